//! llama.cpp's two-level K types, with scales and minima searched under the calibration statistics and codes by error
//! feedback on the fixed grid.
//!
//! Source of the grids: ggml-quants.c; of the feedback: GPTQ, arXiv:2210.17323, algorithm 1. The search is ours: every block
//! tries 25 ranges, fits a line to the codes of each by least squares weighted by the mean square of the inputs, and keeps
//! the best; whole-numbered scales and minima are then chosen among neighbours by the same loss. Layers whose inputs are
//! not a multiple of 256 become integers in groups of 32, which files hold in simpler blocks.

use crate::error::{Error, Result};
use crate::kernels::gram_space::DAMPING;
use crate::kernels::quantize::Grid;
use crate::kernels::scale_search::Scale;
use crate::kernels::super_blocks::{feedback, fit};
use crate::methods::gptq::{check_damping, note_damping, quantize, space};
use crate::methods::{Applied, Layer, Method, change};
use crate::model::seen::Needs;
use crate::weight::super_blocks::{SIZE, SuperKind};
use crate::weight::{Float, Storage, Weight};

/// Options of the K types.
#[derive(Debug, Clone, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct KQuant {
    /// q2_k, q3_k, q4_k, q5_k or q6_k.
    #[serde(rename = "type", with = "names")]
    pub kind: SuperKind,
    /// Share of the mean diagonal of the Gram matrix that is added to it.
    #[serde(default = "damping")]
    pub damping: f64,
}

fn damping() -> f64 {
    DAMPING
}

/// Types by the names that llama.cpp gives them.
mod names {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::weight::super_blocks::SuperKind;

    pub fn serialize<S: Serializer>(kind: &SuperKind, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(kind.name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SuperKind, D::Error> {
        let text = String::deserialize(deserializer)?;
        let known = SuperKind::ALL.into_iter().find(|kind| kind.name() == text);
        known.ok_or_else(|| serde::de::Error::custom(format!("unknown type `{text}`; use q2_k, q3_k, q4_k, q5_k or q6_k")))
    }
}

impl KQuant {
    /// Bits and group of the integers that a layer becomes that is not whole super-blocks.
    fn plain(&self, columns: usize) -> Option<(u8, usize)> {
        (!columns.is_multiple_of(SIZE)).then(|| (self.kind.bits().max(4), if columns.is_multiple_of(32) { 32 } else { columns }))
    }
}

impl Method for KQuant {
    fn needs(&self) -> Needs {
        Needs::Gram
    }

    fn leaves(&self, before: Storage, [_, columns]: [usize; 2], bits: Option<u8>) -> Result<Storage> {
        check_damping(self.damping)?;
        if bits.is_some_and(|bits| bits != self.kind.bits()) {
            return Err(Error::input("other bits for some layers go with integers; k-quant has one type. Use --skip, or another method"));
        }
        match before {
            Storage::Dense => {}
            Storage::Sparse(_) => return Err(Error::input("K types do not hold exact zeros; prune alone, or quantize with gptq")),
            _ => return Err(Error::input("quantizing twice is unsound: keep one quantizing stage")),
        }
        Ok(match self.plain(columns) {
            Some((bits, group)) => Storage::Ints { bits, group, symmetric: true },
            None => Storage::Super(self.kind),
        })
    }

    fn apply(&self, weight: Weight, layer: &Layer<'_>) -> Result<Applied> {
        let space = space(layer, self.damping, true)?;
        let goal = weight.to_matrix();
        let compressed = match self.plain(goal.columns) {
            Some((bits, group)) => {
                let grid = Grid { bits, group, symmetric: true, scale_float: Float::F16 };
                Weight::Ints(quantize(&goal, None, &space, grid, Scale::default(), layer))
            }
            None => {
                let mut importance = vec![0.0f64; goal.columns];
                space.order.iter().enumerate().for_each(|(at, &column)| importance[column] = f64::from(space.gram[at * goal.columns + at]));
                let mut fitted = fit(&goal, self.kind, &importance);
                feedback(&goal, &space, &mut fitted);
                Weight::Super(fitted)
            }
        };
        let change = change(&goal.data, &compressed.to_matrix().data);
        let mut applied = Applied::new(compressed, change);
        note_damping(&mut applied, &space, self.damping);
        Ok(applied)
    }

    fn options(&self) -> toml::Table {
        toml::Table::try_from(self).unwrap_or_default()
    }
}
