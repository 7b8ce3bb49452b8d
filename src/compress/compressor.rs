//! The work on layers and blocks: stage after stage, then into the output and the report.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::decode::encode;
use crate::checkpoint::source::Source;
use crate::compress::exports::Sinks;
use crate::compress::journal::{Kept, Record};
use crate::compress::remarks;
use crate::compress::work::Work;
use crate::compress::writer::Commit;
use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::kernels::quantize::Bounds;
use crate::matrix::Matrix;
use crate::methods::{self, BlockLayer, Layer, Method, Target, float_output};
use crate::model::arrivals::{Aim, Caught, Craft};
use crate::model::bench::Bench;
use crate::model::block::{Linear, Slot};
use crate::model::hidden::Hidden;
use crate::model::seen::{Needs, Statistics};
use crate::model::walk::Visitor;
use crate::plan::{Plan, Planned, Stage};
use crate::report::{BlockReport, LayerReport, StageReport};
use crate::run::Run;
use crate::weight::{Float, Weight};

/// Compresses layers as they come and writes them.
#[derive(Debug)]
pub struct Compressor<'a> {
    plan: &'a Plan,
    sinks: Sinks<'a>,
    layer_error: bool,
    /// Where hidden states are kept for whoever goes on, and the number of blocks.
    keeping: Option<(&'a Work, usize)>,
    layers: Vec<LayerReport>,
    /// Reports of layers since the last record.
    unrecorded: Vec<LayerReport>,
    blocks: Vec<BlockReport>,
    stages: Vec<StageReport>,
    /// Tokens that came to every expert of the block.
    experts: Vec<u64>,
    /// Mean entropy of the shares that its router gave.
    entropy: Option<f64>,
    /// The experts that were kept, where some were removed.
    kept: Vec<usize>,
    saving: Duration,
}

/// What a compressor did.
#[derive(Debug)]
pub struct Finished {
    /// Reports of all layers.
    pub layers: Vec<LayerReport>,
    /// Reports of all blocks.
    pub blocks: Vec<BlockReport>,
    /// How long it waited for what could be gone on with to be on the disk.
    pub committing: Duration,
}

/// What stages hand on and say about one layer.
#[derive(Debug, Default)]
struct Handed {
    bounds: Option<Bounds>,
    notes: Vec<String>,
    /// Of an expert's layer, whose statistics nobody keeps: its error on what was seen of its inputs.
    layer_error: Option<f64>,
}

/// What stages hand on about the layers of a block.
type HandedOn = BTreeMap<Slot, Handed>;

impl<'a> Compressor<'a> {
    /// A compressor that follows a plan and writes into an output.
    pub fn new(plan: &'a Plan, sinks: Sinks<'a>, layer_error: bool) -> Self {
        let (layers, unrecorded, blocks, stages, experts, kept) = Default::default();
        let (keeping, entropy, saving) = (None, None, Duration::ZERO);
        Self { plan, sinks, layer_error, keeping, layers, unrecorded, blocks, stages, experts, entropy, kept, saving }
    }

    /// As [`Self::new`], going on with the work of earlier runs, for a model of so many blocks.
    pub fn going_on(plan: &'a Plan, sinks: Sinks<'a>, layer_error: bool, work: &'a Work, blocks: usize) -> Self {
        let done = work.done();
        Self { keeping: Some((work, blocks)), layers: done.layers, blocks: done.blocks, ..Self::new(plan, sinks, layer_error) }
    }

    /// Works on layer after layer without calibration.
    ///
    /// # Errors
    /// When a layer cannot be read, compressed or written.
    pub fn stream(&mut self, checkpoint: &Checkpoint, source: &dyn Source, run: &Run<'_>) -> Result<()> {
        let plan = self.plan;
        run.observer.begin("compress", plan.layers.len() as u64);
        for planned in plan.layers.iter().filter(|planned| planned.outlined.storage.is_some()) {
            run.check_stop()?;
            let outlined = &planned.outlined;
            if self.sinks.was_done(&outlined.name) {
                run.observer.step(1, &outlined.name);
                continue;
            }
            let mut weight = source.weight(checkpoint, &outlined.name, outlined.shape)?;
            let original = (planned.stages.len() > 1).then(|| weight.to_matrix().into_owned());
            let (mut handed, mut change) = (Handed::default(), [0.0; 2]);
            handed.notes.extend(remarks::of_weight(&weight));
            for &stage in &planned.stages {
                (weight, change) = apply(&plan.stages[stage], planned, weight, None, &mut handed, run.device.gpu.as_ref())?;
            }
            if let Some(original) = original {
                change = methods::change(&original.data, &weight.to_matrix().data);
            }
            self.write(planned, &weight, change, None, handed.notes)?;
            self.sinks.commit_if_due(&mut self.unrecorded)?;
            run.observer.step(1, &outlined.name);
        }
        run.observer.end();
        Ok(())
    }

    /// Brings the output to the disk and gives the reports of all layers and blocks.
    ///
    /// # Errors
    /// When a tensor is incomplete or the disk fails.
    pub fn finish(self, work: &Work) -> Result<Finished> {
        let waited = self.sinks.finish(self.unrecorded, work)?;
        Ok(Finished { layers: self.layers, blocks: self.blocks, committing: self.saving + waited })
    }

    /// Records a block that is done, with the hidden states before the next one.
    fn commit(&mut self, block: BlockReport, streams: [(&str, Option<&Hidden>); 2]) -> Result<()> {
        let Some((work, blocks)) = self.keeping else { return Ok(()) };
        let started = Instant::now();
        let next = block.block + 1;
        let mut commit = Commit::default();
        for (stream, hidden) in streams {
            // Who still needs the states before last are those who find the last record damaged.
            commit.stale.extend(block.block.checked_sub(1).map(|before| work.path.join(Work::states(before, stream))));
            let Some(hidden) = hidden.filter(|hidden| next < blocks && !hidden.is_empty()) else { continue };
            let name = Work::states(next, stream);
            let file = work.storage.create(&work.path.join(&name), 0)?;
            let (bytes, blake3) = hidden.save(|offset, piece| work.storage.write_at(&file, piece, offset))?;
            commit.record.files.push(Kept { name, bytes, blake3: blake3.to_hex().to_string() });
            commit.files.push(file);
        }
        let layers = std::mem::take(&mut self.unrecorded);
        commit.record = Record { layers, block: Some(block), ..commit.record };
        self.saving += started.elapsed();
        self.sinks.commit(commit)
    }

    /// One stage on all layers of a block that it works on; gives the loss curve where there is one.
    fn stage(&self, number: usize, bench: &mut Bench<'_>, handed: &mut HandedOn) -> Result<(Vec<f64>, Vec<String>)> {
        let stage = &self.plan.stages[number];
        let mut layers = Vec::new();
        for slot in bench.block.slots() {
            let Some(name) = bench.block.linear(slot).map(|linear| linear.name.clone()) else { continue };
            let planned = self.plan.layer(&name).filter(|planned| planned.stages.contains(&number));
            if let Some(planned) = planned {
                let bounds = handed.get(&slot).and_then(|handed| handed.bounds.clone());
                let (float, bits, sparsity) = (planned.outlined.float, planned.bits, planned.sparsity);
                layers.push(BlockLayer { slot, name, float, bits, sparsity, bounds });
            }
        }
        layers.sort_by_key(|layer| layer.slot);
        if let Some(method) = stage.method.block() {
            let applied = method.apply_block(bench, &layers)?;
            // What was told of layers before is no longer true of them.
            handed.values_mut().for_each(|handed| handed.layer_error = None);
            for (slot, note) in applied.notes {
                handed.entry(slot).or_default().notes.push(note);
            }
            return Ok((applied.curve, applied.block_notes));
        }
        if stage.method.target() == Target::FloatOutput && !layers.is_empty() {
            for (slot, told) in float_output::by_site(bench, &layers, stage.method.as_ref())? {
                let handed = handed.entry(slot).or_default();
                handed.notes.extend(told.notes);
                handed.layer_error = told.layer_error.map(ratio);
            }
            return Ok(Default::default());
        }
        for layer in layers.iter().filter(|layer| layer.slot.expert.is_none()) {
            let planned = self.plan.layer(&layer.name).ok_or_else(|| Error::run("not part of the plan").tensor(&layer.name))?;
            // A method that needs nothing may run where nothing was observed.
            let statistics = match bench.seen.at(layer.slot.role.site()) {
                Ok(statistics) => Some(statistics),
                Err(_) if stage.method.needs() == Needs::Nothing => None,
                Err(error) => return Err(error.tensor(&layer.name)),
            };
            let linear = bench.block.linear_mut(layer.slot);
            let linear = linear.ok_or_else(|| Error::run("not part of the block").tensor(&layer.name))?;
            let weight = std::mem::replace(&mut linear.weight, Weight::Dense(Matrix::new(0, 0, Vec::new())));
            let gpu = bench.run.device.gpu.as_ref();
            (linear.weight, _) = apply(stage, planned, weight, statistics, handed.entry(layer.slot).or_default(), gpu)?;
        }
        if layers.iter().any(|layer| layer.slot.expert.is_some()) {
            let gpu = bench.run.device.gpu.clone();
            let told = bench.on_experts(&OnExperts { plan: self.plan, stage, layers: &layers, gpu: gpu.as_ref() })?;
            for (slot, more) in told {
                let handed = handed.entry(slot).or_default();
                handed.bounds = more.bounds;
                handed.layer_error = more.layer_error;
                handed.notes.extend(more.notes);
            }
        }
        Ok(Default::default())
    }

    /// Notes where tokens went, once it is known.
    fn came(&mut self, bench: &Bench<'_>) {
        if let Some(arrivals) = bench.arrivals.as_ref().filter(|_| self.experts.is_empty()) {
            self.experts = arrivals.routed.iter().map(|tokens| tokens.len() as u64).collect();
            self.entropy = Some(arrivals.entropy());
        }
    }

    /// Writes the layers of a block with their reports.
    fn write_block(&mut self, bench: &Bench<'_>, mut handed: HandedOn) -> Result<()> {
        let plan = self.plan;
        let tokens = (0..bench.hidden.len()).map(|window| bench.hidden.tokens(window)).sum();
        for module in bench.model.modules(bench.index()) {
            let Some(planned) = plan.layer(&module.name).filter(|planned| planned.outlined.storage.is_some()) else { continue };
            let (mut change, mut layer_error, mut notes) = ([0.0; 2], None, Vec::new());
            for handed in module.roles.iter().filter_map(|&role| handed.remove(&Slot { expert: module.expert, role })) {
                layer_error = layer_error.or(handed.layer_error);
                for note in handed.notes {
                    if !notes.contains(&note) {
                        notes.push(note);
                    }
                }
            }
            let weight = bench.joined(&module)?;
            if let Some(original) = bench.originals(&module)? {
                let (compressed, site) = (weight.to_matrix(), module.site());
                change = methods::change(&original.data, &compressed.data);
                notes.extend(remarks::of_floats(&original.data, original.columns));
                match module.expert {
                    Some(which) => notes.extend(bench.arrivals.as_ref().and_then(|arrivals| remarks::of_expert(arrivals, which))),
                    None => {
                        layer_error = bench.seen.layer_error(site, &original, &compressed).map(ratio);
                        notes.extend(remarks::of_inputs(&bench.seen, site, original.columns, tokens));
                    }
                }
            }
            self.write(planned, &weight, change, layer_error, notes)?;
        }
        if let Some(kept) = &bench.kept {
            self.kept.clone_from(kept);
            let [whole, _] = bench.model.by_expert(bench.index());
            for name in whole {
                bench.model.rows_of(&name, kept, |bytes| self.sinks.carry(&name, bytes, None))?;
            }
        }
        if plan.norms() {
            for norm in &bench.block.norms {
                self.sinks.carry(&norm.name, &encode(Float::F32, &norm.weight), Some(Float::F32))?;
            }
        }
        Ok(())
    }

    fn write(
        &mut self,
        planned: &Planned,
        weight: &Weight,
        change: [f64; 2],
        layer_error: Option<f64>,
        mut notes: Vec<String>,
    ) -> Result<()> {
        let outlined = &planned.outlined;
        if !change[0].is_finite() {
            return Err(Error::input("compression gave values that are not finite").tensor(&outlined.name));
        }
        self.sinks.layer(&outlined.name, weight)?;
        let storage = weight.storage();
        notes.extend(remarks::of_change(storage, ratio(change)));
        let entries = (outlined.shape[0] * outlined.shape[1]) as f64;
        let report = LayerReport {
            name: outlined.name.clone(),
            shape: outlined.shape,
            storage: storage.to_string(),
            bits_per_weight: storage.bits(outlined.shape, outlined.float) as f64 / entries,
            zeros: weight.zeros() as f64 / entries,
            weight_error: ratio(change),
            layer_error,
            notes,
        };
        self.unrecorded.push(report.clone());
        self.layers.push(report);
        Ok(())
    }
}

impl Visitor for Compressor<'_> {
    fn needs(&self) -> Needs {
        if self.layer_error { self.plan.needs().max(Needs::Gram) } else { self.plan.needs() }
    }

    fn observes(&self) -> Needs {
        let stages = self.plan.stages.iter().map(|stage| stage.method.as_ref());
        // What removes experts judges them by what the walk saw.
        let by_walk = |method: &&dyn Method| method.block().is_none() || method.removes_experts();
        let observed = stages.filter(|method| method.target() == Target::Weight && by_walk(method)).map(Method::needs).max();
        match (observed.unwrap_or(Needs::Nothing), self.needs()) {
            // Methods on the workbench see everything anew and leave it for the report.
            (observed, Needs::Streams) => observed,
            (_, needs) => needs,
        }
    }

    fn everywhere(&self) -> bool {
        self.plan.everywhere
    }

    fn visit(&mut self, bench: &mut Bench<'_>) -> Result<()> {
        let mut handed = HandedOn::default();
        // Before experts may be removed.
        self.came(bench);
        let mut before = bench.output_error()?;
        for number in 0..self.plan.stages.len() {
            bench.settled = false;
            let share = |number: usize| number as f64 / self.plan.stages.len() as f64;
            bench.progress.part(share(number), share(number + 1));
            let (curve, notes) = self.stage(number, bench, &mut handed)?;
            let after = bench.output_error()?;
            self.stages.push(StageReport { method: self.plan.stages[number].name.clone(), before, after, notes, curve });
            before = after;
        }
        self.came(bench);
        if let Some(gpu) = &bench.run.device.gpu {
            gpu.tidy();
        }
        self.write_block(bench, handed)
    }

    fn went_through(&mut self, index: usize, output_error: Option<f64>, hidden: &Hidden, float: Option<&Hidden>) -> Result<()> {
        let (stages, experts) = (std::mem::take(&mut self.stages), std::mem::take(&mut self.experts));
        let (router_entropy, experts_kept) = (self.entropy.take(), std::mem::take(&mut self.kept));
        let report = BlockReport { block: index, output_error, stages, experts, router_entropy, experts_kept };
        self.blocks.push(report.clone());
        self.commit(report, [("compressed", Some(hidden)), ("float", float)])
    }
}

/// One stage on the layers of experts.
struct OnExperts<'a> {
    plan: &'a Plan,
    stage: &'a Stage,
    layers: &'a [BlockLayer],
    gpu: Option<&'a Gpu>,
}

impl Craft for OnExperts<'_> {
    type Prepared = Option<Statistics>;
    type Told = Handed;

    fn aim(&self) -> Aim {
        Aim::Weight(self.stage.method.needs())
    }

    fn wants(&self, slot: Slot) -> bool {
        BlockLayer::find(self.layers, slot).is_some()
    }

    fn prepare(&self, caught: Caught) -> Option<Statistics> {
        match caught {
            Caught::Statistics(statistics) => statistics,
            Caught::Streams(_) => None,
        }
    }

    fn work(&self, statistics: &Option<Statistics>, linear: &mut Linear, slot: Slot, original: Option<Matrix>) -> Result<Handed> {
        let missing = || Error::run("not part of the plan");
        let layer = BlockLayer::find(self.layers, slot);
        let layer = layer.ok_or_else(missing)?;
        let planned = self.plan.layer(&layer.name).ok_or_else(missing)?;
        if statistics.is_none() && self.stage.method.needs() > Needs::Nothing {
            return Err(Error::run("no calibration was seen"));
        }
        let mut handed = Handed { bounds: layer.bounds.clone(), ..Handed::default() };
        let weight = std::mem::replace(&mut linear.weight, Weight::Dense(Matrix::new(0, 0, Vec::new())));
        (linear.weight, _) = apply(self.stage, planned, weight, statistics.as_ref(), &mut handed, self.gpu)?;
        let known = statistics.as_ref().zip(original);
        handed.layer_error = known.and_then(|(seen, original)| seen.layer_error(&original, &linear.weight.to_matrix())).map(ratio);
        Ok(handed)
    }
}

/// One stage on one layer; gives the weight and the sums of squares of its change and of what it was.
fn apply(
    stage: &Stage,
    planned: &Planned,
    weight: Weight,
    statistics: Option<&Statistics>,
    handed: &mut Handed,
    gpu: Option<&Gpu>,
) -> Result<(Weight, [f64; 2])> {
    let outlined = &planned.outlined;
    let layer = Layer {
        name: &outlined.name,
        statistics,
        float: outlined.float,
        bits: planned.bits,
        sparsity: planned.sparsity,
        bounds: handed.bounds.as_ref(),
        goal: None,
        gpu,
    };
    let applied = stage.method.apply(weight, &layer).map_err(|error| error.tensor(&outlined.name))?;
    handed.bounds = applied.bounds.or(handed.bounds.take());
    handed.notes.extend(applied.notes);
    Ok((applied.weight, applied.change))
}

fn ratio([change, total]: [f64; 2]) -> f64 {
    if total > 0.0 { change / total } else { 0.0 }
}
