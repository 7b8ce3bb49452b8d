//! Floats as a checkpoint stores them, not yet decoded: half the memory of a matrix, and methods that read every row
//! once need no more.

use std::fmt;
use std::sync::Arc;

use crate::matrix::Matrix;
use crate::weight::Float;

/// Bytes that somebody lends.
pub type Lent = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A dense weight in its stored form; every value is finite.
#[derive(Clone)]
pub struct Stored {
    /// Outputs of the linear layer.
    pub rows: usize,
    /// Inputs of the linear layer.
    pub columns: usize,
    /// Number format.
    pub float: Float,
    /// Little-endian floats, row-major; they need not be aligned.
    pub bytes: Lent,
    /// Decodes bytes into floats, on the calling thread.
    pub decode: fn(Float, &[u8], &mut [f32]),
}

impl Stored {
    /// Decodes rows from `first` on, as many as `out` holds.
    pub fn rows_into(&self, first: usize, out: &mut [f32]) {
        let width = self.columns * self.float.bytes();
        let bytes = &(*self.bytes).as_ref()[first * width..][..out.len() * self.float.bytes()];
        (self.decode)(self.float, bytes, out);
    }

    /// Decodes everything.
    pub fn to_matrix(&self) -> Matrix {
        use rayon::prelude::*;
        let mut data = vec![0.0; self.rows * self.columns];
        let rows = (1 << 16) / self.columns.max(1) + 1;
        data.par_chunks_mut(rows * self.columns.max(1)).enumerate().for_each(|(chunk, out)| self.rows_into(chunk * rows, out));
        Matrix::new(self.rows, self.columns, data)
    }
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stored {} x {} {:?}", self.rows, self.columns, self.float)
    }
}

impl PartialEq for Stored {
    fn eq(&self, other: &Self) -> bool {
        (self.rows, self.columns) == (other.rows, other.columns) && self.to_matrix() == other.to_matrix()
    }
}
