//! The verb `compare`: any number of models on the same tokens, beside the first of them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::evaluate::scores::{Beside, Score, Scores};
use crate::evaluate::sweep::Stream;
use crate::evaluate::{self, Protocol, Quality, Text};
use crate::kernels::sampling;
use crate::methods;
use crate::run::Run;
use crate::statistics::{self, Interval};
use crate::subject::{Subject, Weights};

/// Version of the shape of [`Comparison`].
pub const SCHEMA: u32 = 1;

/// Models beside each other.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Comparison {
    /// Version of this shape.
    pub schema: u32,
    /// Version of the program.
    pub drawknife: &'static str,
    /// Name of the text.
    pub text: String,
    /// blake3 of the text.
    pub text_blake3: String,
    /// Windows.
    pub windows: usize,
    /// Tokens scored.
    pub tokens: usize,
    /// One row per model; the first is the reference.
    pub models: Vec<Row>,
}

/// A model.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// blake3 of its configuration and weights.
    pub blake3: String,
    /// Its size.
    #[serde(flatten)]
    pub weights: Weights,
    /// Stored bits per weight of its linear layers.
    pub bits_per_weight: f64,
    /// Its figures; those of the reference are not beside anything.
    pub quality: Quality,
    /// Intervals at 95 %; none for the reference, or where there are too few windows.
    pub intervals: Option<Intervals>,
    /// Whether no other model is both smaller and closer to the reference.
    pub pareto: bool,
    /// ‖W − Ŵ‖² / ‖W‖² of every linear layer, W of the reference, where it was asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub layers: BTreeMap<String, f64>,
}

/// Where the figures lie with 95 % confidence, by the bootstrap over windows.
#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
pub struct Intervals {
    /// Of the ratio of perplexities.
    pub perplexity_ratio: Bounds,
    /// Of the mean divergence.
    pub kld_mean: Bounds,
    /// Of the share of equal most likely tokens.
    pub top1_agreement: Bounds,
}

/// An interval; a bound is absent where the tokens bound nothing.
#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
pub struct Bounds {
    /// The lower bound.
    pub low: Option<f64>,
    /// The upper bound.
    pub high: Option<f64>,
}

impl From<Interval> for Bounds {
    fn from(of: Interval) -> Self {
        let finite = |bound: f64| bound.is_finite().then_some(bound);
        Self { low: finite(of.low), high: finite(of.high) }
    }
}

impl Intervals {
    /// The intervals of scores beside a reference; `None` with too few windows.
    pub fn of(scores: &Scores, seed: u64) -> Option<Self> {
        let interval = |of: fn(&Score) -> f64, number| {
            statistics::mean_interval(&scores.means(of), statistics::LEVEL, sampling::Stream::new(seed).child(number))
        };
        let agrees = scores.means(|score| f64::from(u8::from(score.agrees)));
        Some(Self {
            perplexity_ratio: interval(|score| score.nll - score.reference_nll, 0)?.map(f64::exp).into(),
            kld_mean: interval(|score| score.divergence, 1)?.into(),
            top1_agreement: statistics::share_interval(&agrees, scores.tokens(), statistics::LEVEL, sampling::Stream::new(seed).child(2))?
                .into(),
        })
    }
}

/// Measures models beside the first.
///
/// # Errors
/// When a model cannot be computed or predicts another vocabulary than the first.
pub fn compare(subjects: &[Subject], text: &Text, protocol: Protocol, layers: bool, run: &Run<'_>) -> Result<Comparison> {
    let [first, others @ ..] = subjects else { return Err(Error::input("nothing to compare; give two models or more")) };
    let reference = first.model()?;
    let windows = first.windows(text, protocol)?;
    for other in others {
        evaluate::comparable(&other.model()?, &reference).map_err(|error| error.file(&other.path))?;
        first.shares_tokens(other, text, protocol, &windows)?;
    }
    let stream = Stream::new(&reference, &windows, "evaluate 1", run)?;
    let scores = Scores::new(&stream, Beside::Nothing, &windows, protocol, run)?;
    let mut models = vec![row(first, &scores, protocol, None)?];
    for (number, other) in others.iter().enumerate() {
        let model = other.model()?;
        let own = Stream::new(&model, &windows, &format!("evaluate {}", number + 2), run)?;
        let scores = Scores::new(&own, Beside::Stream(&stream), &windows, protocol, run)?;
        let mut row = row(other, &scores, protocol, Some(run.seed))?;
        if layers {
            row.layers = layer_errors(first, other, run)?;
        }
        models.push(row);
    }
    mark_pareto(&mut models);
    Ok(Comparison {
        schema: SCHEMA,
        drawknife: env!("CARGO_PKG_VERSION"),
        text: text.name.clone(),
        text_blake3: text.blake3.clone(),
        windows: windows.len(),
        tokens: scores.tokens(),
        models,
    })
}

fn row(subject: &Subject, scores: &Scores, protocol: Protocol, seed: Option<u64>) -> Result<Row> {
    let weights = subject.weights()?;
    Ok(Row {
        name: subject.name(),
        path: subject.path.clone(),
        blake3: subject.fingerprint()?,
        weights,
        bits_per_weight: weights.bits_per_weight(),
        quality: scores.quality(protocol.seq, protocol.bos),
        intervals: seed.and_then(|seed| Intervals::of(scores, seed)),
        pareto: false,
        layers: BTreeMap::new(),
    })
}

fn mark_pareto(models: &mut [Row]) {
    let point = |row: &Row| (row.weights.bytes, row.quality.against.as_ref().map_or(0.0, |against| against.kld_mean));
    let points: Vec<_> = models.iter().map(point).collect();
    for (row, own) in models.iter_mut().zip(&points) {
        row.pareto = !points.iter().any(|other| other.0 <= own.0 && other.1 <= own.1 && other != own);
    }
}

/// The relative squared error of every linear layer that both models have.
fn layer_errors(reference: &Subject, other: &Subject, run: &Run<'_>) -> Result<BTreeMap<String, f64>> {
    let linears = reference.linears()?;
    run.observer.begin("compare layers", linears.len() as u64);
    let errors = linears.par_iter().map(|(name, shape)| {
        run.check_stop()?;
        let matrix = |subject: &Subject| Ok::<_, Error>(subject.source.weight(&subject.checkpoint, name, *shape)?.into_matrix());
        let [change, total] = methods::change(&matrix(reference)?.data, &matrix(other).map_err(|error| error.file(&other.path))?.data);
        run.observer.step(1, name);
        Ok((name.clone(), if total > 0.0 { change / total } else { 0.0 }))
    });
    let errors = errors.collect::<Result<BTreeMap<_, _>>>();
    run.observer.end();
    errors
}
