//! Formats from the command line: GGUF of every family it is written for, several at once, engines, quantized sources.

use std::path::{Path, PathBuf};

use drawknife::checkpoint::Checkpoint;
use drawknife::compress::gguf::unpack::unpack;
use serde_json::{Value, json};

use crate::command::{compress, drawknife, json as run_json, linear, workplace};
use crate::golden::{expected, golden, logits};

const PRUNE: &str = "[[stage]]\nmethod = \"magnitude\"\nsparsity = 0.25\n";
const INTS: &str = "[[stage]]\nmethod = \"round-to-nearest\"\nbits = 4\ngroup = 32\n";

/// A copy of a golden model, in a spelling that GGUF files can hold, with a tokenizer of as many tokens as it has rows of embeddings.
pub fn with_tokenizer(case: &str, folder: &Path) -> PathBuf {
    let to = folder.join(case);
    std::fs::create_dir(&to).unwrap();
    std::fs::copy(golden(case).join("model.safetensors"), to.join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(golden(case).join("config.json")).unwrap()).unwrap();
    let map = config.as_object_mut().unwrap();
    if !case.starts_with("qwen3_5") {
        map.remove("layer_types");
    }
    map.insert("use_sliding_window".into(), json!(false));
    if case.starts_with("gemma") {
        let head = map["head_dim"].clone();
        map.insert("query_pre_attn_scalar".into(), head);
    }
    match case {
        "gemma3_text" => drop(map.insert("rope_parameters".into(), json!({"rope_theta": 1e6, "rope_type": "default"}))),
        "mixtral" => drop(map.insert("sliding_window".into(), Value::Null)),
        "llama3" => map["rope_parameters"]["original_max_position_embeddings"] = json!(8192),
        _ => {}
    }
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    let vocab: serde_json::Map<String, Value> = (0..40u8).map(|id| (char::from(b'A' + id).to_string(), json!(id))).collect();
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": level,
        "post_processor": null, "decoder": level, "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    std::fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    to
}

#[test]
fn a_gguf_file_of_every_family_computes_as_the_checkpoint_does() {
    let folder = tempfile::tempdir().unwrap();
    let dense = ["llama2", "llama3", "llama_linear", "qwen2_untied", "qwen3", "gemma2", "gemma3_text"];
    let more = ["phi3_short", "olmo2", "olmo3", "granite", "glm4", "cohere2", "mixtral", "qwen3_moe_stacked"];
    for case in dense.into_iter().chain(more) {
        let model = with_tokenizer(case, folder.path());
        let more = ["--format", "gguf,dense", "--no-eval"];
        let (out, _) = compress(folder.path(), model.to_str().unwrap(), &format!("{case}-out"), PRUNE, &more);
        let unpacked = folder.path().join(format!("{case}-unpacked"));
        std::fs::create_dir(&unpacked).unwrap();
        unpack(&out.join("gguf/model.gguf"), &unpacked).unwrap();
        let tokens = expected(case).0;
        let (exact, got) = (logits(&out.join("dense"), &tokens), logits(&unpacked, &tokens));
        let largest = exact.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let off = exact.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / largest;
        assert!(exact.len() == got.len() && off < 1e-5, "{case}: {off}");
    }
}

#[test]
fn one_compression_in_every_format_gives_the_same_integers() {
    let (folder, model) = workplace();
    let more = ["--format", "compressed-tensors,gptq,auto-round,gguf", "--eval-tokens", "512", "--eval-seq", "128"];
    let (out, report) = compress(folder.path(), &model, "all", INTS, &more);
    assert_eq!(report["report"]["format"], "compressed-tensors, gptq, auto-round, gguf");
    let unpacked = folder.path().join("unpacked");
    std::fs::create_dir(&unpacked).unwrap();
    unpack(&out.join("gguf/model.gguf"), &unpacked).unwrap();
    let shape = linear_shape(Path::new(&model), "model.layers.0.self_attn.q_proj");
    let read = |folder: &Path| linear(folder, "model.layers.0.self_attn.q_proj", shape);
    let first = read(&out.join("compressed-tensors"));
    for other in [out.join("gptq"), out.join("auto-round"), unpacked] {
        assert!(read(&other) == first, "{}", other.display());
    }
    let nll = report["report"]["quality"]["nll"].as_f64().unwrap();
    let again = run_json(&["eval", out.join("gguf").to_str().unwrap(), "--max-tokens", "512", "--seq", "128"]);
    assert!((again["nll"].as_f64().unwrap() - nll).abs() < 1e-6, "{again} {nll}");
    assert!(out.join("gptq/quantize_config.json").exists());
    for format in ["compressed-tensors", "gptq", "auto-round", "gguf"] {
        let card = std::fs::read_to_string(out.join(format).join("README.md")).unwrap();
        assert!(card.contains("round-to-nearest") && card.contains("vllm") && card.contains("perplexity"), "{card}");
    }
}

fn linear_shape(folder: &Path, name: &str) -> [usize; 2] {
    let checkpoint = Checkpoint::open(folder).unwrap();
    checkpoint.info(&format!("{name}.weight")).unwrap().shape.as_slice().try_into().unwrap()
}

#[test]
fn a_quantized_model_is_a_source_and_leaves_no_trace_of_its_packing() {
    let (folder, model) = workplace();
    let names = |folder: &Path| Checkpoint::open(folder).unwrap().names().map(str::to_owned).collect::<Vec<_>>();
    let original = names(Path::new(&model));
    for format in ["compressed-tensors", "gptq", "auto-round"] {
        let more = ["--format", format, "--no-eval"];
        let (packed, _) = compress(folder.path(), &model, format, INTS, &more);
        let more = ["--format", "dense", "--skip", "*.layers.0.*", "--eval-tokens", "512", "--eval-seq", "128"];
        let (out, report) = compress(folder.path(), packed.to_str().unwrap(), &format!("{format}-again"), PRUNE, &more);
        assert_eq!(names(&out), original, "{format}");
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        assert!(config.get("quantization_config").is_none() && !out.join("quantize_config.json").exists());
        assert!(report["report"]["notes"].to_string().contains("quantized already"), "{report}");
        // A layer that no stage works on comes out as the floats of its integers, rounded to the model's format.
        let shape = linear_shape(Path::new(&model), "model.layers.0.mlp.up_proj");
        let [before, after] = [&packed, &out].map(|folder| linear(folder, "model.layers.0.mlp.up_proj", shape));
        let apart = before.data.iter().zip(&after.data).filter(|(a, b)| (*a - *b).abs() > a.abs() / 128.0).count();
        assert_eq!(apart, 0, "{format}");
    }
}

#[test]
fn k_types_are_written_where_rows_are_whole_super_blocks_and_refused_by_other_formats() {
    let (folder, model) = workplace();
    let out = folder.path().join("k");
    let sizes = ["--samples", "2", "--seq", "64", "--eval-tokens", "512", "--eval-seq", "128"];
    let fixed = ["compress", &model, "-o", out.to_str().unwrap(), "--gguf-type", "q4_k"];
    let report = run_json(&[&fixed[..], &sizes].concat());
    assert_eq!(report["report"]["format"], "gguf");
    let layers = report["report"]["layers"].as_array().unwrap();
    for layer in layers {
        let columns = layer["shape"][1].as_u64().unwrap();
        let whole = columns.is_multiple_of(256);
        assert_eq!(layer["storage"], if whole { "q4_k" } else { "W4 g32 symmetric" }, "{layer}");
    }
    let file = folder.path().join("k.toml");
    std::fs::write(&file, "version = 1\n[[stage]]\nmethod = \"k-quant\"\ntype = \"q4_k\"\n").unwrap();
    let plan = |more: &[&str]| drawknife(&[&["plan", &model, "--recipe", file.to_str().unwrap()][..], more].concat());
    assert!(String::from_utf8_lossy(&plan(&["--skip", "*o_proj"]).stdout).contains("-> gguf"));
    if layers.iter().any(|layer| layer["storage"] == "q4_k") {
        assert_eq!(plan(&["--format", "compressed-tensors"]).status.code(), Some(2));
    }
    let wrong = drawknife(&["plan", &model, "--gguf-type", "q9_k"]);
    assert!(wrong.status.code() == Some(2) && String::from_utf8_lossy(&wrong.stderr).contains("q4_k"));
}

#[test]
fn engines_get_what_they_load_or_are_refused_before_the_work() {
    let (folder, model) = workplace();
    let asymmetric = "[[stage]]\nmethod = \"round-to-nearest\"\nbits = 3\nsymmetric = false\n";
    let file = folder.path().join("a.toml");
    std::fs::write(&file, format!("version = 1\n{asymmetric}")).unwrap();
    let plan = |engine: &str, more: &[&str]| {
        let fixed = ["plan", &model, "--recipe", file.to_str().unwrap(), "--for", engine];
        let output = drawknife(&[&fixed, more].concat());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert!(plan("vllm", &[]).2.contains("-> compressed-tensors"));
    assert!(plan("llama.cpp", &[]).2.contains("-> gguf"));
    let (code, error, _) = plan("sglang", &[]);
    assert!(code == Some(2) && error.contains("--format dense") && error.lines().count() == 1, "{error}");
    let (code, error, _) = plan("vllm", &["--skip", "*q_proj"]);
    assert!(code == Some(2) && error.contains("fuses q_proj, k_proj and v_proj"), "{error}");
    assert_eq!(plan("nobody", &[]).0, Some(2));
}

#[test]
fn packed_checkpoints_are_exported_where_the_other_format_holds_the_same_weights() {
    let (folder, model) = workplace();
    let name = "model.layers.0.mlp.down_proj";
    let shape = linear_shape(Path::new(&model), name);
    let run = |from: &Path, format: &str, to: &str| {
        let out = folder.path().join(to);
        let output = drawknife(&["export", from.to_str().unwrap(), "--format", format, "-o", out.to_str().unwrap()]);
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned(), out)
    };
    let trits = |tied: bool| format!("[[stage]]\nmethod = \"ptqtp\"\ntied = {tied}\ngroup = 32\n");
    let more = ["--format", "tritplane", "--samples", "2", "--seq", "64", "--no-eval"];
    for (title, recipe, formats) in [
        ("free", trits(false), &["dense"][..]),
        ("ints", INTS.to_owned(), &["dense", "compressed-tensors", "gptq", "gguf"][..]),
        ("split", "[[stage]]\nmethod = \"precalibrate\"\nbits = 4\nstorage = \"adpq\"\n".to_owned(), &["dense"][..]),
        ("pattern", "[[stage]]\nmethod = \"magnitude\"\npattern = \"2:4\"\n".to_owned(), &["dense", "gguf"][..]),
    ] {
        let (packed, _) = compress(folder.path(), &model, title, &recipe, &more);
        let exact = linear(&packed, name, shape);
        for format in formats {
            let (code, error, out) = run(&packed, format, &format!("{title}-{format}"));
            assert_eq!(code, Some(0), "{title} {format}: {error}");
            let got = if *format == "gguf" {
                let unpacked = folder.path().join(format!("{title}-unpacked"));
                std::fs::create_dir(&unpacked).unwrap();
                unpack(&out.join("model.gguf"), &unpacked).unwrap();
                linear(&unpacked, name, shape)
            } else {
                linear(&out, name, shape)
            };
            assert!(got == exact, "{title} {format}");
        }
    }
    let (code, error, out) = run(&folder.path().join("free"), "gguf", "refused");
    assert!(code == Some(2) && error.contains("dense") && error.lines().count() == 1 && !out.exists(), "{error}");
}

/// A file of letters that small vocabularies have.
pub fn letters(folder: &Path) -> String {
    let text = folder.join("letters.txt");
    let letter = |at: usize| char::from(b'A' + (at * 7919 + at * at % 31) as u8 % 26);
    std::fs::write(&text, (0..4000).map(letter).collect::<String>()).unwrap();
    text.to_str().unwrap().to_string()
}

/// Calibrated and measured on a file.
fn measured_on(text: &str) -> [&str; 12] {
    ["--calibration", text, "--samples", "24", "--seq", "64", "--eval-text", text, "--eval-tokens", "1024", "--eval-seq", "64"]
}

#[test]
fn mixtures_of_experts_are_quantized_without_data_and_measured() {
    let folder = tempfile::tempdir().unwrap();
    let text = letters(folder.path());
    let measure = ["--eval-text", text.as_str(), "--eval-tokens", "1024", "--eval-seq", "64"];
    for (case, layers) in [("qwen2_moe", 57), ("qwen3_moe", 51), ("mixtral", 32)] {
        let model = with_tokenizer(case, folder.path());
        let recipe = "[[stage]]\nmethod = \"round-to-nearest\"\nbits = 8\ngroup = 8\n";
        let (out, found) = compress(folder.path(), model.to_str().unwrap(), &format!("{case}-out"), recipe, &measure);
        let names: Vec<&str> = found["report"]["layers"].as_array().unwrap().iter().map(|layer| layer["name"].as_str().unwrap()).collect();
        assert_eq!(names.len(), layers, "{names:?}");
        assert!(names.iter().any(|name| name.contains(".experts.3.")) && !names.iter().any(|name| name.ends_with(".gate")), "{names:?}");
        let kld = found["report"]["quality"]["kld_mean"].as_f64().unwrap();
        assert!(kld > 0.0 && kld < 0.02, "{case}: {kld}");
        let checked = drawknife(&["check", out.to_str().unwrap(), "--reference", model.to_str().unwrap(), "--text", &text]);
        assert!(checked.status.success(), "{case}: {}", String::from_utf8_lossy(&checked.stdout));
    }
}

#[test]
fn experts_are_rounded_by_what_comes_to_them_and_learned_and_the_same_for_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let text = letters(folder.path());
    let measured = measured_on(&text);
    for case in ["qwen2_moe", "qwen3_moe_stacked", "mixtral", "deepseek_v3", "deepseek_v3_wide", "qwen3_next", "qwen3_5_moe_text"] {
        let model = with_tokenizer(case, folder.path());
        let run = |name: &str, method: &str, more: &[&str]| {
            let recipe = format!("[[stage]]\nmethod = {method}\nbits = 3\ngroup = 8\n");
            let more = [&measured[..], more].concat();
            let (out, found) = compress(folder.path(), model.to_str().unwrap(), &format!("{case}-{name}"), &recipe, &more);
            let divergence = found["report"]["quality"]["kld_mean"].as_f64().unwrap();
            (std::fs::read(out.join("model.safetensors")).unwrap(), divergence, found)
        };
        let (_, plain, _) = run("plain", "\"round-to-nearest\"", &[]);
        let (_, fed_back, _) = run("gptq", "\"gptq\"", &[]);
        let (closed, aimed, found) = run("closed", "\"closed-form\"", &[]);
        let signround = "\"signround\"\niters = 40\ninit = \"range\"";
        let (learned, descended, _) = run("learned", signround, &[]);
        assert!(fed_back.max(aimed).max(descended) < 0.95 * plain, "{case}: {plain} {fed_back} {aimed} {descended}");
        let layers = found["report"]["layers"].as_array().unwrap();
        let corrected = |layer: &&Value| layer["notes"].to_string().contains("target corrected by");
        assert_eq!(layers.iter().filter(corrected).count(), layers.len(), "{case}");
        assert!(layers.iter().all(|layer| layer["layer_error"].as_f64().is_some_and(|error| error > 0.0 && error < 0.5)), "{case}");
        assert!(closed == run("closed-again", "\"closed-form\"", &["--threads", "1"]).0, "{case}");
        assert!(learned == run("learned-again", signround, &["--threads", "1"]).0, "{case}");
    }
}

#[test]
fn experts_that_give_least_are_removed_and_the_rest_is_worked_on() {
    let folder = tempfile::tempdir().unwrap();
    let text = letters(folder.path());
    let measured = measured_on(&text);
    for (case, key, left) in [
        ("qwen2_moe", "num_experts", 4),
        ("qwen3_moe_stacked", "num_experts", 3),
        ("mixtral", "num_local_experts", 3),
        ("deepseek_v3", "n_routed_experts", 8),
        ("deepseek_v3_wide", "n_routed_experts", 3),
        ("qwen3_next", "num_experts", 4),
        ("gpt_oss", "num_local_experts", 3),
        ("gpt_oss_mxfp4", "num_local_experts", 2),
    ] {
        let model = with_tokenizer(case, folder.path());
        let run = |name: &str, recipe: &str, more: &[&str]| {
            let more = [&measured[..], more].concat();
            let (out, found) = compress(folder.path(), model.to_str().unwrap(), &format!("{case}-{name}"), recipe, &more);
            let divergence = found["report"]["quality"]["kld_mean"].as_f64().unwrap();
            (std::fs::read(out.join("model.safetensors")).unwrap(), divergence, found, out)
        };
        let reap = format!("[[stage]]\nmethod = \"reap\"\nexperts = {left}\n");
        let (bytes, divergence, found, out) = run("reap", &reap, &[]);
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        let key = if config[key].is_null() { "num_local_experts" } else { key };
        assert_eq!(config[key], left, "{case}");
        let original: Value = serde_json::from_slice(&std::fs::read(model.join("config.json")).unwrap()).unwrap();
        let fewer = original[key] != left;
        assert!(if fewer { divergence > 1e-3 } else { divergence < 1e-6 }, "{case}: {divergence}");
        let kept = found["report"]["blocks"].as_array().unwrap().iter().map(|block| block["experts_kept"].as_array().map_or(0, Vec::len));
        assert!(kept.into_iter().all(|kept| kept == left || kept == 0), "{case}");
        assert!(bytes == run("again", &reap, &["--threads", "1"]).0, "{case}");
        let checkpoint = Checkpoint::open(&out).unwrap();
        assert!(!checkpoint.names().any(|name| name.contains(&format!(".experts.{left}."))), "{case}");
        if case == "gpt_oss_mxfp4" {
            assert_eq!(config["quantization_config"]["quant_method"], "mxfp4");
            continue;
        }
        let both = format!("{reap}[[stage]]\nmethod = \"closed-form\"\nbits = 8\ngroup = 8\n");
        let (_, more, found, _) = run("both", &both, &[]);
        // Rounding that aims at the float model's output makes up for some of what went.
        assert!(more < 1.1 * divergence + 0.02, "{case}: {divergence} {more}");
        assert!(found["report"]["notes"].to_string().contains("calibration gave"), "{case}");
    }
    for (recipe, told) in [
        ("[[stage]]\nmethod = \"reap\"\nexperts = 1\n", "a token goes to 2; use 2 to 6"),
        ("[[stage]]\nmethod = \"wanda\"\n[[stage]]\nmethod = \"reap\"\n", "reap must be the first stage"),
    ] {
        let file = folder.path().join("refused.toml");
        std::fs::write(&file, format!("version = 1\n{recipe}")).unwrap();
        let model = folder.path().join("qwen2_moe");
        let out = folder.path().join("refused");
        let args = ["compress", model.to_str().unwrap(), "-o", out.to_str().unwrap(), "--recipe", file.to_str().unwrap()];
        let output = drawknife(&args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && error.contains(told) && error.lines().count() == 1 && !out.exists(), "{error}");
    }
}

#[test]
fn experts_are_pruned_by_the_tokens_that_come_to_them_and_those_that_see_none_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let windows = folder.path().join("windows.jsonl");
    let token = |at: usize| (at * 7919 + at * at % 31) % 40;
    let window = |number: usize| json!({"input_ids": (0..48).map(|at| token(48 * number + at)).collect::<Vec<_>>()}).to_string();
    std::fs::write(&windows, (0..6).map(|number| window(number) + "\n").collect::<String>()).unwrap();
    let few = ["--calibration", windows.to_str().unwrap(), "--no-eval"];
    for case in ["qwen2_moe", "mixtral"] {
        let model = with_tokenizer(case, folder.path());
        let run = |name: &str, method: &str, more: &[&str]| {
            let recipe = format!("[[stage]]\nmethod = \"{method}\"\nsparsity = 0.5\n");
            compress(folder.path(), model.to_str().unwrap(), &format!("{case}-{name}"), &recipe, more)
        };
        let (pruned, found) = run("wanda", "wanda", &few);
        let (by_size, _) = run("magnitude", "magnitude", &["--no-eval"]);
        let (again, _) = run("again", "wanda", &[&few[..], &["--threads", "1"]].concat());
        let bytes = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
        assert!(bytes(&pruned) == bytes(&again) && bytes(&pruned) != bytes(&by_size), "{case}");
        let layers = found["report"]["layers"].as_array().unwrap();
        assert!(layers.iter().all(|layer| (layer["zeros"].as_f64().unwrap() - 0.5).abs() < 0.01), "{case}");
        // Eight tokens for four or six experts: some see nothing, and each of those says so.
        std::fs::write(folder.path().join("short.jsonl"), "{\"input_ids\":[1,2,3,4,5,6,7,8]}\n").unwrap();
        let short = folder.path().join("short.jsonl");
        let (_, found) = run("short", "wanda", &["--calibration", short.to_str().unwrap(), "--no-eval"]);
        let block = &found["report"]["blocks"][0];
        let chosen = [4, 6][usize::from(case == "qwen2_moe")];
        assert_eq!(block["experts"].as_array().unwrap().len(), chosen);
        assert_eq!(block["experts"].as_array().unwrap().iter().map(|tokens| tokens.as_u64().unwrap()).sum::<u64>(), 2 * 8);
        assert!(found["report"]["notes"].to_string().contains("saw fewer than 16"), "{}", found["report"]["notes"]);
        let (everywhere, told) = run("everywhere", "wanda", &[&few[..], &["--all-experts"]].concat());
        assert!(!told["report"]["layers"].to_string().contains("came to this expert") && bytes(&everywhere) != bytes(&pruned), "{case}");
        let notes = found["report"]["layers"].to_string();
        assert!(
            notes.contains("0 calibration tokens came to this expert") || notes.contains("1 calibration tokens came to this expert"),
            "{notes}"
        );
    }
}

#[test]
fn a_gguf_file_that_would_compute_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = [
        ("olmo2", json!({"hidden_act": "gelu_pytorch_tanh"}), "the activation Silu in olmo2"),
        ("qwen3_moe_stacked", json!({"norm_topk_prob": false}), "add up to one"),
        ("qwen3_moe", json!({}), "experts in every layer of qwen3moe"),
        ("qwen2_moe", json!({}), "experts in every layer of qwen2moe"),
        (
            "olmo3",
            json!({"sliding_window": null, "layer_types": ["full_attention", "full_attention", "full_attention", "full_attention"]}),
            "windows in some layers of olmo3",
        ),
        ("smollm3", json!({}), "all but every 4th layer"),
        ("qwen3", json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}}), "a part of them"),
        ("olmoe", json!({}), "as many keys as queries"),
        ("deepseek_v3", json!({}), "gguf is written for llama, "),
    ];
    for (case, changes, what) in refused {
        let model = with_tokenizer(case, folder.path());
        let path = model.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        changes.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        std::fs::write(&path, config.to_string()).unwrap();
        let plan = drawknife(&["plan", model.to_str().unwrap(), "--preset", "w4-fast", "--format", "gguf", "--no-eval"]);
        let error = String::from_utf8_lossy(&plan.stderr).into_owned();
        assert!(plan.status.code() == Some(2) && error.contains(what), "{case}: {error}");
        std::fs::remove_dir_all(&model).unwrap();
    }
}
