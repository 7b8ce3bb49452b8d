//! The comparisons.

use half::f16;

use crate::device::Gpu;
use crate::error::Result;
use crate::kernels::admm::{self, Rule};
use crate::kernels::attention::Attention;
use crate::kernels::attention_adjoint::Passed;
use crate::kernels::gemm::{Sizes, View, product};
use crate::kernels::linear::units::{Exactness, Operand, Units};
use crate::kernels::quantize::{self, Grid};
use crate::kernels::select::gpu::{Scored, marked};
use crate::kernels::self_test::Found;
use crate::kernels::sign_descent::gpu::OnGpu;
use crate::kernels::sign_descent::{Rounding, Start};
use crate::kernels::{channels as channel, gram as grams, linear, precalibrate as ranges, select as selection, trits as planes};
use crate::matrix::Matrix;
use crate::weight::{Float, Ints, Pattern, Weight};

/// Bytes of a binding that holds 128 rows of 150 floats.
const PANELS: u64 = 4 * 128 * 150;
/// Rounding of sums whose order differs.
const SUMS: f64 = 2e-6;
/// Entries at which two roundings of a quotient may decide differently: none where division is exact.
const FEW: f64 = 2e-3;

/// Sets of values.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Values {
    /// Of about normal spread.
    Normal,
    /// Of few levels, so that many are equal, and zeros of both signs.
    Ties,
    /// A few far from all others.
    Tails,
    /// So small that scales in 16 bits are subnormal.
    Small,
    /// So small that scales in f16 would vanish.
    Tiny,
    /// Whose scales lie halfway between two numbers of f16 or of bf16.
    Halfway,
    /// Up to the largest float.
    Large,
    /// Nothing but zeros.
    Zeros,
}

const ALL: [Values; 8] =
    [Values::Normal, Values::Ties, Values::Tails, Values::Small, Values::Tiny, Values::Halfway, Values::Large, Values::Zeros];

impl Values {
    /// So many values, the same in every run.
    fn make(self, count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        let normal = (0..count).map(|_| 2.0 * (uniform() + uniform() + uniform()));
        match self {
            Self::Normal => normal.collect(),
            Self::Ties => normal.map(|value| (value * 2.0).round() / 2.0).collect(),
            Self::Tails => normal.map(|value| value.powi(5)).collect(),
            Self::Small => normal.map(|value| value * 3e-6).collect(),
            Self::Tiny => normal.map(|value| value * 1e-9).collect(),
            Self::Halfway => {
                let step = |value: f32, at: usize| {
                    (1.0 + (2.0 * (value.abs() * 50.0).floor() + 1.0) / [2048.0, 256.0][at / 3 % 2]).copysign(value)
                };
                normal.enumerate().map(|(at, value)| step(value, at)).collect()
            }
            Self::Large => normal.map(|value| value / 3.0 * f32::MAX).collect(),
            Self::Zeros => vec![0.0; count],
        }
    }
}

/// Largest difference, relative to the largest entry.
fn apart(got: &[f64], expected: &[f64]) -> f64 {
    let largest = expected.iter().fold(f64::MIN_POSITIVE, |largest, value| largest.max(value.abs()));
    let difference = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    if got.len() == expected.len() && got.iter().all(|value| value.is_finite()) { difference / largest } else { f64::INFINITY }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// Share of entries that differ.
fn share<T: PartialEq>(got: &[T], expected: &[T]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    got.iter().zip(expected).filter(|(a, b)| a != b).count() as f64 / got.len().max(1) as f64
}

fn found(case: impl Into<String>, difference: f64, tolerance: f64) -> Found {
    Found { case: case.into(), difference, tolerance }
}

pub fn column_squares(gpu: &Gpu) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for (tokens, columns) in [(1, 1), (63, 5), (65, 172), (200, 300)] {
        let x = Values::Tails.make(tokens * columns, 1);
        let (mut got, mut expected) = (grams::gpu::Squares::new(gpu, columns), vec![0.0; columns]);
        for _ in 0..2 {
            got.add(&gpu.upload(&x))?;
            grams::add_column_squares(&x, &mut expected);
        }
        all.push(found(format!("{tokens} x {columns}"), apart(&got.totals()?, &expected), SUMS));
    }
    Ok(all)
}

pub fn gram(gpu: &Gpu) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for (tokens, columns) in [(1, 1), (17, 33), (2100, 70), (64, 130)] {
        let x = Values::Normal.make(tokens * columns, 2);
        let mut expected = vec![0.0; columns * columns];
        grams::add_gram(&x, columns, &mut expected);
        grams::add_gram(&x, columns, &mut expected);
        let Some(sum) = grams::gpu::Gram::new(gpu, columns, u64::MAX) else { continue };
        sum.add(&gpu.upload(&x));
        sum.add(&gpu.upload(&x));
        all.push(found(format!("{tokens} x {columns}"), apart(&sum.totals()?, &expected), SUMS));
    }
    for (tokens, rows, columns) in [(5, 1, 40), (70, 67, 33), (2100, 12, 90)] {
        let (y, x) = (Values::Normal.make(tokens * rows, 24), Values::Normal.make(tokens * columns, 25));
        let mut expected = vec![0.0; rows * columns];
        grams::add_cross(&y, &x, [rows, columns], &mut expected);
        let Some(sum) = grams::gpu::Gram::cross(gpu, [rows, columns], u64::MAX) else { continue };
        sum.add_cross(&gpu.upload(&y), &gpu.upload(&x));
        all.push(found(format!("cross {tokens}, {rows} x {columns}"), apart(&sum.totals()?, &expected), SUMS));
    }
    // In panels, where bindings are as small as they can be.
    let small = gpu.limited(gpu.adapter().workgroups, PANELS);
    let (y, x) = (Values::Normal.make(2100 * 270, 24), Values::Normal.make(2100 * 150, 25));
    let mut expected = vec![0.0; 270 * 150];
    grams::add_cross(&y, &x, [270, 150], &mut expected);
    if let Some(sum) = grams::gpu::Gram::cross(&small, [270, 150], u64::MAX).filter(|_| gpu.adapter().binding_bytes > PANELS) {
        sum.add_cross(&gpu.upload(&y), &gpu.upload(&x));
        all.push(found("cross in panels", apart(&sum.totals()?, &expected), SUMS));
    }
    let mut expected = vec![0.0; 150 * 150];
    grams::add_gram(&x, 150, &mut expected);
    if let Some(sum) = grams::gpu::Gram::new(&small, 150, u64::MAX).filter(|_| gpu.adapter().binding_bytes > PANELS) {
        sum.add(&gpu.upload(&x));
        all.push(found("in panels", apart(&sum.totals()?, &expected), SUMS));
    }
    // Whole numbers whose total needs more digits than one float has.
    let x: Vec<f32> = (0..4 * 40).map(|i| if i < 40 { 4096.0 } else { 1.0 + (i % 3) as f32 }).collect();
    let Some(sum) = grams::gpu::Gram::new(gpu, 40, u64::MAX) else { return Ok(all) };
    let mut expected = vec![0.0; 1600];
    for row in x.chunks(40) {
        sum.add(&gpu.upload(row));
        (0..1600).for_each(|at| expected[at] += f64::from(row[at / 40]) * f64::from(row[at % 40]));
    }
    all.push(found("totals beyond one float", share(&sum.totals()?, &expected), 0.0));
    Ok(all)
}

pub fn select(gpu: &Gpu) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for values in ALL {
        for (rows, columns, count) in [(1, 1, 0), (1, 1, 1), (3, 33, 16), (3, 40, 1), (2, 64, 64), (5, 300, 150), (2, 4100, 1230)] {
            let data = values.make(rows * columns, 3);
            let factors = Values::Ties.make(columns, 17).iter().map(|value| value.abs()).collect::<Vec<_>>();
            let scores: Vec<f32> = data.iter().enumerate().map(|(at, value)| (value.abs() * factors[at % columns]).min(f32::MAX)).collect();
            let (plain, data, factors) = (&data, gpu.upload(&data), gpu.upload(&factors));
            let scored = Scored { values: &data, factors: Some(&factors), rows, columns };
            let got: Vec<u32> = gpu.read(&selection::gpu::keep_but_smallest(gpu, scored, count))?;
            let expected = masks(&scores, columns, |row, scratch, each| selection::smallest(row, count, scratch, each));
            all.push(found(format!("smallest {count} of {rows} x {columns} {values:?}"), share(&got, &expected), 0.0));
            let scored = Scored { factors: None, ..scored };
            let got: Vec<u32> = gpu.read(&selection::gpu::keep_but_smallest(gpu, scored, count))?;
            let scores: Vec<f32> = plain.iter().map(|value| value.abs()).collect();
            let expected = masks(&scores, columns, |row, scratch, each| selection::smallest(row, count, scratch, each));
            all.push(found(format!("smallest {count} of {rows} x {columns} {values:?}, no factors"), share(&got, &expected), 0.0));
        }
        for (rows, columns, kept, of) in
            [(1, 4, 2, 4), (3, 72, 4, 8), (4, 260, 1, 2), (2, 105, 3, 7), (2, 96, 0, 32), (3, 50, 5, 5), (3, 33, 1, 3)]
        {
            let data = values.make(rows * columns, 4);
            let scores: Vec<f32> = data.iter().map(|value| value.abs()).collect();
            let data = gpu.upload(&data);
            let scored = Scored { values: &data, factors: None, rows, columns };
            let got: Vec<u32> = gpu.read(&selection::gpu::keep_in_blocks(gpu, scored, kept, of))?;
            let expected = masks(&scores, columns, |row, scratch, each| selection::smallest_in_blocks(row, kept, of, scratch, each));
            all.push(found(format!("{kept}:{of} of {rows} x {columns} {values:?}"), share(&got, &expected), 0.0));
            let factors: Vec<f32> = (0..columns).map(|column| 0.5 + (column % 5) as f32).collect();
            let scores: Vec<f32> = scores.iter().enumerate().map(|(at, score)| (score * factors[at % columns]).min(f32::MAX)).collect();
            let expected = masks(&scores, columns, |row, scratch, each| selection::smallest_in_blocks(row, kept, of, scratch, each));
            let factors = gpu.upload(&factors);
            let scored = Scored { factors: Some(&factors), ..scored };
            let again: Vec<u32> = gpu.read(&selection::gpu::keep_in_blocks(gpu, scored, kept, of))?;
            all.push(found(format!("{kept}:{of} of {rows} x {columns} {values:?}, factors"), share(&again, &expected), 0.0));
        }
    }
    Ok(all)
}

/// Masks of rows from which what is picked goes.
fn masks(scores: &[f32], columns: usize, pick: impl Fn(&[f32], &mut Vec<u32>, &mut dyn FnMut(usize))) -> Vec<u32> {
    let mut scratch = Vec::new();
    let row = |row: &[f32]| {
        let mut keep = vec![true; columns];
        pick(row, &mut scratch, &mut |at| keep[at] = false);
        selection::gpu::words(&keep)
    };
    scores.chunks(columns).flat_map(row).collect()
}

pub fn keep_largest(gpu: &Gpu) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for values in ALL {
        for (count, gone) in [(1, 0), (1, 1), (31, 7), (5000, 2500), (9001, 9001), (70_000, 699)] {
            let data = values.make(count, 5);
            let keys: Vec<u32> = data.iter().map(|value| value.abs().to_bits()).collect();
            let uploaded = gpu.upload(&data);
            let mut expected = vec![false; count];
            selection::keep_all_but_smallest(&keys, gone, &mut expected);
            let got: Vec<u32> = gpu.read(&selection::gpu::keep_largest(gpu, &uploaded, None, count, gone)?)?;
            all.push(found(format!("{gone} of {count} {values:?}"), share(&marked(&got, count), &expected), 0.0));
            let protected: Vec<bool> = (0..count).map(|at| at % 3 == 0).collect();
            let keys: Vec<u32> = keys.iter().enumerate().map(|(at, &key)| if protected[at] { u32::MAX } else { key }).collect();
            let gone = gone.min(protected.iter().filter(|&&stays| !stays).count());
            selection::keep_all_but_smallest(&keys, gone, &mut expected);
            let stays = gpu.upload(&selection::gpu::words(&protected));
            let got: Vec<u32> = gpu.read(&selection::gpu::keep_largest(gpu, &uploaded, Some(&stays), count, gone)?)?;
            all.push(found(format!("{gone} of {count} {values:?}, some protected"), share(&marked(&got, count), &expected), 0.0));
        }
    }
    Ok(all)
}

/// Codes that differ, where one that differs by more than a step counts as all of them.
fn codes_apart(got: &[u8], expected: &[u8]) -> f64 {
    let far = got.iter().zip(expected).any(|(a, b)| a.abs_diff(*b) > 1);
    if far { f64::INFINITY } else { share(got, expected) }
}

pub fn quantize(gpu: &Gpu) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for values in ALL {
        for (bits, symmetric, scale_float, rows, columns, group) in [
            (4, true, Float::F16, 3, 256, 128),
            (2, true, Float::BF16, 5, 70, 35),
            (3, false, Float::F16, 2, 172, 86),
            (8, false, Float::F32, 3, 129, 129),
            (8, true, Float::F32, 1, 1, 1),
            (5, false, Float::BF16, 7, 66, 33),
        ] {
            // A scale beyond f16 is refused elsewhere.
            if values == Values::Large && scale_float == Float::F16 {
                continue;
            }
            let grid = Grid { bits, group, symmetric, scale_float };
            let weight = Matrix::new(rows, columns, values.make(rows * columns, 6));
            let case = format!("{rows} x {columns}, {bits} bits, group {group}, symmetric {symmetric}, {values:?}");
            let (expected, sums) = quantize::round_to_nearest(&weight, grid);
            let (got, got_sums) = quantize::gpu::round_to_nearest(gpu, &weight, grid, None)?;
            all.extend(compare(&case, &got, &expected));
            if ![Values::Large, Values::Small, Values::Tiny].contains(&values) {
                all.push(found(format!("{case}, sums"), apart(&got_sums, &sums), 1e-4));
            }
            let bounds = ranges::precalibrate(&weight, grid, 0.02, false);
            if let Some(bounds) = bounds {
                let expected = quantize::round_to_nearest_within(&weight, grid, &bounds).0;
                let got = quantize::gpu::round_to_nearest(gpu, &weight, grid, Some(&bounds))?.0;
                all.extend(compare(&format!("{case}, bounds"), &got, &expected));
            }
        }
    }
    Ok(all)
}

fn compare(case: &str, got: &Ints, expected: &Ints) -> [Found; 3] {
    let bits = |ints: &Ints| ints.scales.iter().map(|scale| scale.to_bits()).collect::<Vec<_>>();
    [
        found(format!("{case}, codes"), codes_apart(&got.codes, &expected.codes), 0.0),
        found(format!("{case}, scales"), share(&bits(got), &bits(expected)), 0.0),
        found(
            format!("{case}, zero points"),
            share(&got.zeros.clone().unwrap_or_default(), &expected.zeros.clone().unwrap_or_default()),
            0.0,
        ),
    ]
}

pub fn sign_descent(gpu: &Gpu) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for start in [Start::Range, Start::Grid, Start::Codes] {
        for (bits, symmetric, scale_float, rows, columns, group) in [
            (4, true, Float::F16, 5, 256, 128),
            (2, false, Float::BF16, 3, 70, 35),
            (3, true, Float::F32, 4, 33, 33),
            (3, false, Float::F16, 4, 144, 72),
            (2, true, Float::BF16, 40, 64, 8),
            (2, false, Float::F16, 40, 65, 8),
        ] {
            let mut weight = Matrix::new(rows, columns, Values::Tails.make(rows * columns, 7));
            // Groups on one side of zero, and of nothing but zeros.
            weight.data[..columns].iter_mut().for_each(|value| *value = value.abs());
            weight.data[columns..2 * columns].iter_mut().for_each(|value| *value = -value.abs());
            weight.data[2 * columns..2 * columns + group].fill(0.0);
            let mask = Matrix::from_fn(rows, columns, |i, j| if (i + j) % 5 == 0 { 0.0 } else { 1.0 });
            let ints = quantize::round_to_nearest(&weight, Grid { bits, group, symmetric, scale_float }).0;
            let mut expected = Rounding::new(start, &weight, (rows > 3).then_some(&mask), &ints);
            let Some(layer) = OnGpu::new(gpu, expected.clone()) else { continue };
            let case = format!("{start:?}, {bits} bits, symmetric {symmetric}, {rows} x {columns}");
            let mut quantized = vec![0.0; rows * columns];
            expected.quantize(&mut quantized);
            all.push(found(format!("{case}, before"), share(&gpu.read::<f32>(layer.quantized())?, &quantized), FEW));
            for step in 0..9u64 {
                // Whole numbers, so that the slopes of both have one sign.
                let gradient: Vec<f32> = Values::Normal.make(rows * columns, 8 + step).iter().map(|value| (value * 8.0).round()).collect();
                layer.step(&gpu.upload(&gradient), 0.07, 0.03);
                expected.step(&gradient, 0.07, 0.03);
            }
            expected.quantize(&mut quantized);
            let largest = quantized.iter().fold(f32::MIN_POSITIVE, |largest, value| largest.max(value.abs()));
            let got: Vec<f32> = gpu.read(layer.quantized())?;
            let differ = got.iter().zip(&quantized).filter(|(a, b)| (**a - **b).abs() > 1e-6 * largest).count();
            all.push(found(format!("{case}, after nine steps"), differ as f64 / got.len() as f64, FEW));
            let (got, ints) = (layer.fetch()?.ints(), expected.ints());
            all.push(found(format!("{case}, codes"), codes_apart(&got.codes, &ints.codes), FEW));
        }
    }
    Ok(all)
}

pub fn attention(gpu: &Gpu) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for (windows, attention) in [
        (1, Attention { seq: 1, heads: 1, kv_heads: 1, head_dim: 4, scale: 1.0, softcap: None, window: None, sinks: None }),
        (2, Attention { seq: 37, heads: 6, kv_heads: 2, head_dim: 12, scale: 0.3, softcap: None, window: None, sinks: None }),
        (3, Attention { seq: 70, heads: 2, kv_heads: 1, head_dim: 64, scale: 0.2, softcap: Some(2.0), window: Some(9), sinks: None }),
        (1, Attention { seq: 500, heads: 2, kv_heads: 1, head_dim: 64, scale: 0.1, softcap: None, window: None, sinks: None }),
        (2, Attention { seq: 130, heads: 6, kv_heads: 3, head_dim: 8, scale: 0.5, softcap: Some(0.7), window: Some(64), sinks: None }),
        (1, Attention { seq: 64, heads: 2, kv_heads: 2, head_dim: 4, scale: 0.5, softcap: None, window: Some(1), sinks: None }),
        (1, Attention { seq: 50, heads: 2, kv_heads: 2, head_dim: 256, scale: 0.06, softcap: None, window: Some(33), sinks: None }),
    ] {
        let tokens = windows * attention.seq;
        if !attention.fits(gpu, tokens) {
            continue;
        }
        let (width, kv_width) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
        let [q, dout] = [20, 21].map(|seed| Values::Normal.make(tokens * width, seed));
        let [k, v] = [22, 23].map(|seed| Values::Normal.make(tokens * kv_width, seed));
        let mut out = vec![0.0; tokens * width];
        attention.run_cpu(&q, &k, &v, &mut out);
        let [q_buffer, k_buffer, v_buffer] = [&q, &k, &v].map(|values| gpu.upload(values));
        let buffers = [&q_buffer, &k_buffer, &v_buffer];
        let [mixed, normaliser] = attention.run_on(gpu, buffers);
        let (got, normaliser) = (gpu.read::<f32>(&mixed)?, gpu.read::<f32>(&normaliser)?);
        let case = format!("{windows} windows, {attention:?}");
        all.push(found(case.clone(), apart(&wide(&got), &wide(&out)), 1e-5));
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        attention.adjoint(&Passed { q: &q, k: &k, v: &v, out: &out, dout: &dout }, &mut dq, &mut dk, &mut dv);
        let products = out.chunks(attention.head_dim).zip(dout.chunks(attention.head_dim));
        let products = products.map(|(out, dout)| out.iter().zip(dout).map(|(a, b)| a * b).sum::<f32>());
        let pairs: Vec<[f32; 2]> = normaliser.into_iter().zip(products).map(|(a, b)| [a, b]).collect();
        let got = attention.adjoint_on(gpu, buffers, &gpu.upload(&pairs), &gpu.upload(&dout));
        for ((name, got), expected) in ["queries", "keys", "values"].into_iter().zip(&got).zip([dq, dk, dv]) {
            // With one key there is no slope but rounding.
            let one = attention.seq == 1 || attention.window == Some(1);
            let tolerance = if one && name != "values" { f64::INFINITY } else { 1e-5 };
            all.push(found(format!("{case}, {name}"), apart(&wide(&gpu.read::<f32>(got)?), &wide(&expected)), tolerance));
        }
    }
    Ok(all)
}

pub fn channels(gpu: &Gpu) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for (tokens, width) in [(1, 1), (3, 5), (200, 70), (65, 300)] {
        // Far from zero, where one pass over squares would lose the variance.
        let values: Vec<f32> = Values::Normal.make(tokens * width, 9).iter().map(|value| value + 50.0).collect();
        let [mean, variance] = channel::channels(width, &values);
        let [got_mean, got_variance] = channel::gpu::channels(gpu, width, &gpu.upload(&values))?;
        all.push(found(format!("mean of {tokens} x {width}"), apart(&got_mean, &mean), SUMS));
        all.push(found(format!("variance of {tokens} x {width}"), apart(&got_variance, &variance), 1e-5));
    }
    Ok(all)
}

pub fn products(gpu: &Gpu) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for (m, n, k) in [(1, 1, 1), (3, 130, 17), (65, 64, 70), (70, 90, 172), (2, 3, 8200)] {
        // The longer a sum, the more its order says.
        let sums = SUMS * (1.0 + k as f64 / 2000.0);
        let (a, b) = (Values::Normal.make(m * k, 10), Matrix::new(n, k, Values::Normal.make(n * k, 11)));
        let uploaded = gpu.upload(&a);
        let exact = |weight: &Matrix| {
            let mut c = vec![0.0; m * n];
            product(Sizes { m, n, k }, &mut c, n, false, 1.0, View::rows(&a, k), View::transposed(&weight.data, k), false);
            wide(&c)
        };
        let got: Vec<f32> = gpu.read(&linear::gpu::product(gpu, Sizes { m, n, k }, &uploaded, &gpu.upload(&b.data)))?;
        all.push(found(format!("dense {m} x {n} x {k}"), apart(&wide(&got), &exact(&b)), sums));
        let (weight, parts) = (gpu.upload(&b.data), gpu.empty(m * n));
        linear::gpu::product_in_parts(gpu, Sizes { m, n, k }, [&uploaded, &weight, &parts], 1);
        all.push(found(format!("dense {m} x {n} x {k} in parts"), share(&gpu.read::<f32>(&parts)?, &got), 0.0));
        for symmetric in [true, false] {
            let grid = Grid { bits: 4, group: (k / 2).max(1), symmetric, scale_float: Float::F16 };
            let ints = quantize::round_to_nearest(&b, grid).0;
            let got: Vec<f32> = gpu.read(&linear::gpu::PackedInts::new(gpu, &ints).product(gpu, &uploaded, m))?;
            all.push(found(format!("integers {m} x {n} x {k}"), apart(&wide(&got), &exact(&ints.to_matrix())), sums));
        }
        let trits = planes::fit_free(&Weight::Dense(b.clone()), trit_rule((k / 2).max(1), true), None).0;
        let got: Vec<f32> = gpu.read(&linear::gpu::PackedTrits::new(gpu, &trits).product(gpu, &uploaded, m))?;
        all.push(found(format!("trits {m} x {n} x {k}"), apart(&wide(&got), &exact(&trits.to_matrix())), sums));
    }
    Ok(all)
}

pub fn units(gpu: &Gpu) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for (units, name) in Units::all(gpu).into_iter().zip(["without matrix units", "on matrix units"]) {
        for values in [Values::Normal, Values::Tails, Values::Tiny, Values::Zeros] {
            for (m, n, k, exactness, tolerance) in [
                (1, 1, 1, Exactness::Split, SUMS),
                (130, 257, 70, Exactness::Split, SUMS),
                (3, 5, 1500, Exactness::Split, 2.0 * SUMS),
                (140, 33, 65, Exactness::Half, 1e-3),
            ] {
                let (a, b) = (values.make(m * k, 26), Values::Normal.make(n * k, 27));
                let mut exact = vec![0.0; m * n];
                product(Sizes { m, n, k }, &mut exact, n, false, 1.0, View::rows(&a, k), View::transposed(&b, k), false);
                let (left, right) = (gpu.upload(&a), gpu.upload(&b));
                let case = format!("{m} x {n} x {k} {values:?} {exactness:?} {name}");
                let Some(got) = units.product(Operand::new(&left, [m, k]), Operand::new(&right, [n, k]), exactness) else { continue };
                all.push(found(&case, apart(&wide(&gpu.read::<f32>(&got)?), &wide(&exact)), tolerance));
                // The same operands, lying transposed.
                let turned = |values: &[f32], rows: usize| (0..k * rows).map(|at| values[at % rows * k + at / rows]).collect::<Vec<_>>();
                let (left, right) = (gpu.upload(&turned(&a, m)), gpu.upload(&turned(&b, n)));
                let [left, right] = [Operand::new(&left, [k, m]).transposed(), Operand::new(&right, [k, n]).transposed()];
                let Some(got) = units.product(left, right, exactness) else { continue };
                all.push(found(format!("{case}, transposed"), apart(&wide(&gpu.read::<f32>(&got)?), &wide(&exact)), tolerance));
            }
        }
        // Times one, what a half holds of a float.
        let (a, one) = (Values::Tails.make(40 * 64, 30), (0..64 * 64).map(|at| f32::from(at % 65 == 0)).collect::<Vec<_>>());
        let largest = a.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let scale = 2.0f32.powi(14 - largest.log2().floor() as i32);
        let rounded: Vec<f32> = a.iter().map(|value| f16::from_f32(value * scale).to_f32() / scale).collect();
        let (left, right) = (gpu.upload(&a), gpu.upload(&one));
        if let Some(got) = units.product(Operand::new(&left, [40, 64]), Operand::new(&right, [64, 64]), Exactness::Half) {
            all.push(found(format!("halves {name}"), share(&gpu.read::<f32>(&got)?, &rounded), 0.0));
        }
        let left = gpu.upload(&[a, vec![f32::INFINITY; 64]].concat());
        if let Some(got) = units.product(Operand::new(&left, [41, 64]), Operand::new(&gpu.zeros(64), [1, 64]), Exactness::Split) {
            let finite: Vec<bool> = gpu.read::<f32>(&got)?.iter().map(|value| value.is_finite()).collect();
            all.push(found(format!("no number {name}"), share(&finite, &[false; 41]), 0.0));
        }
        let (y, x) = (Values::Normal.make(2000 * 40, 28), Values::Normal.make(2000 * 150, 29));
        let mut expected = vec![0.0; 40 * 150];
        grams::add_cross(&y, &x, [40, 150], &mut expected);
        let (y, x) = (gpu.upload(&y), gpu.upload(&x));
        if let Some(sum) = grams::gpu::Gram::cross(gpu, [40, 150], u64::MAX).filter(|sum| sum.add_on(&units, &y, &x)) {
            all.push(found(format!("cross sums {name}"), apart(&sum.totals()?, &expected), SUMS));
        }
        let mut expected = vec![0.0; 150 * 150];
        let host: Vec<f32> = gpu.read(&x)?;
        grams::add_gram(&host, 150, &mut expected);
        for (name, gpu) in [(name, gpu), ("in panels", &gpu.limited(gpu.adapter().workgroups, PANELS))] {
            if let Some(sum) = grams::gpu::Gram::new(gpu, 150, u64::MAX).filter(|sum| sum.add_on(&units, &x, &x)) {
                all.push(found(format!("sums {name}"), apart(&sum.totals()?, &expected), SUMS));
            }
        }
    }
    Ok(all)
}

pub fn admm(gpu: &Gpu) -> Result<Vec<Found>> {
    let (rows, columns) = (13, 64);
    let exact = Values::Normal.make(rows * columns, 12);
    // The inverse of a well-conditioned symmetric matrix, near enough.
    let off = Values::Normal.make(columns * columns, 13);
    let inverse: Vec<f32> = (0..columns * columns)
        .map(|at| {
            let (i, j) = (at / columns, at % columns);
            if i == j { 0.9 } else { 0.004 * (off[i * columns + j] + off[j * columns + i]) }
        })
        .collect();
    let keep: Vec<bool> = (0..exact.len()).map(|at| at % 3 != 0).collect();
    let largest = |pattern, ramp, cubic| Rule::Largest { sparsity: 0.5, pattern, ramp, cubic };
    let mut all = Vec::new();
    for (name, iters, rule) in [
        ("no iteration", 0, largest(Pattern::Unstructured, 0, true)),
        ("fixed mask", 8, Rule::Fixed(&keep)),
        ("cubic", 8, largest(Pattern::Unstructured, 6, true)),
        ("at once", 5, largest(Pattern::Unstructured, 3, false)),
        ("2:4", 8, largest(Pattern::Blocks { kept: 2, of: 4 }, 6, true)),
    ] {
        let (z, mask) = admm::prune(&exact, columns, &inverse, 1.0, iters, rule);
        let Some((got, got_mask)) = admm::gpu::prune(gpu, &exact, columns, &inverse, 1.0, iters, rule)? else { continue };
        all.push(found(format!("{name}, mask"), share(&got_mask, &mask), FEW));
        all.push(found(format!("{name}, values"), apart(&wide(&got), &wide(&z)), 1e-5));
    }
    Ok(all)
}

pub fn precalibrate(gpu: &Gpu) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for values in [Values::Normal, Values::Ties, Values::Tails, Values::Zeros, Values::Large, Values::Tiny] {
        for (bits, symmetric, scale_float, rows, columns, group) in
            [(3, true, Float::F16, 40, 256, 128), (2, false, Float::BF16, 33, 70, 35), (4, false, Float::F32, 3, 9, 8)]
        {
            for pruned in [false, true] {
                let grid = Grid { bits, group, symmetric, scale_float };
                let mut weight = Matrix::new(rows, columns, values.make(rows * columns, 14));
                weight.data[columns..2 * columns].fill(0.0);
                weight.data[..columns].iter_mut().for_each(|value| *value = value.abs());
                let case = format!("{rows} x {columns}, {bits} bits, symmetric {symmetric}, {values:?}, pruned {pruned}");
                let theta = ranges::threshold(&weight.data, 0.02, pruned);
                let uploaded = gpu.upload(&weight.data);
                let got = ranges::gpu::threshold(gpu, &uploaded, weight.data.len(), 0.02, pruned)?;
                all.push(found(format!("{case}, threshold"), share(&[got], &[theta]), 0.0));
                let Some(theta) = theta else { continue };
                let expected = ranges::divergences(&weight, grid, theta, pruned);
                let got = ranges::gpu::divergences(gpu, &weight, grid, theta, pruned)?;
                all.push(found(format!("{case}, divergences"), share(&got, &expected), 0.0));
                let expected = ranges::precalibrate(&weight, grid, 0.02, pruned);
                let got = ranges::gpu::precalibrate(gpu, &weight, grid, 0.02, pruned)?;
                let ends = |bounds: Option<quantize::Bounds>| bounds.map(|bounds| [bounds.low, bounds.high].concat()).unwrap_or_default();
                all.push(found(format!("{case}, ranges"), share(&ends(got), &ends(expected)), 0.02));
            }
        }
    }
    Ok(all)
}

fn trit_rule(group: usize, residual_start: bool) -> planes::Rule {
    planes::Rule { group, residual_start, max_iters: 50, epsilon: 1e-4, absolute: false }
}

pub fn trits(gpu: &Gpu) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for values in ALL {
        for (rows, columns, group) in [(1, 1, 1), (6, 256, 128), (5, 172, 86), (6, 129, 128), (3, 1030, 1030)] {
            if values == Values::Large || values == Values::Tiny {
                continue;
            }
            for (residual_start, weighed) in [(true, false), (false, false), (true, true)] {
                let rule = trit_rule(group, residual_start);
                let weight = Matrix::new(rows, columns, values.make(rows * columns, 15));
                let importance: Vec<f32> = (0..columns).map(|column| 0.2 + (column % 7) as f32).collect();
                let importance = weighed.then_some(&importance[..]);
                let dense = Weight::Dense(weight.clone());
                let case = format!("{rows} x {columns}, group {group}, {values:?}, residual {residual_start}, weighed {weighed}");
                let (expected, sums) = planes::fit_free(&dense, rule, importance);
                let (got, got_sums) = planes::gpu::fit_free(gpu, &weight, rule, importance)?;
                // Where many weights are equal, a scale that rounds the other way takes all of them along.
                let apart_at_most = if values == Values::Ties { 0.06 } else { 0.02 };
                all.push(found(format!("{case}, sums"), apart(&got_sums, &sums), 1e-3));
                all.push(found(
                    format!("{case}, planes"),
                    apart(&wide(&got.to_matrix().data), &wide(&expected.to_matrix().data)),
                    apart_at_most,
                ));
                let (expected, _) = planes::fit_tied(&dense, rule, importance, Float::BF16);
                let (got, _) = planes::gpu::fit_tied(gpu, &weight, rule, importance, Float::BF16)?;
                all.push(found(format!("{case}, tied"), share(&got.codes, &expected.codes), 0.01));
            }
        }
    }
    // Groups of one magnitude, or of one and a single other, whose equations say little: what is added to them decides.
    for other in [1.0, 0.5, 1.3] {
        let size = |i: usize, j: usize| 0.3 * (i + 1) as f32 * if j % 20 == 7 { other } else { 1.0 };
        let weight = Matrix::from_fn(9, 60, |i, j| if (7 * i + 3 * j) % 5 < 2 { -size(i, j) } else { size(i, j) });
        for residual_start in [true, false] {
            let rule = trit_rule(20, residual_start);
            let (expected, _) = planes::fit_free(&Weight::Dense(weight.clone()), rule, None);
            let (got, _) = planes::gpu::fit_free(gpu, &weight, rule, None)?;
            let pairs = |scales: &[[f32; 2]]| wide(&scales.concat());
            let case = format!("one magnitude but for {other} of it, residual {residual_start}");
            all.push(found(format!("{case}, scales"), apart(&pairs(&got.scales), &pairs(&expected.scales)), 2e-3));
        }
    }
    Ok(all)
}
