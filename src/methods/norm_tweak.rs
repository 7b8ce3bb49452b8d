//! Norm tweaking: the norms of a compressed block are tuned so that its output has the channel statistics of the original
//! block's.
//!
//! Source: Li et al., "Norm Tweaking: High-performance Low-bit Quantization of Large Language Models",
//! arXiv:2309.02784, algorithm 1 and the channel-wise loss, as specified in methods-quant §2. The reference is the
//! original block on the compressed stream (its own error only); Adam with one step per window, fresh for every block;
//! the learning rate grows with depth: lr · (1 + slope · l / L). Losses: `dist-abs` (the paper), `dist-sq` (the authors'
//! code), `mse`.
//!
//! Beyond the paper: windows are held out, and a block keeps its old norms when its error on them rises. Norms are
//! stored in f32, because their steps are below what 16 bits resolve. Needs both streams; changes only norms.

use crate::error::{Error, Result};
use crate::kernels::channels::channels;
use crate::methods::{Applied, BlockApplied, BlockLayer, BlockMethod, Layer, Method};
use crate::model::backward::Gradients;
use crate::model::bench::Bench;
use crate::model::block::Place;
use crate::model::seen::Needs;
use crate::weight::{Storage, Weight};

/// Of this many windows one is held out.
pub(crate) const HELD_OUT: usize = 10;

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// (1/C) Σ_c |μ_f − μ_q| + |σ_f² − σ_q²|.
    #[serde(alias = "dist_abs")]
    DistAbs,
    /// Σ_c (μ_f − μ_q)² + (σ_f − σ_q)².
    #[default]
    #[serde(alias = "dist_sq")]
    DistSq,
    /// The mean of (y_f − y_q)².
    Mse,
}

/// Options of norm tweaking.
#[derive(Debug, Clone, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct NormTweak {
    /// What is compared.
    pub loss: Loss,
    /// Learning rate of the first block.
    pub lr: f64,
    /// How much the learning rate grows with depth.
    pub slope: f64,
    /// Rounds over all windows.
    pub iters: usize,
    /// Whether norms of queries and keys are tuned too.
    pub qk_norms: bool,
}

impl Default for NormTweak {
    fn default() -> Self {
        Self { loss: Loss::default(), lr: 1e-5, slope: 10.0, iters: 1, qk_norms: false }
    }
}

impl NormTweak {
    /// The learning rate of a block: lr · (1 + slope · l / L).
    fn rate(&self, block: usize, blocks: usize) -> f64 {
        self.lr * (1.0 + self.slope * block as f64 / blocks as f64)
    }
}

impl Method for NormTweak {
    fn needs(&self) -> Needs {
        Needs::Streams
    }

    fn leaves(&self, before: Storage, _: [usize; 2], _: Option<u8>) -> Result<Storage> {
        for (name, value, most) in [("lr", self.lr, 1.0), ("slope", self.slope, 1e4)] {
            if !(0.0..=most).contains(&value) {
                return Err(Error::input(format!("{name} is {value}, use 0 to {most}")));
            }
        }
        Ok(before)
    }

    fn apply(&self, _: Weight, layer: &Layer<'_>) -> Result<Applied> {
        Err(Error::run("norm-tweak works on whole blocks and needs calibration").tensor(layer.name))
    }

    fn block(&self) -> Option<&dyn BlockMethod> {
        Some(self)
    }

    fn norms(&self) -> bool {
        true
    }

    fn options(&self) -> toml::Table {
        toml::Table::try_from(self).unwrap_or_default()
    }
}

impl BlockMethod for NormTweak {
    fn apply_block(&self, bench: &mut Bench<'_>, _: &[BlockLayer]) -> Result<BlockApplied> {
        let count = bench.hidden.len();
        let (held, tuned): (Vec<usize>, Vec<usize>) = (0..count).partition(|window| count >= HELD_OUT && window % HELD_OUT == HELD_OUT - 1);
        let judged = if held.is_empty() { &tuned } else { &held };
        let mut parameters = bench.parameters()?;
        let before = bench.loss(&parameters, judged)?;
        let rate = self.rate(bench.index(), bench.model.config.layers.len());
        let mut norms: Vec<(usize, Vec<f32>)> = Vec::new();
        for (number, norm) in bench.block.norms.iter().enumerate() {
            if self.qk_norms || !matches!(norm.place, Place::Query | Place::Key) {
                norms.push((number, norm.weight.clone()));
            }
        }
        let mut states: Vec<Adam> = norms.iter().map(|(_, weight)| Adam::new(weight.len())).collect();
        let (mut gradients, mut curve) = (Gradients::default(), Vec::new());
        let width = bench.model.config.hidden;
        let steps = self.iters * tuned.len();
        for _ in 0..self.iters {
            for &window in &tuned {
                bench.run.check_stop()?;
                bench.progress.within(curve.len() as f64 / steps as f64);
                gradients.clear();
                let loss = self.loss;
                curve.push(bench.tweak_into(
                    &parameters,
                    window,
                    &mut |y, reference, dy| judge(loss, width, reference, y, dy),
                    &mut gradients,
                )?);
                for ((number, weight), state) in norms.iter_mut().zip(&mut states) {
                    let place = bench.block.norms[*number].place;
                    state.step(weight, gradients.norm(place), rate);
                    parameters.set_norm_floats(place, weight);
                }
            }
        }
        let mut applied = BlockApplied { curve, ..BlockApplied::default() };
        let after = bench.loss(&parameters, judged)?;
        if after.is_finite() && after <= before {
            norms.into_iter().for_each(|(number, weight)| bench.block.norms[number].weight = weight);
        } else {
            applied
                .block_notes
                .push(format!("the error on held-out windows rose from {before:.3e} to {after:.3e}: the norms stay as they were"));
        }
        Ok(applied)
    }
}

/// Adam with the usual constants.
#[derive(Debug)]
pub struct Adam {
    first: Vec<f64>,
    second: Vec<f64>,
    steps: i32,
}

impl Adam {
    /// A fresh state for a number of parameters.
    pub fn new(size: usize) -> Self {
        Self { first: vec![0.0; size], second: vec![0.0; size], steps: 0 }
    }

    /// One step against `gradient`.
    pub fn step(&mut self, parameters: &mut [f32], gradient: &[f32], rate: f64) {
        const BETAS: [f64; 2] = [0.9, 0.999];
        const EPSILON: f64 = 1e-8;
        self.steps += 1;
        let [first, second] = BETAS.map(|beta| 1.0 - beta.powi(self.steps));
        for (((parameter, &gradient), m), v) in parameters.iter_mut().zip(gradient).zip(&mut self.first).zip(&mut self.second) {
            let g = f64::from(gradient);
            *m = BETAS[0] * *m + (1.0 - BETAS[0]) * g;
            *v = BETAS[1] * *v + (1.0 - BETAS[1]) * g * g;
            let step = rate * (*m / first) / ((*v / second).sqrt() + EPSILON);
            if step.is_finite() {
                *parameter -= step as f32;
            }
        }
    }
}

/// The loss of an output `y` beside the reference `f`, both tokens × width, and its gradient by y (methods-quant §2.5).
pub fn judge(loss: Loss, width: usize, f: &[f32], y: &[f32], dy: &mut [f32]) -> f64 {
    let tokens = (y.len() / width.max(1)) as f64;
    if loss == Loss::Mse {
        let factor = 1.0 / y.len().max(1) as f64;
        let mut sum = 0.0;
        for ((dy, &y), &f) in dy.iter_mut().zip(y).zip(f) {
            let error = y - f;
            *dy = (2.0 * factor) as f32 * error;
            sum += f64::from(error).powi(2);
        }
        return sum * factor;
    }
    let [mean_f, spread_f] = compared(width, f, loss);
    let [mean_y, spread_y] = compared(width, y, loss);
    let mut sum = 0.0;
    let (mut by_mean, mut by_spread) = (vec![0.0; width], vec![0.0; width]);
    for c in 0..width {
        let (mean, spread) = (mean_y[c] - mean_f[c], spread_y[c] - spread_f[c]);
        match loss {
            // The slope of σ² by y is 2 (y − μ) / (N − 1); that of σ is half of it over σ.
            Loss::DistAbs => {
                sum += (mean.abs() + spread.abs()) / width as f64;
                by_mean[c] = sign(mean) / (tokens * width as f64);
                by_spread[c] = 2.0 * sign(spread) / ((tokens - 1.0).max(1.0) * width as f64);
            }
            Loss::DistSq | Loss::Mse => {
                sum += mean * mean + spread * spread;
                by_mean[c] = 2.0 * mean / tokens;
                by_spread[c] = 2.0 * spread / ((tokens - 1.0).max(1.0) * spread_y[c]);
            }
        }
    }
    for (dy, y) in dy.chunks_exact_mut(width).zip(y.chunks_exact(width)) {
        for c in 0..width {
            dy[c] = (by_mean[c] + by_spread[c] * (f64::from(y[c]) - mean_y[c])) as f32;
        }
    }
    sum
}

/// Mean of every channel over tokens, and its variance (for `dist-abs`) or √(variance + 1e-6).
fn compared(width: usize, values: &[f32], loss: Loss) -> [Vec<f64>; 2] {
    let [mean, mut spread] = channels(width, values);
    if loss == Loss::DistSq {
        spread.iter_mut().for_each(|spread| *spread = (*spread + 1e-6).sqrt());
    }
    [mean, spread]
}

fn sign(value: f64) -> f64 {
    if value == 0.0 { 0.0 } else { value.signum() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_grows_with_depth_from_that_of_the_first_block() {
        let method = NormTweak { lr: 1e-5, slope: 10.0, ..NormTweak::default() };
        for (block, expected) in [(0, 1e-5), (16, 6e-5), (31, 1e-5 * (1.0 + 310.0 / 32.0))] {
            assert!((method.rate(block, 32) - expected).abs() < 1e-15, "block {block}: {}", method.rate(block, 32));
        }
    }

    #[test]
    fn the_distance_of_channel_statistics_is_the_published_example() {
        let (f, q) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 9.0, 3.0, 8.0, 5.0, 6.0]);
        let found = judge(Loss::DistAbs, 3, &f, &q, &mut [0.0; 6]);
        assert!((found - 29.0 / 3.0).abs() < 1e-12, "{found}");
    }

    #[test]
    fn gradients_of_all_losses_are_those_of_finite_differences() {
        let f: Vec<f32> = (0..20).map(|i| (i as f32 * 0.7).sin()).collect();
        let y: Vec<f32> = (0..20).map(|i| (i as f32 * 0.7).sin() * 1.3 + (i as f32 * 0.31).cos() * 0.4).collect();
        for loss in [Loss::DistAbs, Loss::DistSq, Loss::Mse] {
            let mut dy = vec![0.0; 20];
            judge(loss, 4, &f, &y, &mut dy);
            for i in 0..20 {
                let mut near = y.clone();
                near[i] += 1e-3;
                let up = judge(loss, 4, &f, &near, &mut [0.0; 20]);
                near[i] -= 2e-3;
                let slope = (up - judge(loss, 4, &f, &near, &mut [0.0; 20])) / 2e-3;
                assert!((f64::from(dy[i]) - slope).abs() < 1e-3 * (1.0 + slope.abs()), "{loss:?} {i}: {} {slope}", dy[i]);
            }
            assert_eq!(judge(loss, 4, &f, &f, &mut dy), 0.0);
            assert!(dy.iter().all(|value| *value == 0.0));
        }
    }

    #[test]
    fn the_first_step_of_adam_is_the_learning_rate_and_no_gradient_is_no_step() {
        let mut parameters = [1.0f32, 2.0, 3.0];
        Adam::new(3).step(&mut parameters, &[0.3, -20.0, 0.0], 1e-3);
        assert!((parameters[0] - 0.999).abs() < 1e-6 && (parameters[1] - 2.001).abs() < 1e-6 && parameters[2] == 3.0);
    }
}
