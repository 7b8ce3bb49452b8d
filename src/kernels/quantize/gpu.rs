//! Round to nearest on a GPU.

use crate::device::{Buffer, Gpu, Shader};
use crate::error::Result;
use crate::kernels::quantize::{Bounds, Grid};
use crate::matrix::Matrix;
use crate::weight::{Float, Ints};

/// Scale and zero point of every group.
pub static GROUP_GRIDS: Shader = Shader { name: "group_grids", source: include_str!("../../../shaders/group_grids.wgsl") };
/// The nearest code of every weight.
pub static ROUND_CODES: Shader = Shader { name: "round_codes", source: include_str!("../../../shaders/round_codes.wgsl") };

/// As kernels know a format of scales.
pub fn format(float: Float) -> u32 {
    match float {
        Float::F32 => 0,
        Float::F16 => 1,
        Float::BF16 => 2,
    }
}

/// The scale that stands for one with which a code `reach` steps from the zero point would overflow; its bits.
pub fn limit(reach: f32, float: Float) -> u32 {
    float.round(f32::MAX / reach * 0.99).to_bits()
}

/// How far a code can be from the zero point.
pub fn reach(grid: Grid) -> f32 {
    if grid.symmetric { f32::from(1u8 << (grid.bits - 1)) } else { ((1u32 << grid.bits) - 1) as f32 }
}

/// As [`super::round_to_nearest`], or [`super::round_to_nearest_within`] with bounds, piece by piece of rows.
///
/// # Errors
/// As [`Gpu::read`].
pub fn round_to_nearest(gpu: &Gpu, weight: &Matrix, grid: Grid, bounds: Option<&Bounds>) -> Result<(Ints, [f64; 2])> {
    let (rows, columns) = (weight.rows, weight.columns);
    let groups = columns.div_ceil(grid.group);
    let mut ints = Ints {
        rows,
        columns,
        bits: grid.bits,
        group: grid.group,
        codes: Vec::with_capacity(rows * columns),
        scales: Vec::with_capacity(rows * groups),
        scale_float: grid.scale_float,
        zeros: (!grid.symmetric).then(Vec::new),
    };
    let mut sums = [0.0f64; 2];
    let piece = gpu.rows_per_binding(4 * columns);
    for first in (0..rows).step_by(piece) {
        let count = piece.min(rows - first);
        let weights = gpu.upload(&weight.data[first * columns..][..count * columns]);
        let ranges = match bounds {
            Some(bounds) => {
                let of = first * groups..(first + count) * groups;
                gpu.upload(&bounds.low[of.clone()].iter().zip(&bounds.high[of]).map(|(&low, &high)| [low, high]).collect::<Vec<_>>())
            }
            None => gpu.empty(2),
        };
        let (scales, zeros) = grids(gpu, &weights, [count, columns], grid, (&ranges, bounds.is_some()));
        let (codes, partial) = codes(gpu, &weights, [count, columns], grid, &scales, &zeros);
        let words: Vec<u8> = gpu.read(&codes)?;
        ints.codes.extend_from_slice(&words[..count * columns]);
        ints.scales.extend_from_slice(&gpu.read::<f32>(&scales)?);
        if let Some(all) = &mut ints.zeros {
            all.extend(gpu.read::<u32>(&zeros)?.into_iter().map(|zero| zero as u8));
        }
        for [error, total] in gpu.read::<[f32; 2]>(&partial)? {
            sums = [sums[0] + f64::from(error), sums[1] + f64::from(total)];
        }
    }
    Ok((ints, sums))
}

/// Grids and codes of weights that lie on a GPU, which stay there.
pub fn round_on(gpu: &Gpu, weights: &Buffer, shape: [usize; 2], grid: Grid) -> [Buffer; 3] {
    let (scales, zeros) = grids(gpu, weights, shape, grid, (&gpu.empty(2), false));
    let codes = codes(gpu, weights, shape, grid, &scales, &zeros).0;
    [codes, scales, zeros]
}

fn grids(gpu: &Gpu, weights: &Buffer, [rows, columns]: [usize; 2], grid: Grid, (ranges, given): (&Buffer, bool)) -> (Buffer, Buffer) {
    let count = rows * columns.div_ceil(grid.group);
    let (scales, zeros) = (gpu.empty(count), gpu.empty(count));
    let parameters = [
        rows as u32,
        columns as u32,
        grid.group as u32,
        u32::from(grid.bits),
        u32::from(grid.symmetric),
        format(grid.scale_float),
        limit(reach(grid), grid.scale_float),
        u32::from(given),
    ];
    gpu.launch(&GROUP_GRIDS, count.div_ceil(8), &[weights, ranges, &scales, &zeros], &parameters);
    (scales, zeros)
}

fn codes(gpu: &Gpu, weights: &Buffer, [rows, columns]: [usize; 2], grid: Grid, scales: &Buffer, zeros: &Buffer) -> (Buffer, Buffer) {
    let words = (rows * columns).div_ceil(4);
    let (codes, sums) = (gpu.empty(words), gpu.empty(2 * words.div_ceil(256)));
    let parameters = [rows as u32, columns as u32, grid.group as u32, u32::from(grid.bits)];
    gpu.launch(&ROUND_CODES, words.div_ceil(256), &[weights, scales, zeros, &codes, &sums], &parameters);
    (codes, sums)
}
