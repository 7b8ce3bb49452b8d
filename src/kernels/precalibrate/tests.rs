//! Tests of statistical pre-calibration: the fidelity checks of methods-quant §4 and the figures of §4.2.

use super::*;
use crate::kernels::quantize::{round_to_nearest, round_to_nearest_within};
use crate::weight::Ints;

/// Evenly distributed numbers in 0..1, never 0.
struct Uniform(u64);

impl Uniform {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.next().ln()).sqrt() * (std::f64::consts::TAU * self.next()).cos()
    }

    fn laplace(&mut self) -> f64 {
        let side = self.next() - 0.5;
        -(1.0 - 2.0 * side.abs()).ln().copysign(side)
    }

    /// Student's t with three degrees of freedom.
    fn student(&mut self) -> f64 {
        let squares: f64 = (0..3).map(|_| self.normal().powi(2)).sum();
        self.normal() / (squares / 3.0).sqrt()
    }
}

fn drawn(rows: usize, columns: usize, draw: fn(&mut Uniform) -> f64) -> Matrix {
    let mut uniform = Uniform(7);
    Matrix::from_fn(rows, columns, |_, _| draw(&mut uniform) as f32)
}

fn grid(bits: u8, symmetric: bool) -> Grid {
    Grid { bits, group: 128, symmetric, scale_float: Float::BF16 }
}

fn outlier_mask(weights: &[f32], theta: f32) -> Vec<bool> {
    weights.iter().map(|weight| weight.abs() > theta).collect()
}

fn exact_error(weight: &[f32], ints: &Ints) -> f64 {
    weight.iter().zip(&ints.to_matrix().data).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

#[test]
fn the_threshold_leaves_the_asked_share_of_outliers_and_scales_with_the_weight() {
    for draw in [Uniform::normal, Uniform::laplace, Uniform::student] {
        let weight = drawn(64, 1000, draw);
        for share in [0.0, 0.01, 0.05, 0.09, 0.5] {
            let theta = threshold(&weight.data, share, false).unwrap();
            let mask = outlier_mask(&weight.data, theta);
            let mean = mask.iter().filter(|&&outlier| outlier).count() as f64 / 64_000.0;
            assert!((mean - share).abs() < 1e-3, "{mean} {share}");
            for factor in [0.25f32, 0.3, 1e-6, 7e4] {
                let scaled: Vec<f32> = weight.data.iter().map(|weight| factor * weight).collect();
                let scaled_theta = threshold(&scaled, share, false).unwrap();
                assert_eq!(scaled_theta, factor * theta, "the root of λ' scales with the weight");
                assert_eq!(outlier_mask(&scaled, scaled_theta), mask);
            }
        }
    }
}

#[test]
fn zeros_are_core_pruned_ones_do_not_count_and_what_is_not_finite_is_refused() {
    let mut weights = vec![0.0f32; 1000];
    (0..100).for_each(|index| weights[index * 10] = (index + 1) as f32 * if index % 2 == 0 { 1.0 } else { -1.0 });
    assert_eq!(threshold(&weights, 0.05, false), Some(50.0));
    assert_eq!(threshold(&weights, 0.05, true), Some(95.0));
    assert_eq!(threshold(&weights, 0.2, false), Some(0.0));
    assert_eq!(threshold(&[0.0, -0.0, 0.0], 0.3, true), Some(0.0));
    assert_eq!(threshold(&[], 0.3, false), Some(0.0));
    assert_eq!(threshold(&[f32::MAX, -1e-45, 0.0], 0.34, false), Some(1e-45));
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        weights[3] = wrong;
        assert_eq!(threshold(&weights, 0.05, false), None);
        assert_eq!(precalibrate(&Matrix::new(10, 100, weights.clone()), grid(4, true), 0.05, false), None);
        assert_eq!(precalibrate(&Matrix::new(10, 100, weights.clone()), grid(4, true), 0.0, false), None);
    }
}

/// Relative error of the split with no outliers (the plain symmetric grid) and with 5 %.
fn split_errors(weight: &Matrix, bits: u8) -> [f64; 2] {
    [0.0, 0.05].map(|share| {
        let theta = threshold(&weight.data, share, false).unwrap();
        let (split, [error, total]) = split(weight, theta, bits, 128, 0);
        let measured: f64 = weight.data.iter().zip(&split.to_matrix().data).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        assert!((measured - error).abs() < 1e-6 * total);
        error / total
    })
}

#[test]
fn splitting_reaches_the_errors_of_the_specification() {
    for (draw, bits, plain, apart, tolerance) in [
        (Uniform::normal as fn(&mut Uniform) -> f64, 3, 0.0748, 0.0348, 0.02),
        (Uniform::normal, 4, 0.0137, 0.0064, 0.02),
        (Uniform::laplace, 3, 0.126, 0.041, 0.03),
        (Uniform::student, 4, 0.050, 0.0080, 0.15),
    ] {
        let found = split_errors(&drawn(512, 1024, draw), bits);
        for (found, expected) in found.into_iter().zip([plain, apart]) {
            assert!((found / expected - 1.0).abs() < tolerance, "{bits} bits: {found} for {expected}");
        }
    }
}

#[test]
fn a_split_holds_its_outliers_by_magnitude_and_pruned_and_huge_weights_stay_sane() {
    let weight =
        Matrix::new(2, 9, [0.1, -0.2, 0.3, 8.0, 0.0, -0.3, -4.0, 0.14, 0.0, 3e38, 0.0, 1e-45, 1.0, -3e38, 0.0, 0.0, 0.0, 0.0].to_vec());
    let (split, sums) = split(&weight, 0.3, 3, 8, 0);
    let outliers: Vec<usize> = (0..9).filter(|&column| split.is_outlier(0, column)).collect();
    assert_eq!(outliers, [3, 6]);
    assert_eq!(split.codes[..9], [5, 2, 7, 7, 4, 1, 2, 5, 4], "the scales 0.1 and 8/3 are a little less in f16");
    assert!(sums.iter().all(|sum| sum.is_finite()));
    for (exact, back) in weight.data.iter().zip(&split.to_matrix().data) {
        assert!(back.is_finite() && (*exact != 0.0 || *back == 0.0), "{exact} {back}");
    }
}

#[test]
fn without_outliers_ranges_are_whole_and_rounding_within_them_is_plain_rounding_bit_for_bit() {
    for draw in [Uniform::normal, Uniform::student, |uniform: &mut Uniform| uniform.next() + 0.1, |uniform: &mut Uniform| -uniform.next()] {
        let weight = drawn(16, 300, draw);
        for (bits, symmetric) in [(2, true), (2, false), (3, true), (4, false), (8, true), (8, false)] {
            let bounds = precalibrate(&weight, grid(bits, symmetric), 0.0, false).unwrap();
            let within = round_to_nearest_within(&weight, grid(bits, symmetric), &bounds);
            assert_eq!(within, round_to_nearest(&weight, grid(bits, symmetric)));
        }
    }
}

#[test]
fn heavy_tailed_groups_are_clipped_and_with_many_bits_light_tails_are_not() {
    let shrink = |weight: &Matrix, bits| {
        let bounds = precalibrate(weight, grid(bits, true), 0.05, false).unwrap();
        let whole = precalibrate(weight, grid(bits, true), 0.0, false).unwrap();
        bounds.high.iter().sum::<f32>() / whole.high.iter().sum::<f32>()
    };
    let (normal, student) = (drawn(64, 1024, Uniform::normal), drawn(64, 1024, Uniform::student));
    let even = drawn(64, 1024, |uniform| uniform.next() - 0.5);
    assert!(shrink(&student, 3) < 0.75 && shrink(&student, 3) < shrink(&normal, 3), "{} {}", shrink(&student, 3), shrink(&normal, 3));
    assert!(shrink(&even, 8) > 0.97, "{}", shrink(&even, 8));
}

#[test]
fn constant_and_empty_groups_keep_their_range_and_extreme_ones_stay_finite() {
    let mut data = vec![0.0f32; 128];
    data.extend([0.5; 128]);
    data.extend([-0.25; 128]);
    data.extend((0..128).map(|index| if index % 3 == 0 { 3e38 } else { -2e38 }));
    data.extend((0..128).map(|index| index as f32 * 1e-45));
    data.extend((0..128).map(|index| if index == 5 { 1e-20 } else { 0.0 }));
    let weight = Matrix::new(2, 384, data);
    for (bits, symmetric) in [(2, true), (2, false), (4, true), (8, false)] {
        for (outliers, pruned) in [(0.05, false), (0.05, true), (0.5, false), (0.5, true)] {
            let bounds = precalibrate(&weight, grid(bits, symmetric), outliers, pruned).unwrap();
            assert_eq!((bounds.low[..3].to_vec(), bounds.high[..3].to_vec()), (vec![0.0, 0.0, -0.25], vec![0.0, 0.5, 0.0]));
            assert!(bounds.low.iter().chain(&bounds.high).all(|end| end.is_finite()));
            assert!(bounds.low.iter().all(|&low| low <= 0.0) && bounds.high.iter().all(|&high| high >= 0.0));
            let (ints, sums) = round_to_nearest_within(&weight, grid(bits, symmetric), &bounds);
            assert!(ints.to_matrix().data.iter().all(|value| value.is_finite()) && sums.iter().all(|sum| sum.is_finite()));
        }
    }
}

#[test]
fn pruned_entries_change_nothing_but_the_share() {
    let full = drawn(64, 128, Uniform::laplace);
    let sparse = Matrix::from_fn(64, 256, |row, column| if column % 2 == 0 { full.row(row)[column / 2] } else { 0.0 });
    let wide = Grid { group: 256, ..grid(3, true) };
    let expected = precalibrate(&full, grid(3, true), 0.05, false).unwrap();
    let found = precalibrate(&sparse, wide, 0.05, true).unwrap();
    assert_eq!((found.low, found.high), (expected.low, expected.high));
}

#[test]
fn ranges_scale_with_the_weight_and_do_not_depend_on_the_number_of_threads() {
    let weight = drawn(96, 512, Uniform::student);
    let found = precalibrate(&weight, grid(3, false), 0.05, false).unwrap();
    let scaled = Matrix::new(96, 512, weight.data.iter().map(|weight| 0.25 * weight).collect());
    let of_scaled = precalibrate(&scaled, grid(3, false), 0.05, false).unwrap();
    assert!(of_scaled.low.iter().zip(&found.low).all(|(a, b)| *a == 0.25 * b));
    assert!(of_scaled.high.iter().zip(&found.high).all(|(a, b)| *a == 0.25 * b));
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(|| precalibrate(&weight, grid(3, false), 0.05, false)).unwrap(), found);
    }
}

#[test]
fn the_divergence_is_that_of_the_smoothed_shares_by_hand() {
    let (p, q): (Vec<u32>, Vec<u32>) = (vec![3, 1, 0], vec![1, 3, 0]);
    let expected = 0.75 * 3f64.ln() + 0.25 * (1.0f64 / 3.0).ln();
    assert!((divergence(&p, &q, 4) - expected).abs() < 1e-5);
    assert_eq!(divergence(&p, &p, 4), 0.0);
    assert!(divergence(&[1, 1], &[2, 0], 2) > 5.0, "a bin that lost its weights costs much, but not everything");
    let mut values = [0.5; RATIOS];
    (values[3], values[20]) = (0.25, 0.25);
    assert_eq!(ranking(&values)[..3], [3, 20, 0]);
    let mut counts = vec![0; BINS];
    count_bins(&[-1.0, -2.0, 0.0, 0.9999, 1.0, 5.0], 1.0, &mut counts);
    assert_eq!((counts[0], counts[BINS / 2], counts[BINS - 1]), (2, 1, 3));
}

#[test]
fn divergences_are_those_of_the_definition() {
    let weight = drawn(8, 256, Uniform::laplace);
    let theta = threshold(&weight.data, 0.05, false).unwrap();
    let found = divergences(&weight, grid(3, false), theta, false);
    let whole = precalibrate(&weight, grid(3, false), 0.0, false).unwrap();
    let bin = |value: f32| ((value * (1024.0 / theta) + 1024.0) as i32).clamp(0, 2047) as usize;
    for (index, found) in found.iter().enumerate() {
        let shrunk = |ends: &[f32]| ends.iter().map(|end| end * ratio(index)).collect();
        let bounds = Bounds { group: 128, low: shrunk(&whole.low), high: shrunk(&whole.high) };
        let rounded = round_to_nearest_within(&weight, grid(3, false), &bounds).0.to_matrix();
        let (mut p, mut q, mut count) = (vec![1e-6; 2048], vec![1e-6; 2048], 0.0);
        weight.data.iter().filter(|weight| weight.abs() <= theta).for_each(|_| count += 1.0);
        for (&exact, &rounded) in weight.data.iter().zip(&rounded.data).filter(|(weight, _)| weight.abs() <= theta) {
            p[bin(exact)] += 1.0 / count;
            q[bin(rounded)] += 1.0 / count;
        }
        let expected: f64 = p.iter().zip(&q).map(|(p, q): (&f64, &f64)| p * (p / q).ln()).sum();
        assert!((found - expected).abs() < 1e-6 * expected, "{found} {expected}");
    }
}

proptest::proptest! {
    #[test]
    fn the_outliers_are_the_largest_magnitudes(values in proptest::collection::vec(0.001f32..9.0, 1..300), share in 0.0f64..0.5) {
        let mut weights: Vec<f32> = values.iter().enumerate().map(|(index, value)| if index % 2 == 0 { *value } else { -value }).collect();
        weights.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
        weights.dedup_by(|a, b| a.abs() == b.abs());
        let count = (weights.len() as f64 * share).round() as usize;
        let theta = threshold(&weights, share, false).unwrap();
        let mask = outlier_mask(&weights, theta);
        proptest::prop_assert!(mask.iter().enumerate().all(|(index, &outlier)| outlier == (index >= weights.len() - count)));
    }

    #[test]
    fn no_range_raises_the_error_of_a_group_by_more_than_a_twentieth_over_the_best(
        seed in 0u64.., bits in 2u8..=8, symmetric in proptest::bool::ANY, group in 5usize..90, power in 1i32..5, half in proptest::bool::ANY
    ) {
        let mut uniform = Uniform(seed);
        let weight = Matrix::from_fn(4, 100, |_, _| (uniform.normal().powi(power) + 0.3 * uniform.next()) as f32);
        let grid = Grid { bits, group, symmetric, scale_float: if half { Float::F16 } else { Float::BF16 } };
        let found = precalibrate(&weight, grid, 0.05, false).unwrap();
        let groups = 100usize.div_ceil(group);
        for (at, (&low, &high)) in found.low.iter().zip(&found.high).enumerate() {
            let weights = &weight.row(at / groups)[at % groups * group..];
            let weights = &weights[..group.min(weights.len())];
            let (lowest, highest) = weights.iter().fold((0.0f32, 0.0f32), |(low, high), &weight| (low.min(weight), high.max(weight)));
            let one = Grid { group: weights.len(), ..grid };
            let error = |low, high| {
                let bounds = Bounds { group: weights.len(), low: vec![low], high: vec![high] };
                exact_error(weights, &round_to_nearest_within(&Matrix::new(1, weights.len(), weights.to_vec()), one, &bounds).0)
            };
            let least = (0..RATIOS).map(|index| error(lowest * ratio(index), highest * ratio(index))).fold(f64::INFINITY, f64::min);
            let total: f64 = weights.iter().map(|weight| f64::from(*weight).powi(2)).sum();
            proptest::prop_assert!(error(low, high) <= 1.0501 * least + 1e-9 * total, "{} {least}", error(low, high));
            proptest::prop_assert!((0..RATIOS).any(|index| (low, high) == (lowest * ratio(index), highest * ratio(index))));
        }
    }
}
