//! Mixtures of experts: what config.json says of them, and their layers in a block. A router sends every token to a few of the
//! experts, gated MLPs of which each sees its own tokens; the output is the sum of what they give, times their shares, and of what
//! an expert of all tokens gives, where there is one ([`crate::model::forward`]).

use burn::tensor::Tensor;
use serde_json::Value;

use crate::error::{Error, Result, shown};
use crate::kernels::routing::Rule;
use crate::kernels::{tensor, values};
use crate::matrix::Matrix;
use crate::model::architecture::Family;
use crate::model::block::{Linear, Role, floats};
use crate::model::config::Keys;
use crate::weight::{Sparse, Weight};

/// What the layers of an expert do, in order.
const LAYERS: [Role; 3] = [Role::Gate, Role::Up, Role::Down];

/// Most experts of a layer.
const MOST: usize = 1 << 14;

/// What config.json says of the mixtures of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
        let experts = match keys.count("num_experts", MOST as u64)? {
            Some(experts) => experts,
            None => keys.count("num_local_experts", MOST as u64)?.unwrap_or(experts),
        };
        let chosen = keys.count("num_experts_per_tok", MOST as u64)?.unwrap_or(chosen);
        if chosen > experts {
            return Err(Error::input(format!("config.json: num_experts_per_tok is {chosen}, there are {experts} experts")));
        }
        let renormalized = mixed.renormalized || keys.flag("norm_topk_prob").unwrap_or(false);
        let shared = match mixed.shared {
            Some(_) => Some(keys.count("shared_expert_intermediate_size", 1 << 24)?.unwrap_or(shared)),
            None => None,
        };
        let width = keys.count(mixed.width, 1 << 24)?.unwrap_or(width);
        Ok(Some(Self { experts, rule: Rule { chosen, renormalized }, width, shared }))
    }

    /// Which layers are mixtures.
    ///
    /// # Errors
    /// One line naming the key.
    pub fn layers(keys: &Keys<'_>, family: &Family, count: usize) -> Result<Vec<bool>> {
        let Some(mixed) = family.mixed else { return Ok(vec![false; count]) };
        if mixed.every {
            return Ok(vec![true; count]);
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

    /// Weights of the linear layers of a mixture over `hidden` columns.
    pub fn entries(&self, hidden: usize) -> u64 {
        3 * hidden as u64 * (self.experts as u64 * self.width as u64 + self.shared.unwrap_or(0) as u64)
    }
}

/// Which expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Which {
    /// One of those that the router chooses from.
    Routed(usize),
    /// That of all tokens.
    Shared,
}

/// The layers of a mixture: gate, up and down of every expert.
#[derive(Debug)]
pub struct Experts {
    /// Experts × hidden.
    pub router: Matrix,
    /// Those that the router chooses from.
    pub routed: Vec<[Linear; 3]>,
    /// That of all tokens, with what scales its output, 1 × hidden.
    pub shared: Option<([Linear; 3], Matrix)>,
}

impl Experts {
    /// The layers of every expert, the shared one last.
    pub fn linears(&self) -> impl Iterator<Item = (Which, &[Linear; 3])> {
        let routed = self.routed.iter().enumerate().map(|(expert, linears)| (Which::Routed(expert), linears));
        routed.chain(self.shared.as_ref().map(|(linears, _)| (Which::Shared, linears)))
    }

    /// As [`Self::linears`], to change them.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut [Linear; 3]> {
        self.routed.iter_mut().chain(self.shared.as_mut().map(|(linears, _)| linears))
    }

    /// Bytes of all its weights in f32.
    pub fn bytes(&self) -> u64 {
        let all = self.routed.iter().chain(self.shared.as_ref().map(|(linears, _)| linears)).flatten();
        all.map(|linear| linear.weight.shape()).map(|[rows, columns]| 4 * (rows * columns) as u64).sum()
    }
}

/// The tensors that the forward of a mixture needs.
#[derive(Debug, Clone)]
pub struct Tensors {
    /// Experts × hidden.
    pub router: Tensor<2>,
    /// Gate, up and down of those that the router chooses from.
    pub routed: Vec<[Tensor<2>; 3]>,
    /// Those of the expert of all tokens, with what scales its output, 1 × hidden.
    pub shared: Option<([Tensor<2>; 3], Tensor<2>)>,
}

impl Tensors {
    /// Takes the floats out of a mixture, which must not be used any more.
    pub fn take(experts: &mut Experts, device: &burn::tensor::Device) -> Self {
        let whole = |matrix: &Matrix| tensor(matrix.data.clone(), [matrix.rows, matrix.columns], device);
        let take = |linears: &mut [Linear; 3]| {
            linears.each_mut().map(|linear| {
                let shape = linear.weight.shape();
                tensor(floats(&mut linear.weight), shape, device)
            })
        };
        Self {
            router: whole(&experts.router),
            routed: experts.routed.iter_mut().map(take).collect(),
            shared: experts.shared.as_mut().map(|(linears, gate)| (take(linears), whole(gate))),
        }
    }

    /// The weight of a layer of an expert.
    pub fn weight(&self, which: Which, role: Role) -> Option<&Tensor<2>> {
        let layers = match which {
            Which::Routed(expert) => self.routed.get(expert)?,
            Which::Shared => &self.shared.as_ref()?.0,
        };
        layers.get(LAYERS.iter().position(|layer| *layer == role)?)
    }

    /// Puts the floats back where [`Self::take`] took them from.
    pub fn give_back(self, experts: &mut Experts) {
        let shared = self.shared.map(|(layers, _)| layers);
        for (layers, linears) in self.routed.into_iter().chain(shared).zip(experts.linears_mut()) {
            for (layer, linear) in layers.into_iter().zip(linears) {
                if let Weight::Dense(matrix) | Weight::Sparse(Sparse { matrix, .. }) = &mut linear.weight
                    && matrix.data.is_empty()
                {
                    *matrix = Matrix::new(matrix.rows, matrix.columns, values(layer));
                }
            }
        }
    }
}
