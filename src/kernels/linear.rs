//! The product with a linear layer's weight, y = x Wᵀ.

pub mod gpu;
pub mod units;

use burn::tensor::Tensor;

use crate::device::Gpu;
use crate::kernels::gemm::{Sizes, View, product};
use crate::kernels::linear::units::{Exactness, LEARNED, Operand, Units, worthwhile};
use crate::kernels::{Floats, tensor};

/// Bytes of a weight that pass to a GPU at once.
const TILE_BYTES: usize = 64 << 20;

/// x Wᵀ for `x` of tokens × inputs and `weight` of outputs × inputs: straight from the slices where both lie on the
/// processor and nothing is differentiated, tile by tile where the weight lies there and `x` does not, on a GPU's matrix units
/// where it has some and the product is large enough, else by [`linear_reference`].
pub fn linear(x: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    if let Some(product) = linear_cpu(x, weight) {
        return product;
    }
    match Floats::of(weight) {
        Some(weight_here) if x.device().without_autodiff() != weight.device() => linear_tiled(x, &weight_here, TILE_BYTES),
        _ => linear_on_units(x, weight).unwrap_or_else(|| linear_reference(x, weight)),
    }
}

/// The product on matrix units: with halves where something is differentiated, as in learning, else nearly as with floats.
fn linear_on_units(x: &Tensor<2>, weight: &Tensor<2>) -> Option<Tensor<2>> {
    let ([m, k], [n, _]) = (x.dims(), weight.dims());
    if !worthwhile([m, n, k]) {
        return None;
    }
    let gpu = Gpu::of(&x.device())?;
    let units = Units::of(&gpu)?;
    if x.is_autodiff() || weight.is_autodiff() {
        return gpu.apply(&LEARNED, x, weight);
    }
    let (left, right) = (gpu.buffer(x)?, gpu.buffer(weight)?);
    let product = units.product(Operand::new(&left, [m, k]), Operand::new(&right, [n, k]), Exactness::Split)?;
    Some(gpu.tensor(product, [m, n]))
}

/// The product on the device of `x` with a weight that lies on the processor, some rows of it at a time.
fn linear_tiled(x: &Tensor<2>, weight: &Floats, bytes: usize) -> Tensor<2> {
    let (columns, device) = (x.dims()[1], x.device());
    let rows = (bytes / (4 * columns).max(1)).max(1);
    let tile = |part: &[f32]| linear_reference(x, &tensor(part.to_vec(), [part.len() / columns, columns], &device));
    let tiles: Vec<Tensor<2>> = weight.slice().chunks(rows * columns).map(tile).collect();
    Tensor::cat(tiles, 1)
}

/// The same in tensor algebra.
pub fn linear_reference(x: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    x.clone().matmul(weight.clone().transpose())
}

fn linear_cpu(x: &Tensor<2>, weight: &Tensor<2>) -> Option<Tensor<2>> {
    let ([m, k], [n, _]) = (x.dims(), weight.dims());
    let (left, right) = (Floats::of(x)?, Floats::of(weight)?);
    let mut out = vec![0.0; m * n];
    product(Sizes { m, n, k }, &mut out, n, false, 1.0, View::rows(left.slice(), k), View::transposed(right.slice(), k), true);
    Some(tensor(out, [m, n], &x.device()))
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;
    use crate::kernels::values;

    #[test]
    fn both_faces_agree_on_odd_shapes() {
        for [tokens, inputs, outputs] in [[1, 7, 5], [3, 33, 17], [130, 64, 100]] {
            let random = |shape| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex());
            let (x, weight) = (random([tokens, inputs]), random([outputs, inputs]));
            let (fast, exact) = (values(linear(&x, &weight)), values(linear_reference(&x, &weight)));
            assert_eq!(fast.len(), tokens * outputs);
            assert!(fast.iter().zip(&exact).all(|(a, b)| (a - b).abs() < 1e-4), "{tokens} {inputs} {outputs}");
            for bytes in [1, 4 * inputs * 3, 1 << 20] {
                let tiled = values(linear_tiled(&x, &Floats::of(&weight).unwrap(), bytes));
                assert_eq!(tiled.len(), exact.len());
                assert!(tiled.iter().zip(&exact).all(|(a, b)| (a - b).abs() < 1e-4), "{bytes} bytes a tile");
            }
        }
    }
}
