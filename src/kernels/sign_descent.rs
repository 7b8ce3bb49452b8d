//! Learned rounding (SignRound): fake quantization with a rounding offset per weight and grid parameters per group, and
//! the signed step on both, by the closed forms of methods-quant §1.2.
//!
//! Legend: w weight, V offset, s scale as stored, z zero point, t = round(w/s + V) + z, q = clamp(t, 0, Q),
//! ŵ = s (q − z), g = ∂L/∂ŵ. Rounding passes gradients through; inside means 0 ≤ t ≤ Q.

pub mod gpu;

use rayon::prelude::*;

use crate::kernels::quantize::stored_scale;
use crate::kernels::vectorized;
use crate::matrix::Matrix;
use crate::weight::{Float, Ints};

/// How grid and offsets begin and what of the grid is learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// The range of every group; both clip parameters α and β are learned, in 0..=1 (AutoRound).
    Range,
    /// Given grids; a factor of the scale is learned, in 0..=2 (SignRoundV2).
    Grid,
    /// Given codes; offsets start inside their cells, nearest to the weight, and a factor of the scale is learned, in
    /// 0.5..=1.2 (quality-records §2d).
    Codes,
}

/// A layer whose rounding is learned.
#[derive(Debug, Clone)]
pub struct Rounding {
    start: Start,
    rows: usize,
    columns: usize,
    group: usize,
    bits: u8,
    symmetric: bool,
    float: Float,
    /// w, or w/s + z moved into the cell of the given code.
    base: Vec<f32>,
    /// V; NaN marks weights that stay zero.
    offsets: Vec<f32>,
    /// Per group: what is learned of the grid (α and β, or one factor and nothing).
    learned: Vec<[f32; 2]>,
    /// Per group: smallest and largest weight, or scale and zero point.
    fixed: Vec<[f32; 2]>,
}

/// The grid of one group as it stands.
#[derive(Debug, Clone, Copy)]
struct GroupGrid {
    scale: f32,
    zero: f32,
    /// Factor of w in t: 1/s, or 1 where the base already is in steps.
    steps: f32,
    /// Added to round(…): z, or 0 where the base holds it.
    shift: f32,
}

/// What all groups of a layer have in common.
#[derive(Debug, Clone, Copy)]
struct Kind {
    start: Start,
    symmetric: bool,
    /// 2^(bits − 1).
    middle: f32,
    /// Q.
    top: f32,
}

impl Rounding {
    /// A layer that starts from the range of its groups, or from the grids or codes of `ints`. Zeros of `mask` stay
    /// zero and have no say in ranges.
    pub fn new(start: Start, goal: &Matrix, mask: Option<&Matrix>, ints: &Ints) -> Self {
        let (rows, columns, group) = (ints.rows, ints.columns, ints.group);
        let groups = ints.groups();
        let zero = |at: usize| f32::from(ints.zeros.as_ref().map_or(ints.middle(), |zeros| zeros[at]));
        let free = |at: usize| mask.is_none_or(|mask| mask.data[at] != 0.0);
        let mut rounding = Self {
            start,
            rows,
            columns,
            group,
            bits: ints.bits,
            symmetric: ints.zeros.is_none(),
            float: ints.scale_float,
            base: goal.data.clone(),
            offsets: (0..rows * columns).map(|at| if free(at) { 0.0 } else { f32::NAN }).collect(),
            learned: vec![[1.0, 1.0]; rows * groups],
            fixed: (0..rows * groups).map(|at| [ints.scales[at], zero(at)]).collect(),
        };
        for row in 0..rows {
            for index in 0..groups {
                let at = row * groups + index;
                let range = row * columns + index * group..row * columns + ((index + 1) * group).min(columns);
                match start {
                    Start::Grid => {}
                    Start::Range => {
                        let survivors = range.filter(|&at| free(at)).map(|at| goal.data[at]);
                        let [low, high] = survivors.fold([0.0f32; 2], |[low, high], w| [low.min(w), high.max(w)]);
                        rounding.fixed[at] = [low, high];
                    }
                    Start::Codes => {
                        for place in range {
                            let code = f32::from(ints.codes[place]);
                            let exact = goal.data[place] / ints.scales[at] + zero(at);
                            rounding.base[place] = if exact.is_nan() { code } else { exact.clamp(code - 0.45, code + 0.45) };
                        }
                    }
                }
            }
        }
        rounding
    }

    fn top(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// The grid of a group.
    #[inline(always)]
    fn grid(&self, at: usize) -> GroupGrid {
        let ([a, b], [first, second]) = (self.learned[at], self.fixed[at]);
        let middle = f32::from(1u8 << (self.bits - 1));
        let (scale, zero) = match self.start {
            Start::Range if first == 0.0 && second == 0.0 => (1.0, middle),
            Start::Range if self.symmetric => {
                let (low, high) = (-first * a, second * b);
                let magnitude = low.max(high) / middle;
                (stored_scale(if high > low { -magnitude } else { magnitude }, self.float), middle)
            }
            Start::Range => {
                let scale = stored_scale(second * b / self.top() - first * a / self.top(), self.float);
                (scale, (-first * a / scale).round_ties_even().clamp(0.0, self.top()))
            }
            Start::Grid | Start::Codes => (stored_scale(first * a, self.float), second),
        };
        match self.start {
            Start::Codes => GroupGrid { scale, zero, steps: 1.0, shift: 0.0 },
            _ => GroupGrid { scale, zero, steps: scale, shift: zero },
        }
    }

    /// Writes ŵ, `rows × columns`.
    pub fn quantize(&self, out: &mut [f32]) {
        let (groups, top) = (self.columns.div_ceil(self.group), self.top());
        out.par_chunks_mut(self.columns.max(1)).enumerate().with_min_len(8).for_each(|(row, out)| {
            for (index, out) in out.chunks_mut(self.group).enumerate() {
                let from = row * self.columns + index * self.group;
                let (base, offsets) = (&self.base[from..from + out.len()], &self.offsets[from..from + out.len()]);
                let grid = self.grid(row * groups + index);
                vectorized(
                    #[inline(always)]
                    || {
                        for ((out, &base), &offset) in out.iter_mut().zip(base).zip(offsets) {
                            let code = (base / grid.steps + offset).round_ties_even() + grid.shift;
                            let code = if code > top { top } else { code };
                            let code = if code < 0.0 { 0.0 } else { code };
                            let value = (code - grid.zero) * grid.scale;
                            *out = if offset.is_nan() { 0.0 } else { value };
                        }
                    },
                );
            }
        });
    }

    /// The codes and grids as they stand.
    pub fn ints(&self) -> Ints {
        let (groups, top) = (self.columns.div_ceil(self.group), self.top());
        let grids: Vec<GroupGrid> = (0..self.rows * groups).map(|at| self.grid(at)).collect();
        let code = |place: usize| {
            let grid = grids[place / self.columns * groups + place % self.columns / self.group];
            let offset = self.offsets[place];
            if offset.is_nan() {
                return grid.zero as u8;
            }
            ((self.base[place] / grid.steps + offset).round_ties_even() + grid.shift).clamp(0.0, top) as u8
        };
        Ints {
            rows: self.rows,
            columns: self.columns,
            bits: self.bits,
            group: self.group,
            codes: (0..self.rows * self.columns).map(code).collect(),
            scales: grids.iter().map(|grid| grid.scale).collect(),
            scale_float: self.float,
            zeros: (!self.symmetric).then(|| grids.iter().map(|grid| grid.zero as u8).collect()),
        }
    }

    /// Largest magnitude of an offset.
    pub fn farthest(&self) -> f32 {
        self.offsets.iter().filter(|offset| !offset.is_nan()).fold(0.0, |farthest, offset| farthest.max(offset.abs()))
    }

    /// One signed step on offsets by `rate` and on what is learned of the grid by `grid_rate`, given g, `rows × columns`.
    pub fn step(&mut self, gradient: &[f32], rate: f32, grid_rate: f32) {
        let (groups, columns, group) = (self.columns.div_ceil(self.group), self.columns, self.group);
        let grids: Vec<GroupGrid> = (0..self.rows * groups).into_par_iter().map(|at| self.grid(at)).collect();
        let kind = Kind { start: self.start, symmetric: self.symmetric, middle: f32::from(1u8 << (self.bits - 1)), top: self.top() };
        let (base, fixed) = (&self.base, &self.fixed);
        self.offsets.par_chunks_mut(columns).zip(self.learned.par_chunks_mut(groups)).enumerate().with_min_len(8).for_each(
            |(row, (offsets, learned))| {
                for (index, (offsets, learned)) in offsets.chunks_mut(group).zip(learned).enumerate() {
                    let from = row * columns + index * group;
                    let (base, gradient) = (&base[from..from + offsets.len()], &gradient[from..from + offsets.len()]);
                    let at = row * groups + index;
                    let grid = grids[at];
                    let sums = vectorized(
                        #[inline(always)]
                        || step_group(kind, grid, base, gradient, offsets, rate),
                    );
                    let slopes = slopes(fixed[at], *learned, kind, grid.scale, sums);
                    let limits = match kind.start {
                        Start::Range => (0.0, 1.0),
                        Start::Grid => (0.0, 2.0),
                        Start::Codes => (0.5, 1.2),
                    };
                    for (value, slope) in learned.iter_mut().zip(slopes) {
                        *value = (*value - grid_rate * sign(slope)).clamp(limits.0, limits.1);
                    }
                }
            },
        );
    }
}

/// Sums over a group: g·∂ŵ/∂s inside and clipped, and g over the entries clipped low and high.
#[inline(always)]
fn step_group(kind: Kind, grid: GroupGrid, base: &[f32], gradient: &[f32], offsets: &mut [f32], rate: f32) -> [f32; 3] {
    let top = kind.top;
    let mut lanes = [[0.0f32; 8]; 3];
    let through = if kind.start == Start::Codes { 0.0 } else { 1.0 };
    for ((base, gradient), offsets) in base.chunks(8).zip(gradient.chunks(8)).zip(offsets.chunks_mut(8)) {
        for (lane, ((&base, &g), offset)) in base.iter().zip(gradient).zip(offsets).enumerate() {
            let exact = base / grid.steps;
            let t = (exact + *offset).round_ties_even() + grid.shift;
            let g = if offset.is_nan() { 0.0 } else { g };
            let low = if t < 0.0 { 1.0f32 } else { 0.0 };
            let high = if t > top { 1.0f32 } else { 0.0 };
            let inside = 1.0 - low - high;
            let code = if t > top { top } else { t };
            let code = if code < 0.0 { 0.0 } else { code };
            let code = if offset.is_nan() { grid.zero } else { code };
            lanes[0][lane] += g * (code - grid.zero - through * inside * exact);
            lanes[1][lane] += g * low;
            lanes[2][lane] += g * high;
            *offset -= rate * sign(g * grid.scale * inside);
        }
    }
    lanes.map(|lane| lane.iter().sum())
}

/// The slopes of what is learned of a group's grid.
fn slopes([first, second]: [f32; 2], [a, b]: [f32; 2], kind: Kind, step: f32, [scale, low, high]: [f32; 3]) -> [f32; 2] {
    let Kind { start, symmetric, middle, top } = kind;
    match start {
        Start::Grid | Start::Codes => [scale * first, 0.0],
        Start::Range if symmetric => {
            let (left, right) = (-first * a, second * b);
            if right > left { [0.0, -scale * second / middle] } else { [scale * -first / middle, 0.0] }
        }
        Start::Range => {
            // Where codes are clipped the zero point moves with the scale and with α.
            let clipped = low + high;
            let scale = scale - clipped * first * a / step;
            [clipped * first - scale * first / top, scale * second / top]
        }
    }
}

#[inline(always)]
fn sign(value: f32) -> f32 {
    if value > 0.0 {
        1.0
    } else if value < 0.0 {
        -1.0
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::quantize::{Grid, round_to_nearest};

    fn noise(i: usize) -> f32 {
        let mut state = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        state = (state ^ state >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((state ^ state >> 32) >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }

    fn layer(bits: u8, symmetric: bool) -> (Matrix, Ints) {
        let weight = Matrix::from_fn(6, 32, |i, j| noise(i * 32 + j) * if j % 11 == 4 { 3.0 } else { 1.0 });
        let grid = Grid { bits, group: 16, symmetric, scale_float: Float::F32 };
        let ints = round_to_nearest(&weight, grid).0;
        (weight, ints)
    }

    #[test]
    fn before_the_first_step_every_start_is_what_it_starts_from() {
        for (bits, symmetric) in [(2, true), (3, false), (4, true), (8, false)] {
            let (weight, ints) = layer(bits, symmetric);
            for start in [Start::Range, Start::Grid, Start::Codes] {
                let rounding = Rounding::new(start, &weight, None, &ints);
                let mut out = vec![0.0; weight.data.len()];
                rounding.quantize(&mut out);
                assert_eq!(rounding.ints(), ints, "{start:?} {bits}");
                assert_eq!(out, ints.to_matrix().data);
            }
        }
    }

    /// Σ g ŵ of one group when the residuals of roundings and the sets of clipped entries are frozen: a smooth function
    /// of V, α and β, in f64.
    #[expect(clippy::too_many_arguments, clippy::type_complexity, reason = "everything that the surrogate freezes")]
    fn surrogate(
        w: &[f32],
        g: &[f32],
        at: (&[f64], [f64; 2]),
        frozen: &dyn Fn(&[f64], [f64; 2]) -> (f64, f64),
        symmetric: bool,
        bits: u8,
        codes: &[f32],
        base: &[f64],
        zero: (f64, f64),
    ) -> f64 {
        let (offsets, learned) = at;
        let (s, z_exact) = frozen(offsets, learned);
        let top = f64::from((1u32 << bits) - 1);
        let z = if symmetric { zero.0 } else { z_exact + zero.1 };
        let mut sum = 0.0;
        for (i, &code) in codes.iter().enumerate() {
            let value = if code < 0.0 {
                -s * z
            } else if f64::from(code) > top {
                s * (top - z)
            } else {
                // round(x) = x + residual.
                s * (f64::from(w[i]) / s + offsets[i] + base[i])
            };
            sum += f64::from(g[i]) * value;
        }
        sum
    }

    #[test]
    fn slopes_are_those_of_finite_differences_with_frozen_residuals() {
        for (bits, symmetric) in [(2u8, true), (3, true), (2, false), (4, false)] {
            let (weight, ints) = layer(bits, symmetric);
            let mut rounding = Rounding::new(Start::Range, &weight, None, &ints);
            rounding.learned.iter_mut().enumerate().for_each(|(at, learned)| *learned = [0.8 - 0.01 * at as f32, 0.7 + 0.01 * at as f32]);
            rounding.offsets.iter_mut().enumerate().for_each(|(at, offset)| *offset = 0.4 * noise(at + 900));
            let g: Vec<f32> = (0..16).map(|i| noise(i + 77)).collect();
            for at in 0..12 {
                let w = &weight.data[at * 16..][..16];
                let (learned, [low, high]) = (rounding.learned[at].map(f64::from), rounding.fixed[at].map(f64::from));
                let (middle, top) = (f64::from(1u32 << (bits - 1)), f64::from((1u32 << bits) - 1));
                let frozen = |_: &[f64], [a, b]: [f64; 2]| {
                    if symmetric {
                        let (left, right) = (-low * a, high * b);
                        (left.max(right) / middle * if right > left { -1.0 } else { 1.0 }, middle)
                    } else {
                        let s = (high * b - low * a) / top;
                        (s, -low * a / s)
                    }
                };
                let offsets: Vec<f64> = rounding.offsets[at * 16..][..16].iter().map(|&offset| f64::from(offset)).collect();
                let (s, z_exact) = frozen(&offsets, learned);
                let z = if symmetric { middle } else { z_exact.round_ties_even() };
                let exact: Vec<f64> = w.iter().zip(&offsets).map(|(w, v)| f64::from(*w) / s + v).collect();
                let codes: Vec<f32> = exact.iter().map(|x| (x.round_ties_even() + z) as f32).collect();
                let base: Vec<f64> = exact.iter().map(|x| x.round_ties_even() - x).collect();
                let value = |offsets: &[f64], learned: [f64; 2]| {
                    surrogate(w, &g, (offsets, learned), &frozen, symmetric, bits, &codes, &base, (z, z - z_exact))
                };
                let grid = rounding.grid(at);
                let kind = Kind { start: Start::Range, symmetric, middle: middle as f32, top: top as f32 };
                let mut moved = rounding.offsets[at * 16..][..16].to_vec();
                let sums = step_group(kind, grid, w, &g, &mut moved, 1e-3);
                let found = slopes(rounding.fixed[at], rounding.learned[at], kind, grid.scale, sums);
                for part in 0..2 {
                    let mut near = learned;
                    near[part] += 1e-6;
                    let up = value(&offsets, near);
                    near[part] -= 2e-6;
                    let slope = (up - value(&offsets, near)) / 2e-6;
                    assert!((f64::from(found[part]) - slope).abs() < 2e-3 * (1.0 + slope.abs()), "{bits} {symmetric}: {found:?} {slope}");
                }
                for i in 0..16 {
                    let mut near = offsets.clone();
                    near[i] += 1e-6;
                    let slope = (value(&near, learned) - value(&offsets, learned)) / 1e-6;
                    let step = f64::from(moved[i]) - offsets[i];
                    let expected = if slope.abs() < 1e-9 { 0.0 } else { -1e-3 * slope.signum() };
                    assert!((step - expected).abs() < 1e-6, "{i}: {step} {expected}");
                }
            }
        }
    }

    #[test]
    fn pruned_weights_stay_zero_and_offsets_stay_within_the_sum_of_rates() {
        let (mut weight, _) = layer(3, false);
        (0..weight.data.len()).step_by(2).for_each(|at| weight.data[at] = 0.0);
        let (ints, _) = round_to_nearest(&weight, Grid { bits: 3, group: 16, symmetric: false, scale_float: Float::F32 });
        let dense = layer(3, false).0;
        for start in [Start::Range, Start::Grid, Start::Codes] {
            let mut rounding = Rounding::new(start, &dense, Some(&weight), &ints);
            for step in 0..10 {
                let gradient: Vec<f32> = (0..192).map(|i| noise(i + 1000 * step)).collect();
                rounding.step(&gradient, 0.01, 0.01);
            }
            let back = rounding.ints().to_matrix();
            assert!(back.data.iter().step_by(2).all(|value| *value == 0.0));
            let farthest = rounding.farthest();
            assert!(farthest > 0.0 && farthest <= 0.1001, "{farthest}");
        }
    }

    #[test]
    fn with_fixed_grids_no_code_moves_by_more_than_one() {
        let (weight, ints) = layer(4, true);
        let mut rounding = Rounding::new(Start::Range, &weight, None, &ints);
        for step in 0..200 {
            let gradient: Vec<f32> = (0..192).map(|i| noise(i) + 0.1 * noise(i + 1000 * step)).collect();
            rounding.step(&gradient, (1.0 - step as f32 / 200.0) / 200.0, 0.0);
        }
        assert!(rounding.farthest() <= 0.5026);
        let moved: Vec<u8> = rounding.ints().codes.iter().zip(&ints.codes).map(|(a, b)| a.abs_diff(*b)).collect();
        assert!(moved.iter().all(|&distance| distance <= 1) && moved.contains(&1));
    }

    #[test]
    fn a_positive_dominated_symmetric_group_has_a_negative_scale_and_its_extreme_the_lowest_code() {
        let weight = Matrix::new(1, 4, vec![0.9, -0.2, 0.1, 0.3]);
        let (ints, _) = round_to_nearest(&weight, Grid { bits: 4, group: 4, symmetric: true, scale_float: Float::F32 });
        let rounding = Rounding::new(Start::Range, &weight, None, &ints);
        let ints = rounding.ints();
        assert!(ints.scales[0] < 0.0 && ints.codes[0] == 0);
    }
}
