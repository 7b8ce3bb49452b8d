//! GGUF, llama.cpp's format: one file with everything (formats A5). Our integers go into the block types of 32 or 64 weights
//! that hold them exactly, with the group's scale in every block; what no such type holds stays floats. The names that tensors
//! have there, and what llama.cpp wants changed in them, depend on the model: they stand in `compress::gguf`.

pub mod blocks;
pub mod container;
pub mod k_blocks;
pub mod reader;
pub mod tokenizer;

use safetensors::Dtype;

use crate::checkpoint::decode::encode;
use crate::checkpoint::dtype_of;
use crate::formats::gguf::blocks::Kind;
use crate::formats::{Entry, Format};
use crate::weight::{Float, Outlined, Sparse, Storage, Weight};

/// The format.
pub const FORMAT: Format = Format {
    name: "gguf",
    about: "one file for llama.cpp; integers in Q2_0, Q4_0, Q5_0 or Q8_0 blocks, exactly. Loads in llama.cpp, SGLang, mistral.rs",
    scales: Some(Float::F16),
    holds,
    entries,
    encode: encode_weight,
    config: |_, _| None,
    files: |_| Vec::new(),
};

fn holds(layer: &Outlined) -> Result<(), String> {
    match layer.storage {
        Some(storage @ (Storage::Trits { .. } | Storage::Split { .. })) => {
            Err(format!("gguf has no place for {storage}; use --format dense, or tied = true, which leaves 4-bit integers"))
        }
        _ => Ok(()),
    }
}

/// The block type that holds a layer exactly: the smallest whose range has all of code − zero point; nothing where rows or
/// groups are not whole blocks.
pub fn carrier(layer: &Outlined) -> Option<Kind> {
    if let Some(Storage::Super(kind)) = layer.storage {
        return Some(Kind::Super(kind));
    }
    let Some(Storage::Ints { bits, group, symmetric }) = layer.storage else { return None };
    carrying(bits, group, symmetric, layer.shape[1])
}

fn carrying(bits: u8, group: usize, symmetric: bool, columns: usize) -> Option<Kind> {
    let whole = |block: usize| columns.is_multiple_of(block) && group.is_multiple_of(block);
    let kind = match (bits, symmetric) {
        (2, true) if whole(64) => Kind::Q2_0,
        (2..=4, true) | (2 | 3, false) => Kind::Q4_0,
        (5, true) | (4, false) => Kind::Q5_0,
        (6..=8, true) | (5..=7, false) => Kind::Q8_0,
        _ => return None,
    };
    whole(kind.weights()).then_some(kind)
}

/// One tensor: blocks as bytes, rows × bytes, or floats.
fn entries(layer: &Outlined) -> Vec<Entry> {
    let [rows, columns] = layer.shape;
    let name = format!("{}.weight", layer.name);
    vec![match carrier(layer) {
        Some(kind) => Entry { name, dtype: Dtype::U8, shape: vec![rows, columns / kind.weights() * kind.bytes()] },
        None => Entry { name, dtype: dtype_of(layer.float), shape: layer.shape.to_vec() },
    }]
}

fn encode_weight(weight: &Weight, float: Float) -> Vec<Vec<u8>> {
    vec![match weight {
        Weight::Ints(ints) => match carrying(ints.bits, ints.group, ints.zeros.is_none(), ints.columns) {
            Some(kind) => blocks::encode(ints, kind),
            None => encode(float, &ints.to_matrix().data),
        },
        Weight::Super(blocks) => k_blocks::encode(blocks),
        Weight::Dense(matrix) | Weight::Sparse(Sparse { matrix, .. }) => encode(float, &matrix.data),
        other => encode(float, &other.to_matrix().data),
    }]
}
