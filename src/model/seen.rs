//! What calibration saw at the input sites of a block.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::kernels::gemm::{Sizes, View, product};
use crate::kernels::gram_space::GramSpace;
use crate::kernels::quadratic::layer_error;
use crate::matrix::Matrix;
use crate::model::block::Site;

/// What a method needs to have been seen, in ascending order; a run collects the maximum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Needs {
    /// Nothing: no calibration.
    Nothing,
    /// Σ x² of every input column.
    SquaredNorms,
    /// XᵀX.
    Gram,
    /// XᵀX, and the float model's stream of hidden states beside the compressed one.
    Streams,
}

/// Statistics of one input site over all calibration tokens.
#[derive(Debug, Clone, Default)]
pub struct Statistics {
    /// Tokens seen.
    pub tokens: u64,
    /// Σ x² per column.
    pub squares: Vec<f64>,
    /// XᵀX, `columns × columns`, when it was asked for.
    pub gram: Option<Vec<f64>>,
    /// What was last prepared from the Gram matrix.
    prepared: Prepared,
}

/// A Gram space with the damping and order it was asked for.
type Space = (f64, bool, Option<Arc<GramSpace>>);

/// Holds the last Gram space, because all layers of a site ask for the same; a copy starts empty.
#[derive(Debug, Default)]
struct Prepared(Mutex<Option<Space>>);

impl Clone for Prepared {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Statistics {
    /// Statistics of `tokens` tokens: Σ x² per column, and XᵀX where it is known.
    pub fn new(tokens: u64, squares: Vec<f64>, gram: Option<Vec<f64>>) -> Self {
        Self { tokens, squares, gram, prepared: Prepared::default() }
    }

    /// The Gram matrix prepared for quantizers; `None` when there is none or it is not positive definite even with
    /// full damping.
    pub fn space(&self, damping: f64, by_activation: bool) -> Option<Arc<GramSpace>> {
        let mut held = self.prepared.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, order, space)) = &*held
            && (*known, *order) == (damping, by_activation)
        {
            return space.clone();
        }
        let space = GramSpace::new(self.gram.as_ref()?, self.squares.len(), damping, by_activation).map(Arc::new);
        *held = Some((damping, by_activation, space.clone()));
        space
    }

    /// ‖X(W − Ŵ)ᵀ‖²_F and ‖XWᵀ‖²_F over all tokens, where their Gram matrix is known.
    pub fn layer_error(&self, exact: &Matrix, compressed: &Matrix) -> Option<[f64; 2]> {
        let gram = self.gram.as_ref()?;
        let nothing = vec![0.0; exact.data.len()];
        Some([&compressed.data, &nothing].map(|compressed| layer_error(gram, &exact.data, compressed, exact.columns)))
    }

    /// Itself, where everything that was seen is finite.
    pub(super) fn finite(&self, site: Site) -> Result<&Self> {
        match self.squares.iter().position(|square| !square.is_finite()) {
            Some(column) => Err(Error::input(format!("the calibration inputs at {site:?} are not finite in column {column}"))),
            None => Ok(self),
        }
    }

    /// √Σx² per column in f32, as Wanda multiplies it (methods-pruning §1.2; the scale does not matter there).
    pub fn norms(&self) -> Vec<f32> {
        self.squares.iter().map(|&square| square.sqrt() as f32).collect()
    }
}

/// Statistics of every site of the block that is being visited.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Statistics by site.
    pub sites: BTreeMap<Site, Statistics>,
    /// Inputs of the original block's sites for the first tokens, tokens × columns: where no Gram matrix was gathered, a
    /// layer's error is told on them.
    pub inputs: BTreeMap<Site, Vec<f32>>,
}

impl Seen {
    /// ‖X(W − Ŵ)ᵀ‖²_F and ‖XWᵀ‖²_F at a site: over all calibration tokens where their Gram matrix is known, else over
    /// the first ones.
    pub fn layer_error(&self, site: Site, exact: &Matrix, compressed: &Matrix) -> Option<[f64; 2]> {
        if let Some(known) = self.sites.get(&site).and_then(|statistics| statistics.layer_error(exact, compressed)) {
            return Some(known);
        }
        let inputs = self.inputs.get(&site)?;
        let tokens = inputs.len() / exact.columns.max(1);
        let difference: Vec<f32> = exact.data.iter().zip(&compressed.data).map(|(exact, compressed)| exact - compressed).collect();
        let mut outputs = vec![0.0; tokens * exact.rows];
        let sizes = Sizes { m: tokens, n: exact.rows, k: exact.columns };
        Some([&difference, &exact.data].map(|weight| {
            let (inputs, weight) = (View::rows(inputs, exact.columns), View::transposed(weight, exact.columns));
            product(sizes, &mut outputs, exact.rows, false, 1.0, inputs, weight, true);
            outputs.iter().map(|output| f64::from(*output).powi(2)).sum()
        }))
    }

    /// The statistics of a site.
    ///
    /// # Errors
    /// When nothing was seen there, or something that is not finite.
    pub fn at(&self, site: Site) -> Result<&Statistics> {
        self.sites.get(&site).ok_or_else(|| Error::run(format!("no calibration was seen at {site:?}")))?.finite(site)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::gram::add_gram;

    #[test]
    fn the_error_of_a_layer_is_the_same_from_its_gram_matrix_and_from_its_inputs() {
        let (tokens, rows, columns) = (30, 7, 12);
        let inputs: Vec<f32> = (0..tokens * columns).map(|i| (i as f32 * 0.71).sin()).collect();
        let exact = Matrix::new(rows, columns, (0..rows * columns).map(|i| (i as f32 * 0.37).cos()).collect());
        let compressed = Matrix::new(rows, columns, exact.data.iter().map(|value| (value * 4.0).round() / 4.0).collect());
        let mut seen = Seen { inputs: BTreeMap::from([(Site::Down, inputs.clone())]), ..Seen::default() };
        assert!(seen.layer_error(Site::Mlp, &exact, &compressed).is_none());
        let sampled = seen.layer_error(Site::Down, &exact, &compressed).unwrap();
        let mut gram = vec![0.0; columns * columns];
        add_gram(&inputs, columns, &mut gram);
        seen.sites.insert(Site::Down, Statistics::new(tokens as u64, vec![0.0; columns], Some(gram)));
        let known = seen.layer_error(Site::Down, &exact, &compressed).unwrap();
        for (sampled, known) in sampled.into_iter().zip(known) {
            assert!(known > 0.0 && (sampled - known).abs() < 1e-4 * known, "{sampled} {known}");
        }
        let outputs = (0..tokens * rows).map(|at| (0..columns).map(|j| inputs[at / rows * columns + j] * exact.row(at % rows)[j]).sum());
        let direct: f64 = outputs.map(|output: f32| f64::from(output).powi(2)).sum();
        assert!((known[1] - direct).abs() < 1e-4 * direct, "{} {direct}", known[1]);
    }
}
