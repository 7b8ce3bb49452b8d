//! `export`.

use serde_json::json;

use crate::cli::Invocation;
use crate::cli::arguments::ExportTo;
use crate::cli::progress::{resumable, works_in};
use crate::cli::text::{say, say_json};
use crate::compress::convert::convert;
use crate::compress::destination::{Claim, Destination};
use crate::device::Device;
use crate::error::{Result, shown_path};
use crate::report::bytes;
use crate::run::Run;

/// Runs the verb.
///
/// # Errors
/// Whatever went wrong, in one line.
pub fn run(arguments: &ExportTo, invocation: &Invocation) -> Result<()> {
    let claim = Claim { replace: arguments.force, restart: arguments.restart, ..Claim::default() };
    let destination = Destination::claim(&arguments.output, &arguments.model, claim)?;
    let target = destination.target().to_path_buf();
    works_in(&destination.work.path);
    let device = Device::cpu();
    let run = Run { device: &device, seed: 0, observer: &invocation.progress, scratch: &std::env::temp_dir() };
    let converted = convert(&arguments.model, &arguments.format, destination, &run).map_err(|error| resumable(error, &target))?;
    if invocation.json {
        say_json(&json!({"output": target, "converted": converted}));
    } else {
        let (format, layers, size) = (converted.format, converted.layers, bytes(converted.bytes));
        say(&format!("wrote     {} · {format}, {layers} packed layers, {size}", shown_path(&target)));
    }
    Ok(())
}
