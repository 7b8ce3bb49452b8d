//! The grid of every group by search: the clip ratio, and for symmetric grids the sign of the scale, with the least
//! error weighted by how much each input column matters (its diagonal of the Gram matrix).

use rayon::prelude::*;

use crate::kernels::quantize::{Bounds, Grid, span, stored_scale};
use crate::kernels::{sum_lanes, vectorized};
use crate::matrix::Matrix;
use crate::weight::Ints;

/// How the scale of a group follows from its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    /// Largest magnitude over half the steps, always positive: the common symmetric grid.
    Range,
    /// Signed full-range (formats A4): the dominating end gets the code that the other end has not.
    FullRange,
    /// The clip ratio and sign with the least weighted error.
    #[default]
    Search,
}

/// Clip ratios that are tried, as shares of the range.
const RATIOS: usize = 20;

/// The smallest clip ratio.
const SMALLEST: f32 = 0.35;

/// Integers with grids for every group of `weight` and codes of zero, for a quantizer to fill. `importance` holds one
/// weight per column. `bounds` replaces the ranges of the groups.
pub fn grids(weight: &Matrix, grid: Grid, rule: Scale, importance: &[f32], bounds: Option<&Bounds>) -> Ints {
    let (rows, columns, middle) = (weight.rows, weight.columns, 1u8 << (grid.bits - 1));
    let groups = columns.div_ceil(grid.group);
    let mut scales = vec![1.0f32; rows * groups];
    let mut zeros = vec![middle; rows * groups];
    scales.par_chunks_mut(groups.max(1)).zip(zeros.par_chunks_mut(groups.max(1))).enumerate().with_min_len(4).for_each_init(
        Vec::new,
        |scratch, (row, (scales, zeros))| {
            let parts = weight.row(row).chunks(grid.group).zip(importance.chunks(grid.group));
            for (index, (weights, importance)) in parts.enumerate() {
                let given = bounds.filter(|bounds| bounds.group == grid.group).map(|bounds| {
                    let at = row * groups + index;
                    (bounds.low[at], bounds.high[at])
                });
                (scales[index], zeros[index]) = of_group(weights, importance, grid, rule, given, scratch);
            }
        },
    );
    let codes = vec![middle; rows * columns];
    let zeros = (!grid.symmetric).then_some(zeros);
    Ints { rows, columns, bits: grid.bits, group: grid.group, codes, scales, scale_float: grid.scale_float, zeros }
}

/// Scale and zero point of one group.
fn of_group(weights: &[f32], importance: &[f32], grid: Grid, rule: Scale, bounds: Option<(f32, f32)>, scratch: &mut Vec<f32>) -> (f32, u8) {
    let (low, high) = bounds.unwrap_or_else(|| weights.iter().fold((0.0f32, 0.0f32), |(low, high), &w| (low.min(w), high.max(w))));
    let plain = span(low, high, grid);
    match rule {
        Scale::FullRange => plain,
        Scale::Range if !grid.symmetric || (low == 0.0 && high == 0.0) => plain,
        Scale::Range => {
            let half = ((1u32 << grid.bits) - 1) as f32 / 2.0;
            (stored_scale(high.max(-low) / half, grid.scale_float), plain.1)
        }
        Scale::Search => vectorized(
            #[inline(always)]
            || search(weights, importance, grid, [low, high], plain, scratch),
        ),
    }
}

#[inline(always)]
fn search(weights: &[f32], importance: &[f32], grid: Grid, [low, high]: [f32; 2], plain: (f32, u8), scratch: &mut Vec<f32>) -> (f32, u8) {
    let middle = 1u8 << (grid.bits - 1);
    let mut best = (plain, weighted_error(weights, importance, plain, grid.bits, scratch));
    let extreme = high.max(-low);
    for step in 0..RATIOS {
        let ratio = SMALLEST + (1.1 - SMALLEST) * step as f32 / (RATIOS - 1) as f32;
        let candidates = if grid.symmetric {
            let scale = stored_scale(ratio * extreme / f32::from(middle), grid.scale_float);
            [(scale, middle), (-scale, middle)]
        } else {
            let clipped = span(ratio * low, ratio * high, grid);
            [clipped, clipped]
        };
        for candidate in &candidates[..if grid.symmetric { 2 } else { 1 }] {
            let error = weighted_error(weights, importance, *candidate, grid.bits, scratch);
            if error < best.1 && candidate.0.is_finite() {
                best = (*candidate, error);
            }
        }
    }
    best.0
}

/// Σ h (w − ŵ)² of a group rounded to nearest.
#[inline(always)]
fn weighted_error(weights: &[f32], importance: &[f32], (scale, zero): (f32, u8), bits: u8, scratch: &mut Vec<f32>) -> f32 {
    let zero = f32::from(zero);
    let (lowest, highest) = (-zero, ((1u32 << bits) - 1) as f32 - zero);
    let inverse = 1.0 / scale;
    scratch.resize(weights.len(), 0.0);
    for ((out, &weight), &importance) in scratch.iter_mut().zip(weights).zip(importance) {
        let step = (weight * inverse).round_ties_even();
        let step = if step > highest { highest } else { step };
        let step = if step < lowest { lowest } else { step };
        let error = weight - step * scale;
        *out = importance * error * error;
    }
    sum_lanes(scratch, |error| error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::quantize::round_to_nearest;
    use crate::weight::Float;

    fn weights() -> Matrix {
        Matrix::from_fn(16, 64, |i, j| {
            let value = ((i * 64 + j) as f32 * 0.713).sin() * 0.05;
            if j % 64 == 5 { 8.0 * value } else { value }
        })
    }

    #[test]
    fn searched_grids_have_the_least_weighted_error_of_the_rules() {
        let weight = weights();
        let importance: Vec<f32> = (0..64).map(|j| 0.1 + (j % 7) as f32).collect();
        for (bits, symmetric) in [(2, true), (3, false), (4, true)] {
            let grid = Grid { bits, group: 32, symmetric, scale_float: Float::BF16 };
            let error = |rule: Scale| -> f32 {
                let ints = grids(&weight, grid, rule, &importance, None);
                let mut scratch = Vec::new();
                (0..16 * 2)
                    .map(|at| {
                        let zero = ints.zeros.as_ref().map_or(ints.middle(), |zeros| zeros[at]);
                        let weights = &weight.row(at / 2)[at % 2 * 32..][..32];
                        weighted_error(weights, &importance[at % 2 * 32..][..32], (ints.scales[at], zero), bits, &mut scratch)
                    })
                    .sum()
            };
            let [range, full, search] = [Scale::Range, Scale::FullRange, Scale::Search].map(error);
            assert!(search < full && search < range, "{bits}: {search} {full} {range}");
        }
    }

    #[test]
    fn full_range_grids_are_those_of_round_to_nearest_and_bounds_replace_the_range() {
        let weight = weights();
        for symmetric in [true, false] {
            let grid = Grid { bits: 4, group: 64, symmetric, scale_float: Float::F16 };
            let (nearest, _) = round_to_nearest(&weight, grid);
            let ints = grids(&weight, grid, Scale::FullRange, &[1.0; 64], None);
            assert_eq!((ints.scales, ints.zeros), (nearest.scales.clone(), nearest.zeros.clone()));
            let bounds = Bounds { group: 64, low: vec![-0.8; 16], high: vec![0.4; 16] };
            let ints = grids(&weight, grid, Scale::FullRange, &[1.0; 64], Some(&bounds));
            assert!(ints.scales.iter().all(|&scale| scale == span(-0.8, 0.4, grid).0));
        }
    }
}
