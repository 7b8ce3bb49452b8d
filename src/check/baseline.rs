//! The last accepted measurement, as a file that lies beside the code: what it was measured on, its figures, what may be
//! lost, and the means of every window, so that a later measurement on the same windows is compared pair by pair.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checkpoint::read_file;
use crate::error::{Error, Result};
use crate::evaluate::Bos;
use crate::evaluate::scores::Scores;
use crate::gate::{Evidence, Gate};
use crate::kernels::sampling::Stream;
use crate::statistics::{self, Interval};
use crate::storage::write_whole_json;

/// Version of the file's shape.
pub const SCHEMA: u32 = 1;

/// What measurements must have in common to be compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// blake3 of the reference's configuration and weights; absent without one.
    pub reference: Option<String>,
    /// blake3 of tokenizer.json.
    pub tokenizer: String,
    /// blake3 of the text.
    pub text: String,
    /// Tokens per window.
    pub seq: usize,
    /// Where the token that begins a text goes: `once`, `window` or `none`.
    pub bos: Bos,
    /// Whether divergences are lower bounds from a compact reference.
    pub kld_is_lower_bound: bool,
}

/// A figure with its standard error.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Figure {
    /// The figure.
    pub value: f64,
    /// Its standard error over windows.
    pub stderr: Option<f64>,
}

/// The figures of an accepted measurement, for people to read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// Perplexity.
    pub perplexity: Figure,
    /// Perplexity over that of the reference.
    pub perplexity_ratio: Option<Figure>,
    /// Mean divergence in nats.
    pub kld_mean: Option<Figure>,
    /// Share of equal most likely tokens.
    pub top1_agreement: Option<Figure>,
}

/// What may be lost against the baseline before a check fails.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tolerances {
    /// Growth of the perplexity, as a share.
    pub perplexity_relative: f64,
    /// Growth of the mean divergence, as a share; only what exceeds this and the absolute one counts.
    pub kld_mean_relative: f64,
    /// Growth of the mean divergence, in nats.
    pub kld_mean_absolute: f64,
    /// Fall of the share of equal most likely tokens.
    pub top1_absolute: f64,
    /// Growth of the size, as a share.
    pub size_relative: f64,
}

impl Default for Tolerances {
    fn default() -> Self {
        Self { perplexity_relative: 0.01, kld_mean_relative: 0.1, kld_mean_absolute: 0.002, top1_absolute: 0.01, size_relative: 0.01 }
    }
}

/// Means of every window.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PerWindow {
    /// Negative log-likelihood of a token.
    pub nll: Vec<f64>,
    /// Divergence; empty without a reference.
    pub kld: Vec<f64>,
    /// Share of equal most likely tokens; empty without a reference.
    pub agreement: Vec<f64>,
}

impl PerWindow {
    /// The means of scores.
    pub fn of(scores: &Scores) -> Self {
        let paired = |of: Vec<f64>| if scores.paired { of } else { Vec::new() };
        Self {
            nll: scores.means(|score| score.nll),
            kld: paired(scores.means(|score| score.divergence)),
            agreement: paired(scores.means(|score| f64::from(u8::from(score.agrees)))),
        }
    }
}

/// The file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    /// Version of this shape; 1.
    pub schema: u32,
    /// Version of the program that measured.
    pub drawknife: String,
    /// `cpu` or `gpu`.
    pub device: String,
    /// blake3 of the accepted model's configuration and weights.
    pub model: String,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// What must be the same.
    pub identity: Identity,
    /// Tokens scored.
    pub tokens: usize,
    /// The figures.
    pub metrics: Metrics,
    /// What may be lost; yours to edit.
    pub tolerances: Tolerances,
    /// Means of every window.
    pub per_window: PerWindow,
}

impl Baseline {
    /// Reads a baseline.
    ///
    /// # Errors
    /// When it is missing, or not a baseline of this version.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::input("missing; accept a measurement first with --update-baseline").file(path));
        }
        let bytes = read_file(path, 64 << 20)?;
        let baseline: Self = serde_json::from_slice(&bytes).map_err(|error| Error::input(format!("not a baseline: {error}")).file(path))?;
        let windows = baseline.per_window.nll.len();
        let paired = if baseline.identity.reference.is_some() { windows } else { 0 };
        let means = &baseline.per_window;
        let finite = means.nll.iter().chain(&means.kld).chain(&means.agreement).all(|mean| mean.abs() < 1e6);
        let whole = finite && [&means.kld, &means.agreement].iter().all(|means| means.len() == paired);
        let tolerances = baseline.tolerances;
        let sound = [
            tolerances.perplexity_relative,
            tolerances.kld_mean_relative,
            tolerances.kld_mean_absolute,
            tolerances.top1_absolute,
            tolerances.size_relative,
        ];
        match sound.iter().find(|tolerance| !(0.0..=1e3).contains(*tolerance)) {
            Some(tolerance) => Err(Error::input(format!("a tolerance is {tolerance}, it must be 0 to 1000")).file(path)),
            None if baseline.schema != SCHEMA => {
                Err(Error::input(format!("baseline of version {}, read is {SCHEMA}", baseline.schema)).file(path))
            }
            None if !whole || windows == 0 => {
                Err(Error::input("its windows do not fit together; make it again with --update-baseline").file(path))
            }
            None => Ok(baseline),
        }
    }

    /// Writes the file, complete or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_whole_json(path, self)
    }

    /// Refuses a measurement that has not everything in common.
    ///
    /// # Errors
    /// Naming the first thing that differs.
    pub fn same(&self, identity: &Identity) -> Result<()> {
        let (a, b) = (&self.identity, identity);
        let short = |hash: &str| hash.chars().take(12).collect::<String>();
        let named = |hash: &Option<String>| hash.as_deref().map_or("none".into(), short);
        let differs = [
            ("reference", a.reference == b.reference, named(&a.reference), named(&b.reference)),
            ("tokenizer", a.tokenizer == b.tokenizer, short(&a.tokenizer), short(&b.tokenizer)),
            ("text", a.text == b.text, short(&a.text), short(&b.text)),
            ("--seq", a.seq == b.seq, a.seq.to_string(), b.seq.to_string()),
            ("--bos", a.bos == b.bos, format!("{:?}", a.bos).to_lowercase(), format!("{:?}", b.bos).to_lowercase()),
            (
                "compact reference",
                a.kld_is_lower_bound == b.kld_is_lower_bound,
                a.kld_is_lower_bound.to_string(),
                b.kld_is_lower_bound.to_string(),
            ),
        ];
        match differs.iter().find(|(_, same, ..)| !same) {
            None => Ok(()),
            Some((what, _, was, is)) => Err(Error::input(format!(
                "the baseline was measured otherwise: {what} was {was}, is {is}; measure as it was, or accept anew with --update-baseline"
            ))),
        }
    }

    /// What a new measurement lost, pair by pair over the windows that both have.
    /// Nothing of it where the windows now are others.
    pub fn gates(&self, now: Option<&PerWindow>, bytes: u64, level: f64, stream: Stream) -> Vec<Gate> {
        let nothing = PerWindow::default();
        let now = now.unwrap_or(&nothing);
        let common = self.per_window.nll.len().min(now.nll.len());
        let evidence = Evidence { windows: common, seq: self.identity.seq };
        let differences = |was: &[f64], is: &[f64]| -> Vec<f64> { is.iter().zip(was).map(|(is, was)| is - was).collect() };
        let judged = |differences: &[f64], number| {
            (
                statistics::mean(differences).0,
                statistics::mean_interval(differences, level, stream.child(number)).filter(|_| evidence.suffices()),
            )
        };
        let tolerances = &self.tolerances;
        let (value, interval) = judged(&differences(&self.per_window.nll, &now.nll), 0);
        let ratio = (value.exp(), interval.map(|interval| interval.map(f64::exp)));
        let limit = (1.0 + tolerances.perplexity_relative, false);
        let mut gates = vec![Gate::decide("baseline.ppl", "perplexity over that of the baseline", ratio, limit, evidence)];
        if !self.per_window.kld.is_empty() {
            let was = statistics::mean(&self.per_window.kld[..common]).0;
            let limit = (tolerances.kld_mean_relative * was).max(tolerances.kld_mean_absolute);
            let judged_kld = judged(&differences(&self.per_window.kld, &now.kld), 1);
            gates.push(Gate::decide("baseline.kld_mean", "divergence above the baseline, nats", judged_kld, (limit, false), evidence));
            let judged_top = judged(&differences(&self.per_window.agreement, &now.agreement), 2);
            let about = "same most likely token, change";
            gates.push(Gate::decide("baseline.top1", about, judged_top, (-tolerances.top1_absolute, true), evidence));
        }
        let ratio = bytes as f64 / self.bytes.max(1) as f64;
        let exact = (ratio, Some(Interval { low: ratio, high: ratio }));
        gates.push(Gate::decide(
            "baseline.size",
            "size over that of the baseline",
            exact,
            (1.0 + tolerances.size_relative, false),
            evidence,
        ));
        if now.nll.len() > common {
            // The baseline has no more windows: more tokens now would be compared with nothing.
            gates.iter_mut().for_each(|gate| gate.more_tokens = None);
        }
        gates
    }

    /// What a baseline tolerates, where as much of it can be read.
    pub fn tolerances(path: &Path) -> Option<Tolerances> {
        let value: serde_json::Value = serde_json::from_slice(&read_file(path, 64 << 20).ok()?).ok()?;
        serde_json::from_value(value.get("tolerances")?.clone()).ok()
    }

    /// Refuses to accept what too few windows were measured for.
    ///
    /// # Errors
    /// With both numbers.
    pub fn worth_keeping(&self) -> Result<()> {
        let evidence = Evidence { windows: self.per_window.nll.len(), seq: self.identity.seq };
        if evidence.suffices() {
            return Ok(());
        }
        let (windows, seq, least) = (evidence.windows, evidence.seq, evidence.least_windows());
        Err(Error::input(format!(
            "{windows} windows of {seq} tokens are too few for a baseline, {least} are the least; give more text or a larger --max-tokens"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::Verdict;
    use crate::statistics::FEWEST;

    fn baseline(windows: usize) -> Baseline {
        let figure = Figure { value: 1.0, stderr: None };
        let per_window = PerWindow {
            nll: (0..windows).map(|window| 3.0 + window as f64 % 5.0).collect(),
            kld: (0..windows).map(|window| 0.01 + 0.001 * (window as f64 % 7.0)).collect(),
            agreement: vec![0.9; windows],
        };
        Baseline {
            schema: SCHEMA,
            drawknife: "0".into(),
            device: "cpu".into(),
            model: "m".into(),
            bytes: 1000,
            identity: Identity {
                reference: Some("r".into()),
                tokenizer: "t".into(),
                text: "x".into(),
                seq: 128,
                bos: Bos::Once,
                kld_is_lower_bound: false,
            },
            tokens: 127 * windows,
            metrics: Metrics { perplexity: figure, perplexity_ratio: None, kld_mean: None, top1_agreement: None },
            tolerances: Tolerances::default(),
            per_window,
        }
    }

    #[test]
    fn the_same_measurement_passes_a_worse_one_fails_and_few_windows_decide_nothing() {
        let base = baseline(24);
        let verdicts =
            |now: &PerWindow, bytes| base.gates(Some(now), bytes, 0.95, Stream::new(0)).iter().map(|gate| gate.verdict).collect::<Vec<_>>();
        assert_eq!(verdicts(&base.per_window, 1000), [Verdict::Pass; 4]);
        let mut worse = base.per_window.clone();
        worse.nll.iter_mut().for_each(|nll| *nll += 0.02);
        worse.kld.iter_mut().enumerate().for_each(|(window, kld)| *kld *= 2.0 + 0.1 * (window as f64 % 3.0));
        worse.agreement.iter_mut().for_each(|share| *share -= 0.05);
        assert_eq!(verdicts(&worse, 1011), [Verdict::Fail; 4]);
        let few = PerWindow { nll: base.per_window.nll[..3].to_vec(), kld: base.per_window.kld[..3].to_vec(), agreement: vec![0.9; 3] };
        assert_eq!(verdicts(&few, 1000)[..3], [Verdict::Inconclusive; 3]);
        // A small divergence may double: only what is more than both tolerances counts.
        let mut close = base.clone();
        close.per_window.kld.iter_mut().for_each(|kld| *kld = 1e-5);
        let mut now = close.per_window.clone();
        now.kld.iter_mut().for_each(|kld| *kld = 1e-3);
        assert_eq!(close.gates(Some(&now), 1000, 0.95, Stream::new(0))[1].verdict, Verdict::Pass);
    }

    #[test]
    fn a_baseline_comes_back_from_its_file_and_differences_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("baseline.json");
        assert!(Baseline::open(&path).unwrap_err().to_string().contains("--update-baseline"));
        let base = baseline(10);
        base.write(&path).unwrap();
        assert_eq!(Baseline::open(&path).unwrap(), base);
        base.same(&base.identity).unwrap();
        let other = Identity { seq: 64, ..base.identity.clone() };
        assert!(base.same(&other).unwrap_err().to_string().contains("--seq was 128, is 64"));
        assert!(baseline(FEWEST - 1).worth_keeping().is_err() && baseline(FEWEST).worth_keeping().is_ok());
        for (from, to) in [("\"schema\": 1", "\"schema\": 2"), ("\"tokens\"", "\"token\""), ("0.002", "-0.002"), ("0.9", "\"x\"")] {
            let text = std::fs::read_to_string(&path).unwrap().replacen(from, to, 1);
            let damaged = folder.path().join("damaged.json");
            std::fs::write(&damaged, text).unwrap();
            assert_eq!(Baseline::open(&damaged).unwrap_err().exit_code(), 2, "{from}");
        }
    }
}
