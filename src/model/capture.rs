//! What both streams of hidden states say at one input site, added up over windows.

use crate::device::Gpu;
use crate::error::Result;
use crate::kernels::gram::gpu::Gram;
use crate::kernels::gram::{add_cross, add_gram};
use crate::model::seen::Statistics;

/// What both streams say at one input site. Legend: A (compressed) and F (float) are tokens × columns, R is what the
/// float residual stream has and the compressed one has not.
#[derive(Debug, Clone)]
pub struct Capture {
    /// AᵀA with its tokens.
    pub statistics: Statistics,
    /// (F − A)ᵀA, `columns × columns`.
    pub cross: Vec<f64>,
    /// RᵀA, `outputs × columns`, for layers that write into the residual stream.
    pub residual: Option<Vec<f64>>,
}

/// A capture while it is added up; on a GPU its matrices lie there.
#[derive(Debug)]
pub struct Sums {
    capture: Capture,
    there: Option<There>,
}

/// The matrices of a capture on a GPU.
#[derive(Debug)]
struct There {
    gpu: Gpu,
    gram: Gram,
    cross: Gram,
    residual: Option<Gram>,
}

impl There {
    /// Nothing where a matrix does not fit a binding.
    fn new(gpu: &Gpu, columns: usize, outputs: usize) -> Option<Self> {
        let residual = match outputs {
            0 => None,
            outputs => Some(Gram::cross(gpu, outputs, columns)?),
        };
        Some(Self { gpu: gpu.clone(), gram: Gram::new(gpu, columns)?, cross: Gram::cross(gpu, columns, columns)?, residual })
    }
}

impl Sums {
    /// Nothing yet, for a site of `columns` columns whose layers write `outputs` columns into the residual stream (0 when
    /// they do not).
    pub fn new(columns: usize, outputs: usize, gpu: Option<&Gpu>) -> Self {
        let there = gpu.and_then(|gpu| There::new(gpu, columns, outputs));
        // What adds up there needs no room here.
        let zeros = |rows: usize| if there.is_some() { Vec::new() } else { vec![0.0; rows * columns] };
        let statistics = Statistics::new(0, vec![0.0; columns], Some(zeros(columns)));
        let capture = Capture { statistics, cross: zeros(columns), residual: (outputs > 0).then(|| zeros(outputs)) };
        Self { capture, there }
    }

    /// Adds inputs of the site and residual streams of both streams, the compressed one first.
    pub fn add(&mut self, [a, own]: [Vec<f32>; 2], [mut f, float]: [Vec<f32>; 2], residual_factor: f32) {
        let capture = &mut self.capture;
        let columns = capture.statistics.squares.len();
        capture.statistics.tokens += (a.len() / columns.max(1)) as u64;
        f.iter_mut().zip(&a).for_each(|(f, a)| *f -= a);
        let missing = || -> Vec<f32> { float.iter().zip(&own).map(|(float, own)| (float - own) / residual_factor).collect() };
        if let Some(there) = &self.there {
            let x = there.gpu.upload(&a);
            there.gram.add(&x);
            there.cross.add_cross(&there.gpu.upload(&f), &x);
            if let Some(residual) = &there.residual {
                residual.add_cross(&there.gpu.upload(&missing()), &x);
            }
            return;
        }
        if let Some(gram) = &mut capture.statistics.gram {
            add_gram(&a, columns, gram);
        }
        add_cross(&f, &a, [columns, columns], &mut capture.cross);
        if let Some(residual) = &mut capture.residual {
            add_cross(&missing(), &a, [residual.len() / columns.max(1), columns], residual);
        }
    }

    /// The whole capture. Σ x² per column stands on the diagonal of the Gram matrix.
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn finish(self) -> Result<Capture> {
        let mut capture = self.capture;
        if let Some(there) = self.there {
            capture.statistics.gram = Some(there.gram.totals()?);
            capture.cross = there.cross.totals()?;
            capture.residual = there.residual.map(|residual| residual.totals()).transpose()?;
        }
        let columns = capture.statistics.squares.len();
        if let Some(gram) = &capture.statistics.gram {
            capture.statistics.squares = (0..columns).map(|column| gram[column * columns + column]).collect();
        }
        Ok(capture)
    }
}

impl Capture {
    /// The sum of two captures of one site.
    pub fn merged(&self, other: &Self) -> Self {
        let sum = |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
        let gram = match (&self.statistics.gram, &other.statistics.gram) {
            (Some(a), Some(b)) => Some(sum(a, b)),
            _ => None,
        };
        let squares = sum(&self.statistics.squares, &other.statistics.squares);
        let residual = match (&self.residual, &other.residual) {
            (Some(a), Some(b)) => Some(sum(a, b)),
            _ => None,
        };
        let statistics = Statistics::new(self.statistics.tokens + other.statistics.tokens, squares, gram);
        Self { statistics, cross: sum(&self.cross, &other.cross), residual }
    }
}
