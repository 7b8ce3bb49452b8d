//! A check as JUnit's XML, which build servers show as tests: one suite for the structure, one for the limits.

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use crate::check::Checked;
use crate::error::{Error, Result};
use crate::gate::Verdict;

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
            Verdict::Fail => bad(NonSuccessKind::Failure, "limit", &gate.sentence()),
            Verdict::Inconclusive => bad(NonSuccessKind::Error, "inconclusive", &gate.sentence()),
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
