//! Formats write whichever representation of a weight they find, and read it back. A format is a table of functions;
//! a new one is a file here and a line in [`FORMATS`]. Nothing here computes with tensors.

pub mod awq;
pub mod bitstream;
pub mod compressed_tensors;
pub mod dense;
pub mod float8;
pub mod gguf;
pub mod gptq;
pub mod output;
pub mod targets;
pub mod tritplane;
pub mod words;

use safetensors::Dtype;
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::decode::{decode, nonfinite};
use crate::checkpoint::source::{Plain, Source, Through};
use crate::checkpoint::stacked;
use crate::error::{Error, Result, shown};
use crate::weight::{Float, Outlined, Weight};

/// A tensor of the output, known before any weight is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Full name.
    pub name: String,
    /// Number format.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl Entry {
    /// Bytes of the tensor.
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() as u64 * self.dtype.bitsize() as u64).div_ceil(8)
    }
}

/// A checkpoint format.
pub struct Format {
    /// Name on the command line.
    pub name: &'static str,
    /// What it holds and who loads it, in one line.
    pub about: &'static str,
    /// Number format of the scales of integers where the format has one of its own; else it is the model's.
    pub scales: Option<Float>,
    /// Refuses, with a reason and a way out, a weight that the format cannot hold.
    pub holds: fn(&Outlined) -> Result<(), String>,
    /// The tensors that hold a linear layer.
    pub entries: fn(&Outlined) -> Vec<Entry>,
    /// The bytes of those tensors, in the same order.
    pub encode: fn(&Weight, Float) -> Vec<Vec<u8>>,
    /// What config.json says of the format, as `quantization_config`; `carried` names the other matrices of the model.
    pub config: fn(&[Outlined], carried: &[String]) -> Option<Value>,
    /// Files beside config.json that hold its section too, for older readers.
    pub files: fn(&Value) -> Vec<(&'static str, Value)>,
}

impl std::fmt::Debug for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Format {}", self.name)
    }
}

/// Every format that can be written.
pub const FORMATS: &[&Format] = &[
    &compressed_tensors::FORMAT,
    &dense::FORMAT,
    &gptq::FORMAT,
    &gptq::SECOND,
    &gptq::AUTO_ROUND,
    &awq::FORMAT,
    &gguf::FORMAT,
    &tritplane::FORMAT,
];

/// The format of a name.
///
/// # Errors
/// When there is none, naming those there are.
pub fn find(name: &str) -> Result<&'static Format> {
    FORMATS.iter().copied().find(|format| format.name == name).ok_or_else(|| {
        let known: Vec<&str> = FORMATS.iter().map(|format| format.name).collect();
        Error::input(format!("unknown format `{}`; known are {}", shown(name), known.join(", ")))
    })
}

/// The format of a name for what a plan holds: gptq is of the first version where that has room, else of the second.
///
/// # Errors
/// When there is none of this name, or it cannot hold a layer.
pub fn fitting(name: &str, layers: &[Outlined]) -> Result<&'static Format> {
    let holds =
        |format: &Format| layers.iter().try_for_each(|layer| (format.holds)(layer).map_err(|what| Error::input(what).tensor(&layer.name)));
    let format = find(name)?;
    match holds(format) {
        Ok(()) => Ok(format),
        Err(_) if name == gptq::FORMAT.name && holds(&gptq::SECOND).is_ok() => Ok(&gptq::SECOND),
        Err(error) => Err(error),
    }
}

/// The floats of a tensor of scales, all finite.
///
/// # Errors
/// When one is not, or the tensor cannot be read.
pub fn scales(checkpoint: &Checkpoint, name: &str, float: Float) -> Result<Vec<f32>> {
    let bytes = checkpoint.bytes(name)?;
    let mut scales = vec![0.0; bytes.len() / float.bytes()];
    decode(float, &bytes, &mut scales);
    match nonfinite(&scales) {
        None => Ok(scales),
        Some((first, count)) => {
            let what = format!("{count} scales are NaN or infinite, the first at index {first}");
            Err(Error::input(what).tensor(name).file(&checkpoint.folder))
        }
    }
}

/// How the weights of a checkpoint are read.
///
/// # Errors
/// When the checkpoint is quantized in a way that this version does not read.
pub fn open(checkpoint: &Checkpoint) -> Result<Box<dyn Source>> {
    let apart =
        |source: Box<dyn Source>| -> Box<dyn Source> { if stacked::any(checkpoint) { Box::new(stacked::Stacked(source)) } else { source } };
    let Some(config) = quantization(checkpoint) else { return Ok(apart(Box::new(Plain))) };
    let source = packed(checkpoint, config)?;
    if !checkpoint.names().any(|name| PACKED.iter().any(|end| name.ends_with(end))) {
        let method = shown(config["quant_method"].as_str().unwrap_or("?"));
        let what = format!(
            "config.json says that the model is quantized ({method}), but no tensor is packed; remove quantization_config, or download the weights again"
        );
        return Err(Error::input(what).file(&checkpoint.folder));
    }
    Ok(apart(Box::new(Through::new(source, bounded))))
}

/// Ends of names that only tensors of packed layers have.
const PACKED: [&str; 9] = [
    "_blocks",
    ".qweight",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".trits_coarse",
    ".split_codes",
    ".sparse_values",
    ".weight_shape",
];

/// Refuses a packed weight whose values would not be finite.
fn bounded(weight: Weight) -> Result<Weight> {
    if weight.bound().is_finite() {
        return Ok(weight);
    }
    Err(Error::input("its scales or values are so large that weights are not finite; the model is damaged"))
}

/// The source of a checkpoint that says that it is quantized.
fn packed(checkpoint: &Checkpoint, config: &Value) -> Result<Box<dyn Source>> {
    match config["quant_method"].as_str() {
        Some("tritplane") => Ok(Box::new(tritplane::Tritplane::read(config).map_err(|error| error.file(&checkpoint.folder))?)),
        // Only experts are packed, which are no layers of their own.
        Some("mxfp4") => Ok(Box::new(Plain)),
        Some("fp8") => Ok(Box::new(float8::Float8::read(config).map_err(|error| error.file(&checkpoint.folder))?)),
        Some("compressed-tensors") if float8_groups(config) => Ok(Box::new(float8::Float8::read(config)?)),
        Some("compressed-tensors") => {
            Ok(Box::new(compressed_tensors::PackQuantized::read(config).map_err(|error| error.file(&checkpoint.folder))?))
        }
        Some("gptq" | "auto-round") => Ok(Box::new(gptq::Gptq::read(config).map_err(|error| error.file(&checkpoint.folder))?)),
        Some("awq") => Ok(Box::new(awq::Awq::read(config).map_err(|error| error.file(&checkpoint.folder))?)),
        other => {
            let method = shown(other.unwrap_or("?"));
            Err(Error::input(format!(
                "config.json: quantized by `{method}`, this version reads dense, compressed-tensors, gptq, auto-round, awq, fp8, mxfp4 and tritplane checkpoints"
            ))
            .file(&checkpoint.folder))
        }
    }
}

/// The format in which this program would write what a checkpoint holds; `None` where it writes no such thing.
pub fn of(checkpoint: &Checkpoint) -> Option<&'static Format> {
    let Some(config) = quantization(checkpoint) else { return Some(&dense::FORMAT) };
    match config["quant_method"].as_str()? {
        "compressed-tensors" if !float8_groups(config) => Some(&compressed_tensors::FORMAT),
        "gptq" if config["checkpoint_format"] == "gptq_v2" => Some(&gptq::SECOND),
        "gptq" => Some(&gptq::FORMAT),
        "auto-round" => Some(&gptq::AUTO_ROUND),
        "awq" => Some(&awq::FORMAT),
        "tritplane" => Some(&tritplane::FORMAT),
        _ => None,
    }
}

/// Whether all groups of a compressed-tensors section are floats of 8 bits.
fn float8_groups(config: &Value) -> bool {
    let float8 = |group: &Value| {
        let format = group["format"].as_str().or(config["format"].as_str());
        format == Some("float-quantized") && group["weights"]["num_bits"].as_u64() == Some(8)
    };
    config["config_groups"].as_object().is_some_and(|groups| !groups.is_empty() && groups.values().all(float8))
}

/// Whether a checkpoint has experts of 4-bit floats, which are carried over with what config.json says of them.
pub fn carries_experts(checkpoint: &Checkpoint) -> bool {
    quantization(checkpoint).is_some_and(|config| config["quant_method"] == "mxfp4")
}

/// The quantization section of a checkpoint's config.json.
pub fn quantization(checkpoint: &Checkpoint) -> Option<&Value> {
    ["quantization_config", "compression_config"].iter().filter_map(|key| checkpoint.config.get(*key)).find(|config| !config.is_null())
}

#[cfg(test)]
mod tests;
