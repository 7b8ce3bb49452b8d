//! The loop of ADMM pruning on a GPU. Only counts come back while it runs.

use crate::device::{Buffer, Gpu, Shader};
use crate::error::Result;
use crate::kernels::admm::{Rule, ramped};
use crate::kernels::gemm::Sizes;
use crate::kernels::linear::gpu::product_into;
use crate::kernels::linear::units::{Exactness, Operand, Units, worthwhile};
use crate::kernels::select::gpu::{Scored, keep_in_blocks, keep_largest, marked, words};
use crate::weight::Pattern;

/// U, and Z − U − V₀.
pub static ADMM_SPLIT: Shader = Shader { name: "admm_split", source: include_str!("../../../shaders/admm_split.wgsl") };
/// V + U after the product, and Z at the end.
pub static ADMM_COMBINE: Shader = Shader { name: "admm_combine", source: include_str!("../../../shaders/admm_combine.wgsl") };

/// As [`super::prune`]; nothing where a matrix does not fit a binding, or rows do not end with a word of the mask in a
/// pattern of blocks.
///
/// # Errors
/// As [`Gpu::read`].
pub fn prune(
    gpu: &Gpu,
    exact: &[f32],
    columns: usize,
    inverse: &[f32],
    rho: f32,
    iters: usize,
    rule: Rule<'_>,
) -> Result<Option<(Vec<f32>, Vec<bool>)>> {
    let (count, rows) = (exact.len(), exact.len() / columns.max(1));
    let blocks = matches!(rule, Rule::Largest { pattern: Pattern::Blocks { .. }, .. });
    if gpu.rows_per_binding(4 * columns) < rows.max(columns) || (blocks && !columns.is_multiple_of(32)) {
        return Ok(None);
    }
    let ramp = match rule {
        Rule::Fixed(_) => 0,
        Rule::Largest { ramp, .. } => ramp.min(iters),
    };
    let sizes = Sizes { m: rows, n: columns, k: columns };
    let units = Units::of(gpu).filter(|_| worthwhile([rows, columns, columns]));
    let (start, mut sums, inverse) = (gpu.upload(exact), gpu.upload(exact), gpu.upload(inverse));
    // The inverse is symmetric.
    let by = Operand::new(&inverse, [columns, columns]);
    let (dual, right) = (gpu.empty(count), gpu.empty(count));
    let mut keep = match rule {
        Rule::Fixed(keep) => gpu.upload(&words(keep)),
        Rule::Largest { sparsity, pattern, .. } if ramp == 0 => choose(gpu, &sums, [rows, columns], sparsity, pattern, true)?,
        Rule::Largest { .. } => gpu.upload(&vec![u32::MAX; count.div_ceil(32)]),
    };
    for iteration in 0..iters {
        if let Rule::Largest { sparsity, pattern, cubic, .. } = rule
            && iteration < ramp
        {
            let grows = cubic || pattern != Pattern::Unstructured;
            let share = if grows { ramped(sparsity, iteration, ramp) } else { sparsity };
            keep = choose(gpu, &sums, [rows, columns], share, pattern, iteration + 1 == ramp)?;
        }
        gpu.launch(&ADMM_SPLIT, count.div_ceil(64), &[&sums, &start, &keep, &dual, &right], &[count as u32]);
        match units.as_ref().and_then(|units| units.product(Operand::new(&right, [rows, columns]), by, Exactness::Split)) {
            Some(product) => sums = product,
            None => product_into(gpu, sizes, &right, &inverse, &sums),
        }
        gpu.launch(&ADMM_COMBINE, count.div_ceil(64), &[&sums, &start, &dual, &keep], &[count as u32, rho.to_bits(), 0]);
    }
    gpu.launch(&ADMM_COMBINE, count.div_ceil(64), &[&sums, &start, &dual, &keep], &[count as u32, 0, 1]);
    Ok(Some((gpu.read(&sums)?, marked(&gpu.read::<u32>(&keep)?, count))))
}

/// As the choice of the twin.
fn choose(gpu: &Gpu, sums: &Buffer, [rows, columns]: [usize; 2], share: f64, pattern: Pattern, last: bool) -> Result<Buffer> {
    let count = rows * columns;
    let gone = (count as f64 * share) as usize;
    let Pattern::Blocks { kept, of } = pattern else {
        return keep_largest(gpu, sums, None, count, gone);
    };
    let protected = keep_in_blocks(gpu, Scored { values: sums, factors: None, rows, columns }, kept, of);
    if last {
        return Ok(protected);
    }
    let free: u32 = gpu.read::<u32>(&protected)?.iter().map(|word| word.count_zeros()).sum();
    keep_largest(gpu, sums, Some(&protected), count, gone.min(free as usize))
}
