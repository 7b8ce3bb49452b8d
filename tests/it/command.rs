//! The program as a user runs it, on the embedded model and on tiny ones.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use drawknife::checkpoint::Checkpoint;
use drawknife::formats;
use drawknife::matrix::Matrix;
use serde_json::Value;

/// Runs the program.
pub fn drawknife(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_drawknife")).args(arguments).output().unwrap()
}

/// Runs the program with `--json` and gives the object that it prints.
pub fn json(arguments: &[&str]) -> Value {
    let output = drawknife(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The embedded model as a checkpoint in a new folder, beside which outputs fit.
pub fn workplace() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    drawknife::embedded::write(&model).unwrap();
    (folder, model.to_str().unwrap().to_string())
}

/// Writes a recipe and compresses with it.
pub fn compress(folder: &Path, model: &str, name: &str, recipe: &str, more: &[&str]) -> (PathBuf, Value) {
    let (out, file) = (folder.join(name), folder.join(format!("{name}.toml")));
    std::fs::write(&file, format!("version = 1\n{recipe}")).unwrap();
    let fixed = ["compress", model, "-o", out.to_str().unwrap(), "--recipe", file.to_str().unwrap()];
    let report = json(&[&fixed, more].concat());
    (out, report)
}

/// The floats of a linear layer of a checkpoint.
pub fn linear(folder: &Path, name: &str, shape: [usize; 2]) -> Matrix {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let source = formats::open(&checkpoint).unwrap();
    source.weight(&checkpoint, name, shape).unwrap().into_matrix()
}

#[test]
fn without_a_model_the_embedded_one_is_compressed_twice_in_a_row() {
    let folder = tempfile::tempdir().unwrap();
    let run = || Command::new(env!("CARGO_BIN_EXE_drawknife")).arg("compress").current_dir(folder.path()).output().unwrap();
    let (first, second) = (run(), run());
    let text = String::from_utf8(first.stdout).unwrap();
    for part in ["model     built-in", "plan      round-to-nearest", "quality", "perplexity", "drawknife-demo", "report.html"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(first.status.success() && second.status.success());
    assert!(folder.path().join("drawknife-demo/report.json").exists() && folder.path().join("drawknife-demo-2/model.safetensors").exists());
}

#[test]
fn the_embedded_model_is_what_its_readme_says() {
    let (_folder, model) = workplace();
    let size = std::fs::metadata(Path::new(&model).join("model.safetensors")).unwrap().len();
    assert!(size <= 1_500_000, "{size}");
    let found = json(&["eval", &model, "--seq", "128"]);
    let perplexity = found["perplexity"].as_f64().unwrap();
    assert!(perplexity * 3.0 < 257.9, "a unigram model has 257.9, this has {perplexity}");
}

#[test]
fn every_grid_is_written_read_back_and_measured_without_loss() {
    let (folder, model) = workplace();
    let mut perplexities = Vec::new();
    for (bits, symmetric, group) in [
        (2, true, "32"),
        (3, false, "64"),
        (3, true, "\"channel\""),
        (4, true, "128"),
        (4, false, "128"),
        (8, true, "128"),
        (8, false, "\"channel\""),
    ] {
        let name = format!("w{bits}{symmetric}{}", group.len());
        let stage = format!("[[stage]]\nmethod = \"round-to-nearest\"\nbits = {bits}\nsymmetric = {symmetric}\ngroup = {group}\n");
        let (out, found) = compress(folder.path(), &model, &name, &stage, &["--eval-tokens", "1024"]);
        let quality = &found["report"]["quality"];
        let again = json(&["eval", out.to_str().unwrap(), "--reference", &model, "--max-tokens", "1024"]);
        assert_eq!(quality["nll"], again["nll"], "{name}");
        assert_eq!(quality["kld_mean"], again["kld_mean"], "{name}");
        perplexities.push((bits, quality["kld_mean"].as_f64().unwrap()));
        let error = found["report"]["layers"][0]["weight_error"].as_f64().unwrap();
        let shape = [256, 128];
        let (exact, stored) =
            (linear(Path::new(&model), "model.layers.0.self_attn.q_proj", shape), linear(&out, "model.layers.0.self_attn.q_proj", shape));
        let [change, total] = drawknife::methods::change(&exact.data, &stored.data);
        assert!((error - change / total).abs() < 1e-5 * error, "{name}: {error} {}", change / total);
    }
    let worst = |bits: i32| perplexities.iter().filter(|(b, _)| *b == bits).map(|(_, kld)| *kld).fold(0.0, f64::max);
    assert!(worst(8) < worst(4) && worst(4) < worst(3) && worst(3) < worst(2), "{perplexities:?}");
}

#[test]
fn pruning_zeroes_exactly_and_leaves_survivors_bit_for_bit() {
    let (folder, model) = workplace();
    for (pattern, kept, of) in [("unstructured", 0, 0), ("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)] {
        let stage = format!("[[stage]]\nmethod = \"wanda\"\npattern = \"{pattern}\"\n");
        let (out, _) =
            compress(folder.path(), &model, &pattern.replace(':', "of"), &stage, &["--samples", "4", "--seq", "128", "--no-eval"]);
        for (name, shape) in [("model.layers.0.self_attn.k_proj", [128, 128]), ("model.layers.2.mlp.down_proj", [128, 256])] {
            let (exact, pruned) = (linear(Path::new(&model), name, shape), linear(&out, name, shape));
            assert!(pruned.data.iter().zip(&exact.data).all(|(a, b)| *a == 0.0 || a.to_bits() == b.to_bits()));
            for row in 0..shape[0] {
                let blocks = if of == 0 { pruned.row(row).chunks(shape[1]) } else { pruned.row(row).chunks(of) };
                for block in blocks {
                    let survivors = block.iter().filter(|value| **value != 0.0).count();
                    assert_eq!(survivors, if of == 0 { shape[1] / 2 } else { kept }, "{name} row {row}");
                }
            }
        }
        let config = |folder: &Path| std::fs::read(folder.join("config.json")).unwrap();
        assert_eq!(config(&out), config(Path::new(&model)), "a dense output leaves config.json alone");
    }
}

#[test]
fn quantizing_what_was_pruned_keeps_the_zeros() {
    let (folder, model) = workplace();
    let stages = "[report]\nlayer_error = true\n[[stage]]\nmethod = \"wanda\"\npattern = \"2:4\"\n[[stage]]\nmethod = \"round-to-nearest\"\nbits = 3\nsymmetric = false\ngroup = 64\n";
    let (out, found) = compress(folder.path(), &model, "both", stages, &["--samples", "4", "--seq", "64", "--no-eval"]);
    let matrix = linear(&out, "model.layers.1.mlp.up_proj", [256, 128]);
    assert!(matrix.data.chunks(4).all(|block| block.iter().filter(|value| **value == 0.0).count() >= 2));
    let layer = &found["report"]["layers"][0];
    let error = layer["layer_error"].as_f64().unwrap();
    assert!(error > 0.0 && error < layer["weight_error"].as_f64().unwrap(), "inputs weigh what matters: {layer}");
    assert_eq!(found["report"]["blocks"].as_array().unwrap().len(), 3);
}

#[test]
fn precalibration_without_outliers_changes_no_byte_and_with_them_the_scales() {
    let (folder, model) = workplace();
    let grid = "bits = 3\nsymmetric = false\ngroup = 32\n";
    let round = format!("[[stage]]\nmethod = \"round-to-nearest\"\n{grid}");
    let ranges = |outliers: &str| format!("[[stage]]\nmethod = \"precalibrate\"\noutliers = {outliers}\n{grid}{round}");
    let weights = |name: &str, recipe: &str, more: &[&str]| {
        let (out, found) = compress(folder.path(), &model, name, recipe, &[&["--no-eval"], more].concat());
        (std::fs::read(out.join("model.safetensors")).unwrap(), found["report"]["layers"][0]["weight_error"].as_f64().unwrap())
    };
    let plain = weights("plain", &round, &[]);
    assert_eq!(plain.0, weights("whole", &ranges("0"), &[]).0);
    let clipped = weights("clipped", &ranges("0.05"), &[]);
    assert!(clipped.0 != plain.0 && clipped.1 < plain.1, "{} {}", clipped.1, plain.1);
    let split = "[[stage]]\nmethod = \"precalibrate\"\nstorage = \"adpq\"\n";
    assert!(weights("split", split, &["--format", "dense"]).1 > 0.0);
    std::fs::write(folder.path().join("recipe.toml"), format!("version = 1\n{split}")).unwrap();
    let recipe = folder.path().join("recipe.toml");
    let out = folder.path().join("refused");
    let refused = drawknife(&[
        "compress",
        &model,
        "-o",
        out.to_str().unwrap(),
        "--recipe",
        recipe.to_str().unwrap(),
        "--format",
        "compressed-tensors",
    ]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("use --format dense"), "{refused:?}");
}

#[test]
fn the_output_does_not_depend_on_threads_or_on_the_run() {
    let (folder, model) = workplace();
    let hash = |name: &str, threads: &str| {
        let recipe = "[calibration]\nsamples = 6\nseq = 96\n[[stage]]\nmethod = \"wanda\"\n[[stage]]\nmethod = \"round-to-nearest\"\n";
        let (out, _) = compress(folder.path(), &model, name, recipe, &["--threads", threads, "--eval-tokens", "1024"]);
        let mut files: Vec<PathBuf> = std::fs::read_dir(&out).unwrap().flatten().map(|entry| entry.path()).collect();
        files.sort();
        // It tells how long it took.
        files.retain(|path| !path.ends_with("timing.json"));
        files.iter().map(|path| (path.file_name().unwrap().to_owned(), std::fs::read(path).unwrap())).collect::<Vec<_>>()
    };
    let first = hash("a", "1");
    assert!(first.len() >= 5 && first == hash("b", "2") && first == hash("c", "4") && first == hash("d", "2"));
}

#[test]
fn tensors_and_files_that_are_not_understood_are_carried_over() {
    let (folder, model) = workplace();
    let path = Path::new(&model).join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let odd: Vec<u8> = (0..24).collect();
    let mut views: Vec<(String, safetensors::tensor::TensorView<'_>)> = tensors.tensors();
    views.push(("mtp.odd".into(), safetensors::tensor::TensorView::new(safetensors::Dtype::I16, vec![3, 4], &odd).unwrap()));
    let written = safetensors::serialize(views, None).unwrap();
    std::fs::write(&path, written).unwrap();
    std::fs::write(Path::new(&model).join("generation_config.json"), "{\"a\": 1}").unwrap();
    let (out, _) = compress(
        folder.path(),
        &model,
        "o",
        "[export]\nshard_size = \"300KB\"\n[[stage]]\nmethod = \"round-to-nearest\"\n",
        &["--no-eval", "--skip", "*.layers.1.*"],
    );
    let (before, after) = (Checkpoint::open(Path::new(&model)).unwrap(), Checkpoint::open(&out).unwrap());
    assert!(after.shards.len() > 1 && out.join("model.safetensors.index.json").exists());
    for name in ["mtp.odd", "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"] {
        assert_eq!(before.bytes(name).unwrap()[..], after.bytes(name).unwrap()[..], "{name}");
    }
    assert_eq!(std::fs::read(out.join("generation_config.json")).unwrap(), b"{\"a\": 1}");
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    assert!(config["quantization_config"]["ignore"].as_array().unwrap().contains(&"model.layers.1.mlp.up_proj".into()));
}

#[test]
fn an_unknown_architecture_is_quantized_without_data_and_not_calibrated() {
    let (folder, model) = workplace();
    let config = Path::new(&model).join("config.json");
    let text = std::fs::read_to_string(&config).unwrap().replace("\"llama\"", "\"novel\"");
    std::fs::write(&config, text).unwrap();
    let (out, found) = compress(folder.path(), &model, "o", "[[stage]]\nmethod = \"round-to-nearest\"\n", &[]);
    assert_eq!(found["report"]["layers"].as_array().unwrap().len(), 21);
    assert!(found["report"]["quality"].is_null() && found["report"]["notes"][0].as_str().unwrap().contains("unknown"));
    assert!(drawknife(&["inspect", out.to_str().unwrap()]).status.success());
    let refused = drawknife(&["compress", &model, "-o", folder.path().join("p").to_str().unwrap(), "--preset", "prune50"]);
    assert_eq!(refused.status.code(), Some(2));
    // A larger model that says too little of its decoder.
    std::fs::write(&config, "{\"model_type\": \"pictures\", \"text_config\": {\"model_type\": \"llama\"}}").unwrap();
    let (_, found) = compress(folder.path(), &model, "q", "[[stage]]\nmethod = \"round-to-nearest\"\n", &[]);
    assert_eq!(found["report"]["layers"].as_array().unwrap().len(), 21);
}

#[test]
fn a_reader_that_goes_away_does_not_stop_the_work() {
    let (folder, model) = workplace();
    let out = folder.path().join("o");
    let mut child = Command::new(env!("CARGO_BIN_EXE_drawknife"))
        .args(["compress", &model, "-o", out.to_str().unwrap(), "--gate", "kld_mean=0.0001"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(3), "the gate still decides");
    assert!(out.join("report.json").exists());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn a_packed_checkpoint_that_lost_a_tensor_is_refused() {
    let (folder, model) = workplace();
    let (out, _) = compress(folder.path(), &model, "o", "[[stage]]\nmethod = \"round-to-nearest\"\nsymmetric = false\n", &["--no-eval"]);
    let path = out.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for lost in ["weight_zero_point", "weight_scale", "weight_packed"] {
        let name = format!("model.layers.1.mlp.up_proj.{lost}");
        let kept = tensors.tensors().into_iter().filter(|(other, _)| *other != name);
        std::fs::write(&path, safetensors::serialize(kept, None).unwrap()).unwrap();
        let output = drawknife(&["eval", out.to_str().unwrap(), "--max-tokens", "512"]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && error.contains(&name) && error.contains("missing"), "{lost}: {error}");
    }
}

#[test]
fn a_stray_tensor_with_a_name_of_the_output_is_refused() {
    let (folder, model) = workplace();
    let path = Path::new(&model).join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let mut views = safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors();
    let data = [0u8; 4];
    let stray = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &data).unwrap();
    views.push(("model.layers.0.mlp.up_proj.weight_scale".into(), stray));
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let output = drawknife(&["compress", &model, "-o", folder.path().join("o").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn gates_and_recipes_with_nonsense_are_refused() {
    let (folder, model) = workplace();
    let refused = |recipe: &str, more: &[&str]| {
        let file = folder.path().join("r.toml");
        std::fs::write(&file, format!("version = 1\n{recipe}\n[[stage]]\nmethod = \"wanda\"\n")).unwrap();
        let out = folder.path().join("o");
        let fixed = ["compress", &model, "-o", out.to_str().unwrap(), "--recipe", file.to_str().unwrap()];
        let output = drawknife(&[&fixed, more].concat());
        assert_eq!(output.status.code(), Some(2), "{recipe} {more:?}");
    };
    refused("[gate]\nkld_mean = nan", &[]);
    refused("[gate]\nppl_ratio = -1.0", &[]);
    refused("", &["--gate", "kld_mean=inf"]);
    refused("[[override]]\nmatch = \"*\"\nbits = 99", &[]);
    refused("[[stage]]\nmethod = \"wanda\"\npattern = \"1:4\"\nsparsity = 0.5", &[]);
    refused("[[skip]]\nmatch = \"re:.*visual\"", &[]);
}

#[test]
fn gates_decide_the_exit_code() {
    let (folder, model) = workplace();
    let code = |name: &str, gate: &str, tokens: &str| {
        let out = folder.path().join(name);
        drawknife(&["compress", &model, "-o", out.to_str().unwrap(), "--gate", gate, "--eval-tokens", tokens, "-q"]).status.code()
    };
    assert_eq!(code("a", "kld_mean=0.5", "4096"), Some(0));
    assert_eq!(code("b", "kld_mean=0.001", "4096"), Some(3));
    assert_eq!(code("c", "ppl_ratio=1.5", "512"), Some(4), "one window has no spread");
}

#[test]
fn a_dry_run_writes_nothing_and_plans_the_exact_size() {
    let (folder, model) = workplace();
    let plan = json(&["plan", &model, "--preset", "w8"]);
    let out = folder.path().join("o");
    let dry = json(&["compress", &model, "-o", out.to_str().unwrap(), "--preset", "w8", "--dry-run"]);
    assert_eq!(plan["size"], dry["size"]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    json(&["compress", &model, "-o", out.to_str().unwrap(), "--preset", "w8", "--no-eval"]);
    let written = Checkpoint::open(&out).unwrap();
    let bytes: u64 = written.names().map(|name| written.info(name).unwrap().bytes()).sum();
    assert_eq!(plan["size"]["bytes_after"], bytes);
}

#[test]
fn calibration_takes_chats_and_reports_what_became_of_them() {
    let (folder, model) = workplace();
    let file = folder.path().join("chat.jsonl");
    let line = r#"{"messages":[{"role":"user","content":"How many legs has a spider, and why do people forget?"},{"role":"assistant","content":"Eight."}]}"#;
    std::fs::write(&file, format!("{line}\n{{\"text\":\"A plain document, long enough to make some tokens for a window.\"}}\n")).unwrap();
    let (_, found) = compress(
        folder.path(),
        &model,
        "o",
        "[[stage]]\nmethod = \"wanda\"\n",
        &["--calibration", file.to_str().unwrap(), "--seq", "32", "--no-eval"],
    );
    let counts = &found["report"]["calibration"];
    assert_eq!(
        (&counts["documents"], &counts["chats_by_template"], &counts["tokens_unused"]),
        (&2.into(), &1.into(), &0.into()),
        "{counts}"
    );
    assert!(counts["short_windows"].as_u64().unwrap() <= 1);
}

#[test]
fn refusals_are_one_line_exit_with_2_and_leave_nothing() {
    let (folder, model) = workplace();
    let out = folder.path().join("o").to_str().unwrap().to_string();
    let inside = format!("{model}/sub");
    let cases: &[&[&str]] = &[
        &["compress", "nowhere", "-o", &out],
        &["compress", &model],
        &["compress", &model, "-o", &model],
        &["compress", &model, "-o", &inside],
        &["compress", &model, "-o", &model, "--force"],
        &["compress", &model, "-o", &out, "--preset", "w5"],
        &["compress", &model, "-o", &out, "--device", "abacus"],
        &["compress", &model, "-o", &out, "--preset", "prune50", "--format", "compressed-tensors"],
        &["compress", &model, "-o", &out, "--skip", "model.visual.*"],
        &["compress", &model, "-o", &out, "--keep", "*=9"],
        &["compress", &model, "-o", &out, "--preset", "2:4", "--seq", "9999"],
        &["eval", &model, "--seq", "1"],
        &["eval", &model, "--bos", "twice"],
        &["frobnicate"],
    ];
    for arguments in cases {
        let started = std::time::Instant::now();
        let output = drawknife(arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(error.starts_with("error: ") && error.trim_end().lines().count() == 1, "{arguments:?}: {error}");
        assert!(started.elapsed().as_secs_f64() < 1.0, "{arguments:?}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn help_and_lists_stay_as_they_were_reviewed() {
    let text = |arguments: &[&str]| String::from_utf8(drawknife(arguments).stdout).unwrap();
    insta::assert_snapshot!("help", text(&["--help"]));
    insta::assert_snapshot!("help_compress", text(&["compress", "--help"]));
    insta::assert_snapshot!("help_eval", text(&["eval", "--help"]));
    for verb in ["compare", "check", "sensitivity"] {
        insta::assert_snapshot!(format!("help_{verb}"), text(&[verb, "--help"]));
    }
    insta::assert_snapshot!("presets", text(&["presets"]));
}
