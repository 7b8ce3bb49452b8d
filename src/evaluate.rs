//! Perplexity and, against a reference model, divergence: paired on the same tokens, streamed block by block and
//! through the head slice by slice (protocol: methods-pruning §6).

use std::ops::Range;
use std::str::FromStr;

use burn::tensor::Tensor;
use rayon::prelude::*;
use serde::Serialize;

use crate::calibrate::tokens::Tokenizer;
use crate::error::{Error, Result};
use crate::kernels::likelihood::Pair;
use crate::kernels::{tensor, values};
use crate::model::hidden::{Hidden, Keeping};
use crate::model::walk::{Pass, embed, walk};
use crate::model::{Model, forward};
use crate::run::Run;

/// Tokens whose logits exist at once, per thread.
const TOKENS_AT_ONCE: usize = 512;

/// Where the token that begins a text goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bos {
    /// The tokenizer's own special tokens, once, around the text.
    Once,
    /// It replaces the first token of every window.
    Window,
    /// Nowhere.
    None,
}

impl FromStr for Bos {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "once" => Ok(Self::Once),
            "window" => Ok(Self::Window),
            "none" => Ok(Self::None),
            _ => Err("use once, window or none".into()),
        }
    }
}

/// How a text becomes windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protocol {
    /// Tokens per window.
    pub seq: usize,
    /// Tokens of the text that are used at most.
    pub max_tokens: Option<usize>,
    /// Where the token that begins a text goes.
    pub bos: Bos,
    /// As llama.cpp's perplexity tool does it: only the second half of every window is scored, and windows begin with the
    /// token that begins a text where the tokenizer puts one before texts.
    pub second_half: bool,
}

/// What was measured, in nats. Standard errors are over windows, because tokens of a window are not independent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Quality {
    /// exp(nll).
    pub perplexity: f64,
    /// Mean negative log-likelihood of a scored token.
    pub nll: f64,
    /// Standard error of `nll`; absent with a single window.
    pub nll_stderr: Option<f64>,
    /// Tokens scored: all but the first of every window.
    pub tokens: usize,
    /// Windows.
    pub windows: usize,
    /// Tokens per window.
    pub seq: usize,
    /// Where the token that begins a text went.
    pub bos: Bos,
    /// What a reference model adds.
    #[serde(flatten)]
    pub against: Option<Against>,
}

/// The comparison with a reference model on the same tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Against {
    /// Perplexity of the reference.
    pub reference_perplexity: f64,
    /// Mean negative log-likelihood of the reference.
    pub reference_nll: f64,
    /// Perplexity over that of the reference.
    pub perplexity_ratio: f64,
    /// Standard error of the ratio, from paired differences.
    pub perplexity_ratio_stderr: Option<f64>,
    /// Mean of KL(reference ‖ model).
    pub kld_mean: f64,
    /// Standard error of the mean.
    pub kld_mean_stderr: Option<f64>,
    /// Median of KL(reference ‖ model).
    pub kld_median: f64,
    /// 99th percentile of KL(reference ‖ model).
    pub kld_p99: f64,
    /// Standard error of the percentile, by the binomial spread of its rank.
    pub kld_p99_stderr: Option<f64>,
    /// Share of tokens on which both models find the same token most likely.
    pub top1_agreement: f64,
    /// Standard error of the share.
    pub top1_agreement_stderr: Option<f64>,
}

/// Cuts a text into windows: non-overlapping, the tail dropped.
///
/// # Errors
/// When the text is shorter than one window or the tokenizer fails.
pub fn windows(text: &str, tokenizer: &Tokenizer, protocol: Protocol, bos: Option<u32>) -> Result<Vec<Vec<u32>>> {
    if protocol.seq < 2 {
        return Err(Error::input(format!("windows of {} tokens predict nothing; use --seq 2 or more", protocol.seq)));
    }
    let tokens = tokenizer.encode(text, protocol.bos == Bos::Once, protocol.max_tokens)?;
    let mut windows: Vec<Vec<u32>> = tokens.chunks_exact(protocol.seq).map(<[u32]>::to_vec).collect();
    if windows.is_empty() {
        return Err(Error::input(format!(
            "the text gives {} tokens, one window needs {}; give more text or a smaller --seq",
            tokens.len(),
            protocol.seq
        )));
    }
    if protocol.second_half
        && let Some(bos) =
            bos.filter(|bos| tokens.first() == Some(bos) && !tokenizer.encode(text, false, Some(1)).is_ok_and(|first| first == [*bos]))
    {
        windows.iter_mut().for_each(|window| window[0] = bos);
    }
    if protocol.bos == Bos::Window {
        let bos = bos.ok_or_else(|| Error::input("--bos window: the model names no token that begins a text; use --bos none"))?;
        windows.iter_mut().for_each(|window| window[0] = bos);
    }
    Ok(windows)
}

/// Measures a model on windows of equal length, beside a reference where there is one.
///
/// # Errors
/// When a model cannot be read or gives values that are not finite.
pub fn measure(
    model: &Model<'_>,
    reference: Option<&Model<'_>>,
    windows: &[Vec<u32>],
    protocol: Protocol,
    run: &Run<'_>,
) -> Result<Quality> {
    if let Some(reference) = reference
        && reference.config.vocabulary != model.config.vocabulary
    {
        let (found, needed) = (model.config.vocabulary, reference.config.vocabulary);
        return Err(Error::input(format!("the model predicts {found} tokens, the reference {needed}; they cannot be compared")));
    }
    let last = |model: &Model<'_>, stage: &str| -> Result<Hidden> {
        let mut hidden = embed(model, windows, Keeping::EXACT, run)?;
        walk(model, &mut hidden, stage, run, &mut Pass)?;
        Ok(hidden)
    };
    let own = last(model, "evaluate")?;
    let other = reference.map(|reference| last(reference, "evaluate reference")).transpose()?;
    let mut scores = score(model, &own, reference.zip(other.as_ref()), windows, run)?;
    if protocol.second_half {
        scores.iter_mut().for_each(|scores| drop(scores.drain(..windows[0].len() / 2)));
    }
    Ok(summary(&scores, windows[0].len(), protocol.bos, reference.is_some()))
}

/// One scored token.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Score {
    nll: f64,
    reference_nll: f64,
    divergence: f64,
    agrees: bool,
}

/// Scores of every window, from the last hidden states.
fn score(
    model: &Model<'_>,
    own: &Hidden,
    reference: Option<(&Model<'_>, &Hidden)>,
    windows: &[Vec<u32>],
    run: &Run<'_>,
) -> Result<Vec<Vec<Score>>> {
    let device = &run.device.burn;
    let slices: Vec<_> = model.head_slices().collect();
    let mut pairs: Vec<Vec<Pair>> = windows.iter().map(|window| vec![Pair::default(); window.len() - 1]).collect();
    let weight = |model: &Model<'_>| -> Result<Tensor<1>> {
        let weight = model.final_norm()?;
        let width = weight.len();
        Ok(tensor(weight, [width], device))
    };
    let own_norm = weight(model)?;
    let reference_norm = reference.map(|(reference, _)| weight(reference)).transpose()?;
    run.observer.begin("score", (slices.len() * windows.len()) as u64);
    for slice in slices {
        let rows = |model: &Model<'_>| -> Result<Tensor<2>> {
            let rows = model.head_rows(slice.clone())?;
            Ok(tensor(rows.data, [rows.rows, rows.columns], device))
        };
        let own_head = rows(model)?;
        let reference_head = reference.map(|(reference, _)| rows(reference)).transpose()?;
        let logits = |model: &Model<'_>, states: &[f32], tokens: Range<usize>, norm: &Tensor<1>, head: &Tensor<2>| {
            let (width, count) = (model.config.hidden, tokens.len());
            let x: Tensor<2> = tensor(states[tokens.start * width..tokens.end * width].to_vec(), [count, width], device);
            values(forward::logits(&model.config, forward::final_norm(&model.config, &x, norm), head.clone()))
        };
        for first in (0..windows.len()).step_by(rayon::current_num_threads()) {
            run.check_stop()?;
            let batch = first..(first + rayon::current_num_threads()).min(windows.len());
            pairs[batch.clone()].par_iter_mut().zip(batch.clone()).try_for_each(|(pairs, window)| -> Result<()> {
                let states = own.read(window..window + 1)?;
                let other_states = reference.map(|(_, hidden)| hidden.read(window..window + 1)).transpose()?;
                for (number, pairs) in pairs.chunks_mut(TOKENS_AT_ONCE).enumerate() {
                    let first = number * TOKENS_AT_ONCE;
                    let tokens = first..first + pairs.len();
                    let own = logits(model, &states, tokens.clone(), &own_norm, &own_head);
                    let other = match (reference, &other_states, &reference_norm, &reference_head) {
                        (Some((reference, _)), Some(states), Some(norm), Some(head)) => Some(logits(reference, states, tokens, norm, head)),
                        _ => None,
                    };
                    let targets = &windows[window][first + 1..];
                    add_logits(pairs, &own, other.as_deref(), slice.start as u32, targets);
                }
                Ok(())
            })?;
            run.observer.step(batch.len() as u64, "");
        }
    }
    run.observer.end();
    let paired = reference.is_some();
    let score = |pair: &Pair| Score {
        nll: pair.model.nll(),
        reference_nll: if paired { pair.reference.nll() } else { 0.0 },
        divergence: if paired { pair.divergence() } else { 0.0 },
        agrees: pair.model.best() == pair.reference.best(),
    };
    let scores: Vec<Vec<Score>> = pairs.iter().map(|pairs| pairs.iter().map(score).collect()).collect();
    match scores.iter().flatten().find(|score| ![score.nll, score.reference_nll, score.divergence].iter().all(|value| value.is_finite())) {
        Some(_) => Err(Error::run("the model gives predictions that are not finite; it is damaged")),
        None => Ok(scores),
    }
}

/// Takes the logits of one slice of the vocabulary, which begins at `first`, into the predictions of some tokens.
fn add_logits(pairs: &mut [Pair], own: &[f32], other: Option<&[f32]>, first: u32, targets: &[u32]) {
    let width = own.len() / pairs.len().max(1);
    pairs.par_iter_mut().enumerate().with_min_len(32).for_each(|(token, pair)| {
        let row = token * width..(token + 1) * width;
        match other {
            Some(other) => pair.add(&own[row.clone()], &other[row], first, targets[token]),
            None => pair.model.add(&own[row], first, targets[token]),
        }
    });
}

fn summary(scores: &[Vec<Score>], seq: usize, bos: Bos, paired: bool) -> Quality {
    let tokens = scores.iter().map(Vec::len).sum::<usize>();
    let mean = |of: fn(&Score) -> f64| scores.iter().flatten().map(of).sum::<f64>() / tokens as f64;
    let stderr = |of: fn(&Score) -> f64| standard_error(scores, of);
    let nll = mean(|score| score.nll);
    let against = paired.then(|| {
        let mut divergences: Vec<f64> = scores.iter().flatten().map(|score| score.divergence).collect();
        divergences.sort_by(f64::total_cmp);
        let at = |rank: f64| divergences[(rank.max(0.0) as usize).min(tokens - 1)];
        let (rank, spread) = (0.99 * tokens as f64, (0.99 * 0.01 * tokens as f64).sqrt());
        let reference_nll = mean(|score| score.reference_nll);
        let ratio = (nll - reference_nll).exp().min(f64::MAX);
        Against {
            reference_perplexity: reference_nll.exp().min(f64::MAX),
            reference_nll,
            perplexity_ratio: ratio,
            perplexity_ratio_stderr: stderr(|score| score.nll - score.reference_nll).map(|error| error * ratio),
            kld_mean: mean(|score| score.divergence),
            kld_mean_stderr: stderr(|score| score.divergence),
            kld_median: at(0.5 * tokens as f64),
            kld_p99: at(rank),
            kld_p99_stderr: (tokens >= 100).then(|| (at(rank + spread) - at(rank - spread)) / 2.0),
            top1_agreement: mean(|score| f64::from(u8::from(score.agrees))),
            top1_agreement_stderr: stderr(|score| f64::from(u8::from(score.agrees))),
        }
    });
    Quality {
        perplexity: nll.exp().min(f64::MAX),
        nll,
        nll_stderr: stderr(|score| score.nll),
        tokens,
        windows: scores.len(),
        seq,
        bos,
        against,
    }
}

/// Standard error of a mean over windows; `None` with fewer than two.
fn standard_error(scores: &[Vec<Score>], of: impl Fn(&Score) -> f64) -> Option<f64> {
    let means: Vec<f64> = scores.iter().map(|window| window.iter().map(&of).sum::<f64>() / window.len() as f64).collect();
    let count = means.len() as f64;
    let mean = means.iter().sum::<f64>() / count;
    let variance = means.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
    (means.len() > 1).then(|| (variance / count).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(nll: f64) -> Score {
        Score { nll, reference_nll: 1.0, divergence: nll / 10.0, agrees: nll < 2.5 }
    }

    #[test]
    fn the_summary_follows_hand_computed_figures() {
        let scores = vec![vec![scored(1.0), scored(2.0)], vec![scored(3.0), scored(4.0)]];
        let quality = summary(&scores, 3, Bos::Once, true);
        assert_eq!((quality.nll, quality.tokens, quality.windows), (2.5, 4, 2));
        assert!((quality.nll_stderr.unwrap() - 1.0).abs() < 1e-12, "window means 1.5 and 3.5");
        let against = quality.against.unwrap();
        assert!((against.perplexity_ratio - 1.5f64.exp()).abs() < 1e-12 && (against.kld_mean - 0.25).abs() < 1e-12);
        assert!((against.top1_agreement - 0.5).abs() < 1e-12 && (against.kld_p99 - 0.4).abs() < 1e-12);
        assert_eq!(summary(&scores[..1], 3, Bos::None, false).nll_stderr, None);
    }
}
