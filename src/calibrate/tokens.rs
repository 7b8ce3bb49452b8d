//! Text to token numbers, through the model's own tokenizer.json, and chats to text, through its own template.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde_json::Value;

use crate::checkpoint::{read_file, read_json};
use crate::error::{Error, Result, shown};

/// Largest tokenizer.json that is read, in bytes.
const TOKENIZER_BYTES: u64 = 256 << 20;

/// Numbers of tokens are below this, as vocabularies are (2²⁴).
const MOST_TOKENS: u64 = 1 << 24;

/// Longest chat template, in bytes; those of models have up to thirty thousand.
const TEMPLATE_BYTES: usize = 128 << 10;
/// Steps that a template may take per document.
const FUEL: u64 = 2_000_000;
/// Stack for the deepest template of that length.
const STACK_BYTES: usize = 1 << 30;

/// Text that is encoded at once, in bytes.
const PIECE: usize = 4 << 20;
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
    Ok(())
}

/// What of a tokenizer.json is looked at.
#[derive(serde::Deserialize)]
struct Outline {
    #[serde(rename = "model")]
    _model: IgnoredAny,
    added_tokens: Option<Vec<Added>>,
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
    config: Value,
    template: Option<String>,
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
            Some(String::from_utf8_lossy(&read_file(&template_path, 1 << 20)?).into_owned())
        } else {
            template(&config["chat_template"])
        };
        if let Some(length) = template.as_ref().map(String::len).filter(|&length| length > TEMPLATE_BYTES) {
            return Err(Error::input(format!("chat template: {length} bytes, the limit is {TEMPLATE_BYTES}")).file(&path));
        }
        Ok(Self { path, inner, config, template })
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
        Ok(tokens)
    }

    fn encode_piece(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        match catch_unwind(AssertUnwindSafe(|| self.inner.encode_fast(text, special))) {
            Ok(Ok(encoding)) => Ok(encoding.get_ids().to_vec()),
            Ok(Err(error)) => Err(Error::input(format!("cannot encode the text: {error}")).file(&self.path)),
            Err(_) => Err(Error::input("cannot encode the text: the tokenizer makes its library fail").file(&self.path)),
        }
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
        self.inner.token_to_id(&self.named_text(key)?)
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

    fn named_text(&self, key: &str) -> Option<String> {
        let value = &self.config[key];
        value.as_str().or_else(|| value["content"].as_str()).map(str::to_string)
    }

    /// The model's chat template, where it has one.
    pub fn template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// Messages as the model's chat template writes them; `None` when it has none.
    ///
    /// # Errors
    /// When the template fails.
    pub fn render(&self, messages: &Value) -> Result<Option<String>> {
        let Some(template) = &self.template else { return Ok(None) };
        let mut environment = minijinja::Environment::new();
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
        });
        // A fixed date keeps the calibration of a model the same every day.
        environment.add_function("strftime_now", |_: String| "01 Jan 2025".to_string());
        let context = minijinja::context! {
            messages => minijinja::Value::from_serialize(messages),
            add_generation_prompt => false,
            bos_token => self.named_text("bos_token").unwrap_or_default(),
            eos_token => self.named_text("eos_token").unwrap_or_default(),
        };
        // The library goes down as deep as a template is nested, and a hostile one is nested deeply.
        let rendered = std::thread::scope(|scope| {
            let render = || environment.render_str(template, context);
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, render);
            thread.map(|thread| thread.join().map_err(|_| "it makes the template library fail".to_string()))
        });
        match rendered {
            Ok(Ok(Ok(text))) => Ok(Some(text)),
            Ok(Ok(Err(error))) => Err(Error::input(format!("chat template: {error}")).file(&self.path)),
            Ok(Err(what)) => Err(Error::input(format!("chat template: {what}")).file(&self.path)),
            Err(error) => Err(Error::run(format!("chat template: no thread for it: {error}")).file(&self.path)),
        }
    }
}

/// The template in tokenizer_config.json: a string, or a list of named ones of which the default counts.
fn template(value: &Value) -> Option<String> {
    let named = || value.as_array()?.iter().find(|entry| entry["name"] == "default")?["template"].as_str();
    value.as_str().or_else(named).map(str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_behind_lines_and_characters() {
        assert_eq!(line_end("ab\ncd\nef", 7), 6);
        assert_eq!(line_end("ab\n\ncd", 4), 4, "not between two line ends");
        assert_eq!(line_end("ab\n\ncd", 3), 3 + 1 - 1, "nowhere better");
        assert_eq!(line_end("äöü", 3), 4);
        assert_eq!(line_end("ab", 3), 2);
    }
}
