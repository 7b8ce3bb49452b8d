//! Statistical pre-calibration: keep the distribution of the weights, by ranges for the grids of the stage that follows
//! or by a grid of their own for outliers.
//!
//! Source: Ghaffari et al. 2025, arXiv:2501.09107, whose text could not be read beyond its abstract; the ranges are our
//! reading of it, stated step by step in [`crate::kernels::precalibrate`]. `storage = "adpq"` is its predecessor AdpQ,
//! arXiv:2405.13358. Needs nothing. With ranges it leaves the weight as it is; with `outliers = 0` the next stage does
//! what it would do without it. As mean KLD on a model of 7M parameters / one of 260k, groups of 128, without it and with
//! it: SignRound from the closed form at 2 bits 0.0950 / 0.906 and 0.1053 / 0.910 (50 / 200 iterations), at 3 bits
//! 0.0237 / 0.278 and 0.0247 / 0.277; GPTQ on the smaller at 2 bits 2.187 and 2.170, at 3 bits 0.590 and 0.559; round to nearest at
//! 3 bits 0.1114 and 0.1144 on the larger. It helps what does not look at inputs more than what does, and harms SignRound
//! on the larger: no preset puts it before a calibrated method. It does not tune anything, and rounds nothing unless it splits.

use crate::error::{Error, Result};
use crate::kernels::precalibrate::{self as kernel, precalibrate, split, threshold};
use crate::kernels::quantize::Grid;
use crate::methods::round_to_nearest::Group;
use crate::methods::{Applied, Layer, Method};
use crate::model::seen::Needs;
use crate::weight::{Storage, Weight};

/// Options of pre-calibration.
#[derive(Debug, Clone, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Precalibrate {
    /// Bits per weight, 2..=8; those of the quantizing stage that follows.
    #[serde(default = "four")]
    pub bits: u8,
    /// Columns that share a scale; as in the stage that follows.
    #[serde(default)]
    pub group: Group,
    /// Whether the zero point is fixed in the middle of the range; as in the stage that follows.
    #[serde(default = "yes")]
    pub symmetric: bool,
    /// Share of the weights of the matrix that count as outliers, at most 0.5; with 0 no range is clipped.
    #[serde(default = "one_in_twenty")]
    pub outliers: f64,
    /// What the stage makes.
    #[serde(default)]
    pub storage: Form,
}

/// What pre-calibration makes of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Ranges for the grids of the quantizing stage that follows; the weight stays as it is.
    #[default]
    Bounds,
    /// Integers on two grids per group, as AdpQ has them.
    Adpq,
}

fn four() -> u8 {
    4
}

fn yes() -> bool {
    true
}

fn one_in_twenty() -> f64 {
    0.05
}

impl Method for Precalibrate {
    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn leaves(&self, before: Storage, [_, columns]: [usize; 2], bits: Option<u8>) -> Result<Storage> {
        let bits = bits.unwrap_or(self.bits);
        if !(2..=8).contains(&bits) {
            return Err(Error::input(format!("{bits} bits; precalibrate takes 2 to 8")));
        }
        if !(0.0..=0.5).contains(&self.outliers) {
            return Err(Error::input(format!("outliers is {}, it must be from 0 to 0.5, like 0.05", self.outliers)));
        }
        if !matches!(before, Storage::Dense | Storage::Sparse(_)) {
            return Err(Error::input("precalibrate looks at floats: put it before the quantizing stage"));
        }
        match self.storage {
            Form::Bounds => Ok(before),
            Form::Adpq if !self.symmetric => Err(Error::input("storage \"adpq\" has symmetric grids alone; leave symmetric out")),
            Form::Adpq => Ok(Storage::Split { bits, group: self.group.fit(columns), outliers: self.per_million() }),
        }
    }

    fn prepares(&self, columns: usize, bits: Option<u8>) -> Option<Storage> {
        let grid = Storage::Ints { bits: bits.unwrap_or(self.bits), group: self.group.fit(columns), symmetric: self.symmetric };
        (self.storage == Form::Bounds).then_some(grid)
    }

    fn apply(&self, weight: Weight, layer: &Layer<'_>) -> Result<Applied> {
        let not_finite = || Error::input("a weight is not finite").tensor(layer.name);
        let pruned = matches!(weight, Weight::Sparse(_));
        let matrix = weight.to_matrix();
        let (bits, group) = (layer.bits.unwrap_or(self.bits), self.group.fit(matrix.columns));
        if self.storage == Form::Adpq {
            let theta = threshold(&matrix.data, self.outliers, pruned).ok_or_else(not_finite)?;
            let (split, change) = split(&matrix, theta, bits, group, self.per_million());
            return Ok(Applied::new(Weight::Split(split), change));
        }
        let grid = Grid { bits, group, symmetric: self.symmetric, scale_float: layer.float };
        let bounds = match layer.gpu.filter(|gpu| gpu.rows_per_binding(4 * matrix.columns) >= matrix.rows) {
            Some(gpu) => kernel::gpu::precalibrate(gpu, &matrix, grid, self.outliers, pruned)?,
            None => precalibrate(&matrix, grid, self.outliers, pruned),
        };
        let bounds = bounds.ok_or_else(not_finite)?;
        drop(matrix);
        Ok(Applied { bounds: Some(bounds), ..Applied::new(weight, [0.0; 2]) })
    }

    fn options(&self) -> toml::Table {
        toml::Table::try_from(self).unwrap_or_default()
    }
}

impl Precalibrate {
    fn per_million(&self) -> u32 {
        (self.outliers * 1e6).round() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::Matrix;
    use crate::weight::{Float, Pattern, Sparse};

    fn method(options: &str) -> Precalibrate {
        toml::from_str(options).unwrap()
    }

    fn layer() -> Layer<'static> {
        Layer { name: "layer", statistics: None, float: Float::BF16, bits: None, sparsity: None, bounds: None, goal: None, gpu: None }
    }

    fn wavy() -> Matrix {
        Matrix::from_fn(8, 64, |row, column| ((row * 64 + column) as f32 * 1.7).sin().powi(5))
    }

    #[test]
    fn ranges_leave_the_weight_as_it_is_and_splitting_makes_two_classes() {
        for weight in [Weight::Dense(wavy()), Weight::Sparse(Sparse { matrix: wavy(), pattern: Pattern::Unstructured })] {
            let applied = method("bits = 3\ngroup = 32").apply(weight.clone(), &layer()).unwrap();
            assert_eq!((applied.weight, applied.change), (weight.clone(), [0.0; 2]));
            assert!(applied.bounds.unwrap().fits([8, 64], 32));
            let split = method("bits = 3\ngroup = 32\nstorage = \"adpq\"");
            let applied = split.apply(weight.clone(), &layer()).unwrap();
            assert_eq!(applied.weight.storage(), split.leaves(weight.storage(), [8, 64], None).unwrap());
            assert!(applied.bounds.is_none() && applied.change[0] > 0.0);
        }
    }

    #[test]
    fn bits_of_the_plan_replace_those_of_the_method() {
        let method = method("bits = 4");
        assert_eq!(method.prepares(64, Some(2)), Some(Storage::Ints { bits: 2, group: 64, symmetric: true }));
        let bounds = |bits| method.apply(Weight::Dense(wavy()), &Layer { bits, ..layer() }).unwrap().bounds;
        assert_ne!(bounds(Some(2)), bounds(None));
        assert_eq!(bounds(Some(4)), bounds(None));
    }

    #[test]
    fn wrong_options_weights_that_are_not_finite_and_integers_are_refused() {
        let ints = Storage::Ints { bits: 4, group: 64, symmetric: true };
        for (options, before, reason) in [
            ("outliers = 0.6", Storage::Dense, "from 0 to 0.5"),
            ("outliers = nan", Storage::Dense, "from 0 to 0.5"),
            ("bits = 9", Storage::Dense, "2 to 8"),
            ("storage = \"adpq\"\nsymmetric = false", Storage::Dense, "symmetric grids alone"),
            ("", ints, "before the quantizing stage"),
        ] {
            let error = method(options).leaves(before, [8, 64], None).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert!(toml::from_str::<Precalibrate>("clip = 1").is_err());
        let mut matrix = wavy();
        matrix.data[70] = f32::NAN;
        for storage in ["bounds", "adpq"] {
            let error = method(&format!("storage = \"{storage}\"")).apply(Weight::Dense(matrix.clone()), &layer()).unwrap_err();
            assert!(error.to_string().contains("not finite"), "{error}");
        }
    }
}
