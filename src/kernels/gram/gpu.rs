//! Statistics of inputs that lie on a GPU.

use crate::device::{Buffer, Gpu, Shader};
use crate::error::Result;
use crate::kernels::linear::units::{Operand, Units, worthwhile};

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
    for sums in gpu.read::<f32>(&column_squares(gpu, x, totals.len()))?.chunks_exact(totals.len()) {
        totals.iter_mut().zip(sums).for_each(|(total, &sum)| *total += f64::from(sum));
    }
    Ok(())
}

/// Σx² of every column over every 64 tokens.
pub fn column_squares(gpu: &Gpu, x: &Buffer, columns: usize) -> Buffer {
    let tokens = x.words() / columns.max(1);
    let count = tokens.div_ceil(64) * columns;
    let sums = gpu.empty(count);
    gpu.launch(&COLUMN_SQUARES, count.div_ceil(64), &[x, &sums], &[tokens as u32, columns as u32]);
    sums
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
        if worthwhile([self.rows, self.columns, tokens.min(TOKENS)])
            && let Some(units) = Units::of(&self.gpu)
            && self.add_on(&units, y, x)
        {
            return;
        }
        let tiles = self.rows.div_ceil(32) * self.columns.div_ceil(32);
        let (rows, columns) = (self.rows as u32, self.columns as u32);
        for first in (0..tokens).step_by(TOKENS) {
            let parameters = [(tokens - first).min(TOKENS) as u32, rows, columns, first as u32, 0, u32::from(self.symmetric)];
            self.gpu.launch(&GRAM, tiles, &[y, x, &self.high, &self.low], &parameters);
        }
    }

    /// Adds YᵀX on matrix units, if operands fit.
    pub fn add_on(&self, units: &Units, y: &Buffer, x: &Buffer) -> bool {
        let tokens = x.words() / self.columns.max(1);
        let (y, x) = (Operand::new(y, [tokens, self.rows]), Operand::new(x, [tokens, self.columns]));
        (0..tokens).step_by(TOKENS).all(|first| {
            let [y, x] = [y, x].map(|operand| operand.part(first, TOKENS.min(tokens - first)).transposed());
            units.add_to_pairs(y, x, [&self.high, &self.low], self.symmetric)
        })
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
