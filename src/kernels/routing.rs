//! Which experts of a mixture a token goes to, and how much each of them counts.

use crate::kernels::exponential::sigmoid;

/// How a router chooses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// Experts per token.
    pub chosen: usize,
    /// Whether the shares of the chosen experts are made to add up to one.
    pub renormalized: bool,
    /// What shares come from.
    pub scores: Scores,
}

/// What the shares of experts come from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scores {
    /// The softmax over all experts.
    Softmax,
    /// The sigmoid of every expert. Of as many groups of neighbours as there are, only some are chosen from: those whose two
    /// best experts are best. A correction counts for the choice, not for the share.
    Grouped {
        /// Groups.
        groups: usize,
        /// Groups that are chosen from.
        kept: usize,
        /// What shares are multiplied by in the end.
        factor: f32,
    },
}

/// Tokens that go to an expert, ascending, each with the factor of the expert's output.
pub type Routed = Vec<(usize, f32)>;

/// The tokens of every expert. The largest are chosen, the first of equal ones first. `logits` are tokens × experts, `correction`
/// is one number per expert or nothing.
pub fn route(logits: &[f32], correction: &[f32], experts: usize, rule: Rule) -> Vec<Routed> {
    let mut routed = vec![Vec::new(); experts];
    let mut choice = Choice::default();
    for (token, logits) in logits.chunks_exact(experts.max(1)).enumerate() {
        choice.make(logits, correction, rule);
        for (&expert, &share) in choice.experts.iter().zip(&choice.shares) {
            routed[expert].push((token, share));
        }
    }
    routed
}

/// The experts of one token; the memory is kept from token to token.
#[derive(Debug, Default)]
pub struct Choice {
    /// Those chosen.
    pub experts: Vec<usize>,
    /// The factors of their outputs.
    pub shares: Vec<f32>,
    /// What every expert scores, in softmax or sigmoid.
    scores: Vec<f32>,
    ranks: Vec<f32>,
    groups: Vec<(f32, usize)>,
}

impl Choice {
    /// Chooses for a token by its logits.
    pub fn make(&mut self, logits: &[f32], correction: &[f32], rule: Rule) {
        let Self { experts, shares, scores, ranks, groups } = self;
        scores.clear();
        ranks.clear();
        match rule.scores {
            Scores::Softmax => {
                let largest = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                scores.extend(logits.iter().map(|logit| (logit - largest).exp()));
                ranks.extend_from_slice(logits);
            }
            Scores::Grouped { .. } => {
                scores.extend(logits.iter().map(|&logit| sigmoid(logit)));
                ranks.extend(scores.iter().enumerate().map(|(expert, score)| score + correction.get(expert).unwrap_or(&0.0)));
            }
        }
        if let Scores::Grouped { groups: count, kept, .. } = rule.scores {
            hide_groups(ranks, groups, count, kept);
        }
        experts.clear();
        experts.extend(0..logits.len());
        experts.sort_by(|&a, &b| ranks[b].total_cmp(&ranks[a]).then(a.cmp(&b)));
        experts.truncate(rule.chosen);
        let kept: f32 = experts.iter().map(|&expert| scores[expert]).sum();
        let factor = match rule.scores {
            Scores::Softmax if rule.renormalized => 1.0 / kept,
            Scores::Softmax => 1.0 / scores.iter().sum::<f32>(),
            Scores::Grouped { factor, .. } if rule.renormalized => factor / (kept + 1e-20),
            Scores::Grouped { factor, .. } => factor,
        };
        shares.clear();
        shares.extend(experts.iter().map(|&expert| scores[expert] * factor));
    }

    /// dL/dlogits of the token, added to `dlogits`, for the gradients of the shares of the last choice; which experts are chosen
    /// does not change.
    pub fn adjoint(&self, dshares: &[f32], rule: Rule, dlogits: &mut [f32]) {
        let Self { experts, shares, scores, .. } = self;
        // Σ share · dshare: what a factor over all of them takes away.
        let pull: f32 = shares.iter().zip(dshares).map(|(share, d)| share * d).sum();
        match rule.scores {
            Scores::Softmax => {
                for ((&expert, share), d) in experts.iter().zip(shares).zip(dshares) {
                    dlogits[expert] += share * d;
                }
                let total: f32 = if rule.renormalized { 0.0 } else { scores.iter().sum() };
                if rule.renormalized {
                    experts.iter().zip(shares).for_each(|(&expert, share)| dlogits[expert] -= share * pull);
                } else {
                    dlogits.iter_mut().zip(scores).for_each(|(d, score)| *d -= score / total * pull);
                }
            }
            Scores::Grouped { factor, .. } => {
                let kept: f32 = experts.iter().map(|&expert| scores[expert]).sum();
                for (&expert, d) in experts.iter().zip(dshares) {
                    let score = scores[expert];
                    let slope = if rule.renormalized { (factor * d - pull) / (kept + 1e-20) } else { factor * d };
                    dlogits[expert] += slope * score * (1.0 - score);
                }
            }
        }
    }
}

/// Puts experts outside the best groups behind all others.
fn hide_groups(ranks: &mut [f32], order: &mut Vec<(f32, usize)>, count: usize, kept: usize) {
    let size = (ranks.len() / count.max(1)).max(1);
    order.clear();
    order.extend(ranks.chunks(size).enumerate().map(|(group, ranks)| {
        let best = ranks.iter().fold(
            [f32::NEG_INFINITY; 2],
            |[first, second], &rank| {
                if rank > first { [rank, first] } else { [first, second.max(rank)] }
            },
        );
        (best.iter().filter(|rank| rank.is_finite()).sum(), group)
    }));
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    for &(_, group) in order.iter().skip(kept) {
        ranks[group * size..].iter_mut().take(size).for_each(|rank| *rank = f32::NEG_INFINITY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: &[(usize, f32)], expected: &[(usize, f32)]) {
        assert_eq!(found.len(), expected.len());
        found.iter().zip(expected).for_each(|(a, b)| assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-6, "{found:?}"));
    }

    #[test]
    fn the_largest_shares_are_chosen_and_equal_ones_by_number() {
        let logits = [0.0, 2f32.ln(), 0.0, 4f32.ln(), 1.0, 1.0, 1.0, 1.0];
        let rule = |chosen, renormalized| Rule { chosen, renormalized, scores: Scores::Softmax };
        let shares = |renormalized| route(&logits, &[], 4, rule(2, renormalized));
        let found = shares(false);
        near(&found[0], &[(1, 0.25)]);
        near(&found[1], &[(0, 0.25), (1, 0.25)]);
        near(&found[2], &[]);
        near(&found[3], &[(0, 0.5)]);
        near(&shares(true)[3], &[(0, 4.0 / 6.0)]);
        near(&shares(true)[1], &[(0, 2.0 / 6.0), (1, 0.5)]);
        assert_eq!(route(&[], &[], 3, rule(1, true)), vec![Vec::new(); 3]);
    }

    #[test]
    fn groups_are_chosen_by_their_two_best_and_the_correction_counts_for_the_choice_alone() {
        let logit = |share: f32| (share / (1.0 - share)).ln();
        // Groups of two: the sums are 1.0, 1.1 and, corrected, 1.2.
        let logits = [0.9, 0.1, 0.6, 0.5, 0.4, 0.3].map(logit);
        let correction = [0.0, 0.0, 0.0, 0.0, 0.0, 0.5];
        let rule = |renormalized| Rule { chosen: 2, renormalized, scores: Scores::Grouped { groups: 3, kept: 2, factor: 2.0 } };
        let found = route(&logits, &correction, 6, rule(false));
        near(&found[2], &[(0, 1.2)]);
        near(&found[5], &[(0, 0.6)]);
        assert!(found[0].is_empty() && found[3].is_empty());
        near(&route(&logits, &correction, 6, rule(true))[2], &[(0, 4.0 / 3.0)]);
    }

    #[test]
    fn gradients_of_shares_go_back_to_logits_as_finite_differences_say() {
        let logits = [0.3f32, -0.7, 1.1, 0.2, 0.9, -0.4];
        let upstream = [0.7f32, -1.3];
        for scores in [Scores::Softmax, Scores::Grouped { groups: 3, kept: 2, factor: 2.5 }] {
            for renormalized in [false, true] {
                let rule = Rule { chosen: 2, renormalized, scores };
                let loss = |logits: &[f32]| -> f64 {
                    let mut choice = Choice::default();
                    choice.make(logits, &[], rule);
                    choice.shares.iter().zip(upstream).map(|(share, d)| f64::from(*share) * f64::from(d)).sum()
                };
                let mut choice = Choice::default();
                choice.make(&logits, &[], rule);
                let mut found = [0.0; 6];
                choice.adjoint(&upstream, rule, &mut found);
                for at in 0..6 {
                    let moved = |step: f32| {
                        let mut logits = logits;
                        logits[at] += step;
                        loss(&logits)
                    };
                    let measured = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                    assert!((measured - f64::from(found[at])).abs() < 2e-4, "{rule:?} {at}: {measured} {}", found[at]);
                }
            }
        }
    }
}
