//! Statistics of inputs that lie on a GPU.

use crate::device::{Buffer, Gpu, Shader};
use crate::error::Result;

/// Σx² of columns over pieces of 64 tokens.
pub static COLUMN_SQUARES: Shader = Shader { name: "column_squares", source: include_str!("../../../shaders/column_squares.wgsl") };
/// YᵀX, added to totals.
pub static GRAM: Shader = Shader { name: "gram", source: include_str!("../../../shaders/gram.wgsl") };

/// Tokens whose products add up in f32.
const TOKENS: usize = 2048;

/// As [`super::add_column_squares`], of tokens × columns floats on a GPU.
///
/// # Errors
/// As [`Gpu::read`].
pub fn add_column_squares(gpu: &Gpu, x: &Buffer, totals: &mut [f64]) -> Result<()> {
    let columns = totals.len();
    let tokens = x.words() / columns.max(1);
    let sums = gpu.empty(tokens.div_ceil(64) * columns);
    let workgroups = (tokens.div_ceil(64) * columns).div_ceil(64);
    gpu.launch(&COLUMN_SQUARES, workgroups, &[x, &sums], &[tokens as u32, columns as u32]);
    for sums in gpu.read::<f32>(&sums)?.chunks_exact(columns) {
        totals.iter_mut().zip(sums).for_each(|(total, &sum)| *total += f64::from(sum));
    }
    Ok(())
}

/// A matrix YᵀX that is added up on a GPU, in pairs of floats.
#[derive(Debug)]
pub struct Gram {
    gpu: Gpu,
    rows: usize,
    columns: usize,
    /// Whether Y is X.
    symmetric: bool,
    high: Buffer,
    low: Buffer,
}

impl Gram {
    /// A Gram matrix XᵀX of zeros; nothing where it does not fit a binding.
    pub fn new(gpu: &Gpu, columns: usize) -> Option<Self> {
        Self::zeros(gpu, columns, columns, true)
    }

    /// A matrix YᵀX of zeros; nothing where it does not fit a binding.
    pub fn cross(gpu: &Gpu, rows: usize, columns: usize) -> Option<Self> {
        Self::zeros(gpu, rows, columns, false)
    }

    fn zeros(gpu: &Gpu, rows: usize, columns: usize, symmetric: bool) -> Option<Self> {
        if gpu.rows_per_binding(4 * columns) < rows {
            return None;
        }
        let zeros = vec![0.0f32; rows * columns];
        Some(Self { gpu: gpu.clone(), rows, columns, symmetric, high: gpu.upload(&zeros), low: gpu.upload(&zeros) })
    }

    /// Adds XᵀX of tokens × columns floats.
    pub fn add(&self, x: &Buffer) {
        self.add_cross(x, x);
    }

    /// Adds YᵀX of tokens × rows and tokens × columns floats.
    pub fn add_cross(&self, y: &Buffer, x: &Buffer) {
        let tokens = x.words() / self.columns.max(1);
        let tiles = self.rows.div_ceil(32) * self.columns.div_ceil(32);
        let (rows, columns) = (self.rows as u32, self.columns as u32);
        for first in (0..tokens).step_by(TOKENS) {
            let parameters = [(tokens - first).min(TOKENS) as u32, rows, columns, first as u32, 0, u32::from(self.symmetric)];
            self.gpu.launch(&GRAM, tiles, &[y, x, &self.high, &self.low], &parameters);
        }
    }

    /// The whole matrix, rows × columns.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn totals(&self) -> Result<Vec<f64>> {
        let (high, low) = (self.gpu.read::<f32>(&self.high)?, self.gpu.read::<f32>(&self.low)?);
        let mut totals: Vec<f64> = high.iter().zip(&low).map(|(&high, &low)| f64::from(high) + f64::from(low)).collect();
        for row in (0..self.rows).filter(|_| self.symmetric) {
            for column in 0..row / 32 * 32 {
                totals[row * self.columns + column] = totals[column * self.columns + row];
            }
        }
        Ok(totals)
    }
}
