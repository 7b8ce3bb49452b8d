//! The only transformer mathematics of the crate. Weights come from outside as tensors, so the same code serves
//! calibration, evaluation and, on an autodiff device, gradients.
//!
//! Hidden states are `tokens × width` with the windows of a batch one after the other, `seq` tokens each.

use burn::tensor::Tensor;

use crate::kernels::attention::Attention;
use crate::kernels::gated::gated;
use crate::kernels::rms_norm::rms_norm;
use crate::kernels::rope::{Table, rope};
use crate::model::architecture::{NormKind, QkNorm};
use crate::model::block::{Parameters, Place, Role, Site};
use crate::model::config::{Config, Layer};

/// What a forward of one layer needs besides its tensors.
#[derive(Debug)]
pub struct Spec<'a> {
    /// The model's description.
    pub config: &'a Config,
    /// The layer's description.
    pub layer: &'a Layer,
    /// The rotation for windows of `seq` tokens.
    pub table: Option<Table>,
    /// Tokens per window.
    pub seq: usize,
}

impl<'a> Spec<'a> {
    /// The surroundings of layer `index` for windows of `seq` tokens.
    pub fn new(config: &'a Config, index: usize, seq: usize) -> Self {
        let layer = &config.layers[index];
        Self { config, layer, table: layer.rotation.as_ref().map(|rotation| rotation.table(seq)), seq }
    }
}

/// A tap sees the input of every site as the forward passes it.
pub type Tap<'a> = &'a mut dyn FnMut(Site, &Tensor<2>);

/// The output of a block for the hidden states `x`.
pub fn block(spec: &Spec<'_>, parameters: &Parameters, x: Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    let normed = norm(spec, parameters, Place::AttentionIn, x.clone());
    let attended = attention(spec, parameters, normed, tap);
    let x = add(spec, x, norm(spec, parameters, Place::AttentionOut, attended));
    let normed = norm(spec, parameters, Place::MlpIn, x.clone());
    let mixed = mlp(spec, parameters, normed, tap);
    add(spec, x, norm(spec, parameters, Place::MlpOut, mixed))
}

/// Final norm of the hidden states, before the head.
pub fn final_norm(config: &Config, x: &Tensor<2>, weight: &Tensor<1>) -> Tensor<2> {
    rms_norm(x, weight, config.epsilon, config.family.norm == NormKind::OnePlus)
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

fn add(spec: &Spec<'_>, x: Tensor<2>, branch: Tensor<2>) -> Tensor<2> {
    let factor = spec.config.residual_factor;
    if factor == 1.0 { x + branch } else { x + branch * factor }
}

fn norm(spec: &Spec<'_>, parameters: &Parameters, place: Place, x: Tensor<2>) -> Tensor<2> {
    match parameters.norm(place) {
        Some(weight) => rms_norm(&x, weight, spec.config.epsilon, spec.config.family.norm == NormKind::OnePlus),
        None => x,
    }
}

fn linear(parameters: &Parameters, role: Role, x: &Tensor<2>) -> Tensor<2> {
    let product = x.clone().matmul(parameters.weight(role).clone().transpose());
    match parameters.bias(role) {
        Some(bias) => product + bias.clone().unsqueeze(),
        None => product,
    }
}

fn attention(spec: &Spec<'_>, parameters: &Parameters, x: Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    let config = spec.config;
    tap(Site::Attention, &x);
    let q = rotated(spec, parameters, Place::Query, linear(parameters, Role::Query, &x));
    let k = rotated(spec, parameters, Place::Key, linear(parameters, Role::Key, &x));
    let v = linear(parameters, Role::Value, &x);
    let attention = Attention {
        seq: spec.seq,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        scale: config.scale,
        softcap: config.attention_cap,
        window: spec.layer.window,
    };
    let mixed = attention.run(q, k, v);
    tap(Site::Output, &mixed);
    linear(parameters, Role::Output, &mixed)
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
    match &spec.table {
        Some(table) => rope(x, head_dim, table),
        None => x,
    }
}

fn mlp(spec: &Spec<'_>, parameters: &Parameters, x: Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    tap(Site::Mlp, &x);
    let gate = linear(parameters, Role::Gate, &x);
    let up = linear(parameters, Role::Up, &x);
    let middle = gated(spec.config.activation, gate, up);
    tap(Site::Down, &middle);
    linear(parameters, Role::Down, &middle)
}
