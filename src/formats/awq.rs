//! AWQ packing (gemm): integers of 4 bits with zero points, eight outputs to a word in an order of their own (formats A3).

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::decode::encode;
use crate::checkpoint::float_of;
use crate::checkpoint::source::{Plain, Source, present};
use crate::error::{Error, Result, shown};
use crate::formats::words::transposed;
use crate::formats::{Entry, Format, scales};
use crate::weight::{Float, Ints, Outlined, Storage, Weight};

/// The format.
pub const FORMAT: Format = Format {
    name: "awq",
    about: "4 bits with zero points (gemm). Loads in vLLM, SGLang, transformers with gptqmodel, mistral.rs",
    scales: Some(Float::F16),
    holds,
    entries,
    encode: |weight, _| encode_weight(weight),
    config: |layers, carried| Some(config(layers, carried)),
    files: |_| Vec::new(),
};

/// The column of a word's nibbles, from the lowest on.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

fn holds(layer: &Outlined) -> Result<(), String> {
    let [rows, columns] = layer.shape;
    match layer.storage {
        None => Ok(()),
        Some(Storage::Ints { bits: 4, group, symmetric: false }) if rows % 8 == 0 && columns % group == 0 => Ok(()),
        Some(Storage::Ints { bits: 4, symmetric: true, .. }) => {
            Err("awq holds 4 bits with zero points; use symmetric = false, or --format gptq or compressed-tensors".into())
        }
        Some(Storage::Ints { bits: 4, group, .. }) => Err(format!(
            "awq needs outputs in multiples of 8 and whole groups, the layer is {rows} x {columns} in groups of {group}; \
             use --format compressed-tensors"
        )),
        Some(storage) => Err(format!("awq holds 4 bits with zero points, not {storage}; use --format compressed-tensors or dense")),
    }
}

/// Whole rows are one group per row.
fn entries(layer: &Outlined) -> Vec<Entry> {
    let Some(Storage::Ints { group, .. }) = layer.storage else { return Vec::new() };
    let [rows, columns] = layer.shape;
    let groups = columns / group;
    let entry = |suffix: &str, dtype, shape| Entry { name: format!("{}.{suffix}", layer.name), dtype, shape };
    vec![
        entry("qweight", Dtype::I32, vec![columns, rows / 8]),
        entry("qzeros", Dtype::I32, vec![groups, rows / 8]),
        entry("scales", Dtype::F16, vec![groups, rows]),
    ]
}

fn encode_weight(weight: &Weight) -> Vec<Vec<u8>> {
    let Weight::Ints(ints) = weight else { return Vec::new() };
    let groups = ints.groups();
    let zeros = ints.zeros.clone().unwrap_or_else(|| vec![ints.middle(); ints.rows * groups]);
    vec![
        nibbles(&transposed(&ints.codes, ints.columns)),
        nibbles(&transposed(&zeros, groups)),
        encode(Float::F16, &transposed(&ints.scales, groups)),
    ]
}

fn nibbles(codes: &[u8]) -> Vec<u8> {
    let word = |codes: &[u8; 8]| -> [u8; 4] { std::array::from_fn(|byte| codes[ORDER[2 * byte]] | codes[ORDER[2 * byte + 1]] << 4) };
    codes.as_chunks::<8>().0.iter().flat_map(word).collect()
}

fn codes(bytes: &[u8]) -> Vec<u8> {
    let mut codes = vec![0; 2 * bytes.len()];
    for (codes, word) in codes.as_chunks_mut::<8>().0.iter_mut().zip(bytes.as_chunks::<4>().0) {
        for (at, &to) in ORDER.iter().enumerate() {
            codes[to] = word[at / 2] >> (4 * (at % 2)) & 15;
        }
    }
    codes
}

fn config(layers: &[Outlined], carried: &[String]) -> Value {
    let group = layers.iter().find_map(|layer| match layer.storage {
        Some(Storage::Ints { group, .. }) => Some(if group == layer.shape[1] { -1 } else { group as i64 }),
        _ => None,
    });
    let mut kept: Vec<&str> = layers.iter().filter(|layer| layer.storage.is_none()).map(|layer| layer.name.as_str()).collect();
    kept.extend(carried.iter().map(String::as_str));
    if !kept.contains(&"lm_head") {
        kept.push("lm_head");
    }
    json!({
        "quant_method": "awq",
        "bits": 4,
        "group_size": group.unwrap_or(128),
        "zero_point": true,
        "version": "gemm",
        "modules_to_not_convert": kept,
    })
}

/// Reads linear layers in AWQ packing; those that are not packed are plain.
#[derive(Debug)]
pub struct Awq;

impl Awq {
    /// Reads the quantization section of a config.json.
    ///
    /// # Errors
    /// When it is not the gemm version of 4 bits.
    pub fn read(config: &Value) -> Result<Self> {
        let (bits, version) = (config["bits"].as_u64().or(config["w_bit"].as_u64()), config["version"].as_str().unwrap_or("gemm"));
        if bits == Some(4) && version.eq_ignore_ascii_case("gemm") {
            return Ok(Self);
        }
        Err(Error::input(format!(
            "config.json: quantization_config: awq version `{}` of {} bits is not read by this version, only gemm of 4 bits",
            shown(version),
            bits.map_or("?".into(), |bits| bits.to_string())
        )))
    }

    /// Groups of a layer, and the float of its scales.
    fn layout(&self, checkpoint: &Checkpoint, name: &str, [rows, columns]: [usize; 2]) -> Result<(usize, Float)> {
        let wrong = |suffix: &str, what: String| Error::input(what).tensor(&format!("{name}.{suffix}")).file(&checkpoint.folder);
        let info = |suffix: &str| {
            let info = checkpoint.info(&format!("{name}.{suffix}"));
            info.ok_or_else(|| wrong(suffix, "missing; the checkpoint is incomplete".into()))
        };
        let scales = info("scales")?;
        let groups = scales.shape.first().copied().unwrap_or(0);
        let float = float_of(scales.dtype).filter(|_| scales.shape == [groups, rows] && groups > 0 && columns % groups == 0);
        let float = float.ok_or_else(|| {
            let (dtype, shape) = (scales.dtype, &scales.shape);
            wrong(
                "scales",
                format!("is {dtype:?} {shape:?}, floats of shape [groups, {rows}] are needed, with groups a divisor of {columns}"),
            )
        })?;
        for (suffix, needed) in [("qweight", [columns, rows / 8]), ("qzeros", [groups, rows / 8])] {
            let info = info(suffix)?;
            if info.dtype != Dtype::I32 || info.shape != needed || rows % 8 != 0 {
                let what = format!("is {:?} {:?}, I32 {needed:?} is needed for {rows} outputs of {columns} inputs", info.dtype, info.shape);
                return Err(wrong(suffix, what));
            }
        }
        Ok((groups, float))
    }
}

impl Source for Awq {
    fn shape(&self, checkpoint: &Checkpoint, name: &str) -> Option<[usize; 2]> {
        let Some(weight) = checkpoint.info(&format!("{name}.qweight")) else { return Plain.shape(checkpoint, name) };
        let &[columns, words] = weight.shape.as_slice() else { return None };
        Some([words.checked_mul(8)?, columns])
    }

    fn tensors(&self, checkpoint: &Checkpoint, name: &str) -> Vec<String> {
        present(checkpoint, name, &["weight", "qweight", "qzeros", "scales"])
    }

    fn check(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<()> {
        if checkpoint.has(&format!("{name}.weight")) { Ok(()) } else { self.layout(checkpoint, name, shape).map(drop) }
    }

    fn weight(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<Weight> {
        if checkpoint.has(&format!("{name}.weight")) {
            return Plain.weight(checkpoint, name, shape);
        }
        let ((groups, scale_float), [rows, columns]) = (self.layout(checkpoint, name, shape)?, shape);
        let scales = scales(checkpoint, &format!("{name}.scales"), scale_float)?;
        let read = |suffix: &str| Ok::<_, Error>(transposed(&codes(&checkpoint.bytes(&format!("{name}.{suffix}"))?), rows));
        let (codes, zeros) = (read("qweight")?, read("qzeros")?);
        let scales = transposed(&scales, rows);
        Ok(Weight::Ints(Ints { rows, columns, bits: 4, group: columns / groups, codes, scales, scale_float, zeros: Some(zeros) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_stand_in_their_order() {
        let word = nibbles(&[0, 1, 2, 3, 4, 5, 6, 7]);
        // Columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble on.
        assert_eq!(u32::from_le_bytes(word.as_slice().try_into().unwrap()), 0x7531_6420);
        assert_eq!(codes(&word), [0, 1, 2, 3, 4, 5, 6, 7]);
    }
}
