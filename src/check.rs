//! The verb `check`: is a model whole, and is it as good as it was? Made for build pipelines: a verdict, with what it rests
//! on, and never a pass for want of evidence.

pub mod baseline;
pub mod github;
pub mod junit;
pub mod structure;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::Serialize;

use crate::check::baseline::{Baseline, Figure, Identity, Metrics, PerWindow, Tolerances};
use crate::check::structure::Finding;
use crate::error::{Error, Result, shown};
use crate::evaluate::kept::{self, Kept};
use crate::evaluate::scores::{Beside, Score, Scores};
use crate::evaluate::sweep::Stream;
use crate::evaluate::{self, Bos, Protocol, Quality, Text};
use crate::formats::targets::Engine;
use crate::gate::{Evidence, Gate, Limit, Metric, Verdict, figure};
use crate::kernels::sampling;
use crate::model::Model;
use crate::run::Run;
use crate::statistics::{self, FEWEST, Interval, LEVEL};
use crate::storage::write_whole;
use crate::subject::Subject;

/// Version of the shape of [`Checked`].
pub const SCHEMA: u32 = 1;

/// What a model is checked beside.
#[derive(Debug)]
pub enum Reference {
    /// Nothing.
    Nothing,
    /// A model.
    Model(Box<Subject>),
    /// What was kept of one.
    Kept(Box<Kept>),
}

impl Reference {
    /// Opens a folder, a GGUF file or a compact reference.
    ///
    /// # Errors
    /// When it is none of them.
    pub fn open(path: Option<&Path>, scratch: &Path) -> Result<Self> {
        match path {
            None => Ok(Self::Nothing),
            Some(path) if path.is_file() && path.extension().is_some_and(|end| end == "safetensors") => {
                Ok(Self::Kept(Box::new(Kept::open(path)?)))
            }
            Some(path) => Ok(Self::Model(Box::new(Subject::open(path, scratch)?))),
        }
    }
}

/// What to check.
#[derive(Debug)]
pub struct Options {
    /// What it is compared with.
    pub reference: Reference,
    /// The text.
    pub text: Text,
    /// Whether quality is measured.
    pub measure: bool,
    /// How the text becomes windows.
    pub protocol: Protocol,
    /// Limits on figures.
    pub limits: Vec<Limit>,
    /// The last accepted measurement.
    pub baseline: Option<Baseline>,
    /// An engine that must load the model.
    pub engine: Option<Engine>,
    /// Time that measuring may take; it stops earlier when everything is decided.
    pub budget: Option<Duration>,
    /// Where the reference's predictions are to be kept.
    pub keep: Option<PathBuf>,
}

/// The overall verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The model is whole and keeps every limit.
    Pass,
    /// A limit is broken.
    Fail,
    /// A limit cannot be decided.
    Inconclusive,
    /// The model is not whole.
    Broken,
}

impl Outcome {
    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Inconclusive => "inconclusive",
            Self::Broken => "broken",
        }
    }
}

/// What a check found.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Checked {
    /// Version of this shape; 1.
    pub schema: u32,
    /// Version of the program.
    pub drawknife: String,
    /// The overall verdict.
    pub verdict: Outcome,
    /// The model's name.
    pub model: String,
    /// blake3 of its configuration and weights.
    pub blake3: Option<String>,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Stored bits per weight of the linear layers.
    pub bits_per_weight: f64,
    /// What was measured on what; absent where nothing was measured.
    pub identity: Option<Identity>,
    /// Name of the text.
    pub text: String,
    /// `cpu` or `gpu`.
    pub device: String,
    /// What was looked at.
    pub structure: Vec<Finding>,
    /// The figures.
    pub quality: Option<Quality>,
    /// Limits, each with its verdict.
    pub gates: Vec<Gate>,
    /// What the reader should know.
    pub notes: Vec<String>,
    /// Means of every window, for a new baseline.
    #[serde(skip)]
    pub per_window: PerWindow,
}

/// Checks a model.
///
/// # Errors
/// When something else than the model is wrong: the reference, the text, the baseline.
pub fn check(subject: &Subject, options: &Options, run: &Run<'_>) -> Result<Checked> {
    let structure = structure::examine(subject, options.engine, run);
    let whole = structure.iter().all(|finding| finding.ok);
    let weights = subject.weights().ok();
    let mut checked = Checked {
        blake3: subject.fingerprint().ok(),
        bytes: weights.map_or(0, |weights| weights.bytes),
        bits_per_weight: weights.map_or(0.0, |weights| weights.bits_per_weight()),
        text: options.text.name.clone(),
        device: run.device.kind().into(),
        structure,
        ..Checked::new(subject.name())
    };
    if !whole {
        return Ok(checked);
    }
    if options.measure {
        let model = subject.model()?;
        measure(subject, &model, options, run, &mut checked)?;
    } else {
        checked.gates = gates(options, None, &checked, LEVEL, run.seed);
    }
    checked.verdict = outcome(&checked.gates);
    Ok(checked)
}

fn outcome(gates: &[Gate]) -> Outcome {
    match gates.iter().map(|gate| gate.verdict).max() {
        Some(Verdict::Fail) => Outcome::Fail,
        Some(Verdict::Inconclusive) => Outcome::Inconclusive,
        Some(Verdict::Pass) | None => Outcome::Pass,
    }
}

/// Windows of the text; where it does not even fill one, a single shorter window, which decides nothing.
fn windows(subject: &Subject, options: &Options) -> Result<(Vec<Vec<u32>>, Protocol)> {
    let protocol = options.protocol;
    let (text, special) = (&options.text.content, protocol.bos == Bos::Once);
    let tokens = subject.tokenizer()?.encode(text, special, Some(protocol.max_tokens.unwrap_or(protocol.seq).min(protocol.seq)))?.len();
    let protocol = if (2..protocol.seq).contains(&tokens) { Protocol { seq: tokens, ..protocol } } else { protocol };
    Ok((subject.windows(&options.text, protocol)?, protocol))
}

fn measure(subject: &Subject, model: &Model<'_>, options: &Options, run: &Run<'_>, checked: &mut Checked) -> Result<()> {
    let (windows, protocol) = windows(subject, options)?;
    let identity = identity(subject, model, options)?;
    if let Some(baseline) = &options.baseline {
        baseline.same(&identity)?;
        if baseline.device != checked.device {
            checked.notes.push(format!(
                "the baseline was measured on the {}, this is the {}: sums differ in their last digits",
                shown(&baseline.device),
                checked.device
            ));
        }
        if baseline.drawknife != checked.drawknife {
            checked.notes.push(format!(
                "the baseline was measured by version {}, this is {}",
                shown(&baseline.drawknife),
                checked.drawknife
            ));
        }
    }
    let reference = match &options.reference {
        Reference::Model(reference) => Some(reference.model()?),
        _ => None,
    };
    if let (Some(found), Reference::Model(reference)) = (&reference, &options.reference) {
        evaluate::comparable(model, found)?;
        reference.shares_tokens(subject, &options.text, protocol, &reference.windows(&options.text, protocol)?)?;
    }
    let judge = |scores: &Scores, level: f64, checked: &Checked| gates(options, Some((scores, protocol)), checked, level, run.seed);
    let mut looks = Looks { model, reference: reference.as_ref(), options, windows: &windows, protocol, run };
    let (scores, level) = looks.go(checked, &judge)?;
    if windows.len() > scores.windows.len() {
        checked.notes.push(format!("stopped after {} of {} windows", scores.windows.len(), windows.len()));
    }
    let evidence = Evidence { windows: scores.windows.len(), seq: protocol.seq };
    if !evidence.suffices() {
        let (found, seq, least) = (evidence.windows, protocol.seq, evidence.least_windows());
        checked
            .notes
            .push(format!("{found} windows of {seq} tokens are too few to tell how certain the figures are; {least} are the least"));
    }
    let held = options.baseline.as_ref().map(|baseline| baseline.per_window.nll.len());
    if let Some(held) = held.filter(|held| *held < scores.windows.len()) {
        checked.notes.push(format!("the baseline holds {held} windows, no more are compared; accept anew on more with --update-baseline"));
    }
    checked.gates = judge(&scores, level, checked);
    checked.quality = Some(scores.quality(protocol.seq, protocol.bos));
    checked.per_window = PerWindow::of(&scores);
    checked.identity = Some(identity);
    Ok(())
}

/// What a measurement rests on; the windows that were asked for count, not one that was cut short.
fn identity(subject: &Subject, model: &Model<'_>, options: &Options) -> Result<Identity> {
    let tokenizer = subject.tokenizer_fingerprint()?;
    let reference = match &options.reference {
        Reference::Nothing => None,
        Reference::Model(reference) => Some(reference.fingerprint()?),
        Reference::Kept(kept) => {
            let of = &kept.identity;
            let wrong =
                |what: &str| Error::input(format!("the compact reference was made of another {what}; make it again with --save-reference"));
            if of.vocabulary != model.config.vocabulary || of.tokenizer != tokenizer {
                return Err(wrong("tokenizer"));
            }
            if of.text != options.text.blake3 || of.seq != options.protocol.seq {
                return Err(wrong("text or --seq"));
            }
            Some(of.model.clone())
        }
    };
    Ok(Identity {
        reference,
        tokenizer,
        text: options.text.blake3.clone(),
        seq: options.protocol.seq,
        bos: options.protocol.bos,
        kld_is_lower_bound: matches!(options.reference, Reference::Kept(_)),
    })
}

/// A measurement, at once or in steps that double.
struct Looks<'a> {
    model: &'a Model<'a>,
    reference: Option<&'a Model<'a>>,
    options: &'a Options,
    windows: &'a [Vec<u32>],
    protocol: Protocol,
    run: &'a Run<'a>,
}

impl Looks<'_> {
    /// Scores windows until all are scored or, under a budget, until everything is decided or time is up. Gives the confidence
    /// with which gates are to be judged: every look may err, and all together only as much as one look without a budget
    /// (Bonferroni).
    fn go(&mut self, checked: &Checked, judge: &dyn Fn(&Scores, f64, &Checked) -> Vec<Gate>) -> Result<(Scores, f64)> {
        let all = self.windows.len();
        let Some(budget) = self.options.budget else { return Ok((self.score(0, all)?, LEVEL)) };
        let mut ends: Vec<usize> = (0..).map(|look| FEWEST << look).take_while(|end| *end < all).collect();
        ends.push(all);
        let level = 1.0 - (1.0 - LEVEL) / ends.len() as f64;
        let (started, mut scores): (Instant, Option<Scores>) = (Instant::now(), None);
        for end in ends {
            let first = scores.as_ref().map_or(0, |scores| scores.windows.len());
            let more = self.score(first, end)?;
            match &mut scores {
                Some(scores) => scores.windows.extend(more.windows),
                None => scores = Some(more),
            }
            let so_far = scores.as_ref().map_or(&[][..], |scores| &scores.windows);
            let gates = scores.as_ref().map(|scores| judge(scores, level, checked)).unwrap_or_default();
            let decided = gates.iter().all(|gate| gate.verdict == Verdict::Pass) || gates.iter().any(|gate| gate.verdict == Verdict::Fail);
            // The next look doubles what was done.
            if (decided && !gates.is_empty()) || started.elapsed() * 2 > budget || so_far.len() == all {
                break;
            }
        }
        scores.map(|scores| (scores, level)).ok_or_else(|| Error::input("the text gives no window"))
    }

    fn score(&self, first: usize, end: usize) -> Result<Scores> {
        let windows = &self.windows[first..end];
        let own = Stream::new(self.model, windows, "evaluate", self.run)?;
        if let Reference::Kept(kept) = &self.options.reference {
            let part = kept.part(first..end);
            return Scores::new(&own, Beside::Kept(&part), windows, self.protocol, self.run);
        }
        let other = self.reference.map(|reference| Stream::new(reference, windows, "evaluate reference", self.run)).transpose()?;
        if let (Some(path), Some(other), Reference::Model(reference)) = (&self.options.keep, &other, &self.options.reference) {
            if self.protocol.seq != self.options.protocol.seq || end != self.windows.len() || first > 0 {
                return Err(Error::input("--save-reference needs whole windows, all at once; leave --budget out and give more text"));
            }
            let identity = kept::Identity {
                schema: 1,
                model: reference.fingerprint()?,
                tokenizer: reference.tokenizer_fingerprint()?,
                text: self.options.text.blake3.clone(),
                seq: self.protocol.seq,
                vocabulary: other.model.config.vocabulary,
            };
            write_whole(path, &Kept::new(other, windows, identity, self.run)?.to_bytes()?)?;
        }
        let beside = other.as_ref().map_or(Beside::Nothing, Beside::Stream);
        Scores::new(&own, beside, windows, self.protocol, self.run)
    }
}

/// Every limit, judged at a level of confidence.
fn gates(options: &Options, scores: Option<(&Scores, Protocol)>, checked: &Checked, level: f64, seed: u64) -> Vec<Gate> {
    let mut gates: Vec<Gate> =
        options.limits.iter().map(|limit| judged(limit, scores, options.protocol.seq, checked, level, seed)).collect();
    if let (Some(baseline), Some((scores, protocol))) = (&options.baseline, scores) {
        // A window that was cut short is none of the baseline's.
        let now = (protocol.seq == options.protocol.seq).then(|| PerWindow::of(scores));
        gates.extend(baseline.gates(now.as_ref(), checked.bytes, level, sampling::Stream::new(seed).child(100)));
    }
    gates
}

fn judged(limit: &Limit, scores: Option<(&Scores, Protocol)>, wanted: usize, checked: &Checked, level: f64, seed: u64) -> Gate {
    // A window that was cut short counts for nothing.
    let whole = scores.filter(|(_, protocol)| protocol.seq == wanted);
    let evidence = Evidence { windows: whole.map_or(0, |(scores, _)| scores.windows.len()), seq: wanted };
    let stream = sampling::Stream::new(seed).child(limit.metric as u64);
    let exact = |value: f64| (value, Some(Interval { low: value, high: value }));
    let mean = |of: fn(&Score) -> f64| {
        let means = scores.map(|(scores, _)| scores.means(of)).unwrap_or_default();
        (statistics::mean(&means).0, statistics::mean_interval(&means, level, stream))
    };
    let exponential = |(value, interval): (f64, Option<Interval>)| (value.exp(), interval.map(|interval| interval.map(f64::exp)));
    let (about, found) = match limit.metric {
        Metric::PerplexityRatio => ("perplexity over that of the reference", exponential(mean(|score| score.nll - score.reference_nll))),
        Metric::Perplexity => ("perplexity", exponential(mean(|score| score.nll))),
        Metric::KldMean if scores.is_some_and(|(scores, _)| scores.bound) => {
            ("divergence from the reference, nats, a lower bound", mean(|score| score.divergence))
        }
        Metric::KldMean => ("divergence from the reference, nats", mean(|score| score.divergence)),
        Metric::KldP99 => ("divergence, 99th percentile, nats", percentile(scores.map(|(scores, _)| scores), level, stream)),
        Metric::Top1 => ("same most likely token as the reference", agreement(scores.map(|(scores, _)| scores), level, stream)),
        Metric::Size => ("bytes of all tensors", exact(checked.bytes as f64)),
        Metric::Bits => ("bits per weight of linear layers", exact(checked.bits_per_weight)),
    };
    let found = if limit.metric.is_measured() && !evidence.suffices() { (found.0, None) } else { found };
    Gate::decide(limit.metric.name(), about, found, (limit.bound, limit.at_least), evidence)
}

fn agreement(scores: Option<&Scores>, level: f64, stream: sampling::Stream) -> (f64, Option<Interval>) {
    let means = scores.map(|scores| scores.means(|score| f64::from(u8::from(score.agrees)))).unwrap_or_default();
    let tokens = scores.map_or(0, Scores::tokens);
    (statistics::mean(&means).0, statistics::share_interval(&means, tokens, level, stream))
}

fn percentile(scores: Option<&Scores>, level: f64, stream: sampling::Stream) -> (f64, Option<Interval>) {
    let windows: Vec<Vec<f64>> = scores
        .map(|scores| scores.windows.iter().map(|window| window.iter().map(|score| score.divergence).collect()).collect())
        .unwrap_or_default();
    (statistics::quantile(&mut windows.concat(), 0.99), statistics::quantile_interval(&windows, 0.99, level, stream))
}

impl Checked {
    /// What a model that cannot be opened is.
    pub fn unopened(path: &Path, error: &Error) -> Self {
        let structure = vec![Finding { name: "files".into(), ok: false, detail: error.to_string() }];
        Self { structure, ..Self::new(path.file_name().unwrap_or_default().to_string_lossy().into_owned()) }
    }

    /// A check before anything was looked at.
    fn new(model: String) -> Self {
        Self {
            schema: SCHEMA,
            drawknife: env!("CARGO_PKG_VERSION").into(),
            verdict: Outcome::Broken,
            model,
            blake3: None,
            bytes: 0,
            bits_per_weight: 0.0,
            identity: None,
            text: String::new(),
            device: String::new(),
            structure: Vec::new(),
            quality: None,
            gates: Vec::new(),
            notes: Vec::new(),
            per_window: PerWindow::default(),
        }
    }

    /// The limits as the rows of a table, with a head.
    pub fn rows(&self) -> Vec<Vec<String>> {
        let mut rows = vec![["limit on", "value", "95 % interval", "limit", "verdict"].map(String::from).to_vec()];
        rows.extend(self.gates.iter().map(|gate| {
            let limit = format!("{} {}", if gate.at_least { "≥" } else { "≤" }, figure(gate.limit));
            let more = gate.more_tokens.map(|more| format!(", ~{more} tokens more")).unwrap_or_default();
            vec![gate.name.clone(), gate.value.map_or("-".into(), figure), gate.interval(), limit, format!("{}{more}", gate.verdict.name())]
        }));
        rows
    }

    /// The measurement as a new baseline; what the old one tolerates stays.
    ///
    /// # Errors
    /// When nothing was measured, or on too few windows.
    pub fn accept(&self, tolerances: Option<Tolerances>) -> Result<Baseline> {
        let (Some(identity), Some(quality), Some(model)) = (&self.identity, &self.quality, &self.blake3) else {
            return Err(Error::input("nothing was measured that a baseline could hold"));
        };
        let figure = |value, stderr| Figure { value, stderr };
        let against = quality.against.as_ref();
        let baseline = Baseline {
            schema: baseline::SCHEMA,
            drawknife: self.drawknife.clone(),
            device: self.device.clone(),
            model: model.clone(),
            bytes: self.bytes,
            identity: identity.clone(),
            tokens: quality.tokens,
            metrics: Metrics {
                perplexity: figure(quality.perplexity, quality.nll_stderr.map(|error| error * quality.perplexity)),
                perplexity_ratio: against.map(|of| figure(of.perplexity_ratio, of.perplexity_ratio_stderr)),
                kld_mean: against.map(|of| figure(of.kld_mean, of.kld_mean_stderr)),
                top1_agreement: against.map(|of| figure(of.top1_agreement, of.top1_agreement_stderr)),
            },
            tolerances: tolerances.unwrap_or_default(),
            per_window: self.per_window.clone(),
        };
        baseline.worth_keeping()?;
        Ok(baseline)
    }
}
