//! Methods turn one weight into another. A method is an options struct, a ten-line adapter and the paper's equation
//! as a pure function; a new one is a file here and a line in [`METHODS`].

pub mod admm;
pub mod closed_form;
pub mod float_output;
pub mod gptq;
pub mod k_quant;
pub mod magnitude;
pub mod norm_refit;
pub mod norm_tweak;
pub mod precalibrate;
pub mod ptqtp;
pub mod reap;
pub mod round_to_nearest;
pub mod signround;
pub mod sparsegpt;
pub mod wanda;

use std::fmt::Debug;

use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::kernels::quantize::{Bounds, Grid};
use crate::matrix::Matrix;
use crate::methods::round_to_nearest::Group;
use crate::model::bench::Bench;
use crate::model::block::Slot;
use crate::model::mixture::Mixture;
use crate::model::seen::{Needs, Statistics};
use crate::weight::{Float, Pattern, Storage, Weight};

/// What a method is told about one linear layer.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    /// Full name without `.weight`.
    pub name: &'a str,
    /// What was seen at its input; `None` without calibration.
    pub statistics: Option<&'a Statistics>,
    /// Number format of the model, in which scales are stored.
    pub float: Float,
    /// Bits to use instead of the method's own, where the plan says so.
    pub bits: Option<u8>,
    /// Share of weights to prune instead of the method's own, where the plan says so.
    pub sparsity: Option<f64>,
    /// Ranges that a pre-calibration chose for the grids.
    pub bounds: Option<&'a Bounds>,
    /// For methods that aim at the float model's output: the corrected weight, dense even where the weight is pruned.
    pub goal: Option<&'a Matrix>,
    /// The GPU that kernels run on, where the run has one.
    pub gpu: Option<&'a Gpu>,
}

impl Layer<'_> {
    /// The grid for a layer of `columns`, with the plan's bits before the method's.
    pub fn grid(&self, bits: u8, group: Group, symmetric: bool, columns: usize) -> Grid {
        Grid { bits: self.bits.unwrap_or(bits), group: group.fit(columns), symmetric, scale_float: self.float }
    }

    /// The Gram matrix of the layer's inputs, `inputs × inputs`.
    ///
    /// # Errors
    /// When there is none, or it is not finite.
    pub fn gram(&self) -> Result<&[f64]> {
        let gram = self.statistics.and_then(|statistics| statistics.gram.as_deref());
        let gram = gram.ok_or_else(|| Error::run("no calibration was seen").tensor(self.name))?;
        match gram.iter().all(|value| value.is_finite()) {
            true => Ok(gram),
            false => Err(Error::input("the Gram matrix of the calibration inputs is not finite").tensor(self.name)),
        }
    }
}

/// A weight after a method, and how far it is from the weight before.
#[derive(Debug)]
pub struct Applied {
    /// The weight.
    pub weight: Weight,
    /// Sums of squares of the change and of the weight before.
    pub change: [f64; 2],
    /// Ranges for the grids of a quantizing stage that follows.
    pub bounds: Option<Bounds>,
    /// What the user should know, each a sentence without the layer's name.
    pub notes: Vec<String>,
}

impl Applied {
    /// A weight and its change, with nothing to note.
    pub fn new(weight: Weight, change: [f64; 2]) -> Self {
        Self { weight, change, bounds: None, notes: Vec::new() }
    }
}

/// What a method brings the compressed layer close to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// The layer's own weight, on the inputs that the compressed model gives it.
    #[default]
    Weight,
    /// The output that the layer has in the float model, on the inputs that the compressed model gives it
    /// (quality-records §2a): the method is handed a corrected weight, and inputs are seen anew after every site.
    FloatOutput,
}

/// How strongly a target is corrected, 0..=1: for inputs (α) and for the residual stream (β).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Strength {
    /// α of quality-records §2a.
    pub alpha: f64,
    /// β of quality-records §2a.
    pub beta: f64,
}

/// A compression method for linear layers.
pub trait Method: Debug + Send + Sync {
    /// What must have been seen.
    fn needs(&self) -> Needs;

    /// What must have been seen for what it aims at: both streams where that is the float model's output.
    fn sees(&self) -> Needs {
        if self.target() == Target::FloatOutput { Needs::Streams } else { self.needs() }
    }

    /// What the compressed layer is brought close to.
    fn target(&self) -> Target {
        Target::Weight
    }

    /// How strongly it aims at the float model's output; `None` leaves that to the rule.
    fn strength(&self) -> Option<Strength> {
        None
    }

    /// A cheaper form of the method whose results tell strengths apart as well; `None` when there is none.
    fn rough(&self) -> Option<Box<dyn Method>> {
        None
    }

    /// What it makes of a weight stored like this, of shape `[outputs, inputs]`, so that a format can refuse before
    /// any work starts. `bits` as in [`Layer::bits`].
    ///
    /// # Errors
    /// When it cannot take such a weight, with the reason.
    fn leaves(&self, before: Storage, shape: [usize; 2], bits: Option<u8>) -> Result<Storage>;

    /// The grid that the ranges in [`Applied::bounds`] are for: what the quantizing stage that follows must leave.
    fn prepares(&self, _columns: usize, _bits: Option<u8>) -> Option<Storage> {
        None
    }

    /// Applies the method to a weight.
    ///
    /// # Errors
    /// When the weight or the statistics do not permit it.
    fn apply(&self, weight: Weight, layer: &Layer<'_>) -> Result<Applied>;

    /// The method as one that works on a block as a whole, where it does; [`Self::apply`] is then not called.
    fn block(&self) -> Option<&dyn BlockMethod> {
        None
    }

    /// Iterations over a block, where it learns: its option `iters`, or what stands for it.
    fn iterations(&self) -> Option<usize> {
        None
    }

    /// Whether it removes experts of mixtures.
    fn removes_experts(&self) -> bool {
        false
    }

    /// How many experts it leaves of a mixture, where it removes some.
    ///
    /// # Errors
    /// When the mixture does not permit it.
    fn experts_left(&self, _mixture: &Mixture) -> Option<Result<usize>> {
        None
    }

    /// Whether it changes norms.
    fn norms(&self) -> bool {
        false
    }

    /// The options, as a recipe writes them.
    fn options(&self) -> toml::Table;
}

/// A linear layer of a block that a stage works on.
#[derive(Debug, Clone)]
pub struct BlockLayer {
    /// Which layer of the block.
    pub slot: Slot,
    /// Full name without `.weight`.
    pub name: String,
    /// Number format of the model, in which scales are stored.
    pub float: Float,
    /// Bits to use instead of the method's own, where the plan says so.
    pub bits: Option<u8>,
    /// Share of weights to prune instead of the method's own, where the plan says so.
    pub sparsity: Option<f64>,
    /// Ranges that a pre-calibration chose for the grids.
    pub bounds: Option<Bounds>,
}

impl BlockLayer {
    /// That of a slot, among layers in the order of their slots.
    pub fn find(layers: &[Self], slot: Slot) -> Option<&Self> {
        layers.get(layers.binary_search_by_key(&slot, |layer| layer.slot).ok()?)
    }
}

/// What a method did to a block.
#[derive(Debug, Default)]
pub struct BlockApplied {
    /// Loss by iteration.
    pub curve: Vec<f64>,
    /// What the user should know, by layer.
    pub notes: Vec<(Slot, String)>,
    /// What the user should know of the block as a whole.
    pub block_notes: Vec<String>,
}

/// A method that works on the layers or norms of a block together.
pub trait BlockMethod {
    /// Works on the block; `layers` are those that the plan gives to this stage.
    ///
    /// # Errors
    /// When weights or hidden states do not permit it.
    fn apply_block(&self, bench: &mut Bench<'_>, layers: &[BlockLayer]) -> Result<BlockApplied>;
}

/// One line of the registry.
#[derive(Debug)]
pub struct Entry {
    /// Name in recipes.
    pub name: &'static str,
    /// What it does, in one line.
    pub about: &'static str,
    /// Where it is from.
    pub source: &'static str,
    read: fn(toml::Table) -> Result<Box<dyn Method>, toml::de::Error>,
}

/// Every method.
pub const METHODS: &[Entry] = &[
    Entry {
        name: "round-to-nearest",
        about: "integers of 2 to 8 bits on a grid per group; no calibration",
        source: "baseline; signed full-range scales as in AutoRound",
        read: |options| Ok(Box::new(options.try_into::<round_to_nearest::RoundToNearest>()?)),
    },
    Entry {
        name: "k-quant",
        about: "llama.cpp's K types, searched under calibration statistics, with error feedback; for GGUF",
        source: "grids of ggml-quants.c; feedback of arXiv:2210.17323",
        read: |options| Ok(Box::new(options.try_into::<k_quant::KQuant>()?)),
    },
    Entry {
        name: "gptq",
        about: "integers with error feedback; the baseline of calibrated quantization",
        source: "arXiv:2210.17323",
        read: |options| Ok(Box::new(options.try_into::<gptq::Gptq>()?)),
    },
    Entry {
        name: "closed-form",
        about: "integers that aim at the float model's output: error feedback, descent and refitted scales, no gradients",
        source: "arXiv:2504.02692, arXiv:2210.17323, arXiv:2309.01885",
        read: |options| Ok(Box::new(options.try_into::<closed_form::ClosedForm>()?)),
    },
    Entry {
        name: "signround",
        about: "integers with rounding learned by signed gradient descent, block by block",
        source: "arXiv:2309.05516, arXiv:2512.04746",
        read: |options| Ok(Box::new(options.try_into::<signround::SignRound>()?)),
    },
    Entry {
        name: "norm-tweak",
        about: "tunes norms so that a compressed block's output has the statistics of the original's",
        source: "arXiv:2309.02784",
        read: |options| Ok(Box::new(options.try_into::<norm_tweak::NormTweak>()?)),
    },
    Entry {
        name: "norm-refit",
        about: "the norms in closed form, one solve per norm",
        source: "the aim of arXiv:2309.02784, solved",
        read: |options| Ok(Box::new(options.try_into::<norm_refit::NormRefit>()?)),
    },
    Entry {
        name: "magnitude",
        about: "prunes the smallest weights of each matrix; no calibration",
        source: "baseline",
        read: |options| Ok(Box::new(options.try_into::<magnitude::Magnitude>()?)),
    },
    Entry {
        name: "wanda",
        about: "prunes by weight times input norm, per output row or N:M",
        source: "arXiv:2306.11695",
        read: |options| Ok(Box::new(options.try_into::<wanda::Wanda>()?)),
    },
    Entry {
        name: "ptqtp",
        about: "two planes of trits with two scales per group, 3.45 bits; tied scales give 4-bit integers; no calibration",
        source: "arXiv:2509.16989",
        read: |options| Ok(Box::new(options.try_into::<ptqtp::Ptqtp>()?)),
    },
    Entry {
        name: "reap",
        about: "removes the experts of a mixture that give least: factor times norm of the output; first of all stages",
        source: "arXiv:2510.13999",
        read: |options| Ok(Box::new(options.try_into::<reap::Reap>()?)),
    },
    Entry {
        name: "sparsegpt",
        about: "prunes column by column and lets the columns after make up for it, per block of columns or N:M",
        source: "arXiv:2301.00774",
        read: |options| Ok(Box::new(options.try_into::<sparsegpt::SparseGpt>()?)),
    },
    Entry {
        name: "admm",
        about: "prunes and updates the weights together, over the whole matrix or N:M",
        source: "arXiv:2401.02938; refit as in arXiv:2406.07831",
        read: |options| Ok(Box::new(options.try_into::<admm::Admm>()?)),
    },
    Entry {
        name: "precalibrate",
        about: "keeps the distribution of the weights: ranges for the next stage's grids, or outliers apart; no calibration",
        source: "arXiv:2501.09107, our reading; storage = \"adpq\" is arXiv:2405.13358",
        read: |options| Ok(Box::new(options.try_into::<precalibrate::Precalibrate>()?)),
    },
];

/// The method of a recipe's stage.
///
/// # Errors
/// When the name is unknown or an option is wrong, naming what is known.
pub fn read(name: &str, options: toml::Table) -> Result<Box<dyn Method>> {
    let Some(entry) = METHODS.iter().find(|entry| entry.name == name) else {
        let known: Vec<&str> = METHODS.iter().map(|entry| entry.name).collect();
        let nearest = nearest(name, known.iter().copied());
        return Err(Error::input(format!("unknown method `{}`{nearest}; known are {}", crate::error::shown(name), known.join(", "))));
    };
    (entry.read)(options).map_err(|error| Error::input(format!("method {name}: {}", with_nearest(error.message()))))
}

/// ` (did you mean …?)` for a word that is close to a known one, else nothing.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    let likeness = |known: &str| strsim::jaro_winkler(word, known);
    let best = known.max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    best.filter(|best| likeness(best) > 0.7).map(|best| format!(" (did you mean `{best}`?)")).unwrap_or_default()
}

/// A message about an unknown field with the nearest known one.
pub fn with_nearest(message: &str) -> String {
    let mut words = message.split('`').skip(1).step_by(2);
    match (message.starts_with("unknown field"), words.next()) {
        (true, Some(word)) => format!("{message}{}", nearest(word, words)),
        _ => message.to_string(),
    }
}

/// Sums of squares of the difference between two equally long slices and of the first.
pub fn change(before: &[f32], after: &[f32]) -> [f64; 2] {
    use rayon::prelude::*;
    const CHUNK: usize = 1 << 16;
    let parts: Vec<[f64; 2]> = before
        .par_chunks(CHUNK)
        .zip(after.par_chunks(CHUNK))
        .map(|(before, after)| {
            before.iter().zip(after).fold([0.0f64; 2], |[change, total], (&before, &after)| {
                [change + f64::from(before - after).powi(2), total + f64::from(before).powi(2)]
            })
        })
        .collect();
    parts.iter().fold([0.0; 2], |total, part| [total[0] + part[0], total[1] + part[1]])
}

/// The share of weights to prune: what is asked for, 0.5 when nothing is; an N:M pattern has its own.
pub(crate) fn share(sparsity: Option<f64>, pattern: Pattern) -> Result<f64> {
    let own = match pattern {
        Pattern::Unstructured => None,
        Pattern::Blocks { kept, of } => Some(1.0 - kept as f64 / of as f64),
    };
    match (sparsity, own) {
        (Some(asked), _) if !(0.0..1.0).contains(&asked) => {
            Err(Error::input(format!("sparsity is {asked}, it must be at least 0 and below 1, like 0.5")))
        }
        (Some(asked), Some(own)) if (asked - own).abs() > 1e-9 => {
            Err(Error::input(format!("sparsity {asked} contradicts the pattern {pattern}, which prunes {own}; leave sparsity out")))
        }
        (asked, own) => Ok(own.or(asked).unwrap_or(0.5)),
    }
}

/// Refuses bits out of range and quantizing what is quantized already.
pub(crate) fn quantizable(before: Storage, bits: u8, method: &str) -> Result<()> {
    if !(2..=8).contains(&bits) {
        return Err(Error::input(format!("{bits} bits; {method} takes 2 to 8")));
    }
    match before {
        Storage::Dense | Storage::Sparse(_) => Ok(()),
        _ => Err(Error::input("quantizing twice is unsound: keep one quantizing stage")),
    }
}

/// Refuses pruning what is no longer floats, and an N:M pattern whose blocks do not divide the columns.
pub(crate) fn prunable(before: Storage, columns: usize, pattern: Pattern) -> Result<()> {
    if !matches!(before, Storage::Dense | Storage::Sparse(_)) {
        return Err(Error::input("pruning after quantization is unsound: put the pruning stage first"));
    }
    match pattern {
        Pattern::Blocks { of, .. } if !columns.is_multiple_of(of) => Err(Error::input(format!(
            "pattern {pattern}: {columns} columns are not a multiple of {of}; use another pattern or skip the layer"
        ))),
        _ => Ok(()),
    }
}
