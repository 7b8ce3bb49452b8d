//! Round to nearest on a grid per group of columns.
//!
//! Symmetric grids are *signed full-range*: the scale takes the sign that lets the code 0 (the integer −2^(bits−1))
//! serve the entry of largest magnitude, so no code is wasted. Asymmetric grids contain zero exactly. In both, a
//! zero weight has the code of the zero point, so pruned weights stay zero.

pub mod gpu;

use rayon::prelude::*;

use crate::kernels::{sum_lanes, vectorized};
use crate::matrix::Matrix;
use crate::weight::{Float, Ints, Stored};

/// What grid to round to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Bits per code, 2..=8.
    pub bits: u8,
    /// Columns that share a scale.
    pub group: usize,
    /// Whether the zero point is fixed in the middle.
    pub symmetric: bool,
    /// Number format of the stored scales; codes are chosen against the scale as stored.
    pub scale_float: Float,
}

/// The range that the grid of every group of every row shall span, where it is not the range of the weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Bounds {
    /// Columns per group.
    pub group: usize,
    /// `rows * groups` lower ends, at most zero.
    pub low: Vec<f32>,
    /// `rows * groups` upper ends, at least zero.
    pub high: Vec<f32>,
}

impl Bounds {
    /// Whether these are ranges for every group of a matrix of `[rows, columns]` in groups of `group` columns.
    pub fn fits(&self, [rows, columns]: [usize; 2], group: usize) -> bool {
        let groups = rows * columns.div_ceil(group);
        self.group == group && self.low.len() == groups && self.high.len() == groups
    }
}

/// Rounds every weight to the nearest point of its group's grid. Gives the integers, and the sums of squares of the
/// rounding error and of the weights.
pub fn round_to_nearest(weight: &Matrix, grid: Grid) -> (Ints, [f64; 2]) {
    round_rows([weight.rows, weight.columns], grid, None, |row, _, work| work(weight.row(row)))
}

/// As [`round_to_nearest`], decoding row by row.
pub fn round_stored(weight: &Stored, grid: Grid) -> (Ints, [f64; 2]) {
    round_stored_within(weight, grid, None)
}

/// As [`round_to_nearest`], on grids that span the given ranges; weights outside take the code at the end.
///
/// # Panics
/// When the bounds are not those of the weight's groups.
pub fn round_to_nearest_within(weight: &Matrix, grid: Grid, bounds: &Bounds) -> (Ints, [f64; 2]) {
    round_rows([weight.rows, weight.columns], grid, Some(bounds), |row, _, work| work(weight.row(row)))
}

/// As [`round_stored`], on grids that span the given ranges where there are any.
///
/// # Panics
/// When the bounds are not those of the weight's groups.
pub fn round_stored_within(weight: &Stored, grid: Grid, bounds: Option<&Bounds>) -> (Ints, [f64; 2]) {
    round_rows([weight.rows, weight.columns], grid, bounds, |row, scratch, work| {
        scratch.resize(weight.columns, 0.0);
        weight.rows_into(row, scratch);
        work(scratch);
    })
}

/// Rounds the rows that `lend` lends: it is given a row number and room to decode into, and calls back with the row.
fn round_rows(
    [rows, columns]: [usize; 2],
    grid: Grid,
    bounds: Option<&Bounds>,
    lend: impl Fn(usize, &mut Vec<f32>, &mut dyn FnMut(&[f32])) + Sync,
) -> (Ints, [f64; 2]) {
    let groups = columns.div_ceil(grid.group);
    if let Some(bounds) = bounds {
        assert!(bounds.fits([rows, columns], grid.group), "ranges of other groups");
    }
    let middle = 1u8 << (grid.bits - 1);
    let mut codes = vec![0u8; rows * columns];
    let mut scales = vec![0.0f32; rows * groups];
    let mut zeros = vec![middle; rows * groups];
    let mut sums = vec![[0.0f64; 2]; rows];
    codes
        .par_chunks_mut(columns)
        .zip(scales.par_chunks_mut(groups).zip(zeros.par_chunks_mut(groups)))
        .zip(&mut sums)
        .enumerate()
        .with_min_len(16)
        .for_each_init(Vec::new, |scratch, (row, ((codes, (scales, zeros)), sums))| {
            lend(row, scratch, &mut |weights| {
                vectorized(
                    #[inline(always)]
                    || {
                        for (group, (codes, weights)) in codes.chunks_mut(grid.group).zip(weights.chunks(grid.group)).enumerate() {
                            let (scale, zero) = match bounds {
                                Some(bounds) => span(bounds.low[row * groups + group], bounds.high[row * groups + group], grid),
                                None => fit(weights, grid),
                            };
                            let [error, total] = round_group(weights, scale, zero, grid.bits, codes).map(f64::from);
                            let [error, total] = if (1e-20..1e30).contains(&total) && error.is_finite() {
                                [error, total]
                            } else {
                                wide_sums(weights, scale, zero, codes)
                            };
                            (scales[group], zeros[group]) = (scale, zero);
                            *sums = [sums[0] + error, sums[1] + total];
                        }
                    },
                );
            });
        });
    let sums = sums.iter().fold([0.0; 2], |total, row| [total[0] + row[0], total[1] + row[1]]);
    let zeros = (!grid.symmetric).then_some(zeros);
    (Ints { rows, columns, bits: grid.bits, group: grid.group, codes, scales, scale_float: grid.scale_float, zeros }, sums)
}

/// Scale (rounded to its stored format, never zero, always finite) and zero point of a group.
#[inline(always)]
pub fn fit(weights: &[f32], grid: Grid) -> (f32, u8) {
    let (low, high) = range(weights);
    span(low, high, grid)
}

/// As [`fit`], for a group whose smallest and largest weight are known.
#[inline(always)]
pub fn span(low: f32, high: f32, grid: Grid) -> (f32, u8) {
    let middle = 1u8 << (grid.bits - 1);
    if low == 0.0 && high == 0.0 {
        return (1.0, middle);
    }
    if grid.symmetric {
        let extreme = if high > -low { high } else { low };
        let scale = stored_scale(extreme / -f32::from(middle), grid.scale_float);
        return (decodable(scale, f32::from(middle), grid.scale_float), middle);
    }
    let (low, high) = (low.min(0.0), high.max(0.0));
    let top = ((1u32 << grid.bits) - 1) as f32;
    let scale = decodable(stored_scale(high / top - low / top, grid.scale_float), top, grid.scale_float);
    let zero = (-low / scale).round_ties_even().clamp(0.0, top);
    (scale, zero as u8)
}

/// A scale as its format stores it: what would round to zero becomes the smallest number, in f16 a subnormal one.
#[inline(always)]
pub fn stored_scale(scale: f32, float: Float) -> f32 {
    let smallest = match float {
        Float::F16 => 5.960_464_5e-8,
        Float::BF16 | Float::F32 => f32::MIN_POSITIVE,
    };
    let rounded = float.round(scale);
    if rounded.abs() < smallest { smallest.copysign(scale) } else { rounded }
}

/// A scale with which the farthest code, `reach` steps from the zero point, still decodes to a finite number.
#[inline(always)]
pub fn decodable(scale: f32, reach: f32, float: Float) -> f32 {
    if (scale * reach).is_finite() { scale } else { float.round(f32::MAX / reach * 0.99).copysign(scale) }
}

/// Smallest and largest value. Integers in the order of the floats reduce in vector registers, floats do not.
#[inline(always)]
pub fn range(weights: &[f32]) -> (f32, f32) {
    let key = |value: f32| {
        let bits = value.to_bits() as i32;
        bits ^ ((bits >> 31) as u32 >> 1) as i32
    };
    let value = |key: i32| f32::from_bits((key ^ ((key >> 31) as u32 >> 1) as i32) as u32);
    let low = weights.iter().map(|&weight| key(weight)).fold(i32::MAX, i32::min);
    let high = weights.iter().map(|&weight| key(weight)).fold(i32::MIN, i32::max);
    (value(low), value(high))
}

/// The sums of squares of error and weight where those in f32 overflow or vanish.
fn wide_sums(weights: &[f32], scale: f32, zero: u8, codes: &[u8]) -> [f64; 2] {
    weights.iter().zip(codes).fold([0.0; 2], |[error, total], (&weight, &code)| {
        let step = f64::from(code) - f64::from(zero);
        [error + (f64::from(weight) - step * f64::from(scale)).powi(2), total + f64::from(weight).powi(2)]
    })
}

/// Codes of a group, and the sums of squares of error and weight.
#[inline(always)]
fn round_group(weights: &[f32], scale: f32, zero: u8, bits: u8, codes: &mut [u8]) -> [f32; 2] {
    const BLOCK: usize = 128;
    /// Adding 2^23 puts a small whole number into the low bits.
    const WHOLE: f32 = 8_388_608.0;
    let (zero, top) = (f32::from(zero), ((1u32 << bits) - 1) as f32);
    let mut sums = [0.0f32; 2];
    let mut rounded = [0.0f32; BLOCK];
    for (weights, codes) in weights.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)) {
        let rounded = &mut rounded[..weights.len()];
        for (rounded, &weight) in rounded.iter_mut().zip(weights) {
            let code = (weight / scale).round_ties_even() + zero;
            let code = if code > top { top } else { code };
            *rounded = if code > 0.0 { code } else { 0.0 };
        }
        for (code, &rounded) in codes.iter_mut().zip(&*rounded) {
            *code = (rounded + WHOLE).to_bits() as u8;
        }
        for (rounded, &weight) in rounded.iter_mut().zip(weights) {
            *rounded = weight - (*rounded - zero) * scale;
        }
        sums[0] += sum_lanes(rounded, |error| error * error);
        sums[1] += sum_lanes(weights, |weight| weight * weight);
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(bits: u8, symmetric: bool) -> Grid {
        Grid { bits, group: 4, symmetric, scale_float: Float::F32 }
    }

    #[test]
    fn the_symmetric_grid_gives_the_extreme_code_to_the_largest_magnitude_by_hand() {
        let (ints, _) = round_to_nearest(&Matrix::new(1, 4, vec![0.4, -0.1, 0.2, 0.0]), grid(3, true));
        assert_eq!(ints.scales, [-0.1]);
        assert_eq!(ints.codes, [0, 5, 2, 4]);
        let back = ints.to_matrix().data;
        for (a, b) in back.iter().zip([0.4, -0.1, 0.2, 0.0]) {
            assert!((a - b).abs() < 1e-7);
        }
        let (ints, _) = round_to_nearest(&Matrix::new(1, 4, vec![-0.4, 0.4, 0.2, 0.0]), grid(3, true));
        assert_eq!((ints.scales[0], &ints.codes[..2]), (0.1, &[0u8, 7][..]));
    }

    #[test]
    fn the_asymmetric_grid_holds_its_ends_and_zero_by_hand() {
        let (ints, _) = round_to_nearest(&Matrix::new(1, 4, vec![-1.0, 0.0, 0.5, 2.0]), grid(2, false));
        assert_eq!((ints.scales[0], ints.zeros.as_deref(), &ints.codes[..]), (1.0, Some(&[1u8][..]), &[0u8, 1, 1, 3][..]));
        let (ints, _) = round_to_nearest(&Matrix::new(1, 4, vec![1.0, 2.0, 3.0, 3.0]), grid(2, false));
        assert_eq!(ints.zeros.as_deref(), Some(&[0u8][..]), "an all-positive group still holds zero");
    }

    proptest::proptest! {
        #[test]
        fn no_weight_is_farther_than_half_a_step_unless_the_positive_end_is_clipped(
            values in proptest::collection::vec(-4.0f32..4.0, 12), bits in 2u8..=8, symmetric in proptest::prelude::any::<bool>()
        ) {
            let weight = Matrix::new(3, 4, values);
            let (ints, [error, total]) = round_to_nearest(&weight, grid(bits, symmetric));
            let back = ints.to_matrix();
            for (i, (&exact, &got)) in weight.data.iter().zip(&back.data).enumerate() {
                let scale = ints.scales[i / 4].abs();
                let limit = if symmetric { 1.0 } else { 1.01 } * scale;
                proptest::prop_assert!((exact - got).abs() <= limit, "{exact} {got} {scale}");
                let inside = ints.codes[i] != 0 && u32::from(ints.codes[i]) != (1 << bits) - 1;
                proptest::prop_assert!(!inside || (exact - got).abs() <= 0.501 * scale);
            }
            let exact_error: f64 = weight.data.iter().zip(&back.data).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            let exact_total: f64 = weight.data.iter().map(|a| f64::from(*a).powi(2)).sum();
            proptest::prop_assert!((error - exact_error).abs() <= 1e-5 * exact_total + 1e-9 && (total - exact_total).abs() <= 1e-5 * exact_total + 1e-9);
        }
    }

    #[test]
    fn pruned_weights_stay_exactly_zero_and_extreme_values_stay_finite() {
        let values = vec![0.0, 3.0e38, -3.0e38, 0.0, 0.0, 1e-45, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 65504.0, -1e-8, 0.0];
        let weight = Matrix::new(4, 4, values);
        for float in [Float::BF16, Float::F16, Float::F32] {
            for (bits, symmetric) in (2..=8).flat_map(|bits| [(bits, true), (bits, false)]) {
                let (ints, sums) = round_to_nearest(&weight, Grid { scale_float: float, ..grid(bits, symmetric) });
                assert!(sums.iter().all(|sum| sum.is_finite()));
                assert!(ints.scales.iter().all(|scale| scale.is_finite() && *scale != 0.0));
                let back = ints.to_matrix();
                for (exact, got) in weight.data.iter().zip(&back.data) {
                    assert!(got.is_finite() && (*exact != 0.0 || *got == 0.0), "{float:?} {bits} {symmetric}");
                }
            }
        }
    }
}
