//! What calibration saw at the input sites of a block.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::kernels::gram_space::GramSpace;
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

    /// √Σx² per column in f32, as Wanda multiplies it (methods-pruning §1.2; the scale does not matter there).
    pub fn norms(&self) -> Vec<f32> {
        self.squares.iter().map(|&square| square.sqrt() as f32).collect()
    }

    /// ‖X(W − Ŵ)ᵀ‖²_F and ‖XWᵀ‖²_F, from the Gram matrix.
    pub fn layer_error(&self, exact: &Matrix, compressed: &Matrix) -> Option<[f64; 2]> {
        let gram = self.gram.as_ref()?;
        let columns = exact.columns;
        let quadratic = |row: &[f64]| -> f64 {
            let product = gram.chunks_exact(columns).zip(row).filter(|(_, value)| **value != 0.0);
            product.map(|(gram_row, value)| value * gram_row.iter().zip(row).map(|(a, b)| a * b).sum::<f64>()).sum()
        };
        let rows: Vec<[f64; 2]> = (0..exact.rows)
            .into_par_iter()
            .map(|row| {
                let difference: Vec<f64> =
                    exact.row(row).iter().zip(compressed.row(row)).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
                let whole: Vec<f64> = exact.row(row).iter().map(|&a| f64::from(a)).collect();
                [quadratic(&difference), quadratic(&whole)]
            })
            .collect();
        Some(rows.iter().fold([0.0; 2], |total, row| [total[0] + row[0], total[1] + row[1]]))
    }
}

/// Statistics of every site of the block that is being visited.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Statistics by site.
    pub sites: BTreeMap<Site, Statistics>,
}

impl Seen {
    /// ‖X(W − Ŵ)ᵀ‖²_F and ‖XWᵀ‖²_F at a site, where enough was seen to tell.
    pub fn layer_error(&self, site: Site, exact: &Matrix, compressed: &Matrix) -> Option<[f64; 2]> {
        self.sites.get(&site)?.layer_error(exact, compressed)
    }

    /// The statistics of a site.
    ///
    /// # Errors
    /// When nothing was seen there, or something that is not finite.
    pub fn at(&self, site: Site) -> Result<&Statistics> {
        let statistics = self.sites.get(&site).ok_or_else(|| Error::run(format!("no calibration was seen at {site:?}")))?;
        match statistics.squares.iter().position(|square| !square.is_finite()) {
            Some(column) => Err(Error::run(format!("the calibration inputs at {site:?} are not finite in column {column}"))),
            None => Ok(statistics),
        }
    }
}
