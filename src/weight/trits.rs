//! Two planes of trits: every entry is α₁·t₁ + α₂·t₂ with t in {−1, 0, 1} and two scales per group of columns.

use rayon::prelude::*;

use crate::matrix::Matrix;
use crate::weight::Float;

/// The code of the pair (0, 0), which stands for exactly zero.
pub const ZERO: u8 = 4;

/// Two ternary planes with two scales per group.
#[derive(Debug, Clone, PartialEq)]
pub struct Trits {
    /// Outputs of the linear layer.
    pub rows: usize,
    /// Inputs of the linear layer.
    pub columns: usize,
    /// Consecutive columns that share scales; equal to `columns` when there are two scales per row.
    pub group: usize,
    /// `rows * columns` codes 3·t₁ + t₂ + 4 in 0..=8, row-major.
    pub codes: Vec<u8>,
    /// `rows * groups` pairs (α₁, α₂) with α₁ ≥ α₂ ≥ 0, already rounded to `scale_float`.
    pub scales: Vec<[f32; 2]>,
    /// Number format in which the scales are stored.
    pub scale_float: Float,
}

impl Trits {
    /// Groups per row.
    pub fn groups(&self) -> usize {
        self.columns.div_ceil(self.group)
    }

    /// The trits (t₁, t₂) of a code.
    pub fn pair(code: u8) -> [i8; 2] {
        [code as i8 / 3 - 1, code as i8 % 3 - 1]
    }

    /// Number of entries that are exactly zero: those of the pair (0, 0), and those whose scales cancel or vanish.
    pub fn zeros(&self) -> usize {
        let (columns, groups) = (self.columns.max(1), self.groups().max(1));
        let of_row = |(codes, scales): (&[u8], &[[f32; 2]])| -> usize {
            let in_group = |(codes, scales): (&[u8], &[f32; 2])| {
                let values = levels(*scales);
                codes.iter().filter(|&&code| values[usize::from(code)] == 0.0).count()
            };
            codes.chunks(self.group).zip(scales).map(in_group).sum()
        };
        self.codes.par_chunks(columns).zip(self.scales.par_chunks(groups)).with_min_len(32).map(of_row).sum()
    }

    /// The floats that the codes stand for.
    pub fn to_matrix(&self) -> Matrix {
        let (columns, groups) = (self.columns.max(1), self.groups().max(1));
        let mut data = vec![0.0f32; self.rows * self.columns];
        let rows = data.par_chunks_mut(columns).zip(self.codes.par_chunks(columns)).zip(self.scales.par_chunks(groups));
        rows.with_min_len(8).for_each(|((out, codes), scales)| {
            for ((out, codes), scales) in out.chunks_mut(self.group).zip(codes.chunks(self.group)).zip(scales) {
                let values = levels(*scales);
                for (value, &code) in out.iter_mut().zip(codes) {
                    *value = values[usize::from(code)];
                }
            }
        });
        Matrix::new(self.rows, self.columns, data)
    }
}

/// What each of the nine codes stands for.
fn levels([coarse, fine]: [f32; 2]) -> [f32; 9] {
    std::array::from_fn(|code| {
        let [first, second] = Trits::pair(code as u8).map(f32::from);
        first * coarse + second * fine
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::Storage;

    #[test]
    fn codes_are_pairs_in_balanced_ternary_and_decode_with_their_groups_scales() {
        for code in 0..9u8 {
            let [first, second] = Trits::pair(code);
            assert_eq!(3 * first + second + 4, code as i8);
            assert!([-1, 0, 1].contains(&first) && [-1, 0, 1].contains(&second));
        }
        let trits = Trits {
            rows: 1,
            columns: 5,
            group: 3,
            codes: vec![0, 8, 4, 6, 2],
            scales: vec![[0.75, 0.25], [2.0, 2.0]],
            scale_float: Float::F16,
        };
        assert_eq!(trits.to_matrix().data, [-1.0, 1.0, 0.0, 0.0, 0.0]);
        assert_eq!((trits.groups(), trits.zeros()), (2, 3));
    }

    #[test]
    fn stored_bits_are_five_trits_a_byte_in_two_planes_and_two_scales_a_group() {
        let storage = Storage::Trits { group: 128 };
        assert_eq!(storage.bits([5, 256], Float::BF16), 5 * 256 * 16 / 5 + 5 * 2 * 32);
        assert_eq!(storage.bits([1, 3], Float::F32), 10 + 32);
        assert_eq!(storage.to_string(), "trits g128");
    }
}
