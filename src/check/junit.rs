//! A check as JUnit's XML, which build servers show as tests: one suite for the structure, one for the limits.

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use crate::check::Checked;
use crate::check::gate::{Gate, Verdict};
use crate::error::{Error, Result};

/// The XML of a check. An undecided limit is an error, because it is not a pass.
///
/// # Errors
/// When the XML cannot be made.
pub fn xml(checked: &Checked) -> Result<String> {
    let mut report = Report::new("drawknife check");
    let mut structure = TestSuite::new("structure");
    for finding in &checked.structure {
        let status = if finding.ok { TestCaseStatus::success() } else { bad(NonSuccessKind::Failure, "structure", &finding.detail) };
        structure.add_test_case(case(&checked.model, &finding.name, status));
    }
    report.add_test_suite(structure);
    let mut limits = TestSuite::new("limits");
    for gate in &checked.gates {
        let status = match gate.verdict {
            Verdict::Pass => TestCaseStatus::success(),
            Verdict::Fail => bad(NonSuccessKind::Failure, "limit", &sentence(gate)),
            Verdict::Inconclusive => bad(NonSuccessKind::Error, "inconclusive", &sentence(gate)),
        };
        limits.add_test_case(case(&checked.model, &gate.name, status));
    }
    report.add_test_suite(limits);
    report.to_string().map_err(|error| Error::run(format!("JUnit: {error}")))
}

fn case(model: &str, name: &str, status: TestCaseStatus) -> TestCase {
    let mut case = TestCase::new(name, status);
    case.set_classname(format!("drawknife.{model}"));
    case
}

fn bad(kind: NonSuccessKind, of: &str, message: &str) -> TestCaseStatus {
    let mut status = TestCaseStatus::non_success(kind);
    status.set_type(of).set_message(message);
    status
}

/// A limit and what was measured, in one sentence.
pub fn sentence(gate: &Gate) -> String {
    let sign = if gate.at_least { "at least" } else { "at most" };
    let bound = |bound: Option<f64>| bound.map_or("unknown".into(), figure);
    let interval = match (gate.low, gate.high) {
        (Some(low), Some(high)) if low == high => String::new(),
        (low, high) => format!(" (95 %: {} to {})", bound(low), bound(high)),
    };
    let more = match (gate.verdict, gate.more_tokens) {
        (Verdict::Inconclusive, Some(more)) => format!("; about {more} more tokens would decide"),
        (Verdict::Inconclusive, None) => "; more tokens alone are not sure to decide".into(),
        _ => String::new(),
    };
    format!("{}: {} is {}{interval}, the limit is {sign} {}{more}", gate.verdict.name(), gate.about, bound(gate.value), figure(gate.limit))
}

/// A number with the digits that matter.
pub fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 1e5 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.3}"),
        size if size >= 0.1 || size == 0.0 => format!("{value:.4}"),
        _ => format!("{value:.6}"),
    }
}
