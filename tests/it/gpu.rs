//! Shaders: each is valid without a GPU, and each agrees with its twin on the adapter that there is.

use std::io::Write;

use drawknife::device::{Choice, Device, adapters};
use drawknife::kernels::SHADERS;
use drawknife::kernels::self_test::CHECKS;

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
    let module = match naga::front::wgsl::parse_str(source) {
        Ok(module) => module,
        Err(error) => return Some(error.emit_to_string(source)),
    };
    let info = match Validator::new(ValidationFlags::all(), Capabilities::empty()).validate(&module) {
        Ok(info) => info,
        Err(error) => return Some(error.emit_to_string(source)),
    };
    if let Err(error) = naga::back::spv::write_vec(&module, &info, &naga::back::spv::Options::default(), None) {
        return Some(error.to_string());
    }
    let entry = &module.entry_points[0];
    // What every adapter of WebGPU offers.
    let few = module.global_variables.iter().filter(|(_, variable)| variable.binding.is_some()).count() <= 8;
    (entry.name != "main" || entry.workgroup_size != [64, 1, 1] || !few).then(|| "another entry point, or too many bindings".into())
}

#[test]
fn every_shader_is_valid_and_translates() {
    let wrong: Vec<_> = SHADERS.iter().filter_map(|shader| Some(format!("{}: {}", shader.name, fault(shader.source)?))).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(fault("@compute @workgroup_size(64) fn main() { let x: u32 = 1.5; }").is_some());
}

#[test]
fn the_table_has_every_file_and_every_check() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
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
    let mut known: std::collections::BTreeMap<(&str, &str), &str> = std::collections::BTreeMap::new();
    for name in ["f16_rounded", "stored_scale", "decodable", "from_on", "levels_of", "magnitude_bits", "ratio"] {
        for shader in SHADERS {
            let Some(start) = shader.source.find(&format!("\nfn {name}(")) else { continue };
            let end = start + shader.source[start..].find("\n}\n").unwrap();
            let text = &shader.source[start..end];
            assert_eq!(*known.entry((name, "")).or_insert(text), text, "{name} in {}", shader.name);
        }
    }
    assert_eq!(known.len(), 7);
}

#[test]
fn every_shader_agrees_with_its_twin() {
    let Some(device) = device() else { return };
    let gpu = device.gpu.as_ref().unwrap();
    let mut wrong = Vec::new();
    for check in &CHECKS {
        let found = (check.run)(gpu).unwrap_or_else(|error| panic!("{check:?}: {error}"));
        assert!(!found.is_empty(), "{check:?}");
        let failed = found.iter().filter(|found| !found.agrees());
        wrong.extend(failed.map(|found| {
            format!("{:?}: {} differs by {:.3e}, more than {:.0e}", check.shaders, found.case, found.difference, found.tolerance)
        }));
    }
    assert!(wrong.is_empty(), "{}\n{}", device.name, wrong.join("\n"));
}
