//! The adjoint of the gated delta rule and of what stands before and after it.
//!
//! Legend, for one head, with G = dL/dS of what comes after: G += q doᵀ, dq = S do, dδ = Gᵀ k, dk = G δ, dv = β dδ,
//! G −= k dvᵀ, dk −= γ S₋ dv, dβ = dδ · (v − γ S₋ᵀ k), dγ = Σ G · S₋, G ← γ G, where S₋ is S before the token. The matrices of
//! a stretch of tokens are computed again from the one at its start.

use rayon::prelude::*;

use crate::kernels::delta_rule::{EPSILON, Sizes};
use crate::kernels::exponential::sigmoid;
use crate::kernels::{dot_lanes, vectorized};

/// Tokens whose matrices exist at once.
const STRETCH: usize = 32;

/// What a rule read, and the gradient of what it gave.
#[derive(Debug, Clone, Copy)]
pub struct Passed<'a> {
    /// Normalized rows of channels.
    pub x: &'a [f32],
    /// Rates, tokens × value heads.
    pub rates: &'a [f32],
    /// Kept shares, tokens × value heads.
    pub kept: &'a [f32],
    /// dL/d(output), tokens × value columns.
    pub dout: &'a [f32],
}

/// Gradients of one key head of one window: by token, q and k and the values of its value heads, and their rates and kept shares.
struct Share {
    channels: Vec<f32>,
    rates: Vec<f32>,
    kept: Vec<f32>,
}

/// Gradients of the rows of channels, of the rates and of the kept shares, for windows of `seq` tokens.
pub fn run(sizes: &Sizes, seq: usize, passed: &Passed<'_>) -> [Vec<f32>; 3] {
    let (tokens, times) = (passed.rates.len() / sizes.value_heads, sizes.value_heads / sizes.key_heads);
    let (dk, dv, keys) = (sizes.key_dim, sizes.value_dim, sizes.keys());
    let windows = tokens / seq.max(1);
    let shares: Vec<Share> = (0..windows * sizes.key_heads)
        .into_par_iter()
        .map(|at| {
            let width = 2 * dk + times * dv;
            let mut share = Share { channels: vec![0.0; seq * width], rates: vec![0.0; seq * times], kept: vec![0.0; seq * times] };
            for member in 0..times {
                head(sizes, seq, passed, at / sizes.key_heads, at % sizes.key_heads, member, &mut share);
            }
            share
        })
        .collect();
    let mut channels = vec![0.0; passed.x.len()];
    let mut controls = [vec![0.0; passed.rates.len()], vec![0.0; passed.rates.len()]];
    for (at, share) in shares.iter().enumerate() {
        let (window, key_head) = (at / sizes.key_heads, at % sizes.key_heads);
        for (token, own) in share.channels.chunks_exact(2 * dk + times * dv).enumerate() {
            let at = window * seq + token;
            let row = &mut channels[at * sizes.channels()..][..sizes.channels()];
            row[key_head * dk..][..dk].copy_from_slice(&own[..dk]);
            row[keys + key_head * dk..][..dk].copy_from_slice(&own[dk..2 * dk]);
            row[2 * keys + key_head * times * dv..][..times * dv].copy_from_slice(&own[2 * dk..]);
            for (to, from) in controls.iter_mut().zip([&share.rates, &share.kept]) {
                to[at * sizes.value_heads + key_head * times..][..times].copy_from_slice(&from[token * times..][..times]);
            }
        }
    }
    let [rates, kept] = controls;
    [channels, rates, kept]
}

/// Adds what one value head contributes.
fn head(sizes: &Sizes, seq: usize, passed: &Passed<'_>, window: usize, key_head: usize, member: usize, share: &mut Share) {
    let (dk, dv, times) = (sizes.key_dim, sizes.value_dim, sizes.value_heads / sizes.key_heads);
    let value_head = key_head * times + member;
    let token = |token: usize| {
        let at = window * seq + token;
        let row = &passed.x[at * sizes.channels()..][..sizes.channels()];
        let keys = sizes.keys();
        let parts = [&row[key_head * dk..][..dk], &row[keys + key_head * dk..][..dk], &row[2 * keys + value_head * dv..][..dv]];
        let control = at * sizes.value_heads + value_head;
        (parts, [passed.rates[control], passed.kept[control]], &passed.dout[at * sizes.values() + value_head * dv..][..dv])
    };
    // The matrices before every stretch.
    let size = dk * dv;
    let (mut state, mut push, mut unused) = (vec![0.0; size], vec![0.0; dv], vec![0.0; dv]);
    let mut starts = Vec::with_capacity(seq.div_ceil(STRETCH) * size);
    for at in 0..seq {
        if at % STRETCH == 0 {
            starts.extend_from_slice(&state);
        }
        let (parts, controls, _) = token(at);
        super::step(&mut state, parts, controls, &mut push, &mut unused);
    }
    let mut after = vec![0.0; size];
    let mut states = vec![0.0; STRETCH * size];
    for (stretch, start) in starts.chunks_exact(size).enumerate().rev() {
        let tokens = stretch * STRETCH..seq.min((stretch + 1) * STRETCH);
        state.copy_from_slice(start);
        for at in tokens.clone() {
            states[(at - tokens.start) * size..][..size].copy_from_slice(&state);
            let (parts, controls, _) = token(at);
            super::step(&mut state, parts, controls, &mut push, &mut unused);
        }
        for at in tokens.clone().rev() {
            let before = &states[(at - tokens.start) * size..][..size];
            let (parts, controls, dout) = token(at);
            let own = &mut share.channels[at * (2 * dk + times * dv)..][..2 * dk + times * dv];
            let (keys, values) = own.split_at_mut(2 * dk);
            let values = &mut values[member * dv..][..dv];
            [share.rates[at * times + member], share.kept[at * times + member]] = vectorized(
                #[inline(always)]
                || back(before, &mut after, parts, controls, dout, [keys, values], &mut push),
            );
        }
    }
}

/// One token of one head; `keys` are dq and dk, to which is added, and `values` becomes dv. Gives dβ and dγ.
#[inline(always)]
fn back(
    before: &[f32],
    after: &mut [f32],
    [q, k, v]: [&[f32]; 3],
    [rate, kept]: [f32; 2],
    dout: &[f32],
    [keys, dv]: [&mut [f32]; 2],
    missing: &mut [f32],
) -> [f32; 2] {
    let width = v.len();
    let (dq, dk) = keys.split_at_mut(q.len());
    // What the token's value has and its key did not find, in `missing`.
    missing.copy_from_slice(v);
    for (row, &k) in before.chunks_exact(width).zip(k) {
        missing.iter_mut().zip(row).for_each(|(missing, s)| *missing -= kept * k * s);
    }
    // dδ, in `dv`.
    dv.fill(0.0);
    for ((row, &k), &q) in after.chunks_exact_mut(width).zip(k).zip(q) {
        for ((g, d), dout) in row.iter_mut().zip(dv.iter_mut()).zip(dout) {
            *g += q * dout;
            *d += k * *g;
        }
    }
    let rate_slope = dot_lanes(dv, missing);
    let pushed = dot_lanes(missing, dout) * rate;
    for (((row, g), &k), (dq, dk)) in before.chunks_exact(width).zip(after.chunks_exact(width)).zip(k).zip(dq.iter_mut().zip(dk.iter_mut()))
    {
        // S do = γ S₋ do + k (δ · do), and G δ.
        *dq += kept * dot_lanes(row, dout) + k * pushed;
        *dk += rate * dot_lanes(g, missing);
    }
    dv.iter_mut().for_each(|d| *d *= rate);
    let mut kept_slope = 0.0;
    for (((row, g), &k), dk) in before.chunks_exact(width).zip(after.chunks_exact_mut(width)).zip(k).zip(dk.iter_mut()) {
        *dk -= kept * dot_lanes(row, dv);
        g.iter_mut().zip(dv.iter()).for_each(|(g, d)| *g -= k * d);
        kept_slope += dot_lanes(row, g);
        g.iter_mut().for_each(|g| *g *= kept);
    }
    [rate_slope, kept_slope]
}

/// The adjoint of [`super::normalize`]: `d` enters as the gradient of what it gave for `x`, and leaves as that of `x`.
pub fn normalize(sizes: &Sizes, x: &[f32], d: &mut [f32]) {
    let (keys, width) = (sizes.keys(), sizes.key_dim);
    let short = 1.0 / (width as f32).sqrt();
    d.par_chunks_exact_mut(sizes.channels()).zip(x.par_chunks_exact(sizes.channels())).for_each(|(d, x)| {
        for (head, (d, x)) in d[..2 * keys].chunks_exact_mut(width).zip(x.chunks_exact(width)).enumerate() {
            let factor = 1.0 / (dot_lanes(x, x) + EPSILON).sqrt();
            let pull = dot_lanes(x, d) * factor * factor;
            let all = factor * if head < sizes.key_heads { short } else { 1.0 };
            d.iter_mut().zip(x).for_each(|(d, x)| *d = (*d - x * pull) * all);
        }
    });
}

/// The adjoint of [`super::convolve`] over whole windows: from the gradient of what it gave for `x` to that of `x`.
pub fn convolve(sizes: &Sizes, seq: usize, x: &[f32], taps: &[f32], d: &[f32]) -> Vec<f32> {
    let (channels, kernel) = (sizes.channels(), sizes.kernel);
    let mut dx = vec![0.0; x.len()];
    let windows = dx.par_chunks_exact_mut(seq * channels).zip(x.par_chunks_exact(seq * channels)).zip(d.par_chunks_exact(seq * channels));
    windows.for_each(|((dx, x), d)| {
        for token in 0..seq {
            let first = (kernel - 1).saturating_sub(token);
            for channel in 0..channels {
                let taps = &taps[channel * kernel..][..kernel];
                let at = |tap: usize| (token + 1 + tap - kernel) * channels + channel;
                let sum: f32 = (first..kernel).map(|tap| x[at(tap)] * taps[tap]).sum();
                let open = sigmoid(sum);
                let slope = d[token * channels + channel] * open * (1.0 + sum * (1.0 - open));
                (first..kernel).for_each(|tap| dx[at(tap)] += slope * taps[tap]);
            }
        }
    });
    dx
}

/// The adjoint of [`super::controls`]: from the gradients of rates and kept shares to that of what controls them, `x`.
pub fn controls(x: &[f32], decay: &[f32], offset: &[f32], [rates, kept]: [&[f32]; 2], [drates, dkept]: [&[f32]; 2]) -> Vec<f32> {
    let heads = decay.len();
    let mut d = vec![0.0; x.len()];
    for (token, (d, x)) in d.chunks_exact_mut((2 * heads).max(1)).zip(x.chunks_exact((2 * heads).max(1))).enumerate() {
        for head in 0..heads {
            let at = token * heads + head;
            d[head] = drates[at] * rates[at] * (1.0 - rates[at]);
            d[heads + head] = -dkept[at] * kept[at] * decay[head].exp() * sigmoid(x[heads + head] + offset[head]);
        }
    }
    d
}

/// The adjoint of [`super::gated_norm`] of `o` opened by `z`: `d` enters as the gradient of what it gave and leaves as that of `o`;
/// gives that of `z`.
pub fn gated_norm(o: &[f32], weight: &[f32], epsilon: f32, z: &[f32], d: &mut [f32]) -> Vec<f32> {
    let width = weight.len().max(1);
    let mut dz = vec![0.0; z.len()];
    let rows = d.par_chunks_exact_mut(width).zip(dz.par_chunks_exact_mut(width)).with_min_len(64);
    rows.zip(o.par_chunks_exact(width).zip(z.par_chunks_exact(width))).for_each(|((d, dz), (o, z))| {
        let factor = 1.0 / (dot_lanes(o, o) / width as f32 + epsilon).sqrt();
        for (((d, dz), (&o, &z)), weight) in d.iter_mut().zip(dz).zip(o.iter().zip(z)).zip(weight) {
            let open = sigmoid(z);
            *dz = *d * o * factor * weight * open * (1.0 + z * (1.0 - open));
            *d *= weight * z * open;
        }
        let pull = dot_lanes(d, o) / width as f32 * factor * factor;
        d.iter_mut().zip(o).for_each(|(d, o)| *d = factor * (*d - o * pull));
    });
    dz
}
