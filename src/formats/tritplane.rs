//! tritplane: the container for what no other format holds: two trit-planes, core and outlier integers with two scales, and
//! patterns of zeros with the values between them. Version 1.
//!
//! safetensors tensors of a layer `p` of R outputs and C inputs, with G = ⌈C / group⌉:
//!
//! | storage | tensor | type and shape | content |
//! |---|---|---|---|
//! | trits | `p.trits_coarse`, `p.trits_fine` | U8 `[R, ⌈C/5⌉]` | five trits per byte: Σ (tᵢ + 1)·3ⁱ, i from 0 |
//! | | `p.trits_scale` | F16 `[R, G, 2]` | α₁ of the coarse plane, α₂ of the fine one |
//! | split | `p.split_codes` | I32 `[R, ⌈C·bits/32⌉]` | codes as in compressed-tensors, each row a stream of bits |
//! | | `p.split_scale` | F16 `[R, G, 2]` | scale of core weights, scale of outliers |
//! | | `p.split_outliers` | U8 `[R, ⌈C/8⌉]` | a bit per weight, the lowest first: 1 is an outlier |
//! | sparse N:M | `p.sparse_mask` | U8 `[R, ⌈C/8⌉]` | a bit per weight: 1 is kept |
//! | | `p.sparse_values` | floats `[R, C·N/M]` | the kept weights of each row in order |
//! | integers | as compressed-tensors | | |
//!
//! Entries are α₁·t₁ + α₂·t₂; (code − 2^(bits−1)) · scale; the value or zero. config.json says in `quantization_config` which
//! layer is stored how: `{"quant_method": "tritplane", "version": 1, "layers": {p: {"storage": "trits", "shape": [R, C],
//! "group": 128}}}`; a layer that is not listed is a plain `p.weight`.

use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::checkpoint::decode::{decode, encode};
use crate::checkpoint::source::{Plain, Source, present};
use crate::checkpoint::{Checkpoint, dtype_of, float_of};
use crate::error::{Error, Result, shown};
use crate::formats::{Entry, Format, bitstream, compressed_tensors, scales};
use crate::matrix::Matrix;
use crate::weight::{Float, Outlined, Pattern, Sparse, Split, Storage, Trits, Weight};

/// The format.
pub const FORMAT: Format = Format {
    name: "tritplane",
    about: "trit-planes, two-scale splits and N:M patterns packed; read by drawknife only (`export` makes others of it)",
    scales: None,
    holds,
    entries,
    encode: encode_weight,
    config: |layers, _| Some(config(layers)),
    files: |_| Vec::new(),
};

const VERSION: u64 = 1;

fn holds(layer: &Outlined) -> Result<(), String> {
    match layer.storage {
        Some(Storage::Sparse(Pattern::Unstructured)) => {
            Err("tritplane packs zeros in N:M patterns, where their number is known; unstructured ones are written with --format dense"
                .into())
        }
        Some(Storage::Sparse(Pattern::Blocks { of, .. })) if !layer.shape[1].is_multiple_of(of) => {
            Err(format!("{} inputs are not whole blocks of {of}; use --format dense", layer.shape[1]))
        }
        Some(storage @ Storage::Super(_)) => Err(format!("{storage} is a type of GGUF files; use --format gguf")),
        _ => Ok(()),
    }
}

fn entries(layer: &Outlined) -> Vec<Entry> {
    let [rows, columns] = layer.shape;
    let entry = |suffix: &str, dtype, shape| Entry { name: format!("{}.{suffix}", layer.name), dtype, shape };
    match layer.storage {
        None | Some(Storage::Super(_)) => Vec::new(),
        Some(Storage::Dense | Storage::Sparse(Pattern::Unstructured)) => vec![entry("weight", dtype_of(layer.float), vec![rows, columns])],
        Some(Storage::Ints { .. }) => (compressed_tensors::FORMAT.entries)(layer),
        Some(Storage::Trits { group }) => vec![
            entry("trits_coarse", Dtype::U8, vec![rows, columns.div_ceil(5)]),
            entry("trits_fine", Dtype::U8, vec![rows, columns.div_ceil(5)]),
            entry("trits_scale", Dtype::F16, vec![rows, columns.div_ceil(group), 2]),
        ],
        Some(Storage::Split { bits, group, .. }) => vec![
            entry("split_codes", Dtype::I32, vec![rows, bitstream::words(columns, bits)]),
            entry("split_scale", Dtype::F16, vec![rows, columns.div_ceil(group), 2]),
            entry("split_outliers", Dtype::U8, vec![rows, columns.div_ceil(8)]),
        ],
        Some(Storage::Sparse(Pattern::Blocks { kept, of })) => vec![
            entry("sparse_mask", Dtype::U8, vec![rows, columns.div_ceil(8)]),
            entry("sparse_values", dtype_of(layer.float), vec![rows, columns / of * kept]),
        ],
    }
}

fn encode_weight(weight: &Weight, float: Float) -> Vec<Vec<u8>> {
    match weight {
        Weight::Trits(trits) => {
            let plane = |number: usize| planes(&trits.codes, trits.columns, number);
            vec![plane(0), plane(1), encode(Float::F16, trits.scales.as_flattened())]
        }
        Weight::Split(split) => {
            let codes = bitstream::pack_rows(&split.codes, split.columns, split.bits);
            vec![codes, encode(Float::F16, split.scales.as_flattened()), split.mask.clone()]
        }
        Weight::Sparse(Sparse { matrix, pattern: Pattern::Blocks { kept, of } }) => blocks(matrix, [*kept, *of], float),
        Weight::Ints(_) => (compressed_tensors::FORMAT.encode)(weight, float),
        other => vec![encode(float, &other.to_matrix().data)],
    }
}

/// One plane of trits, five to a byte, each row a row of bytes.
fn planes(codes: &[u8], columns: usize, number: usize) -> Vec<u8> {
    let of_row = |codes: &[u8]| -> Vec<u8> {
        let byte = |five: &[u8]| five.iter().rev().fold(0u8, |byte, &code| 3 * byte + (Trits::pair(code)[number] + 1) as u8);
        codes.chunks(5).map(byte).collect()
    };
    codes.par_chunks(columns.max(1)).with_min_len(16).flat_map_iter(of_row).collect()
}

/// Codes of two planes.
fn joined(coarse: &[u8], fine: &[u8], [rows, columns]: [usize; 2]) -> Result<Vec<u8>, String> {
    let mut codes = vec![0; rows * columns];
    let bytes = columns.div_ceil(5);
    if let Some(wrong) = coarse.iter().chain(fine).find(|&&byte| byte >= 243) {
        return Err(format!("holds the byte {wrong}, five trits end at 242"));
    }
    for ((codes, coarse), fine) in codes.chunks_mut(columns.max(1)).zip(coarse.chunks(bytes.max(1))).zip(fine.chunks(bytes.max(1))) {
        for ((codes, &coarse), &fine) in codes.chunks_mut(5).zip(coarse).zip(fine) {
            let (mut coarse, mut fine) = (coarse, fine);
            for code in codes {
                *code = 3 * (coarse % 3) + fine % 3;
                (coarse, fine) = (coarse / 3, fine / 3);
            }
        }
    }
    Ok(codes)
}

/// Mask and values of an N:M pattern: of every block the kept places, zeros among them where fewer are not zero.
fn blocks(matrix: &Matrix, [kept, of]: [usize; 2], float: Float) -> Vec<Vec<u8>> {
    let width = matrix.columns.div_ceil(8);
    let mut mask = vec![0u8; matrix.rows * width];
    let mut values = Vec::with_capacity(matrix.data.len() / of * kept);
    for (row, mask) in matrix.data.chunks(matrix.columns.max(1)).zip(mask.chunks_mut(width.max(1))) {
        for (number, block) in row.chunks(of).enumerate() {
            let filled = block.iter().filter(|value| **value != 0.0).count();
            let mut spare = kept.saturating_sub(filled);
            for (at, &value) in block.iter().enumerate() {
                if value == 0.0 {
                    if spare == 0 {
                        continue;
                    }
                    spare -= 1;
                }
                let column = number * of + at;
                mask[column / 8] |= 1 << (column % 8);
                values.push(value);
            }
        }
    }
    vec![mask, encode(float, &values)]
}

fn config(layers: &[Outlined]) -> Value {
    let mut listed = Map::new();
    for layer in layers {
        let said = match layer.storage {
            Some(Storage::Ints { bits, group, symmetric }) => {
                json!({"storage": "integers", "bits": bits, "group": group, "symmetric": symmetric})
            }
            Some(Storage::Trits { group }) => json!({"storage": "trits", "group": group}),
            Some(Storage::Split { bits, group, outliers }) => {
                json!({"storage": "split", "bits": bits, "group": group, "outliers_per_million": outliers})
            }
            Some(Storage::Sparse(Pattern::Blocks { kept, of })) => json!({"storage": "sparse", "kept": kept, "of": of}),
            Some(Storage::Dense | Storage::Sparse(Pattern::Unstructured) | Storage::Super(_)) | None => continue,
        };
        let mut said = said;
        said["shape"] = json!(layer.shape);
        listed.insert(layer.name.clone(), said);
    }
    json!({"quant_method": "tritplane", "version": VERSION, "layers": listed})
}

/// Reads the container.
#[derive(Debug)]
pub struct Tritplane {
    layers: std::collections::HashMap<String, ([usize; 2], Storage)>,
}

impl Tritplane {
    /// Reads the quantization section of a config.json.
    ///
    /// # Errors
    /// When it is of another version or malformed.
    pub fn read(section: &Value) -> Result<Self> {
        let wrong = |what: String| Error::input(format!("config.json: quantization_config: {what}"));
        if section["version"].as_u64() != Some(VERSION) {
            return Err(wrong(format!(
                "tritplane version {}, this program reads version {VERSION}",
                shown(&section["version"].to_string())
            )));
        }
        let layers = section["layers"].as_object().ok_or_else(|| wrong("layers is missing".into()))?;
        let one = |(name, said): (&String, &Value)| {
            let bad = |what: &str| wrong(format!("{}: {what}", shown(name)));
            let size = |value: &Value, most: u64| value.as_u64().filter(|size| (1..=most).contains(size)).map(|size| size as usize);
            let shape = size(&said["shape"][0], 1 << 24).zip(size(&said["shape"][1], 1 << 24));
            let (rows, columns) = shape.ok_or_else(|| bad("shape is not two sizes"))?;
            let group = || size(&said["group"], 1 << 24).ok_or_else(|| bad("group is not a size"));
            let bits = || {
                said["bits"].as_u64().filter(|bits| (2..=8).contains(bits)).map(|bits| bits as u8).ok_or_else(|| bad("bits must be 2 to 8"))
            };
            let storage = match said["storage"].as_str() {
                Some("integers") => {
                    Storage::Ints { bits: bits()?, group: group()?, symmetric: said["symmetric"].as_bool().unwrap_or(true) }
                }
                Some("trits") => Storage::Trits { group: group()? },
                Some("split") => Storage::Split {
                    bits: bits()?,
                    group: group()?,
                    outliers: said["outliers_per_million"].as_u64().unwrap_or(0).min(1_000_000) as u32,
                },
                Some("sparse") => {
                    let [kept, of] =
                        ["kept", "of"].map(|key| said[key].as_u64().filter(|size| (1..=64).contains(size)).map(|size| size as usize));
                    let (kept, of) = kept.zip(of).ok_or_else(|| bad("kept and of must be 1 to 64"))?;
                    Storage::Sparse(Pattern::Blocks { kept, of })
                }
                other => return Err(bad(&format!("storage `{}` is not known", shown(other.unwrap_or("?"))))),
            };
            Ok((name.clone(), ([rows, columns], storage)))
        };
        Ok(Self { layers: layers.iter().map(one).collect::<Result<_>>()? })
    }

    /// The listed layer, checked against its tensors.
    fn layer(&self, checkpoint: &Checkpoint, name: &str) -> Result<Option<(Outlined, Storage)>> {
        let Some(&(shape, storage)) = self.layers.get(name) else { return Ok(None) };
        let floats = ["sparse_values", "weight_scale"].iter().find_map(|suffix| checkpoint.info(&format!("{name}.{suffix}")));
        let float = floats.and_then(|info| float_of(info.dtype)).unwrap_or(Float::F16);
        let layer = Outlined { name: name.into(), shape, storage: Some(storage), float };
        for entry in entries(&layer) {
            let wrong = |what: String| Error::input(what).tensor(&entry.name).file(&checkpoint.folder);
            match checkpoint.info(&entry.name) {
                Some(info) if info.dtype == entry.dtype && info.shape == entry.shape => {}
                Some(info) => {
                    return Err(wrong(format!("is {:?} {:?}, {:?} {:?} is needed", info.dtype, info.shape, entry.dtype, entry.shape)));
                }
                None => return Err(wrong("missing; the checkpoint is incomplete".into())),
            }
        }
        Ok(Some((layer, storage)))
    }
}

/// Pairs of scales.
fn pairs(checkpoint: &Checkpoint, name: &str) -> Result<Vec<[f32; 2]>> {
    Ok(scales(checkpoint, name, Float::F16)?.as_chunks::<2>().0.to_vec())
}

impl Source for Tritplane {
    fn shape(&self, checkpoint: &Checkpoint, name: &str) -> Option<[usize; 2]> {
        self.layers.get(name).map(|&(shape, _)| shape).or_else(|| Plain.shape(checkpoint, name))
    }

    fn tensors(&self, checkpoint: &Checkpoint, name: &str) -> Vec<String> {
        let own =
            ["trits_coarse", "trits_fine", "trits_scale", "split_codes", "split_scale", "split_outliers", "sparse_mask", "sparse_values"];
        let ints = ["weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"];
        present(checkpoint, name, &[&own[..], &ints[..]].concat())
    }

    fn check(&self, checkpoint: &Checkpoint, name: &str, _: [usize; 2]) -> Result<()> {
        self.layer(checkpoint, name).map(drop)
    }

    fn weight(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<Weight> {
        let Some((layer, storage)) = self.layer(checkpoint, name)? else { return Plain.weight(checkpoint, name, shape) };
        let [rows, columns] = layer.shape;
        let bytes = |suffix: &str| checkpoint.bytes(&format!("{name}.{suffix}"));
        let wrong = |suffix: &str, what: String| Error::input(what).tensor(&format!("{name}.{suffix}")).file(&checkpoint.folder);
        match storage {
            Storage::Trits { group } => {
                let codes = joined(&bytes("trits_coarse")?, &bytes("trits_fine")?, shape).map_err(|what| wrong("trits_coarse", what))?;
                let scales = pairs(checkpoint, &format!("{name}.trits_scale"))?;
                Ok(Weight::Trits(Trits { rows, columns, group, codes, scales, scale_float: Float::F16 }))
            }
            Storage::Split { bits, group, outliers } => {
                let mut codes = vec![0; rows * columns];
                let stream = 4 * bitstream::words(columns, bits);
                for (codes, bytes) in codes.chunks_exact_mut(columns).zip(bytes("split_codes")?.chunks_exact(stream)) {
                    bitstream::unpack(bytes, bits, codes);
                }
                let scales = pairs(checkpoint, &format!("{name}.split_scale"))?;
                Ok(Weight::Split(Split { rows, columns, bits, group, outliers, codes, scales, mask: bytes("split_outliers")?.to_vec() }))
            }
            Storage::Sparse(pattern) => {
                let mask = bytes("sparse_mask")?;
                let mut values =
                    vec![0.0; checkpoint.info(&format!("{name}.sparse_values")).map_or(0, crate::checkpoint::TensorInfo::entries)];
                decode(layer.float, &bytes("sparse_values")?, &mut values);
                let mut data = vec![0.0; rows * columns];
                let per_row = values.len() / rows.max(1);
                for (row, out) in data.chunks_mut(columns).enumerate() {
                    let mask = &mask[row * columns.div_ceil(8)..];
                    let kept: Vec<usize> = (0..columns).filter(|column| mask[column / 8] >> (column % 8) & 1 == 1).collect();
                    if kept.len() != per_row {
                        return Err(wrong("sparse_mask", format!("row {row} keeps {} weights, {per_row} are stored", kept.len())));
                    }
                    kept.iter().zip(&values[row * per_row..]).for_each(|(&column, &value)| out[column] = value);
                }
                Ok(Weight::Sparse(Sparse { matrix: Matrix::new(rows, columns, data), pattern }))
            }
            Storage::Ints { bits, group, symmetric } => {
                compressed_tensors::PackQuantized::one(name, bits, group, symmetric).weight(checkpoint, name, shape)
            }
            Storage::Dense | Storage::Super(_) => Plain.weight(checkpoint, name, shape),
        }
    }
}
