//! Which tokens came to which expert of a mixture, and what they read there.
//!
//! An expert has statistics of its own, of the tokens that the router sends to it. They are not gathered for all experts side by
//! side, which would take more memory than the experts themselves: the states that the mixture reads are kept, and expert after
//! expert, a few at a time, takes its own tokens out of them.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::gram::{add_column_squares, add_gram};
use crate::kernels::routing::{Routed, Rule, route};
use crate::kernels::{Floats, matrix, tensor, values};
use crate::matrix::Matrix;
use crate::model::bench::{Bench, HELD_OUT};
use crate::model::block::{Linear, Parameters, Site, Slot};
use crate::model::capture::{Capture, Read, Sums};
use crate::model::forward::{self, Spec};
use crate::model::hidden::Hidden;
use crate::model::mixture::{self, Experts, Layers, Which};
use crate::model::seen::{Needs, Statistics};
use crate::weight::Weight;

/// Fewer tokens than these say too little of an expert.
pub const FEW_TOKENS: usize = 16;

/// Tokens of an expert that are worked on at once.
pub(super) const CHUNK: usize = 2048;

/// Where all tokens of calibration went in a mixture.
#[derive(Debug, Default)]
pub struct Arrivals {
    /// By expert, its tokens, ascending, counted over all windows, each with the factor of the expert's output.
    pub routed: Vec<Routed>,
    /// All tokens.
    pub tokens: usize,
    /// Sum over tokens of the entropy of the shares that they gave to their experts, in nats.
    entropy: f64,
    /// Whether every token counts for every expert, wherever it went.
    everywhere: bool,
    /// What the mixture reads before its norm, where the bench's streams do not have it.
    source: Option<Hidden>,
}

impl Arrivals {
    /// Nothing yet; with `everywhere` every token will count for every expert.
    pub fn new(experts: usize, everywhere: bool) -> Self {
        Self { routed: vec![Vec::new(); experts], everywhere, ..Self::default() }
    }

    /// Takes in the router's logits of the next tokens.
    pub fn add(&mut self, logits: &[f32], correction: &[f32], rule: Rule) {
        let experts = self.routed.len();
        let mut by_token = vec![[0.0f64; 2]; logits.len() / experts.max(1)];
        for (all, more) in self.routed.iter_mut().zip(route(logits, correction, experts, rule)) {
            for (token, share) in more {
                let share_of = f64::from(share.max(f32::MIN_POSITIVE));
                by_token[token][0] += share_of;
                by_token[token][1] -= share_of * share_of.ln();
                all.push((self.tokens + token, share));
            }
        }
        // Of shares that add up to s, H = Σ −(p/s) ln(p/s) = (Σ −p ln p)/s + ln s.
        self.entropy += by_token.iter().filter(|[sum, _]| *sum > 0.0).map(|[sum, own]| own / sum + sum.ln()).sum::<f64>();
        self.tokens += by_token.len();
    }

    /// Keeps what the mixture reads.
    pub fn keep(&mut self, source: Hidden) {
        self.source = Some(source);
    }

    pub(super) fn source(&self) -> Option<&Hidden> {
        self.source.as_ref()
    }

    pub(super) fn into_source(self) -> Option<Hidden> {
        self.source
    }

    /// Mean entropy of the shares that a token gave to its experts, in nats.
    pub fn entropy(&self) -> f64 {
        self.entropy / self.tokens.max(1) as f64
    }

    /// Tokens that came to an expert.
    pub fn count(&self, which: Which) -> usize {
        match which {
            Which::Routed(expert) => self.routed.get(expert).map_or(0, Vec::len),
            Which::Shared => self.tokens,
        }
    }

    /// Whether too few tokens came to an expert for statistics of its own.
    pub fn cold(&self, which: Which) -> bool {
        !self.everywhere && self.count(which) < FEW_TOKENS
    }

    /// The tokens whose statistics an expert has: its own, or, where too few came to it, as many as experts have on average,
    /// taken evenly from all.
    pub fn picked(&self, which: Which) -> Vec<usize> {
        match which {
            Which::Routed(expert) if !self.everywhere && !self.cold(which) => self.routed[expert].iter().map(|&(token, _)| token).collect(),
            Which::Routed(_) if !self.everywhere => {
                let mean = self.routed.iter().map(Vec::len).sum::<usize>() / self.routed.len().max(1);
                let count = mean.max(FEW_TOKENS).min(self.tokens);
                (0..count).map(|at| at * self.tokens / count.max(1)).collect()
            }
            _ => (0..self.tokens).collect(),
        }
    }
}

/// What a method aims at with experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aim {
    /// Their weights, with what was seen of their own inputs.
    Weight(Needs),
    /// What they give in the float model.
    FloatOutput,
}

/// What was seen at a site of an expert.
#[derive(Debug)]
pub enum Caught {
    /// Of the original expert, where something was seen.
    Statistics(Option<Statistics>),
    /// Of both streams: of most windows, and of those held out.
    Streams(Box<(Capture, Option<Capture>)>),
}

/// What is done to the layers of experts.
pub trait Craft: Sync {
    /// What is made once of what was seen at a site.
    type Prepared;
    /// What is told of a layer.
    type Told: Send;

    /// What it needs.
    fn aim(&self) -> Aim;

    /// Whether it works on a layer.
    fn wants(&self, slot: Slot) -> bool;

    /// Prepares a site.
    fn prepare(&self, caught: Caught) -> Self::Prepared;

    /// Works on a layer of the site; `original` is its dense weight, where that is known.
    ///
    /// # Errors
    /// Whatever stops the work.
    fn work(&self, prepared: &Self::Prepared, linear: &mut Linear, slot: Slot, original: Option<Matrix>) -> Result<Self::Told>;
}

/// One stream of states that a mixture reads.
pub(super) struct Reader<'a> {
    pub(super) spec: &'a Spec<'a>,
    /// Those of the block, for the norm.
    pub(super) parameters: &'a Parameters,
    pub(super) source: &'a Hidden,
}

impl Reader<'_> {
    /// What a site of an expert reads of some tokens, tokens × columns.
    pub(super) fn read(&self, tokens: &[usize], site: Site, layers: &Layers) -> Result<Vec<f32>> {
        let (rows, hidden) = (self.source.rows(tokens)?, self.spec.config.hidden);
        let x: Tensor<2> = tensor(rows, [tokens.len(), hidden], &self.parameters.home());
        let x = forward::mlp_input(self.spec, self.parameters, x);
        if site == Site::Mlp {
            return Ok(values(x));
        }
        let rows = mixture::picked(Floats::fetched(&x).slice(), hidden, 0..tokens.len());
        let device = layers.weights[0].device();
        let x = tensor(rows, [tokens.len().next_multiple_of(mixture::ROWS), hidden], &device);
        let mut middle = values(mixture::middle(layers, self.spec.config.activation, &x, &mut |_, _| {}));
        middle.truncate(tokens.len() * layers.weights[0].dims()[0]);
        Ok(middle)
    }
}

impl Bench<'_> {
    /// Sends all tokens of the compressed stream to their experts, with everything before the mixture as it stands; the input of
    /// attention's output projection must have been captured before.
    ///
    /// # Errors
    /// When hidden states cannot be read.
    pub fn arrive(&mut self) -> Result<()> {
        self.pass_attention()?;
        let Some(streams) = &self.streams else { return Ok(()) };
        let parameters = Parameters::frame(&self.block, &self.run.device.burn);
        let source = if self.model.config.family.places.parallel { self.hidden } else { streams.between[0].joined() };
        let mut arrivals = self.routed(source, &parameters)?;
        // A later stage may aim at weights, and see what the walk kept.
        if let Some(kept) = self.arrivals.take().and_then(Arrivals::into_source) {
            arrivals.keep(kept);
        }
        self.arrivals = Some(arrivals);
        Ok(())
    }

    /// Where the tokens of states that a mixture reads go, by a router and the norm before it.
    ///
    /// # Errors
    /// When hidden states cannot be read.
    pub(super) fn routed(&self, source: &Hidden, parameters: &Parameters) -> Result<Arrivals> {
        self.passage(parameters).routes(source, self.everywhere)
    }

    /// Lets a craft work on the layers of experts, some experts side by side; gives what it tells of layers, in their order.
    ///
    /// # Errors
    /// Of the craft, or when hidden states cannot be read.
    pub fn on_experts<C: Craft>(&mut self, craft: &C) -> Result<Vec<(Slot, C::Told)>> {
        let parameters = match craft.aim() {
            Aim::FloatOutput => Some(Parameters::frame(&self.block, &self.run.device.burn)),
            Aim::Weight(_) => None,
        };
        let Some(mut experts) = self.block.experts.take() else { return Ok(Vec::new()) };
        let told = self.side_by_side_on(craft, &mut experts, parameters.as_ref());
        self.block.experts = Some(experts);
        told
    }

    fn side_by_side_on<C: Craft>(&self, craft: &C, experts: &mut Experts, parameters: Option<&Parameters>) -> Result<Vec<(Slot, C::Told)>> {
        let wanted = |which: Which, linears: &[Linear; 3]| linears.iter().any(|linear| craft.wants(Slot::of(which, linear.role)));
        let mut all: Vec<(Which, &mut [Linear; 3])> = experts.linears_mut().filter(|(which, linears)| wanted(*which, linears)).collect();
        let columns = all.iter().flat_map(|(_, linears)| linears.iter().map(|linear| linear.weight.shape()[1])).max().unwrap_or(1);
        let matrices = match craft.aim() {
            Aim::FloatOutput => 6,
            Aim::Weight(Needs::Gram | Needs::Streams) => 2,
            Aim::Weight(_) => 0,
        };
        let each = 8 * matrices * (columns * columns) as u64;
        // One per thread where experts are put away again; else a few more, so that no thread waits for the last.
        let threads = rayon::current_num_threads();
        let room = (self.model.block_bytes() / 4 / each.max(1)).max(1) as usize;
        let at_once = if self.away.is_some() { threads } else { room.min(8 * threads) };
        let mut told = Vec::new();
        let count = all.len().div_ceil(at_once);
        for (number, some) in all.chunks_mut(at_once).enumerate() {
            self.run.check_stop()?;
            self.progress.within(number as f64 / count as f64);
            let work = |(which, linears): &mut (Which, &mut [Linear; 3])| self.on_expert(craft, *which, linears, parameters);
            told.extend(some.par_iter_mut().with_max_len(1).map(work).collect::<Result<Vec<_>>>()?.into_iter().flatten());
        }
        Ok(told)
    }

    fn on_expert<C: Craft>(
        &self,
        craft: &C,
        which: Which,
        linears: &mut [Linear; 3],
        parameters: Option<&Parameters>,
    ) -> Result<Vec<(Slot, C::Told)>> {
        let mut told = Vec::new();
        let float = self.original.as_ref().map(|_| self.holdings().original(which)).transpose()?;
        if let Some(away) = &self.away {
            for linear in linears.iter_mut().filter(|linear| mixture::absent(&linear.weight)) {
                if let Some(weight) = away.get(Slot::of(which, linear.role))? {
                    linear.weight = weight;
                }
            }
        }
        for (site, places) in [(Site::Mlp, 0..2), (Site::Down, 2..3)] {
            if !linears[places.clone()].iter().any(|linear| craft.wants(Slot::of(which, linear.role))) {
                continue;
            }
            let caught = match craft.aim() {
                Aim::FloatOutput => Caught::Streams(Box::new(self.streams_of((which, site), linears, float.as_ref(), parameters)?)),
                Aim::Weight(needs) => Caught::Statistics(self.statistics_of((which, site), float.as_ref(), needs)?),
            };
            let prepared = craft.prepare(caught);
            for (linear, place) in linears[places.clone()].iter_mut().zip(places) {
                let slot = Slot::of(which, linear.role);
                if craft.wants(slot) {
                    let original = float.as_ref().map(|float| matrix(&float.weights[place]));
                    if let (true, Some(original)) = (mixture::absent(&linear.weight), &original) {
                        linear.weight = Weight::Dense(original.clone());
                    }
                    let one = craft.work(&prepared, linear, slot, original).map_err(|error| error.tensor(&linear.name))?;
                    told.push((slot, one));
                }
            }
        }
        if let Some(away) = &self.away {
            for linear in linears.iter_mut().filter(|linear| !mixture::absent(&linear.weight)) {
                let hollow = mixture::hollow(linear.weight.shape());
                away.put(Slot::of(which, linear.role), std::mem::replace(&mut linear.weight, hollow))?;
            }
        }
        Ok(told)
    }

    /// Statistics at a site of the original expert on the compressed stream; nothing where nothing was observed.
    fn statistics_of(&self, (which, site): (Which, Site), float: Option<&Layers>, needs: Needs) -> Result<Option<Statistics>> {
        let (Some(arrivals), Some(original), Some(layers)) = (&self.arrivals, &self.original, float) else { return Ok(None) };
        let Some(source) = &arrivals.source else { return Ok(None) };
        let spec = Spec::new(&self.model.config, self.index(), 1);
        let reader = Reader { spec: &spec, parameters: original, source };
        let tokens = arrivals.picked(which);
        let mut statistics = Statistics::default();
        for tokens in tokens.chunks(CHUNK) {
            let x = reader.read(tokens, site, layers)?;
            let columns = x.len() / tokens.len();
            statistics.squares.resize(columns, 0.0);
            add_column_squares(&x, &mut statistics.squares);
            if needs >= Needs::Gram {
                let gram = statistics.gram.get_or_insert_with(|| vec![0.0; columns * columns]);
                add_gram(&x, columns, gram);
            }
            statistics.tokens += tokens.len() as u64;
        }
        statistics.finite(site).map(|_| ())?;
        Ok(Some(statistics))
    }

    /// Both streams at a site of an expert, with everything before it as it stands.
    fn streams_of(
        &self,
        (which, site): (Which, Site),
        linears: &[Linear; 3],
        float: Option<&Layers>,
        parameters: Option<&Parameters>,
    ) -> Result<(Capture, Option<Capture>)> {
        let missing = || Error::run("both streams of a mixture were not kept");
        let (Some(arrivals), Some(streams), Some(original)) = (&self.arrivals, &self.streams, &self.original) else {
            return Err(missing());
        };
        let (parameters, float) = (parameters.ok_or_else(missing)?, float.ok_or_else(missing)?);
        let own = self.holdings().standing(which, linears)?;
        let parallel = self.model.config.family.places.parallel;
        let spec = Spec::new(&self.model.config, self.index(), 1);
        let readers = [
            Reader { spec: &spec, parameters, source: if parallel { self.hidden } else { streams.between[0].joined() } },
            Reader { spec: &spec, parameters: original, source: if parallel { streams.inputs } else { streams.between[1].joined() } },
        ];
        let hold = self.hidden.len() >= HELD_OUT;
        let (held, most): (Vec<usize>, Vec<usize>) =
            arrivals.picked(which).into_iter().partition(|&token| hold && self.hidden.window_of(token) % HELD_OUT == HELD_OUT - 1);
        let (most, held) = if most.is_empty() { (held, most) } else { (most, held) };
        let capture = |tokens: &[usize]| -> Result<Option<Capture>> {
            let mut sums: Option<Sums> = None;
            for tokens in tokens.chunks(CHUNK) {
                let (a, f) = (readers[0].read(tokens, site, &own)?, readers[1].read(tokens, site, float)?);
                let columns = a.len() / tokens.len();
                let read = |x| Read { site: tensor(x, [tokens.len(), columns], &burn::tensor::Device::flex()), stream: None };
                sums.get_or_insert_with(|| Sums::new(columns, 0, &Device::cpu())).add(read(a), read(f), 1.0);
            }
            sums.map(Sums::finish).transpose()
        };
        Ok((capture(&most)?.ok_or_else(|| Error::run("no calibration window was seen"))?, capture(&held)?))
    }
}
