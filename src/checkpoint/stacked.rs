//! Experts whose layers are stacked, one tensor of gate and up of all experts and one of down, read as layers of their own.
//!
//! `….experts.gate_up_proj` is experts × 2 middle × hidden, the rows of gate before those of up; `….experts.down_proj` is
//! experts × hidden × middle. They go by the names that they have where every expert is apart: `….experts.3.up_proj`.

use crate::checkpoint::Checkpoint;
use crate::checkpoint::source::Source;
use crate::error::Result;
use crate::weight::Weight;

/// A source that finds the layers of experts in stacked tensors, and all others where they are.
#[derive(Debug)]
pub struct Stacked(pub Box<dyn Source>);

/// The end of the name of stacked gates and ups.
const BOTH: &str = ".experts.gate_up_proj";

/// Where a layer of an expert lies.
struct Slice {
    tensor: String,
    /// Sizes of the whole tensor.
    shape: [usize; 3],
    /// The first entry.
    first: usize,
    /// `[outputs, inputs]`.
    own: [usize; 2],
}

/// Whether a checkpoint has stacked experts.
pub fn any(checkpoint: &Checkpoint) -> bool {
    checkpoint.names().any(|name| name.ends_with(BOTH))
}

fn find(checkpoint: &Checkpoint, name: &str) -> Option<Slice> {
    let (start, rest) = name.rsplit_once(".experts.")?;
    let (expert, layer) = rest.split_once('.')?;
    let expert: usize = expert.parse().ok()?;
    let (end, half) = match layer {
        "gate_proj" => ("gate_up_proj", Some(0)),
        "up_proj" => ("gate_up_proj", Some(1)),
        "down_proj" => ("down_proj", None),
        _ => return None,
    };
    let tensor = format!("{start}.experts.{end}");
    let shape: [usize; 3] = checkpoint.info(&tensor)?.shape.as_slice().try_into().ok()?;
    let [experts, rows, columns] = shape;
    let own = [if half.is_some() { rows / 2 } else { rows }, columns];
    let first = (expert.checked_mul(rows)?.checked_add(half.unwrap_or(0) * own[0])?).checked_mul(columns)?;
    (expert < experts).then_some(Slice { tensor, shape, first, own })
}

impl Source for Stacked {
    fn shape(&self, checkpoint: &Checkpoint, name: &str) -> Option<[usize; 2]> {
        match find(checkpoint, name) {
            Some(slice) => Some(slice.own),
            None => self.0.shape(checkpoint, name),
        }
    }

    fn tensors(&self, checkpoint: &Checkpoint, name: &str) -> Vec<String> {
        match find(checkpoint, name) {
            Some(slice) => vec![slice.tensor],
            None => self.0.tensors(checkpoint, name),
        }
    }

    fn check(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<()> {
        match find(checkpoint, name) {
            Some(slice) => checkpoint.float(&slice.tensor).map(drop),
            None => self.0.check(checkpoint, name, shape),
        }
    }

    fn weight(&self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<Weight> {
        match find(checkpoint, name).filter(|slice| slice.own == shape) {
            Some(slice) => checkpoint.stored_part(&slice.tensor, &slice.shape, slice.first, shape).map(Weight::Stored),
            None => self.0.weight(checkpoint, name, shape),
        }
    }
}
