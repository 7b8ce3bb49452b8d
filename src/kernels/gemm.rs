//! Matrix products on slices through the gemm crate, checked so that callers need no unsafe code.
//!
//! Legend: dst (m × n) = alpha · dst + beta · lhs (m × k) · rhs (k × n).
#![allow(unsafe_code)]

/// A matrix inside a slice: entry (i, j) is `data[i * row_stride + j * column_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix whose rows lie `row_stride` apart.
    pub fn rows(data: &'a [f32], row_stride: usize) -> Self {
        Self { data, row_stride, column_stride: 1 }
    }

    /// The transpose of a row-major matrix whose rows lie `row_stride` apart.
    pub fn transposed(data: &'a [f32], row_stride: usize) -> Self {
        Self { data, row_stride: 1, column_stride: row_stride }
    }

    /// The data, with the strides of rows and of columns.
    pub(crate) fn parts(&self) -> (&'a [f32], usize, usize) {
        (self.data, self.row_stride, self.column_stride)
    }

    pub(crate) fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row_stride + (columns - 1) * self.column_stride < self.data.len()
    }
}

/// Sizes of a product: dst is m × n, the inner size is k.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Rows of dst and lhs.
    pub m: usize,
    /// Columns of dst and rhs.
    pub n: usize,
    /// Columns of lhs, rows of rhs.
    pub k: usize,
}

/// dst = beta · lhs · rhs, plus dst where `add`; dst row-major with rows `row_stride` apart. On the calling thread
/// unless `parallel`; the split over threads is over rows and columns of dst, never over k.
///
/// # Panics
/// When a slice is too short for the sizes.
#[expect(clippy::too_many_arguments, reason = "the arguments of a matrix product")]
pub fn product(sizes: Sizes, dst: &mut [f32], row_stride: usize, add: bool, beta: f32, lhs: View<'_>, rhs: View<'_>, parallel: bool) {
    let Sizes { m, n, k } = sizes;
    if m == 0 || n == 0 {
        return;
    }
    assert!(row_stride >= n && (m - 1) * row_stride + n <= dst.len(), "dst too short for {m} x {n}");
    assert!(lhs.holds(m, k) && rhs.holds(k, n), "operands too short for {m} x {k} x {n}");
    let parallelism = if parallel { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    // SAFETY: the assertions above keep every index i * row_stride + j * column_stride of the three matrices inside
    // its slice, and dst is borrowed mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            row_stride as isize,
            add,
            lhs.data.as_ptr(),
            lhs.column_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.column_stride as isize,
            rhs.row_stride as isize,
            1.0,
            beta,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_follow_the_definition_with_strides_transposes_and_accumulation() {
        let lhs: Vec<f32> = (0..12).map(|i| i as f32).collect(); // 3 x 4, rows 4 apart; use 2 columns
        let rhs: Vec<f32> = (0..6).map(|i| (i * i) as f32).collect(); // 3 x 2, transposed: 2 x 3
        let mut dst = vec![1.0; 3 * 5];
        let sizes = Sizes { m: 3, n: 3, k: 2 };
        product(sizes, &mut dst, 5, true, 2.0, View::rows(&lhs, 4), View::transposed(&rhs, 2), false);
        for i in 0..3 {
            for j in 0..3 {
                let exact: f32 = (0..2).map(|t| lhs[i * 4 + t] * rhs[j * 2 + t]).sum();
                assert_eq!(dst[i * 5 + j], 1.0 + 2.0 * exact);
            }
            assert_eq!(dst[i * 5 + 3..i * 5 + 5], [1.0, 1.0]);
        }
    }

    #[test]
    #[should_panic(expected = "too short")]
    fn a_short_slice_is_refused() {
        let mut dst = vec![0.0; 4];
        product(Sizes { m: 2, n: 2, k: 3 }, &mut dst, 2, false, 1.0, View::rows(&[0.0; 6], 3), View::rows(&[0.0; 5], 2), false);
    }
}
