//! Speed of the hot paths beside the limit of the machine, measured in one run: `cargo bench --bench speed`.
//! Absolute figures depend on the machine; the ratios are what to compare.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use drawknife::checkpoint::decode::{decode, decode_chunk, encode};
use drawknife::kernels::gemm::{Sizes, View, product};
use drawknife::kernels::gram::{add_column_squares, add_gram};
use drawknife::kernels::quantize::{Grid, round_stored};
use drawknife::kernels::rough_product::Precision;
use drawknife::kernels::values;
use drawknife::matrix::Matrix;
use drawknife::methods::wanda::prune;
use drawknife::model::backward::{self, Gradients, Wanted};
use drawknife::model::block::{Parameters, Place, Role};
use drawknife::model::config::Config;
use drawknife::model::forward::{self, Spec};
use drawknife::model::loss::squared_error;
use drawknife::weight::{Float, Pattern, Stored};

const WIDTH: usize = 2048;
const MIDDLE: usize = 5632;
const TOKENS: usize = 2048;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;

fn main() {
    let device = Device::flex();
    println!("{} threads, {}", rayon::current_num_threads(), drawknife::device::simd());
    let peak = gemm(&device);
    println!("matrix product {TOKENS} x {WIDTH} x {MIDDLE}, f32        {:8.1} GFLOP/s  the limit of what follows", peak / 1e9);
    for (name, (flops, seconds)) in [("block forward", block(&device, false)), ("block forward and backward", block(&device, true))] {
        let rate = flops / seconds;
        let name = format!("{name}, width {WIDTH}, {TOKENS} tokens");
        println!("{name:<52}  {:8.1} GFLOP/s  {:.0} % of the limit", rate / 1e9, 100.0 * rate / peak);
    }
    let copy = copy();
    println!("copy of memory                                {:8.2} GB/s     the limit of what follows", copy / 1e9);
    let weights = MIDDLE * WIDTH;
    let floats: Vec<f32> = (0..weights).map(|i| ((i * 7919) % 2003) as f32 * 1e-4 - 0.1).collect();
    let bytes = encode(Float::BF16, &floats);
    let mut out = vec![0.0; weights];
    show("decode bf16", bytes.len(), best(|| decode(Float::BF16, &bytes, &mut out)), copy);
    let stored =
        Stored { rows: MIDDLE, columns: WIDTH, float: Float::BF16, bytes: std::sync::Arc::new(bytes.clone()), decode: decode_chunk };
    for bits in [2, 3, 4, 8] {
        let grid = Grid { bits, group: 128, symmetric: true, scale_float: Float::BF16 };
        let seconds = best(|| drop(black_box(round_stored(&stored, grid))));
        show(&format!("round to nearest, {bits} bits"), bytes.len(), seconds, copy);
    }
    let norms = vec![1.0; WIDTH];
    for pattern in [Pattern::Unstructured, Pattern::Blocks { kept: 2, of: 4 }] {
        let seconds = best(|| {
            black_box(prune(&mut Matrix::new(MIDDLE, WIDTH, floats.clone()), &norms, 0.5, pattern));
        });
        show(&format!("wanda {pattern} (with a copy)"), 4 * weights, seconds, copy);
    }
    let mut squares = vec![0.0; WIDTH];
    show("column squares", 4 * weights, best(|| add_column_squares(&floats, &mut squares)), copy);
    let mut gram = vec![0.0; WIDTH * WIDTH];
    let seconds = best(|| add_gram(&floats, WIDTH, &mut gram));
    let rate = 2.0 * (weights * WIDTH) as f64 / seconds;
    println!(
        "gram matrix of {MIDDLE} tokens                     {:8.1} GFLOP/s  {:.0} % of the matrix product",
        rate / 1e9,
        100.0 * rate / peak
    );
}

fn show(name: &str, bytes: usize, seconds: f64, limit: f64) {
    let rate = bytes as f64 / seconds;
    println!("{name:<44}  {:8.2} GB/s     {:.0} % of a copy", rate / 1e9, 100.0 * rate / limit);
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

fn copy() -> f64 {
    let from = vec![1u8; 64 << 20];
    let mut to = vec![0u8; 64 << 20];
    from.len() as f64 / best(|| black_box(&mut to).copy_from_slice(black_box(&from)))
}

fn random(shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::random(shape, Distribution::Normal(0.0, 0.02), device)
}

/// The best rate of a large product, into memory that is already there: through the tensor library and without it.
fn gemm(device: &Device) -> f64 {
    let (x, w) = (random([TOKENS, WIDTH], device), random([MIDDLE, WIDTH], device));
    let through = best(|| drop(black_box(values(x.clone().matmul(w.clone().transpose())))));
    let (x, w, mut y) = (values(x), values(w), vec![0.0; TOKENS * MIDDLE]);
    let sizes = Sizes { m: TOKENS, n: MIDDLE, k: WIDTH };
    let direct = best(|| product(sizes, &mut y, MIDDLE, false, 1.0, View::rows(&x, WIDTH), View::transposed(&w, WIDTH), true));
    2.0 * (TOKENS * WIDTH * MIDDLE) as f64 / through.min(direct)
}

/// Floating-point operations of the matrix products of a block, causal attention counted once, and its seconds; of the
/// forward alone or with the gradients of all weights, where attention has seven products in place of two.
fn block(device: &Device, with_gradients: bool) -> (f64, f64) {
    let config = serde_json::json!({"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": MIDDLE, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": 32, "max_position_embeddings": 4096});
    let config = Config::read(&config).expect("a sound configuration");
    let kv = KV_HEADS * WIDTH / HEADS;
    let mut parameters = Parameters::default();
    let mut products = 0;
    for role in Role::PLAIN {
        let shape = match role {
            Role::Query | Role::Output => [WIDTH, WIDTH],
            Role::Key | Role::Value => [kv, WIDTH],
            Role::Gate | Role::Up => [MIDDLE, WIDTH],
            _ => [WIDTH, MIDDLE],
        };
        products += shape[0] * shape[1];
        parameters.set_weight(role, random(shape, device));
    }
    for place in [Place::AttentionIn, Place::MlpIn] {
        parameters.set_norm(place, Tensor::ones([WIDTH], device));
    }
    let x = random([TOKENS, WIDTH], device);
    let spec = Spec::new(&config, 0, TOKENS);
    let products = 2.0 * (TOKENS * products) as f64;
    let attention = 2.0 * (TOKENS * TOKENS / 2 * WIDTH) as f64;
    if with_gradients {
        let target = vec![0.0; TOKENS * WIDTH];
        let (wanted, mut gradients) =
            (Wanted { weights: true, norms: false, input: false, precision: Precision::Single }, Gradients::default());
        let seconds = best(|| {
            let loss = backward::block(&spec, &parameters, &x, wanted, &mut gradients, &mut squared_error(&target, 1.0));
            black_box(loss.expect("the processor does not fail"));
        });
        return (3.0 * products + 7.0 * attention, seconds);
    }
    let seconds = best(|| drop(black_box(values(forward::block(&spec, &parameters, x.clone(), &mut |_, _| {})))));
    (products + 2.0 * attention, seconds)
}
