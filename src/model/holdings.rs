//! Where the layers of a block's experts are: in the block, in the original's tensors, in a temporary file, or only in the checkpoint.
//! Whoever works on experts one after the other asks here, and needs no more memory than for those.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::{matrix, tensor};
use crate::matrix::Matrix;
use crate::model::Model;
use crate::model::away::Away;
use crate::model::block::{Linear, Slot};
use crate::model::mixture::{self, Experts, Layers, Tensors, Which};

/// The layers of a block's experts.
#[derive(Debug, Clone, Copy)]
pub struct Holdings<'a> {
    /// The model.
    pub model: &'a Model<'a>,
    /// The number of the block.
    pub index: usize,
    /// The experts as they stand; the original ones where there are none.
    pub experts: Option<&'a Experts>,
    /// Weights that were put away.
    pub away: Option<&'a Away>,
    /// The original's tensors, which may be without experts.
    pub original: Option<&'a Tensors>,
    /// The experts that were kept, by their numbers in the checkpoint, where some were removed.
    pub kept: Option<&'a [usize]>,
    /// Where they are computed; an expert that has no room there lies on the processor.
    pub device: &'a Device,
}

impl<'a> Holdings<'a> {
    /// Those of a block that nobody has changed.
    pub fn of_original(model: &'a Model<'a>, index: usize, original: Option<&'a Tensors>, device: &'a Device) -> Self {
        Self { model, index, experts: None, away: None, original, kept: None, device }
    }

    /// An expert as it stands.
    ///
    /// # Errors
    /// When a weight cannot be read.
    pub fn layers(&self, which: Which) -> Result<Layers> {
        match self.experts.and_then(|experts| experts.layers(which)) {
            Some(linears) => self.standing(which, linears),
            None => self.original(which),
        }
    }

    /// An expert that stands in these layers, and elsewhere where they are without numbers.
    ///
    /// # Errors
    /// When a weight cannot be read.
    pub fn standing(&self, which: Which, linears: &[Linear; 3]) -> Result<Layers> {
        let home = self.home(linears.each_ref().map(|linear| linear.weight.shape()));
        let mut original: Option<Layers> = None;
        let mut weights = Vec::new();
        for (place, linear) in linears.iter().enumerate() {
            let shape = linear.weight.shape();
            let of = |matrix: Matrix| tensor(matrix.data, shape, &home);
            let put = if mixture::absent(&linear.weight) { self.put_away(Slot::of(which, linear.role))? } else { None };
            weights.push(match put {
                Some(put) => of(put),
                None if !mixture::absent(&linear.weight) => of(linear.weight.to_matrix().into_owned()),
                None => {
                    if original.is_none() {
                        original = Some(self.original(which)?);
                    }
                    original.as_ref().map(|layers| layers.weights[place].clone()).ok_or_else(missing)?
                }
            });
        }
        let weights = weights.try_into().map_err(|_| missing())?;
        Ok(Layers { weights, biases: linears.each_ref().map(|linear| mixture::bias(linear, &home)) })
    }

    /// Where the tensors of an expert lie whose layers have these shapes: the same for all ways to hold it.
    fn home(&self, shapes: [[usize; 2]; 3]) -> burn::tensor::Device {
        let bytes = shapes.map(|[rows, columns]| 4 * (rows * columns) as u64);
        let fits = bytes.iter().sum::<u64>() <= self.device.room_for_weights() && bytes.iter().all(|&bytes| self.device.binds(bytes));
        if self.device.gpu.is_none() || fits { self.device.burn.clone() } else { burn::tensor::Device::flex() }
    }

    fn put_away(&self, slot: Slot) -> Result<Option<Matrix>> {
        Ok(self.away.map(|away| away.get(slot)).transpose()?.flatten().map(crate::weight::Weight::into_matrix))
    }

    /// An expert of the original.
    ///
    /// # Errors
    /// When a weight cannot be read.
    pub fn original(&self, which: Which) -> Result<Layers> {
        match self.original.and_then(|original| original.layers(which)) {
            Some(layers) => Ok(layers.on(&self.home(layers.weights.each_ref().map(burn::tensor::Tensor::dims)))),
            None => {
                let mut linears = self.model.load_expert(self.index, self.numbered(which))?;
                let home = self.home(linears.each_ref().map(|linear| linear.weight.shape()));
                Ok(Layers::take(&mut linears, &home))
            }
        }
    }

    /// The weight of a layer of an expert of the original.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn original_weight(&self, slot: Slot) -> Result<Matrix> {
        let which = slot.expert.ok_or_else(missing)?;
        if let Some(weight) = self.original.and_then(|original| original.weight(which, slot.role)) {
            return Ok(matrix(weight));
        }
        Ok(self.model.load_of_expert(self.index, self.numbered(which), slot.role)?.weight.into_matrix())
    }

    /// All experts as they stand, the shared one last.
    ///
    /// # Errors
    /// When a weight cannot be read.
    pub fn fill(&self, tensors: &mut Tensors, shared: bool) -> Result<()> {
        tensors.routed = (0..tensors.count()).map(|expert| self.layers(Which::Routed(expert))).collect::<Result<_>>()?;
        tensors.shared = shared.then(|| self.layers(Which::Shared)).transpose()?;
        Ok(())
    }

    /// An expert by its number in the checkpoint.
    fn numbered(&self, which: Which) -> Which {
        match (which, self.kept) {
            (Which::Routed(expert), Some(kept)) => Which::Routed(kept.get(expert).copied().unwrap_or(expert)),
            _ => which,
        }
    }
}

fn missing() -> Error {
    Error::run("an expert is not part of the block")
}
