//! The face of a GPU in a program that was built without: there is never one.

use std::convert::Infallible;
use std::ops::Range;

use burn::tensor::Tensor;

use crate::device::{Adapter, Constant, Differentiable, Purpose, Shader};
use crate::error::{Error, Result};

/// A GPU, which this program cannot have.
#[derive(Debug, Clone, PartialEq)]
pub struct Gpu(Infallible);

/// Words on a GPU, which this program cannot have.
#[derive(Debug, Clone)]
pub struct Buffer(());

/// Memory of a GPU, which this program cannot have.
#[derive(Debug)]
pub struct Reserved(Infallible);

impl Buffer {
    /// Number of words.
    pub fn words(&self) -> usize {
        0
    }

    /// Some of the words.
    #[must_use]
    pub fn part(&self, _: Range<usize>) -> Self {
        Self(())
    }
}

/// All adapters of this machine that this program can use: none.
pub fn adapters() -> Vec<Adapter> {
    Vec::new()
}

/// The name of the adapter that was opened last: none.
pub fn opened() -> Option<String> {
    None
}

/// Refuses.
///
/// # Errors
/// Always.
pub fn open(number: usize) -> Result<(Gpu, burn::tensor::Device)> {
    Err(Error::input(format!(
        "--device gpu:{number}: this program was built without GPU support; build it with its default features, or use --device cpu"
    )))
}

impl Gpu {
    /// The GPU that a tensor's device is: none.
    pub fn of(_: &burn::tensor::Device) -> Option<Self> {
        None
    }

    /// What the adapter says of itself.
    pub fn adapter(&self) -> &Adapter {
        match self.0 {}
    }

    /// The same GPU with smaller limits.
    pub fn limited(&self, _: u32, _: u64) -> Self {
        match self.0 {}
    }

    /// Rows of so many bytes that one binding holds.
    pub fn rows_per_binding(&self, _: usize) -> usize {
        match self.0 {}
    }

    /// Words that are copied to the GPU.
    pub fn upload<T: bytemuck::NoUninit>(&self, _: &[T]) -> Buffer {
        match self.0 {}
    }

    /// Words of zeros.
    pub fn zeros(&self, _: usize) -> Buffer {
        match self.0 {}
    }

    /// Sets so many bytes aside.
    pub fn reserve(&self, _: Purpose, _: u64, _: u64) -> Option<Reserved> {
        match self.0 {}
    }

    /// Words that hold anything.
    pub fn empty(&self, _: usize) -> Buffer {
        match self.0 {}
    }

    /// A copy of floats.
    pub fn copy(&self, _: &Buffer) -> Buffer {
        match self.0 {}
    }

    /// The values of a tensor that lies on this GPU.
    pub fn buffer<const D: usize>(&self, _: &Tensor<D>) -> Option<Buffer> {
        match self.0 {}
    }

    /// A tensor that takes over a buffer of floats.
    pub fn tensor<const D: usize>(&self, _: Buffer, _: [usize; D]) -> Tensor<D> {
        match self.0 {}
    }

    /// The operation on two matrices.
    pub fn apply(&self, _: &'static Differentiable, _: &Tensor<2>, _: &Tensor<2>) -> Option<Tensor<2>> {
        match self.0 {}
    }

    /// Launches so many workgroups of a kernel.
    pub fn launch(&self, _: &'static Shader, _: usize, _: &[&Buffer], _: &[u32]) {
        match self.0 {}
    }

    /// As [`Self::launch`].
    pub fn launch_with(&self, _: &'static Shader, _: Constant, _: usize, _: &[&Buffer], _: &[u32]) {
        match self.0 {}
    }

    /// Has what was launched begin.
    pub fn submit(&self) {
        match self.0 {}
    }

    /// Gives memory back.
    pub fn tidy(&self) {
        match self.0 {}
    }

    /// The words of a buffer.
    ///
    /// # Errors
    /// Never here.
    pub fn read<T: bytemuck::Pod>(&self, _: &Buffer) -> Result<Vec<T>> {
        match self.0 {}
    }

    /// Some words of a buffer.
    ///
    /// # Errors
    /// Never here.
    pub fn read_part<T: bytemuck::Pod>(&self, _: &Buffer, _: Range<usize>) -> Result<Vec<T>> {
        match self.0 {}
    }

    /// The error for what the driver said.
    pub fn failure(&self, _: &str) -> Error {
        match self.0 {}
    }
}
