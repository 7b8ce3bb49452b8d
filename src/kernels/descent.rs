//! Coordinate descent on the integers of a layer and the closed-form refit of their scales, in Gram space
//! (quality-records §2b; QuantEase arXiv:2309.01885, CDQuant arXiv:2406.17542).
//!
//! Legend: loss of a row = (ŵ − w)ᵀ H (ŵ − w) with ŵ = s (q − z); D = Ŵ − W, G = D H. The exact minimiser of one code,
//! the rest fixed, is round((ŵ_j − G_j / H_jj) / s) + z. With the codes fixed the loss is quadratic in the scales:
//! A_gh = c_gᵀ H_gh c_h, b_g = c_gᵀ (H w)_g with c = q − z, and (A + ρI) s = b + ρ s_old.
//!
//! Everything is per row: blocks of rows share matrix products and nothing else.

use rayon::prelude::*;

use crate::kernels::error_feedback::ROWS;
use crate::kernels::factor::solve_small;
use crate::kernels::gemm::{Sizes, View, product};
use crate::kernels::gram_space::GramSpace;
use crate::kernels::quantize::stored_scale;
use crate::kernels::vectorized;
use crate::matrix::Matrix;
use crate::weight::{Float, Ints};

/// Columns whose changes are gathered before all other columns are told.
const BLOCK: usize = 128;

/// Share of the mean diagonal that pulls refitted scales towards the old ones.
const RIDGE: f64 = 1e-3;

/// How long to descend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// Rounds of descent followed by a refit of the scales.
    pub rounds: usize,
    /// Sweeps over all columns in each round, and after the last.
    pub sweeps: usize,
    /// Whether scales are refitted.
    pub refit: bool,
}

/// Lowers the loss of `ints` against `goal`; every step is kept only where it does. Where `mask` is given, entries that
/// are zero in it keep the code of zero. Gives the sums of the losses of all rows before and after, in units of the
/// Gram space.
pub fn descend(goal: &Matrix, space: &GramSpace, mask: Option<&Matrix>, ints: &mut Ints, effort: Effort) -> [f64; 2] {
    let columns = ints.columns.max(1);
    let (groups, group, bits, float, middle) = (ints.groups(), ints.group, ints.bits, ints.scale_float, f32::from(ints.middle()));
    let group_of: Vec<usize> = space.order.iter().map(|&column| column / group).collect();
    let members: Vec<Vec<usize>> = (0..groups).map(|one| (0..columns).filter(|&at| group_of[at] == one).collect()).collect();
    let zeros = ints.zeros.as_deref();
    let sums: Vec<[f64; 2]> = ints
        .codes
        .par_chunks_mut(ROWS * columns)
        .zip(ints.scales.par_chunks_mut(ROWS * groups))
        .enumerate()
        .map_init(Rows::default, |rows, (chunk, (codes, scales))| {
            let first = chunk * ROWS;
            let zeros = zeros.map(|zeros| &zeros[first * groups..]);
            rows.load(space, goal, mask, first, codes, scales, zeros, middle, &group_of, groups);
            let before = rows.loss();
            for _ in 0..effort.rounds {
                rows.sweeps(space, &group_of, bits, effort.sweeps);
                if effort.refit {
                    rows.refit(space, &members, &group_of, float);
                }
            }
            if effort.rounds == 0 || effort.refit {
                rows.sweeps(space, &group_of, bits, effort.sweeps);
            }
            rows.store(space, codes, scales);
            [before, rows.loss()]
        })
        .collect();
    sums.iter().fold([0.0; 2], |total, row| [total[0] + row[0], total[1] + row[1]])
}

/// Some rows of a layer in working order.
#[derive(Debug, Default)]
struct Rows {
    count: usize,
    columns: usize,
    groups: usize,
    /// w, the goal.
    goal: Vec<f32>,
    /// c = q − z as floats.
    steps: Vec<f32>,
    /// z per row and group.
    zeros: Vec<f32>,
    /// s per row and group.
    scales: Vec<f32>,
    /// Whether an entry may differ from zero; empty when all may.
    free: Vec<bool>,
    /// D = Ŵ − W.
    difference: Vec<f32>,
    /// G = D H.
    gradient: Vec<f32>,
    /// Changes of one block of columns.
    changes: Vec<f32>,
    /// C_g H_g of one group.
    pushed: Vec<f32>,
    /// H rows of one group.
    gathered: Vec<f32>,
}

impl Rows {
    #[expect(clippy::too_many_arguments, reason = "what a block of rows is made of")]
    fn load(
        &mut self,
        space: &GramSpace,
        goal: &Matrix,
        mask: Option<&Matrix>,
        first: usize,
        codes: &[u8],
        scales: &[f32],
        zeros: Option<&[u8]>,
        middle: f32,
        group_of: &[usize],
        groups: usize,
    ) {
        let columns = space.columns;
        (self.count, self.columns, self.groups) = (codes.len() / columns, columns, groups);
        self.goal.resize(self.count * columns, 0.0);
        self.steps.resize(self.count * columns, 0.0);
        self.zeros = (0..self.count * groups).map(|at| zeros.map_or(middle, |zeros| f32::from(zeros[at]))).collect();
        self.scales = scales.to_vec();
        self.free.clear();
        for row in 0..self.count {
            space.gather(goal.row(first + row), &mut self.goal[row * columns..][..columns]);
            let zeros = &self.zeros[row * groups..][..groups];
            for (at, (step, &column)) in self.steps[row * columns..][..columns].iter_mut().zip(&space.order).enumerate() {
                *step = f32::from(codes[row * columns + column]) - zeros[group_of[at]];
            }
            if let Some(mask) = mask {
                let row = mask.row(first + row);
                self.free.extend(space.order.iter().map(|&column| row[column] != 0.0));
            }
        }
        self.differ(group_of);
        self.push(space);
    }

    /// D from codes and scales.
    fn differ(&mut self, group_of: &[usize]) {
        let columns = self.columns;
        self.difference.clear();
        for row in 0..self.count {
            let scales = &self.scales[row * self.groups..][..self.groups];
            let (steps, goal) = (&self.steps[row * columns..][..columns], &self.goal[row * columns..][..columns]);
            self.difference.extend(steps.iter().zip(goal).zip(group_of).map(|((step, goal), &group)| step * scales[group] - goal));
        }
    }

    /// G from D.
    fn push(&mut self, space: &GramSpace) {
        let n = self.columns;
        self.gradient.resize(self.count * n, 0.0);
        let sizes = Sizes { m: self.count, n, k: n };
        product(sizes, &mut self.gradient, n, false, 1.0, View::rows(&self.difference, n), View::rows(&space.gram, n), false);
    }

    fn row_loss(&self, row: usize) -> f64 {
        let range = row * self.columns..(row + 1) * self.columns;
        self.difference[range.clone()].iter().zip(&self.gradient[range]).map(|(d, g)| f64::from(*d) * f64::from(*g)).sum()
    }

    fn loss(&self) -> f64 {
        (0..self.count).map(|row| self.row_loss(row)).sum()
    }

    /// At most `sweeps` sweeps over all columns; ends early when nothing changes.
    fn sweeps(&mut self, space: &GramSpace, group_of: &[usize], bits: u8, sweeps: usize) {
        let n = self.columns;
        for _ in 0..sweeps {
            let mut moved = false;
            for start in (0..n).step_by(BLOCK) {
                let end = (start + BLOCK).min(n);
                if !self.sweep_block(space, group_of, bits, start, end) {
                    continue;
                }
                moved = true;
                for (first, last) in [(0, start), (end, n)] {
                    if first < last {
                        let sizes = Sizes { m: self.count, n: last - first, k: end - start };
                        let rest = View::rows(&space.gram[start * n + first..], n);
                        product(sizes, &mut self.gradient[first..], n, true, 1.0, View::rows(&self.changes, BLOCK), rest, false);
                    }
                }
            }
            if !moved {
                return;
            }
        }
    }

    /// One pass over the columns `start..end`; tells whether anything changed.
    fn sweep_block(&mut self, space: &GramSpace, group_of: &[usize], bits: u8, start: usize, end: usize) -> bool {
        let (n, top) = (self.columns, ((1u32 << bits) - 1) as f32);
        self.changes.clear();
        self.changes.resize(self.count * BLOCK, 0.0);
        let mut moved = false;
        for row in 0..self.count {
            let at = row * n;
            let gradient = &mut self.gradient[at + start..at + end];
            vectorized(
                #[inline(always)]
                || {
                    for j in start..end {
                        if !self.free.is_empty() && !self.free[at + j] {
                            continue;
                        }
                        let place = row * self.groups + group_of[j];
                        let (scale, zero, step) = (self.scales[place], self.zeros[place], self.steps[at + j]);
                        let gram = &space.gram[j * n..][start..end];
                        let wanted = step - gradient[j - start] / (gram[j - start] * scale);
                        let wanted = wanted.round_ties_even().clamp(-zero, top - zero);
                        // A quotient that is not a number changes nothing.
                        if wanted == step || wanted.is_nan() {
                            continue;
                        }
                        let change = (wanted - step) * scale;
                        self.steps[at + j] = wanted;
                        self.difference[at + j] += change;
                        self.changes[row * BLOCK + j - start] = change;
                        moved = true;
                        gradient.iter_mut().zip(gram).for_each(|(gradient, &gram)| *gradient += change * gram);
                    }
                },
            );
        }
        moved
    }

    /// Refits the scales of every row where that lowers its loss with the scales as they are stored.
    fn refit(&mut self, space: &GramSpace, members: &[Vec<usize>], group_of: &[usize], float: Float) {
        let (n, groups) = (self.columns, self.groups);
        let mut a = vec![0.0f64; self.count * groups * groups];
        let mut b = vec![0.0f64; self.count * groups];
        for (one, columns) in members.iter().enumerate() {
            self.push_group(space, columns);
            for row in 0..self.count {
                let (steps, goal) = (&self.steps[row * n..][..n], &self.goal[row * n..][..n]);
                let into = &mut a[(row * groups + one) * groups..][..groups];
                for ((&pushed, step), (goal, &group)) in self.pushed[row * n..][..n].iter().zip(steps).zip(goal.iter().zip(group_of)) {
                    into[group] += f64::from(pushed) * f64::from(*step);
                    b[row * groups + one] += f64::from(pushed) * f64::from(*goal);
                }
            }
        }
        for row in 0..self.count {
            let old: Vec<f64> = self.scales[row * groups..][..groups].iter().map(|&scale| f64::from(scale)).collect();
            let (a, b) = (&a[row * groups * groups..][..groups * groups], &b[row * groups..][..groups]);
            let Some(new) = refitted(a, b, &old, float) else { continue };
            self.scales[row * groups..][..groups].copy_from_slice(&new);
        }
        self.differ(group_of);
        self.push(space);
    }

    /// C_g H_g for the columns of one group.
    fn push_group(&mut self, space: &GramSpace, columns: &[usize]) {
        let (n, k) = (self.columns, columns.len());
        self.gathered.clear();
        columns.iter().for_each(|&column| self.gathered.extend_from_slice(&space.gram[column * n..][..n]));
        self.changes.clear();
        for row in 0..self.count {
            self.changes.extend(columns.iter().map(|&column| self.steps[row * n + column]));
        }
        self.pushed.resize(self.count * n, 0.0);
        let sizes = Sizes { m: self.count, n, k };
        product(sizes, &mut self.pushed, n, false, 1.0, View::rows(&self.changes, k), View::rows(&self.gathered, n), false);
    }

    fn store(&self, space: &GramSpace, codes: &mut [u8], scales: &mut [f32]) {
        let n = self.columns;
        scales.copy_from_slice(&self.scales);
        for row in 0..self.count {
            let zeros = &self.zeros[row * self.groups..][..self.groups];
            let group = n.div_ceil(self.groups);
            for (at, &column) in space.order.iter().enumerate() {
                codes[row * n + column] = (self.steps[row * n + at] + zeros[column / group]) as u8;
            }
        }
    }
}

/// The scales that minimise sᵀAs − 2bᵀs near `old`, rounded to their stored format, where they are better than `old`.
fn refitted(a: &[f64], b: &[f64], old: &[f64], float: Float) -> Option<Vec<f32>> {
    let groups = old.len();
    let ridge = RIDGE * (0..groups).map(|i| a[i * groups + i]).sum::<f64>() / groups.max(1) as f64;
    let mut matrix = a.to_vec();
    (0..groups).for_each(|i| matrix[i * groups + i] += ridge);
    let mut solved: Vec<f64> = b.iter().zip(old).map(|(b, old)| b + ridge * old).collect();
    if ridge <= 0.0 || !solve_small(&mut matrix, &mut solved) {
        return None;
    }
    let loss =
        |s: &[f64]| -> f64 { (0..groups).map(|g| s[g] * ((0..groups).map(|h| a[g * groups + h] * s[h]).sum::<f64>() - 2.0 * b[g])).sum() };
    let keeps = |(new, old): (&f64, &f64)| {
        let new = stored_scale(*new as f32, float);
        // A scale that vanishes or explodes would lose the group.
        if new.is_finite() && f64::from(new).abs() > 1e-3 * old.abs() { new } else { *old as f32 }
    };
    let new: Vec<f32> = solved.iter().zip(old).map(keeps).collect();
    let wide: Vec<f64> = new.iter().map(|&scale| f64::from(scale)).collect();
    (loss(&wide) < loss(old)).then_some(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::error_feedback::error_feedback;
    use crate::kernels::error_feedback::tests::{example, loss};
    use crate::kernels::quantize::{Grid, round_to_nearest};

    const EFFORT: Effort = Effort { rounds: 4, sweeps: 2, refit: true };

    fn grid(bits: u8, group: usize, symmetric: bool) -> Grid {
        Grid { bits, group, symmetric, scale_float: Float::BF16 }
    }

    #[test]
    fn one_row_of_six_two_bit_weights_reaches_a_state_that_no_single_change_improves() {
        let (weight, gram) = example(9, 6);
        let space = GramSpace::new(&gram, 6, 0.01, true).unwrap();
        let damped = damped(&space);
        for row in 0..9 {
            let goal = Matrix::new(1, 6, weight.row(row).to_vec());
            let (mut ints, _) = round_to_nearest(&goal, grid(2, 6, true));
            descend(&goal, &space, None, &mut ints, Effort { rounds: 0, sweeps: 50, refit: false });
            let own = loss(&goal, &ints.to_matrix(), &damped);
            let mut best = f64::INFINITY;
            for codes in 0..4096usize {
                let mut other = ints.clone();
                (0..6).for_each(|j| other.codes[j] = (codes >> (2 * j) & 3) as u8);
                let distance = other.codes.iter().zip(&ints.codes).filter(|(a, b)| a != b).count();
                let found = loss(&goal, &other.to_matrix(), &damped);
                best = best.min(found);
                assert!(distance > 1 || found >= own * (1.0 - 1e-5), "a single change improves {own} to {found}");
            }
            assert!(own <= 1.6 * best, "{own} is far from the optimum {best}");
        }
    }

    /// The damped Gram matrix in the order of the columns.
    fn damped(space: &GramSpace) -> Vec<f64> {
        let n = space.columns;
        let mut out = vec![0.0; n * n];
        for (i, &a) in space.order.iter().enumerate() {
            for (j, &b) in space.order.iter().enumerate() {
                out[a * n + b] = f64::from(space.gram[i * n + j]);
            }
        }
        out
    }

    #[test]
    fn descent_and_refit_lower_the_loss_of_error_feedback_and_say_by_how_much() {
        let (weight, gram) = example(40, 200);
        let space = GramSpace::new(&gram, 200, 0.01, true).unwrap();
        for (bits, symmetric) in [(2, true), (3, false), (4, true)] {
            let (mut ints, _) = round_to_nearest(&weight, grid(bits, 50, symmetric));
            error_feedback(&weight, &space, None, &mut ints);
            let feedback = ints.clone();
            let [before, after] = descend(&weight, &space, None, &mut ints, EFFORT);
            let exact = |ints: &Ints| loss(&weight, &ints.to_matrix(), &damped(&space));
            assert!((exact(&feedback) - before).abs() < 1e-3 * before && (exact(&ints) - after).abs() < 1e-3 * after);
            assert!(after < 0.95 * before, "{bits} bits: {after} {before}");
            let mut plain = feedback.clone();
            let [_, unfitted] = descend(&weight, &space, None, &mut plain, Effort { refit: false, ..EFFORT });
            assert!(after < unfitted && plain.scales == feedback.scales);
            assert!(ints.scales.iter().all(|&scale| Float::BF16.round(scale) == scale && scale != 0.0));
        }
    }

    #[test]
    fn masked_weights_stay_zero_and_no_effort_changes_nothing() {
        let (weight, gram) = example(33, 64);
        let space = GramSpace::new(&gram, 64, 0.01, true).unwrap();
        let mut mask = weight.clone();
        (0..33 * 64).step_by(3).for_each(|i| mask.data[i] = 0.0);
        let (mut ints, _) = round_to_nearest(&weight, grid(3, 32, true));
        error_feedback(&weight, &space, Some(&mask), &mut ints);
        let untouched = ints.clone();
        descend(&weight, &space, Some(&mask), &mut ints, Effort { rounds: 0, sweeps: 0, refit: false });
        assert_eq!(ints, untouched);
        descend(&weight, &space, Some(&mask), &mut ints, EFFORT);
        assert!(ints.to_matrix().data.iter().step_by(3).all(|value| *value == 0.0));
    }
}
