//! Which layers may be compressed, and the work on each of them.

use crate::checkpoint::source::Source;
use crate::checkpoint::{Checkpoint, float_of};
use crate::error::{Error, Result};
use crate::formats::Format;
use crate::formats::output::Output;
use crate::matrix::Matrix;
use crate::methods::{self, Layer};
use crate::model::block::{Block, Role};
use crate::model::seen::{Needs, Seen, Statistics};
use crate::model::walk::Visitor;
use crate::model::{Model, config};
use crate::plan::{Candidate, Plan, Planned};
use crate::report::{BlockReport, LayerReport};
use crate::run::Run;
use crate::weight::Weight;

/// Pieces of names that are never compressed in a model that is not known.
const UNTOUCHED: &[&str] = &[
    "embed",
    "wte",
    "wpe",
    "norm",
    "lm_head",
    "head.",
    "router",
    "gate.weight",
    "shared_expert_gate",
    "conv",
    "in_proj_a",
    "in_proj_b",
    "A_log",
    "x_proj",
    "dt_proj",
    "rotary",
    "position",
    "relative",
    "visual",
    "vision",
    "mtp",
    "score",
    "classifier",
    "bias",
];

/// The linear layers of a model: by its description where it is known, else by name and shape.
///
/// # Errors
/// When the weights are stored in a way that is known not to work.
pub fn candidates(checkpoint: &Checkpoint, model: Option<&Model<'_>>) -> Result<Vec<Candidate>> {
    let Some(model) = model else { return by_name(checkpoint) };
    let mut candidates = Vec::new();
    for index in 0..model.config.layers.len() {
        for role in Role::ALL {
            let name = model.linear_name(index, role);
            let float = checkpoint.float(&format!("{name}.weight"))?;
            candidates.push(Candidate { name, shape: model.shape(role), float });
        }
    }
    Ok(candidates)
}

fn by_name(checkpoint: &Checkpoint) -> Result<Vec<Candidate>> {
    let model_type = config::model_type(&checkpoint.config);
    if ["gpt2", "openai-gpt", "imagegpt", "gpt_oss"].contains(&model_type) {
        return Err(Error::input(format!(
            "model_type `{model_type}` stores its matrices transposed, which no integer format of this version holds"
        ))
        .file(&checkpoint.folder));
    }
    let numbered = |name: &str| name.split('.').any(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()));
    let candidates = checkpoint.names().filter_map(|tensor| {
        let info = checkpoint.info(tensor)?;
        let name = tensor.strip_suffix(".weight")?;
        let shape: [usize; 2] = info.shape.as_slice().try_into().ok()?;
        let float = float_of(info.dtype)?;
        let linear = numbered(name) && shape[0] > 1 && shape[1] > 1 && !UNTOUCHED.iter().any(|piece| tensor.contains(piece));
        linear.then(|| Candidate { name: name.into(), shape, float })
    });
    Ok(candidates.collect())
}

/// Compresses layers as they come and writes them.
#[derive(Debug)]
pub struct Compressor<'a> {
    plan: &'a Plan,
    format: &'a Format,
    output: &'a mut Output,
    layer_error: bool,
    layers: Vec<LayerReport>,
    blocks: Vec<BlockReport>,
}

impl<'a> Compressor<'a> {
    /// A compressor that follows a plan and writes into an output.
    pub fn new(plan: &'a Plan, format: &'a Format, output: &'a mut Output, layer_error: bool) -> Self {
        Self { plan, format, output, layer_error, layers: Vec::new(), blocks: Vec::new() }
    }

    /// Works on layer after layer without calibration.
    ///
    /// # Errors
    /// When a layer cannot be read, compressed or written.
    pub fn stream(&mut self, checkpoint: &Checkpoint, source: &dyn Source, run: &Run<'_>) -> Result<()> {
        let plan = self.plan;
        run.observer.begin("compress", plan.layers.len() as u64);
        for planned in plan.layers.iter().filter(|planned| !planned.stages.is_empty()) {
            run.check_stop()?;
            let weight = source.weight(checkpoint, &planned.outlined.name, planned.outlined.shape)?;
            drop(self.compress(planned, weight, None)?);
            run.observer.step(1, &planned.outlined.name);
        }
        run.observer.end();
        Ok(())
    }

    /// The reports of all layers and blocks.
    pub fn finish(self) -> (Vec<LayerReport>, Vec<BlockReport>) {
        (self.layers, self.blocks)
    }

    fn compress(&mut self, planned: &Planned, mut weight: Weight, statistics: Option<&Statistics>) -> Result<Weight> {
        let outlined = &planned.outlined;
        let layer = Layer { name: &outlined.name, statistics, float: outlined.float, bits: planned.bits, bounds: None };
        let original = (planned.stages.len() > 1 || self.layer_error).then(|| weight.to_matrix().into_owned());
        let mut change = [0.0; 2];
        for &stage in &planned.stages {
            let applied = self.plan.stages[stage].method.apply(weight, &layer).map_err(|error| error.tensor(&outlined.name))?;
            (weight, change) = (applied.weight, applied.change);
        }
        let mut layer_error = None;
        if let Some(original) = &original {
            let compressed = weight.to_matrix();
            change = methods::change(&original.data, &compressed.data);
            layer_error = statistics.and_then(|statistics| statistics.layer_error(original, &compressed)).map(ratio);
        }
        if !change[0].is_finite() {
            return Err(Error::run("compression gave values that are not finite").tensor(&outlined.name));
        }
        let tensors = (self.format.encode)(&weight, outlined.float);
        for (entry, bytes) in (self.format.entries)(outlined).iter().zip(tensors) {
            self.output.write(&entry.name, bytes)?;
        }
        let storage = weight.storage();
        let entries = (outlined.shape[0] * outlined.shape[1]) as f64;
        self.layers.push(LayerReport {
            name: outlined.name.clone(),
            shape: outlined.shape,
            storage: storage.to_string(),
            bits_per_weight: storage.bits(outlined.shape, outlined.float) as f64 / entries,
            zeros: zeros(&weight) as f64 / entries,
            weight_error: ratio(change),
            layer_error,
        });
        Ok(weight)
    }
}

impl Visitor for Compressor<'_> {
    fn needs(&self) -> Needs {
        if self.layer_error { Needs::Gram } else { self.plan.needs() }
    }

    fn visit(&mut self, mut block: Block, seen: &Seen) -> Result<Block> {
        let plan = self.plan;
        for linear in &mut block.linears {
            let Some(planned) = plan.layer(&linear.name).filter(|planned| !planned.stages.is_empty()) else { continue };
            let weight = std::mem::replace(&mut linear.weight, Weight::Dense(Matrix::new(0, 0, Vec::new())));
            linear.weight =
                self.compress(planned, weight, Some(seen.at(linear.role.site()).map_err(|error| error.tensor(&linear.name))?))?;
        }
        Ok(block)
    }

    fn went_through(&mut self, index: usize, output_error: Option<f64>) {
        self.blocks.push(BlockReport { block: index, output_error });
    }
}

fn ratio([change, total]: [f64; 2]) -> f64 {
    if total > 0.0 { change / total } else { 0.0 }
}

/// Weights that are exactly zero.
fn zeros(weight: &Weight) -> usize {
    match weight {
        Weight::Dense(matrix) | Weight::Sparse(crate::weight::Sparse { matrix, .. }) => matrix.zeros(),
        Weight::Stored(stored) => stored.to_matrix().zeros(),
        Weight::Ints(ints) => ints.zero_codes(),
    }
}
