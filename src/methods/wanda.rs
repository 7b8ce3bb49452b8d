//! Wanda: pruning by weights and activations.
//!
//! Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695, eq. 1,
//! as specified in methods-pruning §1. Needs Σx² of the input columns; leaves the surviving weights bit for bit.
//! It does not update weights, and statistics of a whole block come from the block before any of it is pruned.
//!
//! Two options go beyond the paper and need XᵀX: `swaps` refines the mask by exact swaps of pairs (SparseSwaps,
//! arXiv:2512.10922, quality-records §2j), and `refit` fits the surviving weights to the mask by least squares.

use rayon::prelude::*;

use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::kernels::quadratic::layer_error;
use crate::kernels::refit::{conjugate_gradient, correlation, normalised, norms, restored};
use crate::kernels::select::{self, smallest, smallest_in_blocks};
use crate::kernels::swap::refine;
use crate::matrix::Matrix;
use crate::methods::sparsegpt::{fits, settle};
use crate::methods::{self, Applied, Layer, Method, prunable, share};
use crate::model::seen::Needs;
use crate::weight::{Pattern, Sparse, Storage, Weight};

/// Options of Wanda.
#[derive(Debug, Clone, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Wanda {
    /// Share of the weights of every row to prune; 0.5 by default; N:M patterns imply theirs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f64>,
    /// Where zeros may lie.
    #[serde(default)]
    pub pattern: Pattern,
    /// Swaps of a kept for a pruned entry in every row at most, while they lower the layer error; none in the paper.
    #[serde(default)]
    pub swaps: usize,
    /// Whether the surviving weights are fitted to the mask; not in the paper.
    #[serde(default)]
    pub refit: bool,
}

/// Share of the mean diagonal of the normalised Gram matrix that the refit adds to it: with fewer calibration tokens
/// than a few times the columns, none at all serves unseen inputs less well.
const REFIT_DAMPING: f64 = 0.01;

/// Steps of conjugate gradients at most; rows stop when they have converged.
const REFIT_STEPS: usize = 60;

impl Method for Wanda {
    fn needs(&self) -> Needs {
        if self.swaps > 0 || self.refit { Needs::Gram } else { Needs::SquaredNorms }
    }

    fn leaves(&self, before: Storage, [_, columns]: [usize; 2], _: Option<u8>) -> Result<Storage> {
        share(self.sparsity, self.pattern)?;
        prunable(before, columns, self.pattern)?;
        Ok(Storage::Sparse(self.pattern))
    }

    fn apply(&self, weight: Weight, layer: &Layer<'_>) -> Result<Applied> {
        if layer.sparsity.is_some() {
            return Self { sparsity: layer.sparsity, ..self.clone() }.apply(weight, &Layer { sparsity: None, ..*layer });
        }
        let statistics = layer.statistics.ok_or_else(|| Error::run("wanda needs calibration").tensor(layer.name))?;
        let mut matrix = weight.into_matrix();
        let exact = (self.needs() == Needs::Gram).then(|| matrix.clone());
        let sparsity = share(self.sparsity, self.pattern)?;
        let change = match layer.gpu {
            Some(gpu) => prune_on(gpu, &mut matrix, &statistics.norms(), sparsity, self.pattern)?,
            None => prune(&mut matrix, &statistics.norms(), sparsity, self.pattern),
        };
        let Some(exact) = exact else { return Ok(Applied::new(Weight::Sparse(Sparse { matrix, pattern: self.pattern }), change)) };
        let (mut matrix, notes) = self.improve(&exact, matrix, layer.gram()?)?;
        settle(&mut matrix.data, layer.float);
        let change = methods::change(&exact.data, &matrix.data);
        Ok(Applied { notes, ..Applied::new(Weight::Sparse(Sparse { matrix, pattern: self.pattern }), change) })
    }

    fn options(&self) -> toml::Table {
        toml::Table::try_from(self).unwrap_or_default()
    }
}

impl Wanda {
    /// Swaps and refits, given the exact and the masked weight and H = XᵀX; gives what the user should know too.
    fn improve(&self, exact: &Matrix, masked: Matrix, gram: &[f64]) -> Result<(Matrix, Vec<String>)> {
        fits(exact, gram)?;
        let columns = exact.columns;
        let mut keep: Vec<bool> = masked.data.iter().map(|&value| value != 0.0).collect();
        let mut notes = Vec::new();
        let mut data = masked.data;
        if self.swaps > 0 {
            let group = match self.pattern {
                Pattern::Unstructured => None,
                Pattern::Blocks { of, .. } => Some(of),
            };
            let before = layer_error(gram, &exact.data, &data, columns);
            let swapped = refine(&exact.data, &mut keep, gram, columns, group, self.swaps);
            let kept = |(&value, &keep): (&f32, &bool)| if keep { value } else { 0.0 };
            data = exact.data.iter().zip(&keep).map(kept).collect();
            let share = if before > 0.0 { -swapped.change / before } else { 0.0 };
            notes.push(format!("{} swaps took {:.1} % off the layer error", swapped.swaps, 100.0 * share));
        }
        if self.refit {
            let fitted = refit(exact, gram, &keep);
            let [fitted_error, masked_error] = [&fitted, &data].map(|data| layer_error(gram, &exact.data, data, columns));
            if fitted_error <= masked_error {
                data = fitted;
            } else {
                notes.push("the refit raised the layer error, so weights are masked only".into());
            }
        }
        Ok((Matrix::new(exact.rows, columns, data), notes))
    }
}

/// The least-squares weights on a mask.
fn refit(exact: &Matrix, gram: &[f64], keep: &[bool]) -> Vec<f32> {
    let norms = norms(gram, exact.columns);
    let correlation: Vec<f32> = correlation(gram, &norms, REFIT_DAMPING, 0.0).iter().map(|&value| value as f32).collect();
    let (values, factor) = normalised(&exact.data, &norms);
    let mut fitted: Vec<f32> = values.iter().zip(keep).map(|(&value, &keep)| if keep { value } else { 0.0 }).collect();
    conjugate_gradient(&values, &mut fitted, keep, &correlation, exact.columns, REFIT_STEPS);
    restored(&fitted, &norms, factor)
}

/// Zeroes, in every row, the entries with the smallest |W_ij| · ‖X_j‖₂ (eq. 1): trunc(columns · sparsity) of them, or
/// of every M consecutive columns all but N. Ties go to the lower column. Gives the sums of squares of what was pruned
/// and of all weights.
///
/// Legend: weight (outputs × inputs), norms ‖X_j‖₂ per input up to a common factor.
pub fn prune(weight: &mut Matrix, norms: &[f32], sparsity: f64, pattern: Pattern) -> [f64; 2] {
    let count = (weight.columns as f64 * sparsity) as usize;
    let rows = weight.data.par_chunks_mut(weight.columns).with_min_len(8).map_init(
        || (Vec::new(), Vec::new()),
        |(scores, scratch), row| {
            scores.clear();
            scores.extend(row.iter().zip(norms).map(|(weight, norm)| (weight.abs() * norm).min(f32::MAX)));
            let total: f64 = row.iter().map(|&weight| f64::from(weight).powi(2)).sum();
            let mut pruned = 0.0;
            let zero = |column: usize| {
                pruned += f64::from(row[column]).powi(2);
                row[column] = 0.0;
            };
            match pattern {
                Pattern::Unstructured => smallest(scores, count, scratch, zero),
                Pattern::Blocks { kept, of } => smallest_in_blocks(scores, kept, of, scratch, zero),
            }
            [pruned, total]
        },
    );
    let sums: Vec<[f64; 2]> = rows.collect();
    sums.iter().fold([0.0; 2], |total, row| [total[0] + row[0], total[1] + row[1]])
}

/// As [`prune`], on a GPU.
///
/// # Errors
/// When the GPU fails.
fn prune_on(gpu: &Gpu, weight: &mut Matrix, norms: &[f32], sparsity: f64, pattern: Pattern) -> Result<[f64; 2]> {
    let energy = |matrix: &Matrix| -> f64 { matrix.data.iter().map(|&weight| f64::from(weight).powi(2)).sum() };
    let total = energy(weight);
    let blocks = match pattern {
        Pattern::Unstructured => None,
        Pattern::Blocks { kept, of } => Some([kept, of]),
    };
    select::gpu::prune(gpu, weight, norms, (weight.columns as f64 * sparsity) as usize, blocks)?;
    Ok([total - energy(weight), total])
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::kernels::quadratic::layer_error;
    use crate::model::seen::Statistics;
    use crate::weight::Float;

    /// The inputs of the golden vectors, methods-pruning §8: X (24 × 8) and W (4 × 8).
    pub(crate) fn golden_inputs() -> (Vec<f64>, Matrix) {
        let entry = |t: usize, j: usize| {
            let x = (0.37 * (t + 1) as f64 * (j + 1) as f64).sin() + 0.25 * (1.7 * t as f64 + 0.9 * j as f64).cos();
            if j == 5 { 6.0 * x } else { x }
        };
        let x = (0..24 * 8).map(|i| entry(i / 8, i % 8)).collect();
        let weight = Matrix::from_fn(4, 8, |i, j| (0.53 * (i + 1) as f64 * (j + 1) as f64 + 0.2 * j as f64).cos() as f32);
        (x, weight)
    }

    pub(crate) fn golden_statistics() -> Statistics {
        let (x, _) = golden_inputs();
        let gram: Vec<f64> = (0..64).map(|ab| (0..24).map(|t| x[t * 8 + ab / 8] * x[t * 8 + ab % 8]).sum()).collect();
        Statistics::new(24, (0..8).map(|j| gram[j * 9]).collect(), Some(gram))
    }

    pub(crate) fn mask(weight: &Matrix) -> String {
        let bits = |row: usize| weight.row(row).iter().map(|&value| if value == 0.0 { '0' } else { '1' }).collect::<String>();
        (0..weight.rows).map(bits).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn golden_masks_and_errors() {
        let statistics = golden_statistics();
        let diagonal = [13.595738, 13.129859, 12.544751, 13.702392, 12.615115, 459.161216, 12.242489, 12.068016];
        assert!(statistics.squares.iter().zip(diagonal).all(|(a, b)| (a - b).abs() < 1e-5), "{:?}", statistics.squares);
        for (pattern, expected, error) in [
            (Pattern::Unstructured, "10011100 00101101 01010110 00110110", 52.010610),
            (Pattern::Blocks { kept: 2, of: 4 }, "10011100 01101100 01010110 00110110", 57.026521),
        ] {
            let (_, exact) = golden_inputs();
            let mut weight = exact.clone();
            prune(&mut weight, &statistics.norms(), 0.5, pattern);
            assert_eq!(mask(&weight), expected);
            let gram = statistics.gram.as_ref().unwrap();
            let error_of = |compressed: &[f32]| layer_error(gram, &exact.data, compressed, exact.columns);
            let (found, total) = (error_of(&weight.data), error_of(&[0.0; 32]));
            assert!((found - error).abs() < 1e-4 && (total - 579.085844).abs() < 1e-3, "{found} {total}");
        }
    }

    #[test]
    fn constant_norms_give_the_magnitude_mask_of_each_row() {
        let (_, exact) = golden_inputs();
        let mut weight = exact.clone();
        prune(&mut weight, &[3.0; 8], 0.5, Pattern::Unstructured);
        for row in 0..4 {
            let mut order: Vec<usize> = (0..8).collect();
            order.sort_by(|&a, &b| exact.row(row)[a].abs().total_cmp(&exact.row(row)[b].abs()));
            assert!(order[..4].iter().all(|&column| weight.row(row)[column] == 0.0));
        }
    }

    #[test]
    fn scaling_a_column_and_its_input_inversely_leaves_the_mask() {
        let (_, exact) = golden_inputs();
        let norms = golden_statistics().norms();
        let (mut plain, mut scaled) = (exact.clone(), exact.clone());
        let mut scaled_norms = norms.clone();
        scaled_norms[3] *= 8.0;
        (0..4).for_each(|row| scaled.data[row * 8 + 3] /= 8.0);
        prune(&mut plain, &norms, 0.5, Pattern::Unstructured);
        prune(&mut scaled, &scaled_norms, 0.5, Pattern::Unstructured);
        assert_eq!(mask(&plain), mask(&scaled));
    }

    #[test]
    fn for_one_row_with_uncorrelated_inputs_no_mask_of_the_size_has_a_lower_error() {
        let weight = [0.9f32, -0.2, 0.4, 1.1, -0.7, 0.05, 0.3, -0.6];
        let norms = [0.3f32, 5.0, 1.0, 0.2, 0.9, 8.0, 2.0, 0.1];
        let cost = |mask: u32| -> f32 { (0..8).filter(|j| mask >> j & 1 == 0).map(|j| (weight[j] * norms[j]).powi(2)).sum() };
        let mut row = Matrix::new(1, 8, weight.to_vec());
        prune(&mut row, &norms, 0.5, Pattern::Unstructured);
        let own = (0..8).filter(|&j| row.data[j] != 0.0).map(|j| 1 << j).sum();
        let best = (0u32..256).filter(|mask| mask.count_ones() == 4).map(cost).fold(f32::INFINITY, f32::min);
        assert!(cost(own) <= best * 1.00001, "{} {best}", cost(own));
    }

    #[test]
    fn swaps_lower_the_error_and_the_refit_lowers_it_more_with_exact_counts() {
        let (exact, gram) = methods::admm::tests::layer(16, 48, 300, 3);
        let squares = (0..48).map(|j| gram[j * 49]).collect();
        let statistics = Statistics::new(300, squares, Some(gram.clone()));
        let layer = Layer {
            name: "x",
            statistics: Some(&statistics),
            float: Float::F32,
            bits: None,
            sparsity: None,
            bounds: None,
            goal: None,
            gpu: None,
        };
        for pattern in [Pattern::Unstructured, Pattern::Blocks { kept: 2, of: 4 }] {
            let run = |swaps, refit| {
                let wanda = Wanda { sparsity: None, pattern, swaps, refit };
                let applied = wanda.apply(Weight::Dense(exact.clone()), &layer).unwrap();
                let matrix = applied.weight.into_matrix();
                assert!((0..16).all(|row| matrix.row(row).iter().filter(|value| **value == 0.0).count() == 24));
                (layer_error(&gram, &exact.data, &matrix.data, 48), applied.notes, matrix)
            };
            let (plain, swapped, fitted, both) = (run(0, false), run(1000, false), run(0, true), run(1000, true));
            assert!(swapped.0 < plain.0 && fitted.0 < plain.0 && both.0 < swapped.0);
            // On the layers of a model a better mask refits better; nothing promises it.
            assert!(both.0 < fitted.0 * 1.1, "{pattern}: {} {} {} {}", plain.0, swapped.0, fitted.0, both.0);
            assert!(plain.1.is_empty() && swapped.1[0].contains("swaps took"), "{:?}", swapped.1);
            assert!(swapped.2.data.iter().zip(&exact.data).all(|(a, b)| *a == 0.0 || a.to_bits() == b.to_bits()));
        }
    }

    #[test]
    fn the_refit_is_least_squares_on_the_mask() {
        let (exact, gram) = methods::admm::tests::layer(12, 40, 200, 5);
        let keep: Vec<bool> = (0..480).map(|i| i * 7 % 5 > 1).collect();
        let damped: Vec<f64> = (0..1600).map(|at| if at % 41 == 0 { gram[at] * (1.0 + REFIT_DAMPING) } else { gram[at] }).collect();
        let best = methods::admm::tests::least_squares(&exact, &damped, &keep);
        let found = layer_error(&damped, &exact.data, &refit(&exact, &gram, &keep), 40);
        let best = layer_error(&damped, &exact.data, &best.data, 40);
        assert!(found <= best * 1.001, "{found} {best}");
    }

    proptest::proptest! {
        #[test]
        fn every_row_has_the_exact_number_of_zeros_and_survivors_are_untouched(
            values in proptest::collection::vec(0.1f32..2.0, 5 * 24), norms in proptest::collection::vec(0.0f32..4.0, 24), share in 0.0f64..0.99
        ) {
            let exact = Matrix::new(5, 24, values);
            let mut weight = exact.clone();
            prune(&mut weight, &norms, share, Pattern::Unstructured);
            for row in 0..5 {
                let zeros = weight.row(row).iter().filter(|value| **value == 0.0).count();
                proptest::prop_assert_eq!(zeros, (24.0 * share) as usize);
            }
            proptest::prop_assert!(weight.data.iter().zip(&exact.data).all(|(a, b)| *a == 0.0 || a.to_bits() == b.to_bits()));
            for (kept, of) in [(2, 4), (1, 4), (3, 4), (4, 8)] {
                let mut weight = exact.clone();
                prune(&mut weight, &norms, share, Pattern::Blocks { kept, of });
                proptest::prop_assert!(weight.data.chunks(of).all(|block| block.iter().filter(|value| **value != 0.0).count() == kept));
            }
        }
    }
}
