//! PTQTP: two trit-planes with two scales per group of columns.
//!
//! Source: "PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models", arXiv:2509.16989, Algorithm
//! 1, as specified in methods-quant §3. Needs nothing, or Σx² when weighted; leaves trits of 3.2 bits and two scales
//! per group, or 4-bit integers when the scales are tied. Keeps pruned weights exactly zero. It does not look at the
//! output of the layer, and rounds no weight up or down for the sake of another.
//!
//! Measured as mean KLD, groups of 128, two small models (7M parameters / 260k parameters): free 0.0837 / 0.623, free
//! weighted 0.0899 / 0.630, tied 0.0939 / 0.682, tied weighted 0.0816 / 0.680; round to nearest of 3 bits 0.1114 /
//! 1.267, of 4 bits 0.0311 / 0.253. Weighting does not win reliably (it wins with groups of 64 and loses with groups
//! of 32), so it is off by default; the residual start wins on both (without it 0.0907 / 0.676), so it is on.

use crate::error::{Error, Result};
use crate::kernels::trits::{self, Rule, fit_free, fit_tied};
use crate::methods::round_to_nearest::Group;
use crate::methods::{Applied, Layer, Method, Target};
use crate::model::seen::Needs;
use crate::weight::{Storage, Weight};

/// Options of PTQTP.
#[derive(Debug, Clone, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ptqtp {
    /// Columns that share scales.
    pub group: Group,
    /// Whether the coarse scale is three times the fine one: nine even levels, which 4-bit integers hold.
    pub tied: bool,
    /// Whether a weight counts by Σx² of its input.
    pub weighted: bool,
    /// Whether a second start, from the residual of a ternary fit, is tried, and the better result kept per group.
    pub residual_start: bool,
    /// Rounds of solve and search at most, 2..=1000.
    pub max_iters: u32,
    /// The rounds end when the scales move less than this share of the group's mean magnitude.
    pub epsilon: f64,
    /// Whether `epsilon` is an absolute number instead, as in the paper.
    pub absolute: bool,
    /// What the layer is brought close to.
    pub target: Target,
}

impl Default for Ptqtp {
    fn default() -> Self {
        Self {
            group: Group::default(),
            tied: false,
            weighted: false,
            residual_start: true,
            max_iters: 50,
            epsilon: 1e-4,
            absolute: false,
            target: Target::default(),
        }
    }
}

impl Method for Ptqtp {
    fn needs(&self) -> Needs {
        if self.weighted { Needs::SquaredNorms } else { Needs::Nothing }
    }

    fn target(&self) -> Target {
        self.target
    }

    fn leaves(&self, before: Storage, [_, columns]: [usize; 2], bits: Option<u8>) -> Result<Storage> {
        if !(2..=1000).contains(&self.max_iters) {
            return Err(Error::input(format!("max_iters is {}; ptqtp takes 2 to 1000", self.max_iters)));
        }
        if !(0.0..1.0).contains(&self.epsilon) {
            return Err(Error::input(format!("epsilon is {}; ptqtp takes at least 0 and below 1, like 1e-4", self.epsilon)));
        }
        if let Some(bits) = bits {
            return Err(Error::input(format!("{bits} bits; ptqtp has a width of its own, use 16 to leave the layer as it is")));
        }
        if let Storage::Ints { .. } | Storage::Trits { .. } = before {
            return Err(Error::input("quantizing twice is unsound: keep one quantizing stage"));
        }
        let group = self.group.fit(columns);
        Ok(if self.tied { Storage::Ints { bits: 4, group, symmetric: true } } else { Storage::Trits { group } })
    }

    fn apply(&self, weight: Weight, layer: &Layer<'_>) -> Result<Applied> {
        let rule = Rule {
            group: self.group.fit(weight.shape()[1]),
            residual_start: self.residual_start,
            max_iters: self.max_iters,
            epsilon: self.epsilon,
            absolute: self.absolute,
        };
        let importance = self.importance(layer)?;
        let importance = importance.as_deref();
        // Both starts go over the group in every round, and a few times before.
        let gpu = layer.gpu.filter(|gpu| gpu.adapter().iterates(rule.group * (2 * rule.max_iters as usize + 12)));
        let (weight, change) = if self.tied {
            let (ints, change) = match gpu {
                Some(gpu) => trits::gpu::fit_tied(gpu, &weight.to_matrix(), rule, importance, layer.float)?,
                None => fit_tied(&weight, rule, importance, layer.float),
            };
            (Weight::Ints(ints), change)
        } else {
            let (trits, change) = match gpu {
                Some(gpu) => trits::gpu::fit_free(gpu, &weight.to_matrix(), rule, importance)?,
                None => fit_free(&weight, rule, importance),
            };
            (Weight::Trits(trits), change)
        };
        Ok(Applied::new(weight, change))
    }

    fn options(&self) -> toml::Table {
        toml::Table::try_from(self).unwrap_or_default()
    }
}

impl Ptqtp {
    /// Σx² per column in units of its mean, so that it fits f32.
    fn importance(&self, layer: &Layer<'_>) -> Result<Option<Vec<f32>>> {
        if !self.weighted {
            return Ok(None);
        }
        let statistics = layer.statistics.ok_or_else(|| Error::run("ptqtp with weighted = true needs calibration").tensor(layer.name))?;
        let mean = statistics.squares.iter().sum::<f64>() / statistics.squares.len().max(1) as f64;
        let share = |square: &f64| if mean > 0.0 && mean.is_finite() { (square / mean) as f32 } else { 1.0 };
        Ok(Some(statistics.squares.iter().map(share).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::Matrix;
    use crate::model::seen::Statistics;
    use crate::weight::{Float, Pattern};

    fn read(text: &str) -> Result<Box<dyn Method>> {
        crate::methods::read("ptqtp", text.parse().unwrap())
    }

    fn layer(statistics: Option<&Statistics>) -> Layer<'_> {
        Layer { name: "a", statistics, float: Float::BF16, bits: None, sparsity: None, bounds: None, goal: None, gpu: None }
    }

    #[test]
    fn what_it_leaves_is_what_it_says_it_leaves() {
        let weight = Weight::Dense(Matrix::from_fn(6, 172, |row, column| ((row * 31 + column * 17) % 29) as f32 * 0.01 - 0.14));
        let statistics = Statistics::new(1, (1..=172).map(f64::from).collect(), None);
        for text in [
            "",
            "tied = true",
            "weighted = true",
            "tied = true\nweighted = true\ngroup = \"channel\"",
            "group = 64\nresidual_start = false",
        ] {
            let method = read(text).unwrap();
            for before in [Storage::Dense, Storage::Sparse(Pattern::Unstructured)] {
                let storage = method.leaves(before, [6, 172], None).unwrap();
                let applied = method.apply(weight.clone(), &layer(Some(&statistics))).unwrap();
                assert_eq!(applied.weight.storage(), storage, "{text}");
                let exact = crate::methods::change(&weight.to_matrix().data, &applied.weight.to_matrix().data);
                assert!((applied.change[0] / exact[0] - 1.0).abs() < 1e-4 && (applied.change[1] / exact[1] - 1.0).abs() < 1e-5);
            }
        }
        assert_eq!(read("weighted = true").unwrap().needs(), Needs::SquaredNorms);
        assert_eq!(read("").unwrap().needs(), Needs::Nothing);
        assert_eq!(read("target = \"float-output\"").unwrap().target(), Target::FloatOutput);
    }

    #[test]
    fn a_recipe_that_makes_no_sense_is_refused_with_the_reason() {
        let leaves = |text: &str, before, bits| read(text).unwrap().leaves(before, [8, 128], bits).unwrap_err().to_string();
        assert!(leaves("max_iters = 1", Storage::Dense, None).contains("2 to 1000"));
        assert!(leaves("epsilon = 2.0", Storage::Dense, None).contains("epsilon is 2"));
        assert!(leaves("epsilon = nan", Storage::Dense, None).contains("epsilon"));
        assert!(leaves("", Storage::Dense, Some(3)).contains("3 bits"));
        for before in [Storage::Trits { group: 128 }, Storage::Ints { bits: 4, group: 128, symmetric: true }] {
            assert!(leaves("", before, None).contains("quantizing twice"));
        }
        assert!(read("planes = 3").unwrap_err().to_string().contains("planes"));
        let weighted = read("weighted = true").unwrap();
        let weight = Weight::Dense(Matrix::new(1, 2, vec![1.0, 2.0]));
        assert!(weighted.apply(weight, &layer(None)).unwrap_err().to_string().contains("calibration"));
    }

    #[test]
    fn inputs_that_were_never_seen_leave_the_unweighted_fit() {
        let weight = Weight::Dense(Matrix::from_fn(2, 32, |row, column| (row + column) as f32 * 0.1));
        let dead = Statistics::new(1, vec![0.0; 32], None);
        let weighted = read("weighted = true").unwrap().apply(weight.clone(), &layer(Some(&dead))).unwrap();
        assert_eq!(weighted.weight, read("").unwrap().apply(weight, &layer(None)).unwrap().weight);
    }

    #[test]
    fn no_method_prunes_or_quantizes_trits_again() {
        let trits = Storage::Trits { group: 128 };
        for name in ["round-to-nearest", "magnitude", "wanda"] {
            let method = crate::methods::read(name, toml::Table::new()).unwrap();
            assert!(method.leaves(trits, [8, 128], None).unwrap_err().to_string().contains("unsound"), "{name}");
        }
    }
}
