//! Causal attention over packed windows, with grouped key-value heads, an optional sliding window and soft cap.
//!
//! Legend: q (tokens × heads · d), k and v (tokens × kv_heads · d), token = window · seq + position. Position i sees
//! the positions j with j ≤ i and, under a sliding window W, j > i − W.

pub mod gpu;

use std::ops::Range;

use burn::tensor::activation::softmax;
use burn::tensor::{Int, Tensor};
use rayon::prelude::*;

use crate::kernels::exponential::{exp, tanh};
use crate::kernels::gemm::{Sizes, View, product};
use crate::kernels::{Floats, maximum, sum_lanes, tensor, vectorized};

/// The shape and the switches of an attention.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Tokens per window.
    pub seq: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; query head a reads kv head a / (heads / kv_heads).
    pub kv_heads: usize,
    /// Columns per head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// c in c · tanh(score / c).
    pub softcap: Option<f32>,
    /// How many positions a token sees, itself included.
    pub window: Option<usize>,
    /// By head, a score of nothing that stands beside those of the keys.
    pub sinks: Option<&'a [f32]>,
}

/// Query rows that share one pass over the keys.
pub(super) const BLOCK: usize = 64;

/// Pieces side by side along an axis.
fn joined(mut pieces: Vec<Tensor<2>>, axis: usize) -> Tensor<2> {
    if pieces.len() == 1 { pieces.remove(0) } else { Tensor::cat(pieces, axis) }
}

impl Attention<'_> {
    /// Attention output (tokens × heads · d).
    pub fn run(&self, q: Tensor<2>, k: Tensor<2>, v: Tensor<2>) -> Tensor<2> {
        match (Floats::of(&q), Floats::of(&k), Floats::of(&v)) {
            (Some(fq), Some(fk), Some(fv)) => {
                let mut out = vec![0.0; fq.slice().len()];
                self.run_cpu(fq.slice(), fk.slice(), fv.slice(), &mut out);
                tensor(out, q.dims(), &q.device())
            }
            _ => self.run_tensors(&q, &k, &v).unwrap_or_else(|| self.run_in_pieces(q, k, v)),
        }
    }

    /// The definition, a few windows and heads at a time, so that no matrix of scores outgrows what any GPU binds.
    fn run_in_pieces(&self, q: Tensor<2>, k: Tensor<2>, v: Tensor<2>) -> Tensor<2> {
        const BYTES: usize = 64 << 20;
        let (tokens, times) = (q.dims()[0], self.heads / self.kv_heads);
        let head_bytes = 4 * self.seq * self.seq;
        let kv_heads = (BYTES / (head_bytes * times)).clamp(1, self.kv_heads);
        let windows = (BYTES / (head_bytes * self.heads)).max(1);
        let piece = |rows: Range<usize>, heads: Range<usize>| {
            let sinks = self.sinks.map(|sinks| &sinks[heads.start * times..heads.end * times]);
            let part = Self { heads: heads.len() * times, kv_heads: heads.len(), sinks, ..*self };
            let d = self.head_dim;
            let of = |x: &Tensor<2>, times: usize| x.clone().slice([rows.clone(), heads.start * times * d..heads.end * times * d]);
            part.run_reference(of(&q, times), of(&k, 1), of(&v, 1))
        };
        let step = windows * self.seq;
        let by_window = (0..tokens).step_by(step).map(|row| {
            let rows = row..tokens.min(row + step);
            let by_head = (0..self.kv_heads).step_by(kv_heads).map(|head| piece(rows.clone(), head..self.kv_heads.min(head + kv_heads)));
            joined(by_head.collect(), 1)
        });
        joined(by_window.collect(), 0)
    }

    /// The definition in tensor algebra.
    pub fn run_reference(&self, q: Tensor<2>, k: Tensor<2>, v: Tensor<2>) -> Tensor<2> {
        let ([tokens, width], device) = (q.dims(), q.device());
        let (windows, seq, d) = (tokens / self.seq, self.seq, self.head_dim);
        let split = |x: Tensor<2>, heads: usize| -> Tensor<4> { x.reshape([windows, seq, heads, d]).swap_dims(1, 2) };
        let repeat = |x: Tensor<4>| {
            let times = self.heads / self.kv_heads;
            let shape = [windows, self.kv_heads, times, seq, d];
            x.unsqueeze_dim::<5>(2).expand(shape).reshape([windows, self.heads, seq, d])
        };
        let (q, k, v) = (split(q, self.heads), repeat(split(k, self.kv_heads)), repeat(split(v, self.kv_heads)));
        let mut scores = q.matmul(k.swap_dims(2, 3)) * self.scale;
        if let Some(cap) = self.softcap {
            scores = (scores / cap).tanh() * cap;
        }
        let i: Tensor<2, Int> = Tensor::arange(0..seq as i64, &device).reshape([seq, 1]);
        let j: Tensor<2, Int> = Tensor::arange(0..seq as i64, &device).reshape([1, seq]);
        let distance = i.expand([seq, seq]) - j.expand([seq, seq]);
        let mut hidden = distance.clone().lower_elem(0);
        if let Some(window) = self.window {
            hidden = hidden.bool_or(distance.greater_equal_elem(window as i64));
        }
        let hidden = hidden.unsqueeze::<4>().expand([windows, self.heads, seq, seq]);
        let mut scores = scores.mask_fill(hidden, -1e30);
        if let Some(sinks) = self.sinks {
            let sinks: Tensor<4> = tensor(sinks.to_vec(), [1, self.heads, 1, 1], &device);
            let sinks = if scores.is_autodiff() && !sinks.is_autodiff() { sinks.autodiff() } else { sinks };
            scores = Tensor::cat(vec![scores, sinks.expand([windows, self.heads, seq, 1])], 3);
        }
        let weights = softmax(scores, 3).slice([0..windows, 0..self.heads, 0..seq, 0..seq]);
        weights.matmul(v).swap_dims(1, 2).reshape([tokens, width])
    }

    /// The CPU path: blocks of query rows in parallel; keys that no row of a block sees are never touched.
    pub fn run_cpu(&self, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) {
        let width = self.heads * self.head_dim;
        let kv_width = self.kv_heads * self.head_dim;
        out.par_chunks_mut(self.seq * width).enumerate().for_each(|(window, out)| {
            let q = &q[window * self.seq * width..][..self.seq * width];
            let k = &k[window * self.seq * kv_width..][..self.seq * kv_width];
            let v = &v[window * self.seq * kv_width..][..self.seq * kv_width];
            out.par_chunks_mut(BLOCK * width).enumerate().for_each_init(Vec::new, |scores, (block, out)| {
                for head in 0..self.heads {
                    self.block(block * BLOCK, head, [q, k, v], scores, out);
                }
            });
        });
    }

    /// Output rows `first..` (as many as `out` holds) of one head.
    fn block(&self, first: usize, head: usize, [q, k, v]: [&[f32]; 3], scores: &mut Vec<f32>, out: &mut [f32]) {
        let d = self.head_dim;
        let (width, kv_width) = (self.heads * d, self.kv_heads * d);
        let rows = out.len() / width;
        let low = self.lowest(first);
        let keys = first + rows - low;
        self.scores(first, rows, head, [q, k], scores);
        self.probabilities(first, rows, head, scores);
        let value = View::rows(&v[low * kv_width + self.kv_column(head)..], kv_width);
        let sizes = Sizes { m: rows, n: d, k: keys };
        product(sizes, &mut out[head * d..], width, false, 1.0, View::rows(scores, keys), value, false);
    }

    /// The first key that the query rows from `first` on see.
    pub(super) fn lowest(&self, first: usize) -> usize {
        self.window.map_or(0, |window| (first + 1).saturating_sub(window))
    }

    /// The first column of the keys and values that a query head reads.
    pub(super) fn kv_column(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads) * self.head_dim
    }

    /// Scaled products of the query rows `first..first + rows` of a head with the keys from [`Self::lowest`] to the last
    /// row, not yet capped or masked.
    pub(super) fn scores(&self, first: usize, rows: usize, head: usize, [q, k]: [&[f32]; 2], scores: &mut Vec<f32>) {
        let d = self.head_dim;
        let (width, kv_width) = (self.heads * d, self.kv_heads * d);
        let low = self.lowest(first);
        let keys = first + rows - low;
        scores.resize(rows * keys, 0.0);
        let query = View::rows(&q[first * width + head * d..], width);
        let key = View::transposed(&k[low * kv_width + self.kv_column(head)..], kv_width);
        product(Sizes { m: rows, n: keys, k: d }, scores, keys, false, self.scale, query, key, false);
    }

    /// The score of nothing of a head.
    pub(super) fn sink(&self, head: usize) -> Option<f32> {
        self.sinks.and_then(|sinks| sinks.get(head).copied())
    }

    /// Turns [`Self::scores`] of a head into probabilities; what a row does not see gets 0.
    pub(super) fn probabilities(&self, first: usize, rows: usize, head: usize, scores: &mut [f32]) {
        let (low, sink) = (self.lowest(first), self.sink(head));
        vectorized(
            #[inline(always)]
            || {
                for (row, scores) in scores.chunks_exact_mut(first + rows - low).enumerate() {
                    let start = self.lowest(first + row) - low;
                    let end = first + row + 1 - low;
                    scores[..start].fill(0.0);
                    scores[end..].fill(0.0);
                    softmax_row(&mut scores[start..end], self.softcap, sink);
                }
            },
        );
    }
}

/// Soft cap and softmax of one row of scores, in place; a sink takes its share.
#[inline(always)]
pub(super) fn softmax_row(scores: &mut [f32], softcap: Option<f32>, sink: Option<f32>) {
    if let Some(cap) = softcap {
        for score in scores.iter_mut() {
            *score = cap * tanh(*score / cap);
        }
    }
    let highest = sink.map_or_else(|| maximum(scores), |sink| sink.max(maximum(scores)));
    for score in scores.iter_mut() {
        *score = exp(*score - highest);
    }
    let total = sum_lanes(scores, |score| score) + sink.map_or(0.0, |sink| exp(sink - highest));
    let factor = 1.0 / total;
    for score in scores.iter_mut() {
        *score *= factor;
    }
}
