//! GPTQ packing: integers of 2, 3, 4 or 8 bits as bit streams along the inputs, a column of words per output (formats
//! A2), and AutoRound's packing, which is the same bytes with a configuration of its own (A4).
//!
//! The first version stores zero points less one, so it has no room for zero points of 0 and holds symmetric grids only;
//! the second one stores them as they are.

use std::collections::BTreeMap;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::decode::encode;
use crate::checkpoint::float_of;
use crate::checkpoint::source::{Plain, Source, present};
use crate::error::{Error, Result, shown};
use crate::formats::words::{WORD_CODES, packed_columns, transposed, unpacked_columns};
use crate::formats::{Entry, Format, bitstream, scales};
use crate::weight::{Float, Ints, Outlined, Storage, Weight};

/// GPTQ, first version.
pub const FORMAT: Format = Format {
    name: "gptq",
    about: "symmetric 2, 3, 4 or 8 bits. Loads in vLLM and SGLang (4 and 8), transformers with gptqmodel, mistral.rs",
    scales: Some(Float::F16),
    holds: |layer| holds(layer, "gptq", true),
    entries: |layer| entries(layer, true),
    encode: |weight, _| encode_weight(weight, 1, true),
    config: |layers, _| Some(config(layers, "gptq")),
    files: |section| vec![("quantize_config.json", section.clone())],
};

/// GPTQ, second version.
pub const SECOND: Format = Format {
    name: "gptq_v2",
    about: "2, 3, 4 or 8 bits, also with zero points. Loads in transformers with gptqmodel",
    holds: |layer| holds(layer, "gptq_v2", false),
    encode: |weight, _| encode_weight(weight, 0, true),
    config: |layers, _| Some(config(layers, "gptq_v2")),
    ..FORMAT
};

/// AutoRound's packing of symmetric integers.
pub const AUTO_ROUND: Format = Format {
    name: "auto-round",
    about: "the bytes of gptq with AutoRound's configuration. Loads in transformers with auto-round, vLLM and SGLang",
    holds: |layer| holds(layer, "auto-round", true),
    entries: |layer| entries(layer, false),
    encode: |weight, _| encode_weight(weight, 1, false),
    config: |layers, _| Some(auto_round_config(layers)),
    files: |_| Vec::new(),
    ..FORMAT
};

fn holds(layer: &Outlined, name: &str, symmetric_only: bool) -> Result<(), String> {
    let [rows, columns] = layer.shape;
    match layer.storage {
        None => Ok(()),
        Some(Storage::Ints { symmetric: false, .. }) if symmetric_only => {
            Err(format!("{name} holds symmetric integers; use --format gptq_v2, awq or compressed-tensors, or symmetric = true"))
        }
        Some(Storage::Ints { bits, .. }) if ![2, 3, 4, 8].contains(&bits) => {
            Err(format!("{name} holds 2, 3, 4 or 8 bits, not {bits}; use --format compressed-tensors"))
        }
        Some(Storage::Ints { group, .. }) if rows % WORD_CODES != 0 || columns % WORD_CODES != 0 || columns % group != 0 => Err(format!(
            "{name} needs outputs and inputs in multiples of 32 and whole groups, the layer is {rows} x {columns} in groups of {group}; \
             use --format compressed-tensors"
        )),
        Some(Storage::Ints { .. }) => Ok(()),
        Some(storage) => Err(format!("{name} holds integers, not {storage} weights; use --format dense, or add a quantizing stage")),
    }
}

fn entries(layer: &Outlined, index: bool) -> Vec<Entry> {
    let Some(Storage::Ints { bits, group, .. }) = layer.storage else { return Vec::new() };
    let [rows, columns] = layer.shape;
    let groups = columns.div_ceil(group);
    let entry = |suffix: &str, dtype, shape| Entry { name: format!("{}.{suffix}", layer.name), dtype, shape };
    let mut entries = vec![
        entry("qweight", Dtype::I32, vec![bitstream::words(columns, bits), rows]),
        entry("qzeros", Dtype::I32, vec![groups, bitstream::words(rows, bits)]),
        entry("scales", Dtype::F16, vec![groups, rows]),
    ];
    if index {
        entries.push(entry("g_idx", Dtype::I32, vec![columns]));
    }
    entries
}

/// `less` is what stored zero points are less than the real ones.
fn encode_weight(weight: &Weight, less: u8, index: bool) -> Vec<Vec<u8>> {
    let Weight::Ints(ints) = weight else { return Vec::new() };
    let (groups, mask) = (ints.groups(), ((1u32 << ints.bits) - 1) as u8);
    let zeros = match &ints.zeros {
        Some(zeros) => transposed(zeros, groups),
        None => vec![ints.middle(); ints.rows * groups],
    };
    let stored: Vec<u8> = zeros.iter().map(|zero| zero.wrapping_sub(less) & mask).collect();
    let mut tensors = vec![
        packed_columns(&ints.codes, ints.columns, ints.bits),
        bitstream::pack_rows(&stored, ints.rows, ints.bits),
        encode(Float::F16, &transposed(&ints.scales, groups)),
    ];
    if index {
        tensors.push((0..ints.columns).flat_map(|column| ((column / ints.group) as i32).to_le_bytes()).collect());
    }
    tensors
}

/// One scheme: bits, group size (-1 for whole rows), symmetric.
type Scheme = (u8, i64, bool);

fn scheme_of(layer: &Outlined) -> Option<Scheme> {
    match layer.storage {
        Some(Storage::Ints { bits, group, symmetric }) => Some((bits, if group == layer.shape[1] { -1 } else { group as i64 }, symmetric)),
        _ => None,
    }
}

/// The scheme of most layers, and those of the others by layer; `None` is a layer that stays as it is.
fn common(layers: &[Outlined]) -> (Scheme, Vec<(&str, Option<Scheme>)>) {
    let mut counts: BTreeMap<Scheme, usize> = BTreeMap::new();
    layers.iter().filter_map(scheme_of).for_each(|scheme| *counts.entry(scheme).or_default() += 1);
    let common = counts.iter().max_by_key(|(_, count)| **count).map_or((4, -1, true), |(&scheme, _)| scheme);
    let others = layers.iter().map(|layer| (layer.name.as_str(), scheme_of(layer))).filter(|(_, scheme)| *scheme != Some(common));
    (common, others.collect())
}

fn config(layers: &[Outlined], version: &str) -> Value {
    let ((bits, group, symmetric), others) = common(layers);
    let mut dynamic = Map::new();
    for (name, scheme) in others.iter().filter(|(name, _)| *name != "lm_head") {
        let (key, value) = match scheme {
            Some((bits, group, symmetric)) => ("+", json!({"bits": bits, "group_size": group, "sym": symmetric})),
            None => ("-", json!({})),
        };
        dynamic.insert(format!("{key}:^{}$", regex::escape(name)), value);
    }
    let mut config = json!({
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": false,
        "sym": symmetric,
        "lm_head": layers.iter().any(|layer| layer.name == "lm_head" && layer.storage.is_some()),
        "checkpoint_format": version,
        "pack_dtype": "int32",
    });
    if !dynamic.is_empty() {
        config["dynamic"] = Value::Object(dynamic);
    }
    config
}

fn auto_round_config(layers: &[Outlined]) -> Value {
    let ((bits, group, symmetric), others) = common(layers);
    let mut extra = Map::new();
    for (name, scheme) in others {
        let value = match scheme {
            Some((bits, group, symmetric)) => json!({"bits": bits, "group_size": group, "sym": symmetric, "data_type": "int"}),
            None => json!({"bits": 16, "data_type": "float"}),
        };
        extra.insert(name.to_owned(), value);
    }
    // Blocks are numbered: what stands before the number is the list of blocks.
    let block = |name: &str| {
        let parts: Vec<&str> = name.split('.').collect();
        let number = parts.iter().position(|part| part.parse::<usize>().is_ok())?;
        Some(parts[..number].join("."))
    };
    let blocks = layers.iter().filter(|layer| layer.storage.is_some()).find_map(|layer| block(&layer.name));
    let mut config = json!({
        "quant_method": "auto-round",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
        "block_name_to_quantize": blocks,
    });
    if !extra.is_empty() {
        config["extra_config"] = Value::Object(extra);
    }
    config
}

/// Reads linear layers in GPTQ packing; those that are not packed are plain.
#[derive(Debug)]
pub struct Gptq {
    /// What stored zero points are less than the real ones.
    less: u8,
    /// Bits of every packed layer, where there is one number for all.
    bits: Option<u8>,
    /// Group size of every packed layer, where there is one number for all; −1 stands for whole rows.
    group: Option<i64>,
}

/// How the tensors of one packed layer are laid out.
struct Layout {
    bits: u8,
    group: usize,
    groups: usize,
    scale_float: Float,
}

impl Gptq {
    /// Reads the quantization section of a config.json, by the names of gptq or of auto-round.
    ///
    /// # Errors
    /// When the packing is one that this program does not read.
    pub fn read(config: &Value) -> Result<Self> {
        let version = config["checkpoint_format"].as_str().unwrap_or("gptq");
        let packing = config["packing_format"].as_str().unwrap_or("auto_round:auto_gptq");
        let bits = match &config["bits"] {
            Value::Null => None,
            value => match value.as_u64() {
                Some(bits @ 2..=8) => Some(bits as u8),
                _ => {
                    let found = shown(&value.to_string());
                    return Err(Error::input(format!("config.json: quantization_config: bits is {found}, it must be 2 to 8")));
                }
            },
        };
        let group = match &config["group_size"] {
            Value::Null => None,
            value => match value.as_i64() {
                Some(group @ (-1 | 1..=1_048_576)) => Some(group),
                _ => {
                    let what = format!("group_size is {}, it must be -1 or 1 to 1048576", shown(&value.to_string()));
                    return Err(Error::input(format!("config.json: quantization_config: {what}")));
                }
            },
        };
        let one = config["dynamic"].is_null() && config["extra_config"].is_null();
        let (bits, group) = (bits.filter(|_| one), group.filter(|_| one));
        match (version, packing) {
            ("gptq", "auto_round:auto_gptq") => Ok(Self { less: 1, bits, group }),
            ("gptq_v2", "auto_round:auto_gptq") | ("gptq", "auto_round" | "auto_round:gptqmodel") => Ok(Self { less: 0, bits, group }),
            ("gptq" | "gptq_v2", packing) => Err(Error::input(format!(
                "config.json: quantization_config: packing_format `{}` is not read by this version, only auto_round:auto_gptq",
                shown(packing)
            ))),
            (version, _) => Err(Error::input(format!(
                "config.json: quantization_config: checkpoint_format `{}` is not read by this version, only gptq and gptq_v2",
                shown(version)
            ))),
        }
    }

    /// Checks the tensors of a packed layer against each other, from headers and the index of groups.
    fn layout(&self, checkpoint: &Checkpoint, name: &str, [rows, columns]: [usize; 2]) -> Result<Layout> {
        let wrong = |suffix: &str, what: String| Error::input(what).tensor(&format!("{name}.{suffix}")).file(&checkpoint.folder);
        let info = |suffix: &str| {
            let info = checkpoint.info(&format!("{name}.{suffix}"));
            info.ok_or_else(|| wrong(suffix, "missing; the checkpoint is incomplete".into()))
        };
        let (weight, zeros, scales) = (info("qweight")?, info("qzeros")?, info("scales")?);
        let words = weight.shape.first().copied().unwrap_or(0);
        let bits = [2u8, 3, 4, 8].into_iter().find(|&bits| bitstream::words(columns, bits) == words);
        let bits = bits.filter(|_| weight.dtype == Dtype::I32 && weight.shape == [words, rows]).ok_or_else(|| {
            let (dtype, shape) = (weight.dtype, &weight.shape);
            wrong(
                "qweight",
                format!("is {dtype:?} {shape:?}, {rows} outputs of {columns} inputs in 2, 3, 4 or 8 bits are not of that shape"),
            )
        })?;
        if let Some(said) = self.bits.filter(|&said| said != bits) {
            return Err(wrong("qweight", format!("holds codes of {bits} bits, config.json says {said}")));
        }
        let groups = scales.shape.first().copied().unwrap_or(0);
        let scale_float = float_of(scales.dtype).filter(|_| scales.shape == [groups, rows] && groups > 0 && columns % groups == 0);
        let scale_float = scale_float.ok_or_else(|| {
            wrong(
                "scales",
                format!(
                    "is {:?} {:?}, floats of shape [groups, {rows}] are needed, with groups a divisor of {columns}",
                    scales.dtype, scales.shape
                ),
            )
        })?;
        let said = self.group.map(|size| usize::try_from(size).map_or(1, |size| columns.div_ceil(size)));
        if let Some(said) = said.filter(|&said| said != groups) {
            let size = self.group.unwrap_or_default();
            return Err(wrong("scales", format!("is {:?}, config.json says group_size {size}, which makes {said} groups", scales.shape)));
        }
        let needed = [groups, bitstream::words(rows, bits)];
        if zeros.dtype != Dtype::I32 || zeros.shape != needed {
            return Err(wrong("qzeros", format!("is {:?} {:?}, I32 {needed:?} is needed", zeros.dtype, zeros.shape)));
        }
        let group = columns / groups;
        if let Some(index) = checkpoint.info(&format!("{name}.g_idx")) {
            if index.dtype != Dtype::I32 || index.shape != [columns] {
                return Err(wrong("g_idx", format!("is {:?} {:?}, I32 [{columns}] is needed", index.dtype, index.shape)));
            }
            let bytes = checkpoint.bytes(&format!("{name}.g_idx"))?;
            let in_order = bytes.as_chunks::<4>().0.iter().enumerate().all(|(at, word)| i32::from_le_bytes(*word) == (at / group) as i32);
            if !in_order {
                return Err(wrong("g_idx", "inputs are not in the order of their groups (desc_act); export it with static groups".into()));
            }
        }
        Ok(Layout { bits, group, groups, scale_float })
    }
}

impl Source for Gptq {
    fn shape(&self, checkpoint: &Checkpoint, name: &str) -> Option<[usize; 2]> {
        let Some(weight) = checkpoint.info(&format!("{name}.qweight")) else { return Plain.shape(checkpoint, name) };
        // Words of a stream do not tell how many codes they hold; groups do, of the bits that zero points tell.
        let &[words, rows] = weight.shape.as_slice() else { return None };
        let zero_words = *checkpoint.info(&format!("{name}.qzeros"))?.shape.get(1)?;
        let bits = zero_words.checked_mul(32)? / rows.max(1);
        (bits > 0).then_some([rows, words.checked_mul(32)? / bits.max(1)])
    }

    fn tensors(&self, checkpoint: &Checkpoint, name: &str) -> Vec<String> {
        present(checkpoint, name, &["weight", "qweight", "qzeros", "scales", "g_idx"])
    }

    fn check(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<()> {
        if checkpoint.has(&format!("{name}.weight")) { Ok(()) } else { self.layout(checkpoint, name, shape).map(drop) }
    }

    fn weight(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<Weight> {
        if checkpoint.has(&format!("{name}.weight")) {
            return Plain.weight(checkpoint, name, shape);
        }
        let Layout { bits, group, groups, scale_float } = self.layout(checkpoint, name, shape)?;
        let [rows, columns] = shape;
        let scales = scales(checkpoint, &format!("{name}.scales"), scale_float)?;
        let codes = unpacked_columns(&checkpoint.bytes(&format!("{name}.qweight"))?, rows, columns, bits);
        let mut zeros = vec![0; groups * rows];
        let stream = 4 * bitstream::words(rows, bits);
        for (zeros, bytes) in zeros.chunks_exact_mut(rows).zip(checkpoint.bytes(&format!("{name}.qzeros"))?.chunks_exact(stream)) {
            bitstream::unpack(bytes, bits, zeros);
        }
        let (mask, middle) = (((1u32 << bits) - 1) as u8, 1u8 << (bits - 1));
        zeros.iter_mut().for_each(|zero| *zero = zero.wrapping_add(self.less) & mask);
        let symmetric = zeros.iter().all(|&zero| zero == middle);
        let zeros = (!symmetric).then(|| transposed(&zeros, rows));
        let scales = transposed(&scales, rows);
        Ok(Weight::Ints(Ints { rows, columns, bits, group, codes, scales, scale_float, zeros }))
    }
}
