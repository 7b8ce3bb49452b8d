//! SparseGPT over slices: columns are pruned one after another, and what each loses is made up for by those after it.
//!
//! Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
//! arXiv:2301.00774, algorithm 1, as specified in methods-pruning §3. All in f64: the factor of an inverse that is
//! damped by a hundredth loses most digits of f32. Rows are independent once a block's mask is known, so they are
//! compensated in parallel, and what a block owes the columns after it is one product per piece of rows.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::kernels::select::keep_all_but_smallest;
use crate::kernels::vectorized;

/// Which entries stay.
#[derive(Debug, Clone, Copy)]
pub enum Rule<'a> {
    /// These.
    Fixed(&'a [bool]),
    /// All but the given share of every block of columns, by the smallest w²/U_jj² of the compensated weights. Counts
    /// are such that those of all blocks up to any are trunc(entries · share).
    Share(f64),
    /// As [`Rule::Share`], with everything up to and including the first score that should stay, as the released code
    /// prunes it: one entry more per block, and ties.
    ShareInclusive(f64),
    /// `kept` of every `of` consecutive columns, chosen when their turn comes. Blocks must consist of whole groups.
    Blocks {
        /// Entries that stay in a group.
        kept: usize,
        /// Columns in a group.
        of: usize,
    },
}

/// Rows that are compensated together.
const PIECE: usize = 32;

/// Prunes and compensates `weight` (rows × columns) in blocks of `width` columns; gives what is kept. Pruned entries
/// are zero.
///
/// Legend: upper U (columns × columns) with H⁻¹ = UᵀU.
pub fn prune(weight: &mut [f64], columns: usize, upper: &[f64], width: usize, rule: Rule<'_>) -> Vec<bool> {
    let mut keep = match rule {
        Rule::Fixed(keep) => keep.to_vec(),
        _ => vec![true; weight.len()],
    };
    let pieces = PIECE * columns.max(1);
    for start in (0..columns).step_by(width.max(1)) {
        let block = Block { columns, start, end: (start + width).min(columns), upper };
        match rule {
            Rule::Share(share) => block.choose(weight, &mut keep, share, false),
            Rule::ShareInclusive(share) => block.choose(weight, &mut keep, share, true),
            Rule::Fixed(_) | Rule::Blocks { .. } => {}
        }
        weight.par_chunks_mut(pieces).zip(keep.par_chunks_mut(pieces)).for_each_init(Vec::new, |errors, (weight, keep)| {
            errors.clear();
            errors.resize(weight.len() / columns * (block.end - start), 0.0);
            let rows = weight.chunks_exact_mut(columns).zip(keep.chunks_exact_mut(columns));
            for ((weight, keep), errors) in rows.zip(errors.chunks_exact_mut(block.end - start)) {
                block.compensate(weight, keep, errors, rule);
            }
            block.pass_on(weight, errors);
        });
    }
    keep
}

/// Consecutive columns that are pruned with one reading of the columns after them.
struct Block<'a> {
    columns: usize,
    start: usize,
    end: usize,
    upper: &'a [f64],
}

impl Block<'_> {
    fn diagonal(&self, column: usize) -> f64 {
        self.upper[column * (self.columns + 1)]
    }

    /// Marks what of the block is pruned, over all rows: smallest |w|/U_jj first, ties by lower row, then column.
    fn choose(&self, weight: &[f64], keep: &mut [bool], share: f64, inclusive: bool) {
        let (columns, width) = (self.columns, self.end - self.start);
        let rows = weight.len() / columns;
        let score = |at: usize| {
            let column = self.start + at % width;
            ((weight[at / width * columns + column].abs() / self.diagonal(column)) as f32).min(f32::MAX).to_bits()
        };
        let keys: Vec<u32> = (0..rows * width).into_par_iter().with_min_len(4096).map(score).collect();
        let mut chosen = vec![true; keys.len()];
        if inclusive {
            let mut sorted = keys.clone();
            let count = ((keys.len() as f64 * share) as usize).min(keys.len() - 1);
            let threshold = *sorted.select_nth_unstable(count).1;
            chosen.iter_mut().zip(&keys).for_each(|(keep, &key)| *keep = key > threshold);
        } else {
            let up_to = |column: usize| ((rows * column) as f64 * share) as usize;
            keep_all_but_smallest(&keys, up_to(self.end) - up_to(self.start), &mut chosen);
        }
        for (keep, chosen) in keep.chunks_exact_mut(columns).zip(chosen.chunks_exact(width)) {
            keep[self.start..self.end].copy_from_slice(chosen);
        }
    }

    /// Prunes one row inside the block, column by column: e = w_i/U_ii, w_j ← w_j − e·U_ij. Keeps every e.
    fn compensate(&self, row: &mut [f64], keep: &mut [bool], errors: &mut [f64], rule: Rule<'_>) {
        for column in self.start..self.end {
            if let Rule::Blocks { kept, of } = rule
                && column % of == 0
            {
                self.choose_group(&row[column..column + of], &mut keep[column..column + of], column, kept);
            }
            if keep[column] || row[column] == 0.0 {
                continue;
            }
            let error = row[column] / self.diagonal(column);
            let owed = &self.upper[column * self.columns..][column + 1..self.end];
            let after = &mut row[column + 1..self.end];
            vectorized(
                #[inline(always)]
                || after.iter_mut().zip(owed).for_each(|(weight, upper)| *weight -= error * upper),
            );
            row[column] = 0.0;
            errors[column - self.start] = error;
        }
    }

    /// Keeps the `kept` largest |w|/U_jj of a group that starts at a column; ties prune the lower column.
    fn choose_group(&self, weights: &[f64], keep: &mut [bool], column: usize, kept: usize) {
        let score = |at: usize| weights[at].abs() / self.diagonal(column + at);
        for (at, keep) in keep.iter_mut().enumerate() {
            let own = score(at);
            let smaller = (0..weights.len()).filter(|&other| score(other) < own || (score(other) == own && other < at)).count();
            *keep = smaller >= weights.len() - kept;
        }
    }

    /// Charges the columns after the block with its errors: W ← W − E·U.
    fn pass_on(&self, weight: &mut [f64], errors: &[f64]) {
        let (width, rest) = (self.end - self.start, self.columns - self.end);
        let rows = weight.len() / self.columns;
        if rest == 0 {
            return;
        }
        let weight = MatMut::from_row_major_slice_mut(weight, rows, self.columns).subcols_mut(self.end, rest);
        let errors = MatRef::from_row_major_slice(errors, rows, width);
        let upper = MatRef::from_row_major_slice(self.upper, self.columns, self.columns);
        matmul(weight, Accum::Add, errors, upper.submatrix(self.start, self.end, width, rest), -1.0, Par::Seq);
    }
}
