//! Attention and its adjoint on a GPU, without a matrix of scores in memory.

use burn::tensor::Tensor;

use crate::device::{Buffer, Constant, Gpu, Shader};
use crate::kernels::attention::Attention;

/// The forward.
pub static ATTENTION: Shader = Shader { name: "attention", source: include_str!("../../../shaders/attention.wgsl") };
/// The gradient by queries.
pub static ATTENTION_QUERY_ADJOINT: Shader =
    Shader { name: "attention_query_adjoint", source: include_str!("../../../shaders/attention_query_adjoint.wgsl") };
/// The gradients by keys and values.
pub static ATTENTION_KEY_ADJOINT: Shader =
    Shader { name: "attention_key_adjoint", source: include_str!("../../../shaders/attention_key_adjoint.wgsl") };

/// Queries, or keys, of a workgroup.
const ROWS: usize = 16;

impl Attention<'_> {
    /// Whether the kernels of a GPU can do this attention over so many tokens.
    pub fn fits(&self, gpu: &Gpu, tokens: usize) -> bool {
        let bytes = 4 * tokens * self.heads * self.head_dim.max(2);
        // A key's adjoint goes over all queries of all heads that read it, with two loops over a thread's vectors.
        let iterations = self.heads / self.kv_heads * self.seq * (2 + 2 * self.head_dim.div_ceil(16));
        self.sinks.is_none()
            && gpu.adapter().iterates(iterations)
            && self.head_dim <= 256
            && self.head_dim.is_multiple_of(4)
            && gpu.rows_per_binding(1) >= bytes
    }

    /// Vectors of four floats of a thread, of which four share a row.
    fn constants(&self) -> Constant {
        ("FOURS", self.head_dim.div_ceil(16) as u32)
    }

    fn parameters(&self, tokens: usize) -> [u32; 8] {
        [
            (tokens / self.seq) as u32,
            self.seq as u32,
            self.heads as u32,
            self.kv_heads as u32,
            self.head_dim as u32,
            self.window.map_or(0, |window| window as u32),
            self.scale.to_bits(),
            self.softcap.unwrap_or(0.0).to_bits(),
        ]
    }

    /// The output of tokens × heads · d floats, and the logarithms of the sums that shares were divided by, tokens × heads.
    pub fn run_on(&self, gpu: &Gpu, [q, k, v]: [&Buffer; 3]) -> [Buffer; 2] {
        let tokens = q.words() / (self.heads * self.head_dim);
        let (mixed, normaliser) = (gpu.empty(q.words()), gpu.empty(tokens * self.heads));
        let workgroups = tokens / self.seq * self.heads * self.seq.div_ceil(ROWS);
        gpu.launch_with(&ATTENTION, self.constants(), workgroups, &[q, k, v, &mixed, &normaliser], &self.parameters(tokens));
        [mixed, normaliser]
    }

    /// dL/dq, dL/dk and dL/dv for the gradient of the output. `pairs` are, for every token and head, what [`Self::run_on`]
    /// divided by and the product of output and gradient.
    pub fn adjoint_on(&self, gpu: &Gpu, [q, k, v]: [&Buffer; 3], pairs: &Buffer, upstream: &Buffer) -> [Buffer; 3] {
        let tokens = q.words() / (self.heads * self.head_dim);
        let (dq, dk, dv) = (gpu.empty(q.words()), gpu.empty(k.words()), gpu.empty(v.words()));
        let (blocks, parameters) = (tokens / self.seq * self.seq.div_ceil(ROWS), self.parameters(tokens));
        gpu.launch_with(&ATTENTION_QUERY_ADJOINT, self.constants(), blocks * self.heads, &[q, k, v, pairs, upstream, &dq], &parameters);
        gpu.launch_with(
            &ATTENTION_KEY_ADJOINT,
            self.constants(),
            blocks * self.kv_heads,
            &[q, k, v, pairs, upstream, &dk, &dv],
            &parameters,
        );
        [dq, dk, dv]
    }

    /// The output for tensors that lie on a GPU; nothing where its kernels cannot do it. Where `q` is being differentiated,
    /// the output is a leaf: whoever differentiates goes on behind it with [`Self::adjoint_of`].
    pub fn run_tensors(&self, q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>) -> Option<Tensor<2>> {
        let gpu = Gpu::of(&q.device()).filter(|gpu| self.fits(gpu, q.dims()[0]))?;
        let [q_buffer, k, v] = buffers(&gpu, [q, k, v])?;
        let [mixed, _] = self.run_on(&gpu, [&q_buffer, &k, &v]);
        let mixed = gpu.tensor(mixed, q.dims());
        Some(if q.is_autodiff() { mixed.autodiff().require_grad() } else { mixed })
    }

    /// Gradients by queries, keys and values, given the gradient of the output, of an attention that [`Self::run_tensors`]
    /// has done.
    pub fn adjoint_of(&self, [q, k, v]: [&Tensor<2>; 3], upstream: Tensor<2>) -> Option<[Tensor<2>; 3]> {
        let gpu = Gpu::of(&q.device())?;
        let shapes = [q.dims(), k.dims(), v.dims()];
        let tokens = shapes[0][0];
        let [q, k, v] = buffers(&gpu, [q, k, v])?;
        let [mixed, normaliser] = self.run_on(&gpu, [&q, &k, &v]);
        let mixed: Tensor<2> = gpu.tensor(mixed, shapes[0]);
        let products = (mixed * upstream.clone()).reshape([tokens * self.heads, self.head_dim]).sum_dim(1);
        let pairs = Tensor::cat(vec![gpu.tensor(normaliser, [tokens * self.heads, 1]), products], 1);
        let (pairs, upstream) = (gpu.buffer(&pairs)?, gpu.buffer(&upstream)?);
        let [dq, dk, dv] = self.adjoint_on(&gpu, [&q, &k, &v], &pairs, &upstream);
        Some([gpu.tensor(dq, shapes[0]), gpu.tensor(dk, shapes[1]), gpu.tensor(dv, shapes[2])])
    }
}

fn buffers(gpu: &Gpu, tensors: [&Tensor<2>; 3]) -> Option<[Buffer; 3]> {
    let [q, k, v] = tensors.map(|tensor| gpu.buffer(&tensor.clone().inner()));
    Some([q?, k?, v?])
}
