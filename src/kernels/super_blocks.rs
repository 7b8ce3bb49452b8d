//! Two-level grids under calibration: per block the line that loses least, weighted by how large inputs are; then one float for
//! the scales of 256 weights and one for their minima; then rounding with error feedback on the fixed grid.

use half::f16;
use rayon::prelude::*;

use crate::kernels::error_feedback::feed;
use crate::kernels::gram_space::GramSpace;
use crate::matrix::Matrix;
use crate::weight::super_blocks::{SIZE, SuperBlocks, SuperKind};

/// Ranges that are tried on both sides of the plain one.
const TRIES: i32 = 12;

/// Grids for a weight, and on them the nearest codes. `importance` weighs columns.
pub fn fit(goal: &Matrix, kind: SuperKind, importance: &[f64]) -> SuperBlocks {
    let (rows, columns, block) = (goal.rows, goal.columns, kind.block());
    let mean = importance.iter().sum::<f64>() / columns.max(1) as f64;
    let weights: Vec<f32> = importance.iter().map(|one| (one / mean.max(f64::MIN_POSITIVE)) as f32 + 1e-6).collect();
    let mut floats = vec![[0.0; 2]; rows * columns / SIZE];
    let mut wholes = vec![[0i8; 2]; rows * columns / block];
    let per_row = (columns / SIZE, columns / block);
    let in_rows =
        floats.par_chunks_mut(per_row.0.max(1)).zip(wholes.par_chunks_mut(per_row.1.max(1))).zip(goal.data.par_chunks(columns.max(1)));
    in_rows.for_each(|((floats, wholes), row)| {
        for (number, (floats, wholes)) in floats.iter_mut().zip(wholes.chunks_mut(SIZE / block)).enumerate() {
            let place = number * SIZE..(number + 1) * SIZE;
            let lines: Vec<[f32; 2]> =
                row[place.clone()].chunks(block).zip(weights[place.clone()].chunks(block)).map(|(x, h)| line(x, h, kind)).collect();
            *floats = shared(&lines, kind);
            for ((whole, line), at) in wholes.iter_mut().zip(&lines).zip((place.start..).step_by(block)) {
                *whole = nearest_wholes(*line, *floats, kind, &row[at..at + block], &weights[at..at + block]);
            }
        }
    });
    let mut fitted = SuperBlocks { rows, columns, kind, codes: vec![0; rows * columns], floats, wholes };
    let (top, middle) = (f32::from(((1u16 << kind.bits()) - 1) as u8), f32::from(kind.middle()));
    let codes: Vec<u8> = (0..rows * columns)
        .into_par_iter()
        .map(|at| {
            let (step, offset) = fitted.line(at / columns, at % columns);
            code(goal.data[at], step, offset, middle, top)
        })
        .collect();
    fitted.codes = codes;
    fitted
}

/// Replaces the codes by those of rounding with error feedback.
pub fn feedback(goal: &Matrix, space: &GramSpace, fitted: &mut SuperBlocks) {
    let mut codes = std::mem::take(&mut fitted.codes);
    let (top, middle) = (f32::from(((1u16 << fitted.kind.bits()) - 1) as u8), f32::from(fitted.kind.middle()));
    let grid = |row: usize, column: usize| {
        let (step, offset) = fitted.line(row, column);
        // A block of step 0 stands for its offset alone.
        (if step == 0.0 { f32::MIN_POSITIVE } else { step }, middle, offset)
    };
    feed(goal, space, None, &mut codes, top, grid);
    fitted.codes = codes;
}

fn code(value: f32, step: f32, offset: f32, middle: f32, top: f32) -> u8 {
    let code = if step == 0.0 { middle } else { ((value - offset) / step).round_ties_even() + middle };
    code.clamp(0.0, top) as u8
}

/// Weighted squared error of a block on a line.
fn error(x: &[f32], h: &[f32], step: f32, offset: f32, kind: SuperKind) -> f32 {
    let (top, middle) = (f32::from(((1u16 << kind.bits()) - 1) as u8), f32::from(kind.middle()));
    let one = |(&x, &h): (&f32, &f32)| {
        let off = x - (step * (f32::from(code(x, step, offset, middle, top)) - middle) + offset);
        h * off * off
    };
    x.iter().zip(h).map(one).sum()
}

/// Step and minimum (the offset's negative, at least 0) of the line that loses least among those tried.
fn line(x: &[f32], h: &[f32], kind: SuperKind) -> [f32; 2] {
    if kind.minima() { line_with_minimum(x, h, kind) } else { line_around_zero(x, h, kind) }
}

fn line_with_minimum(x: &[f32], h: &[f32], kind: SuperKind) -> [f32; 2] {
    let top = f32::from(((1u16 << kind.bits()) - 1) as u8);
    let low = x.iter().copied().fold(0.0f32, f32::min);
    let high = x.iter().copied().fold(low, f32::max);
    if high <= low {
        return [0.0, -low];
    }
    let mut best = ([(high - low) / top, -low], f32::INFINITY);
    for try_number in -TRIES..=TRIES {
        let step = (high - low) / (top + 0.1 * try_number as f32);
        let offset = low;
        // The line that fits the codes of this range best.
        let (mut s0, mut s1, mut s2, mut t0, mut t1) = (0.0f64, 0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for (&x, &h) in x.iter().zip(h) {
            let (q, h, x) = (f64::from(code(x, step, offset, 0.0, top)), f64::from(h), f64::from(x));
            (s0, s1, s2) = (s0 + h, s1 + h * q, s2 + h * q * q);
            (t0, t1) = (t0 + h * x, t1 + h * q * x);
        }
        let determinant = s0 * s2 - s1 * s1;
        let mut fitted = [step, -offset];
        if determinant > 0.0 {
            let (slope, start) = ((s0 * t1 - s1 * t0) / determinant, (s2 * t0 - s1 * t1) / determinant);
            // A minimum above zero has no place.
            fitted = if start <= 0.0 { [slope as f32, -start as f32] } else { [(t1 / s2.max(f64::MIN_POSITIVE)) as f32, 0.0] };
        }
        for candidate in [fitted, [step, -offset]] {
            let loss = error(x, h, candidate[0], -candidate[1], kind);
            if candidate[0] > 0.0 && loss < best.1 {
                best = (candidate, loss);
            }
        }
    }
    best.0
}

fn line_around_zero(x: &[f32], h: &[f32], kind: SuperKind) -> [f32; 2] {
    let middle = f32::from(kind.middle());
    let extreme = x.iter().copied().fold(0.0f32, |extreme, x| if x.abs() > extreme.abs() { x } else { extreme });
    if extreme == 0.0 {
        return [0.0; 2];
    }
    let top = 2.0 * middle - 1.0;
    let mut best = ([-extreme / middle, 0.0], f32::INFINITY);
    for try_number in -TRIES..=TRIES {
        let step = -extreme / (middle + 0.1 * try_number as f32);
        let (mut s2, mut t1) = (0.0f64, 0.0f64);
        for (&x, &h) in x.iter().zip(h) {
            let q = f64::from(f32::from(code(x, step, 0.0, middle, top)) - middle);
            (s2, t1) = (s2 + f64::from(h) * q * q, t1 + f64::from(h) * q * f64::from(x));
        }
        for step in [step, (t1 / s2.max(f64::MIN_POSITIVE)) as f32] {
            let loss = error(x, h, step, 0.0, kind);
            if step != 0.0 && loss < best.1 {
                best = ([step, 0.0], loss);
            }
        }
    }
    best.0
}

/// The floats that a super-block's scales and minima are multiples of.
fn shared(lines: &[[f32; 2]], kind: SuperKind) -> [f32; 2] {
    let [least, most] = kind.scales();
    let largest = |at: usize| {
        lines.iter().map(|line| line[at]).fold(0.0f32, |largest, value| if value.abs() > largest.abs() { value } else { largest })
    };
    let whole = if kind.minima() { most } else { least };
    let d = f16::from_f32(largest(0) / whole as f32).to_f32();
    let m = if kind.minima() { f16::from_f32(largest(1) / most as f32).to_f32() } else { 0.0 };
    [d, m]
}

/// The whole numbers near a block's line that lose least.
fn nearest_wholes([step, minimum]: [f32; 2], [d, m]: [f32; 2], kind: SuperKind, x: &[f32], h: &[f32]) -> [i8; 2] {
    let [least, most] = kind.scales();
    let near = |value: f32, unit: f32, least: i32| if unit == 0.0 { 0 } else { ((value / unit).round() as i32).clamp(least, most) };
    let (scale, low) = (near(step, d, least), near(minimum, m, 0));
    let mut best = ([scale, low], f32::INFINITY);
    for scale in (scale - 1).max(least)..=(scale + 1).min(most) {
        for low in if kind.minima() { (low - 1).max(0)..=(low + 1).min(most) } else { 0..=0 } {
            let loss = error(x, h, d * scale as f32, -m * low as f32, kind);
            if loss < best.1 {
                best = ([scale, low], loss);
            }
        }
    }
    best.0.map(|whole| whole as i8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::error_feedback::tests::{example, loss};

    #[test]
    fn feedback_on_fitted_grids_loses_less_than_rounding_and_more_bits_lose_less() {
        let (weight, gram) = example(8, 512);
        let space = GramSpace::new(&gram, 512, 0.01, true).unwrap();
        let importance: Vec<f64> = (0..512).map(|at| gram[at * 513]).collect();
        let mut before = f64::INFINITY;
        for kind in SuperKind::ALL {
            let nearest = fit(&weight, kind, &importance);
            let mut fed = nearest.clone();
            feedback(&weight, &space, &mut fed);
            let [rounded, after] = [&nearest, &fed].map(|one| loss(&weight, &one.to_matrix(), &gram));
            assert!(after < 0.8 * rounded && after < before, "{kind:?}: {after} {rounded} {before}");
            assert!(fed.codes.iter().all(|&code| code < 1 << kind.bits()));
            before = after;
        }
    }

    #[test]
    fn blocks_of_zeros_and_constants_are_exact_enough() {
        for kind in SuperKind::ALL {
            let weight = Matrix::from_fn(2, 256, |row, column| {
                if row == 0 {
                    0.0
                } else if column < 32 {
                    -0.5
                } else {
                    0.25
                }
            });
            let fitted = fit(&weight, kind, &[1.0; 256]).to_matrix();
            let worst = fitted.data.iter().zip(&weight.data).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
            assert!(worst < 0.02 && fitted.data[..256].iter().all(|&value| value == 0.0), "{kind:?}: {worst}");
        }
    }
}
