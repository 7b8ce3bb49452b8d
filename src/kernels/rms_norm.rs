//! y = c / √(mean(c²) + ε) · w, per row, where c is x or, in a layer norm, x less its mean, and w is the stored weight or one
//! plus it.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::kernels::{Floats, dot_lanes, sum_lanes, tensor, vectorized};

/// What a norm does with its input and its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square, times w.
    Plain,
    /// Root mean square, times 1 + w.
    OnePlus,
    /// Less the mean, by the standard deviation, times w.
    Layer,
}

impl NormKind {
    /// What is added to the stored weight.
    fn offset(self) -> f32 {
        if self == Self::OnePlus { 1.0 } else { 0.0 }
    }

    /// What is taken from every entry of a row.
    #[inline(always)]
    fn centre(self, x: &[f32]) -> f32 {
        if self == Self::Layer { sum_lanes(x, |x| x) / x.len().max(1) as f32 } else { 0.0 }
    }
}

/// Norm of every row of `x` (tokens × width) by `weight` (width).
pub fn rms_norm(x: &Tensor<2>, weight: &Tensor<1>, epsilon: f64, kind: NormKind) -> Tensor<2> {
    match (Floats::of(x), Floats::of(weight)) {
        (Some(values), Some(scale)) => {
            let mut out = vec![0.0; values.slice().len()];
            rms_norm_cpu(values.slice(), scale.slice(), epsilon as f32, kind, &mut out);
            tensor(out, x.dims(), &x.device())
        }
        _ => rms_norm_reference(x.clone(), weight.clone(), epsilon, kind),
    }
}

/// The definition in tensor algebra.
pub fn rms_norm_reference(x: Tensor<2>, weight: Tensor<1>, epsilon: f64, kind: NormKind) -> Tensor<2> {
    let scale = if kind == NormKind::OnePlus { weight + 1.0 } else { weight };
    let x = if kind == NormKind::Layer { x.clone() - x.mean_dim(1) } else { x };
    let mean = x.clone().powi_scalar(2).mean_dim(1);
    x / (mean + epsilon).sqrt() * scale.unsqueeze()
}

/// The CPU path: rows in parallel, sums in fixed lanes.
pub fn rms_norm_cpu(x: &[f32], weight: &[f32], epsilon: f32, kind: NormKind, out: &mut [f32]) {
    let width = weight.len().max(1);
    let offset = kind.offset();
    out.par_chunks_mut(width * 32).zip(x.par_chunks(width * 32)).for_each(|(out, x)| {
        vectorized(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    let centre = kind.centre(x);
                    let squares = sum_lanes(x, |x| (x - centre) * (x - centre));
                    let factor = 1.0 / (squares / width as f32 + epsilon).sqrt();
                    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
                        *out = (x - centre) * factor * (weight + offset);
                    }
                }
            },
        );
    });
}

/// The adjoint of [`rms_norm_cpu`]: `d` enters as dL/dy and leaves as dL/dx; dL/dw is added to `dweight`. Rows in
/// parallel; the sums over rows run through blocks of fixed size, in order.
pub fn rms_norm_adjoint(x: &[f32], weight: &[f32], epsilon: f32, kind: NormKind, d: &mut [f32], dweight: Option<&mut [f32]>) {
    let width = weight.len().max(1);
    let block = width * (BLOCK_FLOATS / width).max(1);
    let wanted = dweight.is_some();
    let partials: Vec<Vec<f32>> = d
        .par_chunks_mut(block)
        .zip(x.par_chunks(block))
        .map(|(d, x)| {
            let mut partial = vec![0.0; if wanted { width } else { 0 }];
            vectorized(
                #[inline(always)]
                || adjoint_rows(x, weight, epsilon, kind, d, &mut partial),
            );
            partial
        })
        .collect();
    let Some(dweight) = dweight else { return };
    let mut totals = vec![0.0f64; width];
    for partial in &partials {
        totals.iter_mut().zip(partial).for_each(|(total, &part)| *total += f64::from(part));
    }
    dweight.iter_mut().zip(&totals).for_each(|(gradient, &total)| *gradient += total as f32);
}

/// Floats of a block of rows of the adjoint.
const BLOCK_FLOATS: usize = 1 << 14;

/// With c = x, or x less its mean, r = 1 / √(mean(c²) + ε) and g = dy · w: dw = Σ dy · c · r and
/// dx = r · g − c · r³ · mean(g · c), less its mean where c is.
#[inline(always)]
fn adjoint_rows(x: &[f32], weight: &[f32], epsilon: f32, kind: NormKind, d: &mut [f32], dweight: &mut [f32]) {
    let (width, offset) = (weight.len().max(1), kind.offset());
    for (d, x) in d.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let centre = kind.centre(x);
        let factor = 1.0 / (sum_lanes(x, |x| (x - centre) * (x - centre)) / width as f32 + epsilon).sqrt();
        for ((gradient, &d), &x) in dweight.iter_mut().zip(d.iter()).zip(x) {
            *gradient += d * (x - centre) * factor;
        }
        for (d, &weight) in d.iter_mut().zip(weight) {
            *d *= weight + offset;
        }
        // Entries of c add up to nothing, so that Σ g · c is Σ (g − mean(g)) · x.
        let mean = kind.centre(d);
        d.iter_mut().for_each(|d| *d -= mean);
        let pull = dot_lanes(d, x) / width as f32 * factor * factor * factor;
        for (d, &x) in d.iter_mut().zip(x) {
            *d = *d * factor - (x - centre) * pull;
        }
    }
}
