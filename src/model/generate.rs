//! Text that the model itself writes: calibration data for models whose own data nobody has (LLM-QAT, Liu et al. 2023,
//! arXiv 2305.17888, section 3.1). After a random first token the next ones are the most likely until a window has
//! [`GREEDY`] tokens, then draws from the softmax at temperature 1; tokens that end a text never come.
//!
//! This is the one loop that goes over positions outside and over blocks inside, because a token must be known before
//! the next position can be computed. All windows of a group advance in lock step, so each block serves all of them
//! each time it is in memory, and each is loaded at most once per position when it does not stay there.
//!
//! The draws hang on seed, window, position and token alone ([`crate::kernels::sampling`]). Products are filled up
//! with empty rows to a multiple of `ROWS`, because matrix products take other paths, which round otherwise, for a
//! few rows; so a window does not depend on which windows are written beside it (a matrix of at most 64 outputs and
//! more than 512 inputs may still round otherwise below 65 rows). How windows are grouped follows from the model and
//! the options alone, so equal runs write equal windows in any case.

use std::ops::Range;
use std::sync::Mutex;

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::checkpoint::decode::nonfinite;
use crate::error::{Error, Result};
use crate::kernels::sampling::{Choice, Stream};
use crate::kernels::{tensor, values};
use crate::model::Model;
use crate::model::block::Parameters;
use crate::model::forward::{self, Past, Spec};
use crate::model::holdings::Holdings;
use crate::run::Run;

/// Length, with the token that begins a text, up to which a window grows by the most likely token.
pub const GREEDY: usize = 5;

/// Rows of a product are a multiple of this.
const ROWS: usize = 16;

/// What to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Windows.
    pub samples: usize,
    /// Tokens of each of them.
    pub seq: usize,
    /// Seed of all draws.
    pub seed: u64,
    /// The token that begins every window, where the model has one.
    pub begin: Option<u32>,
    /// Tokens that may come first, or after the one that begins.
    pub starts: Vec<u32>,
    /// Tokens that never come.
    pub suppressed: Vec<u32>,
}

/// Memory that the writing may take; the windows do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of weights that stay in memory, in f32.
    pub weights: u64,
    /// Bytes of keys and values of the windows of a group; a group has one window at least.
    pub cache: u64,
}

/// What a run allows itself.
pub const BUDGET: Budget = Budget { weights: 512 << 20, cache: 1 << 30 };

impl Budget {
    /// Windows that advance together: as many as fit, spread evenly over the groups.
    fn group(self, model: &Model<'_>, options: &Options) -> usize {
        let fitting = (self.cache / cache_bytes(model, 1, options.seq).max(1)).max(1) as usize;
        options.samples.div_ceil(options.samples.div_ceil(fitting).max(1)).max(1)
    }

    /// Peak memory of the writing, in bytes.
    pub fn memory_bytes(self, model: &Model<'_>, options: &Options) -> u64 {
        let passing = if self.passes(model, options) > 1 { 2 * model.block_bytes() } else { 0 };
        cache_bytes(model, self.group(model, options), options.seq) + self.weights.min(weight_bytes(model)) + passing
    }

    /// How many times weights that do not stay in memory are read; 1 when all stay.
    pub fn passes(self, model: &Model<'_>, options: &Options) -> usize {
        let positions = options.samples.div_ceil(self.group(model, options)) * options.seq.saturating_sub(1);
        if weight_bytes(model) <= self.weights { 1 } else { positions }
    }
}

/// Bytes of keys and values of some windows.
fn cache_bytes(model: &Model<'_>, windows: usize, seq: usize) -> u64 {
    let config = &model.config;
    config.layers.iter().map(|layer| Past::bytes(config, layer, windows, seq)).fold(0, u64::saturating_add)
}

/// Bytes of all blocks and of the head, in f32.
fn weight_bytes(model: &Model<'_>) -> u64 {
    let config = &model.config;
    config.layers.len() as u64 * model.block_bytes() + 4 * config.vocabulary as u64 * config.hidden as u64
}

/// Lets the model write; windows of exactly `seq` tokens, in order.
///
/// # Errors
/// When the options leave no token to choose, a weight cannot be read, something is not finite, or a signal asks to
/// stop.
pub fn generate(model: &Model<'_>, options: &Options, budget: Budget, run: &Run<'_>) -> Result<Vec<Vec<u32>>> {
    if options.starts.is_empty() {
        return Err(Error::input("calibration: the model's tokenizer has no token to begin a text with"));
    }
    let size = budget.group(model, options);
    let groups = options.samples.div_ceil(size);
    let mut weights = Weights::new(model, budget.weights, run)?;
    let mut windows = Vec::with_capacity(options.samples);
    run.observer.begin("generate calibration text", (groups * options.seq.saturating_sub(1)) as u64);
    for first in (0..options.samples).step_by(size) {
        windows.extend(group(&mut weights, options, first..(first + size).min(options.samples), run)?);
    }
    run.observer.end();
    Ok(windows)
}

/// The windows of one group.
fn group(weights: &mut Weights<'_>, options: &Options, numbers: Range<usize>, run: &Run<'_>) -> Result<Vec<Vec<u32>>> {
    let streams: Vec<Stream> = numbers.clone().map(|number| Stream::new(options.seed).child(number as u64)).collect();
    let mut windows: Vec<Vec<u32>> = streams.iter().map(|stream| begin(options, *stream)).collect();
    let mut decoder = Decoder::new(weights, numbers.len(), options.seq);
    for position in 0..options.seq.saturating_sub(1) {
        let tokens: Vec<u32> = windows.iter().map(|window| window[position]).collect();
        let states = decoder.step(&tokens)?;
        let length = position + 1;
        if windows[0].len() == length {
            let choice = |stream: &Stream| if length < GREEDY { Choice::greedy() } else { Choice::sampled(stream.child(length as u64)) };
            let mut choices: Vec<Choice> = streams.iter().map(choice).collect();
            decoder.logits(&states, |slice, logits| choose(&mut choices, slice, logits, &options.suppressed))?;
            for (window, choice) in windows.iter_mut().zip(&choices) {
                let none = || Error::run(format!("the model gives no token at position {length} of its calibration text; it is damaged"));
                window.push(choice.token().ok_or_else(none)?);
            }
        }
        run.observer.step(1, &format!("token {} of {}", length + 1, options.seq));
    }
    Ok(windows)
}

/// The tokens that a window has before the model is asked.
fn begin(options: &Options, stream: Stream) -> Vec<u32> {
    let mut window: Vec<u32> = options.begin.into_iter().collect();
    let index = stream.child(window.len() as u64).uniform(0) * options.starts.len() as f64;
    window.push(options.starts[(index as usize).min(options.starts.len() - 1)]);
    window.truncate(options.seq);
    window
}

/// Shows the logits of one slice of the vocabulary, rows of windows, to the choices of the windows.
fn choose(choices: &mut [Choice], slice: Range<usize>, mut logits: Vec<f32>, suppressed: &[u32]) {
    let width = slice.len();
    let hidden: Vec<usize> = suppressed.iter().filter_map(|&token| (token as usize).checked_sub(slice.start)).collect();
    logits.par_chunks_exact_mut(width).zip(choices).with_min_len(4).for_each(|(logits, choice)| {
        for &index in hidden.iter().filter(|&&index| index < width) {
            logits[index] = f32::NEG_INFINITY;
        }
        choice.add(logits, slice.start as u32);
    });
}

/// The weights of a model: some stay, the others are read again whenever they are needed.
#[derive(Debug)]
pub struct Weights<'a> {
    model: &'a Model<'a>,
    run: &'a Run<'a>,
    /// Bytes that may still stay.
    room: u64,
    blocks: Vec<Option<Parameters>>,
    norm: Tensor<1>,
    head: Vec<(Range<usize>, Option<Tensor<2>>)>,
}

impl<'a> Weights<'a> {
    /// Weights of which `room` bytes may stay in memory once they were read.
    ///
    /// # Errors
    /// When the final norm cannot be read.
    pub fn new(model: &'a Model<'a>, room: u64, run: &'a Run<'a>) -> Result<Self> {
        let norm = tensor(model.final_norm()?, [model.config.hidden], &run.device.burn);
        let blocks = model.config.layers.iter().map(|_| None).collect();
        Ok(Self { model, run, room, blocks, norm, head: model.head_slices().map(|slice| (slice, None)).collect() })
    }

    fn block(&mut self, index: usize) -> Result<Parameters> {
        if let Some(kept) = &self.blocks[index] {
            return Ok(kept.clone());
        }
        let mut block = self.model.load_block(index)?;
        let mut parameters = Parameters::take(&mut block, self.run.device);
        if let (true, Some(experts), Some(described)) =
            (self.model.reads_experts_singly(), parameters.experts_mut(), self.model.config.mixture)
        {
            Holdings::of_original(self.model, index, None, self.run.device).fill(experts, described.shared.is_some())?;
        }
        if take_room(&mut self.room, self.model.block_bytes()) {
            self.blocks[index] = Some(parameters.clone());
        }
        Ok(parameters)
    }

    /// Shows the logits of normed states slice by slice over the vocabulary, `rows × slice`.
    ///
    /// # Errors
    /// When the head cannot be read or a signal asks to stop.
    pub fn logits(&mut self, states: &Tensor<2>, mut see: impl FnMut(Range<usize>, Vec<f32>)) -> Result<()> {
        for (slice, kept) in &mut self.head {
            self.run.check_stop()?;
            let rows = match kept {
                Some(rows) => rows.clone(),
                None => {
                    let rows = self.model.head_rows(slice.clone())?;
                    let rows: Tensor<2> = tensor(rows.data, [rows.rows, rows.columns], &self.run.device.burn);
                    if take_room(&mut self.room, 4 * (slice.len() * self.model.config.hidden) as u64) {
                        *kept = Some(rows.clone());
                    }
                    rows
                }
            };
            see(slice.clone(), values(forward::logits(&self.model.config, states.clone(), rows)));
        }
        Ok(())
    }
}

/// Whether some bytes fit into the room; it then shrinks by them.
fn take_room(room: &mut u64, bytes: u64) -> bool {
    let left = room.checked_sub(bytes);
    *room = left.unwrap_or(*room);
    left.is_some()
}

/// Windows in lock step.
#[derive(Debug)]
pub struct Decoder<'w, 'a> {
    weights: &'w mut Weights<'a>,
    length: usize,
    past: Vec<Mutex<Past>>,
}

impl<'w, 'a> Decoder<'w, 'a> {
    /// `windows` windows that will hold `length` tokens in the end.
    pub fn new(weights: &'w mut Weights<'a>, windows: usize, length: usize) -> Self {
        let config = &weights.model.config;
        let past = config.layers.iter().map(|layer| Mutex::new(Past::new(config, layer, windows, length))).collect();
        Self { weights, length, past }
    }

    /// Takes in the next token of every window and gives the normed last states, one row per window and then empty
    /// rows.
    ///
    /// # Errors
    /// When a token is beyond the vocabulary, a weight cannot be read, a state is not finite, or a signal asks to stop.
    pub fn step(&mut self, tokens: &[u32]) -> Result<Tensor<2>> {
        let (model, run) = (self.weights.model, self.weights.run);
        let width = model.config.hidden;
        let rows = tokens.len().next_multiple_of(ROWS);
        let mut x = model.embed(tokens)?;
        x.resize(rows * width, 0.0);
        let mut x: Tensor<2> = tensor(x, [rows, width], &run.device.burn);
        for (index, past) in self.past.iter().enumerate() {
            run.check_stop()?;
            let parameters = self.weights.block(index)?;
            x = forward::block(&Spec::next(&model.config, index, self.length, past), &parameters, x, &mut |_, _| {});
        }
        let states = values(x);
        if nonfinite(&states).is_some() {
            return Err(Error::run("the model gives states that are NaN or infinite as it writes; it is damaged or overflows"));
        }
        let states: Tensor<2> = tensor(states, [rows, width], &run.device.burn);
        Ok(forward::final_norm(&model.config, &states, &self.weights.norm))
    }

    /// The logits of [`Self::step`], as [`Weights::logits`].
    ///
    /// # Errors
    /// As [`Weights::logits`].
    pub fn logits(&mut self, states: &Tensor<2>, see: impl FnMut(Range<usize>, Vec<f32>)) -> Result<()> {
        self.weights.logits(states, see)
    }
}
