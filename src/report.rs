//! The report of a run as data, with a schema version. It holds nothing that changes between equal runs: no time, no
//! path, no number of threads.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;

use crate::calibrate::corpus::Counts;
use crate::evaluate::Quality;
use crate::plan::recipe::Recipe;

/// Version of the report's shape.
pub const SCHEMA: u32 = 1;

/// Everything that a compression run found out.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Version of this shape.
    pub schema: u32,
    /// Version of the program.
    pub drawknife: &'static str,
    /// The model before.
    pub model: ModelFacts,
    /// The resolved recipe.
    pub recipe: Recipe,
    /// The formats written.
    pub format: String,
    /// Sizes.
    pub size: Size,
    /// What calibration was made of.
    pub calibration: Option<Counts>,
    /// How a target was spread over the layers.
    pub allocation: Option<Allocated>,
    /// One row per compressed linear layer.
    pub layers: Vec<LayerReport>,
    /// One row per block, after calibrated methods.
    pub blocks: Vec<BlockReport>,
    /// The measured quality, against the original.
    pub quality: Option<Quality>,
    /// What the quality was measured on.
    pub evaluation: Option<Evaluation>,
    /// Deviations and warnings, each a sentence.
    pub notes: Vec<String>,
}

/// What was allocated.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Allocated {
    /// The target, in words.
    pub target: String,
    /// What is reached: bits per weight, bytes, or share of zeros.
    pub reached: f64,
    /// Sum over layers of what each costs alone, in nats.
    pub predicted_kld: f64,
    /// Whether costs were measured exactly, or predicted.
    pub measured: bool,
    /// Whether nothing better exists for these costs.
    pub optimal: bool,
    /// How many layers got what.
    pub counts: BTreeMap<String, usize>,
    /// The predicted divergence with the next 0.1 bit per weight; absent for a target in sparsity, or where nothing larger is left.
    pub next_kld: Option<f64>,
    /// The best that every target reaches: bits per weight or share of zeros, and predicted divergence.
    pub curve: Vec<(f64, f64)>,
}

/// What a model is.
#[derive(Debug, Clone, Serialize)]
pub struct ModelFacts {
    /// `model_type` of its config.json.
    pub model_type: String,
    /// Parameters of all tensors.
    pub parameters: u64,
    /// Tensors.
    pub tensors: usize,
    /// Linear layers that methods may work on.
    pub linears: usize,
    /// Files of weights.
    pub shards: usize,
}

/// Sizes of the weights.
#[derive(Debug, Clone, Serialize)]
pub struct Size {
    /// Bytes of all tensors before.
    pub bytes_before: u64,
    /// Bytes of all tensors after.
    pub bytes_after: u64,
    /// Stored bits per weight of the compressed layers, scales included.
    pub bits_per_weight: f64,
}

/// One compressed linear layer.
#[derive(Debug, Clone, Serialize)]
pub struct LayerReport {
    /// Full name without `.weight`.
    pub name: String,
    /// `[outputs, inputs]`.
    pub shape: [usize; 2],
    /// What it is stored as.
    pub storage: String,
    /// Stored bits per weight, scales included.
    pub bits_per_weight: f64,
    /// Share of weights that are exactly zero.
    pub zeros: f64,
    /// ‖W − Ŵ‖² / ‖W‖².
    pub weight_error: f64,
    /// ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² of calibrated layers: over all calibration tokens where a stage gathered XᵀX or the recipe
    /// asks for it, else over the first 512 tokens.
    pub layer_error: Option<f64>,
    /// What methods noted about it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// One block.
#[derive(Debug, Clone, Serialize)]
pub struct BlockReport {
    /// Its number.
    pub block: usize,
    /// Relative squared error of its output on the first calibration windows, as of the last stage.
    pub output_error: Option<f64>,
    /// One row per stage.
    pub stages: Vec<StageReport>,
}

/// What a stage did to a block. Errors are relative squared errors of the block's output on the first calibration
/// windows: against the original block on the same inputs or, when the recipe keeps the float stream, against the
/// float model's output.
#[derive(Debug, Clone, Serialize)]
pub struct StageReport {
    /// The method.
    pub method: String,
    /// Error before the stage.
    pub before: Option<f64>,
    /// Error after the stage.
    pub after: Option<f64>,
    /// What the method noted about the block.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Loss by iteration, for methods that iterate over blocks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub curve: Vec<f64>,
}

/// What quality was measured on.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation {
    /// Name of the text.
    pub text: String,
    /// blake3 of the text.
    pub blake3: String,
}

/// A number of bytes as a person reads it.
pub fn bytes(count: u64) -> String {
    let units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    match units.iter().find(|(size, _)| count as f64 >= *size) {
        Some((size, unit)) => format!("{:.2} {unit}", count as f64 / size),
        None => format!("{count} B"),
    }
}
