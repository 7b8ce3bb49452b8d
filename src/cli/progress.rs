//! A progress bar for what takes longer than two seconds, and the signals that stop a run.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};

use crate::cli::allocator;
use crate::compress::work::{Work, worth_keeping};
use crate::error::{Error, Fault, Result};
use crate::run::Observer;

/// How long a signal may wait to be noticed.
const NOTICE: Duration = Duration::from_millis(1600);

/// How long a stage takes before its bar appears.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often free memory is handed back.
const TRIM_EVERY: Duration = Duration::from_secs(5);

/// Shows progress and notices signals.
#[derive(Debug)]
pub struct Progress {
    shown: bool,
    bar: Mutex<Option<(ProgressBar, Instant)>>,
    /// When free memory was last handed back.
    trimmed: Mutex<Instant>,
    signal: Arc<AtomicUsize>,
}

impl Progress {
    /// Progress with bars or without; a second signal ends the program at once.
    ///
    /// # Errors
    /// When signals cannot be noticed.
    pub fn new(shown: bool) -> Result<Self> {
        let signal = Arc::new(AtomicUsize::new(0));
        for number in [SIGINT, SIGTERM] {
            let again = Arc::new(AtomicBool::new(false));
            let fail = |error: std::io::Error| Error::run(format!("signals: {error}"));
            signal_hook::flag::register_conditional_shutdown(number, 128 + number, Arc::clone(&again)).map_err(fail)?;
            signal_hook::flag::register(number, again).map_err(fail)?;
            signal_hook::flag::register_usize(number, Arc::clone(&signal), number as usize).map_err(fail)?;
        }
        // A file-size limit shall be an error of the write, not the end of the program.
        signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))).map_err(|error| Error::run(format!("signals: {error}")))?;
        watch(Arc::clone(&signal));
        Ok(Self { shown, bar: Mutex::new(None), trimmed: Mutex::new(Instant::now()), signal })
    }

    fn with_bar(&self, work: impl FnOnce(&mut Option<(ProgressBar, Instant)>)) {
        if let Ok(mut bar) = self.bar.lock() {
            work(&mut bar);
        }
    }
}

/// A work folder that goes when the program is ended by [`watch`] and nothing in it is worth going on with.
static WORK: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Says which work folder is in use.
pub fn works_in(folder: &Path) {
    if let Ok(mut work) = WORK.lock() {
        *work = Some(folder.to_path_buf());
    }
}

/// The command line as a shell would take it.
pub fn command() -> Vec<String> {
    let plain = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || "-_./=,:+@%".contains(c));
    let quoted = |word: String| if plain(&word) { word } else { format!("'{}'", word.replace('\'', "'\\''")) };
    std::iter::once("drawknife".to_string())
        .chain(std::env::args_os().skip(1).map(|word| quoted(word.to_string_lossy().into_owned())))
        .collect()
}

/// Adds how to go on to the error of a run that a signal stopped, where there is something to go on with.
pub fn resumable(error: Error, target: &Path) -> Error {
    let kept = matches!(error.fault, Fault::Interrupted(_)) && Work::left(target);
    if kept { error.advice(&format!("resume with: {}", command().join(" "))) } else { error }
}

/// Ends the program where a signal was not noticed in time: inside a library that asks nobody. What is recorded by then is on the
/// disk, as after a crash.
fn watch(signal: Arc<AtomicUsize>) {
    let watching = std::thread::Builder::new().name("signals".into()).spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(100));
            let number = signal.load(Ordering::Relaxed);
            if number == 0 {
                continue;
            }
            std::thread::sleep(NOTICE);
            let work = WORK.lock().ok().and_then(|work| work.clone());
            let kept = work.as_ref().is_some_and(|work| worth_keeping(work));
            if let Some(work) = work.filter(|_| !kept) {
                let _ = std::fs::remove_dir_all(work);
            }
            let what = match kept {
                true => format!("stopped; the work so far is kept; resume with: {}", command().join(" ")),
                false => "stopped; nothing was written".into(),
            };
            crate::cli::text::complain(&format!("error: {}", Error::run(what)));
            std::process::exit(128 + i32::try_from(number).unwrap_or(0));
        }
    });
    // Without a thread a signal is noticed at the next step alone.
    drop(watching);
}

impl Observer for Progress {
    fn begin(&self, stage: &str, steps: u64) {
        if !self.shown {
            return;
        }
        let style = ProgressStyle::with_template("{prefix:>18} {bar:28} {percent:>3}%  {elapsed} elapsed, {eta} left  {msg}");
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::hidden());
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(stage.to_string());
        self.with_bar(|slot| *slot = Some((bar, Instant::now())));
    }

    fn step(&self, steps: u64, note: &str) {
        self.with_bar(|slot| {
            let Some((bar, started)) = slot else { return };
            if bar.is_hidden() && started.elapsed() > PATIENCE {
                bar.set_draw_target(ProgressDrawTarget::stderr());
            }
            bar.set_message(crate::error::shown(note));
            bar.inc(steps);
        });
        let mut trimmed = self.trimmed.lock().unwrap_or_else(PoisonError::into_inner);
        if trimmed.elapsed() > TRIM_EVERY {
            allocator::trim();
            *trimmed = Instant::now();
        }
    }

    fn end(&self) {
        self.with_bar(|slot| {
            if let Some((bar, _)) = slot.take() {
                bar.finish_and_clear();
            }
        });
    }

    fn warn(&self, message: &str) {
        crate::cli::text::complain(&format!("! {message}"));
    }

    fn stopped(&self) -> Option<u8> {
        match self.signal.load(Ordering::Relaxed) {
            0 => None,
            number => u8::try_from(number).ok(),
        }
    }
}
