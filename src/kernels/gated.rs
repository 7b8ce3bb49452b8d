//! act(gate) · up, the middle of a gated MLP.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::kernels::exponential::{sigmoid, tanh};
use crate::kernels::{Floats, tensor, vectorized};

/// The activation of a gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// ½x(1 + tanh(√(2/π)(x + 0.044715x³))).
    GeluTanh,
    /// gate · sigmoid(1.702 · gate), the gate at most 7, times 1 + up, which lies in −7..=7.
    Clamped,
}

/// Bound and steepness of [`Activation::Clamped`].
const LIMIT: f32 = 7.0;
const STEEP: f32 = 1.702;

const ROOT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

/// act(gate) · up, entry by entry.
pub fn gated(activation: Activation, gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    match (Floats::of(&gate), Floats::of(&up)) {
        (Some(g), Some(u)) => {
            let mut out = vec![0.0; g.slice().len()];
            gated_cpu(activation, g.slice(), u.slice(), &mut out);
            tensor(out, gate.dims(), &gate.device())
        }
        _ => gated_reference(activation, gate, up),
    }
}

/// The definition in tensor algebra.
pub fn gated_reference(activation: Activation, gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    let activated = match activation {
        Activation::Silu => burn::tensor::activation::silu(gate),
        Activation::GeluTanh => {
            let inner = (gate.clone() + gate.clone().powi_scalar(3) * CUBIC) * ROOT_2_OVER_PI;
            gate * 0.5 * (inner.tanh() + 1.0)
        }
        Activation::Clamped => {
            let gate = gate.clamp_max(LIMIT);
            return gate.clone() * burn::tensor::activation::sigmoid(gate * STEEP) * (up.clamp(-LIMIT, LIMIT) + 1.0);
        }
    };
    activated * up
}

/// The CPU path.
pub fn gated_cpu(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    const CHUNK: usize = 1 << 14;
    out.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK))).for_each(|(out, (gate, up))| {
        vectorized(
            #[inline(always)]
            || match activation {
                Activation::Silu => {
                    for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                        *out = g * sigmoid(g) * u;
                    }
                }
                Activation::GeluTanh => {
                    for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                        *out = 0.5 * g * (1.0 + tanh(ROOT_2_OVER_PI * (g + CUBIC * g * g * g))) * u;
                    }
                }
                Activation::Clamped => {
                    for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                        let g = g.min(LIMIT);
                        *out = g * sigmoid(STEEP * g) * (1.0 + u.clamp(-LIMIT, LIMIT));
                    }
                }
            },
        );
    });
}

/// The adjoint of [`gated_cpu`]: `d` enters as dL/d(act(gate) · up) and leaves as dL/dup; `dgate` becomes dL/dgate.
pub fn gated_adjoint(activation: Activation, gate: &[f32], up: &[f32], d: &mut [f32], dgate: &mut [f32]) {
    const CHUNK: usize = 1 << 14;
    let inputs = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK));
    d.par_chunks_mut(CHUNK).zip(dgate.par_chunks_mut(CHUNK)).zip(inputs).for_each(|((d, dgate), (gate, up))| {
        vectorized(
            #[inline(always)]
            || match activation {
                Activation::Silu => adjoint_entries(gate, up, d, dgate, silu_and_slope),
                Activation::GeluTanh => adjoint_entries(gate, up, d, dgate, gelu_and_slope),
                Activation::Clamped => clamped_adjoint(gate, up, d, dgate),
            },
        );
    });
}

#[inline(always)]
fn adjoint_entries(gate: &[f32], up: &[f32], d: &mut [f32], dgate: &mut [f32], activation: impl Fn(f32) -> [f32; 2]) {
    for (((d, dgate), &g), &u) in d.iter_mut().zip(dgate).zip(gate).zip(up) {
        let [value, slope] = activation(g);
        *dgate = *d * u * slope;
        *d *= value;
    }
}

#[inline(always)]
fn clamped_adjoint(gate: &[f32], up: &[f32], d: &mut [f32], dgate: &mut [f32]) {
    for (((d, dgate), &g), &u) in d.iter_mut().zip(dgate).zip(gate).zip(up) {
        let bounded = g.min(LIMIT);
        let s = sigmoid(STEEP * bounded);
        let slope = if g <= LIMIT { s + STEEP * bounded * s * (1.0 - s) } else { 0.0 };
        *dgate = *d * (1.0 + u.clamp(-LIMIT, LIMIT)) * slope;
        *d *= if u.abs() <= LIMIT { bounded * s } else { 0.0 };
    }
}

#[inline(always)]
fn silu_and_slope(g: f32) -> [f32; 2] {
    let s = sigmoid(g);
    [g * s, s + g * s * (1.0 - s)]
}

/// The slope is flat beyond ±100, and a bound there keeps the square of a huge gate from becoming infinite times zero.
#[inline(always)]
fn gelu_and_slope(g: f32) -> [f32; 2] {
    let bounded = g.clamp(-100.0, 100.0);
    let square = bounded * bounded;
    let t = tanh(ROOT_2_OVER_PI * bounded * (1.0 + CUBIC * square));
    let half = 0.5 * (1.0 + t);
    [g * half, half + 0.5 * bounded * (1.0 - t * t) * ROOT_2_OVER_PI * (1.0 + 3.0 * CUBIC * square)]
}
