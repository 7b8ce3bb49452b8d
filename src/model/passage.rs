//! All windows through a block, by the one forward. A block without experts takes run after run of windows. In a mixture every run
//! goes as far as what its experts read, expert after expert then takes its own tokens of all windows, and every run is finished
//! with what they gave: a product has as many rows as it can have, and no more experts need memory than are at work.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::checkpoint::decode::nonfinite;
use crate::device::Buffer;
use crate::error::{Error, Result};
use crate::kernels::linear::units::{is_finite, largest_of};
use crate::kernels::{Floats, tensor, values};
use crate::model::Model;
use crate::model::arrivals::Arrivals;
use crate::model::block::{Parameters, Place};
use crate::model::forward::{self, Spec, Tap};
use crate::model::hidden::{Hidden, Keeping};
use crate::model::holdings::Holdings;
use crate::model::mixture::{self, Layers, ROWS, Tensors, Which};
use crate::model::progress::Progress;
use crate::run::Run;

/// Memory that the activations of one run of windows may take, in bytes: many small windows share one matrix product,
/// which reads the weights once.
const RUN_BYTES: usize = 32 << 20;

/// Windows whose block outputs are compared before and after the visit.
pub(super) const COMPARED: usize = 2;

/// A block that windows go through.
#[derive(Debug, Clone, Copy)]
pub struct Passage<'a> {
    /// The model.
    pub model: &'a Model<'a>,
    /// The number of the block.
    pub index: usize,
    /// Its tensors; those of its experts are not needed here.
    pub parameters: &'a Parameters,
    /// Its experts.
    pub experts: Holdings<'a>,
    /// The surroundings.
    pub run: &'a Run<'a>,
}

/// Some tokens of an expert.
struct Part<'a> {
    which: Which,
    /// Tokens with the factors of the expert's outputs, of one that the router chose; of the shared one there are none.
    own: &'a [(usize, f32)],
    /// Tokens of the shared expert.
    all: Range<usize>,
}

/// What an expert gave to some tokens.
struct Given {
    tokens: Vec<usize>,
    shares: Vec<f32>,
    values: Vec<f32>,
}

/// Runs that came to a GPU and were not looked at yet, at most.
const UNSEEN: usize = 8;

/// What comes out of a block, run by run.
#[derive(Debug, Default)]
struct Arriving {
    /// The outputs of the first windows.
    first: Vec<Vec<f32>>,
    /// The largest magnitudes of those that were not looked at.
    unseen: Vec<(Range<usize>, Buffer)>,
}

impl Passage<'_> {
    /// The surroundings of the block for windows of `seq` tokens.
    pub fn spec(&self, seq: usize) -> Spec<'_> {
        Spec::new(&self.model.config, self.index, seq)
    }

    /// Where states are computed.
    pub fn home(&self) -> &'_ burn::tensor::Device {
        &self.run.device.burn
    }

    /// What a block without experts gives for windows of `seq` tokens.
    pub fn whole(&self, seq: usize, x: Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
        forward::block(&self.spec(seq), self.parameters, x, tap)
    }

    /// As [`Self::whole`], as far as the residual stream after attention.
    pub fn first_half(&self, seq: usize, x: Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
        let [_, h] = forward::first_half(&self.spec(seq), self.parameters, x, tap);
        h
    }

    /// Sends all hidden states through the block, from the middle where its first half is known (`joined`); gives the outputs
    /// of the first windows.
    ///
    /// # Errors
    /// When states cannot be read or written, or an output is not finite, or a signal asks to stop.
    pub fn advance(&self, hidden: &mut Hidden, joined: Option<&Hidden>, progress: &Progress<'_>) -> Result<Vec<Vec<f32>>> {
        if self.parameters.experts().is_some() {
            return self.advance_mixture(hidden, joined, progress);
        }
        let mut arriving = Arriving::default();
        for runs in self.batches(hidden, false) {
            self.run.check_stop()?;
            let outputs = joined.unwrap_or(hidden).map(&runs, self.home(), |windows, x| {
                let seq = hidden.tokens(windows.start);
                Ok(match joined {
                    Some(_) => forward::second_half(&self.spec(seq), self.parameters, x.clone(), x, &mut |_, _| {}),
                    None => self.whole(seq, x, &mut |_, _| {}),
                })
            })?;
            self.arrived(hidden, &runs, outputs, &mut arriving)?;
            progress.within(runs.last().map_or(0, |windows| windows.end) as f64 / hidden.len() as f64);
        }
        self.look(hidden, &mut arriving)?;
        Ok(arriving.first)
    }

    fn advance_mixture(&self, hidden: &mut Hidden, joined: Option<&Hidden>, progress: &Progress<'_>) -> Result<Vec<Vec<f32>>> {
        let own;
        let joined = match joined {
            Some(joined) => joined,
            None => {
                own = self.join(hidden)?;
                &own
            }
        };
        let source: &Hidden = if self.model.config.family.places.parallel { hidden } else { joined };
        let arrivals = self.routes(source, false)?;
        let given = self.given(source, &arrivals, progress)?;
        let mut arriving = Arriving::default();
        for runs in self.batches(hidden, false) {
            self.run.check_stop()?;
            let outputs = joined.map(&runs, self.home(), |windows, h| self.finish(h, &given, windows))?;
            self.arrived(hidden, &runs, outputs, &mut arriving)?;
        }
        self.look(hidden, &mut arriving)?;
        progress.within(1.0);
        Ok(arriving.first)
    }

    /// The residual stream of all windows after attention.
    fn join(&self, hidden: &Hidden) -> Result<Hidden> {
        let mut joined = hidden.like(self.model.config.hidden, self.run)?;
        for runs in self.batches(hidden, false) {
            self.run.check_stop()?;
            let half = |windows: Range<usize>, x| Ok(self.first_half(hidden.tokens(windows.start), x, &mut |_, _| {}));
            let halves = hidden.map(&runs, self.home(), half)?;
            runs.iter().zip(halves).try_for_each(|(windows, h)| joined.put(windows.clone(), &h))?;
        }
        Ok(joined)
    }

    /// The output of a mixture for some windows, from the residual stream after attention and what experts gave.
    fn finish(&self, h: Tensor<2>, given: &Hidden, windows: Range<usize>) -> Result<Tensor<2>> {
        let given = given.states(windows.clone(), self.home())?;
        let spec = self.spec(given.dims()[0] / windows.len().max(1));
        Ok(forward::add_given(&spec, self.parameters, Place::MlpOut, h, given, &mut |_, _| {}))
    }

    /// Takes in the outputs of some runs.
    fn arrived(&self, hidden: &mut Hidden, runs: &[Range<usize>], outputs: Vec<Tensor<2>>, arriving: &mut Arriving) -> Result<()> {
        for (windows, y) in runs.iter().zip(outputs) {
            let there = self.run.device.gpu.as_ref().filter(|_| hidden.elsewhere());
            if let Some((gpu, buffer)) = there.and_then(|gpu| Some((gpu, gpu.buffer(&y)?))) {
                arriving.unseen.push((windows.clone(), largest_of(gpu, &buffer)));
                hidden.put(windows.clone(), &y)?;
            } else {
                let states = Floats::fetched(&y);
                self.finite(windows, states.slice())?;
                hidden.write(windows.clone(), states.slice())?;
            }
            keep_first(&mut arriving.first, windows, &y);
        }
        if arriving.unseen.len() >= UNSEEN { self.look(hidden, arriving) } else { Ok(()) }
    }

    /// Looks whether the states that came last are finite: what lies on a GPU is looked at there, some runs at a time, because whoever
    /// waits for an answer keeps it from going on.
    fn look(&self, hidden: &Hidden, arriving: &mut Arriving) -> Result<()> {
        for (windows, largest) in arriving.unseen.drain(..) {
            if let Some(gpu) = &self.run.device.gpu
                && !is_finite(gpu, &largest)?
            {
                self.finite(&windows, &hidden.read(windows.clone())?)?;
            }
        }
        Ok(())
    }

    fn finite(&self, windows: &Range<usize>, states: &[f32]) -> Result<()> {
        let Some((_, count)) = nonfinite(states) else { return Ok(()) };
        Err(Error::input(format!(
            "block {} gives {count} values that are NaN or infinite for window {} or after; the model is damaged or overflows",
            self.index, windows.start
        )))
    }

    /// The outputs for the first windows alone.
    ///
    /// # Errors
    /// As [`Self::advance`].
    pub fn of_first(&self, hidden: &Hidden, count: usize) -> Result<Vec<Vec<f32>>> {
        let lengths: Vec<usize> = (0..count.min(hidden.len())).map(|window| hidden.tokens(window)).collect();
        let mut few = self.model.states(&lengths, Keeping::EXACT, self.run)?;
        for window in 0..lengths.len() {
            few.put(window..window + 1, &hidden.states(window..window + 1, self.home())?)?;
        }
        self.advance(&mut few, None, &Progress::new(0, "", self.run))
    }

    /// Where the tokens of states that a mixture reads go.
    ///
    /// # Errors
    /// When hidden states cannot be read.
    pub fn routes(&self, source: &Hidden, everywhere: bool) -> Result<Arrivals> {
        let experts = self.mixture()?;
        let rule = self.model.config.mixture.ok_or_else(missing)?.rule;
        let mut arrivals = Arrivals::new(experts.count(), everywhere);
        let rows = self.rows(experts.count());
        for windows in source.runs(rows) {
            self.run.check_stop()?;
            let x = self.read_by_experts(source.states(windows, self.home())?);
            arrivals.add(&values(experts.logits(&x)), &experts.correction, rule);
        }
        Ok(arrivals)
    }

    fn mixture(&self) -> Result<&Tensors> {
        self.parameters.experts().ok_or_else(missing)
    }

    /// What experts read of states.
    fn read_by_experts(&self, h: Tensor<2>) -> Tensor<2> {
        forward::mlp_input(&self.spec(1), self.parameters, h)
    }

    /// Rows of a run whose steps have so many columns beside the states.
    fn rows(&self, columns: usize) -> usize {
        (RUN_BYTES / (4 * (3 * self.model.config.hidden + columns)) / ROWS).max(1) * ROWS
    }

    /// What the experts of a mixture give to all tokens, each times its share, in the order of the experts.
    fn given(&self, source: &Hidden, arrivals: &Arrivals, progress: &Progress<'_>) -> Result<Hidden> {
        let described = self.model.config.mixture.ok_or_else(missing)?;
        let rows = self.rows(3 * described.width.max(described.shared.unwrap_or(0)));
        let mut parts: Vec<Part<'_>> = Vec::new();
        for (expert, own) in arrivals.routed.iter().enumerate() {
            parts.extend(own.chunks(rows).map(|own| Part { which: Which::Routed(expert), own, all: 0..0 }));
        }
        if described.shared.is_some() {
            let starts = (0..arrivals.tokens).step_by(rows);
            parts.extend(starts.map(|start| Part { which: Which::Shared, own: &[], all: start..(start + rows).min(arrivals.tokens) }));
        }
        let lengths: Vec<usize> = (0..source.len()).map(|window| source.tokens(window)).collect();
        let mut given = self.model.states(&lengths, Keeping::EXACT, self.run)?;
        let mut at_hand: BTreeMap<Which, Layers> = BTreeMap::new();
        let (at_once, count) = (if self.run.device.gpu.is_some() { 1 } else { rayon::current_num_threads() }, parts.len());
        for (number, some) in parts.chunks(at_once).enumerate() {
            self.run.check_stop()?;
            at_hand.retain(|which, _| some.iter().any(|part| part.which == *which));
            let mut wanted: Vec<Which> = some.iter().map(|part| part.which).filter(|which| !at_hand.contains_key(which)).collect();
            wanted.dedup();
            let more = wanted.into_par_iter().map(|which| Ok((which, self.experts.layers(which)?))).collect::<Result<Vec<_>>>()?;
            at_hand.extend(more);
            let work = |part: &Part<'_>| at_hand.get(&part.which).ok_or_else(missing).and_then(|layers| self.part(source, part, layers));
            for Given { tokens, shares, values } in some.par_iter().map(work).collect::<Result<Vec<_>>>()? {
                given.add(&tokens, &shares, &values)?;
            }
            progress.within(0.9 * ((number + 1) * at_once) as f64 / count as f64);
        }
        Ok(given)
    }

    /// What an expert gives to some of its tokens.
    fn part(&self, source: &Hidden, part: &Part<'_>, layers: &Layers) -> Result<Given> {
        let hidden = self.model.config.hidden;
        let tokens: Vec<usize> = part.all.clone().chain(part.own.iter().map(|&(token, _)| token)).collect();
        let x = self.read_by_experts(tensor(source.rows(&tokens)?, [tokens.len(), hidden], self.home()));
        let shares = match part.which {
            Which::Shared => self.mixture()?.openings(&x),
            Which::Routed(_) => part.own.iter().map(|&(_, share)| share).collect(),
        };
        let x = mixture::picked(&values(x), hidden, 0..tokens.len());
        let x = tensor(x, [tokens.len().next_multiple_of(ROWS), hidden], &layers.weights[0].device());
        let mut values = values(mixture::mlp(layers, self.model.config.activation, &x, &mut |_, _| {}));
        values.truncate(tokens.len() * hidden);
        Ok(Given { tokens, shares, values })
    }

    /// Runs of windows that are worked on at once: one run per thread, or one at all when each needs much memory or a GPU works.
    pub fn batches(&self, hidden: &Hidden, single: bool) -> Vec<Vec<Range<usize>>> {
        let runs = runs(self.model, hidden);
        let at_once = if single || self.run.device.gpu.is_some() { 1 } else { rayon::current_num_threads() };
        runs.chunks(at_once).map(<[_]>::to_vec).collect()
    }
}

fn missing() -> Error {
    Error::run("a mixture without experts")
}

/// Keeps outputs until those of the windows that are compared are there.
pub(super) fn keep_first(kept: &mut Vec<Vec<f32>>, windows: &Range<usize>, output: &Tensor<2>) {
    if windows.start < COMPARED {
        let [tokens, width] = output.dims();
        let rows = tokens / windows.len() * windows.len().min(COMPARED - windows.start);
        kept.push(values(output.clone().slice([0..rows, 0..width])));
    }
}

/// Runs of windows that share matrix products, cut by their size alone.
pub(crate) fn runs(model: &Model<'_>, hidden: &Hidden) -> Vec<Range<usize>> {
    hidden.runs(RUN_BYTES / (4 * floats_per_token(model)))
}

/// Floats of the activations of a token, by which runs are cut; of a mixture as if its experts came along.
fn floats_per_token(model: &Model<'_>) -> usize {
    let config = &model.config;
    3 * (config.hidden + config.widest_mixed() + config.widest_middle())
}

/// Windows of so many tokens that all threads work on at once.
pub fn windows_at_once(model: &Model<'_>, length: usize) -> usize {
    let each = activation_bytes_of(model, length as u64).max(1);
    (RUN_BYTES as u64 / each).max(1) as usize * rayon::current_num_threads()
}

fn activation_bytes_of(model: &Model<'_>, tokens: u64) -> u64 {
    4 * floats_per_token(model) as u64 * tokens
}

/// Memory for the activations of so many tokens, in bytes: of one run of windows per thread.
pub fn activation_bytes(model: &Model<'_>, tokens: u64) -> u64 {
    activation_bytes_of(model, tokens).min((rayon::current_num_threads() * RUN_BYTES) as u64)
}
