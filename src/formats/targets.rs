//! Which engine loads what, as their sources of 2026-08 say (formats A7), and the rules that engines have beyond a format's own.

use std::collections::BTreeMap;

use crate::error::{Error, Result, shown};
use crate::formats::{Format, compressed_tensors, dense, gguf, gptq};
use crate::weight::{Outlined, Storage};

/// A program that runs models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// vLLM 0.33.
    Vllm,
    /// transformers 5.
    Transformers,
    /// SGLang 0.5.
    Sglang,
    /// llama.cpp, through its converter where the format is not GGUF.
    LlamaCpp,
}

impl Engine {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Vllm, Self::Transformers, Self::Sglang, Self::LlamaCpp];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Transformers => "transformers",
            Self::Sglang => "sglang",
            Self::LlamaCpp => "llama.cpp",
        }
    }

    /// Formats in the order in which this engine is better off with them.
    fn formats(self) -> &'static [&'static Format] {
        match self {
            Self::Vllm | Self::Transformers => &[&compressed_tensors::FORMAT, &dense::FORMAT],
            Self::Sglang => &[&compressed_tensors::FORMAT, &gptq::AUTO_ROUND, &dense::FORMAT],
            Self::LlamaCpp => &[&gguf::FORMAT],
        }
    }

    /// Whether it loads layers in a format: what to know about it, or why not.
    ///
    /// # Errors
    /// Why it does not.
    pub fn loads(self, format: &Format, layers: &[Outlined]) -> Result<Option<String>, String> {
        if format.name == dense::FORMAT.name {
            return Ok((self == Self::LlamaCpp).then(|| "through convert_hf_to_gguf.py".into()));
        }
        let facts = Facts::of(layers);
        match self {
            Self::Vllm => facts.in_vllm(format.name),
            Self::Transformers => facts.in_transformers(format.name),
            Self::Sglang => facts.in_sglang(format.name),
            Self::LlamaCpp => facts.in_llama_cpp(format.name),
        }
    }

    /// The best format for what a plan holds.
    ///
    /// # Errors
    /// When no format serves, with the reason for each.
    pub fn best(self, layers: &[Outlined]) -> Result<&'static Format> {
        let mut reasons = Vec::new();
        // Integers as floats would be as large as before, which nobody asks for unknowingly.
        let packs = layers.iter().any(|layer| matches!(layer.storage, Some(Storage::Ints { .. })));
        for &format in self.formats().iter().filter(|format| packs == (format.name != dense::FORMAT.name) || self == Self::LlamaCpp) {
            let held = layers.iter().try_for_each(|layer| (format.holds)(layer));
            match held.and_then(|()| self.loads(format, layers)) {
                Ok(_) => return Ok(format),
                Err(reason) => reasons.push(format!("{}: {reason}", format.name)),
            }
        }
        let reasons = reasons.join("; ");
        Err(Error::input(format!(
            "nothing packed that {} loads holds this plan ({reasons}); --format dense would be full-size",
            self.name()
        )))
    }
}

impl std::str::FromStr for Engine {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let known: Vec<&str> = Self::ALL.iter().map(|engine| engine.name()).collect();
        Self::ALL.into_iter().find(|engine| engine.name() == text).ok_or_else(|| format!("use {}", known.join(", ")))
    }
}

/// What engines ask of a plan.
struct Facts {
    /// Bits in use, ascending.
    bits: Vec<u8>,
    /// Whether some grid has zero points.
    asymmetric: bool,
    /// Whether some grid has one scale per row.
    channel: bool,
    /// Different schemes in use.
    schemes: usize,
    /// The first set of layers that engines fuse but that differ.
    unfused: Option<String>,
}

impl Facts {
    fn of(layers: &[Outlined]) -> Self {
        let ints = layers.iter().filter_map(|layer| match layer.storage {
            Some(Storage::Ints { bits, group, symmetric }) => Some((bits, group, symmetric, group == layer.shape[1])),
            _ => None,
        });
        let mut schemes: Vec<_> = ints.collect();
        let (asymmetric, channel) = (schemes.iter().any(|scheme| !scheme.2), schemes.iter().any(|scheme| scheme.3));
        let mut bits: Vec<u8> = schemes.iter().map(|scheme| scheme.0).collect();
        bits.sort_unstable();
        bits.dedup();
        schemes.iter_mut().filter(|scheme| scheme.3).for_each(|scheme| scheme.1 = 0);
        schemes.sort_unstable();
        schemes.dedup();
        let unfused = unfused(layers).into_iter().next();
        Self { bits, asymmetric, channel, schemes: schemes.len(), unfused }
    }

    fn only(&self, allowed: &[u8]) -> bool {
        self.bits.iter().all(|bits| allowed.contains(bits))
    }

    fn fused(&self) -> Result<(), String> {
        match &self.unfused {
            Some(set) => Err(format!("it fuses {set}, which differ; give them one scheme with --keep or --skip")),
            None => Ok(()),
        }
    }

    fn in_vllm(&self, format: &str) -> Result<Option<String>, String> {
        self.fused()?;
        match format {
            "compressed-tensors" if self.only(&[4, 8]) => Ok(None),
            "compressed-tensors" => Ok(Some("2, 3, 5, 6 and 7 bits on CUDA with the Humming kernels".into())),
            "gptq" if self.only(&[4, 8]) => Ok(None),
            "gptq" | "gptq_v2" => Err("its gptq is symmetric, of 4 and 8 bits".into()),
            "auto-round" if self.only(&[4, 8]) => Ok(None),
            "auto-round" => Ok(Some("2 and 3 bits on CUDA with the Humming kernels".into())),
            "awq" => Ok(None),
            "gguf" => Err("it has no reader for gguf since 0.33".into()),
            _ => Err("it has no reader for the format".into()),
        }
    }

    fn in_transformers(&self, format: &str) -> Result<Option<String>, String> {
        match format {
            "compressed-tensors" if self.asymmetric => {
                Ok(Some("with the package compressed-tensors; its 0.20 reads zero points with dequantize=True only".into()))
            }
            "compressed-tensors" if self.only(&[2, 4, 8]) => Ok(Some("with the package compressed-tensors".into())),
            "compressed-tensors" => Ok(Some("with the package compressed-tensors 0.17 or later".into())),
            "gptq" | "gptq_v2" if self.schemes > 1 => Err("it reads one scheme per model; gptqmodel by itself reads several".into()),
            "gptq" | "gptq_v2" => Ok(Some("with the packages gptqmodel and optimum".into())),
            "awq" => Ok(Some("with the package gptqmodel".into())),
            "auto-round" => Ok(Some("with the package auto-round".into())),
            "gguf" => Ok(Some("with the package gguf, which makes it dense".into())),
            _ => Err("it has no reader for the format".into()),
        }
    }

    fn in_sglang(&self, format: &str) -> Result<Option<String>, String> {
        self.fused()?;
        match format {
            "compressed-tensors" if self.only(&[4, 8]) => Ok(None),
            "compressed-tensors" => Err("its compressed-tensors is of 4 and 8 bits".into()),
            "gptq" if self.only(&[4, 8]) => Ok(None),
            "gptq" | "gptq_v2" => Err("its gptq is symmetric, of 4 and 8 bits".into()),
            "auto-round" | "awq" | "gguf" => Ok(None),
            _ => Err("it has no reader for the format".into()),
        }
    }

    fn in_llama_cpp(&self, format: &str) -> Result<Option<String>, String> {
        let converted = || Ok(Some("through convert_hf_to_gguf.py, which makes it dense".into()));
        match format {
            "compressed-tensors" if self.schemes > 1 => Err("its converter reads one scheme per model".into()),
            "compressed-tensors" if self.channel => Err("its converter needs groups".into()),
            "compressed-tensors" if !self.only(&[2, 4, 8]) => Err("its converter reads 2, 4 and 8 bits".into()),
            "compressed-tensors" => converted(),
            "gptq" if !self.asymmetric => converted(),
            "gguf" => Ok(None),
            "gptq_v2" | "awq" | "auto-round" => Err("its converter does not read the format".into()),
            _ => Err("it has no reader for the format".into()),
        }
    }
}

/// The set of layers that engines fuse a layer with, in words; `None` where they fuse it with nothing.
pub fn fusion(name: &str) -> Option<String> {
    // One kernel computes all experts that a router chooses from.
    if let Some((mixture, _)) = name.rsplit_once(".experts.") {
        return Some(format!("all experts of {}", shown(mixture)));
    }
    let (parent, last) = name.rsplit_once('.').unwrap_or(("", name));
    let set = match last {
        "q_proj" | "k_proj" | "v_proj" => "q_proj, k_proj and v_proj",
        "gate_proj" | "up_proj" => "gate_proj and up_proj",
        "q_a_proj" | "kv_a_proj_with_mqa" => "q_a_proj and kv_a_proj_with_mqa",
        "in_proj_qkv" | "in_proj_z" => "in_proj_qkv and in_proj_z",
        _ => return None,
    };
    Some(format!("{set} of {}", shown(parent)))
}

/// Sets of layers that engines fuse but that have different schemes.
pub fn unfused(layers: &[Outlined]) -> Vec<String> {
    let mut sets: BTreeMap<String, Vec<[Option<Storage>; 2]>> = BTreeMap::new();
    for layer in layers {
        if let Some(set) = fusion(&layer.name) {
            // A scale per row is one scheme, however wide rows are.
            let by_row = match layer.storage {
                Some(Storage::Ints { bits, group, symmetric }) if group == layer.shape[1] => {
                    Some(Storage::Ints { bits, group: 0, symmetric })
                }
                storage => storage,
            };
            sets.entry(set).or_default().push([layer.storage, by_row]);
        }
    }
    let alike = |storages: &[[Option<Storage>; 2]]| (0..2).any(|way| storages.iter().all(|one| one[way] == storages[0][way]));
    sets.into_iter().filter(|(_, storages)| !alike(storages)).map(|(set, _)| set).collect()
}

/// What each engine does with a format.
pub fn loaders(format: &Format, layers: &[Outlined]) -> Vec<(Engine, Result<Option<String>, String>)> {
    Engine::ALL.into_iter().map(|engine| (engine, engine.loads(format, layers))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::awq;
    use crate::weight::Float;

    fn layers(bits: u8, symmetric: bool) -> Vec<Outlined> {
        let names = ["q_proj", "k_proj", "v_proj"];
        let storage = Some(Storage::Ints { bits, group: 64, symmetric });
        names.iter().map(|name| Outlined { name: format!("b.0.{name}"), shape: [64, 128], storage, float: Float::BF16 }).collect()
    }

    #[test]
    fn every_engine_gets_what_it_loads() {
        let best = |engine: Engine, bits, symmetric| engine.best(&layers(bits, symmetric)).map(|format| format.name);
        assert_eq!(best(Engine::Vllm, 4, true).unwrap(), "compressed-tensors");
        assert_eq!(best(Engine::Vllm, 3, false).unwrap(), "compressed-tensors");
        assert_eq!(best(Engine::Sglang, 3, true).unwrap(), "auto-round");
        assert!(best(Engine::Sglang, 3, false).unwrap_err().to_string().contains("symmetric integers"));
        assert_eq!(best(Engine::LlamaCpp, 3, true).unwrap(), "gguf");
        let mut mixed = layers(4, true);
        mixed[1].storage = None;
        assert_eq!(unfused(&mixed), ["q_proj, k_proj and v_proj of b.0"]);
        assert!(Engine::Vllm.loads(&compressed_tensors::FORMAT, &mixed).unwrap_err().contains("fuses"));
        assert!(Engine::Transformers.loads(&compressed_tensors::FORMAT, &mixed).is_ok());
        assert!(Engine::Vllm.loads(&awq::FORMAT, &layers(4, false)).is_ok());
        let mut experts = layers(4, true);
        for (number, layer) in experts.iter_mut().enumerate() {
            layer.name = format!("b.0.mlp.experts.{number}.down_proj");
        }
        assert!(unfused(&experts).is_empty());
        // Rows that are one group wide are no scheme of their own.
        experts[1].shape = [128, 64];
        assert!(unfused(&experts).is_empty());
        experts[2].storage = Some(Storage::Ints { bits: 8, group: 64, symmetric: true });
        assert_eq!(unfused(&experts), ["all experts of b.0.mlp"]);
    }
}
