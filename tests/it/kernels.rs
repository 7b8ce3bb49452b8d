//! Every kernel of the forward: its CPU path against its definition in tensor algebra, on odd shapes.

use burn::tensor::{Device, Distribution, Tensor};
use drawknife::kernels::attention::Attention;
use drawknife::kernels::gated::{Activation, gated, gated_reference};
use drawknife::kernels::rms_norm::{NormKind, rms_norm, rms_norm_reference};
use drawknife::kernels::rope::{Table, rope, rope_reference};
use drawknife::kernels::{tensor, values};

thread_local! {
    /// Every tensor of a test differs from the others.
    static CALLS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Numbers of about normal spread, the same in every run.
pub fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    let count: usize = shape.iter().product();
    let mut state = CALLS.replace(CALLS.get() + 1) ^ 0x2545_f491_4f6c_dd1d;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let values: Vec<f32> = (0..count).map(|_| 3.0 * (uniform() + uniform() + uniform())).collect();
    tensor(values, shape, &Device::flex())
}

/// Largest difference, relative to the largest magnitude or to 1 when all are smaller.
fn difference<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f32 {
    let (a, b) = (values(a), values(b));
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(1.0f32, |largest, value| largest.max(value.abs()));
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

#[test]
fn rms_norm_follows_its_definition() {
    for (rows, width) in [(1, 1), (3, 7), (65, 172), (130, 64)] {
        for kind in [NormKind::Plain, NormKind::OnePlus, NormKind::Layer] {
            let (x, weight) = (random([rows, width]), random([width]));
            let found = difference(rms_norm(&x, &weight, 1e-5, kind), rms_norm_reference(x, weight, 1e-5, kind));
            assert!(found < 2e-6, "{rows} x {width}: {found}");
        }
    }
}

#[test]
fn gated_follows_its_definition_also_where_it_saturates() {
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::Clamped] {
        for (rows, width) in [(1, 1), (5, 33), (70, 300)] {
            let (gate, up) = (random([rows, width]) * 12.0, random([rows, width]));
            let found = difference(gated(activation, gate.clone(), up.clone()), gated_reference(activation, gate, up));
            assert!(found < 2e-6, "{activation:?} {rows} x {width}: {found}");
        }
    }
}

#[test]
fn rope_follows_its_definition_with_partial_rotation() {
    for (windows, seq, heads, head_dim, half) in [(1, 1, 1, 2, 1), (2, 9, 3, 10, 5), (3, 17, 2, 18, 4)] {
        let frequencies: Vec<f32> = (0..half).map(|t| 10f32.powf(-(t as f32))).collect();
        for interleaved in [false, true] {
            let table = Table { interleaved, ..Table::new(&frequencies, 1.2, seq).scaled(|row| 1.0 + row as f32 / 8.0) };
            let x = random([windows * seq, heads * head_dim]);
            let found = difference(rope(x.clone(), head_dim, &table), rope_reference(x, head_dim, &table));
            assert!(found < 1e-6, "{found}");
        }
    }
}

#[test]
fn attention_follows_its_definition_with_groups_windows_and_caps() {
    for (windows, seq, heads, kv_heads, head_dim) in
        [(1, 1, 1, 1, 2), (2, 24, 4, 2, 10), (1, 130, 6, 3, 14), (2, 65, 4, 1, 8), (1, 64, 2, 2, 6)]
    {
        // Windows come with a share of nothing beside them.
        let sinks: Vec<f32> = (0..heads).map(|head| head as f32 * 0.7 - 1.0).collect();
        for window in [None, Some(1), Some(7), Some(64), Some(1000)] {
            for softcap in [None, Some(2.0)] {
                let attention =
                    Attention { seq, heads, kv_heads, head_dim, scale: 0.3, softcap, window, sinks: window.map(|_| sinks.as_slice()) };
                let q = random([windows * seq, heads * head_dim]);
                let (k, v) = (random([windows * seq, kv_heads * head_dim]), random([windows * seq, kv_heads * head_dim]));
                let found = difference(attention.run(q.clone(), k.clone(), v.clone()), attention.run_reference(q, k, v));
                assert!(found < 5e-6, "{attention:?}: {found}");
            }
        }
    }
}

#[test]
fn gradients_flow_through_the_definitions() {
    let device = Device::flex().autodiff();
    let x = Tensor::<2>::random([6, 8], Distribution::Normal(0.0, 1.0), &device).require_grad();
    let weight = Tensor::<1>::ones([8], &device);
    let table = Table::new(&[1.0, 0.1], 1.0, 6);
    let attention = Attention { seq: 6, heads: 2, kv_heads: 2, head_dim: 4, scale: 0.5, softcap: None, window: None, sinks: None };
    let normed = rope(rms_norm(&x, &weight, 1e-5, NormKind::Plain), 4, &table);
    let mixed = gated(Activation::Silu, attention.run(normed.clone(), normed.clone(), normed.clone()), normed);
    let gradients = mixed.sum().backward();
    let gradient = values(x.grad(&gradients).unwrap());
    assert!(gradient.iter().all(|value| value.is_finite()) && gradient.iter().any(|value| value.abs() > 1e-3));
}
