//! The adjoint of a mixture of experts ([`crate::model::mixture::forward`]). Which experts a token goes to is taken as fixed; their
//! shares are not.

use std::collections::BTreeMap;

use crate::kernels::gated::gated_adjoint;
use crate::kernels::gemm::{Sizes, View};
use crate::kernels::rough_product::{Precision, product_in};
use crate::kernels::routing::Choice;
use crate::kernels::{Floats, dot_lanes};
use crate::model::backward::{Adjoint, Group, Operands, Record, room};
use crate::model::block::{Place, Role};
use crate::model::forward::Point;
use crate::model::mixture::{Step, Tensors, Which};

/// The layers of all experts.
pub(super) fn layers(experts: &Tensors) -> BTreeMap<(Which, Role), Floats> {
    let routed = experts.routed.iter().enumerate().map(|(expert, layers)| (Which::Routed(expert), layers));
    let all = routed.chain(experts.shared.as_ref().map(|layers| (Which::Shared, layers)));
    let roles = [Role::Gate, Role::Up, Role::Down];
    all.flat_map(|(which, layers)| {
        roles.into_iter().zip(&layers.weights).map(move |(role, weight)| ((which, role), Floats::fetched(weight)))
    })
    .collect()
}

/// The router, and what scales the shared expert.
pub(super) fn routers(experts: &Tensors) -> [Option<Floats>; 2] {
    [Some(Floats::fetched(&experts.router)), experts.opening.as_ref().map(Floats::fetched)]
}

/// What a layer of an expert read, rows of zeros at the end included; nothing where no token came to it.
pub(super) fn read(record: &Record, which: Which, role: Role) -> Option<&[f32]> {
    let step = if role == Role::Down { Step::Middle } else { Step::Input };
    passed(record, which, step).map(|(_, x)| x)
}

/// A step of an expert, with the number of its tokens.
fn passed(record: &Record, which: Which, step: Step) -> Option<(usize, &[f32])> {
    let mut found = record.range(Point::Expert(which, step, 0)..=Point::Expert(which, step, usize::MAX));
    found.next().map(|(point, x)| (if let Point::Expert(_, _, tokens) = point { *tokens } else { 0 }, x.slice()))
}

impl Operands {
    /// Inputs of a layer of an expert.
    pub(super) fn columns(&self, which: Which, role: Role) -> usize {
        let size = |role: Role| self.experts.get(&(which, role)).map_or(0, |weight| weight.slice().len());
        let hidden = self.shapes[Role::Output as usize][0];
        if role == Role::Down { size(Role::Down) / hidden.max(1) } else { hidden }
    }
}

impl Adjoint<'_> {
    /// From the gradient of the residual stream to that of what the mixture read (`group.read`) and of what the layers of its
    /// experts gave.
    pub(super) fn mixture(&self, stream: &[f32], group: &mut Group) {
        let Group { outputs, experts, norms, read, .. } = group;
        let d = &mut outputs[Role::Down as usize];
        self.given(Place::MlpOut, stream, d, norms);
        let dx = room(read, d.len());
        dx.fill(0.0);
        experts.clear();
        self.routed(d, dx, experts);
        self.shared(d, dx, experts);
        d.clear();
    }

    fn routed(&self, d: &[f32], dx: &mut [f32], experts: &mut BTreeMap<(Which, Role), Vec<f32>>) {
        let (Some(router), Some(mixture)) = (&self.operands.routers[0], &self.spec.config.mixture) else { return };
        let (hidden, rule) = (self.spec.config.hidden, mixture.rule);
        let count = router.slice().len() / hidden;
        let logits = self.passed(Point::Logits);
        let correction = self.parameters.experts().map_or(&[][..], |experts| &experts.correction);
        let mut chosen: Vec<Choice> = Vec::new();
        let mut own = vec![Vec::new(); count];
        for (token, logits) in logits.chunks_exact(count).enumerate() {
            let mut choice = Choice::default();
            choice.make(logits, correction, rule);
            choice.experts.iter().enumerate().for_each(|(rank, &expert)| own[expert].push((token, rank)));
            chosen.push(choice);
        }
        let mut dshares: Vec<Vec<f32>> = chosen.iter().map(|choice| vec![0.0; choice.experts.len()]).collect();
        for (expert, tokens) in own.iter().enumerate().filter(|(_, tokens)| !tokens.is_empty()) {
            let which = Which::Routed(expert);
            let Some((_, given)) = passed(self.record, which, Step::Output) else { continue };
            let mut dgiven = vec![0.0; given.len()];
            for ((&(token, rank), dgiven), given) in tokens.iter().zip(dgiven.chunks_exact_mut(hidden)).zip(given.chunks_exact(hidden)) {
                let d = &d[token * hidden..][..hidden];
                dshares[token][rank] = dot_lanes(d, given);
                let share = chosen[token].shares[rank];
                dgiven.iter_mut().zip(d).for_each(|(dgiven, d)| *dgiven = share * d);
            }
            let dread = self.expert(which, dgiven, experts);
            for (&(token, _), dread) in tokens.iter().zip(dread.chunks_exact(hidden)) {
                dx[token * hidden..][..hidden].iter_mut().zip(dread).for_each(|(dx, d)| *dx += d);
            }
        }
        let mut dlogits = vec![0.0; logits.len()];
        for ((choice, dshares), dlogits) in chosen.iter().zip(&dshares).zip(dlogits.chunks_exact_mut(count)) {
            choice.adjoint(dshares, rule, dlogits);
        }
        let sizes = Sizes { m: chosen.len(), n: hidden, k: count };
        product_in(Precision::Single, sizes, dx, hidden, true, View::rows(&dlogits, count), View::rows(router.slice(), hidden), true);
    }

    fn shared(&self, d: &[f32], dx: &mut [f32], experts: &mut BTreeMap<(Which, Role), Vec<f32>>) {
        let Some((tokens, given)) = passed(self.record, Which::Shared, Step::Output) else { return };
        let hidden = self.spec.config.hidden;
        let mut dgiven = d.to_vec();
        if let Some(gate) = &self.operands.routers[1] {
            let x = read(self.record, Which::Shared, Role::Gate).unwrap_or_default();
            for token in 0..tokens {
                let row = token * hidden..(token + 1) * hidden;
                let open = 1.0 / (1.0 + (-dot_lanes(&x[row.clone()], gate.slice())).exp());
                let slope = dot_lanes(&d[row.clone()], &given[row.clone()]) * open * (1.0 - open);
                dgiven[row.clone()].iter_mut().for_each(|d| *d *= open);
                dx[row].iter_mut().zip(gate.slice()).for_each(|(dx, gate)| *dx += slope * gate);
            }
        }
        let dread = self.expert(Which::Shared, dgiven, experts);
        dx.iter_mut().zip(&dread).for_each(|(dx, d)| *dx += d);
    }

    /// From the gradient of what an expert gave to that of what it read; those of what its layers gave are kept where gradients of
    /// weights are wanted.
    fn expert(&self, which: Which, dgiven: Vec<f32>, experts: &mut BTreeMap<(Which, Role), Vec<f32>>) -> Vec<f32> {
        let step = |step| passed(self.record, which, step).map_or(&[][..], |(_, x)| x);
        let (gate, up, hidden) = (step(Step::Gate), step(Step::Up), self.spec.config.hidden);
        let (mut dup, mut dgate) = (vec![0.0; up.len()], vec![0.0; gate.len()]);
        self.back(which, Role::Down, &dgiven, &mut dup, false);
        gated_adjoint(self.spec.config.activation, gate, up, &mut dup, &mut dgate);
        let mut dread = vec![0.0; dgiven.len() / hidden * hidden];
        self.back(which, Role::Gate, &dgate, &mut dread, false);
        self.back(which, Role::Up, &dup, &mut dread, true);
        if self.wanted.weights {
            experts.extend([(Role::Gate, dgate), (Role::Up, dup), (Role::Down, dgiven)].map(|(role, d)| ((which, role), d)));
        }
        dread
    }

    /// dX = dY W of a layer of an expert, or dX plus it.
    fn back(&self, which: Which, role: Role, d: &[f32], dx: &mut [f32], more: bool) {
        let Some(weight) = self.operands.experts.get(&(which, role)) else { return };
        let inputs = self.operands.columns(which, role);
        let outputs = weight.slice().len() / inputs.max(1);
        let sizes = Sizes { m: d.len() / outputs.max(1), n: inputs, k: outputs };
        product_in(self.wanted.precision, sizes, dx, inputs, more, View::rows(d, outputs), View::rows(weight.slice(), inputs), true);
    }
}
