//! Which layers may be compressed.

use safetensors::Dtype;

use crate::checkpoint::source::{Source, shared};
use crate::checkpoint::{Checkpoint, float_of};
use crate::error::{Error, Result};
use crate::model::mixture::Which;
use crate::model::{Model, config};
use crate::plan::Candidate;
use crate::weight::Float;

/// Pieces of names that are never compressed in a model that is not known.
const UNTOUCHED: &[&str] = &[
    "embed",
    "wte",
    "wpe",
    "norm",
    "lm_head",
    "head.",
    "router",
    "gate.weight",
    "shared_expert_gate",
    "conv",
    "in_proj_a",
    "in_proj_b",
    "A_log",
    "x_proj",
    "dt_proj",
    "rotary",
    "position",
    "relative",
    "visual",
    "vision",
    "mtp",
    "score",
    "classifier",
    "bias",
];

/// The linear layers of a model: by its description where it is known, else by name and shape.
///
/// # Errors
/// When the weights are stored in a way that is known not to work.
pub fn candidates(checkpoint: &Checkpoint, source: &dyn Source, model: Option<&Model<'_>>) -> Result<Vec<Candidate>> {
    let Some(model) = model else { return by_name(checkpoint, source) };
    let mut candidates = Vec::new();
    for index in 0..model.config.layers.len() {
        for module in model.modules(index) {
            let float = float(checkpoint, source, &module.name);
            let expert = matches!(module.expert, Some(Which::Routed(_)));
            candidates.push(Candidate { shape: module.shape, name: module.name, float, expert });
        }
    }
    Ok(candidates)
}

/// The number format of a layer's floats; that of the model where the layer has none.
fn float(checkpoint: &Checkpoint, source: &dyn Source, name: &str) -> Float {
    let of = |tensor: &str| checkpoint.info(tensor).and_then(|info| float_of(info.dtype));
    // The layer's own tensor, or the one that it shares with others.
    let own = of(&format!("{name}.weight")).or_else(|| of(&shared(source, checkpoint, name)?));
    let decoder = config::decoder(&checkpoint.config);
    let said = [&checkpoint.config, decoder.as_ref()].into_iter().flat_map(|config| ["dtype", "torch_dtype"].map(|key| config.get(key)));
    let named = said.flatten().find_map(|value| value.as_str());
    own.unwrap_or(match named {
        Some("float16") => Float::F16,
        Some("float32") => Float::F32,
        _ => Float::BF16,
    })
}

fn by_name(checkpoint: &Checkpoint, source: &dyn Source) -> Result<Vec<Candidate>> {
    let model_type = config::model_type(&checkpoint.config);
    if ["gpt2", "openai-gpt", "imagegpt", "gpt_oss"].contains(&model_type) {
        return Err(Error::input(format!(
            "model_type `{model_type}` stores its matrices transposed, which no integer format of this version holds"
        ))
        .file(&checkpoint.folder));
    }
    let numbered = |name: &str| name.split('.').any(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()));
    let candidates = checkpoint.names().filter_map(|tensor| {
        let name = [".weight", ".weight_packed", ".qweight"].iter().find_map(|suffix| tensor.strip_suffix(suffix))?;
        let shape = source.shape(checkpoint, name)?;
        let whole = !tensor.ends_with(".weight")
            || checkpoint.info(tensor).is_some_and(|info| float_of(info.dtype).is_some() || info.dtype == Dtype::F8_E4M3);
        let float = float(checkpoint, source, name);
        let linear = numbered(name) && shape[0] > 1 && shape[1] > 1 && !UNTOUCHED.iter().any(|piece| tensor.contains(piece));
        (linear && whole).then(|| Candidate { name: name.into(), shape, float, expert: false })
    });
    Ok(candidates.collect())
}
