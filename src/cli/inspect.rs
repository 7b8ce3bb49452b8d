//! `inspect`: the verb is small enough to be its own page.

use std::collections::BTreeMap;

use serde_json::json;

use crate::checkpoint::Checkpoint;
use crate::cli::Invocation;
use crate::cli::arguments::Inspect;
use crate::cli::text::{say, say_json, table};
use crate::compress::gguf::unpack::Unpacked;
use crate::compress::layers::candidates;
use crate::error::{Error, Result, shown, shown_path};
use crate::formats;
use crate::model::config::Config;
use crate::model::{self, Model, config};
use crate::report::bytes;

/// Runs the verb.
///
/// # Errors
/// When the folder is not a sound checkpoint.
pub fn run(arguments: &Inspect, invocation: &Invocation) -> Result<()> {
    let unpacked = Unpacked::open(&arguments.model, &std::env::temp_dir())?;
    let named = |error: Error| if unpacked.folder() == arguments.model { error } else { error.file(&arguments.model) };
    let checkpoint = Checkpoint::open(unpacked.folder()).map_err(named)?;
    let known = model::computes(&checkpoint);
    let quantized = formats::quantization(&checkpoint).and_then(|config| config["quant_method"].as_str()).map(shown);
    let source = formats::open(&checkpoint);
    let model = match &source {
        Ok(source) if known => Some(Model::open(&checkpoint, source.as_ref()).map_err(named)?),
        _ => None,
    };
    let linears =
        source.as_ref().ok().and_then(|source| candidates(&checkpoint, source.as_ref(), model.as_ref()).ok()).map(|list| list.len());
    let dtypes = dtypes(&checkpoint);
    let total = dtypes.values().fold((0, 0, 0), |total, row| (total.0 + row.0, total.1 + row.1, total.2 + row.2));
    let model_type = shown(config::model_type(&checkpoint.config));
    if invocation.json {
        let tensors: BTreeMap<&str, _> = checkpoint
            .names()
            .filter_map(|name| Some((name, checkpoint.info(name)?)))
            .map(|(name, info)| (name, json!({"dtype": info.dtype, "shape": info.shape, "bytes": info.bytes()})))
            .collect();
        say_json(&json!({
            "model_type": model_type, "computable": model.is_some(), "quantized": quantized, "parameters": total.1, "bytes": total.2,
            "tensors": total.0, "shards": checkpoint.shards.len(), "linears": linears,
            "blocks": model.as_ref().map(|model| model.config.layers.len()), "tied": checkpoint.config["tie_word_embeddings"],
            "side_files": checkpoint.side_files()?.iter().filter_map(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned()).collect::<Vec<_>>(),
            "tensor_list": if arguments.tensors { json!(tensors) } else { json!(null) },
        }));
        return Ok(());
    }
    say(&format!(
        "{} · {model_type} · {:.1} M parameters · {} in {} file(s)",
        shown_path(&arguments.model),
        total.1 as f64 / 1e6,
        bytes(total.2),
        checkpoint.shards.len()
    ));
    match (&model, &quantized) {
        (Some(model), _) => say(&format!(
            "{} blocks · width {} · MLP {} · {} heads, {} for keys and values, {} columns each · vocabulary {} · {} positions",
            model.config.layers.len(),
            model.config.hidden,
            model.config.intermediate,
            model.config.heads,
            model.config.kv_heads,
            model.config.head_dim,
            model.config.vocabulary,
            model.config.max_positions
        )),
        (None, Some(method)) => say(&format!("quantized by {method}, which this version does not compute")),
        (None, None) => say("this model_type cannot be computed: data-free round-to-nearest works, calibration and perplexity do not"),
    }
    model.iter().flat_map(|model| described(&model.config)).for_each(|line| say(&line));
    if let Some(linears) = linears {
        say(&format!(
            "{linears} linear layers can be compressed; embeddings, head, norms and everything else are carried over as they are"
        ));
    }
    let mut rows = vec![["type", "tensors", "parameters", "bytes"].map(String::from).to_vec()];
    rows.extend(dtypes.iter().map(|(dtype, row)| vec![dtype.clone(), row.0.to_string(), row.1.to_string(), bytes(row.2)]));
    table(&rows).iter().for_each(|line| say(line));
    if arguments.tensors {
        for name in checkpoint.names() {
            if let Some(info) = checkpoint.info(name) {
                say(&format!("{:?}  {:?}  {}", info.dtype, info.shape, shown(name)));
            }
        }
    }
    Ok(())
}

/// Tensors, parameters and bytes by number format.
fn dtypes(checkpoint: &Checkpoint) -> BTreeMap<String, (usize, u64, u64)> {
    let mut dtypes: BTreeMap<String, (usize, u64, u64)> = BTreeMap::new();
    for name in checkpoint.names() {
        if let Some(info) = checkpoint.info(name) {
            let row = dtypes.entry(format!("{:?}", info.dtype)).or_default();
            *row = (row.0 + 1, row.1 + info.entries() as u64, row.2 + info.bytes());
        }
    }
    dtypes
}

/// What a model has that plain ones have not.
fn described(config: &Config) -> Vec<String> {
    let mut lines = Vec::new();
    let linear = config.layers.iter().filter(|layer| layer.linear).count();
    if linear > 0 {
        lines.push(format!("{linear} blocks with a gated delta rule, {} with attention", config.layers.len() - linear));
    }
    if let Some(mixture) = &config.mixture {
        let shared = mixture.shared.map_or(String::new(), |width| format!(" and one of all tokens of {width}"));
        let mixed = config.layers.iter().filter(|layer| layer.mixed).count();
        let (experts, width, chosen) = (mixture.experts, mixture.width, mixture.rule.chosen);
        lines.push(format!("{mixed} blocks are mixtures of {experts} experts of {width}{shared}; a token goes to {chosen}"));
    }
    lines
}
