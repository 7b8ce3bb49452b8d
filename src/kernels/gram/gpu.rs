//! Statistics of inputs that lie on a GPU.

use crate::device::{Buffer, Gpu, Shader};
use crate::error::Result;

/// Σx² of columns over pieces of 64 tokens.
pub static COLUMN_SQUARES: Shader = Shader { name: "column_squares", source: include_str!("../../../shaders/column_squares.wgsl") };
/// XᵀX, added to totals.
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

/// A Gram matrix that is added up on a GPU, in pairs of floats.
#[derive(Debug)]
pub struct Gram {
    gpu: Gpu,
    columns: usize,
    high: Buffer,
    low: Buffer,
}

impl Gram {
    /// A matrix of zeros; nothing where it does not fit a binding.
    pub fn new(gpu: &Gpu, columns: usize) -> Option<Self> {
        let zeros = vec![0.0f32; columns * columns];
        let fits = gpu.rows_per_binding(4 * columns) >= columns;
        fits.then(|| Self { gpu: gpu.clone(), columns, high: gpu.upload(&zeros), low: gpu.upload(&zeros) })
    }

    /// Adds XᵀX of tokens × columns floats.
    pub fn add(&self, x: &Buffer) {
        let tokens = x.words() / self.columns.max(1);
        let tiles = self.columns.div_ceil(32);
        for first in (0..tokens).step_by(TOKENS) {
            let parameters = [(tokens - first).min(TOKENS) as u32, self.columns as u32, first as u32, 0];
            self.gpu.launch(&GRAM, tiles * tiles, &[x, &self.high, &self.low], &parameters);
        }
    }

    /// The whole matrix.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn totals(&self) -> Result<Vec<f64>> {
        let (high, low) = (self.gpu.read::<f32>(&self.high)?, self.gpu.read::<f32>(&self.low)?);
        let mut totals: Vec<f64> = high.iter().zip(&low).map(|(&high, &low)| f64::from(high) + f64::from(low)).collect();
        for row in 0..self.columns {
            for column in 0..row / 32 * 32 {
                totals[row * self.columns + column] = totals[column * self.columns + row];
            }
        }
        Ok(totals)
    }
}
