//! Draws from the softmax of logits that come slice by slice, in one pass, and the numbers that decide them.
//!
//! The vocabulary is cut into blocks. Block B gets the score ln Σ_{t∈B} exp(logit_t) + G_B with Gumbel noise G_B; the
//! block of the highest score is B with probability Σ_B exp / Σ exp, and inside it a token is drawn by its share of
//! the block's sum. That is an exact draw: the largest of Gumbel-shifted logits falls into a block with that
//! probability. The noise hangs on the number of the block's first token, so nothing depends on the slices' order.

use crate::kernels::exponential::exp;
use crate::kernels::{maximum, sum_lanes, vectorized};

/// Tokens of a block; a slice whose length is no multiple of it ends with a shorter one.
const BLOCK: usize = 256;

/// Numbered random numbers: the n-th output of splitmix64 (Steele, Lea and Flood 2014) for a seed, in any order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(u64);

impl Stream {
    /// The numbers of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Number `index`: the state after index + 1 steps of the golden ratio, mixed.
    pub fn number(self, index: u64) -> u64 {
        let mut z = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(index.wrapping_add(1)));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A stream of its own for everything called `index`.
    #[must_use]
    pub fn child(self, index: u64) -> Self {
        Self(self.number(index))
    }

    /// A number between 0 and 1, both excluded.
    pub fn uniform(self, index: u64) -> f64 {
        ((self.number(index) >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }
}

/// The token chosen among the logits seen so far.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    /// Numbers of the draw; none for the most likely token.
    stream: Option<Stream>,
    score: f64,
    token: Option<u32>,
    damaged: bool,
}

impl Choice {
    /// The most likely token; the lowest number on ties.
    pub fn greedy() -> Self {
        Self { stream: None, score: f64::NEG_INFINITY, token: None, damaged: false }
    }

    /// A draw at temperature 1; the numbers 2t and 2t + 1 of the stream belong to the block that begins with token t.
    pub fn sampled(stream: Stream) -> Self {
        Self { stream: Some(stream), ..Self::greedy() }
    }

    /// Takes in the logits of the tokens `first..first + logits.len()`; a token with −∞ is never chosen.
    pub fn add(&mut self, logits: &[f32], first: u32) {
        for (number, block) in logits.chunks(BLOCK).enumerate() {
            let first = first + (number * BLOCK) as u32;
            let [highest, total] = vectorized(
                #[inline(always)]
                || {
                    let highest = maximum(block);
                    [highest, sum_lanes(block, |logit| exp(logit - highest))]
                },
            );
            if highest == f32::NEG_INFINITY && block.iter().all(|&logit| logit == highest) {
                continue;
            }
            self.damaged |= !total.is_finite();
            let score = match self.stream {
                Some(stream) => f64::from(highest) + f64::from(total).ln() - (-stream.uniform(2 * u64::from(first)).ln()).ln(),
                None => f64::from(highest),
            };
            if score > self.score {
                self.score = score;
                let index = match self.stream {
                    Some(stream) => share(block, highest, stream.uniform(2 * u64::from(first) + 1)),
                    None => block.iter().position(|&logit| logit == highest).unwrap_or(0),
                };
                self.token = Some(first + index as u32);
            }
        }
    }

    /// The token; `None` when there was none to choose or a logit was not a number.
    pub fn token(&self) -> Option<u32> {
        self.token.filter(|_| !self.damaged)
    }
}

/// The first index up to which the exponentials hold more than the share `at` of their sum.
fn share(logits: &[f32], highest: f32, at: f64) -> usize {
    let weight = |logit: f32| f64::from(exp(logit - highest));
    let target = at * logits.iter().map(|&logit| weight(logit)).sum::<f64>();
    let (mut sum, mut last) = (0.0, 0);
    for (index, weight) in logits.iter().map(|&logit| weight(logit)).enumerate().filter(|(_, weight)| *weight > 0.0) {
        (sum, last) = (sum + weight, index);
        if sum > target {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_splitmix64() {
        let found: Vec<u64> = (0..5).map(|index| Stream::new(1_234_567).number(index)).collect();
        let published = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ];
        assert_eq!(found, published);
    }

    /// Σ (observed − expected)² / expected over all tokens, for draws of the softmax in slices of some length.
    fn chi_square(logits: &[f32], slice: usize, draws: u64) -> f64 {
        let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        let mut counts = vec![0.0f64; logits.len()];
        for draw in 0..draws {
            let mut choice = Choice::sampled(Stream::new(7).child(draw));
            for (number, part) in logits.chunks(slice).enumerate() {
                choice.add(part, (number * slice) as u32);
            }
            counts[choice.token().unwrap() as usize] += 1.0;
        }
        let expected = logits.iter().map(|&logit| f64::from(logit).exp() / total * draws as f64);
        counts
            .iter()
            .zip(expected)
            .filter(|(_, expected)| *expected > 0.0)
            .map(|(found, expected)| (found - expected).powi(2) / expected)
            .sum()
    }

    #[test]
    fn draws_follow_the_softmax_inside_one_block_and_across_many() {
        // 99.99 % of the chi-square distribution with 7 degrees of freedom lie below 29.9, with 599 below 738.
        let few = [0.0, 1.0, -1.5, 2.0, 0.3, -0.7, 1.4, f32::NEG_INFINITY, 0.9];
        for slice in [9, 1, 4] {
            let found = chi_square(&few, slice, 40_000);
            assert!((0.5..29.9).contains(&found), "slices of {slice}: {found}");
        }
        let many: Vec<f32> = (0..600).map(|i| ((i * 37) % 101) as f32 * 0.02 + if i < 256 { 1.0 } else { 0.0 }).collect();
        for slice in [600, 512, 100] {
            let found = chi_square(&many, slice, 200_000);
            assert!((480.0..738.0).contains(&found), "slices of {slice}: {found}");
        }
    }

    #[test]
    fn a_greedy_choice_is_the_most_likely_token_and_damage_is_no_choice() {
        let mut logits: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32).collect();
        logits[700] = 500.0;
        logits[900] = 500.0;
        let chosen = |logits: &[f32], mut choice: Choice| {
            choice.add(&logits[..600], 0);
            choice.add(&logits[600..], 600);
            choice.token()
        };
        assert_eq!(chosen(&logits, Choice::greedy()), Some(700));
        for broken in [f32::NAN, f32::INFINITY] {
            logits[3] = broken;
            assert_eq!(chosen(&logits, Choice::greedy()), None);
            assert_eq!(chosen(&logits, Choice::sampled(Stream::new(0))), None);
        }
        assert_eq!(chosen(&[f32::NEG_INFINITY; 700], Choice::sampled(Stream::new(0))), None);
        assert_eq!(chosen(&[f32::NAN; 700], Choice::greedy()), None);
    }
}
