//! The predictions of models on windows of tokens: last hidden states, then the head slice by slice over the
//! vocabulary, so that the logits of a large vocabulary never exist at once.

use std::ops::Range;

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::error::Result;
use crate::kernels::{tensor, values};
use crate::model::hidden::{Hidden, Keeping};
use crate::model::walk::{Pass, embed, walk};
use crate::model::{Model, forward};
use crate::run::Run;

/// Tokens whose logits exist at once, per thread.
pub(crate) const TOKENS_AT_ONCE: usize = 512;

/// A model with its last hidden states on some windows.
#[derive(Debug)]
pub struct Stream<'m, 'c> {
    /// The model, whose head is read.
    pub model: &'m Model<'c>,
    /// The hidden states after its last block.
    pub hidden: Hidden,
}

impl<'m, 'c> Stream<'m, 'c> {
    /// Sends windows of tokens through all blocks.
    ///
    /// # Errors
    /// When a block cannot be read or gives values that are not finite.
    pub fn new(model: &'m Model<'c>, windows: &[Vec<u32>], stage: &str, run: &Run<'_>) -> Result<Self> {
        let mut hidden = embed(model, windows, Keeping::EXACT, run)?;
        walk(model, &mut hidden, stage, run, &mut Pass)?;
        Ok(Self { model, hidden })
    }
}

/// The logits of one slice of the vocabulary, for consecutive tokens of a window.
#[derive(Debug)]
pub struct Logits<'a> {
    /// Those of each model, tokens × slice.
    pub of: &'a [&'a [f32]],
    /// First token of the vocabulary in the slice.
    pub first: u32,
    /// The tokens that came.
    pub targets: &'a [u32],
}

impl Logits<'_> {
    /// Tells `take`, in parallel, what is kept of every token with its logits of the first model and the token that came.
    pub fn each<T: Send>(&self, states: &mut [T], take: impl Fn(&mut T, &[f32], u32) + Sync) {
        let width = (self.of[0].len() / states.len().max(1)).max(1);
        let rows = states.par_iter_mut().zip(self.of[0].par_chunks(width)).zip(self.targets);
        rows.for_each(|((state, row), &target)| take(state, row, target));
    }
}

/// Goes over the predictions of models on the same windows, and tells `visit` the logits of the same tokens of all of them
/// with the states that are kept of those tokens. Several windows of the first model's stream may stand for one window: then
/// they follow each other, and the other models are computed once for all of them. `states` holds one per scored token of
/// every window of the first model: all but the last token of the window.
///
/// # Errors
/// When a head cannot be read, hidden states cannot, or a signal asks to stop.
pub fn sweep<T: Send>(
    streams: &[&Stream<'_, '_>],
    windows: &[Vec<u32>],
    states: &mut [Vec<T>],
    run: &Run<'_>,
    visit: impl Fn(&mut [T], Logits<'_>) + Sync,
) -> Result<()> {
    let Some((own, others)) = streams.split_first() else { return Ok(()) };
    let device = &run.device.burn;
    let repeats = states.len() / windows.len().max(1);
    let norms = streams.iter().map(|stream| norm(stream.model, device)).collect::<Result<Vec<_>>>()?;
    let slices: Vec<Range<usize>> = own.model.head_slices().collect();
    run.observer.begin("score", (slices.len() * states.len()) as u64);
    for slice in slices {
        let heads = streams.iter().map(|stream| head(stream.model, slice.clone(), device)).collect::<Result<Vec<_>>>()?;
        let logits = |at: usize, states: &Tensor<2>, tokens: Range<usize>| {
            let config = &streams[at].model.config;
            let x = states.clone().slice([tokens, 0..config.hidden]);
            values(forward::logits(config, forward::final_norm(config, &x, &norms[at]), heads[at].clone()))
        };
        let at_once = rayon::current_num_threads();
        for (batch, states) in states.chunks_mut(repeats.max(1) * at_once).enumerate() {
            run.check_stop()?;
            states.par_chunks_mut(repeats.max(1)).enumerate().try_for_each(|(number, states)| -> Result<()> {
                let window = batch * at_once + number;
                let hidden = others.iter().map(|other| other.hidden.states(window..window + 1, device)).collect::<Result<Vec<_>>>()?;
                let scored = windows[window].len() - 1;
                for start in (0..scored).step_by(TOKENS_AT_ONCE) {
                    let tokens = start..(start + TOKENS_AT_ONCE).min(scored);
                    let other: Vec<Vec<f32>> =
                        hidden.iter().enumerate().map(|(at, states)| logits(at + 1, states, tokens.clone())).collect();
                    for (repeat, states) in states.iter_mut().enumerate() {
                        let copy = window * repeats + repeat;
                        let mine = logits(0, &own.hidden.states(copy..copy + 1, device)?, tokens.clone());
                        let of: Vec<&[f32]> = std::iter::once(&mine).chain(&other).map(Vec::as_slice).collect();
                        let targets = &windows[window][tokens.start + 1..=tokens.end];
                        visit(&mut states[tokens.clone()], Logits { of: &of, first: slice.start as u32, targets });
                    }
                }
                Ok(())
            })?;
            run.observer.step(states.len() as u64, "");
        }
    }
    run.observer.end();
    Ok(())
}

/// The weight of the final norm.
pub(crate) fn norm(model: &Model<'_>, device: &burn::tensor::Device) -> Result<Tensor<1>> {
    let weight = model.final_norm()?;
    let width = weight.len();
    Ok(tensor(weight, [width], device))
}

/// Some rows of the head.
pub(crate) fn head(model: &Model<'_>, rows: Range<usize>, device: &burn::tensor::Device) -> Result<Tensor<2>> {
    let rows = model.head_rows(rows)?;
    Ok(tensor(rows.data, [rows.rows, rows.columns], device))
}
