//! Speed of the compute shaders beside what the adapter reaches with a copy: `cargo bench --bench gpu`, or with the number
//! of an adapter, `cargo bench --bench gpu -- 1`. The figures are yours to report: adapter and driver stand above them.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::time::Instant;

use burn::tensor::{Distribution, Tensor};
use drawknife::device::{Buffer, Choice, Device, Gpu, adapters};
use drawknife::kernels::gemm::Sizes;
use drawknife::kernels::gram::gpu::Gram;
use drawknife::kernels::linear::gpu::{PackedInts, PackedTrits, product_into};
use drawknife::kernels::linear::units::{Exactness, Operand, Units};
use drawknife::kernels::quantize::{Grid, round_to_nearest};
use drawknife::kernels::rough_product::Precision;
use drawknife::kernels::select::gpu::{Scored, keep_but_smallest, keep_in_blocks};
use drawknife::kernels::sign_descent::gpu::OnGpu;
use drawknife::kernels::sign_descent::{Rounding, Start};
use drawknife::kernels::trits::{Rule, fit_free, gpu as trits};
use drawknife::kernels::{admm, channels, gram, linear, matrix, precalibrate, quantize};
use drawknife::matrix::Matrix;
use drawknife::model::backward::{self, Gradients, Wanted};
use drawknife::model::block::{Parameters, Place, Role};
use drawknife::model::config::Config;
use drawknife::model::forward::Spec;
use drawknife::model::loss::{SquaredError, Value};
use drawknife::weight::{Float, Weight};

fn main() {
    let number = std::env::args().filter_map(|argument| argument.parse().ok()).next().unwrap_or(0);
    let Some(adapter) = adapters().into_iter().nth(number) else {
        println!("skipped: there is no GPU adapter gpu:{number}");
        return;
    };
    let device = Device::pick(Choice::Gpu(number)).expect("an adapter that opens");
    let gpu = device.gpu.as_ref().expect("a GPU");
    println!("gpu:{number} {} ({}, {}, {})", adapter.name, adapter.kind, adapter.backend, adapter.driver);
    // More than caches hold; a software adapter is measured on less, so that the benchmark ends.
    let size = if adapter.software { 512 } else { 8192 };
    let bench = Bench { gpu, device: &device, size };
    let copy = bench.copy();
    println!("copy                               {:9.2} GB/s  the limit of what reads and writes", copy / 1e9);
    bench.elementwise(copy);
    bench.fits(copy);
    bench.products();
    bench.step();
}

struct Bench<'a> {
    gpu: &'a Gpu,
    device: &'a Device,
    /// Rows and columns of a weight.
    size: usize,
}

impl Bench<'_> {
    fn floats(&self, count: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..count).map(|_| next() + next() + next()).collect()
    }

    /// Seconds of one call, from several that are waited for together, after one that is not counted.
    fn time(&self, mut work: impl FnMut()) -> f64 {
        let wait = || drop(self.gpu.read::<f32>(&self.gpu.upload(&[0.0f32])).expect("the device answers"));
        work();
        wait();
        let (start, mut calls) = (Instant::now(), 0);
        while calls < 3 || (start.elapsed().as_secs_f64() < 0.3 && calls < 200) {
            work();
            calls += 1;
            if calls % 10 == 0 {
                wait();
            }
        }
        wait();
        start.elapsed().as_secs_f64() / f64::from(calls)
    }

    /// Bytes per second of a copy, those that are read and those that are written.
    fn copy(&self) -> f64 {
        let buffer = self.gpu.upload(&self.floats(self.size * self.size));
        let seconds = self.time(|| drop(self.gpu.copy(&buffer)));
        (8 * self.size * self.size) as f64 / seconds
    }

    fn show(&self, name: &str, bytes: usize, seconds: f64, copy: f64) {
        let rate = bytes as f64 / seconds;
        println!("{name:<33}  {:9.2} GB/s  {:.0} % of a copy", rate / 1e9, 100.0 * rate / copy);
    }

    /// Kernels that see every weight a fixed number of times.
    fn elementwise(&self, copy: f64) {
        let (gpu, n) = (self.gpu, self.size);
        let count = n * n;
        let host = Matrix::new(n, n, self.floats(count));
        let weights = gpu.upload(&host.data);
        let seconds = self.time(|| drop(keep_but_smallest(gpu, Scored { values: &weights, factors: None, rows: n, columns: n }, n / 2)));
        self.show("half of every row", 4 * count, seconds, copy);
        let seconds = self.time(|| drop(keep_in_blocks(gpu, Scored { values: &weights, factors: None, rows: n, columns: n }, 2, 4)));
        self.show("2:4", 4 * count, seconds, copy);
        let grid = Grid { bits: 4, group: 128, symmetric: true, scale_float: Float::F16 };
        let seconds = self.time(|| drop(quantize::gpu::round_on(gpu, &weights, [n, n], grid)));
        self.show("round to nearest", 9 * count, seconds, copy);
        let ints = round_to_nearest(&host, grid).0;
        if let Some(layer) = OnGpu::new(gpu, Rounding::new(Start::Range, &host, None, &ints)) {
            let gradient = gpu.upload(&self.floats(count));
            let seconds = self.time(|| layer.step(&gradient, 0.005, 0.005));
            self.show("signround, step and rounding", 28 * count, seconds, copy);
        }
        let (dual, right) = (gpu.empty(count), gpu.empty(count));
        let keep = gpu.upload(&vec![0x5555_5555u32; count / 32]);
        let seconds = self.time(|| {
            gpu.launch(&admm::gpu::ADMM_SPLIT, count.div_ceil(64), &[&weights, &weights, &keep, &dual, &right], &[count as u32]);
        });
        self.show("admm, before the product", 16 * count, seconds, copy);
        let seconds = self.time(|| drop(gram::gpu::column_squares(gpu, &weights, n)));
        self.show("column squares", 4 * count, seconds, copy);
        let seconds = self.time(|| drop(channels::gpu::pieces(gpu, n, &weights)));
        self.show("statistics of channels", 8 * count, seconds, copy);
    }

    /// Kernels that work long on every weight.
    fn fits(&self, copy: f64) {
        let n = self.size.min(4096);
        let host = Matrix::new(n, n, self.floats(n * n));
        let rule = Rule { group: 128, residual_start: true, max_iters: 50, epsilon: 1e-4, absolute: false };
        let seconds = self.time(|| drop(trits::fit_free(self.gpu, &host, rule, None).expect("trits")));
        self.show("trit-planes, with both transfers", 5 * n * n, seconds, copy);
        let grid = Grid { bits: 3, group: 128, symmetric: true, scale_float: Float::F16 };
        let seconds = self.time(|| drop(precalibrate::gpu::precalibrate(self.gpu, &host, grid, 0.05, false).expect("ranges")));
        self.show("pre-calibration, with both transfers", 4 * n * n, seconds, copy);
    }

    /// Matrix products.
    fn products(&self) {
        let (gpu, n) = (self.gpu, self.size.min(4096));
        let sizes = Sizes { m: n, n, k: n };
        let flops = 2.0 * (n * n * n) as f64;
        let show = |name: &str, seconds: f64, flops: f64| println!("{name:<33}  {:9.3} TFLOP/s", flops / seconds / 1e12);
        let (host, a) = (Matrix::new(n, n, self.floats(n * n)), gpu.upload(&self.floats(n * n)));
        let (b, c): (Buffer, Buffer) = (gpu.upload(&host.data), gpu.empty(n * n));
        show(&format!("product, {n}"), self.time(|| product_into(gpu, sizes, &a, &b, &c)), flops);
        let random = || Tensor::<2>::random([n, n], Distribution::Normal(0.0, 1.0), &self.device.burn);
        let (x, w) = (random(), random());
        show(&format!("product of the tensor library, {n}"), self.time(|| drop(linear::linear_reference(&x, &w))), flops);
        match Units::of(gpu) {
            Some(units) => {
                for n in [n, 2 * n] {
                    let (a, b) = (gpu.empty(n * n), gpu.empty(n * n));
                    let flops = 2.0 * (n * n * n) as f64;
                    for (name, exactness) in [("halves", Exactness::Half), ("floats in parts", Exactness::Split)] {
                        let [a, b] = [&a, &b].map(|floats| Operand::new(floats, [n, n]));
                        show(&format!("on matrix units, {name}, {n}"), self.time(|| drop(units.product(a, b, exactness))), flops);
                    }
                }
            }
            None => println!("on matrix units                    none that multiply 16 x 16 x 16 halves in subgroups of 32"),
        }
        let ints = round_to_nearest(&host, Grid { bits: 4, group: 128, symmetric: true, scale_float: Float::F16 }).0;
        let packed = PackedInts::new(gpu, &ints);
        show("product from integers", self.time(|| drop(packed.product(gpu, &a, n))), flops);
        let rule = Rule { group: 128, residual_start: false, max_iters: 10, epsilon: 1e-3, absolute: false };
        let packed = PackedTrits::new(gpu, &fit_free(&Weight::Dense(host), rule, None).0);
        show("product from trit-planes", self.time(|| drop(packed.product(gpu, &a, n))), flops);
        if let Some(sum) = Gram::new(gpu, n, u64::MAX) {
            show("gram matrix, half of it computed", self.time(|| sum.add(&a)), flops / 2.0);
        }
    }

    /// A step of learned rounding on a block with the shape of Llama 3 8B, of 8 windows of 2048 tokens: forward, gradients of all weights,
    /// and the update. A software adapter takes a small block.
    fn step(&self) {
        let [hidden, middle, heads, kv_heads, seq] = if self.size < 4096 { [256, 768, 4, 2, 128] } else { [4096, 14_336, 32, 8, 2048] };
        let config = Config::read(&serde_json::json!({"model_type": "llama", "hidden_size": hidden, "intermediate_size": middle,
            "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 32}))
        .expect("a configuration");
        let kv = kv_heads * hidden / heads;
        let shapes = [[hidden, hidden], [kv, hidden], [kv, hidden], [hidden, hidden], [middle, hidden], [middle, hidden], [hidden, middle]];
        let mut parameters = Parameters::default();
        let random = |shape, scale| Tensor::<2>::random(shape, Distribution::Normal(0.0, scale), &self.device.burn);
        for (role, shape) in Role::PLAIN.into_iter().zip(shapes) {
            parameters.set_weight(role, random(shape, 0.02));
        }
        for place in [Place::AttentionIn, Place::MlpIn] {
            parameters.set_norm(place, Tensor::ones([hidden], &self.device.burn));
        }
        let grid = Grid { bits: 4, group: 128, symmetric: true, scale_float: Float::F16 };
        let learned = Role::PLAIN.map(|role| {
            let weight = matrix(parameters.weight(role));
            let start = Rounding::new(Start::Range, &weight, None, &round_to_nearest(&weight, grid).0);
            OnGpu::new(self.gpu, start).map(|layer| (role, layer))
        });
        let windows: Vec<[Tensor<2>; 2]> = (0..8).map(|_| [1.0, 0.1].map(|scale| random([seq, hidden], scale))).collect();
        let wanted = Wanted { weights: true, norms: false, input: false, precision: Precision::Rough };
        let (spec, mut gradients) = (Spec::new(&config, 0, seq), Gradients::default());
        let seconds = self.time(|| {
            gradients.clear();
            let mut values = Vec::new();
            for [x, target] in &windows {
                let mut loss = SquaredError { target: target.clone(), factor: 1e-6, window: seq * hidden, dropped: seq * hidden / 1000 };
                values.push(backward::block(&spec, &parameters, x, wanted, &mut gradients, &mut loss).expect("a step"));
            }
            std::hint::black_box(values.into_iter().map(Value::get).sum::<f64>());
            for (role, layer) in learned.iter().flatten() {
                if let Some(gradient) = gradients.weight_buffer(*role, self.gpu) {
                    layer.step(&gradient, 0.005, 0.005);
                }
            }
        });
        let weights: usize = shapes.iter().map(|shape| shape[0] * shape[1]).sum();
        let tokens = 8 * seq;
        // Three products a weight, and attention forward, twice again for its slopes, and once more for its scores.
        let flops = 6.0 * (tokens * weights) as f64 + 14.0 * (tokens * seq / 2 * hidden) as f64;
        println!(
            "learned rounding, 8 x {seq} tokens  {:9.3} TFLOP/s  {seconds:.3} s a step of a block of {:.1} M weights",
            flops / seconds / 1e12,
            weights as f64 / 1e6
        );
    }
}
