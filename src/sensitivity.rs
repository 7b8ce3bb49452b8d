//! The verb `sensitivity`: what every way to store every layer costs the model. Measured exactly, one layer compressed at a
//! time and the divergence of the whole model from itself taken; and predicted from one walk back, by the slopes of the
//! loss at the weights. The file that holds it is enough to solve any target afterwards.

mod experts;
pub mod file;
pub mod schemes;

use std::path::Path;
use std::time::{Duration, Instant};

use crate::calibrate::corpus::{self, hash_tokens};
use crate::error::{Error, Result};
use crate::evaluate::scores::{Beside, Scores};
use crate::evaluate::slope;
use crate::evaluate::sweep::Stream;
use crate::evaluate::{Bos, Protocol};
use crate::matrix::Matrix;
use crate::memory;
use crate::methods;
use crate::model::bench::Bench;
use crate::model::block::Slot;
use crate::model::hidden::{Hidden, Keeping};
use crate::model::seen::{Needs, Statistics};
use crate::model::slopes::{Inputs, Slope, Slopes};
use crate::model::walk::{BackVisitor, Pass, embed, walk, walk_back, walk_part};
use crate::model::{Model, Module};
use crate::plan::recipe::{Calibration, OneOrMany, Recipe};
use crate::report::bytes;
use crate::run::{Muted, Run};
use crate::sensitivity::file::{Candidate, Identity, LayerSensitivity, SCHEMA, Sensitivity};
use crate::sensitivity::schemes::Scheme;
use crate::statistics;
use crate::subject::Subject;
use crate::weight::{Float, Weight};

/// What to measure.
#[derive(Debug)]
pub struct Options {
    /// Ways to store a layer.
    pub schemes: Vec<Scheme>,
    /// What makes integers.
    pub method: String,
    /// Whether the exact measurement is made too.
    pub exact: bool,
    /// Windows of tokens, of one length.
    pub windows: Vec<Vec<u32>>,
    /// Where they come from, in words.
    pub source: String,
    /// Memory that the measurement may have, in bytes; what is free where nothing is said.
    pub memory: Option<u64>,
}

/// Which windows of calibration text to measure on.
#[derive(Debug, Clone)]
pub struct Windows {
    /// `builtin:mix` or files, comma-separated.
    pub source: String,
    /// Windows at most.
    pub samples: usize,
    /// Tokens per window, or as many as the model takes.
    pub seq: usize,
    /// Seed of the choice of windows.
    pub seed: u64,
}

impl Options {
    /// What to measure, with windows of a calibration text.
    ///
    /// # Errors
    /// When the text cannot be read or is too short.
    pub fn new(subject: &Subject, schemes: Vec<Scheme>, method: &str, exact: bool, text: Windows) -> Result<Self> {
        let model = subject.model()?;
        let mut recipe = Recipe::parse("version = 1")?;
        let seq = Some(text.seq.min(model.config.max_positions));
        recipe.calibration =
            Calibration { source: OneOrMany(vec![text.source]), samples: text.samples, seq, seed: text.seed, ..Calibration::default() };
        recipe.check()?;
        let packing = recipe.packing(model.config.max_positions)?;
        if packing.sources == [corpus::Source::Own] {
            return Err(Error::input("--calibration self: a sensitivity needs text that is there; use builtin:mix or files"));
        }
        let packed = corpus::pack(&packing, || subject.tokenizer(), model.config.eos.first().copied(), model.config.vocabulary)?;
        let mut windows = packed.windows;
        // Lines of token numbers may have any length; what is compared between windows needs one.
        let length = windows.iter().map(Vec::len).max().unwrap_or(0);
        windows.retain(|window| window.len() == length);
        if length < 2 {
            return Err(Error::input("the calibration text gives no window of two tokens; give more text"));
        }
        Ok(Self { schemes, method: method.into(), exact, windows, source: packed.counts.sources.join(", "), memory: None })
    }
}

/// All tokens of a window are scored.
const PROTOCOL: Protocol = Protocol { seq: 2, max_tokens: None, bos: Bos::None, second_half: false };

/// How long the parts took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// The walks, the slopes and all predictions.
    pub predicted: Duration,
    /// The exact measurement.
    pub exact: Duration,
}

/// Measures a model. What stands at `path` already and was measured on the same is kept, and every block that is done is
/// written there at once.
///
/// # Errors
/// When the model cannot be computed, or `path` holds another measurement.
pub fn sensitivity(subject: &Subject, options: &Options, path: Option<&Path>, run: &Run<'_>) -> Result<(Sensitivity, Times)> {
    let model = subject.model()?;
    fits(&model, options.memory).map_err(|error| error.file(&subject.path))?;
    let windows = &options.windows;
    let mut found = Sensitivity {
        schema: SCHEMA,
        drawknife: env!("CARGO_PKG_VERSION").into(),
        identity: identity(subject, options, run)?,
        complete: false,
        schemes: options.schemes.iter().map(|scheme| scheme.name.clone()).collect(),
        layers: Vec::new(),
        rank_correlation: None,
    };
    if let Some(path) = path.filter(|path| path.exists()) {
        found.layers = Sensitivity::open(path)?.resumed(&found, options.exact).map_err(|error| error.file(path))?;
    }
    let blocks = model.config.layers.len();
    let steps: usize = (0..blocks).map(|block| work(&model, block, options)).sum();
    run.observer.begin("sensitivity", steps as u64);
    let muted = Muted(run.observer);
    let quiet = Run { observer: &muted, ..*run };
    let started = Instant::now();
    let mut keeper = Inputs::new(blocks, &quiet);
    let mut hidden = embed(&model, windows, Keeping::EXACT, &quiet)?;
    walk(&model, &mut hidden, "", &quiet, &mut keeper)?;
    let inputs = keeper.blocks;
    let stream = Stream { model: &model, hidden };
    let drawn = slope::drawn(&stream, windows, &quiet)?;
    let mut slopes = [slope::slope(&stream, windows, &quiet)?, slope::slope(&stream, &drawn, &quiet)?];
    let scored = windows.iter().map(|window| window.len() - 1).sum::<usize>();
    let mut times = Times::default();
    let mut visitor =
        Measuring { stream: &stream, windows, options, scored, run, quiet: &quiet, found: &mut found, path, exact: &mut times.exact };
    walk_back(&model, &inputs, &mut slopes, &quiet, &mut visitor)?;
    run.observer.end();
    times.predicted = started.elapsed() - times.exact;
    found.finish();
    if let Some(path) = path {
        found.write(path)?;
    }
    Ok((found, times))
}

/// Refuses a mixture whose gradients memory has no room for: block, gradients, and both sums of them.
fn fits(model: &Model<'_>, memory: Option<u64>) -> Result<()> {
    let needed = 4 * model.block_bytes();
    match memory.or_else(memory::available) {
        Some(free) if model.config.mixture.is_some() && needed > free => Err(Error::input(format!(
            "gradients of a block of experts need about {} of memory, there are {}; compare whole models with `compare`",
            bytes(needed),
            bytes(free)
        ))),
        _ => Ok(()),
    }
}

/// Steps of the progress of an exact measurement in a block: it goes through all blocks after it and the head.
fn exactly(model: &Model<'_>, block: usize, options: &Options) -> usize {
    if options.exact { model.config.layers.len() - block } else { 0 }
}

/// Steps of the progress of a block: candidates of layers, and exact measurements, which experts share.
fn work(model: &Model<'_>, block: usize, options: &Options) -> usize {
    let modules = model.modules(block);
    let apart = modules.iter().filter(|module| module.expert.is_none()).count();
    let measured = apart + usize::from(apart < modules.len());
    options.schemes.len() * (modules.len() + measured * exactly(model, block, options))
}

fn identity(subject: &Subject, options: &Options, run: &Run<'_>) -> Result<Identity> {
    Ok(Identity {
        model: subject.fingerprint()?,
        tokens: hash_tokens(&options.windows),
        source: options.source.clone(),
        seq: options.windows.first().map_or(0, Vec::len),
        windows: options.windows.len(),
        device: run.device.kind().into(),
        method: options.method.clone(),
    })
}

/// Measures block by block, on the walk back.
struct Measuring<'a> {
    stream: &'a Stream<'a, 'a>,
    windows: &'a [Vec<u32>],
    options: &'a Options,
    /// Tokens scored.
    scored: usize,
    run: &'a Run<'a>,
    quiet: &'a Run<'a>,
    found: &'a mut Sensitivity,
    path: Option<&'a Path>,
    exact: &'a mut Duration,
}

impl BackVisitor for Measuring<'_> {
    fn needs(&mut self, index: usize) -> Needs {
        let model = self.stream.model;
        let modules = model.modules(index);
        let done = modules.iter().all(|module| self.found.layer(&module.name).is_some());
        if done {
            self.run.observer.step(work(model, index, self.options) as u64, &format!("block {index}, known"));
        }
        if done { Needs::Nothing } else { self.options.schemes.iter().map(Scheme::needs).max().unwrap_or(Needs::Nothing).max(Needs::Gram) }
    }

    fn visit(&mut self, bench: &mut Bench<'_>, slopes: &Slopes) -> Result<()> {
        let index = bench.index();
        let each = 1 + exactly(self.stream.model, index, self.options);
        let mut layers = Vec::new();
        let modules = self.stream.model.modules(index);
        for module in modules.iter().filter(|module| module.expert.is_none()) {
            let (mut layer, matrices) = self.layer(bench, module, &joined(module, slopes))?;
            if self.options.exact {
                let started = Instant::now();
                let effects = self.effects(index, matrices.len(), |hidden| bench.with_others(module, &matrices, hidden))?;
                layer.candidates.iter_mut().zip(effects).for_each(|(candidate, effect)| effect.into(candidate));
                *self.exact += started.elapsed();
            }
            self.run.observer.step((self.options.schemes.len() * each) as u64, &layer.name);
            layers.push(layer);
        }
        if modules.len() > layers.len() {
            layers.extend(self.experts(bench, slopes)?);
        }
        self.found.layers.retain(|layer| layer.block != index);
        self.found.layers.extend(layers);
        self.found.sort();
        self.path.map_or(Ok(()), |path| self.found.write(path))
    }
}

/// What the exact measurement says of one candidate.
#[derive(Debug, Clone, Copy)]
struct Effect {
    kld: f64,
    kld_stderr: Option<f64>,
    nll: f64,
    nll_stderr: Option<f64>,
}

impl Effect {
    /// A share of it.
    fn times(self, share: f64) -> Self {
        let of = |value: Option<f64>| value.map(|value| share * value);
        Self { kld: share * self.kld, kld_stderr: of(self.kld_stderr), nll: share * self.nll, nll_stderr: of(self.nll_stderr) }
    }

    fn into(self, candidate: &mut Candidate) {
        candidate.kld = Some(self.kld);
        candidate.kld_stderr = self.kld_stderr;
        candidate.nll = Some(self.nll);
        candidate.nll_stderr = self.nll_stderr;
    }
}

impl Measuring<'_> {
    /// Every scheme on one layer: what is known without another forward and, where they are measured exactly, the weights.
    fn layer(&self, bench: &Bench<'_>, module: &Module, slope: &Slope) -> Result<(LayerSensitivity, Vec<Matrix>)> {
        let (name, site) = (&module.name, module.site());
        let original = bench.originals(module)?.ok_or_else(|| Error::run("the original block was not kept").tensor(name))?;
        let statistics = bench.seen.at(site).map_err(|error| error.tensor(name))?;
        let mut matrices = Vec::new();
        let candidates = self.candidates(name, &original, slope, statistics, |_, weight| {
            if self.options.exact {
                matrices.push(weight.into_matrix());
            }
            Ok(())
        })?;
        Ok((LayerSensitivity { name: name.clone(), block: bench.index(), shape: module.shape, candidates, shares: false }, matrices))
    }

    /// Every scheme on one layer; `keep` is given what each made of it, with the number of the scheme.
    fn candidates(
        &self,
        name: &str,
        original: &Matrix,
        slope: &Slope,
        statistics: &Statistics,
        mut keep: impl FnMut(usize, Weight) -> Result<()>,
    ) -> Result<Vec<Candidate>> {
        let (shape, float) = ([original.rows, original.columns], Float::BF16);
        let mut candidates = Vec::new();
        for (number, scheme) in self.options.schemes.iter().enumerate() {
            self.quiet.check_stop()?;
            let (Some(storage), Some(bits)) = (scheme.leaves(shape), scheme.bits(shape, float)) else { continue };
            let weight = scheme.compress(name, original, Some(statistics), float, self.run.device.gpu.as_ref())?;
            let matrix = weight.to_matrix();
            let [gradient, predicted_kld] = predicted(slope, original, &matrix, self.scored);
            let share = |[change, total]: [f64; 2]| if total > 0.0 { change / total } else { 0.0 };
            candidates.push(Candidate {
                scheme: scheme.name.clone(),
                storage: storage.to_string(),
                bits,
                weight_error: share(methods::change(&original.data, &matrix.data)),
                layer_error: statistics.layer_error(original, &matrix).map(share),
                gradient,
                predicted_kld,
                kld: None,
                kld_stderr: None,
                nll: None,
                nll_stderr: None,
            });
            drop(matrix);
            keep(number, weight)?;
        }
        Ok(candidates)
    }

    /// The whole model for `count` candidates of a block, whose outputs `fill` gives: output c of window w as window w · count + c.
    fn effects(&self, index: usize, count: usize, fill: impl FnOnce(&mut Hidden) -> Result<()>) -> Result<Vec<Effect>> {
        let lengths: Vec<usize> = self.windows.iter().flat_map(|window| vec![window.len(); count]).collect();
        let mut hidden = self.stream.model.states(&lengths, Keeping::EXACT, self.run)?;
        fill(&mut hidden)?;
        walk_part(self.stream.model, index + 1..self.stream.model.config.layers.len(), (&mut hidden, None), "", self.quiet, &mut Pass)?;
        let own = Stream { model: self.stream.model, hidden };
        let scores = Scores::new(&own, Beside::Stream(self.stream), self.windows, PROTOCOL, self.quiet)?;
        let (klds, nlls) = (scores.means(|score| score.divergence), scores.means(|score| score.nll - score.reference_nll));
        let of =
            |values: &[f64], candidate: usize| statistics::mean(&values.iter().skip(candidate).step_by(count).copied().collect::<Vec<_>>());
        let effect = |candidate| {
            let ((kld, kld_stderr), (nll, nll_stderr)) = (of(&klds, candidate), of(&nlls, candidate));
            Effect { kld, kld_stderr, nll, nll_stderr }
        };
        Ok((0..count).map(effect).collect())
    }
}

/// The slopes of all roles of a module, one after the other.
fn joined(module: &Module, slopes: &Slopes) -> Slope {
    let mut whole = Slope::default();
    for slope in module.roles.iter().filter_map(|&role| slopes.get(&Slot { expert: module.expert, role })) {
        whole.gradient.extend_from_slice(&slope.gradient);
        whole.squares.extend_from_slice(&slope.squares);
    }
    whole
}

/// Two predictions of what a change of a weight does: Σ |dL/dW ⊙ (W − Ŵ)|, and in nats ½ Σ F ⊙ (W − Ŵ)² with the diagonal of
/// the Fisher matrix F, estimated by squares of the gradients of windows whose tokens the model drew itself.
fn predicted(slope: &Slope, original: &Matrix, compressed: &Matrix, scored: usize) -> [f64; 2] {
    use rayon::prelude::*;
    const CHUNK: usize = 1 << 14;
    let parts: Vec<[f64; 2]> = (slope.gradient.par_chunks(CHUNK).zip(slope.squares.par_chunks(CHUNK)))
        .zip(original.data.par_chunks(CHUNK).zip(compressed.data.par_chunks(CHUNK)))
        .map(|((gradient, squares), (w, q))| {
            let terms = gradient.iter().zip(squares).zip(w.iter().zip(q));
            terms.fold([0.0f64; 2], |[first, second], ((&gradient, &square), (w, q))| {
                let change = f64::from(w - q);
                [first + (f64::from(gradient) * change).abs(), second + f64::from(square) * change * change]
            })
        })
        .collect();
    let [first, second] = parts.iter().fold([0.0; 2], |total, part| [total[0] + part[0], total[1] + part[1]]);
    // A window's gradient is that of its share of the mean over all tokens: its square is F / scored² per token.
    [first, 0.5 * second * scored as f64]
}
