//! Experts that are read one at a time, because memory has no room for those of a block: the output is the same to the byte.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use drawknife::compress::destination::{Claim, Destination};
use drawknife::compress::{Job, Prepared, QualityOptions, manifest};
use drawknife::device::Device;
use drawknife::evaluate::{Bos, Protocol};
use drawknife::plan::recipe::Recipe;
use drawknife::run::{Run, Silent};
use drawknife::storage::Disk;

use crate::formats::{letters, with_tokenizer};

/// What a recipe makes of a model: every file but those that tell of time and place.
fn compressed(folder: &Path, model: &Path, text: &str, stages: &str, singly: bool) -> BTreeMap<String, Vec<u8>> {
    let head = format!("version = 1\n[calibration]\nsource = {text:?}\nsamples = 12\nseq = 32\n");
    let job = Job {
        model: model.to_path_buf(),
        recipe: Recipe::parse(&(head + stages)).unwrap(),
        engine: None,
        quality: Some(QualityOptions { text: Some(text.into()), protocol: Protocol { seq: 32, max_tokens: Some(512), bos: Bos::Once, second_half: false } }),
        allocation: None,
        command: Vec::new(),
        beside: Vec::new(),
        memory: None,
    };
    let device = Device::cpu();
    let run = Run { device: &device, seed: 0, observer: &Silent, scratch: folder };
    let mut prepared = Prepared::new(job.clone()).unwrap();
    prepared.needed.singly = singly;
    let dependencies = manifest::dependencies(&job, &prepared.checkpoint, &device).unwrap();
    let out = folder.join(format!("out-{singly}"));
    let claim = Claim { replace: true, restart: true, storage: Arc::new(Disk) };
    let mut destination = Destination::claim(&out, model, claim).unwrap();
    assert!(!destination.begin(&dependencies).unwrap());
    prepared.run(destination, &dependencies, &run).unwrap();
    let names = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let files = names.filter(|name| name.ends_with(".safetensors") || name == "report.json" || name == "config.json");
    files.map(|name| (name.clone(), std::fs::read(out.join(&name)).unwrap())).collect()
}

#[test]
fn experts_read_one_at_a_time_give_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let text = letters(folder.path());
    let integers = |method: &str| format!("[[stage]]\nmethod = \"{method}\"\nbits = 4\ngroup = 8\n");
    let pruned = |method: &str| format!("[[stage]]\nmethod = \"{method}\"\nsparsity = 0.5\n");
    let all = [
        ("qwen2_moe", integers("closed-form")),
        ("qwen3_moe_stacked", integers("gptq")),
        ("mixtral", pruned("wanda")),
        ("mixtral", pruned("admm") + &integers("closed-form")),
        ("deepseek_v3", pruned("sparsegpt") + &integers("round-to-nearest")),
        ("deepseek_v3", integers("closed-form")),
        ("qwen3_next", "[[stage]]\nmethod = \"reap\"\nexperts = 4\n".to_string() + &integers("closed-form")),
        ("qwen3_5_moe_text", pruned("wanda") + &integers("gptq")),
        ("gpt_oss", integers("closed-form")),
    ];
    for (case, stages) in all {
        let model = folder.path().join(case);
        if !model.exists() {
            with_tokenizer(case, folder.path());
        }
        let [held, read] = [false, true].map(|singly| compressed(folder.path(), &model, &text, &stages, singly));
        assert!(held.len() >= 3 && held.keys().eq(read.keys()), "{:?}", held.keys());
        for (name, bytes) in &held {
            assert!(bytes == &read[name], "{case} {stages}: {name} differs");
        }
    }
}
