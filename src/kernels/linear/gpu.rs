//! Products with a weight on a GPU: dense, and straight from packed integers and trit-planes.

use crate::device::{Buffer, Gpu, Shader};
use crate::kernels::gemm::Sizes;
use crate::weight::{Ints, Trits};

/// A Bᵀ of floats.
pub static PRODUCT: Shader = Shader { name: "product", source: include_str!("../../../shaders/product.wgsl") };
/// A Ŵᵀ from packed integers.
pub static PRODUCT_INTS: Shader = Shader { name: "product_ints", source: include_str!("../../../shaders/product_ints.wgsl") };
/// A Ŵᵀ from two trit-planes.
pub static PRODUCT_TRITS: Shader = Shader { name: "product_trits", source: include_str!("../../../shaders/product_trits.wgsl") };

/// Multiplications of a launch: less than half a second where a hundred thousand million are done in one.
const MULTIPLICATIONS: usize = 1 << 35;

/// Workgroups of a product: tiles of 64 × 64.
fn tiles(Sizes { m, n, .. }: Sizes) -> usize {
    m.div_ceil(64) * n.div_ceil(64)
}

/// A Bᵀ of m × k and n × k floats.
pub fn product(gpu: &Gpu, sizes: Sizes, a: &Buffer, b: &Buffer) -> Buffer {
    let c = gpu.empty(sizes.m * sizes.n);
    product_into(gpu, sizes, a, b, &c);
    c
}

/// As [`product`], into room for m × n floats. Large products are done some rows at a time, so that slow adapters do not look as if
/// they hang.
pub fn product_into(gpu: &Gpu, sizes: Sizes, a: &Buffer, b: &Buffer, c: &Buffer) {
    product_in_parts(gpu, sizes, [a, b, c], MULTIPLICATIONS);
}

/// As [`product_into`], so many multiplications at a time.
pub fn product_in_parts(gpu: &Gpu, Sizes { m, n, k }: Sizes, [a, b, c]: [&Buffer; 3], multiplications: usize) {
    let rows = (multiplications / (n * k).max(1)).max(1).next_multiple_of(64);
    for first in (0..m).step_by(rows) {
        let count = rows.min(m - first);
        let sizes = Sizes { m: count, n, k };
        let (a, c) = (a.part(first * k..(first + count) * k), c.part(first * n..(first + count) * n));
        gpu.launch(&PRODUCT, tiles(sizes), &[&a, b, &c], &[count as u32, n as u32, k as u32]);
        if count < m {
            gpu.submit();
        }
    }
}

/// Packed integers on a GPU.
#[derive(Debug)]
pub struct PackedInts {
    shape: [usize; 2],
    group: usize,
    codes: Buffer,
    scales: Buffer,
    zeros: Buffer,
}

impl PackedInts {
    /// A copy of a weight.
    pub fn new(gpu: &Gpu, ints: &Ints) -> Self {
        let zero = |at: usize| ints.zeros.as_ref().map_or(1u32 << (ints.bits - 1), |zeros| u32::from(zeros[at]));
        Self {
            shape: [ints.rows, ints.columns],
            group: ints.group,
            codes: gpu.upload(&ints.codes),
            scales: gpu.upload(&ints.scales),
            zeros: gpu.upload(&(0..ints.scales.len()).map(zero).collect::<Vec<_>>()),
        }
    }

    /// A Ŵᵀ for `m` rows of A.
    pub fn product(&self, gpu: &Gpu, a: &Buffer, m: usize) -> Buffer {
        let sizes = Sizes { m, n: self.shape[0], k: self.shape[1] };
        let c = gpu.empty(m * sizes.n);
        let parameters = [m as u32, sizes.n as u32, sizes.k as u32, self.group as u32];
        gpu.launch(&PRODUCT_INTS, tiles(sizes), &[a, &self.codes, &self.scales, &self.zeros, &c], &parameters);
        c
    }
}

/// Two trit-planes on a GPU.
#[derive(Debug)]
pub struct PackedTrits {
    shape: [usize; 2],
    group: usize,
    codes: Buffer,
    scales: Buffer,
}

impl PackedTrits {
    /// A copy of a weight.
    pub fn new(gpu: &Gpu, trits: &Trits) -> Self {
        let shape = [trits.rows, trits.columns];
        Self { shape, group: trits.group, codes: gpu.upload(&trits.codes), scales: gpu.upload(&trits.scales) }
    }

    /// A Ŵᵀ for `m` rows of A.
    pub fn product(&self, gpu: &Gpu, a: &Buffer, m: usize) -> Buffer {
        let sizes = Sizes { m, n: self.shape[0], k: self.shape[1] };
        let c = gpu.empty(m * sizes.n);
        let parameters = [m as u32, sizes.n as u32, sizes.k as u32, self.group as u32];
        gpu.launch(&PRODUCT_TRITS, tiles(sizes), &[a, &self.codes, &self.scales, &c], &parameters);
        c
    }
}
