//! Recipes: what to do, as a TOML file or a preset. Unknown keys are refused.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::calibrate::corpus::{Options, Source};
use crate::checkpoint::read_file;
use crate::error::{Error, Result, shown};
use crate::methods::{self, nearest, with_nearest};

/// A preset: a name for a recipe.
#[derive(Debug)]
pub struct Preset {
    /// Name on the command line.
    pub name: &'static str,
    /// What one gets, in one line.
    pub about: &'static str,
    /// The recipe.
    pub recipe: &'static str,
}

/// Every preset; the first is the default.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "w4-fast",
        about: "4-bit integers, groups of 128, round to nearest; no calibration, a quarter of the size",
        recipe: "version = 1\n[[stage]]\nmethod = \"round-to-nearest\"\nbits = 4\ngroup = 128\nsymmetric = true\n",
    },
    Preset {
        name: "w8",
        about: "8-bit integers, groups of 128; no calibration, half the size, hardly a loss",
        recipe: "version = 1\n[[stage]]\nmethod = \"round-to-nearest\"\nbits = 8\ngroup = 128\nsymmetric = true\n",
    },
    Preset {
        name: "w4",
        about: "4-bit integers, groups of 128, in closed form: aims at the original's outputs, no gradients, minutes",
        recipe: "version = 1\n[[stage]]\nmethod = \"closed-form\"\nbits = 4\ngroup = 128\nsymmetric = true\n",
    },
    Preset {
        name: "w3",
        about: "3-bit integers, groups of 128, in closed form; noticeable loss on small models",
        recipe: "version = 1\n[[stage]]\nmethod = \"closed-form\"\nbits = 3\ngroup = 128\nsymmetric = true\n",
    },
    Preset {
        name: "w2",
        about: "2-bit integers, groups of 64, rounding learned over 200 iterations from the closed form; large models only",
        recipe: "version = 1\n[[stage]]\nmethod = \"signround\"\nbits = 2\ngroup = 64\nsymmetric = true\niters = 200\n",
    },
    Preset {
        name: "w4-best",
        about: "4-bit integers, groups of 128, rounding learned over 1000 iterations from the closed form; slow",
        recipe: "version = 1\n[[stage]]\nmethod = \"signround\"\nbits = 4\ngroup = 128\nsymmetric = true\npreset = \"best\"\n",
    },
    Preset {
        name: "trit",
        about: "two planes of trits, groups of 128, 3.45 bits; no calibration; written as dense floats, no file holds trits yet",
        recipe: "version = 1\n[[stage]]\nmethod = \"ptqtp\"\ngroup = 128\n",
    },
    Preset {
        name: "trit-w4",
        about: "trit-planes with tied scales, which every 4-bit format holds; no calibration, worse than w4 at its size",
        recipe: "version = 1\n[[stage]]\nmethod = \"ptqtp\"\ngroup = 128\ntied = true\n",
    },
    Preset {
        name: "sparse-w4",
        about: "half of the weights zero by Wanda and 4-bit integers learned under that mask against the dense block",
        recipe: "version = 1\n[[stage]]\nmethod = \"wanda\"\nsparsity = 0.5\npattern = \"unstructured\"\n[[stage]]\nmethod = \"signround\"\nbits = 4\ngroup = 128\nsymmetric = true\niters = 200\n",
    },
    Preset {
        name: "prune50",
        about: "half of the weights of every row zero, by Wanda; same file size, servers gain nothing from the zeros",
        recipe: "version = 1\n[[stage]]\nmethod = \"wanda\"\nsparsity = 0.5\npattern = \"unstructured\"\n",
    },
    Preset {
        name: "2:4",
        about: "two of every four weights zero, by Wanda; same file size, mainstream servers dropped 2:4 kernels in 2026",
        recipe: "version = 1\n[[stage]]\nmethod = \"wanda\"\npattern = \"2:4\"\n",
    },
];

/// A recipe.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Version of the recipe's language; 1.
    pub version: u32,
    /// Where calibration comes from.
    #[serde(default)]
    pub calibration: Calibration,
    /// Methods in order.
    #[serde(default, rename = "stage")]
    pub stages: Vec<StageRecipe>,
    /// Other bits for some layers.
    #[serde(default, rename = "override", skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
    /// Layers to leave as they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skip: Vec<Skip>,
    /// What the whole model shall have, from which bits or sparsity of every layer follow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocate: Option<Allocate>,
    /// What to write.
    #[serde(default)]
    pub export: Export,
    /// Limits that the result must keep.
    #[serde(default, skip_serializing_if = "Gate::is_empty")]
    pub gate: Gate,
    /// What to measure besides.
    #[serde(default)]
    pub report: ReportOptions,
}

/// `[calibration]`.
#[derive(Debug, Clone, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Calibration {
    /// `builtin:mix` or files, .txt or .jsonl; or `self` alone for text that the model itself writes.
    pub source: OneOrMany,
    /// Windows at most.
    pub samples: usize,
    /// Tokens per window; by default 2048 or as many as the model takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<usize>,
    /// Seed of random choices.
    pub seed: u64,
    /// Whether every token counts for the statistics of every expert of a mixture, wherever its router sends it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub all_experts: bool,
}

impl Default for Calibration {
    fn default() -> Self {
        Self { source: OneOrMany(vec!["builtin:mix".into()]), samples: 128, seq: None, seed: 0, all_experts: false }
    }
}

/// A string or a list of strings.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct OneOrMany(pub Vec<String>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            One(String),
            Many(Vec<String>),
        }
        Ok(Self(match Raw::deserialize(deserializer)? {
            Raw::One(one) => vec![one],
            Raw::Many(many) => many,
        }))
    }
}

/// `[[stage]]`: a method, the layers it works on, and its own options.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
pub struct StageRecipe {
    /// Name of the method.
    pub method: String,
    /// Globs over layer names; empty means all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<String>,
    /// Options of the method.
    #[serde(flatten)]
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub options: toml::Table,
}

/// `[[override]]`.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// Glob over layer names.
    #[serde(rename = "match")]
    pub pattern: String,
    /// Bits of quantizing stages, 2..=8; 16 leaves the layer as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
    /// Share of weights that unstructured pruning stages make zero, at least 0 and below 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f64>,
}

/// `[[skip]]`.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Skip {
    /// Glob over layer names.
    #[serde(rename = "match")]
    pub pattern: String,
}

/// `[allocate]`: one target, solved on what a sensitivity measurement says of every layer.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Allocate {
    /// Stored bits per weight of the compressed layers, scales included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_bpw: Option<f64>,
    /// Bytes of the output's tensors, like `"5.5GB"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_size: Option<String>,
    /// Share of zeros in the compressed layers, chosen block by block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_sparsity: Option<f64>,
    /// Fewest bits of a layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_bits: Option<u8>,
    /// A file of `drawknife sensitivity`; without one the cheap measurement is made first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<std::path::PathBuf>,
}

/// `[export]`.
#[derive(Debug, Clone, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// Formats; by default compressed-tensors for integers, dense for the rest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<OneOrMany>,
    /// Whether embeddings and head of a GGUF file are rounded to 8 bits.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub gguf_embeddings_8: bool,
    /// Largest shard, like `"5GB"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard_size: Option<String>,
}

/// `[gate]`: limits for the measured quality; a run that exceeds one exits with 3.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Gate {
    /// Largest mean divergence from the original, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kld_mean: Option<f64>,
    /// Largest perplexity over that of the original.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ppl_ratio: Option<f64>,
}

impl Gate {
    /// Whether there is no limit.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// `[report]`.
#[derive(Debug, Clone, Copy, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReportOptions {
    /// Measure ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² of every layer over all calibration tokens, also where no stage needs XᵀX.
    pub layer_error: bool,
}

impl Recipe {
    /// Reads a recipe's text.
    ///
    /// # Errors
    /// When it is not TOML, has unknown keys or another version.
    pub fn parse(text: &str) -> Result<Self> {
        let recipe: Self = toml::from_str(text).map_err(|error| {
            let line = error.span().map(|span| text[..span.start].matches('\n').count() + 1);
            Error::input(format!("{}{}", line.map(|line| format!("line {line}: ")).unwrap_or_default(), with_nearest(error.message())))
        })?;
        if recipe.version != 1 {
            return Err(Error::input(format!("recipe version {}, this program reads version 1", recipe.version)));
        }
        recipe.check()?;
        Ok(recipe)
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// Naming the one that is out of its range.
    pub fn check(&self) -> Result<()> {
        let Calibration { samples, seq, .. } = self.calibration;
        if samples == 0 {
            return Err(Error::input("calibration: samples is 0, use at least 1"));
        }
        if let Some(seq) = seq.filter(|seq| !(2..=1 << 20).contains(seq)) {
            return Err(Error::input(format!("calibration: seq is {seq}, use 2 to 1048576")));
        }
        for (name, limit) in [("kld_mean", self.gate.kld_mean), ("ppl_ratio", self.gate.ppl_ratio)] {
            if let Some(limit) = limit.filter(|limit| !(limit.is_finite() && *limit > 0.0)) {
                return Err(Error::input(format!("gate: {name} is {limit}, it must be a number above 0")));
            }
        }
        for (number, stage) in self.stages.iter().enumerate() {
            let place = |error: Error| Error::input(format!("stage {}: {error}", number + 1));
            methods::read(&stage.method, stage.options.clone()).map_err(place)?;
        }
        for Override { pattern, bits, sparsity } in &self.overrides {
            if let Some(bits) = bits.filter(|bits| !(2..=8).contains(bits) && *bits != 16) {
                return Err(Error::input(format!("override {pattern}: {bits} bits; use 2 to 8, or 16 to leave the layers as they are")));
            }
            if let Some(sparsity) = sparsity.filter(|sparsity| !(0.0..1.0).contains(sparsity)) {
                return Err(Error::input(format!("override {pattern}: sparsity {sparsity}; use at least 0 and below 1")));
            }
            if bits.is_none() && sparsity.is_none() {
                return Err(Error::input(format!("override {pattern}: changes nothing; give it bits or sparsity")));
            }
        }
        Ok(())
    }

    /// Reads a recipe file.
    ///
    /// # Errors
    /// As [`Self::parse`], or when the file cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = read_file(path, 1 << 20)?;
        let text = String::from_utf8(bytes).map_err(|_| Error::input("not UTF-8").file(path))?;
        Self::parse(&text).map_err(|error| error.file(path))
    }

    /// The recipe of a preset.
    ///
    /// # Errors
    /// When there is no such preset, naming those there are.
    pub fn preset(name: &str) -> Result<Self> {
        let preset = PRESETS.iter().find(|preset| preset.name == name).ok_or_else(|| {
            let known: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
            let nearest = nearest(name, known.iter().copied());
            Error::input(format!("unknown preset `{}`{nearest}; known are {}", shown(name), known.join(", ")))
        })?;
        Self::parse(preset.recipe)
    }

    /// Names of the formats to write; none where the plan decides.
    pub fn formats(&self) -> &[String] {
        self.export.format.as_ref().map_or(&[], |names| names.0.as_slice())
    }

    /// How calibration text is packed for a model that takes `max_positions` tokens.
    ///
    /// # Errors
    /// When a source is neither built in nor `self` nor a .txt or .jsonl file, when `self` stands beside others, or when
    /// a window is longer than the model takes.
    pub fn packing(&self, max_positions: usize) -> Result<Options> {
        let calibration = &self.calibration;
        let sources = calibration.source.0.iter().flat_map(|source| source.split(','));
        let sources = sources.map(|source| source.trim().parse::<Source>().map_err(|what| Error::input(format!("calibration: {what}"))));
        let seq = calibration.seq.unwrap_or(2048.min(max_positions));
        if seq > max_positions {
            return Err(Error::input(format!(
                "--seq {seq} is longer than the {max_positions} positions of the model; use --seq {max_positions}"
            )));
        }
        let sources: Vec<Source> = sources.collect::<Result<_>>()?;
        if sources.contains(&Source::Own) && sources.len() > 1 {
            return Err(Error::input("calibration: `self` stands alone; leave the other sources out"));
        }
        Ok(Options { sources, samples: calibration.samples, seq, seed: calibration.seed })
    }

    /// Largest shard in bytes.
    ///
    /// # Errors
    /// When `shard_size` is not a size.
    pub fn shard_bytes(&self) -> Result<u64> {
        self.export.shard_size.as_deref().map_or(Ok(5_000_000_000), size)
    }
}

/// A size like `5GB`, `500MB` or `123456`.
///
/// # Errors
/// When it is not one.
pub fn size(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1.0,
        "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KIB" => 1024.0,
        "MIB" => 1048576.0,
        "GIB" => 1073741824.0,
        _ => f64::NAN,
    };
    let bytes = digits.trim().parse::<f64>().unwrap_or(f64::NAN) * unit;
    if (1.0..1e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err(Error::input(format!("`{}` is not a size like 5GB or 500MiB", shown(text))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_a_sound_recipe() {
        PRESETS.iter().for_each(|preset| drop(Recipe::preset(preset.name).unwrap()));
    }

    #[test]
    fn mistakes_in_a_recipe_are_named_with_their_line() {
        for (text, reason) in [
            ("version = 2", "version 2"),
            ("version = 1\n[calibraton]\nseed = 1", "line 2: unknown field `calibraton`"),
            ("version = 1\n[calibration]\nseed = -1", "line 3"),
            ("version = 1\n[calibration]\nsamples = 0", "samples"),
            ("version = 1\n[[override]]\nmatch = \"*\"\nbits = 4\nbit = 3", "unknown field `bit`"),
        ] {
            let error = Recipe::parse(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        let error = Recipe::parse("version = 1\n[[stage]]\nmethod = \"round-to-nearest\"\nbit = 4").unwrap_err().to_string();
        assert!(error.contains("stage 1: ") && error.contains("unknown field `bit`, expected one of `bits`"), "{error}");
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!((size("5GB").unwrap(), size("2KiB").unwrap(), size("77").unwrap()), (5_000_000_000, 2048, 77));
        assert!(size("five").is_err() && size("-1GB").is_err() && size("1TB!").is_err());
    }
}
