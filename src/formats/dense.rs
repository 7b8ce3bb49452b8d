//! Dense safetensors: every weight a plain tensor in the model's own number format. Loads everywhere. Pruned weights
//! are zeros; integers are written as the floats they stand for, rounded to the model's format.

use crate::checkpoint::decode::encode;
use crate::checkpoint::dtype_of;
use crate::formats::{Entry, Format};

/// The format.
pub const FORMAT: Format = Format {
    name: "dense",
    about: "plain tensors; pruned weights are zeros. Loads in transformers, vLLM, SGLang, llama.cpp's converter",
    holds: |_| Ok(()),
    entries: |layer| vec![Entry { name: format!("{}.weight", layer.name), dtype: dtype_of(layer.float), shape: layer.shape.to_vec() }],
    encode: |weight, float| vec![encode(float, &weight.to_matrix().data)],
    config: |_| None,
};
