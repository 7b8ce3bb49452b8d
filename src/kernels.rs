//! Operations on matrices that deserve more than a line of tensor algebra. A kernel knows matrices, not layers.
//!
//! An operation of the forward has two faces: tensor algebra that runs on every device and under autodiff (the
//! reference), and a CPU path over slices that is used when the tensors lie on the processor outside autodiff.
//! Tests compare the two. CPU paths go parallel over rows only and reduce in a fixed order, so their results depend
//! neither on the number of threads nor on the width of the vector instructions.
//!
//! An operation that has a compute shader keeps its launch in a file beside it, `kernels/<op>/gpu.rs`, which also compiles
//! where the program is built without GPUs: there the type [`crate::device::Gpu`] has no values. [`SHADERS`] lists the
//! shaders and [`self_test`] compares each with its twin.

pub mod admm;
pub mod attention;
pub mod attention_adjoint;
pub mod channels;
pub mod decode_attention;
pub mod delta_rule;
pub mod descent;
pub mod error_feedback;
pub mod exponential;
pub mod factor;
pub mod gated;
pub mod gemm;
pub mod gram;
pub mod gram_space;
pub mod likelihood;
pub mod linear;
pub mod precalibrate;
pub mod quadratic;
pub mod quantize;
pub mod refit;
pub mod rms_norm;
pub mod rope;
pub mod rough_product;
pub mod routing;
pub mod sampling;
pub mod scale_search;
pub mod select;
pub mod self_test;
pub mod sign_descent;
pub mod sparsegpt;
pub mod super_blocks;
pub mod swap;
pub mod trits;

use burn::tensor::{Device, Tensor, TensorData};
use burn_flex::{Flex, FlexTensor};

use crate::device::Shader;
pub use crate::lanes::{dot_lanes, maximum, sum_lanes, vectorized};
use crate::matrix::Matrix;

/// All compute shaders.
pub static SHADERS: [&Shader; 26] = [
    &admm::gpu::ADMM_SPLIT,
    &admm::gpu::ADMM_COMBINE,
    &attention::gpu::ATTENTION,
    &attention::gpu::ATTENTION_QUERY_ADJOINT,
    &attention::gpu::ATTENTION_KEY_ADJOINT,
    &channels::gpu::CHANNEL_STATISTICS,
    &gram::gpu::COLUMN_SQUARES,
    &gram::gpu::GRAM,
    &linear::gpu::PRODUCT,
    &linear::units::ADD_SCALED,
    &linear::units::HALVE,
    &linear::units::LARGEST_MAGNITUDE,
    &linear::units::PRODUCT_UNITS,
    &linear::gpu::PRODUCT_INTS,
    &linear::gpu::PRODUCT_TRITS,
    &precalibrate::gpu::CLIP_RATIOS,
    &precalibrate::gpu::ROUNDED_HISTOGRAM,
    &quantize::gpu::GROUP_GRIDS,
    &quantize::gpu::ROUND_CODES,
    &select::gpu::KEEP_LARGEST,
    &select::gpu::KEY_HISTOGRAM,
    &select::gpu::SELECT_BLOCKS,
    &select::gpu::SELECT_SMALLEST,
    &sign_descent::gpu::SIGN_DESCENT,
    &trits::gpu::TRIT_CODES,
    &trits::gpu::TRIT_SCALES,
];

/// The floats of a tensor that lies on the processor.
#[derive(Debug)]
pub struct Floats(FlexTensor);

impl Floats {
    /// The floats of a contiguous copy-free view of the tensor, or nothing when it lies elsewhere or is being
    /// differentiated.
    pub fn of<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        let storage = tensor.clone().try_into_primitive::<Flex>().ok()?;
        Some(Self(storage.to_contiguous()))
    }

    /// The floats of a tensor that may lie anywhere, fetched where they do not lie on the processor.
    pub fn fetched<const D: usize>(of: &Tensor<D>) -> Self {
        Self::of(of).unwrap_or_else(|| {
            let here = tensor(values(of.clone()), of.dims(), &Device::flex());
            Self::of(&here).expect("a tensor made on the processor")
        })
    }

    /// The values, row-major.
    pub fn slice(&self) -> &[f32] {
        let (start, end) = self.0.layout().contiguous_offsets().unwrap_or((0, 0));
        &self.0.storage::<f32>()[start..end]
    }
}

/// A tensor that takes over the values.
pub fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// A matrix of the values of a tensor.
pub fn matrix(tensor: &Tensor<2>) -> Matrix {
    let [rows, columns] = tensor.dims();
    Matrix::new(rows, columns, values(tensor.clone()))
}

/// The values of a tensor, row-major; without a copy when nobody else holds it.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("a tensor of f32 read from its device")
}
