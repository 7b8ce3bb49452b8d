//! What a run is expected to need, and whether experts have to be read one at a time for it.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::memory;
use crate::model::generate::{self, BUDGET};
use crate::model::hidden::Keeping;
use crate::model::seen::Needs;
use crate::model::{Model, walk};
use crate::plan::Plan;

/// What is needed in any case, in bytes of memory.
const LEAST: u64 = 230 << 20;

/// What a run is expected to need.
#[derive(Debug, Clone, Copy)]
pub struct Needed {
    /// Peak memory, in bytes.
    pub memory_bytes: u64,
    /// Stores of hidden states that are kept for whoever goes on, with their tokens and the width of those.
    states: [u64; 3],
    /// Whether experts are read one at a time, because memory has no room for those of a block.
    pub singly: bool,
    /// Whether the model has experts.
    pub mixed: bool,
}

impl Default for Needed {
    fn default() -> Self {
        Self { memory_bytes: LEAST, states: [0; 3], singly: false, mixed: false }
    }
}

impl Needed {
    /// What calibrating a model needs, with `tokens` that are read or that `generation` writes; `limit` is the memory that it may
    /// have, or else what is free.
    pub fn of(
        (model, plan): (&Model<'_>, &Plan),
        needs: Needs,
        tokens: usize,
        generation: Option<&generate::Options>,
        limit: Option<u64>,
    ) -> Self {
        let writing = generation.map_or(0, |options| BUDGET.memory_bytes(model, options));
        let tokens = (tokens + generation.map_or(0, |options| options.samples * options.seq)) as u64;
        let streams = match needs {
            Needs::Nothing => 0,
            Needs::Streams => 2,
            _ => 1,
        };
        let states = [3 * streams, tokens, model.config.hidden as u64];
        let bytes = |singly: bool| {
            let block = if needs == Needs::Nothing { 1 } else { 2 } * model.block_bytes_at_once(singly);
            LEAST + writing.max(block + walk::memory_bytes(model, tokens, needs, singly))
        };
        let limit = limit.or_else(|| memory::available().map(|bytes| bytes / 10 * 9));
        let mixed = model.config.layers.iter().any(|layer| layer.mixed);
        let singly = mixed && whole(plan).is_none() && bytes(true) < bytes(false) && limit.is_some_and(|limit| bytes(false) > limit);
        Self { memory_bytes: bytes(singly), states, singly, mixed }
    }

    /// Bytes on disk of the hidden states that are kept for whoever goes on; those that lay on a GPU are kept in f32.
    pub fn states_bytes(&self, device: &Device) -> u64 {
        let [stores, tokens, width] = self.states;
        let keeping = if device.gpu.is_some() && !self.mixed { Keeping::EXACT } else { Keeping::HALVED };
        stores * keeping.stored_bytes(tokens, width)
    }

    /// Refuses what needs more memory than it may have.
    ///
    /// # Errors
    /// One line with both numbers.
    pub fn fits(&self, limit: Option<u64>, plan: &Plan) -> Result<()> {
        let Some(limit) = limit.filter(|&limit| self.memory_bytes > limit) else { return Ok(()) };
        let bytes = crate::report::bytes;
        let learns = whole(plan).filter(|_| self.mixed).map_or(String::new(), |name| {
            format!("method {name} works on a block as a whole, where others, as in preset w4, take experts one at a time; ")
        });
        Err(Error::input(format!(
            "about {} of memory are needed, --memory allows {}; {learns}use fewer --samples, a shorter --seq, or a preset without calibration such as w4-fast",
            bytes(self.memory_bytes),
            bytes(limit)
        )))
    }
}

/// The first method that needs a block as a whole.
fn whole(plan: &Plan) -> Option<&str> {
    let mut stages = plan.stages.iter().filter(|stage| stage.method.block().is_some() && !stage.method.removes_experts());
    stages.next().map(|stage| stage.name.as_str())
}
