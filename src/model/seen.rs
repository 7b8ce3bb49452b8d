//! What calibration saw at the input sites of a block.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::error::{Error, Result};
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
}

impl Statistics {
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
