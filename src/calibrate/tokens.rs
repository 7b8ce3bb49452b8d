//! Text to token numbers, through the model's own tokenizer.json.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde_json::Value;

use crate::calibrate::builtin;
use crate::calibrate::chat::Renderer;
use crate::checkpoint::{read_file, read_json};
use crate::error::{Error, Result, shown};

/// Largest tokenizer.json that is read, in bytes.
const TOKENIZER_BYTES: u64 = 256 << 20;

/// Numbers of tokens are below this, as vocabularies are (2²⁴).
const MOST_TOKENS: u64 = 1 << 24;

/// Text that is encoded at once, in bytes.
const PIECE: usize = 4 << 20;
/// A text of so many bytes or fewer may be special tokens and nothing else.
const SHORT: usize = 64;
/// Bytes that one token hardly ever exceeds on average.
const BYTES_PER_TOKEN: usize = 16;

/// Where to cut a text so that the first part holds about `bytes` bytes: behind the end of a line, where no token reaches
/// across; without lines, behind a character.
fn line_end(text: &str, bytes: usize) -> usize {
    if text.len() <= bytes {
        return text.len();
    }
    let end = (bytes..=text.len()).find(|&end| text.is_char_boundary(end)).unwrap_or(text.len());
    let line = text[..end].char_indices().rev().find(|&(at, c)| c == '\n' && !text[at + 1..].starts_with(['\n', '\r', ' ', '\t']));
    line.map_or(end, |(at, _)| at + 1)
}

/// Looks at the bytes of a tokenizer.json before the library does: an object with a model, and added tokens with
/// numbers that a model may have.
///
/// # Errors
/// What is wrong.
pub fn precheck(bytes: &[u8]) -> Result<(), String> {
    let value: Outline = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let added = value.added_tokens.unwrap_or_default();
    if let Some(token) = added.iter().find(|token| token.id >= MOST_TOKENS) {
        return Err(format!("the added token {} has number {}, the limit is {MOST_TOKENS}", shown(&token.content), token.id));
    }
    match value.normalizer.as_ref().map_or(1, growth) {
        times if times > MOST_GROWTH => Err(format!("its normalizer makes a text up to {times} times as long, the limit is {MOST_GROWTH}")),
        _ => Ok(()),
    }
}

/// How much longer a normalizer may make a text.
const MOST_GROWTH: usize = 256;

/// How many times as long a normalizer makes a text at most.
fn growth(normalizer: &Value) -> usize {
    let length = |value: &Value| value.as_str().map_or(0, str::len);
    match normalizer["type"].as_str() {
        Some("Sequence") => normalizer["normalizers"].as_array().into_iter().flatten().fold(1, |all, one| growth(one).saturating_mul(all)),
        // An expression may match nothing and put its content between any two characters.
        Some("Replace") => match &normalizer["pattern"]["String"] {
            Value::Null => length(&normalizer["content"]).saturating_add(1),
            pattern => length(&normalizer["content"]).div_ceil(length(pattern).max(1)).max(1),
        },
        Some("Prepend") => length(&normalizer["prepend"]).div_ceil(64).max(1),
        _ => 1,
    }
}

/// What of a tokenizer.json is looked at.
#[derive(serde::Deserialize)]
struct Outline {
    #[serde(rename = "model")]
    _model: IgnoredAny,
    added_tokens: Option<Vec<Added>>,
    normalizer: Option<Value>,
}

#[derive(serde::Deserialize)]
struct Added {
    id: u64,
    #[serde(default)]
    content: String,
}

/// A model's tokenizer.
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    /// Numbers of the special tokens.
    special: HashSet<u32>,
    config: Value,
    template: Option<Renderer>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer of {}", self.path.display())
    }
}

impl Tokenizer {
    /// Opens the tokenizer of a model folder.
    ///
    /// # Errors
    /// When tokenizer.json is missing or malformed.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.exists() {
            return Err(Error::input("missing; text needs the model's tokenizer. Give windows of `input_ids` in a .jsonl instead, or copy tokenizer.json into the folder").file(&path));
        }
        let bytes = read_file(&path, TOKENIZER_BYTES)?;
        precheck(&bytes).map_err(|what| Error::input(format!("not a tokenizer: {what}")).file(&path))?;
        let parsed = catch_unwind(|| tokenizers::Tokenizer::from_bytes(&bytes));
        let mut inner = match parsed {
            Ok(Ok(inner)) => inner,
            Ok(Err(error)) => return Err(Error::input(format!("not a tokenizer: {error}")).file(&path)),
            Err(_) => return Err(Error::input("not a tokenizer: it makes the tokenizer library fail").file(&path)),
        };
        inner.with_truncation(None).map_err(|error| Error::input(error.to_string()).file(&path))?;
        inner.with_padding(None);
        let config_path = folder.join("tokenizer_config.json");
        let config = if config_path.exists() { read_json(&config_path)? } else { Value::Null };
        let template_path = folder.join("chat_template.jinja");
        let template = if template_path.exists() {
            let text = String::from_utf8(read_file(&template_path, 1 << 20)?);
            Some((text.map_err(|_| Error::input("not UTF-8").file(&template_path))?, template_path))
        } else {
            let found = template(&config["chat_template"]).map_err(|what| Error::input(what).file(&config_path))?;
            found.map(|text| (text, config_path))
        };
        let tokens = ["bos_token", "eos_token"].map(|key| named_text(&config, key).unwrap_or_default());
        let template = template.map(|(text, path)| Renderer::new(text, tokens, path)).transpose()?;
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(&number, _)| number).collect();
        Ok(Self { path, inner, special, config, template })
    }

    /// Token numbers of a text, with the tokenizer's own special tokens around it when `special`; at most `limit` of
    /// them where there is one. The library needs a hundred bytes of memory per byte of text, so no more is fed to it
    /// than is needed, and never more than 4 MiB at once, cut at the end of a line.
    ///
    /// # Errors
    /// When the tokenizer fails on the text.
    pub fn encode(&self, text: &str, special: bool, limit: Option<usize>) -> Result<Vec<u32>> {
        let piece = limit.map_or(PIECE, |limit| limit.saturating_mul(BYTES_PER_TOKEN).clamp(1 << 16, PIECE));
        let mut tokens = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let end = line_end(rest, piece);
            tokens.extend(self.encode_piece(&rest[..end], special && tokens.is_empty())?);
            rest = &rest[end..];
            if let Some(limit) = limit.filter(|&limit| tokens.len() >= limit) {
                tokens.truncate(limit);
                break;
            }
        }
        if special
            && limit.is_none()
            && text.trim().len() > SHORT
            && !tokens.is_empty()
            && tokens.iter().all(|token| self.special.contains(token))
        {
            let what = format!("knows nothing of a text of {} bytes: it makes special tokens of it and no others", text.len());
            return Err(Error::input(what).file(&self.path));
        }
        Ok(tokens)
    }

    fn encode_piece(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        match catch_unwind(AssertUnwindSafe(|| self.inner.encode_fast(text, special))) {
            Ok(Ok(encoding)) => Ok(encoding.get_ids().to_vec()),
            Ok(Err(error)) => Err(Error::input(format!("cannot encode the text: {error}")).file(&self.path)),
            Err(_) => Err(Error::input("cannot encode the text: the tokenizer makes its library fail").file(&self.path)),
        }
    }

    /// Tries the tokenizer on a text of many kinds, whose tokens must be rows of the embedding.
    ///
    /// # Errors
    /// When the library fails on it, or a token is no row.
    pub fn probe(&self, rows: usize) -> Result<()> {
        let mut text: String = builtin::EVALUATION.iter().map(|(_, text)| text.chars().take(4000).collect::<String>()).collect();
        // What expressions that go back and forth stumble over.
        text.extend([&"a".repeat(64), "! ", &"1 ".repeat(32), "\u{1}\n"]);
        self.fits(&self.encode(&text, true, None)?, rows)
    }

    /// Refuses tokens beyond the rows of the embedding.
    ///
    /// # Errors
    /// Naming the token and the number of rows.
    pub fn fits<'t>(&self, tokens: impl IntoIterator<Item = &'t u32>, rows: usize) -> Result<()> {
        within(tokens, rows).map_err(|what| Error::input(format!("{what}; it belongs to another model")).file(&self.path))
    }

    /// The text of some tokens; what cannot be decoded is a replacement character.
    pub fn decode(&self, tokens: &[u32]) -> String {
        match catch_unwind(AssertUnwindSafe(|| self.inner.decode(tokens, false))) {
            Ok(Ok(text)) => text,
            _ => char::REPLACEMENT_CHARACTER.into(),
        }
    }

    /// The number of the token that tokenizer_config.json names under `key`, such as `bos_token`.
    pub fn named_token(&self, key: &str) -> Option<u32> {
        self.inner.token_to_id(&named_text(&self.config, key)?)
    }

    /// The token that begins a text: what tokenizer_config.json says, also when it says none; without that file,
    /// `fallback`.
    pub fn bos(&self, fallback: Option<u32>) -> Option<u32> {
        if self.config.is_null() { fallback } else { self.named_token("bos_token") }
    }

    /// Every token below `limit` that the tokenizer's own vocabulary holds and nobody added to it, with the text that it
    /// stands for, in order. Pieces that stand for one byte, written `<0x0A>`, are left out.
    ///
    /// # Errors
    /// When the tokenizer library fails.
    pub fn pieces(&self, limit: usize) -> Result<Vec<(u32, String)>> {
        let added = self.inner.get_added_tokens_decoder();
        let byte = |piece: &str| piece.len() == 6 && piece.starts_with("<0x") && piece.ends_with('>');
        let vocabulary = self.inner.get_vocab(false).into_iter();
        let mut tokens: Vec<u32> = vocabulary
            .filter(|(piece, token)| (*token as usize) < limit && !added.contains_key(token) && !byte(piece))
            .map(|(_, token)| token)
            .collect();
        tokens.sort_unstable();
        let text = |token: u32| match catch_unwind(AssertUnwindSafe(|| self.inner.decode(&[token], false))) {
            Ok(Ok(text)) => Ok((token, text)),
            Ok(Err(error)) => Err(Error::input(format!("cannot decode token {token}: {error}")).file(&self.path)),
            Err(_) => Err(Error::input(format!("cannot decode token {token}: the library fails")).file(&self.path)),
        };
        tokens.into_iter().map(text).collect()
    }

    /// The model's chat template, where it has one.
    pub fn template(&self) -> Option<&str> {
        self.template.as_ref().map(Renderer::text)
    }

    /// Messages as the model's chat template writes them; `None` when it has none.
    ///
    /// # Errors
    /// When the template fails.
    pub fn render(&self, messages: &Value) -> Result<Option<String>> {
        self.template.as_ref().map(|template| template.render(messages)).transpose()
    }
}

/// Whether all tokens are among the rows of an embedding.
///
/// # Errors
/// The highest token, where it is not.
pub fn within<'t>(tokens: impl IntoIterator<Item = &'t u32>, rows: usize) -> Result<(), String> {
    match tokens.into_iter().max() {
        Some(&highest) if highest as usize >= rows => Err(format!("token {highest} is beyond the {rows} rows of the embedding")),
        _ => Ok(()),
    }
}

/// The text of the token that a tokenizer_config.json names under `key`.
fn named_text(config: &Value, key: &str) -> Option<String> {
    let value = &config[key];
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_string)
}

/// The template in tokenizer_config.json: a string, or a list of named ones of which the default counts.
fn template(value: &Value) -> Result<Option<String>, String> {
    let text = match value {
        Value::Null => return Ok(None),
        Value::Array(list) => match list.iter().find(|entry| entry["name"] == "default") {
            Some(entry) => &entry["template"],
            None => return Ok(None),
        },
        other => other,
    };
    let wrong = || format!("chat_template is {}, it must be a text or a list of named ones", shown(&value.to_string()));
    text.as_str().map(|text| Some(text.to_string())).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_normalizer_that_makes_texts_much_longer_is_refused() {
        let check = |normalizer: &str| precheck(format!(r#"{{"model":{{}},"normalizer":{normalizer}}}"#).as_bytes());
        let replace = |content: &str| format!(r#"{{"type":"Replace","pattern":{{"String":" "}},"content":"{content}"}}"#);
        let twice = |one: &str| format!(r#"{{"type":"Sequence","normalizers":[{one},{one}]}}"#);
        assert_eq!((check(&replace("▁")), check("null"), check(r#"{"type":"NFC"}"#)), (Ok(()), Ok(()), Ok(())));
        assert_eq!(check(&twice(&replace(&"a".repeat(16)))), Ok(()));
        assert!(check(&twice(&replace(&"a".repeat(17)))).unwrap_err().contains("289 times"));
        assert!(check(&format!(r#"{{"type":"Prepend","prepend":"{}"}}"#, "a".repeat(1 << 20))).unwrap_err().contains("16384 times"));
        assert!(check(&format!(r#"{{"type":"Replace","pattern":{{"Regex":"a*"}},"content":"{}"}}"#, "a".repeat(256))).is_err());
    }

    #[test]
    fn texts_are_cut_behind_lines_and_characters() {
        assert_eq!(line_end("ab\ncd\nef", 7), 6);
        assert_eq!(line_end("ab\n\ncd", 4), 4, "not between two line ends");
        assert_eq!(line_end("ab\n\ncd", 3), 3 + 1 - 1, "nowhere better");
        assert_eq!(line_end("äöü", 3), 4);
        assert_eq!(line_end("ab", 3), 2);
    }
}
