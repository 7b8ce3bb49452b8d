//! Hidden states that lie on a GPU, a buffer per window: they go through block after block there. Only copies that are saved, so
//! that an interrupted run can go on, cross the bus.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::device::{Buffer, Device, Gpu, Purpose, Reserved};
use crate::error::Result;

/// States of windows on a GPU. A buffer is never written once it is there, so tensors may share it.
#[derive(Debug)]
pub struct There {
    gpu: Gpu,
    width: usize,
    /// States of each window; zeros where there are none yet.
    windows: Vec<Option<Buffer>>,
    _reserved: Reserved,
}

impl There {
    /// A store for so many windows of `tokens` tokens in all; nothing where the device is none or has no room for them.
    pub fn new(device: &Device, windows: usize, tokens: usize, width: usize) -> Option<Self> {
        let gpu = device.gpu.as_ref()?;
        let reserved = gpu.reserve(Purpose::States, 4 * (tokens * width) as u64, device.room_for_states())?;
        Some(Self { gpu: gpu.clone(), width, windows: vec![None; windows], _reserved: reserved })
    }

    /// Whether tensors of a device lie where these states do.
    pub fn is_on(&self, device: &burn::tensor::Device) -> bool {
        Gpu::of(device).as_ref() == Some(&self.gpu)
    }

    /// Floats `part` of the states of a window.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn read(&self, window: usize, part: Range<usize>) -> Result<Vec<f32>> {
        match &self.windows[window] {
            Some(buffer) => self.gpu.read_part(buffer, part),
            None => Ok(vec![0.0; part.len()]),
        }
    }

    /// Replaces the states of a window.
    pub fn write(&mut self, window: usize, values: &[f32]) {
        self.windows[window] = Some(self.gpu.upload(values));
    }

    /// States of consecutive windows of the given numbers of tokens.
    pub fn tensor(&self, windows: Range<usize>, tokens: impl Fn(usize) -> usize) -> Tensor<2> {
        let one = |window: usize| {
            let shape = [tokens(window), self.width];
            let zeros = || self.gpu.zeros(shape[0] * shape[1]);
            self.gpu.tensor(self.windows[window].clone().unwrap_or_else(zeros), shape)
        };
        match windows.len() {
            1 => one(windows.start),
            _ => Tensor::cat(windows.map(one).collect(), 0),
        }
    }

    /// Takes over the states of consecutive windows; says whether they lie on this GPU.
    pub fn put(&mut self, windows: Range<usize>, tokens: impl Fn(usize) -> usize, states: &Tensor<2>) -> bool {
        let (mut first, count) = (0, windows.len());
        for window in windows {
            let rows = first..first + tokens(window);
            first = rows.end;
            // A part shares the whole's memory, which goes with the last of them.
            let part = if count == 1 { states.clone() } else { states.clone().slice([rows, 0..self.width]) };
            match self.gpu.buffer(&part) {
                Some(buffer) => self.windows[window] = Some(buffer),
                None => return false,
            }
        }
        true
    }

    /// Shares the states of another store on the same GPU.
    pub fn share(&mut self, other: &Self) {
        self.windows.clone_from(&other.windows);
    }
}
