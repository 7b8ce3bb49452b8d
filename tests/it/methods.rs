//! Calibrated methods through the command line, on the embedded model with few windows.

use std::path::Path;

use serde_json::Value;

use crate::command::{compress, drawknife, json, linear, workplace};

/// Few windows, so that a test takes a second.
const FEW: &[&str] = &["--samples", "12", "--seq", "128", "--eval-tokens", "2048"];

fn stage(method: &str, options: &str) -> String {
    format!("[[stage]]\nmethod = \"{method}\"\n{options}\n")
}

fn divergence(found: &Value) -> f64 {
    found["report"]["quality"]["kld_mean"].as_f64().unwrap()
}

fn weights(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("model.safetensors")).unwrap()
}

#[test]
fn each_step_of_the_closed_form_lowers_the_divergence_at_three_bits() {
    let (folder, model) = workplace();
    let run = |name: &str, method: &str, options: &str| {
        divergence(&compress(folder.path(), &model, name, &stage(method, &format!("bits = 3\n{options}")), FEW).1)
    };
    let nearest = run("rtn", "round-to-nearest", "");
    let gptq = run("gptq", "gptq", "");
    let closed = run("closed", "closed-form", "");
    assert!(gptq < 0.8 * nearest && closed < gptq, "{nearest} {gptq} {closed}");
}

#[test]
fn without_correction_and_descent_the_closed_form_is_gptq_bit_for_bit() {
    let (folder, model) = workplace();
    let quick = &["--samples", "4", "--seq", "128", "--no-eval"];
    let (gptq, _) = compress(folder.path(), &model, "gptq", &stage("gptq", "bits = 3"), quick);
    let plain = "bits = 3\nalpha = 0.0\nbeta = 0.0\nrounds = 0\nsweeps = 0";
    let (closed, _) = compress(folder.path(), &model, "closed", &stage("closed-form", plain), quick);
    assert!(weights(&gptq) == weights(&closed));
    let (other, _) = compress(folder.path(), &model, "other", &stage("closed-form", "bits = 3\nalpha = 1.0"), quick);
    assert!(weights(&gptq) != weights(&other));
}

#[test]
fn methods_on_blocks_give_the_same_bytes_for_any_number_of_threads() {
    let (folder, model) = workplace();
    let recipe = stage("signround", "bits = 2\niters = 6") + &stage("norm-refit", "") + &stage("norm-tweak", "lr = 1e-4");
    let run = |threads: &str| {
        let more = ["--samples", "10", "--seq", "128", "--no-eval", "--threads", threads];
        weights(&compress(folder.path(), &model, &format!("t{threads}"), &recipe, &more).0)
    };
    let one = run("1");
    assert!(run("2") == one && run("3") == one);
}

#[test]
fn every_preset_gives_the_same_bytes_for_any_number_of_threads() {
    let (folder, model) = workplace();
    let run = |preset: &str, threads: &str| {
        let out = folder.path().join(format!("{}-{threads}", preset.replace(':', "-")));
        let few = ["--samples", "3", "--seq", "32", "--no-eval", "--threads", threads];
        json(&[&["compress", &model, "-o", out.to_str().unwrap(), "--preset", preset], &few[..]].concat());
        weights(&out)
    };
    // The slowest differs from another in its number of iterations alone.
    for preset in drawknife::plan::recipe::PRESETS.iter().filter(|preset| preset.name != "w4-best") {
        assert!(run(preset.name, "1") == run(preset.name, "3"), "{}", preset.name);
    }
}

#[test]
fn learned_rounding_lowers_the_block_error_and_keeps_pruned_weights_at_zero() {
    let (folder, model) = workplace();
    let learned = stage("signround", "bits = 3\niters = 20\ninit = \"range\"");
    let (_, found) = compress(folder.path(), &model, "learned", &learned, FEW);
    let nearest = divergence(&compress(folder.path(), &model, "nearest", &stage("signround", "bits = 3\niters = 0"), FEW).1);
    let plain = divergence(&compress(folder.path(), &model, "rtn", &stage("round-to-nearest", "bits = 3"), FEW).1);
    assert_eq!(nearest, plain, "without iterations it is round to nearest");
    assert!(divergence(&found) < 0.8 * nearest);
    assert_eq!(found["report"]["blocks"][0]["stages"][0]["curve"].as_array().unwrap().len(), 20);
    let both = stage("wanda", "sparsity = 0.5") + &stage("signround", "bits = 4\niters = 20");
    let (out, found) = compress(folder.path(), &model, "sparse", &both, FEW);
    let pruned = divergence(&compress(folder.path(), &model, "pruned", &stage("wanda", "sparsity = 0.5"), FEW).1);
    assert!(divergence(&found) < pruned, "rounding against the dense block takes up some of what pruning did");
    let weight = linear(&out, "model.layers.1.self_attn.q_proj", [256, 128]);
    assert!((0..256).all(|row| weight.row(row).iter().filter(|value| **value == 0.0).count() >= 64));
}

#[test]
fn refitted_norms_never_raise_a_blocks_error_and_are_stored_in_single_precision() {
    let (folder, model) = workplace();
    let recipe = stage("round-to-nearest", "bits = 3") + &stage("norm-refit", "");
    let (out, found) = compress(folder.path(), &model, "refit", &recipe, FEW);
    for block in found["report"]["blocks"].as_array().unwrap() {
        let stage = &block["stages"][1];
        assert!(stage["after"].as_f64() <= stage["before"].as_f64(), "{stage}");
    }
    let checkpoint = drawknife::checkpoint::Checkpoint::open(&out).unwrap();
    let info = checkpoint.info("model.layers.0.input_layernorm.weight").unwrap();
    assert_eq!(format!("{:?}", info.dtype), "F32");
    let again = json(&["eval", out.to_str().unwrap(), "--reference", &model, "--max-tokens", "2048"]);
    assert_eq!(again["nll"], found["report"]["quality"]["nll"]);
}

#[test]
fn unsound_orders_and_unknown_words_are_refused_with_the_reason() {
    let (folder, model) = workplace();
    for (recipe, reason) in [
        (stage("norm-refit", "") + &stage("round-to-nearest", ""), "put norm-refit last"),
        (stage("round-to-nearest", "") + &stage("signround", ""), "quantizing twice"),
        (stage("ptqtp", "") + &stage("gptq", ""), "quantizing twice"),
        (stage("gptq", "") + &stage("wanda", ""), "put the pruning stage first"),
        (stage("precalibrate", "bits = 4"), "no quantizing stage follows"),
        (stage("singround", ""), "did you mean `signround`"),
        (stage("gptq", "dampening = 0.1"), "did you mean `damping`"),
        (stage("gptq", "bits = 9"), "9 bits"),
    ] {
        let file = folder.path().join("wrong.toml");
        std::fs::write(&file, format!("version = 1\n{recipe}")).unwrap();
        let out = folder.path().join("out");
        let output = drawknife(&["compress", &model, "-o", out.to_str().unwrap(), "--recipe", file.to_str().unwrap()]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && text.contains(reason) && !out.exists(), "{recipe}: {text}");
    }
}
