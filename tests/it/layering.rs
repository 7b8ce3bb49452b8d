//! The layers of the architecture (src/lib.rs): which module may use which, and what may stand only in one place.

use std::path::Path;

/// Modules in the order of the architecture, each with the modules that it may use.
const LAYERS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("lanes", &[]),
    ("matrix", &[]),
    ("memory", &[]),
    ("weight", &["matrix"]),
    ("checkpoint", &["error", "lanes", "matrix", "weight"]),
    ("device", &["error"]),
    ("run", &["device", "error"]),
    ("storage", &["error"]),
    ("kernels", &["device", "error", "lanes", "matrix", "weight"]),
    ("model", &["checkpoint", "device", "error", "kernels", "matrix", "run", "weight"]),
    ("calibrate", &["checkpoint", "error"]),
    ("methods", &["device", "error", "kernels", "matrix", "model", "run", "weight"]),
    ("formats", &["checkpoint", "error", "lanes", "matrix", "storage", "weight"]),
    ("plan", &["calibrate", "checkpoint", "error", "methods", "model", "weight"]),
    ("evaluate", &["calibrate", "error", "kernels", "model", "run", "statistics"]),
    ("gate", &["error", "evaluate", "plan", "statistics"]),
    ("report", &["calibrate", "error", "evaluate", "gate", "model", "plan", "statistics"]),
    (
        "compress",
        &[
            "calibrate",
            "checkpoint",
            "device",
            "embedded",
            "error",
            "evaluate",
            "formats",
            "gate",
            "hub",
            "kernels",
            "matrix",
            "memory",
            "methods",
            "model",
            "plan",
            "report",
            "run",
            "statistics",
            "storage",
            "weight",
        ],
    ),
    ("embedded", &["error"]),
    ("hub", &["checkpoint", "error", "run"]),
    ("statistics", &["kernels"]),
    ("subject", &["calibrate", "checkpoint", "compress", "embedded", "error", "evaluate", "formats", "hub", "memory", "model"]),
    ("compare", &["error", "evaluate", "kernels", "methods", "run", "statistics", "subject"]),
    (
        "check",
        &[
            "checkpoint",
            "compress",
            "error",
            "evaluate",
            "formats",
            "gate",
            "kernels",
            "model",
            "run",
            "statistics",
            "storage",
            "subject",
            "weight",
        ],
    ),
    (
        "sensitivity",
        &[
            "calibrate",
            "checkpoint",
            "device",
            "error",
            "evaluate",
            "formats",
            "matrix",
            "memory",
            "methods",
            "model",
            "plan",
            "report",
            "run",
            "statistics",
            "storage",
            "subject",
            "weight",
        ],
    ),
    ("untrusted", &["calibrate", "checkpoint", "compress", "formats", "model", "plan"]),
    ("allocation", &["compress", "error", "formats", "plan", "report", "run", "sensitivity", "subject", "weight"]),
];

/// Modules that may use tensors.
const TENSORS: &[&str] = &["device", "kernels", "model", "evaluate"];

/// Modules of the crate that code names, in groups too: `crate::{a::B, c}` names a and c.
fn used_modules(code: &str) -> Vec<String> {
    let word = |text: &str| text.trim_start().split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("").to_string();
    let group = |rest: &str| -> Vec<String> {
        let (mut depth, mut start, mut found) = (0, 1, Vec::new());
        for (at, c) in rest.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if (depth == 1 && c == ',') || depth == 0 {
                found.push(word(&rest[start.min(at)..]));
                start = at + 1;
            }
            if depth == 0 {
                break;
            }
        }
        found
    };
    code.split("crate::").skip(1).flat_map(|rest| if rest.starts_with('{') { group(rest) } else { vec![word(rest)] }).collect()
}

/// What is wrong with a source file of the library, given its path below `src/`.
fn violations(path: &str, text: &str) -> Vec<String> {
    let module = path.split(['/', '.']).next().unwrap_or("");
    let code: String = text
        .lines()
        .take_while(|line| !line.contains("#[cfg(test)]"))
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    let mut found = Vec::new();
    if let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == module) {
        for used in used_modules(&code) {
            let known = LAYERS.iter().any(|(name, _)| *name == used) || used == "cli";
            if known && used != module && !allowed.contains(&used.as_str()) {
                found.push(format!("{path}: {module} may not use {used}"));
            }
        }
        for forbidden in ["println!", "eprintln!", "process::exit", "env::var", "env::temp_dir", "env::args", "stdout()", "stderr()"] {
            if code.contains(forbidden) {
                found.push(format!("{path}: {forbidden} belongs to the command line"));
            }
        }
    } else if !["lib", "main", "cli"].contains(&module) {
        found.push(format!("{path}: a module without a place in the architecture"));
    }
    if (code.contains("burn::") || code.contains("burn_flex")) && !TENSORS.contains(&module) {
        found.push(format!("{path}: {module} may not use tensors"));
    }
    if code.contains("load_block(") && !["model/load.rs", "model/walk.rs", "model/generate.rs"].contains(&path) {
        found.push(format!("{path}: only model/walk.rs and model/generate.rs loop over blocks"));
    }
    found
}

#[test]
fn every_module_uses_only_what_is_below_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let found: Vec<String> = crate::tidy::sources(&root)
        .iter()
        .flat_map(|path| violations(path.strip_prefix(&root).unwrap().to_str().unwrap(), &std::fs::read_to_string(path).unwrap()))
        .collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn planted_violations_are_found() {
    for (path, text) in [
        ("methods/wanda.rs", "use crate::formats::Format;"),
        ("formats/dense.rs", "fn f() { crate::methods::read(); }"),
        ("formats.rs", "use burn::tensor::Tensor;"),
        ("methods/wanda.rs", "use crate::{error::{Error, Result}, formats};"),
        ("model/forward.rs", "fn f() { println!(\"x\"); }"),
        ("calibrate/corpus.rs", "fn f() { std::env::var(\"HOME\"); }"),
        ("evaluate.rs", "let block = model.load_block(0)?;"),
        ("weight/ints.rs", "use crate::checkpoint::Checkpoint;"),
        ("utils.rs", ""),
    ] {
        assert!(!violations(path, text).is_empty(), "{path}: {text}");
    }
    assert!(violations("methods/wanda.rs", "use crate::kernels::select;\n// println!\n").is_empty());
}
