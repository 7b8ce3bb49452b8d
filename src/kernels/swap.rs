//! Exact refinement of a mask by swaps, in the space of the Gram matrix, without changing any weight.
//!
//! Source: Zimmer et al., "SparseSwaps", arXiv:2512.10922, as specified in quality-records §2j: with P what a row has
//! pruned and R = (w⊙P)H, pruning i instead of j changes the row's output error by
//! ΔE = 2wᵢRᵢ + wᵢ²Hᵢᵢ − 2wⱼRⱼ + wⱼ²Hⱼⱼ − 2wᵢwⱼHᵢⱼ, exactly. Every step takes the best pair that is looked at.

use rayon::prelude::*;

use crate::kernels::vectorized;

/// Entries of each side whose pairs are looked at; rows with fewer look at all pairs.
const CANDIDATES: usize = 64;

/// What swaps came to.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Swapped {
    /// Swaps done in all rows.
    pub swaps: usize,
    /// Sum of ΔE, at most zero.
    pub change: f64,
}

/// Swaps pairs of kept and pruned entries in every row, at most `limit` each, until no pair that is looked at lowers
/// the error. With `group`, pairs lie inside one aligned group of that many columns, which keeps an N:M pattern.
/// Every row keeps as many entries as before.
///
/// Legend: weight, keep (rows × columns), gram H (columns × columns), row-major.
pub fn refine(weight: &[f32], keep: &mut [bool], gram: &[f64], columns: usize, group: Option<usize>, limit: usize) -> Swapped {
    let rows = keep.par_chunks_mut(columns.max(1)).zip(weight.par_chunks(columns.max(1)));
    let parts: Vec<Swapped> = rows.map_init(Row::default, |row, (keep, weight)| row.refine(weight, keep, gram, group, limit)).collect();
    parts.iter().fold(Swapped::default(), |total, part| Swapped { swaps: total.swaps + part.swaps, change: total.change + part.change })
}

/// A row that is worked on.
#[derive(Default)]
struct Row {
    /// w.
    weight: Vec<f64>,
    /// R = (w⊙P)H.
    pull: Vec<f64>,
    /// ΔE but for the mixed term: of pruning a kept entry, of restoring a pruned one.
    cost: Vec<f64>,
    /// Columns that are kept, and that are pruned, of lowest cost.
    sides: [Vec<usize>; 2],
}

impl Row {
    fn refine(&mut self, weight: &[f32], keep: &mut [bool], gram: &[f64], group: Option<usize>, limit: usize) -> Swapped {
        let columns = weight.len();
        self.weight.clear();
        self.weight.extend(weight.iter().map(|&weight| f64::from(weight)));
        self.pull.clear();
        self.pull.resize(columns, 0.0);
        for column in (0..columns).filter(|&column| !keep[column]) {
            add(&mut self.pull, self.weight[column], &gram[column * columns..][..columns]);
        }
        let mut done = Swapped::default();
        // Rounding must not make two masks of equal error take turns.
        let size: f64 = self.weight.iter().enumerate().map(|(column, weight)| weight * weight * gram[column * (columns + 1)]).sum();
        while done.swaps < limit {
            let (change, out, back) = self.best(keep, gram, group);
            if change < -1e-12 * size && change.is_finite() {
                (keep[out], keep[back]) = (false, true);
                add(&mut self.pull, self.weight[out], &gram[out * columns..][..columns]);
                add(&mut self.pull, -self.weight[back], &gram[back * columns..][..columns]);
                done = Swapped { swaps: done.swaps + 1, change: done.change + change };
            } else {
                break;
            }
        }
        done
    }

    /// The lowest ΔE with what to prune and what to restore.
    fn best(&mut self, keep: &[bool], gram: &[f64], group: Option<usize>) -> (f64, usize, usize) {
        let columns = keep.len();
        self.cost.clear();
        self.cost.extend((0..columns).map(|column| {
            let weight = self.weight[column];
            let mixed = 2.0 * weight * self.pull[column];
            weight * weight * gram[column * (columns + 1)] + if keep[column] { mixed } else { -mixed }
        }));
        let mut best = (0.0, 0, 0);
        match group {
            Some(group) => (0..columns).step_by(group).for_each(|start| {
                let group = start..(start + group).min(columns);
                self.sides[0].clear();
                self.sides[0].extend(group.clone().filter(|&column| keep[column]));
                self.sides[1].clear();
                self.sides[1].extend(group.filter(|&column| !keep[column]));
                self.look(gram, &mut best);
            }),
            None => {
                for (side, kept) in self.sides.iter_mut().zip([true, false]) {
                    side.clear();
                    side.extend((0..columns).filter(|&column| keep[column] == kept));
                    if columns > 2 * CANDIDATES && side.len() > CANDIDATES {
                        side.select_nth_unstable_by(CANDIDATES, |&a, &b| self.cost[a].total_cmp(&self.cost[b]).then(a.cmp(&b)));
                        side.truncate(CANDIDATES);
                    }
                }
                self.look(gram, &mut best);
            }
        }
        best
    }

    /// Looks at all pairs of the two sides.
    fn look(&self, gram: &[f64], best: &mut (f64, usize, usize)) {
        let columns = self.weight.len();
        for &out in &self.sides[0] {
            let line = &gram[out * columns..][..columns];
            for &back in &self.sides[1] {
                let change = self.cost[out] + self.cost[back] - 2.0 * self.weight[out] * self.weight[back] * line[back];
                if change < best.0 {
                    *best = (change, out, back);
                }
            }
        }
    }
}

/// Adds a multiple of a line of the Gram matrix.
fn add(pull: &mut [f64], factor: f64, line: &[f64]) {
    vectorized(
        #[inline(always)]
        || pull.iter_mut().zip(line).for_each(|(pull, gram)| *pull += factor * gram),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::quadratic::layer_error;

    /// A Gram matrix of correlated inputs.
    fn gram(columns: usize, seed: usize) -> Vec<f64> {
        let x = |t: usize, j: usize| ((t * 31 + j * 17 + t * j + seed * 7) as f64 * 0.61).sin() + ((t + seed) as f64 * 0.3).cos() * 0.5;
        (0..columns * columns).map(|at| (0..2 * columns).map(|t| x(t, at / columns) * x(t, at % columns)).sum()).collect()
    }

    fn masked(weight: &[f32], keep: &[bool]) -> Vec<f32> {
        weight.iter().zip(keep).map(|(&weight, &keep)| if keep { weight } else { 0.0 }).collect()
    }

    #[test]
    fn the_sum_of_changes_is_the_recomputed_change_of_the_error_and_counts_stay() {
        for (columns, group) in [(24, None), (200, None), (24, Some(4)), (200, Some(8))] {
            let gram = gram(columns, 3);
            let weight: Vec<f32> = (0..6 * columns).map(|i| (i as f32 * 1.7).sin()).collect();
            let mut keep: Vec<bool> = (0..6 * columns).map(|i| i % 2 == 0).collect();
            let before = layer_error(&gram, &weight, &masked(&weight, &keep), columns);
            let swapped = refine(&weight, &mut keep, &gram, columns, group, 1000);
            let after = layer_error(&gram, &weight, &masked(&weight, &keep), columns);
            assert!(swapped.swaps > 6 && swapped.change < 0.0, "{columns} {group:?} {swapped:?}");
            assert!((after - before - swapped.change).abs() < 1e-6 * before, "{before} {after} {}", swapped.change);
            assert!(keep.chunks(group.unwrap_or(columns)).all(|part| part.iter().filter(|keep| **keep).count() * 2 == part.len()));
        }
    }

    #[test]
    fn no_single_swap_improves_what_was_refined_without_a_limit() {
        let columns = 16;
        let gram = gram(columns, 1);
        let weight: Vec<f32> = (0..columns).map(|i| (i as f32 * 0.9).cos()).collect();
        let mut keep: Vec<bool> = (0..columns).map(|i| i < 8).collect();
        refine(&weight, &mut keep, &gram, columns, None, usize::MAX);
        let error = |keep: &[bool]| layer_error(&gram, &weight, &masked(&weight, keep), columns);
        let own = error(&keep);
        for pair in 0..columns * columns {
            let (out, back) = (pair / columns, pair % columns);
            if keep[out] && !keep[back] {
                let mut other = keep.clone();
                (other[out], other[back]) = (false, true);
                assert!(error(&other) >= own * (1.0 - 1e-6));
            }
        }
    }

    #[test]
    fn the_limit_is_kept_and_hostile_rows_end() {
        let columns = 8;
        let gram = gram(columns, 2);
        let mut keep = vec![true, false, true, false, true, false, true, false];
        let before = keep.clone();
        let weight: Vec<f32> = (0..8).map(|i| i as f32 - 3.0).collect();
        assert_eq!(refine(&weight, &mut keep, &gram, columns, None, 0), Swapped::default());
        assert_eq!(keep, before);
        assert!(refine(&weight, &mut keep, &gram, columns, None, 1).swaps <= 1);
        for weight in [vec![0.0f32; 8], vec![3e38; 8], vec![f32::NAN; 8]] {
            for gram in [vec![0.0; 64], gram.clone(), vec![1e300; 64]] {
                refine(&weight, &mut keep, &gram, columns, None, usize::MAX);
                assert_eq!(keep.iter().filter(|keep| **keep).count(), 4);
            }
        }
    }
}
