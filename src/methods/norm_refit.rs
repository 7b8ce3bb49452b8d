//! Norm refit: norm tweaking in closed form, one solve per norm and no gradients.
//!
//! Source: methods-quant §2.5. For a norm that feeds linear layers with float weights W_l and compressed weights Q_l, the
//! factors s of its channels that minimise Σ_l ‖F W_lᵀ − A diag(s) Q_lᵀ‖² solve
//! (H ⊙ Σ Q_lᵀQ_l + λI) s = diag(Σ Q_lᵀ W_l M) + λ, with H = AᵀA, M = FᵀA and λ = 0.01 of the mean diagonal. F is the
//! input that the float model gives the layers, so errors of earlier blocks are corrected too. Only the norms before
//! queries, keys and values and before gate and up can be refitted this way.
//!
//! A norm is kept only where the block's error falls, on the first windows and on a sample of all. Norms are stored in
//! f32. Needs both streams; changes only norms.

use crate::error::{Error, Result};
use crate::kernels::factor::solve_rows;
use crate::kernels::gemm::{Sizes, View, product};
use crate::matrix::Matrix;
use crate::methods::{Applied, BlockApplied, BlockLayer, BlockMethod, Layer, Method};
use crate::model::architecture::NormKind;
use crate::model::bench::Bench;
use crate::model::block::{Place, Role, Site};
use crate::model::capture::Capture;
use crate::model::seen::Needs;
use crate::weight::{Storage, Weight};

/// λ as a share of the mean diagonal.
const RIDGE: f64 = 0.01;

/// Windows on which a refit is judged.
const JUDGED: usize = 16;

/// Options of norm refit: none.
#[derive(Debug, Clone, Default, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct NormRefit {}

impl Method for NormRefit {
    fn needs(&self) -> Needs {
        Needs::Streams
    }

    fn leaves(&self, before: Storage, _: [usize; 2], _: Option<u8>) -> Result<Storage> {
        Ok(before)
    }

    fn apply(&self, _: Weight, layer: &Layer<'_>) -> Result<Applied> {
        Err(Error::run("norm-refit works on whole blocks and needs calibration").tensor(layer.name))
    }

    fn block(&self) -> Option<&dyn BlockMethod> {
        Some(self)
    }

    fn norms(&self) -> bool {
        true
    }

    fn options(&self) -> toml::Table {
        toml::Table::new()
    }
}

impl BlockMethod for NormRefit {
    fn apply_block(&self, bench: &mut Bench<'_>, _: &[BlockLayer]) -> Result<BlockApplied> {
        let mut applied = BlockApplied::default();
        let count = bench.hidden.len();
        let judged: Vec<usize> = (0..count).step_by(count.div_ceil(JUDGED).max(1)).collect();
        for site in Site::ALL {
            let place = match site {
                Site::Attention => Place::AttentionIn,
                Site::Mlp => Place::MlpIn,
                Site::QueryLatent | Site::KeyValueLatent | Site::Output | Site::Down => {
                    if site == Site::Output {
                        bench.capture(site)?;
                    }
                    continue;
                }
            };
            let (most, held) = bench.capture(site)?;
            let capture = held.as_ref().map_or_else(|| most.clone(), |held| most.merged(held));
            // A router reads what experts read, and what controls a delta rule what its layers read: neither may change.
            let fixed = site == Site::Mlp && bench.block.experts.is_some() || site == Site::Attention && bench.block.delta.is_some();
            let Some(number) = bench.block.norms.iter().position(|norm| norm.place == place).filter(|_| !fixed) else { continue };
            let Some(factors) = factors(bench, site, &capture)? else {
                applied.block_notes.push(format!("the inputs of {place:?} do not determine a refit: it stays as it was"));
                continue;
            };
            let offset = if bench.model.config.family.norm == NormKind::OnePlus { 1.0 } else { 0.0 };
            let old = bench.block.norms[number].weight.clone();
            let new = old.iter().zip(&factors).map(|(weight, factor)| ((f64::from(*weight) + offset) * factor - offset) as f32).collect();
            let before = (bench.loss(&bench.parameters()?, &judged)?, bench.output_error()?);
            bench.block.norms[number].weight = new;
            let after = (bench.loss(&bench.parameters()?, &judged)?, bench.output_error()?);
            if !(after.0 <= before.0 && after.1 <= before.1) {
                bench.block.norms[number].weight = old;
                applied.block_notes.push(format!("a refit of {place:?} would raise the block's error: it stays as it was"));
            }
        }
        Ok(applied)
    }
}

/// The factors of the channels that a site's layers read; `None` when nothing determines them.
fn factors(bench: &mut Bench<'_>, site: Site, capture: &Capture) -> Result<Option<Vec<f64>>> {
    let Some(gram) = &capture.statistics.gram else { return Ok(None) };
    let mut equations = Equations::new(gram, &capture.cross);
    for role in Role::ALL.into_iter().filter(|role| role.site() == site) {
        let Some(original) = bench.original(role)? else { continue };
        let Some(linear) = bench.linear(role) else { continue };
        equations.add(&original, &linear.weight.to_matrix());
    }
    Ok(equations.solve(gram))
}

/// The normal equations of the factors.
struct Equations {
    /// M = FᵀA.
    seen: Vec<f32>,
    /// Σ Q_lᵀQ_l.
    squares: Vec<f64>,
    /// diag(Σ Q_lᵀ W_l M).
    right: Vec<f64>,
}

impl Equations {
    /// Those of no layer. `gram` is AᵀA, `cross` (F − A)ᵀA.
    fn new(gram: &[f64], cross: &[f64]) -> Self {
        let n = gram.len().isqrt();
        let seen = gram.iter().zip(cross).map(|(gram, cross)| (gram + cross) as f32).collect();
        Self { seen, squares: vec![0.0; n * n], right: vec![0.0; n] }
    }

    /// Adds a layer: its dense and its compressed weight, rows × n.
    fn add(&mut self, original: &Matrix, compressed: &Matrix) {
        let (n, rows) = (self.right.len(), compressed.rows);
        let mut squares = vec![0.0f32; n * n];
        let sizes = Sizes { m: n, n, k: rows };
        product(sizes, &mut squares, n, false, 1.0, View::transposed(&compressed.data, n), View::rows(&compressed.data, n), true);
        self.squares.iter_mut().zip(&squares).for_each(|(total, &square)| *total += f64::from(square));
        let mut pushed = vec![0.0f32; rows * n];
        product(Sizes { m: rows, n, k: n }, &mut pushed, n, false, 1.0, View::rows(&original.data, n), View::rows(&self.seen, n), true);
        for (pushed, compressed) in pushed.chunks_exact(n).zip(compressed.data.chunks_exact(n)) {
            self.right.iter_mut().zip(pushed.iter().zip(compressed)).for_each(|(right, (a, b))| *right += f64::from(*a) * f64::from(*b));
        }
    }

    /// The factors; `None` when nothing determines them.
    fn solve(mut self, gram: &[f64]) -> Option<Vec<f64>> {
        let n = self.right.len();
        self.squares.iter_mut().zip(gram).for_each(|(value, gram)| *value *= gram);
        let ridge = RIDGE * (0..n).map(|i| self.squares[i * n + i]).sum::<f64>() / n.max(1) as f64;
        (0..n).for_each(|i| {
            self.squares[i * n + i] += ridge;
            self.right[i] += ridge;
        });
        solve_rows(&self.squares, n, &self.right).filter(|_| ridge > 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Inputs, a weight, and factors near one. `scaled` says what of the compressed layer is divided by the factors.
    fn recovered(scale_weight: bool, scale_input: bool) -> (Vec<f64>, Vec<f64>) {
        let (tokens, rows, n) = (200, 40, 8);
        let noise = |i: usize| ((i * 7919 % 1009) as f64 / 1009.0 - 0.5) * 2.0;
        let expected: Vec<f64> = (0..n).map(|i| 1.0 + 0.4 * noise(3 * i + 1)).collect();
        let by = |on: bool, i: usize| if on { 1.0 / expected[i % n] } else { 1.0 };
        let float: Vec<f64> = (0..tokens * n).map(|i| noise(i * i + i)).collect();
        let seen: Vec<f64> = float.iter().enumerate().map(|(i, value)| value * by(scale_input, i)).collect();
        let original = Matrix::new(rows, n, (0..rows * n).map(|i| noise(5 * i * i + i) as f32).collect());
        let compressed = Matrix::new(rows, n, original.data.iter().enumerate().map(|(i, w)| w * by(scale_weight, i) as f32).collect());
        let (mut gram, mut cross) = (vec![0.0; n * n], vec![0.0; n * n]);
        for token in 0..tokens {
            for i in 0..n {
                for j in 0..n {
                    gram[i * n + j] += seen[token * n + i] * seen[token * n + j];
                    cross[i * n + j] += (float[token * n + i] - seen[token * n + i]) * seen[token * n + j];
                }
            }
        }
        let mut equations = Equations::new(&gram, &cross);
        equations.add(&original, &compressed);
        (equations.solve(&gram).unwrap(), expected)
    }

    #[test]
    fn factors_that_were_taken_from_weights_or_from_inputs_are_found_again_but_for_the_ridge() {
        for (weight, input) in [(true, false), (false, true)] {
            let (found, expected) = recovered(weight, input);
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 0.03, "{found} {expected}, of the weight {weight}, of the input {input}");
            }
        }
        let (found, _) = recovered(false, false);
        assert!(found.iter().all(|factor| (factor - 1.0).abs() < 1e-4), "{found:?}");
    }
}
