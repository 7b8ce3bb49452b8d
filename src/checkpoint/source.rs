//! Where the weights of linear layers come from: plain tensors, or whatever a format makes of several tensors.

use std::fmt::Debug;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::weight::Weight;

/// Reads the weights of linear layers from a checkpoint.
pub trait Source: Debug + Send + Sync {
    /// `[outputs, inputs]` of the linear layer `name` (without `.weight`), from headers alone; `None` when absent.
    fn shape(&self, checkpoint: &Checkpoint, name: &str) -> Option<[usize; 2]>;

    /// The tensors that hold the linear layer `name`.
    fn tensors(&self, _checkpoint: &Checkpoint, name: &str) -> Vec<String> {
        vec![format!("{name}.weight")]
    }

    /// Checks, from headers alone, that the tensors of the linear layer `name` fit together.
    ///
    /// # Errors
    /// Naming the tensor that does not.
    fn check(&self, _checkpoint: &Checkpoint, _name: &str, _shape: [usize; 2]) -> Result<()> {
        Ok(())
    }

    /// The weight of the linear layer `name`, checked to be finite and of this shape.
    ///
    /// # Errors
    /// When it is missing or wrong, naming the tensor.
    fn weight(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<Weight>;
}

/// Plain `name.weight` tensors.
#[derive(Debug)]
pub struct Plain;

impl Source for Plain {
    fn shape(&self, checkpoint: &Checkpoint, name: &str) -> Option<[usize; 2]> {
        checkpoint.info(&format!("{name}.weight"))?.shape.as_slice().try_into().ok()
    }

    fn weight(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<Weight> {
        checkpoint.stored(&format!("{name}.weight"), shape).map(Weight::Stored)
    }
}

/// A source whose weights go through something: they come changed, or are refused.
#[derive(Debug)]
pub struct Through {
    source: Box<dyn Source>,
    step: fn(Weight) -> Result<Weight>,
}

impl Through {
    /// A source that does `step` to every weight; its error is told with the layer and the folder.
    pub fn new(source: Box<dyn Source>, step: fn(Weight) -> Result<Weight>) -> Self {
        Self { source, step }
    }

    /// A source whose packed layers come as the floats that they stand for.
    pub fn restored(source: Box<dyn Source>) -> Self {
        Self::new(source, |weight| match weight {
            stored @ (Weight::Stored(_) | Weight::Dense(_)) => Ok(stored),
            packed => Ok(Weight::Dense(packed.into_matrix())),
        })
    }
}

impl Source for Through {
    fn shape(&self, checkpoint: &Checkpoint, name: &str) -> Option<[usize; 2]> {
        self.source.shape(checkpoint, name)
    }

    fn tensors(&self, checkpoint: &Checkpoint, name: &str) -> Vec<String> {
        self.source.tensors(checkpoint, name)
    }

    fn check(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<()> {
        self.source.check(checkpoint, name, shape)
    }

    fn weight(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<Weight> {
        let weight = self.source.weight(checkpoint, name, shape)?;
        (self.step)(weight).map_err(|error| error.tensor(name).file(&checkpoint.folder))
    }
}

/// The tensor that holds the linear layer `name` together with others, where one does.
pub fn shared(source: &dyn Source, checkpoint: &Checkpoint, name: &str) -> Option<String> {
    let first = source.tensors(checkpoint, name).into_iter().next()?;
    let own = first.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
    (!own).then_some(first)
}

/// Those tensors of a layer that are there.
pub fn present(checkpoint: &Checkpoint, name: &str, suffixes: &[&str]) -> Vec<String> {
    suffixes.iter().map(|suffix| format!("{name}.{suffix}")).filter(|tensor| checkpoint.has(tensor)).collect()
}

/// Refuses a tensor whose shape is not the one that the configuration asks for.
///
/// # Errors
/// Naming the tensor and both shapes.
pub fn expect_shape(checkpoint: &Checkpoint, name: &str, found: Option<[usize; 2]>, needed: [usize; 2]) -> Result<()> {
    match found {
        Some(found) if found == needed => Ok(()),
        Some(found) => {
            Err(Error::input(format!("has shape {found:?}, config.json asks for {needed:?}")).tensor(name).file(&checkpoint.folder))
        }
        None => match checkpoint.info(name) {
            Some(info) => Err(Error::input(format!("has shape {:?}, config.json asks for {needed:?}", info.shape))
                .tensor(name)
                .file(&checkpoint.folder)),
            None => Err(Error::input(format!(
                "missing (shape {needed:?} expected); the checkpoint is incomplete, or its config.json belongs to another model"
            ))
            .tensor(name)
            .file(&checkpoint.folder)),
        },
    }
}
