//! What is known of every scored token of a model, and what figures follow from it.

use crate::error::{Error, Result};
use crate::evaluate::kept::{self, Kept};
use crate::evaluate::sweep::{Logits, Stream, sweep};
use crate::evaluate::{Against, Bos, Protocol, Quality};
use crate::kernels::likelihood::Pair;
use crate::run::Run;
use crate::statistics;

/// One scored token, in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// −ln p(token that came) of the model.
    pub nll: f64,
    /// −ln p(token that came) of the reference; 0 without one.
    pub reference_nll: f64,
    /// KL(reference ‖ model); a lower bound of it beside a compact reference; 0 without one.
    pub divergence: f64,
    /// Whether both find the same token most likely.
    pub agrees: bool,
}

/// What a model is scored beside.
#[derive(Debug, Clone, Copy)]
pub enum Beside<'a> {
    /// Nothing.
    Nothing,
    /// A model on the same windows.
    Stream(&'a Stream<'a, 'a>),
    /// What was kept of a model's predictions on the same windows.
    Kept(&'a Kept),
}

/// Scores of windows.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// By window.
    pub windows: Vec<Vec<Score>>,
    /// Whether there was a reference.
    pub paired: bool,
    /// Whether divergences are lower bounds.
    pub bound: bool,
}

impl Scores {
    /// Scores every window, from the last hidden states. The streams may hold several windows for one, as
    /// [`sweep`] says; scores are then as many.
    ///
    /// # Errors
    /// When a head cannot be read or predictions are not finite.
    pub fn new(own: &Stream<'_, '_>, beside: Beside<'_>, windows: &[Vec<u32>], protocol: Protocol, run: &Run<'_>) -> Result<Self> {
        let (mut scored, paired, bound) = match beside {
            Beside::Nothing => (pairs(&[own], windows, run)?, false, false),
            Beside::Stream(other) => (pairs(&[own, other], windows, run)?, true, false),
            Beside::Kept(kept) => (kept::scores(own, kept, windows, run)?, true, true),
        };
        let finite = |score: &Score| [score.nll, score.reference_nll, score.divergence].iter().all(|value| value.is_finite());
        if !scored.iter().flatten().all(finite) {
            return Err(Error::input("the model gives predictions that are not finite; it is damaged"));
        }
        if protocol.second_half {
            scored.iter_mut().zip(windows).for_each(|(scores, window)| drop(scores.drain(..window.len() / 2)));
        }
        Ok(Self { windows: scored, paired, bound })
    }

    /// The mean of something over every window.
    pub fn means(&self, of: impl Fn(&Score) -> f64) -> Vec<f64> {
        self.windows.iter().map(|window| window.iter().map(&of).sum::<f64>() / window.len() as f64).collect()
    }

    /// Tokens scored.
    pub fn tokens(&self) -> usize {
        self.windows.iter().map(Vec::len).sum()
    }

    /// The figures of windows of `seq` tokens.
    pub fn quality(&self, seq: usize, bos: Bos) -> Quality {
        let tokens = self.tokens();
        let mean = |of: fn(&Score) -> f64| self.windows.iter().flatten().map(of).sum::<f64>() / tokens as f64;
        let error = |of: fn(&Score) -> f64| statistics::mean(&self.means(of)).1;
        let nll = mean(|score| score.nll);
        Quality {
            perplexity: nll.exp().min(f64::MAX),
            nll,
            nll_stderr: error(|score| score.nll),
            tokens,
            windows: self.windows.len(),
            seq,
            bos,
            against: self.paired.then(|| self.against(nll, mean(|score| score.reference_nll))),
        }
    }

    fn against(&self, nll: f64, reference_nll: f64) -> Against {
        let tokens = self.tokens();
        let mut divergences: Vec<f64> = self.windows.iter().flatten().map(|score| score.divergence).collect();
        divergences.sort_by(f64::total_cmp);
        let at = |rank: f64| divergences[(rank.max(0.0) as usize).min(tokens - 1)];
        let (rank, spread) = (0.99 * tokens as f64, (0.99 * 0.01 * tokens as f64).sqrt());
        let error = |of: fn(&Score) -> f64| statistics::mean(&self.means(of)).1;
        let ratio = (nll - reference_nll).exp().min(f64::MAX);
        Against {
            reference_perplexity: reference_nll.exp().min(f64::MAX),
            reference_nll,
            perplexity_ratio: ratio,
            perplexity_ratio_stderr: error(|score| score.nll - score.reference_nll).map(|error| error * ratio),
            kld_mean: divergences.iter().sum::<f64>() / tokens as f64,
            kld_mean_stderr: error(|score| score.divergence),
            kld_is_lower_bound: self.bound,
            kld_median: at(0.5 * tokens as f64),
            kld_p90: at(0.9 * tokens as f64),
            kld_p99: at(rank),
            kld_p99_stderr: (tokens >= 100).then(|| (at(rank + spread) - at(rank - spread)) / 2.0),
            kld_p999: at(0.999 * tokens as f64),
            kld_max: at(tokens as f64),
            top1_agreement: self.windows.iter().flatten().filter(|score| score.agrees).count() as f64 / tokens as f64,
            top1_agreement_stderr: error(|score| f64::from(u8::from(score.agrees))),
        }
    }
}

/// Scores from whole predictions of one model, or of one beside another.
fn pairs(streams: &[&Stream<'_, '_>], windows: &[Vec<u32>], run: &Run<'_>) -> Result<Vec<Vec<Score>>> {
    let repeats = streams[0].hidden.len() / windows.len().max(1);
    let mut pairs: Vec<Vec<Pair>> = windows.iter().flat_map(|window| vec![vec![Pair::default(); window.len() - 1]; repeats]).collect();
    sweep(streams, windows, &mut pairs, run, |pairs, logits| add(pairs, &logits))?;
    let paired = streams.len() > 1;
    let score = |pair: &Pair| Score {
        nll: pair.model.nll(),
        reference_nll: if paired { pair.reference.nll() } else { 0.0 },
        divergence: if paired { pair.divergence() } else { 0.0 },
        agrees: !paired || pair.model.best() == pair.reference.best(),
    };
    Ok(pairs.iter().map(|pairs| pairs.iter().map(score).collect()).collect())
}

fn add(pairs: &mut [Pair], logits: &Logits<'_>) {
    use rayon::prelude::*;
    let width = logits.of[0].len() / pairs.len().max(1);
    pairs.par_iter_mut().enumerate().with_min_len(32).for_each(|(token, pair)| {
        let row = token * width..(token + 1) * width;
        match logits.of {
            [own, other] => pair.add(&own[row.clone()], &other[row], logits.first, logits.targets[token]),
            of => pair.model.add(&of[0][row], logits.first, logits.targets[token]),
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(nll: f64) -> Score {
        Score { nll, reference_nll: 1.0, divergence: nll / 10.0, agrees: nll < 2.5 }
    }

    #[test]
    fn the_figures_follow_hand_computed_ones() {
        let windows = vec![vec![scored(1.0), scored(2.0)], vec![scored(3.0), scored(4.0)]];
        let scores = Scores { windows, paired: true, bound: false };
        let quality = scores.quality(3, Bos::Once);
        assert_eq!((quality.nll, quality.tokens, quality.windows), (2.5, 4, 2));
        assert!((quality.nll_stderr.unwrap() - 1.0).abs() < 1e-12, "window means 1.5 and 3.5");
        let against = quality.against.unwrap();
        assert!((against.perplexity_ratio - 1.5f64.exp()).abs() < 1e-12 && (against.kld_mean - 0.25).abs() < 1e-12);
        assert!((against.top1_agreement - 0.5).abs() < 1e-12 && (against.kld_p99 - 0.4).abs() < 1e-12);
        let single = Scores { windows: scores.windows[..1].to_vec(), paired: false, bound: false };
        assert_eq!(single.quality(3, Bos::None).nll_stderr, None);
    }
}
