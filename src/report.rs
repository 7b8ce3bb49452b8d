//! The report of a run as data, with a schema version. [`Report`] holds nothing that changes between equal runs: no time, no
//! path, no number of threads; those are in [`Timing`].

pub mod charts;
pub mod page;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::calibrate::corpus::Counts;
use crate::evaluate::Quality;
use crate::evaluate::contexts::TokenView;
use crate::gate::Gate;
use crate::plan::recipe::Recipe;

/// Version of the report's shape.
pub const SCHEMA: u32 = 1;

/// Everything that a compression run found out.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Report {
    /// Version of this shape.
    pub schema: u32,
    /// Version of the program.
    pub drawknife: &'static str,
    /// blake3 of the model's configuration and weights; absent where nothing was measured.
    pub model_blake3: Option<String>,
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
    /// Bytes before and after by kind of layer.
    pub sizes: Vec<ClassSize>,
    /// What engines do with each format.
    pub loads: Vec<Loads>,
    /// How far calibration and evaluation overlap.
    pub audit: Option<Audit>,
    /// The measured quality, against the original.
    pub quality: Option<Quality>,
    /// Where the model differs most from the original.
    pub tokens: Option<TokenView>,
    /// What the quality was measured on.
    pub evaluation: Option<Evaluation>,
    /// The limits of the recipe, each with its verdict.
    pub gates: Vec<Gate>,
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
    /// The best that every target reaches: what it reaches, as `reached` says it, and the predicted divergence.
    pub curve: Vec<(f64, f64)>,
}

/// What changes between equal runs: timing.json, beside the report.
#[derive(Debug, Clone, Default, Serialize, JsonSchema)]
pub struct Timing {
    /// Version of this shape.
    pub schema: u32,
    /// The command line.
    pub command: Vec<String>,
    /// What computed.
    pub device: String,
    /// Threads.
    pub threads: usize,
    /// Whether this run went on where an earlier one was cut off; times are those of this run alone.
    pub resumed: bool,
    /// How long each stage took, in order.
    pub stages: Vec<StageTime>,
    /// How long the work waited until what could be gone on with was on the disk, in seconds.
    pub commit_seconds: f64,
    /// Most memory that was resident, in bytes; absent where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
}

/// How long a stage took.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct StageTime {
    /// What was done.
    pub name: String,
    /// Seconds.
    pub seconds: f64,
}

/// Takes the time of stages that follow each other.
#[derive(Debug)]
pub struct Stopwatch {
    since: std::time::Instant,
    stages: Vec<StageTime>,
}

impl Default for Stopwatch {
    fn default() -> Self {
        Self { since: std::time::Instant::now(), stages: Vec::new() }
    }
}

impl Stopwatch {
    /// The stage that ends now; the next begins.
    pub fn ends(&mut self, name: &str) {
        self.stages.push(StageTime { name: name.into(), seconds: self.since.elapsed().as_secs_f64() });
        self.since = std::time::Instant::now();
    }

    /// All stages.
    pub fn stages(self) -> Vec<StageTime> {
        self.stages
    }
}

/// Bytes of one kind of layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ClassSize {
    /// Attention, MLP, embedding, head, norms or rest.
    pub class: String,
    /// Bytes before.
    pub before: u64,
    /// Bytes after.
    pub after: u64,
}

/// What an engine does with a format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Loads {
    /// The format.
    pub format: String,
    /// The engine.
    pub engine: String,
    /// Whether it loads it.
    pub ok: bool,
    /// How, or why not.
    pub detail: String,
}

/// How far calibration and evaluation overlap.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Audit {
    /// Share of the evaluation's runs of tokens that occur in the calibration.
    pub evaluation_overlap: f64,
    /// Tokens of a run.
    pub run_length: usize,
}

impl Audit {
    /// Compares windows of tokens.
    pub fn of(calibration: &[Vec<u32>], evaluation: &[Vec<u32>]) -> Self {
        const RUN: usize = 16;
        let seen: std::collections::HashSet<&[u32]> = calibration.iter().flat_map(|window| window.windows(RUN)).collect();
        let runs = || evaluation.iter().flat_map(|window| window.windows(RUN));
        let shared = runs().filter(|run| seen.contains(run)).count();
        Self { evaluation_overlap: shared as f64 / runs().count().max(1) as f64, run_length: RUN }
    }
}

/// The kind of layer that a tensor belongs to.
pub fn class_of(tensor: &str) -> &'static str {
    let kinds: [(&str, &[&str]); 5] = [
        ("norms", &["norm"]),
        ("attention", &["attn", "attention"]),
        ("MLP", &["mlp", "expert", "feed_forward", "ffn"]),
        ("head", &["lm_head"]),
        ("embedding", &["embed", "wte"]),
    ];
    let linear = tensor.contains("_proj");
    let found = kinds.iter().find(|(class, pieces)| (!linear || *class != "norms") && pieces.iter().any(|piece| tensor.contains(piece)));
    found.map_or("rest", |(class, _)| class)
}

/// What a model is.
#[derive(Debug, Clone, Serialize, JsonSchema)]
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
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Size {
    /// Bytes of all tensors before.
    pub bytes_before: u64,
    /// Bytes of all tensors after.
    pub bytes_after: u64,
    /// Stored bits per weight of the compressed layers, scales included.
    pub bits_per_weight: f64,
}

/// One compressed linear layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
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
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// One block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BlockReport {
    /// Its number.
    pub block: usize,
    /// Relative squared error of its output on the first calibration windows, as of the last stage.
    pub output_error: Option<f64>,
    /// One row per stage.
    pub stages: Vec<StageReport>,
    /// Calibration tokens that came to every expert that the router chooses from; empty where the block has none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<u64>,
    /// Mean, over calibration tokens, of the entropy of the shares that a token gave to its experts, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router_entropy: Option<f64>,
    /// Numbers, in the original, of the experts that were kept; empty where none was removed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts_kept: Vec<usize>,
}

/// What a stage did to a block. Errors are relative squared errors of the block's output on the first calibration
/// windows: against the original block on the same inputs or, when the recipe keeps the float stream, against the
/// float model's output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StageReport {
    /// The method.
    pub method: String,
    /// Error before the stage.
    pub before: Option<f64>,
    /// Error after the stage.
    pub after: Option<f64>,
    /// What the method noted about the block.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Loss by iteration, for methods that iterate over blocks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub curve: Vec<f64>,
}

/// What quality was measured on.
#[derive(Debug, Clone, Serialize, JsonSchema)]
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
