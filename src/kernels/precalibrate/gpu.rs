//! Pre-calibration on a GPU.

use crate::device::{Buffer, Gpu, Shader};
use crate::error::Result;
use crate::kernels::precalibrate::{BINS, RATIOS, SAFE, divergence, ranking, sampled};
use crate::kernels::quantize::gpu::{format, limit, reach};
use crate::kernels::quantize::{Bounds, Grid, range};
use crate::kernels::select::gpu::{cut, histogram};
use crate::matrix::Matrix;

/// The clip ratio of every group.
pub static CLIP_RATIOS: Shader = Shader { name: "clip_ratios", source: include_str!("../../../shaders/clip_ratios.wgsl") };
/// Histograms of the sample.
pub static ROUNDED_HISTOGRAM: Shader =
    Shader { name: "rounded_histogram", source: include_str!("../../../shaders/rounded_histogram.wgsl") };

/// As [`super::precalibrate`], of a weight that fits a binding.
///
/// # Errors
/// As [`Gpu::read`].
pub fn precalibrate(gpu: &Gpu, weight: &Matrix, grid: Grid, outliers: f64, pruned: bool) -> Result<Option<Bounds>> {
    let weights = gpu.upload(&weight.data);
    let Some(theta) = threshold(gpu, &weights, weight.data.len(), outliers, pruned)? else { return Ok(None) };
    let order = if outliers > 0.0 { ranking(&divergences(gpu, weight, grid, theta, pruned)?) } else { vec![0] };
    let groups = weight.rows * weight.columns.div_ceil(grid.group);
    let mut ranks: Vec<u32> = order.iter().map(|&index| index as u32).collect();
    ranks.resize(RATIOS, 0);
    let ranges = gpu.empty(2 * groups);
    let parameters = [
        weight.rows as u32,
        weight.columns as u32,
        grid.group as u32,
        u32::from(grid.bits),
        u32::from(grid.symmetric),
        format(grid.scale_float),
        limit(reach(grid), grid.scale_float),
        order.len() as u32,
        0,
    ];
    gpu.launch(&CLIP_RATIOS, groups, &[&weights, &gpu.upload(&ranks), &ranges], &parameters);
    let (low, high) = gpu.read::<[f32; 2]>(&ranges)?.into_iter().map(|[low, high]| (low, high)).unzip();
    Ok(Some(Bounds { group: grid.group, low, high }))
}

/// As [`super::threshold`].
///
/// # Errors
/// As [`Gpu::read`].
pub fn threshold(gpu: &Gpu, weights: &Buffer, count: usize, share: f64, pruned: bool) -> Result<Option<f32>> {
    let bins = histogram(gpu, weights, None, count, [20, 32, 0])?;
    if bins[BINS - 8..].iter().any(|&count| count > 0) {
        return Ok(None);
    }
    // Below the smallest normal magnitude zeros are told apart by the next eleven bits, then by the last.
    let zeros = match pruned && bins[0] > 0 {
        true if histogram(gpu, weights, None, count, [9, 20, 0])?[0] > 0 => histogram(gpu, weights, None, count, [0, 9, 0])?[0] as usize,
        _ => 0,
    };
    let exceeding = ((count - zeros) as f64 * share).round() as usize;
    if exceeding >= count {
        return Ok(Some(0.0));
    }
    Ok(Some(f32::from_bits(cut(gpu, weights, None, count, count - 1 - exceeding)?.0)))
}

/// As [`super::divergences`].
///
/// # Errors
/// As [`Gpu::read`].
pub fn divergences(gpu: &Gpu, weight: &Matrix, grid: Grid, theta: f32, pruned: bool) -> Result<[f64; RATIOS]> {
    let sample = sampled(weight, grid.group);
    let is_core = |weight: &f32| weight.abs() <= theta && !(pruned && *weight == 0.0);
    let mut core = vec![0.0f32; sample.len() * grid.group];
    let mut sizes = vec![0u32; sample.len()];
    for ((group, room), size) in sample.iter().zip(core.chunks_exact_mut(grid.group)).zip(&mut sizes) {
        for (room, &weight) in room.iter_mut().zip(group.iter().filter(|&weight| is_core(weight))) {
            *room = weight;
            *size += 1;
        }
    }
    let count: usize = sizes.iter().map(|&size| size as usize).sum();
    if !SAFE.contains(&theta) || count == 0 {
        return Ok([0.0; RATIOS]);
    }
    // Grids hold zero, wherever the weights of a group lie.
    let ranges: Vec<[f32; 2]> = sample.iter().map(|group| range(group)).map(|(low, high)| [low.min(0.0), high.max(0.0)]).collect();
    let counts = gpu.upload(&vec![0u32; (RATIOS + 1) * BINS]);
    let parameters = [
        sample.len() as u32,
        grid.group as u32,
        u32::from(grid.bits),
        u32::from(grid.symmetric),
        format(grid.scale_float),
        limit(reach(grid), grid.scale_float),
        (BINS as f32 / 2.0 / theta).to_bits(),
    ];
    let buffers = [&gpu.upload(&core), &gpu.upload(&sizes), &gpu.upload(&ranges), &counts];
    gpu.launch(&ROUNDED_HISTOGRAM, sample.len() * (RATIOS + 1), &buffers, &parameters);
    let counts: Vec<u32> = gpu.read(&counts)?;
    let (exact, rounded) = counts.split_at(BINS);
    let mut found = [0.0; RATIOS];
    found.iter_mut().zip(rounded.chunks_exact(BINS)).for_each(|(found, rounded)| *found = divergence(exact, rounded, count));
    Ok(found)
}
