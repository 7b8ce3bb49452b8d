//! Reads the container. Everything in a file is untrusted: no number is believed before the file was seen to be long enough.

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

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::checkpoint::header::wide;
use crate::error::{Error, Result, shown};
use crate::formats::gguf::blocks::Kind;
use crate::formats::gguf::container::{Tensor, Value};

/// Most keys, and most tensors, of a file.
const MOST: u64 = 1 << 20;

/// An opened file.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: File,
    /// Its keys; those of types that nothing here asks for are left out.
    pub keys: BTreeMap<String, Value>,
    /// Its tensors with the places of their bytes.
    pub tensors: Vec<(Tensor, u64)>,
}

/// The beginning of a file, read forward.
struct Beginning<R> {
    input: R,
    at: u64,
    length: u64,
}

impl<R: Read> Beginning<R> {
    fn bytes(&mut self, count: u64) -> Result<Vec<u8>, String> {
        if count > self.length.saturating_sub(self.at) {
            return Err(format!("ends at byte {}, {count} more are announced at byte {}", self.length, self.at));
        }
        let mut bytes = vec![0; usize::try_from(count).map_err(|error| error.to_string())?];
        self.input.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        self.at = self.at.saturating_add(count);
        Ok(bytes)
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.bytes(wide(N))?.try_into().map_err(|_| "fewer bytes than were asked for".into())
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.number()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.number()?))
    }

    fn text(&mut self) -> Result<String, String> {
        let count = self.u64()?;
        Ok(String::from_utf8_lossy(&self.bytes(count)?).into_owned())
    }

    /// A value of a type; nothing for types that are only passed over.
    fn value(&mut self, kind: u32) -> Result<Option<Value>, String> {
        Ok(match kind {
            4 => Some(Value::U32(self.u32()?)),
            5 => Some(Value::U32(u32::try_from(i32::from_le_bytes(self.number()?)).unwrap_or(0))),
            6 => Some(Value::F32(f32::from_le_bytes(self.number()?))),
            7 => Some(Value::Bool(self.number::<1>()? != [0])),
            8 => Some(Value::Text(self.text()?)),
            10 => Some(Value::U32(u32::try_from(self.u64()?).unwrap_or(u32::MAX))),
            9 => {
                let (kind, count) = (self.u32()?, self.u64()?);
                return self.array(kind, count);
            }
            _ => {
                self.bytes(width(kind).ok_or_else(|| format!("a value of type {kind}, which version 3 does not have"))?)?;
                None
            }
        })
    }

    fn array(&mut self, kind: u32, count: u64) -> Result<Option<Value>, String> {
        match kind {
            8 => {
                // Every text has at least its length.
                if count > self.length / 8 {
                    return Err(format!("a list of {count} texts does not fit a file of {} bytes", self.length));
                }
                let texts: Result<Vec<String>, String> = (0..count).map(|_| self.text()).collect();
                Ok(Some(Value::Texts(texts?)))
            }
            kind => {
                let width = width(kind).ok_or_else(|| format!("a list of values of type {kind}, which is not read"))?;
                let bytes = self.bytes(width.checked_mul(count).ok_or("a list longer than any file")?)?;
                let (words, _) = bytes.as_chunks::<4>();
                Ok(match kind {
                    7 => Some(Value::I32s(bytes.iter().map(|&truth| i32::from(truth != 0)).collect())),
                    4 | 5 => Some(Value::I32s(words.iter().map(|word| i32::from_le_bytes(*word)).collect())),
                    6 => Some(Value::F32s(words.iter().map(|word| f32::from_le_bytes(*word)).collect())),
                    _ => None,
                })
            }
        }
    }
}

fn width(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

impl Reader {
    /// Opens a file and checks that all it announces is there.
    ///
    /// # Errors
    /// One line that says what is wrong with the file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::unreadable(path, &error))?;
        let length = file.metadata().map_err(|error| Error::unreadable(path, &error))?.len();
        let mut beginning = Beginning { input: BufReader::new(&file), at: 0, length };
        let read = read(&mut beginning).map_err(|what| Error::input(format!("not a sound GGUF file: {what}")).file(path));
        let (keys, tensors) = read?;
        Ok(Self { path: path.to_path_buf(), file, keys, tensors })
    }

    /// The bytes of a tensor.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn bytes(&self, tensor: &Tensor, start: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(tensor.bytes()).unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut bytes, start).map_err(|error| Error::unreadable(&self.path, &error).tensor(&tensor.name))?;
        Ok(bytes)
    }

    /// A whole number.
    pub fn count(&self, key: &str) -> Option<u32> {
        match self.keys.get(key) {
            Some(Value::U32(number)) => Some(*number),
            _ => None,
        }
    }

    /// A float.
    pub fn float(&self, key: &str) -> Option<f32> {
        match self.keys.get(key) {
            Some(Value::F32(number)) => Some(*number),
            _ => None,
        }
    }

    /// A text.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.keys.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// A truth value.
    pub fn truth(&self, key: &str) -> Option<bool> {
        match self.keys.get(key) {
            Some(Value::Bool(truth)) => Some(*truth),
            _ => None,
        }
    }

    /// Texts; none where there is no such key.
    pub fn texts(&self, key: &str) -> &[String] {
        match self.keys.get(key) {
            Some(Value::Texts(texts)) => texts,
            _ => &[],
        }
    }
}

/// Reads the bytes of a whole file as [`Reader::open`] does; gives the number of keys and of tensors.
///
/// # Errors
/// What is wrong.
pub fn parse(bytes: &[u8]) -> Result<(usize, usize), String> {
    let (keys, tensors) = read(&mut Beginning { input: bytes, at: 0, length: wide(bytes.len()) })?;
    Ok((keys.len(), tensors.len()))
}

type Contents = (BTreeMap<String, Value>, Vec<(Tensor, u64)>);

fn read(beginning: &mut Beginning<impl Read>) -> Result<Contents, String> {
    if beginning.bytes(4)? != b"GGUF" {
        return Err("it does not begin with GGUF".into());
    }
    let version = beginning.u32()?;
    if version != 3 && version != 2 {
        return Err(format!("version {version}; versions 2 and 3 are read"));
    }
    let (tensors, keys) = (beginning.u64()?, beginning.u64()?);
    if tensors > MOST || keys > MOST {
        return Err(format!("{tensors} tensors and {keys} keys are announced, more than {MOST}"));
    }
    let mut known = BTreeMap::new();
    for _ in 0..keys {
        let (name, kind) = (beginning.text()?, beginning.u32()?);
        if let Some(value) = beginning.value(kind)? {
            known.insert(name, value);
        }
    }
    let mut listed = Vec::new();
    for _ in 0..tensors {
        let (name, dimensions) = (beginning.text()?, beginning.u32()?);
        if dimensions > 4 {
            return Err(format!("tensor {} has {dimensions} dimensions", shown(&name)));
        }
        let mut shape = (0..dimensions)
            .map(|_| usize::try_from(beginning.u64()?).map_err(|error| error.to_string()))
            .collect::<Result<Vec<_>, String>>()?;
        shape.reverse();
        let (number, offset) = (beginning.u32()?, beginning.u64()?);
        let kind = Kind::ALL.into_iter().find(|kind| kind.number() == number);
        let kind = kind.ok_or_else(|| format!("tensor {} has type {number}, which this version does not read", shown(&name)))?;
        let entries = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size)).filter(|&entries| entries < 1 << 44);
        let whole = shape.last().is_some_and(|columns| columns.is_multiple_of(kind.weights()));
        let sensible = shape.iter().all(|&size| size < 1 << 44);
        if shape.contains(&0) {
            return Err(format!("tensor {} of shape {shape:?} holds nothing", shown(&name)));
        }
        if entries.is_none() || !whole || !sensible {
            return Err(format!("tensor {} of shape {shape:?} is not whole blocks of {}", shown(&name), kind.weights()));
        }
        listed.push((Tensor { name, shape, kind }, offset));
    }
    let alignment = match known.get("general.alignment") {
        Some(Value::U32(alignment @ 1..=65536)) => u64::from(*alignment),
        Some(other) => return Err(format!("general.alignment is {other:?}")),
        None => 32,
    };
    let start = beginning.at.next_multiple_of(alignment);
    for (tensor, offset) in &mut listed {
        let end = start.checked_add(*offset).and_then(|place| place.checked_add(tensor.bytes()));
        if end.is_none_or(|end| end > beginning.length) {
            return Err(format!("tensor {} goes beyond the end of the file at byte {}", shown(&tensor.name), beginning.length));
        }
        *offset = offset.saturating_add(start);
    }
    apart(&listed)?;
    Ok((known, listed))
}

/// Refuses tensors that share a name or bytes.
fn apart(listed: &[(Tensor, u64)]) -> Result<(), String> {
    let mut names = HashSet::new();
    if let Some((twice, _)) = listed.iter().find(|(tensor, _)| !names.insert(tensor.name.as_str())) {
        return Err(format!("tensor {} occurs twice", shown(&twice.name)));
    }
    let mut places: Vec<(u64, &Tensor)> = listed.iter().map(|(tensor, at)| (*at, tensor)).collect();
    places.sort_by_key(|(at, _)| *at);
    let mut pairs = places.iter().zip(places.iter().skip(1));
    match pairs.find(|((at, tensor), (next, _))| at.saturating_add(tensor.bytes()) > *next) {
        Some(((_, tensor), (_, next))) => Err(format!("tensor {} begins inside of tensor {}", shown(&next.name), shown(&tensor.name))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::gguf::container::header;

    #[test]
    fn tensors_that_share_a_name_or_bytes_are_refused() {
        let tensor = |name: &str| Tensor { name: name.into(), shape: vec![3], kind: Kind::F32 };
        assert_eq!(apart(&[(tensor("a"), 96), (tensor("b"), 64)]), Ok(()));
        assert!(apart(&[(tensor("a"), 96), (tensor("b"), 85)]).unwrap_err().contains("inside"));
        assert!(apart(&[(tensor("a"), 96), (tensor("a"), 64)]).unwrap_err().contains("twice"));
    }

    fn file() -> Vec<u8> {
        let keys = BTreeMap::from([
            ("general.architecture".to_string(), Value::Text("llama".into())),
            ("x.texts".into(), Value::Texts(vec!["a".into(), "ü".into()])),
            ("x.flag".into(), Value::Bool(true)),
            ("x.scores".into(), Value::F32s(vec![0.5, -1.0])),
        ]);
        let tensors = [
            Tensor { name: "t".into(), shape: vec![2, 64], kind: Kind::Q4_0 },
            Tensor { name: "u".into(), shape: vec![3], kind: Kind::F32 },
        ];
        let (mut bytes, offsets) = header(&keys, &tensors);
        bytes.resize(offsets[1] as usize, 1);
        bytes.extend([2; 12]);
        bytes
    }

    fn opened(bytes: &[u8]) -> Result<Reader> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gguf");
        std::fs::write(&path, bytes).unwrap();
        Reader::open(&path)
    }

    #[test]
    fn what_was_written_is_read() {
        let reader = opened(&file()).unwrap();
        assert_eq!(reader.text("general.architecture"), Some("llama"));
        assert_eq!(reader.texts("x.texts"), ["a", "ü"]);
        assert_eq!((reader.truth("x.flag"), reader.tensors.len()), (Some(true), 2));
        let (tensor, start) = &reader.tensors[1];
        assert_eq!((tensor.shape.as_slice(), reader.bytes(tensor, *start).unwrap()), (&[3usize][..], vec![2; 12]));
    }

    /// A file of one key of a type and bytes, and of tensors that are listed so: name, sizes, type, offset.
    fn raw(version: u32, counts: [u64; 2], key: (u32, &[u8]), listed: &[(&str, &[u64], u32, u64)], data: usize) -> Vec<u8> {
        let mut all = [&b"GGUF"[..], &version.to_le_bytes(), &counts[0].to_le_bytes(), &counts[1].to_le_bytes()].concat();
        let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
        all.extend([&text("k"), &key.0.to_le_bytes()[..], key.1].concat());
        for (name, sizes, kind, offset) in listed {
            all.extend([text(name), (sizes.len() as u32).to_le_bytes().to_vec()].concat());
            sizes.iter().for_each(|size| all.extend(size.to_le_bytes()));
            all.extend([&kind.to_le_bytes()[..], &offset.to_le_bytes()].concat());
        }
        all.resize(all.len().next_multiple_of(32) + data, 0);
        all
    }

    #[test]
    fn keys_of_every_type_are_read_or_passed_over() {
        let read = |kind: u32, bytes: &[u8]| opened(&raw(3, [0, 1], (kind, bytes), &[], 0)).unwrap();
        assert_eq!(read(4, &[7, 0, 0, 0]).count("k"), Some(7));
        assert_eq!((read(5, &[7, 0, 0, 0]).count("k"), read(5, &[255; 4]).count("k")), (Some(7), Some(0)));
        assert_eq!((read(10, &[7, 0, 0, 0, 0, 0, 0, 0]).count("k"), read(10, &[255; 8]).count("k")), (Some(7), Some(u32::MAX)));
        assert_eq!((read(6, &1.5f32.to_le_bytes()).float("k"), read(6, &[0; 4]).count("k")), (Some(1.5), None));
        assert_eq!((read(7, &[0]).truth("k"), read(7, &[1]).truth("k"), read(4, &[1; 4]).float("k")), (Some(false), Some(true), None));
        for (kind, width) in [(0, 1), (1, 1), (2, 2), (3, 2), (11, 8), (12, 8)] {
            assert!(read(kind, &vec![0; width]).keys.is_empty());
            let list = [&kind.to_le_bytes()[..], &2u64.to_le_bytes(), &vec![0; 2 * width]].concat();
            assert!(read(9, &list).keys.is_empty());
        }
        let list = |kind: u32, values: [u8; 8]| [&kind.to_le_bytes()[..], &2u64.to_le_bytes(), &values].concat();
        assert_eq!(read(9, &list(5, [1, 0, 0, 0, 255, 255, 255, 255])).keys["k"], Value::I32s(vec![1, -1]));
        assert_eq!(read(9, &list(6, [0; 8])).keys["k"], Value::F32s(vec![0.0; 2]));
        for wrong in [raw(3, [0, 1], (13, &[0; 8]), &[], 0), raw(3, [0, 1], (9, &list(13, [0; 8])), &[], 0)] {
            assert!(opened(&wrong).unwrap_err().to_string().contains("of type 13"));
        }
        let many = raw(3, [0, 1], (9, &[&8u32.to_le_bytes()[..], &9u64.to_le_bytes()].concat()), &[], 0);
        assert!(opened(&many).unwrap_err().to_string().contains("a list of 9 texts does not fit a file of 64 bytes"));
    }

    #[test]
    fn numbers_of_a_file_are_held_against_it() {
        let key: (u32, &[u8]) = (7, &[1]);
        let one = |sizes: &[u64], kind, offset, data| raw(3, [1, 1], key, &[("t", sizes, kind, offset)], data);
        let reason = |bytes: &[u8]| opened(bytes).map(drop).map_err(|error| error.to_string());
        assert_eq!((reason(&one(&[3], 0, 0, 12)), parse(&one(&[3], 0, 0, 12))), (Ok(()), Ok((1, 1))));
        assert_eq!(parse(&raw(2, [0, 1], key, &[], 0)), Ok((1, 0)));
        for (bytes, part) in [
            (raw(4, [0, 1], key, &[], 0), "version 4"),
            (raw(3, [MOST + 1, 1], key, &[], 0), "more than"),
            (raw(3, [0, MOST + 1], key, &[], 0), "more than"),
            (one(&[1; 5], 0, 0, 4), "5 dimensions"),
            (one(&[3], 99, 0, 12), "type 99"),
            (one(&[33], 2, 0, 99), "whole blocks of 32"),
            (one(&[1 << 44], 0, 0, 12), "whole blocks"),
            (one(&[1 << 43, 1 << 43], 0, 0, 12), "whole blocks"),
            (one(&[0, 1 << 44], 0, 0, 12), "holds nothing"),
            (raw(3, [2, 1], key, &[("t", &[0], 0, 4), ("u", &[3], 0, 0)], 24), "holds nothing"),
            (one(&[3], 0, 32, 12), "beyond the end"),
            (one(&[3], 0, u64::MAX, 12), "beyond the end"),
            (raw(3, [2, 1], key, &[("t", &[3], 0, 0), ("u", &[3], 0, 8)], 32), "begins inside"),
            (raw(3, [2, 1], key, &[("t", &[3], 0, 0), ("t", &[3], 0, 12)], 32), "occurs twice"),
        ] {
            assert!(reason(&bytes).unwrap_err().contains(part), "{part}: {:?}", reason(&bytes));
        }
        assert_eq!(reason(&one(&[1; 4], 0, 0, 4)), Ok(()));
        assert_eq!(reason(&raw(3, [2, 1], key, &[("t", &[3], 0, 0), ("u", &[3], 0, 12)], 24)), Ok(()), "side by side");
    }

    #[test]
    fn every_cut_and_every_flipped_byte_is_an_error_or_a_file() {
        let whole = file();
        for cut in 0..whole.len() {
            assert!(opened(&whole[..cut]).is_err(), "cut at {cut}");
        }
        for at in 0..whole.len() {
            for bit in [1, 0x80] {
                let mut bytes = whole.clone();
                bytes[at] ^= bit;
                drop(opened(&bytes));
            }
        }
    }
}
