//! Experts of which the layers of all lie in one tensor, columns of gate and up in turn: as gpt_oss stores them. They are read for
//! the forward and carried over as they are; no method works on them, because nothing loads them in any other form.
//!
//! Of plain floats, a tensor is experts × inputs × outputs. Of 4-bit floats (OCP Microscaling Formats 1.0, MXFP4) it is two:
//! `_blocks`, experts × outputs × blocks × 16 bytes, the first of two numbers in the low half of a byte, and `_scales`, the power
//! of two of every block of 32 inputs, less 127.

use rayon::prelude::*;
use safetensors::Dtype;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::model::block::{Linear, Role};
use crate::model::mixture::{self, Mixture};
use crate::weight::Weight;

/// Numbers of a block of 4-bit floats.
const BLOCK: usize = 32;

/// What the codes of 4-bit floats stand for.
const NUMBERS: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// One of the two layers of all experts: its name and `[outputs, inputs]`.
fn layers(mixture: &Mixture, hidden: usize) -> [(&'static str, [usize; 2]); 2] {
    [("gate_up_proj", [2 * mixture.width, hidden]), ("down_proj", [hidden, mixture.width])]
}

/// Checks names and shapes from the headers alone.
///
/// # Errors
/// Naming the tensor that is missing or of another shape.
pub fn check(checkpoint: &Checkpoint, name: &str, mixture: &Mixture, hidden: usize) -> Result<()> {
    for (layer, [outputs, inputs]) in layers(mixture, hidden) {
        let own = format!("{name}.{layer}");
        let expect = |tensor: String, shape: Vec<usize>, bytes: bool| match checkpoint.info(&tensor) {
            Some(info) if info.shape == shape && (!bytes || info.dtype == Dtype::U8) => Ok(()),
            Some(info) => Err(Error::input(format!("is {:?} {:?}, config.json asks for {shape:?}", info.dtype, info.shape))
                .tensor(&tensor)
                .file(&checkpoint.folder)),
            None => Err(Error::input("missing; the checkpoint is incomplete").tensor(&tensor).file(&checkpoint.folder)),
        };
        if packed(checkpoint, &own) {
            if inputs % BLOCK != 0 {
                let what = format!("has {inputs} inputs, which are no whole number of blocks of {BLOCK}");
                return Err(Error::input(what).tensor(&own).file(&checkpoint.folder));
            }
            let blocks = inputs / BLOCK;
            expect(format!("{own}_blocks"), vec![mixture.experts, outputs, blocks, BLOCK / 2], true)?;
            expect(format!("{own}_scales"), vec![mixture.experts, outputs, blocks], true)?;
        } else {
            expect(own.clone(), vec![mixture.experts, inputs, outputs], false)?;
            checkpoint.float(&own)?;
        }
        let bias = format!("{own}_bias");
        expect(bias.clone(), vec![mixture.experts, outputs], false)?;
        checkpoint.float(&bias)?;
    }
    Ok(())
}

/// Whether a layer's tensor is of 4-bit floats.
fn packed(checkpoint: &Checkpoint, name: &str) -> bool {
    checkpoint.has(&format!("{name}_blocks"))
}

/// Reads gate, up and down of an expert.
///
/// # Errors
/// When a tensor cannot be read or is not finite.
pub fn load(checkpoint: &Checkpoint, name: &str, mixture: &Mixture, hidden: usize, expert: usize) -> Result<[Linear; 3]> {
    let [both, down] =
        layers(mixture, hidden).map(|(layer, shape)| outputs_of(checkpoint, &format!("{name}.{layer}"), mixture.experts, expert, shape));
    let (both, down) = (both?, down?);
    let half = |first: usize| {
        let data = (first..both.rows).step_by(2).flat_map(|row| both.row(row).iter().copied()).collect();
        Matrix::new(mixture.width, hidden, data)
    };
    let mut linears = hollow(checkpoint, name, mixture, hidden, expert)?;
    linears.iter_mut().zip([half(0), half(1), down]).for_each(|(linear, matrix)| linear.weight = Weight::Dense(matrix));
    Ok(linears)
}

/// As [`load`], without weights.
///
/// # Errors
/// As [`load`].
pub fn hollow(checkpoint: &Checkpoint, name: &str, mixture: &Mixture, hidden: usize, expert: usize) -> Result<[Linear; 3]> {
    let [both, down] = layers(mixture, hidden).map(|(layer, [outputs, _])| {
        checkpoint.floats(&format!("{name}.{layer}_bias"), &[mixture.experts, outputs], expert * outputs..(expert + 1) * outputs)
    });
    let (both, down) = (both?, down?);
    let half = |first: usize| both.iter().skip(first).step_by(2).copied().collect::<Vec<f32>>();
    let layer = |part: &str, role: Role, shape: [usize; 2], bias: Vec<f32>| {
        Linear::new(format!("{name}.{expert}.{part}"), role, mixture::hollow(shape), Some(bias))
    };
    Ok([
        layer("gate_proj", Role::Gate, [mixture.width, hidden], half(0)),
        layer("up_proj", Role::Up, [mixture.width, hidden], half(1)),
        layer("down_proj", Role::Down, [hidden, mixture.width], down),
    ])
}

/// The weight of an expert, `[outputs, inputs]`.
fn outputs_of(checkpoint: &Checkpoint, name: &str, experts: usize, expert: usize, [outputs, inputs]: [usize; 2]) -> Result<Matrix> {
    let mut data = vec![0.0; outputs * inputs];
    if packed(checkpoint, name) {
        let part = |end: &str, each: usize| checkpoint.part(&format!("{name}{end}"), expert * each..(expert + 1) * each);
        let (codes, scales) = (part("_blocks", outputs * inputs / 2)?, part("_scales", outputs * inputs / BLOCK)?);
        data.par_chunks_mut(BLOCK).zip(codes.par_chunks(BLOCK / 2)).zip(&*scales).with_min_len(256).for_each(|((out, codes), &scale)| {
            let scale = 2f32.powi(i32::from(scale) - 127);
            for (pair, code) in out.chunks_exact_mut(2).zip(codes) {
                pair.copy_from_slice(&[code & 15, code >> 4].map(|code| NUMBERS[usize::from(code)] * scale));
            }
        });
        if let Some((first, count)) = crate::checkpoint::decode::nonfinite(&data) {
            let what = format!("{count} values of expert {expert} are infinite, the first at index {first}; the model is damaged");
            return Err(Error::input(what).tensor(name).file(&checkpoint.folder));
        }
        return Ok(Matrix::new(outputs, inputs, data));
    }
    let size = outputs * inputs;
    let stored = checkpoint.floats(name, &[experts, inputs, outputs], expert * size..(expert + 1) * size)?;
    data.par_chunks_mut(inputs).enumerate().for_each(|(output, row)| {
        row.iter_mut().enumerate().for_each(|(input, value)| *value = stored[input * outputs + output]);
    });
    Ok(Matrix::new(outputs, inputs, data))
}
