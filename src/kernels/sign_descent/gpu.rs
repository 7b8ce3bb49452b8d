//! Learned rounding on a GPU.

use crate::device::{Buffer, Gpu, Shader};
use crate::error::Result;
use crate::kernels::quantize::gpu::format;
use crate::kernels::sign_descent::{Rounding, Start};

/// The signed step and the fake-quantized weight.
pub static SIGN_DESCENT: Shader = Shader { name: "sign_descent", source: include_str!("../../../shaders/sign_descent.wgsl") };

/// A layer whose rounding is learned on a GPU.
#[derive(Debug)]
pub struct OnGpu {
    gpu: Gpu,
    layer: Rounding,
    base: Buffer,
    offsets: Buffer,
    learned: Buffer,
    fixed: Buffer,
    quantized: Buffer,
}

impl OnGpu {
    /// A layer as it stands; nothing where it does not fit a binding.
    pub fn new(gpu: &Gpu, layer: Rounding) -> Option<Self> {
        if gpu.rows_per_binding(4 * layer.columns) < layer.rows {
            return None;
        }
        let offsets: Vec<u32> = layer.offsets.iter().map(|offset| if offset.is_nan() { 0x7fc0_0000 } else { offset.to_bits() }).collect();
        let there = Self {
            gpu: gpu.clone(),
            base: gpu.upload(&layer.base),
            offsets: gpu.upload(&offsets),
            learned: gpu.upload(&layer.learned),
            fixed: gpu.upload(&layer.fixed),
            quantized: gpu.empty(layer.base.len()),
            layer,
        };
        there.launch(&there.quantized, None);
        Some(there)
    }

    /// Where it learns.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// ŵ as it stands, rows × columns.
    pub fn quantized(&self) -> &Buffer {
        &self.quantized
    }

    /// As [`Rounding::step`], and then as [`Rounding::quantize`].
    pub fn step(&self, gradient: &Buffer, rate: f32, grid_rate: f32) {
        self.launch(gradient, Some([rate, grid_rate]));
    }

    fn launch(&self, gradient: &Buffer, rates: Option<[f32; 2]>) {
        let layer = &self.layer;
        let [rate, grid_rate] = rates.unwrap_or_default();
        let start = match layer.start {
            Start::Range => 0,
            Start::Grid => 1,
            Start::Codes => 2,
        };
        let parameters = [
            layer.rows as u32,
            layer.columns as u32,
            layer.group as u32,
            u32::from(layer.bits),
            u32::from(layer.symmetric),
            format(layer.float),
            start,
            u32::from(rates.is_some()),
            rate.to_bits(),
            grid_rate.to_bits(),
        ];
        let buffers = [&self.base, &self.offsets, &self.learned, &self.fixed, gradient, &self.quantized];
        self.gpu.launch(&SIGN_DESCENT, layer.learned.len(), &buffers, &parameters);
    }

    /// What is learned, as it stands.
    pub fn snapshot(&self) -> [Buffer; 2] {
        [self.gpu.copy(&self.offsets), self.gpu.copy(&self.learned)]
    }

    /// The layer as it was at a snapshot, on the processor.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn fetch_snapshot(&self, [offsets, learned]: &[Buffer; 2]) -> Result<Rounding> {
        let mut layer = self.layer.clone();
        layer.offsets = self.gpu.read(offsets)?;
        layer.learned = self.gpu.read(learned)?;
        Ok(layer)
    }

    /// The layer as it stands, back on the processor.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn fetch(&self) -> Result<Rounding> {
        self.fetch_snapshot(&[self.offsets.clone(), self.learned.clone()])
    }
}
