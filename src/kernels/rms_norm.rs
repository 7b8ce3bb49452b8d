//! y = x / √(mean(x²) + ε) · w, per row, where w is the stored weight or one plus it.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::kernels::{Floats, sum_lanes, tensor, vectorized};

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
