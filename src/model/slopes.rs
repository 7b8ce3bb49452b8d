//! The walk back: from the gradient of a loss at the last hidden states through every block to those of its weights. The
//! forward walk has kept what every block read.

use crate::error::Result;
use crate::kernels::rough_product::Precision;
use crate::model::Model;
use crate::model::backward::{self, Gradients, Wanted, upstream};
use crate::model::bench::Bench;
use crate::model::block::{Parameters, Role};
use crate::model::forward::Spec;
use crate::model::hidden::{Hidden, Keeping};
use crate::model::seen::Needs;
use crate::model::walk::{Visitor, opened};
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
        self.blocks.push(bench.hidden.copy_as(Keeping::shared(self.stores), self.run.scratch)?);
        Ok(())
    }
}

/// What is known of the weights of a role.
#[derive(Debug, Clone, Default)]
pub struct Slope {
    /// dL/dW over all windows, `[outputs, inputs]`.
    pub gradient: Vec<f32>,
    /// Σ over windows of the square of the window's own dL/dW, of the second loss.
    pub squares: Vec<f32>,
}

/// A visitor of the walk back.
pub trait BackVisitor {
    /// What must have been seen at the sites of the block; asked before each block.
    fn needs(&mut self, index: usize) -> Needs;

    /// Looks at a block with the slopes of its weights, by role.
    ///
    /// # Errors
    /// Whatever stops the walk.
    fn visit(&mut self, bench: &mut Bench<'_>, slopes: &[Slope]) -> Result<()>;
}

/// Walks from the last block to the first. `inputs` are those of every block, `slopes` enter with the gradients of two losses
/// at the last hidden states: of the first the gradients of all windows are summed, of the second their squares.
///
/// # Errors
/// When a block cannot be read, or the visitor fails.
pub fn walk_back(
    model: &Model<'_>,
    inputs: &[Hidden],
    slopes: &mut [Hidden; 2],
    run: &Run<'_>,
    visitor: &mut dyn BackVisitor,
) -> Result<()> {
    for (index, hidden) in inputs.iter().enumerate().rev() {
        run.check_stop()?;
        let needs = visitor.needs(index);
        let mut bench = opened(model, index, hidden, needs, run)?;
        let Some(parameters) = bench.original.clone() else { continue };
        let found = through(model, index, &parameters, hidden, slopes, needs > Needs::Nothing, run)?;
        if needs > Needs::Nothing {
            visitor.visit(&mut bench, &found)?;
        }
    }
    Ok(())
}

/// Turns the gradient of a block's output into that of its input, window by window; gives the slopes of its weights.
fn through(
    model: &Model<'_>,
    index: usize,
    parameters: &Parameters,
    hidden: &Hidden,
    streams: &mut [Hidden; 2],
    weights: bool,
    run: &Run<'_>,
) -> Result<Vec<Slope>> {
    use rayon::prelude::*;
    let mut gradients = Gradients::default();
    let mut slopes: Vec<Slope> = Role::ALL.iter().map(|_| Slope::default()).collect();
    let wanted = Wanted { weights, norms: false, input: index > 0, precision: Precision::Single };
    for window in 0..hidden.len() {
        run.check_stop()?;
        let spec = Spec::new(&model.config, index, hidden.tokens(window));
        let x = hidden.read(window..window + 1)?;
        for (number, stream) in streams.iter_mut().enumerate() {
            let dy = stream.read(window..window + 1)?;
            gradients.clear();
            backward::block(&spec, parameters, &x, wanted, &mut gradients, &mut upstream(&dy));
            if index > 0 {
                stream.write(window..window + 1, gradients.input())?;
            }
            for (slope, role) in slopes.iter_mut().zip(Role::ALL).filter(|_| weights) {
                let own = gradients.fetched_weight(role);
                let total = if number == 0 { &mut slope.gradient } else { &mut slope.squares };
                total.resize(own.len(), 0.0);
                let pairs = total.par_iter_mut().zip(own.par_iter()).with_min_len(1 << 13);
                pairs.for_each(|(total, own)| *total += if number == 0 { *own } else { own * own });
            }
        }
    }
    Ok(slopes)
}
