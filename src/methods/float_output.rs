//! The corrected target: a layer aims at the float model's output on the inputs that the compressed model gives it.
//!
//! Source: quality-records §2a (GPTAQ arXiv:2504.02692, QEP, Qronos arXiv:2505.11695, LoaQ arXiv:2509.06297). With
//! H = AᵀA, C = (F − A)ᵀA and N = RᵀA the minimiser of ‖F Wᵀ + R − A Ŵᵀ‖² over float Ŵ is
//! W* = W + (α W C + β N)(H + λI)⁻¹, and any method that works in Gram space then aims at W*. The strengths α and β
//! follow a rule (§3.3): by tokens per column, and with enough tokens by the loss on held-out windows, which needs no
//! forward: with D = Ŵ − W it is tr(D H Dᵀ) − 2 tr(D (W C + N)ᵀ) + constant.

use std::sync::Arc;

use rayon::prelude::*;

use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::kernels::factor::Factor;
use crate::kernels::gemm::{Sizes, View, product};
use crate::matrix::Matrix;
use crate::methods::{Applied, BlockLayer, Layer, Method, Strength};
use crate::model::arrivals::{Aim, Caught, Craft};
use crate::model::bench::Bench;
use crate::model::block::{self, Linear, Slot};
use crate::model::capture::Capture;
use crate::weight::{Sparse, Weight};

/// λ as a share of the mean diagonal of H.
const RIDGE: f64 = 0.05;

/// Tokens per column from which the full correction is safe enough to be tried, and below which little of it is.
const PLENTY: f64 = 12.0;
const FEW: f64 = 4.0;

/// The strengths that the guard tries.
const CANDIDATES: [Strength; 4] = [
    Strength { alpha: 0.0, beta: 0.0 },
    Strength { alpha: 0.25, beta: 0.25 },
    Strength { alpha: 0.5, beta: 0.5 },
    Strength { alpha: 1.0, beta: 1.0 },
];

/// One site of a block, ready to correct the layers that read it.
#[derive(Debug)]
pub struct Site {
    most: Part,
    held: Option<Part>,
    all: Part,
}

/// Some windows' statistics with what corrections need of them.
#[derive(Debug)]
struct Part {
    capture: Capture,
    factor: Option<Arc<Factor>>,
}

impl Part {
    fn new(capture: Capture, solves: bool) -> Self {
        let columns = capture.statistics.squares.len();
        let factor = capture.statistics.gram.as_ref().filter(|_| solves).and_then(|gram| {
            let damped = crate::kernels::factor::damped(gram, columns, RIDGE);
            Factor::new(&damped, columns).map(Arc::new)
        });
        Self { capture, factor }
    }

    /// W C and N, `outputs × columns` each.
    fn sides(&self, weight: &Matrix) -> [Vec<f32>; 2] {
        let n = weight.columns;
        let cross: Vec<f32> = self.capture.cross.iter().map(|&value| value as f32).collect();
        let mut side = vec![0.0; weight.data.len()];
        let sizes = Sizes { m: weight.rows, n, k: n };
        product(sizes, &mut side, n, false, 1.0, View::rows(&weight.data, n), View::rows(&cross, n), true);
        let residual = self.capture.residual.as_ref().map(|residual| residual.iter().map(|&value| value as f32).collect());
        [side, residual.unwrap_or_else(|| vec![0.0; weight.data.len()])]
    }

    /// W C (H + λI)⁻¹ and N (H + λI)⁻¹.
    fn directions(&self, weight: &Matrix) -> Option<[Vec<f32>; 2]> {
        let factor = self.factor.as_ref()?;
        let [inputs, residual] = self.sides(weight);
        let solved = |side: Vec<f32>| if side.iter().all(|&value| value == 0.0) { Some(side) } else { factor.solve_rows_f32(&side) };
        Some([solved(inputs)?, solved(residual)?])
    }

    /// D H of some rows of `columns`, in single precision.
    fn pushed(&self, rows: &[f32], columns: usize) -> Vec<f32> {
        let gram: Vec<f32> = self.capture.statistics.gram.iter().flatten().map(|&value| value as f32).collect();
        let mut pushed = vec![0.0; rows.len()];
        let sizes = Sizes { m: rows.len() / columns.max(1), n: columns, k: columns };
        product(sizes, &mut pushed, columns, false, 1.0, View::rows(rows, columns), View::rows(&gram, columns), true);
        pushed
    }

    /// Sums of squares of the error of a layer's output and of that output, for a weight that integers stand for: those errors are
    /// spread over all inputs, so that single precision does.
    fn error(&self, weight: &Matrix, got: &Matrix) -> Option<[f64; 2]> {
        self.capture.statistics.gram.as_ref()?;
        let difference: Vec<f32> = got.data.iter().zip(&weight.data).map(|(got, weight)| got - weight).collect();
        Some([&difference, &weight.data].map(|rows| {
            let pushed = self.pushed(rows, weight.columns);
            rows.iter().zip(&pushed).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>().max(0.0)
        }))
    }

    /// The loss of a compressed weight up to a constant.
    fn loss(&self, weight: &Matrix, got: &Matrix, sides: &[Vec<f32>; 2]) -> f64 {
        let n = weight.columns;
        let difference: Vec<f32> = got.data.iter().zip(&weight.data).map(|(got, weight)| got - weight).collect();
        let pushed = self.pushed(&difference, n);
        let row = |row: usize| -> f64 {
            let range = row * n..(row + 1) * n;
            range.map(|i| f64::from(difference[i]) * (f64::from(pushed[i]) - 2.0 * (f64::from(sides[0][i]) + f64::from(sides[1][i])))).sum()
        };
        let rows: Vec<f64> = (0..weight.rows).into_par_iter().map(row).collect();
        rows.iter().sum()
    }
}

impl Site {
    /// Prepares what was captured at a site.
    pub fn new((most, held): (Capture, Option<Capture>)) -> Self {
        let all = held.as_ref().map_or_else(|| most.clone(), |held| most.merged(held));
        let plenty = tokens_per_column(&all) >= PLENTY;
        let held = held.filter(|_| plenty).map(|held| Part::new(held, false));
        Self { most: Part::new(most, held.is_some()), held, all: Part::new(all, true) }
    }

    /// Applies a method to a weight, aimed at the float model's output. `original` is the layer's dense weight. Gives
    /// the strengths that were used.
    ///
    /// # Errors
    /// As the method.
    pub fn apply(&self, method: &dyn Method, weight: Weight, original: &Matrix, layer: &Layer<'_>) -> Result<(Applied, Strength)> {
        if !self.all.capture.cross.iter().all(|value| value.is_finite()) {
            return Err(Error::input("the calibration inputs are not finite").tensor(layer.name));
        }
        let strength = match method.strength() {
            Some(strength) => strength,
            None => self.choose(method, &weight, original, layer)?,
        };
        let mut applied = run(&self.all, method, weight, original, layer, strength)?;
        if self.all.factor.is_none() {
            applied.notes.push("the inputs do not determine a corrected target; the layer aims at its own weight".into());
        }
        Ok((applied, strength))
    }

    /// The strengths by the rule, or by the held-out loss.
    fn choose(&self, method: &dyn Method, weight: &Weight, original: &Matrix, layer: &Layer<'_>) -> Result<Strength> {
        let ratio = tokens_per_column(&self.all.capture);
        let Some(held) = &self.held else {
            let strength = if ratio >= FEW { 0.5 } else { 0.25 };
            return Ok(Strength { alpha: strength, beta: strength });
        };
        let sides = held.sides(original);
        let rough = method.rough();
        let mut best = (f64::INFINITY, CANDIDATES[0]);
        for strength in CANDIDATES {
            let got = run(&self.most, rough.as_deref().unwrap_or(method), weight.clone(), original, layer, strength)?;
            let loss = held.loss(original, &got.weight.to_matrix(), &sides);
            if loss < best.0 {
                best = (loss, strength);
            }
        }
        Ok(best.1)
    }
}

impl Site {
    /// Applies a method to a layer; gives what the user should know.
    fn on_layer(
        &self,
        method: &dyn Method,
        linear: &mut Linear,
        original: &Matrix,
        one: &BlockLayer,
        gpu: Option<&Gpu>,
    ) -> Result<Vec<String>> {
        let weight = std::mem::replace(&mut linear.weight, Weight::Dense(Matrix::new(0, 0, Vec::new())));
        let layer = Layer {
            name: &one.name,
            statistics: None,
            float: one.float,
            bits: one.bits,
            sparsity: one.sparsity,
            bounds: one.bounds.as_ref(),
            goal: None,
            gpu,
        };
        let (applied, Strength { alpha, beta }) = self.apply(method, weight, original, &layer)?;
        linear.weight = applied.weight;
        let mut notes = applied.notes;
        notes.push(format!("target corrected by {alpha} for inputs and {beta} for the residual stream"));
        Ok(notes)
    }
}

/// What is told of a layer.
#[derive(Debug)]
pub struct Told {
    /// What the user should know.
    pub notes: Vec<String>,
    /// Of a layer of an expert, whose statistics nobody keeps: sums of squares of the error of its output and of that output.
    pub layer_error: Option<[f64; 2]>,
}

/// A method on the layers of experts.
struct OnExperts<'a> {
    method: &'a dyn Method,
    layers: &'a [BlockLayer],
}

impl Craft for OnExperts<'_> {
    type Prepared = Option<Site>;
    type Told = Told;

    fn aim(&self) -> Aim {
        Aim::FloatOutput
    }

    fn wants(&self, slot: Slot) -> bool {
        BlockLayer::find(self.layers, slot).is_some()
    }

    fn prepare(&self, caught: Caught) -> Option<Site> {
        match caught {
            Caught::Streams(captures) => Some(Site::new(*captures)),
            Caught::Statistics(_) => None,
        }
    }

    fn work(&self, prepared: &Option<Site>, linear: &mut Linear, slot: Slot, original: Option<Matrix>) -> Result<Told> {
        let layer = BlockLayer::find(self.layers, slot);
        let missing = || Error::run("the original block was not kept");
        let (prepared, original, layer) =
            (prepared.as_ref().ok_or_else(missing)?, original.ok_or_else(missing)?, layer.ok_or_else(missing)?);
        let notes = prepared.on_layer(self.method, linear, &original, layer, None)?;
        let layer_error = prepared.all.error(&original, &linear.weight.to_matrix());
        Ok(Told { notes, layer_error })
    }
}

/// Applies a method to layers of a block, which come in the order of their slots, site after site, each seeing what the layers
/// before it now give.
///
/// # Errors
/// As the method, or when hidden states cannot be read.
pub fn by_site(bench: &mut Bench<'_>, layers: &[BlockLayer], method: &dyn Method) -> Result<Vec<(Slot, Told)>> {
    let mut told = Vec::new();
    let gpu = bench.run.device.gpu.as_ref();
    for site in block::Site::ALL {
        if bench.block.experts.is_some() && site == block::Site::Mlp {
            bench.arrive()?;
            told.extend(bench.on_experts(&OnExperts { method, layers })?);
            break;
        }
        if !bench.reads(site) {
            continue;
        }
        let capture = bench.capture(site)?;
        let reads: Vec<&BlockLayer> = layers.iter().filter(|layer| layer.slot.expert.is_none() && layer.slot.role.site() == site).collect();
        if reads.is_empty() {
            continue;
        }
        let prepared = Site::new(capture);
        for one in reads {
            bench.run.check_stop()?;
            let original = bench.original(one.slot)?.ok_or_else(|| Error::run("the original block was not kept").tensor(&one.name))?;
            let linear = bench.linear(one.slot).ok_or_else(|| Error::run("not part of the block").tensor(&one.name))?;
            let notes = prepared.on_layer(method, linear, &original, one, gpu).map_err(|error| error.tensor(&one.name))?;
            told.push((one.slot, Told { notes, layer_error: None }));
        }
    }
    bench.settled = true;
    Ok(told)
}

/// Applies a method with the statistics of some windows, aimed at the corrected weight.
fn run(part: &Part, method: &dyn Method, weight: Weight, original: &Matrix, layer: &Layer<'_>, strength: Strength) -> Result<Applied> {
    let mut goal = original.clone();
    if strength != CANDIDATES[0]
        && let Some([inputs, residual]) = part.directions(original)
    {
        let (alpha, beta) = (strength.alpha as f32, strength.beta as f32);
        goal.data.iter_mut().zip(inputs.iter().zip(&residual)).for_each(|(goal, (a, b))| *goal += alpha * a + beta * b);
    }
    let weight = match weight {
        sparse @ Weight::Sparse(Sparse { .. }) => sparse,
        _ => Weight::Dense(goal.clone()),
    };
    method.apply(weight, &Layer { statistics: Some(&part.capture.statistics), goal: Some(&goal), ..*layer })
}

fn tokens_per_column(capture: &Capture) -> f64 {
    capture.statistics.tokens as f64 / capture.statistics.squares.len().max(1) as f64
}
