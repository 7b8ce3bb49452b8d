//! `report` and `schema`.

use schemars::{Schema, schema_for};

use crate::check::Checked;
use crate::check::baseline::Baseline;
use crate::cli::Invocation;
use crate::cli::arguments::{ReportOf, Schema as Arguments};
use crate::cli::text::{say, say_json};
use crate::compare::Comparison;
use crate::compress::manifest::Manifest;
use crate::compress::write_pages;
use crate::error::{Error, Result, shown, shown_path};
use crate::report::{Report, Timing};
use crate::sensitivity::file::Sensitivity;

/// A file that the program writes: its name, what it is, and its schema.
type Known = (&'static str, &'static str, fn() -> Schema);

/// Every file with a published schema.
pub const SCHEMAS: [Known; 7] = [
    ("report", "report.json of compress: what was done and what it cost", || schema_for!(Report)),
    ("timing", "timing.json of compress: the command, times and memory", || schema_for!(Timing)),
    ("manifest", "manifest.json of compress and export: hashes of all files", || schema_for!(Manifest)),
    ("sensitivity", "sensitivity.json: what every way to store every layer costs", || schema_for!(Sensitivity)),
    ("baseline", "the baseline of check: an accepted measurement", || schema_for!(Baseline)),
    ("check", "check --json: structure, figures, limits and the verdict", || schema_for!(Checked)),
    ("compare", "compare --json: models beside each other", || schema_for!(Comparison)),
];

/// Makes the pages of a run again.
///
/// # Errors
/// When the folder holds no report.
pub fn run(arguments: &ReportOf, invocation: &Invocation) -> Result<()> {
    write_pages(&arguments.folder)?;
    let html = arguments.folder.join("report.html");
    if invocation.json {
        say_json(&serde_json::json!({"html": html, "markdown": arguments.folder.join("report.md")}));
    } else {
        say(&format!("wrote     {}", shown_path(&html)));
    }
    Ok(())
}

/// Prints a schema, or lists what there is.
///
/// # Errors
/// When there is none of the name.
pub fn schema(arguments: &Arguments) -> Result<()> {
    let Some(name) = &arguments.name else {
        SCHEMAS.iter().for_each(|(name, about, _)| say(&format!("{name:<12} {about}")));
        return Ok(());
    };
    let found = SCHEMAS.iter().find(|(known, ..)| known == name);
    let known = SCHEMAS.map(|(name, ..)| name).join(", ");
    let (_, _, schema) = found.ok_or_else(|| Error::input(format!("no schema `{}`; known are {known}", shown(name))))?;
    say_json(&schema());
    Ok(())
}
