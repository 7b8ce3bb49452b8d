//! The only transformer mathematics of the crate. Weights come from outside as tensors, so the same code serves
//! calibration, evaluation and, on an autodiff device, gradients.
//!
//! Hidden states are `tokens × width` with the windows of a batch one after the other, `seq` tokens each.

use std::sync::{Mutex, PoisonError};

use burn::tensor::Tensor;

use crate::kernels::attention::Attention;
use crate::kernels::decode_attention::{self, Cache};
use crate::kernels::gated::{Activation, gated};
use crate::kernels::linear;
use crate::kernels::rms_norm::rms_norm;
use crate::kernels::rope::{Table, rope};
use crate::kernels::routing::{Rule, route};
use crate::kernels::{tensor, values};
use crate::model::architecture::QkNorm;
use crate::model::block::{Parameters, Place, Role, Site};
use crate::model::config::{Config, Layer};
use crate::model::mixture::{Tensors, Which};

/// What a forward of one layer needs besides its tensors.
#[derive(Debug)]
pub struct Spec<'a> {
    /// The model's description.
    pub config: &'a Config,
    /// The layer's description.
    pub layer: &'a Layer,
    /// The rotation for windows of `seq` tokens.
    pub table: Option<Table>,
    /// That of queries, where it is another.
    pub query_table: Option<Table>,
    /// Tokens per window.
    pub seq: usize,
    /// Keys and values of the positions before, when a forward goes one position at a time; it takes in the new ones.
    /// Behind a lock, because the layer's surroundings are otherwise only read, by all threads.
    pub cache: Option<&'a Mutex<Cache>>,
}

impl<'a> Spec<'a> {
    /// The surroundings of layer `index` for windows of `seq` tokens.
    pub fn new(config: &'a Config, index: usize, seq: usize) -> Self {
        let layer = &config.layers[index];
        let query_table = layer.rotation.as_ref().and_then(|rotation| rotation.query_table_at(0..seq, seq));
        Self { config, layer, table: layer.rotation.as_ref().map(|rotation| rotation.table(seq)), query_table, seq, cache: None }
    }

    /// The surroundings of layer `index` for the next position of windows that will hold `length` tokens in the end;
    /// rotations whose frequencies depend on the length then turn as in a forward of whole windows.
    pub fn next(config: &'a Config, index: usize, length: usize, cache: &'a Mutex<Cache>) -> Self {
        let layer = &config.layers[index];
        let position = cache.lock().unwrap_or_else(PoisonError::into_inner).len();
        let table = layer.rotation.as_ref().map(|rotation| rotation.table_at(position..position + 1, length));
        let query_table = layer.rotation.as_ref().and_then(|rotation| rotation.query_table_at(position..position + 1, length));
        Self { config, layer, table, query_table, seq: 1, cache: Some(cache) }
    }

    /// The rotation of queries or of keys.
    pub fn table_of(&self, place: Place) -> Option<&Table> {
        match place {
            Place::Query => self.query_table.as_ref().or(self.table.as_ref()),
            _ => self.table.as_ref(),
        }
    }

    /// The attention of the layer.
    pub fn attention(&self) -> Attention {
        let config = self.config;
        Attention {
            seq: self.seq,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: config.scale,
            softcap: config.attention_cap,
            window: self.layer.window,
        }
    }
}

/// Rows of an expert's products are a multiple of this.
const ROWS: usize = 16;

/// A tensor that the forward passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Point {
    /// The input of the block.
    Input,
    /// The input of linear layers.
    Site(Site),
    /// The input of the layers of an expert at a site, of so many tokens; rows after them are empty.
    Expert(Which, Site, usize),
    /// Queries before their norm and rotation.
    Query,
    /// Keys before their norm and rotation.
    Key,
    /// Queries as attention reads them.
    TurnedQuery,
    /// Keys as attention reads them.
    TurnedKey,
    /// Values.
    Value,
    /// The residual stream after attention.
    Joined,
    /// The gate of the MLP before its activation.
    Gate,
    /// What the activated gate multiplies.
    Up,
    /// The output of attention or of the MLP before the norm at this place.
    Branch(Place),
}

/// A tap sees every point as the forward passes it. A tensor that it keeps costs no copy here, but keeps a later
/// step from working in its memory.
pub type Tap<'a> = &'a mut dyn FnMut(Point, &Tensor<2>);

/// The output of a block for the hidden states `x`: [`attend`], [`join`], [`middle`] and [`finish`], one after the other.
/// [`middle`] reads the residual stream after attention or, in a parallel block, `x` as attention does.
pub fn block(spec: &Spec<'_>, parameters: &Parameters, x: Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    let mixed = attend(spec, parameters, x.clone(), tap);
    let parallel = spec.config.family.places.parallel.then(|| x.clone());
    let h = add_branch(spec, parameters, Branch::ATTENTION, x, mixed, tap);
    tap(Point::Joined, &h);
    let source = parallel.unwrap_or_else(|| h.clone());
    if let (Some(experts), Some(described)) = (parameters.experts(), &spec.config.mixture) {
        let given = mixture(experts, described.rule, spec.config.activation, &mlp_input(spec, parameters, source), tap);
        return add_given(spec, parameters, Place::MlpOut, h, given, tap);
    }
    let gated = middle(spec, parameters, source, tap);
    add_branch(spec, parameters, Branch::MLP, h, gated, tap)
}

/// The output of attention before its projection, `tokens × query width`, for the hidden states `x`.
pub fn attend(spec: &Spec<'_>, parameters: &Parameters, x: Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    tap(Point::Input, &x);
    let x = attention_input(spec, parameters, x);
    tap(Point::Site(Site::Attention), &x);
    let q = linear(parameters, Role::Query, &x);
    tap(Point::Query, &q);
    let q = rotated(spec, parameters, Place::Query, q);
    tap(Point::TurnedQuery, &q);
    let k = linear(parameters, Role::Key, &x);
    tap(Point::Key, &k);
    let k = rotated(spec, parameters, Place::Key, k);
    tap(Point::TurnedKey, &k);
    let v = linear(parameters, Role::Value, &x);
    tap(Point::Value, &v);
    let mixed = match spec.cache {
        Some(cache) => decode_attention::attend(&spec.attention(), &mut cache.lock().unwrap_or_else(PoisonError::into_inner), q, k, v),
        None => spec.attention().run(q, k, v),
    };
    tap(Point::Site(Site::Output), &mixed);
    mixed
}

/// What queries, keys and values read.
pub fn attention_input(spec: &Spec<'_>, parameters: &Parameters, x: Tensor<2>) -> Tensor<2> {
    norm(spec, parameters, Place::AttentionIn, x)
}

/// What gate and up read, for the residual stream `h` after attention or, in a parallel block, before it.
pub fn mlp_input(spec: &Spec<'_>, parameters: &Parameters, h: Tensor<2>) -> Tensor<2> {
    norm(spec, parameters, if spec.config.family.places.parallel { Place::AttentionIn } else { Place::MlpIn }, h)
}

/// The residual stream after attention: `x` plus the projection of what [`attend`] gave.
pub fn join(spec: &Spec<'_>, parameters: &Parameters, x: Tensor<2>, mixed: Tensor<2>) -> Tensor<2> {
    add_branch(spec, parameters, Branch::ATTENTION, x, mixed, &mut |_, _| {})
}

/// The middle of the MLP, `tokens × intermediate`, for what [`mlp_input`] takes.
pub fn middle(spec: &Spec<'_>, parameters: &Parameters, h: Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    let x = mlp_input(spec, parameters, h);
    tap(Point::Site(Site::Mlp), &x);
    let gate = linear(parameters, Role::Gate, &x);
    tap(Point::Gate, &gate);
    let up = linear(parameters, Role::Up, &x);
    tap(Point::Up, &up);
    let middle = gated(spec.config.activation, gate, up);
    tap(Point::Site(Site::Down), &middle);
    middle
}

/// The output of the block: `h` plus the projection of what [`middle`] gave.
pub fn finish(spec: &Spec<'_>, parameters: &Parameters, h: Tensor<2>, middle: Tensor<2>) -> Tensor<2> {
    add_branch(spec, parameters, Branch::MLP, h, middle, &mut |_, _| {})
}

/// Final norm of the hidden states, before the head.
pub fn final_norm(config: &Config, x: &Tensor<2>, weight: &Tensor<1>) -> Tensor<2> {
    rms_norm(x, weight, config.epsilon, config.family.norm)
}

/// Logits of normed hidden states for some rows of the head.
pub fn logits(config: &Config, normed: Tensor<2>, head: Tensor<2>) -> Tensor<2> {
    let mut logits = normed.matmul(head.transpose());
    if config.logits_factor != 1.0 {
        logits = logits * config.logits_factor;
    }
    match config.logits_cap {
        Some(cap) => (logits / cap).tanh() * cap,
        None => logits,
    }
}

/// What a mixture gives for its input `x`, tokens × hidden. The tap sees `x` and what the layers of every expert read. Tokens go
/// to the processor between experts, so that nothing here is differentiated.
fn mixture(experts: &Tensors, rule: Rule, activation: Activation, x: &Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    tap(Point::Site(Site::Mlp), x);
    let ([tokens, hidden], device) = (x.dims(), x.device());
    let rows = values(x.clone());
    let logits = values(linear::linear(x, &experts.router));
    let mut out = vec![0.0f32; tokens * hidden];
    let routed = route(&logits, experts.routed.len(), rule);
    for ((expert, layers), tokens) in experts.routed.iter().enumerate().zip(routed).filter(|(_, tokens)| !tokens.is_empty()) {
        let mut own = Vec::with_capacity(tokens.len() * hidden);
        tokens.iter().for_each(|&(token, _)| own.extend_from_slice(&rows[token * hidden..][..hidden]));
        // Products of few rows round otherwise; what a token gets must not depend on who goes with it.
        let filled = tokens.len().next_multiple_of(ROWS);
        own.resize(filled * hidden, 0.0);
        let mut see = |site: Site, x: &Tensor<2>| tap(Point::Expert(Which::Routed(expert), site, tokens.len()), x);
        let given = values(mlp(layers, activation, &tensor(own, [filled, hidden], &device), &mut see));
        for (&(token, share), given) in tokens.iter().zip(given.chunks_exact(hidden.max(1))) {
            out[token * hidden..][..hidden].iter_mut().zip(given).for_each(|(out, given)| *out += share * given);
        }
    }
    if let Some((layers, gate)) = &experts.shared {
        let mut see = |site: Site, x: &Tensor<2>| tap(Point::Expert(Which::Shared, site, tokens), x);
        let (given, gates) = (values(mlp(layers, activation, x, &mut see)), values(linear::linear(x, gate)));
        for ((out, given), gate) in out.chunks_exact_mut(hidden.max(1)).zip(given.chunks_exact(hidden.max(1))).zip(gates) {
            let open = 1.0 / (1.0 + (-gate).exp());
            out.iter_mut().zip(given).for_each(|(out, given)| *out += open * given);
        }
    }
    tensor(out, [tokens, hidden], &device)
}

/// A gated MLP; `see` is shown what its layers read.
fn mlp([gate, up, down]: &[Tensor<2>; 3], activation: Activation, x: &Tensor<2>, see: &mut dyn FnMut(Site, &Tensor<2>)) -> Tensor<2> {
    see(Site::Mlp, x);
    let middle = gated(activation, linear::linear(x, gate), linear::linear(x, up));
    see(Site::Down, &middle);
    linear::linear(&middle, down)
}

/// How a branch returns to the residual stream.
struct Branch {
    role: Role,
    place: Place,
}

impl Branch {
    const ATTENTION: Self = Self { role: Role::Output, place: Place::AttentionOut };
    const MLP: Self = Self { role: Role::Down, place: Place::MlpOut };
}

fn add_branch(spec: &Spec<'_>, parameters: &Parameters, branch: Branch, x: Tensor<2>, mixed: Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    add_given(spec, parameters, branch.place, x, linear(parameters, branch.role, &mixed), tap)
}

/// The residual stream after a branch that gave `projected`.
fn add_given(spec: &Spec<'_>, parameters: &Parameters, place: Place, x: Tensor<2>, projected: Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    tap(Point::Branch(place), &projected);
    let normed = norm(spec, parameters, place, projected);
    let factor = spec.config.residual_factor;
    // Nobody else holds the branch, so the sum is formed in its memory, also where a tap keeps `x`.
    if factor == 1.0 { normed + x } else { normed * factor + x }
}

fn norm(spec: &Spec<'_>, parameters: &Parameters, place: Place, x: Tensor<2>) -> Tensor<2> {
    match parameters.norm(place) {
        Some(weight) => rms_norm(&x, weight, spec.config.epsilon, spec.config.family.norm),
        None => x,
    }
}

fn linear(parameters: &Parameters, role: Role, x: &Tensor<2>) -> Tensor<2> {
    let product = linear::linear(x, parameters.weight(role));
    match parameters.bias(role) {
        Some(bias) => product + bias.clone().unsqueeze(),
        None => product,
    }
}

/// Queries or keys after their norm and rotation.
fn rotated(spec: &Spec<'_>, parameters: &Parameters, place: Place, x: Tensor<2>) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let head_dim = spec.config.head_dim;
    let x = match spec.config.family.qk_norm {
        QkNorm::Absent => x,
        QkNorm::Projection => norm(spec, parameters, place, x),
        QkNorm::Head => {
            let heads = x.reshape([tokens * width / head_dim, head_dim]);
            norm(spec, parameters, place, heads).reshape([tokens, width])
        }
    };
    match spec.table_of(place) {
        Some(table) => rope(x, head_dim, table),
        None => x,
    }
}
