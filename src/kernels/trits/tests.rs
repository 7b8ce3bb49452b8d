//! The fidelity checks of methods-quant §3.4, against a reference that follows the paper word by word in f64.

use proptest::prelude::*;

use super::*;
use crate::matrix::Matrix;

const RULE: Rule = Rule { group: 128, residual_start: false, max_iters: 50, epsilon: 1e-4, absolute: false };

/// Numbers in 0..1 from a counter (SplitMix64).
struct Uniform(u64);

impl Uniform {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn gaussian(count: usize, seed: u64) -> Vec<f32> {
    let mut uniform = Uniform(seed);
    let mut next = || {
        let (radius, angle) = ((-2.0 * (1.0 - uniform.next()).ln()).sqrt(), std::f64::consts::TAU * uniform.next());
        (0.02 * radius * angle.cos()) as f32
    };
    (0..count).map(|_| next()).collect()
}

fn laplace(count: usize, seed: u64) -> Vec<f32> {
    let mut uniform = Uniform(seed);
    let mut next = || {
        let (size, sign) = (-(1.0 - uniform.next()).ln(), if uniform.next() < 0.5 { -1.0 } else { 1.0 });
        (0.02 * size * sign) as f32
    };
    (0..count).map(|_| next()).collect()
}

fn dense(rows: usize, values: Vec<f32>) -> Weight {
    Weight::Dense(Matrix::new(rows, values.len() / rows, values))
}

fn ratio([error, total]: [f64; 2]) -> f64 {
    error / total
}

/// Squared error and squared size, by definition.
fn measured(weight: &[f32], back: &[f32]) -> [f64; 2] {
    let error = |(w, b): (&f32, &f32)| (f64::from(*w) - f64::from(*b)).powi(2);
    [weight.iter().zip(back).map(error).sum(), weight.iter().map(|&w| f64::from(w).powi(2)).sum()]
}

/// Every pair: (0, 0), then sparser pairs, then in lexicographic order.
const LEXICOGRAPHIC: [[f64; 2]; 9] =
    [[0.0, 0.0], [-1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [1.0, 0.0], [-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]];
/// Every pair: (0, 0), then sparser pairs, then the finer plane.
const PINNED: [[f64; 2]; 9] =
    [[0.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]];

/// The nearest pair, the first of equals.
fn nearest(weight: f64, scales: [f64; 2], order: &[[f64; 2]; 9]) -> [f64; 2] {
    let mut best = (order[0], f64::INFINITY);
    for &pair in order {
        let distance = (weight - (scales[0] * pair[0] + scales[1] * pair[1])).abs();
        if distance < best.1 {
            best = (pair, distance);
        }
    }
    best.0
}

/// The paper's loop: scales, squared error, and rounds.
fn reference(weights: &[f32], epsilon: f64) -> ([f64; 2], f64, usize) {
    let weights: Vec<f64> = weights.iter().map(|&weight| f64::from(weight)).collect();
    let sign = |weight: f64| if weight == 0.0 { 0.0 } else { weight.signum() };
    let mut trits: Vec<[f64; 2]> = weights.iter().map(|&weight| [sign(weight); 2]).collect();
    let mut scales = [1.0f64; 2];
    let mut rounds = 0;
    while rounds < 50 {
        rounds += 1;
        let dot = |a: usize, b: usize| trits.iter().map(|pair| pair[a] * pair[b]).sum::<f64>();
        let right = |a: usize| trits.iter().zip(&weights).map(|(pair, weight)| pair[a] * weight).sum::<f64>();
        let (n11, n22, n12) = (dot(0, 0), dot(1, 1), dot(0, 1));
        let mut lambda = 1e-8;
        let determinant = loop {
            let determinant = (n11 * n22 - n12 * n12) + lambda * (n11 + n22) + lambda * lambda;
            let condition = ((n11 + lambda).powi(2) + (n22 + lambda).powi(2) + 2.0 * n12 * n12) / determinant;
            if condition <= 1e6 || lambda >= 1.0 {
                break determinant;
            }
            lambda = (lambda * 10.0).min(1.0);
        };
        let next = [((n22 + lambda) * right(0) - n12 * right(1)) / determinant, ((n11 + lambda) * right(1) - n12 * right(0)) / determinant];
        trits = weights.iter().map(|&weight| nearest(weight, next, &LEXICOGRAPHIC)).collect();
        let moved = ((next[0] - scales[0]).powi(2) + (next[1] - scales[1]).powi(2)).sqrt();
        scales = next;
        if moved < epsilon {
            break;
        }
    }
    let error = trits.iter().zip(&weights).map(|(pair, weight)| (weight - pair[0] * scales[0] - pair[1] * scales[1]).powi(2)).sum();
    (scales, error, rounds)
}

/// A group whose weights all count alike.
fn read(weights: &[f32]) -> Group {
    let mut group = Group::default();
    group.read(weights, None);
    group
}

/// Mean of the relative errors of the groups, mean and largest number of rounds.
fn mean_error(values: &[f32], rule: Rule, stored: Stored) -> (f64, f64, u32) {
    let mut group = Group::default();
    let (mut error, mut rounds, mut most, mut codes) = (0.0, 0, 0, vec![0; rule.group]);
    for weights in values.chunks(rule.group) {
        let (_, change) = fit_group(&mut group, weights, None, rule, stored, &mut codes);
        let (_, taken) = group.fit(rule, stored);
        (error, rounds, most) = (error + ratio(change), rounds + taken, most.max(taken));
    }
    let groups = (values.len() / rule.group) as f64;
    (error / groups, f64::from(rounds) / groups, most)
}

#[test]
fn errors_and_rounds_on_normal_and_laplacian_weights_are_those_measured_for_the_paper() {
    type Make = fn(usize, u64) -> Vec<f32>;
    let table: [(Make, _); 2] = [(gaussian, [0.0264, 0.0279, 0.0280]), (laplace, [0.0369, 0.0413, 0.0442])];
    for (make, errors) in table {
        for (group, expected) in [64, 128, 256].into_iter().zip(errors) {
            let values = make(2000 * group, 11);
            let (error, rounds, most) = mean_error(&values, Rule { group, ..RULE }, Stored::Free);
            assert!((error / expected - 1.0).abs() < 0.03, "group {group}: {error} for {expected}");
            assert!((10.0..19.0).contains(&rounds) && most < 50, "group {group}: {rounds} rounds, at most {most}");
            let (both, _, _) = mean_error(&values, Rule { group, residual_start: true, ..RULE }, Stored::Free);
            assert!(both < error, "the better of two starts: {both} against {error}");
        }
    }
    let values = gaussian(2000 * 128, 12);
    let (error, _, _) = mean_error(&values, RULE, Stored::Free);
    let (_, rounds, most) = mean_error(&values, Rule { absolute: true, ..RULE }, Stored::Free);
    assert!((error - 0.028).abs() < 0.0005 && (rounds - 13.3).abs() < 0.7 && most < 50, "{error} {rounds} {most}");
    let (tied, _, _) = mean_error(&values, RULE, Stored::Tied(Float::BF16));
    assert!((tied - 0.0287).abs() < 0.0006 && tied > error, "{tied}");
}

#[test]
fn the_result_is_that_of_the_paper_followed_word_by_word() {
    for values in [gaussian(300 * 128, 5), laplace(300 * 128, 6)] {
        let (mut own, mut slow, mut same) = (0.0, 0.0, 0);
        for weights in values.chunks(128) {
            let group = read(weights);
            let (scales, rounds) = group.fit(RULE, Stored::Free);
            let mean = weights.iter().map(|weight| f64::from(weight.abs())).sum::<f64>() / 128.0;
            let (expected, error, expected_rounds) = reference(weights, 1e-4 * mean);
            let (high, low) = (expected[0].abs().max(expected[1].abs()), expected[0].abs().min(expected[1].abs()));
            let close = |a: f32, b: f64| (f64::from(a) / b - 1.0).abs() < 1e-3;
            same += u32::from(close(scales[0], high) && close(scales[1], low) && rounds as usize == expected_rounds);
            let mut codes = vec![0; 128];
            own += fit_group(&mut Group::default(), weights, None, RULE, Stored::Free, &mut codes).1[0];
            slow += error;
        }
        assert!(same >= 297, "{same} of 300 groups");
        assert!((own / slow - 1.0).abs() < 1e-3, "{own} {slow}");
    }
}

#[test]
fn a_small_group_is_fitted_as_by_hand() {
    // Sign start: both scales 10/8, so 1 lies between 0.625 and 1.875 and goes to plane 2, 4 to both. Then
    // SᵀS = [2 2; 2 4] and Sᵀw = (8, 10): α = (3, 1), which leaves nothing over.
    let (trits, change) = fit_free(&dense(1, vec![4.0, -4.0, 1.0, 0.0, 1.0]), Rule { group: 5, ..RULE }, None);
    assert_eq!((&trits.scales[..], &trits.codes[..]), (&[[3.0, 1.0]][..], &[8u8, 0, 5, 4, 5][..]));
    assert_eq!(change[1], 34.0);
    assert!(change[0] < 1e-9);
}

#[test]
fn one_ternary_plane_is_recovered_exactly_and_two_planes_by_the_residual_start() {
    for residual_start in [false, true] {
        for scale in [1.0f32, 0.0078125, 0.75, 48.0] {
            let values: Vec<f32> = (0..256).map(|i| scale * ((i * 7 % 5) % 3 - 1) as f32).collect();
            let (trits, [error, _]) = fit_free(&dense(2, values.clone()), Rule { residual_start, ..RULE }, None);
            assert_eq!(trits.to_matrix().data, values, "{scale} {:?}", trits.scales);
            assert_eq!(error, 0.0);
        }
    }
    let mut uniform = Uniform(3);
    let mut trit = || ((uniform.next() * 3.0) as i32 - 1) as f32;
    let values: Vec<f32> = (0..1280).map(|_| 0.75 * trit() + 0.25 * trit()).collect();
    let (_, [error, total]) = fit_free(&dense(10, values), Rule { residual_start: true, ..RULE }, None);
    assert!(error < 1e-6 * total, "{}", error / total);
}

#[test]
fn the_error_never_rises_and_ends_below_that_of_the_best_single_plane() {
    for (values, importance) in [(gaussian(600 * 100, 1), None), (laplace(600 * 100, 2), Some(importance(100, 4)))] {
        for weights in values.chunks(100) {
            let mut group = Group::default();
            group.read(weights, importance.as_deref());
            let whole = group.above([0.0, f32::INFINITY, f32::INFINITY, f32::INFINITY]);
            let mut statistics = group.sign_start(&whole, Stored::Free);
            let mut before = f64::INFINITY;
            for _ in 0..50 {
                let scales = statistics.ridge();
                statistics = group.search(scales);
                let now = statistics.change_of_error(scales);
                assert!(now <= before + 1e-6 * group.squares, "{now} after {before}");
                before = now;
            }
            if importance.is_none() {
                let (_, [error, total]) = fit_group(&mut group, weights, None, RULE, Stored::Free, &mut [0; 100]);
                let mut sorted: Vec<f64> = weights.iter().map(|weight| f64::from(weight.abs())).collect();
                sorted.sort_by(|a, b| b.total_cmp(a));
                let mut sum = 0.0;
                let gain = |(index, value): (usize, &f64)| {
                    sum += value;
                    sum * sum / (index + 1) as f64
                };
                let single = total - sorted.iter().enumerate().map(gain).fold(0.0, f64::max);
                assert!(error <= single, "{error} {single}");
            }
        }
    }
}

fn importance(columns: usize, seed: u64) -> Vec<f32> {
    let mut uniform = Uniform(seed);
    (0..columns).map(|_| (4.0 * uniform.next() - 2.0).exp() as f32).collect()
}

#[test]
fn a_group_has_at_most_nine_values_symmetric_about_zero() {
    let (trits, _) = fit_free(&dense(40, laplace(40 * 256, 8)), RULE, None);
    for (scales, (codes, values)) in trits.scales.iter().zip(trits.codes.chunks(128).zip(trits.to_matrix().data.chunks(128))) {
        assert!(scales[0] >= scales[1] && scales[1] >= 0.0);
        for (&code, &value) in codes.iter().zip(values) {
            let [coarse, fine] = Trits::pair(code).map(f32::from);
            assert_eq!(value, coarse * scales[0] + fine * scales[1]);
        }
    }
}

#[test]
fn tied_codes_decode_to_the_floats_of_the_trits() {
    let weight = dense(30, gaussian(30 * 200, 9));
    for float in [Float::BF16, Float::F16] {
        let rule = Rule { group: 64, residual_start: true, ..RULE };
        let (ints, change) = fit_tied(&weight, rule, None, float);
        let scales = ints.scales.iter().map(|&scale| [3.0 * scale, scale]).collect();
        let codes = ints.codes.iter().map(|&code| code - 4).collect();
        let trits = Trits { rows: 30, columns: 200, group: 64, codes, scales, scale_float: float };
        assert!(trits.codes.iter().all(|&code| code <= 8));
        assert_eq!(ints.to_matrix(), trits.to_matrix());
        let [error, total] = measured(&weight.to_matrix().data, &ints.to_matrix().data);
        assert!((change[0] / error - 1.0).abs() < 1e-5 && (change[1] / total - 1.0).abs() < 1e-5);
    }
}

#[test]
fn pruned_weights_stay_zero_and_do_not_count() {
    let mut uniform = Uniform(21);
    let mut entry = |_| (uniform.next() * 200.0 - 100.0).round() as f32 / 64.0;
    let kept: Vec<f32> = (0..64).map(&mut entry).map(|value| if value == 0.0 { 1.0 } else { value }).collect();
    let spread: Vec<f32> = kept.iter().flat_map(|&value| [0.0, value]).collect();
    let alone = fit_free(&dense(1, kept), Rule { group: 64, ..RULE }, None).0;
    let matrix = Matrix::new(1, 128, spread.clone());
    let sparse = Weight::Sparse(crate::weight::Sparse { matrix, pattern: crate::weight::Pattern::Unstructured });
    for residual_start in [false, true] {
        let rule = Rule { residual_start, ..RULE };
        let alone = if residual_start { fit_free(&alone_of(&spread), Rule { group: 64, ..rule }, None).0 } else { alone.clone() };
        let (pruned, _) = fit_free(&sparse, rule, None);
        assert_eq!(pruned.scales, alone.scales);
        assert!(pruned.codes.iter().step_by(2).all(|&code| code == crate::weight::trits::ZERO));
        assert_eq!(pruned.codes.iter().skip(1).step_by(2).copied().collect::<Vec<_>>(), alone.codes);
        assert!(fit_tied(&sparse, rule, None, Float::BF16).0.codes.iter().step_by(2).all(|&code| code == 8));
    }
}

/// The weights at odd places.
fn alone_of(spread: &[f32]) -> Weight {
    dense(1, spread.iter().skip(1).step_by(2).copied().collect())
}

#[test]
fn importance_lowers_the_error_that_it_weighs_and_even_importance_changes_nothing() {
    let values = laplace(200 * 128, 13);
    let weight = dense(200, values.clone());
    let importance = importance(128, 14);
    let weighed = |trits: &Trits| -> f64 {
        let errors = values.iter().zip(trits.to_matrix().data).map(|(a, b)| f64::from(a - b).powi(2));
        errors.zip(importance.iter().cycle()).map(|(error, &one)| error * f64::from(one)).sum()
    };
    for residual_start in [false, true] {
        let rule = Rule { residual_start, ..RULE };
        let plain = fit_free(&weight, rule, None).0;
        let with = fit_free(&weight, rule, Some(&importance)).0;
        assert!(weighed(&with) < 0.97 * weighed(&plain), "{} {}", weighed(&with), weighed(&plain));
        for even in [1.0, 4.0, 0.0] {
            assert_eq!(fit_free(&weight, rule, Some(&[even; 128])).0, plain, "{even}");
        }
    }
}

#[test]
fn hostile_values_give_finite_results() {
    let hostile = vec![
        vec![0.0; 20],
        vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0, -1.0, 0.5, 0.25, f32::NAN],
        vec![f32::MAX, -f32::MAX, f32::MAX, 1.0, f32::MIN_POSITIVE],
        vec![1e-45, -1e-45, 1e-44, 0.0],
        vec![1e-9; 33],
        vec![3e38, 1e-38],
        vec![-7.0],
    ];
    for values in hostile {
        let weight = dense(1, values.clone());
        for (residual_start, importance) in
            [(false, None), (true, None), (true, Some(vec![0.0; values.len()])), (true, Some(importance(values.len(), 1)))]
        {
            let rule = Rule { group: 16, residual_start, ..RULE };
            let (trits, change) = fit_free(&weight, rule, importance.as_deref());
            let tied = Float::F32;
            let (ints, tied_change) = fit_tied(&weight, rule, importance.as_deref(), tied);
            assert!(change.iter().chain(&tied_change).all(|sum| sum.is_finite()), "{values:?} {change:?} {tied_change:?}");
            for (matrix, name) in [(trits.to_matrix(), "free"), (ints.to_matrix(), "tied")] {
                for (&weight, &back) in values.iter().zip(&matrix.data) {
                    assert!(back.is_finite(), "{name} {values:?} {matrix:?}");
                    assert!((weight.is_finite() && weight != 0.0) || back == 0.0, "{name} {values:?} {matrix:?}");
                }
            }
            assert!(ints.scales.iter().all(|&scale| scale != 0.0) && ints.codes.iter().all(|code| (4..=12).contains(code)));
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads_or_the_form_of_the_weight() {
    let values = gaussian(37 * 300, 17);
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let decode = |_: Float, bytes: &[u8], out: &mut [f32]| {
        for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *value = f32::from_le_bytes(*bytes);
        }
    };
    let stored = crate::weight::Stored { rows: 37, columns: 300, float: Float::F32, bytes: std::sync::Arc::new(bytes), decode };
    let rule = Rule { residual_start: true, ..RULE };
    let of = |weight: &Weight, threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| fit_free(weight, rule, None))
    };
    let first = of(&dense(37, values.clone()), 1);
    assert_eq!(first.0.scales.len(), 37 * 3, "the last group of a row is short");
    for threads in 1..4 {
        assert_eq!(of(&dense(37, values.clone()), threads), first);
        assert_eq!(of(&Weight::Stored(stored.clone()), threads), first);
    }
}

proptest! {
    #[test]
    fn the_code_is_that_of_the_nearest_of_nine_and_ties_go_as_they_are_pinned(
        coarse in 0u8..40, fine in 0u8..40, weights in proptest::collection::vec(-200i16..200, 1..80)
    ) {
        let scales = [f64::from(coarse.max(fine)) / 16.0, f64::from(coarse.min(fine)) / 16.0];
        let weights: Vec<f32> = weights.iter().map(|&weight| f32::from(weight) / 32.0).collect();
        let magnitudes: Vec<f32> = weights.iter().map(|weight| weight.abs()).collect();
        let mut codes = vec![0; weights.len()];
        let levels = Levels::new(scales);
        let error = assign(&magnitudes, &weights, &levels, &mut codes);
        let mut expected = 0.0;
        for (&weight, &code) in weights.iter().zip(&codes) {
            let pair = nearest(f64::from(weight), scales, &PINNED);
            prop_assert_eq!(Trits::pair(code).map(f64::from), pair, "{} of {:?}", weight, scales);
            expected += (f64::from(weight) - pair[0] * scales[0] - pair[1] * scales[1]).powi(2);
        }
        prop_assert!((error - expected).abs() <= 1e-5 * expected + 1e-9);
    }

    #[test]
    fn no_other_pair_is_nearer(coarse in 0.0f32..1.0, share in 0.0f32..=1.0, weights in proptest::collection::vec(-2.0f32..2.0, 1..40)) {
        let scales = [coarse, coarse * share].map(f64::from);
        let magnitudes: Vec<f32> = weights.iter().map(|weight| weight.abs()).collect();
        let mut codes = vec![0; weights.len()];
        assign(&magnitudes, &weights, &Levels::new(scales), &mut codes);
        for (&weight, &code) in weights.iter().zip(&codes) {
            let [first, second] = Trits::pair(code).map(f64::from);
            let pair = nearest(f64::from(weight), scales, &PINNED);
            let distance = |pair: [f64; 2]| (f64::from(weight) - pair[0] * scales[0] - pair[1] * scales[1]).abs();
            prop_assert!(distance([first, second]) <= distance(pair) + 1e-15);
        }
    }

    #[test]
    fn sums_of_a_search_are_those_of_its_codes(seed in 0u64..1000, length in 1usize..700) {
        let weights = gaussian(length, seed);
        let group = read(&weights);
        let (scales, _) = group.fit(RULE, Stored::Free);
        let scales = scales.map(|scale| f64::from(scale) * group.factor);
        let found = group.search(scales);
        let mut codes = vec![0; length];
        assign(&group.magnitudes, &weights, &Levels::new(scales), &mut codes);
        for (index, pair) in PAIRS.iter().enumerate() {
            let of_pair = |code: u8| Trits::pair(code).map(f64::from);
            let takes = |code: u8| of_pair(code) == *pair || of_pair(code).map(|trit| -trit) == *pair;
            let magnitudes: Vec<f64> =
                codes.iter().zip(&weights).filter(|(code, _)| takes(**code)).map(|(_, weight)| f64::from(weight.abs()) * group.factor).collect();
            prop_assert_eq!(found.counts[index], magnitudes.len() as f64);
            prop_assert!((found.sums[index] - magnitudes.iter().sum::<f64>()).abs() < 1e-4 * length as f64);
        }
    }

    #[test]
    fn powers_of_two_and_a_change_of_sign_change_nothing_else(seed in 0u64..1000, power in -3i32..6) {
        let weights = laplace(128, seed);
        let rule = Rule { residual_start: true, ..RULE };
        let other = fit_free(&dense(1, weights.iter().map(|weight| -weight * 2f32.powi(power)).collect()), rule, None).0;
        let one = fit_free(&dense(1, weights), rule, None).0;
        prop_assert_eq!(one.scales[0].map(|scale| scale * 2f32.powi(power)), other.scales[0]);
        prop_assert!(one.codes.iter().zip(&other.codes).all(|(one, other)| one + other == 8));
    }
}
