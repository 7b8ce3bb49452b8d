//! Everything that reads bytes which somebody else wrote, as functions from bytes alone: for fuzzers, and for the test that
//! feeds them mutated seeds. None may panic, take a second or allocate what the bytes merely announce.

use serde_json::Value;

use crate::calibrate::tokens;
use crate::checkpoint::{header, index};
use crate::compress::journal;
use crate::formats::gguf::reader;
use crate::model::config::Config;
use crate::plan::recipe::Recipe;

/// A reader of bytes: whether it takes them.
pub type Reader = fn(&[u8]) -> bool;

/// All of them, by name.
pub const READERS: [(&str, Reader); 7] = [
    ("header", |bytes| header_of(bytes).is_ok()),
    ("index", |bytes| index::index(bytes).is_ok_and(|index| index.values().all(|name| index::plain_file_name(name).is_ok()))),
    ("config", |bytes| serde_json::from_slice::<Value>(bytes).is_ok_and(|value| Config::read(&value).is_ok())),
    ("tokenizer", |bytes| tokens::precheck(bytes).is_ok()),
    ("recipe", |bytes| std::str::from_utf8(bytes).is_ok_and(|text| Recipe::parse(text).is_ok())),
    ("journal", |bytes| journal::read(bytes).is_ok_and(|read| !read.records.is_empty())),
    ("gguf", |bytes| reader::parse(bytes).is_ok()),
];

/// The checked header of a whole safetensors file, as it is read at opening.
///
/// # Errors
/// What is wrong with it.
pub fn header_of(bytes: &[u8]) -> Result<header::Header, String> {
    let length = header::length(bytes.get(..64).unwrap_or(bytes), bytes.len() as u64)?;
    let end = usize::try_from(length).ok().and_then(|length| length.checked_add(8)).ok_or("a length beyond memory")?;
    let text = bytes.get(8..end).ok_or("cut off")?;
    header::parse(text, (bytes.len() - end) as u64)
}

/// One of them by its name.
///
/// # Panics
/// When there is none of the name.
pub fn reader(name: &str) -> Reader {
    READERS.into_iter().find(|(known, _)| *known == name).map(|(_, reader)| reader).expect("a reader of this name")
}
