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

/// Words of sums that may wait on the GPU.
const WAITING: usize = 1 << 22;

/// Σx² of columns that adds up as [`super::add_column_squares`] does. Sums of pieces wait on the GPU, because whoever fetches
/// them keeps it from going on.
#[derive(Debug)]
pub struct Squares {
    gpu: Gpu,
    waiting: Vec<Buffer>,
    totals: Vec<f64>,
}

impl Squares {
    /// Zeros.
    pub fn new(gpu: &Gpu, columns: usize) -> Self {
        Self { gpu: gpu.clone(), waiting: Vec::new(), totals: vec![0.0; columns] }
    }

    /// Adds those of tokens × columns floats.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn add(&mut self, x: &Buffer) -> Result<()> {
        self.waiting.push(column_squares(&self.gpu, x, self.totals.len()));
        if self.waiting.iter().map(Buffer::words).sum::<usize>() > WAITING { self.fetch() } else { Ok(()) }
    }

    fn fetch(&mut self) -> Result<()> {
        for waiting in self.waiting.drain(..) {
            for sums in self.gpu.read::<f32>(&waiting)?.chunks_exact(self.totals.len().max(1)) {
                self.totals.iter_mut().zip(sums).for_each(|(total, &sum)| *total += f64::from(sum));
            }
        }
        Ok(())
    }

    /// The sums of all columns.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn totals(mut self) -> Result<Vec<f64>> {
        self.fetch()?;
        Ok(self.totals)
    }
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
        let [high, low] = [(); 2].map(|()| gpu.zeros(rows * columns));
        Some(Self { gpu: gpu.clone(), rows, columns, symmetric, high, low })
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
