//! The adjoint of causal attention on the processor. The probabilities are computed again for a block of query rows at
//! a time, so nothing of the size seq × seq exists.
//!
//! Legend, for one head: P = softmax(scores), o = P v, and for an upstream gradient do: dP = do vᵀ,
//! dS = P · (dP − Σ do · o) · scale · (slope of the soft cap), dq = dS k, dk = dSᵀ q, dv = Pᵀ do.

use rayon::prelude::*;

use crate::kernels::attention::{Attention, BLOCK};
use crate::kernels::exponential::tanh;
use crate::kernels::gemm::{Sizes, View, product};
use crate::kernels::{dot_lanes, vectorized};

/// What an attention read and gave, and the gradient of what it gave.
#[derive(Debug, Clone, Copy)]
pub struct Passed<'a> {
    /// Queries, tokens × heads · d.
    pub q: &'a [f32],
    /// Keys, tokens × kv_heads · d.
    pub k: &'a [f32],
    /// Values, tokens × kv_heads · d.
    pub v: &'a [f32],
    /// Output, tokens × heads · d.
    pub out: &'a [f32],
    /// dL/d(output).
    pub dout: &'a [f32],
}

/// The gradients of one kv head of one window: one slice per token.
struct Share<'a> {
    window: usize,
    kv_head: usize,
    dq: Vec<&'a mut [f32]>,
    dk: Vec<&'a mut [f32]>,
    dv: Vec<&'a mut [f32]>,
}

/// Memory of one thread.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    slopes: Vec<f32>,
    upstream: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Attention<'_> {
    /// Writes dL/dq, dL/dk and dL/dv. Windows and kv heads in parallel; the heads and rows that add to one key do so in
    /// a fixed order.
    pub fn adjoint(&self, passed: &Passed<'_>, dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]) {
        let (d, group) = (self.head_dim, self.heads / self.kv_heads);
        let split = |x, width| self.split(x, width).into_iter();
        let shares: Vec<Share<'_>> = split(dq, group * d)
            .zip(split(dk, d).zip(split(dv, d)))
            .enumerate()
            .map(|(at, (dq, (dk, dv)))| Share { window: at / self.kv_heads, kv_head: at % self.kv_heads, dq, dk, dv })
            .collect();
        shares.into_par_iter().with_max_len(1).for_each_init(Scratch::default, |scratch, share| self.share(passed, share, scratch));
    }

    /// The slices of every token for every window and kv head, `width` columns each.
    fn split<'a>(&self, x: &'a mut [f32], width: usize) -> Vec<Vec<&'a mut [f32]>> {
        let windows = x.len() / (self.seq * self.kv_heads * width).max(1);
        let mut parts: Vec<Vec<&mut [f32]>> = (0..windows * self.kv_heads).map(|_| Vec::with_capacity(self.seq)).collect();
        for (at, slice) in x.chunks_exact_mut(width).enumerate() {
            let (token, kv_head) = (at / self.kv_heads, at % self.kv_heads);
            parts[token / self.seq * self.kv_heads + kv_head].push(slice);
        }
        parts
    }

    fn share(&self, passed: &Passed<'_>, mut share: Share<'_>, scratch: &mut Scratch) {
        let (d, group) = (self.head_dim, self.heads / self.kv_heads);
        let part = |x, heads| window_of(x, share.window, self.seq * heads * d);
        let window = Passed {
            q: part(passed.q, self.heads),
            k: part(passed.k, self.kv_heads),
            v: part(passed.v, self.kv_heads),
            out: part(passed.out, self.heads),
            dout: part(passed.dout, self.heads),
        };
        for sums in [&mut scratch.dk, &mut scratch.dv] {
            sums.clear();
            sums.resize(self.seq * d, 0.0);
        }
        for first in (0..self.seq).step_by(BLOCK) {
            let rows = BLOCK.min(self.seq - first);
            for member in 0..group {
                self.rows(first, rows, share.kv_head * group + member, &window, scratch);
                for (to, from) in share.dq[first..].iter_mut().zip(scratch.dq.chunks_exact(d)) {
                    to[member * d..][..d].copy_from_slice(from);
                }
            }
        }
        for (to, from) in [(share.dk, &scratch.dk), (share.dv, &scratch.dv)] {
            to.into_iter().zip(from.chunks_exact(d)).for_each(|(to, from)| to.copy_from_slice(from));
        }
    }

    /// Writes dq of some query rows of one head and adds to dk and dv what they contribute.
    fn rows(&self, first: usize, rows: usize, head: usize, window: &Passed<'_>, scratch: &mut Scratch) {
        let Passed { q, k, v, out, dout } = *window;
        let d = self.head_dim;
        let (width, kv_width) = (self.heads * d, self.kv_heads * d);
        let low = self.lowest(first);
        let keys = first + rows - low;
        let kv_at = low * kv_width + self.kv_column(head);
        let at = first * width + head * d;
        let Scratch { scores, slopes, upstream, dq, dk, dv } = scratch;
        self.scores(first, rows, head, [q, k], scores);
        if let Some(cap) = self.softcap {
            cap_slopes(scores, cap, slopes);
        }
        self.probabilities(first, rows, head, scores);
        upstream.resize(rows * keys, 0.0);
        dq.resize(rows * d, 0.0);
        let across = Sizes { m: rows, n: keys, k: d };
        let down = Sizes { m: keys, n: d, k: rows };
        let dout_rows = View::rows(&dout[at..], width);
        product(across, upstream, keys, false, 1.0, dout_rows, View::transposed(&v[kv_at..], kv_width), false);
        product(down, &mut dv[low * d..], d, true, 1.0, View::transposed(scores, keys), dout_rows, false);
        vectorized(
            #[inline(always)]
            || {
                for (row, (scores, upstream)) in scores.chunks_exact_mut(keys).zip(upstream.chunks_exact(keys)).enumerate() {
                    let at = at + row * width;
                    softmax_adjoint(scores, upstream, &out[at..at + d], &dout[at..at + d], self.scale);
                }
                if self.softcap.is_some() {
                    scores.iter_mut().zip(slopes.iter()).for_each(|(score, &slope)| *score *= slope);
                }
            },
        );
        let back = Sizes { m: rows, n: d, k: keys };
        product(back, dq, d, false, 1.0, View::rows(scores, keys), View::rows(&k[kv_at..], kv_width), false);
        product(down, &mut dk[low * d..], d, true, 1.0, View::transposed(scores, keys), View::rows(&q[at..], width), false);
    }
}

fn window_of(x: &[f32], window: usize, size: usize) -> &[f32] {
    &x[window * size..][..size]
}

/// Turns the probabilities of a row into the gradient of its scores.
#[inline(always)]
fn softmax_adjoint(scores: &mut [f32], upstream: &[f32], out: &[f32], dout: &[f32], scale: f32) {
    let mean = dot_lanes(out, dout);
    for (score, &upstream) in scores.iter_mut().zip(upstream) {
        *score *= (upstream - mean) * scale;
    }
}

/// 1 − tanh²(score / cap), the slope of the soft cap.
fn cap_slopes(scores: &[f32], cap: f32, slopes: &mut Vec<f32>) {
    slopes.resize(scores.len(), 0.0);
    vectorized(
        #[inline(always)]
        || {
            for (slope, &score) in slopes.iter_mut().zip(scores) {
                let t = tanh(score / cap);
                *slope = 1.0 - t * t;
            }
        },
    );
}
