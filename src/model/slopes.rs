//! What the walk back needs of a block: what it read on the way forward, and from the gradients of its output those of its
//! weights and of its input.

use std::collections::BTreeMap;

use crate::error::Result;
use crate::kernels::rough_product::Precision;
use crate::model::Model;
use crate::model::backward::{self, Gradients, Wanted};
use crate::model::bench::Bench;
use crate::model::block::{Parameters, Slot};
use crate::model::forward::Spec;
use crate::model::hidden::{Hidden, Keeping};
use crate::model::loss::upstream;
use crate::model::seen::Needs;
use crate::model::walk::Visitor;
use crate::run::Run;

/// Keeps the hidden states that every block reads.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// Those of each block so far.
    pub blocks: Vec<Hidden>,
    run: &'a Run<'a>,
    stores: usize,
}

impl<'a> Inputs<'a> {
    /// A keeper for so many blocks.
    pub fn new(blocks: usize, run: &'a Run<'a>) -> Self {
        Self { blocks: Vec::new(), run, stores: blocks }
    }
}

impl Visitor for Inputs<'_> {
    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn visit(&mut self, bench: &mut Bench<'_>) -> Result<()> {
        self.blocks.push(bench.hidden.copy_as(Keeping::shared(self.stores), self.run)?);
        Ok(())
    }
}

/// What is known of the weights of a layer.
#[derive(Debug, Clone, Default)]
pub struct Slope {
    /// dL/dW over all windows, `[outputs, inputs]`.
    pub gradient: Vec<f32>,
    /// Σ over windows of the square of the window's own dL/dW, of the second loss.
    pub squares: Vec<f32>,
}

/// What is known of the weights of a block's layers.
pub type Slopes = BTreeMap<Slot, Slope>;

/// Turns the gradients of a block's output into those of its input, window by window; gives the slopes of the weights of `slots`.
///
/// # Errors
/// When hidden states cannot be read or written, or a signal asks to stop.
pub fn through(
    model: &Model<'_>,
    index: usize,
    parameters: &Parameters,
    hidden: &Hidden,
    streams: &mut [Hidden; 2],
    slots: &[Slot],
    run: &Run<'_>,
) -> Result<Slopes> {
    use rayon::prelude::*;
    let mut gradients = Gradients::default();
    let mut slopes: Slopes = slots.iter().map(|&slot| (slot, Slope::default())).collect();
    let wanted = Wanted { weights: !slots.is_empty(), norms: false, input: index > 0, precision: Precision::Single };
    for window in 0..hidden.len() {
        run.check_stop()?;
        let spec = Spec::new(&model.config, index, hidden.tokens(window));
        let x = hidden.states(window..window + 1, &parameters.home())?;
        for (number, stream) in streams.iter_mut().enumerate() {
            let dy = stream.read(window..window + 1)?;
            gradients.clear();
            backward::block(&spec, parameters, &x, wanted, &mut gradients, &mut upstream(&dy))?;
            if index > 0 {
                stream.write(window..window + 1, gradients.input())?;
            }
            for (&slot, slope) in &mut slopes {
                let own = gradients.fetched_weight(slot);
                let total = if number == 0 { &mut slope.gradient } else { &mut slope.squares };
                total.resize(own.len(), 0.0);
                let pairs = total.par_iter_mut().zip(own.par_iter()).with_min_len(1 << 13);
                pairs.for_each(|(total, own)| *total += if number == 0 { *own } else { own * own });
            }
        }
    }
    Ok(slopes)
}
