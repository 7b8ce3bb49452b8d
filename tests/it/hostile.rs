//! Layers and calibration that give methods little to work with: every method ends in a finite model with a note, or in a
//! refusal that names the tensor.

use std::path::Path;

use drawknife::checkpoint::Checkpoint;
use drawknife::checkpoint::decode::{decode, encode};
use drawknife::weight::Float;
use serde_json::Value;

use crate::command::{compress, drawknife, workplace};

/// Every method, and the compositions that hand something on.
const RECIPES: &[(&str, &str)] = &[
    ("round-to-nearest", "method = \"round-to-nearest\"\nbits = 3\nsymmetric = false"),
    ("gptq", "method = \"gptq\"\nbits = 3"),
    ("closed-form", "method = \"closed-form\"\nbits = 2\nsymmetric = false"),
    ("signround", "method = \"signround\"\nbits = 3\niters = 3"),
    ("signround-range", "method = \"signround\"\nbits = 2\niters = 3\ninit = \"range\"\nsymmetric = false"),
    ("signround-search", "method = \"signround\"\nbits = 2\niters = 3\ninit = \"search\""),
    ("precalibrate", "method = \"precalibrate\"\nbits = 3\n[[stage]]\nmethod = \"round-to-nearest\"\nbits = 3"),
    ("adpq", "method = \"precalibrate\"\nbits = 3\nstorage = \"adpq\""),
    ("ptqtp", "method = \"ptqtp\"\nweighted = true"),
    ("tied", "method = \"ptqtp\"\ntied = true\ntarget = \"float-output\""),
    ("magnitude", "method = \"magnitude\"\nsparsity = 0.5"),
    ("wanda", "method = \"wanda\"\nswaps = 20\nrefit = true"),
    ("sparsegpt", "method = \"sparsegpt\"\npattern = \"2:4\"\ntarget = \"float-output\""),
    ("admm", "method = \"admm\"\nmask = \"auto\"\nrefit = 4"),
    ("admm-float", "method = \"admm\"\npattern = \"2:4\"\ntarget = \"float-output\""),
    ("norm-tweak", "method = \"round-to-nearest\"\nbits = 3\n[[stage]]\nmethod = \"norm-tweak\""),
    ("norm-refit", "method = \"wanda\"\n[[stage]]\nmethod = \"round-to-nearest\"\n[[stage]]\nmethod = \"norm-refit\""),
];

/// Changes a tensor of a model in place.
fn change(model: &Path, name: &str, edit: impl Fn(&mut [f32], usize)) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let info = checkpoint.info(name).unwrap();
    let columns = *info.shape.last().unwrap();
    let bytes = checkpoint.bytes(name).unwrap().to_vec();
    let mut floats = vec![0.0; bytes.len() / 2];
    decode(Float::BF16, &bytes, &mut floats);
    edit(&mut floats, columns);
    let file = model.join("model.safetensors");
    let mut all = std::fs::read(&file).unwrap();
    let at = all.windows(bytes.len()).position(|window| window == bytes).unwrap();
    drop(checkpoint);
    all[at..at + bytes.len()].copy_from_slice(&encode(Float::BF16, &floats));
    std::fs::write(file, all).unwrap();
}

const LINEARS: &[&str] =
    &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];

/// Dead input columns and constant rows in block 0, nothing but zeros in block 1.
fn damage(model: &Path) {
    for norm in ["input_layernorm", "post_attention_layernorm"] {
        change(model, &format!("model.layers.0.{norm}.weight"), |norm, _| norm[3] = 0.0);
    }
    for linear in LINEARS {
        change(model, &format!("model.layers.0.{linear}.weight"), |weight, columns| {
            weight[5 * columns..6 * columns].fill(0.25);
            weight[7 * columns..8 * columns].fill(0.0);
        });
        change(model, &format!("model.layers.1.{linear}.weight"), |weight, _| weight.fill(0.0));
    }
}

fn finite(folder: &Path) -> bool {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let names: Vec<String> = checkpoint.names().map(str::to_string).collect();
    names.iter().all(|name| {
        let float = match format!("{:?}", checkpoint.info(name).unwrap().dtype).as_str() {
            "BF16" => Float::BF16,
            "F16" => Float::F16,
            "F32" => Float::F32,
            _ => return true,
        };
        let bytes = checkpoint.bytes(name).unwrap();
        let mut floats = vec![0.0; bytes.len() / float.bytes()];
        decode(float, &bytes, &mut floats);
        floats.iter().all(|value| value.is_finite())
    })
}

/// The notes of a layer.
fn notes<'a>(found: &'a Value, name: &str) -> Vec<&'a str> {
    let layer = found["report"]["layers"].as_array().unwrap().iter().find(|layer| layer["name"] == name).unwrap();
    layer["notes"].as_array().into_iter().flatten().map(|note| note.as_str().unwrap()).collect()
}

fn says(notes: &[&str], part: &str) -> bool {
    notes.iter().any(|note| note.contains(part))
}

#[test]
fn dead_inputs_constant_rows_and_blocks_of_zeros_end_in_a_finite_model_with_a_note() {
    let (folder, model) = workplace();
    damage(Path::new(&model));
    for (name, stages) in RECIPES {
        let few = ["--samples", "6", "--seq", "64", "--eval-tokens", "512"];
        let (out, found) = compress(folder.path(), &model, name, &format!("[[stage]]\n{stages}"), &few);
        assert!(finite(&out), "{name}");
        assert!(found["report"]["quality"]["nll"].as_f64().unwrap().is_finite(), "{name}");
        let query = notes(&found, "model.layers.0.self_attn.q_proj");
        assert!(says(&query, "2 of 256 rows hold one value each, 1 of them zero"), "{name}: {query:?}");
        let zeros = notes(&found, "model.layers.1.mlp.down_proj");
        assert!(says(&zeros, "all weights were zero"), "{name}: {zeros:?}");
        let calibrated = !found["report"]["calibration"].is_null();
        assert_eq!(says(&query, "1 of 128 input columns were zero"), calibrated, "{name}: {query:?}");
        assert!(found["report"]["layers"].as_array().unwrap().iter().all(|layer| layer["layer_error"].is_number() == calibrated), "{name}");
    }
}

#[test]
fn one_window_is_enough_to_end_in_a_finite_model_with_a_note() {
    let (folder, model) = workplace();
    for (name, stages) in RECIPES {
        let few = ["--samples", "1", "--seq", "64", "--eval-tokens", "512", "--eval-seq", "128"];
        let (out, found) = compress(folder.path(), &model, name, &format!("[[stage]]\n{stages}"), &few);
        assert_eq!(found["report"]["quality"]["seq"], 128);
        assert!(finite(&out) && found["report"]["quality"]["nll"].as_f64().unwrap().is_finite(), "{name}");
        if !found["report"]["calibration"].is_null() {
            let query = notes(&found, "model.layers.2.self_attn.q_proj");
            assert!(says(&query, "64 calibration tokens are fewer than the 128 input columns"), "{name}: {query:?}");
        }
    }
}

#[test]
fn a_norm_that_is_not_finite_is_refused_by_name() {
    let (folder, model) = workplace();
    change(Path::new(&model), "model.layers.1.input_layernorm.weight", |norm, _| norm[3] = f32::NAN);
    for (name, stages) in RECIPES {
        let file = folder.path().join("recipe.toml");
        std::fs::write(&file, format!("version = 1\n[[stage]]\n{stages}")).unwrap();
        let out = folder.path().join("out");
        let arguments =
            ["compress", &model, "-o", out.to_str().unwrap(), "--recipe", file.to_str().unwrap(), "--samples", "2", "--seq", "64"];
        let output = drawknife(&arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && !out.exists(), "{name}: {text}");
        assert!(text.contains("model.layers.1.input_layernorm.weight") && text.contains("NaN"), "{name}: {text}");
    }
}

/// Templates that ask for more memory or time than there is.
const BOMBS: &[(&str, &str)] = &[
    ("doubling", "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"),
    ("join", "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x]|join('') %}{% endfor %}{{ ns.x }}"),
    ("replace", "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x|replace('a', 'aa') %}{% endfor %}{{ ns.x }}"),
    ("format", "{{ '%999999999999s'|format('x') }}"),
    ("batch", "{{ [1]|batch(99999999999, 'x')|list }}"),
    ("indent", "{{ 'a\\nb'|indent(99999999999) }}"),
];

#[test]
fn a_chat_template_that_asks_for_all_memory_is_refused_by_name() {
    let (folder, model) = workplace();
    let chats = folder.path().join("chats.jsonl");
    std::fs::write(&chats, "{\"messages\":[{\"role\":\"user\",\"content\":\"Good day to you all, and many more of them!\"}]}\n").unwrap();
    let chats = chats.to_str().unwrap();
    for (what, template) in BOMBS {
        std::fs::write(Path::new(&model).join("chat_template.jinja"), template).unwrap();
        let started = std::time::Instant::now();
        let output = drawknife(&["plan", &model, "--preset", "prune50", "--calibration", chats]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{what}: {error}");
        assert!(error.contains("chat_template.jinja: chat template: ") && error.trim_end().lines().count() == 1, "{what}: {error}");
        assert!(started.elapsed().as_secs() < 20, "{what}");
    }
    std::fs::write(Path::new(&model).join("chat_template.jinja"), "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
        .unwrap();
    let output = drawknife(&["plan", &model, "--preset", "prune50", "--calibration", chats]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}
