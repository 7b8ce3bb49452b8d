//! The verb `compress`: a checkpoint and a recipe to a smaller checkpoint with its quality measured.

pub mod card;
pub mod changes;
pub mod compressor;
pub mod convert;
pub mod destination;
pub mod estimate;
pub mod exports;
pub mod generation;
pub mod gguf;
pub mod journal;
pub mod layers;
pub mod manifest;
pub mod needed;
pub mod remarks;
pub mod work;
pub mod writer;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::calibrate::corpus::Source as Origin;
use crate::calibrate::corpus::{self, Packed};
use crate::calibrate::tokens::Tokenizer;
use crate::checkpoint::source::{Source, Through};
use crate::checkpoint::{Checkpoint, read_file};
use crate::compress::changes::Changes;
use crate::compress::compressor::{Compressor, Finished};
use crate::compress::destination::Destination;
use crate::compress::exports::{Export, Sinks};
use crate::compress::gguf::unpack::Unpacked;
use crate::compress::journal::Kept;
use crate::compress::layers::candidates;
use crate::compress::needed::Needed;
use crate::compress::work::Work;
use crate::error::{Error, Result};
use crate::evaluate::contexts::TokenView;
use crate::evaluate::{self, Protocol, Quality, Text};
use crate::formats::targets::{Engine, loaders, unfused};
use crate::formats::{self, Format};
use crate::gate;
use crate::model::computes;
use crate::model::generate;
use crate::model::hidden::{Hidden, Keeping};
use crate::model::seen::Needs;
use crate::model::walk::{embed, walk_part};
use crate::model::{Model, config};
use crate::plan::Plan;
use crate::plan::recipe::Recipe;
use crate::report::page::{self, Files};
use crate::report::{
    Allocated, Audit, BlockReport, ClassSize, Evaluation, LayerReport, Loads, ModelFacts, Report, SCHEMA, Size, Stopwatch, Timing, class_of,
};
use crate::run::Run;
use crate::storage::{Store, write_whole};
use crate::weight::Outlined;

/// What to compress, how, and where to.
#[derive(Debug, Clone)]
pub struct Job {
    /// The model folder.
    pub model: PathBuf,
    /// The recipe.
    pub recipe: Recipe,
    /// The engine that shall load the output.
    pub engine: Option<Engine>,
    /// How to measure at the end; `None` for not at all.
    pub quality: Option<QualityOptions>,
    /// How a target was spread over the layers, where the recipe had one.
    pub allocation: Option<Allocated>,
    /// The command line, for the record.
    pub command: Vec<String>,
    /// Further files of the output, by name.
    pub beside: Vec<(String, Vec<u8>)>,
    /// Memory that the run may have, in bytes; what is free where nothing is said.
    pub memory: Option<u64>,
}

/// How quality is measured.
#[derive(Debug, Clone)]
pub struct QualityOptions {
    /// A text file; `None` for the built-in evaluation text.
    pub text: Option<PathBuf>,
    /// How the text becomes windows; shortened to what the model takes.
    pub protocol: Protocol,
}

/// A job whose inputs were checked: nothing was written yet, and no weight was read.
#[derive(Debug)]
pub struct Prepared {
    /// The job.
    pub job: Job,
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// What happens to every layer.
    pub plan: Plan,
    /// What is written, one per format.
    pub exports: Vec<Export>,
    /// Facts about the model.
    pub facts: ModelFacts,
    /// Sizes before and after.
    pub size: Size,
    /// Calibration windows, when a method needs them; none yet where the model is to write them.
    pub calibration: Option<Packed>,
    /// What the model is to write for its calibration.
    pub generation: Option<generate::Options>,
    /// Evaluation windows.
    pub evaluation: Option<(Vec<Vec<u32>>, Evaluation)>,
    /// Tensors beside linear layers that stages change.
    pub changes: Changes,
    /// What the run is expected to need.
    pub needed: Needed,
    /// Deviations and warnings so far.
    pub notes: Vec<String>,
}

impl Prepared {
    /// Checks a job completely: the checkpoint, the recipe against it, the texts against the tokenizer.
    ///
    /// # Errors
    /// One line that names the first thing that is wrong.
    pub fn new(mut job: Job) -> Result<Self> {
        let checkpoint = Checkpoint::open(&job.model)?;
        // A broken one would be carried into the output.
        let named = std::fs::symlink_metadata(job.model.join("tokenizer.json")).is_ok();
        let tokenizer = if named { Some(Tokenizer::open(&job.model)?) } else { None };
        let known = computes(&checkpoint);
        let source = Through::restored(formats::open(&checkpoint)?);
        let model = if known { Some(Model::open(&checkpoint, &source)?) } else { None };
        let experts = changes::experts_left(&job.recipe, model.as_ref()).map_err(|error| error.file(&job.model))?;
        let model = model.map(|model| model.with_experts(experts));
        let candidates = candidates(&checkpoint, &source, model.as_ref())?;
        let carried: Vec<&str> = checkpoint.names().collect();
        let mut plan = Plan::resolve(&job.recipe, &candidates, &carried)?;
        plan.experts = experts;
        exports::restore(&mut plan, &checkpoint, &source);
        let chosen = exports::chosen(&job.recipe, job.engine, &mut plan)?;
        let needs = needs(&job.recipe, &plan);
        let mut notes = plan.notes.clone();
        let model_type = crate::error::shown(config::model_type(&checkpoint.config));
        if model.is_none() && needs > Needs::Nothing {
            return Err(Error::input(format!("model_type `{model_type}` cannot be computed by this version, and the recipe needs calibration; use a data-free preset such as w4-fast or w8")).file(&job.model));
        }
        if model.is_none() {
            notes.push(format!(
                "model_type `{model_type}` is unknown, or described or stored in a way that is: layers were chosen by name and shape, and quality cannot be measured"
            ));
        }
        let (mut calibration, mut generation, mut evaluation, mut needed) = (None, None, None, Needed::default());
        if let Some(model) = &model {
            evaluation = evaluation_windows(&job, model, tokenizer.as_ref(), &mut notes)?;
            (calibration, generation) = calibration_windows(&mut job, model, needs, &mut notes)?;
            let tokens = calibration.iter().flat_map(|packed: &Packed| &packed.windows).map(Vec::len).sum();
            needed = Needed::of((model, &plan), needs, tokens, generation.as_ref(), job.memory);
        }
        if !job.recipe.gate.is_empty() && evaluation.is_none() {
            return Err(Error::input(format!(
                "the gate cannot be decided: {}",
                notes.last().map_or("quality is not measured", String::as_str)
            )));
        }
        notes.extend(side_notes(&checkpoint, &plan, &chosen)?);
        if overlaps(&job) {
            notes.push("quality is measured on the calibration text itself: the figures flatter".into());
        }
        let changes = model.as_ref().map(|model| changes::of(model, &plan)).unwrap_or_default();
        let export = |format| {
            Export::new(&checkpoint, &source, &plan, format, &changes, (&job.recipe.export, chosen.len() > 1))
                .map_err(|error| error.file(&job.model))
        };
        let exports = chosen.iter().map(|&format| export(format)).collect::<Result<Vec<_>>>()?;
        let tensors = || checkpoint.names().filter_map(|name| checkpoint.info(name));
        notes.extend(exports.iter().filter_map(|export| export.file.as_ref()).flat_map(|file| file.notes.iter().cloned()));
        let size = Size {
            bytes_before: tensors().map(crate::checkpoint::TensorInfo::bytes).sum(),
            bytes_after: exports.iter().map(Export::bytes).sum(),
            bits_per_weight: plan.bits_per_weight(),
        };
        let facts = ModelFacts {
            model_type,
            parameters: tensors().map(|info| info.entries() as u64).sum(),
            tensors: checkpoint.names().count(),
            linears: candidates.len(),
            shards: checkpoint.shards.len(),
        };
        Ok(Self { job, plan, exports, changes, facts, size, calibration, generation, evaluation, needed, notes, checkpoint })
    }

    /// Does the work, or what is left of it, and puts the finished folder into place. The destination must have begun with
    /// [`manifest::dependencies`] of this job, which are given again here.
    ///
    /// # Errors
    /// When anything fails; the destination is then absent, as before.
    pub fn run(mut self, destination: Destination, dependencies: &Map<String, Value>, run: &Run<'_>) -> Result<Report> {
        match run.guarded(|| self.fill(&destination, dependencies, run)) {
            Ok(report) => destination.publish().map(|()| report),
            Err(error) => Err(destination.give_up(error)),
        }
    }

    /// Fills the work folder.
    fn fill(&mut self, destination: &Destination, dependencies: &Map<String, Value>, run: &Run<'_>) -> Result<Report> {
        let mut watch = Stopwatch::default();
        let (folder, work) = (destination.folder(), &destination.work);
        let storage: &dyn Store = work.storage.as_ref();
        destination.has_room(self.disk_bytes(run)?)?;
        let Finished { layers, blocks, committing } = self.compress(work, run, &mut watch)?;
        self.notes.extend(remarks::of_experts(&blocks));
        for export in &self.exports {
            export.side_files(&self.checkpoint, &folder, storage)?;
            export.verify(&folder)?;
        }
        watch.ends("verify");
        let (quality, tokens) = self.measure(&folder, run)?.unzip();
        watch.ends("measure quality");
        let report = self.report((layers, blocks), quality, tokens.flatten())?;
        for export in &self.exports {
            card::write(&report, export, &self.checkpoint, &folder, storage)?;
        }
        for (name, bytes) in &self.job.beside {
            storage.put(&folder.join(name), bytes)?;
        }
        storage.put_json(&folder.join("report.json"), &report)?;
        for (name, text) in pages(&folder)? {
            storage.put(&folder.join(name), text.as_bytes())?;
        }
        manifest::write(&folder, dependencies, storage)?;
        watch.ends("report");
        let timing = Timing {
            schema: SCHEMA,
            command: std::mem::take(&mut self.job.command),
            device: run.device.name.clone(),
            threads: rayon::current_num_threads(),
            resumed: work.resumes(),
            stages: watch.stages(),
            commit_seconds: committing.as_secs_f64(),
            peak_memory_bytes: crate::memory::peak(),
        };
        storage.put_json(&folder.join("timing.json"), &timing)?;
        Ok(report)
    }

    /// Bytes of the disk that the work needs: the output and, for whoever goes on, hidden states before three blocks.
    fn disk_bytes(&self, run: &Run<'_>) -> Result<u64> {
        let side: u64 = self.checkpoint.side_files()?.iter().filter_map(|path| path.metadata().ok()).map(|file| file.len()).sum();
        Ok(self.size.bytes_after + side * self.exports.len() as u64 + self.needed.states_bytes(run.device))
    }

    /// Everything up to the last tensor.
    fn compress(&mut self, work: &Work, run: &Run<'_>, watch: &mut Stopwatch) -> Result<Finished> {
        let mut metadata = self.checkpoint.metadata();
        metadata.insert("drawknife".into(), env!("CARGO_PKG_VERSION").into());
        let mut sinks = Sinks::create(&self.exports, &metadata, work, self.job.recipe.shard_bytes()?)?;
        exports::carry(&self.checkpoint, formats::open(&self.checkpoint)?.as_ref(), &self.plan, &self.changes, &mut sinks, run)?;
        watch.ends("copy the rest");
        let source = Through::restored(formats::open(&self.checkpoint)?);
        let layer_error = self.job.recipe.report.layer_error;
        let needs = needs(&self.job.recipe, &self.plan);
        let mut compressor;
        if needs == Needs::Nothing {
            compressor = Compressor::going_on(&self.plan, sinks, layer_error, work, 0);
            compressor.stream(&self.checkpoint, &source, run)?;
        } else {
            let model = model_of(&self.checkpoint, &source, &self.plan, self.needed)?;
            generation::write(&model, self.generation.as_ref(), self.calibration.as_mut(), work, run)?;
            let windows = self.calibration.as_ref().map_or(&[][..], |packed| &packed.windows);
            let blocks = model.config.layers.len();
            compressor = Compressor::going_on(&self.plan, sinks, layer_error, work, blocks);
            let done = work.done();
            let first = done.blocks.len();
            if first < blocks {
                let (mut hidden, float) = match first {
                    0 => (embed(&model, windows, Keeping::HALVED, run)?, None),
                    _ => states(&model, windows, work, (&done.states, needs), run)?,
                };
                walk_part(&model, first..blocks, (&mut hidden, float), "compress", run, &mut compressor)?;
            }
        }
        let finished = compressor.finish(work)?;
        watch.ends("compress");
        Ok(finished)
    }

    fn report(
        &mut self,
        (layers, blocks): (Vec<LayerReport>, Vec<BlockReport>),
        quality: Option<Quality>,
        tokens: Option<TokenView>,
    ) -> Result<Report> {
        let audit = match (&self.calibration, &self.evaluation) {
            (Some(packed), Some((windows, _))) => Some(Audit::of(&packed.windows, windows)),
            _ => None,
        };
        Ok(Report {
            schema: SCHEMA,
            drawknife: env!("CARGO_PKG_VERSION"),
            model_blake3: quality.as_ref().map(|_| self.checkpoint.fingerprint()).transpose()?,
            model: self.facts.clone(),
            recipe: self.job.recipe.clone(),
            format: self.exports.iter().map(|export| export.format.name).collect::<Vec<_>>().join(", "),
            size: self.size.clone(),
            calibration: self.calibration.take().map(|packed| packed.counts),
            allocation: self.job.allocation.take(),
            layers,
            blocks,
            sizes: sizes(&self.checkpoint, &self.exports[0]),
            loads: loads(&self.exports),
            audit,
            gates: gate::of_recipe(&self.job.recipe.gate, quality.as_ref()),
            quality,
            tokens,
            evaluation: self.evaluation.take().map(|(_, evaluation)| evaluation),
            notes: std::mem::take(&mut self.notes),
        })
    }

    fn measure(&self, folder: &Path, run: &Run<'_>) -> Result<Option<(Quality, Option<TokenView>)>> {
        let (Some((windows, _)), Some(options)) = (&self.evaluation, &self.job.quality) else { return Ok(None) };
        // All exports hold one compression; one that needs no unpacking is read first.
        let export = self.exports.iter().find(|export| export.file.is_none()).unwrap_or(&self.exports[0]);
        let unpacked = Unpacked::open(&export.path(folder), run.scratch)?;
        let written = Checkpoint::open(unpacked.folder())?;
        let source: Box<dyn Source> = formats::open(&written)?;
        let model = Model::open(&written, source.as_ref())?.with_experts_read_singly(self.needed.singly);
        let original = formats::open(&self.checkpoint)?;
        let reference = Model::open(&self.checkpoint, original.as_ref())?.with_experts_read_singly(self.needed.singly);
        let tokenizer = Tokenizer::open(&self.job.model)?;
        evaluate::closely(&model, Some(&reference), windows, options.protocol, Some(&tokenizer), run).map(Some)
    }
}

/// The model as the work goes through it.
fn model_of<'a>(checkpoint: &'a Checkpoint, source: &'a dyn Source, plan: &Plan, needed: Needed) -> Result<Model<'a>> {
    Ok(Model::open(checkpoint, source)?.with_experts(plan.experts).with_experts_read_singly(needed.singly))
}

/// Hidden states that an earlier run left before a block: those of the walk and those of the float model.
fn states(
    model: &Model<'_>,
    windows: &[Vec<u32>],
    work: &Work,
    (kept, needs): (&[Kept], Needs),
    run: &Run<'_>,
) -> Result<(Hidden, Option<Hidden>)> {
    let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
    let load = |stream: &str| -> Result<Hidden> {
        let missing = || Error::damaged(format!("no states `{stream}` were recorded")).file(&work.path);
        let kept = kept.iter().find(|kept| kept.name.ends_with(stream)).ok_or_else(missing)?;
        let path = work.path.join(&kept.name);
        let mut hidden = model.states(&lengths, Keeping::HALVED, run)?;
        let file = std::fs::File::open(&path).map_err(|error| Error::damaged(error).file(&path))?;
        let (bytes, blake3) = hidden.load(&file, &path).map_err(Error::damaged)?;
        if (bytes, blake3.to_hex().as_str()) != (kept.bytes, kept.blake3.as_str()) {
            return Err(Error::damaged("is not as it was written").file(&path));
        }
        Ok(hidden)
    };
    if windows.is_empty() {
        return Ok((embed(model, windows, Keeping::HALVED, run)?, None));
    }
    let float = if needs == Needs::Streams { Some(load("float")?) } else { None };
    Ok((load("compressed")?, float))
}

/// Makes report.html and report.md from the files of a run that lie in a folder, each with its name. Times are left out: they
/// would differ between equal runs.
///
/// # Errors
/// When report.json is missing or is none.
pub fn pages(folder: &Path) -> Result<[(&'static str, String); 2]> {
    let files = files(folder)?;
    Ok([("report.html", page::html(&files)?), ("report.md", page::markdown(&files)?)])
}

/// As [`pages`], with times, written into the folder.
///
/// # Errors
/// As [`pages`], or when the pages cannot be written.
pub fn write_pages(folder: &Path) -> Result<()> {
    let mut files = files(folder)?;
    let timing = folder.join("timing.json");
    if timing.exists() {
        files.timing = read_report(&timing)?;
    }
    write_whole(&folder.join("report.html"), page::html(&files)?.as_bytes())?;
    write_whole(&folder.join("report.md"), page::markdown(&files)?.as_bytes())
}

fn files(folder: &Path) -> Result<Files> {
    let report = read_report(&folder.join("report.json"))?;
    if report["schema"] != SCHEMA || !report["recipe"].is_object() {
        let what = format!("is no report of version {SCHEMA}, which this program reads; compress again");
        return Err(Error::input(what).file(&folder.join("report.json")));
    }
    let optional = |name: &str| match folder.join(name) {
        path if path.exists() => read_report(&path),
        _ => Ok(Value::Null),
    };
    Ok(Files { report, timing: Value::Null, sensitivity: optional("sensitivity.json")? })
}

/// Reads a file of a report.
///
/// # Errors
/// When it is missing or not JSON.
pub fn read_report(path: &Path) -> Result<Value> {
    let bytes = read_file(path, 256 << 20)?;
    serde_json::from_slice(&bytes).map_err(|error| Error::input(format!("not JSON: {error}")).file(path))
}

/// Bytes before and after by kind of layer; kinds of which there is nothing are left out.
fn sizes(checkpoint: &Checkpoint, export: &Export) -> Vec<ClassSize> {
    let before = checkpoint.names().filter_map(|name| Some((name, checkpoint.info(name)?.bytes())));
    let after: Vec<(&str, u64)> = match &export.file {
        Some(file) => file.sizes().collect(),
        None => export.entries.iter().map(|entry| (entry.name.as_str(), entry.bytes())).collect(),
    };
    let mut sizes =
        ["attention", "MLP", "embedding", "head", "norms", "rest"].map(|class| ClassSize { class: class.into(), before: 0, after: 0 });
    for (name, bytes) in before {
        sizes.iter_mut().filter(|size| size.class == class_of(name)).for_each(|size| size.before += bytes);
    }
    for (name, bytes) in after {
        sizes.iter_mut().filter(|size| size.class == class_of(name)).for_each(|size| size.after += bytes);
    }
    sizes.into_iter().filter(|size| size.before + size.after > 0).collect()
}

/// What every engine does with every export.
fn loads(exports: &[Export]) -> Vec<Loads> {
    let of = |export: &Export| -> Vec<Loads> {
        let told = |(engine, loads): (Engine, Result<Option<String>, String>)| Loads {
            format: export.format.name.into(),
            engine: engine.name().into(),
            ok: loads.is_ok(),
            detail: loads.map_or_else(|reason| reason, Option::unwrap_or_default),
        };
        loaders(export.format, &export.layers).into_iter().map(told).collect()
    };
    exports.iter().flat_map(of).collect()
}

/// What the methods and the report need to have been seen.
pub(crate) fn needs(recipe: &Recipe, plan: &Plan) -> Needs {
    if recipe.report.layer_error { plan.needs().max(Needs::Gram) } else { plan.needs() }
}

/// Fewer different tokens than these say nothing of how a model is used.
const FEW_KINDS: usize = 32;

/// What calibration is made of.
type Calibrated = (Option<Packed>, Option<generate::Options>);

/// The calibration windows, when a method needs them, or what the model is to write; the recipe then says how long they
/// are.
fn calibration_windows(job: &mut Job, model: &Model<'_>, needs: Needs, notes: &mut Vec<String>) -> Result<Calibrated> {
    let options = job.recipe.packing(model.config.max_positions)?;
    if needs == Needs::Nothing {
        return Ok((None, None));
    }
    if options.sources == [Origin::Own] {
        job.recipe.calibration.seq = Some(options.seq);
        let (packed, generation) = generation::prepare(&job.model, model, &options, notes)?;
        return Ok((Some(packed), Some(generation)));
    }
    let packed = corpus::pack(&options, || Tokenizer::open(&job.model), model.config.eos.first().copied(), model.config.vocabulary)?;
    fits(&packed.windows, model.config.max_positions)?;
    if packed.counts.end_of_text.is_none() && packed.counts.documents > 1 {
        notes.push("the model names no end-of-text token: documents follow each other without one".into());
    }
    let kinds = packed.windows.iter().flatten().collect::<std::collections::BTreeSet<_>>().len();
    if kinds < FEW_KINDS {
        notes.push(format!("the calibration text is made of {kinds} different tokens only; give text of the kind that the model is for"));
    }
    job.recipe.calibration.seq = Some(options.seq);
    Ok((Some(packed), None))
}

/// The evaluation windows; without a tokenizer or with too short a built-in text there are none, and a note says so.
fn evaluation_windows(
    job: &Job,
    model: &Model<'_>,
    tokenizer: Option<&Tokenizer>,
    notes: &mut Vec<String>,
) -> Result<Option<(Vec<Vec<u32>>, Evaluation)>> {
    let Some(options) = &job.quality else { return Ok(None) };
    let windows = match tokenizer {
        Some(tokenizer) => tokenized(options, tokenizer, model),
        // Says that it is missing.
        None => Tokenizer::open(&job.model).and_then(|tokenizer| tokenized(options, &tokenizer, model)),
    };
    match windows {
        Ok(windows) => Ok(Some(windows)),
        Err(error) if options.text.is_none() => {
            notes.push(format!("quality cannot be measured: {error}"));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn tokenized(options: &QualityOptions, tokenizer: &Tokenizer, model: &Model<'_>) -> Result<(Vec<Vec<u32>>, Evaluation)> {
    let text = Text::open(options.text.as_deref())?;
    let protocol = Protocol { seq: options.protocol.seq.min(model.config.max_positions), ..options.protocol };
    let bos = tokenizer.bos(model.config.bos);
    let windows = evaluate::windows(&text.content, tokenizer, protocol, bos)?;
    tokenizer.fits(windows.iter().flatten(), model.config.vocabulary)?;
    Ok((windows, Evaluation { text: text.name, blake3: text.blake3 }))
}

/// Whether a recipe calibrates on the file that quality is to be measured on.
fn overlaps(job: &Job) -> bool {
    let same = |a: &Path, b: &Path| a.canonicalize().ok().is_some_and(|a| b.canonicalize().ok() == Some(a));
    let text = job.quality.as_ref().and_then(|options| options.text.as_deref());
    let sources = job
        .recipe
        .calibration
        .source
        .0
        .iter()
        .flat_map(|source| source.split(','))
        .filter_map(|source| source.trim().parse::<Origin>().ok());
    text.is_some_and(|text| sources.into_iter().any(|source| matches!(source, Origin::File(path) if same(&path, text))))
}

/// Refuses windows that are longer than the model takes.
fn fits(windows: &[Vec<u32>], max_positions: usize) -> Result<()> {
    match windows.iter().position(|window| window.len() > max_positions) {
        Some(number) => {
            let length = windows[number].len();
            Err(Error::input(format!("calibration: window {number} has {length} tokens, the model takes {max_positions}; cut it")))
        }
        None => Ok(()),
    }
}

/// Names what of the folder stays behind, and sets of layers that servers fuse but that now differ.
fn side_notes(checkpoint: &Checkpoint, plan: &Plan, chosen: &[&Format]) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    if let Some(section) = formats::quantization(checkpoint) {
        let method = crate::error::shown(section["quant_method"].as_str().unwrap_or("?"));
        notes.push(format!("the model is quantized already ({method}): its weights are read as floats, errors add up"));
    }
    let behind = checkpoint.left_behind()?;
    if !behind.is_empty() {
        notes.push(format!("not copied: {}", behind.join(", ")));
    }
    let outlined: Vec<Outlined> = plan.layers.iter().map(|layer| layer.outlined.clone()).collect();
    let mixed = unfused(&outlined);
    if let (Some(first), true) = (mixed.first(), chosen.iter().any(|format| (format.config)(&outlined, &[]).is_some())) {
        notes.push(format!(
            "{first} have different schemes, which vLLM and SGLang cannot load because they fuse them ({} such sets)",
            mixed.len()
        ));
    }
    Ok(notes)
}
