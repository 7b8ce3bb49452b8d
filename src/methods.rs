//! Methods turn one weight into another. A method is an options struct, a ten-line adapter and the paper's equation
//! as a pure function; a new one is a file here and a line in [`METHODS`].

pub mod magnitude;
pub mod round_to_nearest;
pub mod wanda;

use std::fmt::Debug;

use crate::error::{Error, Result};
use crate::kernels::quantize::Bounds;
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
    /// Ranges that a pre-calibration chose for the grids.
    pub bounds: Option<&'a Bounds>,
}

impl Layer<'_> {
    /// The Gram matrix of the layer's inputs, `inputs × inputs`.
    ///
    /// # Errors
    /// When there is none, or it is not finite.
    pub fn gram(&self) -> Result<&[f64]> {
        let gram = self.statistics.and_then(|statistics| statistics.gram.as_deref());
        let gram = gram.ok_or_else(|| Error::run("no calibration was seen").tensor(self.name))?;
        match gram.iter().all(|value| value.is_finite()) {
            true => Ok(gram),
            false => Err(Error::run("the Gram matrix of the calibration inputs is not finite").tensor(self.name)),
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

/// A compression method for linear layers.
pub trait Method: Debug + Send + Sync {
    /// What must have been seen.
    fn needs(&self) -> Needs;

    /// What the compressed layer is brought close to.
    fn target(&self) -> Target {
        Target::Weight
    }

    /// What it makes of a weight stored like this, of shape `[outputs, inputs]`, so that a format can refuse before
    /// any work starts. `bits` as in [`Layer::bits`].
    ///
    /// # Errors
    /// When it cannot take such a weight, with the reason.
    fn leaves(&self, before: Storage, shape: [usize; 2], bits: Option<u8>) -> Result<Storage>;

    /// Applies the method to a weight.
    ///
    /// # Errors
    /// When the weight or the statistics do not permit it.
    fn apply(&self, weight: Weight, layer: &Layer<'_>) -> Result<Applied>;

    /// The options, as a recipe writes them.
    fn options(&self) -> toml::Table;
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
];

/// The method of a recipe's stage.
///
/// # Errors
/// When the name is unknown or an option is wrong, naming what is known.
pub fn read(name: &str, options: toml::Table) -> Result<Box<dyn Method>> {
    let Some(entry) = METHODS.iter().find(|entry| entry.name == name) else {
        let known: Vec<&str> = METHODS.iter().map(|entry| entry.name).collect();
        return Err(Error::input(format!("unknown method `{}`; known are {}", crate::error::shown(name), known.join(", "))));
    };
    (entry.read)(options).map_err(|error| Error::input(format!("method {name}: {}", error.message())))
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

/// Refuses pruning what is no longer floats, and an N:M pattern whose blocks do not divide the columns.
pub(crate) fn prunable(before: Storage, columns: usize, pattern: Pattern) -> Result<()> {
    if let Storage::Ints { .. } = before {
        return Err(Error::input("pruning after quantization is unsound: put the pruning stage first"));
    }
    match pattern {
        Pattern::Blocks { of, .. } if !columns.is_multiple_of(of) => Err(Error::input(format!(
            "pattern {pattern}: {columns} columns are not a multiple of {of}; use another pattern or skip the layer"
        ))),
        _ => Ok(()),
    }
}
