//! The adjoint of the block forward, written by hand over slices: from the gradient of a block's output to those of its
//! weights, its norms and its input. The forward itself is [`crate::model::forward`], with a tap that keeps what the
//! adjoint reads; tests compare every gradient with automatic differentiation of that one forward.
//!
//! A batch is worked through in groups of whole windows that are small enough to stay in cache, side by side. What they
//! add to the gradients of weights and norms is added in their order, so results do not depend on threads.

mod delta;
mod latent;
mod mixture;

use std::borrow::Cow;
use std::collections::BTreeMap;

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::device::{Buffer, Gpu};
use crate::error::Result;
use crate::kernels::attention_adjoint::Passed;
use crate::kernels::exponential::sigmoid;
use crate::kernels::gated::gated_adjoint;
use crate::kernels::gemm::{Sizes, View};
use crate::kernels::rms_norm::rms_norm_adjoint;
use crate::kernels::rope::{Table, rope_cpu};
use crate::kernels::rough_product::{Precision, product_in};
use crate::kernels::{Floats, tensor, values};
use crate::model::block::{Parameters, Place, Role, Site, Slot};
use crate::model::forward::{self, Point, Spec};
use crate::model::loss::{Loss, Value};
use crate::model::mixture::Which;

/// Tokens of a group; a longer window is a group of its own.
const GROUP_TOKENS: usize = 512;

/// Roles that read what attention reads.
const ATTENTION: [Role; 7] = [Role::QueryDown, Role::KeyValueDown, Role::DeltaIn, Role::DeltaGate, Role::Query, Role::Key, Role::Value];

/// Floats of a task of an operation on single entries.
const CHUNK: usize = 1 << 13;

/// Which gradients are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Those of the linear layers.
    pub weights: bool,
    /// Those of the norms.
    pub norms: bool,
    /// That of the block's input.
    pub input: bool,
    /// How exact the products of the adjoint are; the forward is always in single precision.
    pub precision: Precision,
}

/// Gradients of a block. Those of weights and norms add up over calls until [`Self::clear`]; the memory is kept.
#[derive(Debug, Default)]
pub struct Gradients {
    weights: [Vec<f32>; Role::COUNT],
    /// Those of the layers of experts.
    experts: BTreeMap<(Which, Role), Vec<f32>>,
    /// Those of weights that lie on another device than the processor.
    elsewhere: [Option<Tensor<2>>; Role::COUNT],
    norms: [Vec<f32>; Place::COUNT],
    /// The gradient of the output, which turns step by step into that of the input, tokens × hidden.
    stream: Vec<f32>,
    output: Vec<f32>,
    groups: Vec<Group>,
}

/// What the adjoint finds for one group.
#[derive(Debug, Default)]
struct Group {
    /// Gradients of what the projections give, by role.
    outputs: [Vec<f32>; Role::COUNT],
    /// Those of the layers of experts.
    experts: BTreeMap<(Which, Role), Vec<f32>>,
    /// Gradients of norms.
    norms: [Vec<f32>; Place::COUNT],
    branch: Vec<f32>,
    mixed: Vec<f32>,
    /// The gradient of what a mixture reads.
    read: Vec<f32>,
}

impl Gradients {
    /// Makes room for what is wanted, for so many groups.
    fn prepare(&mut self, operands: &Operands, wanted: Wanted, groups: usize) {
        self.groups.resize_with(groups.max(self.groups.len()), Group::default);
        if wanted.weights {
            let sizes = operands.weights.iter().map(|weight| weight.as_ref().map_or(0, |weight| weight.slice().len()));
            self.weights.iter_mut().zip(sizes).for_each(|(gradient, size)| gradient.resize(size, 0.0));
            for (&at, weight) in &operands.experts {
                self.experts.entry(at).or_default().resize(weight.slice().len(), 0.0);
            }
        }
        if wanted.norms {
            let sizes = operands.norms.iter().map(|norm| norm.as_ref().map_or(0, |norm| norm.slice().len()));
            self.norms.iter_mut().zip(sizes).for_each(|(gradient, size)| gradient.resize(size, 0.0));
        }
    }

    /// dL/dW of a role, `[outputs, inputs]`; empty until it was wanted, and where the weight lies on another device.
    pub fn weight(&self, role: Role) -> &[f32] {
        &self.weights[role as usize]
    }

    /// dL/dW of a layer of an expert, as [`Self::weight`].
    pub fn of_expert(&self, which: Which, role: Role) -> &[f32] {
        self.experts.get(&(which, role)).map_or(&[], Vec::as_slice)
    }

    /// dL/dW of a role whose weight lies on a GPU.
    pub fn weight_buffer(&self, role: Role, gpu: &Gpu) -> Option<Buffer> {
        gpu.buffer(self.elsewhere[role as usize].as_ref()?)
    }

    /// dL/dW of a layer, wherever it lies.
    pub fn fetched_weight(&self, slot: impl Into<Slot>) -> Cow<'_, [f32]> {
        let Slot { expert, role } = slot.into();
        match (expert, &self.elsewhere[role as usize]) {
            (Some(which), _) => Cow::Borrowed(self.of_expert(which, role)),
            (None, Some(there)) => Cow::Owned(values(there.clone())),
            (None, None) => Cow::Borrowed(self.weight(role)),
        }
    }

    /// dL/dw of a norm's stored weight; empty until it was wanted, and where the block has no such norm.
    pub fn norm(&self, place: Place) -> &[f32] {
        &self.norms[place as usize]
    }

    /// dL/dx of the last call, tokens × hidden; means nothing unless it was wanted.
    pub fn input(&self) -> &[f32] {
        &self.stream
    }

    /// The block's output in the last call, tokens × hidden; means nothing where it lies elsewhere and was judged there.
    pub fn output(&self) -> &[f32] {
        &self.output
    }

    /// Sets the gradients of weights and norms to zero.
    pub fn clear(&mut self) {
        self.weights
            .iter_mut()
            .chain(&mut self.norms)
            .chain(self.experts.values_mut())
            .for_each(|gradient| gradient.par_iter_mut().for_each(|value| *value = 0.0));
        self.elsewhere = Default::default();
    }
}

/// What a group's forward passed.
type Record = BTreeMap<Point, Floats>;

/// Runs the block on `x` (tokens × hidden, whole windows), lets `loss` judge the output, and adds the gradients that are
/// wanted. Gives the value of the loss, which a GPU need not have computed yet. Where the parameters do not lie on the processor,
/// automatic differentiation of the forward does the work there.
///
/// # Errors
/// When a GPU fails.
pub fn block(
    spec: &Spec<'_>,
    parameters: &Parameters,
    x: &Tensor<2>,
    wanted: Wanted,
    gradients: &mut Gradients,
    loss: &mut dyn Loss,
) -> Result<Value> {
    if parameters.elsewhere() {
        return differentiated(spec, parameters, x, wanted, gradients, loss);
    }
    let x = Floats::fetched(x);
    let x = x.slice();
    let hidden = spec.config.hidden;
    let size = (hidden * spec.seq * (GROUP_TOKENS / spec.seq).max(1)).max(1);
    let operands = Operands::of(parameters);
    gradients.prepare(&operands, wanted, x.len().div_ceil(size));
    let device = parameters.home();
    let forward = |x: &[f32]| recorded(spec, parameters, tensor(x.to_vec(), [x.len() / hidden, hidden], &device));
    let (records, outputs): (Vec<Record>, Vec<Tensor<2>>) = x.par_chunks(size).map(forward).unzip();
    let Gradients { weights, experts, norms, stream, output, groups, .. } = gradients;
    output.clear();
    outputs.into_iter().for_each(|y| output.extend_from_slice(Floats::fetched(&y).slice()));
    let value = Value::Here(loss.judge(output, room(stream, output.len())));
    records.par_iter().zip(stream.par_chunks_mut(size)).zip(&mut *groups).for_each(|((record, stream), group)| {
        group.norms.iter_mut().zip(norms.iter()).for_each(|(sums, norm)| {
            sums.clear();
            sums.resize(norm.len(), 0.0);
        });
        Adjoint { spec, parameters, operands: &operands, record, wanted }.run(stream, group);
    });
    for group in &groups[..records.len()] {
        norms.iter_mut().zip(&group.norms).for_each(|(total, sums)| add(total, sums));
    }
    if wanted.weights {
        let precision = wanted.precision;
        weights.par_iter_mut().zip(Role::ALL).filter(|(total, _)| !total.is_empty()).for_each(|(total, role)| {
            for (record, group) in records.iter().zip(&*groups) {
                add_weight(
                    precision,
                    operands.shapes[role as usize],
                    record[&Point::Site(role.site())].slice(),
                    &group.outputs[role as usize],
                    total,
                );
            }
        });
        experts.par_iter_mut().for_each(|(&(which, role), total)| {
            for (record, group) in records.iter().zip(&*groups) {
                // Groups in which nothing came to the expert add nothing.
                if let (Some(d), Some(x)) = (group.experts.get(&(which, role)), mixture::read(record, which, role)) {
                    add_weight(
                        precision,
                        [d.len() * operands.columns(which, role) / x.len().max(1), operands.columns(which, role)],
                        x,
                        d,
                        total,
                    );
                }
            }
        });
    }
    Ok(value)
}

/// As [`block`] on any device, by automatic differentiation. A GPU's own attention is not part of the graph: what lies
/// before it is differentiated in a second pass.
fn differentiated(
    spec: &Spec<'_>,
    parameters: &Parameters,
    x: &Tensor<2>,
    wanted: Wanted,
    gradients: &mut Gradients,
    loss: &mut dyn Loss,
) -> Result<Value> {
    let tracked = parameters.tracked(wanted.weights, wanted.norms);
    let device = parameters.home();
    let leaf = x.clone().to_device(&device).autodiff().set_require_grad(wanted.input);
    let mut seen = BTreeMap::new();
    let y = forward::block(spec, &tracked, leaf.clone(), &mut |point, tensor| {
        if matches!(point, Point::TurnedQuery | Point::TurnedKey | Point::Value | Point::Attended | Point::Site(Site::Output)) {
            seen.insert(point, tensor.clone());
        }
    });
    let output = y.clone().inner();
    let (value, upstream) = match loss.judge_there(&output)? {
        Some(judged) => judged,
        None => {
            let shape = output.dims();
            gradients.output = values(output);
            let value = Value::Here(loss.judge(&gradients.output, room(&mut gradients.stream, shape[0] * shape[1])));
            (value, tensor::<2>(gradients.stream.clone(), shape, &device))
        }
    };
    let found = (y * upstream.autodiff()).sum().backward();
    let before = before_attention(spec, parameters, &seen, &found);
    for role in parameters.roles().filter(|_| wanted.weights) {
        let weight = tracked.weight(role);
        let more = sum(weight.grad(&found), before.as_ref().and_then(|before| weight.grad(before)));
        let total = &mut gradients.elsewhere[role as usize];
        *total = sum(total.take(), more);
    }
    for place in Place::ALL.into_iter().filter(|_| wanted.norms) {
        let Some(norm) = tracked.norm(place) else { continue };
        let Some(more) = sum(norm.grad(&found), before.as_ref().and_then(|before| norm.grad(before))) else { continue };
        let (total, more) = (&mut gradients.norms[place as usize], values(more));
        total.resize(more.len(), 0.0);
        add(total, &more);
    }
    if wanted.input
        && let Some(input) = sum(leaf.grad(&found), before.as_ref().and_then(|before| leaf.grad(before)))
    {
        gradients.stream = values(input);
    }
    Ok(value)
}

/// The gradients of what lies before a GPU's own attention, given those of what lies behind it; nothing where attention
/// was part of the graph, or nothing before it is differentiated.
fn before_attention(
    spec: &Spec<'_>,
    parameters: &Parameters,
    seen: &BTreeMap<Point, Tensor<2>>,
    found: &burn::tensor::Gradients,
) -> Option<burn::tensor::Gradients> {
    let [Some(q), Some(k), Some(v)] = [Point::TurnedQuery, Point::TurnedKey, Point::Value].map(|point| seen.get(&point)) else {
        return None;
    };
    let inputs = [q, k, v];
    // What attention gave is the leaf, also where its projection reads something made of it.
    let mixed = seen.get(&Point::Attended).or(seen.get(&Point::Site(Site::Output)))?;
    if !mixed.is_require_grad() || !inputs.iter().any(|input| input.is_tracked()) {
        return None;
    }
    let slopes = spec.attention(parameters).adjoint_of(inputs, mixed.grad(found)?)?;
    let products = inputs.into_iter().zip(slopes).map(|(input, slope)| (input.clone() * slope.autodiff()).sum());
    products.reduce(|total, product| total + product).map(|total| total.backward())
}

fn sum<const D: usize>(a: Option<Tensor<D>>, b: Option<Tensor<D>>) -> Option<Tensor<D>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (a, b) => a.or(b),
    }
}

/// dW += dYᵀ X.
fn add_weight(precision: Precision, [outputs, inputs]: [usize; 2], x: &[f32], d: &[f32], total: &mut [f32]) {
    let sizes = Sizes { m: outputs, n: inputs, k: x.len() / inputs.max(1) };
    product_in(precision, sizes, total, inputs, true, View::transposed(d, outputs), View::rows(x, inputs), true);
}

/// The slices of a block's parameters.
struct Operands {
    weights: [Option<Floats>; Role::COUNT],
    /// `[outputs, inputs]` of every role.
    shapes: [[usize; 2]; Role::COUNT],
    norms: [Option<Floats>; Place::COUNT],
    /// The layers of a mixture's experts.
    experts: BTreeMap<(Which, Role), Floats>,
    /// The router of a mixture, and what scales its shared expert.
    routers: [Option<Floats>; 2],
}

impl Operands {
    fn of(parameters: &Parameters) -> Self {
        Self {
            weights: Role::ALL.map(|role| parameters.has(role).then(|| Floats::fetched(parameters.weight(role)))),
            shapes: Role::ALL.map(|role| if parameters.has(role) { parameters.weight(role).dims() } else { [0; 2] }),
            norms: Place::ALL.map(|place| parameters.norm(place).map(Floats::fetched)),
            experts: parameters.experts().map(mixture::layers).unwrap_or_default(),
            routers: parameters.experts().map(mixture::routers).unwrap_or_default(),
        }
    }

    fn weight(&self, role: Role) -> &[f32] {
        self.weights[role as usize].as_ref().map_or(&[], Floats::slice)
    }
}

/// A forward that keeps what its adjoint reads.
fn recorded(spec: &Spec<'_>, parameters: &Parameters, x: Tensor<2>) -> (Record, Tensor<2>) {
    let mut record = Record::new();
    let has = |place| parameters.norm(place).is_some();
    let y = forward::block(spec, parameters, x, &mut |point, tensor| {
        let read = match point {
            Point::Input => has(Place::AttentionIn),
            Point::Query => has(Place::Query) || has(Place::QueryLatent),
            Point::Key => has(Place::Key) || has(Place::KeyValueLatent),
            Point::Joined => has(Place::MlpIn),
            Point::Branch(place) => has(place),
            _ => true,
        };
        if read {
            record.insert(point, Floats::fetched(tensor));
        }
    });
    (record, y)
}

/// A buffer of a size; what lies in it means nothing.
fn room(buffer: &mut Vec<f32>, size: usize) -> &mut [f32] {
    buffer.resize(size, 0.0);
    buffer
}

fn add(to: &mut [f32], from: &[f32]) {
    to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
    });
}

/// The adjoint of one group.
struct Adjoint<'a> {
    spec: &'a Spec<'a>,
    parameters: &'a Parameters,
    operands: &'a Operands,
    record: &'a Record,
    wanted: Wanted,
}

impl<'a> Adjoint<'a> {
    /// `stream` enters as the gradient of the output and leaves as that of the input, where that is wanted.
    fn run(&self, stream: &mut [f32], group: &mut Group) {
        let parallel = self.spec.config.family.places.parallel;
        let mixed = !self.operands.experts.is_empty();
        if mixed {
            self.mixture(stream, group);
        } else {
            self.mlp(stream, group);
        }
        let Group { outputs, norms, branch, mixed: attended, read, .. } = group;
        if !parallel {
            let d = room(branch, stream.len());
            if mixed {
                d.copy_from_slice(read);
            } else {
                self.inputs(&[Role::Gate, Role::Up], outputs, d, false);
            }
            self.norm(Place::MlpIn, Point::Joined, d, norms);
            add(stream, d);
        }
        let mut output = std::mem::take(&mut outputs[Role::Output as usize]);
        self.branch(Role::Output, Place::AttentionOut, stream, &mut output, attended, norms);
        outputs[Role::Output as usize] = output;
        let mut controls = Vec::new();
        match (self.parameters.delta(), &self.spec.config.delta, &self.spec.config.latent) {
            (Some(delta), Some(sizes), _) => self.delta(sizes, delta, attended, outputs, &mut controls),
            (_, _, Some(latent)) => self.latent(latent, attended, outputs, norms),
            _ => self.attention(attended, outputs, norms),
        }
        if self.wanted.input || self.wanted.norms && self.operands.norms[Place::AttentionIn as usize].is_some() {
            let d = room(branch, stream.len());
            self.inputs(&ATTENTION, outputs, d, false);
            add(d, &controls);
            if parallel && mixed {
                add(d, read);
            } else if parallel {
                self.inputs(&[Role::Gate, Role::Up], outputs, d, true);
            }
            self.norm(Place::AttentionIn, Point::Input, d, norms);
            add(stream, d);
        }
    }

    /// From the gradient of the residual stream to those of what gate, up and down give.
    fn mlp(&self, stream: &[f32], group: &mut Group) {
        let Group { outputs, norms, .. } = group;
        let [gate, up, down] = &mut outputs[Role::Gate as usize..] else { return };
        self.branch(Role::Down, Place::MlpOut, stream, down, up, norms);
        let (passed_gate, passed_up) = (self.passed(Point::Gate), self.passed(Point::Up));
        gated_adjoint(self.spec.config.activation, passed_gate, passed_up, up, room(gate, passed_gate.len()));
    }

    /// From the gradient of the residual stream after a branch to that of the branch's last projection (`d`) and of its
    /// input.
    fn branch(
        &self,
        role: Role,
        place: Place,
        stream: &[f32],
        d: &mut Vec<f32>,
        input: &mut Vec<f32>,
        norms: &mut [Vec<f32>; Place::COUNT],
    ) {
        self.given(place, stream, d, norms);
        let width = self.passed(Point::Site(role.site())).len();
        self.input(role, d, room(input, width), false);
    }

    /// From the gradient of the residual stream after a branch to that of what the branch gave.
    fn given(&self, place: Place, stream: &[f32], d: &mut Vec<f32>, norms: &mut [Vec<f32>; Place::COUNT]) {
        let d = room(d, stream.len());
        let factor = self.spec.config.residual_factor;
        d.par_chunks_mut(CHUNK).zip(stream.par_chunks(CHUNK)).for_each(|(d, stream)| {
            d.iter_mut().zip(stream).for_each(|(d, stream)| *d = stream * factor);
        });
        self.norm(place, Point::Branch(place), d, norms);
    }

    /// From the gradient of attention's output to those of queries, keys and values as their projections gave them.
    fn attention(&self, mixed: &mut [f32], outputs: &mut [Vec<f32>; Role::COUNT], norms: &mut [Vec<f32>; Place::COUNT]) {
        let config = self.spec.config;
        let opening = config.family.gated.then(|| self.opening(mixed));
        let out = if opening.is_some() { Point::Attended } else { Point::Site(Site::Output) };
        let [mut q, mut k, mut v] = [Role::Query, Role::Key, Role::Value].map(|role| std::mem::take(&mut outputs[role as usize]));
        self.attended(out, mixed, [&mut q, &mut k, &mut v]);
        for (place, d, width) in [(Place::Query, &mut q, config.query_width()), (Place::Key, &mut k, config.kv_width())] {
            if let Some(table) = self.spec.table_of(place).map(Table::adjoint) {
                rope_cpu(d, width, config.head_dim, &table);
            }
        }
        self.norm(Place::Query, Point::Query, &mut q, norms);
        self.norm(Place::Key, Point::Key, &mut k, norms);
        if let Some(opening) = opening {
            let d = config.head_dim;
            q = q.chunks_exact(d).zip(opening.chunks_exact(d)).flat_map(|(q, opening)| [q, opening]).flatten().copied().collect();
        }
        for (role, d) in [(Role::Query, q), (Role::Key, k), (Role::Value, v)] {
            outputs[role as usize] = d;
        }
    }

    /// From the gradient of what was let through to that of attention's output, in place, and of what opened it.
    fn opening(&self, mixed: &mut [f32]) -> Vec<f32> {
        let (out, opening) = (self.passed(Point::Attended), self.passed(Point::Opening));
        let pairs = mixed.iter_mut().zip(out.iter().zip(opening));
        let through = |(d, (out, &opening)): (&mut f32, (&f32, &f32))| {
            let open = sigmoid(opening);
            let slope = *d * out * open * (1.0 - open);
            *d *= open;
            slope
        };
        pairs.map(through).collect()
    }

    /// From the gradient of attention's output to those of queries, keys and values as attention reads them.
    fn attended(&self, out: Point, mixed: &[f32], [q, k, v]: [&mut Vec<f32>; 3]) {
        let passed = Passed {
            q: self.passed(Point::TurnedQuery),
            k: self.passed(Point::TurnedKey),
            v: self.passed(Point::Value),
            out: self.passed(out),
            dout: mixed,
        };
        let (q, k, v) = (room(q, passed.q.len()), room(k, passed.k.len()), room(v, passed.v.len()));
        self.spec.attention(self.parameters).adjoint(&passed, q, k, v);
    }

    fn passed(&self, point: Point) -> &'a [f32] {
        self.record[&point].slice()
    }

    /// From the gradient of a norm's output to that of its input, in place; nothing where there is no norm.
    fn norm(&self, place: Place, input: Point, d: &mut [f32], norms: &mut [Vec<f32>; Place::COUNT]) {
        let Some(weight) = &self.operands.norms[place as usize] else { return };
        let (epsilon, kind) = self.spec.norm(place);
        let x = self.passed(input);
        let sums = self.wanted.norms.then_some(norms[place as usize].as_mut_slice());
        rms_norm_adjoint(x, weight.slice(), epsilon as f32, kind, d, sums);
    }

    /// The sum of [`Self::input`] over those of some roles that are there, or `dx` plus it.
    fn inputs(&self, roles: &[Role], outputs: &[Vec<f32>; Role::COUNT], dx: &mut [f32], mut more: bool) {
        for &role in roles.iter().filter(|&&role| self.operands.weights[role as usize].is_some()) {
            self.input(role, &outputs[role as usize], dx, more);
            more = true;
        }
    }

    /// dX = dY W, or dX plus it where `add`.
    fn input(&self, role: Role, d: &[f32], dx: &mut [f32], add: bool) {
        let [outputs, inputs] = self.operands.shapes[role as usize];
        let tokens = dx.len() / inputs.max(1);
        let weight = View::rows(self.operands.weight(role), inputs);
        let sizes = Sizes { m: tokens, n: inputs, k: outputs };
        product_in(self.wanted.precision, sizes, dx, inputs, add, View::rows(d, outputs), weight, true);
    }
}
