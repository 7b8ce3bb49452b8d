//! The model card: README.md beside the weights, with what was done, how good it is, and how to load it.

use std::fmt::Write;
use std::path::Path;

use crate::checkpoint::Checkpoint;
use crate::compress::exports::Export;
use crate::error::{Result, tamed};
use crate::formats::targets::{Engine, loaders};
use crate::hub;
use crate::report::{Report, bytes};
use crate::statistics::shown as figure;
use crate::storage::Store;

/// Where a model's own card goes.
pub const ORIGINAL: &str = "README.original.md";

/// Writes the card of an export; a card that came with the model is kept beside it.
///
/// # Errors
/// When it cannot be written.
pub fn write(report: &Report, export: &Export, checkpoint: &Checkpoint, output: &Path, storage: &dyn Store) -> Result<()> {
    let folder = export.path(output);
    let own = checkpoint.folder.join("README.md");
    let before = std::fs::read_to_string(&own).ok();
    if let Some(before) = &before {
        storage.put(&folder.join(ORIGINAL), before.as_bytes())?;
    }
    let front = before.as_deref().map(front_matter).unwrap_or_default();
    storage.put(&folder.join("README.md"), tamed(&text(report, export, &front, &name(checkpoint))).as_bytes()).map(drop)
}

fn name(checkpoint: &Checkpoint) -> String {
    hub::name_of(&checkpoint.folder).map_or_else(|| "model".into(), |name| name.replace('<', "&lt;"))
}

/// The lines about licence and language of a card's front matter.
fn front_matter(card: &str) -> Vec<&str> {
    let Some(rest) = card.strip_prefix("---\n") else { return Vec::new() };
    let Some((front, _)) = rest.split_once("\n---") else { return Vec::new() };
    let mut kept = Vec::new();
    let mut inside = false;
    for line in front.lines() {
        let nested = line.starts_with([' ', '-']);
        inside = if nested { inside } else { ["license", "language"].iter().any(|key| line.starts_with(key)) };
        if inside {
            kept.push(line);
        }
    }
    kept
}

fn text(report: &Report, export: &Export, front: &[&str], name: &str) -> String {
    let mut out = String::from("---\n");
    front.iter().for_each(|line| writeln!(out, "{line}").expect("a string grows"));
    write!(out, "tags:\n- {}\n- drawknife\n---\n\n# {name}, compressed\n\n", export.format.name).expect("a string grows");
    body(&mut out, report, export).expect("a string grows");
    out
}

fn body(out: &mut String, report: &Report, export: &Export) -> std::fmt::Result {
    let size = &report.size;
    writeln!(out, "Made by drawknife {} of a model of the type {}.\n", report.drawknife, report.model.model_type.replace('<', "&lt;"))?;
    writeln!(out, "| | |\n|---|---|")?;
    writeln!(out, "| format | {} |", export.format.name)?;
    writeln!(out, "| weights | {} -> {} |", bytes(size.bytes_before), bytes(export.bytes()))?;
    writeln!(out, "| bits per weight in compressed layers | {:.3} |", size.bits_per_weight)?;
    if let (Some(quality), Some(evaluation)) = (&report.quality, &report.evaluation) {
        let plus = |error: Option<f64>, digits: usize| error.map(|error| format!(" ± {}", figure(error, digits))).unwrap_or_default();
        writeln!(out, "| measured on | {}, {} windows of {} tokens |", evaluation.text, quality.windows, quality.seq)?;
        writeln!(out, "| perplexity | {} |", figure(quality.perplexity, 4))?;
        if let Some(against) = &quality.against {
            writeln!(out, "| perplexity of the original | {} |", figure(against.reference_perplexity, 4))?;
            writeln!(out, "| ratio | {}{} |", figure(against.perplexity_ratio, 4), plus(against.perplexity_ratio_stderr, 4))?;
            writeln!(out, "| mean divergence (nats) | {:.5}{} |", against.kld_mean, plus(against.kld_mean_stderr, 5))?;
            writeln!(out, "| same most likely token | {:.2} % |", 100.0 * against.top1_agreement)?;
        }
    } else {
        writeln!(out, "| quality | not measured |")?;
    }
    writeln!(out, "\n## Load it\n")?;
    for (engine, loads) in loaders(export.format, &export.layers) {
        match loads {
            Ok(how) => {
                let how = how.map(|how| format!(" ({how})")).unwrap_or_default();
                writeln!(out, "- {}{how}: `{}`", engine.name(), command(engine, export))?;
            }
            Err(reason) => writeln!(out, "- {}: no; {reason}", engine.name())?,
        }
    }
    let recipe = toml::to_string(&report.recipe).unwrap_or_default();
    writeln!(out, "\n## Recipe\n\n`drawknife compress MODEL -o OUT --recipe FILE` with\n\n```toml\n{}\n```", recipe.trim_end())?;
    if !report.notes.is_empty() {
        writeln!(out, "\n## Notes\n")?;
        report.notes.iter().try_for_each(|note| writeln!(out, "- {}", note.replace('<', "&lt;")))?;
    }
    Ok(())
}

/// How an engine is started on a folder.
fn command(engine: Engine, export: &Export) -> String {
    match (engine, export.file.is_some()) {
        (Engine::Vllm, _) => "vllm serve FOLDER".into(),
        (Engine::Sglang, _) => "python -m sglang.launch_server --model-path FOLDER".into(),
        (Engine::Transformers, true) => "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=\"model.gguf\")".into(),
        (Engine::Transformers, false) => "AutoModelForCausalLM.from_pretrained(FOLDER)".into(),
        (Engine::LlamaCpp, true) => "llama-server -m FOLDER/model.gguf".into(),
        (Engine::LlamaCpp, false) => "python convert_hf_to_gguf.py FOLDER".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licence_and_language_are_carried_over() {
        let card = "---\nlicense: other\nlicense_name: x\nlanguage:\n- en\n- de\ntags:\n- y\npipeline_tag: z\n---\n# M\nlicense: not this";
        assert_eq!(front_matter(card), ["license: other", "license_name: x", "language:", "- en", "- de"]);
        assert!(front_matter("# M\nlicense: mit").is_empty());
    }
}
