//! Where tensors are computed.

#[cfg(not(feature = "gpu"))]
mod absent;
#[cfg(feature = "gpu")]
mod gpu;

#[cfg(not(feature = "gpu"))]
pub use absent::{Buffer, Gpu, Reserved, adapters, open, opened};
#[cfg(feature = "gpu")]
pub use gpu::{Buffer, Gpu, Reserved, adapters, open, opened};

use std::borrow::Cow;

use crate::error::Result;

/// What `--device` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// The fastest device there is.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The GPU of this number.
    Gpu(usize),
}

impl std::str::FromStr for Choice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "gpu" => Ok(Self::Gpu(0)),
            _ => match text.strip_prefix("gpu:").map(str::parse) {
                Some(Ok(number)) => Ok(Self::Gpu(number)),
                _ => Err("use auto, cpu, gpu or gpu:N".into()),
            },
        }
    }
}

/// A compute shader: one valid WGSL file whose entry point is `main`, of 64 threads per workgroup.
#[derive(Debug, PartialEq, Eq)]
pub struct Shader {
    /// Name of the kernel and, with `.wgsl`, of its file.
    pub name: &'static str,
    /// The text.
    pub source: &'static str,
}

/// What memory of a GPU is set aside for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Hidden states between blocks.
    States,
    /// Sums over all tokens.
    Sums,
}

/// The name of a constant of a shader, and another number for it.
pub type Constant = (&'static str, u32);

impl Shader {
    /// The text, with another number where its constant is declared: sizes that a driver knows lie in registers.
    ///
    /// # Panics
    /// When the text declares no such constant.
    pub fn text(&self, constant: Option<Constant>) -> Cow<'static, str> {
        let Some((name, number)) = constant else { return Cow::Borrowed(self.source) };
        let declared = format!("const {name}: u32 = ");
        let before = self.source.find(&declared).unwrap_or_else(|| panic!("{} without a constant {name}", self.name)) + declared.len();
        let after = before + self.source[before..].find(';').unwrap_or_default();
        Cow::Owned(format!("{}{number}u{}", &self.source[..before], &self.source[after..]))
    }
}

/// A matrix on a GPU: rows × columns floats.
#[derive(Debug, Clone)]
pub struct Array {
    /// The floats, row by row.
    pub buffer: Buffer,
    /// Rows and columns.
    pub shape: [usize; 2],
}

/// An operation on two matrices by launches of kernels, and its adjoint.
#[derive(Debug)]
pub struct Differentiable {
    /// Whether the GPU can do it, and its adjoint, on matrices of these shapes.
    pub fits: fn(&Gpu, [[usize; 2]; 2]) -> bool,
    /// The outcome.
    pub forward: fn(&Gpu, [&Array; 2]) -> Array,
    /// From the operands and the gradient of the outcome, the gradients of the operands: of the first where the second is
    /// given, of the second where the first is.
    pub adjoint: Adjoint,
}

/// From operands and the gradient of an outcome to gradients of operands.
pub type Adjoint = fn(&Gpu, [Option<&Array>; 2], &Array) -> [Option<Array>; 2];

/// What a GPU adapter says of itself.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Adapter {
    /// Its number, for `--device gpu:N`.
    pub number: usize,
    /// Its name.
    pub name: String,
    /// Discrete, integrated, virtual, or software.
    pub kind: String,
    /// Whether it computes on the processor: good for tests, slow for work.
    pub software: bool,
    /// The graphics interface.
    pub backend: String,
    /// The driver and its version.
    pub driver: String,
    /// Bytes of a buffer that a kernel sees at once.
    pub binding_bytes: u64,
    /// Bytes of a buffer.
    pub buffer_bytes: u64,
    /// Bytes of its memory, where the driver says.
    pub memory_bytes: Option<u64>,
    /// Workgroups per dimension of a launch.
    pub workgroups: u32,
    /// Threads of a workgroup.
    pub workgroup_threads: u32,
    /// Bytes that a workgroup shares.
    pub workgroup_bytes: u32,
    /// Buffers of a kernel.
    pub bindings: u32,
    /// Whether kernels may use 16-bit floats.
    pub half: bool,
    /// Smallest and largest number of threads that step together.
    pub subgroups: [u32; 2],
    /// Matrix units: shapes, operand and result types.
    pub matrix_units: Vec<String>,
}

/// Iterations of loops, nested ones multiplied, after which the software Vulkan driver of Mesa ends a thread's loops
/// without a word.
const SOFTWARE_ITERATIONS: usize = 65_000;

impl Adapter {
    /// Whether a thread may go through so many iterations.
    pub fn iterates(&self, iterations: usize) -> bool {
        !self.software || iterations < SOFTWARE_ITERATIONS
    }
}

/// A device that computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// The burn device.
    pub burn: burn::tensor::Device,
    /// What a person calls it.
    pub name: String,
    /// Where kernels are launched, when it is a GPU.
    pub gpu: Option<Gpu>,
    /// Bytes of GPU memory to use at most, where the user says so.
    pub gpu_memory: Option<u64>,
}

impl Device {
    /// `cpu` or `gpu`: what measurements that are compared should have in common.
    pub fn kind(&self) -> &'static str {
        if self.gpu.is_some() { "gpu" } else { "cpu" }
    }

    /// What computes, without the number of threads, which changes no result: the name of a GPU, or the processor's vector
    /// instructions.
    pub fn identity(&self) -> String {
        match &self.gpu {
            Some(_) => self.name.clone(),
            None => format!("cpu ({})", simd()),
        }
    }

    /// Picks the device. `auto` is the first real GPU that opens, else the processor; a software adapter must be asked for.
    ///
    /// # Errors
    /// When the GPU asked for is not there or fails, or the program was built without GPU support.
    pub fn pick(choice: Choice) -> Result<Self> {
        match choice {
            Choice::Cpu => Ok(Self::cpu()),
            Choice::Gpu(number) => Self::gpu(number),
            Choice::Auto => {
                let real = installed().into_iter().filter(|adapter| !adapter.software);
                Ok(real.map(|adapter| Self::gpu(adapter.number)).find_map(Result::ok).unwrap_or_else(Self::cpu))
            }
        }
    }

    /// The GPU of this number, after it has computed something.
    fn gpu(number: usize) -> Result<Self> {
        let (gpu, burn) = open(number)?;
        Ok(Self { burn, name: format!("gpu:{number} ({})", gpu.adapter().name), gpu: Some(gpu), gpu_memory: None })
    }

    /// Bytes of GPU memory to use: what the user says, or else four fifths of what the adapter has, which leaves others theirs.
    /// Without limit where neither is known.
    fn memory(&self) -> u64 {
        let own = |gpu: &Gpu| gpu.adapter().memory_bytes.map(|bytes| bytes / 5 * 4);
        self.gpu_memory.or_else(|| self.gpu.as_ref().and_then(own)).unwrap_or(u64::MAX)
    }

    /// Bytes that the weights of one block may take on the GPU, a tenth of its memory: while rounding is learned, up to eight
    /// numbers per weight stand there (the original, its grid, what is rounded, offsets now and at their best, gradients, the next
    /// block), and activations and the states between blocks besides. What does not fit stays on the processor's side and passes by
    /// tile by tile.
    pub fn room_for_weights(&self) -> u64 {
        self.memory() / 10
    }

    /// Bytes that hidden states may take on the GPU between blocks, all stores together; none on the processor.
    pub fn room_for_states(&self) -> u64 {
        if self.gpu.is_some() { self.memory() / 10 } else { 0 }
    }

    /// Bytes that Gram matrices and the like may take on the GPU, four tenths of its memory: while they add up nothing is learned, and
    /// of the weights two blocks lie there. What does not fit adds up on the processor.
    pub fn room_for_sums(&self) -> u64 {
        self.memory() / 10 * 4
    }

    /// Whether a tensor of so many bytes can be one buffer that a kernel binds.
    pub fn binds(&self, bytes: u64) -> bool {
        self.gpu.as_ref().is_none_or(|gpu| bytes <= gpu.adapter().binding_bytes)
    }

    /// The processor.
    pub fn cpu() -> Self {
        let threads = rayon::current_num_threads();
        Self { burn: burn::tensor::Device::flex(), name: format!("cpu ({threads} threads, {})", simd()), gpu: None, gpu_memory: None }
    }
}

/// The adapters, without waking the graphics library where the system has no GPU: that takes longer than a refusal may.
fn installed() -> Vec<Adapter> {
    let nodes = ["/dev/dri", "/dev/nvidiactl", "/dev/dxg", "/dev/kgsl-3d0", "/dev/mali0"];
    if nodes.iter().any(|node| std::path::Path::new(node).exists()) { adapters() } else { Vec::new() }
}

/// The widest vector instructions that the processor has and this program uses.
pub fn simd() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return "AVX-512";
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            return "AVX2";
        }
        "SSE2"
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::env::consts::ARCH
}
