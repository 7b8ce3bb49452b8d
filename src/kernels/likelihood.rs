//! Log-likelihood of the next token and, against a reference, the Kullback-Leibler divergence of the predictions,
//! gathered slice by slice over the vocabulary, so that the logits of a large vocabulary never exist at once.

use crate::kernels::exponential::exp;
use crate::kernels::{maximum, sum_lanes, vectorized};

/// What is known of one prediction after some slices of the vocabulary.
#[derive(Debug, Clone, Copy)]
pub struct Prediction {
    /// Largest logit so far.
    highest: f32,
    /// Σ exp(logit − highest).
    total: f64,
    /// Logit of the token that came.
    target: f32,
    /// Token of the largest logit; the lowest number on ties.
    best: u32,
}

impl Default for Prediction {
    fn default() -> Self {
        Self { highest: f32::NEG_INFINITY, total: 0.0, target: f32::NAN, best: 0 }
    }
}

impl Prediction {
    /// Takes in the logits of the tokens `first..first + logits.len()`; `target` is the token that came.
    pub fn add(&mut self, logits: &[f32], first: u32, target: u32) {
        self.raise(logits, first, target);
        let highest = self.highest;
        self.total += vectorized(
            #[inline(always)]
            || exponentials(logits, highest),
        );
    }

    /// Raises the maximum to that of a new slice; gives the factor by which sums so far shrink.
    fn raise(&mut self, logits: &[f32], first: u32, target: u32) -> f64 {
        if let Some(&logit) = target.checked_sub(first).and_then(|index| logits.get(index as usize)) {
            self.target = logit;
        }
        let highest = vectorized(
            #[inline(always)]
            || maximum(logits),
        );
        if highest <= self.highest {
            return 1.0;
        }
        let index = logits.iter().position(|&logit| logit == highest).unwrap_or(0);
        self.best = first + index as u32;
        let shrink = f64::from(self.highest - highest).exp();
        self.total *= shrink;
        self.highest = highest;
        shrink
    }

    /// ln Σ exp(logit), over what was seen.
    pub fn log_total(&self) -> f64 {
        f64::from(self.highest) + self.total.ln()
    }

    /// −ln p(token that came), in nats.
    pub fn nll(&self) -> f64 {
        self.log_total() - f64::from(self.target)
    }

    /// The most likely token.
    pub fn best(&self) -> u32 {
        self.best
    }
}

/// A prediction beside that of a reference model.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pair {
    /// The model.
    pub model: Prediction,
    /// The reference.
    pub reference: Prediction,
    /// Σ exp(reference − highest reference) · (reference − model).
    cross: f64,
}

impl Pair {
    /// Takes in both models' logits of one slice of the vocabulary.
    pub fn add(&mut self, model: &[f32], reference: &[f32], first: u32, target: u32) {
        self.model.add(model, first, target);
        self.cross *= self.reference.raise(reference, first, target);
        let highest = self.reference.highest;
        let [total, cross] = vectorized(
            #[inline(always)]
            || weighted(model, reference, highest),
        );
        self.reference.total += total;
        self.cross += cross;
    }

    /// KL(reference ‖ model) in nats, never below zero.
    pub fn divergence(&self) -> f64 {
        let value = self.cross / self.reference.total - self.reference.log_total() + self.model.log_total();
        if value < 0.0 { 0.0 } else { value }
    }
}

/// Logits summed in f32 before they join an f64 total.
const BLOCK: usize = 256;

/// Σ exp(logit − highest), in f32 over short blocks and f64 over blocks.
#[inline(always)]
fn exponentials(logits: &[f32], highest: f32) -> f64 {
    logits.chunks(BLOCK).map(|block| f64::from(sum_lanes(block, |logit| exp(logit - highest)))).sum()
}

/// Σ exp(reference − highest) and Σ exp(reference − highest) · (reference − model).
#[inline(always)]
fn weighted(model: &[f32], reference: &[f32], highest: f32) -> [f64; 2] {
    let mut totals = [0.0f64; 2];
    for (model, reference) in model.chunks(BLOCK).zip(reference.chunks(BLOCK)) {
        let mut lanes = [[0.0f32; 16]; 2];
        let (model_chunks, model_rest) = model.as_chunks::<16>();
        let (reference_chunks, reference_rest) = reference.as_chunks::<16>();
        let mut add = |lane: usize, model: f32, reference: f32| {
            let weight = exp(reference - highest);
            lanes[0][lane] += weight;
            lanes[1][lane] += weight * (reference - model);
        };
        for (model, reference) in model_chunks.iter().zip(reference_chunks) {
            for lane in 0..16 {
                add(lane, model[lane], reference[lane]);
            }
        }
        for (lane, (&model, &reference)) in model_rest.iter().zip(reference_rest).enumerate() {
            add(lane, model, reference);
        }
        for (total, lanes) in totals.iter_mut().zip(&lanes) {
            *total += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
        }
    }
    totals
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(seed: u32, count: usize) -> Vec<f32> {
        (0..count as u32).map(|i| ((i * 7919 + seed * 104_729) % 1000) as f32 * 0.017 - 8.0).collect()
    }

    fn exact(logits: &[f32]) -> Vec<f64> {
        let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        logits.iter().map(|&x| f64::from(x) - total.ln()).collect()
    }

    #[test]
    fn any_split_of_the_vocabulary_gives_the_exact_likelihood_and_divergence() {
        let (model, reference) = (logits(1, 531), logits(2, 531));
        let (p, q) = (exact(&reference), exact(&model));
        let divergence: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
        for split in [531, 1, 7, 100] {
            let mut pair = Pair::default();
            for first in (0..531).step_by(split) {
                let end = (first + split).min(531);
                pair.add(&model[first..end], &reference[first..end], first as u32, 77);
            }
            assert!((pair.model.nll() + q[77]).abs() < 1e-6 && (pair.reference.nll() + p[77]).abs() < 1e-6);
            assert!((pair.divergence() - divergence).abs() < 1e-6 * divergence, "{} {divergence}", pair.divergence());
            let best = (0..531).rev().max_by(|&a, &b| model[a].total_cmp(&model[b])).unwrap();
            assert_eq!(pair.model.best() as usize, best);
        }
    }

    #[test]
    fn uniform_logits_have_the_vocabulary_as_perplexity_and_equal_models_no_divergence() {
        let mut pair = Pair::default();
        pair.add(&[0.25; 1000], &[0.25; 1000], 0, 3);
        assert!((pair.model.nll().exp() - 1000.0).abs() < 1e-6);
        assert_eq!((pair.divergence(), pair.model.best()), (0.0, 0));
    }
}
