//! Tests of ADMM pruning.

use super::*;
use crate::kernels::factor::solve_rows;
use crate::kernels::refit::{correlation, norms};
use crate::methods::sparsegpt::update;
use crate::methods::wanda::tests::{golden_inputs, golden_statistics, mask};

const TWO_OF_FOUR: Pattern = Pattern::Blocks { kept: 2, of: 4 };

/// Numbers from the bell-shaped sum of a few uniform ones, of a fixed generator.
fn noise(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 31) as f64 - 0.5
    };
    (0..count).map(|_| (0..6).map(|_| uniform()).sum::<f64>() * 2f64.sqrt()).collect()
}

/// A weight and the Gram matrix of correlated inputs with a power-law spectrum and three outlier channels.
pub(crate) fn layer(rows: usize, columns: usize, tokens: usize, seed: u64) -> (Matrix, Vec<f64>) {
    let (hidden, mixing) = (noise(tokens * columns, seed), noise(columns * columns, seed + 100));
    let mut x = vec![0.0; tokens * columns];
    for (x, hidden) in x.chunks_mut(columns).zip(hidden.chunks(columns)) {
        for (k, (value, mixing)) in hidden.iter().zip(mixing.chunks(columns)).enumerate() {
            let strength = value / (k + 1) as f64;
            x.iter_mut().zip(mixing).for_each(|(x, mixing)| *x += strength * mixing);
        }
        [1, columns / 2, columns - 2].iter().for_each(|&outlier| x[outlier] *= 20.0);
    }
    let mut gram = vec![0.0; columns * columns];
    for x in x.chunks(columns) {
        for (line, &value) in gram.chunks_mut(columns).zip(x) {
            line.iter_mut().zip(x).for_each(|(gram, other)| *gram += value * other);
        }
    }
    let weight = noise(rows * columns, seed + 200).iter().map(|&value| value as f32).collect();
    (Matrix::new(rows, columns, weight), gram)
}

fn error(gram: &[f64], exact: &Matrix, pruned: &Matrix) -> f64 {
    layer_error(gram, &exact.data, &pruned.data, exact.columns)
}

/// H with a share of every diagonal entry added to it: the damped objective in raw units.
fn diagonally_damped(gram: &[f64], columns: usize, share: f64) -> Vec<f64> {
    let mut gram = gram.to_vec();
    (0..columns).for_each(|column| gram[column * (columns + 1)] *= 1.0 + share);
    gram
}

/// Least squares on a mask, row by row: H[S,S] ŵ = (H w)[S].
pub(crate) fn least_squares(weight: &Matrix, gram: &[f64], keep: &[bool]) -> Matrix {
    let columns = weight.columns;
    let mut out = Matrix::new(weight.rows, columns, vec![0.0; weight.data.len()]);
    for row in 0..weight.rows {
        let set: Vec<usize> = (0..columns).filter(|&column| keep[row * columns + column]).collect();
        let inner: Vec<f64> = set.iter().flat_map(|&i| set.iter().map(move |&j| gram[i * columns + j])).collect();
        let pull = |&i: &usize| (0..columns).map(|j| gram[i * columns + j] * f64::from(weight.row(row)[j])).sum();
        let right: Vec<f64> = set.iter().map(pull).collect();
        let solved = solve_rows(&inner, set.len(), &right).unwrap();
        set.iter().zip(solved).for_each(|(&column, value)| out.data[row * columns + column] = value as f32);
    }
    out
}

/// The loop of methods-pruning §2.2 word by word, in f64, for unstructured pruning; kept entries where `fixed`.
fn reference(weight: &Matrix, gram: &[f64], options: &Admm, fixed: Option<&[bool]>) -> Vec<f64> {
    let (columns, entries) = (weight.columns, weight.data.len());
    let norms = norms(gram, columns);
    let g = correlation(gram, &norms, options.damping, 0.0);
    let inverse = inverse(&correlation(gram, &norms, options.damping, options.rho), columns).unwrap();
    let times = |v: &[f64], m: &[f64]| -> Vec<f64> {
        (0..entries).map(|at| (0..columns).map(|k| v[at / columns * columns + k] * m[k * columns + at % columns]).sum()).collect()
    };
    let start: Vec<f64> = weight.data.iter().enumerate().map(|(at, &w)| f64::from(w) * norms[at % columns]).collect();
    let xy = times(&start, &g);
    let (mut v, mut u) = (start, vec![0.0; entries]);
    let mut keep = fixed.map_or(vec![true; entries], <[bool]>::to_vec);
    for t in 0..options.iters {
        if fixed.is_none() && t < options.ramp {
            let s = options.sparsity.unwrap_or(0.5);
            let grown = s - s * (1.0 - (t + 1) as f64 / options.ramp as f64).powi(3);
            let share = if options.schedule == Schedule::Cubic { grown } else { s };
            let mut order: Vec<usize> = (0..entries).collect();
            order.sort_by(|&a, &b| (v[a] + u[a]).abs().total_cmp(&(v[b] + u[b]).abs()));
            keep.fill(true);
            order[..(entries as f64 * share) as usize].iter().for_each(|&at| keep[at] = false);
        }
        let z: Vec<f64> = (0..entries).map(|at| if keep[at] { v[at] + u[at] } else { 0.0 }).collect();
        (0..entries).for_each(|at| u[at] += v[at] - z[at]);
        let right: Vec<f64> = (0..entries).map(|at| xy[at] + options.rho * (z[at] - u[at])).collect();
        v = times(&right, &inverse);
    }
    (0..entries).map(|at| if keep[at] { (v[at] + u[at]) / norms[at % columns] } else { 0.0 }).collect()
}

fn solve(weight: &Matrix, gram: &[f64], options: &Admm, keep: &[bool]) -> Matrix {
    Space::new(weight, gram, options).unwrap().solve(None, "given", Some(keep), false).unwrap().matrix
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-5 * expected, "{found} is not {expected}");
}

fn row_is(matrix: &Matrix, row: usize, expected: [f32; 8]) {
    assert!(matrix.row(row).iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{:?}", matrix.row(row));
}

#[test]
fn golden_least_squares_and_fixed_mask() {
    let (_, exact) = golden_inputs();
    let gram = golden_statistics().gram.unwrap();
    let keep = wanda_mask(&exact, &gram, 0.5, Pattern::Unstructured);
    close(error(&gram, &exact, &least_squares(&exact, &gram, &keep)), 50.904497);
    close(error(&gram, &exact, &least_squares(&exact, &diagonally_damped(&gram, 8, 0.1), &keep)), 50.913286);
    let (fixed, notes) = Admm { mask: Mask::Wanda, ..Admm::default() }.prune(&exact, &gram).unwrap();
    close(error(&gram, &exact, &fixed), 50.913286);
    row_is(&fixed, 0, [0.91428, 0.0, 0.0, -1.021387, -0.993654, -0.518101, 0.0, 0.0]);
    assert!(notes.is_empty(), "{notes:?}");
}

#[test]
fn golden_schedules_and_two_of_four() {
    let (_, exact) = golden_inputs();
    let gram = golden_statistics().gram.unwrap();
    for (schedule, e) in [(Schedule::Cubic, 47.713036), (Schedule::ReferenceCode, 47.712525)] {
        let (pruned, _) = Admm { schedule, ..Admm::default() }.prune(&exact, &gram).unwrap();
        assert_eq!(mask(&pruned), "10011100 00101101 01000110 00110111");
        close(error(&gram, &exact, &pruned), e);
        if schedule == Schedule::Cubic {
            row_is(&pruned, 2, [0.0, -1.029345, 0.0, 0.0, 0.0, -0.445314, 1.101326, 0.0]);
        }
    }
    let (pruned, _) = Admm { pattern: TWO_OF_FOUR, ..Admm::default() }.prune(&exact, &gram).unwrap();
    assert_eq!(mask(&pruned), "10011100 01101100 01010110 00110110");
    close(error(&gram, &exact, &pruned), 55.850426);
    row_is(&pruned, 1, [0.0, -0.685068, -0.918571, 0.0, 1.100772, 0.475158, 0.0, 0.0]);
}

#[test]
fn single_precision_follows_the_specification_in_double() {
    let (weight, gram) = layer(40, 56, 300, 3);
    for (sparsity, schedule) in [(0.5, Schedule::Cubic), (0.7, Schedule::Cubic), (0.5, Schedule::ReferenceCode)] {
        let options = Admm { sparsity: Some(sparsity), schedule, ..Admm::default() };
        let exact = reference(&weight, &gram, &options, None);
        let (pruned, _) = options.prune(&weight, &gram).unwrap();
        let largest = exact.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        let apart = pruned.data.iter().zip(&exact).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max);
        assert!(apart < 7e-5 * largest, "{sparsity} {schedule:?}: {apart} of {largest}");
    }
}

#[test]
fn on_a_fixed_mask_it_converges_to_damped_least_squares() {
    let (weight, gram) = layer(24, 64, 300, 7);
    let damped = diagonally_damped(&gram, 64, 0.1);
    for keep in [wanda_mask(&weight, &gram, 0.6, Pattern::Unstructured), wanda_mask(&weight, &gram, 0.5, TWO_OF_FOUR)] {
        let best = error(&damped, &weight, &least_squares(&weight, &damped, &keep));
        let masked = Admm { iters: 0, ..Admm::default() };
        let start = error(&damped, &weight, &solve(&weight, &gram, &masked, &keep));
        for (iters, gap) in [(20, 1e-3), (100, 1e-8)] {
            let found = error(&damped, &weight, &solve(&weight, &gram, &Admm { iters, ..Admm::default() }, &keep));
            assert!(found - best <= gap * best && found <= start, "{iters}: {found} {best} {start}");
        }
        let doubles = reference(&weight, &gram, &Admm { iters: 100, ..Admm::default() }, Some(&keep));
        let doubles = Matrix::new(24, 64, doubles.iter().map(|&value| value as f32).collect());
        assert!(error(&damped, &weight, &doubles) - best <= 1e-8 * best);
        let refitted = solve(&weight, &gram, &Admm { refit: Some(10), ..Admm::default() }, &keep);
        let plain = solve(&weight, &gram, &Admm::default(), &keep);
        let [refitted, plain] = [refitted, plain].map(|matrix| error(&damped, &weight, &matrix) - best);
        assert!(refitted < 0.1 * plain, "{refitted} {plain}");
    }
}

#[test]
fn uncorrelated_inputs_and_full_masks_leave_the_kept_weights_bit_for_bit_close() {
    let (weight, gram) = layer(10, 32, 100, 4);
    let diagonal: Vec<f64> = (0..32 * 32).map(|at| if at / 32 == at % 32 { gram[at] } else { 0.0 }).collect();
    let pruned = Admm { mask: Mask::Wanda, ..Admm::default() }.prune(&weight, &diagonal).unwrap().0;
    assert!(pruned.data.iter().zip(&weight.data).all(|(a, b)| *a == 0.0 || (a - b).abs() <= 1e-6 * b.abs()));
    let full = Admm { sparsity: Some(0.0), ..Admm::default() }.prune(&weight, &gram).unwrap().0;
    assert!(full.data.iter().zip(&weight.data).all(|(a, b)| (a - b).abs() <= 2.0 * f32::EPSILON * b.abs()));
}

#[test]
fn scaling_inputs_and_weights_inversely_scales_the_result_and_permuting_rows_permutes_it() {
    let (weight, gram) = layer(20, 32, 150, 9);
    let scale = |column: usize| 2f64.powi(column as i32 % 9 - 4) * if column.is_multiple_of(2) { 1.3 } else { 1.0 };
    let scaled_gram: Vec<f64> = (0..32 * 32).map(|at| gram[at] * scale(at / 32) * scale(at % 32)).collect();
    let scaled = Matrix::from_fn(20, 32, |i, j| (f64::from(weight.row(i)[j]) / scale(j)) as f32);
    let permuted = Matrix::from_fn(20, 32, |i, j| weight.row((i * 7 + 3) % 20)[j]);
    for pattern in [Pattern::Unstructured, TWO_OF_FOUR] {
        let options = Admm { pattern, ..Admm::default() };
        let [plain, scaled, permuted] =
            [(&weight, &gram), (&scaled, &scaled_gram), (&permuted, &gram)].map(|(weight, gram)| options.prune(weight, gram).unwrap().0);
        for (at, &value) in plain.data.iter().enumerate() {
            let back = f64::from(scaled.data[at]) * scale(at % 32);
            assert!((back - f64::from(value)).abs() < 1e-5, "{pattern} {at}: {back} {value}");
        }
        assert!((0..20).all(|i| permuted.row(i).iter().zip(plain.row((i * 7 + 3) % 20)).all(|(a, b)| (a - b).abs() < 1e-5)));
    }
}

#[test]
fn zeros_are_counted_exactly_without_a_sign_and_blocks_keep_n_of_m() {
    let (weight, gram) = layer(15, 24, 90, 6);
    for sparsity in [0.0, 0.1, 0.333, 0.5, 0.7, 0.99] {
        for schedule in [Schedule::Cubic, Schedule::ReferenceCode] {
            let options = Admm { sparsity: Some(sparsity), schedule, refit: Some(3), ..Admm::default() };
            let pruned = options.prune(&weight, &gram).unwrap().0;
            assert_eq!(pruned.zeros(), (360.0 * sparsity) as usize);
            assert!(pruned.data.iter().all(|value| value.to_bits() != (-0.0f32).to_bits()));
        }
    }
    for (kept, of) in [(2, 4), (1, 4), (3, 4), (4, 8), (2, 3), (5, 6), (1, 24)] {
        for (mask, ramp) in [(Mask::Own, 15), (Mask::Own, 0), (Mask::Own, 40), (Mask::Auto, 15)] {
            let options = Admm { pattern: Pattern::Blocks { kept, of }, mask, ramp, ..Admm::default() };
            let pruned = options.prune(&weight, &gram).unwrap().0;
            assert!(pruned.data.chunks(of).all(|block| block.iter().filter(|value| **value != 0.0).count() == kept), "{kept}:{of}");
        }
    }
}

#[test]
fn no_iterations_leave_masked_weights() {
    let (weight, gram) = layer(6, 16, 60, 8);
    let pruned = Admm { iters: 0, ..Admm::default() }.prune(&weight, &gram).unwrap().0;
    assert_eq!(pruned.zeros(), 48);
    assert!(pruned.data.iter().zip(&weight.data).all(|(a, b)| *a == 0.0 || a.to_bits() == b.to_bits()));
}

#[test]
fn on_the_same_mask_it_is_nearer_than_the_update_of_sparsegpt() {
    for seed in 0..4 {
        let (weight, gram) = layer(32, 64, 400, seed);
        let damped = diagonally_damped(&gram, 64, 0.1);
        for pattern in [Pattern::Unstructured, TWO_OF_FOUR] {
            let theirs = SparseGpt { pattern, ..SparseGpt::default() }.prune(&weight, &gram).unwrap();
            let ours = Admm { pattern, mask: Mask::Sparsegpt, ..Admm::default() }.prune(&weight, &gram).unwrap().0;
            assert!(error(&damped, &weight, &ours) <= error(&damped, &weight, &theirs.matrix));
            let best = error(&gram, &weight, &least_squares(&weight, &gram, &theirs.keep));
            assert!(error(&gram, &weight, &theirs.matrix) >= best * (1.0 - 1e-6));
            let keep = wanda_mask(&weight, &gram, 0.5, pattern);
            let sparsegpt = update(&weight, &gram, &keep, 0.01, 128).unwrap().matrix;
            let ours = solve(&weight, &gram, &Admm::default(), &keep);
            let masked = solve(&weight, &gram, &Admm { iters: 0, ..Admm::default() }, &keep);
            assert!(error(&damped, &weight, &ours) <= error(&damped, &weight, &sparsegpt));
            assert!(error(&gram, &weight, &ours) <= error(&gram, &weight, &masked));
        }
    }
}

#[test]
fn on_power_law_inputs_admm_beats_sparsegpt_beats_wanda_and_auto_is_no_worse_than_any() {
    let (weight, gram) = layer(64, 96, 1000, 0);
    for sparsity in [0.5, 0.7] {
        let options = Admm { sparsity: Some(sparsity), ..Admm::default() };
        let admm = |options: Admm| error(&gram, &weight, &options.prune(&weight, &gram).unwrap().0);
        let own = admm(options.clone());
        let sparsegpt = SparseGpt { sparsity: Some(sparsity), ..SparseGpt::default() }.prune(&weight, &gram).unwrap().matrix;
        let keep = wanda_mask(&weight, &gram, sparsity, Pattern::Unstructured);
        let wanda = solve(&weight, &gram, &Admm { iters: 0, ..Admm::default() }, &keep);
        let [sparsegpt, wanda] = [sparsegpt, wanda].map(|matrix| error(&gram, &weight, &matrix));
        assert!(own < sparsegpt && sparsegpt < wanda, "{own} {sparsegpt} {wanda}");
        let auto = admm(Admm { mask: Mask::Auto, ..options.clone() });
        for (mask, schedule) in [
            (Mask::Own, Schedule::Cubic),
            (Mask::Own, Schedule::ReferenceCode),
            (Mask::Wanda, Schedule::Cubic),
            (Mask::Sparsegpt, Schedule::Cubic),
        ] {
            assert!(auto <= admm(Admm { mask, schedule, ..options.clone() }));
        }
    }
    let notes = Admm { mask: Mask::Auto, ..Admm::default() }.prune(&weight, &gram).unwrap().1;
    assert!(notes[0].starts_with("the mask is of ") && notes[0].contains("sparsegpt"), "{notes:?}");
}

#[test]
fn hostile_values_give_finite_weights_and_notes() {
    let (mut weight, mut gram) = layer(8, 16, 40, 2);
    (0..16).for_each(|j| (gram[3 * 16 + j], gram[j * 16 + 3]) = (0.0, 0.0));
    weight.data[0] = 3e38;
    weight.data[1] = 1e-45;
    weight.data[16..32].fill(0.0);
    weight.data[32..48].iter_mut().for_each(|value| *value *= 1e-4);
    for pattern in [Pattern::Unstructured, TWO_OF_FOUR] {
        for gram in [&gram, &vec![0.0; 256], &vec![1e30; 256]] {
            for mask in [Mask::Own, Mask::Wanda, Mask::Auto] {
                let (pruned, _) = Admm { pattern, mask, refit: Some(5), ..Admm::default() }.prune(&weight, gram).unwrap();
                assert!(pruned.data.iter().all(|value| value.is_finite()) && pruned.zeros() >= 64);
            }
        }
    }
    let (pruned, notes) = Admm { sparsity: Some(0.7), ..Admm::default() }.prune(&weight, &gram).unwrap();
    assert!(notes.iter().any(|note| note.contains("have lost every weight")), "{notes:?} {}", mask(&pruned));
    let indefinite: Vec<f64> = (0..256).map(|at| if at / 16 == at % 16 { 1.0 } else { -0.5 }).collect();
    let (_, notes) = Admm::default().prune(&weight, &indefinite).unwrap();
    assert!(notes[0].contains("could not be inverted with damping 0.1"), "{notes:?}");
    assert!(Admm::default().prune(&weight, &gram[1..]).is_err());
}

#[test]
fn recipes_spell_the_options_as_documented_and_wrong_ranges_are_refused() {
    let text = "sparsity = 0.5\npattern = \"2:4\"\nschedule = \"reference-code\"\nmask = \"auto\"\nrefit = 10\ntarget = \"float-output\"";
    let options: Admm = toml::from_str(text).unwrap();
    assert_eq!((options.mask, options.schedule, options.refit, options.iters), (Mask::Auto, Schedule::ReferenceCode, Some(10), 20));
    assert_eq!(
        (options.target(), options.leaves(Storage::Dense, [4, 8], None).unwrap()),
        (Target::FloatOutput, Storage::Sparse(TWO_OF_FOUR))
    );
    assert!(toml::from_str::<Admm>("sparsty = 0.5").is_err());
    for (text, says) in
        [("rho = 0.0", "0.001 to 1000"), ("damping = -1.0", "0 to 10"), ("iters = 20000", "at most"), ("sparsity = 1.0", "below 1")]
    {
        let options: Admm = toml::from_str(text).unwrap();
        assert!(options.leaves(Storage::Dense, [4, 8], None).unwrap_err().to_string().contains(says));
    }
}
