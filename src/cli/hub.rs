//! Models that are given by their name on a hub, and what the environment says of the hub.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cli::arguments::Command;
use crate::cli::progress::Progress;
use crate::error::Result;
use crate::hub::{Hub, Id, PATIENCE};

/// Puts the folders of models in place of their names on a hub.
///
/// # Errors
/// When a model cannot be had.
pub fn locate(command: &mut Command, offline: bool, progress: &Progress) -> Result<()> {
    let models: Vec<&mut PathBuf> = match command {
        Command::Compress(arguments) | Command::Plan(arguments) => arguments.model.iter_mut().collect(),
        Command::Eval(arguments) => std::iter::once(&mut arguments.model).chain(&mut arguments.reference).collect(),
        Command::Compare(arguments) => arguments.models.iter_mut().collect(),
        Command::Sensitivity(arguments) => vec![&mut arguments.model],
        Command::Check(arguments) => std::iter::once(&mut arguments.model).chain(&mut arguments.reference).collect(),
        Command::Export(arguments) => vec![&mut arguments.model],
        Command::Inspect(arguments) => vec![&mut arguments.model],
        Command::Report(_) | Command::Schema(_) | Command::Presets(_) | Command::Doctor(_) | Command::RenderChats => Vec::new(),
    };
    let hub = hub(offline);
    for model in models {
        if let Some(id) = Id::of(model) {
            *model = hub.locate(&id, progress)?;
        }
    }
    Ok(())
}

/// The hub as the environment describes it, in the words that other programs use too.
fn hub(offline: bool) -> Hub {
    let word = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    let folder = |name: &str| word(name).map(PathBuf::from);
    let home = folder("HF_HOME").or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")));
    let home = home.or_else(|| folder("HOME").map(|home| home.join(".cache/huggingface")));
    let home = home.unwrap_or_else(|| Path::new(".cache/huggingface").into());
    let token = word("HF_TOKEN").or_else(|| word("HUGGING_FACE_HUB_TOKEN"));
    let kept = folder("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
    let token =
        token.or_else(|| std::fs::read_to_string(kept).ok().map(|token| token.trim().to_string()).filter(|token| !token.is_empty()));
    let told = word("HF_HUB_OFFLINE").is_some_and(|value| ["1", "true", "yes", "on"].contains(&value.to_lowercase().as_str()));
    Hub {
        cache: folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub")),
        endpoint: word("HF_ENDPOINT"),
        token,
        offline: offline || told,
        patience: word("HF_HUB_DOWNLOAD_TIMEOUT").map_or(PATIENCE, |value| patience(&value)),
    }
}

/// Seconds as other programs read them; what is no time to wait counts as not said.
fn patience(value: &str) -> Duration {
    let seconds = value.trim().parse::<f64>().ok().filter(|seconds| *seconds > 0.0);
    seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).unwrap_or(PATIENCE)
}
