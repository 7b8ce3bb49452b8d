//! Two trit-planes on a GPU.

use crate::device::{Gpu, Shader};
use crate::error::Result;
use crate::kernels::quantize::gpu::{format, limit};
use crate::kernels::trits::Rule;
use crate::matrix::Matrix;
use crate::weight::{Float, Ints, Trits};

/// Scales of every group.
pub static TRIT_SCALES: Shader = Shader { name: "trit_scales", source: include_str!("../../../shaders/trit_scales.wgsl") };
/// The nearest level of every weight.
pub static TRIT_CODES: Shader = Shader { name: "trit_codes", source: include_str!("../../../shaders/trit_codes.wgsl") };

/// As [`super::fit_free`].
///
/// # Errors
/// As [`Gpu::read`].
pub fn fit_free(gpu: &Gpu, weight: &Matrix, rule: Rule, importance: Option<&[f32]>) -> Result<(Trits, [f64; 2])> {
    let (codes, scales, change) = fit(gpu, weight, rule, importance, None)?;
    let (rows, columns) = (weight.rows, weight.columns);
    Ok((Trits { rows, columns, group: rule.group, codes, scales, scale_float: Float::F16 }, change))
}

/// As [`super::fit_tied`].
///
/// # Errors
/// As [`Gpu::read`].
pub fn fit_tied(gpu: &Gpu, weight: &Matrix, rule: Rule, importance: Option<&[f32]>, scale_float: Float) -> Result<(Ints, [f64; 2])> {
    let (codes, scales, change) = fit(gpu, weight, rule, importance, Some(scale_float))?;
    let codes = codes.into_iter().map(|code| code.wrapping_add(4)).collect();
    let scales = scales.iter().map(|&[_, fine]| fine).collect();
    let (rows, columns) = (weight.rows, weight.columns);
    Ok((Ints { rows, columns, bits: 4, group: rule.group, codes, scales, scale_float, zeros: None }, change))
}

type Fitted = (Vec<u8>, Vec<[f32; 2]>, [f64; 2]);

/// Piece by piece of rows.
fn fit(gpu: &Gpu, weight: &Matrix, rule: Rule, importance: Option<&[f32]>, tied: Option<Float>) -> Result<Fitted> {
    let (columns, groups) = (weight.columns, weight.columns.div_ceil(rule.group));
    let (mut codes, mut scales, mut sums) = (Vec::new(), Vec::new(), [0.0f64; 2]);
    let by_column = importance.map_or_else(|| gpu.empty(1), |importance| gpu.upload(importance));
    for rows in weight.data.chunks(gpu.rows_per_binding(4 * columns) * columns.max(1)) {
        let count = rows.len() / columns;
        let weights = gpu.upload(rows);
        let (pairs, factors) = (gpu.empty(2 * count * groups), gpu.empty(count * groups));
        let float = tied.unwrap_or(Float::F16);
        let parameters = [
            count as u32,
            columns as u32,
            rule.group as u32,
            u32::from(tied.is_some()),
            format(float),
            limit(4.0, float),
            rule.max_iters,
            (rule.epsilon as f32).to_bits(),
            u32::from(rule.absolute),
            u32::from(rule.residual_start),
            u32::from(importance.is_some()),
        ];
        gpu.launch(&TRIT_SCALES, (count * groups).div_ceil(64), &[&weights, &by_column, &pairs, &factors], &parameters);
        let words = rows.len().div_ceil(4);
        let (packed, partial) = (gpu.empty(words), gpu.empty(2 * words.div_ceil(64)));
        let parameters = [count as u32, columns as u32, rule.group as u32];
        gpu.launch(&TRIT_CODES, words.div_ceil(64), &[&weights, &pairs, &factors, &packed, &partial], &parameters);
        codes.extend_from_slice(&gpu.read::<u8>(&packed)?[..rows.len()]);
        scales.extend(gpu.read::<[f32; 2]>(&pairs)?);
        for [error, total] in gpu.read::<[f32; 2]>(&partial)? {
            sums = [sums[0] + f64::from(error), sums[1] + f64::from(total)];
        }
    }
    Ok((codes, scales, sums))
}
