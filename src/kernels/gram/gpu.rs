//! Statistics of inputs that lie on a GPU.

use crate::device::{Buffer, Gpu, Purpose, Reserved, Shader};
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

/// Bytes of the floats of a panel, if it has more rows than the least.
const PANEL_BYTES: usize = 256 << 20;

/// Rows of a panel are so many, or a multiple: what both kinds of kernels take as a tile.
const PANEL_ROWS: usize = 128;

/// A matrix YᵀX that is added up on a GPU, in pairs of floats. It lies there in panels of rows, which bindings hold.
#[derive(Debug)]
pub struct Gram {
    gpu: Gpu,
    rows: usize,
    columns: usize,
    /// Whether Y is X.
    symmetric: bool,
    panels: Vec<Panel>,
    _reserved: Reserved,
}

/// Some rows; of a symmetric matrix without the columns before the first row's number.
#[derive(Debug)]
struct Panel {
    first: usize,
    rows: usize,
    high: Buffer,
    low: Buffer,
}

impl Gram {
    /// A Gram matrix XᵀX of zeros; nothing where rows do not fit a binding, or all such matrices take more than `room` bytes.
    pub fn new(gpu: &Gpu, columns: usize, room: u64) -> Option<Self> {
        Self::zeros(gpu, [columns, columns], true, room)
    }

    /// A matrix YᵀX of zeros; nothing as for [`Self::new`].
    pub fn cross(gpu: &Gpu, shape: [usize; 2], room: u64) -> Option<Self> {
        Self::zeros(gpu, shape, false, room)
    }

    fn zeros(gpu: &Gpu, [rows, columns]: [usize; 2], symmetric: bool, room: u64) -> Option<Self> {
        let most = gpu.rows_per_binding(4 * columns);
        let each = match most.min(PANEL_BYTES / (4 * columns).max(1)).max(PANEL_ROWS) / PANEL_ROWS * PANEL_ROWS {
            _ if most >= rows && rows <= PANEL_ROWS => rows,
            each if each <= most => each,
            _ => return None,
        };
        let starts = || (0..rows).step_by(each.max(1)).map(|first| (first, each.min(rows - first)));
        let across = |first: usize| if symmetric { columns - first } else { columns };
        let words: usize = starts().map(|(first, rows)| rows * across(first)).sum();
        let reserved = gpu.reserve(Purpose::Sums, 8 * words as u64, room)?;
        let panel = |(first, rows)| {
            let [high, low] = [(); 2].map(|()| gpu.zeros(rows * across(first)));
            Panel { first, rows, high, low }
        };
        Some(Self { gpu: gpu.clone(), rows, columns, symmetric, panels: starts().map(panel).collect(), _reserved: reserved })
    }

    /// The first column of a panel.
    fn left(&self, panel: &Panel) -> usize {
        if self.symmetric { panel.first } else { 0 }
    }

    /// Columns of the whole matrix.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Adds XᵀX of tokens × columns floats.
    pub fn add(&self, x: &Buffer) {
        self.add_cross(x, x);
    }

    /// Adds YᵀX of tokens × rows and tokens × columns floats.
    pub fn add_cross(&self, y: &Buffer, x: &Buffer) {
        let tokens = x.words() / self.columns.max(1);
        let units = worthwhile([self.rows, self.columns, tokens.min(TOKENS)]).then(|| Units::of(&self.gpu)).flatten();
        for first in (0..tokens).step_by(TOKENS) {
            let count = TOKENS.min(tokens - first);
            let [y, x] = [(y, self.rows), (x, self.columns)].map(|(all, width)| all.part(first * width..(first + count) * width));
            for panel in &self.panels {
                if !units.as_ref().is_some_and(|units| self.add_panel_on(units, panel, &y, &x)) {
                    self.add_panel(panel, &y, &x, count);
                }
            }
        }
    }

    fn add_panel(&self, panel: &Panel, y: &Buffer, x: &Buffer, tokens: usize) {
        let left = self.left(panel);
        let columns = self.columns - left;
        let sizes = [tokens, panel.rows, columns, panel.first, left, self.rows, self.columns, usize::from(self.symmetric), 0];
        let tiles = panel.rows.div_ceil(32) * columns.div_ceil(32);
        self.gpu.launch(&GRAM, tiles, &[y, x, &panel.high, &panel.low], &sizes.map(|size| size as u32));
    }

    /// Adds YᵀX of up to 2048 tokens to a panel on matrix units, if operands fit.
    fn add_panel_on(&self, units: &Units, panel: &Panel, y: &Buffer, x: &Buffer) -> bool {
        let (left, tokens) = (self.left(panel), x.words() / self.columns.max(1));
        let y = Operand { first: panel.first, columns: panel.rows, ..Operand::new(y, [tokens, self.rows]) };
        let x = Operand { first: left, columns: self.columns - left, ..Operand::new(x, [tokens, self.columns]) };
        units.add_to_pairs(y.transposed(), x.transposed(), [&panel.high, &panel.low], self.symmetric)
    }

    /// Adds YᵀX of up to 2048 tokens on matrix units, if operands fit.
    pub fn add_on(&self, units: &Units, y: &Buffer, x: &Buffer) -> bool {
        self.panels.iter().all(|panel| self.add_panel_on(units, panel, y, x))
    }

    /// The whole matrix, rows × columns.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn totals(&self) -> Result<Vec<f64>> {
        let mut totals = vec![0.0; self.rows * self.columns];
        for panel in &self.panels {
            let (high, low) = (self.gpu.read::<f32>(&panel.high)?, self.gpu.read::<f32>(&panel.low)?);
            let left = self.left(panel);
            let width = self.columns - left;
            let rows = high.chunks_exact(width.max(1)).zip(low.chunks_exact(width.max(1)));
            for ((high, low), row) in rows.zip(totals[panel.first * self.columns..].chunks_exact_mut(self.columns)) {
                let pairs = high.iter().zip(low).map(|(&high, &low)| f64::from(high) + f64::from(low));
                row[left..].iter_mut().zip(pairs).for_each(|(total, pair)| *total = pair);
            }
        }
        for row in (0..self.rows).filter(|_| self.symmetric) {
            for column in 0..row / 32 * 32 {
                totals[row * self.columns + column] = totals[column * self.columns + row];
            }
        }
        Ok(totals)
    }
}
