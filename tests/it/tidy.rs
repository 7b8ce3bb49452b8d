//! House style as a failing test.

use std::path::{Path, PathBuf};

/// The only modules that may hold unsafe code, each with notes on safety.
const UNSAFE: &[&str] = &["src/device/gpu.rs", "src/kernels/gemm.rs", "src/kernels/rough_product.rs", "src/cli/allocator.rs"];

/// All Rust files below a folder.
pub fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// What is untidy in a file, given its path from the root of the project.
fn violations(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut say = |what: &str| found.push(format!("{path}: {what}"));
    let lines = text.lines().count();
    if lines > 600 {
        say(&format!("{lines} lines, at most 600: the design is telling something"));
    }
    if !text.starts_with("//!") {
        say("does not open with prose that says what it is");
    }
    if ["mod.rs", "utils.rs", "helpers.rs", "common.rs"].iter().any(|name| path.ends_with(&format!("/{name}"))) {
        say("a name that says nothing");
    }
    let code = |line: &&str| !line.trim_start().starts_with("//");
    let has_unsafe = text.lines().filter(code).any(|line| {
        line.contains(concat!("unsafe", " {")) || line.contains(concat!("unsafe", " fn")) || line.contains(concat!("unsafe", " impl"))
    });
    if has_unsafe && !UNSAFE.contains(&path) {
        say("unsafe code outside the named modules");
    }
    if has_unsafe && !text.contains("SAFETY:") {
        say("unsafe code without a note on safety");
    }
    for word in [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("/ho", "me/"),
        concat!("/ro", "ot/"),
    ] {
        if text.contains(word) {
            say(&format!("{word} is left in it"));
        }
    }
    let body = text.split(concat!("#[cfg(", "test)]")).next().unwrap_or("");
    for (name, length) in functions(body) {
        if length > 70 {
            say(&format!("function {name} has {length} lines, at most 70"));
        }
    }
    found
}

/// Names and lengths of functions, as formatted code shows them by indentation.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let Some((before, rest)) =
            line.split_once("fn ").filter(|(before, _)| before.trim_start().is_empty() || before.trim_start().starts_with("pub"))
        else {
            continue;
        };
        // A method of a trait without a body.
        if lines[start..].iter().find(|line| line.ends_with(['{', '}', ';'])).is_some_and(|line| line.ends_with(';')) {
            continue;
        }
        let indent = before.len() - before.trim_start().len();
        let end = lines[start..].iter().position(|line| line.starts_with(&format!("{}}}", " ".repeat(indent))));
        found.push((rest.split('(').next().unwrap_or("").to_string(), end.unwrap_or(0)));
    }
    found
}

#[test]
fn every_file_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = ["src", "tests", "benches", "calibration"];
    let found: Vec<String> = folders
        .iter()
        .flat_map(|folder| sources(&root.join(folder)))
        .flat_map(|path| violations(path.strip_prefix(root).unwrap().to_str().unwrap(), &std::fs::read_to_string(&path).unwrap()))
        .collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn planted_violations_are_found() {
    let planted = [
        ("src/a.rs", "fn no_prose() {}".to_string()),
        ("src/a.rs", format!("//! a\n{}", "\n".repeat(700))),
        ("src/a.rs", format!("//! a\nfn f() {{ {} {{}} }}", concat!("uns", "afe"))),
        ("src/kernels/gemm.rs", format!("//! a\nfn f() {{ {} {{}} }}", concat!("uns", "afe"))),
        ("src/kernels/mod.rs", "//! a\n".into()),
        ("src/a.rs", format!("//! a\n// {}\n", concat!("TO", "DO"))),
        ("src/a.rs", format!("//! a\npub fn long() {{\n{}}}\n", "    x();\n".repeat(71))),
    ];
    for (path, text) in planted {
        assert!(!violations(path, &text).is_empty(), "{path}: {}", &text[..text.len().min(60)]);
    }
    assert!(violations("src/a.rs", "//! a\nfn f() {\n}\n").is_empty());
}
