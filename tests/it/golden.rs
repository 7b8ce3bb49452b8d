//! Golden logits of a tiny random model of every family, made with transformers (tests/golden/generate.py).

use std::path::{Path, PathBuf};

use drawknife::checkpoint::{Checkpoint, Shard};
use drawknife::device::Device;
use drawknife::kernels::{tensor, values};
use drawknife::model::hidden::Keeping;
use drawknife::model::walk::{Pass, embed, walk};
use drawknife::model::{Model, forward};
use drawknife::run::{Run, Silent};

/// The folder of a golden model.
pub fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

/// The tokens of a golden model and the logits of transformers for them.
pub fn expected(case: &str) -> (Vec<u32>, Vec<f32>) {
    let shard = Shard::open(&golden(case).join("logits.safetensors")).unwrap();
    let bytes = |name: &str| {
        let info = &shard.header.tensors[name];
        shard.bytes(info, 0..info.bytes()).unwrap().to_vec()
    };
    let tokens = bytes("input_ids").chunks(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()) as u32).collect();
    let logits = bytes("logits").chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
    (tokens, logits)
}

/// Logits of a folder for one window, through the walk and the head, on the processor.
pub fn logits(folder: &Path, tokens: &[u32]) -> Vec<f32> {
    logits_on(&Device::cpu(), folder, tokens)
}

/// As [`logits`], on any device.
pub fn logits_on(device: &Device, folder: &Path, tokens: &[u32]) -> Vec<f32> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let source = drawknife::formats::open(&checkpoint).unwrap();
    let model = Model::open(&checkpoint, source.as_ref()).unwrap();
    let run = Run { device, seed: 0, observer: &Silent, scratch: Path::new(".") };
    let mut hidden = embed(&model, &[tokens.to_vec()], Keeping::EXACT, &run).unwrap();
    walk(&model, &mut hidden, "golden", &run, &mut Pass).unwrap();
    let config = &model.config;
    let x = tensor(hidden.read(0..1).unwrap(), [tokens.len(), config.hidden], &device.burn);
    let norm = tensor(model.final_norm().unwrap(), [config.hidden], &device.burn);
    let head = model.head_rows(0..config.vocabulary).unwrap();
    let head = tensor(head.data, [config.vocabulary, config.hidden], &device.burn);
    values(forward::logits(config, forward::final_norm(config, &x, &norm), head))
}

fn check(case: &str, folder: &Path) {
    let (tokens, expected) = expected(case);
    let found = logits(folder, &tokens);
    assert_eq!(found.len(), expected.len(), "{case}");
    let largest = expected.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= (2e-5 * largest).min(2e-4), "{case}: off by {worst} of {largest}");
}

#[test]
fn every_family_gives_the_logits_of_transformers() {
    let mut cases: Vec<String> = std::fs::read_dir(golden(""))
        .unwrap()
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    cases.sort();
    assert!(cases.len() >= 18, "{cases:?}");
    for case in &cases {
        check(case, &golden(case));
    }
}

#[test]
fn the_config_spelling_of_transformers_4_gives_the_same_logits() {
    let mut found = 0;
    for entry in std::fs::read_dir(golden("")).unwrap().flatten() {
        if !entry.path().join("config.v4.json").exists() {
            continue;
        }
        found += 1;
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(entry.path().join("config.v4.json"), folder.path().join("config.json")).unwrap();
        std::fs::copy(entry.path().join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
        check(&entry.file_name().into_string().unwrap(), folder.path());
    }
    assert!(found >= 4);
}
