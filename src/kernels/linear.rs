//! The product with a linear layer's weight, y = x Wᵀ.

pub mod gpu;

use burn::tensor::Tensor;

use crate::kernels::gemm::{Sizes, View, product};
use crate::kernels::{Floats, tensor};

/// x Wᵀ for `x` of tokens × inputs and `weight` of outputs × inputs: straight from the slices where both lie on the
/// processor and nothing is differentiated, else by [`linear_reference`].
pub fn linear(x: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    linear_cpu(x, weight).unwrap_or_else(|| linear_reference(x, weight))
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
        }
    }
}
