//! The only loops over blocks, forward and back. Compression, calibration and perplexity are visitors.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use burn::tensor::Tensor;

use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::kernels::gram::gpu::Gram;
use crate::kernels::gram::{self, add_column_squares, add_gram};
use crate::kernels::{Floats, tensor, values};
use crate::model::Model;
use crate::model::arrivals::Arrivals;
use crate::model::bench::{Bench, Between, Streams, relative_error};
use crate::model::block::{Parameters, Site};
use crate::model::forward::{self, Point, Spec, Tap};
use crate::model::hidden::{Hidden, Keeping};
use crate::model::seen::{Needs, Seen, Statistics};
use crate::model::slopes::{self, Slope};
use crate::run::Run;

/// Windows whose block outputs are compared before and after the visit.
const COMPARED: usize = 2;

/// Tokens whose inputs are kept to tell the errors of layers where no Gram matrix is gathered.
const SAMPLED: usize = 512;

/// Memory that the activations of one run of windows may take, in bytes: many small windows share one matrix product,
/// which reads the weights once.
const RUN_BYTES: usize = 32 << 20;

/// What happens to each block.
pub trait Visitor {
    /// What must have been seen before [`Self::visit`].
    fn needs(&self) -> Needs;

    /// What the original block must have been seen doing on the compressed stream; as [`Self::needs`], unless everything
    /// is seen anew on the workbench.
    fn observes(&self) -> Needs {
        self.needs()
    }

    /// Whether every token counts for every expert of a mixture, wherever its router sends it.
    fn everywhere(&self) -> bool {
        false
    }

    /// Works on a block; the walk goes on with the block as it then stands.
    ///
    /// # Errors
    /// Whatever stops the walk.
    fn visit(&mut self, bench: &mut Bench<'_>) -> Result<()>;

    /// Told, after the walk went through the block, the relative squared error of its output on some windows, and shown the
    /// hidden states before the next block: those of the walk and those of the float model, where it keeps them.
    ///
    /// # Errors
    /// Whatever stops the walk.
    fn went_through(&mut self, _index: usize, _output_error: Option<f64>, _hidden: &Hidden, _float: Option<&Hidden>) -> Result<()> {
        Ok(())
    }
}

/// A visitor that changes nothing: the walk is then an evaluation.
#[derive(Debug)]
pub struct Pass;

impl Visitor for Pass {
    fn needs(&self) -> Needs {
        Needs::Nothing
    }
    fn visit(&mut self, _: &mut Bench<'_>) -> Result<()> {
        Ok(())
    }
}

/// Puts the embedding of windows of tokens into a store of hidden states.
///
/// # Errors
/// When a token is beyond the vocabulary or the store cannot be written.
pub fn embed(model: &Model<'_>, windows: &[Vec<u32>], keeping: Keeping, run: &Run<'_>) -> Result<Hidden> {
    let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
    let mut hidden = Hidden::new(&lengths, model.config.hidden, keeping, run.scratch)?;
    for (number, window) in windows.iter().enumerate() {
        hidden.write(number..number + 1, &model.embed(window)?)?;
    }
    Ok(hidden)
}

/// Walks over all blocks, one resident at a time. `hidden` enters with the embeddings and leaves with the last
/// block's outputs; each block's input is the output of the visited, not the original, block before it.
///
/// # Errors
/// When a block cannot be read, an output is not finite, a signal asks to stop, or the visitor fails.
pub fn walk(model: &Model<'_>, hidden: &mut Hidden, stage: &str, run: &Run<'_>, visitor: &mut dyn Visitor) -> Result<()> {
    walk_part(model, 0..model.config.layers.len(), (hidden, None), stage, run, visitor)
}

/// As [`walk`], through some blocks only; `hidden` enters with the inputs of the first of them, and `float` is what the float
/// model has there, where that is something else.
///
/// # Errors
/// As [`walk`].
pub fn walk_part(
    model: &Model<'_>,
    blocks: Range<usize>,
    (hidden, float): (&mut Hidden, Option<Hidden>),
    stage: &str,
    run: &Run<'_>,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    let needs = visitor.needs();
    let calibrated = needs > Needs::Nothing && !hidden.is_empty();
    let passes = if calibrated { 2 } else { 1 };
    run.observer.begin(stage, (blocks.len() * (passes * hidden.len()).max(1)) as u64);
    let mut float = if calibrated && needs == Needs::Streams { Some(FloatStream::new(model, hidden, float, run)?) } else { None };
    for index in blocks {
        run.check_stop()?;
        let note = format!("block {index}");
        let mut block = model.load_block(index)?;
        let (mut seen, mut wanted, mut original, mut arrivals) = (Seen::default(), Vec::new(), None, None);
        if calibrated {
            let parameters = Parameters::take(&mut block, None, run.device);
            original = Some(parameters.clone());
            if visitor.observes() > Needs::Nothing {
                let needs = visitor.observes();
                (seen, wanted) = if model.config.layers[index].mixed {
                    let found = observe_mixture(model, index, &parameters, hidden, (needs, visitor.everywhere()), run, &note)?;
                    arrivals = Some(found.1);
                    (found.0, found.2)
                } else {
                    observe(model, index, &parameters, hidden, needs, run, &note)?
                };
            }
            if let Some(float) = &mut float {
                float.fit(model, index, hidden, run)?;
                wanted = float.advance(model, index, &parameters, run)?;
            }
            if visitor.observes() < Needs::Gram {
                seen.inputs = first_inputs(model, index, &parameters, hidden, run)?;
            }
            parameters.give_back_own(&mut block);
        }
        let streams = float.as_mut().map(FloatStream::lend);
        let everywhere = visitor.everywhere();
        let mut bench =
            Bench { model, block, seen, arrivals, everywhere, kept: None, run, hidden, original, streams, wanted, settled: false };
        visitor.visit(&mut bench)?;
        let Bench { mut block, wanted, settled, original, .. } = bench;
        // Where nothing of the original is needed any more, it goes before floats are made of what came of it.
        let original = original.filter(|_| !block.is_whole());
        let parameters = Parameters::take(&mut block, original.as_ref(), run.device);
        drop((block, original));
        // The MLP of a parallel block reads what stands before attention.
        let middle = settled && !model.config.family.places.parallel;
        let joined = float.as_ref().filter(|_| middle).map(FloatStream::joined);
        let after = advance(model, index, &parameters, hidden, joined, run, &note)?;
        if hidden.is_empty() {
            run.observer.step(1, &note);
        }
        if let Some(float) = &mut float {
            float.next();
        }
        visitor.went_through(index, relative_error(&wanted, &after), hidden, float.as_ref().map(|float| &float.inputs))?;
    }
    run.observer.end();
    Ok(())
}

/// A visitor of the walk back.
pub trait BackVisitor {
    /// What must have been seen at the sites of the block; asked before each block.
    fn needs(&mut self, index: usize) -> Needs;

    /// Looks at a block with the slopes of its weights, by role.
    ///
    /// # Errors
    /// Whatever stops the walk.
    fn visit(&mut self, bench: &mut Bench<'_>, slopes: &[Slope]) -> Result<()>;
}

/// Walks back, from the last block to the first. `inputs` are those of every block, `streams` enter with the gradients of two losses
/// at the last hidden states: of the first the gradients of all windows are summed, of the second their squares.
///
/// # Errors
/// When a block cannot be read, or the visitor fails.
pub fn walk_back(
    model: &Model<'_>,
    inputs: &[Hidden],
    streams: &mut [Hidden; 2],
    run: &Run<'_>,
    visitor: &mut dyn BackVisitor,
) -> Result<()> {
    for (index, hidden) in inputs.iter().enumerate().rev() {
        run.check_stop()?;
        let needs = visitor.needs(index);
        let mut bench = opened(model, index, hidden, needs, run)?;
        let Some(original) = bench.original.clone() else { continue };
        let parameters = if bench.block.stays() { bench.parameters() } else { original };
        let found = slopes::through(model, index, &parameters, hidden, streams, needs > Needs::Nothing, run)?;
        if needs > Needs::Nothing {
            visitor.visit(&mut bench, &found)?;
        }
    }
    Ok(())
}

/// A block on the workbench of the walk back with what it was seen doing: `hidden` are its inputs.
fn opened<'a>(model: &'a Model<'a>, index: usize, hidden: &'a Hidden, needs: Needs, run: &'a Run<'a>) -> Result<Bench<'a>> {
    let mut block = model.load_block(index)?;
    let parameters = Parameters::take(&mut block, None, run.device);
    let original = Some(parameters.clone());
    let (seen, wanted) = match needs {
        Needs::Nothing => Default::default(),
        _ => observe(model, index, &parameters, hidden, needs, run, "")?,
    };
    parameters.give_back(&mut block);
    let (arrivals, everywhere) = Default::default();
    Ok(Bench { model, block, seen, arrivals, everywhere, kept: None, run, hidden, original, streams: None, wanted, settled: false })
}

/// Memory for what must have been seen of so many tokens, in bytes, beside the block and the hidden states: Gram matrices
/// of all sites and, for both streams, the stores of the float stream and of the states between sites (what is over their
/// budget lies on disk), and the sums of the widest site for most windows, those held out, and all.
pub fn memory_bytes(model: &Model<'_>, tokens: u64, needs: Needs) -> u64 {
    let config = &model.config;
    let (hidden, query, middle) = (config.hidden as u64, config.widest_mixed() as u64, config.widest_middle() as u64);
    let square = |columns: u64| 8 * columns * columns;
    let gram = if needs >= Needs::Gram { 2 * square(hidden) + square(query) + square(middle) } else { 0 };
    if needs < Needs::Streams {
        return gram;
    }
    let store = |width: u64| Keeping::HALVED.memory_bytes(tokens, width);
    gram + 4 * store(hidden) + 2 * store(query) + 6 * square(hidden.max(query).max(middle))
}

/// The hidden states of the float model beside those of the compressed one.
struct FloatStream {
    inputs: Hidden,
    targets: Hidden,
    between: [Between; 2],
}

impl FloatStream {
    fn new(model: &Model<'_>, hidden: &Hidden, inputs: Option<Hidden>, run: &Run<'_>) -> Result<Self> {
        let between = || Between::new(model.config.hidden, hidden, run);
        let inputs = inputs.map_or_else(|| hidden.copy(run.scratch), Ok)?;
        Ok(Self { inputs, targets: hidden.copy(run.scratch)?, between: [between()?, between()?] })
    }

    /// Makes room for states between the sites of a block, where they are of another width than those of the block before.
    fn fit(&mut self, model: &Model<'_>, index: usize, hidden: &Hidden, run: &Run<'_>) -> Result<()> {
        let width = model.config.mixed_width(index);
        self.between.iter_mut().try_for_each(|between| between.fit(width, hidden, run))
    }

    /// Computes the outputs of the original block; gives those of the first windows.
    fn advance(&mut self, model: &Model<'_>, index: usize, parameters: &Parameters, run: &Run<'_>) -> Result<Vec<Vec<f32>>> {
        let mut first = Vec::new();
        for runs in batches(model, &self.inputs, false, run) {
            run.check_stop()?;
            let inputs = &self.inputs;
            let outputs = inputs.map(&runs, |windows, x| {
                let (mut mixed, mut joined) = (Vec::new(), Vec::new());
                let seq = inputs.tokens(windows.start);
                let y = forward_run(model, index, parameters, seq, x, run, &mut |point, x| match point {
                    Point::Site(Site::Output) => mixed = values(x.clone()),
                    Point::Joined => joined = values(x.clone()),
                    _ => {}
                });
                Ok((mixed, joined, y))
            })?;
            for (windows, (mixed, joined, y)) in runs.iter().zip(outputs) {
                self.between[1].keep(windows.clone(), &mixed, &joined)?;
                self.targets.write(windows.clone(), &y)?;
                keep_first(&mut first, windows, y);
            }
        }
        Ok(first)
    }

    /// The compressed residual stream after attention.
    fn joined(&self) -> &Hidden {
        self.between[0].joined()
    }

    fn lend(&mut self) -> Streams<'_> {
        Streams { inputs: &self.inputs, targets: &self.targets, between: &mut self.between }
    }

    fn next(&mut self) {
        std::mem::swap(&mut self.inputs, &mut self.targets);
    }
}

/// Runs the original block on its inputs and gathers statistics; hidden states stay as they are.
fn observe(
    model: &Model<'_>,
    index: usize,
    parameters: &Parameters,
    hidden: &Hidden,
    needs: Needs,
    run: &Run<'_>,
    note: &str,
) -> Result<(Seen, Vec<Vec<f32>>)> {
    let mut seen = Seen::default();
    let mut outputs = Vec::new();
    let grams = Mutex::new(BTreeMap::new());
    for runs in batches(model, hidden, needs >= Needs::Gram, run) {
        run.check_stop()?;
        let results = hidden.map(&runs, |windows, x| {
            let mut sites = BTreeMap::new();
            let y = forward_run(model, index, parameters, hidden.tokens(windows.start), x, run, &mut |point, input| {
                if let Point::Site(site) = point {
                    sites.insert(site, statistics(site, input, needs, run.device.gpu.as_ref(), &grams));
                }
            });
            let sites = sites.into_iter().map(|(site, statistics)| Ok((site, statistics?))).collect::<Result<BTreeMap<_, _>>>()?;
            Ok((sites, y))
        })?;
        for (windows, (sites, y)) in runs.iter().zip(results) {
            for (site, statistics) in sites {
                merge(seen.sites.entry(site).or_default(), statistics);
            }
            keep_first(&mut outputs, windows, y);
        }
        run.observer.step(runs.iter().map(Range::len).sum::<usize>() as u64, note);
    }
    for (site, gram) in grams.into_inner().unwrap_or_else(PoisonError::into_inner) {
        seen.sites.entry(site).or_default().gram = Some(gram.totals()?);
    }
    Ok((seen, outputs))
}

/// What was seen, where tokens went, and the outputs of the first windows.
type WatchedMixture = (Seen, Arrivals, Vec<Vec<f32>>);

/// As [`observe`] for a mixture of experts, up to what its experts read: those see their own tokens one after the other, later.
fn observe_mixture(
    model: &Model<'_>,
    index: usize,
    parameters: &Parameters,
    hidden: &Hidden,
    (needs, everywhere): (Needs, bool),
    run: &Run<'_>,
    note: &str,
) -> Result<WatchedMixture> {
    let (mut seen, mut outputs) = (Seen::default(), Vec::new());
    let (Some(experts), Some(described)) = (parameters.experts(), &model.config.mixture) else {
        return Err(Error::run("a mixture without experts"));
    };
    let mut arrivals = Arrivals::new(described.experts, everywhere);
    let mut source = hidden.like(model.config.hidden, run.scratch)?;
    for runs in batches(model, hidden, needs >= Needs::Gram, run) {
        run.check_stop()?;
        let results = hidden.map(&runs, |windows, x| {
            let mut sites = BTreeMap::new();
            let spec = Spec::new(&model.config, index, hidden.tokens(windows.start));
            let x: Tensor<2> = tensor(x, [windows.len() * spec.seq, model.config.hidden], &run.device.burn);
            let [read, h] = forward::first_half(&spec, parameters, x, &mut |point, input| {
                if let Point::Site(site) = point {
                    sites.insert(site, statistics(site, input, needs, None, &Mutex::default()));
                }
            });
            drop(h);
            let input = forward::mlp_input(&spec, parameters, read.clone());
            sites.insert(Site::Mlp, statistics(Site::Mlp, &input, Needs::SquaredNorms, None, &Mutex::default()));
            let sites = sites.into_iter().map(|(site, statistics)| Ok((site, statistics?))).collect::<Result<BTreeMap<_, _>>>()?;
            Ok((sites, values(experts.logits(&input)), values(read)))
        })?;
        for (windows, (sites, logits, read)) in runs.iter().zip(results) {
            for (site, statistics) in sites {
                merge(seen.sites.entry(site).or_default(), statistics);
            }
            arrivals.add(&logits, &experts.correction, described.rule);
            source.write(windows.clone(), &read)?;
            if windows.start < COMPARED {
                let windows = windows.start..windows.end.min(COMPARED);
                let seq = hidden.tokens(windows.start);
                let y = forward_run(model, index, parameters, seq, hidden.read(windows.clone())?, run, &mut |_, _| {});
                keep_first(&mut outputs, &windows, y);
            }
        }
        run.observer.step(runs.iter().map(Range::len).sum::<usize>() as u64, note);
    }
    arrivals.keep(source);
    Ok((seen, arrivals, outputs))
}

/// Inputs of all sites of the original block for the first tokens.
fn first_inputs(
    model: &Model<'_>,
    index: usize,
    parameters: &Parameters,
    hidden: &Hidden,
    run: &Run<'_>,
) -> Result<BTreeMap<Site, Vec<f32>>> {
    let Some(windows) = runs(model, hidden).into_iter().next() else { return Ok(BTreeMap::new()) };
    let seq = hidden.tokens(windows.start);
    let windows = windows.start..windows.end.min(windows.start + (SAMPLED / seq.max(1)).max(1));
    let mut inputs = BTreeMap::new();
    forward_run(model, index, parameters, seq, hidden.read(windows)?, run, &mut |point, input| {
        if let Point::Site(site) = point {
            let kept = SAMPLED * input.dims()[1];
            let mut input = values(input.clone());
            input.truncate(kept);
            inputs.insert(site, input);
        }
    });
    Ok(inputs)
}

/// Sends all hidden states through a block, from the middle where its first half is known (`joined`); gives the outputs
/// of the first windows.
fn advance(
    model: &Model<'_>,
    index: usize,
    parameters: &Parameters,
    hidden: &mut Hidden,
    joined: Option<&Hidden>,
    run: &Run<'_>,
    note: &str,
) -> Result<Vec<Vec<f32>>> {
    let mut first = Vec::new();
    for runs in batches(model, hidden, false, run) {
        run.check_stop()?;
        let outputs = joined.unwrap_or(hidden).map(&runs, |windows, x| {
            let seq = hidden.tokens(windows.start);
            let y = match joined {
                Some(_) => second_half(model, index, parameters, seq, x, run),
                None => forward_run(model, index, parameters, seq, x, run, &mut |_, _| {}),
            };
            match crate::checkpoint::decode::nonfinite(&y) {
                Some((_, count)) => Err(Error::input(format!(
                    "block {index} gives {count} values that are NaN or infinite for window {} or after; the model is damaged or overflows",
                    windows.start
                ))),
                None => Ok(y),
            }
        })?;
        for (windows, y) in runs.iter().zip(outputs) {
            hidden.write(windows.clone(), &y)?;
            keep_first(&mut first, windows, y);
        }
        run.observer.step(runs.iter().map(Range::len).sum::<usize>() as u64, note);
    }
    Ok(first)
}

/// The outputs of a block for windows of `seq` tokens.
fn forward_run(model: &Model<'_>, index: usize, parameters: &Parameters, seq: usize, x: Vec<f32>, run: &Run<'_>, tap: Tap<'_>) -> Vec<f32> {
    let tokens = x.len() / model.config.hidden;
    let x: Tensor<2> = tensor(x, [tokens, model.config.hidden], &run.device.burn);
    values(forward::block(&Spec::new(&model.config, index, seq), parameters, x, tap))
}

/// The outputs of a block whose residual stream after attention is known.
fn second_half(model: &Model<'_>, index: usize, parameters: &Parameters, seq: usize, h: Vec<f32>, run: &Run<'_>) -> Vec<f32> {
    let spec = Spec::new(&model.config, index, seq);
    let tokens = h.len() / model.config.hidden;
    let h: Tensor<2> = tensor(h, [tokens, model.config.hidden], &run.device.burn);
    values(forward::second_half(&spec, parameters, h.clone(), h, &mut |_, _| {}))
}

/// Keeps outputs until those of the windows that are compared are there.
fn keep_first(kept: &mut Vec<Vec<f32>>, windows: &Range<usize>, output: Vec<f32>) {
    if windows.start < COMPARED {
        let each = output.len() / windows.len();
        kept.push(output[..each * windows.len().min(COMPARED - windows.start)].to_vec());
    }
}

/// Windows of so many tokens that all threads work on at once.
pub fn windows_at_once(model: &Model<'_>, length: usize) -> usize {
    let each = activation_bytes_of(model, length as u64).max(1);
    (RUN_BYTES as u64 / each).max(1) as usize * rayon::current_num_threads()
}

fn activation_bytes_of(model: &Model<'_>, tokens: u64) -> u64 {
    let config = &model.config;
    4 * 3 * (config.hidden + config.widest_mixed() + config.widest_middle()) as u64 * tokens
}

/// Memory for the activations of so many tokens, in bytes: of one run of windows per thread.
pub fn activation_bytes(model: &Model<'_>, tokens: u64) -> u64 {
    activation_bytes_of(model, tokens).min((rayon::current_num_threads() * RUN_BYTES) as u64)
}

/// Runs of windows that share matrix products, cut by their size alone.
pub(crate) fn runs(model: &Model<'_>, hidden: &Hidden) -> Vec<Range<usize>> {
    let config = &model.config;
    let floats_per_token = 3 * (config.hidden + config.widest_mixed() + config.widest_middle());
    hidden.runs(RUN_BYTES / (4 * floats_per_token))
}

/// Runs of windows that are worked on at once: one run per thread, or one at all when each needs much memory or a GPU works.
fn batches(model: &Model<'_>, hidden: &Hidden, single: bool, run: &Run<'_>) -> Vec<Vec<Range<usize>>> {
    let runs = runs(model, hidden);
    runs.chunks(if single || run.device.gpu.is_some() { 1 } else { rayon::current_num_threads() }).map(<[_]>::to_vec).collect()
}

/// Statistics of an input of a site. Where it lies on a GPU its Gram matrix adds up there, in `grams`.
fn statistics(site: Site, input: &Tensor<2>, needs: Needs, gpu: Option<&Gpu>, grams: &Mutex<BTreeMap<Site, Gram>>) -> Result<Statistics> {
    let [tokens, columns] = input.dims();
    let mut statistics = Statistics::new(tokens as u64, vec![0.0; columns], None);
    if let Some((gpu, buffer)) = gpu.and_then(|gpu| Some((gpu, gpu.buffer(input)?))) {
        let mut grams = grams.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = (needs >= Needs::Gram).then(|| grams.remove(&site).or_else(|| Gram::new(gpu, columns))).flatten();
        if needs < Needs::Gram || sum.is_some() {
            gram::gpu::add_column_squares(gpu, &buffer, &mut statistics.squares)?;
            if let Some(sum) = sum {
                sum.add(&buffer);
                grams.insert(site, sum);
            }
            return Ok(statistics);
        }
    }
    let copy;
    let floats = Floats::of(input);
    let x = match &floats {
        Some(floats) => floats.slice(),
        None => {
            copy = values(input.clone());
            &copy
        }
    };
    add_column_squares(x, &mut statistics.squares);
    if needs >= Needs::Gram {
        let mut gram = vec![0.0; columns * columns];
        add_gram(x, columns, &mut gram);
        statistics.gram = Some(gram);
    }
    Ok(statistics)
}

fn merge(total: &mut Statistics, part: Statistics) {
    let add = |total: &mut Vec<f64>, part: Vec<f64>| {
        if total.is_empty() {
            *total = part;
        } else {
            total.iter_mut().zip(part).for_each(|(total, part)| *total += part);
        }
    };
    total.tokens += part.tokens;
    add(&mut total.squares, part.squares);
    if let Some(gram) = part.gram {
        add(total.gram.get_or_insert_default(), gram);
    }
}
