//! A compact reference: of every prediction of a model the most likely tokens with their log-probabilities, and the mass
//! of all others together. Half a kilobyte per token instead of a whole vocabulary, so that a comparison needs the large
//! model only once. The divergence from it is that of distributions with all other tokens merged into one, which by the
//! data-processing inequality is at most the divergence of the whole predictions.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::evaluate::scores::Score;
use crate::evaluate::sweep::{Stream, sweep};
use crate::kernels::likelihood::Prediction;
use crate::run::Run;

/// Tokens of which the log-probability is kept.
pub const KEPT: usize = 64;

/// Less mass than this of all other tokens is not told apart from this much, because sums in single precision do not.
const LEAST_TAIL: f64 = 1e-7;

/// A name in the metadata of the file.
const IDENTITY: &str = "drawknife_reference";

/// What a compact reference was made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Version of this shape; 1.
    pub schema: u32,
    /// blake3 of the model's weights and configuration.
    pub model: String,
    /// blake3 of its tokenizer.json.
    pub tokenizer: String,
    /// blake3 of the text.
    pub text: String,
    /// Tokens per window.
    pub seq: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
}

/// What is kept of a model's predictions on windows of equal length.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// What it was made of.
    pub identity: Identity,
    /// The windows, seq tokens each.
    pub windows: Vec<Vec<u32>>,
    /// Most likely tokens of every prediction, the likeliest first; tokens × [`KEPT`] or × the vocabulary where that is smaller.
    ids: Vec<u32>,
    /// Their log-probabilities in nats.
    logs: Vec<f32>,
    /// ln of the probability of all others; −∞ where there are none.
    tails: Vec<f32>,
    /// −ln p(token that came).
    nlls: Vec<f32>,
}

/// The likeliest tokens of a prediction as far as the vocabulary was seen.
#[derive(Debug, Clone, Default)]
struct Likeliest {
    prediction: Prediction,
    /// Logit and token.
    best: Vec<(f32, u32)>,
}

impl Likeliest {
    fn add(&mut self, logits: &[f32], first: u32, target: u32) {
        self.prediction.add(logits, first, target);
        let least = if self.best.len() < KEPT { f32::NEG_INFINITY } else { self.best[KEPT - 1].0 };
        let more = logits.iter().zip(first..).filter(|(logit, _)| **logit > least || self.best.len() < KEPT);
        self.best.extend(more.map(|(&logit, token)| (logit, token)).collect::<Vec<_>>());
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if self.best.len() > KEPT {
            self.best.select_nth_unstable_by(KEPT - 1, order);
            self.best.truncate(KEPT);
        }
        self.best.sort_by(order);
    }
}

impl Kept {
    /// Keeps the predictions of a model on windows of equal length.
    ///
    /// # Errors
    /// When the head cannot be read or predictions are not finite.
    pub fn new(stream: &Stream<'_, '_>, windows: &[Vec<u32>], identity: Identity, run: &Run<'_>) -> Result<Self> {
        let mut states: Vec<Vec<Likeliest>> = windows.iter().map(|window| vec![Likeliest::default(); window.len() - 1]).collect();
        sweep(&[stream], windows, &mut states, run, |states, logits| {
            logits.each(states, |state, row, target| state.add(row, logits.first, target));
        })?;
        let mut kept = Self { identity, windows: windows.to_vec(), ids: Vec::new(), logs: Vec::new(), tails: Vec::new(), nlls: Vec::new() };
        for state in states.iter().flatten() {
            let total = state.prediction.log_total();
            if !total.is_finite() || !state.prediction.nll().is_finite() {
                return Err(Error::input("the model gives predictions that are not finite; it is damaged"));
            }
            let logs = state.best.iter().map(|&(logit, _)| f64::from(logit) - total);
            let tail = if state.best.len() == kept.identity.vocabulary { 0.0 } else { 1.0 - logs.clone().map(f64::exp).sum::<f64>() };
            kept.ids.extend(state.best.iter().map(|&(_, token)| token));
            kept.logs.extend(logs.map(|log| log as f32));
            kept.tails.push(if tail == 0.0 { f32::NEG_INFINITY } else { tail.max(LEAST_TAIL).ln() as f32 });
            kept.nlls.push(state.prediction.nll() as f32);
        }
        Ok(kept)
    }

    /// Tokens kept of every prediction.
    fn width(&self) -> usize {
        KEPT.min(self.identity.vocabulary)
    }

    /// What is kept of some of the windows; windows beyond the last are left out.
    #[must_use]
    pub fn part(&self, windows: std::ops::Range<usize>) -> Self {
        let (scored, width) = (self.identity.seq - 1, self.width());
        let windows = windows.start.min(self.windows.len())..windows.end.min(self.windows.len());
        let tokens = windows.start * scored..windows.end * scored;
        let listed = tokens.start * width..tokens.end * width;
        Self {
            identity: self.identity.clone(),
            windows: self.windows[windows].to_vec(),
            ids: self.ids[listed.clone()].to_vec(),
            logs: self.logs[listed].to_vec(),
            tails: self.tails[tokens.clone()].to_vec(),
            nlls: self.nlls[tokens].to_vec(),
        }
    }

    /// A safetensors file of it.
    ///
    /// # Errors
    /// When its tensors do not fit together.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let (predictions, width) = (self.nlls.len(), self.width());
        let tokens: Vec<u32> = self.windows.concat();
        let view = |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes);
        let tensors = [
            ("tokens", view(Dtype::U32, &[self.windows.len(), self.identity.seq], bytemuck::cast_slice(&tokens))),
            ("likeliest", view(Dtype::U32, &[predictions, width], bytemuck::cast_slice(&self.ids))),
            ("log_probability", view(Dtype::F32, &[predictions, width], bytemuck::cast_slice(&self.logs))),
            ("log_tail", view(Dtype::F32, &[predictions], bytemuck::cast_slice(&self.tails))),
            ("nll", view(Dtype::F32, &[predictions], bytemuck::cast_slice(&self.nlls))),
        ];
        let failed = |what: String| Error::run(format!("reference file: {what}"));
        let tensors = tensors.into_iter().map(|(name, view)| Ok((name, view?))).collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
        let tensors = tensors.map_err(|error| failed(error.to_string()))?;
        let identity = serde_json::to_string(&self.identity).map_err(|error| failed(error.to_string()))?;
        let bytes = safetensors::serialize(tensors, Some(HashMap::from([(IDENTITY.into(), identity)])));
        let bytes = bytes.map_err(|error| failed(error.to_string()))?;
        Ok(bytes)
    }

    /// Reads a file that [`Self::to_bytes`] made, and checks all of it.
    ///
    /// # Errors
    /// When it is something else or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| Error::unreadable(path, &error))?;
        Self::read(&bytes).map_err(|error| error.file(path))
    }

    fn read(bytes: &[u8]) -> Result<Self> {
        let wrong = |what: &str| Error::input(format!("{what}; make the reference again with --save-reference"));
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| wrong(&format!("not a reference file: {error}")))?;
        let identity =
            metadata.metadata().as_ref().and_then(|metadata| metadata.get(IDENTITY)).ok_or_else(|| wrong("not a reference file"))?;
        let identity: Identity = serde_json::from_str(identity).map_err(|error| wrong(&format!("its identity: {error}")))?;
        if identity.schema != 1 || identity.seq < 2 {
            return Err(wrong(&format!("schema {} with windows of {} tokens is not known", identity.schema, identity.seq)));
        }
        let file = SafeTensors::deserialize(bytes).map_err(|error| wrong(&error.to_string()))?;
        let words = |name: &str, dtype: Dtype| -> Result<Vec<u32>> {
            let tensor = file.tensor(name).map_err(|error| wrong(&error.to_string()))?;
            match tensor.dtype() == dtype {
                true => Ok(tensor.data().as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()),
                false => Err(wrong(&format!("tensor {name} is of another type"))),
            }
        };
        let floats = |name| Ok(words(name, Dtype::F32)?.into_iter().map(f32::from_bits).collect::<Vec<f32>>());
        let windows: Vec<Vec<u32>> = words("tokens", Dtype::U32)?.chunks(identity.seq).map(<[u32]>::to_vec).collect();
        let kept = Self {
            windows,
            ids: words("likeliest", Dtype::U32)?,
            logs: floats("log_probability")?,
            tails: floats("log_tail")?,
            nlls: floats("nll")?,
            identity,
        };
        let predictions = kept.windows.len() * (kept.identity.seq - 1);
        let sizes = [kept.tails.len(), kept.nlls.len()];
        let listed = [kept.ids.len(), kept.logs.len()];
        let whole = kept.windows.iter().all(|window| window.len() == kept.identity.seq) && predictions > 0;
        if !whole || sizes != [predictions; 2] || listed != [predictions * kept.width(); 2] {
            return Err(wrong("its tensors do not fit together"));
        }
        let known = |token: &u32| (*token as usize) < kept.identity.vocabulary;
        let sound = kept.ids.iter().chain(kept.windows.iter().flatten()).all(known)
            && kept.logs.iter().all(|log| log.is_finite() && *log <= 1e-3)
            && kept.tails.iter().all(|tail| !tail.is_nan() && *tail <= 1e-3)
            && kept.nlls.iter().all(|nll| nll.is_finite());
        if sound { Ok(kept) } else { Err(wrong("tokens or probabilities are out of their range")) }
    }
}

/// A prediction with the logits of some tokens.
#[derive(Debug, Clone)]
struct Listed {
    prediction: Prediction,
    ids: std::ops::Range<usize>,
    logits: Vec<f32>,
}

/// Scores of a model beside what was kept of another on windows that begin with these.
///
/// # Errors
/// When the windows are others, or the head cannot be read.
pub fn scores(own: &Stream<'_, '_>, kept: &Kept, windows: &[Vec<u32>], run: &Run<'_>) -> Result<Vec<Vec<Score>>> {
    if kept.windows.get(..windows.len()) != Some(windows) {
        return Err(Error::input("the reference file holds predictions of other tokens; make it again with --save-reference"));
    }
    let (width, scored) = (kept.width(), kept.identity.seq - 1);
    let listed = |prediction: usize| Listed {
        prediction: Prediction::default(),
        ids: prediction * width..(prediction + 1) * width,
        logits: vec![f32::NAN; width],
    };
    let mut states: Vec<Vec<Listed>> =
        (0..windows.len()).map(|window| (window * scored..(window + 1) * scored).map(listed).collect()).collect();
    sweep(&[own], windows, &mut states, run, |states, logits| {
        logits.each(states, |state, row, target| {
            state.prediction.add(row, logits.first, target);
            for (kept, id) in state.logits.iter_mut().zip(&kept.ids[state.ids.clone()]) {
                if let Some(logit) = id.checked_sub(logits.first).and_then(|index| row.get(index as usize)) {
                    *kept = *logit;
                }
            }
        });
    })?;
    let score = |(prediction, state): (usize, &Listed)| Score {
        nll: state.prediction.nll(),
        reference_nll: f64::from(kept.nlls[prediction]),
        divergence: divergence(&kept.logs[state.ids.clone()], kept.tails[prediction], state),
        agrees: state.prediction.best() == kept.ids[state.ids.start],
    };
    Ok(states.iter().enumerate().map(|(window, states)| (window * scored..).zip(states).map(score).collect()).collect())
}

/// Σ p (ln p − ln q) over the listed tokens and the rest as one.
fn divergence(logs: &[f32], tail: f32, state: &Listed) -> f64 {
    let total = state.prediction.log_total();
    let (mut sum, mut mass) = (0.0, 0.0);
    for (&log, &logit) in logs.iter().zip(&state.logits) {
        let (p, q) = (f64::from(log), f64::from(logit) - total);
        sum += p.exp() * (p - q);
        mass += q.exp();
    }
    if tail > f32::NEG_INFINITY {
        let tail = f64::from(tail);
        sum += tail.exp() * (tail - (1.0 - mass).max(LEAST_TAIL).ln());
    }
    sum.max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> Kept {
        let identity = Identity { schema: 1, model: "m".into(), tokenizer: "t".into(), text: "x".into(), seq: 3, vocabulary: 4 };
        let logs = [0.5f32, 0.25, 0.15, 0.1].map(f32::ln);
        Kept {
            identity,
            windows: vec![vec![0, 1, 2], vec![3, 0, 1]],
            ids: [2, 0, 1, 3].repeat(4),
            logs: logs.repeat(4),
            tails: vec![f32::NEG_INFINITY; 4],
            nlls: vec![1.0; 4],
        }
    }

    #[test]
    fn a_reference_comes_back_from_its_bytes_and_its_parts_are_its_windows() {
        let kept = kept();
        assert_eq!(Kept::read(&kept.to_bytes().unwrap()).unwrap(), kept);
        let part = kept.part(1..2);
        assert_eq!((part.windows.clone(), part.ids.len(), part.tails.len()), (vec![vec![3, 0, 1]], 8, 2));
        assert_eq!(Kept::read(&part.to_bytes().unwrap()).unwrap(), part);
    }

    #[test]
    fn no_cut_and_no_flipped_byte_makes_it_fail_otherwise_than_by_an_error() {
        let bytes = kept().to_bytes().unwrap();
        for length in 0..bytes.len() {
            assert!(Kept::read(&bytes[..length]).is_err(), "{length}");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0xff;
            let _ = Kept::read(&damaged);
        }
        let mut other = kept();
        other.ids[3] = 4;
        assert!(Kept::read(&other.to_bytes().unwrap()).is_err(), "a token beyond the vocabulary");
        other = kept();
        other.logs[0] = f32::NAN;
        assert!(Kept::read(&other.to_bytes().unwrap()).is_err());
    }

    #[test]
    fn with_all_tokens_listed_the_divergence_is_the_whole_one_and_merging_lowers_it() {
        let p = [0.5f64, 0.25, 0.15, 0.1];
        let q = [0.3f64, 0.4, 0.1, 0.2];
        let logits: Vec<f32> = q.iter().map(|q| q.ln() as f32 + 3.0).collect();
        let mut prediction = Prediction::default();
        prediction.add(&logits, 0, 0);
        let of = |listed: usize| {
            let logs: Vec<f32> = p[..listed].iter().map(|p| p.ln() as f32).collect();
            let rest: f64 = p[listed..].iter().sum();
            let tail = if listed == 4 { f32::NEG_INFINITY } else { rest.ln() as f32 };
            divergence(&logs, tail, &Listed { prediction, ids: 0..listed, logits: logits[..listed].to_vec() })
        };
        let whole: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        let merged = 0.5 * (0.5f64 / 0.3).ln() + 0.25 * (0.25f64 / 0.4).ln() + 0.25 * (0.25f64 / 0.3).ln();
        assert!((of(4) - whole).abs() < 1e-6 && (of(2) - merged).abs() < 1e-6 && of(2) < of(4), "{} {whole} {} {merged}", of(4), of(2));
    }
}
