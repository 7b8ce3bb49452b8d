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
    /// Picks the device.
    ///
    /// # Errors
    /// When a GPU is asked for: this version computes on the processor.
    pub fn pick(choice: Choice) -> Result<Self> {
        match choice {
            Choice::Auto | Choice::Cpu => Ok(Self::cpu()),
            Choice::Gpu(number) => {
                Err(Error::input(format!("--device gpu:{number}: this version computes on the processor only; use --device cpu")))
            }
        }
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
