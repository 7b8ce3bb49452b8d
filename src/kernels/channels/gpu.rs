//! Statistics of channels that lie on a GPU.

use crate::device::{Buffer, Gpu, Shader};
use crate::error::Result;

/// Mean and variance of every channel.
pub static CHANNEL_STATISTICS: Shader =
    Shader { name: "channel_statistics", source: include_str!("../../../shaders/channel_statistics.wgsl") };

/// As [`super::channels`], of tokens × width floats on a GPU.
///
/// # Errors
/// As [`Gpu::read`].
pub fn channels(gpu: &Gpu, width: usize, values: &Buffer) -> Result<[Vec<f64>; 2]> {
    let tokens = values.words() / width.max(1);
    let (mean, variance) = (gpu.empty(width), gpu.empty(width));
    gpu.launch(&CHANNEL_STATISTICS, width, &[values, &mean, &variance], &[tokens as u32, width as u32]);
    let wide = |buffer| Ok(gpu.read::<f32>(buffer)?.into_iter().map(f64::from).collect());
    Ok([wide(&mean)?, wide(&variance)?])
}
