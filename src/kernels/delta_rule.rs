//! The gated delta rule and the short convolution before it, over packed windows.
//!
//! Source: Gated Delta Networks (arXiv:2412.06464). A head keeps a matrix S of what it has learned, key × value columns, zeros at
//! the start of a window. For the key k, the value v and the query q of a token, the rate β and the share γ that is kept:
//! S ← γ S, δ = β (v − Sᵀk), S ← S + k δᵀ, o = Sᵀ q.

pub mod adjoint;

use rayon::prelude::*;

use crate::kernels::exponential::sigmoid;
use crate::kernels::{dot_lanes, vectorized};

/// Sizes of a delta rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values; value head a reads key head a / (value_heads / key_heads).
    pub value_heads: usize,
    /// Columns of a query and of a key.
    pub key_dim: usize,
    /// Columns of a value.
    pub value_dim: usize,
    /// Tokens that the convolution sees, its own included.
    pub kernel: usize,
}

/// What is added to a sum of squares before its root.
const EPSILON: f32 = 1e-6;

impl Sizes {
    /// Columns of all queries, or of all keys.
    pub fn keys(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Columns of all values.
    pub fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Columns of queries, keys and values together.
    pub fn channels(&self) -> usize {
        2 * self.keys() + self.values()
    }
}

/// What windows have learned so far: the last inputs of the convolution and the matrices of all heads.
#[derive(Debug, Clone)]
pub struct State {
    /// Tokens taken in.
    length: usize,
    /// By window, the last kernel − 1 rows of channels.
    recent: Vec<f32>,
    /// By window and value head, key × value columns.
    learned: Vec<f32>,
}

impl State {
    /// Nothing, for so many windows.
    pub fn new(sizes: &Sizes, windows: usize) -> Self {
        let learned = vec![0.0; windows * sizes.value_heads * sizes.key_dim * sizes.value_dim];
        Self { length: 0, recent: vec![0.0; windows * (sizes.kernel - 1) * sizes.channels()], learned }
    }

    /// Bytes of a state.
    pub fn bytes(sizes: &Sizes, windows: usize) -> u64 {
        4 * (windows * (sizes.value_heads * sizes.key_dim * sizes.value_dim + (sizes.kernel - 1) * sizes.channels())) as u64
    }

    /// Tokens taken in.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing was taken in.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

/// silu of the causal convolution of every channel, window by window of `seq` tokens, with what `state` saw before them, which
/// takes the new rows in. `taps` are channels × kernel, the last one of the token itself.
pub fn convolve(sizes: &Sizes, seq: usize, x: &[f32], taps: &[f32], state: &mut State, out: &mut [f32]) {
    let (channels, kernel) = (sizes.channels(), sizes.kernel);
    let before = (kernel - 1) * channels;
    let by_tap: Vec<f32> = (0..kernel).flat_map(|tap| (0..channels).map(move |channel| taps[channel * kernel + tap])).collect();
    let windows = out.par_chunks_exact_mut(seq * channels).zip(x.par_chunks_exact(seq * channels));
    windows.zip(state.recent.par_chunks_mut(before.max(1))).for_each(|((out, x), recent)| {
        let row =
            |at: usize| if at < kernel - 1 { &recent[at * channels..][..channels] } else { &x[(at + 1 - kernel) * channels..][..channels] };
        for (token, out) in out.chunks_exact_mut(channels).enumerate() {
            vectorized(
                #[inline(always)]
                || {
                    out.fill(0.0);
                    for (tap, taps) in by_tap.chunks_exact(channels).enumerate() {
                        out.iter_mut().zip(row(token + tap)).zip(taps).for_each(|((out, x), tap)| *out += x * tap);
                    }
                    out.iter_mut().for_each(|out| *out *= sigmoid(*out));
                },
            );
        }
        let last: Vec<f32> = (seq..seq + kernel - 1).flat_map(|at| row(at).iter().copied()).collect();
        recent[..before].copy_from_slice(&last);
    });
}

/// Makes every query and key of unit length, and queries shorter by the root of their columns; values stay. Rows are channels.
pub fn normalize(sizes: &Sizes, x: &mut [f32]) {
    let (keys, d) = (sizes.keys(), sizes.key_dim);
    let short = 1.0 / (d as f32).sqrt();
    x.par_chunks_exact_mut(sizes.channels()).for_each(|row| {
        for (head, x) in row[..2 * keys].chunks_exact_mut(d).enumerate() {
            let factor = if head < sizes.key_heads { short } else { 1.0 } / (dot_lanes(x, x) + EPSILON).sqrt();
            x.iter_mut().for_each(|x| *x *= factor);
        }
    });
}

/// The outputs (tokens × value columns) for rows of channels, and by token and value head the rates and what is kept. `state`
/// goes on from where it stands.
pub fn run(sizes: &Sizes, seq: usize, x: &[f32], [rates, kept]: [&[f32]; 2], state: &mut State, out: &mut [f32]) {
    let (heads, dk, dv) = (sizes.value_heads, sizes.key_dim, sizes.value_dim);
    let mut by_head = vec![0.0; out.len()];
    let work = by_head.par_chunks_exact_mut(seq * dv).zip(state.learned.par_chunks_exact_mut(dk * dv)).enumerate();
    work.for_each(|(at, (out, learned))| {
        let (window, head) = (at / heads, at % heads);
        let key = head / (heads / sizes.key_heads) * dk;
        let mut push = vec![0.0f32; dv];
        for (token, out) in out.chunks_exact_mut(dv).enumerate() {
            let token = window * seq + token;
            let row = &x[token * sizes.channels()..][..sizes.channels()];
            let (q, k) = (&row[key..][..dk], &row[sizes.keys() + key..][..dk]);
            let v = &row[2 * sizes.keys() + head * dv..][..dv];
            let (rate, kept) = (rates[token * heads + head], kept[token * heads + head]);
            vectorized(
                #[inline(always)]
                || step(learned, [q, k, v], [rate, kept], &mut push, out),
            );
        }
    });
    state.length += seq;
    out.par_chunks_exact_mut(heads * dv).enumerate().for_each(|(token, out)| {
        for (head, out) in out.chunks_exact_mut(dv).enumerate() {
            let at = (token / seq * heads + head) * seq + token % seq;
            out.copy_from_slice(&by_head[at * dv..][..dv]);
        }
    });
}

/// One token of one head.
#[inline(always)]
fn step(learned: &mut [f32], [q, k, v]: [&[f32]; 3], [rate, kept]: [f32; 2], push: &mut [f32], out: &mut [f32]) {
    let dv = v.len();
    push.fill(0.0);
    for (row, &k) in learned.chunks_exact_mut(dv).zip(k) {
        for (s, push) in row.iter_mut().zip(push.iter_mut()) {
            *s *= kept;
            *push += *s * k;
        }
    }
    push.iter_mut().zip(v).for_each(|(push, v)| *push = (v - *push) * rate);
    out.fill(0.0);
    for ((row, &k), &q) in learned.chunks_exact_mut(dv).zip(k).zip(q) {
        for ((s, &push), out) in row.iter_mut().zip(push.iter()).zip(out.iter_mut()) {
            *s += k * push;
            *out += *s * q;
        }
    }
}

/// Rates β and kept shares γ from what controls them: rows of b, then of a, of all value heads.
/// β = sigmoid(b), γ = exp(−exp(A) · softplus(a + offset)).
pub fn controls(x: &[f32], decay: &[f32], offset: &[f32]) -> [Vec<f32>; 2] {
    let heads = decay.len();
    let rows = || x.chunks_exact((2 * heads).max(1));
    let rates = rows().flat_map(|row| row[..heads].iter().map(|&b| sigmoid(b))).collect();
    let kept =
        rows().flat_map(|row| row[heads..].iter().zip(decay.iter().zip(offset)).map(|(a, (decay, offset))| share(a + offset, *decay)));
    [rates, kept.collect()]
}

fn share(x: f32, decay: f32) -> f32 {
    let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
    (-decay.exp() * softplus).exp()
}

/// rms(o) · weight · silu(z) over every head of `o` (tokens × value columns), in place.
pub fn gated_norm(o: &mut [f32], weight: &[f32], epsilon: f32, z: &[f32]) {
    let width = weight.len().max(1);
    o.par_chunks_exact_mut(width * 16).zip(z.par_chunks_exact(width * 16)).for_each(|(o, z)| gated_rows(o, weight, epsilon, z));
    let rest = o.len() / (width * 16) * (width * 16);
    gated_rows(&mut o[rest..], weight, epsilon, &z[rest..]);
}

fn gated_rows(o: &mut [f32], weight: &[f32], epsilon: f32, z: &[f32]) {
    let width = weight.len().max(1);
    vectorized(
        #[inline(always)]
        || {
            for (o, z) in o.chunks_exact_mut(width).zip(z.chunks_exact(width)) {
                let factor = 1.0 / (dot_lanes(o, o) / width as f32 + epsilon).sqrt();
                o.iter_mut().zip(z).zip(weight).for_each(|((o, &z), weight)| *o *= factor * weight * z * sigmoid(z));
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes { key_heads: 2, value_heads: 4, key_dim: 3, value_dim: 5, kernel: 4 };

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 500.0 - 1.0).collect()
    }

    fn all(seq: usize, windows: usize, state: &mut State, tokens: impl Fn(&[f32], usize) -> Vec<f32>) -> Vec<f32> {
        let (channels, heads) = (SIZES.channels(), SIZES.value_heads);
        let x = tokens(&numbers(windows * 9 * channels, 1), channels);
        let [rates, kept] = [2, 3].map(|seed| tokens(&numbers(windows * 9 * heads, seed), heads).iter().map(|x| x * 0.4 + 0.5).collect());
        let [rates, kept]: [Vec<f32>; 2] = [rates, kept];
        let mut mixed = vec![0.0; x.len()];
        convolve(&SIZES, seq, &x, &numbers(channels * 4, 4), state, &mut mixed);
        normalize(&SIZES, &mut mixed);
        let mut out = vec![0.0; windows * seq * SIZES.values()];
        run(&SIZES, seq, &mixed, [&rates, &kept], state, &mut out);
        out
    }

    #[test]
    fn token_after_token_gives_what_whole_windows_give() {
        let windows = 2;
        let whole = all(9, windows, &mut State::new(&SIZES, windows), |x, _| x.to_vec());
        let mut state = State::new(&SIZES, windows);
        for token in 0..9 {
            let rows =
                |x: &[f32], width: usize| (0..windows).flat_map(|window| x[(window * 9 + token) * width..][..width].to_vec()).collect();
            let found = all(1, windows, &mut state, rows);
            let expected = rows(&whole, SIZES.values());
            let worst = found.iter().zip(&expected).map(|(a, b): (&f32, &f32)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-6, "token {token}: {worst}");
        }
        assert_eq!(state.len(), 9);
    }

    #[test]
    fn a_key_that_comes_again_finds_its_value_and_forgets_by_the_kept_share() {
        let sizes = Sizes { key_heads: 1, value_heads: 1, key_dim: 2, value_dim: 1, kernel: 1 };
        // q, k, v of three tokens: learn 3 at the first key, learn 5 at the second, ask for the first.
        let x = [1.0, 0.0, 1.0, 0.0, 3.0, 0.0, 1.0, 0.0, 1.0, 5.0, 1.0, 0.0, 0.0, 1.0, 5.0];
        let mut out = [0.0; 3];
        run(&sizes, 3, &x, [&[1.0; 3], &[1.0, 0.5, 0.5]], &mut State::new(&sizes, 1), &mut out);
        assert_eq!(out, [3.0, 5.0, 0.75]);
    }
}
