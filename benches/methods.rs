//! Speed of the methods beside the limit of the machine: `cargo bench --bench methods`. Absolute figures depend on the
//! machine; a method that only reads weights can be as fast as a copy of them.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::hint::black_box;
use std::time::Instant;

use drawknife::kernels::gemm::{Sizes, View, product};
use drawknife::kernels::gram::add_gram;
use drawknife::kernels::precalibrate::precalibrate;
use drawknife::kernels::quantize::{Grid, round_to_nearest};
use drawknife::kernels::sign_descent::{Rounding, Start};
use drawknife::kernels::trits::{Rule, fit_free, fit_tied};
use drawknife::matrix::Matrix;
use drawknife::methods::{self, Layer};
use drawknife::model::seen::Statistics;
use drawknife::weight::{Float, Weight};

const ROWS: usize = 1024;
const COLUMNS: usize = 2048;

fn main() {
    let threads = rayon::current_num_threads();
    println!("{threads} threads, {}", drawknife::device::simd());
    let copy = copy();
    println!("copy of f32 weights                {:8.1} million weights per core-second  the limit of what reads weights", copy / 1e6);
    let matrix = Matrix::new(ROWS, COLUMNS, normal(ROWS * COLUMNS));
    let weight = Weight::Dense(matrix.clone());
    let show = |name: &str, seconds: f64| {
        let rate = (ROWS * COLUMNS) as f64 / seconds / threads as f64;
        println!("{name:<33}  {:8.1} million weights per core-second  {:.1} % of a copy", rate / 1e6, 100.0 * rate / copy);
    };
    ptqtp(&weight, &show);
    ranges(&matrix, &show);
    sign_descent(&matrix, &show);
    let peak = gemm();
    println!("matrix product 2048 x {COLUMNS} x {ROWS}     {:8.1} GFLOP/s  the limit of what follows", peak / 1e9);
    gram_methods(&weight, peak);
}

/// Ranges for the grids of the stage that follows.
fn ranges(matrix: &Matrix, show: &dyn Fn(&str, f64)) {
    for (bits, symmetric) in [(4, true), (4, false), (3, true), (2, false)] {
        let grid = Grid { bits, group: 128, symmetric, scale_float: Float::BF16 };
        let seconds = best(|| drop(black_box(precalibrate(matrix, grid, 0.05, false))));
        show(&format!("precalibrate, {bits} bits{}", if symmetric { "" } else { ", asymmetric" }), seconds);
    }
}

/// What SignRound does with a layer's gradients, once per iteration.
fn sign_descent(matrix: &Matrix, show: &dyn Fn(&str, f64)) {
    let ints = round_to_nearest(matrix, Grid { bits: 4, group: 128, symmetric: true, scale_float: Float::BF16 }).0;
    let gradient = normal(ROWS * COLUMNS);
    let mut floats = vec![0.0; ROWS * COLUMNS];
    for (name, start) in [("range", Start::Range), ("closed form", Start::Codes)] {
        let mut rounding = Rounding::new(start, matrix, None, &ints);
        let seconds = best(|| {
            rounding.quantize(&mut floats);
            rounding.step(black_box(&gradient), 0.005, 0.005);
        });
        show(&format!("signround, step from {name}"), seconds);
    }
}

/// Methods that solve with the Gram matrix: operations of the products alone, beside the rate of a product.
fn gram_methods(weight: &Weight, peak: f64) {
    let tokens = 2 * COLUMNS;
    let mut gram = vec![0.0; COLUMNS * COLUMNS];
    let seconds = best(|| add_gram(&normal(tokens * COLUMNS), COLUMNS, &mut gram));
    rate("gram matrix", (tokens * COLUMNS * COLUMNS) as f64, seconds, peak);
    let squares = (0..COLUMNS).map(|column| gram[column * (COLUMNS + 1)]).collect();
    let statistics = Statistics::new(tokens as u64, squares, Some(gram));
    let cube = (COLUMNS * COLUMNS * COLUMNS) as f64;
    let square = (ROWS * COLUMNS * COLUMNS) as f64;
    // Factor and inverse once per input site, then each row against what is left of the factor.
    let solves = [
        ("gptq", toml::Table::new(), square),
        ("closed-form", toml::toml! { alpha = 0.0 beta = 0.0 }, 19.0 * square),
        ("sparsegpt", toml::Table::new(), square),
        ("admm", toml::Table::new(), 40.0 * square),
    ];
    for (name, options, products) in solves {
        let method = methods::read(name, options).expect("sound options");
        let seconds = best(|| {
            let statistics = statistics.clone();
            drop(black_box(method.apply(weight.clone(), &layer(Some(&statistics))).expect("sound statistics")));
        });
        rate(name, cube + products, seconds, peak);
    }
}

fn layer(statistics: Option<&Statistics>) -> Layer<'_> {
    Layer { name: "layer", statistics, float: Float::BF16, bits: None, sparsity: None, bounds: None, goal: None, gpu: None }
}

fn rate(name: &str, operations: f64, seconds: f64, peak: f64) {
    let rate = operations / seconds;
    println!("{name:<33}  {:8.1} GFLOP/s  {:.0} % of the product, {seconds:.2} s", rate / 1e9, 100.0 * rate / peak);
}

/// The best rate of a product of single precision on all threads.
fn gemm() -> f64 {
    let (x, w, mut y) = (normal(2048 * COLUMNS), normal(ROWS * COLUMNS), vec![0.0; 2048 * ROWS]);
    let sizes = Sizes { m: 2048, n: ROWS, k: COLUMNS };
    let seconds = best(|| product(sizes, &mut y, ROWS, false, 1.0, View::rows(&x, COLUMNS), View::transposed(&w, COLUMNS), true));
    2.0 * (2048 * ROWS * COLUMNS) as f64 / seconds
}

/// The fit of two trit-planes: about 14 rounds per start.
fn ptqtp(weight: &Weight, show: &dyn Fn(&str, f64)) {
    let rule = Rule { group: 128, residual_start: true, max_iters: 50, epsilon: 1e-4, absolute: false };
    let one = Rule { residual_start: false, ..rule };
    let importance = vec![1.0; COLUMNS];
    show("ptqtp", best(|| drop(black_box(fit_free(weight, rule, None)))));
    show("ptqtp, sign start alone", best(|| drop(black_box(fit_free(weight, one, None)))));
    show("ptqtp, weighted", best(|| drop(black_box(fit_free(weight, rule, Some(&importance))))));
    show("ptqtp, tied", best(|| drop(black_box(fit_tied(weight, rule, None, Float::BF16)))));
}

/// Weights that are copied per second by one thread.
fn copy() -> f64 {
    let from = vec![1u8; 64 << 20];
    let mut to = vec![0u8; 64 << 20];
    from.len() as f64 / 4.0 / best(|| black_box(&mut to).copy_from_slice(black_box(&from)))
}

/// Numbers whose distribution is close to normal: sums of twelve even ones.
fn normal(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut even = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32
    };
    (0..count).map(|_| 0.02 * ((0..12).map(|_| even()).sum::<f32>() - 6.0)).collect()
}

/// The shortest of five runs after one to warm up.
fn best(mut work: impl FnMut()) -> f64 {
    work();
    let times = (0..5).map(|_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}
