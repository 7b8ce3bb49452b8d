//! `compress` and `plan`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use crate::allocation::{self, Target};
use crate::checkpoint::Checkpoint;
use crate::cli::Invocation;
use crate::cli::arguments::Compress;
use crate::cli::device::pick_device;
use crate::cli::progress::{command, resumable, works_in};
use crate::cli::text::{say, say_json, table};
use crate::compress::destination::{Claim, Destination};
use crate::compress::estimate::{Estimate, estimate};
use crate::compress::work::Work;
use crate::compress::{Job, Prepared, QualityOptions, manifest, read_report};
use crate::device::Device;
use crate::embedded::is_named;
use crate::error::{Error, Fault, Result, shown, shown_path};
use crate::evaluate::{Bos, Protocol, Quality};
use crate::formats::targets::{Engine, loaders};
use crate::gate::{Gate, Verdict};
use crate::plan::recipe::{OneOrMany, Override, Recipe, Skip, size};
use crate::report::{Allocated, Report, bytes};
use crate::run::Run;
use crate::statistics::shown as figure;
use crate::storage::write_whole;

/// What the model that the program carries is called in its card.
const EMBEDDED: &str = "drawknife-demo";

/// Runs the verb.
///
/// # Errors
/// Whatever went wrong, in one line.
pub fn run(arguments: &Compress, invocation: &Invocation, dry_run: bool) -> Result<()> {
    let device = pick_device(arguments.device, arguments.gpu_memory.as_deref())?;
    let recipe = recipe(arguments, invocation)?;
    let embedded = embedded(arguments)?;
    let built_in = embedded.as_ref().map(|folder| folder.path().join(EMBEDDED));
    let model = built_in.as_deref().or(arguments.model.as_deref()).unwrap_or(Path::new("."));
    let quality = quality(arguments)?;
    let job = Job {
        model: model.to_path_buf(),
        recipe,
        engine: arguments.engine,
        quality,
        allocation: None,
        command: command(),
        beside: Vec::new(),
        memory: arguments.memory.as_deref().map(size).transpose()?,
    };
    let seed = job.recipe.calibration.seed;
    let run = Run { device: &device, seed, observer: &invocation.progress, scratch: &std::env::temp_dir() };
    if !dry_run {
        return compress(job, arguments, invocation, &run, embedded.is_some());
    }
    show(job, arguments, invocation, &run, embedded.is_some())
}

/// Shows what would happen.
fn show(mut job: Job, arguments: &Compress, invocation: &Invocation, run: &Run<'_>, embedded: bool) -> Result<()> {
    if let Some(wish) = job.recipe.allocate.take() {
        allocation::allocate(&mut job, &wish, None, run)?;
    }
    let preparing = Instant::now();
    let mut prepared = Prepared::new(job)?;
    let found = estimate(&prepared, preparing.elapsed().as_secs_f64(), run)?;
    prepared.needed.memory_bytes = found.memory_bytes;
    let resolved = prepared.plan.resolved(&prepared.job.recipe);
    if let Some(path) = arguments.output.as_ref().filter(|path| path.extension().is_some_and(|end| end == "toml")) {
        let text = toml::to_string(&resolved).map_err(|error| Error::run(format!("recipe: {error}")))?;
        write_whole(path, text.as_bytes())?;
    }
    if invocation.json {
        say_json(&plan_json(&prepared, &resolved, found));
    } else if !invocation.quiet {
        show_plan(&prepared, run.device, invocation, embedded);
        let how = if found.tried { "by a trial on the first block" } else { "roughly, by counting operations" };
        say(&format!("time      about {} ({how})", duration(found.seconds)));
    }
    Ok(())
}

/// Compresses, or goes on where an earlier run was cut off.
fn compress(job: Job, arguments: &Compress, invocation: &Invocation, run: &Run<'_>, embedded: bool) -> Result<()> {
    let started = Instant::now();
    let claim = Claim { replace: arguments.force, restart: arguments.restart, ..Claim::default() };
    let mut destination = Destination::claim(&target(arguments)?, &job.model, claim)?;
    let target = destination.target().to_path_buf();
    works_in(&destination.work.path);
    let scratch = scratch(&destination.work.path);
    let run = &Run { scratch: &scratch, ..*run };
    let dependencies = manifest::dependencies(&job, &Checkpoint::open(&job.model)?, run.device)?;
    if destination.begin(&dependencies)? {
        return finished_before(&target, invocation);
    }
    let resumed = destination.work.resumes();
    let prepared = match prepare(job, &destination.work, run) {
        Ok(prepared) => prepared,
        Err(error) => return Err(resumable(destination.give_up(error), &target)),
    };
    if !invocation.json && !invocation.quiet {
        show_plan(&prepared, run.device, invocation, embedded);
        if resumed {
            let done = destination.work.done();
            say(&format!("resume    {} blocks and {} layers were done before", done.blocks.len(), done.layers.len()));
        }
    }
    let report = prepared.run(destination, &dependencies, run).map_err(|error| resumable(error, &target))?;
    let seconds = started.elapsed().as_secs_f64();
    if invocation.json {
        say_json(
            &json!({"output": target, "report_file": target.join("report.json"), "seconds": seconds, "resumed": resumed, "report": report}),
        );
    } else {
        show_result(&report, &target, seconds, invocation);
    }
    check_gates(&report.gates)
}

/// Where what outgrows memory lies: in the temporary folder, but beside the output where that folder lies in memory itself and nobody
/// has named one.
fn scratch(work: &Path) -> PathBuf {
    const IN_MEMORY: i128 = 0x0102_1994;
    let folder = std::env::temp_dir();
    let in_memory = rustix::fs::statfs(&folder).is_ok_and(|system| i128::from(system.f_type) == IN_MEMORY);
    if in_memory && std::env::var_os("TMPDIR").is_none() { work.to_path_buf() } else { folder }
}

/// Everything before the work: a target is spread over the layers, inputs are checked, and limits held against what is needed.
fn prepare(mut job: Job, work: &Work, run: &Run<'_>) -> Result<Prepared> {
    if let Some(wish) = job.recipe.allocate.take() {
        allocation::allocate(&mut job, &wish, Some(work), run)?;
    }
    let prepared = Prepared::new(job)?;
    prepared.needed.fits(prepared.job.memory, &prepared.plan)?;
    Ok(prepared)
}

/// Says that there was nothing left to do but to tidy up.
fn finished_before(target: &Path, invocation: &Invocation) -> Result<()> {
    let report = read_report(&target.join("report.json"))?;
    if invocation.json {
        say_json(&json!({"output": target, "report_file": target.join("report.json"), "seconds": 0.0, "resumed": true, "report": report}));
    } else {
        say(&format!("wrote     {} (the run before had finished it)", shown_path(target)));
    }
    Ok(())
}

/// The built-in model in a temporary folder, when no model is given.
fn embedded(arguments: &Compress) -> Result<Option<tempfile::TempDir>> {
    if arguments.model.as_deref().is_some_and(|model| !is_named(model)) {
        return Ok(None);
    }
    let folder = tempfile::tempdir().map_err(|error| Error::run(format!("temporary folder: {error}")))?;
    crate::embedded::write(&folder.path().join(EMBEDDED))?;
    Ok(Some(folder))
}

/// Where the output goes; the built-in model goes to the first free name in the current folder.
fn target(arguments: &Compress) -> Result<PathBuf> {
    match (&arguments.output, &arguments.model) {
        (Some(output), _) => Ok(output.clone()),
        (None, Some(model)) if !is_named(model) => Err(Error::input("no destination; give one with -o FOLDER")),
        (None, _) => {
            let names = std::iter::once("drawknife-demo".to_string()).chain((2..).map(|number| format!("drawknife-demo-{number}")));
            let free = names.map(PathBuf::from).find(|name| std::fs::symlink_metadata(name).is_err());
            free.ok_or_else(|| Error::input("no free name for the output; give one with -o FOLDER"))
        }
    }
}

/// The recipe with what the flags change in it.
fn recipe(arguments: &Compress, invocation: &Invocation) -> Result<Recipe> {
    let mut recipe = match (&arguments.recipe, &arguments.preset) {
        (Some(path), _) => Recipe::open(path)?,
        (None, None) if let Some(kind) = &arguments.gguf_type => {
            Recipe::parse(&format!("version = 1\n[[stage]]\nmethod = \"k-quant\"\ntype = {:?}\n", kind.to_lowercase()))?
        }
        (None, preset) => Recipe::preset(preset.as_deref().unwrap_or(crate::plan::recipe::PRESETS[0].name))?,
    };
    let calibration = &mut recipe.calibration;
    if let Some(source) = &arguments.calibration {
        calibration.source = OneOrMany(vec![source.clone()]);
    }
    calibration.samples = arguments.samples.unwrap_or(calibration.samples);
    calibration.all_experts |= arguments.all_experts;
    calibration.seq = arguments.seq.or(calibration.seq);
    calibration.seed = invocation.seed.unwrap_or(calibration.seed);
    if arguments.gguf_type.is_some() {
        // Also where every layer falls back to a type that other formats know.
        recipe.export.format = Some(OneOrMany(vec!["gguf".into()]));
    }
    if let Some(format) = &arguments.format {
        recipe.export.format = Some(OneOrMany(format.split(',').map(|name| name.trim().to_owned()).collect()));
    }
    recipe.export.gguf_embeddings_8 |= arguments.gguf_embeddings_8;
    recipe.skip.extend(arguments.skip.iter().map(|pattern| Skip { pattern: pattern.clone() }));
    for keep in &arguments.keep {
        let wrong = || Error::input(format!("--keep {keep}: use GLOB=BITS with 2 to 8 bits, or 16 to leave the layers as they are"));
        let (pattern, bits) = keep.rsplit_once('=').ok_or_else(wrong)?;
        let bits: u8 = bits.parse().map_err(|_| wrong())?;
        if !(2..=8).contains(&bits) && bits != 16 {
            return Err(wrong());
        }
        recipe.overrides.push(Override { pattern: pattern.into(), bits: Some(bits), sparsity: None });
    }
    for gate in &arguments.gate {
        let wrong = || Error::input(format!("--gate {gate}: use kld_mean=LIMIT or ppl_ratio=LIMIT"));
        let (name, limit) = gate.split_once("<=").or_else(|| gate.split_once('=')).ok_or_else(wrong)?;
        let limit = limit.trim().parse::<f64>().map_err(|_| wrong())?;
        match name.trim() {
            "kld_mean" => recipe.gate.kld_mean = Some(limit),
            "ppl_ratio" => recipe.gate.ppl_ratio = Some(limit),
            _ => return Err(wrong()),
        }
    }
    wish(arguments, &mut recipe)?;
    recipe.check()?;
    if !recipe.gate.is_empty() && arguments.no_eval {
        return Err(Error::input("a gate needs the measurement that --no-eval leaves out"));
    }
    Ok(recipe)
}

/// The target of the flags, which replaces that of the recipe.
fn wish(arguments: &Compress, recipe: &mut Recipe) -> Result<()> {
    let targets = (arguments.target_bpw, arguments.target_size.clone(), arguments.target_sparsity);
    if targets != (None, None, None) {
        let wish = recipe.allocate.get_or_insert_default();
        (wish.target_bpw, wish.target_size, wish.target_sparsity) = targets;
    }
    match &mut recipe.allocate {
        Some(wish) => {
            wish.min_bits = arguments.min_bits.or(wish.min_bits);
            wish.sensitivity = arguments.sensitivity.clone().or(wish.sensitivity.take());
            Target::of(wish).map(drop)
        }
        None if arguments.min_bits.is_some() || arguments.sensitivity.is_some() => {
            Err(Error::input("--min-bits and --sensitivity belong to a target; give --target-bpw, --target-size or --target-sparsity"))
        }
        None => Ok(()),
    }
}

fn quality(arguments: &Compress) -> Result<Option<QualityOptions>> {
    if arguments.no_eval {
        return Ok(None);
    }
    for (name, value) in [("--eval-tokens", arguments.eval_tokens), ("--eval-seq", arguments.eval_seq)] {
        if value < 2 {
            return Err(Error::input(format!("{name} is {value}, it must be at least 2, like 512")));
        }
    }
    let seq = arguments.eval_seq.min(arguments.eval_tokens);
    let protocol = Protocol { seq, max_tokens: Some(arguments.eval_tokens), bos: Bos::Once, second_half: false };
    Ok(Some(QualityOptions { text: arguments.eval_text.clone(), protocol }))
}

fn show_plan(prepared: &Prepared, device: &Device, invocation: &Invocation, embedded: bool) {
    let (facts, size, plan) = (&prepared.facts, &prepared.size, &prepared.plan);
    let name = if embedded { "built-in".to_string() } else { shown_path(&prepared.job.model) };
    let shards = if facts.shards == 1 { "1 file".to_string() } else { format!("{} files", facts.shards) };
    say(&format!(
        "model     {name} · {} · {:.1} M parameters · {} tensors in {shards}",
        facts.model_type,
        facts.parameters as f64 / 1e6,
        facts.tensors
    ));
    let stages: Vec<String> = plan.stages.iter().map(|stage| format!("{} ({})", stage.name, options(&stage.method.options()))).collect();
    say(&format!("plan      {} -> {}", stages.join(", then "), formats(prepared)));
    let mut kinds: Vec<(String, usize)> = Vec::new();
    for layer in &plan.layers {
        let kind = layer.outlined.storage.map_or("as they are".to_string(), |storage| storage.to_string());
        match kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, count)) => *count += 1,
            None => kinds.push((kind, 1)),
        }
    }
    let kinds: Vec<String> = kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    say(&format!("layers    {} of {} tensors: {}", facts.linears, facts.tensors, kinds.join(", ")));
    if let Some(allocation) = &prepared.job.allocation {
        allocation_lines(allocation).iter().for_each(|line| say(line));
    }
    say(&format!(
        "size      {} -> {} · {:.3} bits per weight in compressed layers, {:.3} in the whole file",
        bytes(size.bytes_before),
        bytes(size.bytes_after),
        size.bits_per_weight,
        8.0 * size.bytes_after as f64 / (facts.parameters.max(1) * prepared.exports.len().max(1) as u64) as f64
    ));
    say(&format!(
        "needs     about {} of memory{} · {} of disk · {}",
        bytes(prepared.needed.memory_bytes),
        if prepared.needed.singly { ", experts one at a time" } else { "" },
        bytes(size.bytes_after),
        device.name
    ));
    for export in &prepared.exports {
        let of = |(engine, loads): &(Engine, Result<Option<String>, String>)| match loads {
            Ok(None) => format!("{} yes", engine.name()),
            Ok(Some(how)) => format!("{} {how}", engine.name()),
            Err(_) => format!("{} no", engine.name()),
        };
        let loads: Vec<String> = loaders(export.format, &export.layers).iter().map(of).collect();
        say(&format!("loads     {}: {}", export.format.name, loads.join(" · ")));
    }
    if let Some(packed) = &prepared.calibration {
        let counts = &packed.counts;
        let sources = counts.sources.join(", ");
        say(&format!(
            "calib     {sources} · {} documents, {} tokens -> {} windows, {} tokens used, {} not needed",
            counts.documents, counts.tokens, counts.windows, counts.tokens_used, counts.tokens_unused
        ));
    }
    for note in &prepared.notes {
        say(&format!("note      {note}"));
    }
    if invocation.verbose {
        for layer in &plan.layers {
            let storage = layer.outlined.storage.map_or("as it is".to_string(), |storage| storage.to_string());
            say(&format!("  {} {:?} {storage}", shown(&layer.outlined.name), layer.outlined.shape));
        }
    }
}

/// How a target was spread, and what more would buy.
fn allocation_lines(allocation: &Allocated) -> Vec<String> {
    let counts = allocation.counts.iter().map(|(label, count)| format!("{count} layers {label}")).collect::<Vec<_>>().join(", ");
    let reached = match allocation.reached {
        share if share < 1.0 => format!("{:.1} % zeros", 100.0 * share),
        bits if bits <= 16.0 => format!("{bits:.3} bits per weight"),
        size => bytes(size as u64),
    };
    let how = if allocation.measured { "measured one by one" } else { "predicted" };
    let best = if allocation.optimal { "" } else { " (close to the best)" };
    let mut lines = vec![
        format!("allocate  {} -> {reached}{best}: {counts}", allocation.target),
        format!("          sum of the layers' divergences, {how}: {:.5} nats", allocation.predicted_kld),
    ];
    if let Some(next) = allocation.next_kld {
        let less = 100.0 * (1.0 - next / allocation.predicted_kld.max(f64::MIN_POSITIVE));
        lines.push(format!("          the next 0.1 bit per weight would bring it to {next:.5} ({less:.0} % less)"));
    }
    lines
}

/// Seconds as a person reads them.
fn duration(seconds: f64) -> String {
    match seconds {
        short if short < 90.0 => format!("{short:.1} s"),
        long if long < 5400.0 => format!("{:.0} min", long / 60.0),
        hours => format!("{:.1} h", hours / 3600.0),
    }
}

fn formats(prepared: &Prepared) -> String {
    prepared.exports.iter().map(|export| export.format.name).collect::<Vec<_>>().join(", ")
}

fn options(options: &toml::Table) -> String {
    options.iter().map(|(key, value)| format!("{key} {}", value.to_string().trim_matches('"'))).collect::<Vec<_>>().join(", ")
}

fn plan_json(prepared: &Prepared, resolved: &Recipe, found: Estimate) -> serde_json::Value {
    let layers: Vec<_> = prepared
        .plan
        .layers
        .iter()
        .map(|layer| json!({"name": layer.outlined.name, "shape": layer.outlined.shape, "storage": layer.outlined.storage.map(|storage| storage.to_string())}))
        .collect();
    json!({
        "model": prepared.facts, "recipe": resolved, "seconds": found.seconds, "tried": found.tried, "allocation": prepared.job.allocation, "format": formats(prepared), "size": prepared.size,
        "memory_bytes": prepared.needed.memory_bytes, "calibration": prepared.calibration.as_ref().map(|packed| &packed.counts),
        "layers": layers, "notes": prepared.notes,
    })
}

fn show_result(report: &Report, target: &Path, seconds: f64, invocation: &Invocation) {
    if invocation.verbose {
        let mut rows = vec![["layer", "storage", "bits", "zeros", "weight error"].map(String::from).to_vec()];
        rows.extend(report.layers.iter().map(|layer| {
            vec![
                shown(&layer.name),
                layer.storage.clone(),
                format!("{:.2}", layer.bits_per_weight),
                format!("{:.4}", layer.zeros),
                format!("{:.2e}", layer.weight_error),
            ]
        }));
        table(&rows).iter().for_each(|line| say(line));
    }
    match (&report.quality, &report.evaluation) {
        (Some(quality), Some(evaluation)) => {
            say(&format!("quality   {} · {} windows of {} tokens, paired", evaluation.text, quality.windows, quality.seq));
            quality_table(quality).iter().for_each(|line| say(&format!("          {line}")));
        }
        _ => say("quality   not measured"),
    }
    say(&format!("wrote     {} ({}) · {seconds:.1} s", shown_path(target), bytes(report.size.bytes_after)));
    say(&format!("report    {}", shown_path(&target.join("report.html"))));
}

/// The quality of a model beside its reference.
pub fn quality_table(quality: &Quality) -> Vec<String> {
    let plus = |error: Option<f64>, digits: usize| error.map(|error| format!("± {}", figure(error, digits))).unwrap_or_default();
    let mut rows = vec![vec![
        "perplexity".to_string(),
        figure(quality.perplexity, 4),
        plus(quality.nll_stderr.map(|error| error * quality.perplexity), 4),
    ]];
    if let Some(against) = &quality.against {
        rows.push(vec!["perplexity of the original".into(), figure(against.reference_perplexity, 4)]);
        rows.push(vec!["ratio".into(), figure(against.perplexity_ratio, 4), plus(against.perplexity_ratio_stderr, 4)]);
        let bound = if against.kld_is_lower_bound { ", at least" } else { "" };
        rows.push(vec![format!("divergence, mean (nats){bound}"), format!("{:.5}", against.kld_mean), plus(against.kld_mean_stderr, 5)]);
        rows.push(vec![format!("divergence, 99th percentile{bound}"), format!("{:.5}", against.kld_p99), plus(against.kld_p99_stderr, 5)]);
        rows.push(vec![
            "same most likely token".into(),
            format!("{:.2} %", 100.0 * against.top1_agreement),
            plus(against.top1_agreement_stderr.map(|error| 100.0 * error), 2),
        ]);
    }
    table(&rows)
}

/// Ends with what the limits say, where they are not all kept.
fn check_gates(gates: &[Gate]) -> Result<()> {
    let told = |gate: &Gate| format!("gate {}: {}", gate.name, gate.sentence());
    let of = |verdict: Verdict| gates.iter().find(|gate| gate.verdict == verdict).map(told);
    match (of(Verdict::Fail), of(Verdict::Inconclusive)) {
        (Some(what), _) => Err(Error::new(Fault::Gate, format!("{what}; use more bits or a better method"))),
        (None, Some(what)) => Err(Error::new(Fault::Inconclusive, format!("{what}; measure more with --eval-tokens"))),
        (None, None) => Ok(()),
    }
}
