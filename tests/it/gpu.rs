//! Shaders: each is valid without a GPU, and each agrees with its twin on the adapter that there is.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use burn::tensor::Tensor;
use drawknife::checkpoint::Checkpoint;
use drawknife::device::{Choice, Device, Gpu, Shader, adapters};
use drawknife::error::Error;
use drawknife::kernels::linear::linear_reference;
use drawknife::kernels::linear::units::{LEARNED, is_finite, largest_of};
use drawknife::kernels::quantize::stored_scale;
use drawknife::kernels::rough_product::Precision;
use drawknife::kernels::self_test::CHECKS;
use drawknife::kernels::{SHADERS, tensor, values};
use drawknife::model::Model;
use drawknife::model::backward::{self, Gradients, Wanted};
use drawknife::model::block::{Block, Parameters, Place, Role};
use drawknife::model::forward::Spec;
use drawknife::model::hidden::{Hidden, Keeping};
use drawknife::model::holdings::Holdings;
use drawknife::model::loss::{Loss, SquaredError, squared_error, trimmed_squared_error};
use drawknife::run::{Run, Silent};
use drawknife::weight::{Float, Weight};

use crate::backward::{difference, golden};
use crate::command::json;
use crate::golden::logits_on;
use crate::kernels::random;

/// The first adapter, real or software. Without one the test says so; where `DRAWKNIFE_GPU=required` it fails.
pub fn device() -> Option<Device> {
    if adapters().is_empty() {
        assert!(std::env::var("DRAWKNIFE_GPU").as_deref() != Ok("required"), "a GPU adapter is required here and there is none");
        let _ = writeln!(std::io::stderr(), "skipped: there is no GPU adapter, not even a software one");
        return None;
    }
    Some(Device::pick(Choice::Gpu(0)).unwrap())
}

/// What is wrong with a shader.
fn fault(source: &str) -> Option<String> {
    use naga::valid::{Capabilities, ValidationFlags, Validator};
    let units = source.contains("enable wgpu_cooperative_matrix;");
    let few = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    let capabilities = if units { few | Capabilities::COOPERATIVE_MATRIX | Capabilities::SHADER_FLOAT16 } else { few };
    let module = match naga::front::wgsl::parse_str(source) {
        Ok(module) => module,
        Err(error) => return Some(error.emit_to_string(source)),
    };
    let info = match Validator::new(ValidationFlags::all(), capabilities).validate(&module) {
        Ok(info) => info,
        Err(error) => return Some(error.emit_to_string(source)),
    };
    if let Err(error) = naga::back::spv::write_vec(&module, &info, &naga::back::spv::Options::default(), None) {
        return Some(error.to_string());
    }
    let entry = &module.entry_points[0];
    // What every adapter of WebGPU offers.
    let few = module.global_variables.iter().filter(|(_, variable)| variable.binding.is_some()).count() <= 8;
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).expect("a valid module");
    let shared = module.global_variables.iter().filter(|(_, variable)| variable.space == naga::AddressSpace::WorkGroup);
    let shared: u32 = shared.map(|(_, variable)| layouter[variable.ty].size).sum();
    if !units && shared > 16_384 {
        return Some(format!("a workgroup shares {shared} bytes"));
    }
    let threads = if units { 256 } else { 64 };
    (entry.name != "main" || entry.workgroup_size != [threads, 1, 1] || !few).then(|| "another entry point, or too many bindings".into())
}

#[test]
fn every_shader_is_valid_and_translates() {
    let wrong: Vec<_> = SHADERS.iter().filter_map(|shader| Some(format!("{}: {}", shader.name, fault(shader.source)?))).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(fault("@compute @workgroup_size(64) fn main() { let x: u32 = 1.5; }").is_some());
    // Launches share parameters.
    for shader in &SHADERS {
        let written = shader.source.lines().filter(|line| line.trim_start().starts_with("parameters["));
        assert_eq!(written.count(), 0, "{} writes parameters", shader.name);
    }
    // Whatever the width of heads.
    for shader in SHADERS.iter().filter(|shader| shader.source.contains("const FOURS: u32 = ")) {
        for fours in 1..=16 {
            let text = shader.text(Some(("FOURS", fours)));
            assert!(text.contains(&format!("const FOURS: u32 = {fours}u;\n")), "{}", shader.name);
            assert_eq!(fault(&text), None, "{} {fours}", shader.name);
        }
    }
}

#[test]
fn the_table_has_every_file_and_every_check() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let mut files: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_suffix(".wgsl").map(str::to_owned))
        .collect();
    files.sort();
    let mut names: Vec<_> = SHADERS.iter().map(|shader| shader.name.to_owned()).collect();
    names.sort();
    assert_eq!(files, names);
    let mut checked: Vec<_> = CHECKS.iter().flat_map(|check| check.shaders).map(|&name| name.to_owned()).collect();
    checked.sort();
    assert_eq!(checked, names);
}

#[test]
fn functions_of_one_name_are_the_same_text_in_every_shader() {
    const SHARED: [&str; 14] = [
        "quotient",
        "parts_of",
        "nearest",
        "f16_rounded",
        "stored_scale",
        "decodable",
        "from_on",
        "levels_of",
        "magnitude_bits",
        "ratio",
        "capped",
        "share_and_slope",
        "four_left",
        "four_right",
    ];
    let mut known: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in SHARED {
        for shader in SHADERS {
            let Some(start) = shader.source.find(&format!("\nfn {name}(")) else { continue };
            let end = start + shader.source[start..].find("\n}\n").unwrap();
            known.entry(name).or_default().push(&shader.source[start..end]);
        }
        let texts = &known[name];
        assert!(texts.len() > 1 && texts.iter().all(|text| text == &texts[0]), "{name}");
    }
}

/// The text of a function of some shader.
fn function(name: &str) -> &'static str {
    let source = SHADERS.iter().map(|shader| shader.source).find(|source| source.contains(&format!("\nfn {name}("))).unwrap();
    let start = source.find(&format!("\nfn {name}(")).unwrap();
    &source[start..start + source[start..].find("\n}\n").unwrap() + 3]
}

/// Runs `expression` of floats `a` and `b` on a GPU whose divisions are wrong by some units in the last place.
fn computed(gpu: &Gpu, expression: &str, units: i32, [a, b]: [&[f32]; 2]) -> Vec<f32> {
    let off = format!("* (1.0 + {:e})", f64::from(units) / f64::from(1 << 23));
    let quotient = function("quotient").replace("f32(over.x) / f32(under.x)", &format!("f32(over.x) / f32(under.x) {off}"));
    let nearest = function("nearest").replace("weight / scale;", &format!("weight / scale {off};"));
    assert!(quotient.contains(&off) && nearest.contains(&off));
    let functions = [function("parts_of"), &quotient, &nearest, function("f16_rounded"), function("stored_scale")].concat();
    let source = format!(
        "@group(0) @binding(0) var<storage, read_write> left: array<f32>;
@group(0) @binding(1) var<storage, read_write> right: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(0) @binding(3) var<storage, read_write> parameters: array<u32>;
{functions}
@compute @workgroup_size(64, 1, 1)
fn main(@builtin(global_invocation_id) at: vec3<u32>) {{
    if (at.x < parameters[0]) {{
        let a = left[at.x];
        let b = right[at.x];
        out[at.x] = {expression};
    }}
}}
"
    );
    assert_eq!(fault(&source), None);
    let shader: &'static Shader = Box::leak(Box::new(Shader {
        name: Box::leak(format!("{expression} {units}").into_boxed_str()),
        source: Box::leak(source.into_boxed_str()),
    }));
    let out = gpu.empty(a.len());
    gpu.launch(shader, a.len().div_ceil(64), &[&gpu.upload(a), &gpu.upload(b), &out], &[a.len() as u32]);
    gpu.read(&out).unwrap()
}

/// Floats of every kind: zeros, subnormal ones, steps of halves and their middles, largest, and bits without order.
fn every_kind() -> Vec<f32> {
    let bits = [0, 1, 2, 3, 0x7f_ffff, 0x80_0000, 0x80_0001, 0x3300_0000, 0x337f_ffff, 0x3380_0000, 0x33c0_0000, 0x387f_f000, 0x3880_0000];
    let more =
        [0x3f7f_ffff, 0x3f80_0000, 0x3f80_1000, 0x3f80_3000, 0x3f80_8000, 0x3f81_8000, 0x477f_e000, 0x477f_efff, 0x477f_f000, 0x7f7f_ffff];
    let wild = (0..200u32).map(|at| (at.wrapping_mul(2_654_435_761).rotate_left(at % 31)) & 0x7fff_ffff);
    let all = bits.into_iter().chain(more).chain(wild).map(f32::from_bits).filter(|value| value.is_finite());
    all.flat_map(|value| [value, -value]).collect()
}

#[test]
fn arithmetic_of_shaders_is_exact_however_a_driver_divides() {
    let Some(device) = device() else { return };
    let gpu = device.gpu.as_ref().unwrap();
    let kinds = every_kind();
    let pairs = || kinds.iter().flat_map(|&a| kinds.iter().map(move |&b| (a, b)));
    let (a, b): (Vec<f32>, Vec<f32>) = pairs().filter(|&(_, b)| b != 0.0).unzip();
    let (weights, scales): (Vec<f32>, Vec<f32>) = pairs().filter(|(a, b)| *b != 0.0 && (a / b).abs() < 300.0).unzip();
    // Middles between whole numbers, and their neighbours.
    let middles = (-200..200).flat_map(|at| [0.1f32, 3e-39, 7.0, -1e30].map(|scale| ((at as f32 + 0.5) * scale, scale)));
    let (middles, steps): (Vec<f32>, Vec<f32>) = middles.flat_map(|(a, b)| [(a, b), (a.next_up(), b), (a.next_down(), b)]).unzip();
    let [weights, scales] = [[weights, middles].concat(), [scales, steps].concat()];
    for units in [0, 1, -1, 5, -5] {
        for (at, got) in computed(gpu, "quotient(a, b)", units, [&a, &b]).into_iter().enumerate() {
            assert_eq!(got.to_bits(), (a[at] / b[at]).to_bits(), "{units}: {:e} / {:e} is {got:e}", a[at], b[at]);
        }
        for (at, got) in computed(gpu, "nearest(a, b)", units, [&weights, &scales]).into_iter().enumerate() {
            assert_eq!(got, (weights[at] / scales[at]).round_ties_even(), "{units}: nearest of {:e} / {:e}", weights[at], scales[at]);
        }
    }
    let halves = computed(gpu, "f16_rounded(a)", 0, [&kinds, &kinds]);
    let stored = [0u32, 1, 2].map(|format| computed(gpu, &format!("stored_scale(a, {format}u)"), 0, [&kinds, &kinds]));
    for (at, &value) in kinds.iter().enumerate() {
        assert_eq!(halves[at].to_bits(), Float::F16.round(value).to_bits(), "{value:e}");
        for (format, float) in [Float::F32, Float::F16, Float::BF16].into_iter().enumerate() {
            assert_eq!(stored[format][at].to_bits(), stored_scale(value, float).to_bits(), "{value:e} as {float:?}");
        }
    }
}

/// Whether the shaders of a check are tested: those with `DRAWKNIFE_SHADER` in their names, where that is set.
fn asked(shaders: &[&str]) -> bool {
    std::env::var("DRAWKNIFE_SHADER").map_or(true, |part| shaders.iter().any(|shader| shader.contains(&part)))
}

#[test]
fn every_shader_agrees_with_its_twin() {
    let Some(device) = device() else { return };
    let gpu = device.gpu.as_ref().unwrap();
    let mut wrong = Vec::new();
    // The adapter as it is, one on which every launch is folded, and one on which every matrix is cut.
    for (name, gpu) in [("as it is", gpu.clone()), ("folded", gpu.limited(3, 1 << 27)), ("cut", gpu.limited(65535, 2048))] {
        for check in CHECKS.iter().filter(|check| asked(check.shaders)) {
            let found = (check.run)(&gpu).unwrap_or_else(|error| panic!("{check:?}: {error}"));
            assert!(!found.is_empty() || name == "cut", "{check:?}");
            let failed = found.iter().filter(|found| !found.agrees());
            wrong.extend(failed.map(|found| {
                format!(
                    "{name}, {:?}: {} differs by {:.3e}, more than {:.0e}",
                    check.shaders, found.case, found.difference, found.tolerance
                )
            }));
        }
    }
    assert!(wrong.is_empty(), "{}\n{}", device.name, wrong.join("\n"));
}

/// Largest difference, relative to the largest entry.
fn apart(got: &[f32], expected: &[f32]) -> f32 {
    difference(got, expected, f32::MIN_POSITIVE)
}

#[test]
fn a_gpu_gives_the_logits_of_every_family() {
    let Some(device) = device() else { return };
    for case in golden() {
        let (tokens, expected) = crate::golden::expected(case.file_name().unwrap().to_str().unwrap());
        let worst = apart(&logits_on(&device, &case, &tokens), &expected);
        assert!(worst <= 1e-4, "{}: {worst}", case.display());
    }
}

#[test]
fn gradients_on_a_gpu_are_those_of_the_processor_wherever_weights_lie() {
    let Some(device) = device() else { return };
    let narrow = Device { gpu_memory: Some(4 * 4000), ..device.clone() };
    for case in golden() {
        let checkpoint = Checkpoint::open(&case).unwrap();
        let source = drawknife::formats::open(&checkpoint).unwrap();
        let model = Model::open(&checkpoint, source.as_ref()).unwrap();
        let block = model.load_block(model.config.layers.len() - 1).unwrap();
        let spec = Spec::new(&model.config, block.index, 7);
        let x = random([14, model.config.hidden]);
        let target = values(random([14, model.config.hidden]));
        let wanted = Wanted { weights: true, norms: true, input: true, precision: Precision::Single };
        let run = |device: &Device| {
            let processor = Device::cpu();
            let device = if block.stays() { &processor } else { device };
            let (mut parameters, mut gradients) = (Parameters::copy(&block, device), Gradients::default());
            if let (Some(tensors), Some(experts)) = (parameters.experts_mut(), &block.experts) {
                let holdings = Holdings::of_original(&model, block.index, None, device);
                holdings.fill(tensors, experts.shared.is_some()).unwrap();
            }
            let loss = backward::block(&spec, &parameters, &x, wanted, &mut gradients, &mut squared_error(&target, 1.0)).unwrap().get();
            (loss, gradients, parameters.elsewhere())
        };
        let (loss, exact, _) = run(&Device::cpu());
        for device in [&device, &narrow] {
            let (found, gradients, elsewhere) = run(device);
            assert_eq!(elsewhere, device.gpu_memory.is_none() && !block.stays(), "{}", case.display());
            assert!((found - loss).abs() < 1e-4 * loss, "{}: {found} {loss}", case.display());
            for role in Role::ALL {
                let worst = apart(&gradients.fetched_weight(role), exact.weight(role));
                assert!(worst < 1e-4, "{} {}: {worst}", case.display(), role.name());
            }
            for place in Place::ALL.into_iter().filter(|place| !exact.norm(*place).is_empty()) {
                assert!(apart(gradients.norm(place), exact.norm(place)) < 1e-4, "{} {place:?}", case.display());
            }
            assert!(apart(gradients.input(), exact.input()) < 1e-4, "{}", case.display());
        }
    }
}

#[test]
fn what_a_gpu_compresses_is_what_the_processor_compresses() {
    // With few bits and a short calibration the last digit of a sum decides which way weights are rounded, and with them the
    // perplexity by some thousandths; learned and solved rounding are compared at 8 bits therefore.
    if device().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("calibration/model");
    for (name, stages) in [
        ("wanda", "[[stage]]\nmethod = \"wanda\"\n"),
        ("admm", "[[stage]]\nmethod = \"admm\"\npattern = \"2:4\"\n"),
        ("trits", "[[stage]]\nmethod = \"ptqtp\"\n"),
        ("closed-form", "[[stage]]\nmethod = \"precalibrate\"\nbits = 8\n[[stage]]\nmethod = \"closed-form\"\nbits = 8\n"),
        ("signround", "[[stage]]\nmethod = \"signround\"\nbits = 8\niters = 20\n[[stage]]\nmethod = \"norm-tweak\"\n"),
    ] {
        let recipe = folder.path().join(format!("{name}.toml"));
        std::fs::write(&recipe, format!("version = 1\n{stages}")).unwrap();
        let [here, there] = ["cpu", "gpu"].map(|device| {
            let out = folder.path().join(format!("{name}-{device}"));
            let [model, out, recipe] = [&model, &out, &recipe].map(|path| path.to_str().unwrap());
            let sizes = ["--samples", "4", "--seq", "96", "--eval-tokens", "512", "--eval-seq", "128"];
            let arguments = [&["compress", model, "-o", out, "--recipe", recipe, "--device", device][..], &sizes].concat();
            json(&arguments)["report"]["quality"]["nll"].as_f64().unwrap()
        });
        assert!((here - there).abs() < 1e-3 * here, "{name}: {here} on the processor, {there} on the GPU");
    }
}

#[test]
fn products_with_halves_have_the_gradients_of_products() {
    let Some(device) = device() else { return };
    let gpu = device.gpu.as_ref().unwrap();
    for [tokens, inputs, outputs] in [[70, 33, 40], [200, 130, 5]] {
        let place = |shape: [usize; 2]| random(shape).to_device(&device.burn);
        let (x, weight, upstream) = (place([tokens, inputs]), place([outputs, inputs]), place([tokens, outputs]));
        let gradients = |halved: bool, wanted: [bool; 2]| {
            let [x, weight] = [&x, &weight].map(|tensor| tensor.clone().autodiff());
            let (x, weight) = (x.set_require_grad(wanted[0]), weight.set_require_grad(wanted[1]));
            let y = if halved { gpu.apply(&LEARNED, &x, &weight).unwrap() } else { linear_reference(&x, &weight) };
            let found = (y.clone() * upstream.clone().autodiff()).sum().backward();
            let tensors = [Some(y.inner()), x.grad(&found), weight.grad(&found)];
            tensors.map(|tensor| tensor.map(values))
        };
        for wanted in [[true, true], [true, false], [false, true]] {
            let (got, exact) = (gradients(true, wanted), gradients(false, wanted));
            for (got, exact) in got.iter().zip(&exact) {
                assert_eq!(got.is_some(), exact.is_some(), "{wanted:?}");
                let (Some(got), Some(exact)) = (got, exact) else { continue };
                let off = difference(got, exact, 0.0);
                assert!(got.len() == exact.len() && off < 2e-3 && off > 0.0, "{tokens} {inputs} {outputs} {wanted:?}: {off}");
            }
        }
    }
}

#[test]
fn mixtures_are_worked_on_and_measured_with_a_gpu_as_without() {
    if device().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let text = crate::formats::letters(folder.path());
    let model = crate::formats::with_tokenizer("qwen2_moe", folder.path()).to_str().unwrap().to_string();
    let own = ["--calibration", text.as_str(), "--samples", "12", "--seq", "32"];
    let recipe = "[[stage]]\nmethod = \"closed-form\"\nbits = 4\ngroup = 8\n[[stage]]\nmethod = \"norm-tweak\"\n".to_string();
    let measured = ["--eval-text", text.as_str(), "--eval-tokens", "1024", "--eval-seq", "64"];
    let found = ["cpu", "gpu"].map(|device| {
        let path = folder.path().join(format!("{device}.json")).to_str().unwrap().to_string();
        let costs = json(&[&["sensitivity", &model, "-o", &path, "--schemes", "w4", "--device", device], &own[..]].concat());
        let costs = costs["layers"].as_array().unwrap().iter().map(|layer| layer["candidates"][0]["kld"].as_f64().unwrap()).sum::<f64>();
        let more = [&own[..], &measured[..], &["--device", device]].concat();
        let (_, done) = crate::command::compress(folder.path(), &model, &format!("{device}-out"), &recipe, &more);
        [costs, done["report"]["quality"]["kld_mean"].as_f64().unwrap()]
    });
    for (with, without) in found[1].iter().zip(found[0]) {
        assert!((with - without).abs() < 0.05 * without, "{found:?}");
    }
}

#[test]
fn states_stay_on_a_gpu_while_it_has_room_for_them() {
    let Some(device) = device() else { return };
    let folder = tempfile::tempdir().unwrap();
    let lengths = [3, 3, 70, 1];
    let (width, floats) = (33, 77 * 33);
    // With room for two stores of three.
    let device = Device { gpu_memory: Some(10 * 4 * floats as u64 * 2), ..device };
    let run = Run { device: &device, seed: 0, observer: &Silent, scratch: folder.path() };
    let all: Vec<f32> = (0..floats).map(|at| (at as f32).sin()).collect();
    let mut stores = [0; 3].map(|_| Hidden::new(&lengths, width, Keeping::EXACT, &run).unwrap());
    assert_eq!(stores.each_ref().map(Hidden::elsewhere), [true, true, false]);
    for hidden in &mut stores {
        // Two windows at once, then one that is put as a part of a tensor, then one that is written.
        hidden.put(0..2, &tensor(all[..6 * width].to_vec(), [6, width], &device.burn)).unwrap();
        let more: Tensor<2> = tensor(all[5 * width..].to_vec(), [72, width], &device.burn);
        hidden.put(2..3, &more.slice([1..71, 0..width])).unwrap();
        hidden.write(3..4, &all[76 * width..]).unwrap();
        assert_eq!(hidden.read(0..4).unwrap(), all);
        assert_eq!(hidden.rows(&[0, 4, 76]).unwrap(), [&all[..width], &all[4 * width..5 * width], &all[76 * width..]].concat());
        for place in [&device.burn, &burn::tensor::Device::flex()] {
            assert_eq!(values(hidden.states(1..4, place).unwrap()), all[3 * width..]);
            assert_eq!(values(hidden.states_of(&[3, 0], place).unwrap()), [&all[76 * width..], &all[..3 * width]].concat());
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let saved =
            hidden.save(|start, piece| file.as_file().write_all_at(piece, start).map_err(|error| Error::run(error.to_string()))).unwrap();
        let mut back = Hidden::new(&lengths, width, Keeping::EXACT.near(), &run).unwrap();
        assert_eq!(back.load(file.as_file(), file.path()).unwrap(), saved);
        assert_eq!(back.read(0..4).unwrap(), all);
    }
    // A copy has its own states from the first change on, and what a store held is free when it goes.
    let [mut first, second, third] = stores;
    drop((second, third));
    let copy = first.copy(&run).unwrap();
    first.add(&[4], &[0.5], &all[..width]).unwrap();
    assert!(copy.elsewhere() && copy.read(0..4).unwrap() == all);
    let sum = |at: usize| all[4 * width + at] + 0.5 * all[at];
    assert_eq!(first.rows(&[4]).unwrap(), (0..width).map(sum).collect::<Vec<_>>());
}

#[test]
fn what_lies_on_a_gpu_of_a_layer_goes_when_the_layer_may_change() {
    let Some(device) = device() else { return };
    let case = golden().into_iter().find(|case| case.ends_with("llama2")).unwrap();
    let checkpoint = Checkpoint::open(&case).unwrap();
    let source = drawknife::formats::open(&checkpoint).unwrap();
    let model = Model::open(&checkpoint, source.as_ref()).unwrap();
    let mut block = model.load_block(0).unwrap();
    block.send(&device);
    let of = |block: &Block, role: Role| values(Parameters::copy(block, &device).weight(role).clone());
    let (query, key) = (of(&block, Role::Query), of(&block, Role::Key));
    let linear = block.linear_mut(Role::Query.into()).unwrap();
    let mut weight = linear.weight.to_matrix().into_owned();
    weight.data.iter_mut().for_each(|value| *value += 1.0);
    linear.weight = Weight::Dense(weight);
    let more: Vec<f32> = query.iter().map(|value| value + 1.0).collect();
    assert_eq!((of(&block, Role::Query), of(&block, Role::Key)), (more.clone(), key));
    assert_eq!(values(Parameters::copy_to_change(&block, &device).weight(Role::Query).clone()), more);
}

#[test]
fn a_gpu_sees_what_is_not_finite() {
    let Some(device) = device() else { return };
    let gpu = device.gpu.as_ref().unwrap();
    let mut all = values(random([9001, 1]));
    all[7] = f32::MAX;
    let all_finite = |all: &[f32]| is_finite(gpu, &largest_of(gpu, &gpu.upload(all))).unwrap();
    assert!(all_finite(&all));
    for wrong in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 4096, 9000] {
            let mut all = all.clone();
            all[at] = wrong;
            assert!(!all_finite(&all), "{wrong} at {at}");
        }
    }
}

#[test]
fn squared_errors_are_judged_on_a_gpu_as_on_the_processor() {
    let Some(device) = device() else { return };
    let [tokens, width] = [12, 130];
    let (y, target) = (random([tokens, width]), random([tokens, width]));
    let (mut y, target) = (values(y), values(target));
    // Equal errors at the edge, and errors of nothing.
    for at in 0..40 {
        y[7 * at] = target[7 * at] + if at % 2 == 0 { 3.0 } else { -3.0 };
        y[7 * at + 1] = target[7 * at + 1];
    }
    let window = 4 * width;
    for dropped in [0, 1, 5, 9, window - 1, window, window + 7] {
        let mut expected = vec![f32::NAN; y.len()];
        let loss = trimmed_squared_error(&target, 0.25, window, dropped)(&y, &mut expected);
        let place = |values: &[f32]| tensor::<2>(values.to_vec(), [tokens, width], &device.burn);
        let (found, slope) =
            SquaredError { target: place(&target), factor: 0.25, window, dropped }.judge_there(&place(&y)).unwrap().unwrap();
        let found = found.get();
        assert!((found - loss).abs() <= 1e-5 * loss, "{dropped}: {found} {loss}");
        assert!(difference(&values(slope), &expected, f32::MIN_POSITIVE) < 1e-6, "{dropped}");
    }
}

#[test]
fn a_gpu_without_room_is_an_error_of_one_line_and_not_a_panic() {
    let Some(device) = device() else { return };
    let run = Run { device: &device, seed: 0, observer: &Silent, scratch: Path::new(".") };
    let most = device.gpu.as_ref().unwrap().adapter().buffer_bytes as usize / 4;
    let failed = run.guarded(|| {
        let huge = Tensor::<2>::zeros([2, most], &device.burn) + 1.0;
        Ok(values(huge.sum()))
    });
    let error = failed.unwrap_err();
    let said = error.to_string();
    assert_eq!(error.exit_code(), 1);
    assert!(said.contains(&device.gpu.as_ref().unwrap().adapter().name) && said.contains("use a smaller --gpu-memory"), "{said}");
    assert!(!said.contains('\n') && said.len() < 600, "{said}");
    // Errors of the work itself come through as they are.
    assert_eq!(run.guarded(|| Err::<(), _>(Error::input("no"))).unwrap_err().exit_code(), 2);
}
