//! Super-blocks of llama.cpp's K types as bytes (the layouts of ggml-common.h).

use half::f16;
use rayon::prelude::*;

use crate::weight::super_blocks::{SIZE, SuperBlocks, SuperKind};

/// The bytes of a weight, super-block after super-block.
pub fn encode(blocks: &SuperBlocks) -> Vec<u8> {
    let (kind, per) = (blocks.kind, SIZE / blocks.kind.block());
    let mut out = vec![0u8; blocks.floats.len() * kind.bytes()];
    let parts = out.par_chunks_mut(kind.bytes()).zip(blocks.codes.par_chunks(SIZE));
    parts.zip(blocks.floats.par_iter()).zip(blocks.wholes.par_chunks(per)).with_min_len(64).for_each(|(((out, codes), floats), wholes)| {
        let codes: &[u8; SIZE] = codes.try_into().expect("whole super-blocks");
        match kind {
            SuperKind::Q2K => pack_q2(out, codes, *floats, wholes),
            SuperKind::Q3K => pack_q3(out, codes, *floats, wholes),
            SuperKind::Q4K | SuperKind::Q5K => pack_q4_q5(out, codes, *floats, wholes, kind == SuperKind::Q5K),
            SuperKind::Q6K => pack_q6(out, codes, *floats, wholes),
        }
    });
    out
}

/// The weight of bytes; rows × columns.
pub fn decode(bytes: &[u8], kind: SuperKind, [rows, columns]: [usize; 2]) -> SuperBlocks {
    let (count, per) = (bytes.len() / kind.bytes(), SIZE / kind.block());
    let mut blocks =
        SuperBlocks { rows, columns, kind, codes: vec![0; count * SIZE], floats: vec![[0.0; 2]; count], wholes: vec![[0; 2]; count * per] };
    let parts = bytes.chunks_exact(kind.bytes()).zip(blocks.codes.chunks_exact_mut(SIZE));
    for (((bytes, codes), floats), wholes) in parts.zip(&mut blocks.floats).zip(blocks.wholes.chunks_exact_mut(per)) {
        match kind {
            SuperKind::Q2K => unpack_q2(bytes, codes, floats, wholes),
            SuperKind::Q3K => unpack_q3(bytes, codes, floats, wholes),
            SuperKind::Q4K | SuperKind::Q5K => unpack_q4_q5(bytes, codes, floats, wholes, kind == SuperKind::Q5K),
            SuperKind::Q6K => unpack_q6(bytes, codes, floats, wholes),
        }
    }
    blocks
}

fn put(out: &mut [u8], value: f32) {
    out[..2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

fn get(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Where the two bits of entry `at` lie in 64 bytes: of each half of 128, four planes over 32 bytes.
fn two_bits(at: usize) -> (usize, usize) {
    (at / 128 * 32 + at % 32, at % 128 / 32 * 2)
}

fn pack_q2(out: &mut [u8], codes: &[u8; SIZE], [d, m]: [f32; 2], wholes: &[[i8; 2]]) {
    wholes.iter().zip(&mut out[..16]).for_each(|([scale, minimum], byte)| *byte = *scale as u8 | (*minimum as u8) << 4);
    for (at, code) in codes.iter().enumerate() {
        let (byte, shift) = two_bits(at);
        out[16 + byte] |= code << shift;
    }
    put(&mut out[80..], d);
    put(&mut out[82..], m);
}

fn unpack_q2(bytes: &[u8], codes: &mut [u8], floats: &mut [f32; 2], wholes: &mut [[i8; 2]]) {
    wholes.iter_mut().zip(&bytes[..16]).for_each(|(whole, byte)| *whole = [(byte & 15) as i8, (byte >> 4) as i8]);
    for (at, code) in codes.iter_mut().enumerate() {
        let (byte, shift) = two_bits(at);
        *code = bytes[16 + byte] >> shift & 3;
    }
    *floats = [get(&bytes[80..]), get(&bytes[82..])];
}

fn pack_q3(out: &mut [u8], codes: &[u8; SIZE], [d, _]: [f32; 2], wholes: &[[i8; 2]]) {
    for (at, code) in codes.iter().enumerate() {
        let (byte, shift) = two_bits(at);
        out[32 + byte] |= (code & 3) << shift;
        out[at % 32] |= (code >> 2) << (at / 32);
    }
    for (at, [scale, _]) in wholes.iter().enumerate() {
        let whole = (scale + 32) as u8;
        out[96 + at % 8] |= (whole & 15) << (4 * (at / 8));
        out[104 + at % 4] |= (whole >> 4) << (2 * (at / 4));
    }
    put(&mut out[108..], d);
}

fn unpack_q3(bytes: &[u8], codes: &mut [u8], floats: &mut [f32; 2], wholes: &mut [[i8; 2]]) {
    for (at, code) in codes.iter_mut().enumerate() {
        let (byte, shift) = two_bits(at);
        *code = bytes[32 + byte] >> shift & 3 | (bytes[at % 32] >> (at / 32) & 1) << 2;
    }
    for (at, whole) in wholes.iter_mut().enumerate() {
        let value = bytes[96 + at % 8] >> (4 * (at / 8)) & 15 | (bytes[104 + at % 4] >> (2 * (at / 4)) & 3) << 4;
        *whole = [value as i8 - 32, 0];
    }
    *floats = [get(&bytes[108..]), 0.0];
}

fn pack_q4_q5(out: &mut [u8], codes: &[u8; SIZE], [d, m]: [f32; 2], wholes: &[[i8; 2]], five: bool) {
    put(out, d);
    put(&mut out[2..], m);
    for at in 0..4 {
        let [[scale, minimum], [later_scale, later_minimum]] = [wholes[at], wholes[at + 4]].map(|whole| whole.map(|value| value as u8));
        out[4 + at] = scale | (later_scale >> 4) << 6;
        out[8 + at] = minimum | (later_minimum >> 4) << 6;
        out[12 + at] = later_scale & 15 | (later_minimum & 15) << 4;
    }
    let low = if five { 48 } else { 16 };
    for (at, code) in codes.iter().enumerate() {
        out[low + at / 64 * 32 + at % 32] |= (code & 15) << (4 * (at / 32 % 2));
        if five {
            out[16 + at % 32] |= (code >> 4) << (at / 32);
        }
    }
}

fn unpack_q4_q5(bytes: &[u8], codes: &mut [u8], floats: &mut [f32; 2], wholes: &mut [[i8; 2]], five: bool) {
    *floats = [get(bytes), get(&bytes[2..])];
    for at in 0..4 {
        wholes[at] = [bytes[4 + at] & 63, bytes[8 + at] & 63].map(|value| value as i8);
        let later = [bytes[12 + at] & 15 | bytes[4 + at] >> 6 << 4, bytes[12 + at] >> 4 | bytes[8 + at] >> 6 << 4];
        wholes[at + 4] = later.map(|value| value as i8);
    }
    let low = if five { 48 } else { 16 };
    for (at, code) in codes.iter_mut().enumerate() {
        let fifth = if five { bytes[16 + at % 32] >> (at / 32) & 1 } else { 0 };
        *code = bytes[low + at / 64 * 32 + at % 32] >> (4 * (at / 32 % 2)) & 15 | fifth << 4;
    }
}

/// Where entry `at` lies: byte and shift of its four low bits, byte and shift of its two high ones.
fn six_bits(at: usize) -> (usize, usize, usize, usize) {
    let (half, inside) = (at / 128, at % 128);
    (half * 64 + inside % 64, inside / 64 * 4, half * 32 + inside % 32, inside / 32 * 2)
}

fn pack_q6(out: &mut [u8], codes: &[u8; SIZE], [d, _]: [f32; 2], wholes: &[[i8; 2]]) {
    for (at, code) in codes.iter().enumerate() {
        let (low, low_shift, high, high_shift) = six_bits(at);
        out[low] |= (code & 15) << low_shift;
        out[128 + high] |= (code >> 4) << high_shift;
    }
    wholes.iter().zip(&mut out[192..208]).for_each(|([scale, _], byte)| *byte = *scale as u8);
    put(&mut out[208..], d);
}

fn unpack_q6(bytes: &[u8], codes: &mut [u8], floats: &mut [f32; 2], wholes: &mut [[i8; 2]]) {
    for (at, code) in codes.iter_mut().enumerate() {
        let (low, low_shift, high, high_shift) = six_bits(at);
        *code = bytes[low] >> low_shift & 15 | (bytes[128 + high] >> high_shift & 3) << 4;
    }
    wholes.iter_mut().zip(&bytes[192..208]).for_each(|(whole, byte)| *whole = [*byte as i8, 0]);
    *floats = [get(&bytes[208..]), 0.0];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn super_blocks_come_back() {
        for kind in SuperKind::ALL {
            let [least, most] = kind.scales();
            let per = SIZE / kind.block();
            let span = (most - least + 1) as usize;
            let blocks = SuperBlocks {
                rows: 2,
                columns: 512,
                kind,
                codes: (0..1024u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 20) as u8 & ((1u16 << kind.bits()) - 1) as u8).collect(),
                floats: (0..4).map(|at| [0.5 + at as f32, if kind.minima() { 0.25 * at as f32 } else { 0.0 }]).collect(),
                wholes: (0..4 * per)
                    .map(|at| [(least + (at * 7 % span) as i32) as i8, if kind.minima() { (at * 5 % span) as i8 } else { 0 }])
                    .collect(),
            };
            let bytes = encode(&blocks);
            assert_eq!(bytes.len(), 4 * kind.bytes());
            assert_eq!(decode(&bytes, kind, [2, 512]), blocks, "{kind:?}");
        }
    }
}
