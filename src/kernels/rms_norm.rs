//! y = x / √(mean(x²) + ε) · w, per row, where w is the stored weight or one plus it.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::kernels::{Floats, dot_lanes, sum_lanes, tensor, vectorized};

/// Root-mean-square norm of every row of `x` (tokens × width), by `weight` (width), or 1 + weight when `one_plus`.
pub fn rms_norm(x: &Tensor<2>, weight: &Tensor<1>, epsilon: f64, one_plus: bool) -> Tensor<2> {
    match (Floats::of(x), Floats::of(weight)) {
        (Some(values), Some(scale)) => {
            let mut out = vec![0.0; values.slice().len()];
            rms_norm_cpu(values.slice(), scale.slice(), epsilon as f32, one_plus, &mut out);
            tensor(out, x.dims(), &x.device())
        }
        _ => rms_norm_reference(x.clone(), weight.clone(), epsilon, one_plus),
    }
}

/// The definition in tensor algebra.
pub fn rms_norm_reference(x: Tensor<2>, weight: Tensor<1>, epsilon: f64, one_plus: bool) -> Tensor<2> {
    let scale = if one_plus { weight + 1.0 } else { weight };
    let mean = x.clone().powi_scalar(2).mean_dim(1);
    x / (mean + epsilon).sqrt() * scale.unsqueeze()
}

/// The CPU path: rows in parallel, sums in fixed lanes.
pub fn rms_norm_cpu(x: &[f32], weight: &[f32], epsilon: f32, one_plus: bool, out: &mut [f32]) {
    let width = weight.len().max(1);
    let offset = if one_plus { 1.0 } else { 0.0 };
    out.par_chunks_mut(width * 32).zip(x.par_chunks(width * 32)).for_each(|(out, x)| {
        vectorized(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    let squares = sum_lanes(x, |x| x * x);
                    let factor = 1.0 / (squares / width as f32 + epsilon).sqrt();
                    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
                        *out = x * factor * (weight + offset);
                    }
                }
            },
        );
    });
}

/// The adjoint of [`rms_norm_cpu`]: `d` enters as dL/dy and leaves as dL/dx; dL/dw is added to `dweight`. Rows in
/// parallel; the sums over rows run through blocks of fixed size, in order.
pub fn rms_norm_adjoint(x: &[f32], weight: &[f32], epsilon: f32, one_plus: bool, d: &mut [f32], dweight: Option<&mut [f32]>) {
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
                || adjoint_rows(x, weight, epsilon, if one_plus { 1.0 } else { 0.0 }, d, &mut partial),
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

/// With r = 1 / √(mean(x²) + ε) and g = dy · w: dx = r · g − x · r³ · mean(g · x) and dw = Σ dy · x · r.
#[inline(always)]
fn adjoint_rows(x: &[f32], weight: &[f32], epsilon: f32, offset: f32, d: &mut [f32], dweight: &mut [f32]) {
    let width = weight.len().max(1);
    for (d, x) in d.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let factor = 1.0 / (sum_lanes(x, |x| x * x) / width as f32 + epsilon).sqrt();
        for ((gradient, &d), &x) in dweight.iter_mut().zip(d.iter()).zip(x) {
            *gradient += d * x * factor;
        }
        for (d, &weight) in d.iter_mut().zip(weight) {
            *d *= weight + offset;
        }
        let pull = dot_lanes(d, x) / width as f32 * factor * factor * factor;
        for (d, &x) in d.iter_mut().zip(x) {
            *d = *d * factor - x * pull;
        }
    }
}
