//! `eval`.

use serde_json::json;

use crate::cli::Invocation;
use crate::cli::arguments::{Eval, Measuring, Scoring};
use crate::cli::compress::quality_table;
use crate::cli::device::pick_device;
use crate::cli::text::{say, say_json};
use crate::error::{Error, Result};
use crate::evaluate::{Protocol, Text, measure};
use crate::model::Model;
use crate::run::Run;
use crate::subject::Subject;

/// Runs the verb.
///
/// # Errors
/// Whatever went wrong, in one line.
pub fn run(arguments: &Eval, invocation: &Invocation) -> Result<()> {
    let device = pick_device(arguments.device, arguments.gpu_memory.as_deref())?;
    let scratch = std::env::temp_dir();
    let subject = Subject::open(&arguments.model, &scratch)?;
    let model = subject.model()?;
    let reference = arguments.reference.as_deref().map(|path| Subject::open(path, &scratch)).transpose()?;
    let beside = reference;
    let reference = beside.as_ref().map(Subject::model).transpose()?;
    let second_half = arguments.protocol == Scoring::LlamaCpp;
    let protocol = Protocol { second_half, ..protocol(&arguments.measuring, &model)? };
    if second_half && protocol.seq < 4 {
        return Err(Error::input(format!("--seq {}: the second half of a window predicts nothing; use 4 or more", protocol.seq)));
    }
    let text = Text::open(arguments.measuring.text.as_deref())?;
    let windows = subject.windows(&text, protocol)?;
    if let Some(beside) = &beside {
        subject.shares_tokens(beside, &text, protocol, &windows)?;
    }
    let run = Run { device: &device, seed: invocation.seed.unwrap_or(0), observer: &invocation.progress, scratch: &scratch };
    let quality = measure(&model, reference.as_ref(), &windows, protocol, &run)?;
    if invocation.json {
        let mut object = serde_json::to_value(&quality).map_err(|error| Error::run(error.to_string()))?;
        object["text_blake3"] = json!(text.blake3);
        say_json(&object);
        return Ok(());
    }
    if !invocation.quiet {
        say(&measured_on(&text, protocol, quality.windows, quality.tokens));
    }
    quality_table(&quality).iter().for_each(|line| say(line));
    Ok(())
}

/// How text becomes windows for a model, by the flags.
///
/// # Errors
/// When the windows do not suit the model.
pub fn protocol(measuring: &Measuring, model: &Model<'_>) -> Result<Protocol> {
    let longest = model.config.max_positions;
    let seq = measuring.seq.unwrap_or(512.min(longest));
    if seq < 2 || seq > longest {
        return Err(Error::input(format!("--seq {seq}: the model takes windows of 2 to {longest} tokens")));
    }
    Ok(Protocol { seq, max_tokens: measuring.max_tokens, bos: measuring.bos, second_half: false })
}

/// What something was measured on, in one line.
pub fn measured_on(text: &Text, protocol: Protocol, windows: usize, tokens: usize) -> String {
    let bos = serde_json::to_value(protocol.bos).ok().and_then(|bos| bos.as_str().map(str::to_string)).unwrap_or_default();
    format!("{} · {windows} windows of {} tokens, {tokens} scored · bos {bos}", crate::error::shown(&text.name), protocol.seq)
}
