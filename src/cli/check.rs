//! `check`.

use std::io::Write;
use std::path::Path;

use crate::check::baseline::Baseline;
use crate::check::{Checked, Options, Outcome, Reference, check, github, junit};
use crate::cli::Invocation;
use crate::cli::arguments::{Check, CheckFormat};
use crate::cli::compress::quality_table;
use crate::cli::device::pick_device;
use crate::cli::eval::protocol;
use crate::cli::text::{say, say_json, table};
use crate::error::{Error, Fault, Result, shown, shown_path};
use crate::evaluate::{Protocol, Text};
use crate::gate::{Gate, Limits, Verdict};
use crate::report::bytes;
use crate::run::Run;
use crate::subject::Subject;

/// Runs the verb.
///
/// # Errors
/// The verdict where it is not a pass, or whatever went wrong, in one line.
pub fn run(arguments: &Check, invocation: &Invocation) -> Result<()> {
    let device = pick_device(arguments.device, arguments.gpu_memory.as_deref())?;
    let scratch = std::env::temp_dir();
    refuse_senseless(arguments)?;
    if !arguments.model.exists() && !crate::embedded::is_named(&arguments.model) {
        return Err(Error::input("no such file or folder").file(&arguments.model));
    }
    let run = Run { device: &device, seed: invocation.seed.unwrap_or(0), observer: &invocation.progress, scratch: &scratch };
    let accepted = match &arguments.baseline {
        Some(path) if !arguments.update_baseline => Some(Baseline::open(path)?),
        _ => None,
    };
    let tolerances = arguments.baseline.as_deref().and_then(Baseline::tolerances);
    let checked = match Subject::open(&arguments.model, &scratch) {
        Ok(subject) => {
            let options = options(arguments, &subject, accepted, &scratch)?;
            check(&subject, &options, &run)?
        }
        Err(error) => Checked::unopened(&arguments.model, &error),
    };
    show(&checked, arguments, invocation)?;
    if let Some(path) = &arguments.junit {
        std::fs::write(path, junit::xml(&checked)?).map_err(|error| Error::io(path, &error))?;
    }
    verdict(&checked)?;
    if let (Some(path), true) = (&arguments.baseline, arguments.update_baseline) {
        checked.accept(tolerances)?.write(path)?;
        if !invocation.json && arguments.format == CheckFormat::Human {
            say(&format!("accepted  {}", shown_path(path)));
        }
    }
    Ok(())
}

fn refuse_senseless(arguments: &Check) -> Result<()> {
    if arguments.update_baseline && arguments.baseline.is_none() {
        return Err(Error::input("--update-baseline needs --baseline FILE to say where"));
    }
    if arguments.reference.is_none() {
        if arguments.save_reference.is_some() {
            return Err(Error::input("--save-reference keeps the predictions of --reference, which is missing"));
        }
        if let Some(limit) = arguments.max.iter().flat_map(|limits| &limits.0).find(|limit| limit.metric.needs_reference()) {
            return Err(Error::input(format!(
                "--max {}: needs --reference, the model before compression or what was kept of it",
                limit.metric.name()
            )));
        }
    }
    Ok(())
}

fn options(arguments: &Check, subject: &Subject, accepted: Option<Baseline>, scratch: &Path) -> Result<Options> {
    let measuring = &arguments.measuring;
    let protocol = match subject.model() {
        Ok(model) => protocol(measuring, &model)?,
        Err(_) => Protocol { seq: measuring.seq.unwrap_or(512), max_tokens: measuring.max_tokens, bos: measuring.bos, second_half: false },
    };
    let reference = Reference::open(arguments.reference.as_deref(), scratch)?;
    if matches!(reference, Reference::Kept(_)) && arguments.save_reference.is_some() {
        return Err(Error::input("--save-reference needs the model itself as --reference, not what was kept of it"));
    }
    let limits = arguments.max.clone().unwrap_or_default().0;
    let measured = limits.iter().any(|limit| limit.metric.is_measured());
    Ok(Options {
        reference,
        text: Text::open(measuring.text.as_deref())?,
        measure: measured || arguments.baseline.is_some() || arguments.reference.is_some() || measuring.text.is_some(),
        protocol,
        limits,
        baseline: accepted,
        engine: arguments.engine,
        budget: arguments.budget,
        keep: arguments.save_reference.clone(),
    })
}

/// The verdict as the program's end.
fn verdict(checked: &Checked) -> Result<()> {
    let named = |verdict: Verdict| {
        let gates: Vec<String> = checked.gates.iter().filter(|gate| gate.verdict == verdict).map(Gate::sentence).collect();
        gates.join("; ")
    };
    match checked.verdict {
        Outcome::Pass => Ok(()),
        Outcome::Fail => Err(Error::new(Fault::Gate, named(Verdict::Fail))),
        Outcome::Inconclusive => Err(Error::new(Fault::Inconclusive, named(Verdict::Inconclusive))),
        Outcome::Broken => {
            let broken: Vec<String> = checked
                .structure
                .iter()
                .filter(|finding| !finding.ok)
                .map(|finding| format!("{}: {}", finding.name, finding.detail))
                .collect();
            Err(Error::new(Fault::Verification, format!("the model is not whole: {}", broken.join("; "))))
        }
    }
}

fn show(checked: &Checked, arguments: &Check, invocation: &Invocation) -> Result<()> {
    match (invocation.json, arguments.format) {
        (true, _) => say_json(checked),
        (false, CheckFormat::Github) => {
            github::annotations(checked).iter().for_each(|line| say(line));
            if let Some(path) = std::env::var_os("GITHUB_STEP_SUMMARY").filter(|path| !path.is_empty()) {
                let path = Path::new(&path);
                let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
                file.and_then(|mut file| file.write_all(github::markdown(checked).as_bytes())).map_err(|error| Error::io(path, &error))?;
            }
        }
        (false, CheckFormat::Human) if invocation.quiet => say(checked.verdict.name()),
        (false, CheckFormat::Human) => people(checked),
    }
    Ok(())
}

fn people(checked: &Checked) {
    say(&format!(
        "model     {} · {} · {:.2} bits per weight in linear layers",
        shown(&checked.model),
        bytes(checked.bytes),
        checked.bits_per_weight
    ));
    for finding in &checked.structure {
        let mark = match (finding.ok, finding.detail.starts_with("does not")) {
            (false, _) => "BROKEN",
            (true, true) => "-",
            (true, false) => "ok",
        };
        say(&format!("{mark:<9} {:<16} {}", finding.name, finding.detail));
    }
    if let Some(quality) = &checked.quality {
        say(&format!("quality   {} · {} windows of {} tokens", shown(&checked.text), quality.windows, quality.seq));
        quality_table(quality).iter().for_each(|line| say(&format!("          {line}")));
    }
    if !checked.gates.is_empty() {
        say("");
        table(&checked.rows()).iter().for_each(|line| say(line));
        say("");
    }
    for note in &checked.notes {
        say(&format!("note      {note}"));
    }
    let gates = checked.gates.len();
    let about = match checked.verdict {
        Outcome::Pass if gates == 0 && checked.quality.is_none() => {
            " · the files are whole; quality was not measured: give --reference, --text, --baseline or --max"
        }
        Outcome::Pass if gates == 0 => " · the files are whole; no limit was set: give --baseline or --max",
        _ => "",
    };
    say(&format!("verdict   {}{about}", checked.verdict.name()));
}

/// Reads limits, for the command line.
///
/// # Errors
/// What is wrong with them.
pub fn limits(text: &str) -> Result<Limits, String> {
    text.parse()
}

/// Reads a time like `2m`, `90s` or `1h`.
///
/// # Errors
/// When it is none.
pub fn duration(text: &str) -> Result<std::time::Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => f64::NAN,
    };
    let seconds = digits.parse::<f64>().unwrap_or(f64::NAN) * unit;
    match (1.0..=1e7).contains(&seconds) {
        true => Ok(std::time::Duration::from_secs_f64(seconds)),
        false => Err("use a time like 90s, 2m or 1h".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(
            (duration("2m").unwrap().as_secs(), duration("90").unwrap().as_secs(), duration("1h").unwrap().as_secs()),
            (120, 90, 3600)
        );
        assert!(["", "m", "2x", "-1s", "0"].iter().all(|text| duration(text).is_err()));
    }
}
