//! What formats share that lay codes down column by column.

use rayon::prelude::*;

use crate::formats::bitstream;

/// Codes that fill whole words whatever their bits.
pub const WORD_CODES: usize = 32;
/// Sides of the squares that a transposition goes by, which both fit a cache.
const SQUARE: usize = 64;

/// A matrix of `columns` columns, transposed.
pub fn transposed<T: Copy + Default + Send + Sync>(values: &[T], columns: usize) -> Vec<T> {
    let rows = values.len() / columns.max(1);
    let mut out = vec![T::default(); values.len()];
    out.par_chunks_mut((rows * SQUARE).max(1)).enumerate().for_each(|(strip, out)| {
        let first = strip * SQUARE;
        for start in (0..rows).step_by(SQUARE) {
            for (column, out) in out.chunks_exact_mut(rows).enumerate() {
                for row in start..rows.min(start + SQUARE) {
                    out[row] = values[row * columns + first + column];
                }
            }
        }
    });
    out
}

/// Codes of rows × columns as streams along the columns: the bytes of words × rows, each row's stream a column of words.
pub fn packed_columns(codes: &[u8], columns: usize, bits: u8) -> Vec<u8> {
    let streams = bitstream::pack_rows(codes, columns, bits);
    let (words, _) = streams.as_chunks::<4>();
    transposed(words, bitstream::words(columns, bits)).into_flattened()
}

/// The codes of what [`packed_columns`] gives.
pub fn unpacked_columns(bytes: &[u8], rows: usize, columns: usize, bits: u8) -> Vec<u8> {
    let streams = transposed(bytes.as_chunks::<4>().0, rows).into_flattened();
    let mut codes = vec![0; rows * columns];
    let stream = 4 * bitstream::words(columns, bits);
    codes
        .par_chunks_exact_mut(columns.max(1))
        .zip(streams.par_chunks_exact(stream.max(1)))
        .with_min_len(16)
        .for_each(|(codes, stream)| bitstream::unpack(stream, bits, codes));
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_turn_and_turn_back() {
        for (rows, columns) in [(1, 1), (3, 5), (64, 64), (65, 130), (200, 7)] {
            let values: Vec<u32> = (0..rows * columns).collect();
            let turned = transposed(&values, columns as usize);
            assert!(turned.iter().enumerate().all(|(at, &value)| value == at as u32 % rows * columns + at as u32 / rows));
            assert_eq!(transposed(&turned, rows as usize), values);
        }
    }
}
