//! What is written, in each format: tensors planned before the work, the files that hold them, and what lies beside.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use safetensors::Dtype;

use crate::checkpoint::decode::nonfinite_bytes;
use crate::checkpoint::source::{Source, shared};
use crate::checkpoint::{Checkpoint, float_of, read_file};
use crate::compress::changes::{Change, Changes, set_experts};
use crate::compress::gguf;
use crate::compress::journal::{Hashed, Record};
use crate::compress::work::Work;
use crate::compress::writer::{Commit, Writer};
use crate::error::{Error, Fault, Result};
use crate::formats::output::{Files, Layout};
use crate::formats::targets::Engine;
use crate::formats::{self, Entry, Format};
use crate::plan::Plan;
use crate::plan::recipe::{self, Recipe};
use crate::report::LayerReport;
use crate::run::Run;
use crate::storage::Store;
use crate::weight::{Float, Outlined, Storage, Weight};

/// Bytes that are copied at once.
const PIECE: u64 = 8 << 20;

/// How long layers are worked on before they are recorded, where no block sets the pace.
const COMMIT_EVERY: Duration = Duration::from_secs(2);

/// Files that this program puts beside the weights, which those of a model are not copied over.
pub const OWN: [&str; 7] = ["report.json", "report.html", "report.md", "run.json", "timing.json", "sensitivity.json", "manifest.json"];

/// A compressed checkpoint that is to be written.
#[derive(Debug)]
pub struct Export {
    /// Its format.
    pub format: &'static Format,
    /// Every linear layer as this format is to hold it.
    pub layers: Vec<Outlined>,
    /// Its tensors, in the order of the input.
    pub entries: Vec<Entry>,
    /// The file that it is, where it is one GGUF file.
    pub file: Option<gguf::File>,
    /// Folder within the output, where there are several.
    pub folder: Option<&'static str>,
    /// Experts that are left of those that a router chooses from, where some are removed.
    pub experts: Option<usize>,
}

/// The formats that a recipe asks for, or the best one of an engine; sets in which number format the plan's scales are
/// stored, so that every format holds the same ones.
///
/// # Errors
/// When a format is unknown or cannot hold a layer, or nothing serves the engine.
pub fn chosen(recipe: &Recipe, engine: Option<Engine>, plan: &mut Plan) -> Result<Vec<&'static Format>> {
    let outlined: Vec<Outlined> = plan.layers.iter().map(|layer| layer.outlined.clone()).collect();
    let names = recipe.formats();
    let mut chosen = match engine {
        Some(engine) if names.is_empty() => vec![engine.best(&outlined)?],
        _ if names.is_empty() => vec![formats::fitting(plan.format(), &outlined)?],
        _ => names.iter().map(|name| formats::fitting(name, &outlined)).collect::<Result<Vec<_>>>()?,
    };
    let mut seen = HashSet::new();
    chosen.retain(|format| seen.insert(format.name));
    if let Some(engine) = engine {
        for format in &chosen {
            let refused = |reason| Error::input(format!("{} does not load this as {}: {reason}", engine.name(), format.name));
            engine.loads(format, &outlined).map_err(refused)?;
        }
    }
    if let Some(float) = chosen.iter().find_map(|format| format.scales) {
        let ints = plan.layers.iter_mut().filter(|layer| matches!(layer.outlined.storage, Some(Storage::Ints { .. })));
        ints.for_each(|layer| layer.outlined.float = float);
    }
    Ok(chosen)
}

/// Layers of a quantized model that no stage works on become floats, for the output says nothing of how they were packed; so do
/// those that share a tensor with layers that leave it.
pub fn restore(plan: &mut Plan, checkpoint: &Checkpoint, source: &dyn Source) {
    let plain = |name: &str| checkpoint.info(&format!("{name}.weight")).is_some_and(|info| float_of(info.dtype).is_some());
    let shared = |name: &str| shared(source, checkpoint, name);
    let worked_on = plan.layers.iter().filter(|layer| layer.outlined.storage.is_some());
    let left: HashSet<String> = worked_on.filter_map(|layer| shared(&layer.outlined.name)).collect();
    for layer in plan.layers.iter_mut().filter(|layer| layer.outlined.storage.is_none()) {
        let name = &layer.outlined.name;
        let goes = match shared(name) {
            Some(tensor) => left.contains(&tensor),
            None => !plain(name) && source.shape(checkpoint, name).is_some(),
        };
        if goes {
            layer.outlined.storage = Some(Storage::Dense);
        }
    }
}

impl Export {
    /// Plans the tensors. `changes` are what stages change beside linear layers.
    ///
    /// # Errors
    /// When two tensors would have one name.
    pub fn new(
        checkpoint: &Checkpoint,
        source: &dyn Source,
        plan: &Plan,
        format: &'static Format,
        changes: &Changes,
        (options, several): (&recipe::Export, bool),
    ) -> Result<Self> {
        let dense = |outlined: &Outlined| {
            let float = checkpoint.info(&format!("{}.weight", outlined.name)).and_then(|info| float_of(info.dtype));
            Outlined { float: float.unwrap_or(outlined.float), ..outlined.clone() }
        };
        // Floats keep the model's own number format.
        let own = |outlined: &Outlined| if format.name == formats::dense::FORMAT.name { dense(outlined) } else { outlined.clone() };
        let layers: Vec<Outlined> = plan.layers.iter().map(|layer| own(&layer.outlined)).collect();
        let folder = several.then_some(format.name);
        if format.name == formats::gguf::FORMAT.name {
            let file = Some(gguf::File::plan(checkpoint, source, &layers, changes, options.gguf_embeddings_8)?);
            return Ok(Self { format, layers, entries: Vec::new(), file, folder, experts: plan.experts });
        }
        let floats = |layer: &&Outlined| !matches!(layer.storage, None | Some(Storage::Dense | Storage::Sparse(_)));
        if let Some(layer) = layers.iter().find(floats).filter(|_| formats::carries_experts(checkpoint)) {
            let what = "the experts are 4-bit floats already, and config.json has room for one quantization; prune instead, like --preset prune50, or remove experts with the method reap";
            return Err(Error::input(what).tensor(&layer.name));
        }
        let entries = entries(checkpoint, source, &layers, format, changes);
        let mut names = HashSet::new();
        if let Some(twice) = entries.iter().find(|entry| !names.insert(entry.name.as_str())) {
            let what = "already in the checkpoint, but the output needs this name; remove the stray tensor";
            return Err(Error::input(what).tensor(&twice.name));
        }
        Ok(Self { format, layers, entries, file: None, folder, experts: plan.experts })
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.file.as_ref().map_or_else(|| self.entries.iter().map(Entry::bytes).sum(), gguf::File::bytes)
    }

    /// Where it lies in an output.
    pub fn path(&self, output: &Path) -> PathBuf {
        self.folder.map_or_else(|| output.to_path_buf(), |folder| output.join(folder))
    }

    /// Copies everything else of the model's folder, and config.json with the section that the format adds.
    ///
    /// # Errors
    /// When a file cannot be copied.
    pub fn side_files(&self, checkpoint: &Checkpoint, output: &Path, storage: &dyn Store) -> Result<()> {
        let folder = self.path(output);
        let copy = |path: &Path| copy(path, &folder, storage);
        let licence = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().to_uppercase().starts_with("LICEN"));
        if self.file.is_some() {
            // Everything else is in the file.
            return checkpoint.side_files()?.iter().filter(|path| licence(path)).try_for_each(|path| copy(path));
        }
        let quantized = formats::quantization(checkpoint).is_some() && !formats::carries_experts(checkpoint);
        for path in checkpoint.side_files()? {
            let name = path.file_name().unwrap_or_default();
            let own = OWN.iter().any(|own| name == *own);
            if !(own || quantized && name == "quantize_config.json") {
                copy(&path)?;
            }
        }
        let config = folder.join("config.json");
        let mut value = checkpoint.config.clone();
        if let Some(object) = value.as_object_mut().filter(|_| quantized) {
            object.shift_remove("quantization_config");
            object.shift_remove("compression_config");
        }
        if let Some(left) = self.experts {
            set_experts(&mut value, left);
        }
        let Some(section) = (self.format.config)(&self.layers, &self.carried_matrices(checkpoint)) else {
            if quantized || self.experts.is_some() {
                return storage.put_json(&config, &value).map(drop);
            }
            let bytes = read_file(&checkpoint.folder.join("config.json"), 256 << 20)?;
            return storage.put(&config, &bytes).map(drop);
        };
        for (name, value) in (self.format.files)(&section) {
            storage.put_json(&folder.join(name), &value)?;
        }
        value["quantization_config"] = section;
        storage.put_json(&config, &value).map(drop)
    }

    /// Modules with a matrix of floats that no plan speaks of, embeddings aside: a loader must not expect them packed.
    fn carried_matrices(&self, checkpoint: &Checkpoint) -> Vec<String> {
        let planned: HashSet<&str> = self.layers.iter().map(|layer| layer.name.as_str()).collect();
        let matrix = |name: &&str| checkpoint.info(name).is_some_and(|info| info.shape.len() == 2 && float_of(info.dtype).is_some());
        let modules = checkpoint.names().filter(matrix).filter_map(|name| name.strip_suffix(".weight"));
        modules.filter(|name| !planned.contains(name) && !name.contains("embed") && !name.contains("wte")).map(str::to_string).collect()
    }

    /// Opens what was written as a stranger would and compares it with the plan.
    ///
    /// # Errors
    /// When it is not what was planned.
    pub fn verify(&self, output: &Path) -> Result<()> {
        let failed = |what: String| Error::new(Fault::Verification, format!("the output does not read back: {what}"));
        if let Some(file) = &self.file {
            return file.verify(&self.path(output)).map_err(|error| failed(error.to_string()));
        }
        let written = Checkpoint::open(&self.path(output)).map_err(|error| failed(error.to_string()))?;
        for entry in &self.entries {
            match written.info(&entry.name) {
                Some(info) if info.dtype == entry.dtype && info.shape == entry.shape => {}
                other => return Err(failed(format!("tensor {}: {other:?} instead of {:?} {:?}", entry.name, entry.dtype, entry.shape))),
            }
        }
        let count = written.names().count();
        if count != self.entries.len() {
            return Err(failed(format!("{count} tensors instead of {}", self.entries.len())));
        }
        formats::open(&written).map(drop).map_err(|error| failed(error.to_string()))
    }
}

/// Copies every tensor that no method works on, byte for byte.
///
/// # Errors
/// When a value is not finite, or as [`Sinks::carry`].
pub fn carry(
    checkpoint: &Checkpoint,
    source: &dyn Source,
    plan: &Plan,
    changes: &Changes,
    sinks: &mut Sinks<'_>,
    run: &Run<'_>,
) -> Result<()> {
    let written = plan.layers.iter().filter(|layer| layer.outlined.storage.is_some());
    let replaced: HashSet<String> = written.flat_map(|layer| source.tensors(checkpoint, &layer.outlined.name)).collect();
    run.observer.begin("copy the rest", checkpoint.shards.len() as u64);
    for shard in &checkpoint.shards {
        for (name, info) in shard.header.tensors.iter().filter(|(name, _)| !replaced.contains(*name) && !changes.contains_key(*name)) {
            if sinks.was_done(name) {
                continue;
            }
            run.check_stop()?;
            for start in (0..info.bytes()).step_by(PIECE as usize) {
                let bytes = shard.bytes(info, start..(start + PIECE).min(info.bytes()))?;
                if let Some((first, count)) = float_of(info.dtype).and_then(|float| nonfinite_bytes(float, &bytes)) {
                    let what = format!("{count} values are NaN or infinite, the first {first} after byte {start}; the model is damaged");
                    return Err(Error::input(what).tensor(name).file(&shard.path));
                }
                sinks.carry(name, &bytes, None)?;
            }
            sinks.done(name);
            sinks.commit_if_due(&mut Vec::new())?;
        }
        run.observer.step(1, "");
    }
    run.observer.end();
    Ok(())
}

fn copy(path: &Path, folder: &Path, storage: &dyn Store) -> Result<()> {
    let mut from = std::fs::File::open(path).map_err(|error| Error::unreadable(path, &error))?;
    let to = storage.create(&folder.join(path.file_name().unwrap_or_default()), 0)?;
    let (mut at, mut piece) = (0, vec![0; PIECE as usize]);
    loop {
        match from.read(&mut piece).map_err(|error| Error::unreadable(path, &error))? {
            0 => return Ok(()),
            read => {
                storage.write_at(&to, &piece[..read], at)?;
                at += read as u64;
            }
        }
    }
}

/// The tensors of an output, in the order of the input.
fn entries(checkpoint: &Checkpoint, source: &dyn Source, layers: &[Outlined], format: &Format, changes: &Changes) -> Vec<Entry> {
    let mut replaced: HashMap<String, Vec<Entry>> = HashMap::new();
    for layer in layers.iter().filter(|layer| layer.storage.is_some()) {
        // What holds the layer now stands where the first of its tensors stood.
        let mut before = source.tensors(checkpoint, &layer.name).into_iter();
        if let Some(first) = before.next() {
            replaced.entry(first).or_default().extend((format.entries)(layer));
        }
        for other in before {
            replaced.entry(other).or_default();
        }
    }
    let mut entries = Vec::new();
    for shard in &checkpoint.shards {
        let mut order: Vec<_> = shard.header.tensors.iter().collect();
        order.sort_by_key(|(_, info)| info.begin);
        for (name, info) in order {
            let mut own = Entry { name: name.clone(), dtype: info.dtype, shape: info.shape.clone() };
            match (replaced.remove(name), changes.get(name)) {
                (Some(replaced), _) => {
                    entries.extend(replaced);
                    continue;
                }
                (None, Some(Change::Gone)) => continue,
                (None, Some(Change::Single)) => own.dtype = Dtype::F32,
                (None, Some(Change::Rows(rows))) => own.shape[0] = *rows,
                (None, None) => {}
            }
            entries.push(own);
        }
    }
    entries
}

/// The files of all exports while they are written.
#[derive(Debug)]
pub struct Sinks<'a> {
    sinks: Vec<Sink<'a>>,
    writer: Option<Writer>,
    /// What is complete since the last commit.
    record: Record,
    before: HashSet<String>,
    committed: Instant,
}

#[derive(Debug)]
struct Sink<'a> {
    export: &'a Export,
    layout: Layout,
    /// Places of its layers by name.
    layers: HashMap<&'a str, usize>,
    waiting: gguf::Waiting,
}

impl<'a> Sinks<'a> {
    /// Files of no export: whatever is written is forgotten.
    pub fn nowhere() -> Self {
        Self { sinks: Vec::new(), writer: None, record: Record::default(), before: HashSet::new(), committed: Instant::now() }
    }

    /// Lays out the files of all exports in a work folder, or takes up those that lie there.
    ///
    /// # Errors
    /// When one cannot be made, or is not as it was left.
    pub fn create(exports: &'a [Export], metadata: &BTreeMap<String, String>, work: &Work, shard_bytes: u64) -> Result<Self> {
        let mut sinks = Self { before: work.done().names, ..Self::nowhere() };
        let (mut files, mut first) = (Vec::new(), Vec::new());
        for (number, export) in exports.iter().enumerate() {
            let folder = export.path(&work.output());
            let mut layout = match &export.file {
                Some(file) => file.layout(),
                None => Layout::shards(&export.entries, shard_bytes, metadata)?,
            };
            if work.resumes() {
                let hashes = hashes(work.records().iter().flat_map(|record| &record.tensors), number);
                files.push(Files::reopen(&layout, &folder, Arc::clone(&work.storage))?);
                layout.verify(&folder, &hashes)?.map_err(Error::damaged)?;
                hashes.keys().try_for_each(|name| layout.written(name))?;
            } else {
                work.storage.create_folder(&folder)?;
                files.push(Files::create(&layout, &folder, Arc::clone(&work.storage))?);
                work.storage.sync_folder(&folder)?;
            }
            let computed = export.file.iter().flat_map(gguf::File::computed);
            first.extend(computed.filter(|(name, _)| !layout.is_written(name)).map(|(name, bytes)| (number, name, bytes)));
            let layers = export.layers.iter().enumerate().map(|(at, layer)| (layer.name.as_str(), at)).collect();
            sinks.sinks.push(Sink { export, layout, layers, waiting: gguf::Waiting::new() });
        }
        work.storage.sync_folder(&work.output())?;
        sinks.writer = Some(Writer::start(files, Arc::clone(&work.storage), Some(work.log()?))?);
        for (number, name, bytes) in first {
            sinks.give(number, name, bytes)?;
        }
        Ok(sinks)
    }

    fn give(&mut self, export: usize, name: &str, bytes: Vec<u8>) -> Result<()> {
        let piece = self.sinks[export].layout.piece(name, bytes)?;
        self.writer.as_mut().map_or(Ok(()), |writer| writer.write(export, piece))
    }

    /// Takes the next bytes of a tensor that every export carries as it is, in the number format of the model's tensor or,
    /// where it was changed, in `float`.
    ///
    /// # Errors
    /// When the disk refuses, or the tensor is not part of the layout or already full.
    pub fn carry(&mut self, name: &str, bytes: &[u8], float: Option<Float>) -> Result<()> {
        for export in 0..self.sinks.len() {
            let sink = &mut self.sinks[export];
            let (name, bytes) = match &sink.export.file {
                Some(file) => match file.carry(&mut sink.waiting, name, bytes, float) {
                    Some(changed) => changed,
                    None => continue,
                },
                None => (name.to_owned(), bytes.to_vec()),
            };
            self.give(export, &name, bytes)?;
        }
        Ok(())
    }

    /// Takes the weight of a linear layer, by its place in the plan.
    ///
    /// # Errors
    /// As [`Self::carry`].
    pub fn layer(&mut self, name: &str, weight: &Weight) -> Result<()> {
        for number in 0..self.sinks.len() {
            let export = self.sinks[number].export;
            let layer = self.sinks[number].layers.get(name).map(|&at| &export.layers[at]);
            let layer = layer.ok_or_else(|| Error::run("not part of the planned output").tensor(name))?;
            if let Some(file) = &export.file {
                let (name, bytes) = file.layer(layer, weight)?;
                self.give(number, &name, bytes)?;
                continue;
            }
            for (entry, bytes) in (export.format.entries)(layer).iter().zip((export.format.encode)(weight, layer.float)) {
                self.give(number, &entry.name, bytes)?;
            }
        }
        self.done(name);
        Ok(())
    }

    /// Whether a tensor or layer of the model was done by an earlier run.
    pub fn was_done(&self, name: &str) -> bool {
        self.before.contains(name)
    }

    /// All of a tensor or layer of the model was given.
    fn done(&mut self, name: &str) {
        self.record.done.push(name.to_owned());
    }

    /// Records what is complete, with reports of layers, once in a while.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn commit_if_due(&mut self, layers: &mut Vec<LayerReport>) -> Result<()> {
        if self.committed.elapsed() < COMMIT_EVERY {
            return Ok(());
        }
        self.record.layers.append(layers);
        self.commit(Commit::default())
    }

    /// Records what is complete.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn commit(&mut self, mut commit: Commit) -> Result<()> {
        let record = std::mem::take(&mut self.record);
        commit.record.done.extend(record.done);
        commit.record.layers.extend(record.layers);
        self.committed = Instant::now();
        self.writer.as_mut().map_or(Ok(()), |writer| writer.commit(commit))
    }

    /// Records the rest, waits until everything is on the disk, and reads it back; gives the time for which others waited.
    ///
    /// # Errors
    /// When a tensor is incomplete or the disk refuses.
    pub fn finish(mut self, layers: Vec<LayerReport>, work: &Work) -> Result<Duration> {
        self.sinks.iter().try_for_each(|sink| sink.layout.complete())?;
        self.record.layers.extend(layers);
        self.commit(Commit::default())?;
        let Some(mut writer) = self.writer.take() else { return Ok(Duration::ZERO) };
        let complete = writer.settle()?;
        let recorded = || work.records().iter().flat_map(|record| &record.tensors).chain(&complete);
        for (number, Sink { export, layout, .. }) in self.sinks.iter().enumerate() {
            let hashes = hashes(recorded(), number);
            let failed = |what| Error::new(Fault::Verification, format!("the output does not read back: {what}"));
            layout.verify(&export.path(&work.output()), &hashes)?.map_err(failed)?;
        }
        Ok(writer.waited)
    }
}

/// Hashes of the tensors of an export.
fn hashes<'a>(recorded: impl Iterator<Item = &'a Hashed>, export: usize) -> HashMap<&'a str, &'a str> {
    recorded.filter(|tensor| tensor.export == export).map(|hashed| (hashed.tensor.as_str(), hashed.blake3.as_str())).collect()
}
