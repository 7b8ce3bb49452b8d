//! Magnitude pruning, the baseline that looks at weights alone.
//!
//! Source: as the baseline of arXiv:2306.11695 and its released code (methods-pruning §1.2): one threshold over the
//! whole matrix. Needs nothing. The paper's count is the default; `reference_code` repeats the released code, which
//! prunes everything up to and including the threshold, so one entry and all ties more.

use rayon::prelude::*;

use crate::error::Result;
use crate::kernels::select::{smallest, smallest_in_blocks};
use crate::matrix::Matrix;
use crate::methods::{Applied, Layer, Method, prunable, share};
use crate::model::seen::Needs;
use crate::weight::{Pattern, Sparse, Storage, Weight};

/// Options of magnitude pruning.
#[derive(Debug, Clone, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Magnitude {
    /// Share of the weights of the matrix to prune; 0.5 by default; N:M patterns imply theirs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f64>,
    /// Where zeros may lie.
    #[serde(default)]
    pub pattern: Pattern,
    /// Prune one entry and all ties more, as the released code does.
    #[serde(default)]
    pub reference_code: bool,
}

impl Method for Magnitude {
    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn leaves(&self, before: Storage, [_, columns]: [usize; 2], _: Option<u8>) -> Result<Storage> {
        share(self.sparsity, self.pattern)?;
        prunable(before, columns, self.pattern)?;
        Ok(Storage::Sparse(self.pattern))
    }

    fn apply(&self, weight: Weight, layer: &Layer<'_>) -> Result<Applied> {
        let mut matrix = weight.into_matrix();
        let change = prune(&mut matrix, share(layer.sparsity.or(self.sparsity), self.pattern)?, self.pattern, self.reference_code);
        Ok(Applied::new(Weight::Sparse(Sparse { matrix, pattern: self.pattern }), change))
    }

    fn options(&self) -> toml::Table {
        toml::Table::try_from(self).unwrap_or_default()
    }
}

/// Zeroes the smallest magnitudes: trunc(entries · sparsity) of the whole matrix, or all but N of every M consecutive
/// columns. Gives the sums of squares of what was pruned and of all weights.
pub fn prune(weight: &mut Matrix, sparsity: f64, pattern: Pattern, reference_code: bool) -> [f64; 2] {
    let scores: Vec<f32> = weight.data.par_iter().map(|value| value.abs()).collect();
    let total = scores.iter().map(|&value| f64::from(value).powi(2)).sum();
    let mut pruned = 0.0;
    let data = &mut weight.data;
    let zero = |index: usize| {
        pruned += f64::from(data[index]).powi(2);
        data[index] = 0.0;
    };
    let mut scratch = Vec::new();
    let count = (scores.len() as f64 * sparsity) as usize;
    match pattern {
        Pattern::Blocks { kept, of } => smallest_in_blocks(&scores, kept, of, &mut scratch, zero),
        Pattern::Unstructured if reference_code && count < scores.len() => {
            let mut sorted = scores.clone();
            let threshold = *sorted.select_nth_unstable_by(count, f32::total_cmp).1;
            scores.iter().enumerate().filter(|(_, score)| **score <= threshold).map(|(index, _)| index).for_each(zero);
        }
        Pattern::Unstructured => smallest(&scores, count, &mut scratch, zero),
    }
    [pruned, total]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::quadratic::layer_error;
    use crate::methods::wanda::tests::{golden_inputs, golden_statistics, mask};

    #[test]
    fn the_reference_code_gives_its_golden_mask_and_error() {
        let (_, exact) = golden_inputs();
        let mut weight = exact.clone();
        prune(&mut weight, 0.5, Pattern::Unstructured, true);
        assert_eq!(mask(&weight), "10011001 00101001 01011010 00110011");
        let error = layer_error(&golden_statistics().gram.unwrap(), &exact.data, &weight.data, exact.columns);
        assert!((error - 415.102903).abs() < 1e-3, "{error}");
    }

    #[test]
    fn the_default_prunes_the_exact_count_and_blocks_keep_n_of_m() {
        let (_, exact) = golden_inputs();
        for (sparsity, zeros) in [(0.5, 16), (0.3, 9), (0.0, 0)] {
            let mut weight = exact.clone();
            let [pruned, total] = prune(&mut weight, sparsity, Pattern::Unstructured, false);
            assert_eq!(weight.zeros(), zeros);
            assert!(pruned <= sparsity * total);
        }
        let mut weight = exact.clone();
        prune(&mut weight, 0.5, Pattern::Blocks { kept: 1, of: 4 }, false);
        assert!(weight.data.chunks(4).all(|block| block.iter().filter(|value| **value != 0.0).count() == 1));
    }
}
