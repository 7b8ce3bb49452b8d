//! `presets` and `doctor`: what there is.

use serde_json::json;

use crate::cli::Invocation;
use crate::cli::arguments::Presets;
use crate::cli::text::{say, say_json};
use crate::compress::destination::free_bytes;
use crate::device::{Device, simd};
use crate::error::Result;
use crate::formats::FORMATS;
use crate::methods::METHODS;
use crate::plan::recipe::{PRESETS, Recipe};
use crate::report::bytes;

/// Lists presets, methods and formats, or shows one recipe.
///
/// # Errors
/// When the preset is unknown.
pub fn presets(arguments: &Presets, invocation: &Invocation) -> Result<()> {
    if let Some(name) = &arguments.name {
        let recipe = Recipe::preset(name)?;
        match PRESETS.iter().find(|preset| preset.name == name) {
            Some(preset) if !invocation.json => say(preset.recipe.trim_end()),
            _ => say_json(&recipe),
        }
        return Ok(());
    }
    if invocation.json {
        let presets: Vec<_> =
            PRESETS.iter().map(|preset| json!({"name": preset.name, "about": preset.about, "recipe": preset.recipe})).collect();
        say_json(&presets);
        return Ok(());
    }
    say("Presets (compress --preset NAME; `drawknife presets NAME` prints the recipe to start from):");
    PRESETS.iter().for_each(|preset| say(&format!("  {:<10} {}", preset.name, preset.about)));
    say("Methods ([[stage]] method = \"NAME\"):");
    METHODS.iter().for_each(|entry| say(&format!("  {:<18} {} ({})", entry.name, entry.about, entry.source)));
    say("Formats (compress --format NAME):");
    FORMATS.iter().for_each(|format| say(&format!("  {:<18} {}", format.name, format.about)));
    Ok(())
}

/// Shows what the machine offers.
///
/// # Errors
/// When a file system cannot be asked.
pub fn doctor(invocation: &Invocation) -> Result<()> {
    let device = Device::cpu();
    let (here, temporary) = (std::path::PathBuf::from("."), std::env::temp_dir());
    let (total, available) = memory();
    let (free_here, free_temporary) = (free_bytes(&here)?, free_bytes(&temporary)?);
    if invocation.json {
        say_json(&json!({
            "version": env!("CARGO_PKG_VERSION"), "device": device.name, "simd": simd(), "threads": rayon::current_num_threads(),
            "memory_bytes": total, "memory_available_bytes": available, "disk_free_bytes": free_here,
            "temporary_folder": temporary, "temporary_free_bytes": free_temporary, "gpu_support": cfg!(feature = "gpu"),
        }));
        return Ok(());
    }
    say(&format!("drawknife  {}", env!("CARGO_PKG_VERSION")));
    say(&format!("compute    {}", device.name));
    let gpu = if cfg!(feature = "gpu") { "used with --device gpu" } else { "not used: this program was built without GPU support" };
    say(&format!("gpu        {gpu}"));
    say(&format!("memory     {} of {} available", bytes(available), bytes(total)));
    say(&format!(
        "disk       {} free here, {} free in {} (hidden states go there when they outgrow memory)",
        bytes(free_here),
        bytes(free_temporary),
        temporary.display()
    ));
    Ok(())
}

/// Total and available memory in bytes; 0 where the system does not tell.
fn memory() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().nth(1)).and_then(|kilobytes| kilobytes.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    (field("MemTotal:"), field("MemAvailable:"))
}
