//! A row-major matrix of f32: `rows` outputs by `columns` inputs for the weight of a linear layer.

/// Row-major matrix; row `r` is `data[r * columns..][..columns]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Number of rows (outputs of a linear layer).
    pub rows: usize,
    /// Number of columns (inputs of a linear layer).
    pub columns: usize,
    /// `rows * columns` values.
    pub data: Vec<f32>,
}

impl Matrix {
    /// A matrix from its values.
    ///
    /// # Panics
    /// When the number of values is not `rows * columns`.
    pub fn new(rows: usize, columns: usize, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), rows * columns, "a {rows} x {columns} matrix");
        Self { rows, columns, data }
    }

    /// A matrix computed entry by entry.
    pub fn from_fn(rows: usize, columns: usize, mut entry: impl FnMut(usize, usize) -> f32) -> Self {
        let data = (0..rows * columns).map(|i| entry(i / columns, i % columns)).collect();
        Self { rows, columns, data }
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.columns..][..self.columns]
    }

    /// Number of entries that are exactly zero.
    pub fn zeros(&self) -> usize {
        self.data.iter().filter(|&&value| value == 0.0).count()
    }
}
