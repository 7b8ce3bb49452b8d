//! The only transformer mathematics of the crate. Weights come from outside as tensors, so the same code serves
//! calibration, evaluation and, on an autodiff device, gradients.
//!
//! Hidden states are `tokens × width` with the windows of a batch one after the other, `seq` tokens each.

use std::sync::{Mutex, PoisonError};

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;

use crate::kernels::attention::Attention;
use crate::kernels::decode_attention::{self, Cache};
use crate::kernels::delta_rule::State;
use crate::kernels::gated::gated;
use crate::kernels::linear;
use crate::kernels::rms_norm::{NormKind, rms_norm};
use crate::kernels::rope::{Table, rope};
use crate::model::architecture::QkNorm;
use crate::model::block::{Parameters, Place, Role, Site};
use crate::model::config::{Config, Layer};
use crate::model::mixture::{self, Step, Which};
use crate::model::{delta, latent};

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
    /// What is kept of the positions before, when a forward goes one position at a time; it takes in the new ones.
    /// Behind a lock, because the layer's surroundings are otherwise only read, by all threads.
    pub past: Option<&'a Mutex<Past>>,
}

/// What a layer keeps of the positions before.
#[derive(Debug)]
pub enum Past {
    /// Keys and values.
    Attention(Cache),
    /// What a delta rule has learned, of so many windows.
    Delta(State, usize),
}

impl Past {
    /// Nothing yet, of `windows` windows that will hold `length` tokens, for a layer.
    pub fn new(config: &Config, layer: &Layer, windows: usize, length: usize) -> Self {
        match &config.delta {
            Some(sizes) if layer.linear => Self::Delta(State::new(sizes, windows), windows),
            _ => Self::Attention(Cache::new(windows, length, config.kv_heads, config.head_dim)),
        }
    }

    /// Bytes of that.
    pub fn bytes(config: &Config, layer: &Layer, windows: usize, length: usize) -> u64 {
        match &config.delta {
            Some(sizes) if layer.linear => State::bytes(sizes, windows),
            _ => Cache::bytes(windows, length, config.kv_heads, config.head_dim),
        }
    }

    /// Positions kept.
    pub fn len(&self) -> usize {
        match self {
            Self::Attention(cache) => cache.len(),
            Self::Delta(state, _) => state.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'a> Spec<'a> {
    /// The surroundings of layer `index` for windows of `seq` tokens.
    pub fn new(config: &'a Config, index: usize, seq: usize) -> Self {
        let layer = &config.layers[index];
        let query_table = layer.rotation.as_ref().and_then(|rotation| rotation.query_table_at(0..seq, seq));
        Self { config, layer, table: layer.rotation.as_ref().map(|rotation| rotation.table(seq)), query_table, seq, past: None }
    }

    /// The surroundings of layer `index` for the next position of windows that will hold `length` tokens in the end;
    /// rotations whose frequencies depend on the length then turn as in a forward of whole windows.
    pub fn next(config: &'a Config, index: usize, length: usize, past: &'a Mutex<Past>) -> Self {
        let layer = &config.layers[index];
        let position = past.lock().unwrap_or_else(PoisonError::into_inner).len();
        let table = layer.rotation.as_ref().map(|rotation| rotation.table_at(position..position + 1, length));
        let query_table = layer.rotation.as_ref().and_then(|rotation| rotation.query_table_at(position..position + 1, length));
        Self { config, layer, table, query_table, seq: 1, past: Some(past) }
    }

    /// The ε and the kind of a norm.
    pub fn norm(&self, place: Place) -> (f64, NormKind) {
        match place {
            Place::QueryLatent | Place::KeyValueLatent => (latent::EPSILON, NormKind::Plain),
            _ => (self.config.epsilon, self.config.family.norm),
        }
    }

    /// The rotation of queries or of keys.
    pub fn table_of(&self, place: Place) -> Option<&Table> {
        match place {
            Place::Query => self.query_table.as_ref().or(self.table.as_ref()),
            _ => self.table.as_ref(),
        }
    }

    /// The attention of the layer with these parameters.
    pub fn attention<'p>(&self, parameters: &'p Parameters) -> Attention<'p> {
        let config = self.config;
        Attention {
            seq: self.seq,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: config.scale,
            softcap: config.attention_cap,
            window: self.layer.window,
            sinks: parameters.sinks(),
        }
    }
}

/// A tensor that the forward passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Point {
    /// The input of the block.
    Input,
    /// The input of linear layers.
    Site(Site),
    /// What a router gives, tokens × experts.
    Logits,
    /// A step of an expert, of so many tokens; rows after them are empty.
    Expert(Which, Step, usize),
    /// Queries before their norm and rotation, or narrowed.
    Query,
    /// Keys before their norm and rotation, or narrowed.
    Key,
    /// Queries as attention reads them.
    TurnedQuery,
    /// Keys as attention reads them.
    TurnedKey,
    /// Values.
    Value,
    /// What attention gave, where what its projection reads is made of it.
    Attended,
    /// What opens attention's output.
    Opening,
    /// What the first layer of a delta rule gave.
    DeltaIn,
    /// What its second layer gave, where it has one.
    DeltaGate,
    /// What controls its rates and what it keeps.
    Controls,
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

/// The output of a block for the hidden states `x`: [`first_half`] and [`second_half`].
pub fn block(spec: &Spec<'_>, parameters: &Parameters, x: Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    let [source, h] = first_half(spec, parameters, x, tap);
    second_half(spec, parameters, source, h, tap)
}

/// What the MLP reads before its norm, and the residual stream after attention.
pub fn first_half(spec: &Spec<'_>, parameters: &Parameters, x: Tensor<2>, tap: Tap<'_>) -> [Tensor<2>; 2] {
    let mixed = attend(spec, parameters, x.clone(), tap);
    let parallel = spec.config.family.places.parallel.then(|| x.clone());
    let h = add_branch(spec, parameters, Branch::ATTENTION, x, mixed, tap);
    tap(Point::Joined, &h);
    [parallel.unwrap_or_else(|| h.clone()), h]
}

/// The output of a block for the residual stream `h` after attention; the MLP reads `source`, which is `h` unless the block is
/// parallel.
pub fn second_half(spec: &Spec<'_>, parameters: &Parameters, source: Tensor<2>, h: Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    if let (Some(experts), Some(described)) = (parameters.experts(), &spec.config.mixture) {
        let x = mlp_input(spec, parameters, source);
        let given = mixture::forward(experts, described.rule, spec.config.activation, &x, tap);
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
    let mixed = match (parameters.delta(), &spec.config.delta, &spec.config.latent) {
        (Some(delta), Some(sizes), _) => delta::mix(spec, sizes, delta, parameters, &x, tap),
        (_, _, Some(latent)) => latent::attend(spec, latent, parameters, &x, tap),
        _ => attention(spec, parameters, &x, tap),
    };
    tap(Point::Site(Site::Output), &mixed);
    mixed
}

/// Queries, keys and values of their own, and what attention makes of them.
fn attention(spec: &Spec<'_>, parameters: &Parameters, x: &Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    let mut q = linear(parameters, Role::Query, x);
    let mut opening = None;
    if spec.config.family.gated {
        // Every head has its query and then what opens its output.
        let ([tokens, width], d) = (q.dims(), spec.config.head_dim);
        let heads: Tensor<3> = q.reshape([tokens, width / (2 * d), 2 * d]);
        let part =
            |columns: std::ops::Range<usize>| heads.clone().slice([0..tokens, 0..width / (2 * d), columns]).reshape([tokens, width / 2]);
        opening = Some(part(d..2 * d));
        q = part(0..d);
    }
    tap(Point::Query, &q);
    let q = rotated(spec, parameters, Place::Query, q);
    tap(Point::TurnedQuery, &q);
    let k = linear(parameters, Role::Key, x);
    tap(Point::Key, &k);
    let k = rotated(spec, parameters, Place::Key, k);
    tap(Point::TurnedKey, &k);
    let v = linear(parameters, Role::Value, x);
    tap(Point::Value, &v);
    let out = attended(spec, parameters, [q, k, v]);
    let Some(opening) = opening else { return out };
    tap(Point::Attended, &out);
    tap(Point::Opening, &opening);
    out * sigmoid(opening)
}

/// Attention over whole windows, or over what is kept of the positions before.
pub(super) fn attended(spec: &Spec<'_>, parameters: &Parameters, [q, k, v]: [Tensor<2>; 3]) -> Tensor<2> {
    let attention = spec.attention(parameters);
    if let Some(past) = spec.past
        && let Past::Attention(cache) = &mut *past.lock().unwrap_or_else(PoisonError::into_inner)
    {
        return decode_attention::attend(&attention, cache, q, k, v);
    }
    attention.run(q, k, v)
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

/// Final norm of the hidden states, before the head.
pub fn final_norm(config: &Config, x: &Tensor<2>, weight: &Tensor<1>) -> Tensor<2> {
    rms_norm(x, weight, config.epsilon, config.family.norm)
}

/// Logits of normed hidden states for some rows of the head.
pub fn logits(config: &Config, normed: Tensor<2>, head: Tensor<2>) -> Tensor<2> {
    let mut logits = linear::linear(&normed, &head);
    if config.logits_factor != 1.0 {
        logits = logits * config.logits_factor;
    }
    match config.logits_cap {
        Some(cap) => (logits / cap).tanh() * cap,
        None => logits,
    }
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
pub(super) fn add_given(
    spec: &Spec<'_>,
    parameters: &Parameters,
    place: Place,
    x: Tensor<2>,
    projected: Tensor<2>,
    tap: Tap<'_>,
) -> Tensor<2> {
    tap(Point::Branch(place), &projected);
    let normed = norm(spec, parameters, place, projected);
    let factor = spec.config.residual_factor;
    // Nobody else holds the branch, so the sum is formed in its memory, also where a tap keeps `x`.
    if factor == 1.0 { normed + x } else { normed * factor + x }
}

pub(super) fn norm(spec: &Spec<'_>, parameters: &Parameters, place: Place, x: Tensor<2>) -> Tensor<2> {
    let (epsilon, kind) = spec.norm(place);
    match parameters.norm(place) {
        Some(weight) => rms_norm(&x, weight, epsilon, kind),
        None => x,
    }
}

pub(super) fn linear(parameters: &Parameters, role: Role, x: &Tensor<2>) -> Tensor<2> {
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
