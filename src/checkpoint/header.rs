//! The header of one safetensors file: an own scanner with hard limits that refuses duplicates, holes, overlaps
//! and sizes that do not fit the file, all in checked arithmetic. It runs before the safetensors crate sees a byte.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::as_conversions
    )
)]

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use safetensors::Dtype;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};

/// Longest header that is read at all, in bytes (the format's own limit).
const HEADER_BYTES: u64 = 100_000_000;
/// Longest header that is not padding, in bytes; checkpoints with 100,000 tensors stay far below.
const TEXT_BYTES: usize = 16 << 20;
/// Most tensors of a file, and of an index.
pub const TENSORS: usize = 1_000_000;
/// Most entries of `__metadata__`.
const METADATA: usize = 10_000;
const NAME_BYTES: usize = 1024;
const RANK: usize = 8;

/// A length in memory as a length in a file.
pub fn wide(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// One tensor of a file: its type, its shape and where its bytes lie behind the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Number format.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// First byte, counted from the end of the header.
    pub begin: u64,
    /// One past the last byte.
    pub end: u64,
}

impl TensorInfo {
    /// Bytes of the tensor.
    pub fn bytes(&self) -> u64 {
        self.end.saturating_sub(self.begin)
    }

    /// Number of entries.
    pub fn entries(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A scanned header.
#[derive(Debug, Default)]
pub struct Header {
    /// Tensors by name.
    pub tensors: BTreeMap<String, TensorInfo>,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// Bytes before the first tensor: 8 and the header's length.
    pub data_start: u64,
    /// blake3 of its text.
    pub blake3: String,
}

/// Checks the length word of a file of `file_bytes` bytes and gives the number of header bytes behind it.
///
/// # Errors
/// What is wrong, with both numbers.
pub fn length(first: &[u8], file_bytes: u64) -> Result<u64, String> {
    let Some(word) = first.first_chunk::<8>() else {
        return Err(format!("the file has {file_bytes} bytes, a safetensors file at least 10; download it again"));
    };
    let length = u64::from_le_bytes(*word);
    let rest = file_bytes.saturating_sub(8);
    let plausible = (2..=rest).contains(&length) && first.get(8).is_none_or(|byte| b"{ \t\r\n".contains(byte));
    if let Some(hint) = foreign(first).filter(|_| !plausible) {
        return Err(hint.into());
    }
    if length < 2 || length > rest {
        return Err(format!("the header is said to have {length} bytes, the file has {rest} behind the length; download it again"));
    }
    if length > HEADER_BYTES {
        return Err(format!("the header has {length} bytes, the limit is {HEADER_BYTES}"));
    }
    Ok(length)
}

/// Recognises what is often found under the name of a safetensors file.
fn foreign(first: &[u8]) -> Option<&'static str> {
    let text = first.to_ascii_lowercase();
    let starts = |magic: &[u8]| text.starts_with(magic);
    if starts(b"pk\x03\x04") || matches!(first, [0x80, 2..=5, ..]) {
        return Some("this is a PyTorch pickle, not safetensors; convert it with save_pretrained(safe_serialization=True)");
    }
    if starts(b"gguf") {
        return Some("this is a GGUF file, not safetensors; give the original Hugging Face folder");
    }
    if starts(b"version ") {
        return Some("this is a git-lfs pointer, not the file; run `git lfs pull`");
    }
    if starts(b"<!doctyp") || starts(b"<html") {
        return Some("this is a web page, not a safetensors file; download it again");
    }
    None
}

/// Parses the header text of a file whose tensors occupy `data_bytes` bytes behind it.
///
/// # Errors
/// What is wrong, naming the tensor where there is one.
pub fn parse(text: &[u8], data_bytes: u64) -> Result<Header, String> {
    let trimmed = text.trim_ascii();
    if trimmed.len() > TEXT_BYTES {
        return Err(format!("the header has {} bytes of text, the limit is {TEXT_BYTES}", trimmed.len()));
    }
    let mut reader = serde_json::Deserializer::from_slice(trimmed);
    let header = HeaderSeed.deserialize(&mut reader).map_err(|error| format!("header: {error}"))?;
    reader.end().map_err(|error| format!("header: {error}"))?;
    contiguous(&header, data_bytes)?;
    safetensors::SafeTensors::read_metadata(&[&wide(text.len()).to_le_bytes(), text].concat()).map(drop).or_else(|error| match error {
        // The crate checks the data behind the header too, which is not in this buffer; that check is ours above.
        safetensors::SafeTensorError::MetadataIncompleteBuffer => Ok(()),
        other => Err(format!("header: {other}")),
    })?;
    Ok(Header { data_start: wide(text.len()).saturating_add(8), blake3: blake3::hash(text).to_hex().to_string(), ..header })
}

/// Tensors must tile the data exactly: from 0, without hole or overlap, to its end.
fn contiguous(header: &Header, data_bytes: u64) -> Result<(), String> {
    let mut order: Vec<(&String, &TensorInfo)> = header.tensors.iter().collect();
    order.sort_by_key(|(_, info)| (info.begin, info.end));
    let mut expected = 0;
    for (name, info) in order {
        let name = crate::error::shown(name);
        if info.end < info.begin {
            return Err(format!("tensor {name}: data_offsets end at {} before they begin at {}", info.end, info.begin));
        }
        if info.begin != expected {
            let what = if info.begin < expected { "overlaps the tensor before it" } else { "leaves a hole" };
            return Err(format!("tensor {name}: data begin at {} but the tensor before ends at {expected}: it {what}", info.begin));
        }
        if info.end > data_bytes {
            return Err(format!(
                "tensor {name}: its data end at byte {} but the file holds {data_bytes} bytes of data; it is truncated, download it again",
                info.end
            ));
        }
        expected = info.end;
    }
    if expected != data_bytes {
        return Err(format!("the tensors end at byte {expected} but the file holds {data_bytes} bytes of data; download it again"));
    }
    Ok(())
}

struct HeaderSeed;

impl<'de> DeserializeSeed<'de> for HeaderSeed {
    type Value = Header;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Header, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a JSON object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header::default();
        let mut seen_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if std::mem::replace(&mut seen_metadata, true) {
                    return Err(A::Error::custom("__metadata__ occurs twice"));
                }
                header.metadata = map.next_value_seed(UniqueStrings(METADATA))?;
                continue;
            }
            if name.len() > NAME_BYTES {
                return Err(A::Error::custom(format!("a tensor name has {} bytes, the limit is {NAME_BYTES}", name.len())));
            }
            if header.tensors.len() >= TENSORS {
                return Err(A::Error::custom(format!("more than {TENSORS} tensors")));
            }
            let wrong = |what: String| A::Error::custom(format!("tensor {}: {what}", crate::error::shown(&name)));
            let raw: RawInfo = map.next_value().map_err(|error| wrong(error.to_string()))?;
            let info = checked(raw).map_err(wrong)?;
            if let Some(previous) = header.tensors.insert(name.clone(), info) {
                let begin = previous.begin;
                return Err(A::Error::custom(format!("tensor {} occurs twice (first at byte {begin})", crate::error::shown(&name))));
            }
        }
        Ok(header)
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object of dtype, shape and data_offsets")]
struct RawInfo {
    dtype: Dtype,
    #[serde(deserialize_with = "short_shape")]
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// Reads a shape without ever holding more sizes than a tensor may have.
fn short_shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct Short;
    impl<'de> Visitor<'de> for Short {
        type Value = Vec<u64>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {RANK} sizes")
        }
        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
            let mut shape = Vec::new();
            while let Some(size) = seq.next_element()? {
                if shape.len() == RANK {
                    return Err(A::Error::custom(format!("more than {RANK} dimensions")));
                }
                shape.push(size);
            }
            Ok(shape)
        }
    }
    deserializer.deserialize_seq(Short)
}

fn checked(raw: RawInfo) -> Result<TensorInfo, String> {
    let [begin, end] = raw.data_offsets;
    let bits = raw.shape.iter().try_fold(wide(raw.dtype.bitsize()), |total, &size| total.checked_mul(size));
    let needed = bits.ok_or_else(|| format!("the shape {:?} overflows", raw.shape))?.div_ceil(8);
    let found = end.checked_sub(begin).ok_or_else(|| format!("data_offsets end at {end} before they begin at {begin}"))?;
    if needed != found {
        return Err(format!("{:?} of shape {:?} needs {needed} bytes, data_offsets span {found}", raw.dtype, raw.shape));
    }
    let shape = raw.shape.iter().map(|&size| usize::try_from(size)).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    Ok(TensorInfo { dtype: raw.dtype, shape, begin, end })
}

/// A map of at most so many strings that refuses a key that occurs twice.
#[derive(Debug)]
pub struct UniqueStrings(pub usize);

impl<'de> DeserializeSeed<'de> for UniqueStrings {
    type Value = BTreeMap<String, String>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for UniqueStrings {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a JSON object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut out = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            if out.len() >= self.0 {
                return Err(A::Error::custom(format!("more than {} entries", self.0)));
            }
            match out.entry(key) {
                Entry::Vacant(place) => drop(place.insert(map.next_value()?)),
                Entry::Occupied(twice) => return Err(A::Error::custom(format!("{} occurs twice", crate::error::shown(twice.key())))),
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(text: &str, data: u64) -> Result<Header, String> {
        parse(text.as_bytes(), data)
    }

    #[test]
    fn a_sound_header_gives_its_tensors_and_metadata() {
        let header = parse_text(
            r#" {"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}  "#,
            16,
        )
        .unwrap();
        assert_eq!(header.metadata["format"], "pt");
        assert_eq!(header.tensors["b"].shape, [2, 3]);
        assert_eq!((header.tensors["b"].begin, header.tensors["b"].bytes()), (4, 12));
    }

    #[test]
    fn every_way_to_be_corrupt_is_refused_with_its_reason() {
        let one =
            |dtype: &str, shape: &str, offsets: &str| format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
        let cases = [
            (one("F32", "[2]", "[0,4]"), 4, "needs 8 bytes, data_offsets span 4"),
            (one("F32", "[1]", "[4,8]"), 8, "leaves a hole"),
            (one("F32", "[1]", "[0,4]"), 5, "holds 5 bytes"),
            (one("F32", "[2]", "[0,8]"), 4, "truncated"),
            (one("F32", "[1]", "[4,0]"), 4, "before they begin"),
            (one("F32", "[4294967296,4294967296,4]", "[0,0]"), 0, "overflows"),
            (one("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "more than 8 dimensions"),
            (one("F32", "[-1]", "[0,4]"), 4, "invalid value"),
            (one("F32", "[1.5]", "[0,4]"), 4, "invalid type"),
            (one("X9", "[1]", "[0,4]"), 4, "unknown variant"),
            (r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"extra":1}}"#.into(), 4, "unknown field"),
            (
                r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"t":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#.into(),
                8,
                "occurs twice",
            ),
            (
                r#"{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"u":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#.into(),
                12,
                "overlaps",
            ),
            (r#"{"__metadata__":{"a":"1","a":"2"}}"#.into(), 0, "occurs twice"),
            (r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0, "occurs twice"),
            ("[1]".into(), 0, "invalid type"),
            ("{} x".into(), 0, "trailing"),
        ];
        for (text, data, reason) in cases {
            let error = parse_text(&text, data).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
        let long = format!(r#"{{"{}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#, "n".repeat(2000));
        assert!(parse_text(&long, 4).unwrap_err().contains("limit is 1024"));
        assert!(parse_text(&"[".repeat(10_000), 0).is_err());
    }

    #[test]
    fn nine_tensors_whose_ends_add_up_to_two_to_the_64_are_refused_without_a_panic() {
        let step = u64::MAX / 8;
        let tensors: Vec<String> = (0..9u64)
            .map(|i| {
                let (begin, end) = (i * step, if i == 8 { u64::MAX } else { (i + 1) * step });
                format!(r#""t{i}":{{"dtype":"U8","shape":[{}],"data_offsets":[{begin},{end}]}}"#, end - begin)
            })
            .collect();
        assert!(parse_text(&format!("{{{}}}", tensors.join(",")), 16).is_err());
    }

    #[test]
    fn the_length_word_is_checked_before_anything_is_allocated() {
        for (word, file) in [(0u64, 100), (1, 100), (93, 100), (u64::MAX, 100), (1 << 63, 1 << 40), (200_000_000, 1 << 40)] {
            assert!(length(&word.to_le_bytes(), file).is_err(), "{word}");
        }
        assert_eq!(length(&92u64.to_le_bytes(), 100), Ok(92));
        assert_eq!(length(b"\x80\x02\0\0\0\0\0\0{\"a", 1000), Ok(640), "a length that looks like the start of a pickle");
        assert!(length(b"abc", 3).unwrap_err().contains("3 bytes"));
        assert!(length(b"version https://git-lfs", 130).unwrap_err().contains("git lfs pull"));
        assert!(length(b"PK\x03\x04aaaaaa", 130).unwrap_err().contains("pickle"));
        assert!(length(b"GGUFaaaaaa", 130).unwrap_err().contains("GGUF"));
        assert!(length(b"<!DOCTYPE html>", 130).unwrap_err().contains("web page"));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_scanner_panic(text in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300), data in 0u64..1000) {
            let _ = parse(&text, data);
            let _ = length(&text, data);
        }
    }
}
