//! The weights of a block, read from a checkpoint, also while another is worked on.

use std::ops::Range;
use std::thread::{Scope, ScopedJoinHandle};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::model::architecture::{Lying, Mixing};
use crate::model::block::{Block, Linear, Norm, Place, Role};
use crate::model::delta::{self, Delta};
use crate::model::mixture::{self, Experts, Router, Which};
use crate::model::{Model, Module, woven};
use crate::run::Run;
use crate::weight::Weight;

/// Blocks of a model one after the other. While one is worked on, a thread asks the system for the bytes of the next; where a GPU
/// does the work and the processor has time, it decodes them too and copies them there, but for mixtures, which take much memory.
#[derive(Debug)]
pub struct Blocks<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    model: &'env Model<'env>,
    blocks: Range<usize>,
    device: &'env Device,
    ahead: Option<ScopedJoinHandle<'scope, Option<Result<Block>>>>,
}

impl<'scope, 'env> Blocks<'scope, 'env> {
    /// Some blocks of a model.
    pub fn new(scope: &'scope Scope<'scope, 'env>, model: &'env Model<'env>, blocks: Range<usize>, run: &Run<'env>) -> Self {
        Self { scope, model, blocks, device: run.device, ahead: None }
    }

    /// The next block, while it goes on to the one after; nothing after the last.
    ///
    /// # Errors
    /// As [`Model::load_block`].
    pub fn next(&mut self) -> Result<Option<Block>> {
        let Some(index) = self.blocks.next() else { return Ok(None) };
        let ahead = self.ahead.take().map(|ahead| ahead.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        let block = match ahead.flatten() {
            Some(block) => block?,
            None => self.model.load_block(index)?,
        };
        // Experts that are read one at a time are more than memory has room for.
        if let Some(index) = self.blocks.clone().next().filter(|_| !self.model.reads_experts_singly()) {
            let (model, device) = (self.model, self.device);
            self.ahead = Some(self.scope.spawn(move || {
                model.expect_block(index);
                device
                    .gpu
                    .as_ref()
                    .filter(|_| model.config.mixture.is_none())
                    .map(|_| model.load_block(index).inspect(|block| block.send(device)))
            }));
        }
        Ok(Some(block))
    }
}

impl Drop for Blocks<'_, '_> {
    fn drop(&mut self) {
        // Whatever comes of a block that nobody asks for must not stand for what stopped the walk.
        if let Some(ahead) = self.ahead.take() {
            let _ = ahead.join();
        }
    }
}

impl Model<'_> {
    /// Tells the system that a block will be read soon.
    fn expect_block(&self, index: usize) {
        self.checkpoint.expect(&self.named(index, ""));
    }

    /// Reads a block; where experts are read one at a time, without theirs.
    ///
    /// # Errors
    /// When a tensor is not finite or cannot be read.
    pub fn load_block(&self, index: usize) -> Result<Block> {
        let (mut linears, mut routed, mut shared) = (Vec::new(), Vec::new(), Vec::new());
        for module in self.all_modules(index) {
            let into = match module.expert {
                None => &mut linears,
                Some(Which::Routed(_)) => &mut routed,
                Some(Which::Shared) => &mut shared,
            };
            if self.singly && module.expert.is_some() {
                into.push(self.hollow(module)?);
            } else {
                into.extend(self.load_module(index, module)?);
            }
        }
        let experts = self.load_experts(index, threes(routed), threes(shared).pop())?;
        let norm = |(name, place, width): (String, Place, usize)| Ok(Norm { weight: self.checkpoint.vector(&name, width)?, name, place });
        let sinks = if self.config.family.sinks {
            Some(self.checkpoint.vector(&self.named(index, "self_attn.sinks"), self.config.heads)?)
        } else {
            None
        };
        let norms = self.norms(index).into_iter().map(norm).collect::<Result<_>>()?;
        Ok(Block { index, linears, experts, delta: self.load_delta(index)?, sinks, norms })
    }

    /// Reads what a mixture has beside the layers that methods work on.
    fn load_experts(&self, index: usize, mut routed: Vec<[Linear; 3]>, shared: Option<[Linear; 3]>) -> Result<Option<Experts>> {
        let Some((mixture, mixed)) = self.mixture(index) else { return Ok(None) };
        let mut matrices = self.matrices(index).into_iter().map(|(name, shape)| self.checkpoint.matrix(&name, shape));
        let weight = matrices.next().transpose()?.ok_or_else(|| Error::run("a mixture without a router"))?;
        let gate = if mixed.shared.is_some_and(|(_, gate)| gate.is_some()) { matrices.next().transpose()? } else { None };
        let mut router = Router { weight, bias: Vec::new(), correction: Vec::new() };
        let own = self.named(index, &format!("{}.{}", mixed.name, mixed.router));
        for (name, width) in self.vectors(index).into_iter().filter(|(name, _)| name.starts_with(&own)) {
            let vector = self.checkpoint.vector(&name, width)?;
            if name.ends_with(".bias") { router.bias = vector } else { router.correction = vector }
        }
        if mixed.lying == Lying::Woven {
            let name = self.named(index, &format!("{}.experts", mixed.name));
            let one = |expert| match self.singly {
                true => woven::hollow(self.checkpoint, &name, &mixture, self.config.hidden, expert),
                false => woven::load(self.checkpoint, &name, &mixture, self.config.hidden, expert),
            };
            routed = (0..mixture.experts).map(one).collect::<Result<_>>()?;
        }
        Ok(Some(Experts { router, routed, shared: shared.map(|shared| (shared, gate)) }))
    }

    /// Reads what a delta rule has beside its linear layers.
    fn load_delta(&self, index: usize) -> Result<Option<Delta>> {
        let (true, Some(sizes)) = (self.config.layers[index].linear, &self.config.delta) else { return Ok(None) };
        let (checkpoint, named) = (self.checkpoint, |name: &str| self.named(index, &format!("linear_attn.{name}")));
        let of_control = |(name, _): &(String, [usize; 2])| name.contains(".linear_attn.");
        let mut controls = Matrix::new(0, self.config.hidden, Vec::new());
        for (name, shape) in self.matrices(index).into_iter().filter(of_control) {
            controls.rows += shape[0];
            controls.data.extend(checkpoint.matrix(&name, shape)?.data);
        }
        if matches!(self.config.family.mixing, Mixing::Hybrid(names) if names.controls.len() == 1) {
            let rows = delta::control_rows(sizes).into_iter().flat_map(|row| controls.row(row).to_vec()).collect();
            controls.data = rows;
        }
        let vector = |name: &str, width: usize| checkpoint.vector(&named(name), width);
        Ok(Some(Delta {
            controls,
            taps: checkpoint.floats(&named("conv1d.weight"), &[sizes.channels(), 1, sizes.kernel], 0..sizes.channels() * sizes.kernel)?,
            decay: vector("A_log", sizes.value_heads)?,
            offset: vector("dt_bias", sizes.value_heads)?,
            norm: vector("norm.weight", sizes.value_dim)?,
        }))
    }

    /// Reads gate, up and down of an expert.
    ///
    /// # Errors
    /// When the block has no such expert, or a tensor is not finite or cannot be read.
    pub fn load_expert(&self, index: usize, which: Which) -> Result<[Linear; 3]> {
        let woven = self.mixture(index).filter(|(_, mixed)| mixed.lying == Lying::Woven);
        if let (Some((mixture, mixed)), Which::Routed(expert)) = (woven, which) {
            let name = self.named(index, &format!("{}.experts", mixed.name));
            return woven::load(self.checkpoint, &name, &mixture, self.config.hidden, expert);
        }
        let own = self.all_modules(index).into_iter().filter(|module| module.expert == Some(which));
        let linears = own.map(|module| self.load_module(index, module)).collect::<Result<Vec<_>>>()?;
        threes(linears.into_iter().flatten().collect()).pop().ok_or_else(|| Error::run(format!("block {index} has no expert {which:?}")))
    }

    /// Reads one layer of an expert.
    ///
    /// # Errors
    /// As [`Self::load_expert`].
    pub fn load_of_expert(&self, index: usize, which: Which, role: Role) -> Result<Linear> {
        let missing = || Error::run(format!("block {index} has no expert {which:?}"));
        let is_it = |module: &Module| module.expert == Some(which) && module.roles == [role];
        match self.all_modules(index).into_iter().find(is_it) {
            Some(module) => self.load_module(index, module)?.pop().ok_or_else(missing),
            None => self.load_expert(index, which)?.into_iter().find(|linear| linear.role == role).ok_or_else(missing),
        }
    }

    /// A layer of an expert without its weight.
    fn hollow(&self, module: Module) -> Result<Linear> {
        let (bias, role) = (self.load_bias(&module)?, module.roles.first().copied().unwrap_or(Role::Down));
        Ok(Linear::new(module.name, role, mixture::hollow(module.shape), bias))
    }

    fn load_bias(&self, module: &Module) -> Result<Option<Vec<f32>>> {
        let bias = format!("{}.bias", module.name);
        if self.checkpoint.has(&bias) { self.checkpoint.vector(&bias, module.shape[0]).map(Some) } else { Ok(None) }
    }

    /// Reads a module: a linear layer for each of its roles.
    fn load_module(&self, index: usize, module: Module) -> Result<Vec<Linear>> {
        let bias = self.load_bias(&module)?;
        let Module { name, roles, shape, .. } = module;
        let weight = match self.source.weight(self.checkpoint, &name, shape)? {
            Weight::Stored(stored) => Weight::Dense(stored.to_matrix()),
            weight => weight,
        };
        if let [role] = roles.as_slice() {
            return Ok(vec![Linear::new(name, *role, weight, bias)]);
        }
        let mut first = 0;
        let part = |role: Role| {
            let rows: Vec<usize> = (first..first + self.shape(index, role)[0]).collect();
            let bias = bias.as_ref().map(|bias| bias[first..first + rows.len()].to_vec());
            first += rows.len();
            Linear::new(name.clone(), role, weight.picked(&rows), bias)
        };
        Ok(roles.into_iter().map(part).collect())
    }
}

/// Gate, up and down of one expert after the other.
fn threes(linears: Vec<Linear>) -> Vec<[Linear; 3]> {
    let mut linears = linears.into_iter();
    std::iter::from_fn(|| Some([linears.next()?, linears.next()?, linears.next()?])).collect()
}
