//! Attention of one new position per window to the positions before it, whose keys and values are kept.
//!
//! Legend: q (rows × heads · d), k and v (rows × kv_heads · d), one row per window. The new position i sees the kept
//! positions j with j ≤ i and, under a sliding window W, j > i − W: what [`crate::kernels::attention`] computes for
//! the last row of a window. Sums run in a fixed order that depends on nothing but the sizes of one head.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::kernels::attention::{Attention, softmax_row};
use crate::kernels::{tensor, values, vectorized};

/// Positions whose keys lie together, column by column, so that one load serves as many positions as a vector holds.
const TILE: usize = 64;

/// Keys and values of all positions so far, head by head and window by window.
#[derive(Debug)]
pub struct Cache {
    /// Positions kept.
    length: usize,
    /// Positions that there is room for.
    room: usize,
    /// Columns of a head.
    head_dim: usize,
    /// Per window and head: tiles of positions, each d × TILE.
    keys: Vec<f32>,
    /// Per window and head: room × d.
    values: Vec<f32>,
}

impl Cache {
    /// An empty cache with room for `length` positions of `windows` windows with `kv_heads` heads each.
    pub fn new(windows: usize, length: usize, kv_heads: usize, head_dim: usize) -> Self {
        let room = length.next_multiple_of(TILE);
        let floats = || vec![0.0; windows * kv_heads * room * head_dim];
        Self { length: 0, room, head_dim, keys: floats(), values: floats() }
    }

    /// Bytes of a cache of these sizes.
    pub fn bytes(windows: usize, length: usize, kv_heads: usize, head_dim: usize) -> u64 {
        8 * (windows * kv_heads * length.next_multiple_of(TILE) * head_dim) as u64
    }

    /// Positions kept.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no position is kept.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

/// Takes the new position of every window into the cache and gives its attention output (rows × heads · d). Rows
/// beyond the windows of the cache stay zero: they fill a product up and stand for nothing.
///
/// # Panics
/// When the cache is full, or was made for other sizes.
pub fn attend(attention: &Attention<'_>, cache: &mut Cache, q: Tensor<2>, k: Tensor<2>, v: Tensor<2>) -> Tensor<2> {
    let (dims, device) = (q.dims(), q.device());
    let (q, k, v) = (values(q), values(k), values(v));
    let mut out = vec![0.0; q.len()];
    attend_cpu(attention, cache, [&q, &k, &v], &mut out);
    tensor(out, dims, &device)
}

/// [`attend`] over slices: windows and key-value heads in parallel.
///
/// # Panics
/// As [`attend`].
pub fn attend_cpu(attention: &Attention<'_>, cache: &mut Cache, [q, k, v]: [&[f32]; 3], out: &mut [f32]) {
    let (d, position, room) = (cache.head_dim, cache.length, cache.room);
    assert!(position < room && d == attention.head_dim, "position {position} of {room}, {d} columns");
    let group = attention.heads / attention.kv_heads * d;
    let low = attention.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let rows = q.par_chunks_exact(group).zip(k.par_chunks_exact(d)).zip(v.par_chunks_exact(d));
    let kept = cache.keys.par_chunks_exact_mut(room * d).zip(cache.values.par_chunks_exact_mut(room * d));
    out.par_chunks_exact_mut(group).zip(rows).zip(kept).enumerate().with_min_len(4).for_each_init(
        Vec::new,
        |scores, (at, ((out, ((q, k), v)), (keys, values)))| {
            let tile = &mut keys[position / TILE * TILE * d..][..TILE * d];
            for (column, &key) in tile.chunks_exact_mut(TILE).zip(k) {
                column[position % TILE] = key;
            }
            values[position * d..][..d].copy_from_slice(v);
            scores.resize(room, 0.0);
            vectorized(
                #[inline(always)]
                || {
                    let first = at % attention.kv_heads * (attention.heads / attention.kv_heads);
                    for (head, (q, out)) in q.chunks_exact(d).zip(out.chunks_exact_mut(d)).enumerate() {
                        score(q, keys, low / TILE..position / TILE + 1, attention.scale, scores);
                        softmax_row(&mut scores[low..=position], attention.softcap, attention.sink(first + head));
                        mix(&scores[low..=position], &values[low * d..], out);
                    }
                },
            );
        },
    );
    cache.length += 1;
}

/// scale · q · key for the positions of some tiles.
#[inline(always)]
fn score(q: &[f32], keys: &[f32], tiles: std::ops::Range<usize>, scale: f32, scores: &mut [f32]) {
    for tile in tiles {
        let mut sums = [0.0f32; TILE];
        for (&q, column) in q.iter().zip(keys[tile * TILE * q.len()..].as_chunks::<TILE>().0) {
            for (sum, &key) in sums.iter_mut().zip(column) {
                *sum += q * key;
            }
        }
        for (score, sum) in scores[tile * TILE..][..TILE].iter_mut().zip(sums) {
            *score = sum * scale;
        }
    }
}

/// Σ weight · value over positions, for as many columns as `out` has; rows of `values` are as wide.
#[inline(always)]
fn mix(weights: &[f32], values: &[f32], out: &mut [f32]) {
    let width = out.len();
    let mut first = 0;
    while width - first >= 64 {
        mix_columns::<64>(weights, values, first, out);
        first += 64;
    }
    while width - first >= 16 {
        mix_columns::<16>(weights, values, first, out);
        first += 16;
    }
    while width > first {
        mix_columns::<1>(weights, values, first, out);
        first += 1;
    }
}

/// [`mix`] for the columns `first..first + N`, which stay in registers.
#[inline(always)]
fn mix_columns<const N: usize>(weights: &[f32], values: &[f32], first: usize, out: &mut [f32]) {
    let width = out.len();
    let mut sums = [0.0f32; N];
    for (&weight, row) in weights.iter().zip(values.chunks_exact(width)) {
        let row = &row[first..first + N];
        for (sum, &value) in sums.iter_mut().zip(row) {
            *sum += weight * value;
        }
    }
    out[first..first + N].copy_from_slice(&sums);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 400.0 - 1.2).collect()
    }

    #[test]
    fn position_after_position_gives_the_attention_of_whole_windows() {
        for (seq, heads, kv_heads, head_dim) in [(1, 1, 1, 2), (70, 4, 2, 10), (130, 6, 3, 82), (65, 2, 2, 64)] {
            for window in [None, Some(1), Some(7), Some(65), Some(1000)] {
                for softcap in [None, Some(2.0)] {
                    let sinks: Vec<f32> = (0..heads).map(|head| head as f32 * 0.7 - 1.0).collect();
                    let sinks = window.map(|_| sinks.as_slice());
                    let whole = Attention { seq, heads, kv_heads, head_dim, scale: 0.3, softcap, window, sinks };
                    let (windows, width, kv_width) = (3, heads * head_dim, kv_heads * head_dim);
                    let q = numbers(windows * seq * width, 1);
                    let [k, v] = [2, 3].map(|seed| numbers(windows * seq * kv_width, seed));
                    let mut exact = vec![0.0; q.len()];
                    whole.run_cpu(&q, &k, &v, &mut exact);
                    let mut cache = Cache::new(windows, seq, kv_heads, head_dim);
                    for position in 0..seq {
                        // One row more than there are windows.
                        let row = |x: &[f32], width: usize| -> Vec<f32> {
                            let mut rows: Vec<f32> =
                                (0..windows).flat_map(|window| &x[(window * seq + position) * width..][..width]).copied().collect();
                            rows.resize((windows + 1) * width, 0.0);
                            rows
                        };
                        let mut out = vec![0.0; (windows + 1) * width];
                        let rows = [row(&q, width), row(&k, kv_width), row(&v, kv_width)];
                        attend_cpu(&Attention { seq: 1, ..whole }, &mut cache, rows.each_ref().map(Vec::as_slice), &mut out);
                        let worst = row(&exact, width).iter().zip(&out).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                        assert!(worst < 5e-6, "{whole:?} position {position}: {worst}");
                    }
                }
            }
        }
    }
}
