//! The command line: arguments to one library call to a message.

pub mod allocator;
pub mod arguments;
pub mod check;
pub mod compare;
pub mod compress;
pub mod device;
pub mod eval;
pub mod export;
pub mod hub;
pub mod inspect;
pub mod look;
pub mod progress;
pub mod report;
pub mod sensitivity;
pub mod text;

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Mutex;

use clap::Parser;
use clap::error::ErrorKind;

use crate::calibrate::chat;
use crate::cli::arguments::{Arguments, Command};
use crate::cli::progress::Progress;
use crate::device::opened;
use crate::error::{Error, Result};

/// What every verb is given from the command line.
#[derive(Debug)]
pub struct Invocation {
    /// `--json`.
    pub json: bool,
    /// `--quiet`.
    pub quiet: bool,
    /// `-v`.
    pub verbose: bool,
    /// `--seed`.
    pub seed: Option<u64>,
    /// Progress and signals.
    pub progress: Progress,
}

/// What a library said when it failed; shown only when nothing catches the failure, so that an error stays one line.
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

/// Runs the program and gives its exit code.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    allocator::tune();
    let parsed = match Arguments::try_parse_from(arguments) {
        Ok(parsed) => parsed,
        Err(error) => return usage(&error),
    };
    // Before anything is started that the child has no use for.
    if matches!(parsed.command, Command::RenderChats) {
        allocator::limit(chat::CHILD_BYTES);
        return if chat::serve(std::io::stdin().lock(), std::io::stdout().lock()).is_ok() { ExitCode::SUCCESS } else { ExitCode::from(1) };
    }
    // Under this name the program is found even where it was replaced meanwhile.
    let own = std::path::PathBuf::from("/proc/self/exe");
    chat::isolate(if own.exists() { own } else { std::env::current_exe().unwrap_or(own) });
    std::panic::set_hook(Box::new(|info| {
        if let Ok(mut last) = LAST_PANIC.lock() {
            *last = info.to_string();
        }
    }));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(parsed)));
    match result {
        Ok(Ok(())) if text::lost() => {
            text::complain("error: standard output takes no more, part of the result was not printed");
            ExitCode::from(1)
        }
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            text::complain(&format!("error: {error}"));
            ExitCode::from(error.exit_code())
        }
        Err(_) => {
            let what = LAST_PANIC.lock().map(|last| last.clone()).unwrap_or_default();
            // Tensors have no errors: out of memory and a lost device arrive here.
            let error = match opened() {
                Some(name) => format!("{name} failed, there is no output; use --gpu-memory or --device cpu: {what}"),
                None => format!("internal failure, there is no output; please report it: {what}"),
            };
            text::complain(&format!("error: {}", Error::run(error)));
            ExitCode::from(1)
        }
    }
}

fn run(mut arguments: Arguments) -> Result<()> {
    if let Some(threads) = arguments.threads.filter(|threads| !(1..=4096).contains(threads)) {
        return Err(Error::input(format!("--threads {threads}: use 1 to 4096")));
    }
    // 0 stands for one thread per processor.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(arguments.threads.unwrap_or(0)).build_global();
    pool.map_err(|error| Error::run(format!("no threads to work with: {error}; fewer may be allowed: --threads 1")))?;
    let bars = !arguments.quiet && !arguments.json && text::is_terminal();
    let invocation = Invocation {
        json: arguments.json,
        quiet: arguments.quiet,
        verbose: arguments.verbose,
        seed: arguments.seed,
        progress: Progress::new(bars)?,
    };
    hub::locate(&mut arguments.command, arguments.offline, &invocation.progress)?;
    match arguments.command {
        Command::Compress(arguments) => compress::run(&arguments, &invocation, arguments.dry_run),
        Command::Plan(arguments) => compress::run(&arguments, &invocation, true),
        Command::Eval(arguments) => eval::run(&arguments, &invocation),
        Command::Check(arguments) => check::run(&arguments, &invocation),
        Command::Sensitivity(arguments) => sensitivity::run(&arguments, &invocation),
        Command::Report(arguments) => report::run(&arguments, &invocation),
        Command::Schema(arguments) => report::schema(&arguments),
        Command::Compare(arguments) => compare::run(&arguments, &invocation),
        Command::Export(arguments) => export::run(&arguments, &invocation),
        Command::Inspect(arguments) => inspect::run(&arguments, &invocation),
        Command::Presets(arguments) => look::presets(&arguments, &invocation),
        Command::Doctor(arguments) => look::doctor(&arguments, &invocation),
        // Answered before.
        Command::RenderChats => Ok(()),
    }
}

/// Help and version as clap prints them; a mistake as one line.
fn usage(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand) {
        return match error.print() {
            Err(failed) if failed.kind() != std::io::ErrorKind::BrokenPipe => ExitCode::from(1),
            _ if error.use_stderr() => ExitCode::from(2),
            _ => ExitCode::SUCCESS,
        };
    }
    let rendered = error.render().to_string();
    let lines = rendered.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let parts: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
    text::complain(&format!("{}; see `drawknife --help`", parts.join(" ")));
    ExitCode::from(2)
}
