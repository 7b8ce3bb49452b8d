//! GPTQ: rounding with error feedback, the baseline of calibrated quantization.
//!
//! Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
//! arXiv:2210.17323, algorithm 1, with static groups: grids are fixed beforehand, and activation order is an order of
//! work that leaves no trace in the file (methods-quant §6.1). The factor is computed in f64 with damping that grows
//! tenfold until it exists. Needs the Gram matrix; leaves integers; keeps pruned weights exactly zero.

use crate::error::{Error, Result};
use crate::kernels::error_feedback::error_feedback;
use crate::kernels::gram_space::{DAMPING, GramSpace};
use crate::kernels::quantize::Grid;
use crate::kernels::scale_search::{Scale, grids};
use crate::matrix::Matrix;
use crate::methods::round_to_nearest::Group;
use crate::methods::{Applied, Layer, Method, change, quantizable};
use crate::model::seen::Needs;
use crate::weight::{Ints, Sparse, Storage, Weight};

/// Options of GPTQ.
#[derive(Debug, Clone, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Gptq {
    /// Bits per weight, 2..=8.
    #[serde(default = "four")]
    pub bits: u8,
    /// Columns that share a scale.
    #[serde(default)]
    pub group: Group,
    /// Whether the zero point is fixed in the middle of the range.
    #[serde(default = "yes")]
    pub symmetric: bool,
    /// How scales follow from the weights.
    #[serde(default)]
    pub scale: Scale,
    /// Share of the mean diagonal of the Gram matrix that is added to it.
    #[serde(default = "damping")]
    pub damping: f64,
    /// Whether the columns with the largest inputs are rounded first.
    #[serde(default = "yes")]
    pub activation_order: bool,
}

fn four() -> u8 {
    4
}

fn yes() -> bool {
    true
}

fn damping() -> f64 {
    DAMPING
}

impl Method for Gptq {
    fn needs(&self) -> Needs {
        Needs::Gram
    }

    fn leaves(&self, before: Storage, [_, columns]: [usize; 2], bits: Option<u8>) -> Result<Storage> {
        check_damping(self.damping)?;
        quantizable(before, bits.unwrap_or(self.bits), "gptq")?;
        Ok(Storage::Ints { bits: bits.unwrap_or(self.bits), group: self.group.fit(columns), symmetric: self.symmetric })
    }

    fn apply(&self, weight: Weight, layer: &Layer<'_>) -> Result<Applied> {
        let space = space(layer, self.damping, self.activation_order)?;
        let goal = weight.to_matrix();
        let mask = matches!(weight, Weight::Sparse(_)).then_some(&*goal);
        let grid = layer.grid(self.bits, self.group, self.symmetric, goal.columns);
        let ints = quantize(&goal, mask, &space, grid, self.scale, layer);
        let change = change(&goal.data, &ints.to_matrix().data);
        let mut applied = Applied::new(Weight::Ints(ints), change);
        note_damping(&mut applied, &space, self.damping);
        Ok(applied)
    }

    fn options(&self) -> toml::Table {
        toml::Table::try_from(self).unwrap_or_default()
    }
}

/// Refuses a share that is not one.
pub(crate) fn check_damping(damping: f64) -> Result<()> {
    match (0.0..=1.0).contains(&damping) {
        true => Ok(()),
        false => Err(Error::input(format!("damping is {damping}, use 0 to 1, like {DAMPING}"))),
    }
}

/// The Gram space of a layer's inputs.
pub(crate) fn space(layer: &Layer<'_>, damping: f64, by_activation: bool) -> Result<std::sync::Arc<GramSpace>> {
    layer.gram()?;
    let statistics = layer.statistics.ok_or_else(|| Error::run("no calibration was seen").tensor(layer.name))?;
    statistics.space(damping, by_activation).ok_or_else(|| {
        Error::run("the Gram matrix of the calibration inputs is not positive definite even with full damping").tensor(layer.name)
    })
}

/// Says when more damping was needed than asked for.
pub(crate) fn note_damping(applied: &mut Applied, space: &GramSpace, asked: f64) {
    if space.damping > asked {
        applied.notes.push(format!("the Gram matrix needed damping {} instead of {asked}", space.damping));
    }
}

/// Rounds with error feedback on grids by `rule`.
pub(crate) fn quantize(goal: &Matrix, mask: Option<&Matrix>, space: &GramSpace, grid: Grid, rule: Scale, layer: &Layer<'_>) -> Ints {
    let mut importance = vec![0.0; goal.columns];
    space.order.iter().enumerate().for_each(|(at, &column)| importance[column] = space.gram[at * goal.columns + at]);
    // Pruned weights have no say in the range.
    let mut ints = grids(mask.unwrap_or(goal), grid, rule, &importance, layer.bounds);
    error_feedback(goal, space, mask, &mut ints);
    ints
}

/// The pruned weight that says which entries may differ from zero.
pub(crate) fn mask(weight: &Weight) -> Option<&Matrix> {
    match weight {
        Weight::Sparse(Sparse { matrix, .. }) => Some(matrix),
        _ => None,
    }
}
