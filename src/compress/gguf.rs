//! A model as one GGUF file: its keys, the names of its tensors there, and what llama.cpp wants changed in them.

pub mod unpack;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use regex::Regex;
use serde_json::Value as Json;

use crate::calibrate::tokens::Tokenizer;
use crate::checkpoint::decode::{decode, encode};
use crate::checkpoint::source::Source;
use crate::checkpoint::{Checkpoint, float_of, read_json};
use crate::error::{Error, Result, shown};
use crate::formats::gguf::blocks::{self, Kind};
use crate::formats::gguf::container::{Tensor, Value, header};
use crate::formats::gguf::reader::Reader;
use crate::formats::gguf::{FORMAT, carrier, tokenizer};
use crate::formats::output::Layout;
use crate::model::architecture::NormKind;
use crate::model::config::{Config, model_type};
use crate::weight::{Float, Outlined, Storage, Weight};

/// The file's name.
pub const FILE: &str = "model.gguf";

/// What llama.cpp wants changed in a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Nothing.
    None,
    /// Floats of 32 bits, and 1 more where the weight of a norm is stored less 1.
    Single { plus_one: bool },
    /// Blocks of 8-bit codes, rounded to nearest.
    Eight,
    /// Rows of heads in pairs: llama.cpp turns neighbours, the checkpoint turns halves.
    Paired { heads: usize },
}

#[derive(Debug)]
struct Placed {
    tensor: Tensor,
    change: Change,
    /// Number format of the bytes that are carried; nothing for blocks.
    float: Option<Float>,
}

/// Everything about the file but the bytes of its tensors.
#[derive(Debug)]
pub struct File {
    keys: BTreeMap<String, Value>,
    /// By the name in the checkpoint, in the order of the file.
    tensors: Vec<(String, Placed)>,
    places: HashMap<String, usize>,
    /// Frequencies' divisors, where rotation is bent.
    divisors: Option<Vec<f32>>,
    /// What the file does not hold, each a sentence.
    pub notes: Vec<String>,
}

/// Bytes of rows that wait for the rest of their tensor, by its name.
pub type Waiting = HashMap<String, Vec<u8>>;

/// llama.cpp's name of an architecture.
fn architecture(model_type: &str) -> Option<&'static str> {
    Some(match model_type {
        "llama" | "mistral" => "llama",
        "qwen2" => "qwen2",
        "qwen3" => "qwen3",
        "gemma2" => "gemma2",
        "gemma3" | "gemma3_text" => "gemma3",
        _ => return None,
    })
}

/// A tensor's name in the file.
fn renamed(name: &str, gemma: bool) -> Option<String> {
    let block = Regex::new(r"^(?:.*\.)?layers\.(\d+)\.(.+)\.(weight|bias)$").expect("a pattern");
    let Some(found) = block.captures(name) else {
        return match name.rsplit('.').nth(1)? {
            "embed_tokens" => Some("token_embd.weight".into()),
            "norm" => Some("output_norm.weight".into()),
            "lm_head" => Some("output.weight".into()),
            _ => None,
        };
    };
    let part = match &found[2] {
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" if gemma => "post_attention_norm",
        "pre_feedforward_layernorm" if gemma => "ffn_norm",
        "post_feedforward_layernorm" if gemma => "post_ffw_norm",
        "post_attention_layernorm" => "ffn_norm",
        _ => return None,
    };
    Some(format!("blk.{}.{part}.{}", &found[1], &found[3]))
}

impl File {
    /// Plans the file for a model and what a plan makes of its layers.
    ///
    /// # Errors
    /// When llama.cpp has no such architecture or tokenizer.
    pub fn plan(checkpoint: &Checkpoint, source: &dyn Source, layers: &[Outlined], eight: bool) -> Result<Self> {
        let kind = model_type(&checkpoint.config);
        let arch = architecture(kind).ok_or_else(|| {
            Error::input(format!(
                "gguf is written for llama, mistral, qwen2, qwen3, gemma2 and gemma3, not for `{}`; use another --format",
                shown(kind)
            ))
        })?;
        let config = Config::read(&checkpoint.config)?;
        computes(&config, arch)?;
        let mut keys = keys(checkpoint, &config, arch)?;
        keys.extend(tokenizer_keys(checkpoint, &config)?);
        let by_name: HashMap<String, &Outlined> =
            layers.iter().filter(|layer| layer.storage.is_some()).map(|layer| (format!("{}.weight", layer.name), layer)).collect();
        let rotation = config.layers.first().and_then(|layer| layer.rotation.as_ref());
        let divisors = rotation.and_then(crate::model::rotation::Rotation::divisors);
        let mut file = Self { keys, tensors: Vec::new(), places: HashMap::new(), divisors, notes: Vec::new() };
        let mut left = Vec::new();
        let gemma = arch.starts_with("gemma");
        let packed: HashSet<String> = by_name
            .values()
            .flat_map(|layer| source.tensors(checkpoint, &layer.name))
            .filter(|tensor| !tensor.ends_with(".weight"))
            .collect();
        for (name, layer) in by_name.iter().filter(|(name, _)| !checkpoint.has(name)) {
            let to = renamed(name, gemma).ok_or_else(|| Error::input("has no place in a GGUF file").tensor(name))?;
            file.add(name, to, &layer.shape, layer.float, Some(layer), &config, arch);
        }
        for name in checkpoint.names().filter(|name| !packed.contains(*name)) {
            let (Some(info), Some(to)) = (checkpoint.info(name), renamed(name, gemma)) else {
                left.push(name.to_owned());
                continue;
            };
            if to == "output.weight" && config.tied {
                continue;
            }
            let layer = by_name.get(name).copied();
            let float = layer
                .map(|layer| layer.float)
                .or(float_of(info.dtype))
                .ok_or_else(|| Error::input(format!("is {:?}, gguf is written from floats", info.dtype)).tensor(name))?;
            file.add(name, to, &info.shape, float, layer, &config, arch);
        }
        let order = |(_, placed): &(String, Placed)| {
            let mut parts = placed.tensor.name.split('.');
            let number = parts.nth(1).and_then(|number| number.parse::<usize>().ok());
            (
                number.map_or(usize::from(placed.tensor.name != "token_embd.weight") * usize::MAX, |number| number + 1),
                placed.tensor.name.clone(),
            )
        };
        for (_, placed) in file.tensors.iter_mut().filter(|_| eight) {
            let whole = placed.tensor.shape.last().is_some_and(|columns| columns.is_multiple_of(Kind::Q8_0.weights()));
            if whole && placed.float.is_some() && ["token_embd.weight", "output.weight"].contains(&placed.tensor.name.as_str()) {
                (placed.tensor.kind, placed.change) = (Kind::Q8_0, Change::Eight);
            }
        }
        file.tensors.sort_by_key(order);
        file.places = file.tensors.iter().enumerate().map(|(at, (name, _))| (name.clone(), at)).collect();
        file.notes = notes(&left, layers, &config, arch);
        file.keys.insert("general.file_type".into(), Value::U32(file.mostly().file_type()));
        Ok(file)
    }

    #[expect(clippy::too_many_arguments, reason = "one place that knows all of a tensor")]
    fn add(&mut self, name: &str, to: String, shape: &[usize], float: Float, layer: Option<&Outlined>, config: &Config, arch: &str) {
        let heads = match to.rsplit('.').nth(1) {
            Some("attn_q") => config.heads,
            Some("attn_k") => config.kv_heads,
            _ => 0,
        };
        let norm = to.contains("norm");
        let change = match shape.len() {
            _ if heads > 0 && arch == "llama" => Change::Paired { heads },
            1 => Change::Single { plus_one: norm && config.family.norm == NormKind::OnePlus },
            _ => Change::None,
        };
        let carried = layer.and_then(carrier);
        let kind = match (carried, shape.len()) {
            (Some(kind), _) => kind,
            (None, 1) => Kind::F32,
            (None, _) => Kind::of(layer.map_or(float, |layer| layer.float)),
        };
        let float = if carried.is_some() { None } else { Some(float) };
        let tensor = Tensor { name: to, shape: shape.to_vec(), kind };
        self.tensors.push((name.to_owned(), Placed { tensor, change, float }));
    }

    /// The type of most weights in matrices.
    fn mostly(&self) -> Kind {
        let size = |kind: Kind| -> usize {
            let of = self.tensors.iter().filter(|(_, placed)| placed.tensor.kind == kind && placed.tensor.shape.len() == 2);
            of.map(|(_, placed)| placed.tensor.shape.iter().product::<usize>()).sum()
        };
        Kind::ALL.into_iter().max_by_key(|&kind| size(kind)).unwrap_or(Kind::F32)
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        let (header, offsets) = header(&self.keys, &self.listed());
        let last = self.listed().last().map_or(0, Tensor::bytes);
        offsets.last().map_or(header.len() as u64, |offset| offset + last)
    }

    /// Bytes of its tensors by their names in the checkpoint.
    pub fn sizes(&self) -> impl Iterator<Item = (&str, u64)> {
        self.tensors.iter().map(|(name, placed)| (name.as_str(), placed.tensor.bytes()))
    }

    fn listed(&self) -> Vec<Tensor> {
        let divisors = self.divisors.as_ref().map(|divisors| Tensor {
            name: "rope_freqs.weight".into(),
            shape: vec![divisors.len()],
            kind: Kind::F32,
        });
        self.tensors.iter().map(|(_, placed)| placed.tensor.clone()).chain(divisors).collect()
    }

    /// Lays out the file.
    pub fn layout(&self) -> Layout {
        let tensors = self.listed();
        let (header, offsets) = header(&self.keys, &tensors);
        let places = tensors.iter().zip(offsets).map(|(tensor, offset)| (tensor.name.clone(), offset, tensor.bytes())).collect();
        Layout::single(FILE, header, places)
    }

    /// The tensor that is in no checkpoint, where there is one, and its bytes.
    pub fn computed(&self) -> Option<(&'static str, Vec<u8>)> {
        self.divisors.as_ref().map(|divisors| ("rope_freqs.weight", encode(Float::F32, divisors)))
    }

    /// Opens the file as a stranger would and compares it with the plan.
    ///
    /// # Errors
    /// When it is not what was planned.
    pub fn verify(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        let written = Reader::open(&path)?;
        let tensors: Vec<Tensor> = written.tensors.into_iter().map(|(tensor, _)| tensor).collect();
        match self.listed().into_iter().zip(&tensors).find(|(planned, found)| planned != *found) {
            Some((planned, found)) => Err(Error::run(format!("{found:?} instead of {planned:?}")).file(&path)),
            None if written.keys != self.keys => Err(Error::run("the keys are not those that were planned").file(&path)),
            None if tensors.len() != self.listed().len() => Err(Error::run(format!("{} tensors", tensors.len())).file(&path)),
            None => Ok(()),
        }
    }

    /// Takes the next bytes of a tensor, in the number format `float`.
    /// Gives what becomes of them: a tensor's name and its next bytes.
    pub fn carry(&self, waiting: &mut Waiting, name: &str, bytes: &[u8], float: Option<Float>) -> Option<(&str, Vec<u8>)> {
        let (_, placed) = &self.tensors[*self.places.get(name)?];
        let from = float.or(placed.float).unwrap_or(Float::F32);
        let tensor = &placed.tensor;
        let bytes = match placed.change {
            Change::None => bytes.to_vec(),
            Change::Single { plus_one } => {
                let mut values = vec![0.0; bytes.len() / from.bytes()];
                decode(from, bytes, &mut values);
                values.iter_mut().for_each(|value| *value += f32::from(u8::from(plus_one)));
                encode(Float::F32, &values)
            }
            Change::Eight => {
                let mut values = vec![0.0; bytes.len() / from.bytes()];
                decode(from, bytes, &mut values);
                blocks::rounded_to_eight(&values)
            }
            Change::Paired { heads } => {
                let come = waiting.entry(name.to_owned()).or_default();
                come.extend_from_slice(bytes);
                let rows = tensor.shape[0];
                let row_bytes = from.bytes() * tensor.shape.iter().skip(1).product::<usize>();
                if come.len() < rows * row_bytes {
                    return None;
                }
                let whole = waiting.remove(name).unwrap_or_default();
                let mut turned = Vec::with_capacity(whole.len());
                paired(rows, heads).for_each(|row| turned.extend_from_slice(&whole[row * row_bytes..][..row_bytes]));
                if tensor.shape.len() == 1 {
                    let mut values = vec![0.0; rows];
                    decode(from, &turned, &mut values);
                    turned = encode(Float::F32, &values);
                }
                turned
            }
        };
        Some((&tensor.name, bytes))
    }

    /// What becomes of the weight of a linear layer: a tensor's name and its bytes.
    ///
    /// # Errors
    /// When the file has no place for it.
    pub fn layer(&self, layer: &Outlined, weight: &Weight) -> Result<(&str, Vec<u8>)> {
        let name = format!("{}.weight", layer.name);
        let Some(&at) = self.places.get(&name) else { return Err(Error::run("has no place in the file").tensor(&name)) };
        let placed = &self.tensors[at].1;
        let turned = match placed.change {
            Change::Paired { heads } => Some(weight.picked(&paired(layer.shape[0], heads).collect::<Vec<_>>())),
            _ => None,
        };
        let encoded = (FORMAT.encode)(turned.as_ref().unwrap_or(weight), layer.float);
        Ok((&placed.tensor.name, encoded.concat()))
    }
}

/// Refuses what llama.cpp computes differently, for its files cannot say it.
fn computes(config: &Config, arch: &str) -> Result<()> {
    let gemma = arch.starts_with("gemma");
    // The largest models of the family go by the width per head.
    let largest = gemma && [46, 62].contains(&config.layers.len());
    let size = if largest { config.hidden as f32 / config.heads as f32 } else { config.head_dim as f32 };
    if (config.scale * size.sqrt() - 1.0).abs() > 1e-4 {
        let what = format!("llama.cpp scales the scores of {arch} by {}, the model by {}", size.powf(-0.5), config.scale);
        return Err(Error::input(format!("{what}; a GGUF file would compute something else, use another --format")));
    }
    let every = if arch == "gemma2" { 2 } else { 6 };
    let fixed = |(number, layer): (usize, &crate::model::config::Layer)| layer.window.is_some() == ((number + 1) % every != 0);
    if gemma && !config.layers.iter().enumerate().all(fixed) {
        let what = format!("llama.cpp has windows in all but every {every}th layer of {arch}, config.json says otherwise");
        return Err(Error::input(format!("{what}; a GGUF file would compute something else, use another --format")));
    }
    Ok(())
}

/// What a file does not hold.
fn notes(left: &[String], layers: &[Outlined], config: &Config, arch: &str) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(first) = left.first() {
        notes.push(format!("gguf has no place for {} ({} such tensors)", shown(first), left.len()));
    }
    let floats = layers.iter().filter(|layer| matches!(layer.storage, Some(Storage::Ints { .. })) && carrier(layer).is_none());
    let (count, first) = (floats.clone().count(), floats.map(|layer| shown(&layer.name)).next());
    if let Some(first) = first {
        notes.push(format!("gguf: {count} layers stay floats, for their rows or groups are not whole blocks of 32, or they have 8 bits with zero points (first {first})"));
    }
    if let Some(window) =
        config.layers.iter().find_map(|layer| layer.window).filter(|&window| !arch.starts_with("gemma") && window < config.max_positions)
    {
        notes.push(format!("llama.cpp does not know this model's window of {window} tokens: beyond it, it computes something else"));
    }
    notes
}

/// Rows in llama.cpp's order: of each head the first of both halves, the second of both, and so on.
pub fn paired(rows: usize, heads: usize) -> impl Iterator<Item = usize> {
    let size = rows / heads.max(1);
    (0..rows).map(move |row| row / size * size + row % size % 2 * (size / 2) + row % size / 2)
}

/// What the keys say of the model itself.
fn keys(checkpoint: &Checkpoint, config: &Config, arch: &str) -> Result<BTreeMap<String, Value>> {
    let name = crate::hub::name_of(&checkpoint.folder);
    let whole = |number: usize| Value::U32(number as u32);
    let mut keys = BTreeMap::from([
        ("general.architecture".to_string(), Value::Text(arch.into())),
        ("general.type".into(), Value::Text("model".into())),
        ("general.name".into(), Value::Text(name.unwrap_or_default())),
        ("general.quantization_version".into(), Value::U32(2)),
        ("general.alignment".into(), Value::U32(32)),
    ]);
    let mut put = |key: &str, value: Value| drop(keys.insert(format!("{arch}.{key}"), value));
    put("block_count", whole(config.layers.len()));
    put("context_length", whole(config.max_positions));
    put("embedding_length", whole(config.hidden));
    put("feed_forward_length", whole(config.intermediate));
    put("attention.head_count", whole(config.heads));
    put("attention.head_count_kv", whole(config.kv_heads));
    put("attention.layer_norm_rms_epsilon", Value::F32(config.epsilon as f32));
    put("attention.key_length", whole(config.head_dim));
    put("attention.value_length", whole(config.head_dim));
    put("vocab_size", whole(config.vocabulary));
    let wanted = config.layers.iter().rev().find(|layer| layer.window.is_none()).or(config.layers.last());
    if let Some(rotation) = wanted.and_then(|layer| layer.rotation.as_ref()) {
        put("rope.dimension_count", whole(rotation.width()));
        put("rope.freq_base", Value::F32(rotation.theta() as f32));
        if let Some((kind, factor, original)) = rotation.scaling() {
            put("rope.scaling.type", Value::Text(kind.into()));
            put("rope.scaling.factor", Value::F32(factor as f32));
            original.into_iter().for_each(|original| put("rope.scaling.original_context_length", whole(original as usize)));
        }
    }
    if arch.starts_with("gemma") {
        let window = config.layers.iter().find_map(|layer| layer.window);
        window.into_iter().for_each(|window| put("attention.sliding_window", whole(window)));
        config.attention_cap.into_iter().for_each(|cap| put("attn_logit_softcapping", Value::F32(cap)));
        config.logits_cap.into_iter().for_each(|cap| put("final_logit_softcapping", Value::F32(cap)));
    }
    Ok(keys)
}

fn tokenizer_keys(checkpoint: &Checkpoint, config: &Config) -> Result<BTreeMap<String, Value>> {
    let path = checkpoint.folder.join("tokenizer.json");
    if !path.exists() {
        return Err(Error::input("missing; a GGUF file holds the tokenizer. Copy it into the folder, or use another --format").file(&path));
    }
    let tokenizer: Json = serde_json::from_slice(&crate::checkpoint::read_file(&path, 256 << 20)?)
        .map_err(|error| Error::input(format!("not JSON: {error}")).file(&path))?;
    let own = checkpoint.folder.join("tokenizer_config.json");
    let own = if own.exists() { read_json(&own)? } else { Json::Null };
    let opened = Tokenizer::open(&checkpoint.folder)?;
    let described = tokenizer::Described {
        tokenizer: &tokenizer,
        config: &own,
        template: opened.template(),
        vocabulary: config.vocabulary,
        ends: [config.bos, config.eos.first().copied()],
    };
    tokenizer::keys(&described).map_err(|error| error.file(&checkpoint.folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_rows_are_those_of_llama_cpp() {
        assert_eq!(renamed("model.layers.3.self_attn.q_proj.weight", false).unwrap(), "blk.3.attn_q.weight");
        assert_eq!(renamed("model.layers.3.post_attention_layernorm.weight", true).unwrap(), "blk.3.post_attention_norm.weight");
        assert_eq!(renamed("model.layers.3.post_attention_layernorm.weight", false).unwrap(), "blk.3.ffn_norm.weight");
        assert_eq!(renamed("model.norm.weight", false).unwrap(), "output_norm.weight");
        assert_eq!(renamed("model.rotary_emb.inv_freq", false), None);
        // Two heads of four rows: halves [0 1] and [2 3] become pairs.
        assert_eq!(paired(8, 2).collect::<Vec<_>>(), [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
