//! compressed-tensors `pack-quantized`: integers of 2 to 8 bits as dense bit streams (formats A1). Loads in
//! transformers and vLLM. Reading also takes the older padded layout of 3, 5, 6 and 7 bits.

use std::collections::{BTreeMap, BTreeSet};

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::checkpoint::decode::encode;
use crate::checkpoint::source::{Plain, Source, present};
use crate::checkpoint::{Checkpoint, dtype_of, float_of};
use crate::error::{Error, Result, shown};
use crate::formats::{Entry, Format, bitstream, scales};
use crate::weight::{Float, Ints, Outlined, Storage, Weight};

/// The format.
pub const FORMAT: Format = Format {
    name: "compressed-tensors",
    about: "packed integers (pack-quantized). Loads in transformers and vLLM",
    scales: None,
    holds,
    entries,
    encode: encode_weight,
    config: |layers, carried| Some(config(layers, carried)),
    files: |_| Vec::new(),
};

fn holds(layer: &Outlined) -> Result<(), String> {
    match layer.storage {
        Some(Storage::Ints { .. }) | None => Ok(()),
        Some(storage @ Storage::Trits { .. }) => {
            Err(format!("compressed-tensors has no place for {storage}; use --format dense, or tied = true, which leaves 4-bit integers"))
        }
        Some(storage @ Storage::Super(_)) => Err(format!("{storage} is a type of GGUF files; use --format gguf")),
        Some(storage @ Storage::Split { .. }) => {
            Err(format!("compressed-tensors has one scale per group, {storage} has two; use --format dense, or storage = \"bounds\""))
        }
        Some(storage) => {
            Err(format!("compressed-tensors holds integers, not {storage} weights; use --format dense, or add a quantizing stage"))
        }
    }
}

fn entries(layer: &Outlined) -> Vec<Entry> {
    let Some(Storage::Ints { bits, group, symmetric }) = layer.storage else { return Vec::new() };
    let [rows, columns] = layer.shape;
    let groups = columns.div_ceil(group);
    let entry = |suffix: &str, dtype, shape| Entry { name: format!("{}.weight_{suffix}", layer.name), dtype, shape };
    let mut entries = vec![
        entry("packed", Dtype::I32, vec![rows, bitstream::words(columns, bits)]),
        entry("scale", dtype_of(layer.float), vec![rows, groups]),
        entry("shape", Dtype::I64, vec![2]),
    ];
    if !symmetric {
        entries.push(entry("zero_point", Dtype::I32, vec![bitstream::words(rows, bits), groups]));
    }
    entries
}

fn encode_weight(weight: &Weight, float: Float) -> Vec<Vec<u8>> {
    let Weight::Ints(ints) = weight else { return Vec::new() };
    let shape = [ints.rows, ints.columns].into_iter().flat_map(|size| (size as i64).to_le_bytes()).collect();
    let mut tensors = vec![bitstream::pack_rows(&ints.codes, ints.columns, ints.bits), encode(float, &ints.scales), shape];
    if let Some(zeros) = &ints.zeros {
        tensors.push(pack_columns(zeros, ints.groups(), ints.bits));
    }
    tensors
}

/// Packs `rows × groups` zero points along the rows: every group's column is a stream of its own.
fn pack_columns(zeros: &[u8], groups: usize, bits: u8) -> Vec<u8> {
    let rows = zeros.len() / groups.max(1);
    let words = bitstream::words(rows, bits);
    let mut out = vec![0; 4 * words * groups];
    let (mut column, mut stream) = (vec![0; rows], vec![0; 4 * words]);
    for group in 0..groups {
        column.iter_mut().enumerate().for_each(|(row, code)| *code = zeros[row * groups + group]);
        stream.fill(0);
        bitstream::pack(&column, bits, &mut stream);
        for (word, bytes) in stream.chunks_exact(4).enumerate() {
            out[4 * (word * groups + group)..][..4].copy_from_slice(bytes);
        }
    }
    out
}

fn unpack_columns(bytes: &[u8], rows: usize, groups: usize, bits: u8) -> Vec<u8> {
    let words = bitstream::words(rows, bits);
    let mut zeros = vec![0; rows * groups];
    let (mut column, mut stream) = (vec![0; rows], vec![0; 4 * words]);
    for group in 0..groups {
        for (word, out) in stream.chunks_exact_mut(4).enumerate() {
            out.copy_from_slice(&bytes[4 * (word * groups + group)..][..4]);
        }
        bitstream::unpack(&stream, bits, &mut column);
        column.iter().enumerate().for_each(|(row, &code)| zeros[row * groups + group] = code);
    }
    zeros
}

/// One quantization scheme: bits, group size (`None` for one scale per row), symmetric.
type Scheme = (u8, Option<usize>, bool);

/// `quantization_config`. One scheme for everything targets the class Linear; several target their layers by name.
fn config(layers: &[Outlined], carried: &[String]) -> Value {
    let whole_rows = |layer: &&Outlined| matches!(layer.storage, Some(Storage::Ints { group, .. }) if group < layer.shape[1]);
    let sizes: BTreeSet<usize> = layers.iter().filter(whole_rows).filter_map(|layer| ints(layer).map(|(_, group, _)| group)).collect();
    let mut schemes: BTreeMap<Scheme, Vec<&str>> = BTreeMap::new();
    let mut ignore = Vec::new();
    for layer in layers {
        match ints(layer) {
            Some((bits, group, symmetric)) => {
                let group = (group < layer.shape[1] || sizes.contains(&group)).then_some(group);
                schemes.entry((bits, group, symmetric)).or_default().push(&layer.name);
            }
            None => ignore.push(layer.name.clone()),
        }
    }
    ignore.extend(carried.iter().cloned());
    if !ignore.iter().any(|name| name == "lm_head") {
        ignore.push("lm_head".into());
    }
    let single = schemes.len() == 1;
    let groups: serde_json::Map<String, Value> = schemes
        .iter()
        .enumerate()
        .map(|(number, (&scheme, names))| (format!("group_{number}"), group(scheme, if single { json!(["Linear"]) } else { json!(names) })))
        .collect();
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": null,
        "kv_cache_scheme": null,
        "ignore": ignore,
        "config_groups": groups,
    })
}

fn ints(layer: &Outlined) -> Option<(u8, usize, bool)> {
    match layer.storage {
        Some(Storage::Ints { bits, group, symmetric }) => Some((bits, group, symmetric)),
        _ => None,
    }
}

fn group((bits, group, symmetric): Scheme, targets: Value) -> Value {
    json!({
        "targets": targets,
        "format": "pack-quantized",
        "input_activations": null,
        "output_activations": null,
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": if group.is_some() { "group" } else { "channel" },
            "group_size": group,
            "dynamic": false,
            "actorder": null,
            "block_structure": null,
            "observer": "minmax",
            "observer_kwargs": {},
        },
    })
}

/// Reads `pack-quantized` linear layers; those that are not packed are plain.
#[derive(Debug)]
pub struct PackQuantized {
    groups: Vec<(Vec<Target>, Scheme)>,
}

#[derive(Debug)]
enum Target {
    Exact(String),
    Pattern(regex::Regex),
    AnyLinear,
}

/// How the tensors of one packed layer are laid out.
struct Layout {
    scheme: Scheme,
    group: usize,
    groups: usize,
    /// Words per row.
    words: usize,
    scale_float: Float,
}

impl PackQuantized {
    /// Reads the quantization section of a config.json.
    ///
    /// # Errors
    /// When a group is not weight-only integers in the format pack-quantized.
    pub fn read(config: &Value) -> Result<Self> {
        let wrong = |what: String| Error::input(format!("config.json: quantization_config: {what}"));
        let groups = config["config_groups"].as_object().ok_or_else(|| wrong("config_groups is missing".into()))?;
        let mut read = Vec::new();
        for (name, group) in groups {
            let name = shown(name);
            let format = group["format"].as_str().or(config["format"].as_str()).unwrap_or("?");
            if format != "pack-quantized" {
                return Err(wrong(format!("{name}: format `{}` is not read by this version, only pack-quantized", shown(format))));
            }
            let scheme = scheme(&group["weights"]).map_err(|what| wrong(format!("{name}: {what}")))?;
            let targets = group["targets"].as_array().ok_or_else(|| wrong(format!("{name}: targets is missing")))?;
            let target = |target: &Value| match target.as_str() {
                Some("Linear") => Ok(Target::AnyLinear),
                Some(name) => match name.strip_prefix("re:") {
                    Some(pattern) => {
                        regex::Regex::new(&format!("^(?:{pattern})")).map(Target::Pattern).map_err(|error| wrong(error.to_string()))
                    }
                    None => Ok(Target::Exact(name.into())),
                },
                None => Err(wrong(format!("{name}: a target is not a string"))),
            };
            read.push((targets.iter().map(target).collect::<Result<_>>()?, scheme));
        }
        Ok(Self { groups: read })
    }

    /// A reader of one layer whose scheme is known.
    pub fn one(name: &str, bits: u8, group: usize, symmetric: bool) -> Self {
        Self { groups: vec![(vec![Target::Exact(name.into())], (bits, Some(group), symmetric))] }
    }

    fn scheme(&self, name: &str) -> Option<Scheme> {
        let class = |targets: &[Target]| targets.iter().any(|target| matches!(target, Target::AnyLinear));
        let named = |targets: &[Target]| {
            targets.iter().any(|target| match target {
                Target::Exact(exact) => exact == name,
                Target::Pattern(pattern) => pattern.is_match(name),
                Target::AnyLinear => false,
            })
        };
        let find = |test: &dyn Fn(&[Target]) -> bool| self.groups.iter().find(|(targets, _)| test(targets)).map(|&(_, scheme)| scheme);
        find(&named).or_else(|| find(&class))
    }

    /// Checks the tensors of a packed layer against its scheme, from headers alone.
    fn layout(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<Layout> {
        let wrong = |suffix: &str, what: String| Error::input(what).tensor(&format!("{name}.weight_{suffix}")).file(&checkpoint.folder);
        let info = |suffix: &str| {
            let info = checkpoint.info(&format!("{name}.weight_{suffix}"));
            info.ok_or_else(|| wrong(suffix, "missing; the checkpoint is incomplete".into()))
        };
        if checkpoint.has(&format!("{name}.weight_g_idx")) {
            return Err(wrong("g_idx", "activation order by group is not supported; export it with static groups".into()));
        }
        let scheme = self.scheme(name).ok_or_else(|| wrong("packed", "no group of quantization_config targets this layer".into()))?;
        let ((bits, group, symmetric), [rows, columns]) = (scheme, shape);
        let group = group.unwrap_or(columns);
        let groups = columns.div_ceil(group);
        let (packed, scale) = (info("packed")?, info("scale")?);
        let (dense, padded) = (bitstream::words(columns, bits), columns.div_ceil(32 / usize::from(bits)));
        let words = packed.shape.get(1).copied().unwrap_or(0);
        if packed.dtype != Dtype::I32 || packed.shape != [rows, words] || ![dense, padded].contains(&words) {
            let (dtype, found) = (packed.dtype, &packed.shape);
            return Err(wrong("packed", format!("is {dtype:?} {found:?}, {bits} bits of {shape:?} need I32 [{rows}, {dense}]")));
        }
        let scale_float = float_of(scale.dtype).filter(|_| scale.shape == [rows, groups]);
        let scale_float = scale_float.ok_or_else(|| {
            wrong("scale", format!("is {:?} {:?}, groups of {group} need floats of shape [{rows}, {groups}]", scale.dtype, scale.shape))
        })?;
        if !symmetric {
            let (zero, needed) = (info("zero_point")?, [bitstream::words(rows, bits), groups]);
            if zero.dtype != Dtype::I32 || zero.shape != needed {
                return Err(wrong("zero_point", format!("is {:?} {:?}, it must be I32 {needed:?}", zero.dtype, zero.shape)));
            }
        }
        Ok(Layout { scheme, group, groups, words, scale_float })
    }
}

/// The scheme of a group's `weights`.
fn scheme(weights: &Value) -> Result<Scheme, String> {
    let known = |key: &str| shown(&weights[key].to_string());
    let bits = weights["num_bits"].as_u64().and_then(|bits| u8::try_from(bits).ok()).filter(|bits| (2..=8).contains(bits));
    let bits = bits.ok_or_else(|| format!("num_bits is {}, it must be 2 to 8", known("num_bits")))?;
    if weights.get("type").is_some_and(|kind| !kind.is_null() && kind != "int") {
        return Err(format!("type is {}, this version reads int", known("type")));
    }
    let symmetric = weights["symmetric"].as_bool().unwrap_or(true);
    let group = match weights["strategy"].as_str() {
        Some("channel") => None,
        Some("group") | None => match weights["group_size"].as_i64() {
            Some(-1) | None if weights["strategy"].is_null() => None,
            Some(size @ 1..=1_048_576) => Some(size as usize),
            _ => return Err(format!("group_size is {}, it must be 1 to 1048576", known("group_size"))),
        },
        Some(_) => return Err(format!("strategy {} is not read by this version, only group and channel", known("strategy"))),
    };
    Ok((bits, group, symmetric))
}

impl Source for PackQuantized {
    fn shape(&self, checkpoint: &Checkpoint, name: &str) -> Option<[usize; 2]> {
        let Some(info) = checkpoint.info(&format!("{name}.weight_shape")) else { return Plain.shape(checkpoint, name) };
        if info.dtype != Dtype::I64 || info.shape != [2] {
            return None;
        }
        let bytes = checkpoint.bytes(&format!("{name}.weight_shape")).ok()?;
        let sizes: Vec<usize> = bytes
            .as_chunks::<8>()
            .0
            .iter()
            .filter_map(|size| usize::try_from(i64::from_le_bytes(*size)).ok().filter(|&size| size <= 1 << 31))
            .collect();
        sizes.as_slice().try_into().ok()
    }

    fn tensors(&self, checkpoint: &Checkpoint, name: &str) -> Vec<String> {
        present(checkpoint, name, &["weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"])
    }

    fn check(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<()> {
        if checkpoint.has(&format!("{name}.weight")) { Ok(()) } else { self.layout(checkpoint, name, shape).map(drop) }
    }

    fn weight(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<Weight> {
        if checkpoint.has(&format!("{name}.weight")) {
            return Plain.weight(checkpoint, name, shape);
        }
        let Layout { scheme: (bits, _, symmetric), group, groups, words, scale_float } = self.layout(checkpoint, name, shape)?;
        let [rows, columns] = shape;
        let scales = scales(checkpoint, &format!("{name}.weight_scale"), scale_float)?;
        let mut codes = vec![0; rows * columns];
        let bytes = checkpoint.bytes(&format!("{name}.weight_packed"))?;
        let unpack = if words == bitstream::words(columns, bits) { bitstream::unpack } else { bitstream::unpack_padded };
        for (codes, bytes) in codes.chunks_exact_mut(columns).zip(bytes.chunks_exact(4 * words)) {
            unpack(bytes, bits, codes);
        }
        let zeros = || Ok(unpack_columns(&checkpoint.bytes(&format!("{name}.weight_zero_point"))?, rows, groups, bits));
        let zeros = if symmetric { None } else { Some(zeros()?) };
        Ok(Weight::Ints(Ints { rows, columns, bits, group, codes, scales, scale_float, zeros }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(name: &str, shape: [usize; 2], storage: Option<Storage>) -> Outlined {
        Outlined { name: name.into(), shape, storage, float: Float::BF16 }
    }

    #[test]
    fn one_scheme_targets_linear_and_several_target_names() {
        let ints = |group| Some(Storage::Ints { bits: 4, group, symmetric: true });
        let layers = [layer("a", [4, 128], ints(128)), layer("b", [4, 256], ints(128)), layer("c", [4, 256], None)];
        let found = config(&layers, &["router".to_string()]);
        assert_eq!(found["config_groups"]["group_0"]["targets"], json!(["Linear"]));
        assert_eq!(found["config_groups"]["group_0"]["weights"]["group_size"], 128);
        assert_eq!(found["ignore"], json!(["c", "router", "lm_head"]));
        let layers = [layer("a", [4, 64], ints(64)), layer("b", [4, 172], ints(86))];
        let found = config(&layers, &["router".to_string()]);
        assert_eq!(found["config_groups"]["group_0"]["targets"], json!(["a"]));
        assert_eq!(found["config_groups"]["group_0"]["weights"]["strategy"], "channel");
        assert_eq!(found["config_groups"]["group_1"]["targets"], json!(["b"]));
    }

    #[test]
    fn zero_points_pack_along_the_rows_and_come_back() {
        let zeros: Vec<u8> = (0..11 * 3).map(|i| i * 5 % 8).collect();
        let packed = pack_columns(&zeros, 3, 3);
        assert_eq!(packed.len(), 4 * 2 * 3);
        assert_eq!(unpack_columns(&packed, 11, 3, 3), zeros);
        assert_eq!(pack_columns(&[1, 2, 3, 4], 2, 8)[..8], [1, 3, 0, 0, 2, 4, 0, 0]);
    }

    #[test]
    fn targets_match_by_name_pattern_and_class() {
        let group = |targets: Value, bits: u8| json!({"targets": targets, "format": "pack-quantized", "weights": {"num_bits": bits, "strategy": "channel"}});
        let config = json!({"config_groups": {"x": group(json!(["Linear"]), 4), "y": group(json!(["re:.*down_proj", "a.b"]), 8)}});
        let read = PackQuantized::read(&config).unwrap();
        let bits = |name: &str| read.scheme(name).map(|(bits, _, _)| bits);
        assert_eq!((bits("m.q_proj"), bits("m.down_proj"), bits("a.b")), (Some(4), Some(8), Some(8)));
        let wrong = json!({"config_groups": {"x": {"targets": ["Linear"], "format": "float-quantized", "weights": {"num_bits": 8}}}});
        assert!(PackQuantized::read(&wrong).unwrap_err().to_string().contains("float-quantized"));
    }
}
