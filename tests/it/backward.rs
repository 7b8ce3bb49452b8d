//! The hand-written adjoint of the block against automatic differentiation of the one forward, finite differences, and
//! itself under other numbers of threads.

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use drawknife::checkpoint::Checkpoint;
use drawknife::kernels::attention::Attention;
use drawknife::kernels::attention_adjoint::Passed;
use drawknife::kernels::gated::{Activation, gated_adjoint, gated_reference};
use drawknife::kernels::gemm::{Sizes, View, product};
use drawknife::kernels::rms_norm::{NormKind, rms_norm_adjoint, rms_norm_reference};
use drawknife::kernels::rope::{Table, rope_cpu, rope_reference};
use drawknife::kernels::rough_product::Precision;
use drawknife::kernels::routing::route;
use drawknife::kernels::{tensor, values};
use drawknife::model::Model;
use drawknife::model::backward::{self, Gradients, Wanted};
use drawknife::model::block::{Parameters, Place, Role};
use drawknife::model::config::Config;
use drawknife::model::forward::{self, Point, Spec};
use drawknife::model::loss::{squared_error, trimmed_squared_error, upstream};
use drawknife::model::mixture::Which;

use crate::kernels::random;

const ALL: Wanted = Wanted { weights: true, norms: true, input: true, precision: Precision::Single };

/// Largest difference, relative to the largest magnitude or to `floor` when all are smaller.
pub fn difference(found: &[f32], exact: &[f32], floor: f32) -> f32 {
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
    let mut parameters = Parameters::take(&mut block, &drawknife::device::Device::cpu());
    for role in parameters.roles().collect::<Vec<_>>() {
        let [outputs, inputs] = model.shape(index, role);
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
    for role in parameters.roles() {
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
    let loss = backward::block(spec, parameters, x, ALL, &mut gradients, &mut squared_error(&target, 1.0)).unwrap().get();
    assert!((loss - exact_loss).abs() < 1e-4 * exact_loss, "{what}: loss {loss}, {exact_loss}");
    // With one token a window, the gradients of queries and keys are zero but for rounding.
    let floor = 0.01 * values(leaf.grad(&exact).unwrap()).iter().fold(1e-30f32, |largest, value| largest.max(value.abs()));
    let check = |name: &str, found: &[f32], exact: Vec<f32>| {
        let found = difference(found, &exact, floor);
        assert!(found < 1e-4, "{what}, {name}: {found}");
    };
    let slopes: Vec<_> = parameters.roles().map(|role| (role, values(tracked.weight(role).grad(&exact).unwrap()))).collect();
    let steepest = slopes.iter().flat_map(|(_, slope)| slope).fold(1e-30f32, |largest, value| largest.max(value.abs()));
    for (role, slope) in slopes {
        let nothing = spec.seq == 1 && matches!(role, Role::Query | Role::Key);
        // How large rounding is depends on the processor, and on what it is rounding of: here the slopes of all weights.
        let floor = if nothing { floor.max(0.01 * steepest) } else { floor };
        let found = difference(gradients.weight(role), &slope, floor);
        assert!(found < 1e-4, "{what}, {}: {found}", role.name());
    }
    for place in Place::ALL {
        match tracked.norm(place) {
            Some(norm) => check(&format!("{place:?}"), gradients.norm(place), values(norm.grad(&exact).unwrap())),
            None => assert!(gradients.norm(place).is_empty()),
        }
    }
    check("input", gradients.input(), values(leaf.grad(&exact).unwrap()));
}

/// Folders of the golden models.
pub fn golden() -> Vec<PathBuf> {
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
        let source = drawknife::formats::open(&checkpoint).unwrap();
        let model = Model::open(&checkpoint, source.as_ref()).unwrap();
        families.insert(model.config.family.model_type);
        // Mixtures and delta rules leave the graph: finite differences say what their gradients are.
        let whole = |index: &usize| !model.config.layers[*index].mixed && !model.config.layers[*index].linear;
        for index in (0..model.config.layers.len()).filter(whole) {
            let parameters = lively(&model, index);
            for (windows, seq) in [(1, 1), (3, 5), (9, 70)] {
                let spec = Spec::new(&model.config, index, seq);
                let shape = [windows * seq, model.config.hidden];
                compare(&format!("{} {index} {windows} x {seq}", case.display()), &spec, &parameters, &random(shape), &random(shape));
            }
        }
    }
    assert_eq!(families.len(), drawknife::model::architecture::families::FAMILIES.len(), "{families:?}");
}

/// Parameters and description of a one-layer llama of some size, with grouped kv heads.
fn llama(hidden: usize, middle: usize, heads: usize, kv_heads: usize) -> (Config, Parameters) {
    let config = serde_json::json!({"model_type": "llama", "hidden_size": hidden, "intermediate_size": middle, "num_hidden_layers": 1,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 32});
    let kv = kv_heads * hidden / heads;
    let mut parameters = Parameters::default();
    let shapes = [[hidden, hidden], [kv, hidden], [kv, hidden], [hidden, hidden], [middle, hidden], [middle, hidden], [hidden, middle]];
    for (role, [outputs, inputs]) in Role::PLAIN.into_iter().zip(shapes) {
        parameters.set_weight(role, random([outputs, inputs]) * (1.2 / (inputs as f32).sqrt()));
    }
    for place in [Place::AttentionIn, Place::MlpIn] {
        parameters.set_norm(place, random([hidden]) * 0.2 + 1.0);
    }
    (Config::read(&config).unwrap(), parameters)
}

/// Compares every gradient of Σ (y − target)² with differences of the loss along random directions.
fn differences(what: &str, spec: &Spec<'_>, parameters: &Parameters, x: &Tensor<2>) {
    let target = values(random(x.dims()));
    let mut gradients = Gradients::default();
    backward::block(spec, parameters, x, ALL, &mut gradients, &mut squared_error(&target, 1.0)).unwrap();
    // The loss, and which experts tokens go to: where that changes, a difference says nothing of a gradient.
    let loss = |parameters: &Parameters, x: &Tensor<2>| -> (f64, Vec<Vec<usize>>) {
        let mut chosen = Vec::new();
        let y = forward::block(spec, parameters, x.clone(), &mut |point, logits| {
            if let (Point::Logits, Some(mixture)) = (point, &spec.config.mixture) {
                let correction = &parameters.experts().unwrap().correction;
                let routed = route(&values(logits.clone()), correction, mixture.experts, mixture.rule);
                chosen = routed.into_iter().map(|tokens| tokens.into_iter().map(|(token, _)| token).collect()).collect();
            }
        });
        (values(y).iter().zip(&target).map(|(y, target)| (f64::from(*y) - f64::from(*target)).powi(2)).sum(), chosen)
    };
    let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let least = 1e-2 * norm(gradients.input()) / (gradients.input().len() as f64).sqrt();
    let step = 2e-3;
    let check = |name: &str, gradient: &[f32], direction: Vec<f32>, moved: &dyn Fn(f32) -> (f64, Vec<Vec<usize>>)| {
        assert_eq!(gradient.len(), direction.len(), "{what}, {name}");
        let [(below, chosen), (less, _), (more, _), (above, chosen_above)] = [-step, -0.5 * step, 0.5 * step, step].map(moved);
        if chosen != chosen_above {
            return;
        }
        let slope: f64 = gradient.iter().zip(&direction).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        // Differences over two steps, so that what grows with the square of the step goes away.
        let measured = (8.0 * (more - less) - (above - below)) / (6.0 * f64::from(step));
        let scale = (norm(gradient) / (gradient.len() as f64).sqrt()).max(least) * norm(&direction);
        assert!((slope - measured).abs() < 2e-2 * scale, "{what}, {name}: {slope}, measured {measured}, scale {scale}");
    };
    for role in parameters.roles() {
        let weight = parameters.weight(role);
        let direction = random(weight.dims()) * 0.3;
        check(role.name(), gradients.weight(role), values(direction.clone()), &|step| {
            let mut moved = parameters.clone();
            moved.set_weight(role, weight.clone() + direction.clone() * step);
            loss(&moved, x)
        });
    }
    for place in Place::ALL {
        let Some(weight) = parameters.norm(place) else { continue };
        let direction = random(weight.dims()) * 0.3;
        check(&format!("{place:?}"), gradients.norm(place), values(direction.clone()), &|step| {
            let mut moved = parameters.clone();
            moved.set_norm(place, weight.clone() + direction.clone() * step);
            loss(&moved, x)
        });
    }
    let experts = parameters.experts().map_or(0, |experts| experts.routed.len());
    for which in (0..experts).map(Which::Routed).chain(Some(Which::Shared)) {
        for (place, role) in [Role::Gate, Role::Up, Role::Down].into_iter().enumerate() {
            let Some(weight) = parameters.experts().and_then(|experts| experts.weight(which, role)) else { continue };
            let direction = random(weight.dims()) * 0.3;
            check(&format!("{which:?} {role:?}"), gradients.of_expert(which, role), values(direction.clone()), &|step| {
                let mut moved = parameters.clone();
                let layers = moved.experts_mut().and_then(|experts| experts.layers_mut(which)).unwrap();
                layers.weights[place] = weight.clone() + direction.clone() * step;
                loss(&moved, x)
            });
        }
    }
    // A few directions, because tokens near an edge change their experts along some.
    for _ in 0..4 {
        let direction = random(x.dims());
        check("input", gradients.input(), values(direction.clone()), &|step| loss(parameters, &(x.clone() + direction.clone() * step)));
    }
}

#[test]
fn gradients_of_a_llama_agree_with_finite_differences() {
    let (config, parameters) = llama(24, 40, 4, 2);
    differences("llama", &Spec::new(&config, 0, 12), &parameters, &random([24, 24]));
}

#[test]
fn gradients_of_every_kind_of_block_agree_with_finite_differences() {
    for case in golden() {
        let checkpoint = Checkpoint::open(&case).unwrap();
        let source = drawknife::formats::open(&checkpoint).unwrap();
        let model = Model::open(&checkpoint, source.as_ref()).unwrap();
        for index in 0..model.config.layers.len() {
            let parameters = lively(&model, index);
            differences(
                &format!("{} {index}", case.display()),
                &Spec::new(&model.config, index, 7),
                &parameters,
                &random([14, model.config.hidden]),
            );
        }
    }
}

#[test]
fn gradients_do_not_depend_on_the_number_of_threads() {
    let (config, parameters) = llama(96, 200, 4, 2);
    let (x, target) = (random([5 * 200, 96]), values(random([5 * 200, 96])));
    let run = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let spec = Spec::new(&config, 0, 200);
            let mut gradients = Gradients::default();
            let mut loss = trimmed_squared_error(&target, 1e-3, 200 * config.hidden, 96);
            let value = backward::block(&spec, &parameters, &x, ALL, &mut gradients, &mut loss).unwrap().get();
            let all =
                Role::ALL.iter().flat_map(|&role| gradients.weight(role)).chain(Place::ALL.iter().flat_map(|&place| gradients.norm(place)));
            let bits: Vec<u32> = all.chain(gradients.input()).map(|value| value.to_bits()).collect();
            (value.to_bits(), bits)
        })
    };
    let one = run(1);
    for threads in [2, 3, 4] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

#[test]
fn gradients_add_up_until_they_are_cleared_and_only_what_is_wanted_is_there() {
    let (config, parameters) = llama(24, 40, 4, 2);
    let spec = Spec::new(&config, 0, 10);
    let (x, target) = (random([20, 24]), values(random([20, 24])));
    let mut gradients = Gradients::default();
    let step = |wanted, gradients: &mut Gradients| {
        backward::block(&spec, &parameters, &x, wanted, gradients, &mut squared_error(&target, 0.5)).unwrap()
    };
    step(ALL, &mut gradients);
    let (query, norm) = (gradients.weight(Role::Query).to_vec(), gradients.norm(Place::MlpIn).to_vec());
    step(ALL, &mut gradients);
    let doubled = |found: &[f32], once: &[f32]| difference(found, &once.iter().map(|value| 2.0 * value).collect::<Vec<f32>>(), 0.0) < 1e-6;
    assert!(doubled(gradients.weight(Role::Query), &query) && doubled(gradients.norm(Place::MlpIn), &norm));
    gradients.clear();
    step(Wanted { weights: true, norms: false, input: false, precision: Precision::Single }, &mut gradients);
    assert_eq!(gradients.weight(Role::Query), query);
    assert!(gradients.norm(Place::MlpIn).iter().all(|&value| value == 0.0));
    let mut norms = Gradients::default();
    step(Wanted { weights: false, norms: true, input: false, precision: Precision::Single }, &mut norms);
    assert_eq!(norms.norm(Place::MlpIn), norm);
    assert!(Role::ALL.iter().all(|&role| norms.weight(role).is_empty()));
    let dy: Vec<f32> = gradients.output().iter().zip(&target).map(|(y, target)| y - target).collect();
    gradients.clear();
    backward::block(&spec, &parameters, &x, ALL, &mut gradients, &mut upstream(&dy)).unwrap();
    assert_eq!(gradients.weight(Role::Query), query);
}

#[test]
fn a_trimmed_error_leaves_out_the_largest() {
    let (y, target) = ([1.0, -4.0, 0.5, 3.0, 0.0], [0.0; 5]);
    let mut dy = [9.0; 5];
    assert_eq!(trimmed_squared_error(&target, 0.5, 5, 2)(&y, &mut dy), 0.5 * 1.25);
    assert_eq!(dy, [1.0, 0.0, 0.5, 0.0, 0.0]);
    assert_eq!(trimmed_squared_error(&target, 1.0, 5, 0)(&y, &mut dy), squared_error(&target, 1.0)(&y, &mut [0.0; 5]));
    assert_eq!(trimmed_squared_error(&target, 1.0, 5, 5)(&y, &mut dy), 0.0);
    assert_eq!(dy, [0.0; 5]);
    let (y, target) = ([1.0, -4.0, 2.0, 3.0], [0.0; 4]);
    assert_eq!(trimmed_squared_error(&target, 1.0, 2, 1)(&y, &mut dy[..4]), 5.0, "the largest of every window");
    assert_eq!(dy[..4], [2.0, 0.0, 4.0, 0.0]);
}

/// A leaf with the values of a tensor, on a device that differentiates.
fn leaf<const D: usize>(of: &Tensor<D>) -> Tensor<D> {
    tensor(values(of.clone()), of.dims(), &Device::flex().autodiff()).require_grad()
}

/// Gradients of Σ output · upstream for some leaves.
fn exact(output: Tensor<2>, upstream: &Tensor<2>, leaves: &[&Tensor<2>]) -> Vec<Vec<f32>> {
    let upstream = tensor::<2>(values(upstream.clone()), upstream.dims(), &Device::flex().autodiff());
    let gradients = (output * upstream).sum().backward();
    leaves.iter().map(|leaf| values(leaf.grad(&gradients).unwrap())).collect()
}

#[test]
fn the_adjoint_of_the_norm_follows_its_definition() {
    for (rows, width) in [(1, 1), (3, 7), (65, 172), (700, 64)] {
        for kind in [NormKind::Plain, NormKind::OnePlus, NormKind::Layer] {
            let (x, weight, upstream) = (random([rows, width]), random([1, width]), random([rows, width]));
            let (lx, lw) = (leaf(&x), leaf(&weight));
            let output = rms_norm_reference(lx.clone(), lw.clone().reshape([width]), 1e-2, kind);
            let exact = exact(output, &upstream, &[&lx, &lw]);
            let (mut d, mut dweight) = (values(upstream), vec![0.0; width]);
            rms_norm_adjoint(&values(x), &values(weight), 1e-2, kind, &mut d, Some(&mut dweight));
            let found = difference(&d, &exact[0], 0.1).max(difference(&dweight, &exact[1], 0.1));
            assert!(found < 1e-5, "{kind:?} {rows} x {width}: {found}");
        }
    }
}

#[test]
fn the_adjoint_of_the_gate_follows_its_definition_and_stays_finite() {
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::Clamped] {
        for (rows, width, spread) in [(1, 1, 1.0), (5, 33, 12.0), (70, 300, 2.0)] {
            let (gate, up, upstream) = (random([rows, width]) * spread, random([rows, width]), random([rows, width]));
            let (lg, lu) = (leaf(&gate), leaf(&up));
            let exact = exact(gated_reference(activation, lg.clone(), lu.clone()), &upstream, &[&lg, &lu]);
            let (mut d, mut dgate) = (values(upstream), vec![0.0; rows * width]);
            gated_adjoint(activation, &values(gate), &values(up), &mut d, &mut dgate);
            let found = difference(&dgate, &exact[0], 0.1).max(difference(&d, &exact[1], 0.1));
            assert!(found < 5e-6, "{activation:?} {rows} x {width}: {found}");
        }
        let gate = [1e30, -1e30, 1e10, -1e10, 3e5, -3e5, 0.0];
        let (mut d, mut dgate) = ([1.0; 7], [0.0; 7]);
        gated_adjoint(activation, &gate, &[1.0; 7], &mut d, &mut dgate);
        assert!(d.iter().all(|value| value.is_finite()));
        let slopes =
            if activation == Activation::Clamped { [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0] } else { [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.5] };
        assert!(difference(&dgate, &slopes, 1.0) < 1e-6, "{dgate:?}");
    }
}

#[test]
fn the_adjoint_of_the_rotation_turns_back() {
    for (windows, seq, heads, head_dim, half) in [(1, 1, 1, 2, 1), (2, 9, 3, 10, 5), (3, 17, 2, 18, 4)] {
        let frequencies: Vec<f32> = (0..half).map(|t| 10f32.powf(-(t as f32))).collect();
        let table = Table::new(&frequencies, 1.2, seq);
        let (x, upstream) = (random([windows * seq, heads * head_dim]), random([windows * seq, heads * head_dim]));
        let lx = leaf(&x);
        let exact = exact(rope_reference(lx.clone(), head_dim, &table), &upstream, &[&lx]);
        let mut d = values(upstream);
        rope_cpu(&mut d, heads * head_dim, head_dim, &table.adjoint());
        assert!(difference(&d, &exact[0], 0.1) < 1e-6);
    }
}

#[test]
fn the_adjoint_of_attention_follows_its_definition_with_groups_windows_and_caps() {
    for (windows, seq, heads, kv_heads, head_dim) in
        [(1, 1, 1, 1, 2), (2, 24, 4, 2, 10), (1, 130, 6, 3, 14), (2, 65, 4, 1, 8), (1, 64, 2, 2, 18)]
    {
        // Windows come with a share of nothing beside them.
        let sinks: Vec<f32> = (0..heads).map(|head| head as f32 * 0.7 - 1.0).collect();
        for window in [None, Some(1), Some(7), Some(64), Some(1000)] {
            for softcap in [None, Some(2.0)] {
                let attention =
                    Attention { seq, heads, kv_heads, head_dim, scale: 0.3, softcap, window, sinks: window.map(|_| sinks.as_slice()) };
                let q = random([windows * seq, heads * head_dim]);
                let (k, v) = (random([windows * seq, kv_heads * head_dim]), random([windows * seq, kv_heads * head_dim]));
                let upstream = random(q.dims());
                let [lq, lk, lv] = [&q, &k, &v].map(leaf);
                let output = attention.run_reference(lq.clone(), lk.clone(), lv.clone());
                let exact = exact(output.clone(), &upstream, &[&lq, &lk, &lv]);
                let [q, k, v, out, dout] = [q, k, v, output.inner(), upstream].map(values);
                let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());
                let passed = Passed { q: &q, k: &k, v: &v, out: &out, dout: &dout };
                attention.adjoint(&passed, &mut dq, &mut dk, &mut dv);
                let found = [(dq, &exact[0]), (dk, &exact[1]), (dv, &exact[2])].map(|(found, exact)| difference(&found, exact, 1.0));
                assert!(found.iter().all(|&found| found < 1e-5), "{attention:?}: {found:?}");
            }
        }
    }
}

/// CPU seconds of the process so far: user and system, all threads.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    // The kernel counts in hundredths of a second.
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

/// Prints wall and CPU seconds of one run, averaged over some seconds of runs.
fn show(name: &str, flops: f64, mut work: impl FnMut()) {
    work();
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let mut runs = 0.0;
    while start.elapsed().as_secs_f64() < 3.0 {
        work();
        runs += 1.0;
    }
    let (wall, cpu) = (start.elapsed().as_secs_f64() / runs, (cpu_seconds() - cpu) / runs);
    eprintln!("{name:<36} {wall:.4} s  {cpu:.4} CPU s  {:6.1} GFLOP per CPU s", flops / cpu * 1e-9);
}

/// Run with `--ignored --nocapture`, `RAYON_NUM_THREADS` set, and `MALLOC_MMAP_THRESHOLD_=33554432
/// MALLOC_TRIM_THRESHOLD_=536870912` for the allocator as the command line tunes it.
#[test]
#[ignore = "a measurement"]
fn seconds_of_a_step_on_a_small_model() {
    let (seq, hidden, middle) = (512, 256, 768);
    let (config, parameters) = llama(hidden, middle, 4, 2);
    let spec = Spec::new(&config, 0, seq);
    let tokens = 8 * seq;
    let (x, target) = (random([tokens, hidden]), values(random([tokens, hidden])));
    let linears = 2.0 * tokens as f64 * Role::ALL.iter().map(|&role| parameters.weight(role).shape().num_elements() as f64).sum::<f64>();
    let attention = (2 * tokens * seq / 2 * hidden) as f64;
    let (a, b, mut c) = (vec![1.0; tokens * hidden], vec![1.0; middle * hidden], vec![0.0; tokens * middle]);
    let (sizes, rows, weight) = (Sizes { m: tokens, n: middle, k: hidden }, View::rows(&a, hidden), View::transposed(&b, hidden));
    let flops = 2.0 * (tokens * hidden * middle) as f64;
    show("gate product", flops, || product(sizes, &mut c, middle, false, 1.0, rows, weight, true));
    let tensor_of = |device: &Device| tensor::<2>(values(x.clone()), [tokens, hidden], device);
    show("forward", linears + 2.0 * attention, || {
        drop(values(forward::block(&spec, &parameters, tensor_of(&Device::flex()), &mut |_, _| {})));
    });
    let mut gradients = Gradients::default();
    for (name, wanted) in [
        ("step, weights", Wanted { weights: true, norms: false, input: false, precision: Precision::Single }),
        ("step, weights, rough", Wanted { weights: true, norms: false, input: false, precision: Precision::Rough }),
        ("step, all", ALL),
        ("step, norms", Wanted { weights: false, norms: true, input: false, precision: Precision::Single }),
    ] {
        let products = if wanted.weights { 3.0 } else { 2.0 };
        show(name, products * linears + 7.0 * attention, || {
            backward::block(&spec, &parameters, &x, wanted, &mut gradients, &mut squared_error(&target, 1e-6)).unwrap();
        });
    }
    let device = Device::flex().autodiff();
    let tracked = tracked(&parameters, &device);
    show("step, automatic differentiation", 3.0 * linears + 6.0 * attention, || {
        let aim = tensor::<2>(target.clone(), [tokens, hidden], &device);
        let loss = (forward::block(&spec, &tracked, tensor_of(&device), &mut |_, _| {}) - aim).powi_scalar(2).mean();
        let gradients = loss.backward();
        Role::ALL.iter().for_each(|&role| drop(values(tracked.weight(role).grad(&gradients).unwrap())));
    });
}
