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
use crate::methods::{Applied, BlockApplied, BlockLayer, BlockMethod, Layer, Method};
use crate::model::architecture::NormKind;
use crate::model::bench::{Bench, Capture};
use crate::model::block::{Place, Role, Site};
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
                Site::Output | Site::Down => {
                    if site == Site::Output {
                        bench.capture(site)?;
                    }
                    continue;
                }
            };
            let (most, held) = bench.capture(site)?;
            let capture = held.as_ref().map_or_else(|| most.clone(), |held| most.merged(held));
            let Some(number) = bench.block.norms.iter().position(|norm| norm.place == place) else { continue };
            let Some(factors) = factors(bench, site, &capture)? else {
                applied.block_notes.push(format!("the inputs of {place:?} do not determine a refit: it stays as it was"));
                continue;
            };
            let offset = if bench.model.config.family.norm == NormKind::OnePlus { 1.0 } else { 0.0 };
            let old = bench.block.norms[number].weight.clone();
            let new = old.iter().zip(&factors).map(|(weight, factor)| ((f64::from(*weight) + offset) * factor - offset) as f32).collect();
            let before = (bench.loss(&bench.parameters(), &judged)?, bench.output_error()?);
            bench.block.norms[number].weight = new;
            let after = (bench.loss(&bench.parameters(), &judged)?, bench.output_error()?);
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
    let n = capture.statistics.squares.len();
    let seen: Vec<f32> = gram.iter().zip(&capture.cross).map(|(gram, cross)| (gram + cross) as f32).collect();
    let (mut matrix, mut right) = (vec![0.0f64; n * n], vec![0.0f64; n]);
    for role in Role::ALL.into_iter().filter(|role| role.site() == site) {
        let original = bench.original(role).ok_or_else(|| Error::run("the original block was not kept"))?;
        let Some(linear) = bench.linear(role) else { continue };
        let compressed = linear.weight.to_matrix();
        let rows = compressed.rows;
        let mut squares = vec![0.0f32; n * n];
        let sizes = Sizes { m: n, n, k: rows };
        product(sizes, &mut squares, n, false, 1.0, View::transposed(&compressed.data, n), View::rows(&compressed.data, n), true);
        matrix.iter_mut().zip(&squares).for_each(|(total, &square)| *total += f64::from(square));
        let mut pushed = vec![0.0f32; rows * n];
        product(Sizes { m: rows, n, k: n }, &mut pushed, n, false, 1.0, View::rows(&original.data, n), View::rows(&seen, n), true);
        for (pushed, compressed) in pushed.chunks_exact(n).zip(compressed.data.chunks_exact(n)) {
            right.iter_mut().zip(pushed.iter().zip(compressed)).for_each(|(right, (a, b))| *right += f64::from(*a) * f64::from(*b));
        }
    }
    matrix.iter_mut().zip(gram).for_each(|(value, gram)| *value *= gram);
    let ridge = RIDGE * (0..n).map(|i| matrix[i * n + i]).sum::<f64>() / n.max(1) as f64;
    (0..n).for_each(|i| {
        matrix[i * n + i] += ridge;
        right[i] += ridge;
    });
    Ok(solve_rows(&matrix, n, &right).filter(|_| ridge > 0.0))
}
