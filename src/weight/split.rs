//! Core and outlier weights as two classes of integers: codes of 2 to 8 bits, one scale per class and group of columns.

use rayon::prelude::*;

use crate::matrix::Matrix;

/// Integers on two grids per group: entry = (code − 2^(bits−1)) · the scale of its class.
#[derive(Debug, Clone, PartialEq)]
pub struct Split {
    /// Outputs of the linear layer.
    pub rows: usize,
    /// Inputs of the linear layer.
    pub columns: usize,
    /// Bits per code, 2..=8.
    pub bits: u8,
    /// Consecutive columns that share the two scales.
    pub group: usize,
    /// Outliers that were asked for, per million weights; for the count of stored bits.
    pub outliers: u32,
    /// `rows * columns` codes in `1..2^bits`, row-major; the grid is symmetric, so code 0 is not used.
    pub codes: Vec<u8>,
    /// `rows * groups` pairs of the core's and the outliers' scale, already rounded to f16; positive.
    pub scales: Vec<[f32; 2]>,
    /// One bit per entry, set for an outlier; every row starts at a byte, the lowest bit is the first column.
    pub mask: Vec<u8>,
}

impl Split {
    /// Groups per row.
    pub fn groups(&self) -> usize {
        self.columns.div_ceil(self.group)
    }

    /// Whether an entry is an outlier.
    pub fn is_outlier(&self, row: usize, column: usize) -> bool {
        self.mask[row * self.columns.div_ceil(8) + column / 8] >> (column % 8) & 1 == 1
    }

    /// Number of entries that are exactly zero.
    pub fn zeros(&self) -> usize {
        let middle = 1u8 << (self.bits - 1);
        self.codes.par_chunks(1 << 16).map(|codes| codes.iter().filter(|&&code| code == middle).count()).sum()
    }

    /// The floats that the codes stand for.
    pub fn to_matrix(&self) -> Matrix {
        let (groups, middle) = (self.groups(), 1i32 << (self.bits - 1));
        let mut data = vec![0.0f32; self.rows * self.columns];
        data.par_chunks_mut(self.columns.max(1)).enumerate().with_min_len(16).for_each(|(row, out)| {
            let mask = &self.mask[row * self.columns.div_ceil(8)..];
            let codes = &self.codes[row * self.columns..];
            for (column, (value, &code)) in out.iter_mut().zip(codes).enumerate() {
                let class = usize::from(mask[column / 8] >> (column % 8) & 1);
                *value = (i32::from(code) - middle) as f32 * self.scales[row * groups + column / self.group][class];
            }
        });
        Matrix::new(self.rows, self.columns, data)
    }
}

/// Bits of the position of an outlier inside its group.
pub(super) fn position_bits(group: usize) -> u64 {
    u64::from(group.max(1).next_power_of_two().trailing_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::{Float, Storage, Weight};

    #[test]
    fn every_entry_decodes_with_the_scale_of_its_class_also_in_a_short_last_group() {
        let split = Split {
            rows: 1,
            columns: 9,
            bits: 3,
            group: 8,
            outliers: 50_000,
            codes: vec![4, 5, 3, 7, 1, 4, 4, 4, 6],
            scales: vec![[0.5, 2.0], [0.25, 1.0]],
            mask: vec![0b0001_1000, 0b1],
        };
        assert_eq!(split.to_matrix().data, [0.0, 0.5, -0.5, 6.0, -6.0, 0.0, 0.0, 0.0, 2.0]);
        assert!(split.is_outlier(0, 3) && split.is_outlier(0, 8) && !split.is_outlier(0, 2));
        assert_eq!((split.zeros(), Weight::Split(split).shape()), (4, [1, 9]));
    }

    #[test]
    fn bits_count_codes_two_scales_and_positions_of_outliers() {
        let bits = |bits, outliers| Storage::Split { bits, group: 128, outliers }.bits([1000, 1280], Float::BF16) as f64 / 1_280_000.0;
        assert!((bits(4, 50_000) - 4.60).abs() < 1e-9, "{}", bits(4, 50_000));
        assert!((bits(4, 90_000) - 4.88).abs() < 1e-9, "{}", bits(4, 90_000));
        assert!((bits(3, 0) - 3.25).abs() < 1e-9);
    }
}
