//! Text that a model writes itself: the decoding against whole windows, and what the program makes of it.

use std::path::Path;

use drawknife::checkpoint::Checkpoint;
use drawknife::device::Device;
use drawknife::model::Model;
use drawknife::model::generate::{BUDGET, Budget, Decoder, GREEDY, Options, Weights, generate};
use drawknife::run::{Run, Silent};

use crate::command::{drawknife, json, workplace};
use crate::golden::{expected, golden, logits};

/// Logits of one window, position after position, beside a window that holds other tokens.
fn decoded(folder: &Path, window: &[u32], room: u64) -> Vec<f32> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let source = drawknife::formats::open(&checkpoint).unwrap();
    let model = Model::open(&checkpoint, source.as_ref()).unwrap();
    let device = Device::cpu();
    let run = Run { device: &device, seed: 0, observer: &Silent, scratch: Path::new(".") };
    let mut weights = Weights::new(&model, room, &run).unwrap();
    let mut decoder = Decoder::new(&mut weights, 2, window.len());
    let mut found = Vec::new();
    for &token in window {
        let states = decoder.step(&[(token + 7) % model.config.vocabulary as u32, token]).unwrap();
        let see = |slice: std::ops::Range<usize>, logits: Vec<f32>| found.extend_from_slice(&logits[slice.len()..2 * slice.len()]);
        decoder.logits(&states, see).unwrap();
    }
    found
}

#[test]
fn position_after_position_gives_the_logits_of_whole_windows_in_every_family() {
    let mut cases: Vec<String> =
        std::fs::read_dir(golden("")).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap()).collect();
    cases.retain(|case| golden(case).is_dir());
    assert!(cases.len() >= 18);
    for case in cases {
        let folder = golden(&case);
        let tokens = expected(&case).0;
        let (exact, found) = (logits(&folder, &tokens), decoded(&folder, &tokens, u64::MAX));
        let largest = exact.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let worst = exact.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(exact.len() == found.len() && worst <= 2e-5 * largest, "{case}: off by {worst} of {largest}");
        assert_eq!(found, decoded(&folder, &tokens, 0), "{case}: weights that do not stay are the same weights");
    }
}

#[test]
fn long_windows_of_the_embedded_model_agree_too() {
    let (_folder, model) = workplace();
    let tokens: Vec<u32> = (0..300).map(|i| (i * 7919 + 11) % 512).collect();
    let (exact, found) = (logits(Path::new(&model), &tokens), decoded(Path::new(&model), &tokens, u64::MAX));
    let largest = exact.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let worst = exact.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 1e-4 * largest, "off by {worst} of {largest}");
}

fn options(samples: usize, seed: u64) -> Options {
    Options { samples, seq: 48, seed, begin: Some(0), starts: (200..400).collect(), suppressed: vec![1, 40, 9999] }
}

/// Windows that the embedded model writes on some threads.
fn written(folder: &str, options: &Options, budget: Budget, threads: usize) -> Vec<Vec<u32>> {
    let checkpoint = Checkpoint::open(Path::new(folder)).unwrap();
    let source = drawknife::formats::open(&checkpoint).unwrap();
    let model = Model::open(&checkpoint, source.as_ref()).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let device = Device::cpu();
        let run = Run { device: &device, seed: 0, observer: &Silent, scratch: Path::new(".") };
        generate(&model, options, budget, &run).unwrap()
    })
}

#[test]
fn windows_depend_on_the_seed_alone_and_not_on_threads_groups_or_neighbours() {
    let (_folder, model) = workplace();
    let first = written(&model, &options(37, 5), BUDGET, 1);
    assert_eq!(first, written(&model, &options(37, 5), BUDGET, 3), "threads");
    for cache in [0, 3 << 20, 9 << 20] {
        let budget = Budget { weights: cache, cache };
        assert_eq!(first, written(&model, &options(37, 5), budget, 2), "groups under {cache} bytes");
    }
    assert_eq!(first[..20], written(&model, &options(20, 5), BUDGET, 2), "neighbours");
    let other = written(&model, &options(37, 6), BUDGET, 2);
    assert!(first.iter().zip(&other).all(|(a, b)| a != b), "another seed writes other windows");
    let mut distinct = first;
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), 37);
}

#[test]
fn windows_have_their_length_begin_as_they_should_and_hold_no_suppressed_token() {
    let (_folder, model) = workplace();
    for seq in [2, 3, GREEDY, 100] {
        let options = Options { seq, ..options(21, 1) };
        let windows = written(&model, &options, BUDGET, 2);
        assert_eq!(windows.len(), 21);
        for window in &windows {
            assert!(window.len() == seq && window[0] == 0 && (200..400).contains(&window[1]), "{window:?}");
            assert!(window.iter().all(|token| *token != 1 && *token != 40 && *token < 512), "{window:?}");
        }
    }
    let options = Options { begin: None, seq: 1, ..options(3, 1) };
    assert!(written(&model, &options, BUDGET, 1).iter().all(|window| window.len() == 1 && window[0] >= 200));
}

#[test]
fn the_first_tokens_are_the_most_likely_ones() {
    let (_folder, model) = workplace();
    for window in written(&model, &Options { suppressed: vec![], ..options(5, 3) }, BUDGET, 2) {
        let exact = logits(Path::new(&model), &window);
        for length in 2..GREEDY {
            let row = &exact[(length - 1) * 512..length * 512];
            let best = (0..512).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
            assert_eq!(window[length] as usize, best, "{window:?}");
        }
    }
}

#[test]
fn drawn_tokens_are_as_surprising_as_the_model_s_own_distribution_says() {
    let (_folder, model) = workplace();
    // −ln p of a drawn token minus the entropy of its distribution has mean zero for draws at temperature 1.
    let mut means = Vec::new();
    for window in written(&model, &Options { suppressed: vec![], seq: 128, ..options(40, 2) }, BUDGET, 2) {
        let exact = logits(Path::new(&model), &window);
        let surplus = (GREEDY..128).map(|length| {
            let row: Vec<f64> = exact[(length - 1) * 512..length * 512].iter().map(|&logit| f64::from(logit)).collect();
            let total = row.iter().map(|logit| logit.exp()).sum::<f64>().ln();
            let entropy: f64 = row.iter().map(|logit| (total - logit) * (logit - total).exp()).sum();
            total - row[window[length] as usize] - entropy
        });
        means.push(surplus.sum::<f64>() / (128 - GREEDY) as f64);
    }
    let mean = means.iter().sum::<f64>() / 40.0;
    let spread = (means.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 39.0 / 40.0).sqrt();
    assert!(mean.abs() < 4.0 * spread && spread < 0.04, "{mean} ± {spread}");
}

#[test]
fn a_model_calibrates_on_its_own_text() {
    let (folder, model) = workplace();
    let out = folder.path().join("out");
    let run = |name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        let fixed = ["compress", &model, "-o", out.to_str().unwrap(), "--calibration", "self", "--preset", "prune50"];
        let size = ["--samples", "4", "--seq", "64", "--eval-tokens", "1024"];
        (std::fs::canonicalize(&out).ok(), json(&[&fixed, &size[..], more].concat()))
    };
    let (_, plan) = run("never", &["--dry-run"]);
    assert!(!folder.path().join("never").exists() && plan["calibration"]["blake3"] == "", "a plan does not write: {plan}");
    let (_, found) = run("out", &[]);
    let counts = &found["report"]["calibration"];
    assert_eq!((&counts["sources"][0], &counts["documents"], &counts["tokens_used"]), (&"self-generated".into(), &4.into(), &256.into()));
    assert_eq!((&counts["windows"], &counts["short_windows"], &counts["tokens"]), (&4.into(), &0.into(), &256.into()));
    assert!(counts["blake3"].as_str().unwrap().len() == 64 && found["report"]["quality"]["kld_mean"].as_f64().unwrap() < 1.0);
    let weights = |name: &str| std::fs::read(folder.path().join(name).join("model.safetensors")).unwrap();
    let (_, again) = run("again", &["--threads", "3"]);
    assert!(out.exists() && weights("out") == weights("again") && again["report"]["calibration"] == *counts);
    let (_, other) = run("other", &["--seed", "1"]);
    assert_ne!(other["report"]["calibration"]["blake3"], counts["blake3"]);
}

#[test]
fn own_text_beside_other_sources_or_without_a_tokenizer_is_refused() {
    let (folder, model) = workplace();
    let refused = |source: &str| {
        let out = folder.path().join("o");
        let output = drawknife(&["compress", &model, "-o", out.to_str().unwrap(), "--preset", "2:4", "--calibration", source]);
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused("self,a.txt").contains("stands alone") && refused("builtin:mix,self").contains("stands alone"));
    std::fs::remove_file(Path::new(&model).join("tokenizer.json")).unwrap();
    assert!(refused("self").contains("tokenizer.json"));
}
