//! `--device` and `--gpu-memory`: which device a command computes on.

use std::os::fd::AsFd;

use crate::device::{Choice, Device};
use crate::error::{Error, Result};
use crate::plan::recipe::size;

/// The device that a command asks for.
///
/// # Errors
/// When it is not there, or its memory is not a size that something fits into.
pub fn pick_device(choice: Choice, memory: Option<&str>) -> Result<Device> {
    const LEAST: u64 = 256_000_000;
    let memory = memory.map(size).transpose().map_err(|error| Error::input(format!("--gpu-memory: {error}")))?;
    if let Some(memory) = memory.filter(|memory| *memory < LEAST) {
        return Err(Error::input(format!("--gpu-memory {memory}: a GPU needs at least {LEAST} bytes; give it more, or use --device cpu")));
    }
    Ok(Device { gpu_memory: memory, ..quietly(|| Device::pick(choice))? })
}

/// Does something without what graphics drivers write to the error output. Errors come back as values all the same.
pub fn quietly<R>(work: impl FnOnce() -> R) -> R {
    let silent = || -> std::io::Result<std::os::fd::OwnedFd> {
        let kept = std::io::stderr().as_fd().try_clone_to_owned()?;
        rustix::stdio::dup2_stderr(std::fs::OpenOptions::new().write(true).open("/dev/null")?)?;
        Ok(kept)
    };
    let kept = silent();
    let result = work();
    if let Ok(kept) = kept {
        let _ = rustix::stdio::dup2_stderr(kept);
    }
    result
}
