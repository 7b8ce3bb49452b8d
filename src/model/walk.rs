//! The only loops over blocks, forward and back. Compression, calibration and perplexity are visitors.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use burn::tensor::Tensor;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::gram::gpu::{Gram, Squares};
use crate::kernels::gram::{add_column_squares, add_gram};
use crate::kernels::{Floats, values};
use crate::model::arrivals::Arrivals;
use crate::model::away::Away;
use crate::model::bench::{Bench, Between, Streams, relative_error};
use crate::model::block::{Block, Parameters, Site};
use crate::model::forward::{self, Point, Tap};
use crate::model::hidden::{Hidden, Keeping};
use crate::model::holdings::Holdings;
use crate::model::load::Blocks;
use crate::model::mixture::Experts;
use crate::model::passage::{COMPARED, Passage, keep_first};
use crate::model::progress::Progress;
use crate::model::seen::{Needs, Seen, Statistics};
use crate::model::slopes::{self, Slopes};
use crate::model::{Model, passage};
use crate::run::Run;

/// Tokens whose inputs are kept to tell the errors of layers where no Gram matrix is gathered.
const SAMPLED: usize = 512;

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
    let mut hidden = model.states(&lengths, keeping, run)?;
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
    std::thread::scope(|scope| {
        let coming = Blocks::new(scope, model, blocks.clone(), run);
        walk_through(model, (blocks.len(), coming), (hidden, float), stage, run, visitor)
    })
}

fn walk_through<'env>(
    model: &'env Model<'env>,
    (count, mut coming): (usize, Blocks<'_, 'env>),
    (hidden, float): (&mut Hidden, Option<Hidden>),
    stage: &str,
    run: &Run<'_>,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    let needs = visitor.needs();
    let calibrated = needs > Needs::Nothing && !hidden.is_empty();
    // Observed, worked on, gone through.
    let passes = if calibrated { 3 } else { 1 };
    run.observer.begin(stage, (count * (passes * hidden.len()).max(1)) as u64);
    let mut float = if calibrated && needs == Needs::Streams { Some(FloatStream::new(model, hidden, float, run)?) } else { None };
    loop {
        run.check_stop()?;
        let Some(mut block) = coming.next()? else { break };
        let index = block.index;
        let note = format!("block {index}");
        let (mut seen, mut wanted, mut original, mut arrivals) = (Seen::default(), Vec::new(), None, None);
        if calibrated {
            let parameters = Parameters::take(&mut block, run.device);
            let passage = of_original(model, index, &parameters, run);
            let mut looking = Progress::new(hidden.len(), &note, run);
            let observed = visitor.observes() > Needs::Nothing;
            if observed {
                looking.part(0.0, if float.is_some() { 0.5 } else { 1.0 });
                (seen, wanted, arrivals) = observe(&passage, hidden, (visitor.observes(), visitor.everywhere()), &looking)?;
            }
            if let Some(float) = &mut float {
                looking.part(if observed { 0.5 } else { 0.0 }, 1.0);
                float.fit(model, index, hidden, run)?;
                wanted = float.advance(&passage, &looking)?;
            }
            looking.part(1.0, 1.0);
            if wanted.is_empty() {
                wanted = passage.of_first(hidden, COMPARED)?;
            }
            if visitor.observes() < Needs::Gram {
                seen.inputs = first_inputs(&passage, hidden)?;
            }
            original = Some(parameters.clone());
            parameters.give_back(&mut block);
        }
        let streams = float.as_mut().map(FloatStream::lend);
        let away = if calibrated && model.reads_experts_singly() { Some(Away::new(run.scratch)?) } else { None };
        let everywhere = visitor.everywhere();
        let (kept, settled, progress) = (None, false, Progress::new(if calibrated { hidden.len() } else { 0 }, &note, run));
        let mut bench =
            Bench { model, block, seen, arrivals, everywhere, kept, away, run, hidden, original, streams, wanted, settled, progress };
        visitor.visit(&mut bench)?;
        bench.progress.part(1.0, 1.0);
        let Bench { block, wanted, settled, original, kept, away, .. } = bench;
        // The MLP of a parallel block reads what stands before attention.
        let middle = settled && !model.config.family.places.parallel;
        let joined = float.as_ref().filter(|_| middle).map(FloatStream::joined);
        let after = Remains { block, original, kept, away }.advance(model, hidden, joined, run, &note)?;
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

/// The passage through a block that nobody has changed.
fn of_original<'a>(model: &'a Model<'a>, index: usize, parameters: &'a Parameters, run: &'a Run<'a>) -> Passage<'a> {
    let experts = Holdings::of_original(model, index, parameters.experts(), run.device);
    Passage { model, index, parameters, experts, run }
}

/// What remains of a workbench when the work is done.
struct Remains {
    block: Block,
    original: Option<Parameters>,
    kept: Option<Vec<usize>>,
    away: Option<Away>,
}

impl Remains {
    /// Sends all hidden states through the block as it stands; gives the outputs of the first windows.
    fn advance(
        mut self,
        model: &Model<'_>,
        hidden: &mut Hidden,
        joined: Option<&Hidden>,
        run: &Run<'_>,
        note: &str,
    ) -> Result<Vec<Vec<f32>>> {
        // Floats are not copied where the block holds nothing else; what is packed becomes floats expert by expert.
        let original = self.original.filter(|_| !self.block.is_whole());
        let floats = self.block.experts.as_ref().is_some_and(Experts::floats);
        let parameters =
            if floats { Parameters::take(&mut self.block, run.device) } else { Parameters::take_own(&mut self.block, run.device) };
        let index = self.block.index;
        let experts = match floats {
            true => Holdings::of_original(model, index, parameters.experts(), run.device),
            false => Holdings {
                experts: self.block.experts.as_ref(),
                away: self.away.as_ref(),
                kept: self.kept.as_deref(),
                ..Holdings::of_original(model, index, original.as_ref().and_then(Parameters::experts), run.device)
            },
        };
        let progress = Progress::new(hidden.len(), note, run);
        Passage { model, index, parameters: &parameters, experts, run }.advance(hidden, joined, &progress)
    }
}

/// A visitor of the walk back.
pub trait BackVisitor {
    /// What must have been seen at the sites of the block; asked before each block.
    fn needs(&mut self, index: usize) -> Needs;

    /// Looks at a block with the slopes of its weights.
    ///
    /// # Errors
    /// Whatever stops the walk.
    fn visit(&mut self, bench: &mut Bench<'_>, slopes: &Slopes) -> Result<()>;
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
        let parameters = if bench.block.stays() { bench.parameters()? } else { original };
        let slots = if needs > Needs::Nothing { bench.block.slots() } else { Vec::new() };
        let found = slopes::through(model, index, &parameters, hidden, streams, &slots, run)?;
        drop(parameters);
        if needs > Needs::Nothing {
            visitor.visit(&mut bench, &found)?;
        }
    }
    Ok(())
}

/// A block on the workbench of the walk back with what it was seen doing: `hidden` are its inputs.
fn opened<'a>(model: &'a Model<'a>, index: usize, hidden: &'a Hidden, needs: Needs, run: &'a Run<'a>) -> Result<Bench<'a>> {
    let mut block = model.load_block(index)?;
    let parameters = Parameters::take(&mut block, run.device);
    let (seen, wanted, arrivals) = match needs {
        Needs::Nothing => Default::default(),
        _ => observe(&of_original(model, index, &parameters, run), hidden, (needs, false), &Progress::new(0, "", run))?,
    };
    let original = Some(parameters.clone());
    parameters.give_back(&mut block);
    let ((everywhere, kept, away, streams, settled), progress) = (Default::default(), Progress::new(0, "", run));
    Ok(Bench { model, block, seen, arrivals, everywhere, kept, away, run, hidden, original, streams, wanted, settled, progress })
}

/// Memory for what must have been seen of so many tokens, in bytes, beside the block and the hidden states: Gram matrices
/// of all sites and, for both streams, the stores of the float stream and of the states between sites (what is over their
/// budget lies on disk), and the sums of the widest site for most windows, those held out, and all. Of experts, which see their
/// tokens one after the other, it is the states that they read and give and, where they are read `singly`, the experts at work.
pub fn memory_bytes(model: &Model<'_>, tokens: u64, needs: Needs, singly: bool) -> u64 {
    let config = &model.config;
    let [hidden, query, dense, experts] =
        [config.hidden, config.widest_mixed(), config.dense_middle(), config.expert_middle()].map(|width| width as u64);
    let square = |columns: u64| 8 * columns * columns;
    let store = |width: u64| Keeping::HALVED.memory_bytes(tokens, width);
    let mut bytes = if config.mixture.is_some() { 3 * store(hidden) } else { 0 };
    if singly {
        // The original, what stands, and what a method makes of both; and what was seen.
        let sums = match needs {
            Needs::Nothing | Needs::SquaredNorms => 0,
            Needs::Gram => 2,
            Needs::Streams => 6,
        };
        let each = 4 * 4 * 3 * hidden * experts + sums * square(hidden.max(experts));
        bytes += rayon::current_num_threads() as u64 * each;
    }
    if needs >= Needs::Gram {
        bytes += 2 * square(hidden) + square(query) + square(dense.max(experts));
    }
    if needs >= Needs::Streams {
        bytes += 4 * store(hidden) + 2 * store(query) + 6 * square(hidden.max(query).max(dense).max(experts));
    }
    bytes
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
        let inputs = inputs.map_or_else(|| hidden.copy(run), Ok)?;
        Ok(Self { inputs, targets: hidden.copy(run)?, between: [between()?, between()?] })
    }

    /// Makes room for states between the sites of a block, where they are of another width than those of the block before.
    fn fit(&mut self, model: &Model<'_>, index: usize, hidden: &Hidden, run: &Run<'_>) -> Result<()> {
        let width = model.config.mixed_width(index);
        self.between.iter_mut().try_for_each(|between| between.fit(width, hidden, run))
    }

    /// Computes the outputs of the original block; gives those of the first windows.
    fn advance(&mut self, passage: &Passage<'_>, progress: &Progress<'_>) -> Result<Vec<Vec<f32>>> {
        let mixed = passage.parameters.experts().is_some();
        let mut first = Vec::new();
        for runs in passage.batches(&self.inputs, false) {
            passage.run.check_stop()?;
            let inputs = &self.inputs;
            let outputs = inputs.map(&runs, passage.home(), |windows, x| {
                let (mut between, mut joined) = (None, None);
                let seq = inputs.tokens(windows.start);
                let tap: Tap<'_> = &mut |point, x| match point {
                    Point::Site(Site::Output) => between = Some(x.clone()),
                    Point::Joined => joined = Some(x.clone()),
                    _ => {}
                };
                // Of a mixture the inputs, which then go on from the middle.
                let y = if mixed {
                    passage.first_half(seq, x.clone(), tap);
                    x
                } else {
                    passage.whole(seq, x, tap)
                };
                Ok((between.zip(joined), y))
            })?;
            for (windows, (between, y)) in runs.iter().zip(outputs) {
                let (mixed, joined) = between.ok_or_else(|| Error::run("a forward that passed attention by"))?;
                self.between[1].keep(windows.clone(), &mixed, &joined)?;
                self.targets.put(windows.clone(), &y)?;
                keep_first(&mut first, windows, &y);
            }
            progress.within(runs.last().map_or(0, |windows| windows.end) as f64 / self.inputs.len() as f64 * if mixed { 0.3 } else { 1.0 });
        }
        if mixed {
            return passage.advance(&mut self.targets, Some(self.between[1].joined()), &Progress::new(0, "", passage.run));
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

/// What was seen, the outputs of the first windows, and of a mixture where tokens went.
type Watched = (Seen, Vec<Vec<f32>>, Option<Arrivals>);

/// Runs a block on its inputs and gathers statistics; hidden states stay as they are. A mixture runs up to what its experts read:
/// those see their own tokens one after the other, later, and there are no outputs.
fn observe(passage: &Passage<'_>, hidden: &Hidden, (needs, everywhere): (Needs, bool), progress: &Progress<'_>) -> Result<Watched> {
    let (parameters, run) = (passage.parameters, passage.run);
    let (mut seen, mut outputs, sums) = (Seen::default(), Vec::new(), Mutex::new(BTreeMap::new()));
    let mut source = parameters.experts().map(|_| hidden.like(passage.model.config.hidden, run)).transpose()?;
    for runs in passage.batches(hidden, needs >= Needs::Gram) {
        run.check_stop()?;
        let results = hidden.map(&runs, passage.home(), |windows, x| {
            let mut sites = BTreeMap::new();
            let spec = passage.spec(hidden.tokens(windows.start));
            let mut watch = |site, input: &Tensor<2>, needs| {
                sites.insert(site, statistics(site, input, needs, run.device, &sums));
            };
            let tap: Tap<'_> = &mut |point, input| {
                if let Point::Site(site) = point {
                    watch(site, input, needs);
                }
            };
            let given = if source.is_some() {
                let [read, _] = forward::first_half(&spec, parameters, x, tap);
                watch(Site::Mlp, &forward::mlp_input(&spec, parameters, read.clone()), Needs::SquaredNorms);
                read
            } else {
                forward::block(&spec, parameters, x, tap)
            };
            let sites = sites.into_iter().map(|(site, statistics)| Ok((site, statistics?))).collect::<Result<BTreeMap<_, _>>>()?;
            Ok((sites, given))
        })?;
        for (windows, (sites, given)) in runs.iter().zip(results) {
            for (site, statistics) in sites {
                merge(seen.sites.entry(site).or_default(), statistics);
            }
            match &mut source {
                Some(source) => source.put(windows.clone(), &given)?,
                None => keep_first(&mut outputs, windows, &given),
            }
        }
        progress.within(runs.last().map_or(0, |windows| windows.end) as f64 / hidden.len() as f64);
    }
    for (site, sums) in sums.into_inner().unwrap_or_else(PoisonError::into_inner) {
        merge(seen.sites.entry(site).or_default(), sums.finish()?);
    }
    let arrivals = source.map(|source| {
        let mut arrivals = passage.routes(&source, everywhere)?;
        arrivals.keep(source);
        Ok(arrivals)
    });
    Ok((seen, outputs, arrivals.transpose()?))
}

/// Inputs of all sites of a block for the first tokens; of a mixture, up to what its experts read.
fn first_inputs(passage: &Passage<'_>, hidden: &Hidden) -> Result<BTreeMap<Site, Vec<f32>>> {
    let Some(windows) = passage::runs(passage.model, hidden).into_iter().next() else { return Ok(BTreeMap::new()) };
    let seq = hidden.tokens(windows.start);
    let windows = windows.start..windows.end.min(windows.start + (SAMPLED / seq.max(1)).max(1));
    let mut inputs = BTreeMap::new();
    let tap: Tap<'_> = &mut |point, input| {
        if let Point::Site(site) = point {
            let kept = SAMPLED * input.dims()[1];
            let mut input = values(input.clone());
            input.truncate(kept);
            inputs.insert(site, input);
        }
    };
    let x = hidden.states(windows, passage.home())?;
    if passage.parameters.experts().is_some() {
        passage.first_half(seq, x, tap)
    } else {
        passage.whole(seq, x, tap)
    };
    Ok(inputs)
}

/// What adds up on a GPU while a block is observed.
#[derive(Debug)]
enum Sums {
    Squares(Squares),
    /// The squares stand on its diagonal.
    Gram(Gram),
}

impl Sums {
    fn new(device: &Device, columns: usize, needs: Needs) -> Option<Self> {
        let (gpu, room) = (device.gpu.as_ref()?, device.room_for_sums());
        if needs >= Needs::Gram { Gram::new(gpu, columns, room).map(Self::Gram) } else { Some(Self::Squares(Squares::new(gpu, columns))) }
    }

    /// The sums, of tokens that were counted before.
    fn finish(self) -> Result<Statistics> {
        Ok(match self {
            Self::Squares(squares) => Statistics::new(0, squares.totals()?, None),
            Self::Gram(gram) => {
                let (columns, gram) = (gram.columns(), gram.totals()?);
                let squares = (0..columns).map(|column| gram[column * columns + column]).collect();
                Statistics::new(0, squares, Some(gram))
            }
        })
    }
}

/// Statistics of an input of a site. Where it lies on a GPU they add up there, in `sums`.
fn statistics(site: Site, input: &Tensor<2>, needs: Needs, device: &Device, sums: &Mutex<BTreeMap<Site, Sums>>) -> Result<Statistics> {
    let [tokens, columns] = input.dims();
    let mut statistics = Statistics::new(tokens as u64, vec![0.0; columns], None);
    if let Some(buffer) = device.gpu.as_ref().and_then(|gpu| gpu.buffer(input)) {
        let mut all = sums.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut own) = all.remove(&site).or_else(|| Sums::new(device, columns, needs)) {
            match &mut own {
                Sums::Squares(squares) => squares.add(&buffer)?,
                Sums::Gram(gram) => gram.add(&buffer),
            }
            all.insert(site, own);
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
