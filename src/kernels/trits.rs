//! Two trit-planes per group: w ≈ α₁·t₁ + α₂·t₂, by alternating a ridge solve for the scales and an exact search of
//! the nine pairs (PTQTP, arXiv:2509.16989, as specified in methods-quant §3).
//!
//! The nine levels 0, ±α₂, ±(α₁−α₂), ±α₁, ±(α₁+α₂) are symmetric, so the nearest one follows from |w| and the four
//! midpoints between the five levels that are not negative. The statistics of the next solve — how many weights of a
//! group take each pair and the sum of their magnitudes — are differences of sums over |w| above a threshold. One
//! pass of compare and add per iteration is all the search costs; trits are written once, at the end.
//!
//! A group is scaled by a power of two so that its largest magnitude lies in 1..2, which is exact and keeps every sum
//! in range. Plane 1 is always the coarser one: signs and the order of the planes are free, and both scales are kept
//! in the order α₁ ≥ α₂ ≥ 0. Weights that are zero, pruned ones too, take (0, 0) and weigh nothing in the solve.

pub mod gpu;

use rayon::prelude::*;

use crate::kernels::quantize::{decodable, stored_scale};
use crate::kernels::{sum_lanes, vectorized};
use crate::weight::{Float, Ints, Trits, Weight};

/// How the fit goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// Columns that share scales.
    pub group: usize,
    /// Whether the residual start is tried besides the sign start, and the better kept.
    pub residual_start: bool,
    /// Rounds of solve and search at most, two or more.
    pub max_iters: u32,
    /// The rounds end when the scales move less than this.
    pub epsilon: f64,
    /// Whether `epsilon` is absolute; else it is relative to the mean magnitude of the group's weights.
    pub absolute: bool,
}

/// Lanes of a sum: a fixed number, so that sums do not depend on the processor.
const LANES: usize = 16;
/// Magnitudes per sum in f32; totals of such sums are f64.
const BLOCK: usize = 512;
/// What every weight counts where all count alike.
const ONES: [f32; BLOCK] = [1.0; BLOCK];

/// The four pairs (t₁, t₂) of a positive weight besides (0, 0), in the order of all that is indexed by pair below.
const PAIRS: [[f64; 2]; 4] = [[0.0, 1.0], [1.0, -1.0], [1.0, 0.0], [1.0, 1.0]];

/// Fits free scales, stored as f16. `importance` weighs the columns in the solve. Gives the trits, and the sums of
/// squares of the error and of the weights.
pub fn fit_free(weight: &Weight, rule: Rule, importance: Option<&[f32]>) -> (Trits, [f64; 2]) {
    let [rows, columns] = weight.shape();
    let (codes, scales, change) = fit_rows(weight, rule, importance, Stored::Free);
    (Trits { rows, columns, group: rule.group, codes, scales, scale_float: Float::F16 }, change)
}

/// Fits scales tied by α₁ = 3·α₂, which makes the levels the whole multiples −4..4 of α₂: 4-bit integers on a
/// symmetric grid with the scale α₂. Gives what [`fit_free`] gives.
pub fn fit_tied(weight: &Weight, rule: Rule, importance: Option<&[f32]>, scale_float: Float) -> (Ints, [f64; 2]) {
    let [rows, columns] = weight.shape();
    let (mut codes, scales, change) = fit_rows(weight, rule, importance, Stored::Tied(scale_float));
    codes.iter_mut().for_each(|code| *code = code.wrapping_add(4));
    let scales = scales.iter().map(|&[_, fine]| fine).collect();
    (Ints { rows, columns, bits: 4, group: rule.group, codes, scales, scale_float, zeros: None }, change)
}

/// What is stored of the scales.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stored {
    /// Both, as f16.
    Free,
    /// The finer one in this format; the coarser is three times it.
    Tied(Float),
}

type Fitted = (Vec<u8>, Vec<[f32; 2]>, [f64; 2]);

/// Fits row by row, groups of a row one after the other.
fn fit_rows(weight: &Weight, rule: Rule, importance: Option<&[f32]>, stored: Stored) -> Fitted {
    let [rows, columns] = weight.shape();
    let groups = columns.div_ceil(rule.group);
    let (mut codes, mut scales) = (vec![0u8; rows * columns], vec![[0.0f32; 2]; rows * groups]);
    let mut sums = vec![[0.0f64; 2]; rows];
    let decoded = if let Weight::Stored(_) = weight { None } else { Some(weight.to_matrix()) };
    let lines = codes.par_chunks_mut(columns.max(1)).zip(scales.par_chunks_mut(groups.max(1))).zip(&mut sums);
    lines.enumerate().with_min_len(4).for_each_init(
        || (Vec::new(), Group::default()),
        |(decoding, group), (row, ((codes, scales), sums))| {
            let weights = match (weight, &decoded) {
                (Weight::Stored(stored), _) => {
                    decoding.resize(columns, 0.0);
                    stored.rows_into(row, decoding);
                    &decoding[..]
                }
                (_, decoded) => decoded.as_ref().map_or(&[][..], |matrix| matrix.row(row)),
            };
            vectorized(
                #[inline(always)]
                || {
                    for (index, (codes, weights)) in codes.chunks_mut(rule.group).zip(weights.chunks(rule.group)).enumerate() {
                        let importance = importance.map(|all| &all[index * rule.group..][..weights.len()]);
                        let change;
                        (scales[index], change) = fit_group(group, weights, importance, rule, stored, codes);
                        *sums = [sums[0] + change[0], sums[1] + change[1]];
                    }
                },
            );
        },
    );
    let sums = sums.iter().fold([0.0; 2], |total, row| [total[0] + row[0], total[1] + row[1]]);
    (codes, scales, sums)
}

/// Scales and codes 3·t₁ + t₂ + 4 of a group, and the sums of squares of its error and of its weights.
#[inline(always)]
fn fit_group(
    group: &mut Group,
    weights: &[f32],
    importance: Option<&[f32]>,
    rule: Rule,
    stored: Stored,
    codes: &mut [u8],
) -> ([f32; 2], [f64; 2]) {
    group.read(weights, importance);
    let (scales, _) = group.fit(rule, stored);
    let levels = Levels::new(scales.map(|scale| f64::from(scale) * group.factor));
    let error = assign(&group.magnitudes, weights, &levels, codes);
    let unit = group.factor.recip().powi(2);
    (scales, [error * unit, group.squares * unit])
}

/// The magnitudes of a group, scaled by a power of two, in whole lanes: padding is zero, which nothing counts.
#[derive(Debug, Default)]
struct Group {
    /// |w| · factor; zero where the weight is not finite.
    magnitudes: Vec<f32>,
    /// The same, zero too where the weight is negative.
    positive: Vec<f32>,
    /// Importance per weight with a mean of one; empty where all count alike.
    importance: Vec<f32>,
    /// Importance times magnitude; empty likewise.
    products: Vec<f32>,
    /// Largest magnitude to 1..2.
    factor: f64,
    /// Σ magnitude².
    squares: f64,
}

impl Group {
    #[inline(always)]
    fn read(&mut self, weights: &[f32], importance: Option<&[f32]>) {
        let magnitude = |weight: &f32| {
            let bits = weight.to_bits() & 0x7fff_ffff;
            if bits < 0x7f80_0000 { bits } else { 0 }
        };
        let largest = weights.iter().map(magnitude).fold(0, u32::max);
        let exponent = (largest >> 23).clamp(1, 253);
        let factor = f32::from_bits((254 - exponent) << 23);
        let length = weights.len().next_multiple_of(LANES);
        self.magnitudes.clear();
        self.magnitudes.extend(weights.iter().map(|weight| f32::from_bits(magnitude(weight)) * factor));
        self.magnitudes.resize(length, 0.0);
        self.positive.clear();
        self.positive.extend(self.magnitudes.iter().zip(weights).map(|(&magnitude, &weight)| if weight > 0.0 { magnitude } else { 0.0 }));
        self.positive.resize(length, 0.0);
        self.factor = f64::from(factor);
        self.squares = self.magnitudes.chunks(BLOCK).map(|part| f64::from(sum_lanes(part, |value| value * value))).sum();
        self.importance.clear();
        self.products.clear();
        let Some(importance) = importance else { return };
        let mean = importance.iter().map(|&one| f64::from(one)).sum::<f64>() / importance.len().max(1) as f64;
        if mean > 0.0 && mean.is_finite() {
            let scale = mean.recip();
            self.importance.extend(importance.iter().map(|&one| (f64::from(one) * scale) as f32));
            self.importance.resize(length, 0.0);
            self.products.extend(self.importance.iter().zip(&self.magnitudes).map(|(one, magnitude)| one * magnitude));
        }
    }

    /// The stored scales of the best start, and the rounds that the sign start took.
    #[inline(always)]
    fn fit(&self, rule: Rule, stored: Stored) -> ([f32; 2], u32) {
        let whole = self.above([0.0, f32::INFINITY, f32::INFINITY, f32::INFINITY]);
        let mean = whole.sums[0] / whole.counts[0].max(f64::MIN_POSITIVE);
        let epsilon = if rule.absolute { rule.epsilon * self.factor } else { rule.epsilon * mean };
        let (mut best, mut least, mut rounds) = ([0.0f32; 2], f64::INFINITY, 0);
        for start in 0..1 + u32::from(rule.residual_start) {
            let residual = start == 1;
            let first = if residual { self.residual_start(mean) } else { self.sign_start(&whole, stored) };
            let taken = u32::from(!residual && stored == Stored::Free);
            let (scales, more) = self.alternate(first, rule.max_iters.saturating_sub(taken), epsilon, stored);
            let scales = store(scales, self.factor, stored);
            let rounded = scales.map(|scale| f64::from(scale) * self.factor);
            rounds = if residual { rounds } else { taken + more };
            // A start that stands alone needs no comparison.
            let change = if rule.residual_start { self.search(rounded).change_of_error(rounded) } else { 0.0 };
            if change < least {
                (best, least) = (scales, change);
            }
        }
        (best, rounds)
    }

    /// Rounds of solve and search until the scales rest. Gives them and the number of rounds.
    #[inline(always)]
    fn alternate(&self, mut statistics: Statistics, max_iters: u32, epsilon: f64, stored: Stored) -> ([f64; 2], u32) {
        let mut before = [f64::INFINITY; 2];
        let mut round = 1;
        loop {
            let scales = if stored == Stored::Free { statistics.ridge() } else { statistics.tied() };
            let moved = (scales[0] - before[0]).powi(2) + (scales[1] - before[1]).powi(2);
            // The search that would follow is made later, against the scales as stored.
            if moved < epsilon * epsilon || round >= max_iters {
                return (scales, round);
            }
            statistics = self.search(scales);
            before = scales;
            round += 1;
        }
    }

    /// Every weight to the nearest level: what each pair then holds.
    #[inline(always)]
    fn search(&self, scales: [f64; 2]) -> Statistics {
        let levels = Levels::new(scales);
        self.above(levels.thresholds).by_pair(levels.fine_first)
    }

    /// t₁ = t₂ = sign(w), solved and searched once: the trits of the second round. Its scales are equal, so weights of
    /// middling magnitude may take (0, 1) or (1, 0). The negative ones go to plane 1, the positive ones to plane 2, as
    /// in a search of the pairs in lexicographic order; were all to go to one plane, the planes would grow apart and
    /// rest at a higher error (on normal weights 0.0283 against 0.0274, on Laplacian ones 0.050 against 0.041).
    #[inline(always)]
    fn sign_start(&self, whole: &Above, stored: Stored) -> Statistics {
        let sign = Statistics { counts: [0.0, 0.0, 0.0, whole.counts[0]], sums: [0.0, 0.0, 0.0, whole.sums[0]] };
        if stored != Stored::Free {
            return sign;
        }
        let levels = Levels::new(sign.ridge());
        let mut all = self.above(levels.thresholds).by_pair(levels.fine_first);
        let positive = self.above_among(&self.positive, levels.thresholds).by_pair(levels.fine_first);
        let middle = [all.counts[0], all.sums[0]];
        (all.counts[0], all.sums[0]) = (positive.counts[0], positive.sums[0]);
        (all.counts[2], all.sums[2]) = (middle[0] - positive.counts[0], middle[1] - positive.sums[0]);
        all
    }

    /// t₁ = TWN(w), t₂ = TWN(w − α·t₁), where TWN keeps the sign of what exceeds 0.7 of the mean magnitude.
    #[inline(always)]
    fn residual_start(&self, mean: f64) -> Statistics {
        const SHARE: f64 = 0.7;
        let coarse = SHARE * mean;
        let kept = self.above([coarse as f32, f32::INFINITY, f32::INFINITY, f32::INFINITY]);
        let scale = (kept.sums[0] / kept.counts[0].max(f64::MIN_POSITIVE)).max(coarse);
        let [all, kept, upper, _] = self.above([0.0, coarse as f32, scale as f32, f32::INFINITY]).pairs();
        let below = all[1] - kept[1];
        let lower = [kept[0] - upper[0], kept[1] - upper[1]];
        let residual = below + (upper[1] - scale * upper[0]) + (scale * lower[0] - lower[1]);
        let fine = SHARE * residual / all[0].max(f64::MIN_POSITIVE);
        // What the coarse plane meets exactly keeps (1, 0), also where nothing else is left over.
        let thresholds = [above(fine.min(coarse)), above(coarse), from((scale - fine).max(coarse)), above(scale + fine)];
        self.above(thresholds).by_pair(true)
    }

    /// Importance and sum of the magnitudes above each of four thresholds.
    #[inline(always)]
    fn above(&self, thresholds: [f32; 4]) -> Above {
        self.above_among(&self.magnitudes, thresholds)
    }

    /// As [`Self::above`], where some magnitudes may have been set to zero.
    #[inline(always)]
    fn above_among(&self, magnitudes: &[f32], thresholds: [f32; 4]) -> Above {
        let mut total = Above { counts: [0.0; 4], sums: [0.0; 4] };
        for (index, part) in magnitudes.chunks(BLOCK).enumerate() {
            let range = index * BLOCK..index * BLOCK + part.len();
            if self.products.is_empty() {
                total.add(above_in_block(part, &ONES[..part.len()], part, thresholds));
            } else {
                total.add(above_in_block(part, &self.importance[range.clone()], &self.products[range], thresholds));
            }
        }
        total
    }
}

/// What [`Group::above`] adds up, over one block. Each threshold has its own pass over sixteen lanes, because a loop over
/// thresholds inside is what compilers turn into shuffles; the lanes of all eight sums are then added together.
#[inline(always)]
fn above_in_block(magnitudes: &[f32], importance: &[f32], products: &[f32], thresholds: [f32; 4]) -> Above {
    const HALF: usize = LANES / 2;
    let mut lanes = [[0.0f32; HALF]; 8];
    for (k, threshold) in thresholds.into_iter().enumerate() {
        let (mut counts, mut sums) = ([0.0f32; LANES], [0.0f32; LANES]);
        let chunks = magnitudes.as_chunks::<LANES>().0.iter().zip(importance.as_chunks::<LANES>().0);
        for ((magnitudes, importance), products) in chunks.zip(products.as_chunks::<LANES>().0) {
            for lane in 0..LANES {
                let mask = u32::from(magnitudes[lane] > threshold).wrapping_neg();
                sums[lane] += f32::from_bits(products[lane].to_bits() & mask);
                counts[lane] += f32::from_bits(importance[lane].to_bits() & mask);
            }
        }
        for lane in 0..HALF {
            lanes[k][lane] = counts[lane] + counts[lane + HALF];
            lanes[k + 4][lane] = sums[lane] + sums[lane + HALF];
        }
    }
    let mut totals = [0.0f32; 8];
    for lane in 0..HALF {
        for (total, lanes) in totals.iter_mut().zip(&lanes) {
            *total += lanes[lane];
        }
    }
    let [a, b, c, d, sums @ ..] = totals.map(f64::from);
    Above { counts: [a, b, c, d], sums }
}

/// Importance and sum of the magnitudes above four ascending thresholds.
#[derive(Debug, Clone, Copy)]
struct Above {
    counts: [f64; 4],
    sums: [f64; 4],
}

impl Above {
    #[inline(always)]
    fn add(&mut self, other: Self) {
        for k in 0..4 {
            self.counts[k] += other.counts[k];
            self.sums[k] += other.sums[k];
        }
    }

    #[inline(always)]
    fn pairs(&self) -> [[f64; 2]; 4] {
        std::array::from_fn(|k| [self.counts[k], self.sums[k]])
    }

    /// What lies between thresholds, by pair. Ascending, the levels belong to (0, 1), (1, −1), (1, 0), (1, 1) when
    /// the finer level comes first, else the first two change places.
    #[inline(always)]
    fn by_pair(&self, fine_first: bool) -> Statistics {
        let between = |all: [f64; 4]| {
            let [a, b, c, d] = [all[0] - all[1], all[1] - all[2], all[2] - all[3], all[3]];
            if fine_first { [a, b, c, d] } else { [b, a, c, d] }
        };
        Statistics { counts: between(self.counts), sums: between(self.sums) }
    }
}

/// How many weights take each of [`PAIRS`], by importance, and the sum of their magnitudes.
#[derive(Debug, Clone, Copy)]
struct Statistics {
    counts: [f64; 4],
    sums: [f64; 4],
}

impl Statistics {
    /// α = (SᵀS + λI)⁻¹Sᵀw, with λ ten times larger until the condition number is at most 10⁶ or λ is 1.
    ///
    /// The determinant of SᵀS is a sum of products that are not negative (Cauchy–Binet), so nothing cancels, and
    /// without importance it is an exact integer.
    #[inline(always)]
    fn ridge(&self) -> [f64; 2] {
        const LARGEST_CONDITION: f64 = 1e6;
        let ([fine, less, coarse, more], [fine_sum, less_sum, coarse_sum, more_sum]) = (self.counts, self.sums);
        let (n11, n22, n12) = (less + coarse + more, fine + less + more, more - less);
        let gram = fine * n11 + less * coarse + 4.0 * less * more + coarse * more;
        let right = [less_sum + coarse_sum + more_sum, fine_sum - less_sum + more_sum];
        let mut lambda = 1e-8;
        let determinant = loop {
            let determinant = gram + lambda * (n11 + n22) + lambda * lambda;
            let norm = (n11 + lambda).powi(2) + (n22 + lambda).powi(2) + 2.0 * n12 * n12;
            if norm <= LARGEST_CONDITION * determinant || lambda >= 1.0 {
                break determinant;
            }
            lambda = (10.0 * lambda).min(1.0);
        };
        // In this form equal planes give equal scales, and n − n12 does not cancel against λ.
        let [difference, unit] = [n12 * (right[0] - right[1]), determinant.recip()];
        let first = ((n22 - n12) * right[0] + lambda * right[0] + difference) * unit;
        let second = ((n11 - n12) * right[1] + lambda * right[1] - difference) * unit;
        let (first, second) = (first.abs(), second.abs());
        if first >= second { [first, second] } else { [second, first] }
    }

    /// The least-squares step of levels that are multiples of it, as (3α, α).
    #[inline(always)]
    fn tied(&self) -> [f64; 2] {
        let ([fine, less, coarse, more], [fine_sum, less_sum, coarse_sum, more_sum]) = (self.counts, self.sums);
        let squares = fine + 4.0 * less + 9.0 * coarse + 16.0 * more;
        let products = fine_sum + 2.0 * less_sum + 3.0 * coarse_sum + 4.0 * more_sum;
        let step = if squares > 0.0 { products / squares } else { 0.0 };
        [3.0 * step, step]
    }

    /// ‖w − Sα‖² − ‖w‖².
    #[inline(always)]
    fn change_of_error(&self, scales: [f64; 2]) -> f64 {
        let mut change = 0.0;
        for (pair, (count, sum)) in PAIRS.iter().zip(self.counts.iter().zip(self.sums)) {
            let level = pair[0] * scales[0] + pair[1] * scales[1];
            change += level * (level * count - 2.0 * sum);
        }
        change
    }
}

/// The scales in stored form, for the weights before they were multiplied by `factor`.
#[inline(always)]
fn store([coarse, fine]: [f64; 2], factor: f64, stored: Stored) -> [f32; 2] {
    let largest = f64::from(f32::MAX);
    let [coarse, fine] = [(coarse / factor).min(largest) as f32, (fine / factor).min(largest) as f32];
    match stored {
        Stored::Free => [Float::F16.round(coarse), Float::F16.round(fine)],
        Stored::Tied(_) if fine == 0.0 => [3.0, 1.0],
        Stored::Tied(float) => {
            let fine = decodable(stored_scale(fine, float), 4.0, float);
            [3.0 * fine, fine]
        }
    }
}

/// The positive levels of two scales and where the nearest level changes, ascending.
#[derive(Debug, Clone, Copy)]
struct Levels {
    /// A magnitude above this is nearer to the level of the same index, or to a later one, than to any earlier.
    thresholds: [f32; 4],
    levels: [f64; 4],
    /// Whether α₂ is below α₁ − α₂.
    fine_first: bool,
}

impl Levels {
    /// Of scales α₁ ≥ α₂ ≥ 0. Where two levels are equally near, (0, 0) goes first, then the sparser pair, then the
    /// finer plane: thresholds round down so that in f32 `>` decides as exact arithmetic would, and the threshold of
    /// a level that equals another one leaves it nothing.
    #[inline(always)]
    fn new([coarse, fine]: [f64; 2]) -> Self {
        let (less, more) = (coarse - fine, coarse + fine);
        let fine_first = fine < less;
        let (low, high) = if fine_first { (fine, less) } else { (less, fine) };
        let first = above(0.5 * low);
        // (0, 1) wins against (1, −1), and (1, 0) too: equality goes up where (1, −1) is the lower of the two.
        let second = if fine_first { above(0.5 * (low + high)) } else { from(0.5 * (low + high)) };
        let third = if fine_first { from(0.5 * (high + coarse)) } else { above(0.5 * (high + coarse)) };
        let fourth = above(0.5 * (coarse + more));
        let thresholds = if coarse == 0.0 {
            [f32::INFINITY; 4]
        } else if fine == 0.0 {
            let half = above(0.5 * coarse);
            [half, half, half, f32::INFINITY]
        } else if less == 0.0 {
            let half = above(0.5 * fine);
            [half, half, fourth, fourth]
        } else if low == high {
            [first, first, third, fourth]
        } else {
            [first, second, third, fourth]
        };
        Self { thresholds, levels: [low, high, coarse, more], fine_first }
    }
}

/// The f32 above which f32 numbers are above `middle`.
#[inline(always)]
fn above(middle: f64) -> f32 {
    let rounded = middle as f32;
    lower(rounded, f64::from(rounded) > middle)
}

/// The f32 above which f32 numbers are at least `middle`.
#[inline(always)]
fn from(middle: f64) -> f32 {
    let rounded = middle as f32;
    lower(rounded, f64::from(rounded) >= middle)
}

/// The next f32 below a positive one when `step` says so, without a branch.
#[inline(always)]
fn lower(positive: f32, step: bool) -> f32 {
    f32::from_bits(positive.to_bits().saturating_sub(u32::from(step)))
}

/// Writes the code of the nearest level of every weight. Gives the sum of squares of the error of the magnitudes.
#[inline(always)]
fn assign(magnitudes: &[f32], weights: &[f32], levels: &Levels, codes: &mut [u8]) -> f64 {
    const PART: usize = 128;
    /// Adding 2^23 puts a small whole number into the low bits.
    const WHOLE: f32 = 8_388_608.0;
    let steps: [f32; 4] = if levels.fine_first { [1.0, 2.0, 3.0, 4.0] } else { [2.0, 1.0, 3.0, 4.0] };
    let (mut chosen, mut error, mut total) = ([0.0f32; PART], [0.0f32; PART], 0.0f64);
    let values = levels.levels.map(|level| level as f32);
    for ((codes, weights), magnitudes) in codes.chunks_mut(PART).zip(weights.chunks(PART)).zip(magnitudes.chunks(PART)) {
        let (chosen, error) = (&mut chosen[..weights.len()], &mut error[..weights.len()]);
        for (((chosen, error), &weight), &magnitude) in chosen.iter_mut().zip(&mut *error).zip(weights).zip(magnitudes) {
            let (mut step, mut value) = (0.0f32, 0.0f32);
            for k in 0..4 {
                let over = magnitude > levels.thresholds[k];
                step = if over { steps[k] } else { step };
                value = if over { values[k] } else { value };
            }
            *chosen = step.copysign(weight);
            *error = magnitude - value;
        }
        for (code, &chosen) in codes.iter_mut().zip(&*chosen) {
            *code = (chosen + (WHOLE + 4.0)).to_bits() as u8;
        }
        total += f64::from(sum_lanes(error, |error| error * error));
    }
    total
}

#[cfg(test)]
mod tests;
