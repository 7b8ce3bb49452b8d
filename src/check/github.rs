//! A check as GitHub Actions shows it: annotations on the run, and a summary of the step.

use crate::check::{Checked, Outcome};
use crate::error::shown;
use crate::gate::Verdict;
use crate::statistics::shown as figure;

/// Workflow commands: an annotation per broken part or limit, and one for the verdict.
pub fn annotations(checked: &Checked) -> Vec<String> {
    let data = |text: &str| text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A");
    let property = |text: &str| data(text).replace(':', "%3A").replace(',', "%2C");
    let line =
        |kind: &str, title: &str, text: &str| format!("::{kind} title={}::{}", property(&format!("drawknife check: {title}")), data(text));
    let mut lines = Vec::new();
    for finding in checked.structure.iter().filter(|finding| !finding.ok) {
        lines.push(line("error", &finding.name, &finding.detail));
    }
    for gate in &checked.gates {
        match gate.verdict {
            Verdict::Pass => {}
            Verdict::Fail => lines.push(line("error", &gate.name, &gate.sentence())),
            Verdict::Inconclusive => lines.push(line("warning", &gate.name, &gate.sentence())),
        }
    }
    let passed = checked.gates.iter().filter(|gate| gate.verdict == Verdict::Pass).count();
    let summary = format!("{}: {passed} of {} limits kept, {}", checked.verdict.name(), checked.gates.len(), shown(&checked.model));
    lines.push(line(if checked.verdict == Outcome::Pass { "notice" } else { "error" }, "verdict", &summary));
    lines
}

/// The check as Markdown, for the summary of a step or a pull request.
pub fn markdown(checked: &Checked) -> String {
    let cell = |text: &str| text.replace('|', "\\|").replace('<', "&lt;").replace('\n', " ");
    let mut out = format!("### drawknife check: {} · {}\n\n", checked.verdict.name(), cell(&shown(&checked.model)));
    let broken = checked.structure.iter().filter(|finding| !finding.ok);
    broken.for_each(|finding| out.push_str(&format!("- **{}**: {}\n", cell(&finding.name), cell(&finding.detail))));
    if !checked.gates.is_empty() {
        for (number, row) in checked.rows().iter().enumerate() {
            out.push_str(&format!("| {} |\n", row.iter().map(|text| cell(text)).collect::<Vec<_>>().join(" | ")));
            if number == 0 {
                out.push_str("| --- | ---: | ---: | ---: | --- |\n");
            }
        }
    }
    if let Some(quality) = &checked.quality {
        let (text, windows, seq) = (cell(&shown(&checked.text)), quality.windows, quality.seq);
        out.push_str(&format!("\nperplexity {} on {windows} windows of {seq} tokens of {text}\n", figure(quality.perplexity, 4)));
    }
    checked.notes.iter().for_each(|note| out.push_str(&format!("\n{}\n", cell(note))));
    out.push('\n');
    out
}
