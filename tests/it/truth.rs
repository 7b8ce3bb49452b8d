//! What the program says about quality: comparisons, checks, sensitivities, targets and reports, as a user and a build server
//! get them.

use std::path::{Path, PathBuf};

use drawknife::statistics::rank_correlation;
use serde_json::{Value, json};

use crate::command::{compress, drawknife, json as run_json, workplace};

/// Where a value does not follow a schema, as far as this program's schemas go: types, properties, items, references, `anyOf`,
/// `oneOf`, `enum`, `const` and bounds.
fn violations(value: &Value, schema: &Value, root: &Value, place: &str, found: &mut Vec<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        let target = root.pointer(reference.trim_start_matches('#')).unwrap_or_else(|| panic!("{reference}"));
        return violations(value, target, root, place, found);
    }
    for key in ["anyOf", "oneOf"] {
        let Some(options) = schema[key].as_array() else { continue };
        let fits = |option: &&Value| {
            let mut inner = Vec::new();
            violations(value, option, root, place, &mut inner);
            inner.is_empty()
        };
        let count = options.iter().filter(fits).count();
        if count == 0 || (key == "oneOf" && count > 1) {
            found.push(format!("{place}: {count} of {key} fit {value}"));
        }
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::String(one) => vec![one],
        Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let is = |kind: &&str| match *kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("type {other}"),
    };
    if !types.is_empty() && !types.iter().any(is) {
        found.push(format!("{place}: {value} is no {types:?}"));
    }
    let one_of = schema["enum"].as_array().is_none_or(|list| list.contains(value));
    let same = schema.get("const").is_none_or(|constant| constant == value);
    let bounded = schema["minimum"].as_f64().is_none_or(|least| value.as_f64().is_none_or(|value| value >= least));
    if !one_of || !same || !bounded {
        found.push(format!("{place}: {value} is out of its range"));
    }
    if let Some(object) = value.as_object() {
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !object.contains_key(name) {
                found.push(format!("{place}: {name} is missing"));
            }
        }
        for (name, value) in object {
            match (&schema["properties"][name], &schema["additionalProperties"]) {
                (Value::Null, Value::Bool(false)) => found.push(format!("{place}: {name} is not known")),
                (Value::Null, Value::Null | Value::Bool(true)) => {}
                (Value::Null, others) => violations(value, others, root, &format!("{place}.{name}"), found),
                (own, _) => violations(value, own, root, &format!("{place}.{name}"), found),
            }
        }
    }
    if let Some(items) = value.as_array() {
        for (number, item) in items.iter().enumerate() {
            let own = schema["prefixItems"].get(number).or(schema.get("items"));
            own.into_iter().for_each(|own| violations(item, own, root, &format!("{place}[{number}]"), found));
        }
    }
}

/// Holds a value against the schema that the program prints for it.
fn follows(value: &Value, name: &str) {
    let schema: Value = serde_json::from_slice(&drawknife(&["schema", name]).stdout).unwrap();
    let mut found = Vec::new();
    violations(value, &schema, &schema, name, &mut found);
    assert!(found.is_empty(), "{}", found.join("\n"));
    let properties = schema["properties"].as_object().unwrap();
    assert!(value.as_object().unwrap().keys().all(|key| properties.contains_key(key)), "{name}");
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn round_to_nearest(bits: u8) -> String {
    format!("[[stage]]\nmethod = \"round-to-nearest\"\nbits = {bits}\ngroup = 64\n")
}

/// The built-in model with 4 and with 3 bits.
fn compressed() -> (tempfile::TempDir, String, [PathBuf; 2]) {
    let (folder, model) = workplace();
    let made = [4, 3].map(|bits| compress(folder.path(), &model, &format!("w{bits}"), &round_to_nearest(bits), &["--no-eval"]).0);
    (folder, model, made)
}

#[test]
fn schemas_accept_what_follows_them_and_nothing_else() {
    let schema = json!({"type": "object", "required": ["a"], "additionalProperties": false,
        "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
        "$defs": {"n": {"type": "integer", "minimum": 0}}});
    let count = |value: Value| {
        let mut found = Vec::new();
        violations(&value, &schema, &schema, "", &mut found);
        found.len()
    };
    assert_eq!(count(json!({"a": 1, "b": null})), 0);
    for wrong in [json!({}), json!({"a": -1}), json!({"a": 1.5}), json!({"a": 1, "b": 2}), json!({"a": 1, "c": 2}), json!([])] {
        assert!(count(wrong.clone()) > 0, "{wrong}");
    }
}

#[test]
fn models_are_compared_on_the_same_tokens() {
    let (_folder, model, [four, three]) = compressed();
    let (four, three) = (four.to_str().unwrap(), three.to_str().unwrap());
    let found = run_json(&["compare", &model, four, three, &model, "--seq", "64", "--max-tokens", "1024", "--layers"]);
    follows(&found, "compare");
    let rows = found["models"].as_array().unwrap();
    let kld = |row: usize| rows[row]["quality"]["kld_mean"].as_f64();
    assert!(kld(0).is_none() && kld(1) < kld(2) && kld(3) < Some(1e-6));
    let alone = run_json(&["eval", three, "--reference", &model, "--seq", "64", "--max-tokens", "1024"]);
    assert_eq!(rows[2]["quality"]["kld_mean"], alone["kld_mean"]);
    let interval = &rows[2]["intervals"]["kld_mean"];
    assert!(interval["low"].as_f64() < kld(2) && kld(2) < interval["high"].as_f64());
    assert_eq!(rows[0]["blake3"], rows[3]["blake3"]);
    assert!(rows[1]["layers"].as_object().unwrap().values().all(|error| error.as_f64().unwrap() > 0.0));
    assert_eq!((rows[1]["pareto"].as_bool(), rows[3]["layers"].as_object().unwrap().len()), (Some(true), 21));
    let table = String::from_utf8(drawknife(&["compare", &model, three, "--seq", "64", "--max-tokens", "1024"]).stdout).unwrap();
    assert!(table.lines().all(|line| line.chars().count() <= 100), "{table}");
}

#[test]
fn a_check_passes_what_is_as_it_was_fails_what_is_worse_and_says_when_it_cannot_tell() {
    let (folder, model, [four, three]) = compressed();
    let (four, three) = (four.to_str().unwrap(), three.to_str().unwrap());
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (baseline, junit, kept) = (at("baseline.json"), at("check.xml"), at("reference.safetensors"));
    let measured = ["--reference", &model, "--seq", "64", "--max-tokens", "2048"];
    let check = |checked: &str, more: &[&str]| drawknife(&[&["check", checked], &measured[..], more].concat());
    assert_eq!(check(four, &["--baseline", &baseline]).status.code(), Some(2), "no baseline yet");
    assert!(check(four, &["--baseline", &baseline, "--update-baseline", "--save-reference", &kept]).status.success());
    follows(&read(Path::new(&baseline)), "baseline");
    let same = check(four, &["--baseline", &baseline, "--json", "--junit", &junit]);
    let found: Value = serde_json::from_slice(&same.stdout).unwrap();
    follows(&found, "check");
    assert_eq!((same.status.code(), found["verdict"].as_str()), (Some(0), Some("pass")));
    let report = quick_junit::Report::deserialize_from_str(&std::fs::read_to_string(&junit).unwrap()).unwrap();
    assert_eq!((report.failures, report.errors, report.test_suites.len()), (0, 0, 2));
    let worse = check(three, &["--baseline", &baseline, "--format", "github", "--junit", &junit]);
    assert_eq!(worse.status.code(), Some(3));
    let report = quick_junit::Report::deserialize_from_str(&std::fs::read_to_string(&junit).unwrap()).unwrap();
    assert!(report.failures >= 2 && report.errors == 0);
    let command = regex::Regex::new(r"^::(error|warning|notice) title=[^:,\n]+::[^\n]+$").unwrap();
    let lines = String::from_utf8(worse.stdout).unwrap();
    assert!(lines.lines().count() > 2 && lines.lines().all(|line| command.is_match(line)), "{lines}");
    // A run of 20 tokens never passes, also where nothing changed.
    let few = ["check", four, "--reference", &model, "--seq", "64", "--max-tokens", "20", "--baseline", &baseline, "--json"];
    let few = drawknife(&few);
    let found: Value = serde_json::from_slice(&few.stdout).unwrap();
    follows(&found, "check");
    assert_eq!((few.status.code(), found["verdict"].as_str()), (Some(4), Some("inconclusive")));
    assert!(found["gates"][0]["more_tokens"].as_u64() >= Some(7 * 64));
    let other = drawknife(&["check", four, "--reference", &model, "--seq", "32", "--max-tokens", "2048", "--baseline", &baseline]);
    assert!(other.status.code() == Some(2) && String::from_utf8_lossy(&other.stderr).contains("--seq was 64, is 32"));
    // What was kept of the reference stands for it, and says that it is a bound.
    let full = run_json(&[&["check", three], &measured[..]].concat());
    let bound = run_json(&["check", three, "--reference", &kept, "--seq", "64", "--max-tokens", "2048"]);
    let kld = |found: &Value| found["quality"]["kld_mean"].as_f64().unwrap();
    assert!(kld(&bound) <= kld(&full) && kld(&bound) > 0.3 * kld(&full), "{} {}", kld(&bound), kld(&full));
    assert_eq!(bound["quality"]["kld_is_lower_bound"], true);
    assert!((bound["quality"]["reference_nll"].as_f64().unwrap() - full["quality"]["reference_nll"].as_f64().unwrap()).abs() < 1e-5);
}

#[test]
fn a_model_with_another_tokenizer_is_not_measured_on_its_own_tokens() {
    let (folder, model, [four, _]) = compressed();
    let path = four.join("tokenizer.json");
    let mut tokenizer = read(&path);
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    for id in vocabulary.values_mut() {
        let number = id.as_u64().unwrap();
        if (100..=400).contains(&number) {
            *id = json!(500 - number);
        }
    }
    std::fs::write(&path, serde_json::to_vec(&tokenizer).unwrap()).unwrap();
    // Whoever changes a file and knows it removes the hashes of what it was.
    std::fs::remove_file(four.join("manifest.json")).unwrap();
    let four = four.to_str().unwrap();
    let measured = ["--reference", &model, "--seq", "64", "--max-tokens", "2048"];
    for command in [&["check", four][..], &["eval", four]] {
        let output = drawknife(&[command, &measured[..]].concat());
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && message.contains("tokenizer cuts the text"), "{command:?} {message}");
    }
    // Neither few tokens nor a baseline without its divergences pass.
    let few = ["check", &model, "--reference", &model, "--seq", "2", "--max-tokens", "16", "--max", "top1>=0.9,kld_p99<=0.1"];
    assert_eq!(drawknife(&few).status.code(), Some(4));
    let baseline = folder.path().join("baseline.json");
    let at = baseline.to_str().unwrap();
    let check = |more: &[&str]| drawknife(&[&["check", &model], &measured[..], &["--baseline", at], more].concat()).status.code();
    assert_eq!(check(&["--update-baseline"]), Some(0));
    let mut edited = read(&baseline);
    edited["per_window"]["kld"] = json!([]);
    std::fs::write(&baseline, serde_json::to_vec(&edited).unwrap()).unwrap();
    assert_eq!((check(&[]), check(&["--update-baseline"]), check(&[])), (Some(2), Some(0), Some(0)));
}

#[test]
fn limits_decide_the_exit_code_and_a_budget_stops_early() {
    let (_folder, model, [four, _]) = compressed();
    let four = four.to_str().unwrap();
    let check = |limits: &str, more: &[&str]| {
        let fixed = ["check", four, "--reference", &model, "--seq", "64", "--max-tokens", "2048", "--max", limits];
        drawknife(&[&fixed, more].concat()).status.code()
    };
    assert_eq!(check("kld_mean<=5,ppl_ratio<=3,top1>=0.1,size<=5MB,bits<=5", &[]), Some(0));
    assert_eq!(check("kld_mean<=5,size<=5kB", &[]), Some(3));
    assert_eq!(check("kld_mean<=0.0001", &[]), Some(3));
    assert_eq!(check("speed<=1", &[]), Some(2));
    let budget = ["check", four, "--reference", &model, "--seq", "64", "--max", "kld_mean<=5", "--budget", "1m"];
    let found = run_json(&budget);
    assert_eq!((found["verdict"].as_str(), found["quality"]["windows"].as_u64()), (Some("pass"), Some(8)));
    let alone = drawknife(&["check", four, "--max", "kld_mean<=1"]);
    assert!(alone.status.code() == Some(2) && String::from_utf8_lossy(&alone.stderr).contains("--reference"));
}

#[test]
fn what_is_not_whole_is_broken_whatever_else_holds() {
    let (folder, _, [four, _]) = compressed();
    let junit = folder.path().join("check.xml");
    let path = four.join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    // The last value of the last tensor becomes infinite or, where it is a code, another one.
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut damaged = whole.clone();
    let text = String::from_utf8(whole[8..header].to_vec()).unwrap();
    let object: Value = serde_json::from_str(text.trim_end()).unwrap();
    let scale = object.as_object().unwrap().iter().find(|(name, _)| name.ends_with("weight_scale")).unwrap();
    let begin = header + scale.1["data_offsets"][0].as_u64().unwrap() as usize;
    damaged[begin..begin + 2].copy_from_slice(&[0x80, 0x7f]);
    for (bytes, part) in [(damaged, "weights"), (whole[..whole.len() - 7].to_vec(), "files")] {
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, bytes).unwrap();
        let output = drawknife(&["check", four.to_str().unwrap(), "--json", "--junit", junit.to_str().unwrap()]);
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        follows(&found, "check");
        assert_eq!((output.status.code(), found["verdict"].as_str()), (Some(5), Some("broken")), "{part}");
        let broken = found["structure"].as_array().unwrap().iter().filter(|finding| finding["ok"] == false);
        let broken: Vec<&str> = broken.filter_map(|finding| finding["name"].as_str()).collect();
        // A flipped value is found twice: by itself, and by the hashes of the manifest.
        assert!(broken.contains(&part) && (part == "files" || broken.contains(&"hashes")), "{broken:?}");
        let report = quick_junit::Report::deserialize_from_str(&std::fs::read_to_string(&junit).unwrap()).unwrap();
        assert!(report.failures >= 1 && report.errors == 0);
    }
    assert_eq!(drawknife(&["check", "./nothing-is-here"]).status.code(), Some(2));
}

#[test]
fn a_sensitivity_goes_on_where_it_was_stopped_and_ranks_layers_as_the_exact_one_does() {
    let (folder, model) = workplace();
    let (path, again) = (folder.path().join("sensitivity.json"), folder.path().join("again.json"));
    let measure = |path: &Path, more: &[&str]| {
        let fixed = ["sensitivity", &model, "-o", path.to_str().unwrap(), "--schemes", "w2,w4,s50,trit", "--samples", "4", "--seq", "64"];
        drawknife(&[&fixed, more].concat())
    };
    assert!(measure(&path, &[]).status.success());
    let found = read(&path);
    follows(&found, "sensitivity");
    assert_eq!((found["layers"].as_array().unwrap().len(), found["complete"].as_bool()), (21, Some(true)));
    let candidates: Vec<&Value> =
        found["layers"].as_array().unwrap().iter().flat_map(|layer| layer["candidates"].as_array().unwrap()).collect();
    let column = |name: &str| candidates.iter().map(|candidate| candidate[name].as_f64().unwrap()).collect::<Vec<f64>>();
    for name in ["gradient", "predicted_kld"] {
        let correlation = rank_correlation(&column(name), &column("kld"));
        assert!(correlation > 0.8, "{name} {correlation}");
        assert!((found["rank_correlation"][name].as_f64().unwrap() - correlation).abs() < 1e-12);
    }
    let ratio = column("predicted_kld").iter().sum::<f64>() / column("kld").iter().sum::<f64>();
    assert!((0.4..2.5).contains(&ratio), "predictions are in nats: {ratio}");
    // As if it had been stopped after the last block, which is measured first.
    let mut part = found.clone();
    part["complete"] = json!(false);
    part["rank_correlation"] = Value::Null;
    part["layers"] = found["layers"].as_array().unwrap().iter().filter(|layer| layer["block"] == 2).cloned().collect();
    std::fs::write(&again, serde_json::to_vec(&part).unwrap()).unwrap();
    assert!(measure(&again, &[]).status.success());
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&again).unwrap());
    // Layers that no scheme takes are known after a quick measurement, and stand once after a whole one.
    let some = folder.path().join("some.json");
    for more in [&["--quick"][..], &[]] {
        let fixed = ["sensitivity", &model, "-o", some.to_str().unwrap(), "--schemes", "3:7", "--samples", "2", "--seq", "32"];
        assert!(drawknife(&[&fixed, more].concat()).status.success());
        assert_eq!(read(&some)["layers"].as_array().unwrap().len(), 21);
    }
    let other = measure(&again, &["--seed", "1", "--method", "gptq"]);
    assert!(other.status.code() == Some(2) && String::from_utf8_lossy(&other.stderr).contains("another model, text or scheme"));
    assert_eq!(measure(&folder.path().join("x.json"), &["--method", "magic"]).status.code(), Some(2));
}

#[test]
fn a_target_is_met_keeps_fused_layers_together_and_lies_between_uniform_widths() {
    let (folder, model) = workplace();
    let file = folder.path().join("sensitivity.json");
    let file = file.to_str().unwrap();
    assert!(drawknife(&["sensitivity", &model, "-o", file, "--quick", "--schemes", "w2,w3,w4,w8,s30,s40,s50,s60"]).status.success());
    let measured = ["--eval-seq", "256", "--eval-tokens", "4096"];
    let target = [&measured[..], &["--target-bpw", "3.5", "--sensitivity", file]].concat();
    let (out, mixed) = compress(folder.path(), &model, "mixed", &round_to_nearest(4), &target);
    let uniform = [3, 4].map(|bits| compress(folder.path(), &model, &format!("w{bits}"), &round_to_nearest(bits), &measured).1);
    let kld = |run: &Value| run["report"]["quality"]["kld_mean"].as_f64().unwrap();
    assert!(kld(&uniform[1]) < kld(&mixed) && kld(&mixed) < kld(&uniform[0]), "{} {} {}", kld(&uniform[1]), kld(&mixed), kld(&uniform[0]));
    let bits = mixed["report"]["size"]["bits_per_weight"].as_f64().unwrap();
    assert!(bits <= 3.5 && bits > 3.4, "{bits}");
    for layers in mixed["report"]["layers"].as_array().unwrap().chunks(7) {
        let storage = |at: usize| layers[at]["storage"].as_str().unwrap();
        assert!(storage(0) == storage(1) && storage(1) == storage(2) && storage(4) == storage(5));
    }
    let report = read(&out.join("report.json"));
    follows(&report, "report");
    let (view, quality) = (&report["tokens"], &report["quality"]);
    let count = |key: &str| view[key].as_array().unwrap().iter().map(|bin| bin["tokens"].as_u64().unwrap()).sum::<u64>();
    assert_eq!([count("histogram"), count("by_confidence")], [quality["tokens"].as_u64().unwrap(); 2]);
    let worst = view["worst"].as_array().unwrap();
    assert!(worst.len() == 10 && worst[0]["divergence"] == quality["kld_max"]);
    let likeliest = worst[0]["original"].as_array().unwrap();
    assert!(likeliest.len() == 5 && likeliest.windows(2).all(|pair| pair[0][1].as_f64() >= pair[1][1].as_f64()));
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.matches("<svg").count() >= 5 && page.len() < 1 << 20);
    assert!(!page.contains("http://") && !page.contains("https://") && page.contains("default-src 'none'"));
    follows(&read(&out.join("timing.json")), "timing");
    follows(&read(&out.join("manifest.json")), "manifest");
    follows(&read(&out.join("sensitivity.json")), "sensitivity");
    // Made again it holds times too; without them it is the same page.
    let timing = std::fs::read(out.join("timing.json")).unwrap();
    std::fs::remove_file(out.join("report.html")).unwrap();
    assert!(drawknife(&["report", out.to_str().unwrap()]).status.success());
    assert!(std::fs::read_to_string(out.join("report.html")).unwrap().contains("peak memory"));
    std::fs::remove_file(out.join("timing.json")).unwrap();
    assert!(drawknife(&["report", out.to_str().unwrap()]).status.success());
    assert_eq!(std::fs::read_to_string(out.join("report.html")).unwrap(), page);
    std::fs::write(out.join("timing.json"), timing).unwrap();
    // llama.cpp fuses nothing, a size counts everything, and zeros are spread by block.
    let plan = |more: &[&str]| drawknife(&[&["plan", &model, "--no-eval", "--sensitivity", file, "--json"], more].concat());
    let sized: Value = serde_json::from_slice(&plan(&["--target-size", "420kB"]).stdout).unwrap();
    assert!(sized["size"]["bytes_after"].as_u64().unwrap() <= 420_000);
    let zeros: Value = serde_json::from_slice(&plan(&["--preset", "prune50", "--target-sparsity", "0.45"]).stdout).unwrap();
    let shares = zeros["recipe"]["override"].as_array().unwrap();
    assert!(shares.len() == 21 && shares.chunks(7).all(|block| block.iter().all(|one| one["sparsity"] == block[0]["sparsity"])));
    let low = plan(&["--target-bpw", "1.5"]);
    let message = String::from_utf8_lossy(&low.stderr).into_owned();
    assert!(low.status.code() == Some(2) && message.contains("out of reach") && message.contains("2."), "{message}");
    assert_eq!(plan(&["--target-bpw", "3.5", "--target-size", "1MB"]).status.code(), Some(2));
    assert_eq!(plan(&["--preset", "trit", "--target-bpw", "3.5"]).status.code(), Some(2));
}

#[test]
fn a_plan_writes_a_recipe_without_patterns_that_does_the_same() {
    let (folder, model) = workplace();
    let recipe = folder.path().join("resolved.toml");
    let chosen = ["--preset", "w4-fast", "--keep", "*.down_proj=8", "--skip", "*layers.0.*", "--no-eval"];
    let plan = run_json(&[&["plan", &model, "-o", recipe.to_str().unwrap()], &chosen[..]].concat());
    let text = std::fs::read_to_string(&recipe).unwrap();
    assert!(!text.contains('*') && text.contains("model.layers.0.self_attn.q_proj"), "{text}");
    assert!(plan["seconds"].as_f64().unwrap() > 0.0 && plan["memory_bytes"].as_u64().unwrap() > 1 << 20);
    let again = run_json(&["plan", &model, "--recipe", recipe.to_str().unwrap(), "--no-eval"]);
    assert_eq!(plan["layers"], again["layers"]);
    assert_eq!(plan["size"], again["size"]);
}

#[test]
fn the_built_in_model_is_as_good_as_the_accepted_measurement() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("w4");
    let out = out.to_str().unwrap();
    assert!(drawknife(&["compress", "builtin:model", "-o", out, "--preset", "w4-fast", "--no-eval"]).status.success());
    let baseline = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/quality-baseline.json");
    let checked = drawknife(&["check", out, "--reference", "builtin:model", "--baseline", baseline]);
    assert!(checked.status.success(), "{}{}", String::from_utf8_lossy(&checked.stdout), String::from_utf8_lossy(&checked.stderr));
}
