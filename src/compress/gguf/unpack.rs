//! A GGUF file as the checkpoint that it was made from, as far as the file tells: config.json, tokenizer.json and weights,
//! with blocks as packed integers of the same values.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::{Value as Json, json};

use crate::checkpoint::decode::{decode, encode};
use crate::checkpoint::dtype_of;
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
    arch: String,
    config: Json,
    tokenizer: Option<[Json; 2]>,
}

/// The name in a checkpoint of a tensor.
fn renamed(name: &str, gemma: bool) -> Option<String> {
    let simple = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(simple) = simple {
        return Some(simple.into());
    }
    let mut parts = name.split('.');
    let (Some("blk"), Some(number), Some(part), Some(end), None) = (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let part = match part {
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        "attn_norm" => "input_layernorm",
        "post_attention_norm" => "post_attention_layernorm",
        "ffn_norm" if gemma => "pre_feedforward_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "post_ffw_norm" => "post_feedforward_layernorm",
        _ => return None,
    };
    number.parse::<u32>().ok()?;
    Some(format!("model.layers.{number}.{part}.{end}"))
}

impl Contents {
    fn of(reader: &Reader) -> Result<Self> {
        let arch = reader.text("general.architecture").unwrap_or("?").to_owned();
        let model_type = match arch.as_str() {
            "llama" | "qwen2" | "qwen3" | "gemma2" => arch.as_str(),
            "gemma3" => "gemma3_text",
            _ => return Err(Error::input(format!("architecture `{}`; read are llama, qwen2, qwen3, gemma2 and gemma3", shown(&arch)))),
        };
        let key = |name: &str| format!("{arch}.{name}");
        let count = |name: &str| reader.count(&key(name));
        let embedding = reader.tensors.iter().find(|(tensor, _)| tensor.name == "token_embd.weight");
        let vocabulary = embedding.and_then(|(tensor, _)| tensor.shape.first().copied());
        let mut config = json!({
            "model_type": model_type,
            "vocab_size": vocabulary,
            "hidden_size": count("embedding_length"),
            "intermediate_size": count("feed_forward_length"),
            "num_hidden_layers": count("block_count"),
            "num_attention_heads": count("attention.head_count"),
            "num_key_value_heads": count("attention.head_count_kv").or(count("attention.head_count")),
            "max_position_embeddings": count("context_length"),
            "rms_norm_eps": reader.float(&key("attention.layer_norm_rms_epsilon")).map(f64::from),
            "rope_theta": reader.float(&key("rope.freq_base")).map_or(10_000.0, f64::from),
            "tie_word_embeddings": !reader.tensors.iter().any(|(tensor, _)| tensor.name == "output.weight"),
            "bos_token_id": reader.count("tokenizer.ggml.bos_token_id"),
            "eos_token_id": reader.count("tokenizer.ggml.eos_token_id"),
        });
        let mut put = |name: &str, value: Option<Json>| value.into_iter().for_each(|value| config[name] = value);
        put("head_dim", count("attention.key_length").map(Json::from));
        if arch.starts_with("gemma") {
            put("sliding_window", count("attention.sliding_window").map(Json::from));
            put("query_pre_attn_scalar", count("attention.key_length").map(Json::from));
            put("attn_logit_softcapping", reader.float(&key("attn_logit_softcapping")).map(|cap| json!(cap)).or(Some(Json::Null)));
            put("final_logit_softcapping", reader.float(&key("final_logit_softcapping")).map(|cap| json!(cap)).or(Some(Json::Null)));
        }
        if let (Some(kind), Some(factor)) = (reader.text(&key("rope.scaling.type")), reader.float(&key("rope.scaling.factor")))
            && kind != "none"
        {
            let original = count("rope.scaling.original_context_length");
            put("rope_scaling", Some(json!({"rope_type": kind, "factor": factor, "original_max_position_embeddings": original})));
        }
        let divisors = reader.tensors.iter().find(|(tensor, _)| tensor.name == "rope_freqs.weight");
        if let Some((tensor, start)) = divisors {
            let mut values = vec![0.0; tensor.shape.iter().product()];
            decode(Float::F32, &reader.bytes(tensor, *start)?, &mut values);
            config["rope_scaling"] = bent(&config, &values)?;
        }
        let tokenizer = tokenizer(reader);
        Ok(Self { arch, config, tokenizer })
    }

    fn write(mut self, reader: &Reader, folder: &Path) -> Result<()> {
        let gemma = self.arch.starts_with("gemma");
        let known: Vec<(String, &Tensor, u64)> = reader
            .tensors
            .iter()
            .filter(|(tensor, _)| tensor.name != "rope_freqs.weight")
            .map(|(tensor, start)| {
                let name = renamed(&tensor.name, gemma);
                name.map(|name| (name, tensor, *start))
                    .ok_or_else(|| Error::input("not a tensor of this architecture").tensor(&tensor.name))
            })
            .collect::<Result<_>>()?;
        let layers: HashMap<&str, Outlined> =
            known.iter().filter_map(|(name, tensor, _)| Some((name.as_str(), packed(name, tensor)?))).collect();
        let entry = |(name, tensor, _): &(String, &Tensor, u64)| match layers.get(name.as_str()) {
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
        self.config[key].as_u64().filter(|_| self.arch == "llama").map(|heads| heads as usize)
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
        if self.arch.starts_with("gemma") && name.contains("norm") {
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

/// A linear layer in blocks; embeddings are read as floats.
fn packed(name: &str, tensor: &Tensor) -> Option<Outlined> {
    let ints = blocks::decode(&[], tensor.kind, [0, 0])?;
    let layer = name.strip_suffix(".weight").filter(|name| name.contains("_proj"))?;
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
    Err(Error::input("its rotation is bent by a rule that is not Llama 3's").tensor("rope_freqs.weight"))
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
