//! Statistical pre-calibration: which weights are outliers, and which range the grid of every group shall span, from
//! the distribution of the weights alone.
//!
//! Source: Ghaffari et al. 2025, arXiv:2501.09107, of which only the abstract and summaries could be read (the estimator
//! of the divergence, the rule for λ and the tables could not), and its predecessor AdpQ, arXiv:2405.13358, through a
//! public reimplementation; methods-quant §4. The split into two classes ([`split`]) is AdpQ; the ranges
//! ([`precalibrate`]) are **our reading** of "keep the distribution of the weights":
//!
//! 1. θ is the (1 − α) quantile of |W| over the matrix, found by selection; outliers are |w| > θ, so equal magnitudes
//!    and zeros are core. A share α of 0 means that nothing is given up to outliers: every range stays whole.
//! 2. Candidates are r = 1.00, 0.98, …, 0.50: a group's grid spans r times its smallest and largest weight, outliers
//!    included. An asymmetric grid gets its zero point from the shrunk range, symmetric ones keep theirs.
//! 3. Candidates are ranked once per matrix by KL(p ‖ q_r): p is the histogram of core weights, q_r that of the same
//!    weights rounded at ratio r in every group, both with 2048 bins over [−θ, θ] and 1e-6 added to every bin. A group
//!    alone is too small for a histogram. At most 2^16 weights are looked at: whole groups, evenly spaced over the
//!    rows, taken from the columns in turn.
//! 4. Every group takes the best-ranked candidate whose squared error, over all its weights and against the scale as it
//!    is stored, is at most 5 % above the least of the 26. These errors are computed, not estimated.
//!
//! Groups whose largest magnitude is outside 1e-15..1e15 keep their whole range. Pruned entries, where the caller says
//! that zeros are such, count neither in α nor in the histograms; in errors and ranges a zero has no part anyhow.

pub mod gpu;

use rayon::prelude::*;

use crate::kernels::quantize::{Bounds, Grid, range, span, stored_scale};
use crate::kernels::vectorized;
use crate::matrix::Matrix;
use crate::weight::{Float, Split};

/// Number of clip ratios.
pub const RATIOS: usize = 26;
/// Bins of a histogram of weights.
const BINS: usize = 2048;
/// What is added to the share of every bin.
const SMOOTHING: f64 = 1e-6;
/// How far a group's squared error may be above its least.
const TOLERANCE: f32 = 1.05;
/// Weights that the ranking looks at, at most.
const SAMPLE: usize = 1 << 16;
/// Magnitudes between which squares in f32 neither vanish nor overflow.
const SAFE: std::ops::Range<f32> = 1e-15..1e15;
/// Clip ratios that are worked on side by side, those beyond the last for nothing.
const LANES: usize = 32;
/// Weights per parallel piece.
const PIECE: usize = 1 << 16;

/// A clip ratio: 1.00, 0.98, …, 0.50.
#[inline(always)]
pub fn ratio(index: usize) -> f32 {
    0.02 * (50 - index) as f32
}

/// The ranges that the grids of a weight's groups shall span (see the module). `outliers` is α, in 0..=0.5; `pruned`
/// says that exact zeros are pruned entries. Gives nothing when a weight is not finite.
pub fn precalibrate(weight: &Matrix, grid: Grid, outliers: f64, pruned: bool) -> Option<Bounds> {
    let theta = threshold(&weight.data, outliers, pruned)?;
    let order = if outliers > 0.0 { ranking(&divergences(weight, grid, theta, pruned)) } else { vec![0] };
    let groups = weight.columns.div_ceil(grid.group);
    let mut low = vec![0.0f32; weight.rows * groups];
    let mut high = vec![0.0f32; weight.rows * groups];
    weight
        .data
        .par_chunks(weight.columns.max(1))
        .zip(low.par_chunks_mut(groups.max(1)).zip(high.par_chunks_mut(groups.max(1))))
        .with_min_len(8)
        .for_each(|(row, (low, high))| {
            for (weights, (low, high)) in row.chunks(grid.group).zip(low.iter_mut().zip(high)) {
                (*low, *high) = clipped(weights, grid, &order);
            }
        });
    Some(Bounds { group: grid.group, low, high })
}

/// The magnitude that round(share · count) of the weights exceed, ties aside: the (1 − share) quantile of |W|, by two
/// levels of selection. `pruned` leaves exact zeros out. Nothing when a weight is not finite; 0 when there is none.
pub fn threshold(weights: &[f32], share: f64, pruned: bool) -> Option<f32> {
    let counts = magnitude_counts(weights);
    if counts[BINS - 8..].iter().any(|&count| count > 0) {
        return None;
    }
    let zero = |weights: &[f32]| weights.iter().filter(|&&weight| weight == 0.0).count();
    let absent = if pruned { weights.par_chunks(PIECE).map(zero).sum() } else { 0 };
    let exceeding = ((weights.len() - absent) as f64 * share).round() as usize;
    let mut above = 0;
    for bin in (0..BINS).rev() {
        if above + counts[bin] > exceeding {
            let mut candidates = in_bin(weights, bin);
            let from_top = candidates.len() - 1 - (exceeding - above);
            return Some(f32::from_bits(*candidates.select_nth_unstable(from_top).1));
        }
        above += counts[bin];
    }
    Some(0.0)
}

/// Bin of a magnitude by its exponent and the three highest bits of its mantissa; the last eight are not finite.
#[inline(always)]
fn magnitude_bin(weight: f32) -> usize {
    (weight.to_bits() >> 20) as usize & (BINS - 1)
}

fn magnitude_counts(weights: &[f32]) -> Vec<usize> {
    let of_piece = |mut counts: Vec<usize>, piece: &[f32]| {
        // Four tables, so that neighbours of equal size do not wait for each other.
        let mut tables = [[0u32; BINS]; 4];
        for quad in piece.chunks(4) {
            for (table, &weight) in tables.iter_mut().zip(quad) {
                let count = &mut table[magnitude_bin(weight)];
                *count = count.wrapping_add(1);
            }
        }
        for (bin, count) in counts.iter_mut().enumerate() {
            *count += tables.iter().map(|table| table[bin] as usize).sum::<usize>();
        }
        counts
    };
    let add = |mut a: Vec<usize>, b: Vec<usize>| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        a
    };
    weights.par_chunks(PIECE).fold(|| vec![0; BINS], of_piece).reduce(|| vec![0; BINS], add)
}

/// Bits of the magnitudes that fall into a bin.
fn in_bin(weights: &[f32], bin: usize) -> Vec<u32> {
    let of_piece = |found: &mut Vec<u32>, piece: &[f32]| {
        // Every weight is written and only those of the bin are kept, which needs no branch.
        let mut count = 0usize;
        for &weight in piece {
            found[count] = weight.to_bits() & 0x7fff_ffff;
            count = count.wrapping_add(usize::from(magnitude_bin(weight) == bin));
        }
        found[..count].to_vec()
    };
    weights.par_chunks(PIECE).map_init(|| vec![0; PIECE + 1], of_piece).collect::<Vec<_>>().concat()
}

/// KL(p ‖ q_r) for every clip ratio (step 3 of the module); all zero where the magnitudes are too extreme to tell.
pub fn divergences(weight: &Matrix, grid: Grid, theta: f32, pruned: bool) -> [f64; RATIOS] {
    let mut found = [0.0; RATIOS];
    let sample = sampled(weight, grid.group);
    let is_core = |weight: &f32| weight.abs() <= theta && !(pruned && *weight == 0.0);
    let core: Vec<Vec<f32>> = sample.iter().map(|group| group.iter().copied().filter(is_core).collect()).collect();
    let count: usize = core.iter().map(Vec::len).sum();
    if !SAFE.contains(&theta) || count == 0 {
        return found;
    }
    let mut exact = vec![0u32; BINS];
    core.iter().for_each(|weights| count_bins(weights, theta, &mut exact));
    let work: Vec<(&[f32], (f32, f32))> = core.iter().map(Vec::as_slice).zip(sample.iter().map(|group| range(group))).collect();
    found.par_iter_mut().enumerate().for_each(|(index, found)| {
        let (mut rounded, mut counts) = (Vec::new(), vec![0u32; BINS]);
        for &(weights, (low, high)) in &work {
            let (scale, zero) = span(low * ratio(index), high * ratio(index), grid);
            rounded.clear();
            rounded.extend_from_slice(weights);
            vectorized(
                #[inline(always)]
                || rounded.iter_mut().for_each(|value| *value = nearest(*value, scale, zero, grid.bits)),
            );
            count_bins(&rounded, theta, &mut counts);
        }
        *found = divergence(&exact, &counts, count);
    });
    found
}

/// Groups that stand for the matrix: evenly spaced over the rows, from the columns in turn.
fn sampled(weight: &Matrix, group: usize) -> Vec<&[f32]> {
    let groups = weight.columns.div_ceil(group);
    let count = (SAMPLE / group).max(1).min(weight.rows * groups);
    let at = |index: usize| {
        let (row, column) = (index * weight.rows / count, index % groups * group);
        &weight.row(row)[column..weight.columns.min(column + group)]
    };
    (0..count).map(at).collect()
}

/// The point of a grid that a weight is rounded to.
#[inline(always)]
fn nearest(weight: f32, scale: f32, zero: u8, bits: u8) -> f32 {
    let (lowest, highest) = (-f32::from(zero), ((1u32 << bits) - 1) as f32 - f32::from(zero));
    let code = (weight / scale).round_ties_even();
    let code = if code > highest { highest } else { code };
    (if code > lowest { code } else { lowest }) * scale
}

/// Counts values in bins over [−θ, θ]; what lies outside belongs to the bins at the ends.
fn count_bins(values: &[f32], theta: f32, counts: &mut [u32]) {
    let (middle, bins) = (BINS as i32 / 2, BINS as f32 / 2.0 / theta);
    for &value in values {
        let bin = (((value * bins).floor() as i32).clamp(-middle, middle - 1) + middle) as usize;
        counts[bin] = counts[bin].wrapping_add(1);
    }
}

/// KL of two histograms of `count` values each, in nats, smoothed.
fn divergence(exact: &[u32], rounded: &[u32], count: usize) -> f64 {
    let share = |bin: u32| f64::from(bin) / count as f64 + SMOOTHING;
    exact.iter().zip(rounded).map(|(&p, &q)| share(p) * (share(p) / share(q)).ln()).sum()
}

/// Ratios from the lowest divergence on; of equal ones the wider range goes first.
fn ranking(divergences: &[f64; RATIOS]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..RATIOS).collect();
    order.sort_by(|&a, &b| divergences[a].total_cmp(&divergences[b]));
    order
}

/// The range that a group's grid shall span: by the first ratio of `order` whose error is tolerated.
fn clipped(weights: &[f32], grid: Grid, order: &[usize]) -> (f32, f32) {
    let (low, high) = vectorized(
        #[inline(always)]
        || range(weights),
    );
    let (low, high) = (low.min(0.0), high.max(0.0));
    if order.len() < RATIOS || !SAFE.contains(&high.max(-low)) {
        return (low, high);
    }
    let errors = vectorized(
        #[inline(always)]
        || squared_errors(weights, low, high, grid),
    );
    let least = errors.iter().copied().fold(f32::INFINITY, f32::min);
    let chosen = order.iter().copied().find(|&index| errors[index] <= TOLERANCE * least).unwrap_or(0);
    (low * ratio(chosen), high * ratio(chosen))
}

/// Sums of squares of the rounding error of a group for every clip ratio: every weight is read once, for all ratios side
/// by side.
#[inline(always)]
fn squared_errors(weights: &[f32], low: f32, high: f32, grid: Grid) -> [f32; RATIOS] {
    /// Adding and subtracting 1.5 · 2^23 rounds a small number to the nearest whole one, ties to even.
    const WHOLE: f32 = 12_582_912.0;
    let top = ((1u32 << grid.bits) - 1) as f32;
    let (mut scales, mut inverses, mut lowest, mut highest) = ([1.0f32; LANES], [1.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    for lane in 0..RATIOS {
        let (scale, zero) = span(low * ratio(lane), high * ratio(lane), grid);
        (scales[lane], inverses[lane]) = (scale, scale.recip());
        (lowest[lane], highest[lane]) = (-f32::from(zero), top - f32::from(zero));
    }
    let mut squares = [0.0f32; LANES];
    for &weight in weights {
        for lane in 0..LANES {
            let code = weight * inverses[lane] + WHOLE - WHOLE;
            let code = if code > highest[lane] { highest[lane] } else { code };
            let code = if code > lowest[lane] { code } else { lowest[lane] };
            let error = weight - code * scales[lane];
            squares[lane] += error * error;
        }
    }
    std::array::from_fn(|lane| squares[lane])
}

/// AdpQ: core weights |w| ≤ θ and outliers |w| > θ, each on a symmetric grid of its own per group with 2^bits − 1 points
/// and a scale in f16. `outliers` is the share that θ is for, per million, which the count of stored bits goes by.
/// Gives the integers, and the sums of squares of the rounding error and of the weights.
pub fn split(weight: &Matrix, theta: f32, bits: u8, group: usize, outliers: u32) -> (Split, [f64; 2]) {
    let (rows, columns) = (weight.rows, weight.columns);
    let (groups, bytes) = (columns.div_ceil(group), columns.div_ceil(8));
    let mut codes = vec![0u8; rows * columns];
    let mut scales = vec![[1.0f32; 2]; rows * groups];
    let mut mask = vec![0u8; rows * bytes];
    let sums: Vec<[f64; 2]> = weight
        .data
        .par_chunks(columns.max(1))
        .zip(codes.par_chunks_mut(columns.max(1)))
        .zip(scales.par_chunks_mut(groups.max(1)).zip(mask.par_chunks_mut(bytes.max(1))))
        .with_min_len(8)
        .map(|((row, codes), (scales, mask))| {
            row.iter().enumerate().for_each(|(column, weight)| mask[column / 8] |= u8::from(weight.abs() > theta) << (column % 8));
            let groups = row.chunks(group).zip(codes.chunks_mut(group)).zip(scales);
            groups.fold([0.0; 2], |total, ((weights, codes), scales)| {
                *scales = class_scales(weights, theta, bits);
                let sums = round_classes(weights, theta, *scales, bits, codes);
                [total[0] + sums[0], total[1] + sums[1]]
            })
        })
        .collect();
    let sums = sums.iter().fold([0.0; 2], |total, row| [total[0] + row[0], total[1] + row[1]]);
    (Split { rows, columns, bits, group, outliers, codes, scales, mask }, sums)
}

/// Scales of a group's core weights and outliers; 1 where there are none.
fn class_scales(weights: &[f32], theta: f32, bits: u8) -> [f32; 2] {
    let top = f32::from((1u8 << (bits - 1)) - 1);
    let largest = weights.iter().fold([0.0f32; 2], |[core, outlier], weight| match weight.abs() {
        size if size > theta => [core, outlier.max(size)],
        size => [core.max(size), outlier],
    });
    largest.map(|largest| if largest == 0.0 { 1.0 } else { stored_scale(largest / top, Float::F16) })
}

/// Codes of a group, and the sums of squares of error and weight.
fn round_classes(weights: &[f32], theta: f32, scales: [f32; 2], bits: u8, codes: &mut [u8]) -> [f64; 2] {
    let middle = f32::from(1u8 << (bits - 1));
    let top = middle - 1.0;
    weights.iter().zip(codes).fold([0.0; 2], |[error, total], (&weight, code)| {
        let scale = scales[usize::from(weight.abs() > theta)];
        let step = (weight / scale).round_ties_even().clamp(-top, top);
        *code = (step + middle) as u8;
        [error + (f64::from(weight) - f64::from(step * scale)).powi(2), total + f64::from(weight).powi(2)]
    })
}

#[cfg(test)]
mod tests;
