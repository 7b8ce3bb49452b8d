//! Expert pruning: experts that give little are removed from every mixture.
//!
//! Source: REAP, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", arXiv:2510.13999, eq. 9: the saliency of an
//! expert is the mean, over the calibration tokens that the router sends to it, of the factor of its output times the norm of
//! that output. Experts of least saliency go, and the router goes without their rows; the tokens that went to them go to others.
//!
//! Every mixture loses as many, because a configuration has one number of experts, and where a router chooses among groups of
//! experts every group loses as many. An expert to which no token came has no saliency. Needs calibration; comes before all other
//! stages, which work on what is left.

use crate::error::{Error, Result};
use crate::methods::{Applied, BlockApplied, BlockLayer, BlockMethod, Layer, Method};
use crate::model::bench::Bench;
use crate::model::mixture::Mixture;
use crate::model::seen::Needs;
use crate::weight::{Storage, Weight};

/// Options of expert pruning.
#[derive(Debug, Clone, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reap {
    /// Share of the experts that goes, 0 to 1.
    pub share: f64,
    /// Experts that stay, instead of a share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<usize>,
}

impl Default for Reap {
    fn default() -> Self {
        Self { share: 0.25, experts: None }
    }
}

impl Method for Reap {
    fn needs(&self) -> Needs {
        Needs::SquaredNorms
    }

    fn leaves(&self, before: Storage, _: [usize; 2], _: Option<u8>) -> Result<Storage> {
        match before {
            Storage::Dense => Ok(before),
            _ => Err(Error::input("experts must be removed before anything else is done: put reap first")),
        }
    }

    fn apply(&self, _: Weight, layer: &Layer<'_>) -> Result<Applied> {
        Err(Error::run("reap works on whole blocks and needs calibration").tensor(layer.name))
    }

    fn block(&self) -> Option<&dyn BlockMethod> {
        Some(self)
    }

    fn removes_experts(&self) -> bool {
        true
    }

    fn experts_left(&self, mixture: &Mixture) -> Option<Result<usize>> {
        Some(left(self, mixture))
    }

    fn options(&self) -> toml::Table {
        toml::Table::try_from(self).unwrap_or_default()
    }
}

/// How many experts stay.
fn left(reap: &Reap, mixture: &Mixture) -> Result<usize> {
    let (all, chosen, groups) = (mixture.experts, mixture.rule.chosen, mixture.groups());
    let least = mixture.fewest();
    let asked = match reap.experts {
        Some(experts) => experts,
        None if (0.0..1.0).contains(&reap.share) => all - (reap.share * all as f64).round() as usize,
        None => return Err(Error::input(format!("share is {}, use 0 to 1, like 0.25", reap.share))),
    };
    let stay = asked.next_multiple_of(groups);
    if stay > all || stay < least || reap.experts.is_some_and(|experts| experts != stay) {
        let of_groups = if groups > 1 { format!(" in {groups} groups, of which each keeps as many") } else { String::new() };
        return Err(Error::input(format!(
            "{asked} of {all} experts{of_groups} cannot stay: a token goes to {chosen}; use {least} to {all}{}",
            if groups > 1 { format!(", a multiple of {groups}") } else { String::new() }
        )));
    }
    Ok(stay)
}

impl BlockMethod for Reap {
    fn apply_block(&self, bench: &mut Bench<'_>, _: &[BlockLayer]) -> Result<BlockApplied> {
        let mut applied = BlockApplied::default();
        let Some(mixture) = bench.model.config.mixture.filter(|_| bench.block.experts.is_some()) else { return Ok(applied) };
        let stay = left(self, &mixture)?;
        let saliency = bench.saliency()?;
        let kept = chosen(&saliency, stay, mixture.groups());
        let total: f64 = saliency.iter().sum();
        let lost: f64 = total - kept.iter().map(|&expert| saliency[expert]).sum::<f64>();
        let unseen = saliency.iter().filter(|saliency| **saliency == 0.0).count();
        let mut note = format!(
            "{} of {} experts removed, with {:.1} % of the saliency",
            saliency.len() - kept.len(),
            saliency.len(),
            100.0 * lost / total.max(f64::MIN_POSITIVE)
        );
        if unseen > 0 {
            note += &format!("; {unseen} had seen no token");
        }
        applied.block_notes.push(note);
        bench.keep_experts(kept)?;
        Ok(applied)
    }
}

/// The experts that stay, ascending: of every group those of largest saliency, the first of equal ones.
fn chosen(saliency: &[f64], stay: usize, groups: usize) -> Vec<usize> {
    let size = saliency.len() / groups.max(1);
    let mut kept = Vec::with_capacity(stay);
    for (group, saliency) in saliency.chunks(size.max(1)).enumerate() {
        let mut order: Vec<usize> = (0..saliency.len()).collect();
        order.sort_by(|&a, &b| saliency[b].total_cmp(&saliency[a]).then(a.cmp(&b)));
        order.truncate(stay / groups.max(1));
        kept.extend(order.into_iter().map(|expert| group * size + expert));
    }
    kept.sort_unstable();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::routing::{Rule, Scores};

    fn mixture(experts: usize, chosen: usize, scores: Scores) -> Mixture {
        Mixture { experts, rule: Rule { chosen, renormalized: true, scores }, width: 8, shared: None }
    }

    #[test]
    fn the_least_salient_go_and_groups_lose_as_many() {
        let saliency = [0.5, 0.1, 0.9, 0.1, 0.2, 0.3, 0.0, 0.8];
        assert_eq!(chosen(&saliency, 5, 1), [0, 2, 4, 5, 7]);
        assert_eq!(chosen(&saliency, 4, 4), [0, 2, 5, 7]);
        assert_eq!(chosen(&saliency, 4, 2), [0, 2, 5, 7]);
        assert_eq!(chosen(&[0.0; 4], 2, 1), [0, 1]);
    }

    #[test]
    fn as_many_stay_as_a_token_needs_and_as_groups_can_share() {
        let plain = mixture(8, 2, Scores::Softmax);
        let read = |share: f64, experts: Option<usize>, mixture: &Mixture| left(&Reap { share, experts }, mixture);
        assert_eq!(read(0.25, None, &plain).unwrap(), 6);
        assert_eq!(read(0.0, Some(3), &plain).unwrap(), 3);
        assert!(read(0.9, None, &plain).unwrap_err().to_string().contains("1 of 8 experts cannot stay: a token goes to 2; use 2 to 8"));
        assert!(read(1.5, None, &plain).is_err());
        let grouped = mixture(16, 3, Scores::Grouped { groups: 4, kept: 2, factor: 1.0 });
        assert_eq!(read(0.3, None, &grouped).unwrap(), 12);
        assert!(read(0.0, Some(10), &grouped).unwrap_err().to_string().contains("use 8 to 16, a multiple of 4"));
    }
}
