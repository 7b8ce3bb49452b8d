//! The gradient of the mean negative log-likelihood at the last hidden states: where the walk back begins.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::evaluate::sweep::{Stream, TOKENS_AT_ONCE, head, norm, sweep};
use crate::kernels::likelihood::Prediction;
use crate::kernels::rms_norm::rms_norm_adjoint;
use crate::kernels::sampling::{self, Choice};
use crate::kernels::{tensor, values};
use crate::model::forward;
use crate::model::hidden::Hidden;
use crate::run::Run;

/// Windows of the same first tokens, where every other token is drawn from what the model predicts for it after the windows'
/// own tokens. The slopes of their likelihood are those whose squares make the Fisher matrix.
///
/// # Errors
/// As [`slope`].
pub fn drawn(stream: &Stream<'_, '_>, windows: &[Vec<u32>], run: &Run<'_>) -> Result<Vec<Vec<u32>>> {
    let numbers = sampling::Stream::new(run.seed);
    let choices = |(number, window): (usize, &Vec<u32>)| -> Vec<Choice> {
        (1..window.len()).map(|token| Choice::sampled(numbers.child(number as u64).child(token as u64))).collect()
    };
    let mut states: Vec<Vec<Choice>> = windows.iter().enumerate().map(choices).collect();
    sweep(&[stream], windows, &mut states, run, |states, logits| {
        logits.each(states, |state, row, _| state.add(row, logits.first));
    })?;
    let lost = || Error::input("the model gives predictions that are not finite; it is damaged");
    let drawn = windows.iter().zip(&states).map(|(window, states)| {
        let tokens = states.iter().map(|state| state.token().ok_or_else(lost));
        std::iter::once(Ok(window[0])).chain(tokens).collect::<Result<Vec<u32>>>()
    });
    drawn.collect()
}

/// dL/dh of the last hidden states h of windows, for L the mean over all scored tokens of −ln p(token that came): those of
/// the windows, which are those that the stream went through or as [`drawn`] makes them.
///
/// # Errors
/// When the head or hidden states cannot be read, or a signal asks to stop.
pub fn slope(stream: &Stream<'_, '_>, windows: &[Vec<u32>], run: &Run<'_>) -> Result<Hidden> {
    let mut totals: Vec<Vec<Prediction>> = windows.iter().map(|window| vec![Prediction::default(); window.len() - 1]).collect();
    sweep(&[stream], windows, &mut totals, run, |states, logits| {
        logits.each(states, |state, row, target| state.add(row, logits.first, target));
    })?;
    let (model, device) = (stream.model, &run.device.burn);
    let (config, scored) = (&model.config, windows.iter().map(|window| window.len() - 1).sum::<usize>());
    let (weight, norm) = (model.final_norm()?, norm(model, device)?);
    let mut slope = stream.hidden.like(config.hidden, run)?;
    for slice in model.head_slices() {
        let head = head(model, slice.clone(), device)?;
        for (window, tokens) in windows.iter().enumerate() {
            run.check_stop()?;
            let states = stream.hidden.read(window..window + 1)?;
            let mut slopes = slope.read(window..window + 1)?;
            let parts = slopes[..(tokens.len() - 1) * config.hidden].par_chunks_mut(TOKENS_AT_ONCE * config.hidden);
            parts.enumerate().for_each(|(number, slopes)| {
                let (first, count) = (number * TOKENS_AT_ONCE, slopes.len() / config.hidden);
                let x = states[first * config.hidden..(first + count) * config.hidden].to_vec();
                let x: Tensor<2> = tensor(x, [count, config.hidden], device);
                let mut logits = values(forward::logits(config, forward::final_norm(config, &x, &norm), head.clone()));
                for (token, row) in logits.chunks_mut(slice.len()).enumerate() {
                    let total = totals[window][first + token].log_total();
                    let target = (tokens[first + token + 1] as usize).checked_sub(slice.start);
                    turn(row, total, target, config.logits_factor, config.logits_cap, scored);
                }
                let more = values(tensor::<2>(logits, [count, slice.len()], device).matmul(head.clone()));
                slopes.iter_mut().zip(more).for_each(|(slope, more)| *slope += more);
            });
            slope.write(window..window + 1, &slopes)?;
        }
    }
    for window in 0..windows.len() {
        let mut slopes = slope.read(window..window + 1)?;
        rms_norm_adjoint(&stream.hidden.read(window..window + 1)?, &weight, config.epsilon as f32, config.family.norm, &mut slopes, None);
        slope.write(window..window + 1, &slopes)?;
    }
    Ok(slope)
}

/// From the logits of a token to dL/d(product of state and head): (p − 1 where it came) / scored, through cap and factor.
fn turn(row: &mut [f32], total: f64, target: Option<usize>, factor: f32, cap: Option<f32>, scored: usize) {
    let scale = f64::from(factor) / scored as f64;
    for (at, logit) in row.iter_mut().enumerate() {
        let bent = cap.map_or(1.0, |cap| 1.0 - f64::from(*logit / cap).powi(2));
        let came = if target == Some(at) { 1.0 } else { 0.0 };
        *logit = (((f64::from(*logit) - total).exp() - came) * bent * scale) as f32;
    }
}
