//! `sensitivity.json`: what was measured on what, per layer and scheme. Enough to solve any target again.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checkpoint::read_file;
use crate::error::{Error, Result};
use crate::statistics::rank_correlation;
use crate::storage::write_whole_json;

/// Version of the file's shape.
pub const SCHEMA: u32 = 1;

/// The file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sensitivity {
    /// Version of this shape; 1.
    pub schema: u32,
    /// Version of the program.
    pub drawknife: String,
    /// What was measured on what.
    pub identity: Identity,
    /// Whether every layer is in it.
    pub complete: bool,
    /// The schemes.
    pub schemes: Vec<String>,
    /// One row per linear layer, in the order of the blocks.
    pub layers: Vec<LayerSensitivity>,
    /// How well predictions rank the exact measurement (Spearman); absent without it.
    pub rank_correlation: Option<RankCorrelation>,
}

/// What was measured on what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// blake3 of the model's configuration and weights.
    pub model: String,
    /// blake3 of the windows of tokens.
    pub tokens: String,
    /// Where they come from.
    pub source: String,
    /// Tokens per window.
    pub seq: usize,
    /// Windows.
    pub windows: usize,
    /// `cpu` or `gpu`.
    pub device: String,
    /// What made integers.
    pub method: String,
}

/// A linear layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LayerSensitivity {
    /// Its full name.
    pub name: String,
    /// Its block.
    pub block: usize,
    /// `[outputs, inputs]`.
    pub shape: [usize; 2],
    /// What each scheme costs; those that cannot take the layer are left out.
    pub candidates: Vec<Candidate>,
    /// Whether what was measured exactly is this layer's share of what all experts of the block cost together.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shares: bool,
}

/// What storing one layer one way costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Candidate {
    /// The scheme's name.
    pub scheme: String,
    /// What it leaves.
    pub storage: String,
    /// Stored bits with scales; pruned weights count as not stored.
    pub bits: u64,
    /// ‖W − Ŵ‖² / ‖W‖².
    pub weight_error: f64,
    /// ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² over all tokens.
    pub layer_error: Option<f64>,
    /// Σ |dL/dW ⊙ (W − Ŵ)|, L the mean negative log-likelihood.
    pub gradient: f64,
    /// ½ Σ F ⊙ (W − Ŵ)² with the diagonal Fisher matrix F: the predicted divergence in nats.
    pub predicted_kld: f64,
    /// The model's mean divergence from itself with this layer alone compressed, in nats.
    pub kld: Option<f64>,
    /// Its standard error over windows.
    pub kld_stderr: Option<f64>,
    /// Growth of the mean negative log-likelihood.
    pub nll: Option<f64>,
    /// Its standard error over windows, paired.
    pub nll_stderr: Option<f64>,
}

impl Candidate {
    /// What it costs in nats: as measured, else as predicted.
    pub fn cost(&self) -> f64 {
        self.kld.unwrap_or(self.predicted_kld)
    }
}

/// Spearman's rank correlation with the exact divergence over all layers and schemes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RankCorrelation {
    /// Of the gradient's prediction.
    pub gradient: f64,
    /// Of the predicted divergence.
    pub predicted_kld: f64,
    /// Of the weight error.
    pub weight_error: f64,
    /// Of the gradient's prediction among layers of one scheme.
    pub gradient_by_scheme: Vec<(String, f64)>,
    /// Of the predicted divergence among layers of one scheme.
    pub predicted_kld_by_scheme: Vec<(String, f64)>,
}

impl Sensitivity {
    /// Reads a file.
    ///
    /// # Errors
    /// When it is missing or not of this version.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(&read_file(path, 256 << 20)?).map_err(|error| error.file(path))
    }

    /// Reads the bytes of such a file.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let found: Self = serde_json::from_slice(bytes).map_err(|error| Error::input(format!("no sensitivity file: {error}")))?;
        let sound = |candidate: &Candidate| (0.0..1e6).contains(&candidate.cost()) && candidate.bits > 0;
        match () {
            () if found.schema != SCHEMA => Err(Error::input(format!("version {}, read is {SCHEMA}", found.schema))),
            () if !found.layers.iter().flat_map(|layer| &layer.candidates).all(sound) => {
                Err(Error::input("costs must be 0 to a million nats and sizes above 0; measure again"))
            }
            () => Ok(found),
        }
    }

    /// Writes the file, complete or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_whole_json(path, self)
    }

    /// The row of a layer.
    pub fn layer(&self, name: &str) -> Option<&LayerSensitivity> {
        self.layers.iter().find(|layer| layer.name == name)
    }

    /// The rows of this file that a new measurement, `wanted`, can keep.
    ///
    /// # Errors
    /// When this is a measurement of something else.
    pub fn resumed(self, wanted: &Self, exact: bool) -> Result<Vec<LayerSensitivity>> {
        if self.identity != wanted.identity || self.schemes != wanted.schemes {
            return Err(Error::input(
                "holds a measurement of another model, text or scheme; give another --output, or remove the file to measure anew",
            ));
        }
        let known = |layer: &LayerSensitivity| !exact || layer.candidates.iter().all(|candidate| candidate.kld.is_some());
        Ok(self.layers.into_iter().filter(known).collect())
    }

    /// Puts the rows into the order of the blocks.
    pub fn sort(&mut self) {
        let order = |name: &str| crate::model::block::Role::ALL.iter().position(|role| name.ends_with(role.name()));
        self.layers.sort_by_key(|layer| (layer.block, order(&layer.name).unwrap_or(usize::MAX)));
    }

    /// Marks it as complete and works out the correlations.
    pub fn finish(&mut self) {
        self.complete = true;
        self.sort();
        // Shares follow a prediction, and say nothing of it.
        let apart = self.layers.iter().filter(|layer| !layer.shares).flat_map(|layer| &layer.candidates);
        let exact: Vec<&Candidate> = apart.filter(|candidate| candidate.kld.is_some()).collect();
        let correlation = |of: &dyn Fn(&Candidate) -> f64, scheme: Option<&str>| {
            let chosen = exact.iter().filter(|candidate| scheme.is_none_or(|scheme| candidate.scheme == scheme));
            let (a, b): (Vec<f64>, Vec<f64>) = chosen.map(|candidate| (of(candidate), candidate.kld.unwrap_or(0.0))).unzip();
            rank_correlation(&a, &b)
        };
        let finite = |value: f64| if value.is_finite() { value } else { 0.0 };
        let by_scheme = |of: &dyn Fn(&Candidate) -> f64| {
            self.schemes.iter().map(|scheme| (scheme.clone(), finite(correlation(of, Some(scheme))))).collect()
        };
        self.rank_correlation = (exact.len() > 1).then(|| RankCorrelation {
            gradient: finite(correlation(&|candidate| candidate.gradient, None)),
            predicted_kld: finite(correlation(&|candidate| candidate.predicted_kld, None)),
            weight_error: finite(correlation(&|candidate| candidate.weight_error, None)),
            gradient_by_scheme: by_scheme(&|candidate| candidate.gradient),
            predicted_kld_by_scheme: by_scheme(&|candidate| candidate.predicted_kld),
        });
    }
}
