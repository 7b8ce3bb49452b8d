//! Checks on larger trained models that are not part of the repository. Without them the tests say that they were
//! skipped; the folder is `../shared`, or what `DRAWKNIFE_SHARED` names.

use std::io::Write;
use std::path::PathBuf;

use crate::command::{drawknife, json};

fn shared(what: &str) -> Option<PathBuf> {
    let folder =
        std::env::var_os("DRAWKNIFE_SHARED").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let path = folder.join("data").join(what);
    if path.exists() {
        return Some(path);
    }
    // Written directly, because the test runner hides what passing tests print.
    let _ = writeln!(std::io::stderr(), "skipped: {what} is not here");
    None
}

#[test]
fn perplexities_of_trained_models_are_those_of_an_independent_program() {
    for (model, text, seq, perplexity) in
        [("classics-7m", "books-eval.txt", "512", 59.1743), ("stories-260k", "stories-eval.txt", "256", 7.7670)]
    {
        let (Some(model), Some(text)) = (shared(&format!("models/{model}")), shared(&format!("text/{text}"))) else { return };
        let found = json(&["eval", model.to_str().unwrap(), "--text", text.to_str().unwrap(), "--seq", seq, "--max-tokens", "20480"]);
        let nll = found["nll"].as_f64().unwrap();
        assert!((nll - f64::ln(perplexity)).abs() / nll < 1e-4, "{nll}");
    }
}

#[test]
fn wanda_gives_the_divergence_of_an_independent_program_on_its_windows() {
    let (Some(model), Some(windows), Some(text)) =
        (shared("models/classics-7m"), shared("calibration-128x512.jsonl"), shared("text/books-eval.txt"))
    else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let arguments = [
        "compress",
        model.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
        "--preset",
        "prune50",
        "--calibration",
        windows.to_str().unwrap(),
        "--eval-text",
        text.to_str().unwrap(),
        "--eval-tokens",
        "20480",
    ];
    let found = json(&arguments);
    let divergence = found["report"]["quality"]["kld_mean"].as_f64().unwrap();
    assert!((divergence - 0.12916).abs() < 3e-3, "{divergence}");
    drop(drawknife(&["inspect", out.to_str().unwrap()]));
}
