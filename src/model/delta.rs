//! The layers of a gated delta rule in a block ([`crate::kernels::delta_rule`]), which stands where attention stands in others.

use std::sync::{Arc, PoisonError};

use burn::tensor::Tensor;

use crate::error::{Error, Result};
use crate::kernels::delta_rule::{self, Sizes, State};
use crate::kernels::linear::linear as product;
use crate::kernels::{Floats, tensor};
use crate::matrix::Matrix;
use crate::model::block::{Parameters, Role};
use crate::model::config::Keys;
use crate::model::forward::{Past, Point, Spec, Tap, linear};

/// What a delta rule has beside its linear layers; nothing of it is compressed.
#[derive(Debug, Clone)]
pub struct Delta {
    /// Rows that give the rates of all value heads, then rows that give what is kept, over hidden columns.
    pub controls: Matrix,
    /// Taps of the convolution, channels × kernel.
    pub taps: Vec<f32>,
    /// Logarithm of how fast heads forget.
    pub decay: Vec<f32>,
    /// What is added to what controls the forgetting.
    pub offset: Vec<f32>,
    /// Weight of the norm of a head's output.
    pub norm: Vec<f32>,
}

/// Most numbers that the heads of a rule may learn.
const MOST: usize = 1 << 26;

/// Reads the sizes from a configuration.
///
/// # Errors
/// One line naming the key.
pub fn sizes(keys: &Keys<'_>) -> Result<Sizes> {
    let count = |key: &str, default: usize| Ok(keys.count(key, 1 << 16)?.unwrap_or(default));
    let sizes = Sizes {
        key_heads: count("linear_num_key_heads", 16)?,
        value_heads: count("linear_num_value_heads", 32)?,
        key_dim: count("linear_key_head_dim", 128)?,
        value_dim: count("linear_value_head_dim", 128)?,
        kernel: count("linear_conv_kernel_dim", 4)?,
    };
    if sizes.kernel < 2 {
        return Err(Error::input(format!("config.json: linear_conv_kernel_dim is {}, it must be at least 2", sizes.kernel)));
    }
    let learned = sizes.value_heads.saturating_mul(sizes.key_dim).saturating_mul(sizes.value_dim);
    if learned > MOST {
        return Err(Error::input(format!(
            "config.json: linear_num_value_heads x linear_key_head_dim x linear_value_head_dim is {learned}, at most {MOST} are supported"
        )));
    }
    if !sizes.value_heads.is_multiple_of(sizes.key_heads) {
        let (values, keys) = (sizes.value_heads, sizes.key_heads);
        return Err(Error::input(format!("config.json: linear_num_value_heads {values} is not a multiple of linear_num_key_heads {keys}")));
    }
    Ok(sizes)
}

/// Rates and kept shares of the heads lie key head by key head in the rows of one layer: the order of [`Delta::controls`].
pub fn control_rows(sizes: &Sizes) -> Vec<usize> {
    let times = sizes.value_heads / sizes.key_heads;
    let of = |half: usize| (0..sizes.value_heads).map(move |head| (head / times * 2 + half) * times + head % times);
    of(0).chain(of(1)).collect()
}

/// The output before its projection, tokens × value columns, for what the layers read.
pub fn mix(spec: &Spec<'_>, sizes: &Sizes, delta: &Arc<Delta>, parameters: &Parameters, x: &Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    let ([tokens, hidden], device) = (x.dims(), x.device());
    let mut given = |point: Point, y: Tensor<2>| {
        tap(point, &y);
        Floats::fetched(&y)
    };
    let input = given(Point::DeltaIn, linear(parameters, Role::DeltaIn, x));
    let gate = parameters.has(Role::DeltaGate).then(|| given(Point::DeltaGate, linear(parameters, Role::DeltaGate, x)));
    let [channels, opening] = match &gate {
        Some(gate) => [input.slice().to_vec(), gate.slice().to_vec()],
        None => parted(sizes, input.slice()),
    };
    let weight: Tensor<2> = tensor(delta.controls.data.clone(), [delta.controls.rows, hidden], &device);
    let controls = given(Point::Controls, product(x, &weight));
    let [rates, kept] = delta_rule::controls(controls.slice(), &delta.decay, &delta.offset);
    let windows = tokens / spec.seq.max(1);
    let mut out = vec![0.0; tokens * sizes.values()];
    let mut go = |state: &mut State, windows: usize| {
        let rows = windows * spec.seq;
        let mut mixed = vec![0.0; rows * sizes.channels()];
        delta_rule::convolve(sizes, spec.seq, &channels[..rows * sizes.channels()], &delta.taps, state, &mut mixed);
        delta_rule::normalize(sizes, &mut mixed);
        let (heads, values) = (rows * sizes.value_heads, rows * sizes.values());
        delta_rule::run(sizes, spec.seq, &mixed, [&rates[..heads], &kept[..heads]], state, &mut out[..values]);
    };
    match spec.past {
        Some(past) => {
            if let Past::Delta(state, windows) = &mut *past.lock().unwrap_or_else(PoisonError::into_inner) {
                go(state, *windows);
            }
        }
        None => go(&mut State::new(sizes, windows), windows),
    }
    delta_rule::gated_norm(&mut out, &delta.norm, spec.config.epsilon as f32, &opening);
    tensor(out, [tokens, sizes.values()], &device)
}

/// Channels, and what opens the output, of rows in which every key head has its query, its key, its values and what opens those.
pub fn parted(sizes: &Sizes, input: &[f32]) -> [Vec<f32>; 2] {
    let (keys, dk) = (sizes.keys(), sizes.key_dim);
    let own = sizes.values() / sizes.key_heads;
    let width = 2 * dk + 2 * own;
    let tokens = input.len() / (width * sizes.key_heads).max(1);
    let (mut channels, mut opening) = (vec![0.0; tokens * sizes.channels()], vec![0.0; tokens * sizes.values()]);
    let rows = channels.chunks_exact_mut(sizes.channels()).zip(opening.chunks_exact_mut(sizes.values()));
    for (input, (channels, opening)) in input.chunks_exact(width * sizes.key_heads).zip(rows) {
        for (head, input) in input.chunks_exact(width).enumerate() {
            channels[head * dk..][..dk].copy_from_slice(&input[..dk]);
            channels[keys + head * dk..][..dk].copy_from_slice(&input[dk..2 * dk]);
            channels[2 * keys + head * own..][..own].copy_from_slice(&input[2 * dk..2 * dk + own]);
            opening[head * own..][..own].copy_from_slice(&input[2 * dk + own..]);
        }
    }
    [channels, opening]
}

/// Rows as [`parted`] takes them.
pub fn joined(sizes: &Sizes, channels: &[f32], opening: &[f32]) -> Vec<f32> {
    let (keys, dk, own) = (sizes.keys(), sizes.key_dim, sizes.values() / sizes.key_heads);
    let rows = channels.chunks_exact(sizes.channels()).zip(opening.chunks_exact(sizes.values()));
    let mut input = Vec::with_capacity(channels.len() + opening.len());
    for (channels, opening) in rows {
        for head in 0..sizes.key_heads {
            input.extend_from_slice(&channels[head * dk..][..dk]);
            input.extend_from_slice(&channels[keys + head * dk..][..dk]);
            input.extend_from_slice(&channels[2 * keys + head * own..][..own]);
            input.extend_from_slice(&opening[head * own..][..own]);
        }
    }
    input
}
