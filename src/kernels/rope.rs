//! Rotary position embedding: pairs of columns of every head turn by an angle that grows with the position.

use std::ops::Range;

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::kernels::{Floats, tensor, values, vectorized};

/// Cosines and sines for `seq` consecutive positions of a window, row-major `seq × half`.
#[derive(Debug, Clone)]
pub struct Table {
    /// Positions.
    pub seq: usize,
    /// Pairs that rotate; the first `2 · half` columns of a head take part.
    pub half: usize,
    /// Cosines times the attention factor.
    pub cosines: Vec<f32>,
    /// Sines times the attention factor.
    pub sines: Vec<f32>,
    /// Whether a pair are neighbours, columns 2t and 2t + 1; else they are columns t and t + half.
    pub interleaved: bool,
}

impl Table {
    /// The table for inverse frequencies `frequencies` and an attention factor, from the first position on.
    pub fn new(frequencies: &[f32], factor: f32, seq: usize) -> Self {
        Self::range(frequencies, factor, 0..seq)
    }

    /// The rows of some positions.
    pub fn range(frequencies: &[f32], factor: f32, positions: Range<usize>) -> Self {
        let angles = || positions.clone().flat_map(|position| frequencies.iter().map(move |&frequency| position as f32 * frequency));
        Self {
            seq: positions.len(),
            half: frequencies.len(),
            cosines: angles().map(|angle| angle.cos() * factor).collect(),
            sines: angles().map(|angle| angle.sin() * factor).collect(),
            interleaved: false,
        }
    }

    /// The table that also multiplies what turns by a factor of its row.
    #[must_use]
    pub fn scaled(&self, factor: impl Fn(usize) -> f32) -> Self {
        let half = self.half.max(1);
        let scaled = |values: &[f32]| values.iter().enumerate().map(|(at, value)| value * factor(at / half)).collect();
        Self { cosines: scaled(&self.cosines), sines: scaled(&self.sines), ..self.clone() }
    }

    /// The table that turns the other way: the adjoint of the rotation, attention factor included.
    #[must_use]
    pub fn adjoint(&self) -> Self {
        Self { sines: self.sines.iter().map(|sine| -sine).collect(), ..self.clone() }
    }
}

/// Rotates every head of `x` (windows · seq × heads · head_dim).
pub fn rope(x: Tensor<2>, head_dim: usize, table: &Table) -> Tensor<2> {
    if Floats::of(&x).is_none() {
        return rope_reference(x, head_dim, table);
    }
    let (dims, device) = (x.dims(), x.device());
    let mut data = values(x);
    rope_cpu(&mut data, dims[1], head_dim, table);
    tensor(data, dims, &device)
}

/// The definition in tensor algebra: [u·c − v·s, v·c + u·s, untouched columns], where the pair (u, v) are the halves of the
/// columns that turn, or neighbours.
pub fn rope_reference(x: Tensor<2>, head_dim: usize, table: &Table) -> Tensor<2> {
    let ([tokens, width], device, half) = (x.dims(), x.device(), table.half);
    let heads = width / head_dim;
    let shape = [1, table.seq, 1, half];
    let cosines: Tensor<4> = tensor(table.cosines.clone(), shape, &device);
    let sines: Tensor<4> = tensor(table.sines.clone(), shape, &device);
    let windows = tokens / table.seq;
    let x = x.reshape([windows, table.seq, heads, head_dim]);
    // Neighbours are a last axis of two, halves a last axis but one.
    let split = if table.interleaved { [half, 2] } else { [2, half] };
    let axis = if table.interleaved { 4 } else { 3 };
    let pairs: Tensor<5> = x.clone().narrow(3, 0, 2 * half).reshape([windows, table.seq, heads, split[0], split[1]]);
    let one = |which: usize| pairs.clone().narrow(axis, which, 1).reshape([windows, table.seq, heads, half]);
    let (u, v): (Tensor<4>, Tensor<4>) = (one(0), one(1));
    let turned = [u.clone() * cosines.clone() - v.clone() * sines.clone(), v * cosines + u * sines];
    let turned: Vec<Tensor<5>> = turned.into_iter().map(|part| part.unsqueeze_dim(axis)).collect();
    let mut parts = vec![Tensor::cat(turned, axis).reshape([windows, table.seq, heads, 2 * half])];
    if head_dim > 2 * half {
        parts.push(x.narrow(3, 2 * half, head_dim - 2 * half));
    }
    Tensor::cat(parts, 3).reshape([tokens, width])
}

/// The CPU path, in place.
pub fn rope_cpu(x: &mut [f32], width: usize, head_dim: usize, table: &Table) {
    let half = table.half;
    x.par_chunks_mut(width).enumerate().with_min_len(16).for_each(|(token, row)| {
        let at = (token % table.seq) * half;
        let (cosines, sines) = (&table.cosines[at..at + half], &table.sines[at..at + half]);
        vectorized(
            #[inline(always)]
            || {
                for head in row.chunks_exact_mut(head_dim) {
                    if table.interleaved {
                        for ((pair, &c), &s) in head.as_chunks_mut::<2>().0.iter_mut().zip(cosines).zip(sines) {
                            let [u, v] = *pair;
                            *pair = [u * c - v * s, v * c + u * s];
                        }
                        continue;
                    }
                    let (u, v) = head.split_at_mut(half);
                    for (((u, v), &c), &s) in u.iter_mut().zip(v).zip(cosines).zip(sines) {
                        (*u, *v) = (*u * c - *v * s, *v * c + *u * s);
                    }
                }
            },
        );
    });
}
