//! Mixtures of experts: read one at a time where memory has no room for those of a block, with the same output to the byte, and what
//! storing them costs.

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
use serde_json::Value;

use crate::command::{compress, json as run_json};
use crate::formats::{letters, with_tokenizer};

/// What a recipe makes of a model: every file but those that tell of time and place.
fn compressed(folder: &Path, model: &Path, text: &str, stages: &str, singly: bool) -> BTreeMap<String, Vec<u8>> {
    let head = format!("version = 1\n[calibration]\nsource = {text:?}\nsamples = 12\nseq = 32\n");
    let job = Job {
        model: model.to_path_buf(),
        recipe: Recipe::parse(&(head + stages)).unwrap(),
        engine: None,
        quality: Some(QualityOptions {
            text: Some(text.into()),
            protocol: Protocol { seq: 32, max_tokens: Some(512), bos: Bos::Once, second_half: false },
        }),
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

#[test]
fn what_experts_cost_is_shared_out_and_adds_up_to_what_they_cost_together() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("letters.txt");
    // As many tokens as ten windows have, so that both verbs see the same.
    std::fs::write(&text, (0..640usize).map(|at| char::from(b'A' + (at * 7919 + at * at % 31) as u8 % 26)).collect::<String>()).unwrap();
    let text = text.to_str().unwrap();
    for (case, gone) in [("qwen2_moe", "model.layers.[12].*"), ("deepseek_v3", "model.layers.0.*")] {
        let model = with_tokenizer(case, folder.path()).to_str().unwrap().to_string();
        let path = folder.path().join(format!("{case}.json")).to_str().unwrap().to_string();
        let own = ["--schemes", "w2,w4", "--calibration", text, "--samples", "10", "--seq", "64"];
        let found = run_json(&[&["sensitivity", &model, "-o", &path], &own[..]].concat());
        let layers: Vec<&Value> = found["layers"].as_array().unwrap().iter().filter(|layer| layer["shares"] == true).collect();
        assert!(layers.len() > 20 && layers.iter().all(|layer| layer["name"].as_str().unwrap().contains("expert")), "{case}");
        let block = layers.iter().map(|layer| layer["block"].as_u64().unwrap()).find(|block| *block == u64::from(case == "deepseek_v3"));
        let of_block = layers.iter().filter(|layer| layer["block"].as_u64() == block);
        let sum: f64 = of_block.map(|layer| layer["candidates"][0]["kld"].as_f64().unwrap()).sum();
        let recipe = "[[stage]]\nmethod = \"round-to-nearest\"\nbits = 2\ngroup = 128\n";
        let measured = ["--eval-text", text, "--eval-seq", "64", "--skip", "*self_attn*", "--skip", gone, "--format", "dense"];
        let (_, done) = compress(folder.path(), &model, &format!("{case}-out"), recipe, &measured);
        let together = done["report"]["quality"]["kld_mean"].as_f64().unwrap();
        assert!(sum > 1e-3 && (sum - together).abs() < 1e-6 * sum, "{case}: {sum} {together}");
        // A target gives all experts of a block the same bits.
        let target = ["--sensitivity", &path, "--target-bpw", "3.9", "--no-eval"];
        let recipe = "[[stage]]\nmethod = \"round-to-nearest\"\nbits = 4\ngroup = 128\n";
        let (_, done) = compress(folder.path(), &model, &format!("{case}-target"), recipe, &target);
        let mut stored = BTreeMap::new();
        for layer in
            done["report"]["layers"].as_array().unwrap().iter().filter(|layer| layer["name"].as_str().unwrap().contains(".experts."))
        {
            let block = layer["name"].as_str().unwrap().split('.').nth(2).unwrap().to_string();
            let bits = layer["storage"].as_str().unwrap().split(' ').next().unwrap().to_string();
            assert_eq!(stored.entry(block).or_insert(bits.clone()), &bits, "{case}");
        }
        assert!(!stored.is_empty());
    }
}

#[test]
fn experts_that_are_pruned_already_are_measured_too() {
    let folder = tempfile::tempdir().unwrap();
    let text = letters(folder.path());
    let model = with_tokenizer("qwen2_moe", folder.path()).to_str().unwrap().to_string();
    let recipe = "[[stage]]\nmethod = \"wanda\"\npattern = \"2:4\"\n";
    let own = ["--calibration", text.as_str(), "--samples", "4", "--seq", "32"];
    let more = [&own[..], &["--no-eval", "--format", "tritplane"]].concat();
    let (out, _) = compress(folder.path(), &model, "pruned", recipe, &more);
    let path = folder.path().join("sensitivity.json").to_str().unwrap().to_string();
    let found = run_json(&[&["sensitivity", out.to_str().unwrap(), "-o", &path, "--schemes", "w4"], &own[..]].concat());
    assert_eq!(found["complete"], true);
}
