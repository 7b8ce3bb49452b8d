//! Grouped integers: codes of 2 to 8 bits, one scale and perhaps one zero point per group of columns.

use rayon::prelude::*;

use crate::matrix::Matrix;
use crate::weight::Float;

/// Integers on a grid per group: entry = (code − zero point) · scale.
#[derive(Debug, Clone, PartialEq)]
pub struct Ints {
    /// Outputs of the linear layer.
    pub rows: usize,
    /// Inputs of the linear layer.
    pub columns: usize,
    /// Bits per code, 2..=8.
    pub bits: u8,
    /// Consecutive columns that share a scale; equal to `columns` when there is one scale per row.
    pub group: usize,
    /// `rows * columns` codes in `0..2^bits`, row-major.
    pub codes: Vec<u8>,
    /// `rows * groups` scales, already rounded to `scale_float`; may be negative, never zero.
    pub scales: Vec<f32>,
    /// Number format in which the scales are stored.
    pub scale_float: Float,
    /// `rows * groups` zero points in `0..2^bits`; absent when every zero point is `2^(bits-1)`.
    pub zeros: Option<Vec<u8>>,
}

impl Ints {
    /// Groups per row.
    pub fn groups(&self) -> usize {
        self.columns.div_ceil(self.group)
    }

    /// The zero point of a symmetric grid, `2^(bits-1)`.
    pub fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// Number of codes that stand for exactly zero.
    pub fn zero_codes(&self) -> usize {
        let (groups, middle) = (self.groups(), self.middle());
        let of_row = |(row, codes): (usize, &[u8])| -> usize {
            let zero = |index: usize| self.zeros.as_ref().map_or(middle, |zeros| zeros[row * groups + index]);
            let equal = |codes: &[u8], zero: u8| codes.iter().fold(0u8, |count, &code| count.wrapping_add(u8::from(code == zero)));
            let count =
                |(index, codes): (usize, &[u8])| codes.chunks(128).map(|codes| usize::from(equal(codes, zero(index)))).sum::<usize>();
            codes.chunks(self.group).enumerate().map(count).sum()
        };
        self.codes.par_chunks(self.columns.max(1)).enumerate().with_min_len(32).map(of_row).sum()
    }

    /// The floats that the codes stand for.
    pub fn to_matrix(&self) -> Matrix {
        let (groups, middle) = (self.groups(), self.middle());
        let mut data = vec![0.0f32; self.rows * self.columns];
        data.par_chunks_mut(self.columns.max(1)).enumerate().for_each(|(row, out)| {
            let codes = &self.codes[row * self.columns..][..self.columns];
            for (index, (out, codes)) in out.chunks_mut(self.group).zip(codes.chunks(self.group)).enumerate() {
                let scale = self.scales[row * groups + index];
                let zero = i32::from(self.zeros.as_ref().map_or(middle, |zeros| zeros[row * groups + index]));
                for (value, &code) in out.iter_mut().zip(codes) {
                    *value = (i32::from(code) - zero) as f32 * scale;
                }
            }
        });
        Matrix::new(self.rows, self.columns, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding_subtracts_the_zero_point_and_multiplies_also_with_a_short_last_group() {
        let ints = Ints {
            rows: 1,
            columns: 5,
            bits: 4,
            group: 2,
            codes: vec![0, 15, 8, 9, 3],
            scales: vec![0.5, -1.0, 2.0],
            scale_float: Float::F32,
            zeros: Some(vec![8, 8, 3]),
        };
        assert_eq!(ints.to_matrix().data, [-4.0, 3.5, 0.0, -1.0, 0.0]);
        let symmetric = Ints { zeros: None, ..ints };
        assert_eq!(symmetric.to_matrix().data, [-4.0, 3.5, 0.0, -1.0, -10.0]);
    }
}
