//! Golden logits of a tiny random model of every family, made with transformers (tests/golden/generate.py).

use std::path::{Path, PathBuf};

use drawknife::checkpoint::{Checkpoint, Shard};
use drawknife::device::Device;
use drawknife::kernels::routing::Scores;
use drawknife::kernels::{tensor, values};
use drawknife::model::architecture::{Family, NormKind, Places, QkNorm};
use drawknife::model::config::Config;
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
    of_model(device, Model::open(&checkpoint, source.as_ref()).unwrap(), tokens)
}

fn of_model(device: &Device, model: Model<'_>, tokens: &[u32]) -> Vec<f32> {
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

/// A wrong forward: the golden model, and what is wrong.
type Wrong = (&'static str, &'static str, fn(&mut Config));

const WRONG: &[Wrong] = &[
    ("mistral", "a window of 8", |config| config.layers.iter_mut().for_each(|layer| layer.window = Some(8))),
    ("qwen2", "no windows", |config| config.layers.iter_mut().for_each(|layer| layer.window = None)),
    ("qwen3", "no norms of heads", |config| other(config, |family| family.qk_norm = QkNorm::Absent)),
    ("llama2", "a larger epsilon", |config| config.epsilon = 9e-3),
    ("gemma2", "weights of norms as they are", |config| other(config, |family| family.norm = NormKind::Plain)),
    ("gemma2", "no cap of scores", |config| config.attention_cap = None),
    ("gemma2", "no cap of logits", |config| config.logits_cap = None),
    ("gemma3_text", "a cap of scores", |config| config.attention_cap = Some(2.0)),
    ("gemma3_text", "one rotation", |config| {
        let full = config.layers[2].rotation.clone();
        config.layers.iter_mut().for_each(|layer| layer.rotation = full.clone());
    }),
    ("granite", "no factor of branches", |config| config.residual_factor = 1.0),
    ("granite", "plain scores", |config| config.scale = (config.head_dim as f32).powf(-0.5)),
    ("smollm3", "rotation everywhere", |config| {
        let turned = config.layers.iter().find_map(|layer| layer.rotation.clone());
        config.layers.iter_mut().for_each(|layer| layer.rotation = turned.clone());
    }),
    ("cohere2", "root mean squares", |config| other(config, |family| family.norm = NormKind::Plain)),
    ("cohere2", "one branch after the other", |config| {
        other(config, |family| family.places = Places { parallel: false, ..family.places });
    }),
    ("ministral3", "queries that do not grow", |config| config.layers.iter_mut().for_each(|layer| layer.rotation = None)),
    ("qwen2_moe", "shares that add up to one", |config| rule(config, |rule| rule.renormalized ^= true)),
    ("qwen3_moe", "shares that do not add up to one", |config| rule(config, |rule| rule.renormalized ^= true)),
    ("mixtral", "one expert less", |config| rule(config, |rule| rule.chosen = 1)),
    ("gpt_oss", "no scores of nothing", |config| other(config, |family| family.sinks = false)),
    ("gpt_oss", "a plain gate", |config| config.activation = drawknife::kernels::gated::Activation::Silu),
    ("gpt_oss", "a window of 8", |config| config.layers[0].window = Some(8)),
    ("deepseek_v3", "no sharper scores", |config| config.scale = 14f32.powf(-0.5)),
    ("deepseek_v3", "a factor of shares of 1", |config| grouped(config, |_, _, factor| *factor = 1.0)),
    ("deepseek_v3", "all groups", |config| grouped(config, |groups, kept, _| *kept = *groups)),
    ("deepseek_v3", "softmax", |config| rule(config, |rule| rule.scores = Scores::Softmax)),
    ("deepseek_v3_wide", "shares that add up to one", |config| rule(config, |rule| rule.renormalized ^= true)),
    ("qwen3_next", "shares that do not add up to one", |config| rule(config, |rule| rule.renormalized ^= true)),
    ("qwen3_next", "weights of norms as they are", |config| other(config, |family| family.norm = NormKind::Plain)),
    ("qwen3_5_text", "no norms of heads", |config| other(config, |family| family.qk_norm = QkNorm::Absent)),
];

/// Another row of the table.
fn other(config: &mut Config, change: fn(&mut Family)) {
    let mut family = *config.family;
    change(&mut family);
    config.family = Box::leak(Box::new(family));
}

fn rule(config: &mut Config, change: fn(&mut drawknife::kernels::routing::Rule)) {
    change(&mut config.mixture.as_mut().unwrap().rule);
}

fn grouped(config: &mut Config, change: fn(&mut usize, &mut usize, &mut f32)) {
    match &mut config.mixture.as_mut().unwrap().rule.scores {
        Scores::Grouped { groups, kept, factor } => change(groups, kept, factor),
        Scores::Softmax => panic!("no groups"),
    }
}

#[test]
fn wrong_forwards_give_other_logits() {
    let seen = |case: &str, what: &str, found: Vec<f32>| {
        let (_, expected) = expected(case);
        let largest = expected.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst > 1e-3 * largest, "{case}, {what}: {worst} of {largest} would not be seen");
    };
    for (case, what, change) in WRONG {
        let checkpoint = Checkpoint::open(&golden(case)).unwrap();
        let source = drawknife::formats::open(&checkpoint).unwrap();
        let mut model = Model::open(&checkpoint, source.as_ref()).unwrap();
        change(&mut model.config);
        seen(case, what, of_model(&Device::cpu(), model, &expected(case).0));
    }
    // Pairs are read with the configuration.
    for (case, key, value) in [
        ("deepseek_v3", "rope_interleave", serde_json::json!(false)),
        ("deepseek_v3_wide", "rope_interleave", serde_json::json!(true)),
        ("qwen3_5_text", "rope_parameters", serde_json::json!({"rope_theta": 1e4, "partial_rotary_factor": 1.0})),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(golden(case).join("config.json")).unwrap()).unwrap();
        config[key] = value;
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        std::fs::copy(golden(case).join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
        seen(case, key, logits(folder.path(), &expected(case).0));
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
