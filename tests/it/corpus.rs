//! A corpus of broken model folders, texts and destinations, each tried on the program as a user runs it. Every one is refused in
//! one line that names the culprit, or taken; none ends the program in another way, makes it wait, fills the memory, controls the
//! terminal or leaves anything behind.

mod configs;
mod headers;
mod indexes;
mod names;
mod outputs;
mod place;
mod texts;
mod tokenizers;
mod weights;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{Read, Seek, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use drawknife::error::controls;
use rayon::prelude::*;

use crate::corpus::place::Place;

/// The variable that names a part of the corpus, all of whose ends are then told.
const ONLY: &str = "DRAWKNIFE_CORPUS";
/// Longest time that one command may take.
const LONGEST: Duration = Duration::from_secs(10);
/// Memory that one command may hold, in KiB.
const MEMORY: u64 = 512 << 10;

/// What has to happen.
#[derive(Debug, Clone, Copy)]
enum Expect {
    /// `check` and `compress` refuse it and name this; of several parts joined by ` + ` all.
    Refused(&'static str),
    /// `compress` refuses it and names this; `check` may not look at it.
    ByCompress(&'static str),
    /// `check` refuses it, and what `compress` makes of it.
    ByCheck(&'static str),
    /// Both take it.
    Accepted,
    /// Both may do as they like, in good order.
    Either,
}

/// A change to a workplace.
type Change = fn(&Place);

/// A change with its name and what has to happen.
type Row = (&'static str, Expect, Change);

/// One entry of the corpus. In paths `{folder}` is the workplace, and `%FF` a byte that is no UTF-8.
struct Variant {
    name: String,
    expect: Expect,
    change: Box<dyn Fn(&Place) + Send + Sync>,
    model: &'static str,
    output: String,
    compress: &'static [&'static str],
    check: &'static [&'static str],
}

impl Variant {
    fn new(name: &str, expect: Expect, change: impl Fn(&Place) + Send + Sync + 'static) -> Self {
        let output = "{folder}/out".to_string();
        Self { name: name.into(), expect, change: Box::new(change), model: "{folder}/model", output, compress: &[], check: &[] }
    }
}

fn rows(rows: &'static [Row]) -> impl Iterator<Item = Variant> {
    rows.iter().map(|&(name, expect, change)| Variant::new(name, expect, change))
}

/// How a command ended.
struct Ended {
    code: i32,
    output: String,
    error: String,
    seconds: f64,
    peak: u64,
}

/// The most memory that a process held so far, in KiB.
fn peak(id: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0)
}

/// Runs the program, and ends it where it takes too long or too much.
fn run(arguments: &[OsString], temporary: &Path) -> Ended {
    let [mut output, mut error] = [(); 2].map(|()| tempfile::tempfile().unwrap());
    let started = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_drawknife"))
        .args(arguments)
        .env("TMPDIR", temporary)
        .stdin(std::process::Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(error.try_clone().unwrap())
        .spawn()
        .unwrap();
    let mut most = 0;
    let status = loop {
        most = most.max(peak(child.id()));
        if started.elapsed() > LONGEST || most > MEMORY {
            let _ = child.kill();
        }
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None => std::thread::sleep(Duration::from_millis(3)),
        }
    };
    let text = |file: &mut std::fs::File| {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        String::from_utf8(bytes).unwrap_or_else(|error| format!("\u{1}not UTF-8: {error}"))
    };
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ended { code, output: text(&mut output), error: text(&mut error), seconds: started.elapsed().as_secs_f64(), peak: most }
}

/// What is in a folder: paths with lengths, where there are any.
fn listing(folder: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let metadata = entry.metadata().unwrap();
        if metadata.is_dir() {
            found.extend(listing(&entry.path()));
        }
        found.insert(entry.path(), if metadata.is_file() { metadata.len() } else { 0 });
    }
    found
}

/// Paths of one listing that another does not hold, or not with this length.
fn missing(one: &BTreeMap<PathBuf, u64>, other: &BTreeMap<PathBuf, u64>) -> Vec<PathBuf> {
    one.iter().filter(|(path, length)| other.get(*path) != Some(length)).map(|(path, _)| path.clone()).collect()
}

/// A template as a path or another argument.
fn filled(template: &str, folder: &Path) -> OsString {
    let text = template.replace("{folder}", folder.to_str().unwrap());
    let mut parts = text.split("%FF");
    let mut bytes = parts.next().unwrap_or("").as_bytes().to_vec();
    for part in parts {
        bytes.push(0xff);
        bytes.extend(part.as_bytes());
    }
    OsString::from_vec(bytes)
}

/// What is wrong with an end, whatever was expected.
fn disorder(ended: &Ended, codes: &[i32]) -> Vec<String> {
    let mut found = Vec::new();
    if !codes.contains(&ended.code) {
        found.push(format!("exit code {}, not one of {codes:?}", ended.code));
    }
    if ended.seconds > LONGEST.as_secs_f64() {
        found.push(format!("it took {:.1} s", ended.seconds));
    }
    if ended.peak > MEMORY {
        found.push(format!("it held {} MiB", ended.peak >> 10));
    }
    let lines = ended.error.trim_end().lines().count();
    if ended.code != 0 && !(ended.error.starts_with("error: ") && lines <= 4) {
        found.push(format!("{lines} lines on the error output"));
    }
    for (name, text) in [("standard output", &ended.output), ("error output", &ended.error)] {
        if let Some(control) = text.chars().find(|c| controls(*c) && !"\n\t".contains(*c)) {
            found.push(format!("{control:?} on the {name}"));
        }
    }
    found
}

/// What is wrong with an end where it had to be a refusal that names the culprit.
fn refusal(ended: &Ended, culprit: &str) -> Vec<String> {
    let lacking = culprit.split(" + ").filter(|part| !ended.error.contains(part));
    let mut found: Vec<String> = lacking.map(|part| format!("{part:?} is not named")).collect();
    if ended.code == 0 {
        found = vec!["it was taken".into()];
    }
    found
}

/// What is wrong with the reports of an output: they hold nothing that controls, and no markup of others.
fn reports(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for name in ["report.html", "report.md", "report.json", "README.md", "manifest.json"] {
        let text = std::fs::read_to_string(folder.join(name)).unwrap_or_default();
        if let Some(control) = text.chars().find(|c| controls(*c) && !"\n\t".contains(*c)) {
            found.push(format!("{control:?} in {name}"));
        }
        if name != "report.json" && name != "manifest.json" && text.contains("<img src=x") {
            found.push(format!("foreign markup in {name}"));
        }
    }
    found
}

/// All commands on one variant, and what was wrong with them.
fn examine(variant: &Variant) -> Vec<String> {
    let place = Place::new();
    (variant.change)(&place);
    let [model, output] = [variant.model, &variant.output].map(|template| filled(template, &place.folder));
    let options = |options: &[&str]| options.iter().map(|option| filled(option, &place.folder)).collect::<Vec<_>>();
    let temporary = tempfile::tempdir().unwrap();
    let before = listing(&place.folder);
    let mut found = Vec::new();
    let mut tell = |verb: &str, ended: &Ended, wrong: Vec<String>| {
        let left = listing(temporary.path()).len();
        let left = (left > 0).then(|| format!("{left} files in the folder for temporary ones"));
        let first: String = ended.error.lines().next().unwrap_or("").chars().take(300).collect();
        let end = format!("exit {} after {:.1} s, {} MiB: {first}", ended.code, ended.seconds, ended.peak >> 10);
        if std::env::var_os(ONLY).is_some() {
            let _ = writeln!(std::io::stderr(), "{} · {verb}: {end}", variant.name);
        }
        found.extend(wrong.into_iter().chain(left).map(|what| format!("{} · {verb}: {what} · {end}", variant.name)));
    };
    let kept = |mut wrong: Vec<String>| {
        let after = listing(&place.folder);
        let changed = missing(&before, &after).into_iter().chain(missing(&after, &before)).next();
        wrong.extend(changed.map(|path| format!("{} is not as it was", path.display())));
        wrong
    };

    // It reads neither tokenizers nor texts.
    if !["tok_", "text_", "dest_", "option_"].iter().any(|start| variant.name.starts_with(start)) {
        let ended = run(&[OsString::from("inspect"), model.clone()], temporary.path());
        tell("inspect", &ended, kept(disorder(&ended, &[0, 1, 2])));
    }

    let checking = [OsString::from("check"), model.clone()].into_iter().chain(options(variant.check)).collect::<Vec<_>>();
    let ended = run(&checking, temporary.path());
    // 5 is the code of `check` for files that are not whole.
    let mut wrong = disorder(&ended, &[0, 1, 2, 5]);
    match variant.expect {
        Expect::Refused(culprit) | Expect::ByCheck(culprit) => wrong.extend(refusal(&ended, culprit)),
        Expect::Accepted if ended.code != 0 => wrong.push("it was refused".into()),
        _ => {}
    }
    tell("check", &ended, kept(wrong));

    let few = ["--preset", "prune50", "--samples", "2", "--seq", "64", "--eval-tokens", "512", "--eval-seq", "128"];
    let fixed = [OsString::from("compress"), model, "-o".into(), output.clone()].into_iter();
    let compressing: Vec<OsString> = fixed.chain(few.map(OsString::from)).chain(options(variant.compress)).collect();
    let ended = run(&compressing, temporary.path());
    let mut wrong = disorder(&ended, if variant.name.starts_with("dest_") { &[0, 1, 2] } else { &[0, 2] });
    match variant.expect {
        Expect::Refused(culprit) | Expect::ByCompress(culprit) => wrong.extend(refusal(&ended, culprit)),
        Expect::Accepted if ended.code != 0 => wrong.push("it was refused".into()),
        _ => {}
    }
    let after = listing(&place.folder);
    let (lost, new) = (missing(&before, &after), missing(&after, &before));
    let strange = if ended.code == 0 { new.into_iter().filter(|path| !path.starts_with(&output)).collect() } else { new };
    wrong.extend(lost.iter().chain(&strange).take(1).map(|path| format!("{} is not as it was", path.display())));
    tell("compress", &ended, wrong);
    if ended.code == 0 {
        let wrong = reports(Path::new(&output));
        let ended = run(&[OsString::from("check"), output], temporary.path());
        let codes: &[i32] = if matches!(variant.expect, Expect::ByCheck(_)) { &[5] } else { &[0] };
        tell("check of the output", &ended, disorder(&ended, codes).into_iter().chain(wrong).collect());
    }
    found
}

/// The whole corpus.
fn corpus() -> Vec<Variant> {
    let mut all = Vec::new();
    all.extend(headers::variants());
    all.extend(indexes::variants());
    all.extend(weights::variants());
    all.extend(configs::variants());
    all.extend(tokenizers::variants());
    all.extend(texts::variants());
    all.extend(names::variants());
    all.extend(outputs::variants());
    all
}

#[test]
fn every_variant_is_refused_by_name_or_taken() {
    let only = std::env::var(ONLY).unwrap_or_default();
    let mut variants = corpus();
    let mut names: Vec<&str> = variants.iter().map(|variant| variant.name.as_str()).collect();
    names.sort_unstable();
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "a name stands for one variant");
    assert!(names.len() >= 180);
    // Written directly, because the test runner hides what passing tests print.
    let mut out = std::io::stderr();
    variants.retain(|variant| variant.name.contains(&only));
    let started = Instant::now();
    let wrong: Vec<String> = variants.par_iter().flat_map(examine).collect();
    let _ = writeln!(out, "{} variants in {:.1} s", variants.len(), started.elapsed().as_secs_f64());
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_reader_that_goes_away_ends_nothing_badly() {
    let place = Place::new();
    let model = place.model.to_str().unwrap();
    let out = place.folder.join("out");
    let commands: [(&[&str], i32); 5] = [
        (&["inspect", model, "--tensors"], 0),
        (&["check", model], 0),
        (&["presets"], 0),
        (&["--help"], 0),
        (&["compress", model, "-o", out.to_str().unwrap(), "--preset", "w8", "--no-eval", "--json"], 0),
    ];
    for (arguments, code) in commands {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(env!("CARGO_BIN_EXE_drawknife")).args(arguments).stdout(writer).output().unwrap();
        assert_eq!((output.status.code(), output.stderr.len()), (Some(code), 0), "{arguments:?}");
    }
}

#[test]
fn paths_that_are_no_text_are_filled_in() {
    assert_eq!(filled("{folder}/a%FFb", Path::new("/t")).as_bytes(), b"/t/a\xffb");
}
