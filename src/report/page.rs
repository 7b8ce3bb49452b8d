//! A report as one page that needs nothing else, and as Markdown for a pull request. Both are made from the files of a run
//! alone, so that they can be made again.

use std::collections::BTreeMap;

use minijinja::{AutoEscape, Environment};
use serde_json::{Value, json};

use crate::error::{Error, Result, tamed};
use crate::gate::{Gate, Verdict};
use crate::model::arrivals::FEW_TOKENS;
use crate::report::bytes;
use crate::report::charts::{self, Grid, Line};

/// Blocks beyond which the cells of a heat map carry no numbers.
const NUMBERED_ROWS: usize = 64;

/// The files of a run.
#[derive(Debug, Clone, Default)]
pub struct Files {
    /// report.json.
    pub report: Value,
    /// timing.json; null where it is missing or left out.
    pub timing: Value,
    /// sensitivity.json; null where there was none.
    pub sensitivity: Value,
}

/// The page.
///
/// # Errors
/// When the files are not those of a run.
pub fn html(files: &Files) -> Result<String> {
    rendered("page.html", include_str!("page.html"), files, charts_of(files))
}

/// The Markdown.
///
/// # Errors
/// When the files are not those of a run.
pub fn markdown(files: &Files) -> Result<String> {
    rendered("page.md", include_str!("page.md"), files, json!({}))
}

fn rendered(name: &str, template: &str, files: &Files, charts: Value) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|name| if name.ends_with(".html") { AutoEscape::Html } else { AutoEscape::None });
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.add_filter("bytes", |value: f64| bytes(value as u64));
    environment.add_filter("fixed", |value: Option<f64>, digits: usize| {
        value.map_or("–".into(), |value| crate::statistics::shown(value, digits))
    });
    environment.add_filter("percent", |value: Option<f64>, digits: usize| {
        value.map_or("–".into(), |value| format!("{:.digits$} %", 100.0 * value))
    });
    environment.add_filter("sci", |value: Option<f64>| value.map_or("–".into(), |value| format!("{value:.2e}")));
    environment.add_filter("visible", |value: String| value.replace(' ', "␣").replace('\n', "↵").replace('\t', "⇥"));
    environment.add_filter("cell", |value: String| value.replace('|', "\\|").replace('<', "&lt;").replace(['\n', '\r'], " "));
    let wrong = |error: minijinja::Error| Error::run(format!("the report cannot be rendered: {error:#}"));
    environment.add_template(name, template).map_err(wrong)?;
    let context = json!({
        "report": files.report, "timing": files.timing, "charts": charts, "verdict": verdict(&files.report),
        "recipe": recipe(&files.report), "sensitive": sensitive(&files.sensitivity), "remarks": remarks(&files.report),
        "mixtures": mixtures(&files.report), "few": FEW_TOKENS,
    });
    // Names from a model may hold anything; escaping for HTML leaves what controls a terminal or turns text around.
    environment.get_template(name).and_then(|template| template.render(context)).map(|page| tamed(&page)).map_err(wrong)
}

/// The verdict on the limits of the recipe: its word, and a sentence on each limit.
fn verdict(report: &Value) -> Value {
    let gates: Vec<Gate> = array(&report["gates"]).iter().filter_map(|gate| serde_json::from_value(gate.clone()).ok()).collect();
    let (word, kind) = match gates.iter().map(|gate| gate.verdict).max() {
        None => ("no limit was set", "none"),
        Some(Verdict::Pass) => ("limits kept", "good"),
        Some(Verdict::Inconclusive) => ("limits undecided", "open"),
        Some(Verdict::Fail) => ("limits broken", "bad"),
    };
    json!({"word": word, "kind": kind, "lines": gates.iter().map(Gate::sentence).collect::<Vec<_>>()})
}

fn recipe(report: &Value) -> String {
    serde_json::from_value::<toml::Table>(without_nulls(&report["recipe"]))
        .ok()
        .and_then(|table| toml::to_string(&table).ok())
        .unwrap_or_default()
}

fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            object.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), without_nulls(value))).collect()
        }
        Value::Array(list) => list.iter().map(without_nulls).collect(),
        other => other.clone(),
    }
}

/// Everything unusual that happened to single layers and blocks.
fn remarks(report: &Value) -> Vec<Value> {
    let mut remarks = Vec::new();
    for layer in array(&report["layers"]) {
        remarks.extend(array(&layer["notes"]).iter().map(|note| json!({"place": layer["name"], "note": note})));
    }
    for block in array(&report["blocks"]) {
        for stage in array(&block["stages"]) {
            let place = format!("block {} · {}", block["block"], stage["method"].as_str().unwrap_or(""));
            remarks.extend(array(&stage["notes"]).iter().map(|note| json!({"place": place, "note": note})));
        }
    }
    remarks
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The number of a layer's block and the name of what it does there.
fn place(name: &str) -> (usize, String) {
    let number = name.split('.').find_map(|part| part.parse().ok()).unwrap_or(0);
    let last = name.rsplit('.').next().unwrap_or(name);
    (number, last.trim_end_matches("_proj").to_string())
}

/// Numbers of layers by block and projection; of experts, and whatever else there are several of, their mean.
fn grid(layers: &[Value], value: impl Fn(&Value) -> Option<f64>) -> Grid {
    let mut columns: Vec<String> = Vec::new();
    let mut rows: BTreeMap<usize, BTreeMap<String, [f64; 2]>> = BTreeMap::new();
    for layer in layers {
        let (block, column) = place(layer["name"].as_str().unwrap_or(""));
        if !columns.contains(&column) {
            columns.push(column.clone());
        }
        if let Some(value) = value(layer) {
            let cell = rows.entry(block).or_default().entry(column).or_default();
            *cell = [cell[0] + value, cell[1] + 1.0];
        }
    }
    let rows = rows.into_iter().map(|(block, cells)| {
        (block.to_string(), columns.iter().map(|column| cells.get(column).map(|[sum, count]| sum / count)).collect())
    });
    Grid { rows: rows.collect(), columns: columns.clone() }
}

/// The scheme by which layers are compared: of those that were measured the one of fewest bits, and whether it was measured.
fn sensitive(sensitivity: &Value) -> Value {
    let Some(layer) = array(&sensitivity["layers"]).first() else { return Value::Null };
    let candidates = array(&layer["candidates"]);
    let narrowest = candidates.iter().min_by(|a, b| a["bits"].as_f64().unwrap_or(0.0).total_cmp(&b["bits"].as_f64().unwrap_or(0.0)));
    narrowest.map_or(Value::Null, |of| {
        let (gradient, predicted) = (&sensitivity["rank_correlation"]["gradient"], &sensitivity["rank_correlation"]["predicted_kld"]);
        json!({"scheme": of["scheme"], "measured": of["kld"].is_number(), "gradient": gradient, "predicted": predicted, "identity": sensitivity["identity"]})
    })
}

fn cost(layer: &Value, scheme: &Value) -> Option<f64> {
    let candidate = array(&layer["candidates"]).iter().find(|candidate| candidate["scheme"] == *scheme)?;
    candidate["kld"].as_f64().or(candidate["predicted_kld"].as_f64())
}

fn charts_of(files: &Files) -> Value {
    let (report, layers) = (&files.report, array(&files.report["layers"]));
    let part = |class: &Value| {
        (class["class"].as_str().unwrap_or("").to_string(), class["before"].as_u64().unwrap_or(0), class["after"].as_u64().unwrap_or(0))
    };
    let parts: Vec<charts::Part> = array(&report["sizes"]).iter().map(part).collect();
    let scheme = &sensitive(&files.sensitivity)["scheme"];
    let (errors, title) = match scheme {
        Value::Null => {
            let calibrated = layers.iter().any(|layer| layer["layer_error"].is_number());
            let key = if calibrated { "layer_error" } else { "weight_error" };
            let title = if calibrated { "relative error of the layer's output" } else { "relative error of the weights" };
            (grid(layers, |layer| layer[key].as_f64()), title.to_string())
        }
        scheme => {
            let title = format!("divergence of the model with this layer alone at {}", scheme.as_str().unwrap_or(""));
            (grid(array(&files.sensitivity["layers"]), |layer| cost(layer, scheme)), title)
        }
    };
    let many = errors.rows.len() > NUMBERED_ROWS;
    let number = move |text: String| if many { String::new() } else { text };
    let bits = grid(layers, |layer| layer["bits_per_weight"].as_f64());
    json!({
        "sizes": charts::sizes(&parts),
        "sensitivity": charts::heat_map(&errors, &format!("By block and projection: {title}"), true, |value| number(format!("{value:.0e}"))),
        "sensitivity_title": title,
        "bits": charts::heat_map(&bits, "Bits per weight by block and projection", false, |value| number(format!("{value:.2}"))),
        "pareto": pareto(report),
        "depth": depth(report),
        "losses": losses(report),
        "histogram": histogram(report),
        "experts": charts::heat_map(&experts(report), "Calibration tokens by block and expert", true, |value| number(format!("{value}"))),
    })
}

/// Calibration tokens by block and expert.
fn experts(report: &Value) -> Grid {
    let rows = array(&report["blocks"]).iter().filter(|block| !array(&block["experts"]).is_empty());
    let rows: Vec<_> =
        rows.map(|block| (block["block"].to_string(), array(&block["experts"]).iter().map(Value::as_f64).collect::<Vec<_>>())).collect();
    let widest = rows.iter().map(|(_, cells)| cells.len()).max().unwrap_or(0);
    Grid { columns: (0..widest).map(|expert| expert.to_string()).collect(), rows }
}

/// By block with experts: its number, experts, least and most tokens, experts with too few, how evenly tokens went, and what was
/// kept.
fn mixtures(report: &Value) -> Vec<Value> {
    let of = |block: &Value| -> Option<Value> {
        let tokens: Vec<f64> = array(&block["experts"]).iter().filter_map(Value::as_f64).collect();
        let (least, most) = (tokens.iter().copied().reduce(f64::min)?, tokens.iter().copied().reduce(f64::max)?);
        let total: f64 = tokens.iter().sum();
        let spread: f64 =
            tokens.iter().map(|tokens| tokens / total.max(1.0)).filter(|share| *share > 0.0).map(|share| -share * share.ln()).sum();
        let even = if tokens.len() > 1 { spread / (tokens.len() as f64).ln() } else { 1.0 };
        let few = tokens.iter().filter(|tokens| **tokens < FEW_TOKENS as f64).count();
        let kept = array(&block["experts_kept"]).len();
        Some(json!({"block": block["block"], "experts": tokens.len(), "least": least, "most": most, "few": few, "even": even,
            "entropy": block["router_entropy"], "kept": (kept > 0).then_some(kept)}))
    };
    array(&report["blocks"]).iter().filter_map(of).collect()
}

/// What every target would reach, and where this one lies.
fn pareto(report: &Value) -> Option<String> {
    let allocation = &report["allocation"];
    let point = |pair: &Value| Some((pair[0].as_f64()?, pair[1].as_f64()?));
    let curve: Vec<(f64, f64)> = array(&allocation["curve"]).iter().filter_map(point).collect();
    let at = allocation["reached"].as_f64()?;
    let dot = |label: &str, value: &Value| value.as_f64().map(|value| Line { label: label.into(), points: vec![(at, value)], dots: true });
    let mut lines = vec![Line { label: "best reachable".into(), points: curve, dots: false }];
    lines.extend(dot("chosen", &allocation["predicted_kld"]));
    lines.extend(dot("measured", &report["quality"]["kld_mean"]));
    let axis = match at {
        at if at < 1.0 => "share of zeros",
        at if at <= 16.0 => "bits per weight",
        _ => "bytes",
    };
    charts::lines(&lines, "Divergence by size of the compressed layers", (axis, "divergence, nats"), true)
}

/// The error of every block's output.
fn depth(report: &Value) -> Option<String> {
    let blocks = array(&report["blocks"]);
    let point = |block: &Value, of: &Value| Some((block["block"].as_f64()?, of.as_f64()?));
    let after: Vec<(f64, f64)> = blocks.iter().filter_map(|block| point(block, &block["output_error"])).collect();
    let first = blocks.iter().filter_map(|block| point(block, &array(&block["stages"]).last()?["before"])).collect();
    let several = blocks.iter().any(|block| array(&block["stages"]).len() > 1);
    let mut lines = vec![Line { label: "after all stages".into(), points: after, dots: false }];
    if several {
        lines.push(Line { label: "before the last".into(), points: first, dots: false });
    }
    charts::lines(&lines, "Relative squared error of every block's output", ("block", "relative error"), true)
}

/// Loss by iteration of some blocks: the first, the last and those between at even distance, each beside its own start.
fn losses(report: &Value) -> Option<String> {
    const SHOWN: usize = 5;
    const POINTS: usize = 100;
    let curve = |block: &Value| {
        let curve = array(&block["stages"]).iter().map(|stage| array(&stage["curve"])).find(|curve| curve.len() > 1)?;
        let start = curve[0].as_f64().filter(|start| *start > 0.0)?;
        let step = curve.len().div_ceil(POINTS);
        let points = curve.iter().enumerate().step_by(step).filter_map(|(at, loss)| Some((at as f64, loss.as_f64()? / start)));
        Some(Line { label: format!("block {}", block["block"]), points: points.collect(), dots: false })
    };
    let all: Vec<Line> = array(&report["blocks"]).iter().filter_map(curve).collect();
    let shown = SHOWN.min(all.len());
    let chosen: Vec<Line> = (0..shown).map(|number| all[number * (all.len() - 1) / (shown - 1).max(1)].clone()).collect();
    charts::lines(&chosen, "Loss by iteration, over that at the start", ("iteration", "loss / loss at start"), false)
}

fn histogram(report: &Value) -> Option<String> {
    let bins: Vec<&Value> = array(&report["tokens"]["histogram"]).iter().collect();
    let first = bins.iter().position(|bin| bin["tokens"].as_u64() > Some(0))?;
    let last = bins.iter().rposition(|bin| bin["tokens"].as_u64() > Some(0))?;
    let label = |bin: &Value| match bin["low"].as_f64().unwrap_or(0.0) {
        0.0 => "0".to_string(),
        low if low < 0.01 => format!("{low:.0e}"),
        low if low < 1.0 => format!("{low:.2}"),
        low => format!("{low:.1}"),
    };
    let bars: Vec<(String, f64)> = bins[first..=last].iter().map(|bin| (label(bin), bin["tokens"].as_f64().unwrap_or(0.0))).collect();
    charts::bars(&bars, "Tokens by their divergence in nats; every bar is named by its lower end")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> Files {
        let layer = |name: &str| json!({"name": name, "shape": [4, 8], "storage": "W4 g8 symmetric", "bits_per_weight": 4.5, "zeros": 0.1, "weight_error": 0.01, "layer_error": null, "notes": ["4 of 8 rows hold <b>one</b> value"]});
        let context = json!({"window": 0, "position": 3, "divergence": 0.5, "before": "a <script>alert(1)</script>", "came": "&", "original": [["x", 0.5]], "compressed": [["y", 0.25]]});
        let report = json!({
            "schema": 1, "drawknife": "0.1.0", "format": "dense", "notes": ["a note"], "allocation": null, "calibration": null, "audit": null,
            "model": {"model_type": "llama", "parameters": 1000, "tensors": 3, "linears": 2, "shards": 1},
            "recipe": {"version": 1, "gate": {"kld_mean": 0.1}, "export": {"format": null}},
            "size": {"bytes_before": 2000, "bytes_after": 1000, "bits_per_weight": 4.5},
            "sizes": [{"class": "attention", "before": 1000, "after": 500}, {"class": "rest", "before": 1000, "after": 500}],
            "layers": [layer("model.layers.0.self_attn.q_proj"), layer("model.layers.0.<script>")], "blocks": [],
            "quality": {"perplexity": 10.0, "nll": 2.3, "tokens": 100, "windows": 10, "seq": 11, "kld_mean": 0.01, "kld_mean_stderr": 0.001, "perplexity_ratio": 1.01, "perplexity_ratio_stderr": 0.01, "reference_perplexity": 9.9, "top1_agreement": 0.9, "kld_median": 0.1, "kld_p90": 0.1, "kld_p99": 0.1, "kld_p999": 0.1, "kld_max": 0.2},
            "gates": [{"name": "kld_mean", "about": "divergence, nats", "value": 0.01, "low": 0.008, "high": 0.012, "limit": 0.1, "at_least": false, "verdict": "pass", "more_tokens": null}],
            "evaluation": {"text": "text.txt", "blake3": "00"}, "loads": [{"format": "dense", "engine": "vllm", "ok": true, "detail": "loads"}],
            "tokens": {"histogram": [{"low": 0.0, "high": 1.0, "tokens": 5}, {"low": 1.0, "high": null, "tokens": 1}], "by_confidence": [{"low": 0.0, "high": null, "tokens": 6, "kld_mean": 0.1}], "worst": [context]},
        });
        Files {
            report,
            timing: json!({"command": ["drawknife", "compress", "x"], "stages": [{"name": "compress", "seconds": 1.5}], "peak_memory_bytes": 1000}),
            sensitivity: Value::Null,
        }
    }

    #[test]
    fn the_page_holds_every_section_and_escapes_what_comes_from_files() {
        let page = html(&files()).unwrap();
        for id in [
            "verdict",
            "identity",
            "size",
            "sensitivity",
            "allocation",
            "depth",
            "losses",
            "tokens",
            "calibration",
            "numerics",
            "compatibility",
            "resources",
        ] {
            assert!(page.contains(&format!("id=\"{id}\"")), "{id}");
        }
        assert!(page.contains("Limits kept") && page.contains("&lt;script&gt;") && page.contains("&lt;b&gt;one"));
        assert!(!page.contains("<script") && !page.contains("<b>one") && !page.contains("src=") && !page.contains("@import"));
        assert!(page.len() < 1 << 20 && page.matches("<svg").count() >= 4);
        let opened = page.matches("<section").count();
        assert_eq!((opened, page.matches("<table").count()), (page.matches("</section>").count(), page.matches("</table>").count()));
    }

    #[test]
    fn the_markdown_holds_the_figures_and_the_verdict() {
        let text = markdown(&files()).unwrap();
        assert!(text.contains("limits kept") && text.contains("| mean divergence | 0.01000 ± 0.00100 nats |"), "{text}");
        assert!(!text.contains("<script"));
    }

    #[test]
    fn limits_are_kept_broken_or_undecided() {
        let mut report = files().report;
        for (verdict_word, kind) in [("pass", "good"), ("inconclusive", "open"), ("fail", "bad")] {
            report["gates"][0]["verdict"] = json!(verdict_word);
            assert_eq!(verdict(&report)["kind"], kind);
        }
        assert_eq!(verdict(&Value::Null)["kind"], "none");
    }
}
