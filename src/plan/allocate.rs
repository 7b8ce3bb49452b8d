//! Which layer gets which way of storage under a limit on the sum of sizes: the multiple-choice knapsack. Exact by dynamic
//! programming over undominated sums; where these become too many, by a Lagrangian and improvements of what it leaves.

/// One way to store a group of layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Its size.
    pub size: u64,
    /// What it costs the model.
    pub cost: f64,
}

/// A choice for every group.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// By group.
    pub choices: Vec<usize>,
    /// Sum of sizes.
    pub size: u64,
    /// Sum of costs.
    pub cost: f64,
    /// Whether nothing better exists.
    pub exact: bool,
}

/// Undominated sums that one step may hold, and all steps together.
const MOST: [usize; 2] = [1 << 16, 1 << 24];

/// The cheapest choices whose sizes sum up to at most `limit`; `None` where even the smallest do not fit. Of equal costs the
/// smaller size wins.
///
/// # Panics
/// When a group has no choice.
pub fn allocate(groups: &[Vec<Choice>], limit: u64) -> Option<Allocation> {
    let smallest: Vec<u64> = groups.iter().map(|group| group.iter().map(|choice| choice.size).min().expect("a choice")).collect();
    if smallest.iter().sum::<u64>() > limit {
        return None;
    }
    Some(exact(groups, &smallest, limit, MOST).unwrap_or_else(|| lagrangian(groups, limit)))
}

/// A sum of sizes and costs, and how it came about.
#[derive(Debug, Clone, Copy)]
struct Sum {
    size: u64,
    cost: f64,
    before: u32,
    choice: u16,
}

fn exact(groups: &[Vec<Choice>], smallest: &[u64], limit: u64, [most, most_together]: [usize; 2]) -> Option<Allocation> {
    let mut rest: u64 = smallest.iter().sum();
    let mut steps: Vec<Vec<Sum>> = vec![vec![Sum { size: 0, cost: 0.0, before: 0, choice: 0 }]];
    let mut together = 0;
    for (group, smallest) in groups.iter().zip(smallest) {
        rest -= smallest;
        let last = steps.last()?;
        let mut sums: Vec<Sum> = Vec::new();
        for (choice, of) in group.iter().enumerate() {
            let more = last.iter().enumerate().map(|(before, sum)| Sum {
                size: sum.size + of.size,
                cost: sum.cost + of.cost,
                before: before as u32,
                choice: choice as u16,
            });
            sums.extend(more.filter(|sum| sum.size + rest <= limit));
        }
        sums.sort_by(|a, b| a.size.cmp(&b.size).then(a.cost.total_cmp(&b.cost)));
        let mut lowest = f64::INFINITY;
        sums.retain(|sum| {
            sum.cost < lowest && {
                lowest = sum.cost;
                true
            }
        });
        together += sums.len();
        if sums.len() > most || together > most_together {
            return None;
        }
        steps.push(sums);
    }
    let (mut at, end) = steps.last()?.iter().enumerate().min_by(|(_, a), (_, b)| a.cost.total_cmp(&b.cost).then(a.size.cmp(&b.size)))?;
    let (size, cost) = (end.size, end.cost);
    let mut choices = Vec::new();
    for step in steps[1..].iter().rev() {
        choices.push(usize::from(step[at].choice));
        at = step[at].before as usize;
    }
    choices.reverse();
    Some(Allocation { choices, size, cost, exact: true })
}

/// The best choices at a price per unit of size, for the lowest price that fits; then whatever still fits is bought where it
/// saves most.
fn lagrangian(groups: &[Vec<Choice>], limit: u64) -> Allocation {
    let at_price = |price: f64| -> Vec<usize> {
        let total = |choice: &Choice| choice.cost + price * choice.size as f64;
        let best = |group: &Vec<Choice>| (0..group.len()).min_by(|&a, &b| total(&group[a]).total_cmp(&total(&group[b]))).unwrap_or(0);
        groups.iter().map(best).collect()
    };
    let size = |choices: &[usize]| groups.iter().zip(choices).map(|(group, &choice)| group[choice].size).sum::<u64>();
    let smallest = |group: &Vec<Choice>| (0..group.len()).min_by_key(|&choice| group[choice].size).unwrap_or(0);
    let mut choices: Vec<usize> = groups.iter().map(smallest).collect();
    let (mut low, mut high) = (1e-40f64, 1e40f64);
    for _ in 0..300 {
        let price = (low.ln() / 2.0 + high.ln() / 2.0).exp();
        let found = at_price(price);
        if size(&found) <= limit {
            (high, choices) = (price, found);
        } else {
            low = price;
        }
    }
    while let Some((group, choice)) = improvement(groups, &choices, limit - size(&choices)) {
        choices[group] = choice;
    }
    let cost = groups.iter().zip(&choices).map(|(group, &choice)| group[choice].cost).sum();
    Allocation { size: size(&choices), choices, cost, exact: false }
}

/// The change of one group that saves most and fits into `room`.
fn improvement(groups: &[Vec<Choice>], choices: &[usize], room: u64) -> Option<(usize, usize)> {
    let mut best: Option<(f64, usize, usize)> = None;
    for (number, (group, &now)) in groups.iter().zip(choices).enumerate() {
        for (other, choice) in group.iter().enumerate() {
            let saved = group[now].cost - choice.cost;
            let fits = choice.size <= group[now].size.saturating_add(room);
            if fits && saved > 0.0 && best.is_none_or(|(most, ..)| saved > most) {
                best = Some((saved, number, other));
            }
        }
    }
    best.map(|(_, group, choice)| (group, choice))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn brute_force(groups: &[Vec<Choice>], limit: u64) -> Option<f64> {
        let count: usize = groups.iter().map(Vec::len).product();
        let all = (0..count).filter_map(|mut code| {
            let (mut size, mut cost) = (0, 0.0);
            for group in groups {
                let choice = group[code % group.len()];
                (size, cost, code) = (size + choice.size, cost + choice.cost, code / group.len());
            }
            (size <= limit).then_some(cost)
        });
        all.min_by(f64::total_cmp)
    }

    fn group() -> impl Strategy<Value = Vec<Choice>> {
        proptest::collection::vec((1u64..40, 0u32..1000).prop_map(|(size, cost)| Choice { size, cost: f64::from(cost) / 7.0 }), 3)
    }

    proptest! {
        #[test]
        fn four_layers_of_three_options_are_allocated_as_brute_force_does(groups in proptest::collection::vec(group(), 4), limit in 4u64..160) {
            let found = allocate(&groups, limit);
            match brute_force(&groups, limit) {
                None => prop_assert!(found.is_none()),
                Some(cost) => {
                    let found = found.unwrap();
                    let sum: u64 = groups.iter().zip(&found.choices).map(|(group, &choice)| group[choice].size).sum();
                    prop_assert!(found.exact && found.size == sum && sum <= limit && (found.cost - cost).abs() < 1e-9);
                    // The other way keeps the limit and is never better.
                    let other = lagrangian(&groups, limit);
                    prop_assert!(other.size <= limit && other.cost >= cost - 1e-9);
                }
            }
        }
    }

    #[test]
    fn too_many_sums_are_left_to_the_lagrangian_which_comes_close() {
        let choice = |group: u64, bits: u64| Choice {
            size: (1_000_003 + 7919 * group * group) * bits + 97 * group * bits * bits,
            cost: (group % 7 + 1) as f64 * 4f64.powi(-(bits as i32)),
        };
        let groups: Vec<Vec<Choice>> = (0..60).map(|group| [2, 3, 4, 8].map(|bits| choice(group, bits)).to_vec()).collect();
        let limit = groups.iter().map(|group| group[1].size).sum::<u64>() * 7 / 6;
        let smallest: Vec<u64> = groups.iter().map(|group| group[0].size).collect();
        assert!(exact(&groups, &smallest, limit, [1 << 10, 1 << 20]).is_none());
        let (best, close) = (allocate(&groups, limit).unwrap(), lagrangian(&groups, limit));
        assert!(close.cost >= best.cost - 1e-12 && close.cost < 1.02 * best.cost, "{} {}", close.cost, best.cost);
    }
}
