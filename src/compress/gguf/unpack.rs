//! A GGUF file as the checkpoint that it was made from, as far as the file tells: config.json, tokenizer.json and weights,
//! with blocks as packed integers of the same values.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::{Value as Json, json};

use crate::checkpoint::decode::{decode, encode};
use crate::checkpoint::dtype_of;
use crate::compress::gguf::families::{FAMILIES, Family, Head, Sliding, restored};
use crate::compress::gguf::paired;
use crate::embedded;
use crate::error::{Error, Result, shown};
use crate::formats::gguf::blocks::{self, Kind};
use crate::formats::gguf::container::{Tensor, Value};
use crate::formats::gguf::k_blocks;
use crate::formats::gguf::reader::Reader;
use crate::formats::output::Output;
use crate::formats::{Entry, compressed_tensors};
use crate::model::config::Config;
use crate::model::rotation;
use crate::storage::write_whole_json;
use crate::weight::{Float, Outlined, Storage, Weight};

/// Writes the checkpoint that a file holds into an empty folder.
///
/// # Errors
/// When the file is not sound, or holds a model that this program does not know.
pub fn unpack(path: &Path, folder: &Path) -> Result<()> {
    let reader = Reader::open(path)?;
    let unpacked = Contents::of(&reader).and_then(|unpacked| unpacked.write(&reader, folder));
    unpacked.map_err(|error| error.file(path))
}

struct Contents {
    family: &'static Family,
    experts: usize,
    config: Json,
    tokenizer: Option<[Json; 2]>,
}

impl Contents {
    fn of(reader: &Reader) -> Result<Self> {
        let arch = reader.text("general.architecture").unwrap_or("?").to_owned();
        let key = |name: &str| format!("{arch}.{name}");
        let count = |name: &str| reader.count(&key(name));
        let experts = count("expert_count").unwrap_or(0) as usize;
        if experts > MOST_EXPERTS {
            return Err(Error::input(format!("{experts} experts; at most {MOST_EXPERTS} are read")));
        }
        let windows = count("attention.sliding_window").is_some_and(|window| window > 0);
        let mut families = FAMILIES.iter().filter(|family| family.arch == arch);
        let fits = |family: &&Family| {
            let listed = family.sliding == Sliding::Listed && family.head == Head::Own;
            (family.renormalized.is_some() == (experts > 0)) && (arch != "olmo2" || listed == windows)
        };
        let Some(family) = families.find(fits) else {
            let mut read: Vec<&str> = FAMILIES.iter().map(|family| family.arch).collect();
            read.dedup();
            return Err(Error::input(format!("architecture `{}`; read are {}", shown(&arch), read.join(", "))));
        };
        let embedding = reader.tensors.iter().find(|(tensor, _)| tensor.name == "token_embd.weight");
        let vocabulary = embedding.and_then(|(tensor, _)| tensor.shape.first().copied());
        let mut config = json!({
            "model_type": family.model_types[0],
            "vocab_size": vocabulary,
            "hidden_size": count("embedding_length"),
            "intermediate_size": count("feed_forward_length"),
            "num_hidden_layers": count("block_count"),
            "num_attention_heads": count("attention.head_count"),
            "num_key_value_heads": count("attention.head_count_kv").or(count("attention.head_count")),
            "max_position_embeddings": count("context_length"),
            "rope_theta": reader.float(&key("rope.freq_base")).map_or(10_000.0, f64::from),
            "tie_word_embeddings": !reader.tensors.iter().any(|(tensor, _)| tensor.name == "output.weight"),
            "bos_token_id": reader.count("tokenizer.ggml.bos_token_id"),
            "eos_token_id": reader.count("tokenizer.ggml.eos_token_id"),
        });
        let mut put = |name: &str, value: Option<Json>| value.into_iter().for_each(|value| config[name] = value);
        put("head_dim", count("attention.key_length").map(Json::from));
        described(reader, family, &mut put);
        turned(reader, family, &mut config)?;
        // What the file does not say is left to the family.
        config.as_object_mut().into_iter().for_each(|config| config.retain(|key, value| !value.is_null() || NULLS.contains(&key.as_str())));
        let tokenizer = tokenizer(reader);
        Ok(Self { family, experts, config, tokenizer })
    }

    fn write(mut self, reader: &Reader, folder: &Path) -> Result<()> {
        let mut known: Vec<(String, Tensor, u64)> = Vec::new();
        for (tensor, start) in reader.tensors.iter().filter(|(tensor, _)| !ROTATIONS.contains(&tensor.name.as_str())) {
            let names = restored(&tensor.name, self.family, self.experts);
            let names = names.ok_or_else(|| Error::input("not a tensor of this architecture").tensor(&tensor.name))?;
            known.extend(parts(names, tensor, *start)?);
        }
        let layers: HashMap<&str, Outlined> =
            known.iter().filter_map(|(name, tensor, _)| Some((name.as_str(), packed(name, tensor)?))).collect();
        let entry = |(name, tensor, _): &(String, Tensor, u64)| match layers.get(name.as_str()) {
            Some(layer) => (compressed_tensors::FORMAT.entries)(layer),
            None => {
                vec![Entry { name: name.clone(), dtype: dtype_of(tensor.kind.float().unwrap_or(Float::F32)), shape: tensor.shape.clone() }]
            }
        };
        let entries: Vec<Entry> = known.iter().flat_map(entry).collect();
        let mut output = Output::create(folder, &entries, u64::MAX, &BTreeMap::new())?;
        for (name, tensor, start) in &known {
            let bytes = reader.bytes(tensor, *start)?;
            match layers.get(name.as_str()) {
                Some(layer) => {
                    let weight = Weight::Ints(blocks::decode(&bytes, tensor.kind, layer.shape).expect("a type of blocks"));
                    let weight = self.halved(name, &weight).unwrap_or(weight);
                    for (entry, bytes) in
                        (compressed_tensors::FORMAT.entries)(layer).iter().zip((compressed_tensors::FORMAT.encode)(&weight, Float::F16))
                    {
                        output.write(&entry.name, bytes)?;
                    }
                }
                None => output.write(name, self.floats(name, tensor, bytes))?,
            }
        }
        output.finish()?;
        let mut outlined: Vec<Outlined> = layers.into_values().collect();
        outlined.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(section) = (compressed_tensors::FORMAT.config)(&outlined, &[]).filter(|_| !outlined.is_empty()) {
            self.config["quantization_config"] = section;
        }
        write_whole_json(&folder.join("config.json"), &self.config)?;
        if let Some([tokenizer, config]) = &self.tokenizer {
            write_whole_json(&folder.join("tokenizer.json"), tokenizer)?;
            write_whole_json(&folder.join("tokenizer_config.json"), config)?;
        }
        Ok(())
    }

    /// Heads of a tensor whose rows llama.cpp has in pairs.
    fn heads(&self, name: &str) -> Option<usize> {
        let key = match name.rsplit('.').nth(1)? {
            "q_proj" => "num_attention_heads",
            "k_proj" => "num_key_value_heads",
            _ => return None,
        };
        self.config[key].as_u64().filter(|_| self.family.paired).map(|heads| heads as usize)
    }

    /// The order of rows that undoes pairs.
    fn halves(&self, name: &str, rows: usize) -> Option<Vec<usize>> {
        let heads = self.heads(name).filter(|&heads| heads > 0 && rows.is_multiple_of(2 * heads))?;
        let mut order = vec![0; rows];
        paired(rows, heads).enumerate().for_each(|(to, row)| order[row] = to);
        Some(order)
    }

    fn halved(&self, name: &str, weight: &Weight) -> Option<Weight> {
        Some(weight.picked(&self.halves(name, weight.shape()[0])?))
    }

    /// The floats of a tensor as a checkpoint holds them.
    fn floats(&self, name: &str, tensor: &Tensor, bytes: Vec<u8>) -> Vec<u8> {
        let Some(float) = tensor.kind.float() else {
            let (columns, entries) = (tensor.shape.last().copied().unwrap_or(1), tensor.shape.iter().product::<usize>());
            let shape = [entries / columns.max(1), columns];
            let matrix = match tensor.kind {
                Kind::Super(kind) => k_blocks::decode(&bytes, kind, shape).to_matrix(),
                kind => blocks::decode(&bytes, kind, shape).expect("a type of blocks").to_matrix(),
            };
            let matrix = Weight::Dense(matrix);
            return encode(Float::F32, &self.halved(name, &matrix).unwrap_or(matrix).to_matrix().data);
        };
        if self.family.plus_one && name.contains("norm") {
            let mut values = vec![0.0; bytes.len() / float.bytes()];
            decode(float, &bytes, &mut values);
            values.iter_mut().for_each(|value| *value -= 1.0);
            return encode(float, &values);
        }
        let rows = tensor.shape.first().copied().unwrap_or(1);
        match self.halves(name, rows) {
            Some(order) => {
                let row_bytes = bytes.len() / rows.max(1);
                order.iter().flat_map(|&row| bytes[row * row_bytes..][..row_bytes].iter().copied()).collect()
            }
            None => bytes,
        }
    }
}

/// Keys of which null says something else than silence.
const NULLS: [&str; 3] = ["sliding_window", "attn_logit_softcapping", "final_logit_softcapping"];

/// Most experts of a layer.
const MOST_EXPERTS: usize = 1 << 14;

/// Tensors of rotations.
const ROTATIONS: [&str; 3] = ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];

/// A tensor under its name in a checkpoint; one of all experts as one for each.
fn parts(names: Vec<String>, tensor: &Tensor, start: u64) -> Result<Vec<(String, Tensor, u64)>> {
    let [experts, rows, columns] = match (tensor.shape.as_slice(), names.as_slice()) {
        (&[width], [name]) if name.ends_with(".shared_expert_gate.weight") => {
            return Ok(vec![(name.clone(), Tensor { shape: vec![1, width], ..tensor.clone() }, start)]);
        }
        (_, [_]) if tensor.shape.len() < 3 => return Ok(names.into_iter().map(|name| (name, tensor.clone(), start)).collect()),
        (&[experts, rows, columns], names) if experts == names.len() => [experts, rows, columns],
        (shape, names) => return Err(Error::input(format!("is {shape:?} for {} experts", names.len())).tensor(&tensor.name)),
    };
    let part = Tensor { shape: vec![rows, columns], ..tensor.clone() };
    let starts = (0..experts as u64).map(|expert| start + expert * part.bytes());
    Ok(names.into_iter().zip(starts).map(|(name, start)| (name, part.clone(), start)).collect())
}

/// What the keys say of a family beside what they say of all.
fn described(reader: &Reader, family: &Family, put: &mut dyn FnMut(&str, Option<Json>)) {
    let key = |name: &str| format!("{}.{name}", family.arch);
    let whole = |name: &str| reader.count(&key(name)).map(Json::from);
    let float = |name: &str| reader.float(&key(name)).map(|value| json!(value));
    put("rms_norm_eps", float("attention.layer_norm_rms_epsilon"));
    put("layer_norm_eps", float("attention.layer_norm_epsilon"));
    if let Some(renormalized) = family.renormalized {
        let mixtral = family.arch == "llama";
        put(if mixtral { "num_local_experts" } else { "num_experts" }, whole("expert_count"));
        put("num_experts_per_tok", whole("expert_used_count"));
        put("norm_topk_prob", Some(json!(renormalized)).filter(|_| !mixtral));
        put("moe_intermediate_size", whole("expert_feed_forward_length"));
        put("shared_expert_intermediate_size", whole("expert_shared_feed_forward_length"));
    }
    put("sliding_window", whole("attention.sliding_window").or(Some(Json::Null)).filter(|_| family.sliding != Sliding::Unknown));
    if family.sliding == Sliding::Unknown {
        put("use_sliding_window", Some(json!(false)));
        put("sliding_window", Some(Json::Null));
    }
    let kind = |sliding: bool| json!(if sliding { "sliding_attention" } else { "full_attention" });
    let layers = reader.count(&key("block_count")).unwrap_or(0).min(1 << 16);
    match (family.sliding, reader.keys.get(&key("attention.sliding_window_pattern"))) {
        (Sliding::Listed, Some(Value::I32s(pattern))) => {
            put("layer_types", Some(pattern.iter().map(|&sliding| kind(sliding != 0)).collect()));
        }
        (Sliding::Listed, Some(Value::U32(every @ 1..))) => {
            put("layer_types", Some((0..layers).map(|layer| kind(layer % every < every - 1)).collect()));
        }
        _ => {}
    }
    let has = |part: &str| reader.tensors.iter().any(|(tensor, _)| tensor.name == format!("blk.0.{part}.bias"));
    let biased = has("attn_q");
    if ["qwen2", "qwen2moe"].contains(&family.arch) {
        put("qkv_bias", Some(json!(biased)));
    } else if biased {
        put("attention_bias", Some(json!(true)));
    }
    if has("ffn_up") {
        put("mlp_bias", Some(json!(true)));
    }
    match family.arch {
        "gemma2" | "gemma3" => {
            put("query_pre_attn_scalar", whole("attention.key_length"));
            put("attn_logit_softcapping", float("attn_logit_softcapping").or(Some(Json::Null)));
            put("final_logit_softcapping", float("final_logit_softcapping").or(Some(Json::Null)));
        }
        "glm4" => put("attention_bias", Some(json!(biased))),
        "cohere2" => put("logit_scale", float("logit_scale")),
        "granite" => {
            put("logits_scaling", float("logit_scale"));
            put("attention_multiplier", float("attention.scale"));
            put("embedding_multiplier", float("embedding_scale"));
            put("residual_multiplier", float("residual_scale"));
            put("attention_bias", Some(json!(biased)));
        }
        _ => {}
    }
}

/// What the file says of rotations.
fn turned(reader: &Reader, family: &Family, config: &mut Json) -> Result<()> {
    let arch = family.arch;
    let key = |name: &str| format!("{arch}.{name}");
    let listed = |name: &str| -> Result<Option<Vec<f32>>> {
        let Some((tensor, start)) = reader.tensors.iter().find(|(tensor, _)| tensor.name == name) else { return Ok(None) };
        if tensor.kind != Kind::F32 {
            return Err(Error::input(format!("is {:?}, it must be floats of 32 bits", tensor.kind)).tensor(name));
        }
        let mut values = vec![0.0; tensor.shape.iter().product()];
        decode(Float::F32, &reader.bytes(tensor, *start)?, &mut values);
        Ok(Some(values))
    };
    let (width, turning) = (reader.count(&key("attention.key_length")), reader.count(&key("rope.dimension_count")));
    let whole = width.map_or(1.0, f64::from);
    let part = turning.map_or(1.0, |turning| f64::from(turning) / whole);
    if part < 1.0 || family.partial {
        config["partial_rotary_factor"] = json!(part);
    }
    if let Some(local) = reader.float(&key("rope.freq_base_swa")).filter(|_| arch == "gemma3") {
        config["rope_local_base_freq"] = json!(f64::from(local));
    }
    let original = reader.count(&key("rope.scaling.original_context_length"));
    let kind = reader.text(&key("rope.scaling.type")).filter(|kind| *kind != "none");
    let attention = reader.float(&key("rope.scaling.attn_factor")).map(f64::from);
    if let (Some(kind), Some(factor)) = (kind, reader.float(&key("rope.scaling.factor")).map(f64::from)) {
        config["rope_scaling"] = json!({"rope_type": kind, "factor": factor, "original_max_position_embeddings": original});
        if let Some(attention) = attention.filter(|_| kind == "yarn") {
            config["rope_scaling"]["attention_factor"] = json!(attention * (1.0 + 0.1 * factor.max(1.0).ln()));
        }
    }
    if let (Some(short), Some(long)) = (listed(ROTATIONS[1])?, listed(ROTATIONS[2])?) {
        config["original_max_position_embeddings"] = json!(original);
        config["rope_scaling"] = json!({"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": attention.unwrap_or(1.0),
                "original_max_position_embeddings": original});
    }
    if let Some(divisors) = listed(ROTATIONS[0])? {
        config["rope_scaling"] = bent(config, &divisors)?;
    }
    if config["model_type"] == "olmo3" {
        // Layers with windows turn at the same base, and unstretched.
        let theta = config["rope_theta"].clone();
        let mut full =
            config.get("rope_scaling").filter(|scaling| scaling.is_object()).cloned().unwrap_or_else(|| json!({"rope_type": "default"}));
        full["rope_theta"] = theta.clone();
        config["rope_parameters"] = json!({"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": theta}});
        config.as_object_mut().into_iter().for_each(|config| {
            config.shift_remove("rope_scaling");
            config.shift_remove("rope_theta");
        });
    }
    Ok(())
}

/// A linear layer in blocks; embeddings are read as floats.
fn packed(name: &str, tensor: &Tensor) -> Option<Outlined> {
    let ints = blocks::decode(&[], tensor.kind, [0, 0])?;
    let layer = name.strip_suffix(".weight").filter(|name| name.contains("_proj") || name.contains(".experts."))?;
    let storage = Some(Storage::Ints { bits: ints.bits, group: tensor.kind.weights(), symmetric: true });
    Some(Outlined { name: layer.into(), shape: tensor.shape.as_slice().try_into().ok()?, storage, float: Float::F16 })
}

/// The rule of Llama 3 that gives these divisors.
fn bent(config: &Json, divisors: &[f32]) -> Result<Json> {
    for factor in [8.0, 32.0, 4.0, 16.0, 2.0] {
        let rule = json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        let mut tried = config.clone();
        tried["rope_scaling"] = rule.clone();
        let found = Config::read(&tried)?.layers.first().and_then(|layer| layer.rotation.as_ref().and_then(rotation::Rotation::divisors));
        if found.is_some_and(|found| found.len() == divisors.len() && found.iter().zip(divisors).all(|(a, b)| (a - b).abs() < 1e-3 * a)) {
            return Ok(rule);
        }
    }
    // Another rule: what it gives is known as well.
    Ok(json!({"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"]}))
}

/// tokenizer.json and tokenizer_config.json, where the file has a tokenizer of a kind that this program writes.
fn tokenizer(reader: &Reader) -> Option<[Json; 2]> {
    let tokens = reader.texts("tokenizer.ggml.tokens");
    let Some(Value::I32s(kinds)) = reader.keys.get("tokenizer.ggml.token_type") else { return None };
    let vocab: serde_json::Map<String, Json> =
        tokens.iter().enumerate().filter(|&(id, _)| kinds.get(id) != Some(&5)).map(|(id, token)| (token.clone(), json!(id))).collect();
    let added = |(id, token): (usize, &String)| {
        let special = matches!(kinds.get(id), Some(2 | 3));
        (special || kinds.get(id) == Some(&4)).then(|| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special})
        })
    };
    let added: Vec<Json> = tokens.iter().enumerate().filter_map(added).collect();
    let named = |key: &str| reader.count(key).and_then(|id| tokens.get(id as usize));
    let bos = named("tokenizer.ggml.bos_token_id");
    let around = reader.truth("tokenizer.ggml.add_bos_token").unwrap_or(false);
    let processor = bos.filter(|_| around).map(|token| {
        let id = reader.count("tokenizer.ggml.bos_token_id");
        let begin = json!([{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
        json!({"type": "TemplateProcessing", "single": begin, "pair": begin, "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}}})
    });
    let unknown = named("tokenizer.ggml.unknown_token_id");
    let own = match reader.text("tokenizer.ggml.model")? {
        "gpt2" => {
            let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
            let split = crate::formats::gguf::tokenizer::pattern(reader.text("tokenizer.ggml.pre")?);
            let pre = match split {
                Some(pattern) => json!({"type": "Sequence", "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                    {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}),
                None if reader.text("tokenizer.ggml.pre") == Some("gpt-2") => level.clone(),
                None if reader.text("tokenizer.ggml.pre") == Some("smollm") => {
                    json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, level.clone()]})
                }
                None => return None,
            };
            let merges = reader.texts("tokenizer.ggml.merges");
            json!({"normalizer": null, "pre_tokenizer": pre, "decoder": level,
                "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges}})
        }
        "llama" => {
            let Some(Value::F32s(scores)) = reader.keys.get("tokenizer.ggml.scores") else { return None };
            let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
            let normalizer = match reader.truth("tokenizer.ggml.add_space_prefix").unwrap_or(true) {
                true => json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}),
                false => space,
            };
            json!({"normalizer": normalizer, "pre_tokenizer": null, "decoder": null,
                "model": {"type": "BPE", "dropout": null, "unk_token": unknown, "fuse_unk": true, "byte_fallback": true,
                    "vocab": vocab, "merges": merges(tokens, kinds, scores)}})
        }
        _ => return None,
    };
    let mut tokenizer = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "post_processor": processor});
    own.as_object()?.iter().for_each(|(key, value)| tokenizer[key] = value.clone());
    let template = reader.text("tokenizer.chat_template");
    let config =
        json!({"bos_token": bos, "eos_token": named("tokenizer.ggml.eos_token_id"), "unk_token": unknown, "chat_template": template});
    Some([tokenizer, config])
}

/// Merges that make the tokens of a SentencePiece model, the best-scored first.
fn merges(tokens: &[String], kinds: &[i32], scores: &[f32]) -> Vec<Json> {
    let known: HashMap<&str, usize> =
        tokens.iter().enumerate().filter(|&(id, _)| kinds.get(id) == Some(&1)).map(|(id, token)| (token.as_str(), id)).collect();
    let mut found = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|&(id, _)| kinds.get(id) == Some(&1)) {
        let score = scores.get(id).copied().unwrap_or(0.0);
        if score <= crate::formats::gguf::tokenizer::UNREACHED {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (a, b) = token.split_at(at);
            if let (Some(&first), Some(&second)) = (known.get(a), known.get(b)) {
                found.push((score, first, second, json!([a, b])));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    found.into_iter().map(|(_, _, _, merge)| merge).collect()
}

/// A checkpoint's folder: as it was given, or what a GGUF file was unpacked to.
#[derive(Debug)]
pub enum Unpacked {
    /// As it was given.
    Given(std::path::PathBuf),
    /// Unpacked for as long as this lives.
    File(tempfile::TempDir),
}

impl Unpacked {
    /// The folder at a path, or what the GGUF file there holds or the program carries, unpacked below `scratch`.
    ///
    /// # Errors
    /// As [`unpack`].
    pub fn open(path: &Path, scratch: &Path) -> Result<Self> {
        if embedded::is_named(path) {
            let folder = tempfile::tempdir_in(scratch).map_err(|error| Error::io(scratch, &error))?;
            embedded::write(folder.path())?;
            return Ok(Self::File(folder));
        }
        let Some(file) = file_of(path) else { return Ok(Self::Given(path.to_path_buf())) };
        let folder = tempfile::tempdir_in(scratch).map_err(|error| Error::io(scratch, &error))?;
        unpack(&file, folder.path())?;
        Ok(Self::File(folder))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::File(folder) => folder.path(),
        }
    }
}

/// The GGUF file that a path is, or that a folder without config.json holds.
pub fn file_of(path: &Path) -> Option<std::path::PathBuf> {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) && path.is_file() {
        return Some(path.to_path_buf());
    }
    let file = path.join(super::FILE);
    (file.is_file() && !path.join("config.json").exists()).then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::gguf::container::header;

    /// Why a file with these keys and tensors, all zeros, is not unpacked.
    fn refused(keys: &[(&str, Value)], tensors: &[(&str, &[usize], Kind)]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gguf");
        let arch = ("general.architecture", Value::Text("qwen3moe".into()));
        let keys = keys.iter().cloned().chain([arch]).map(|(key, value)| (key.to_owned(), value)).collect();
        let tensor = |(name, shape, kind): &(&str, &[usize], Kind)| Tensor { name: (*name).into(), shape: shape.to_vec(), kind: *kind };
        let tensors: Vec<Tensor> = tensors.iter().map(tensor).collect();
        let (mut bytes, offsets) = header(&keys, &tensors);
        let end = offsets.iter().zip(&tensors).map(|(offset, tensor)| offset + tensor.bytes()).max();
        bytes.resize(bytes.len().max(end.unwrap_or(0) as usize), 0);
        std::fs::write(&path, bytes).unwrap();
        unpack(&path, folder.path()).unwrap_err().to_string()
    }

    #[test]
    fn numbers_of_experts_and_lists_of_rotations_are_held_against_the_file() {
        let count = |experts: u32| ("qwen3moe.expert_count", Value::U32(experts));
        assert!(refused(&[count(4_000_000_000)], &[]).contains("4000000000 experts; at most 16384 are read"));
        let stacked: (&str, &[usize], Kind) = ("blk.0.ffn_up_exps.weight", &[2, 3, 4], Kind::F32);
        assert!(refused(&[count(16384)], &[stacked]).contains("is [2, 3, 4] for 16384 experts"));
        let divisors: (&str, &[usize], Kind) = ("rope_freqs.weight", &[4], Kind::F16);
        assert!(refused(&[count(2)], &[divisors]).contains("is F16, it must be floats of 32 bits"));
        assert!(refused(&[], &[]).contains("architecture `qwen3moe`"), "a mixture without experts");
    }
}
