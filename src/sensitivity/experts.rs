//! What ways to store the experts of a mixture cost. There are hundreds in a block and none of them weighs much, so they are measured
//! exactly all at once: every expert compressed in the same way, as engines want it anyway. What that costs is shared out among
//! their layers by what was predicted for each.

use std::time::Instant;

use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::model::arrivals::{Aim, Caught, Craft};
use crate::model::away::Away;
use crate::model::bench::Bench;
use crate::model::block::{Linear, Slot};
use crate::model::mixture;
use crate::model::seen::{Needs, Statistics};
use crate::model::slopes::{Slope, Slopes};
use crate::sensitivity::file::LayerSensitivity;
use crate::sensitivity::schemes::Scheme;
use crate::sensitivity::{Effect, Measuring, exactly};
use crate::weight::Weight;

/// Tries every scheme on the layers of experts.
struct Trying<'a, 'm> {
    measuring: &'a Measuring<'m>,
    block: usize,
    slopes: &'a Slopes,
    /// What every scheme makes of them, where that is measured.
    made: &'a [Away],
}

impl Craft for Trying<'_, '_> {
    type Prepared = Option<Statistics>;
    type Told = LayerSensitivity;

    fn aim(&self) -> Aim {
        let needs = self.measuring.options.schemes.iter().map(Scheme::needs).max().unwrap_or(Needs::Nothing);
        Aim::Weight(needs.max(Needs::Gram))
    }

    fn wants(&self, slot: Slot) -> bool {
        self.slopes.contains_key(&slot)
    }

    fn prepare(&self, caught: Caught) -> Option<Statistics> {
        match caught {
            Caught::Statistics(statistics) => statistics,
            Caught::Streams(_) => None,
        }
    }

    fn work(&self, seen: &Option<Statistics>, linear: &mut Linear, slot: Slot, original: Option<Matrix>) -> Result<LayerSensitivity> {
        let (original, seen) = original.zip(seen.as_ref()).ok_or_else(|| Error::run("no calibration was seen"))?;
        let nothing = Slope::default();
        let keep = |number: usize, weight: Weight| self.made.get(number).map_or(Ok(()), |made| made.put(slot, weight));
        let candidates = self.measuring.candidates(&linear.name, &original, self.slopes.get(&slot).unwrap_or(&nothing), seen, keep)?;
        let shape = [original.rows, original.columns];
        // The block needs no copy of what the original has.
        linear.weight = mixture::hollow(shape);
        self.measuring.run.observer.step(self.measuring.options.schemes.len() as u64, &linear.name);
        Ok(LayerSensitivity { name: linear.name.clone(), block: self.block, shape, candidates, shares: !self.made.is_empty() })
    }
}

impl Measuring<'_> {
    /// Every scheme on all experts of a block.
    pub(super) fn experts(&mut self, bench: &mut Bench<'_>, slopes: &Slopes) -> Result<Vec<LayerSensitivity>> {
        let (index, options) = (bench.index(), self.options);
        let count = if options.exact { options.schemes.len() } else { 0 };
        let made = (0..count).map(|_| Away::new(self.run.scratch)).collect::<Result<Vec<_>>>()?;
        let told = bench.on_experts(&Trying { measuring: self, block: index, slopes, made: &made })?;
        let mut layers: Vec<LayerSensitivity> = told.into_iter().map(|(_, layer)| layer).collect();
        if options.exact {
            let started = Instant::now();
            let effects = self.effects(index, count, |hidden| bench.with_other_experts(&made, hidden))?;
            options.schemes.iter().zip(effects).for_each(|(scheme, effect)| share_out(&mut layers, &scheme.name, effect));
            *self.exact += started.elapsed();
            let steps = options.schemes.len() * exactly(self.stream.model, index, options);
            self.run.observer.step(steps as u64, &format!("experts of block {index}"));
        }
        Ok(layers)
    }
}

/// Gives every layer its share of what a scheme costs on all of them, by its predicted divergence; in equal parts where nothing is
/// predicted.
fn share_out(layers: &mut [LayerSensitivity], scheme: &str, effect: Effect) {
    let own = |layer: &LayerSensitivity| layer.candidates.iter().position(|candidate| candidate.scheme == scheme);
    let having: Vec<(usize, usize)> = layers.iter().enumerate().filter_map(|(layer, of)| Some((layer, own(of)?))).collect();
    let predicted = |&(layer, candidate): &(usize, usize)| layers[layer].candidates[candidate].predicted_kld;
    let total: f64 = having.iter().map(predicted).sum();
    let shares: Vec<f64> =
        having.iter().map(|place| if total > 0.0 { predicted(place) / total } else { 1.0 / having.len() as f64 }).collect();
    for (&(layer, candidate), share) in having.iter().zip(shares) {
        effect.times(share).into(&mut layers[layer].candidates[candidate]);
    }
}
