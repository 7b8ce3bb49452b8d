//! `sensitivity`.

use std::time::Duration;

use serde_json::json;

use crate::cli::Invocation;
use crate::cli::arguments::Sensitivity as Arguments;
use crate::cli::device::pick_device;
use crate::cli::text::{layer, say, say_json, table};
use crate::error::{Error, Fault, Result, shown_path};
use crate::run::Run;
use crate::sensitivity::file::{Candidate, Sensitivity};
use crate::sensitivity::schemes::Scheme;
use crate::sensitivity::{Options, Times, Windows, sensitivity};
use crate::subject::Subject;

/// Layers that are listed.
const LISTED: usize = 10;

/// Runs the verb.
///
/// # Errors
/// Whatever went wrong, in one line.
pub fn run(arguments: &Arguments, invocation: &Invocation) -> Result<()> {
    let device = pick_device(arguments.device, arguments.gpu_memory.as_deref())?;
    let scratch = std::env::temp_dir();
    let schemes = Scheme::parse_all(&arguments.schemes, &arguments.method)?;
    let subject = Subject::open(&arguments.model, &scratch)?;
    let text = Windows {
        source: arguments.calibration.clone(),
        samples: arguments.samples,
        seq: arguments.seq,
        seed: invocation.seed.unwrap_or(0),
    };
    let options = Options::new(&subject, schemes, &arguments.method, !arguments.quick, text)?;
    let run = Run { device: &device, seed: invocation.seed.unwrap_or(0), observer: &invocation.progress, scratch: &scratch };
    let measured = run.guarded(|| sensitivity(&subject, &options, Some(&arguments.output), &run));
    let (found, times) = measured.map_err(|error| stopped(error, arguments))?;
    if invocation.json {
        let mut object = serde_json::to_value(&found).map_err(|error| Error::run(error.to_string()))?;
        object["seconds"] = json!({"predicted": times.predicted.as_secs_f64(), "exact": times.exact.as_secs_f64()});
        say_json(&object);
        return Ok(());
    }
    if !invocation.quiet {
        show(&found, &options, times, invocation.verbose);
    }
    say(&format!("wrote     {}", shown_path(&arguments.output)));
    Ok(())
}

/// Says what a stop leaves: every block that was done.
fn stopped(error: Error, arguments: &Arguments) -> Error {
    if !matches!(error.fault, Fault::Interrupted(_) | Fault::Run | Fault::Full) {
        return error;
    }
    let done = Sensitivity::open(&arguments.output).map_or(0, |found| found.layers.len());
    if done == 0 && !matches!(error.fault, Fault::Interrupted(_)) {
        return error;
    }
    let error = if let Fault::Interrupted(_) = error.fault { error.file(&arguments.output) } else { error };
    error.advice(&format!("{done} layers are measured, the same command goes on from there"))
}

fn show(found: &Sensitivity, options: &Options, times: Times, all: bool) {
    let identity = &found.identity;
    say(&format!("text      {} · {} windows of {} tokens", identity.source, identity.windows, identity.seq));
    say(&format!("layers    {} · schemes {} · integers by {}", found.layers.len(), found.schemes.join(", "), identity.method));
    say("");
    let mut rows = vec![
        ["scheme", "bits", "weight error", "layer error", "divergence: median", "worst", "sum", "worst layer"].map(String::from).to_vec(),
    ];
    rows.extend(found.schemes.iter().filter_map(|scheme| overview(found, scheme)));
    table(&rows).iter().for_each(|line| say(line));
    say(if options.exact {
        "divergence in nats, one layer compressed at a time"
    } else {
        "divergence in nats, predicted from slopes of the loss"
    });
    say("");
    layers(found, all);
    if let Some(of) = &found.rank_correlation {
        let within = |list: &[(String, f64)]| list.iter().map(|(_, of)| format!("{of:.2}")).collect::<Vec<String>>();
        let row = |name: &str, all: f64, within: Vec<String>| [vec![name.to_string(), format!("{all:.3}")], within].concat();
        let head = ["rank correlation with exact", "all"].into_iter().map(String::from).chain(found.schemes.iter().cloned()).collect();
        let rows = [
            head,
            row("  Σ |gradient · change|", of.gradient, within(&of.gradient_by_scheme)),
            row("  predicted divergence", of.predicted_kld, within(&of.predicted_kld_by_scheme)),
            row("  weight error", of.weight_error, Vec::new()),
        ];
        say("");
        table(&rows).iter().for_each(|line| say(line));
        say("Spearman's correlation, over all layers and schemes and among the layers of one scheme");
    }
    let seconds = |time: Duration| format!("{:.1} s", time.as_secs_f64());
    if options.exact {
        let share = times.predicted.as_secs_f64() / times.exact.as_secs_f64().max(1e-9);
        say(&format!("time      predictions {} · exact {} · {:.0} % of it", seconds(times.predicted), seconds(times.exact), 100.0 * share));
    } else {
        say(&format!("time      {}", seconds(times.predicted)));
    }
}

fn candidates<'a>(found: &'a Sensitivity, scheme: &'a str) -> impl Iterator<Item = (&'a str, &'a Candidate, usize)> {
    found.layers.iter().filter_map(move |layer| {
        let candidate = layer.candidates.iter().find(|candidate| candidate.scheme == scheme)?;
        Some((layer.name.as_str(), candidate, layer.shape[0] * layer.shape[1]))
    })
}

fn overview(found: &Sensitivity, scheme: &str) -> Option<Vec<String>> {
    let mut costs: Vec<f64> = candidates(found, scheme).map(|(_, candidate, _)| candidate.cost()).collect();
    costs.sort_by(f64::total_cmp);
    let worst = candidates(found, scheme).max_by(|a, b| a.1.cost().total_cmp(&b.1.cost()))?;
    let mean =
        |of: &dyn Fn(&Candidate) -> f64| candidates(found, scheme).map(|(_, candidate, _)| of(candidate)).sum::<f64>() / costs.len() as f64;
    let bits: f64 = candidates(found, scheme).map(|(_, candidate, _)| candidate.bits as f64).sum();
    let weights: f64 = candidates(found, scheme).map(|(.., weights)| weights as f64).sum();
    Some(vec![
        scheme.into(),
        format!("{:.2}", bits / weights),
        format!("{:.2e}", mean(&|candidate| candidate.weight_error)),
        format!("{:.2e}", mean(&|candidate| candidate.layer_error.unwrap_or(0.0))),
        format!("{:.6}", costs[costs.len() / 2]),
        format!("{:.6}", costs[costs.len() - 1]),
        format!("{:.5}", costs.iter().sum::<f64>()),
        layer(worst.0, 28),
    ])
}

/// The most sensitive layers, by what the narrowest integers cost; the first scheme where there are none.
fn layers(found: &Sensitivity, all: bool) {
    let Some(first) = found.schemes.first() else { return };
    let mut order: Vec<(&str, &Candidate, usize)> = candidates(found, first).collect();
    order.sort_by(|a, b| b.1.cost().total_cmp(&a.1.cost()));
    let kept = if all { order.len() } else { LISTED.min(order.len()) };
    let shown: Vec<&String> = found.schemes.iter().take(5).collect();
    let head = std::iter::once(format!("the {kept} most sensitive layers")).chain(shown.iter().map(|scheme| (*scheme).clone()));
    let mut rows = vec![head.collect::<Vec<_>>()];
    for (name, ..) in &order[..kept] {
        let cost = |scheme: &&String| {
            let known = found.layer(name).and_then(|layer| layer.candidates.iter().find(|candidate| candidate.scheme == **scheme));
            known.map_or("-".into(), |candidate| match candidate.kld_stderr {
                Some(error) => format!("{:.6} ±{error:.6}", candidate.cost()),
                None => format!("{:.6}", candidate.cost()),
            })
        };
        // Errors would make the table wider than a screen.
        let cells = shown.iter().map(cost).map(|cell| if shown.len() > 2 { cell.split(" ±").next().unwrap_or("").into() } else { cell });
        rows.push(std::iter::once(layer(name, 40)).chain(cells).collect());
    }
    table(&rows).iter().for_each(|line| say(line));
}
