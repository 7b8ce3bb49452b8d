//! Which experts of a mixture a token goes to, and how much each of them counts.

/// How a router chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Experts per token.
    pub chosen: usize,
    /// Whether the shares of the chosen experts are made to add up to one.
    pub renormalized: bool,
}

/// By expert, the tokens that go to it, ascending, each with the factor of the expert's output: softmax over all experts, of which
/// the largest are taken, the first of equal ones first. `logits` are tokens × experts.
pub fn route(logits: &[f32], experts: usize, rule: Rule) -> Vec<Vec<(usize, f32)>> {
    let mut routed = vec![Vec::new(); experts];
    let mut order: Vec<usize> = Vec::with_capacity(experts);
    let mut shares = vec![0.0f32; experts];
    for (token, logits) in logits.chunks_exact(experts.max(1)).enumerate() {
        let largest = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        shares.iter_mut().zip(logits).for_each(|(share, logit)| *share = (logit - largest).exp());
        let total: f32 = shares.iter().sum();
        order.clear();
        order.extend(0..experts);
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        order.truncate(rule.chosen);
        let kept: f32 = order.iter().map(|&expert| shares[expert]).sum();
        let divisor = if rule.renormalized { kept } else { total };
        for &expert in &order {
            routed[expert].push((token, shares[expert] / divisor));
        }
    }
    routed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_shares_are_chosen_and_equal_ones_by_number() {
        let logits = [0.0, 2f32.ln(), 0.0, 4f32.ln(), 1.0, 1.0, 1.0, 1.0];
        let shares = |renormalized| route(&logits, 4, Rule { chosen: 2, renormalized });
        let near = |found: &[(usize, f32)], expected: &[(usize, f32)]| {
            assert_eq!(found.len(), expected.len());
            found.iter().zip(expected).for_each(|(a, b)| assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-6, "{found:?}"));
        };
        let found = shares(false);
        near(&found[0], &[(1, 0.25)]);
        near(&found[1], &[(0, 0.25), (1, 0.25)]);
        near(&found[2], &[]);
        near(&found[3], &[(0, 0.5)]);
        near(&shares(true)[3], &[(0, 4.0 / 6.0)]);
        near(&shares(true)[1], &[(0, 2.0 / 6.0), (1, 0.5)]);
        assert_eq!(route(&[], 3, Rule { chosen: 1, renormalized: true }), vec![Vec::new(); 3]);
    }
}
