//! Perplexity and, against a reference model, divergence: paired on the same tokens, streamed block by block and
//! through the head slice by slice (protocol: methods-pruning §6).

pub mod contexts;
pub mod kept;
pub mod scores;
pub mod slope;
pub mod sweep;

use std::path::Path;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::calibrate::tokens::Tokenizer;
use crate::calibrate::{builtin, corpus};
use crate::error::{Error, Result};
use crate::evaluate::contexts::TokenView;
use crate::evaluate::scores::{Beside, Scores};
use crate::evaluate::sweep::Stream;
use crate::model::Model;
use crate::run::Run;

/// Where the token that begins a text goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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

/// A text to measure on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// Its name.
    pub name: String,
    /// blake3 of its bytes.
    pub blake3: String,
    /// The text.
    pub content: String,
}

impl Text {
    /// A text file, or the built-in evaluation text.
    ///
    /// # Errors
    /// When the file cannot be read or is not UTF-8.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let (name, content) = match path {
            Some(path) => (path.file_name().unwrap_or_default().to_string_lossy().into_owned(), corpus::read_text(path)?),
            None => (format!("{} evaluation", builtin::VERSION), builtin::evaluation_text()),
        };
        Ok(Self { name, blake3: blake3::hash(content.as_bytes()).to_hex().to_string(), content })
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
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
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
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
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
    /// Whether divergences are lower bounds, because of the reference only the likeliest tokens are known.
    pub kld_is_lower_bound: bool,
    /// Median of KL(reference ‖ model).
    pub kld_median: f64,
    /// 90th percentile.
    pub kld_p90: f64,
    /// 99th percentile of KL(reference ‖ model).
    pub kld_p99: f64,
    /// Standard error of the percentile, by the binomial spread of its rank.
    pub kld_p99_stderr: Option<f64>,
    /// 99.9th percentile.
    pub kld_p999: f64,
    /// The largest.
    pub kld_max: f64,
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
    closely(model, reference, windows, protocol, None, run).map(|(quality, _)| quality)
}

/// As [`measure`]; with a tokenizer and a reference also where the two differ most.
///
/// # Errors
/// As [`measure`].
pub fn closely(
    model: &Model<'_>,
    reference: Option<&Model<'_>>,
    windows: &[Vec<u32>],
    protocol: Protocol,
    tokenizer: Option<&Tokenizer>,
    run: &Run<'_>,
) -> Result<(Quality, Option<TokenView>)> {
    if let Some(reference) = reference {
        comparable(model, reference)?;
    }
    let own = Stream::new(model, windows, "evaluate", run)?;
    let other = reference.map(|reference| Stream::new(reference, windows, "evaluate reference", run)).transpose()?;
    let beside = other.as_ref().map_or(Beside::Nothing, Beside::Stream);
    let scores = Scores::new(&own, beside, windows, protocol, run)?;
    let view = match (&other, tokenizer) {
        (Some(other), Some(tokenizer)) => Some(contexts::view(&own, other, &scores, windows, tokenizer, run)?),
        _ => None,
    };
    Ok((scores.quality(windows[0].len(), protocol.bos), view))
}

/// Refuses models that predict different vocabularies.
///
/// # Errors
/// With both sizes.
pub fn comparable(model: &Model<'_>, reference: &Model<'_>) -> Result<()> {
    let (found, needed) = (model.config.vocabulary, reference.config.vocabulary);
    match found == needed {
        true => Ok(()),
        false => Err(Error::input(format!("the model predicts {found} tokens, the reference {needed}; they cannot be compared"))),
    }
}
