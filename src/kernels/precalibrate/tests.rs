//! Tests of statistical pre-calibration.

use super::*;

fn cpu() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse::<f64>().unwrap() * 1e-9
}

#[test]
#[ignore = "prints speed"]
#[allow(clippy::print_stdout, reason = "prints its figures")]
fn speed() {
    let (rows, columns) = (4096, 4096);
    let mut state = 7u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) as f32 / (1u64 << 31) as f32) - 0.5
    };
    let weight = Matrix::from_fn(rows, columns, |_, _| (0..6).map(|_| next()).sum::<f32>() * 0.02);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let best = |work: &mut dyn FnMut()| {
        (0..4)
            .map(|_| {
                let start = cpu();
                work();
                cpu() - start
            })
            .fold(f64::INFINITY, f64::min)
    };
    let n = (rows * columns) as f64;
    pool.install(|| {
        let mut out = vec![0.0f32; rows * columns];
        let s = best(&mut || out.copy_from_slice(std::hint::black_box(&weight.data)));
        println!("copy {:.1} GB/s read+write, {:.0} Mweights/s", 8.0 * n / s / 1e9, n / s / 1e6);
        for (bits, symmetric) in [(2, true), (2, false), (3, true), (4, true), (4, false)] {
            let grid = Grid { bits, group: 128, symmetric, scale_float: Float::BF16 };
            let s = best(&mut || drop(std::hint::black_box(precalibrate(&weight, grid, 0.05, false))));
            println!("precalibrate {bits} {symmetric}: {:.0} Mweights/s", n / s / 1e6);
        }
        let grid = Grid { bits: 4, group: 128, symmetric: true, scale_float: Float::BF16 };
        let s = best(&mut || _ = std::hint::black_box(threshold(&weight.data, 0.05, false)));
        println!("threshold {:.0} Mweights/s", n / s / 1e6);
        let s = best(&mut || _ = std::hint::black_box(divergences(&weight, grid, 0.02, false)));
        println!("divergences {:.2} ms", s * 1e3);
        println!("{:?}", divergences(&weight, grid, 0.02, false));
        let s = best(&mut || drop(std::hint::black_box(crate::kernels::quantize::round_to_nearest(&weight, grid))));
        println!("rtn {:.0} Mweights/s", n / s / 1e6);
    });
}
