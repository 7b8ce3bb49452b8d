//! SignRound: rounding offsets and grid parameters learned by signed gradient descent, block by block.
//!
//! Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
//! arXiv:2309.05516, with AutoRound's defaults, and SignRoundV2, arXiv:2512.04746 (scale search, outlier-suppressed
//! loss below 4 bits), as specified in methods-quant §1. The target is the original float block on the float stream, the
//! input the compressed stream, also after pruning. `init = "closed-form"` starts from the codes of
//! [`crate::methods::closed_form`] with offsets inside their cells (quality-records §2d).
//!
//! Which start wins was measured as mean KLD, groups of 128, 200 iterations, on a model of 7M parameters / one of 260k.
//! 4 bits: closed form 0.0064 / 0.0745, searched grids – / 0.0812, ranges – / 0.0824. 3 bits: 0.0246 / 0.278, 0.0265 /
//! 0.271, – / 0.310. 2 bits: 0.0952 / 0.921, 0.1039 / 0.887, – / 1.192. After 50 iterations at 4 bits, 7M parameters:
//! closed form 0.0063, ranges 0.0089. The closed form wins on the larger model and everywhere at 4 bits, so it is the
//! default. With learning rates of 1/50 half a hundred iterations from it ended where they began or worse; see `lr`.
//!
//! Beyond the paper: the start, the best mini-batch and the last state are compared on the same calibration windows and the
//! best is kept; the loss with outliers suppressed drops them per window. The adjoint's products are rounded to
//! bfloat16 where the processor multiplies it, because only signs are read. Needs both streams; leaves integers.

use crate::device::Buffer;
use crate::error::{Error, Result};
use crate::kernels::quantize::round_to_nearest;
use crate::kernels::rough_product::Precision;
use crate::kernels::scale_search::{Scale, grids};
use crate::kernels::sign_descent::gpu::OnGpu;
use crate::kernels::sign_descent::{Rounding, Start};
use crate::matrix::Matrix;
use crate::methods::closed_form::ClosedForm;
use crate::methods::gptq::mask;
use crate::methods::round_to_nearest::Group;
use crate::methods::{Applied, BlockApplied, BlockLayer, BlockMethod, Layer, Method, float_output, quantizable};
use crate::model::backward::{Gradients, Wanted};
use crate::model::bench::Bench;
use crate::model::block::{Parameters, Slot};
use crate::model::seen::Needs;
use crate::weight::{Ints, Storage, Weight};

/// Bits below which outliers of the loss are suppressed by default.
const LOW_BITS: u8 = 4;

/// Share of the entries of the output that are dropped then.
const TRIM: f64 = 1e-3;

/// Windows on which the candidates are compared at the end.
const JUDGED: usize = 32;

/// Where learning starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Init {
    /// Round to nearest on the range of every group.
    Range,
    /// Round to nearest on searched grids (SignRoundV2).
    Search,
    /// The closed form.
    ClosedForm,
}

/// Iterations by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// 50 iterations with the learning rate of 200.
    Light,
    /// 200 iterations.
    #[default]
    Default,
    /// 1000 iterations.
    Best,
}

/// Options of SignRound.
#[derive(Debug, Clone, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct SignRound {
    /// Bits per weight, 2..=8.
    pub bits: u8,
    /// Columns that share a scale.
    pub group: Group,
    /// Whether the zero point is fixed in the middle of the range.
    pub symmetric: bool,
    /// `light`, `default` or `best`.
    pub preset: Preset,
    /// Iterations; those of the preset when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iters: Option<usize>,
    /// Learning rate of the offsets; when absent 1 / iterations, from the closed form at most 1 / 200 below 4 bits and 1 / 500
    /// else. It falls linearly to zero.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Learning rate of the grids; when absent `lr`, from the closed form a fifth of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grid_lr: Option<f64>,
    /// Windows per iteration.
    pub batch: usize,
    /// Where learning starts; the closed form when absent, plain rounding when there are no iterations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<Init>,
    /// Share of the largest errors that do not count; 0.001 below 4 bits, else 0, when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trim: Option<f64>,
}

impl Default for SignRound {
    fn default() -> Self {
        Self {
            bits: 4,
            group: Group::default(),
            symmetric: true,
            preset: Preset::default(),
            iters: None,
            lr: None,
            grid_lr: None,
            batch: 8,
            init: None,
            trim: None,
        }
    }
}

impl SignRound {
    fn iterations(&self) -> usize {
        self.iters.unwrap_or(match self.preset {
            Preset::Light => 50,
            Preset::Default => 200,
            Preset::Best => 1000,
        })
    }

    fn start(&self) -> Init {
        self.init.unwrap_or(if self.iterations() == 0 { Init::Range } else { Init::ClosedForm })
    }

    /// Learning rates of the offsets and of the grids. AutoRound's; from the closed form, which is close to an optimum, at
    /// most 1/200 below 4 bits, 1/500 from there on, and a fifth of that: with 1/50 half a hundred iterations lead away
    /// from it.
    fn rates(&self) -> [f64; 2] {
        let iterations = self.iterations().max(1) as f64;
        let near = self.start() == Init::ClosedForm;
        let automatic = match self.preset {
            Preset::Light if self.iters.is_none() => 1.0 / 200.0,
            _ if self.iterations() >= 1000 && self.bits < LOW_BITS => 2.0 / iterations,
            _ if near => 1.0 / iterations.max(if self.bits < LOW_BITS { 200.0 } else { 500.0 }),
            _ => 1.0 / iterations,
        };
        let rate = self.lr.unwrap_or(automatic);
        [rate, self.grid_lr.unwrap_or(if near { rate / 5.0 } else { rate })]
    }

    fn trim(&self) -> f64 {
        self.trim.unwrap_or(if self.bits < LOW_BITS { TRIM } else { 0.0 })
    }
}

impl Method for SignRound {
    fn iterations(&self) -> Option<usize> {
        Some(SignRound::iterations(self))
    }

    fn needs(&self) -> Needs {
        Needs::Streams
    }

    fn leaves(&self, before: Storage, [_, columns]: [usize; 2], bits: Option<u8>) -> Result<Storage> {
        quantizable(before, bits.unwrap_or(self.bits), "signround")?;
        for (name, value, most) in [("lr", self.lr, 1.0), ("grid_lr", self.grid_lr, 1.0), ("trim", self.trim, 0.5)] {
            if let Some(value) = value.filter(|value| !(0.0..=most).contains(value)) {
                return Err(Error::input(format!("{name} is {value}, use 0 to {most}, or leave it out")));
            }
        }
        if self.batch == 0 || self.iterations() > 1_000_000 {
            let (batch, iterations) = (self.batch, self.iterations());
            return Err(Error::input(format!(
                "batch is {batch} and iters {iterations}; use a batch of 1 or more and at most 1000000 iterations"
            )));
        }
        Ok(Storage::Ints { bits: bits.unwrap_or(self.bits), group: self.group.fit(columns), symmetric: self.symmetric })
    }

    fn apply(&self, _: Weight, layer: &Layer<'_>) -> Result<Applied> {
        Err(Error::run("signround works on whole blocks and needs calibration").tensor(layer.name))
    }

    fn block(&self) -> Option<&dyn BlockMethod> {
        Some(self)
    }

    fn options(&self) -> toml::Table {
        toml::Table::try_from(self).unwrap_or_default()
    }
}

/// A layer that is being learned.
struct Learned {
    slot: Slot,
    rounding: Rounding,
    first: Ints,
    best: Ints,
    /// The layer on a GPU while it learns there, and its best state.
    there: Option<OnGpu>,
    snapshot: Option<[Buffer; 2]>,
}

impl BlockMethod for SignRound {
    fn apply_block(&self, bench: &mut Bench<'_>, layers: &[BlockLayer]) -> Result<BlockApplied> {
        let mut applied = BlockApplied::default();
        if layers.is_empty() {
            return Ok(applied);
        }
        let mut learned = self.begin(bench, layers, &mut applied)?;
        bench.settled = false;
        applied.curve = self.learn(bench, &mut learned)?;
        let chosen = self.judge(bench, &learned)?;
        for one in learned {
            let last = one.rounding.ints();
            let linear = bench.linear(one.slot).ok_or_else(|| Error::run("not part of the block"))?;
            linear.weight = Weight::Ints(match chosen {
                0 => one.first,
                1 => one.best,
                _ => last,
            });
        }
        Ok(applied)
    }
}

impl SignRound {
    /// Every layer at its start; the block holds the integers that learning starts from.
    fn begin(&self, bench: &mut Bench<'_>, layers: &[BlockLayer], applied: &mut BlockApplied) -> Result<Vec<Learned>> {
        let masks: Vec<Option<Matrix>> =
            layers.iter().map(|layer| bench.block.linear(layer.slot).and_then(|linear| mask(&linear.weight).cloned())).collect();
        if self.start() == Init::ClosedForm {
            let closed = ClosedForm { bits: self.bits, group: self.group, symmetric: self.symmetric, ..ClosedForm::default() };
            // Learning takes longer by far.
            let [from, to] = bench.progress.split(0.1);
            let told = float_output::by_site(bench, layers, &closed)?;
            bench.progress.part(from, to);
            applied.notes = told.into_iter().flat_map(|(slot, told)| told.notes.into_iter().map(move |note| (slot, note))).collect();
        }
        let mut learned = Vec::new();
        for (layer, mask) in layers.iter().zip(masks) {
            let goal = bench.original(layer.slot)?.ok_or_else(|| Error::run("the original block was not kept").tensor(&layer.name))?;
            let seen = if layer.slot.expert.is_some() { None } else { bench.seen.at(layer.slot.role.site()).ok() };
            let squares = seen.map_or_else(|| vec![1.0; goal.columns], |seen| seen.squares.clone());
            let linear = bench.linear(layer.slot).ok_or_else(|| Error::run("not part of the block").tensor(&layer.name))?;
            let view = Layer {
                name: &layer.name,
                statistics: None,
                float: layer.float,
                bits: layer.bits,
                sparsity: None,
                bounds: layer.bounds.as_ref(),
                goal: None,
                gpu: None,
            };
            let grid = view.grid(self.bits, self.group, self.symmetric, goal.columns);
            let ranged = mask.as_ref().unwrap_or(&goal);
            let (start, ints) = match (self.start(), &linear.weight) {
                (Init::ClosedForm, Weight::Ints(ints)) => (Start::Codes, ints.clone()),
                (Init::Search, _) => {
                    let importance: Vec<f32> = squares.iter().map(|&square| square as f32).collect();
                    (Start::Grid, grids(ranged, grid, Scale::Search, &importance, layer.bounds.as_ref()))
                }
                _ if layer.bounds.is_some() => {
                    (Start::Grid, grids(ranged, grid, Scale::FullRange, &vec![1.0; goal.columns], layer.bounds.as_ref()))
                }
                _ => (Start::Range, round_to_nearest(ranged, grid).0),
            };
            let rounding = Rounding::new(start, &goal, mask.as_ref(), &ints);
            let first = rounding.ints();
            linear.weight = Weight::Ints(first.clone());
            learned.push(Learned { slot: layer.slot, rounding, best: first.clone(), first, there: None, snapshot: None });
        }
        Ok(learned)
    }

    /// The iterations; gives the loss of each, before its step.
    fn learn(&self, bench: &Bench<'_>, learned: &mut [Learned]) -> Result<Vec<f64>> {
        let (iterations, [rate, grid_rate], trim) = (self.iterations(), self.rates(), self.trim());
        let mut parameters = bench.parameters()?;
        let mut gradients = Gradients::default();
        let mut sampler = Sampler::new(bench.hidden.len(), bench.run.seed ^ (bench.index() as u64) << 32);
        let wanted = Wanted { weights: true, norms: false, input: false, precision: Precision::Rough };
        let (mut curve, mut best) = (Vec::with_capacity(iterations), f64::INFINITY);
        if let Some(gpu) = bench.run.device.gpu.as_ref().filter(|_| parameters.elsewhere()) {
            learned.iter_mut().for_each(|one| one.there = OnGpu::new(gpu, one.rounding.clone()));
        }
        for iteration in 0..iterations {
            bench.run.check_stop()?;
            bench.progress.within(iteration as f64 / iterations as f64);
            fill(&mut parameters, learned);
            gradients.clear();
            let loss = bench.descend_into(&parameters, &sampler.next(self.batch), trim, wanted, &mut gradients)?;
            if loss < best {
                best = loss;
                learned.iter_mut().for_each(Learned::keep);
            }
            curve.push(loss);
            let left = 1.0 - iteration as f64 / iterations as f64;
            for one in learned.iter_mut() {
                one.step(&gradients, [rate * left, grid_rate * left].map(|rate| rate as f32))?;
            }
        }
        learned.iter_mut().try_for_each(Learned::come_back)?;
        Ok(curve)
    }

    /// Which of start (0), best mini-batch (1) and last state (2) is best on the same windows.
    fn judge(&self, bench: &Bench<'_>, learned: &[Learned]) -> Result<usize> {
        if self.iterations() == 0 {
            return Ok(0);
        }
        let count = bench.hidden.len();
        let windows: Vec<usize> = (0..count).step_by(count.div_ceil(JUDGED).max(1)).collect();
        let mut parameters = bench.parameters()?;
        let mut best = (f64::INFINITY, 0);
        for candidate in 0..3 {
            for one in learned {
                let floats = match candidate {
                    0 => one.first.to_matrix(),
                    1 => one.best.to_matrix(),
                    _ => one.rounding.ints().to_matrix(),
                };
                parameters.refill(one.slot, |weight| weight.copy_from_slice(&floats.data));
            }
            let loss = bench.loss(&parameters, &windows)?;
            if loss < best.0 {
                best = (loss, candidate);
            }
        }
        Ok(best.1)
    }
}

/// Puts the weights as they would be stored into the block's tensors, in the memory of the old ones.
fn fill(parameters: &mut Parameters, learned: &[Learned]) {
    for one in learned {
        match &one.there {
            Some(there) => parameters.set_weight_buffer(one.slot.role, there.gpu(), there.quantized().clone()),
            None => parameters.refill(one.slot, |floats| one.rounding.quantize(floats)),
        }
    }
}

impl Learned {
    /// Keeps the state as the best one.
    fn keep(&mut self) {
        match &self.there {
            Some(there) => self.snapshot = Some(there.snapshot()),
            None => self.best = self.rounding.ints(),
        }
    }

    /// A signed step on offsets and on the grid.
    fn step(&mut self, gradients: &Gradients, [rate, grid_rate]: [f32; 2]) -> Result<()> {
        match &self.there {
            Some(there) => {
                let gradient = gradients.weight_buffer(self.slot.role, there.gpu());
                there.step(&gradient.ok_or_else(|| Error::run("a gradient is not on the GPU"))?, rate, grid_rate);
            }
            None => self.rounding.step(&gradients.fetched_weight(self.slot), rate, grid_rate),
        }
        Ok(())
    }

    /// Fetches from a GPU what was learned there.
    fn come_back(&mut self) -> Result<()> {
        if let Some(there) = self.there.take() {
            self.rounding = there.fetch()?;
            if let Some(snapshot) = self.snapshot.take() {
                self.best = there.fetch_snapshot(&snapshot)?.ints();
            }
        }
        Ok(())
    }
}

/// Windows in shuffled order, again and again; what does not fill a batch at the end of a round is dropped.
struct Sampler {
    order: Vec<usize>,
    at: usize,
    state: u64,
}

impl Sampler {
    fn new(count: usize, seed: u64) -> Self {
        Self { order: (0..count).collect(), at: count, state: seed }
    }

    /// splitmix64.
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ self.state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn next(&mut self, batch: usize) -> Vec<usize> {
        let batch = batch.min(self.order.len());
        if self.at + batch > self.order.len() {
            for last in (1..self.order.len()).rev() {
                let other = (self.random() % (last as u64 + 1)) as usize;
                self.order.swap(last, other);
            }
            self.at = 0;
        }
        self.at += batch;
        self.order[self.at - batch..self.at].to_vec()
    }
}
