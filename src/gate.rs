//! Limits on measured figures and what can be said of them: pass, fail, or that the tokens do not suffice to tell.

use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::shown;
use crate::evaluate::Quality;
use crate::plan::recipe::{self, size};
use crate::statistics::{FEWEST, FEWEST_TOKENS, Interval, times_more};

/// What can be limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Perplexity over that of the reference.
    PerplexityRatio,
    /// Perplexity.
    Perplexity,
    /// Mean of KL(reference ‖ model), in nats.
    KldMean,
    /// 99th percentile of KL(reference ‖ model), in nats.
    KldP99,
    /// Share of tokens on which model and reference find the same token most likely.
    Top1,
    /// Bytes of all tensors.
    Size,
    /// Stored bits per weight of the linear layers.
    Bits,
}

impl Metric {
    /// All of them.
    pub const ALL: [Self; 7] = [Self::PerplexityRatio, Self::Perplexity, Self::KldMean, Self::KldP99, Self::Top1, Self::Size, Self::Bits];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::PerplexityRatio => "ppl_ratio",
            Self::Perplexity => "ppl",
            Self::KldMean => "kld_mean",
            Self::KldP99 => "kld_p99",
            Self::Top1 => "top1",
            Self::Size => "size",
            Self::Bits => "bits",
        }
    }

    /// Whether it needs a reference.
    pub fn needs_reference(self) -> bool {
        matches!(self, Self::PerplexityRatio | Self::KldMean | Self::KldP99 | Self::Top1)
    }

    /// Whether it is measured on tokens, and not counted.
    pub fn is_measured(self) -> bool {
        !matches!(self, Self::Size | Self::Bits)
    }
}

/// A limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    /// Of what.
    pub metric: Metric,
    /// Whether it bounds from below.
    pub at_least: bool,
    /// The bound.
    pub bound: f64,
}

/// Limits as they are written: `ppl_ratio<=1.01,kld_mean<=0.02,top1>=0.95,size<=5.8GB`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Limits(pub Vec<Limit>);

impl FromStr for Limits {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',').map(|one| one.trim().parse()).collect::<Result<_, _>>().map(Self)
    }
}

impl FromStr for Limit {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let known = || Metric::ALL.map(Metric::name).join(", ");
        let wrong = || format!("`{}`: use NAME<=LIMIT or NAME>=LIMIT with one of {}", shown(text), known());
        let (name, bound, at_least) = match (text.split_once("<="), text.split_once(">="), text.split_once('=')) {
            (Some((name, bound)), ..) => (name, bound, false),
            (_, Some((name, bound)), _) => (name, bound, true),
            (_, _, Some((name, bound))) => (name, bound, name.trim() == Metric::Top1.name()),
            _ => return Err(wrong()),
        };
        let metric = Metric::ALL.into_iter().find(|metric| metric.name() == name.trim());
        let metric = metric.ok_or_else(|| format!("`{}` is not known; use {}", shown(name.trim()), known()))?;
        let bound = match metric {
            Metric::Size => size(bound.trim()).map_err(|error| error.to_string())? as f64,
            _ => bound.trim().parse::<f64>().ok().filter(|bound| bound.is_finite() && *bound >= 0.0).ok_or_else(wrong)?,
        };
        Ok(Self { metric, at_least, bound })
    }
}

/// What can be said of a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The whole interval keeps the limit.
    Pass,
    /// The interval straddles the limit, or there is none.
    Inconclusive,
    /// The whole interval breaks the limit.
    Fail,
}

impl Verdict {
    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Inconclusive => "inconclusive",
            Self::Fail => "fail",
        }
    }
}

/// A limit with what was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Gate {
    /// What is limited: a metric's name, or `baseline.` and the name of what is compared with the baseline.
    pub name: String,
    /// What that is, in words.
    pub about: String,
    /// What was measured; absent where nothing was.
    pub value: Option<f64>,
    /// Lower bound of the interval; absent where it is unbounded or unknown.
    pub low: Option<f64>,
    /// Upper bound of the interval; absent where it is unbounded or unknown.
    pub high: Option<f64>,
    /// The limit.
    pub limit: f64,
    /// Whether the limit bounds from below.
    pub at_least: bool,
    /// What follows.
    pub verdict: Verdict,
    /// Where inconclusive, about how many more tokens would decide, if the value stays; absent where no number would.
    pub more_tokens: Option<u64>,
}

/// How much was measured.
#[derive(Debug, Clone, Copy)]
pub struct Evidence {
    /// Windows.
    pub windows: usize,
    /// Tokens of a window.
    pub seq: usize,
}

impl Evidence {
    /// Windows that are the least: those that carry an interval.
    pub fn least_windows(self) -> usize {
        FEWEST.max(FEWEST_TOKENS.div_ceil(self.seq.saturating_sub(1).max(1)))
    }

    /// Whether it is enough for an interval.
    pub fn suffices(self) -> bool {
        self.windows >= self.least_windows()
    }
}

impl Gate {
    /// Decides a limit on a value whose interval is known, or is not because there are too few windows.
    pub fn decide(name: &str, about: &str, (value, interval): (f64, Option<Interval>), limit: (f64, bool), evidence: Evidence) -> Self {
        let (bound, at_least) = limit;
        let sign = if at_least { -1.0 } else { 1.0 };
        let turned = interval.map(|of| if at_least { Interval { low: -of.high, high: -of.low } } else { of });
        let verdict = match turned {
            Some(of) if of.low > sign * bound => Verdict::Fail,
            Some(of) if of.high <= sign * bound => Verdict::Pass,
            _ => Verdict::Inconclusive,
        };
        let finite = |bound: f64| bound.is_finite().then_some(bound);
        Self {
            name: name.into(),
            about: about.into(),
            value: finite(value),
            low: interval.and_then(|of| finite(of.low)),
            high: interval.and_then(|of| finite(of.high)),
            limit: bound,
            at_least,
            verdict,
            more_tokens: (verdict == Verdict::Inconclusive).then(|| more(value, interval, bound, evidence)).flatten(),
        }
    }

    /// The interval as a person reads it.
    pub fn interval(&self) -> String {
        match (self.low, self.high) {
            (Some(low), Some(high)) if low == high => String::new(),
            (Some(low), Some(high)) => format!("{} to {}", figure(low), figure(high)),
            _ => "unknown".into(),
        }
    }

    /// A limit and what was measured, in one sentence.
    pub fn sentence(&self) -> String {
        let sign = if self.at_least { "at least" } else { "at most" };
        let bound = |bound: Option<f64>| bound.map_or("unknown".into(), figure);
        let interval = match (self.low, self.high) {
            (Some(low), Some(high)) if low == high => String::new(),
            (low, high) => format!(" (95 %: {} to {})", bound(low), bound(high)),
        };
        let more = match (self.verdict, self.more_tokens) {
            (Verdict::Inconclusive, Some(more)) => format!("; about {more} more tokens would decide"),
            (Verdict::Inconclusive, None) => "; more tokens alone are not sure to decide".into(),
            _ => String::new(),
        };
        format!(
            "{}: {} is {}{interval}, the limit is {sign} {}{more}",
            self.verdict.name(),
            self.about,
            bound(self.value),
            figure(self.limit)
        )
    }
}

/// A number with the digits that matter.
pub fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 1e5 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.3}"),
        size if size >= 0.1 || size == 0.0 => format!("{value:.4}"),
        _ => format!("{value:.6}"),
    }
}

/// The limits of a recipe, held against the quality of what it made: as far as 1.96 standard errors reach.
pub fn of_recipe(gate: &recipe::Gate, quality: Option<&Quality>) -> Vec<Gate> {
    let against = quality.and_then(|quality| quality.against.as_ref());
    let evidence = Evidence { windows: quality.map_or(0, |quality| quality.windows), seq: quality.map_or(0, |quality| quality.seq) };
    let judged = |metric: Metric, about: &str, limit: Option<f64>, value: Option<f64>, error: Option<f64>| {
        let value = value.unwrap_or(f64::NAN);
        let interval = error.map(|error| Interval { low: value - 1.96 * error, high: value + 1.96 * error });
        limit.map(|limit| Gate::decide(metric.name(), about, (value, interval), (limit, false), evidence))
    };
    let kld = judged(
        Metric::KldMean,
        "divergence from the original, nats",
        gate.kld_mean,
        against.map(|of| of.kld_mean),
        against.and_then(|of| of.kld_mean_stderr),
    );
    let ratio = judged(
        Metric::PerplexityRatio,
        "perplexity over that of the original",
        gate.ppl_ratio,
        against.map(|of| of.perplexity_ratio),
        against.and_then(|of| of.perplexity_ratio_stderr),
    );
    kld.into_iter().chain(ratio).collect()
}

/// Tokens that are missing for a decision, in whole windows.
fn more(value: f64, interval: Option<Interval>, bound: f64, evidence: Evidence) -> Option<u64> {
    /// Beyond so many times the windows the honest answer is that no number of tokens decides.
    const MOST: f64 = 10_000.0;
    let times = interval.map_or(0.0, |interval| times_more(value, interval, bound));
    let windows = (times * evidence.windows as f64).ceil().max(evidence.least_windows() as f64);
    (times < MOST).then(|| (windows as usize).saturating_sub(evidence.windows).max(1) as u64 * evidence.seq as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_they_are_written() {
        let limits: Limits = "ppl_ratio<=1.01, kld_mean<=0.02,top1>=0.95,size<=5.8GB".parse().unwrap();
        let read: Vec<_> = limits.0.iter().map(|limit| (limit.metric.name(), limit.at_least, limit.bound)).collect();
        assert_eq!(read, [("ppl_ratio", false, 1.01), ("kld_mean", false, 0.02), ("top1", true, 0.95), ("size", false, 5.8e9)]);
        assert!("top1=0.9".parse::<Limit>().unwrap().at_least && !"ppl=9".parse::<Limit>().unwrap().at_least);
        for wrong in ["", "kld", "kld_mean<=", "kld_mean<=x", "speed<=1", "size<=big", "kld_mean<=-1", "kld_mean<=inf"] {
            assert!(wrong.parse::<Limits>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_limit_passes_or_fails_only_with_its_whole_interval() {
        let evidence = Evidence { windows: 20, seq: 100 };
        let decide = |low, high, limit, at_least| {
            Gate::decide("x", "", ((low + high) / 2.0, Some(Interval { low, high })), (limit, at_least), evidence).verdict
        };
        assert_eq!(decide(1.0, 2.0, 2.0, false), Verdict::Pass);
        assert_eq!(decide(1.0, 2.0, 0.9, false), Verdict::Fail);
        assert_eq!(decide(1.0, 2.0, 1.9, false), Verdict::Inconclusive);
        assert_eq!(decide(0.9, 0.95, 0.9, true), Verdict::Pass);
        assert_eq!(decide(0.8, 0.85, 0.9, true), Verdict::Fail);
        assert_eq!(decide(f64::NAN, f64::NAN, 0.9, false), Verdict::Inconclusive, "what is not a number does not pass");
        let gate = Gate::decide("x", "", (1.0, Some(Interval { low: 0.8, high: 1.2 })), (1.1, false), evidence);
        assert_eq!(gate.more_tokens, Some(60 * 100), "twice too wide: four times the windows");
        let few = Gate::decide("x", "", (1.0, None), (1.1, false), Evidence { windows: 1, seq: 20 });
        assert_eq!((few.verdict, few.more_tokens), (Verdict::Inconclusive, Some(13 * 20)));
        assert_eq!(Gate::decide("x", "", (1.0, Some(Interval { low: 0.8, high: 1.2 })), (1.0, false), evidence).more_tokens, None);
    }
}
