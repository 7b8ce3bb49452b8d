//! The hand-written adjoint of the block against automatic differentiation of the one forward, finite differences, and
//! itself under other numbers of threads.

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use drawknife::checkpoint::{Checkpoint, source::Plain};
use drawknife::kernels::attention::Attention;
use drawknife::kernels::attention_adjoint::Passed;
use drawknife::kernels::gated::{Activation, gated_adjoint, gated_reference};
use drawknife::kernels::rms_norm::{rms_norm_adjoint, rms_norm_reference};
use drawknife::kernels::rope::{Table, rope_cpu, rope_reference};
use drawknife::kernels::{tensor, values};
use drawknife::model::Model;
use drawknife::model::backward::{self, Gradients, Wanted, squared_error, trimmed_squared_error, upstream};
use drawknife::model::block::{Parameters, Place, Role};
use drawknife::model::config::Config;
use drawknife::model::forward::{self, Spec};

use crate::kernels::random;

const ALL: Wanted = Wanted { weights: true, norms: true, input: true };

/// Largest difference, relative to the largest magnitude or to `floor` when all are smaller.
fn difference(found: &[f32], exact: &[f32], floor: f32) -> f32 {
    assert_eq!(found.len(), exact.len());
    let largest = exact.iter().fold(floor, |largest, value| largest.max(value.abs()));
    // A NaN among the differences must not be passed over, as f32::max would.
    found.iter().zip(exact).map(|(a, b)| (a - b).abs()).fold(0.0, |worst, off| if off > worst || off.is_nan() { off } else { worst })
        / largest
}

/// Parameters of a layer of a golden model with livelier weights than its own.
fn lively(model: &Model<'_>, index: usize) -> Parameters {
    let mut block = model.load_block(index).unwrap();
    for linear in &mut block.linears {
        if let Some(bias) = &mut linear.bias {
            *bias = values(random([bias.len()]) * 0.2);
        }
    }
    let mut parameters = Parameters::take(&mut block, &Device::flex());
    for role in Role::ALL {
        let [outputs, inputs] = model.shape(role);
        parameters.set_weight(role, random([outputs, inputs]) * (1.2 / (inputs as f32).sqrt()));
    }
    for norm in &block.norms {
        parameters.set_norm(norm.place, random([norm.weight.len()]) * 0.3 + 0.8);
    }
    parameters
}

/// The same parameters on a device that differentiates.
fn tracked(parameters: &Parameters, device: &Device) -> Parameters {
    let mut tracked = Parameters::default();
    for role in Role::ALL {
        let weight = parameters.weight(role);
        tracked.set_weight(role, tensor(values(weight.clone()), weight.dims(), device).require_grad());
        if let Some(bias) = parameters.bias(role) {
            tracked.set_bias(role, tensor(values(bias.clone()), bias.dims(), device));
        }
    }
    for place in Place::ALL {
        if let Some(weight) = parameters.norm(place) {
            tracked.set_norm(place, tensor(values(weight.clone()), weight.dims(), device).require_grad());
        }
    }
    tracked
}

/// Compares every gradient of Σ (y − target)² with automatic differentiation.
fn compare(what: &str, spec: &Spec<'_>, parameters: &Parameters, x: &Tensor<2>, target: &Tensor<2>) {
    let device = Device::flex().autodiff();
    let tracked = tracked(parameters, &device);
    let leaf = tensor::<2>(values(x.clone()), x.dims(), &device).require_grad();
    let aim = tensor::<2>(values(target.clone()), x.dims(), &device);
    let exact = (forward::block(spec, &tracked, leaf.clone(), &mut |_, _| {}) - aim).powi_scalar(2).sum();
    let exact_loss = f64::from(values(exact.clone())[0]);
    let exact = exact.backward();
    let mut gradients = Gradients::default();
    let target = values(target.clone());
    let loss = backward::block(spec, parameters, &values(x.clone()), ALL, &mut gradients, &mut squared_error(&target, 1.0));
    assert!((loss - exact_loss).abs() < 1e-4 * exact_loss, "{what}: loss {loss}, {exact_loss}");
    // With one token a window, the gradients of queries and keys are zero but for rounding.
    let floor = 0.01 * values(leaf.grad(&exact).unwrap()).iter().fold(1e-30f32, |largest, value| largest.max(value.abs()));
    let check = |name: &str, found: &[f32], exact: Vec<f32>| {
        let found = difference(found, &exact, floor);
        assert!(found < 1e-4, "{what}, {name}: {found}");
    };
    for role in Role::ALL {
        check(role.name(), gradients.weight(role), values(tracked.weight(role).grad(&exact).unwrap()));
    }
    for place in Place::ALL {
        match tracked.norm(place) {
            Some(norm) => check(&format!("{place:?}"), gradients.norm(place), values(norm.grad(&exact).unwrap())),
            None => assert!(gradients.norm(place).is_empty()),
        }
    }
    check("input", gradients.input(), values(leaf.grad(&exact).unwrap()));
}

fn golden() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    cases.sort();
    cases
}

#[test]
fn gradients_of_every_family_agree_with_automatic_differentiation() {
    let mut families = std::collections::BTreeSet::new();
    for case in golden() {
        let checkpoint = Checkpoint::open(&case).unwrap();
        let model = Model::open(&checkpoint, &Plain).unwrap();
        families.insert(model.config.family.model_type);
        for index in 0..model.config.layers.len() {
            let parameters = lively(&model, index);
            for (windows, seq) in [(1, 1), (3, 5), (9, 70)] {
                let spec = Spec::new(&model.config, index, seq);
                let shape = [windows * seq, model.config.hidden];
                compare(&format!("{} {index} {windows} x {seq}", case.display()), &spec, &parameters, &random(shape), &random(shape));
            }
        }
    }
    assert_eq!(families.len(), drawknife::model::architecture::FAMILIES.len(), "{families:?}");
}
