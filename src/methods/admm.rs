//! ADMM pruning: the mask and the surviving weights of a layer found together.
//!
//! Source: Boža, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv:2401.02938, as specified
//! in methods-pruning §2; the refit is that of ALPS, arXiv:2406.07831. Needs XᵀX; leaves a mask of exactly
//! trunc(entries · sparsity) zeros over the whole matrix, or N of every M. The paper's cubic ramp is the default;
//! `reference-code` re-selects at the full sparsity from the start, as the released code does for unstructured
//! pruning. Unlike the released code, N:M means any N and M. Damping pulls towards the original weights, which serves
//! inputs that calibration has not seen.

use serde::{Deserialize, Serialize};

use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::kernels::admm::{self, Rule};
use crate::kernels::factor::inverse;
use crate::kernels::quadratic::layer_error;
use crate::kernels::refit::{conjugate_gradient, correlation, normalised, norms, restored};
use crate::matrix::Matrix;
use crate::methods::sparsegpt::{SparseGpt, fits, settle};
use crate::methods::{Applied, Layer, Method, Target, change, prunable, share, wanda};
use crate::model::seen::Needs;
use crate::weight::{Pattern, Sparse, Storage, Weight};

/// Options of ADMM pruning.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admm {
    /// Share of the weights of the matrix to prune; 0.5 by default; N:M patterns imply theirs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f64>,
    /// Where zeros may lie.
    pub pattern: Pattern,
    /// Iterations; none leaves the masked weights as they are.
    pub iters: usize,
    /// Iterations that choose the mask, at most all; with none it is chosen once from the original weights.
    pub ramp: usize,
    /// Penalty of the split; inputs are normalised, so that one fits all layers.
    pub rho: f64,
    /// Share of the mean diagonal of the normalised Gram matrix to add to it.
    pub damping: f64,
    /// How the mask grows.
    pub schedule: Schedule,
    /// Where the mask is from.
    pub mask: Mask,
    /// Steps of conjugate gradients on the last mask, with the same damping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refit: Option<usize>,
    /// What the layer is brought close to.
    pub target: Target,
}

/// How the share to prune grows over the ramp.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Cubically, as the paper has it.
    #[default]
    Cubic,
    /// At once, as the released code has it for unstructured pruning; N:M patterns grow cubically in it too.
    ReferenceCode,
}

/// Where the mask is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mask {
    /// ADMM's own, by the schedule.
    #[default]
    Own,
    /// Wanda's, fixed.
    Wanda,
    /// SparseGPT's, fixed.
    Sparsegpt,
    /// Both schedules, Wanda's and SparseGPT's masks are tried, and the lowest layer error is kept.
    Auto,
}

impl Default for Admm {
    fn default() -> Self {
        Self {
            sparsity: None,
            pattern: Pattern::Unstructured,
            iters: 20,
            ramp: 15,
            rho: 1.0,
            damping: 0.1,
            schedule: Schedule::Cubic,
            mask: Mask::Own,
            refit: None,
            target: Target::Weight,
        }
    }
}

impl Method for Admm {
    fn needs(&self) -> Needs {
        Needs::Gram
    }

    fn target(&self) -> Target {
        self.target
    }

    fn leaves(&self, before: Storage, [_, columns]: [usize; 2], _: Option<u8>) -> Result<Storage> {
        share(self.sparsity, self.pattern)?;
        prunable(before, columns, self.pattern)?;
        let steps = [("iters", self.iters), ("ramp", self.ramp), ("refit", self.refit.unwrap_or(0))];
        if let Some((name, count)) = steps.into_iter().find(|(_, count)| *count > 10_000) {
            return Err(Error::input(format!("{name} is {count}, it must be at most 10000")));
        }
        if !(1e-3..=1e3).contains(&self.rho) {
            return Err(Error::input(format!("rho is {}, it must be from 0.001 to 1000, like 1", self.rho)));
        }
        if !(0.0..=10.0).contains(&self.damping) {
            return Err(Error::input(format!("damping is {}, it must be from 0 to 10, like 0.1", self.damping)));
        }
        Ok(Storage::Sparse(self.pattern))
    }

    fn apply(&self, weight: Weight, layer: &Layer<'_>) -> Result<Applied> {
        if layer.sparsity.is_some() {
            return Self { sparsity: layer.sparsity, ..self.clone() }.apply(weight, &Layer { sparsity: None, ..*layer });
        }
        let gram = layer.gram()?;
        let exact = weight.into_matrix();
        let (mut matrix, notes) = self.prune_on(layer.gpu, &exact, gram)?;
        settle(&mut matrix.data, layer.float);
        let change = change(&exact.data, &matrix.data);
        Ok(Applied { notes, ..Applied::new(Weight::Sparse(Sparse { matrix, pattern: self.pattern }), change) })
    }

    fn options(&self) -> toml::Table {
        toml::Table::try_from(self).unwrap_or_default()
    }
}

/// A result with the name of its mask and its layer error.
struct Candidate {
    name: &'static str,
    matrix: Matrix,
    error: f64,
    /// Whether the original weights under the mask were better than the update.
    only_masked: bool,
}

impl Admm {
    /// Prunes a weight (outputs × inputs) given H = XᵀX of its inputs; gives what the user should know too.
    ///
    /// # Errors
    /// When H does not fit the weight, or cannot be inverted with any damping.
    pub fn prune(&self, weight: &Matrix, gram: &[f64]) -> Result<(Matrix, Vec<String>)> {
        self.prune_on(None, weight, gram)
    }

    /// As [`Self::prune`], on a GPU where there is one.
    ///
    /// # Errors
    /// As [`Self::prune`], and when the GPU fails.
    pub fn prune_on(&self, gpu: Option<&Gpu>, weight: &Matrix, gram: &[f64]) -> Result<(Matrix, Vec<String>)> {
        fits(weight, gram)?;
        let space = Space::new(weight, gram, self)?;
        let mut notes = space.notes.clone();
        let mut tried = Vec::new();
        let mut best: Option<Candidate> = None;
        for (name, keep) in self.masks(weight, gram, &mut notes)? {
            let candidate = space.solve(gpu, name, keep.as_deref(), name == "reference-code")?;
            tried.push(format!("{name} {:.3e}", candidate.error));
            if best.as_ref().is_none_or(|best| candidate.error < best.error) {
                best = Some(candidate);
            }
        }
        let best = best.ok_or_else(|| Error::run("no mask was found"))?;
        if tried.len() > 1 {
            notes.push(format!("the mask is of {}; layer errors were {}", best.name, tried.join(", ")));
        }
        if best.only_masked {
            notes.push("the update raised the layer error, so weights are masked only".into());
        }
        notes.extend(emptied(weight, &best.matrix));
        Ok((best.matrix, notes))
    }

    /// Names of the masks to try; without a mask ADMM chooses its own.
    #[expect(clippy::type_complexity, reason = "a name and the mask, none where the schedule chooses it")]
    fn masks(&self, weight: &Matrix, gram: &[f64], notes: &mut Vec<String>) -> Result<Vec<(&'static str, Option<Vec<bool>>)>> {
        let own = match self.schedule {
            Schedule::Cubic => "cubic",
            Schedule::ReferenceCode => "reference-code",
        };
        let wanda = || -> Result<_> { Ok(("wanda", Some(wanda_mask(weight, gram, share(self.sparsity, self.pattern)?, self.pattern)))) };
        let sparsegpt = || -> Result<_> {
            let options = SparseGpt { sparsity: self.sparsity, pattern: self.pattern, ..SparseGpt::default() };
            Ok(("sparsegpt", Some(options.prune(weight, gram)?.keep)))
        };
        Ok(match self.mask {
            Mask::Own => vec![(own, None)],
            Mask::Wanda => vec![wanda()?],
            Mask::Sparsegpt => vec![sparsegpt()?],
            Mask::Auto => {
                let mut masks = vec![("cubic", None), wanda()?];
                if self.pattern == Pattern::Unstructured {
                    masks.push(("reference-code", None));
                }
                match sparsegpt() {
                    Ok(mask) => masks.push(mask),
                    Err(error) => notes.push(format!("the mask of SparseGPT was not tried: {error}")),
                }
                masks
            }
        })
    }
}

/// Wanda's mask: what is kept of every row, or of every M columns.
fn wanda_mask(weight: &Matrix, gram: &[f64], sparsity: f64, pattern: Pattern) -> Vec<bool> {
    let columns = weight.columns;
    let norms: Vec<f32> = (0..columns).map(|column| gram[column * (columns + 1)].max(0.0).sqrt() as f32).collect();
    let mut masked = weight.clone();
    wanda::prune(&mut masked, &norms, sparsity, pattern);
    masked.data.iter().map(|&value| value != 0.0).collect()
}

/// A sentence on rows that have lost every weight.
fn emptied(before: &Matrix, after: &Matrix) -> Option<String> {
    let any = |matrix: &Matrix, row: usize| matrix.row(row).iter().any(|&value| value != 0.0);
    let count = (0..before.rows).filter(|&row| any(before, row) && !any(after, row)).count();
    (count > 0).then(|| format!("{count} of {} rows have lost every weight", before.rows))
}

/// A layer in the coordinates in which its inputs have unit norm, ready to be solved for several masks.
struct Space<'a> {
    options: &'a Admm,
    weight: &'a Matrix,
    gram: &'a [f64],
    norms: Vec<f64>,
    /// V₀ and the factor that brings its largest entry to one.
    exact: Vec<f32>,
    factor: f64,
    /// (G + damping + ρ)⁻¹.
    inverse: Vec<f32>,
    damping: f64,
    notes: Vec<String>,
}

impl<'a> Space<'a> {
    fn new(weight: &'a Matrix, gram: &'a [f64], options: &'a Admm) -> Result<Self> {
        let columns = weight.columns;
        let norms = norms(gram, columns);
        let (exact, factor) = normalised(&weight.data, &norms);
        let ladder = (0..6).map(|step| if step == 0 { options.damping } else { options.damping.max(0.01) * 10f64.powi(step) });
        for damping in ladder {
            let Some(inverse) = inverse(&correlation(gram, &norms, damping, options.rho), columns) else { continue };
            let inverse = inverse.iter().map(|&value| value as f32).collect();
            let raised = format!("the Gram matrix could not be inverted with damping {}, {damping} was used", options.damping);
            let notes = if damping > options.damping { vec![raised] } else { Vec::new() };
            return Ok(Self { options, weight, gram, norms, exact, factor, inverse, damping, notes });
        }
        Err(Error::run("the Gram matrix cannot be inverted with any damping"))
    }

    /// Solves for a fixed mask, or for one by a schedule, and measures. Better masked than made worse.
    fn solve(&self, gpu: Option<&Gpu>, name: &'static str, keep: Option<&[bool]>, reference_code: bool) -> Result<Candidate> {
        let (options, columns) = (self.options, self.weight.columns);
        // The options were validated; were they not, half is pruned.
        let sparsity = share(options.sparsity, options.pattern).unwrap_or(0.5);
        let rule = match keep {
            Some(keep) => Rule::Fixed(keep),
            None => Rule::Largest { sparsity, pattern: options.pattern, ramp: options.ramp, cubic: !reference_code },
        };
        let (rho, iters) = (options.rho as f32, options.iters);
        let there = gpu.map(|gpu| admm::gpu::prune(gpu, &self.exact, columns, &self.inverse, rho, iters, rule)).transpose()?.flatten();
        let (mut values, keep) = there.unwrap_or_else(|| admm::prune(&self.exact, columns, &self.inverse, rho, iters, rule));
        if let Some(steps) = options.refit.filter(|steps| *steps > 0) {
            let correlation = correlation(self.gram, &self.norms, self.damping, 0.0);
            let correlation: Vec<f32> = correlation.iter().map(|&value| value as f32).collect();
            conjugate_gradient(&self.exact, &mut values, &keep, &correlation, columns, steps);
        }
        let masked = |(&value, &keep): (&f32, &bool)| if keep { value + 0.0 } else { 0.0 };
        let masked: Vec<f32> = self.weight.data.iter().zip(&keep).map(masked).collect();
        let updated =
            if options.iters == 0 && options.refit.is_none() { masked.clone() } else { restored(&values, &self.norms, self.factor) };
        let error = |data: &[f32]| layer_error(self.gram, &self.weight.data, data, columns);
        let (update_error, masked_error) = (error(&updated), error(&masked));
        let only_masked = !matches!(update_error.partial_cmp(&masked_error), Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal));
        let (data, error) = if only_masked { (masked, masked_error) } else { (updated, update_error) };
        Ok(Candidate { name, matrix: Matrix::new(self.weight.rows, columns, data), error, only_masked })
    }
}

#[cfg(test)]
pub(crate) mod tests;
