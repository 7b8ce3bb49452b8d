//! Attention over narrowed keys and values (multi-head latent attention, DeepSeek-V2 arXiv:2405.04434, section 2.1): queries and
//! keys are a part without rotation, widened from what was narrowed, and a part that turns, which all heads of keys share.
//!
//! Heads are laid out for the attention as [turning columns, others, zeros]: scores are sums over columns in any order, and one
//! width for queries, keys and values is what attention knows.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::error::{Error, Result};
use crate::kernels::rope::rope;
use crate::model::block::{Parameters, Place, Role, Site};
use crate::model::config::Keys;
use crate::model::forward::{Point, Spec, Tap, attended, linear, norm};

/// Widths of a latent attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latent {
    /// Columns of narrowed queries, where those are narrowed.
    pub query_rank: Option<usize>,
    /// Columns of narrowed keys and values.
    pub rank: usize,
    /// Columns of a head's queries and keys that do not turn.
    pub still: usize,
    /// Columns of a head's queries and keys that turn.
    pub turning: usize,
    /// Columns of a head's values.
    pub value: usize,
}

/// The ε of the norms of what was narrowed, whatever config.json says of others.
pub const EPSILON: f64 = 1e-6;

impl Latent {
    /// Reads the widths.
    ///
    /// # Errors
    /// One line naming the key.
    pub fn read(keys: &Keys<'_>) -> Result<Self> {
        let count = |key: &str, default: usize| Ok(keys.count(key, 1 << 20)?.unwrap_or(default));
        let turning = count("qk_rope_head_dim", 64)?;
        if turning % 2 != 0 {
            return Err(Error::input(format!("config.json: qk_rope_head_dim {turning} is odd; rotation needs an even one")));
        }
        let query_rank = if keys.0.contains_key("q_lora_rank") { keys.count("q_lora_rank", 1 << 20)? } else { Some(1536) };
        Ok(Self {
            query_rank,
            rank: count("kv_lora_rank", 512)?,
            still: count("qk_nope_head_dim", 128)?,
            turning,
            value: count("v_head_dim", 128)?,
        })
    }

    /// Columns of a head's queries and keys.
    pub fn key(&self) -> usize {
        self.still + self.turning
    }

    /// Columns of a head as attention knows them.
    pub fn head_dim(&self) -> usize {
        self.key().max(self.value)
    }
}

/// The output of attention before its projection, for what queries, keys and values read.
pub fn attend(spec: &Spec<'_>, latent: &Latent, parameters: &Parameters, x: &Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    let ([tokens, _], heads) = (x.dims(), spec.config.heads);
    let q = if parameters.has(Role::QueryDown) {
        let narrow = narrowed_queries(spec, parameters, x, tap);
        tap(Point::Site(Site::QueryLatent), &narrow);
        linear(parameters, Role::QueryUp, &narrow)
    } else {
        linear(parameters, Role::Query, x)
    };
    let (key, inner) = (latent.key(), latent.head_dim());
    let q = by_head(q, heads, key);
    let q = Tensor::cat(vec![columns(&q, latent.still..key), columns(&q, 0..latent.still), empty(&q, inner - key)], 2);
    let q = turned(spec, q.reshape([tokens, heads * inner]), inner);
    tap(Point::TurnedQuery, &q);
    let [narrow, turning] = narrowed_keys(spec, latent, parameters, x, tap);
    tap(Point::Site(Site::KeyValueLatent), &narrow);
    let wide = by_head(linear(parameters, Role::KeyValueUp, &narrow), heads, latent.still + latent.value);
    let turning = turned(spec, turning, latent.turning).reshape([tokens, 1, latent.turning]).expand([tokens, heads, latent.turning]);
    let k = Tensor::cat(vec![turning, columns(&wide, 0..latent.still), empty(&wide, inner - key)], 2);
    let k = k.reshape([tokens, heads * inner]);
    tap(Point::TurnedKey, &k);
    let v = columns(&wide, latent.still..latent.still + latent.value);
    let v = Tensor::cat(vec![v, empty(&wide, inner - latent.value)], 2).reshape([tokens, heads * inner]);
    tap(Point::Value, &v);
    let out = attended(spec, parameters, [q, k, v]);
    tap(Point::Attended, &out);
    columns(&by_head(out, heads, inner), 0..latent.value).reshape([tokens, heads * latent.value])
}

/// What queries, or keys and values, read of what was narrowed, for what attention reads.
pub fn narrowed(spec: &Spec<'_>, latent: &Latent, parameters: &Parameters, site: Site, x: &Tensor<2>) -> Tensor<2> {
    match site {
        Site::QueryLatent => narrowed_queries(spec, parameters, x, &mut |_, _| {}),
        _ => {
            let [narrow, _] = narrowed_keys(spec, latent, parameters, x, &mut |_, _| {});
            narrow
        }
    }
}

fn narrowed_queries(spec: &Spec<'_>, parameters: &Parameters, x: &Tensor<2>, tap: Tap<'_>) -> Tensor<2> {
    let narrow = linear(parameters, Role::QueryDown, x);
    tap(Point::Query, &narrow);
    norm(spec, parameters, Place::QueryLatent, narrow)
}

/// Narrowed keys and values, and the columns of keys that turn, before they do.
fn narrowed_keys(spec: &Spec<'_>, latent: &Latent, parameters: &Parameters, x: &Tensor<2>, tap: Tap<'_>) -> [Tensor<2>; 2] {
    let (narrow, tokens) = (linear(parameters, Role::KeyValueDown, x), x.dims()[0]);
    let turning = narrow.clone().slice([0..tokens, latent.rank..latent.rank + latent.turning]);
    let narrow = narrow.slice([0..tokens, 0..latent.rank]);
    tap(Point::Key, &narrow);
    [norm(spec, parameters, Place::KeyValueLatent, narrow), turning]
}

fn turned(spec: &Spec<'_>, x: Tensor<2>, head_dim: usize) -> Tensor<2> {
    match &spec.table {
        Some(table) => rope(x, head_dim, table),
        None => x,
    }
}

fn by_head(x: Tensor<2>, heads: usize, width: usize) -> Tensor<3> {
    let tokens = x.dims()[0];
    x.reshape([tokens, heads, width])
}

fn columns(x: &Tensor<3>, columns: Range<usize>) -> Tensor<3> {
    let [tokens, heads, _] = x.dims();
    x.clone().slice([0..tokens, 0..heads, columns])
}

/// So many columns of zeros beside `x`.
fn empty(x: &Tensor<3>, width: usize) -> Tensor<3> {
    let [tokens, heads, _] = x.dims();
    let empty = Tensor::zeros([tokens, heads, width], &x.device());
    if x.is_autodiff() && !empty.is_autodiff() { empty.autodiff() } else { empty }
}
