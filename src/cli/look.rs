//! `presets` and `doctor`: what there is.

use serde_json::json;

use crate::cli::Invocation;
use crate::cli::arguments::{Doctor, Presets};
use crate::cli::device::quietly;
use crate::cli::text::{say, say_json};
use crate::compress::destination::free_bytes;
use crate::device::{Adapter, Choice, Device, adapters, simd};
use crate::error::{Error, Result};
use crate::formats::FORMATS;
use crate::kernels::SHADERS;
use crate::kernels::linear::units::Units;
use crate::kernels::self_test::CHECKS;
use crate::memory;
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

/// Seconds for which the kernels of a GPU are compared with their twins.
const LOOK_SECONDS: f64 = 2.0;

/// Shows what the machine offers, and has the kernels of its first GPU compared with their twins for two seconds, or those of all
/// GPUs to the end.
///
/// # Errors
/// When a file system cannot be asked, or a GPU computes something wrong.
pub fn doctor(arguments: &Doctor, invocation: &Invocation) -> Result<()> {
    let device = Device::cpu();
    let (here, temporary) = (std::path::PathBuf::from("."), std::env::temp_dir());
    let [total, available] = [memory::total(), memory::available()].map(Option::unwrap_or_default);
    let (free_here, free_temporary) = (free_bytes(&here)?, free_bytes(&temporary)?);
    let adapters = quietly(adapters);
    let (count, seconds) = if arguments.thorough { (adapters.len(), f64::INFINITY) } else { (1, LOOK_SECONDS) };
    let examined: Vec<Examined> = adapters.iter().take(count).map(|adapter| examine(adapter.number, seconds)).collect();
    if invocation.json {
        say_json(&json!({
            "version": env!("CARGO_PKG_VERSION"), "device": device.name, "simd": simd(), "threads": rayon::current_num_threads(),
            "memory_bytes": total, "memory_available_bytes": available, "disk_free_bytes": free_here,
            "temporary_folder": temporary, "temporary_free_bytes": free_temporary, "gpu_support": cfg!(feature = "gpu"),
            "adapters": adapters, "self_test": examined.first(), "self_tests": examined,
        }));
    } else {
        say(&format!("drawknife  {}", env!("CARGO_PKG_VERSION")));
        say(&format!("compute    {}", device.name));
        show_adapters(&adapters);
        for examined in &examined {
            say(&format!("self-test  {examined}"));
        }
        say(&format!("memory     {} of {} available", bytes(available), bytes(total)));
        say(&format!(
            "disk       {} free here, {} free in {} (hidden states go there when they outgrow memory)",
            bytes(free_here),
            bytes(free_temporary),
            temporary.display()
        ));
    }
    match examined.into_iter().find_map(|examined| Some((examined.adapter, examined.failure?))) {
        Some((adapter, failure)) => Err(Error::run(format!("gpu:{adapter}: {failure}; use --device cpu"))),
        None => Ok(()),
    }
}

fn show_adapters(adapters: &[Adapter]) {
    if adapters.is_empty() {
        let why = if cfg!(feature = "gpu") {
            "none that Vulkan knows; --device auto is the processor"
        } else {
            "not used: this program was built without GPU support"
        };
        say(&format!("gpu        {why}"));
    }
    for adapter in adapters {
        let kind = if adapter.software { "software, for tests: only with --device gpu" } else { &adapter.kind };
        say(&format!("gpu:{:<6} {} ({kind}; {}, {})", adapter.number, adapter.name, adapter.backend, adapter.driver));
        let units = if adapter.matrix_units.is_empty() { "no matrix units".into() } else { adapter.matrix_units.join(", ") };
        let memory = adapter.memory_bytes.map_or_else(|| "memory of unknown size".into(), |memory| format!("{} of memory", bytes(memory)));
        say(&format!(
            "           {memory}, bindings of {}, buffers of {}, {} bindings, {} threads and {} a workgroup, subgroups of {} to {}, {}, {units}",
            bytes(adapter.binding_bytes),
            bytes(adapter.buffer_bytes),
            adapter.bindings,
            adapter.workgroup_threads,
            bytes(adapter.workgroup_bytes.into()),
            adapter.subgroups[0],
            adapter.subgroups[1],
            if adapter.half { "16-bit floats" } else { "no 16-bit floats" },
        ));
    }
}

/// What the self-test of a GPU found.
#[derive(Debug, serde::Serialize)]
struct Examined {
    adapter: usize,
    comparisons: usize,
    shaders: usize,
    /// Those that this adapter can run.
    kernels: usize,
    seconds: f64,
    failure: Option<String>,
}

impl std::fmt::Display for Examined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.failure {
            Some(failure) => write!(f, "gpu:{}: FAILED: {failure}", self.adapter),
            None => {
                let Self { adapter, shaders, kernels, comparisons, seconds, .. } = self;
                write!(
                    f,
                    "gpu:{adapter}: {shaders} of {kernels} kernels agree with the processor in {comparisons} comparisons ({seconds:.1} s)"
                )?;
                if shaders < kernels { write!(f, "; for the others two seconds were too short, see --thorough") } else { Ok(()) }
            }
        }
    }
}

/// Compares kernels of an adapter with their twins until the time is over.
fn examine(number: usize, seconds: f64) -> Examined {
    let start = std::time::Instant::now();
    let mut examined = Examined { adapter: number, comparisons: 0, shaders: 0, kernels: SHADERS.len(), seconds: 0.0, failure: None };
    match quietly(|| Device::pick(Choice::Gpu(number))) {
        Err(error) => examined.failure = Some(error.to_string()),
        Ok(Device { gpu: None, .. }) => {}
        Ok(Device { gpu: Some(gpu), .. }) => {
            // What needs matrix units runs only where there are some.
            let idle = if Units::of(&gpu).is_none() { "product_units" } else { "" };
            examined.kernels -= usize::from(!idle.is_empty());
            for check in CHECKS.iter().take_while(|_| start.elapsed().as_secs_f64() < seconds) {
                match (check.run)(&gpu) {
                    Err(error) => examined.failure = Some(error.to_string()),
                    Ok(found) => {
                        examined.shaders += check.shaders.iter().filter(|shader| **shader != idle).count();
                        examined.comparisons += found.len();
                        if let Some(wrong) = found.iter().find(|found| !found.agrees()) {
                            let what = format!("{}: {} is {:.1e} apart", check.shaders.join(" or "), wrong.case, wrong.difference);
                            examined.failure.get_or_insert(what);
                        }
                    }
                }
            }
        }
    }
    examined.seconds = start.elapsed().as_secs_f64();
    examined
}
