//! Matrix products whose operands are rounded to bfloat16 and whose sums are single precision, for gradients of which
//! the sign alone counts. Processors that multiply bfloat16 do it at up to twice the rate of single precision; on all
//! others it is [`product`] itself, because rounding would then cost time and buy nothing.
//!
//! Legend: dst (m × n) = lhs (m × k) · rhs (k × n), plus dst where `add`. Operands lie as pairs along k: one word holds
//! entries 2p (low half) and 2p + 1 (high half).
#![allow(unsafe_code)]

use crate::kernels::gemm::{Sizes, View, product};

/// How exact a product is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Single precision.
    Single,
    /// Operands in bfloat16 where the processor multiplies it.
    Rough,
}

/// dst = lhs · rhs, plus dst where `add`, as [`product`]. Every entry is summed in one order, whatever the threads.
///
/// # Panics
/// When a slice is too short for the sizes.
#[expect(clippy::too_many_arguments, reason = "the arguments of a matrix product")]
pub fn product_in(
    precision: Precision,
    sizes: Sizes,
    dst: &mut [f32],
    row_stride: usize,
    add: bool,
    lhs: View<'_>,
    rhs: View<'_>,
    parallel: bool,
) {
    #[cfg(target_arch = "x86_64")]
    if precision == Precision::Rough && x86::supported() && x86::worthwhile(sizes) {
        return x86::product(sizes, dst, row_stride, add, lhs, rhs, parallel);
    }
    product(sizes, dst, row_stride, add, 1.0, lhs, rhs, parallel);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512bh, __mmask16, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_epi32,
        _mm512_setzero_ps,
    };

    use rayon::prelude::*;

    use crate::kernels::gemm::{Sizes, View};

    /// Rows and columns of dst that are summed in registers.
    const ROWS: usize = 8;
    const COLUMNS: usize = 32;

    /// Pairs along k per pass: a panel of rhs then stays in the innermost cache.
    const PAIRS: usize = 128;

    /// Rows of dst per task.
    const TASK: usize = 32 * ROWS;

    pub fn supported() -> bool {
        std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512bf16")
    }

    /// Whether the work outweighs rounding the operands.
    pub fn worthwhile(Sizes { m, n, k }: Sizes) -> bool {
        m >= ROWS && n >= COLUMNS && k >= 32
    }

    /// lhs in pairs: the word of row i and pair p is `words[i * row + p * pair]`.
    struct Left {
        words: Vec<u32>,
        row: usize,
        pair: usize,
    }

    pub fn product(sizes: Sizes, dst: &mut [f32], row_stride: usize, add: bool, lhs: View<'_>, rhs: View<'_>, parallel: bool) {
        let Sizes { m, n, k } = sizes;
        assert!(row_stride >= n && (m - 1) * row_stride + n <= dst.len(), "dst too short for {m} x {n}");
        assert!(lhs.holds(m, k) && rhs.holds(k, n), "operands too short for {m} x {k} x {n}");
        let (left, panels) = (left(lhs, m, k, parallel), panels(rhs, k, n, parallel));
        let pairs = k.div_ceil(2);
        let task = |(number, rows): (usize, &mut [f32])| {
            let first = number * TASK;
            for from in (0..pairs).step_by(PAIRS) {
                let count = PAIRS.min(pairs - from);
                for (panel, start) in (0..n).step_by(COLUMNS).enumerate() {
                    let panel = &panels[(panel * pairs + from) * COLUMNS..][..count * COLUMNS];
                    let width = COLUMNS.min(n - start);
                    for (strip, dst) in rows.chunks_mut(ROWS * row_stride).enumerate() {
                        let height = dst.len().div_ceil(row_stride).min(m - first - strip * ROWS);
                        let words = &left.words[(first + strip * ROWS) * left.row + from * left.pair..];
                        let tile = Tile { words, row: left.row, pair: left.pair, panel, dst: &mut dst[start..], row_stride, width };
                        tile.run(height, add || from > 0);
                    }
                }
            }
        };
        let rows = &mut dst[..(m - 1) * row_stride + n];
        if parallel {
            rows.par_chunks_mut(TASK * row_stride).enumerate().for_each(task);
        } else {
            rows.chunks_mut(TASK * row_stride).enumerate().for_each(task);
        }
    }

    /// A part of dst of at most `ROWS` rows and `COLUMNS` columns, with what is multiplied into it.
    struct Tile<'a> {
        words: &'a [u32],
        row: usize,
        pair: usize,
        panel: &'a [u32],
        dst: &'a mut [f32],
        row_stride: usize,
        width: usize,
    }

    impl Tile<'_> {
        fn run(self, height: usize, add: bool) {
            let pairs = self.panel.len() / COLUMNS;
            assert!(height >= 1 && (height - 1) * self.row + (pairs - 1) * self.pair < self.words.len());
            assert!((height - 1) * self.row_stride + self.width <= self.dst.len() && self.width <= COLUMNS);
            // SAFETY: the processor has the instructions (`supported` was asked), and the assertions above keep every
            // read of words and every masked access of dst inside its slice; the panel holds COLUMNS words per pair.
            unsafe {
                match height {
                    1 => self.sum::<1>(add),
                    2 => self.sum::<2>(add),
                    3 => self.sum::<3>(add),
                    4 => self.sum::<4>(add),
                    5 => self.sum::<5>(add),
                    6 => self.sum::<6>(add),
                    7 => self.sum::<7>(add),
                    _ => self.sum::<ROWS>(add),
                }
            }
        }

        #[target_feature(enable = "avx512f,avx512bf16")]
        unsafe fn sum<const R: usize>(self, add: bool) {
            let masks: [__mmask16; 2] = [lanes(self.width), lanes(self.width.saturating_sub(16))];
            let mut sums = [[_mm512_setzero_ps(); 2]; R];
            let dst = self.dst.as_mut_ptr();
            if add {
                for (row, sums) in sums.iter_mut().enumerate() {
                    for half in 0..2 {
                        // SAFETY: see `run`; lanes beyond the width are masked.
                        sums[half] = unsafe { _mm512_maskz_loadu_ps(masks[half], dst.wrapping_add(row * self.row_stride + 16 * half)) };
                    }
                }
            }
            let words = self.words.as_ptr();
            for (pair, panel) in self.panel.chunks_exact(COLUMNS).enumerate() {
                // SAFETY: a chunk holds 32 words.
                let right = unsafe { [_mm512_loadu_si512(panel.as_ptr().cast()), _mm512_loadu_si512(panel.as_ptr().add(16).cast())] };
                // SAFETY: any bits are values of the type.
                let right: [__m512bh; 2] = unsafe { std::mem::transmute(right) };
                for (row, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: see `run`.
                    let word = unsafe { *words.add(row * self.row + pair * self.pair) };
                    // SAFETY: any bits are values of the type.
                    let left: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(word.cast_signed())) };
                    sums[0] = _mm512_dpbf16_ps(sums[0], left, right[0]);
                    sums[1] = _mm512_dpbf16_ps(sums[1], left, right[1]);
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                for half in 0..2 {
                    // SAFETY: see `run`; lanes beyond the width are masked.
                    unsafe { _mm512_mask_storeu_ps(dst.wrapping_add(row * self.row_stride + 16 * half), masks[half], sums[half]) };
                }
            }
        }
    }

    fn lanes(count: usize) -> __mmask16 {
        if count >= 16 { !0 } else { (1 << count) - 1 }
    }

    /// The two halves of a word.
    #[inline(always)]
    fn word(low: f32, high: f32) -> u32 {
        u32::from(half(low)) | u32::from(half(high)) << 16
    }

    /// The nearest bfloat16; of two the even one.
    #[inline(always)]
    fn half(value: f32) -> u16 {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
        if value.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded }
    }

    /// Rows of lhs that are contiguous keep their order; a transposed lhs keeps its own.
    fn left(lhs: View<'_>, m: usize, k: usize, parallel: bool) -> Left {
        let pairs = k.div_ceil(2);
        let (data, row_stride, column_stride) = lhs.parts();
        let mut words = vec![0u32; m * pairs];
        if column_stride == 1 {
            each(&mut words, pairs, parallel, |row, words| {
                let row = &data[row * row_stride..][..k];
                crate::kernels::vectorized(
                    #[inline(always)]
                    || {
                        let (twos, rest) = row.as_chunks::<2>();
                        words.iter_mut().zip(twos).for_each(|(out, &[low, high])| *out = word(low, high));
                        if let (Some(last), [single]) = (words.last_mut(), rest) {
                            *last = word(*single, 0.0);
                        }
                    },
                );
            });
            return Left { words, row: pairs, pair: 1 };
        }
        assert_eq!(row_stride, 1, "an operand that is contiguous in neither direction");
        each(&mut words, m, parallel, |pair, words| pair_of_lines(data, column_stride, pair, k, words));
        Left { words, row: 1, pair: m }
    }

    /// rhs in panels of `COLUMNS` columns, in each of them pair after pair; columns beyond n are zero.
    fn panels(rhs: View<'_>, k: usize, n: usize, parallel: bool) -> Vec<u32> {
        let (data, row_stride, column_stride) = rhs.parts();
        assert_eq!(column_stride, 1, "rhs must have contiguous rows");
        let pairs = k.div_ceil(2);
        let mut words = vec![0u32; n.div_ceil(COLUMNS) * pairs * COLUMNS];
        each(&mut words, pairs * COLUMNS, parallel, |panel, words| {
            let start = panel * COLUMNS;
            let width = COLUMNS.min(n - start);
            for (pair, words) in words.chunks_exact_mut(COLUMNS).enumerate() {
                pair_of_lines(&data[start..], row_stride, pair, k, &mut words[..width]);
            }
        });
        words
    }

    /// Words of lines 2 · `pair` and the next of a matrix of k lines; behind the last line all is zero.
    fn pair_of_lines(data: &[f32], stride: usize, pair: usize, k: usize, words: &mut [u32]) {
        let low = &data[2 * pair * stride..][..words.len()];
        let high = if 2 * pair + 1 < k { &data[(2 * pair + 1) * stride..][..words.len()] } else { &[] };
        crate::kernels::vectorized(
            #[inline(always)]
            || {
                if high.is_empty() {
                    words.iter_mut().zip(low).for_each(|(out, &low)| *out = word(low, 0.0));
                } else {
                    words.iter_mut().zip(low.iter().zip(high)).for_each(|(out, (&low, &high))| *out = word(low, high));
                }
            },
        );
    }

    /// Works on parts of `size` words, one after the other or in parallel.
    fn each(words: &mut [u32], size: usize, parallel: bool, work: impl Fn(usize, &mut [u32]) + Sync) {
        if parallel {
            words.par_chunks_mut(size).enumerate().for_each(|(at, words)| work(at, words));
        } else {
            words.chunks_mut(size).enumerate().for_each(|(at, words)| work(at, words));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| (((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0) * if i % 97 == 3 { 30.0 } else { 1.0 }).collect()
    }

    #[test]
    fn rough_products_are_products_of_rounded_operands() {
        for (at, (m, n, k)) in [(12, 32, 32), (13, 33, 65), (25, 100, 300), (300, 40, 64), (1, 1, 1), (31, 47, 513)].into_iter().enumerate()
        {
            let (rows, columns) = (noise(m * (k + 3), at), noise((k + 1) * (n + 2), at + 1));
            let transposed: Vec<f32> = (0..k * m).map(|i| rows[i % m * (k + 3) + i / m]).collect();
            let round = |value: f32| f64::from(half::bf16::from_f32(value).to_f32());
            for (lhs, add) in [(View::rows(&rows, k + 3), false), (View::transposed(&transposed, m), true)] {
                let mut dst = vec![0.5f32; m * (n + 1)];
                product_in(Precision::Rough, Sizes { m, n, k }, &mut dst, n + 1, add, lhs, View::rows(&columns, n + 2), true);
                let mut alone = vec![0.5f32; m * (n + 1)];
                product_in(Precision::Rough, Sizes { m, n, k }, &mut alone, n + 1, add, lhs, View::rows(&columns, n + 2), false);
                assert_eq!(dst, alone);
                for (i, j) in (0..m * n).map(|at| (at / n, at % n)) {
                    let terms = (0..k).map(|t| (rows[i * (k + 3) + t], columns[t * (n + 2) + j]));
                    let size: f64 = terms.clone().map(|(a, b)| f64::from((a * b).abs())).sum();
                    let start = if add { 0.5 } else { 0.0 };
                    let rounded: f64 = terms.clone().map(|(a, b)| round(a) * round(b)).sum::<f64>() + start;
                    let exact: f64 = terms.map(|(a, b)| f64::from(a) * f64::from(b)).sum::<f64>() + start;
                    let found = f64::from(dst[i * (n + 1) + j]);
                    // Where the processor lacks the instructions the product is exact.
                    let near = |value: f64| (found - value).abs() <= 1e-5 * size + 1e-6;
                    assert!(near(rounded) || near(exact), "{m} {n} {k} at {i} {j}: {found} {rounded} {exact}");
                }
                assert!((0..m).all(|i| dst[i * (n + 1) + n] == 0.5), "what lies between rows is not touched");
            }
        }
    }

    #[test]
    fn values_that_are_not_numbers_stay_so() {
        let mut lhs = noise(16 * 64, 1);
        lhs[5 * 64 + 7] = f32::from_bits(0x7fff_ffff);
        let rhs = noise(64 * 32, 2);
        let mut dst = vec![0.0; 16 * 32];
        product_in(Precision::Rough, Sizes { m: 16, n: 32, k: 64 }, &mut dst, 32, false, View::rows(&lhs, 64), View::rows(&rhs, 32), false);
        assert!(dst.chunks(32).enumerate().all(|(row, values)| values.iter().all(|value| value.is_nan() == (row == 5))));
    }
}
