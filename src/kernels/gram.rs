//! Statistics of the inputs of a linear layer: column sums of squares and the Gram matrix XᵀX.
//!
//! Products are f32; totals over windows are f64, so that a long calibration loses nothing.

pub mod gpu;

use rayon::prelude::*;

use crate::kernels::gemm::{Sizes, View, product};
use crate::kernels::vectorized;

/// Adds Σ x² of every column of `x` (tokens × columns, row-major) to `totals`.
pub fn add_column_squares(x: &[f32], totals: &mut [f64]) {
    let columns = totals.len().max(1);
    const WIDTH: usize = 256;
    totals.par_chunks_mut(WIDTH).enumerate().for_each(|(block, totals)| {
        vectorized(
            #[inline(always)]
            || {
                for tokens in x.chunks(columns * 64) {
                    let mut partial = [0.0f32; WIDTH];
                    for row in tokens.chunks_exact(columns) {
                        let row = &row[block * WIDTH..][..totals.len()];
                        for (partial, &value) in partial.iter_mut().zip(row) {
                            *partial += value * value;
                        }
                    }
                    for (total, &partial) in totals.iter_mut().zip(&partial) {
                        *total += f64::from(partial);
                    }
                }
            },
        );
    });
}

/// Adds XᵀX of `x` (tokens × columns, row-major) to `totals` (columns × columns).
pub fn add_gram(x: &[f32], columns: usize, totals: &mut [f64]) {
    const ROWS: usize = 128;
    let tokens = x.len() / columns.max(1);
    let mut partial = vec![0.0f32; ROWS.min(columns) * columns];
    for (block, rows) in totals.chunks_mut(ROWS * columns).enumerate() {
        // Only what lies on and right of the diagonal; the rest is its mirror image.
        let (first, count) = (block * ROWS, rows.len() / columns);
        let sizes = Sizes { m: count, n: columns - first, k: tokens };
        let (left, right) = (View::transposed(&x[first..], columns), View::rows(&x[first..], columns));
        product(sizes, &mut partial[first..], columns, false, 1.0, left, right, true);
        rows.par_chunks_mut(columns).zip(partial.par_chunks(columns)).for_each(|(row, partial)| {
            row[first..].iter_mut().zip(&partial[first..]).for_each(|(total, &partial)| *total += f64::from(partial));
        });
    }
    for row in 0..columns {
        for column in 0..row / ROWS * ROWS {
            totals[row * columns + column] = totals[column * columns + row];
        }
    }
}

/// Adds YᵀX of `y` (tokens × rows) and `x` (tokens × columns) to `totals` (rows × columns).
pub fn add_cross(y: &[f32], x: &[f32], [height, columns]: [usize; 2], totals: &mut [f64]) {
    let tokens = x.len() / columns.max(1);
    const ROWS: usize = 256;
    let mut partial = vec![0.0f32; ROWS.min(height) * columns];
    for (block, totals) in totals.chunks_mut(ROWS * columns).enumerate() {
        let rows = totals.len() / columns;
        let sizes = Sizes { m: rows, n: columns, k: tokens };
        let left = View::transposed(&y[block * ROWS..], height);
        product(sizes, &mut partial, columns, false, 1.0, left, View::rows(x, columns), true);
        totals.par_iter_mut().zip(&partial).with_min_len(4096).for_each(|(total, &partial)| *total += f64::from(partial));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_gram_follow_the_definition_for_any_split_into_windows() {
        let (tokens, columns) = (130, 300);
        let x: Vec<f32> = (0..tokens * columns).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.03).collect();
        let (mut squares, mut gram) = (vec![0.0; columns], vec![0.0; columns * columns]);
        for part in x.chunks(50 * columns) {
            add_column_squares(part, &mut squares);
            add_gram(part, columns, &mut gram);
        }
        for a in (0..columns).step_by(7) {
            for b in (0..columns).step_by(11) {
                let exact: f64 = (0..tokens).map(|t| f64::from(x[t * columns + a]) * f64::from(x[t * columns + b])).sum();
                assert!((gram[a * columns + b] - exact).abs() < 1e-3, "{a} {b}");
            }
            assert!((gram[a * columns + a] - squares[a]).abs() < 1e-3);
        }
    }
}
