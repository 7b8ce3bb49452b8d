//! Where a compressed model differs most: a histogram of divergences, and the contexts of the largest with what both models
//! expected there.

use schemars::JsonSchema;
use serde::Serialize;

use crate::calibrate::tokens::Tokenizer;
use crate::error::Result;
use crate::evaluate::scores::Scores;
use crate::evaluate::sweep::{Stream, head, norm};
use crate::kernels::likelihood::Prediction;
use crate::kernels::{tensor, values};
use crate::model::forward;
use crate::run::Run;

/// Contexts that are told.
const WORST: usize = 10;

/// Tokens of which the probability is told.
const LIKELIEST: usize = 5;

/// Tokens before the predicted one that are shown.
const BEFORE: usize = 24;

/// How divergences are spread, and where they are largest.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct TokenView {
    /// Divergences by size.
    pub histogram: Vec<Bin>,
    /// Divergences by how certain the original was of its likeliest token.
    pub by_confidence: Vec<Confidence>,
    /// The contexts of the largest divergences, the largest first.
    pub worst: Vec<Context>,
}

/// Tokens whose divergence lies between two bounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, JsonSchema)]
pub struct Bin {
    /// Lower bound in nats.
    pub low: f64,
    /// Upper bound in nats; absent for the last.
    pub high: Option<f64>,
    /// Tokens.
    pub tokens: usize,
}

/// Tokens on which the original was about equally certain.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, JsonSchema)]
pub struct Confidence {
    /// The original's −ln p(token that came) from here on.
    pub low: f64,
    /// The original's −ln p(token that came) up to here; absent for the last.
    pub high: Option<f64>,
    /// Tokens.
    pub tokens: usize,
    /// Their mean divergence.
    pub kld_mean: f64,
}

/// One prediction.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Context {
    /// The window.
    pub window: usize,
    /// The token of the window that was predicted.
    pub position: usize,
    /// The divergence in nats.
    pub divergence: f64,
    /// The text before.
    pub before: String,
    /// The token that came.
    pub came: String,
    /// What the original found likeliest, with probabilities.
    pub original: Vec<(String, f64)>,
    /// What the compressed model found likeliest, with probabilities.
    pub compressed: Vec<(String, f64)>,
}

/// Looks at scores beside a model.
///
/// # Errors
/// When a head or hidden states cannot be read.
pub fn view(
    own: &Stream<'_, '_>,
    other: &Stream<'_, '_>,
    scores: &Scores,
    windows: &[Vec<u32>],
    tokenizer: &Tokenizer,
    run: &Run<'_>,
) -> Result<TokenView> {
    // With the second half of windows scored, the first score is not that of the second token.
    let skipped = |window: usize| windows[window].len() - 1 - scores.windows[window].len();
    let mut places: Vec<(usize, usize, f64)> = Vec::new();
    for (window, of) in scores.windows.iter().enumerate() {
        places.extend(of.iter().enumerate().map(|(at, score)| (window, at + skipped(window), score.divergence)));
    }
    places.sort_by(|a, b| b.2.total_cmp(&a.2).then((a.0, a.1).cmp(&(b.0, b.1))));
    places.truncate(WORST);
    let likeliest = [likeliest(other, &places, run)?, likeliest(own, &places, run)?];
    let text = |tokens: &[u32]| tokenizer.decode(tokens);
    let contexts = places.iter().enumerate().map(|(number, &(window, at, divergence))| {
        let tokens = &windows[window];
        let named = |of: &[(u32, f64)]| of.iter().map(|&(token, share)| (text(&[token]), share)).collect();
        Context {
            window,
            position: at + 1,
            divergence,
            before: text(&tokens[(at + 1).saturating_sub(BEFORE)..=at]),
            came: text(&tokens[at + 1..at + 2]),
            original: named(&likeliest[0][number]),
            compressed: named(&likeliest[1][number]),
        }
    });
    Ok(TokenView { histogram: histogram(scores), by_confidence: by_confidence(scores), worst: contexts.collect() })
}

/// Divergences in bins that grow by half a power of ten, from 10⁻⁵ nats to 10.
fn histogram(scores: &Scores) -> Vec<Bin> {
    let edges: Vec<f64> = std::iter::once(0.0).chain((-10..=2).map(|half| 10f64.powf(f64::from(half) / 2.0))).collect();
    let mut bins: Vec<Bin> =
        edges.iter().enumerate().map(|(number, &low)| Bin { low, high: edges.get(number + 1).copied(), tokens: 0 }).collect();
    for score in scores.windows.iter().flatten() {
        let number = edges.partition_point(|edge| *edge <= score.divergence);
        bins[number.saturating_sub(1)].tokens += 1;
    }
    bins
}

fn by_confidence(scores: &Scores) -> Vec<Confidence> {
    let edges = [0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0];
    let group = |(number, &low): (usize, &f64)| {
        let high = edges.get(number + 1).copied();
        let inside = scores
            .windows
            .iter()
            .flatten()
            .filter(|score| score.reference_nll >= low && high.is_none_or(|high| score.reference_nll < high));
        let divergences: Vec<f64> = inside.map(|score| score.divergence).collect();
        let tokens = divergences.len();
        Confidence { low, high, tokens, kld_mean: divergences.iter().sum::<f64>() / tokens.max(1) as f64 }
    };
    edges.iter().enumerate().map(group).collect()
}

/// The likeliest tokens of a model at some places, with probabilities.
fn likeliest(stream: &Stream<'_, '_>, places: &[(usize, usize, f64)], run: &Run<'_>) -> Result<Vec<Vec<(u32, f64)>>> {
    let (model, device) = (stream.model, &run.device.burn);
    let width = model.config.hidden;
    let mut states = Vec::new();
    for &(window, at, _) in places {
        states.extend_from_slice(&stream.hidden.read(window..window + 1)?[at * width..(at + 1) * width]);
    }
    let normed = forward::final_norm(&model.config, &tensor(states, [places.len(), width], device), &norm(model, device)?);
    let mut found: Vec<(Prediction, Vec<(f32, u32)>)> = vec![(Prediction::default(), Vec::new()); places.len()];
    for slice in model.head_slices() {
        let logits = values(forward::logits(&model.config, normed.clone(), head(model, slice.clone(), device)?));
        for ((prediction, best), row) in found.iter_mut().zip(logits.chunks(slice.len().max(1))) {
            prediction.add(row, slice.start as u32, 0);
            best.extend(row.iter().copied().zip(slice.start as u32..));
            best.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            best.truncate(LIKELIEST);
        }
    }
    let shares = found
        .iter()
        .map(|(prediction, best)| best.iter().map(|&(logit, token)| (token, (f64::from(logit) - prediction.log_total()).exp())).collect());
    Ok(shares.collect())
}
