//! Codes of 2 to 8 bits as a contiguous little-endian stream: code i of a stream occupies its bits i·B .. (i+1)·B, and
//! a stream fills whole 32-bit words (formats, section A).

use rayon::prelude::*;

use crate::lanes::vectorized;

/// Words of a stream of `count` codes.
pub fn words(count: usize, bits: u8) -> usize {
    // A count that no file holds fits no tensor either.
    count.saturating_mul(usize::from(bits)).div_ceil(32)
}

/// Packs `codes` row by row, each row a stream of its own; gives the little-endian bytes of `rows × words` words.
pub fn pack_rows(codes: &[u8], columns: usize, bits: u8) -> Vec<u8> {
    let stride = 4 * words(columns, bits);
    let rows = codes.len() / columns.max(1);
    let mut out = vec![0; rows * stride];
    out.par_chunks_mut(stride.max(1))
        .zip(codes.par_chunks(columns.max(1)))
        .with_min_len(16)
        .for_each(|(out, codes)| pack(codes, bits, out));
    out
}

/// Packs one stream into zeroed bytes.
pub fn pack(codes: &[u8], bits: u8, out: &mut [u8]) {
    match bits {
        8 => out[..codes.len()].copy_from_slice(codes),
        4 => {
            let (pairs, rest) = codes.as_chunks::<2>();
            vectorized(
                #[inline(always)]
                || {
                    for (byte, pair) in out.iter_mut().zip(pairs) {
                        *byte = pair[0] | pair[1] << 4;
                    }
                },
            );
            rest.iter().for_each(|&last| out[pairs.len()] = last);
        }
        _ => {
            let (mut pending, mut filled, mut at) = (0u32, 0u32, 0);
            for &code in codes {
                pending |= u32::from(code) << filled;
                filled += u32::from(bits);
                while filled >= 8 {
                    out[at] = pending as u8;
                    (pending, filled, at) = (pending >> 8, filled - 8, at + 1);
                }
            }
            if filled > 0 {
                out[at] = pending as u8;
            }
        }
    }
}

/// Unpacks one stream of little-endian bytes.
pub fn unpack(bytes: &[u8], bits: u8, codes: &mut [u8]) {
    let mask = ((1u32 << bits) - 1) as u8;
    match bits {
        8 => codes.copy_from_slice(&bytes[..codes.len()]),
        4 => codes.iter_mut().enumerate().for_each(|(i, code)| *code = bytes[i / 2] >> (4 * (i % 2)) & mask),
        _ => {
            for (i, code) in codes.iter_mut().enumerate() {
                let bit = i * usize::from(bits);
                let low = u16::from(bytes[bit / 8]);
                let high = bytes.get(bit / 8 + 1).map_or(0, |&byte| u16::from(byte));
                *code = ((low | high << 8) >> (bit % 8)) as u8 & mask;
            }
        }
    }
}

/// Unpacks the older layout of 3, 5, 6 and 7 bits: ⌊32/B⌋ codes in every word, the rest of the word unused.
pub fn unpack_padded(bytes: &[u8], bits: u8, codes: &mut [u8]) {
    let per_word = 32 / usize::from(bits);
    let mask = (1u32 << bits) - 1;
    for (codes, word) in codes.chunks_mut(per_word).zip(bytes.as_chunks::<4>().0) {
        let word = u32::from_le_bytes(*word);
        for (i, code) in codes.iter_mut().enumerate() {
            *code = (word >> (i * usize::from(bits)) & mask) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_by_hand() {
        assert_eq!(pack_rows(&[1, 2, 3, 15], 4, 4), [0x21, 0xf3, 0, 0]);
        assert_eq!(pack_rows(&[1, 2, 3, 0, 1], 5, 2), [0b0011_1001, 1, 0, 0]);
        // 7 | 5 << 3 | 1 << 6 = 0x6f; the next code continues in bit 9.
        assert_eq!(pack_rows(&[7, 5, 1, 6], 4, 3), [0x6f, 0x0c, 0, 0]);
        assert_eq!(words(172, 3), 17);
        let mut codes = [0; 4];
        unpack_padded(&[0x6f, 0x0c, 0, 0], 3, &mut codes);
        assert_eq!(codes, [7, 5, 1, 6]);
    }

    proptest::proptest! {
        #[test]
        fn packing_comes_back(bits in 2u8..=8, columns in 1usize..80, seed in proptest::prelude::any::<u32>()) {
            let codes: Vec<u8> = (0..3 * columns as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8 & ((1u32 << bits) - 1) as u8).collect();
            let packed = pack_rows(&codes, columns, bits);
            let stride = 4 * words(columns, bits);
            proptest::prop_assert_eq!(packed.len(), 3 * stride);
            for (row, bytes) in packed.chunks(stride).enumerate() {
                let mut back = vec![0; columns];
                unpack(bytes, bits, &mut back);
                proptest::prop_assert_eq!(&back, &codes[row * columns..][..columns]);
            }
        }
    }
}
