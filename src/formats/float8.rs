//! Floats of 8 bits with scales per block, row or matrix, as some models are published: read, not written.
//!
//! `name.weight` is F8_E4M3; `name.weight_scale_inv` (blocks, 128 × 128 as a rule) or `name.weight_scale` (rows, or one) is what
//! it is multiplied by.

use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::Value;

use crate::checkpoint::decode::nonfinite;
use crate::checkpoint::source::{Plain, Source, present};
use crate::checkpoint::{Checkpoint, float_of};
use crate::error::{Error, Result, shown};
use crate::formats::scales;
use crate::matrix::Matrix;
use crate::weight::Weight;

/// Reads linear layers of 8-bit floats; those that are not are plain.
#[derive(Debug)]
pub struct Float8 {
    /// Rows and columns that share a scale; nothing where scales tell by their shape.
    block: Option<[usize; 2]>,
}

/// The number that a byte stands for; NaN for the two that stand for none.
fn number(byte: u8) -> f32 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction / 512.0,
        _ => (1.0 + fraction / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

impl Float8 {
    /// Reads the quantization section of a config.json.
    ///
    /// # Errors
    /// When blocks are of no sound size.
    pub fn read(config: &Value) -> Result<Self> {
        let Some(sizes) = config.get("weight_block_size").filter(|sizes| !sizes.is_null()) else { return Ok(Self { block: None }) };
        let size = |at: usize| sizes[at].as_u64().filter(|size| (1..=1 << 20).contains(size)).map(|size| size as usize);
        match (size(0), size(1)) {
            (Some(rows), Some(columns)) => Ok(Self { block: Some([rows, columns]) }),
            _ => Err(Error::input(format!("config.json: quantization_config: weight_block_size is {}", shown(&sizes.to_string())))),
        }
    }

    /// The name of a layer's scales, and the rows and columns that share one.
    fn scales(&self, checkpoint: &Checkpoint, name: &str, [rows, columns]: [usize; 2]) -> Result<(String, [usize; 2])> {
        let scale = ["weight_scale_inv", "weight_scale"].map(|suffix| format!("{name}.{suffix}"));
        let Some(scale) = scale.into_iter().find(|scale| checkpoint.has(scale)) else {
            return Err(Error::input("missing; 8-bit floats need their scales")
                .tensor(&format!("{name}.weight_scale_inv"))
                .file(&checkpoint.folder));
        };
        let (dtype, shape) = checkpoint.info(&scale).map(|info| (Some(info.dtype), info.shape.clone())).unwrap_or_default();
        if dtype.and_then(float_of).is_none() {
            return Err(Error::input(format!("is {dtype:?}, floats are needed")).tensor(&scale).file(&checkpoint.folder));
        }
        let [down, across] = self.block.unwrap_or([1, columns.max(1)]);
        let blocks = [rows.div_ceil(down), columns.div_ceil(across)];
        let found = match shape.as_slice() {
            [] | [1] | [1, 1] => [rows.max(1), columns.max(1)],
            [one, two] if [*one, *two] == blocks => [down, across],
            [one] | [one, 1] if *one == rows => [1, columns.max(1)],
            _ => {
                let what = format!("has shape {shape:?}; {blocks:?}, [{rows}, 1] or [1] fit a layer of {rows} x {columns}");
                return Err(Error::input(what).tensor(&scale).file(&checkpoint.folder));
            }
        };
        Ok((scale, found))
    }
}

fn is_float8(checkpoint: &Checkpoint, name: &str) -> bool {
    checkpoint.info(&format!("{name}.weight")).is_some_and(|info| info.dtype == Dtype::F8_E4M3)
}

impl Source for Float8 {
    fn shape(&self, checkpoint: &Checkpoint, name: &str) -> Option<[usize; 2]> {
        Plain.shape(checkpoint, name)
    }

    fn tensors(&self, checkpoint: &Checkpoint, name: &str) -> Vec<String> {
        present(checkpoint, name, &["weight", "weight_scale_inv", "weight_scale", "input_scale"])
    }

    fn check(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<()> {
        if is_float8(checkpoint, name) { self.scales(checkpoint, name, shape).map(drop) } else { Ok(()) }
    }

    fn weight(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<Weight> {
        if !is_float8(checkpoint, name) {
            return Plain.weight(checkpoint, name, shape);
        }
        let ([rows, columns], (scale, [down, across])) = (shape, self.scales(checkpoint, name, shape)?);
        let wrong = |tensor: &str, what: String| Error::input(what).tensor(tensor).file(&checkpoint.folder);
        let dtype = checkpoint.info(&scale).map(|info| info.dtype);
        let float = dtype.and_then(float_of).ok_or_else(|| wrong(&scale, format!("is {dtype:?}, floats are needed")))?;
        let scales = scales(checkpoint, &scale, float)?;
        let table: Vec<f32> = (0..=255).map(number).collect();
        let mut data = vec![0.0; rows * columns];
        let bytes = checkpoint.bytes(&format!("{name}.weight"))?;
        let per_row = columns.div_ceil(across);
        data.par_chunks_mut(columns.max(1)).zip(bytes.par_chunks(columns.max(1))).enumerate().for_each(|(row, (out, bytes))| {
            let scales = &scales[row / down * per_row..][..per_row];
            for ((out, bytes), scale) in out.chunks_mut(across).zip(bytes.chunks(across)).zip(scales) {
                out.iter_mut().zip(bytes).for_each(|(out, &byte)| *out = table[usize::from(byte)] * scale);
            }
        });
        match nonfinite(&data) {
            Some((first, count)) => {
                Err(wrong(&format!("{name}.weight"), format!("{count} values are NaN or infinite, the first at index {first}")))
            }
            None => Ok(Weight::Dense(Matrix::new(rows, columns, data))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stand_for_numbers() {
        for (byte, value) in [(0x00, 0.0), (0x01, 1.0 / 512.0), (0x08, 1.0 / 64.0), (0x38, 1.0), (0x7e, 448.0), (0xb8, -1.0), (0x3c, 1.5)] {
            assert_eq!(number(byte), value, "{byte:#x}");
        }
        assert!(number(0x7f).is_nan() && number(0xff).is_nan());
    }
}
