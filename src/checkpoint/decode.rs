//! Bytes of stored floats to f32 and back, at the speed of memory. Bytes need not be aligned.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::lanes::vectorized;
use crate::weight::Float;

/// Entries handled by one task.
const CHUNK: usize = 1 << 16;

/// Decodes little-endian floats into `out`; `bytes` holds exactly `out.len()` of them.
pub fn decode(float: Float, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * float.bytes(), "bytes of {float:?}");
    out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * float.bytes())).for_each(|(out, bytes)| decode_chunk(float, bytes, out));
}

/// As [`decode`], on the calling thread.
pub fn decode_chunk(float: Float, bytes: &[u8], out: &mut [f32]) {
    match float {
        Float::BF16 => vectorized(
            #[inline(always)]
            || {
                for (out, pair) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes(*pair)) << 16);
                }
            },
        ),
        Float::F16 => decode_f16(bytes, out),
        Float::F32 => {
            for (out, quad) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(*quad);
            }
        }
    }
}

/// Index of the first stored float that is NaN or infinite, and how many there are, without decoding.
pub fn nonfinite_bytes(float: Float, bytes: &[u8]) -> Option<(usize, usize)> {
    let width = float.bytes();
    let count: usize = bytes.par_chunks(CHUNK * width).map(|bytes| bad_bytes(float, bytes)).sum();
    if count == 0 {
        return None;
    }
    let first = (0..bytes.len() / width).find(|&index| bad_bytes(float, &bytes[index * width..][..width]) > 0);
    first.map(|first| (first, count))
}

/// Number of stored floats whose exponent is all ones.
fn bad_bytes(float: Float, bytes: &[u8]) -> usize {
    let pairs = |mask: u16| {
        vectorized(
            #[inline(always)]
            || {
                let blocks = bytes.as_chunks::<2>().0.chunks(4096);
                blocks
                    .map(|block| {
                        usize::from(
                            block.iter().fold(0u16, |count, pair| count.wrapping_add(u16::from(u16::from_le_bytes(*pair) & mask == mask))),
                        )
                    })
                    .sum()
            },
        )
    };
    match float {
        Float::BF16 => pairs(0x7f80),
        Float::F16 => pairs(0x7c00),
        Float::F32 => bytes.as_chunks::<4>().0.iter().filter(|quad| u32::from_le_bytes(**quad) & 0x7f80_0000 == 0x7f80_0000).count(),
    }
}

fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    let mut block = [f16::ZERO; 256];
    for (out, bytes) in out.chunks_mut(256).zip(bytes.chunks(512)) {
        for (value, pair) in block.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *value = f16::from_le_bytes(*pair);
        }
        block[..out.len()].convert_to_f32_slice(out);
    }
}

/// Encodes f32 as little-endian floats, rounding to nearest even. Values that the format holds come back bit for bit.
pub fn encode(float: Float, values: &[f32]) -> Vec<u8> {
    let mut out = vec![0; values.len() * float.bytes()];
    out.par_chunks_mut(CHUNK * float.bytes()).zip(values.par_chunks(CHUNK)).for_each(|(out, values)| match float {
        Float::BF16 => {
            for (pair, &value) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *pair = bf16::from_f32(value).to_le_bytes();
            }
        }
        Float::F16 => {
            for (pair, &value) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *pair = f16::from_f32(value).to_le_bytes();
            }
        }
        Float::F32 => {
            for (quad, &value) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *quad = value.to_le_bytes();
            }
        }
    });
    out
}

/// Index of the first value that is NaN or infinite, and how many there are.
pub fn nonfinite(values: &[f32]) -> Option<(usize, usize)> {
    let bad = |values: &[f32]| values.iter().map(|value| u32::from(value.to_bits() & 0x7f80_0000 == 0x7f80_0000)).sum::<u32>() as usize;
    let count: usize = values.par_chunks(CHUNK).map(bad).sum();
    let first = if count == 0 { None } else { values.iter().position(|value| !value.is_finite()) };
    first.map(|first| (first, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_16_bit_pattern_decodes_as_the_half_crate_does_and_encodes_back() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut out = vec![0.0; 1 << 16];
        for (float, expected) in [
            (Float::BF16, (0..=u16::MAX).map(|bits| bf16::from_bits(bits).to_f32()).collect::<Vec<_>>()),
            (Float::F16, (0..=u16::MAX).map(|bits| f16::from_bits(bits).to_f32()).collect()),
        ] {
            decode(float, &bytes, &mut out);
            assert!(out.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())));
            let back = encode(float, &out);
            assert!(back.chunks(2).zip(bytes.chunks(2)).zip(&out).all(|((a, b), value)| a == b || value.is_nan()));
        }
    }

    #[test]
    fn unaligned_bytes_decode_the_same() {
        let values = [1.5f32, -2.25, 0.0, f32::MAX];
        for float in [Float::BF16, Float::F16, Float::F32] {
            let mut bytes = vec![7u8];
            bytes.extend(encode(float, &values));
            let mut out = [0.0; 4];
            decode(float, &bytes[1..], &mut out);
            assert_eq!(out[..3], values[..3]);
        }
    }

    #[test]
    fn nonfinite_values_are_counted_and_located() {
        let mut values = vec![0.5; 100_000];
        assert_eq!(nonfinite(&values), None);
        values[70_001] = f32::NAN;
        values[70_003] = f32::NEG_INFINITY;
        assert_eq!(nonfinite(&values), Some((70_001, 2)));
        for float in [Float::BF16, Float::F16, Float::F32] {
            assert_eq!(nonfinite_bytes(float, &encode(float, &values)), Some((70_001, 2)), "{float:?}");
            assert_eq!(nonfinite_bytes(float, &encode(float, &values[..70_000])), None);
        }
    }
}
