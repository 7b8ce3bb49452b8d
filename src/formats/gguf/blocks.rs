//! Blocks of weights (formats A5; the layouts of ggml-common.h).

use half::f16;
use rayon::prelude::*;

use crate::weight::super_blocks::{SIZE, SuperKind};
use crate::weight::{Float, Ints};

/// The type of a tensor's entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// Codes of 2 bits, −1 to 2, in blocks of 64.
    Q2_0,
    /// Codes of 4 bits, −8 to 7, in blocks of 32.
    Q4_0,
    /// Codes of 5 bits, −16 to 15, in blocks of 32.
    Q5_0,
    /// Codes of 8 bits in blocks of 32.
    Q8_0,
    /// Super-blocks of 256.
    Super(SuperKind),
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q2_0,
        Self::Q4_0,
        Self::Q5_0,
        Self::Q8_0,
        Self::Super(SuperKind::Q2K),
        Self::Super(SuperKind::Q3K),
        Self::Super(SuperKind::Q4K),
        Self::Super(SuperKind::Q5K),
        Self::Super(SuperKind::Q6K),
    ];

    /// Its number in files.
    pub fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q5_0 => 6,
            Self::Q8_0 => 8,
            Self::BF16 => 30,
            Self::Q2_0 => 42,
            Self::Super(kind) => 8 + u32::from(kind.bits()),
        }
    }

    /// The type of a number format.
    pub fn of(float: Float) -> Self {
        match float {
            Float::F32 => Self::F32,
            Float::F16 => Self::F16,
            Float::BF16 => Self::BF16,
        }
    }

    /// The number format of floats.
    pub fn float(self) -> Option<Float> {
        [Float::F32, Float::F16, Float::BF16].into_iter().find(|&float| Self::of(float) == self)
    }

    /// Weights of a block.
    pub fn weights(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q2_0 => 64,
            Self::Super(_) => SIZE,
            Self::Q4_0 | Self::Q5_0 | Self::Q8_0 => 32,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q2_0 | Self::Q4_0 => 18,
            Self::Q5_0 => 22,
            Self::Q8_0 => 34,
            Self::Super(kind) => kind.bytes(),
        }
    }

    /// The number of llama.cpp's `general.file_type` for a file that is mostly of this type.
    pub fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Q5_0 => 8,
            Self::BF16 => 32,
            Self::Q2_0 => 41,
            Self::Super(SuperKind::Q2K) => 10,
            Self::Super(SuperKind::Q3K) => 11,
            Self::Super(SuperKind::Q4K) => 14,
            Self::Super(SuperKind::Q5K) => 16,
            Self::Super(SuperKind::Q6K) => 18,
        }
    }
}

/// Blocks of integers whose differences from their zero points the type holds; row by row.
pub fn encode(ints: &Ints, kind: Kind) -> Vec<u8> {
    let (groups, size) = (ints.groups(), kind.weights());
    let row_bytes = ints.columns / size * kind.bytes();
    let mut out = vec![0; ints.rows * row_bytes];
    let of_row = |(row, out): (usize, &mut [u8])| {
        let codes = &ints.codes[row * ints.columns..][..ints.columns];
        for (block, (out, codes)) in out.chunks_exact_mut(kind.bytes()).zip(codes.chunks_exact(size)).enumerate() {
            let group = row * groups + block * size / ints.group;
            let zero = ints.zeros.as_ref().map_or(ints.middle(), |zeros| zeros[group]);
            pack(kind, ints.scales[group], zero, codes, out);
        }
    };
    out.par_chunks_mut(row_bytes.max(1)).enumerate().with_min_len(8).for_each(of_row);
    out
}

fn pack(kind: Kind, scale: f32, zero: u8, codes: &[u8], out: &mut [u8]) {
    // The blocks of 2 bits hold −1 to 2, our codes −2 to 1: both turn their sign.
    let (scale, sign) = if kind == Kind::Q2_0 { (-scale, -1) } else { (scale, 1) };
    let step = |at: usize| sign * (i32::from(codes[at]) - i32::from(zero));
    out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    match kind {
        Kind::Q2_0 => {
            out[2..].fill(0);
            (0..64).for_each(|at| out[2 + at / 4] |= ((step(at) + 1) as u8 & 3) << (2 * (at % 4)));
        }
        Kind::Q4_0 => (0..16).for_each(|at| out[2 + at] = (step(at) + 8) as u8 & 15 | ((step(at + 16) + 8) as u8 & 15) << 4),
        Kind::Q5_0 => {
            let fifth = |at: usize| ((step(at) + 16) as u32 >> 4 & 1) << at;
            out[2..6].copy_from_slice(&(0..32).map(fifth).fold(0, |all, bit| all | bit).to_le_bytes());
            (0..16).for_each(|at| out[6 + at] = (step(at) + 16) as u8 & 15 | ((step(at + 16) + 16) as u8 & 15) << 4);
        }
        Kind::Q8_0 => (0..32).for_each(|at| out[2 + at] = step(at) as i8 as u8),
        Kind::F32 | Kind::F16 | Kind::BF16 | Kind::Super(_) => {}
    }
}

/// Floats, whole blocks of 32, rounded to nearest in blocks of 8-bit codes.
pub fn rounded_to_eight(values: &[f32]) -> Vec<u8> {
    let (size, bytes) = (Kind::Q8_0.weights(), Kind::Q8_0.bytes());
    let mut out = vec![0; values.len() / size * bytes];
    out.par_chunks_exact_mut(bytes).zip(values.par_chunks_exact(size)).with_min_len(256).for_each(|(out, values)| {
        let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let scale = f16::from_f32(largest / 127.0);
        let step = scale.to_f32();
        out[..2].copy_from_slice(&scale.to_le_bytes());
        let code = |value: f32| if step == 0.0 { 0.0 } else { (value / step).round_ties_even().clamp(-127.0, 127.0) };
        out[2..].iter_mut().zip(values).for_each(|(out, &value)| *out = code(value) as i8 as u8);
    });
    out
}

/// The integers of rows of blocks; nothing for floats.
pub fn decode(bytes: &[u8], kind: Kind, [rows, columns]: [usize; 2]) -> Option<Ints> {
    let bits = match kind {
        Kind::Q2_0 => 2,
        Kind::Q4_0 => 4,
        Kind::Q5_0 => 5,
        Kind::Q8_0 => 8,
        Kind::F32 | Kind::F16 | Kind::BF16 | Kind::Super(_) => return None,
    };
    let size = kind.weights();
    let mut codes = vec![0u8; rows * columns];
    let mut scales = vec![0.0f32; rows * columns / size];
    for ((block, codes), scale) in bytes.chunks_exact(kind.bytes()).zip(codes.chunks_exact_mut(size)).zip(&mut scales) {
        let sign = if kind == Kind::Q2_0 { -1.0 } else { 1.0 };
        *scale = sign * f16::from_le_bytes([block[0], block[1]]).to_f32();
        let unpacked = |at: usize| match kind {
            Kind::Q2_0 => 3 - (block[2 + at / 4] >> (2 * (at % 4)) & 3),
            Kind::Q4_0 => block[2 + at % 16] >> (4 * (at / 16)) & 15,
            Kind::Q5_0 => {
                let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]) >> at & 1;
                block[6 + at % 16] >> (4 * (at / 16)) & 15 | (fifth as u8) << 4
            }
            _ => block[2 + at] ^ 0x80,
        };
        codes.iter_mut().enumerate().for_each(|(at, code)| *code = unpacked(at));
    }
    Some(Ints { rows, columns, bits, group: size, codes, scales, scale_float: Float::F16, zeros: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_gives_back_the_weights_that_went_in() {
        for (bits, symmetric, kind) in [
            (2u8, true, Kind::Q2_0),
            (2, true, Kind::Q4_0),
            (3, true, Kind::Q4_0),
            (4, true, Kind::Q4_0),
            (3, false, Kind::Q4_0),
            (4, false, Kind::Q5_0),
            (5, true, Kind::Q5_0),
            (7, false, Kind::Q8_0),
            (8, true, Kind::Q8_0),
        ] {
            let (rows, columns, group) = (3, 192, 64);
            let limit = 1u32 << bits;
            let codes = (0..rows * columns).map(|at| (at as u32 * 7 % limit) as u8).collect();
            let scales: Vec<f32> = (0..9).map(|at| Float::F16.round(0.01 * (at as f32 - 4.2))).collect();
            let zeros = (!symmetric).then(|| (0..9u32).map(|at| (at * 5 % limit) as u8).collect());
            let ints = Ints { rows, columns, bits, group, codes, scales, scale_float: Float::F16, zeros };
            let bytes = encode(&ints, kind);
            assert_eq!(bytes.len(), rows * columns / kind.weights() * kind.bytes());
            let back = decode(&bytes, kind, [rows, columns]).unwrap();
            assert_eq!(back.to_matrix().data, ints.to_matrix().data, "{bits} {symmetric} {kind:?}");
        }
    }

    #[test]
    fn floats_round_to_eight_bits() {
        let values: Vec<f32> = (0..64).map(|at| if at < 32 { 0.0 } else { 0.01 * (at as f32 - 40.5) }).collect();
        let back = decode(&rounded_to_eight(&values), Kind::Q8_0, [1, 64]).unwrap().to_matrix();
        let worst = back.data.iter().zip(&values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 0.2255 / 127.0 * 0.51 && back.data[..32].iter().all(|&value| value == 0.0), "{worst}");
    }

    #[test]
    fn bytes_by_hand() {
        let ints = |bits, codes: Vec<u8>, columns| Ints {
            rows: 1,
            columns,
            bits,
            group: columns,
            codes,
            scales: vec![1.0],
            scale_float: Float::F16,
            zeros: None,
        };
        let mut codes = vec![8u8; 32];
        (codes[0], codes[1], codes[16]) = (0, 15, 9);
        let bytes = encode(&ints(4, codes, 32), Kind::Q4_0);
        assert_eq!(bytes[..4], [0x00, 0x3c, 0x90, 0x8f]);
        let mut codes = vec![128u8; 32];
        (codes[0], codes[31]) = (0, 255);
        let bytes = encode(&ints(8, codes, 32), Kind::Q8_0);
        assert_eq!((bytes[2], bytes[3], bytes[33]), (0x80, 0, 0x7f));
        let mut codes = vec![16u8; 32];
        (codes[0], codes[17]) = (31, 0);
        let bytes = encode(&ints(5, codes, 32), Kind::Q5_0);
        // The fifth bits of all but number 17, and 15 beside 0 in the first byte of nibbles.
        assert_eq!((&bytes[2..6], bytes[6], bytes[7]), (&0xfffd_ffffu32.to_le_bytes()[..], 0x0f, 0));
    }
}
