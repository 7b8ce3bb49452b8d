//! Which experts of a mixture matter, and a mixture without some of them.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::kernels::{dot_lanes, tensor, values};
use crate::matrix::Matrix;
use crate::model::arrivals::{Arrivals, CHUNK, Reader};
use crate::model::bench::Bench;
use crate::model::block::{Parameters, Site};
use crate::model::forward::Spec;
use crate::model::mixture::{self, Router, Which};

impl Bench<'_> {
    /// By expert, the mean over its tokens of the factor of its output times the norm of that output; 0 where no token came.
    ///
    /// # Errors
    /// When hidden states cannot be read, or something is not finite.
    pub fn saliency(&self) -> Result<Vec<f64>> {
        let missing = || Error::run("no calibration was seen at the experts");
        let (Some(arrivals), Some(original)) = (&self.arrivals, &self.original) else { return Err(missing()) };
        let source = arrivals.source().ok_or_else(missing)?;
        let spec = Spec::new(&self.model.config, self.index(), 1);
        let reader = Reader { spec: &spec, parameters: original, source };
        let hidden = self.model.config.hidden;
        let holdings = self.holdings();
        let of = |expert: usize| -> Result<f64> {
            self.run.check_stop()?;
            let layers = &holdings.original(Which::Routed(expert))?;
            let (own, mut sum) = (&arrivals.routed[expert], 0.0);
            for own in own.chunks(CHUNK) {
                let tokens: Vec<usize> = own.iter().map(|&(token, _)| token).collect();
                let x = mixture::picked(&reader.read(&tokens, Site::Mlp, layers)?, hidden, 0..tokens.len());
                let x = tensor(x, [tokens.len().next_multiple_of(mixture::ROWS), hidden], &layers.weights[0].device());
                let given = values(mixture::mlp(layers, self.model.config.activation, &x, &mut |_, _| {}));
                for (&(_, share), given) in own.iter().zip(given.chunks_exact(hidden)) {
                    sum += f64::from(share) * f64::from(dot_lanes(given, given)).sqrt();
                }
            }
            let mean = sum / own.len().max(1) as f64;
            if mean.is_finite() { Ok(mean) } else { Err(Error::input(format!("the outputs of expert {expert} are not finite"))) }
        };
        // As many at once as there are threads: each needs the memory of its expert.
        let (mut saliency, at_once) = (Vec::new(), rayon::current_num_threads());
        for first in (0..arrivals.routed.len()).step_by(at_once) {
            let some = first..(first + at_once).min(arrivals.routed.len());
            saliency.extend(some.into_par_iter().with_max_len(1).map(of).collect::<Result<Vec<_>>>()?);
        }
        Ok(saliency)
    }

    /// Leaves the block with some of its experts, in this order, and sends all tokens to those.
    ///
    /// # Errors
    /// When hidden states cannot be read.
    pub fn keep_experts(&mut self, kept: Vec<usize>) -> Result<()> {
        if let Some(experts) = &mut self.block.experts {
            let mut all: Vec<_> = std::mem::take(&mut experts.routed).into_iter().map(Some).collect();
            experts.routed = kept.iter().filter_map(|&expert| all[expert].take()).collect();
            for (number, linears) in experts.routed.iter_mut().enumerate() {
                linears.iter_mut().for_each(|linear| linear.name = renumbered(&linear.name, number));
            }
            experts.router.keep(&kept);
        }
        if let Some(experts) = self.original.as_mut().and_then(Parameters::experts_mut) {
            experts.keep(&kept);
        }
        if let (Some(source), Some(original)) = (self.arrivals.take().and_then(Arrivals::into_source), &self.original) {
            let mut arrivals = self.routed(&source, original)?;
            arrivals.keep(source);
            self.arrivals = Some(arrivals);
        }
        self.kept = Some(kept);
        Ok(())
    }
}

impl Router {
    /// Leaves the rows of some experts.
    fn keep(&mut self, kept: &[usize]) {
        let rows = kept.iter().flat_map(|&row| self.weight.row(row).iter().copied()).collect();
        self.weight = Matrix::new(kept.len(), self.weight.columns, rows);
        for vector in [&mut self.bias, &mut self.correction].into_iter().filter(|vector| !vector.is_empty()) {
            *vector = kept.iter().map(|&row| vector[row]).collect();
        }
    }
}

impl mixture::Tensors {
    /// Leaves some of the experts that the router chooses from.
    fn keep(&mut self, kept: &[usize]) {
        let mut router = Router {
            weight: Matrix::new(self.router.dims()[0], self.router.dims()[1], values(self.router.clone())),
            bias: self.bias.clone().map(values).unwrap_or_default(),
            correction: std::mem::take(&mut self.correction),
        };
        router.keep(kept);
        let device = self.router.device();
        self.router = tensor(router.weight.data, [kept.len(), router.weight.columns], &device);
        self.bias = self.bias.take().map(|_| tensor(router.bias, [kept.len()], &device));
        self.correction = router.correction;
        self.routed = kept.iter().filter_map(|&expert| self.routed.get(expert).cloned()).collect();
    }
}

/// A layer's name as that of another expert.
fn renumbered(name: &str, number: usize) -> String {
    let Some((start, rest)) = name.rsplit_once(".experts.") else { return name.to_string() };
    let layer = rest.split_once('.').map_or("", |(_, layer)| layer);
    format!("{start}.experts.{number}.{layer}")
}
