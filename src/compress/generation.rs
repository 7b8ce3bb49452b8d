//! Calibration text that the model itself writes: what it may begin with, what it must not write, and when it writes.

use std::path::Path;

use crate::calibrate::corpus::{self, Packed};
use crate::calibrate::starts::starts;
use crate::calibrate::tokens::Tokenizer;
use crate::checkpoint::read_json;
use crate::compress::work::{WINDOWS, Work};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::config::tokens;
use crate::model::generate::{BUDGET, Options, generate};
use crate::run::Run;

/// What the model in `folder` is to write, and windows that are still to come with their counts. Reads no weight.
///
/// # Errors
/// When the model has no tokenizer or nothing to begin with.
pub fn prepare(folder: &Path, model: &Model<'_>, options: &corpus::Options, notes: &mut Vec<String>) -> Result<(Packed, Options)> {
    let tokenizer = Tokenizer::open(folder)?;
    let config = &model.config;
    let mut suppressed: Vec<u32> = config.eos.iter().copied().chain(tokenizer.named_token("eos_token")).collect();
    // Chat models often name their ends of turns there alone.
    let generation_config = folder.join("generation_config.json");
    if generation_config.exists() {
        suppressed.extend(tokens(read_json(&generation_config)?.get("eos_token_id")));
    }
    suppressed.sort_unstable();
    suppressed.dedup();
    let mut starts = starts(&tokenizer, config.vocabulary)?;
    starts.retain(|start| !suppressed.contains(start));
    let begin = tokenizer.bos(config.bos).filter(|&begin| (begin as usize) < config.vocabulary);
    let generation = Options { samples: options.samples, seq: options.seq, seed: options.seed, begin, starts, suppressed };
    let passes = BUDGET.passes(model, &generation);
    if passes > 1 {
        notes.push(format!(
            "the model does not fit into memory as it writes its calibration text: its weights are read {passes} times; a smaller --seq or fewer --samples are faster"
        ));
    }
    Ok((Packed { windows: Vec::new(), counts: corpus::own_counts(options) }, generation))
}

/// Lets the model write, where it is to and an earlier run did not.
///
/// # Errors
/// When it cannot.
pub fn write(model: &Model<'_>, generation: Option<&Options>, packed: Option<&mut Packed>, work: &Work, run: &Run<'_>) -> Result<()> {
    if let (Some(generation), Some(packed)) = (generation, packed) {
        packed.windows = match work.kept(WINDOWS)? {
            Some(kept) => serde_json::from_slice(&kept).map_err(|error| Error::damaged(error).file(&work.path.join(WINDOWS)))?,
            None => {
                let windows = generate(model, generation, BUDGET, run)?;
                let bytes = serde_json::to_vec(&windows).map_err(|error| Error::run(error.to_string()))?;
                work.keep(WINDOWS, &bytes)?;
                windows
            }
        };
        packed.counts.blake3 = corpus::hash_tokens(&packed.windows);
    }
    Ok(())
}
