//! Speed of the methods beside the limit of the machine: `cargo bench --bench methods`. Absolute figures depend on the
//! machine; a method that only reads weights can be as fast as a copy of them.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::hint::black_box;
use std::time::Instant;

use drawknife::kernels::trits::{Rule, fit_free, fit_tied};
use drawknife::matrix::Matrix;
use drawknife::weight::{Float, Weight};

const ROWS: usize = 1024;
const COLUMNS: usize = 2048;

fn main() {
    let threads = rayon::current_num_threads();
    println!("{threads} threads, {}", drawknife::device::simd());
    let copy = copy();
    println!("copy of f32 weights             {:8.1} million weights per core-second  the limit of what follows", copy / 1e6);
    let weight = Weight::Dense(Matrix::new(ROWS, COLUMNS, normal(ROWS * COLUMNS)));
    let show = |name: &str, seconds: f64| {
        let rate = (ROWS * COLUMNS) as f64 / seconds / threads as f64;
        println!("{name:<30}  {:8.1} million weights per core-second  {:.1} % of a copy", rate / 1e6, 100.0 * rate / copy);
    };
    ptqtp(&weight, &show);
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
