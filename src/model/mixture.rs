//! Mixtures of experts: what config.json says of them, and their layers in a block. A router sends every token to a few of the
//! experts, gated MLPs of which each sees its own tokens; the output is the sum of what they give, times their shares, and of what
//! an expert of all tokens gives, where there is one ([`crate::model::forward`]).

use burn::tensor::{Device, Tensor};
use serde_json::Value;

use crate::error::{Error, Result, shown};
use crate::kernels::gated::{Activation, gated};
use crate::kernels::linear::linear as product;
use crate::kernels::routing::{Rule, Scores, route};
use crate::kernels::{tensor, values};
use crate::matrix::Matrix;
use crate::model::architecture::{Family, Mixed, MixedLayers, Renormalized, Routing};
use crate::model::block::{Linear, Role, Site, floats};
use crate::model::config::Keys;
use crate::model::forward::{Point, Tap};
use crate::weight::{Sparse, Weight};

/// What the layers of an expert do, in order.
const LAYERS: [Role; 3] = [Role::Gate, Role::Up, Role::Down];

/// Most experts of a layer.
const MOST: usize = 1 << 14;

/// Rows of an expert's products are a multiple of this.
pub const ROWS: usize = 16;

/// What config.json says of the mixtures of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mixture {
    /// Experts of a layer.
    pub experts: usize,
    /// How tokens are given to them.
    pub rule: Rule,
    /// Columns in the middle of an expert.
    pub width: usize,
    /// Columns in the middle of the expert of all tokens, where there is one.
    pub shared: Option<usize>,
}

impl Mixture {
    /// Reads the mixture of a family that has one.
    ///
    /// # Errors
    /// One line naming the key.
    pub fn read(keys: &Keys<'_>, family: &Family) -> Result<Option<Self>> {
        let Some(mixed) = family.mixed else { return Ok(None) };
        let [experts, chosen, width, shared] = mixed.defaults;
        let first = |names: &[&str], limit: usize, default: usize| {
            let found = names.iter().map(|key| keys.count(key, limit as u64)).find(|found| !matches!(found, Ok(None)));
            found.unwrap_or(Ok(None)).map(|found| found.unwrap_or(default))
        };
        let experts = first(&["num_experts", "num_local_experts", "n_routed_experts"], MOST, experts)?;
        let chosen = first(&["num_experts_per_tok", "experts_per_token"], MOST, chosen)?;
        if chosen > experts {
            return Err(Error::input(format!("config.json: num_experts_per_tok is {chosen}, there are {experts} experts")));
        }
        let renormalized = match mixed.renormalized {
            Renormalized::Always => true,
            Renormalized::Key(absent) => keys.flag("norm_topk_prob").unwrap_or(absent),
        };
        let width = first(&[mixed.width], 1 << 24, width)?;
        let shared = match mixed.shared {
            None => None,
            // Shared experts are counted where they are as wide as the others.
            Some((_, None)) => Some(width * first(&["n_shared_experts"], MOST, shared)?),
            Some(_) => Some(first(&["shared_expert_intermediate_size"], 1 << 24, shared)?),
        };
        let scores = scores(keys, mixed, experts, chosen)?;
        Ok(Some(Self { experts, rule: Rule { chosen, renormalized, scores }, width, shared }))
    }

    /// Which layers are mixtures.
    ///
    /// # Errors
    /// One line naming the key.
    pub fn layers(keys: &Keys<'_>, family: &Family, count: usize) -> Result<Vec<bool>> {
        let Some(mixed) = family.mixed else { return Ok(vec![false; count]) };
        match mixed.which {
            MixedLayers::Every => return Ok(vec![true; count]),
            MixedLayers::AfterFirst => {
                let silent = if keys.0.contains_key("first_k_dense_replace") { 0 } else { 3 };
                let dense = keys.whole("first_k_dense_replace", 1 << 20)?.unwrap_or(silent);
                return Ok((0..count).map(|layer| layer >= dense).collect());
            }
            MixedLayers::Sparse => {}
        }
        let step = keys.count("decoder_sparse_step", 1 << 20)?.unwrap_or(1);
        let dense: Vec<u64> = match keys.0.get("mlp_only_layers") {
            None | Some(Value::Null) => Vec::new(),
            Some(value) => {
                let wrong =
                    || Error::input(format!("config.json: mlp_only_layers is {}, it must be a list of numbers", shown(&value.to_string())));
                value.as_array().and_then(|list| list.iter().map(Value::as_u64).collect()).ok_or_else(wrong)?
            }
        };
        Ok((0..count).map(|layer| !dense.contains(&(layer as u64)) && (layer + 1).is_multiple_of(step)).collect())
    }

    /// Groups that experts are chosen from.
    pub fn groups(&self) -> usize {
        match self.rule.scores {
            Scores::Softmax => 1,
            Scores::Grouped { groups, .. } => groups,
        }
    }

    /// The fewest experts that this mixture works with.
    pub fn fewest(&self) -> usize {
        match self.rule.scores {
            Scores::Grouped { groups, kept, .. } if groups > 1 => groups * self.rule.chosen.div_ceil(kept).max(2),
            _ => self.rule.chosen,
        }
    }

    /// Weights of the linear layers of a mixture over `hidden` columns.
    pub fn entries(&self, hidden: usize) -> u64 {
        3 * hidden as u64 * (self.experts as u64 * self.width as u64 + self.shared.unwrap_or(0) as u64)
    }
}

/// What shares come from.
fn scores(keys: &Keys<'_>, mixed: Mixed, experts: usize, chosen: usize) -> Result<Scores> {
    if mixed.routing == Routing::Softmax {
        return Ok(Scores::Softmax);
    }
    let count = |key: &str, default: usize| Ok(keys.count(key, MOST as u64)?.unwrap_or(default));
    let (groups, kept) = (count("n_group", 8)?, count("topk_group", 4)?);
    if !experts.is_multiple_of(groups) || kept > groups || chosen > experts / groups * kept {
        return Err(Error::input(format!(
            "config.json: {experts} experts in n_group {groups} groups, of which topk_group {kept} are kept, do not give {chosen} per token"
        )));
    }
    let factor = keys.positive("routed_scaling_factor")?.unwrap_or(2.5) as f32;
    Ok(Scores::Grouped { groups, kept, factor })
}

/// Which expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Which {
    /// One of those that the router chooses from.
    Routed(usize),
    /// That of all tokens.
    Shared,
}

/// A step through an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// What gate and up read.
    Input,
    /// The gate before its activation.
    Gate,
    /// What the activated gate multiplies.
    Up,
    /// What down reads.
    Middle,
    /// What it gives.
    Output,
}

/// What chooses experts.
#[derive(Debug)]
pub struct Router {
    /// Experts × hidden.
    pub weight: Matrix,
    /// One number per expert, or nothing.
    pub bias: Vec<f32>,
    /// What counts for the choice alone, one number per expert or nothing.
    pub correction: Vec<f32>,
}

/// The layers of a mixture: gate, up and down of every expert.
#[derive(Debug)]
pub struct Experts {
    /// What chooses them.
    pub router: Router,
    /// Those that the router chooses from.
    pub routed: Vec<[Linear; 3]>,
    /// That of all tokens, with what scales its output, 1 × hidden, where something does.
    pub shared: Option<([Linear; 3], Option<Matrix>)>,
}

impl Experts {
    /// The layers of every expert, the shared one last.
    pub fn linears(&self) -> impl Iterator<Item = (Which, &[Linear; 3])> {
        let routed = self.routed.iter().enumerate().map(|(expert, linears)| (Which::Routed(expert), linears));
        routed.chain(self.shared.as_ref().map(|(linears, _)| (Which::Shared, linears)))
    }

    /// As [`Self::linears`], to change them.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (Which, &mut [Linear; 3])> {
        let routed = self.routed.iter_mut().enumerate().map(|(expert, linears)| (Which::Routed(expert), linears));
        routed.chain(self.shared.as_mut().map(|(linears, _)| (Which::Shared, linears)))
    }

    /// The layers of an expert.
    pub fn layers(&self, which: Which) -> Option<&[Linear; 3]> {
        match which {
            Which::Routed(expert) => self.routed.get(expert),
            Which::Shared => self.shared.as_ref().map(|(linears, _)| linears),
        }
    }

    /// As [`Self::layers`], to change them.
    pub fn layers_mut(&mut self, which: Which) -> Option<&mut [Linear; 3]> {
        match which {
            Which::Routed(expert) => self.routed.get_mut(expert),
            Which::Shared => self.shared.as_mut().map(|(linears, _)| linears),
        }
    }

    /// Whether the block holds the weights of all of them, as floats.
    pub fn floats(&self) -> bool {
        let floats = |weight: &Weight| matches!(weight, Weight::Dense(_) | Weight::Sparse(_)) && !absent(weight);
        self.linears().flat_map(|(_, linears)| linears).all(|linear| floats(&linear.weight))
    }

    /// Bytes of all its weights in f32.
    pub fn bytes(&self) -> u64 {
        self.linears()
            .flat_map(|(_, linears)| linears)
            .map(|linear| linear.weight.shape())
            .map(|[rows, columns]| 4 * (rows * columns) as u64)
            .sum()
    }
}

/// The tensors of an expert: gate, up and down.
#[derive(Debug, Clone)]
pub struct Layers {
    /// Their weights, `[outputs, inputs]`.
    pub weights: [Tensor<2>; 3],
    /// Their biases, where there are such.
    pub biases: [Option<Tensor<1>>; 3],
}

impl Layers {
    /// What one of the layers gives.
    fn apply(&self, number: usize, x: &Tensor<2>) -> Tensor<2> {
        let product = product(x, &self.weights[number]);
        match &self.biases[number] {
            Some(bias) => added(product, bias),
            None => product,
        }
    }

    /// The floats of an expert's layers, taken out of them without a copy where they hold floats.
    pub fn take(linears: &mut [Linear; 3], device: &Device) -> Self {
        let biases = linears.each_ref().map(|linear| bias(linear, device));
        let weights = linears.each_mut().map(|linear| {
            let shape = linear.weight.shape();
            tensor(floats(&mut linear.weight), shape, device)
        });
        Self { weights, biases }
    }

    /// The same on a device.
    #[must_use]
    pub fn on(&self, device: &Device) -> Self {
        if self.weights.iter().all(|weight| weight.device() == *device) {
            return self.clone();
        }
        Self {
            weights: self.weights.each_ref().map(|weight| moved(weight, device)),
            biases: self.biases.each_ref().map(|bias| bias.as_ref().map(|bias| moved(bias, device))),
        }
    }
}

/// A tensor on another device.
fn moved<const D: usize>(tensor: &Tensor<D>, device: &Device) -> Tensor<D> {
    crate::kernels::tensor(values(tensor.clone()), tensor.dims(), device)
}

/// A product plus a bias, which may lie elsewhere.
fn added(product: Tensor<2>, bias: &Tensor<1>) -> Tensor<2> {
    let device = product.device();
    let bias = if bias.device() == device { bias.clone() } else { moved(bias, &device) };
    product + bias.unsqueeze()
}

/// The bias of a layer, where it has one.
pub(super) fn bias(linear: &Linear, device: &Device) -> Option<Tensor<1>> {
    linear.bias.as_ref().map(|bias| tensor(bias.clone(), [bias.len()], device))
}

/// A weight of this shape that lies elsewhere: [`absent`] here.
pub fn hollow([rows, columns]: [usize; 2]) -> Weight {
    Weight::Dense(Matrix { rows, columns, data: Vec::new() })
}

/// Whether a block does not hold the numbers of a weight, because they are those of the original, or were put away.
pub fn absent(weight: &Weight) -> bool {
    let (Weight::Dense(matrix) | Weight::Sparse(Sparse { matrix, .. })) = weight else { return false };
    matrix.data.is_empty() && matrix.rows * matrix.columns > 0
}

/// The tensors that the forward of a mixture needs.
#[derive(Debug, Clone)]
pub struct Tensors {
    /// Experts × hidden.
    pub router: Tensor<2>,
    /// One number per expert, or nothing.
    pub bias: Option<Tensor<1>>,
    /// What counts for the choice alone, one number per expert or nothing.
    pub correction: Vec<f32>,
    /// What scales the output of the expert of all tokens, 1 × hidden, where something does.
    pub opening: Option<Tensor<2>>,
    /// Those that the router chooses from; none where they lie elsewhere.
    pub routed: Vec<Layers>,
    /// That of all tokens, where there is one that does not lie elsewhere.
    pub shared: Option<Layers>,
}

impl Tensors {
    /// Takes the floats out of a mixture that has those of all its experts.
    pub fn take(experts: &mut Experts, device: &Device) -> Self {
        let mut tensors = Self::frame(experts, device);
        if experts.linears().flat_map(|(_, linears)| linears).all(|linear| !absent(&linear.weight)) {
            tensors.routed = experts.routed.iter_mut().map(|linears| Layers::take(linears, device)).collect();
            tensors.shared = experts.shared.as_mut().map(|(linears, _)| Layers::take(linears, device));
        }
        tensors
    }

    /// What a mixture has beside the layers of its experts.
    pub fn frame(experts: &Experts, device: &Device) -> Self {
        let whole = |matrix: &Matrix| tensor(matrix.data.clone(), [matrix.rows, matrix.columns], device);
        let bias = &experts.router.bias;
        Self {
            router: whole(&experts.router.weight),
            bias: (!bias.is_empty()).then(|| tensor(bias.clone(), [bias.len()], device)),
            correction: experts.router.correction.clone(),
            opening: experts.shared.as_ref().and_then(|(_, gate)| gate.as_ref()).map(whole),
            routed: Vec::new(),
            shared: None,
        }
    }

    /// How many experts the router chooses from.
    pub fn count(&self) -> usize {
        self.router.dims()[0]
    }

    /// The layers of an expert.
    pub fn layers(&self, which: Which) -> Option<&Layers> {
        match which {
            Which::Routed(expert) => self.routed.get(expert),
            Which::Shared => self.shared.as_ref(),
        }
    }

    /// As [`Self::layers`], to change them.
    pub fn layers_mut(&mut self, which: Which) -> Option<&mut Layers> {
        match which {
            Which::Routed(expert) => self.routed.get_mut(expert),
            Which::Shared => self.shared.as_mut(),
        }
    }

    /// The weight of a layer of an expert.
    pub fn weight(&self, which: Which, role: Role) -> Option<&Tensor<2>> {
        self.layers(which)?.weights.get(place(role)?)
    }

    /// The logits of all experts, tokens × experts.
    pub fn logits(&self, x: &Tensor<2>) -> Tensor<2> {
        let logits = product(x, &self.router);
        match &self.bias {
            Some(bias) => added(logits, bias),
            None => logits,
        }
    }

    /// By token, the factor of what the expert of all tokens gives for its input `x`.
    pub fn openings(&self, x: &Tensor<2>) -> Vec<f32> {
        match &self.opening {
            Some(opening) => values(product(x, opening)).into_iter().map(|opening| 1.0 / (1.0 + (-opening).exp())).collect(),
            None => vec![1.0; x.dims()[0]],
        }
    }
}

/// Where the layer of a role stands in an expert.
pub fn place(role: Role) -> Option<usize> {
    LAYERS.iter().position(|layer| *layer == role)
}

/// What a mixture gives for its input `x`, tokens × hidden. The tap sees `x` and the steps of every expert. Tokens go to the
/// processor between experts.
///
/// # Panics
/// When the tensors are without experts.
pub fn forward(experts: &Tensors, rule: Rule, activation: Activation, x: &Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    assert_eq!(experts.routed.len(), experts.count(), "the experts of a mixture");
    tap(Point::Site(Site::Mlp), x);
    let ([tokens, hidden], device) = (x.dims(), x.device());
    let rows = values(x.clone());
    let logits = experts.logits(x);
    tap(Point::Logits, &logits);
    let logits = values(logits);
    let mut out = vec![0.0f32; tokens * hidden];
    let routed = route(&logits, &experts.correction, experts.count(), rule);
    for ((expert, layers), tokens) in experts.routed.iter().enumerate().zip(routed).filter(|(_, tokens)| !tokens.is_empty()) {
        let own = picked(&rows, hidden, tokens.iter().map(|&(token, _)| token));
        let own = tensor(own, [tokens.len().next_multiple_of(ROWS), hidden], &device);
        let mut see = |step: Step, x: &Tensor<2>| tap(Point::Expert(Which::Routed(expert), step, tokens.len()), x);
        let given = values(mlp(layers, activation, &own, &mut see));
        for (&(token, share), given) in tokens.iter().zip(given.chunks_exact(hidden.max(1))) {
            out[token * hidden..][..hidden].iter_mut().zip(given).for_each(|(out, given)| *out += share * given);
        }
    }
    if let Some(layers) = &experts.shared {
        let mut see = |step: Step, x: &Tensor<2>| tap(Point::Expert(Which::Shared, step, tokens), x);
        let given = values(mlp(layers, activation, x, &mut see));
        let openings = experts.openings(x);
        for ((out, given), open) in out.chunks_exact_mut(hidden.max(1)).zip(given.chunks_exact(hidden.max(1))).zip(openings) {
            out.iter_mut().zip(given).for_each(|(out, given)| *out += open * given);
        }
    }
    tensor(out, [tokens, hidden], &device)
}

/// Some rows, filled up with empty ones: products of few rows round otherwise, and what a token gets must not depend on who goes
/// with it.
pub fn picked(rows: &[f32], width: usize, tokens: impl ExactSizeIterator<Item = usize>) -> Vec<f32> {
    let filled = tokens.len().next_multiple_of(ROWS) * width;
    let mut own = Vec::with_capacity(filled);
    tokens.for_each(|token| own.extend_from_slice(&rows[token * width..][..width]));
    own.resize(filled, 0.0);
    own
}

/// A gated MLP; `see` is shown its steps.
pub fn mlp(layers: &Layers, activation: Activation, x: &Tensor<2>, see: &mut dyn FnMut(Step, &Tensor<2>)) -> Tensor<2> {
    let middle = middle(layers, activation, x, see);
    let given = layers.apply(2, &middle);
    see(Step::Output, &given);
    given
}

/// What down reads in a gated MLP.
pub fn middle(layers: &Layers, activation: Activation, x: &Tensor<2>, see: &mut dyn FnMut(Step, &Tensor<2>)) -> Tensor<2> {
    see(Step::Input, x);
    let (gate, up) = (layers.apply(0, x), layers.apply(1, x));
    see(Step::Gate, &gate);
    see(Step::Up, &up);
    let middle = gated(activation, gate, up);
    see(Step::Middle, &middle);
    middle
}
