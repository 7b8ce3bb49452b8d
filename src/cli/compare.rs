//! `compare`.

use crate::cli::Invocation;
use crate::cli::arguments::Compare;
use crate::cli::device::pick_device;
use crate::cli::eval::{measured_on, protocol};
use crate::cli::text::{layer, say, say_json, short, table};
use crate::compare::{Comparison, Intervals, Row, compare};
use crate::error::Result;
use crate::evaluate::{Against, Text};
use crate::report::bytes;
use crate::run::Run;
use crate::statistics::shown as figure;
use crate::subject::Subject;

/// Layers whose errors are listed.
const LISTED: usize = 10;

/// Runs the verb.
///
/// # Errors
/// Whatever went wrong, in one line.
pub fn run(arguments: &Compare, invocation: &Invocation) -> Result<()> {
    let device = pick_device(arguments.device, arguments.gpu_memory.as_deref())?;
    let scratch = std::env::temp_dir();
    let subjects = arguments.models.iter().map(|path| Subject::open(path, &scratch)).collect::<Result<Vec<_>>>()?;
    let protocol = protocol(&arguments.measuring, &subjects[0].model()?)?;
    let text = Text::open(arguments.measuring.text.as_deref())?;
    let run = Run { device: &device, seed: invocation.seed.unwrap_or(0), observer: &invocation.progress, scratch: &scratch };
    let comparison = compare(&subjects, &text, protocol, arguments.layers, &run)?;
    if invocation.json {
        say_json(&comparison);
        return Ok(());
    }
    if !invocation.quiet {
        say(&measured_on(&text, protocol, comparison.windows, comparison.tokens));
    }
    show(&comparison, invocation.verbose);
    Ok(())
}

fn show(comparison: &Comparison, all: bool) {
    let mut rows =
        vec![["model", "size", "bits", "perplexity", "", "ratio", "", "divergence", "", "same top", ""].map(String::from).to_vec()];
    rows.extend(comparison.models.iter().map(overview));
    table(&rows).iter().for_each(|line| say(line));
    say("* no other model here is both smaller and closer to the first; ± is one standard error, paired");
    say("");
    let mut rows =
        vec![["divergence (nats)", "median", "90 %", "99 %", "99.9 %", "largest", "95 % of the mean"].map(String::from).to_vec()];
    rows.extend(comparison.models.iter().skip(1).filter_map(|row| Some(divergences(row, row.quality.against.as_ref()?))));
    table(&rows).iter().for_each(|line| say(line));
    let compared: Vec<&Row> = comparison.models.iter().filter(|row| !row.layers.is_empty()).collect();
    if compared.is_empty() {
        return;
    }
    say("");
    let worst = |name: &str| compared.iter().map(|row| row.layers[name]).fold(0.0, f64::max);
    let mut names: Vec<&String> = compared[0].layers.keys().collect();
    if !all {
        names.sort_by(|a, b| worst(b).total_cmp(&worst(a)));
        say(&format!("relative squared error of weights, the {} worst of {} layers (-v lists all)", LISTED.min(names.len()), names.len()));
        names.truncate(LISTED);
    }
    let head = std::iter::once("layer".to_string()).chain(compared.iter().map(|row| short(&row.name, 20)));
    let mut rows = vec![head.collect::<Vec<_>>()];
    rows.extend(names.iter().map(|name| {
        let errors = compared.iter().map(|row| format!("{:.2e}", row.layers[*name]));
        std::iter::once(layer(name, 50)).chain(errors).collect()
    }));
    table(&rows).iter().for_each(|line| say(line));
}

fn overview(row: &Row) -> Vec<String> {
    let plus = |error: Option<f64>, digits: usize| error.map(|error| format!("±{}", figure(error, digits))).unwrap_or_default();
    let quality = &row.quality;
    let mut cells = vec![
        format!("{} {}", if row.pareto { "*" } else { " " }, short(&row.name, 18)),
        bytes(row.weights.bytes),
        format!("{:.2}", row.bits_per_weight),
        figure(quality.perplexity, 2),
        plus(quality.nll_stderr.map(|error| error * quality.perplexity), 2),
    ];
    if let Some(against) = &quality.against {
        cells.extend([
            figure(against.perplexity_ratio, 4),
            plus(against.perplexity_ratio_stderr, 4),
            format!("{:.5}", against.kld_mean),
            plus(against.kld_mean_stderr, 5),
            format!("{:.1} %", 100.0 * against.top1_agreement),
            plus(against.top1_agreement_stderr.map(|error| 100.0 * error), 1),
        ]);
    }
    cells
}

fn divergences(row: &Row, against: &Against) -> Vec<String> {
    let bound = |bound: Option<f64>| bound.map_or("?".into(), |bound| format!("{bound:.5}"));
    let interval = |of: Intervals| format!("{} to {}", bound(of.kld_mean.low), bound(of.kld_mean.high));
    let interval = row.intervals.map_or("too few windows".into(), interval);
    let figures = [against.kld_median, against.kld_p90, against.kld_p99, against.kld_p999, against.kld_max];
    std::iter::once(format!("  {}", short(&row.name, 24))).chain(figures.map(|value| format!("{value:.5}"))).chain([interval]).collect()
}
