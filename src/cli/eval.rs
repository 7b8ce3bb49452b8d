//! `eval`.

use serde_json::json;

use crate::calibrate::corpus::{check_tokens, read_text};
use crate::calibrate::{builtin, tokens::Tokenizer};
use crate::checkpoint::Checkpoint;
use crate::cli::Invocation;
use crate::cli::arguments::{Eval, Scoring};
use crate::cli::compress::quality_table;
use crate::cli::device::pick_device;
use crate::cli::text::{say, say_json};
use crate::compress::gguf::unpack::Unpacked;
use crate::error::{Error, Result, shown_path};
use crate::evaluate::{Protocol, measure, windows};
use crate::formats;
use crate::model::Model;
use crate::run::Run;

/// Runs the verb.
///
/// # Errors
/// Whatever went wrong, in one line.
pub fn run(arguments: &Eval, invocation: &Invocation) -> Result<()> {
    let device = pick_device(arguments.device, arguments.gpu_memory.as_deref())?;
    let scratch = std::env::temp_dir();
    let unpacked = Unpacked::open(&arguments.model, &scratch)?;
    let checkpoint = Checkpoint::open(unpacked.folder())?;
    let source = formats::open(&checkpoint)?;
    let model = Model::open(&checkpoint, source.as_ref())?;
    let unpacked_reference = arguments.reference.as_deref().map(|path| Unpacked::open(path, &scratch)).transpose()?;
    let reference = unpacked_reference.as_ref().map(|unpacked| Checkpoint::open(unpacked.folder())).transpose()?;
    let reference_source = reference.as_ref().map(formats::open).transpose()?;
    let reference = match (&reference, &reference_source) {
        (Some(checkpoint), Some(source)) => Some(Model::open(checkpoint, source.as_ref())?),
        _ => None,
    };
    let longest = model.config.max_positions;
    let seq = arguments.seq.unwrap_or(512.min(longest));
    if seq < 2 || seq > longest {
        return Err(Error::input(format!("--seq {seq}: the model takes windows of 2 to {longest} tokens")));
    }
    let second_half = arguments.protocol == Scoring::LlamaCpp;
    if second_half && seq < 4 {
        return Err(Error::input(format!("--seq {seq}: the second half of a window predicts nothing; use 4 or more")));
    }
    let protocol = Protocol { seq, max_tokens: arguments.max_tokens, bos: arguments.bos, second_half };
    let tokenizer = Tokenizer::open(unpacked.folder())?;
    let (name, text) = match &arguments.text {
        Some(path) => (shown_path(path), read_text(path)?),
        None => (format!("{} evaluation", builtin::VERSION), builtin::evaluation_text()),
    };
    let bos = tokenizer.bos(model.config.bos);
    let windows = windows(&text, &tokenizer, protocol, bos)?;
    check_tokens(&windows, model.config.vocabulary)?;
    let run = Run { device: &device, seed: invocation.seed.unwrap_or(0), observer: &invocation.progress, scratch: &std::env::temp_dir() };
    let quality = measure(&model, reference.as_ref(), &windows, protocol, &run)?;
    if invocation.json {
        let mut object = serde_json::to_value(&quality).map_err(|error| Error::run(error.to_string()))?;
        object["text_blake3"] = json!(blake3::hash(text.as_bytes()).to_hex().to_string());
        say_json(&object);
        return Ok(());
    }
    if !invocation.quiet {
        let bos = serde_json::to_value(arguments.bos).ok().and_then(|bos| bos.as_str().map(str::to_string)).unwrap_or_default();
        say(&format!("{name} · {} windows of {seq} tokens, {} scored · bos {bos}", quality.windows, quality.tokens));
    }
    quality_table(&quality).iter().for_each(|line| say(line));
    Ok(())
}
