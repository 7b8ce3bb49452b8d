//! The adjoint of [`crate::model::delta`].

use crate::kernels::delta_rule::{self, Sizes, State, adjoint};
use crate::kernels::gemm::{Sizes as Extents, View};
use crate::kernels::rough_product::{Precision, product_in};
use crate::model::backward::{Adjoint, room};
use crate::model::block::Role;
use crate::model::delta::{Delta, joined, parted};
use crate::model::forward::Point;

impl Adjoint<'_> {
    /// From the gradient of what the output projection reads to those of what the other layers gave; `read` becomes the gradient
    /// by way of what controls the rule.
    pub(super) fn delta(&self, sizes: &Sizes, delta: &Delta, mixed: &[f32], outputs: &mut [Vec<f32>; Role::COUNT], read: &mut Vec<f32>) {
        let (input, controls) = (self.passed(Point::DeltaIn), self.passed(Point::Controls));
        let apart = self.operands.weights[Role::DeltaGate as usize].is_some();
        let [channels, opening] = if apart { [input.to_vec(), self.passed(Point::DeltaGate).to_vec()] } else { parted(sizes, input) };
        let (seq, epsilon) = (self.spec.seq, self.spec.config.epsilon as f32);
        let [rates, kept] = delta_rule::controls(controls, &delta.decay, &delta.offset);
        let mut state = State::new(sizes, channels.len() / (sizes.channels() * seq).max(1));
        let mut drawn = vec![0.0; channels.len()];
        delta_rule::convolve(sizes, seq, &channels, &delta.taps, &mut state, &mut drawn);
        let mut x = drawn.clone();
        delta_rule::normalize(sizes, &mut x);
        let mut out = vec![0.0; mixed.len()];
        delta_rule::run(sizes, seq, &x, [&rates, &kept], &mut state, &mut out);
        let mut dout = mixed.to_vec();
        let dopening = adjoint::gated_norm(&out, &delta.norm, epsilon, &opening, &mut dout);
        let passed = adjoint::Passed { x: &x, rates: &rates, kept: &kept, dout: &dout };
        let [mut dx, drates, dkept] = adjoint::run(sizes, seq, &passed);
        adjoint::normalize(sizes, &drawn, &mut dx);
        let dchannels = adjoint::convolve(sizes, seq, &channels, &delta.taps, &dx);
        let dcontrols = adjoint::controls(controls, &delta.decay, &delta.offset, [&rates, &kept], [&drates, &dkept]);
        if apart {
            (outputs[Role::DeltaIn as usize], outputs[Role::DeltaGate as usize]) = (dchannels, dopening);
        } else {
            outputs[Role::DeltaIn as usize] = joined(sizes, &dchannels, &dopening);
        }
        let (hidden, rows) = (self.spec.config.hidden, 2 * sizes.value_heads);
        let tokens = controls.len() / rows;
        let extents = Extents { m: tokens, n: hidden, k: rows };
        let weight = View::rows(&delta.controls.data, hidden);
        product_in(Precision::Single, extents, room(read, tokens * hidden), hidden, false, View::rows(&dcontrols, rows), weight, true);
    }
}
