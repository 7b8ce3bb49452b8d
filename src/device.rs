//! Where tensors are computed.

use crate::error::{Error, Result};

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

/// A device that computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// The burn device.
    pub burn: burn::tensor::Device,
    /// What a person calls it.
    pub name: String,
}

impl Device {
    /// Picks the device. `auto` is the processor: until every kernel has its GPU twin, it is the faster of the two
    /// for the small windows of calibration.
    ///
    /// # Errors
    /// When the GPU asked for is not there, or the program was built without GPU support.
    pub fn pick(choice: Choice) -> Result<Self> {
        match choice {
            Choice::Auto | Choice::Cpu => Ok(Self::cpu()),
            Choice::Gpu(number) => Self::gpu(number),
        }
    }

    /// The GPU of this number, after it has computed something.
    #[cfg(feature = "gpu")]
    fn gpu(number: usize) -> Result<Self> {
        use burn::tensor::{DeviceKind, Tensor};
        let kinds = [DeviceKind::DiscreteGpu(number), DeviceKind::IntegratedGpu(number), DeviceKind::VirtualGpu(number), DeviceKind::Cpu];
        for kind in kinds {
            let name = format!("gpu:{number} ({kind:?})");
            let works = std::panic::catch_unwind(|| {
                let device = burn::tensor::Device::wgpu(kind);
                let sum = Tensor::<1>::ones([4], &device).sum().into_data().try_into_vec::<f32>();
                (sum == Ok(vec![4.0])).then_some(device)
            });
            if let Ok(Some(burn)) = works {
                return Ok(Self { burn, name });
            }
        }
        Err(Error::input(format!("--device gpu:{number}: no such adapter answers; use --device cpu")))
    }

    #[cfg(not(feature = "gpu"))]
    fn gpu(number: usize) -> Result<Self> {
        Err(Error::input(format!(
            "--device gpu:{number}: this program was built without GPU support; build it with `--features gpu`, or use --device cpu"
        )))
    }

    /// The processor.
    pub fn cpu() -> Self {
        let threads = rayon::current_num_threads();
        Self { burn: burn::tensor::Device::flex(), name: format!("cpu ({threads} threads, {})", simd()) }
    }
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
