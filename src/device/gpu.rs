//! A wgpu adapter that computes: which there are, what they can, buffers on them, and launches of WGSL kernels.
//!
//! Kernels run through the tensor library's client, so that they share its queue and its memory with tensors. Buffers are
//! pieces of shared pages: shaders declare every binding `read_write`. Parameters are words in one more buffer, the last, which
//! launches with the same words share: no shader writes there.
//! An error of a launch shows when its outcome is read.
#![allow(unsafe_code)]

mod differentiable;

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::wgpu::{WgpuSetup, wgpu};
use burn::tensor::{Shape, Tensor};
use burn_wgpu::{CubeDim, CubeTensor, KernelSource, SourceKernel, SourceTemplate, Wgpu, into_contiguous};
use cubecl::client::Client;
use cubecl::future::block_on;
use cubecl::prelude::{CubeCount, ExecutionMode, KernelId};
use cubecl::server::{Handle, KernelArguments, MetadataBindingInfo};
use cubecl_environment::stream::{StreamPolicy, set_policy};

use crate::device::{Adapter, Array, Constant, Purpose, Shader};
use crate::error::{Error, Result};

/// Threads of a workgroup of every kernel.
const THREADS: u32 = 64;

/// A GPU that kernels are launched on.
#[derive(Clone)]
pub struct Gpu {
    client: Client,
    device: burn::tensor::Device,
    adapter: Arc<Adapter>,
    /// Bytes that are set aside, by [`Purpose`].
    reserved: Arc<[AtomicU64; 2]>,
}

/// Memory of a GPU that is set aside while this lives.
#[derive(Debug)]
pub struct Reserved {
    bytes: u64,
    purpose: Purpose,
    of: Arc<[AtomicU64; 2]>,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.of[self.purpose as usize].fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu on {}", self.adapter.name)
    }
}

impl PartialEq for Gpu {
    fn eq(&self, other: &Self) -> bool {
        self.adapter.number == other.adapter.number
    }
}

/// Words of 32 bits on a GPU. A clone is the same words.
#[derive(Debug, Clone)]
pub struct Buffer {
    handle: Handle,
    words: usize,
}

impl Buffer {
    /// Number of words.
    pub fn words(&self) -> usize {
        self.words
    }

    /// Some of the words, the same memory. A kernel can bind them where the first is a multiple of 64.
    pub fn part(&self, words: Range<usize>) -> Self {
        let after = self.handle.size_in_used().saturating_sub(4 * words.end as u64);
        Self { handle: self.handle.clone().offset_start(4 * words.start as u64).offset_end(after), words: words.len() }
    }
}

/// The instance, and its adapters in a fixed order: real ones first, of a kind those with more memory first.
fn enumerate() -> (wgpu::Instance, Vec<wgpu::Adapter>) {
    let backends = wgpu::Backends::VULKAN;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor { backends, ..wgpu::InstanceDescriptor::new_without_display_handle() });
    let mut adapters = block_on(instance.enumerate_adapters(backends));
    adapters.sort_by_key(|adapter| {
        let kind = match adapter.get_info().device_type {
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu => 2,
            wgpu::DeviceType::Other => 3,
            wgpu::DeviceType::Cpu => 4,
        };
        (kind, Reverse(memory_of(adapter)))
    });
    (instance, adapters)
}

/// What an adapter says of itself.
fn describe(number: usize, adapter: &wgpu::Adapter) -> Adapter {
    let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
    let matrix_units = adapter
        .cooperative_matrix_properties()
        .iter()
        .map(|unit| format!("{}x{}x{} {:?}->{:?}", unit.m_size, unit.n_size, unit.k_size, unit.ab_type, unit.cr_type))
        .collect();
    Adapter {
        number,
        name: info.name,
        kind: format!("{:?}", info.device_type),
        software: info.device_type == wgpu::DeviceType::Cpu,
        backend: info.backend.to_string(),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        binding_bytes: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size),
        buffer_bytes: limits.max_buffer_size,
        memory_bytes: memory_of(adapter),
        workgroups: limits.max_compute_workgroups_per_dimension,
        workgroup_threads: limits.max_compute_invocations_per_workgroup,
        workgroup_bytes: limits.max_compute_workgroup_storage_size,
        bindings: limits.max_storage_buffers_per_shader_stage,
        half: features.contains(wgpu::Features::SHADER_F16),
        subgroups: [info.subgroup_min_size, info.subgroup_max_size],
        matrix_units,
    }
}

/// Bytes of the largest memory that lies at the adapter; nothing where the driver does not say.
fn memory_of(adapter: &wgpu::Adapter) -> Option<u64> {
    // SAFETY: the handles are read, nothing is destroyed or kept, and the adapter outlives the call.
    let properties = unsafe {
        let vulkan = adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
        vulkan.shared_instance().raw_instance().get_physical_device_memory_properties(vulkan.raw_physical_device())
    };
    let heaps = properties.memory_heaps.iter().take(properties.memory_heap_count as usize);
    heaps.filter(|heap| heap.flags.as_raw() & 1 == 1).map(|heap| heap.size).max()
}

/// All adapters of this machine. None where there is no graphics library.
pub fn adapters() -> Vec<Adapter> {
    let all = || enumerate().1.iter().enumerate().map(|(number, one)| describe(number, one)).collect();
    std::panic::catch_unwind(all).unwrap_or_default()
}

/// Opens the adapter of this number.
///
/// # Errors
/// When there is none, it gives no device, or a first computation on it fails.
pub fn open(number: usize) -> Result<(Gpu, burn::tensor::Device)> {
    let opened = std::panic::catch_unwind(|| open_adapter(number));
    opened.unwrap_or_else(|_| Err(Error::run(format!("--device gpu:{number}: the driver failed; use --device cpu"))))
}

fn open_adapter(number: usize) -> Result<(Gpu, burn::tensor::Device)> {
    // Each stream has memory of its own, which others do not get back: one serves all threads.
    set_policy(StreamPolicy::Single);
    let (instance, mut adapters) = enumerate();
    if number >= adapters.len() {
        let have = match adapters.len() {
            0 => "this machine has no GPU that Vulkan knows".to_owned(),
            1 => "there is one adapter, gpu:0".to_owned(),
            count => format!("there are the adapters gpu:0 to gpu:{}", count - 1),
        };
        return Err(Error::input(format!("--device gpu:{number}: {have}; use --device cpu, or see `drawknife doctor`")));
    }
    let adapter = adapters.swap_remove(number);
    let description = describe(number, &adapter);
    let failed = |what: &dyn std::fmt::Display| Error::run(format!("--device gpu:{number}: {what}; use --device cpu"));
    let experimental = wgpu::Features::all_experimental_mask().difference(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
    let request = wgpu::DeviceDescriptor {
        label: None,
        required_features: adapter.features().difference(wgpu::Features::MAPPABLE_PRIMARY_BUFFERS | experimental),
        required_limits: adapter.limits(),
        memory_hints: wgpu::MemoryHints::MemoryUsage,
        // SAFETY: the one experimental feature asked for is matrix units; what computes on them is compared with the processor
        // before it is used.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..wgpu::DeviceDescriptor::default()
    };
    let (device, queue) = block_on(adapter.request_device(&request)).map_err(|error| failed(&error))?;
    let backend = adapter.get_info().backend;
    let setup = WgpuSetup { instance, adapter, device, queue, backend };
    let device = burn::tensor::Device::wgpu_options().setup(setup).init().map_err(|error| failed(&error))?;
    let probe = Tensor::<1>::ones([4], &device);
    let client = probe.clone().try_into_primitive::<Wgpu>().map_err(|_| failed(&"not a device of this kind"))?.client;
    let sum = probe.sum().into_data().try_into_vec::<f32>();
    if sum != Ok(vec![4.0]) {
        return Err(failed(&"it does not add"));
    }
    let gpu = Gpu { client, device: device.clone(), adapter: Arc::new(description), reserved: Arc::default() };
    OPENED.lock().unwrap_or_else(PoisonError::into_inner).push(gpu.clone());
    Ok((gpu, device))
}

/// The name of the adapter that was opened last.
pub fn opened() -> Option<String> {
    OPENED.lock().unwrap_or_else(PoisonError::into_inner).last().map(|gpu| gpu.adapter.name.clone())
}

/// The GPUs that were opened, by their devices.
static OPENED: Mutex<Vec<Gpu>> = Mutex::new(Vec::new());

impl Gpu {
    /// The GPU that a tensor's device is; nothing for other devices.
    pub fn of(device: &burn::tensor::Device) -> Option<Self> {
        let device = device.clone().without_autodiff();
        OPENED.lock().unwrap_or_else(PoisonError::into_inner).iter().find(|gpu| gpu.device == device).cloned()
    }

    /// What the adapter says of itself.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// The same GPU with smaller limits, as if a lesser adapter: so many workgroups per dimension and bytes per binding.
    pub fn limited(&self, workgroups: u32, binding_bytes: u64) -> Self {
        let adapter = Adapter { workgroups, binding_bytes, ..(*self.adapter).clone() };
        Self { adapter: Arc::new(adapter), ..self.clone() }
    }

    /// Rows of so many bytes that one binding holds; at least one.
    pub fn rows_per_binding(&self, row_bytes: usize) -> usize {
        (self.adapter.binding_bytes as usize / row_bytes.max(1)).max(1)
    }

    /// Words that are copied to the GPU.
    pub fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Buffer {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if bytes.len().is_multiple_of(4) && !bytes.is_empty() {
            return Buffer { handle: self.client.create_from_slice(bytes), words: bytes.len() / 4 };
        }
        let mut whole = bytes.to_vec();
        whole.resize(bytes.len().next_multiple_of(4).max(4), 0);
        Buffer { handle: self.client.create_from_slice(&whole), words: whole.len() / 4 }
    }

    /// Sets so many bytes aside, if no more than `most` are set aside for this then.
    pub fn reserve(&self, purpose: Purpose, bytes: u64, most: u64) -> Option<Reserved> {
        let more = |held: u64| held.checked_add(bytes).filter(|&held| held <= most);
        self.reserved[purpose as usize].fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Reserved { bytes, purpose, of: self.reserved.clone() })
    }

    /// Words that hold anything.
    pub fn empty(&self, words: usize) -> Buffer {
        Buffer { handle: self.client.empty(4 * words.max(1)), words: words.max(1) }
    }

    /// Words of zeros, written there.
    pub fn zeros(&self, words: usize) -> Buffer {
        self.buffer(&Tensor::<1>::zeros([words.max(1)], &self.device)).expect("a tensor made on this device")
    }

    /// A copy of floats.
    pub fn copy(&self, buffer: &Buffer) -> Buffer {
        // The caller's clone keeps the product from being formed in place.
        let copy = self.tensor(buffer.clone(), [buffer.words]).mul_scalar(1.0);
        self.buffer(&copy).expect("a tensor made on this device")
    }

    /// The values of a tensor that lies on this GPU, without a copy where it is contiguous; nothing when it lies elsewhere.
    pub fn buffer<const D: usize>(&self, tensor: &Tensor<D>) -> Option<Buffer> {
        let tensor = into_contiguous(tensor.clone().try_into_primitive::<Wgpu>().ok()?);
        let words = tensor.meta.shape().num_elements();
        Some(Buffer { handle: tensor.handle, words })
    }

    /// A tensor that takes over a buffer of floats.
    pub fn tensor<const D: usize>(&self, buffer: Buffer, shape: [usize; D]) -> Tensor<D> {
        let probe = Tensor::<1>::empty([1], &self.device);
        let probe = probe.try_into_primitive::<Wgpu>().expect("a tensor made on this device");
        Tensor::from_primitive::<Wgpu>(CubeTensor::new_contiguous(
            probe.client,
            probe.device,
            Shape::from(shape),
            buffer.handle,
            burn::tensor::DType::F32,
        ))
    }

    /// Launches so many workgroups of a kernel.
    pub fn launch(&self, shader: &'static Shader, workgroups: usize, buffers: &[&Buffer], parameters: &[u32]) {
        self.launch_as(Launched { shader, constant: None }, workgroups, buffers, parameters);
    }

    /// As [`Self::launch`], with another number for a constant of the kernel.
    pub fn launch_with(&self, shader: &'static Shader, constant: Constant, workgroups: usize, buffers: &[&Buffer], parameters: &[u32]) {
        self.launch_as(Launched { shader, constant: Some(constant) }, workgroups, buffers, parameters);
    }

    fn launch_as(&self, kernel: Launched, workgroups: usize, buffers: &[&Buffer], parameters: &[u32]) {
        if workgroups == 0 {
            return;
        }
        let most = self.adapter.workgroups as usize;
        let y = workgroups.div_ceil(most);
        let x = workgroups.div_ceil(y);
        // As what the client calls information they need no copy that would end its run of launches.
        let pairs = parameters.chunks(2).map(|pair| u64::from(pair[0]) | u64::from(pair.get(1).copied().unwrap_or(0)) << 32);
        let information = MetadataBindingInfo::custom(pairs.collect());
        let bindings = buffers.iter().map(|buffer| buffer.handle.clone().binding());
        let arguments = bindings.fold(KernelArguments::new().with_info(information), KernelArguments::with_buffer);
        let kernel = SourceKernel::new(kernel, CubeDim::new_1d(THREADS));
        self.client.launch(Box::new(kernel), CubeCount::Static(x as u32, y as u32, 1), arguments);
    }

    /// Has what was launched begin: drivers end what takes seconds from one submission to the end of the work in it.
    pub fn submit(&self) {
        // What fails shows when an outcome is read.
        drop(self.client.flush());
    }

    /// Gives memory back that nothing uses.
    pub fn tidy(&self) {
        drop(self.client.memory_cleanup());
    }

    /// The words of a buffer, after everything that was launched before.
    ///
    /// # Errors
    /// When a launch failed, or the device is lost or out of memory.
    pub fn read<T: bytemuck::Pod>(&self, buffer: &Buffer) -> Result<Vec<T>> {
        self.read_part(buffer, 0..buffer.words)
    }

    /// Some words of a buffer, as [`Self::read`].
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_part<T: bytemuck::Pod>(&self, buffer: &Buffer, words: Range<usize>) -> Result<Vec<T>> {
        if words.is_empty() {
            return Ok(Vec::new());
        }
        let length = 4 * words.len();
        let bytes = self.client.read_one(buffer.part(words).handle);
        let bytes = bytes.map_err(|error| self.failure(&error.to_string()))?;
        Ok(bytemuck::pod_collect_to_vec(&bytes[..length]))
    }

    /// The error for what the driver or the tensor library said.
    pub fn failure(&self, said: &str) -> Error {
        Error::run(format!("{} failed: {}; use a smaller --gpu-memory, or --device cpu", self.adapter.name, cause(said)))
    }
}

/// The matrix that a tensor of the library holds.
fn array_of(tensor: CubeTensor) -> Array {
    let tensor = into_contiguous(tensor);
    let shape = tensor.meta.shape();
    let (shape, words) = ([shape[0], shape[1]], shape.num_elements());
    Array { buffer: Buffer { handle: tensor.handle, words }, shape }
}

/// A matrix as a tensor of the library, on the device of another.
fn placed(like: &CubeTensor, array: Array) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    CubeTensor::new_contiguous(client, device, Shape::from(array.shape), array.buffer.handle, burn::tensor::DType::F32)
}

/// The last cause of an error that lists causes line by line, without drawings and backtraces.
fn cause(message: &str) -> &str {
    let lines = message.lines().map(str::trim).take_while(|line| !line.starts_with("Backtrace") && !line.starts_with('┌'));
    lines.filter(|line| !line.is_empty() && !line.starts_with("Caused by")).last().unwrap_or("the device failed")
}

/// A kernel as the client launches it.
struct Launched {
    shader: &'static Shader,
    constant: Option<Constant>,
}

impl KernelSource for Launched {
    fn source(&self) -> SourceTemplate {
        SourceTemplate::new(self.shader.text(self.constant))
    }

    fn id(&self) -> KernelId {
        KernelId::new::<Self>().mode(ExecutionMode::Unchecked).info((self.shader.name, self.constant))
    }

    fn lang(&self) -> &'static str {
        "wgsl"
    }
}
