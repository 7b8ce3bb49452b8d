//! Operations on tensors that are launches of kernels, whose gradients are launches of kernels too.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::autodiff::{Autodiff, NodeId};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;
use burn_wgpu::{CubeTensor, Wgpu};

use super::{Gpu, array_of, placed};
use crate::device::Differentiable;

/// How the tensor library finds such an operation, by itself and while it differentiates.
#[backend_extension(Cube, Autodiff)]
pub trait Applied: Backend {
    /// The operation on `a` and `b`.
    fn applied(operation: &'static Differentiable, gpu: Gpu, a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl Applied for Wgpu {
    fn applied(operation: &'static Differentiable, gpu: Gpu, a: CubeTensor, b: CubeTensor) -> CubeTensor {
        let [like, a, b] = [a.clone(), a, b];
        placed(&like, (operation.forward)(&gpu, [&array_of(a), &array_of(b)]))
    }
}

/// The operation in a graph that is differentiated.
#[derive(Debug)]
struct Step {
    operation: &'static Differentiable,
    gpu: Gpu,
}

impl Backward<Wgpu, 2> for Step {
    /// The operands that gradients of the other one need.
    type State = [Option<NodeId>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let upstream = grads.consume::<Wgpu>(&ops.node);
        let operands = ops.state.map(|node| Some(array_of(checkpointer.retrieve_node_output(node?))));
        let [a, b] = &operands;
        let found = (self.operation.adjoint)(&self.gpu, [a.as_ref(), b.as_ref()], &array_of(upstream.clone()));
        for (parent, found) in ops.parents.into_iter().zip(found) {
            if let (Some(parent), Some(found)) = (parent, found) {
                grads.register::<Wgpu>(parent.id, placed(&upstream, found));
            }
        }
    }
}

impl<C: CheckpointStrategy> Applied for Autodiff<Wgpu, C> {
    fn applied(operation: &'static Differentiable, gpu: Gpu, a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        let tracked = [a.is_tracked(), b.is_tracked()];
        let step = Step { operation, gpu: gpu.clone() };
        match step.prepare::<C>([a.node(), b.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = [tracked[1].then(|| prep.checkpoint(&a)), tracked[0].then(|| prep.checkpoint(&b))];
                prep.finish(state, Wgpu::applied(operation, gpu, a.into_primitive(), b.into_primitive()))
            }
            OpsKind::UnTracked(prep) => prep.finish(Wgpu::applied(operation, gpu, a.into_primitive(), b.into_primitive())),
        }
    }
}

impl Gpu {
    /// The operation on two matrices of which at least one lies on this GPU's device; nothing where they do not fit it. Gradients
    /// go through where the operands are tracked.
    pub fn apply(&self, operation: &'static Differentiable, a: &Tensor<2>, b: &Tensor<2>) -> Option<Tensor<2>> {
        if !(operation.fits)(self, [a.dims(), b.dims()]) {
            return None;
        }
        let applied = Dispatch::applied(operation, self.clone(), a.clone().into_dispatch(), b.clone().into_dispatch());
        Some(Tensor::from_dispatch(applied))
    }
}
