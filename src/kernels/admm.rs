//! The loop of ADMM pruning over slices: masks re-selected while the sparsity grows, then a fit on the last mask.
//!
//! Source: Boža, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv:2401.02938, algorithms 1
//! and 2, as specified in methods-pruning §2. Everything is in the normalised coordinates of [`crate::kernels::refit`].
//!
//! The iterate is written as V = V₀ + Δ, which turns V ← (G + ρ)⁻¹(GV₀ + ρ(Z − U)) into
//! Δ ← ρ(G + ρ)⁻¹(Z − U − V₀): one product less, no G, and a layer that needs no correction gets none, exactly.
//! On kept entries U is zero and Z = V + U; on pruned ones Z is zero and U ← V + U.

pub mod gpu;

use rayon::prelude::*;

use crate::kernels::gemm::{Sizes, View, product};
use crate::kernels::select::{keep_all_but_smallest, smallest_in_blocks};
use crate::kernels::vectorized;
use crate::weight::Pattern;

/// Which entries stay.
#[derive(Debug, Clone, Copy)]
pub enum Rule<'a> {
    /// These, from the start.
    Fixed(&'a [bool]),
    /// Those of largest |V + U| in the whole matrix, chosen again in each of the first `ramp` iterations; with a ramp
    /// of zero once, from |V₀|.
    Largest {
        /// Share to prune in the end.
        sparsity: f64,
        /// Where zeros may lie.
        pattern: Pattern,
        /// Iterations that choose.
        ramp: usize,
        /// Whether the share grows cubically over the ramp; otherwise it is the final one at once, as the released
        /// code has it for unstructured pruning. N:M patterns always grow, there as here.
        cubic: bool,
    },
}

/// Entries per piece of element-wise work.
const PIECE: usize = 1 << 14;

/// Runs `iters` iterations; gives Z, zero where pruned, and the mask of what is kept. No iterations mask V₀.
///
/// Legend: exact V₀ (rows × columns), inverse (G + ρ)⁻¹ (columns × columns), row-major.
pub fn prune(exact: &[f32], columns: usize, inverse: &[f32], rho: f32, iters: usize, rule: Rule<'_>) -> (Vec<f32>, Vec<bool>) {
    let sizes = Sizes { m: exact.len() / columns.max(1), n: columns, k: columns };
    let ramp = match rule {
        Rule::Fixed(_) => 0,
        Rule::Largest { ramp, .. } => ramp.min(iters),
    };
    let mut sums = exact.to_vec();
    let (mut dual, mut right) = (vec![0.0f32; exact.len()], vec![0.0f32; exact.len()]);
    let mut keep = match rule {
        Rule::Fixed(keep) => keep.to_vec(),
        Rule::Largest { sparsity, pattern, .. } => {
            let mut keep = vec![true; exact.len()];
            if ramp == 0 {
                choose(&sums, columns, sparsity, pattern, true, &mut keep);
            }
            keep
        }
    };
    for iteration in 0..iters {
        if let Rule::Largest { sparsity, pattern, cubic, .. } = rule
            && iteration < ramp
        {
            let last = iteration + 1 == ramp;
            let grows = cubic || pattern != Pattern::Unstructured;
            let share = if grows { ramped(sparsity, iteration, ramp) } else { sparsity };
            choose(&sums, columns, share, pattern, last, &mut keep);
        }
        split(&sums, exact, &keep, &mut dual, &mut right);
        product(sizes, &mut sums, columns, false, rho, View::rows(&right, columns), View::rows(inverse, columns), true);
        sums.par_chunks_mut(PIECE).zip(exact.par_chunks(PIECE)).zip(dual.par_chunks(PIECE)).for_each(|((sums, exact), dual)| {
            sums.iter_mut().zip(exact).zip(dual).for_each(|((sum, exact), dual)| *sum += exact + dual);
        });
    }
    sums.par_iter_mut().zip(&keep).with_min_len(PIECE).for_each(|(sum, &keep)| *sum = if keep { *sum } else { 0.0 });
    (sums, keep)
}

/// The share to prune in an iteration: S − S(1 − (t + 1)/ramp)³, S itself in the last.
pub fn ramped(sparsity: f64, iteration: usize, ramp: usize) -> f64 {
    sparsity - sparsity * (1.0 - (iteration + 1) as f64 / ramp as f64).powi(3)
}

/// U, and Z − U − V₀.
fn split(sums: &[f32], exact: &[f32], keep: &[bool], dual: &mut [f32], right: &mut [f32]) {
    let pieces = sums.par_chunks(PIECE).zip(exact.par_chunks(PIECE)).zip(keep.par_chunks(PIECE));
    pieces.zip(dual.par_chunks_mut(PIECE).zip(right.par_chunks_mut(PIECE))).for_each(|(((sums, exact), keep), (dual, right))| {
        vectorized(
            #[inline(always)]
            || {
                for ((((&sum, &exact), &keep), dual), right) in sums.iter().zip(exact).zip(keep).zip(dual).zip(right) {
                    *dual = if keep { 0.0 } else { sum };
                    *right = if keep { sum } else { -sum } - exact;
                }
            },
        );
    });
}

/// Prunes trunc(entries · share) of the smallest |V + U| in the whole matrix. With a pattern N:M only among those that
/// are not of the N largest of their block (methods-pruning §2.3), and `last` prunes all of these.
fn choose(sums: &[f32], columns: usize, share: f64, pattern: Pattern, last: bool, keep: &mut [bool]) {
    let count = (sums.len() as f64 * share) as usize;
    let mut keys: Vec<u32> = sums.par_iter().with_min_len(PIECE).map(|sum| sum.abs().to_bits()).collect();
    let Pattern::Blocks { kept, of } = pattern else {
        return keep_all_but_smallest(&keys, count, keep);
    };
    let blocks = sums.par_chunks(columns).zip(keep.par_chunks_mut(columns)).zip(keys.par_chunks_mut(columns));
    let free: Vec<usize> = blocks
        .map_init(
            || (Vec::new(), Vec::new()),
            |(scores, scratch), ((sums, keep), keys)| {
                scores.clear();
                scores.extend(sums.iter().map(|sum| sum.abs()));
                keep.fill(true);
                smallest_in_blocks(scores, kept, of, scratch, |index| keep[index] = false);
                keys.iter_mut().zip(&*keep).for_each(|(key, &protected)| *key = if protected { u32::MAX } else { *key });
                keep.iter().filter(|&&keep| !keep).count()
            },
        )
        .collect();
    if !last {
        keep_all_but_smallest(&keys, count.min(free.iter().sum()), keep);
    }
}
