//! Rounding with error feedback (GPTQ, arXiv:2210.17323, algorithm 1): columns are rounded one after the other, and
//! the columns that follow take up the error. Grids are fixed beforehand; the order of the columns is an order of work
//! only and leaves no trace in the file.
//!
//! Legend: w (rows × columns, in working order), U upper triangular with H⁻¹ = UᵀU, e = (w_i − ŵ_i) / U_ii.

use rayon::prelude::*;

use crate::kernels::gemm::{Sizes, View, product};
use crate::kernels::gram_space::GramSpace;
use crate::kernels::vectorized;
use crate::matrix::Matrix;
use crate::weight::Ints;

/// Columns whose errors are gathered before the columns after them are told.
const BLOCK: usize = 128;

/// Rows that share one matrix product.
pub const ROWS: usize = 32;

/// Rounds `goal` to the grids of `ints`, whose codes are replaced. Where `mask` is given, entries that are zero in it
/// get the code of zero.
pub fn error_feedback(goal: &Matrix, space: &GramSpace, mask: Option<&Matrix>, ints: &mut Ints) {
    let (groups, group, middle) = (ints.groups(), ints.group, f32::from(ints.middle()));
    let top = ((1u32 << ints.bits) - 1) as f32;
    let (scales, zeros) = (&ints.scales, ints.zeros.as_deref());
    let grid = |row: usize, column: usize| {
        let at = row * groups + column / group;
        (scales[at], zeros.map_or(middle, |zeros| f32::from(zeros[at])), 0.0)
    };
    feed(goal, space, mask, &mut ints.codes, top, grid);
}

/// The same on any grid: `grid` gives for a row and a column the step, the code of the offset, and the offset. Codes end at
/// `top`.
pub fn feed(
    goal: &Matrix,
    space: &GramSpace,
    mask: Option<&Matrix>,
    codes: &mut [u8],
    top: f32,
    grid: impl Fn(usize, usize) -> (f32, f32, f32) + Sync,
) {
    let columns = goal.columns;
    codes.par_chunks_mut(ROWS * columns.max(1)).enumerate().for_each_init(
        || (Vec::new(), Vec::new()),
        |(w, errors), (chunk, codes)| {
            let rows = codes.len() / columns;
            w.resize(rows * columns, 0.0);
            for (row, w) in w.chunks_exact_mut(columns).enumerate() {
                space.gather(goal.row(chunk * ROWS + row), w);
            }
            for start in (0..columns).step_by(BLOCK) {
                let end = (start + BLOCK).min(columns);
                errors.clear();
                errors.resize(rows * BLOCK, 0.0f32);
                for row in 0..rows {
                    let number = chunk * ROWS + row;
                    let w = &mut w[row * columns..][start..end];
                    let (codes, errors) = (&mut codes[row * columns..][..columns], &mut errors[row * BLOCK..]);
                    vectorized(
                        #[inline(always)]
                        || {
                            for i in 0..end - start {
                                let column = space.order[start + i];
                                let (scale, zero, offset) = grid(number, column);
                                let kept = mask.is_none_or(|mask| mask.data[number * columns + column] != 0.0);
                                let code = if kept { (((w[i] - offset) / scale).round_ties_even() + zero).clamp(0.0, top) } else { zero };
                                codes[column] = code as u8;
                                let factor = &space.factor[(start + i) * columns..][start + i..end];
                                let error = (w[i] - (code - zero) * scale - offset) / factor[0];
                                errors[i] = error;
                                w[i + 1..].iter_mut().zip(&factor[1..]).for_each(|(w, &u)| *w -= error * u);
                            }
                        },
                    );
                }
                if end < columns {
                    let sizes = Sizes { m: rows, n: columns - end, k: end - start };
                    let later = View::rows(&space.factor[start * columns + end..], columns);
                    product(sizes, &mut w[end..], columns, true, -1.0, View::rows(errors, BLOCK), later, false);
                }
            }
        },
    );
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::kernels::quantize::{Grid, round_to_nearest};
    use crate::weight::Float;

    /// Weights and the Gram matrix of inputs whose spectrum falls off, deterministic.
    pub(crate) fn example(rows: usize, columns: usize) -> (Matrix, Vec<f64>) {
        let noise = |i: usize| {
            let mut state = (i as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            state = (state ^ state >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            ((state ^ state >> 32) >> 11) as f64 / (1u64 << 53) as f64 - 0.5
        };
        let weight = Matrix::from_fn(rows, columns, |i, j| (noise(i * columns + j) + noise(i * 31 + j * 7919 + 5)) as f32 * 0.1);
        let tokens = 4 * columns;
        let base: Vec<f64> = (0..tokens * columns).map(|i| noise(i + 1_000_000)).collect();
        // Neighbouring columns share a part, so that errors can be compensated.
        let x = |t: usize, j: usize| {
            (0..6).map(|k| base[t * columns + (j + k) % columns] / f64::from(1 + k as u32)).sum::<f64>()
                * if j % 9 == 3 { 5.0 } else { 1.0 }
        };
        let x: Vec<f64> = (0..tokens * columns).map(|i| x(i / columns, i % columns)).collect();
        let gram = (0..columns * columns)
            .map(|ab| (0..tokens).map(|t| x[t * columns + ab / columns] * x[t * columns + ab % columns]).sum())
            .collect();
        (weight, gram)
    }

    /// tr((W − Ŵ) H (W − Ŵ)ᵀ).
    pub(crate) fn loss(goal: &Matrix, got: &Matrix, gram: &[f64]) -> f64 {
        let columns = goal.columns;
        (0..goal.rows)
            .map(|row| {
                let d: Vec<f64> = goal.row(row).iter().zip(got.row(row)).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
                (0..columns).map(|i| d[i] * (0..columns).map(|j| gram[i * columns + j] * d[j]).sum::<f64>()).sum::<f64>()
            })
            .sum()
    }

    fn grid(bits: u8, group: usize, symmetric: bool) -> Grid {
        Grid { bits, group, symmetric, scale_float: Float::F32 }
    }

    #[test]
    fn with_uncorrelated_equal_inputs_it_is_round_to_nearest() {
        let (weight, _) = example(7, 40);
        let identity: Vec<f64> = (0..1600).map(|i| if i % 41 == 0 { 3.0 } else { 0.0 }).collect();
        let space = GramSpace::new(&identity, 40, 0.01, true).unwrap();
        for symmetric in [true, false] {
            let (nearest, _) = round_to_nearest(&weight, grid(3, 20, symmetric));
            let mut ints = nearest.clone();
            ints.codes.fill(0);
            error_feedback(&weight, &space, None, &mut ints);
            assert_eq!(ints, nearest);
        }
    }

    #[test]
    fn feedback_lowers_the_output_error_and_blocks_do_not_matter() {
        let (weight, gram) = example(40, 300);
        let space = GramSpace::new(&gram, 300, 0.01, true).unwrap();
        let (nearest, _) = round_to_nearest(&weight, grid(3, 100, true));
        let mut ints = nearest.clone();
        error_feedback(&weight, &space, None, &mut ints);
        let (before, after) = (loss(&weight, &nearest.to_matrix(), &gram), loss(&weight, &ints.to_matrix(), &gram));
        assert!(after < 0.7 * before, "{after} {before}");
        // The same in one go over all columns, in f64.
        let mut exact = nearest.clone();
        for row in 0..40 {
            let mut w: Vec<f64> = space.order.iter().map(|&column| f64::from(weight.row(row)[column])).collect();
            for i in 0..300 {
                let column = space.order[i];
                let scale = f64::from(exact.scales[row * 3 + column / 100]);
                let code = ((w[i] / scale).round_ties_even() + 4.0).clamp(0.0, 7.0);
                exact.codes[row * 300 + column] = code as u8;
                let u = |j: usize| f64::from(space.factor[i * 300 + j]);
                let error = (w[i] - (code - 4.0) * scale) / u(i);
                (i + 1..300).for_each(|j| w[j] -= error * u(j));
            }
        }
        let differing = exact.codes.iter().zip(&ints.codes).filter(|(a, b)| a != b).count();
        assert!(differing < 40, "{differing} of 12000 codes differ: more than ties explain");
    }

    #[test]
    fn masked_weights_are_exactly_zero_and_their_error_is_taken_up() {
        let (weight, gram) = example(12, 64);
        let space = GramSpace::new(&gram, 64, 0.01, true).unwrap();
        let mut mask = weight.clone();
        (0..12 * 64).step_by(2).for_each(|i| mask.data[i] = 0.0);
        let (mut ints, _) = round_to_nearest(&weight, grid(4, 32, false));
        error_feedback(&weight, &space, Some(&mask), &mut ints);
        let got = ints.to_matrix();
        assert!(got.data.iter().step_by(2).all(|value| *value == 0.0));
        assert!(loss(&weight, &got, &gram) < loss(&weight, &mask, &gram), "compensation beats plain zeroing");
    }
}
