//! The container: keys with values, then names, shapes and types of tensors, then their bytes at aligned offsets.

use std::collections::BTreeMap;

use crate::formats::gguf::blocks::Kind;

/// Bytes that tensors begin at multiples of.
const ALIGNMENT: usize = 32;
const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;

/// A value of a key.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A whole number of 32 bits.
    U32(u32),
    /// A float.
    F32(f32),
    /// A truth value.
    Bool(bool),
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Whole numbers with a sign.
    I32s(Vec<i32>),
    /// Floats.
    F32s(Vec<f32>),
}

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The type of its entries.
    pub kind: Kind,
}

impl Tensor {
    /// Bytes of the tensor.
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() / self.kind.weights() * self.kind.bytes()) as u64
    }
}

/// The beginning of a file, and where after it each tensor begins.
pub fn header(keys: &BTreeMap<String, Value>, tensors: &[Tensor]) -> (Vec<u8>, Vec<u64>) {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    // What the model is comes first, as readers list it.
    let first = |key: &&String| !key.starts_with("general.architecture");
    let mut names: Vec<&String> = keys.keys().collect();
    names.sort_by_key(|key| (first(key), !key.starts_with("general."), key.starts_with("tokenizer."), (*key).clone()));
    for name in names {
        text(&mut out, name);
        value(&mut out, &keys[name]);
    }
    let mut offset = 0u64;
    let mut offsets = Vec::new();
    for tensor in tensors {
        text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&size| out.extend((size as u64).to_le_bytes()));
        out.extend(tensor.kind.number().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offsets.push(offset);
        offset = (offset + tensor.bytes()).next_multiple_of(ALIGNMENT as u64);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    let start = out.len() as u64;
    offsets.iter_mut().for_each(|offset| *offset += start);
    (out, offsets)
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn value(out: &mut Vec<u8>, value: &Value) {
    let array = |out: &mut Vec<u8>, kind: u32, count: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((count as u64).to_le_bytes());
    };
    match value {
        Value::U32(number) => out.extend([4u32.to_le_bytes(), number.to_le_bytes()].concat()),
        Value::F32(number) => out.extend([6u32.to_le_bytes(), number.to_le_bytes()].concat()),
        Value::Bool(truth) => {
            out.extend(7u32.to_le_bytes());
            out.push(u8::from(*truth));
        }
        Value::Text(words) => {
            out.extend(8u32.to_le_bytes());
            text(out, words);
        }
        Value::Texts(texts) => {
            array(out, 8, texts.len());
            texts.iter().for_each(|one| text(out, one));
        }
        Value::I32s(numbers) => {
            array(out, 5, numbers.len());
            numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
        }
        Value::F32s(numbers) => {
            array(out, 6, numbers.len());
            numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_by_hand() {
        let keys = BTreeMap::from([("a".to_string(), Value::U32(7)), ("general.architecture".to_string(), Value::Text("x".into()))]);
        let tensors = [
            Tensor { name: "t".into(), shape: vec![2, 32], kind: Kind::Q4_0 },
            Tensor { name: "u".into(), shape: vec![3], kind: Kind::F32 },
        ];
        let (bytes, offsets) = header(&keys, &tensors);
        assert_eq!(&bytes[..8], b"GGUF\x03\0\0\0");
        assert_eq!(u64::from_le_bytes(bytes[8..16].try_into().unwrap()), 2);
        assert_eq!(&bytes[24..32], &20u64.to_le_bytes());
        assert_eq!(&bytes[32..52], b"general.architecture");
        // 36 bytes of the first tensor end at 64, the next multiple of 32.
        assert_eq!((bytes.len() % 32, offsets[1] - offsets[0]), (0, 64));
        assert_eq!(offsets[0], bytes.len() as u64);
        let sizes = bytes.windows(16).any(|window| window == [32u64.to_le_bytes(), 2u64.to_le_bytes()].concat());
        assert!(sizes, "sizes stand innermost first");
    }
}
