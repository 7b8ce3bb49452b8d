//! The squared error of a layer's output, from the Gram matrix of its inputs, in f64.
//!
//! Compensated pruning leaves differences that lie where the Gram matrix is small, so the quadratic form cancels
//! heavily and single precision would not do.

use rayon::prelude::*;

use crate::kernels::vectorized;

/// Rows that share one reading of the Gram matrix.
const SHARED: usize = 8;

/// ‖X(W − Ŵ)ᵀ‖²_F = tr((W − Ŵ) H (W − Ŵ)ᵀ) for `exact` and `compressed` of `rows × columns` and H = XᵀX of
/// `columns × columns`, all row-major.
pub fn layer_error(gram: &[f64], exact: &[f32], compressed: &[f32], columns: usize) -> f64 {
    let size = SHARED * columns.max(1);
    let parts = exact.par_chunks(size).zip(compressed.par_chunks(size)).map_init(Vec::new, |differences, (exact, compressed)| {
        differences.clear();
        differences.extend(exact.iter().zip(compressed).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        vectorized(
            #[inline(always)]
            || quadratic_forms(gram, differences, columns),
        )
    });
    parts.collect::<Vec<f64>>().iter().sum()
}

/// Σ over rows of d H dᵀ.
#[inline(always)]
fn quadratic_forms(gram: &[f64], differences: &[f64], columns: usize) -> f64 {
    let mut totals = [0.0; SHARED];
    for (column, line) in gram.chunks_exact(columns).enumerate() {
        for (total, row) in totals.iter_mut().zip(differences.chunks_exact(columns)) {
            if row[column] != 0.0 {
                *total += row[column] * dot(line, row);
            }
        }
    }
    totals.iter().sum()
}

/// Σ aᵢbᵢ in eight fixed lanes: the same value at every vector width.
#[inline(always)]
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (chunks_a, rest_a) = a.as_chunks::<8>();
    let (chunks_b, rest_b) = b.as_chunks::<8>();
    for (a, b) in chunks_a.iter().zip(chunks_b) {
        for lane in 0..8 {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(rest_a.iter().zip(rest_b)) {
        *lane += a * b;
    }
    let halves = [lanes[0] + lanes[4], lanes[1] + lanes[5], lanes[2] + lanes[6], lanes[3] + lanes[7]];
    (halves[0] + halves[2]) + (halves[1] + halves[3])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_follows_its_definition_over_the_inputs() {
        let (tokens, columns, rows) = (40, 21, 11);
        let x = |t: usize, j: usize| ((t * 7 + j * 13) as f64 * 0.61).sin();
        let gram: Vec<f64> = (0..columns * columns).map(|at| (0..tokens).map(|t| x(t, at / columns) * x(t, at % columns)).sum()).collect();
        let exact: Vec<f32> = (0..rows * columns).map(|i| (i as f32 * 0.37).cos()).collect();
        let compressed: Vec<f32> = exact.iter().enumerate().map(|(i, v)| if i % 3 == 0 { 0.0 } else { v * 1.1 }).collect();
        let output = |t: usize, r: usize| -> f64 {
            (0..columns).map(|j| x(t, j) * f64::from(exact[r * columns + j] - compressed[r * columns + j])).sum()
        };
        let direct: f64 = (0..tokens * rows).map(|at| output(at / rows, at % rows).powi(2)).sum();
        let found = layer_error(&gram, &exact, &compressed, columns);
        assert!((found - direct).abs() < 1e-5 * direct, "{found} {direct}");
    }
}
