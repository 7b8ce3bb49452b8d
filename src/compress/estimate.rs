//! How long a run will take and how much memory it will need, from a short trial: the recipe's own stages on the first
//! block with a few windows, once with fewer and once with more, and a few windows of the measurement of quality. Where the
//! model is too large for a trial, floating-point operations are counted and divided by what a matrix product reaches here.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::calibrate::corpus::Packed;
use crate::checkpoint::source::{Source, Through};
use crate::compress::compressor::Compressor;
use crate::compress::exports::Sinks;
use crate::compress::{Prepared, model_of};
use crate::error::Result;
use crate::evaluate;
use crate::formats;
use crate::kernels::gemm::{Sizes, View, product};
use crate::memory;
use crate::model::hidden::Keeping;
use crate::model::mixture::Which;
use crate::model::passage::{activation_bytes, windows_at_once};
use crate::model::seen::Needs;
use crate::model::walk::{embed, walk_part};
use crate::model::{Model, Module, computes};
use crate::plan::recipe::Recipe;
use crate::plan::{Candidate, Plan};
use crate::run::{Muted, Run};
use crate::statistics;

/// Floating-point operations that a trial may cost; what is larger is counted.
const TRIAL_OPERATIONS: f64 = 2e11;

/// Tokens of a trial, about.
const TRIAL_TOKENS: usize = 4096;

/// A trial of fewer seconds than this is repeated with more windows.
const SHORTEST: f64 = 0.5;

/// What starts, ends and is written besides, in seconds.
const OVERHEAD: f64 = 0.1;

/// How much longer operations take where hundreds of small layers each see few tokens; as measured, between 2.0 and 2.5.
const OF_EXPERTS: f64 = 2.2;

/// Iterations of learned rounding in the two trials that tell what one costs.
const TRIAL_ITERATIONS: [i64; 2] = [4, 16];

/// What a run is expected to need.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Seconds.
    pub seconds: f64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Whether a trial was made.
    pub tried: bool,
}

/// Estimates a run that was prepared in `preparing` seconds.
///
/// # Errors
/// When the trial fails as the run would.
pub fn estimate(prepared: &Prepared, preparing: f64, run: &Run<'_>) -> Result<Estimate> {
    let muted = Muted(run.observer);
    let trial = Trial { prepared, run: &Run { observer: &muted, ..*run }, source: formats::open(&prepared.checkpoint)? };
    let bytes = prepared.size.bytes_before + prepared.size.bytes_after;
    // Reading and writing at what a usual disk sustains.
    let moving = OVERHEAD + bytes as f64 / 1e9;
    if !computes(&prepared.checkpoint) {
        let seconds = preparing + moving + trial.stream()?;
        return Ok(Estimate { seconds, memory_bytes: trial.memory(0), tried: true });
    }
    let source = Through::restored(formats::open(&prepared.checkpoint)?);
    let model = &model_of(&prepared.checkpoint, &source, &prepared.plan, prepared.needed)?;
    let needs = crate::compress::needs(&prepared.job.recipe, &prepared.plan);
    let tokens = |windows: &[Vec<u32>]| windows.iter().map(Vec::len).sum::<usize>();
    let calibration = prepared.calibration.as_ref().map_or(&[][..], |packed: &Packed| &packed.windows);
    let evaluation = prepared.evaluation.as_ref().map_or(&[][..], |(windows, _)| windows);
    let per_token = 2.0 * met(model);
    let widest = columns(model).into_iter().fold(1.0, f64::max);
    let trial_cost = 8.0 * per_token * TRIAL_TOKENS.min(tokens(calibration)) as f64 + 4.0 * widest.powi(3) * more_sites(model);
    let whole = 2.0 * (prepared.facts.parameters as f64 - passed_by(model)) * 2.0 * 512.0;
    if trial_cost > TRIAL_OPERATIONS || whole > TRIAL_OPERATIONS || prepared.generation.is_some() {
        let seconds = trial.counted(model, needs, tokens(calibration), tokens(evaluation));
        return Ok(Estimate { seconds: preparing + moving + seconds, memory_bytes: prepared.needed.memory_bytes, tried: false });
    }
    let mut seconds = preparing + moving;
    let mut growth = 0;
    let active = |tokens: usize| activation_bytes(model, tokens as u64);
    if needs == Needs::Nothing {
        seconds += trial.stream()?;
    } else {
        let (block, tried) = trial.blocks(model, calibration)?;
        seconds += block * model.config.layers.len() as f64;
        let width = model.config.hidden as u64;
        let store = |tokens: usize| Keeping::HALVED.memory_bytes(tokens as u64, width);
        let stores = if needs == Needs::Streams { 7 } else { 1 };
        growth = stores * (store(tokens(calibration)) - store(tried)) + active(tokens(calibration)) - active(tried);
    }
    if !evaluation.is_empty() {
        let (measuring, tried) = trial.quality(model, evaluation)?;
        // Logits of both models for the tokens that threads score at once; blocks and head do not need memory together.
        let slice = model.head_slices().next().map_or(0, |slice| slice.len());
        let scored = rayon::current_num_threads() * evaluation.iter().map(Vec::len).max().unwrap_or(0).min(512);
        let scoring = (2 * 4 * scored * slice) as u64;
        seconds += measuring;
        let store = |tokens: usize| Keeping::EXACT.memory_bytes(tokens as u64, model.config.hidden as u64);
        growth = growth
            .max(2 * (store(tokens(evaluation)) - store(tried)) + active(tokens(evaluation)).max(scoring) - active(tried).max(scoring));
    }
    Ok(Estimate { seconds, memory_bytes: trial.memory(growth), tried: true })
}

/// A trial of a prepared run.
struct Trial<'a> {
    prepared: &'a Prepared,
    run: &'a Run<'a>,
    source: Box<dyn Source>,
}

impl Trial<'_> {
    /// What this process has needed so far, and what the whole run needs beyond.
    fn memory(&self, growth: u64) -> u64 {
        memory::peak().map_or(self.prepared.needed.memory_bytes, |peak| peak + growth)
    }

    /// Seconds for all layers without calibration, from the first ones.
    fn stream(&self) -> Result<f64> {
        const SECONDS: f64 = 0.7;
        let entries = |shape: [usize; 2]| (shape[0] * shape[1]) as f64;
        let compressed = || self.prepared.plan.layers.iter().filter(|layer| layer.outlined.storage.is_some());
        let all: f64 = compressed().map(|layer| entries(layer.outlined.shape)).sum();
        let (started, mut done, mut count) = (Instant::now(), 0.0, 0);
        for layer in compressed() {
            if started.elapsed().as_secs_f64() > SECONDS {
                break;
            }
            count += 1;
            done += entries(layer.outlined.shape);
            let mut plan = self.plan(None)?;
            plan.layers.retain(|planned| planned.outlined.name == layer.outlined.name);
            Compressor::new(&plan, Sinks::nowhere(), false).stream(&self.prepared.checkpoint, self.source.as_ref(), self.run)?;
        }
        Ok(if count == 0 { 0.0 } else { started.elapsed().as_secs_f64() * all / done })
    }

    /// The plan again, with other iterations of learned rounding where it learns.
    fn plan(&self, iterations: Option<i64>) -> Result<Plan> {
        let mut recipe: Recipe = self.prepared.job.recipe.clone();
        if let Some(iterations) = iterations {
            let learning = recipe.stages.iter_mut().zip(&self.prepared.plan.stages);
            for (stage, _) in learning.filter(|(_, planned)| planned.method.iterations().is_some()) {
                stage.options.insert("iters".into(), toml::Value::Integer(iterations));
            }
        }
        let candidates = self.prepared.plan.layers.iter().map(|layer| &layer.outlined);
        let candidates: Vec<Candidate> = candidates
            .map(|one| Candidate { name: one.name.clone(), shape: one.shape, float: one.float, expert: one.name.contains(".experts.") })
            .collect();
        recipe.skip = self.prepared.plan.resolved(&recipe).skip;
        Plan::resolve(&recipe, &candidates, &[])
    }

    /// Seconds of the first block with some windows, and how many iterations it learned.
    fn block(&self, model: &Model<'_>, windows: &[Vec<u32>], iterations: Option<i64>) -> Result<f64> {
        let plan = self.plan(iterations)?;
        let started = Instant::now();
        let mut compressor = Compressor::new(&plan, Sinks::nowhere(), self.prepared.job.recipe.report.layer_error);
        let mut hidden = embed(model, windows, Keeping::HALVED, self.run)?;
        walk_part(model, 0..1, (&mut hidden, None), "", self.run, &mut compressor)?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Seconds per block with all windows, and the tokens of the larger trial.
    fn blocks(&self, model: &Model<'_>, windows: &[Vec<u32>]) -> Result<(f64, usize)> {
        let length = windows.iter().map(Vec::len).max().unwrap_or(1).max(1);
        // Ten windows or more, so that some are held out as in the run; learned rounding takes eight at a time.
        let unit = windows_at_once(model, length);
        let mut more = TRIAL_TOKENS.div_ceil(length).max(12).next_multiple_of(unit).min(windows.len());
        let [few, many] = TRIAL_ITERATIONS;
        let iterations = self.iterations().map(|_| few);
        self.block(model, &windows[..1], iterations)?;
        let mut fewer = (more / 2).next_multiple_of(unit).min(more - 1).max(1);
        let (mut small, mut large) = (self.block(model, &windows[..fewer], iterations)?, self.block(model, &windows[..more], iterations)?);
        while large < SHORTEST && more < windows.len() {
            (fewer, small, more) = (more, large, (2 * more).min(windows.len()));
            large = self.block(model, &windows[..more], iterations)?;
        }
        let per_window = slope((fewer, small), (more, large));
        let mut seconds = large + per_window * (windows.len() - more) as f64;
        if let Some(all) = self.iterations() {
            let per_iteration = ((self.block(model, &windows[..more], Some(many))? - large) / (many - few) as f64).max(0.0);
            seconds += per_iteration * (all - few) as f64;
        }
        Ok((seconds, windows[..more].iter().map(Vec::len).sum()))
    }

    /// Iterations of the stage that learns longest; none where no stage learns.
    fn iterations(&self) -> Option<i64> {
        self.prepared.plan.stages.iter().filter_map(|stage| stage.method.iterations()).max().map(|iterations| iterations as i64)
    }

    /// Seconds of the measurement of quality, and the tokens of the larger trial.
    fn quality(&self, model: &Model<'_>, windows: &[Vec<u32>]) -> Result<(f64, usize)> {
        let Some(options) = &self.prepared.job.quality else { return Ok((0.0, 0)) };
        let mut more = (2 * rayon::current_num_threads()).min(windows.len());
        let mut fewer = (more / 2).max(1);
        let time = |count: usize| -> Result<f64> {
            let started = Instant::now();
            evaluate::measure(model, Some(model), &windows[..count], options.protocol, self.run)?;
            Ok(started.elapsed().as_secs_f64())
        };
        time(1)?;
        let (mut small, mut large) = (time(fewer)?, time(more)?);
        while large < SHORTEST && more < windows.len() {
            (fewer, small, more) = (more, large, (2 * more).min(windows.len()));
            large = time(more)?;
        }
        let per_window = slope((fewer, small), (more, large));
        Ok((large + per_window * (windows.len() - more) as f64, windows[..more].iter().map(Vec::len).sum()))
    }

    /// Seconds by counting: forwards, Gram matrices and factors of the calibrated stages, learned iterations, and quality.
    fn counted(&self, model: &Model<'_>, needs: Needs, calibration: usize, evaluation: usize) -> f64 {
        let rate = product_rate();
        let (blocks, weights) = (model.config.layers.len() as f64, met(model));
        let columns = columns(model);
        let forwards = match needs {
            Needs::Nothing => 0.0,
            Needs::SquaredNorms | Needs::Gram => 2.6,
            Needs::Streams => 5.0,
        };
        let sites: f64 = columns.iter().map(|columns| columns * columns).sum();
        let grams = match needs {
            Needs::Nothing | Needs::SquaredNorms => 0.0,
            Needs::Gram => 1.0,
            Needs::Streams => 3.0,
        };
        let gathered = calibration as f64 * (forwards * 2.0 * weights + grams * sites);
        // What methods do with a layer beside factors of its inputs, by rows times the square of columns; as measured.
        let rounds = match needs {
            Needs::Nothing | Needs::SquaredNorms => 0.0,
            Needs::Gram => 5.0,
            Needs::Streams => 20.0,
        };
        let factors: f64 = if needs >= Needs::Gram { columns.iter().map(|columns| 4.0 * columns.powi(3)).sum() } else { 0.0 };
        let layers = few(model).into_iter().map(|module| module.shape[0] as f64 * (module.shape[1] as f64).powi(2)).sum::<f64>();
        let solved = (factors + rounds * layers) * more_sites(model);
        let length = self.prepared.calibration.as_ref().and_then(|packed| packed.windows.first()).map_or(2048, Vec::len) as f64;
        let learning = self.iterations().unwrap_or(0) as f64 * 8.0 * length * 6.0 * weights;
        let measured = 2.0 * evaluation as f64 * 2.0 * (self.prepared.facts.parameters as f64 - passed_by(model));
        let slower = if model.config.mixture.is_some() { OF_EXPERTS } else { 1.0 };
        (blocks * (gathered + solved + learning) + measured) * slower / rate
    }
}

/// Weights of the largest block that a token meets: of experts those that it goes to.
fn met(model: &Model<'_>) -> f64 {
    let mixed = model.config.mixture.map_or(0, |mixture| mixture.rule.chosen * mixture.width + mixture.shared.unwrap_or(0));
    model.block_bytes_at_once(true) as f64 / 4.0 + (3 * model.config.hidden * mixed) as f64
}

/// Weights of all experts that a token does not go to.
fn passed_by(model: &Model<'_>) -> f64 {
    let blocks = model.config.layers.iter().filter(|layer| layer.mixed).count();
    let others = model.config.mixture.map_or(0, |mixture| (mixture.experts - mixture.rule.chosen) * mixture.width);
    (3 * model.config.hidden * blocks * others) as f64
}

/// How many times as many sites are solved for as a token meets.
fn more_sites(model: &Model<'_>) -> f64 {
    model.config.mixture.map_or(1.0, |mixture| mixture.experts as f64 / mixture.rule.chosen as f64)
}

/// Layers of the first block; of experts, those of as many as a token goes to.
fn few(model: &Model<'_>) -> Vec<Module> {
    let chosen = model.config.mixture.map_or(0, |mixture| mixture.rule.chosen);
    let few = |module: &Module| !matches!(module.expert, Some(Which::Routed(expert)) if expert >= chosen);
    model.modules(0).into_iter().filter(few).collect()
}

/// Columns that the sites of [`few`] layers have.
fn columns(model: &Model<'_>) -> Vec<f64> {
    let mut sites = BTreeSet::new();
    let modules = few(model).into_iter();
    modules.filter(|module| sites.insert((module.expert, module.site()))).map(|module| module.shape[1] as f64).collect()
}

/// Seconds per window from two trials; hardly less than its share of the larger one, because differences of short times say little.
fn slope((fewer, small): (usize, f64), (more, large): (usize, f64)) -> f64 {
    let share = large / more.max(1) as f64;
    if more > fewer { ((large - small) / (more - fewer) as f64).clamp(0.7 * share, share) } else { share }
}

/// Floating-point operations per second of a matrix product here.
fn product_rate() -> f64 {
    const SIZE: usize = 1024;
    let (a, b, mut c) = (vec![0.5; SIZE * SIZE], vec![0.25; SIZE * SIZE], vec![0.0; SIZE * SIZE]);
    let sizes = Sizes { m: SIZE, n: SIZE, k: SIZE };
    // The median of many: the first ones wake threads and touch memory, and the fastest are the processor's sprints.
    let (started, mut times) = (Instant::now(), Vec::new());
    while started.elapsed().as_secs_f64() < 0.5 {
        let one = Instant::now();
        product(sizes, &mut c, SIZE, false, 1.0, View::rows(&a, SIZE), View::transposed(&b, SIZE), true);
        times.push(one.elapsed().as_secs_f64());
    }
    2.0 * (SIZE as f64).powi(3) / statistics::quantile(&mut times, 0.5)
}
