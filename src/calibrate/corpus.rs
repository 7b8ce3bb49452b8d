//! Calibration data: documents from the built-in text or from files, packed into windows of tokens. Nothing is
//! dropped silently; the counts go into the report.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::calibrate::builtin;
use crate::calibrate::chat::plain_chat;
use crate::calibrate::tokens::{Tokenizer, within};
use crate::checkpoint::read_file;
use crate::error::{Error, Result};

/// Largest text file that is read, in bytes.
pub const TEXT_BYTES: u64 = 4 << 30;
/// What counts call text that the model itself wrote.
const SELF: &str = "self-generated";
/// Fewest tokens that make a window.
const SHORTEST: usize = 8;

/// Where documents come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The built-in text.
    Builtin,
    /// Text that the model itself writes.
    Own,
    /// A .txt or .jsonl file.
    File(PathBuf),
}

impl std::str::FromStr for Source {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "builtin" | "builtin:mix" | builtin::VERSION => Ok(Self::Builtin),
            "self" => Ok(Self::Own),
            _ if text.starts_with("builtin") => Err(format!("unknown built-in text `{text}`; this version carries {}", builtin::VERSION)),
            _ if text.ends_with(".txt") || text.ends_with(".jsonl") => Ok(Self::File(text.into())),
            _ => Err(format!("`{text}` is neither `builtin:mix` nor `self` nor a .txt or .jsonl file")),
        }
    }
}

/// One document.
enum Document {
    Text(String),
    Chat(Value),
    Tokens(Vec<u32>),
}

impl Document {
    fn blake3(&self) -> blake3::Hash {
        match self {
            Self::Text(text) => blake3::hash(text.as_bytes()),
            Self::Chat(messages) => blake3::hash(messages.to_string().as_bytes()),
            Self::Tokens(tokens) => blake3::hash(&tokens.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<u8>>()),
        }
    }
}

/// What to make of the documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Where they come from.
    pub sources: Vec<Source>,
    /// Windows at most.
    pub samples: usize,
    /// Tokens per window.
    pub seq: usize,
    /// Seed of the choice of windows when there are more than `samples`.
    pub seed: u64,
}

/// What became of the documents.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct Counts {
    /// Sources, as the recipe names them.
    pub sources: Vec<String>,
    /// blake3 over the text, or over the tokens that the model itself wrote; empty until it wrote them.
    pub blake3: String,
    /// Documents read.
    pub documents: usize,
    /// Of them chats, rendered by the model's template.
    pub chats_by_template: usize,
    /// Of them chats, written as plain lines because the model has no template.
    pub chats_as_plain_text: usize,
    /// Of them windows given as token numbers and taken as they are.
    pub token_windows: usize,
    /// Documents that hold no token.
    pub empty: usize,
    /// Documents that are equal to an earlier one.
    pub duplicates: usize,
    /// The token between documents: that of config.json, else that of the tokenizer, else none.
    pub end_of_text: Option<u32>,
    /// Tokens of all documents, end-of-text between documents included.
    pub tokens: usize,
    /// Windows used.
    pub windows: usize,
    /// Windows shorter than asked for.
    pub short_windows: usize,
    /// Tokens in the windows used.
    pub tokens_used: usize,
    /// Tokens that were not needed for the number of windows asked for.
    pub tokens_unused: usize,
}

/// Windows of tokens with their history.
#[derive(Debug, Clone)]
pub struct Packed {
    /// Token numbers, one list per window.
    pub windows: Vec<Vec<u32>>,
    /// What became of the documents.
    pub counts: Counts,
}

/// Reads, tokenizes and packs. Documents are joined with the end-of-text token between them and cut into windows of
/// `seq` tokens; the rest makes a shorter window. Windows given as token numbers stay as they are.
///
/// # Errors
/// When a file is unreadable, not UTF-8, not what its name says, or too short; or when a token is beyond `vocabulary`.
pub fn pack(options: &Options, tokenizer: impl Fn() -> Result<Tokenizer>, eos: Option<u32>, vocabulary: usize) -> Result<Packed> {
    let mut counts = Counts::default();
    let mut hasher = blake3::Hasher::new();
    let mut documents = Vec::new();
    for source in &options.sources {
        counts.sources.push(match source {
            Source::Builtin => builtin::VERSION.to_string(),
            Source::Own => SELF.to_string(),
            Source::File(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        });
        documents.extend(read(source, &mut hasher, vocabulary)?);
    }
    counts.blake3 = hasher.finalize().to_hex().to_string();
    counts.documents = documents.len();
    let mut windows = Vec::new();
    let mut stream = Vec::new();
    let needs_text = documents.iter().any(|document| !matches!(document, Document::Tokens(_)));
    let tokenizer = if needs_text { Some(tokenizer()?) } else { None };
    let eos = eos.or_else(|| tokenizer.as_ref()?.named_token("eos_token"));
    counts.end_of_text = eos;
    let mut known = std::collections::HashSet::new();
    for document in documents {
        counts.duplicates += usize::from(!known.insert(document.blake3()));
        let tokens = match (document, &tokenizer) {
            (Document::Tokens(tokens), _) => {
                counts.token_windows += 1;
                counts.tokens += tokens.len();
                windows.push(tokens);
                continue;
            }
            (Document::Text(text), Some(tokenizer)) => tokenizer.encode(&text, true, None)?,
            (Document::Chat(messages), Some(tokenizer)) => match tokenizer.render(&messages)? {
                Some(text) => {
                    counts.chats_by_template += 1;
                    tokenizer.encode(&text, false, None)?
                }
                None => {
                    counts.chats_as_plain_text += 1;
                    tokenizer.encode(&plain_chat(&messages), true, None)?
                }
            },
            (_, None) => Vec::new(),
        };
        if tokens.is_empty() {
            counts.empty += 1;
            continue;
        }
        if let Some(eos) = eos.filter(|_| !stream.is_empty()) {
            stream.push(eos);
        }
        stream.extend(tokens);
    }
    counts.tokens += stream.len();
    windows.extend(stream.chunks(options.seq).filter(|window| window.len() >= SHORTEST.min(options.seq)).map(<[u32]>::to_vec));
    if let Some(tokenizer) = &tokenizer {
        tokenizer.fits(&stream, vocabulary)?;
    }
    let windows = choose(windows, options);
    if windows.is_empty() {
        return Err(Error::input(format!(
            "the calibration text ({}) gives {} tokens, at least {SHORTEST} are needed; give more text with --calibration",
            counts.sources.join(", "),
            counts.tokens
        )));
    }
    counts.windows = windows.len();
    counts.short_windows = windows.iter().filter(|window| window.len() < options.seq).count();
    counts.tokens_used = windows.iter().map(Vec::len).sum();
    counts.tokens_unused = counts.tokens - counts.tokens_used;
    Ok(Packed { windows, counts })
}

/// What will be there when the model has written its own windows, which are always of full length: every window is a
/// document.
pub fn own_counts(options: &Options) -> Counts {
    let tokens = options.samples.saturating_mul(options.seq);
    Counts {
        sources: vec![SELF.to_string()],
        documents: options.samples,
        tokens,
        windows: options.samples,
        tokens_used: tokens,
        ..Counts::default()
    }
}

/// blake3 over the tokens of windows, four bytes each, the lowest first.
pub fn hash_tokens(windows: &[Vec<u32>]) -> String {
    let mut hasher = blake3::Hasher::new();
    for token in windows.iter().flatten() {
        hasher.update(&token.to_le_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// At most `samples` windows: a choice by the seed, in their order. Windows given as token numbers come first.
fn choose(mut windows: Vec<Vec<u32>>, options: &Options) -> Vec<Vec<u32>> {
    let (count, samples) = (windows.len(), options.samples);
    if count <= samples {
        return windows;
    }
    let ranks = (0..count as u64).map(|index| blake3::hash(&[options.seed.to_le_bytes(), index.to_le_bytes()].concat()));
    let mut order: Vec<(bool, [u8; 32], usize)> =
        ranks.enumerate().map(|(index, rank)| (windows[index].len() < options.seq, *rank.as_bytes(), index)).collect();
    order.sort_unstable();
    let mut chosen: Vec<usize> = order[..samples].iter().map(|&(_, _, index)| index).collect();
    chosen.sort_unstable();
    chosen.into_iter().map(|index| std::mem::take(&mut windows[index])).collect()
}

fn read(source: &Source, hasher: &mut blake3::Hasher, vocabulary: usize) -> Result<Vec<Document>> {
    match source {
        Source::Own => Err(Error::input("the model's own text is not a file; it stands alone")),
        Source::Builtin => {
            hasher.update(builtin::hash(builtin::CALIBRATION).as_bytes());
            let mut documents = Vec::new();
            for (name, text) in builtin::CALIBRATION {
                if name.ends_with(".jsonl") {
                    documents.extend(lines(text, vocabulary).map_err(|error| error.file(Path::new(name)))?);
                } else {
                    documents.extend(builtin::documents(text).map(|text| Document::Text(text.to_string())));
                }
            }
            Ok(documents)
        }
        Source::File(path) => {
            let text = read_text(path)?;
            hasher.update(text.as_bytes());
            if path.extension().is_some_and(|extension| extension == "jsonl") {
                lines(&text, vocabulary).map_err(|error| error.file(path))
            } else {
                Ok(vec![Document::Text(text)])
            }
        }
    }
}

/// A UTF-8 text file that is not blank.
///
/// # Errors
/// When it is unreadable, blank, or not UTF-8 (naming the byte).
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = read_file(path, TEXT_BYTES)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::input(format!("not UTF-8 at byte {at}; convert it first")).file(path)
    })?;
    if text.trim().is_empty() {
        return Err(Error::input("holds no text").file(path));
    }
    Ok(text)
}

fn lines(text: &str, vocabulary: usize) -> Result<Vec<Document>> {
    let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    numbered.map(|(number, line)| document(line, vocabulary).map_err(|what| Error::input(format!("line {}: {what}", number + 1)))).collect()
}

fn document(line: &str, vocabulary: usize) -> Result<Document, String> {
    let value: Value = serde_json::from_str(line).map_err(|error| format!("not JSON: {error}"))?;
    if let Some(tokens) = value.get("input_ids") {
        let tokens = tokens.as_array().ok_or("`input_ids` is not a list")?;
        let one =
            |token: &Value| token.as_u64().and_then(|token| u32::try_from(token).ok()).ok_or_else(|| format!("`input_ids` holds {token}"));
        let tokens: Vec<u32> = tokens.iter().map(one).collect::<Result<_, _>>()?;
        within(&tokens, vocabulary)?;
        return if tokens.is_empty() { Err("`input_ids` is empty".into()) } else { Ok(Document::Tokens(tokens)) };
    }
    if let Some(messages) = value.get("messages") {
        let sound = messages.as_array().is_some_and(|list| !list.is_empty() && list.iter().all(|one| one["role"].is_string()));
        return if sound {
            Ok(Document::Chat(messages.clone()))
        } else {
            Err("`messages` is not a list of objects with `role` and `content`".into())
        };
    }
    match value.get("text").and_then(Value::as_str) {
        Some(text) => Ok(Document::Text(text.to_string())),
        None => Err("has none of the fields `text`, `messages`, `input_ids`".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(file: &Path, samples: usize, seq: usize) -> Options {
        Options { sources: vec![Source::File(file.into())], samples, seq, seed: 7 }
    }

    fn none() -> Result<Tokenizer> {
        Err(Error::input("no tokenizer"))
    }

    #[test]
    fn windows_given_as_tokens_are_taken_as_they_are_and_all_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.jsonl");
        std::fs::write(&path, "{\"input_ids\":[1,2,3]}\n\n{\"input_ids\":[4,5]}\n").unwrap();
        let packed = pack(&options(&path, 9, 3), none, None, 6).unwrap();
        assert_eq!(packed.windows, [vec![1, 2, 3], vec![4, 5]]);
        assert_eq!(
            (packed.counts.token_windows, packed.counts.tokens_used, packed.counts.tokens_unused, packed.counts.short_windows),
            (2, 5, 0, 1)
        );
        assert!(pack(&options(&path, 9, 3), none, None, 5).unwrap_err().to_string().contains("token 5 is beyond the 5 rows"));
        let one = pack(&options(&path, 1, 3), none, None, 6).unwrap();
        assert_eq!((one.windows.len(), one.counts.tokens_unused), (1, 2));
    }

    #[test]
    fn broken_lines_are_named_by_their_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.jsonl");
        for (line, reason) in [
            ("{", "not JSON"),
            ("{\"input_ids\":[-1]}", "holds -1"),
            ("{\"input_ids\":[]}", "empty"),
            ("{\"messages\":3}", "not a list"),
            ("{\"texts\":\"a\"}", "none of the fields"),
        ] {
            std::fs::write(&path, format!("{{\"input_ids\":[1]}}\n{line}\n")).unwrap();
            let error = pack(&options(&path, 9, 3), none, None, 9).unwrap_err().to_string();
            assert!(error.contains("line 2") && error.contains(reason), "{error}");
        }
        std::fs::write(&path, [0x61, 0xff]).unwrap();
        assert!(pack(&options(&path, 9, 3), none, None, 9).unwrap_err().to_string().contains("not UTF-8 at byte 1"));
    }
}
