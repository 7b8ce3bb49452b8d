//! Closed form: the strongest quantization without gradients.
//!
//! Source: quality-records §2a and 2b. Every layer aims at the output of the float model on the inputs that the
//! compressed model gives it ([`crate::methods::float_output`]: GPTAQ arXiv:2504.02692, Qronos arXiv:2505.11695, with
//! the residual term of LoaQ arXiv:2509.06297); then rounding with error feedback (GPTQ, arXiv:2210.17323), coordinate
//! descent on the codes (QuantEase, arXiv:2309.01885) and the closed-form refit of the scales, each step kept only
//! where the loss falls. With `alpha = 0`, `beta = 0`, `rounds = 0` and `sweeps = 0` it is GPTQ bit for bit. Needs both
//! streams; leaves integers; keeps pruned weights exactly zero while aiming at the dense layer.

use crate::error::{Error, Result};
use crate::kernels::descent::{Effort, descend};
use crate::kernels::gram_space::DAMPING;
use crate::kernels::scale_search::Scale;
use crate::methods::gptq::{check_damping, mask, note_damping, quantize, space};
use crate::methods::round_to_nearest::Group;
use crate::methods::{Applied, Layer, Method, Strength, Target, change, quantizable};
use crate::model::seen::Needs;
use crate::weight::{Storage, Weight};

/// Options of the closed form.
#[derive(Debug, Clone, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClosedForm {
    /// Bits per weight, 2..=8.
    pub bits: u8,
    /// Columns that share a scale.
    pub group: Group,
    /// Whether the zero point is fixed in the middle of the range.
    pub symmetric: bool,
    /// How the first scales follow from the weights.
    pub scale: Scale,
    /// Share of the mean diagonal of the Gram matrix that is added to it.
    pub damping: f64,
    /// Whether the columns with the largest inputs are rounded first.
    pub activation_order: bool,
    /// Strength of the correction of inputs, 0..=1; chosen by the rule and the held-out guard when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Strength of the correction of the residual stream, 0..=1; as `alpha` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
    /// Rounds of descent and refit.
    pub rounds: usize,
    /// Sweeps of descent in each round and after the last.
    pub sweeps: usize,
    /// Whether scales are refitted.
    pub refit: bool,
}

impl Default for ClosedForm {
    fn default() -> Self {
        Self {
            bits: 4,
            group: Group::default(),
            symmetric: true,
            scale: Scale::default(),
            damping: DAMPING,
            activation_order: true,
            alpha: None,
            beta: None,
            rounds: 4,
            sweeps: 2,
            refit: true,
        }
    }
}

impl ClosedForm {
    fn effort(&self) -> Effort {
        Effort { rounds: self.rounds, sweeps: self.sweeps, refit: self.refit && self.rounds > 0 }
    }
}

impl Method for ClosedForm {
    fn needs(&self) -> Needs {
        Needs::Gram
    }

    fn target(&self) -> Target {
        match self.strength() {
            Some(Strength { alpha: 0.0, beta: 0.0 }) => Target::Weight,
            _ => Target::FloatOutput,
        }
    }

    fn strength(&self) -> Option<Strength> {
        let alpha = self.alpha.or(self.beta)?;
        Some(Strength { alpha, beta: self.beta.unwrap_or(alpha) })
    }

    fn rough(&self) -> Option<Box<dyn Method>> {
        Some(Box::new(Self { rounds: self.rounds.min(1), sweeps: self.sweeps.min(1), ..self.clone() }))
    }

    fn leaves(&self, before: Storage, [_, columns]: [usize; 2], bits: Option<u8>) -> Result<Storage> {
        check_damping(self.damping)?;
        for (name, value) in [("alpha", self.alpha), ("beta", self.beta)] {
            if let Some(value) = value.filter(|value| !(0.0..=1.0).contains(value)) {
                return Err(Error::input(format!("{name} is {value}, use 0 to 1, or leave it out for the rule")));
            }
        }
        quantizable(before, bits.unwrap_or(self.bits), "closed-form")?;
        Ok(Storage::Ints { bits: bits.unwrap_or(self.bits), group: self.group.fit(columns), symmetric: self.symmetric })
    }

    fn apply(&self, weight: Weight, layer: &Layer<'_>) -> Result<Applied> {
        let space = space(layer, self.damping, self.activation_order)?;
        let current = weight.to_matrix();
        let goal = layer.goal.unwrap_or(&current);
        let mask = mask(&weight);
        let grid = layer.grid(self.bits, self.group, self.symmetric, goal.columns);
        let mut ints = quantize(goal, mask, &space, grid, self.scale, layer);
        descend(goal, &space, mask, &mut ints, self.effort());
        let change = change(&current.data, &ints.to_matrix().data);
        let mut applied = Applied::new(Weight::Ints(ints), change);
        note_damping(&mut applied, &space, self.damping);
        Ok(applied)
    }

    fn options(&self) -> toml::Table {
        toml::Table::try_from(self).unwrap_or_default()
    }
}
