//! Dense safetensors: every weight a plain tensor in the model's own number format. Loads everywhere. Pruned weights
//! are zeros; integers and trits are written as the floats they stand for, rounded to the model's format.

use crate::checkpoint::decode::encode;
use crate::checkpoint::dtype_of;
use crate::formats::{Entry, Format};
use crate::weight::{Float, Sparse, Weight};

/// The format.
pub const FORMAT: Format = Format {
    name: "dense",
    about: "plain tensors; pruned weights are zeros. Loads in transformers, vLLM, SGLang, llama.cpp's converter",
    scales: None,
    holds: |_| Ok(()),
    entries: |layer| vec![Entry { name: format!("{}.weight", layer.name), dtype: dtype_of(layer.float), shape: layer.shape.to_vec() }],
    encode: encode_weight,
    config: |_, _| None,
    files: |_| Vec::new(),
};

fn encode_weight(weight: &Weight, float: Float) -> Vec<Vec<u8>> {
    match weight {
        Weight::Dense(matrix) | Weight::Sparse(Sparse { matrix, .. }) => vec![encode(float, &matrix.data)],
        Weight::Stored(stored) => vec![encode(float, &stored.to_matrix().data)],
        Weight::Ints(_) | Weight::Trits(_) | Weight::Split(_) | Weight::Super(_) => {
            let mut values = weight.to_matrix().into_owned().data;
            let largest = float.largest();
            values.iter_mut().for_each(|value| *value = value.clamp(-largest, largest));
            vec![encode(float, &values)]
        }
    }
}
