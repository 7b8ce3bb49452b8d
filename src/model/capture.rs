//! What both streams of hidden states say at one input site, added up over windows.

use burn::tensor::Tensor;

use crate::device::{Device, Gpu};
use crate::error::Result;
use crate::kernels::gram::gpu::Gram;
use crate::kernels::gram::{add_cross, add_gram};
use crate::kernels::{Floats, values};
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

/// What one stream has at a site for some windows.
#[derive(Debug)]
pub struct Read {
    /// The input of the site, tokens × columns.
    pub site: Tensor<2>,
    /// The residual stream before it, for layers that write into it, tokens × hidden.
    pub stream: Option<Tensor<2>>,
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
    /// Nothing where there is no GPU, or no room on it.
    fn new(device: &Device, columns: usize, outputs: usize) -> Option<Self> {
        let (gpu, room) = (device.gpu.as_ref()?, device.room_for_sums());
        let residual = match outputs {
            0 => None,
            outputs => Some(Gram::cross(gpu, [outputs, columns], room)?),
        };
        let (gram, cross) = (Gram::new(gpu, columns, room)?, Gram::cross(gpu, [columns, columns], room)?);
        Some(Self { gpu: gpu.clone(), gram, cross, residual })
    }
}

impl Sums {
    /// Nothing yet, for a site of `columns` columns whose layers write `outputs` columns into the residual stream (0 when
    /// they do not).
    pub fn new(columns: usize, outputs: usize, device: &Device) -> Self {
        let there = There::new(device, columns, outputs);
        // What adds up there needs no room here.
        let zeros = |rows: usize| if there.is_some() { Vec::new() } else { vec![0.0; rows * columns] };
        let statistics = Statistics::new(0, vec![0.0; columns], Some(zeros(columns)));
        let capture = Capture { statistics, cross: zeros(columns), residual: (outputs > 0).then(|| zeros(outputs)) };
        Self { capture, there }
    }

    /// Adds what was read of both streams, the compressed one first.
    pub fn add(&mut self, own: Read, float: Read, residual_factor: f32) {
        let capture = &mut self.capture;
        let [tokens, columns] = own.site.dims();
        capture.statistics.tokens += tokens as u64;
        if let Some(there) = &self.there {
            let place = |states: Tensor<2>| there.gpu.buffer(&states).unwrap_or_else(|| there.gpu.upload(&values(states)));
            let x = place(own.site.clone());
            there.gram.add(&x);
            there.cross.add_cross(&place(float.site - own.site), &x);
            if let (Some(residual), Some(own), Some(float)) = (&there.residual, own.stream, float.stream) {
                residual.add_cross(&place((float - own).div_scalar(residual_factor)), &x);
            }
            return;
        }
        let [a, f] = [&own.site, &float.site].map(Floats::fetched);
        let less = |f: &Floats, a: &Floats| -> Vec<f32> { f.slice().iter().zip(a.slice()).map(|(f, a)| f - a).collect() };
        if let Some(gram) = &mut capture.statistics.gram {
            add_gram(a.slice(), columns, gram);
        }
        add_cross(&less(&f, &a), a.slice(), [columns, columns], &mut capture.cross);
        if let (Some(residual), Some(own), Some(float)) = (&mut capture.residual, &own.stream, &float.stream) {
            let mut missing = less(&Floats::fetched(float), &Floats::fetched(own));
            missing.iter_mut().for_each(|missing| *missing /= residual_factor);
            add_cross(&missing, a.slice(), [residual.len() / columns.max(1), columns], residual);
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
