//! Least squares on a frozen mask, for many rows at once, in the coordinates in which inputs have unit norm.
//!
//! Source: the preconditioned conjugate gradient of ALPS (Meng et al., arXiv:2406.07831, algorithm 2). Normalising by
//! the diagonal of the Gram matrix is its preconditioner; step lengths are per row here, because rows are independent
//! problems. In these coordinates the weight is V = W·D with D = diag(√H_jj), the Gram matrix is the correlation
//! matrix G = D⁻¹HD⁻¹, and no product over- or underflows single precision.

use rayon::prelude::*;

use crate::kernels::gemm::{Sizes, View, product};
use crate::kernels::vectorized;

/// √H_jj of every column, plus a trace so that dead columns divide too (methods-pruning §2.1).
pub fn norms(gram: &[f64], columns: usize) -> Vec<f64> {
    (0..columns).map(|column| gram[column * (columns + 1)].max(0.0).sqrt() + 1e-8).collect()
}

/// G = D⁻¹HD⁻¹ with `damping` of its mean diagonal and `more` added to every diagonal entry.
pub fn correlation(gram: &[f64], norms: &[f64], damping: f64, more: f64) -> Vec<f64> {
    let columns = norms.len();
    let mut normal = vec![0.0; columns * columns];
    normal.par_chunks_mut(columns.max(1)).zip(gram.par_chunks(columns.max(1))).zip(norms).for_each(|((normal, gram), row_norm)| {
        normal.iter_mut().zip(gram).zip(norms).for_each(|((normal, gram), norm)| *normal = gram / row_norm / norm);
    });
    let mean = (0..columns).map(|column| normal[column * (columns + 1)]).sum::<f64>() / columns.max(1) as f64;
    (0..columns).for_each(|column| normal[column * (columns + 1)] += damping * mean + more);
    normal
}

/// V = W·D times a common factor that brings the largest entry to one, and that factor; one when W is zero.
pub fn normalised(weight: &[f32], norms: &[f64]) -> (Vec<f32>, f64) {
    let columns = norms.len().max(1);
    let largest = weight
        .par_chunks(columns)
        .map(|row| row.iter().zip(norms).map(|(&weight, norm)| (f64::from(weight) * norm).abs()).fold(0.0, f64::max))
        .reduce(|| 0.0, f64::max);
    let factor = if largest > 0.0 && largest.is_finite() { largest.recip() } else { 1.0 };
    let scaled = |(at, &weight): (usize, &f32)| (f64::from(weight) * norms[at % columns] * factor) as f32;
    (weight.par_iter().enumerate().with_min_len(4096).map(scaled).collect(), factor)
}

/// The weight of normalised coordinates: V D⁻¹ over the factor. What is beyond f32 is held at its ends, and zero has
/// no sign, so that nobody who compares bits mistakes it for a weight.
pub fn restored(values: &[f32], norms: &[f64], factor: f64) -> Vec<f32> {
    let columns = norms.len().max(1);
    let limit = f64::from(f32::MAX);
    let plain = |(at, &value): (usize, &f32)| (f64::from(value) / norms[at % columns] / factor).clamp(-limit, limit) as f32 + 0.0;
    values.par_iter().enumerate().with_min_len(4096).map(plain).collect()
}

/// Moves the kept entries of `values` towards the minimum of tr((V₀ − V) G (V₀ − V)ᵀ) by at most `steps` steps of
/// conjugate gradients in every row; the other entries must be zero and stay so. A row stops when its residual has
/// fallen by 10⁻⁶. Each step costs one product of the size of the layer times its columns.
///
/// Legend: exact V₀, values V (rows × columns), correlation G (columns × columns), all row-major.
pub fn conjugate_gradient(exact: &[f32], values: &mut [f32], keep: &[bool], correlation: &[f32], columns: usize, steps: usize) {
    let rows = exact.len() / columns.max(1);
    let sizes = Sizes { m: rows, n: columns, k: columns };
    let multiply = |from: &[f32], into: &mut [f32]| {
        product(sizes, into, columns, false, 1.0, View::rows(from, columns), View::rows(correlation, columns), true);
    };
    let mut direction: Vec<f32> = exact.par_iter().zip(&*values).with_min_len(4096).map(|(exact, value)| exact - value).collect();
    let mut residual = vec![0.0f32; values.len()];
    multiply(&direction, &mut residual);
    residual.par_iter_mut().zip(keep).with_min_len(4096).for_each(|(residual, &keep)| *residual = if keep { *residual } else { 0.0 });
    direction.copy_from_slice(&residual);
    let first: Vec<f64> = residual.par_chunks(columns.max(1)).map(|row| sum_of_products(row, row)).collect();
    let mut energy = first.clone();
    let mut image = vec![0.0f32; values.len()];
    for _ in 0..steps {
        if energy.iter().zip(&first).all(|(energy, first)| energy <= &(first * 1e-12)) {
            break;
        }
        multiply(&direction, &mut image);
        let rows = values.par_chunks_mut(columns).zip(residual.par_chunks_mut(columns)).zip(direction.par_chunks_mut(columns));
        let rows = rows.zip(image.par_chunks(columns)).zip(keep.par_chunks(columns)).zip(energy.par_iter_mut().zip(&first));
        rows.for_each(|(((((values, residual), direction), image), keep), (energy, first))| {
            if *energy > first * 1e-12 {
                *energy = step(values, residual, direction, image, keep, *energy);
            }
        });
    }
}

/// One step in one row; gives the new square of the residual.
fn step(values: &mut [f32], residual: &mut [f32], direction: &mut [f32], image: &[f32], keep: &[bool], energy: f64) -> f64 {
    let curvature = sum_of_products(direction, image);
    if curvature <= 0.0 || !curvature.is_finite() {
        return 0.0;
    }
    let length = (energy / curvature) as f32;
    vectorized(
        #[inline(always)]
        || {
            values.iter_mut().zip(&*direction).for_each(|(value, direction)| *value += length * direction);
            for ((residual, &image), &keep) in residual.iter_mut().zip(image).zip(keep) {
                *residual -= if keep { length * image } else { 0.0 };
            }
        },
    );
    let after = sum_of_products(residual, residual);
    let share = (after / energy) as f32;
    direction.iter_mut().zip(&*residual).for_each(|(direction, residual)| *direction = residual + share * *direction);
    after
}

fn sum_of_products(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}
