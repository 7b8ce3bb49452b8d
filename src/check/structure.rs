//! Whether a checkpoint is whole: what loaders stumble over, or worse, do not notice.

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::Serialize;

use crate::checkpoint::decode::nonfinite_bytes;
use crate::checkpoint::float_of;
use crate::compress::manifest;
use crate::error::{Error, Result};
use crate::formats::targets::{Engine, loaders};
use crate::formats::{self, Format};
use crate::model::config::Config;
use crate::run::Run;
use crate::subject::Subject;
use crate::weight::{Float, Outlined, Weight};

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Finding {
    /// What.
    pub name: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was found.
    pub detail: String,
}

impl Finding {
    /// A finding from a result: the detail of a success or the message of an error.
    pub fn of(name: &str, result: Result<String>) -> Self {
        let ok = result.is_ok();
        Self { name: name.into(), ok, detail: result.unwrap_or_else(|error| error.to_string()) }
    }
}

/// What reading all weights of a model found.
#[derive(Debug, Clone, Default)]
struct Decoded {
    layers: Vec<Outlined>,
    packed: usize,
    round_trips: usize,
}

/// Looks at everything that an opened model holds. `engine` is one that must load it.
pub fn examine(subject: &Subject, engine: Option<Engine>, run: &Run<'_>) -> Vec<Finding> {
    let checkpoint = &subject.checkpoint;
    let tensors = checkpoint.names().count();
    let mut findings = vec![Finding::of("files", Ok(format!("{tensors} tensors in {} files, as the index says", checkpoint.shards.len())))];
    findings.extend(hashes(subject));
    let known = crate::model::computes(checkpoint);
    findings.push(match known {
        true => Finding::of("shapes", subject.model().map(|model| format!("{} blocks as config.json says", model.config.layers.len()))),
        false => Finding::of("shapes", Ok("the model is not one that can be computed: shapes were not compared with config.json".into())),
    });
    let decoded = decode(subject, run);
    let told = |decoded: &Decoded| {
        let (layers, packed, round_trips) = (decoded.layers.len(), decoded.packed, decoded.round_trips);
        format!("{layers} linear layers, {packed} packed, {round_trips} the same when packed again; scales finite")
    };
    findings.push(Finding::of("weights", decoded.as_ref().map(told).map_err(copied)));
    findings.push(Finding::of("other tensors", others_finite(subject, run)));
    findings.push(Finding::of("tokenizer", tokenizer(subject)));
    if let (Ok(decoded), Some(format)) = (&decoded, format_of(subject)) {
        findings.extend(loader_findings(format, &decoded.layers, engine));
    }
    findings
}

/// Whether the tokenizer works, and gives tokens that the model has.
fn tokenizer(subject: &Subject) -> Result<String> {
    let tokenizer = subject.tokenizer()?;
    let rows = Config::read(&subject.checkpoint.config).map_or(usize::MAX, |config| config.vocabulary);
    tokenizer.probe(rows).map(|()| "tokenizer.json reads, and gives tokens of the model".into())
}

/// Whether files are what this program wrote, where it left a manifest.
fn hashes(subject: &Subject) -> Option<Finding> {
    let folder = subject.path.is_dir().then_some(subject.path.as_path())?;
    let found = manifest::verify(folder).transpose()?;
    Some(Finding::of("hashes", found.map(|count| format!("{count} files are what manifest.json says"))))
}

fn copied(error: &Error) -> Error {
    Error::new(error.fault, error.to_string())
}

fn format_of(subject: &Subject) -> Option<&'static Format> {
    match crate::compress::gguf::unpack::file_of(&subject.path) {
        Some(_) => Some(&formats::gguf::FORMAT),
        None => formats::of(&subject.checkpoint),
    }
}

/// What engines do with it: an engine that does not load it is a failure only where it was asked for.
fn loader_findings(format: &Format, layers: &[Outlined], engine: Option<Engine>) -> Vec<Finding> {
    let told = |(which, loads): (Engine, Result<Option<String>, String>)| {
        let detail = match &loads {
            Ok(None) => "loads".to_string(),
            Ok(Some(how)) => format!("loads {how}"),
            Err(why) => format!("does not load {}: {why}", format.name),
        };
        Finding { name: format!("for {}", which.name()), ok: loads.is_ok() || engine != Some(which), detail }
    };
    loaders(format, layers).into_iter().map(told).collect()
}

/// Reads every linear layer, and packs what is packed once more.
fn decode(subject: &Subject, run: &Run<'_>) -> Result<Decoded> {
    let linears = subject.linears()?;
    let format = formats::of(&subject.checkpoint);
    run.observer.begin("decode", linears.len() as u64);
    let decoded = linears.par_iter().map(|(name, shape)| {
        run.check_stop()?;
        let weight = subject.source.weight(&subject.checkpoint, name, *shape)?;
        let (packed, outlined) = (!matches!(weight, Weight::Stored(_) | Weight::Dense(_)), outlined(name, &weight));
        let again = match format.filter(|_| packed) {
            Some(format) => packs_again(subject, format, &outlined, &weight)?,
            None => false,
        };
        run.observer.step(1, name);
        Ok(Decoded { layers: vec![outlined], packed: usize::from(packed), round_trips: usize::from(again) })
    });
    let all = decoded.collect::<Result<Vec<_>>>()?;
    run.observer.end();
    Ok(all.into_iter().fold(Decoded::default(), |mut total, mut one| {
        total.layers.append(&mut one.layers);
        Decoded { packed: total.packed + one.packed, round_trips: total.round_trips + one.round_trips, ..total }
    }))
}

fn outlined(name: &str, weight: &Weight) -> Outlined {
    let storage = (!matches!(weight, Weight::Stored(_) | Weight::Dense(_))).then(|| weight.storage());
    Outlined { name: name.into(), shape: weight.shape(), storage, float: Float::BF16 }
}

/// Packs a decoded layer and compares it with what is stored; false where the tensors are laid out as this program does not.
fn packs_again(subject: &Subject, format: &Format, outlined: &Outlined, weight: &Weight) -> Result<bool> {
    let checkpoint = &subject.checkpoint;
    for float in [Float::BF16, Float::F16, Float::F32] {
        let entries = (format.entries)(&Outlined { float, ..outlined.clone() });
        let same = |entry: &formats::Entry| {
            checkpoint.info(&entry.name).is_some_and(|info| info.dtype == entry.dtype && info.shape == entry.shape)
        };
        if !entries.iter().all(same) {
            continue;
        }
        for (entry, bytes) in entries.iter().zip((format.encode)(weight, float)) {
            if *checkpoint.bytes(&entry.name)? != *bytes {
                return Err(Error::input("decodes to values that pack to other bytes; the file is damaged, or its padding is not zero")
                    .tensor(&entry.name)
                    .file(&checkpoint.folder));
            }
        }
        return Ok(true);
    }
    Ok(false)
}

/// Looks for values that are not finite in all floats.
fn others_finite(subject: &Subject, run: &Run<'_>) -> Result<String> {
    const PIECE: u64 = 8 << 20;
    let checkpoint = &subject.checkpoint;
    run.observer.begin("look at values", checkpoint.shards.len() as u64);
    let mut count = 0;
    for shard in &checkpoint.shards {
        for (name, info) in &shard.header.tensors {
            run.check_stop()?;
            let Some(float) = float_of(info.dtype) else { continue };
            count += 1;
            let pieces: Vec<u64> = (0..info.bytes()).step_by(PIECE as usize).collect();
            pieces.par_iter().try_for_each(|&start| {
                let bytes = shard.bytes(info, start..(start + PIECE).min(info.bytes()))?;
                match nonfinite_bytes(float, &bytes) {
                    None => Ok(()),
                    Some((_, wrong)) => {
                        let what = format!("{wrong} values after byte {start} are NaN or infinite; the model is damaged");
                        Err(Error::input(what).tensor(name).file(&shard.path))
                    }
                }
            })?;
        }
        run.observer.step(1, "");
    }
    run.observer.end();
    Ok(format!("{count} tensors of floats are finite"))
}
