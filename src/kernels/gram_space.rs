//! A layer in Gram space: the damped Gram matrix of its inputs with the columns in the order in which a quantizer
//! works on them, and the factor of its inverse that error feedback needs. It depends on the inputs alone, so all
//! layers that read one site share it.

use crate::kernels::factor;

/// Share of the mean diagonal that is added to the diagonal first; it grows tenfold until the factor exists.
pub const DAMPING: f64 = 0.01;

/// The Gram matrix of an input site, ready for quantizers.
#[derive(Debug, Clone, PartialEq)]
pub struct GramSpace {
    /// Number of columns.
    pub columns: usize,
    /// Column at each position of the working order.
    pub order: Vec<usize>,
    /// The damped Gram matrix in working order, `columns × columns`.
    pub gram: Vec<f32>,
    /// Upper triangular U in working order with gram⁻¹ = UᵀU.
    pub factor: Vec<f32>,
    /// Share of the mean diagonal that was added.
    pub damping: f64,
}

impl GramSpace {
    /// Prepares a Gram matrix (`columns × columns`, row-major, finite). With `by_activation` columns with the largest
    /// diagonal come first. Damping grows tenfold up to 1 while the matrix is not positive definite; `None` when it
    /// never is.
    pub fn new(gram: &[f64], columns: usize, damping: f64, by_activation: bool) -> Option<Self> {
        let diagonal = |column: usize| gram[column * columns + column];
        let mut order: Vec<usize> = (0..columns).collect();
        if by_activation {
            order.sort_by(|&a, &b| diagonal(b).total_cmp(&diagonal(a)));
        }
        let mean = (0..columns).map(diagonal).sum::<f64>() / columns.max(1) as f64;
        // Inputs that are all zero say nothing: every column then counts the same.
        let (unit, scale) = if mean > 0.0 && mean.is_finite() { (0.0, 1.0 / mean) } else { (1.0, 0.0) };
        let mut share = damping;
        loop {
            let mut matrix = vec![0.0f64; columns * columns];
            for (row, &from) in matrix.chunks_mut(columns.max(1)).zip(&order) {
                let source = &gram[from * columns..][..columns];
                row.iter_mut().zip(&order).for_each(|(value, &column)| *value = source[column] * scale);
            }
            (0..columns).for_each(|i| matrix[i * columns + i] += share + unit);
            if let Some(factor) = factor::inverse_factor(&matrix, columns) {
                let single = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect();
                return Some(Self { columns, order, gram: single(matrix), factor: single(factor), damping: share });
            }
            if share >= 1.0 {
                return None;
            }
            share = (10.0 * share).clamp(1e-3, 1.0);
        }
    }

    /// Copies a row into working order.
    pub fn gather(&self, row: &[f32], out: &mut [f32]) {
        out.iter_mut().zip(&self.order).for_each(|(out, &column)| *out = row[column]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damping_grows_until_the_factor_exists_and_dead_inputs_count_alike() {
        let singular = [1.0, 1.0, 1.0, 1.0];
        let space = GramSpace::new(&singular, 2, 0.0, true).unwrap();
        assert!(space.damping > 0.0 && space.damping < 0.1, "{}", space.damping);
        let dead = GramSpace::new(&[0.0; 9], 3, 0.01, true).unwrap();
        assert!((0..3).all(|i| dead.gram[i * 4] > 0.9) && dead.gram[1] == 0.0);
        assert!(GramSpace::new(&[f64::NAN], 1, 0.01, false).is_none());
    }

    #[test]
    fn columns_stand_in_the_order_of_their_energy() {
        let gram = [1.0, 0.1, 0.2, 0.1, 4.0, 0.3, 0.2, 0.3, 2.0];
        let space = GramSpace::new(&gram, 3, 0.01, true).unwrap();
        assert_eq!(space.order, [1, 2, 0]);
        let mean = 7.0 / 3.0;
        assert!((f64::from(space.gram[1]) - 0.3 / mean).abs() < 1e-6);
        let mut row = [0.0; 3];
        space.gather(&[10.0, 11.0, 12.0], &mut row);
        assert_eq!(row, [11.0, 12.0, 10.0]);
    }
}
