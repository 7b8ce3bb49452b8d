//! Products on a GPU's matrix units, which take halves and add up in floats.
//!
//! Operands are scaled by a power of two, which is exact: the largest magnitude of a matrix comes to lie in 2^14..2^15. One
//! scale serves a matrix as it is and transposed, where one per row would serve one of the two only; numbers down to 2^-29 of
//! the largest keep all 11 bits of a half, and below that errors are at most 2^-40 of the largest.
//!
//! A half leaves a part of a float that is a half again, so a product of floats is three of halves, up to 2^-22: high by
//! high, high by low, low by high. They are laid one behind the other along k, so that one kernel does both kinds
//! ([`Exactness`]). Matrix units drop what does not fit their sums instead of rounding, so they sum over at most
//! 4096 places; longer sums are added up outside.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use half::f16;

use crate::device::{Array, Buffer, Differentiable, Gpu, Shader};
use crate::error::Result;
use crate::kernels::gemm::{Sizes, View, product};

/// The largest magnitude of a matrix.
pub static LARGEST_MAGNITUDE: Shader =
    Shader { name: "largest_magnitude", source: include_str!("../../../shaders/largest_magnitude.wgsl") };
/// A matrix in halves.
pub static HALVE: Shader = Shader { name: "halve", source: include_str!("../../../shaders/halve.wgsl") };
/// The product of halves.
pub static PRODUCT_UNITS: Shader = Shader { name: "product_units", source: include_str!("../../../shaders/product_units.wgsl") };
/// The product without padding and scales.
pub static ADD_SCALED: Shader = Shader { name: "add_scaled", source: include_str!("../../../shaders/add_scaled.wgsl") };

/// Places along k over which matrix units sum.
const DEPTH: usize = 4096;
/// Rows and columns of a tile of the product.
pub const TILE: usize = 128;
/// Places along k of a step.
const STEP: usize = 64;
/// Products of fewer multiplications than this are not worth the preparation.
const WORTHWHILE: usize = 1 << 30;

/// How exact a product is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exactness {
    /// One product of halves: relative to the sum of magnitudes, errors of 2^-11.
    Half,
    /// Three products, which give nearly what floats give.
    Split,
}

impl Exactness {
    fn parts(self) -> usize {
        match self {
            Self::Half => 1,
            Self::Split => 3,
        }
    }
}

/// A matrix on a GPU that is an operand, with its rows and columns as the product sees them.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    /// Its floats.
    pub floats: &'a Buffer,
    /// Number of the first float.
    pub first: usize,
    /// Rows.
    pub rows: usize,
    /// Columns: places along k.
    pub columns: usize,
    /// Floats from row to row, and from column to column.
    pub strides: [usize; 2],
}

impl<'a> Operand<'a> {
    /// A matrix as it lies there, row by row.
    pub fn new(floats: &'a Buffer, [rows, columns]: [usize; 2]) -> Self {
        Self { floats, first: 0, rows, columns, strides: [columns, 1] }
    }

    /// The same matrix transposed.
    pub fn transposed(self) -> Self {
        Self { rows: self.columns, columns: self.rows, strides: [self.strides[1], self.strides[0]], ..self }
    }

    /// Some of its rows.
    pub fn part(self, first: usize, rows: usize) -> Self {
        Self { first: self.first + first * self.strides[0], rows, ..self }
    }
}

/// Where the multiplications are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Engine {
    Units,
    /// The processor instead of matrix units: for tests where there are none.
    Processor,
}

/// What becomes of a product.
#[derive(Debug, Clone, Copy)]
enum Outcome<'a> {
    Floats(&'a Buffer),
    Pairs([&'a Buffer; 2]),
}

/// Matrix units of a GPU that were seen to multiply.
#[derive(Debug, Clone)]
pub struct Units {
    gpu: Gpu,
    engine: Engine,
}

/// A padded matrix in halves.
struct Halves {
    halves: Buffer,
    largest: Buffer,
    rows: usize,
    /// Places along k, of all parts.
    columns: usize,
}

impl Units {
    /// The matrix units of a GPU: those of 16 × 16 × 16 halves that add to floats, in subgroups of 32 threads, if a product
    /// on them comes out right. The first call for a GPU tries that.
    pub fn of(gpu: &Gpu) -> Option<Self> {
        static TRIED: Mutex<BTreeMap<usize, bool>> = Mutex::new(BTreeMap::new());
        let adapter = gpu.adapter();
        let have = adapter.matrix_units.iter().any(|unit| unit == "16x16x16 F16->F32");
        let room = adapter.workgroup_threads >= 256 && adapter.workgroup_bytes >= 36_864;
        if !(have && room && adapter.half && adapter.subgroups == [32, 32]) {
            return None;
        }
        let units = Self { gpu: gpu.clone(), engine: Engine::Units };
        let mut tried = TRIED.lock().unwrap_or_else(PoisonError::into_inner);
        let good = *tried.entry(adapter.number).or_insert_with(|| units.multiply_right());
        good.then_some(units)
    }

    /// The same with the processor in the place of matrix units.
    pub fn on_processor(gpu: &Gpu) -> Self {
        Self { gpu: gpu.clone(), engine: Engine::Processor }
    }

    /// Those that a self-test tries: the processor in their place, and real ones where there are some.
    pub fn all(gpu: &Gpu) -> Vec<Self> {
        [Some(Self::on_processor(gpu)), Self::of(gpu)].into_iter().flatten().collect()
    }

    /// Whether a product of some tiles is right.
    fn multiply_right(&self) -> bool {
        let [m, n, k] = [150, 270, 330];
        let values = |count: usize, by: usize| (0..count).map(|at| ((at * by) % 61) as f32 - 30.0).collect::<Vec<f32>>();
        let (a, b) = (values(m * k, 7), values(n * k, 13));
        let mut expected = vec![0.0; m * n];
        // By this thread alone: while it waits for others it could be given work that asks for matrix units.
        product(Sizes { m, n, k }, &mut expected, n, false, 1.0, View::rows(&a, k), View::transposed(&b, k), false);
        let (a, b) = (self.gpu.upload(&a), self.gpu.upload(&b));
        let got = self.product(Operand::new(&a, [m, k]), Operand::new(&b, [n, k]), Exactness::Half);
        // Whole numbers, all of which halves hold and floats add exactly.
        got.and_then(|got| self.gpu.read::<f32>(&got).ok()).is_some_and(|got| got == expected)
    }

    /// A Bᵀ, rows of A × rows of B floats; nothing where operands do not fit bindings.
    pub fn product(&self, a: Operand<'_>, b: Operand<'_>, exactness: Exactness) -> Option<Buffer> {
        let out = self.gpu.empty(a.rows * b.rows);
        self.run(a, b, exactness, Outcome::Floats(&out), false).then_some(out)
    }

    /// Adds A Bᵀ to pairs of floats, of a symmetric product only tiles on and above the diagonal; says whether operands fit
    /// bindings.
    pub fn add_to_pairs(&self, a: Operand<'_>, b: Operand<'_>, pairs: [&Buffer; 2], symmetric: bool) -> bool {
        self.run(a, b, Exactness::Split, Outcome::Pairs(pairs), symmetric)
    }

    /// Whether the operands and the outcome of a product of these sizes, m × n by k, fit bindings.
    pub fn fits(&self, [m, n, k]: [usize; 3], exactness: Exactness) -> bool {
        self.rows_at_once([m, n, k], exactness) > 0
    }

    /// Rows of the product that are made at once; none where nothing fits.
    fn rows_at_once(&self, [m, n, k]: [usize; 3], exactness: Exactness) -> usize {
        let columns = n.next_multiple_of(TILE);
        let row_bytes = 2 * exactness.parts() * k.next_multiple_of(STEP);
        let fit = |bytes: usize| self.gpu.rows_per_binding(bytes) / TILE * TILE;
        let whole = fit(row_bytes) >= columns && self.gpu.rows_per_binding(4) >= m * n;
        if whole { fit(row_bytes).min(fit(4 * columns)).min(m.next_multiple_of(TILE)) } else { 0 }
    }

    fn run(&self, a: Operand<'_>, b: Operand<'_>, exactness: Exactness, outcome: Outcome<'_>, symmetric: bool) -> bool {
        let rows = self.rows_at_once([a.rows, b.rows, a.columns], exactness);
        if rows == 0 || (symmetric && rows < a.rows) {
            return false;
        }
        let largest = self.largest(a);
        let right = self.halved(b, self.largest(b), exactness, 3);
        for first in (0..a.rows).step_by(rows) {
            let part = a.part(first, rows.min(a.rows - first));
            let left = self.halved(part, largest.clone(), exactness, 2);
            self.multiply(&left, &right, [part.rows, b.rows], first, outcome, symmetric);
        }
        true
    }

    fn largest(&self, x: Operand<'_>) -> Buffer {
        // With what lies between, if its rows are parts of longer ones: a larger scale costs no more than its own digits.
        let [rows, columns] = [x.rows, x.columns].map(|count| count.saturating_sub(1));
        largest(&self.gpu, x.floats, x.first, rows * x.strides[0] + columns * x.strides[1] + 1)
    }

    fn halved(&self, x: Operand<'_>, largest: Buffer, exactness: Exactness, parts: u32) -> Halves {
        let (rows, columns) = (x.rows.next_multiple_of(TILE), x.columns.next_multiple_of(STEP));
        let times = exactness.parts();
        let parts = if times == 1 { 1 } else { parts };
        let halves = self.gpu.empty(rows * columns * times / 2);
        let [down, across] = x.strides.map(|stride| stride as u32);
        let parameters = [rows as u32, columns as u32, x.rows as u32, x.columns as u32, x.first as u32, down, across, parts];
        self.gpu.launch(&HALVE, rows / 32 * (columns / 32), &[x.floats, &largest, &halves], &parameters);
        Halves { halves, largest, rows, columns: columns * times }
    }

    /// Multiplies, in pieces along k, and lays the product down from row `first` on.
    fn multiply(&self, a: &Halves, b: &Halves, [rows, columns]: [usize; 2], first: usize, outcome: Outcome<'_>, symmetric: bool) {
        let gpu = &self.gpu;
        let (high, low, mode) = match outcome {
            Outcome::Floats(floats) => (floats, floats, 0),
            Outcome::Pairs([high, low]) => (high, low, 2),
        };
        let spare = gpu.empty(1);
        let low = if mode == 2 { low } else { &spare };
        for start in (0..a.columns).step_by(DEPTH) {
            let depth = DEPTH.min(a.columns - start);
            let product = match self.engine {
                Engine::Processor => gpu.upload(&multiplied(gpu, a, b, start, depth)),
                Engine::Units => {
                    let product = gpu.empty(a.rows * b.rows);
                    let shape = [a.rows, b.rows, a.columns, start, depth / STEP, usize::from(symmetric)].map(|size| size as u32);
                    gpu.launch(&PRODUCT_UNITS, a.rows / TILE * (b.rows / TILE), &[&a.halves, &b.halves, &product], &shape);
                    product
                }
            };
            let mode = if mode == 0 && start > 0 { 1 } else { mode };
            let parameters = [rows, columns, b.rows, first, mode, 0].map(|size| size as u32);
            let buffers = [&product, &a.largest, &b.largest, high, low];
            gpu.launch(&ADD_SCALED, (rows * columns).div_ceil(64), &buffers, &parameters);
        }
    }
}

/// The bits of the largest magnitude of so many floats.
fn largest(gpu: &Gpu, floats: &Buffer, first: usize, count: usize) -> Buffer {
    let largest = gpu.zeros(1);
    gpu.launch(&LARGEST_MAGNITUDE, count.div_ceil(4096), &[floats, &largest], &[first as u32, count as u32]);
    largest
}

/// The bits of the largest magnitude of floats, for [`is_finite`].
pub fn largest_of(gpu: &Gpu, floats: &Buffer) -> Buffer {
    largest(gpu, floats, 0, floats.words())
}

/// Whether none of the floats is infinite or NaN whose largest magnitude this is.
///
/// # Errors
/// As [`Gpu::read`].
pub fn is_finite(gpu: &Gpu, largest: &Buffer) -> Result<bool> {
    Ok(gpu.read::<u32>(largest)?.iter().all(|&bits| bits < f32::INFINITY.to_bits()))
}

/// The product of halves over some places along k, on the processor.
fn multiplied(gpu: &Gpu, a: &Halves, b: &Halves, start: usize, depth: usize) -> Vec<f32> {
    let floats = |halves: &Buffer| -> Vec<f32> {
        let halves: Vec<u16> = gpu.read(halves).expect("halves that were just made");
        halves.iter().map(|&half| f16::from_bits(half).to_f32()).collect()
    };
    let (left, right) = (floats(&a.halves), floats(&b.halves));
    let mut out = vec![0.0; a.rows * b.rows];
    let sizes = Sizes { m: a.rows, n: b.rows, k: depth };
    product(sizes, &mut out, b.rows, false, 1.0, View::rows(&left[start..], a.columns), View::transposed(&right[start..], b.columns), true);
    out
}

/// Whether a product of these sizes is worth the preparation.
pub fn worthwhile([m, n, k]: [usize; 3]) -> bool {
    m * n * k >= WORTHWHILE
}

/// y = x Wᵀ with halves, and its gradients, as learning uses them.
pub static LEARNED: Differentiable = Differentiable { fits, forward, adjoint };

fn units(gpu: &Gpu) -> Units {
    Units::of(gpu).unwrap_or_else(|| Units::on_processor(gpu))
}

/// The product of halves.
fn halved_product(gpu: &Gpu, a: Operand<'_>, b: Operand<'_>) -> Array {
    let buffer = units(gpu).product(a, b, Exactness::Half).expect("operands that were seen to fit");
    Array { buffer, shape: [a.rows, b.rows] }
}

fn operand(array: &Array) -> Operand<'_> {
    Operand::new(&array.buffer, array.shape)
}

fn fits(gpu: &Gpu, [[tokens, inputs], [outputs, _]]: [[usize; 2]; 2]) -> bool {
    let units = units(gpu);
    let products = [[tokens, outputs, inputs], [tokens, inputs, outputs], [outputs, inputs, tokens]];
    products.into_iter().all(|sizes| units.fits(sizes, Exactness::Half))
}

fn forward(gpu: &Gpu, [x, weight]: [&Array; 2]) -> Array {
    halved_product(gpu, operand(x), operand(weight))
}

/// dL/dx = dL/dy W and dL/dW = (dL/dy)ᵀ x.
fn adjoint(gpu: &Gpu, [x, weight]: [Option<&Array>; 2], upstream: &Array) -> [Option<Array>; 2] {
    let dy = operand(upstream);
    let dx = weight.map(|weight| halved_product(gpu, dy, operand(weight).transposed()));
    let dweight = x.map(|x| halved_product(gpu, dy.transposed(), operand(x).transposed()));
    [dx, dweight]
}
