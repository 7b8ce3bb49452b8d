//! Rows of weights: outputs of a linear layer, picked from one, or put together from several. What hangs on a group of columns
//! hangs on one row, so every representation stays what it is.

use std::borrow::Cow;

use crate::matrix::Matrix;
use crate::weight::super_blocks::SIZE;
use crate::weight::{Ints, Sparse, Split, SuperBlocks, Trits, Weight};

/// Some rows of `width` values each.
fn picked<T: Copy>(values: &[T], width: usize, rows: &[usize]) -> Vec<T> {
    let mut out = Vec::with_capacity(rows.len() * width);
    rows.iter().for_each(|&row| out.extend_from_slice(&values[row * width..][..width]));
    out
}

fn matrix(matrix: &Matrix, rows: &[usize]) -> Matrix {
    Matrix::new(rows.len(), matrix.columns, picked(&matrix.data, matrix.columns, rows))
}

impl Weight {
    /// Some rows in the given order; floats that are not decoded yet become decoded ones.
    pub fn picked(&self, rows: &[usize]) -> Self {
        match self {
            Self::Ints(ints) => {
                let groups = ints.groups();
                Self::Ints(Ints {
                    rows: rows.len(),
                    codes: picked(&ints.codes, ints.columns, rows),
                    scales: picked(&ints.scales, groups, rows),
                    zeros: ints.zeros.as_ref().map(|zeros| picked(zeros, groups, rows)),
                    ..*ints
                })
            }
            Self::Trits(trits) => Self::Trits(Trits {
                rows: rows.len(),
                codes: picked(&trits.codes, trits.columns, rows),
                scales: picked(&trits.scales, trits.groups(), rows),
                ..*trits
            }),
            Self::Split(split) => Self::Split(Split {
                rows: rows.len(),
                codes: picked(&split.codes, split.columns, rows),
                scales: picked(&split.scales, split.groups(), rows),
                mask: picked(&split.mask, split.columns.div_ceil(8), rows),
                ..*split
            }),
            Self::Super(blocks) => Self::Super(SuperBlocks {
                rows: rows.len(),
                codes: picked(&blocks.codes, blocks.columns, rows),
                floats: picked(&blocks.floats, blocks.columns / SIZE, rows),
                wholes: picked(&blocks.wholes, blocks.columns / blocks.kind.block(), rows),
                ..*blocks
            }),
            Self::Sparse(sparse) => Self::Sparse(Sparse { matrix: matrix(&sparse.matrix, rows), pattern: sparse.pattern }),
            Self::Dense(dense) => Self::Dense(matrix(dense, rows)),
            Self::Stored(stored) => Self::Dense(matrix(&stored.to_matrix(), rows)),
        }
    }

    /// One weight of the rows of several, one after the other. Where they are not stored alike it holds floats.
    ///
    /// # Panics
    /// When they have other numbers of columns.
    pub fn stacked(parts: &[&Self]) -> Self {
        let alike = parts.windows(2).all(|pair| pair[0].storage() == pair[1].storage());
        let rows = parts.iter().map(|part| part.shape()[0]).sum();
        match parts.first() {
            Some(Self::Ints(first)) if alike => {
                let of = |read: fn(&Ints) -> &[u8]| parts.iter().filter_map(|part| ints(part)).flat_map(read).copied().collect();
                let scales = parts.iter().filter_map(|part| ints(part)).flat_map(|part| &part.scales).copied().collect();
                let zeros = first.zeros.as_ref().map(|_| of(|part| part.zeros.as_deref().unwrap_or_default()));
                Self::Ints(Ints { rows, codes: of(|part| &part.codes), scales, zeros, ..*first })
            }
            Some(Self::Trits(first)) if alike => {
                let all = || parts.iter().filter_map(|part| if let Self::Trits(trits) = part { Some(trits) } else { None });
                let codes = all().flat_map(|part| &part.codes).copied().collect();
                Self::Trits(Trits { rows, codes, scales: all().flat_map(|part| &part.scales).copied().collect(), ..*first })
            }
            Some(Self::Split(first)) if alike => {
                let all = || parts.iter().filter_map(|part| if let Self::Split(split) = part { Some(split) } else { None });
                let codes = all().flat_map(|part| &part.codes).copied().collect();
                let mask = all().flat_map(|part| &part.mask).copied().collect();
                Self::Split(Split { rows, codes, mask, scales: all().flat_map(|part| &part.scales).copied().collect(), ..*first })
            }
            Some(Self::Super(first)) if alike => {
                let all = || parts.iter().filter_map(|part| if let Self::Super(blocks) = part { Some(blocks) } else { None });
                let codes = all().flat_map(|part| &part.codes).copied().collect();
                let floats = all().flat_map(|part| &part.floats).copied().collect();
                Self::Super(SuperBlocks { rows, codes, floats, wholes: all().flat_map(|part| &part.wholes).copied().collect(), ..*first })
            }
            Some(Self::Sparse(first)) if alike => Self::Sparse(Sparse { matrix: joined(parts), pattern: first.pattern }),
            _ => Self::Dense(joined(parts)),
        }
    }
}

fn ints(weight: &Weight) -> Option<&Ints> {
    if let Weight::Ints(ints) = weight { Some(ints) } else { None }
}

/// The floats of several weights, one after the other.
fn joined(parts: &[&Weight]) -> Matrix {
    let floats: Vec<Cow<'_, Matrix>> = parts.iter().map(|part| part.to_matrix()).collect();
    let columns = floats.first().map_or(0, |matrix| matrix.columns);
    Matrix::new(floats.iter().map(|matrix| matrix.rows).sum(), columns, floats.iter().flat_map(|matrix| &matrix.data).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::{Float, Pattern, SuperKind};

    /// One weight of every representation, 5 rows of 256 columns.
    fn weights() -> Vec<Weight> {
        let (rows, columns, group) = (5usize, 256usize, 64usize);
        let codes = |top: usize| (0..rows * columns).map(|at| (at * 7 % top) as u8).collect::<Vec<u8>>();
        let pairs = |count: usize| (0..count).map(|at| [1.0 + at as f32, 0.5]).collect::<Vec<[f32; 2]>>();
        let groups = rows * columns / group;
        let dense = Matrix::from_fn(rows, columns, |row, column| (row * 1000 + column) as f32);
        let ints = Ints {
            rows,
            columns,
            bits: 4,
            group,
            codes: codes(16),
            scales: (0..groups).map(|at| 1.0 + at as f32).collect(),
            scale_float: Float::F16,
            zeros: Some((0..groups).map(|at| (at % 16) as u8).collect()),
        };
        vec![
            Weight::Ints(Ints { zeros: None, ..ints.clone() }),
            Weight::Ints(ints),
            Weight::Trits(Trits { rows, columns, group, codes: codes(9), scales: pairs(groups), scale_float: Float::F16 }),
            Weight::Split(Split {
                rows,
                columns,
                bits: 4,
                group,
                outliers: 0,
                codes: codes(16),
                scales: pairs(groups),
                mask: codes(255)[..rows * columns / 8].to_vec(),
            }),
            Weight::Super(SuperBlocks {
                rows,
                columns,
                kind: SuperKind::Q4K,
                codes: codes(16),
                floats: pairs(rows),
                wholes: (0..rows * columns / 32).map(|at| [at as i8, 1]).collect(),
            }),
            Weight::Sparse(Sparse { matrix: dense.clone(), pattern: Pattern::Unstructured }),
            Weight::Dense(dense),
        ]
    }

    #[test]
    fn picked_rows_are_those_of_the_floats_and_parts_make_the_whole_again() {
        for weight in weights() {
            let whole = weight.to_matrix().into_owned();
            let some = weight.picked(&[3, 0, 3]);
            assert_eq!(some.storage(), weight.storage());
            let rows: Vec<f32> = [3, 0, 3].into_iter().flat_map(|row| whole.row(row).to_vec()).collect();
            assert_eq!(some.to_matrix().data, rows, "{}", weight.storage());
            let parts = [weight.picked(&[0, 1]), weight.picked(&[2]), weight.picked(&[3, 4])];
            assert_eq!(Weight::stacked(&parts.iter().collect::<Vec<_>>()), weight, "{}", weight.storage());
        }
        let [symmetric, asymmetric] = [&weights()[0], &weights()[1]];
        assert!(matches!(Weight::stacked(&[symmetric, asymmetric]), Weight::Dense(Matrix { rows: 10, .. })));
    }
}
