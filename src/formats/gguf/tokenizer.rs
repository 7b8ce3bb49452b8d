//! tokenizer.json as the keys that llama.cpp reads: byte-level BPE as `gpt2` with the name of its pre-tokenizer, and BPE with
//! byte fallback, which comes from SentencePiece, as `llama`.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value as Json;

use crate::error::{Error, Result, shown};
use crate::formats::gguf::container::Value;

/// Pre-tokenizers that llama.cpp knows, by what marks their patterns.
const PATTERNS: &[(&str, &str)] = &[
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "llama-bpe"),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "qwen2"),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "tekken",
    ),
];

/// Score of tokens that no merge makes: they must not come out of merging.
pub const UNREACHED: f32 = -1e9;

/// The pattern of a pre-tokenizer that splits by one.
pub fn pattern(pre: &str) -> Option<&'static str> {
    PATTERNS.iter().find(|(_, name)| *name == pre).map(|&(pattern, _)| pattern)
}

/// What the folder of a model says about its tokenizer.
#[derive(Debug)]
pub struct Described<'a> {
    /// tokenizer.json.
    pub tokenizer: &'a Json,
    /// tokenizer_config.json, or null.
    pub config: &'a Json,
    /// The chat template, where there is one.
    pub template: Option<&'a str>,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// The tokens that config.json says begin and end a text.
    pub ends: [Option<u32>; 2],
}

/// The keys of a tokenizer.
///
/// # Errors
/// When llama.cpp has no tokenizer of this kind.
pub fn keys(described: &Described<'_>) -> Result<BTreeMap<String, Value>> {
    let Described { tokenizer, config, template, vocabulary, ends } = *described;
    let wrong = |what: String| Error::input(format!("tokenizer.json: {what}; --format dense keeps the tokenizer as it is"));
    let model = &tokenizer["model"];
    let vocab = model["vocab"].as_object().filter(|_| model["type"].as_str().unwrap_or("BPE") == "BPE");
    let vocab =
        vocab.ok_or_else(|| wrong(format!("llama.cpp has no reader for a `{}` model", shown(model["type"].as_str().unwrap_or("?")))))?;
    let mut table = Table::new(vocabulary);
    for (token, id) in vocab {
        table.set(id.as_u64(), token, 1).map_err(wrong)?;
    }
    for added in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        let special = added["special"].as_bool() == Some(true);
        table.set(added["id"].as_u64(), added["content"].as_str().unwrap_or(""), if special { 3 } else { 4 }).map_err(wrong)?;
    }
    let fallback = model["byte_fallback"].as_bool() == Some(true);
    let merges: Vec<[String; 2]> = model["merges"].as_array().into_iter().flatten().filter_map(merge).collect();
    let mut keys = BTreeMap::new();
    let mut put = |key: &str, value: Value| drop(keys.insert(format!("tokenizer.{key}"), value));
    if fallback {
        let mut rank: HashMap<String, usize> = HashMap::new();
        for (number, [a, b]) in merges.iter().enumerate() {
            rank.entry(format!("{a}{b}")).or_insert(number);
        }
        let single = |token: &str| token.chars().count() == 1;
        let score = |token: &String| rank.get(token).map_or(if single(token) { 0.0 } else { UNREACHED }, |&rank| -1.0 - rank as f32);
        put("ggml.model", Value::Text("llama".into()));
        put("ggml.pre", Value::Text("default".into()));
        put("ggml.scores", Value::F32s(table.tokens.iter().map(score).collect()));
        put("ggml.add_space_prefix", Value::Bool(prepends(tokenizer)));
        for (token, kind) in table.tokens.iter().zip(&mut table.kinds).filter(|(_, kind)| **kind == 1) {
            *kind = if is_byte(token) { 6 } else { 1 };
        }
    } else {
        put("ggml.model", Value::Text("gpt2".into()));
        put("ggml.pre", Value::Text(pre(tokenizer).map_err(wrong)?.into()));
        put("ggml.merges", Value::Texts(merges.iter().map(|[a, b]| format!("{a} {b}")).collect()));
    }
    let id = |text: &str| table.tokens.iter().position(|token| token == text).map(|id| id as u32);
    let named = |key: &str| config[key].as_str().or(config[key]["content"].as_str()).and_then(id);
    let unknown = named("unk_token").or(model["unk_token"].as_str().and_then(id));
    let [begin, end] = ends;
    for (key, token) in [
        ("ggml.bos_token_id", named("bos_token").or(begin)),
        ("ggml.eos_token_id", named("eos_token").or(end)),
        ("ggml.unknown_token_id", unknown),
        ("ggml.padding_token_id", named("pad_token")),
    ] {
        token.into_iter().for_each(|token| put(key, Value::U32(token)));
    }
    if let Some(id) = unknown.filter(|_| fallback) {
        table.kinds[id as usize] = 2;
    }
    let [before, after] = around(tokenizer);
    put("ggml.add_bos_token", Value::Bool(before));
    put("ggml.add_eos_token", Value::Bool(after));
    template.into_iter().for_each(|template| put("chat_template", Value::Text(template.into())));
    put("ggml.tokens", Value::Texts(table.tokens));
    put("ggml.token_type", Value::I32s(table.kinds));
    Ok(keys)
}

/// Tokens by number; numbers that nobody names are unused.
struct Table {
    tokens: Vec<String>,
    kinds: Vec<i32>,
}

impl Table {
    fn new(count: usize) -> Self {
        Self { tokens: (0..count).map(|id| format!("[PAD{id}]")).collect(), kinds: vec![5; count] }
    }

    fn set(&mut self, id: Option<u64>, token: &str, kind: i32) -> Result<(), String> {
        let count = self.tokens.len();
        let place = id.and_then(|id| usize::try_from(id).ok()).filter(|&id| id < count);
        let id = place.ok_or_else(|| format!("token `{}` is not below the vocabulary of {count}", shown(token)))?;
        self.tokens[id] = token.into();
        self.kinds[id] = kind;
        Ok(())
    }
}

fn merge(merge: &Json) -> Option<[String; 2]> {
    match merge {
        Json::String(text) => text.split_once(' ').map(|(a, b)| [a.to_owned(), b.to_owned()]),
        Json::Array(pair) => Some([pair.first()?.as_str()?.to_owned(), pair.get(1)?.as_str()?.to_owned()]),
        _ => None,
    }
}

fn is_byte(token: &str) -> bool {
    token.len() == 6 && token.starts_with("<0x") && token.ends_with('>') && token[3..5].chars().all(|c| c.is_ascii_hexdigit())
}

/// All objects below a value that have a type, itself included.
fn typed(value: &Json) -> Vec<&Json> {
    match value {
        Json::Object(map) => {
            let below = map.values().flat_map(typed);
            map.contains_key("type").then_some(value).into_iter().chain(below).collect()
        }
        Json::Array(list) => list.iter().flat_map(typed).collect(),
        _ => Vec::new(),
    }
}

/// Whether a space goes before the text.
fn prepends(tokenizer: &Json) -> bool {
    let before = |one: &&Json| match one["type"].as_str() {
        Some("Prepend") => true,
        Some("Metaspace") => one["prepend_scheme"].as_str() != Some("never") && one["add_prefix_space"].as_bool() != Some(false),
        _ => false,
    };
    [&tokenizer["normalizer"], &tokenizer["pre_tokenizer"]].into_iter().flat_map(typed).any(|one| before(&one))
}

/// The name that llama.cpp has for the pre-tokenizer of a byte-level BPE.
fn pre(tokenizer: &Json) -> Result<&'static str, String> {
    let parts = typed(&tokenizer["pre_tokenizer"]);
    let of = |kind: &str| parts.iter().find(|part| part["type"].as_str() == Some(kind));
    let level = of("ByteLevel").ok_or("llama.cpp has no reader for a BPE that is not of bytes")?;
    if let Some(split) = of("Split") {
        let pattern = split["pattern"]["Regex"].as_str().unwrap_or("?");
        let known = PATTERNS.iter().find(|(known, _)| *known == pattern).map(|&(_, name)| name);
        return known.ok_or_else(|| format!("llama.cpp knows no pre-tokenizer of the pattern `{}`", shown(pattern)));
    }
    match (of("Digits"), level["use_regex"].as_bool().unwrap_or(true)) {
        (Some(_), true) => Ok("smollm"),
        (None, true) => Ok("gpt-2"),
        _ => Err("llama.cpp knows no pre-tokenizer without a pattern".into()),
    }
}

/// Whether the tokenizer puts a special token before a text, and behind it.
fn around(tokenizer: &Json) -> [bool; 2] {
    let parts = typed(&tokenizer["post_processor"]);
    let single = parts.iter().find(|part| part["type"].as_str() == Some("TemplateProcessing")).and_then(|part| part["single"].as_array());
    let Some(single) = single else { return [false; 2] };
    let special = |one: Option<&Json>| one.is_some_and(|one| one.get("SpecialToken").is_some());
    [special(single.first()), special(single.last())]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn described<'a>(tokenizer: &'a Json, config: &'a Json) -> Described<'a> {
        Described { tokenizer, config, template: None, vocabulary: 6, ends: [Some(0), None] }
    }

    #[test]
    fn scores_follow_the_ranks_of_merges() {
        let tokenizer = json!({
            "model": {"type": "BPE", "byte_fallback": true, "unk_token": "<unk>", "vocab": {"<unk>": 0, "<0x41>": 1, "a": 2, "b": 3, "ab": 4}, "merges": ["a b"]},
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<unk>"}}, {"Sequence": {"id": "A"}}]},
        });
        let found = keys(&described(&tokenizer, &json!({"eos_token": "ab"}))).unwrap();
        assert_eq!(found["tokenizer.ggml.model"], Value::Text("llama".into()));
        assert_eq!(found["tokenizer.ggml.scores"], Value::F32s(vec![UNREACHED, UNREACHED, 0.0, 0.0, -1.0, UNREACHED]));
        assert_eq!(found["tokenizer.ggml.token_type"], Value::I32s(vec![2, 6, 1, 1, 1, 5]));
        assert_eq!(found["tokenizer.ggml.eos_token_id"], Value::U32(4));
        assert_eq!(
            (&found["tokenizer.ggml.add_bos_token"], &found["tokenizer.ggml.add_eos_token"]),
            (&Value::Bool(true), &Value::Bool(false))
        );
        assert_eq!(found["tokenizer.ggml.add_space_prefix"], Value::Bool(true));
    }

    #[test]
    fn byte_level_pre_tokenizers_have_names_or_are_refused() {
        let tokenizer = |pre: Json| json!({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": pre});
        let name = |pre: Json| keys(&described(&tokenizer(pre), &Json::Null)).map(|keys| keys["tokenizer.ggml.pre"].clone());
        assert_eq!(name(json!({"type": "ByteLevel", "use_regex": true})).unwrap(), Value::Text("gpt-2".into()));
        let split = |pattern: &str| json!({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel", "use_regex": false}]});
        assert_eq!(name(split(PATTERNS[1].0)).unwrap(), Value::Text("qwen2".into()));
        assert!(name(split("x+")).unwrap_err().to_string().contains("x+"));
        assert!(name(json!({"type": "Whitespace"})).is_err());
    }
}
