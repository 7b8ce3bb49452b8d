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
    let pieces: Vec<[f32; 2]> = gpu.read(&pieces(gpu, width, values))?;
    let mut totals = vec![[0.0f64; 2]; width];
    for (index, pieces) in pieces.chunks_exact(width).enumerate() {
        let (before, more) = ((64 * index) as f64, 64.min(tokens - 64 * index) as f64);
        for ([mean, squares], &[of_piece, squares_of_piece]) in totals.iter_mut().zip(pieces) {
            let difference = f64::from(of_piece) - *mean;
            *mean += difference * more / (before + more);
            *squares += f64::from(squares_of_piece) + difference * difference * before * more / (before + more);
        }
    }
    let divisor = (tokens as f64 - 1.0).max(1.0);
    Ok([totals.iter().map(|&[mean, _]| mean).collect(), totals.iter().map(|&[_, squares]| squares / divisor).collect()])
}

/// For every 64 tokens and every channel, mean and sum of squared differences from it.
pub fn pieces(gpu: &Gpu, width: usize, values: &Buffer) -> Buffer {
    let tokens = values.words() / width.max(1);
    let count = tokens.div_ceil(64) * width;
    let pieces = gpu.empty(2 * count);
    gpu.launch(&CHANNEL_STATISTICS, count.div_ceil(64), &[values, &pieces], &[tokens as u32, width as u32]);
    pieces
}
