//! What every long computation is given: the device, the seed, and somebody who watches.

use std::path::Path;

use crate::device::Device;
use crate::error::{Error, Fault, Result};

/// Who watches a run: a progress bar, a log, a test.
pub trait Observer: Send + Sync {
    /// A stage of `steps` steps begins.
    fn begin(&self, _stage: &str, _steps: u64) {}
    /// Some steps of the stage are done; `note` says what was done.
    fn step(&self, _steps: u64, _note: &str) {}
    /// The stage is done.
    fn end(&self) {}
    /// Something that the user should know.
    fn warn(&self, _message: &str) {}
    /// The signal that asked to stop, if one did.
    fn stopped(&self) -> Option<u8> {
        None
    }
}

/// An observer that sees nothing.
#[derive(Debug)]
pub struct Silent;

impl Observer for Silent {}

/// An observer that passes on nothing but the wish to stop: for work inside a stage that is already watched.
#[derive(Clone, Copy)]
pub struct Muted<'a>(pub &'a dyn Observer);

impl std::fmt::Debug for Muted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Muted")
    }
}

impl Observer for Muted<'_> {
    fn stopped(&self) -> Option<u8> {
        self.0.stopped()
    }
}

/// The surroundings of a computation.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// Where tensors are computed.
    pub device: &'a Device,
    /// Seed of every random choice.
    pub seed: u64,
    /// Who watches.
    pub observer: &'a dyn Observer,
    /// Where hidden states go that outgrow memory. It is here because nothing below the command line may ask the
    /// environment for the temporary folder.
    pub scratch: &'a Path,
}

impl std::fmt::Debug for Run<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Run on {} with seed {}", self.device.name, self.seed)
    }
}

impl Run<'_> {
    /// Stops here when a signal asked for it.
    ///
    /// # Errors
    /// [`Fault::Interrupted`] with the signal's number.
    pub fn check_stop(&self) -> Result<()> {
        match self.observer.stopped() {
            Some(signal) => Err(Error::new(Fault::Interrupted(signal), "stopped")),
            None => Ok(()),
        }
    }

    /// Does work on the device. Tensors have no errors: where a GPU runs out of memory or is lost under them they panic, and that
    /// becomes an error here, so that whoever keeps what was done so far can say so.
    ///
    /// # Errors
    /// Those of the work, or [`Fault::Run`] where a GPU failed.
    pub fn guarded<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        let Some(gpu) = &self.device.gpu else { return work() };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|panic| {
            let said = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            Err(gpu.failure(said.unwrap_or("the device failed")))
        })
    }
}
