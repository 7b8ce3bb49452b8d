//! Cholesky factors, inverses and solves of symmetric positive definite matrices, in f64 through faer.
//!
//! Everything runs on the calling thread, so results do not depend on the number of threads; callers go parallel over
//! matrices. Matrices are square, `n × n`, row-major in a slice.

use faer::linalg::solvers::{DenseSolveCore, Llt, Solve};
use faer::{Mat, MatRef, Side};

/// Runs faer on the calling thread.
fn cholesky(matrix: &[f64], n: usize) -> Option<Llt<f64>> {
    faer::set_global_parallelism(faer::Par::Seq);
    let view = MatRef::from_row_major_slice(matrix, n, n);
    view.llt(Side::Lower).ok()
}

/// The inverse; `None` when the matrix is not positive definite.
pub fn inverse(matrix: &[f64], n: usize) -> Option<Vec<f64>> {
    let inverse = cholesky(matrix, n)?.inverse();
    finite((0..n * n).map(|at| inverse[(at / n, at % n)]).collect())
}

/// The upper triangular U with matrix⁻¹ = UᵀU, as GPTQ and SparseGPT use it; `None` when the matrix is not positive
/// definite.
pub fn inverse_factor(matrix: &[f64], n: usize) -> Option<Vec<f64>> {
    let inverse = cholesky(matrix, n)?.inverse();
    let lower = inverse.as_ref().llt(Side::Lower).ok()?;
    let lower = lower.L();
    finite((0..n * n).map(|at| if at % n >= at / n { lower[(at % n, at / n)] } else { 0.0 }).collect())
}

/// X with X · matrix = right, both `rows × n`; `None` when the matrix is not positive definite.
pub fn solve_rows(matrix: &[f64], n: usize, right: &[f64]) -> Option<Vec<f64>> {
    let factor = cholesky(matrix, n)?;
    let rows = right.len() / n.max(1);
    let columns = Mat::from_fn(n, rows, |i, j| right[j * n + i]);
    let solved = factor.solve(columns);
    finite((0..rows * n).map(|at| solved[(at % n, at / n)]).collect())
}

/// A Cholesky factor that serves several solves.
pub struct Factor {
    factor: Llt<f64>,
    n: usize,
}

impl std::fmt::Debug for Factor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Factor of {0} x {0}", self.n)
    }
}

impl Factor {
    /// Factors a matrix (`n × n`); `None` when it is not positive definite.
    pub fn new(matrix: &[f64], n: usize) -> Option<Self> {
        Some(Self { factor: cholesky(matrix, n)?, n })
    }

    /// X with X · matrix = right, both `rows × n`; `None` when the result is not finite. Rows are solved in blocks, so
    /// that the copy in f64 stays small.
    pub fn solve_rows_f32(&self, right: &[f32]) -> Option<Vec<f32>> {
        use rayon::prelude::*;
        const ROWS: usize = 64;
        let n = self.n;
        let mut out = vec![0.0f32; right.len()];
        out.par_chunks_mut(ROWS * n).zip(right.par_chunks(ROWS * n)).for_each(|(out, right)| {
            let columns = Mat::from_fn(n, right.len() / n, |i, j| f64::from(right[j * n + i]));
            let solved = self.factor.solve(columns);
            out.iter_mut().enumerate().for_each(|(at, out)| *out = solved[(at % n, at / n)] as f32);
        });
        out.iter().all(|value| value.is_finite()).then_some(out)
    }
}

/// A Gram matrix with `share` of its mean diagonal added to every diagonal entry.
pub fn damped(gram: &[f64], n: usize, share: f64) -> Vec<f64> {
    let mut matrix = gram.to_vec();
    let mean = (0..n).map(|i| gram[i * n + i]).sum::<f64>() / n.max(1) as f64;
    (0..n).for_each(|i| matrix[i * n + i] += share * mean);
    matrix
}

/// Solves matrix · x = right in place by Cholesky, for the small systems of single rows; false when the matrix (`n × n`
/// with n the length of `right`) is not positive definite.
pub fn solve_small(matrix: &mut [f64], right: &mut [f64]) -> bool {
    let n = right.len();
    for j in 0..n {
        for i in j..n {
            let inner: f64 = (0..j).map(|k| matrix[i * n + k] * matrix[j * n + k]).sum();
            let value = matrix[i * n + j] - inner;
            if i > j {
                matrix[i * n + j] = value / matrix[j * n + j];
            } else if value > 0.0 && value.is_finite() {
                matrix[j * n + j] = value.sqrt();
            } else {
                return false;
            }
        }
    }
    for i in 0..n {
        let inner: f64 = (0..i).map(|k| matrix[i * n + k] * right[k]).sum();
        right[i] = (right[i] - inner) / matrix[i * n + i];
    }
    for i in (0..n).rev() {
        let inner: f64 = (i + 1..n).map(|k| matrix[k * n + i] * right[k]).sum();
        right[i] = (right[i] - inner) / matrix[i * n + i];
    }
    right.iter().all(|value| value.is_finite())
}

fn finite(values: Vec<f64>) -> Option<Vec<f64>> {
    values.iter().all(|value| value.is_finite()).then_some(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A Gram matrix of some rows.
    fn gram(n: usize) -> Vec<f64> {
        let x = |t: usize, j: usize| ((t * 7 + j * 13) as f64 * 0.61).sin() + if t % n == j { 1.0 } else { 0.0 };
        (0..n * n).map(|at| (0..3 * n).map(|t| x(t, at / n) * x(t, at % n)).sum()).collect()
    }

    fn product(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
        (0..a.len()).map(|at| (0..n).map(|k| a[at / n * n + k] * b[k * n + at % n]).sum()).collect()
    }

    #[test]
    fn the_inverse_and_its_factor_give_back_the_identity() {
        for n in [1, 2, 7, 40] {
            let matrix = gram(n);
            let inverse = inverse(&matrix, n).unwrap();
            let upper = inverse_factor(&matrix, n).unwrap();
            let transposed: Vec<f64> = (0..n * n).map(|at| upper[at % n * n + at / n]).collect();
            let rebuilt = product(&transposed, &upper, n);
            for (at, one) in product(&matrix, &inverse, n).iter().enumerate() {
                let exact = if at / n == at % n { 1.0 } else { 0.0 };
                assert!((one - exact).abs() < 1e-9, "{n} {at} {one}");
                assert!((rebuilt[at] - inverse[at]).abs() < 1e-9);
                assert!(at % n >= at / n || upper[at] == 0.0);
            }
        }
    }

    #[test]
    fn rows_are_solved_against_the_matrix() {
        let (n, matrix) = (12, gram(12));
        let right: Vec<f64> = (0..3 * n).map(|i| (i as f64).cos()).collect();
        let solved = solve_rows(&matrix, n, &right).unwrap();
        assert!(product(&solved, &matrix, n).iter().zip(&right).all(|(a, b)| (a - b).abs() < 1e-9));
    }

    #[test]
    fn small_systems_are_solved_in_place() {
        for n in [1, 3, 9] {
            let matrix = gram(n);
            let right: Vec<f64> = (0..n).map(|i| (i as f64).sin() + 2.0).collect();
            let (mut work, mut x) = (matrix.clone(), right.clone());
            assert!(solve_small(&mut work, &mut x));
            let back: Vec<f64> = (0..n).map(|i| (0..n).map(|j| matrix[i * n + j] * x[j]).sum()).collect();
            assert!(back.iter().zip(&right).all(|(a, b)| (a - b).abs() < 1e-9), "{back:?}");
        }
        assert!(!solve_small(&mut [1.0, 2.0, 2.0, 1.0], &mut [1.0, 1.0]));
    }

    #[test]
    fn what_is_not_positive_definite_is_told() {
        assert!(inverse(&[1.0, 2.0, 2.0, 1.0], 2).is_none() && inverse_factor(&[0.0], 1).is_none());
        assert!(inverse(&[f64::NAN], 1).is_none() && solve_rows(&[1.0, 0.0, 0.0, -1.0], 2, &[1.0, 1.0]).is_none());
        assert!(inverse(&damped(&[1.0, 1.0, 1.0, 1.0], 2, 0.01), 2).is_some());
    }
}
