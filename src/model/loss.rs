//! Losses of a block's output, and their gradients.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::device::Gpu;
use crate::error::Result;
use crate::kernels::select::gpu::cut;
use crate::kernels::{Floats, dot_lanes, values, vectorized};

/// Floats of a task.
const CHUNK: usize = 1 << 13;

/// The value of a loss.
#[derive(Debug)]
pub enum Value {
    /// A number.
    Here(f64),
    /// The sum of these numbers, one per token, times a factor. A GPU may still be computing them.
    There {
        /// Tokens × 1.
        tokens: Box<Tensor<2>>,
        /// The factor.
        factor: f64,
    },
}

impl Value {
    /// The number, after everything that it waits for.
    pub fn get(self) -> f64 {
        match self {
            Self::Here(value) => value,
            Self::There { tokens, factor } => factor * total(*tokens),
        }
    }
}

/// A loss of a block's output.
pub trait Loss {
    /// Given the output, writes the gradient and gives the value.
    fn judge(&mut self, y: &[f32], dy: &mut [f32]) -> f64;

    /// Value and gradient, computed where the output lies; nothing where this loss is judged on the processor alone.
    ///
    /// # Errors
    /// When a GPU fails.
    fn judge_there(&mut self, _y: &Tensor<2>) -> Result<Option<(Value, Tensor<2>)>> {
        Ok(None)
    }
}

impl<F: FnMut(&[f32], &mut [f32]) -> f64> Loss for F {
    fn judge(&mut self, y: &[f32], dy: &mut [f32]) -> f64 {
        self(y, dy)
    }
}

/// factor · Σ (y − target)² without the `dropped` entries of largest error in every `window` entries; of equal errors at the edge
/// all stay.
#[derive(Debug)]
pub struct SquaredError {
    /// What the output should be, tokens × hidden.
    pub target: Tensor<2>,
    /// The factor.
    pub factor: f64,
    /// Entries of a window, whole tokens.
    pub window: usize,
    /// Entries of a window that do not count.
    pub dropped: usize,
}

impl Loss for SquaredError {
    fn judge(&mut self, y: &[f32], dy: &mut [f32]) -> f64 {
        let target = Floats::fetched(&self.target);
        trimmed_squared_error(target.slice(), self.factor, self.window, self.dropped)(y, dy)
    }

    fn judge_there(&mut self, y: &Tensor<2>) -> Result<Option<(Value, Tensor<2>)>> {
        let Some(gpu) = Gpu::of(&y.device()) else { return Ok(None) };
        let [tokens, width] = y.dims();
        let mut errors = y.clone() - self.target.clone().to_device(&y.device());
        let kept = self.window.saturating_sub(self.dropped);
        // What is no number does not count, as on the processor.
        let within = |errors: Tensor<2>, edge: f32| {
            let beyond = errors.clone().abs().lower_equal_elem(edge).bool_not();
            errors.mask_fill(beyond, 0.0)
        };
        if self.dropped == 0 {
            errors = within(errors, f32::INFINITY);
        } else if kept > 0 {
            let rows = self.window / width.max(1);
            let trimmed = (0..tokens).step_by(rows.max(1)).map(|first| {
                let part = errors.clone().slice([first..first + rows, 0..width]);
                let buffer = gpu.buffer(&part).ok_or_else(|| gpu.failure("an output that lies elsewhere"))?;
                let edge = f32::from_bits(cut(&gpu, &buffer, None, self.window, kept - 1)?.0);
                Ok(within(part, edge))
            });
            errors = Tensor::cat(trimmed.collect::<Result<Vec<_>>>()?, 0);
        } else {
            errors = errors.zeros_like();
        }
        Ok(Some((Value::There { tokens: Box::new(token_squares(&errors)), factor: self.factor }, errors * (2.0 * self.factor) as f32)))
    }
}

/// Σ (y − target)², wherever both lie.
pub fn distance(y: &Tensor<2>, target: &Tensor<2>) -> f64 {
    match (Floats::of(y), Floats::of(target)) {
        (Some(y), Some(target)) => y.slice().iter().zip(target.slice()).map(|(y, target)| f64::from(y - target).powi(2)).sum(),
        _ => total(token_squares(&(y.clone() - target.clone()))),
    }
}

/// Σ of the squares of every token.
fn token_squares(errors: &Tensor<2>) -> Tensor<2> {
    (errors.clone() * errors.clone()).sum_dim(1)
}

/// Σ of floats in doubles.
fn total(floats: Tensor<2>) -> f64 {
    values(floats).into_iter().map(f64::from).sum()
}

/// The loss factor · Σ (y − target)².
pub fn squared_error(target: &[f32], factor: f64) -> impl FnMut(&[f32], &mut [f32]) -> f64 {
    move |y, dy| factor * error_sum(y, target, dy, factor, f32::INFINITY)
}

/// The loss factor · Σ (y − target)² without the `dropped` entries of largest error in every `window` entries; of equal
/// errors at the edge all stay.
pub fn trimmed_squared_error(target: &[f32], factor: f64, window: usize, dropped: usize) -> impl FnMut(&[f32], &mut [f32]) -> f64 {
    move |y, dy| {
        let windows = y.chunks(window.max(1)).zip(target.chunks(window.max(1))).zip(dy.chunks_mut(window.max(1)));
        let judged = windows.map(|((y, target), dy)| factor * error_sum(y, target, dy, factor, edge(y, target, dropped)));
        judged.sum()
    }
}

/// The largest error that counts when the `dropped` largest do not; below all when none counts.
fn edge(y: &[f32], target: &[f32], dropped: usize) -> f32 {
    match (dropped, y.len().saturating_sub(dropped)) {
        (0, _) => f32::INFINITY,
        (_, 0) => -1.0,
        (_, kept) => {
            let mut errors: Vec<f32> = y.par_iter().zip(target).map(|(y, target)| (y - target).abs()).collect();
            *errors.select_nth_unstable_by(kept - 1, f32::total_cmp).1
        }
    }
}

/// The gradient of the output as it was given; the value is 0.
pub fn upstream(gradient: &[f32]) -> impl FnMut(&[f32], &mut [f32]) -> f64 {
    move |_, dy| {
        dy.copy_from_slice(gradient);
        0.0
    }
}

/// Σ of the squared errors that are at most `edge`, and their gradient times `factor`.
fn error_sum(y: &[f32], target: &[f32], dy: &mut [f32], factor: f64, edge: f32) -> f64 {
    assert_eq!(y.len(), target.len(), "an output and a target of different sizes");
    let slope = (2.0 * factor) as f32;
    let parts = y.par_chunks(CHUNK).zip(target.par_chunks(CHUNK)).zip(dy.par_chunks_mut(CHUNK)).map(|((y, target), dy)| {
        vectorized(
            #[inline(always)]
            || {
                for ((dy, &y), &target) in dy.iter_mut().zip(y).zip(target) {
                    let error = y - target;
                    *dy = if error.abs() <= edge { error } else { 0.0 };
                }
                let sum = dot_lanes(dy, dy);
                dy.iter_mut().for_each(|error| *error *= slope);
                f64::from(sum)
            },
        )
    });
    parts.collect::<Vec<f64>>().iter().sum()
}
