//! How certain a measured mean is. Tokens of one window depend on each other, so windows are what is resampled: the
//! block bootstrap with the window as its block. Nothing here knows what was measured.

use rayon::prelude::*;

use crate::kernels::sampling::Stream;

/// Fewer windows than this carry no interval: their spread says too little about the spread of others.
pub const FEWEST: usize = 8;

/// Fewer tokens than this carry none either.
pub const FEWEST_TOKENS: usize = 256;

/// The confidence of intervals where nothing else is asked for.
pub const LEVEL: f64 = 0.95;

/// Resamples of a bootstrap.
const RESAMPLES: u64 = 1999;

/// Where a true value lies with the confidence that was asked for; a bound is infinite where the data bound nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// The lower bound.
    pub low: f64,
    /// The upper bound.
    pub high: f64,
}

impl Interval {
    /// The interval of f(x) for an ascending f.
    #[must_use]
    pub fn map(self, f: impl Fn(f64) -> f64) -> Self {
        Self { low: f(self.low), high: f(self.high) }
    }
}

/// Mean and its standard error; the error is absent with fewer than two values.
pub fn mean(values: &[f64]) -> (f64, Option<f64>) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (values.len() > 1).then(|| (squares / (count - 1.0) / count).sqrt()))
}

/// The interval of a mean over windows by the studentized bootstrap (Efron and Tibshirani 1993, §12.5): resamples tell how
/// (mean* − mean) / error* is distributed, which follows the skew that divergences have. `None` below [`FEWEST`] windows.
pub fn mean_interval(windows: &[f64], level: f64, stream: Stream) -> Option<Interval> {
    if windows.len() < FEWEST {
        return None;
    }
    let (center, error) = mean(windows);
    let error = error.unwrap_or(0.0);
    if error == 0.0 {
        return Some(Interval { low: center, high: center });
    }
    let studentized = |resample: u64| {
        let draws = draws(windows.len(), stream.child(resample)).map(|window| windows[window]);
        let (mean, error) = mean(&draws.collect::<Vec<f64>>());
        let (difference, error) = (mean - center, error.unwrap_or(0.0));
        if difference == 0.0 { 0.0 } else { difference / error }
    };
    let mut sorted: Vec<f64> = (0..RESAMPLES).into_par_iter().map(studentized).collect();
    sorted.sort_by(f64::total_cmp);
    let [low, high] = tails(&sorted, level);
    Some(Interval { low: center - high * error, high: center - low * error })
}

/// The interval of a quantile over all tokens by the percentile bootstrap over windows. `None` below [`FEWEST`] windows.
pub fn quantile_interval(windows: &[Vec<f64>], rank: f64, level: f64, stream: Stream) -> Option<Interval> {
    /// Fewer resamples than for means, because each selects among all tokens.
    const SELECTIONS: u64 = 399;
    if windows.len() < FEWEST {
        return None;
    }
    let resampled = |resample: u64| {
        let drawn = draws(windows.len(), stream.child(resample)).flat_map(|window| windows[window].iter().copied());
        quantile(&mut drawn.collect::<Vec<f64>>(), rank)
    };
    let mut sorted: Vec<f64> = (0..SELECTIONS).into_par_iter().map(resampled).collect();
    sorted.sort_by(f64::total_cmp);
    let [low, high] = tails(&sorted, level);
    // No resample exceeds the largest value: where too few tokens lie beyond the rank, nothing bounds the quantile from above.
    let tokens = windows.iter().map(Vec::len).sum::<usize>() as f64;
    let reach = rank * tokens + 2.0 * (tokens * rank * (1.0 - rank)).sqrt();
    Some(Interval { low, high: if reach < tokens { high } else { f64::INFINITY } })
}

/// The interval of a share of tokens, never narrower than that of as many independent tokens (Wilson's at 95 %), because windows
/// that all agree say nothing of their spread; between 0 and 1.
pub fn share_interval(windows: &[f64], tokens: usize, level: f64, stream: Stream) -> Option<Interval> {
    let interval = mean_interval(windows, level, stream)?;
    let (share, n, z) = (mean(windows).0, tokens.max(1) as f64, 1.96f64);
    let center = (share + z * z / (2.0 * n)) / (1.0 + z * z / n);
    let reach = z / (1.0 + z * z / n) * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt();
    Some(Interval { low: interval.low.min(center - reach).max(0.0), high: interval.high.max(center + reach).min(1.0) })
}

/// The value at a rank of 0 to 1 among values, which are reordered; NaN when there is none.
pub fn quantile(values: &mut [f64], rank: f64) -> f64 {
    match values.len() {
        0 => f64::NAN,
        count => *values.select_nth_unstable_by(((rank * count as f64) as usize).min(count - 1), f64::total_cmp).1,
    }
}

/// Numbers of windows, as many as there are, drawn with replacement.
fn draws(windows: usize, stream: Stream) -> impl Iterator<Item = usize> {
    (0..windows as u64).map(move |draw| ((stream.uniform(draw) * windows as f64) as usize).min(windows - 1))
}

/// The values that cut off the tails of a sorted sample.
fn tails(sorted: &[f64], level: f64) -> [f64; 2] {
    let tail = (1.0 - level) / 2.0;
    let at = |rank: f64| sorted[((rank * (sorted.len() + 1) as f64).round() as usize).clamp(1, sorted.len()) - 1];
    [at(tail), at(1.0 - tail)]
}

/// How many times the windows it takes until an interval around `value` no longer reaches `limit`, if the value stays:
/// the width of an interval falls with the root of the number of windows. Infinite where the value is the limit.
pub fn times_more(value: f64, interval: Interval, limit: f64) -> f64 {
    let reach = if value < limit { interval.high - value } else { value - interval.low };
    (reach / (limit - value).abs()).powi(2)
}

/// Spearman's rank correlation; NaN when one side has no spread.
///
/// # Panics
/// When the sides have different lengths.
pub fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "pairs");
    let (a, b) = (ranks(a), ranks(b));
    let center = (a.len() as f64 - 1.0) / 2.0;
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - center) * (b - center)).sum::<f64>();
    product(&a, &b) / (product(&a, &a) * product(&b, &b)).sqrt()
}

/// Ranks from 0; equal values share the mean of their ranks.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    for tied in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let first = order.partition_point(|&at| values[at].total_cmp(&values[tied[0]]).is_lt());
        tied.iter().for_each(|&at| ranks[at] = first as f64 + (tied.len() - 1) as f64 / 2.0);
    }
    ranks
}

/// A figure with so many digits after the point, or as a power of ten where it has too many before it.
pub fn shown(value: f64, digits: usize) -> String {
    if value.abs() < 1e7 { format!("{value:.digits$}") } else { format!("{value:.3e}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A standard normal number.
    fn normal(stream: Stream, index: u64) -> f64 {
        (-2.0 * stream.uniform(2 * index).ln()).sqrt() * (std::f64::consts::TAU * stream.uniform(2 * index + 1)).cos()
    }

    /// Means of windows of 64 tokens as divergences are: skewed, and tokens of a window alike.
    fn simulated(windows: usize, stream: Stream) -> Vec<f64> {
        let window = |window: usize| {
            let stream = stream.child(window as u64);
            let alike = 0.5 * normal(stream, 0);
            (1..=64).map(|token| (alike + normal(stream, token)).exp()).sum::<f64>() / 64.0
        };
        (0..windows).map(window).collect()
    }

    #[test]
    fn intervals_cover_the_truth_in_93_to_97_percent_of_500_runs() {
        let truth = 0.625f64.exp();
        for windows in [16, 40] {
            let covered = (0..500u64).filter(|&run| {
                let stream = Stream::new(7).child(run).child(windows as u64);
                let interval = mean_interval(&simulated(windows, stream.child(0)), LEVEL, stream.child(1)).unwrap();
                interval.low <= truth && truth <= interval.high
            });
            let covered = covered.count();
            assert!((465..=485).contains(&covered), "{covered} of 500 with {windows} windows");
        }
    }

    #[test]
    fn figures_stay_short() {
        assert_eq!([shown(12.345_678, 4), shown(-0.5, 2), shown(1.797e308, 4)], ["12.3457", "-0.50", "1.797e308"]);
    }

    #[test]
    fn an_interval_needs_windows_and_closes_where_nothing_varies() {
        let stream = Stream::new(0);
        assert_eq!(mean_interval(&[1.0; FEWEST - 1], LEVEL, stream), None);
        assert_eq!(mean_interval(&[0.25; FEWEST], LEVEL, stream), Some(Interval { low: 0.25, high: 0.25 }));
        let values: Vec<f64> = (0..20).map(f64::from).collect();
        let (narrow, wide) = (mean_interval(&values, 0.8, stream).unwrap(), mean_interval(&values, 0.99, stream).unwrap());
        assert!(wide.low < narrow.low && narrow.low < 9.5 && narrow.high > 9.5 && narrow.high < wide.high);
    }

    #[test]
    fn quantiles_and_their_intervals_follow_the_tokens() {
        assert_eq!(quantile(&mut [3.0, 1.0, 2.0, 4.0], 0.5), 3.0);
        let windows: Vec<Vec<f64>> = (0..30).map(|window| (0..100).map(|token| f64::from((token * 37 + window) % 100)).collect()).collect();
        let interval = quantile_interval(&windows, 0.9, LEVEL, Stream::new(1)).unwrap();
        assert!(interval.low <= 90.0 && interval.high >= 90.0 && interval.high - interval.low < 3.0, "{interval:?}");
    }

    #[test]
    fn few_tokens_bound_neither_a_share_nor_a_high_quantile() {
        let stream = Stream::new(2);
        let all = share_interval(&[1.0; 8], 8, LEVEL, stream).unwrap();
        assert!(all.low < 0.7 && all.high == 1.0, "{all:?}");
        assert!(share_interval(&[1.0; 8], 8000, LEVEL, stream).unwrap().low > 0.999);
        let few: Vec<Vec<f64>> = (0..8).map(|window| vec![f64::from(window); 10]).collect();
        assert_eq!(quantile_interval(&few, 0.99, LEVEL, stream).unwrap().high, f64::INFINITY);
    }

    #[test]
    fn the_rank_correlation_is_that_of_hand_computed_ranks() {
        assert!((rank_correlation(&[1.0, 2.0, 3.0, 4.0], &[10.0, 100.0, 1e4, 1e9]) - 1.0).abs() < 1e-12);
        assert!((rank_correlation(&[1.0, 2.0, 3.0, 4.0], &[4.0, 3.0, 2.0, 1.0]) + 1.0).abs() < 1e-12);
        // Ranks 0, 1.5, 1.5, 3 against 0, 2, 1, 3: 4.5 / √(4.5 · 5).
        assert!((rank_correlation(&[1.0, 2.0, 2.0, 3.0], &[1.0, 3.0, 2.0, 4.0]) - 4.5 / 22.5f64.sqrt()).abs() < 1e-12);
        assert!(rank_correlation(&[1.0, 1.0], &[1.0, 2.0]).is_nan());
    }

    #[test]
    fn more_windows_decide_by_the_square_of_what_is_missing() {
        let interval = Interval { low: 0.6, high: 1.4 };
        assert!((times_more(1.0, interval, 1.1) - 16.0).abs() < 1e-9 && (times_more(1.0, interval, 0.8) - 4.0).abs() < 1e-9);
        assert_eq!(times_more(1.0, interval, 1.0), f64::INFINITY);
    }
}
