//! Selection among scores on a GPU. Masks are words of 32 entries, the lowest bit first.

use rayon::prelude::*;

use crate::device::{Buffer, Gpu, Shader};
use crate::error::Result;
use crate::matrix::Matrix;

/// The smallest of every row.
pub static SELECT_SMALLEST: Shader = Shader { name: "select_smallest", source: include_str!("../../../shaders/select_smallest.wgsl") };
/// The smallest of every block of a row.
pub static SELECT_BLOCKS: Shader = Shader { name: "select_blocks", source: include_str!("../../../shaders/select_blocks.wgsl") };
/// Counts of keys by eleven of their bits.
pub static KEY_HISTOGRAM: Shader = Shader { name: "key_histogram", source: include_str!("../../../shaders/key_histogram.wgsl") };
/// The mask of a whole matrix by a threshold.
pub static KEEP_LARGEST: Shader = Shader { name: "keep_largest", source: include_str!("../../../shaders/keep_largest.wgsl") };

/// Bins of a histogram of keys.
pub const BINS: usize = 2048;

/// Values whose magnitudes are scored, times a factor per column where there are any.
#[derive(Debug, Clone, Copy)]
pub struct Scored<'a> {
    /// rows × columns floats.
    pub values: &'a Buffer,
    /// One per column.
    pub factors: Option<&'a Buffer>,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
}

/// What of every row stays when its `count` smallest scores go, as [`super::smallest`] finds them: rows × ⌈columns / 32⌉
/// words.
pub fn keep_but_smallest(gpu: &Gpu, Scored { values, factors, rows, columns }: Scored<'_>, count: usize) -> Buffer {
    let (keep, none) = (gpu.empty(rows * columns.div_ceil(32)), gpu.empty(1));
    let parameters = [rows as u32, columns as u32, count as u32, u32::from(factors.is_some())];
    gpu.launch(&SELECT_SMALLEST, rows, &[values, factors.unwrap_or(&none), &keep], &parameters);
    keep
}

/// What of every row stays when all but `kept` of each block of `of` go, as [`super::smallest_in_blocks`] finds them.
pub fn keep_in_blocks(gpu: &Gpu, Scored { values, factors, rows, columns }: Scored<'_>, kept: usize, of: usize) -> Buffer {
    let words = rows * columns.div_ceil(32);
    let (keep, none) = (gpu.empty(words), gpu.empty(1));
    let parameters = [rows as u32, columns as u32, kept as u32, of as u32, u32::from(factors.is_some())];
    gpu.launch(&SELECT_BLOCKS, words.div_ceil(64), &[values, factors.unwrap_or(&none), &keep], &parameters);
    keep
}

/// As [`keep_but_smallest`] and [`keep_in_blocks`], for a matrix on the processor whose entries that go become zero, piece by
/// piece of rows.
///
/// # Errors
/// As [`Gpu::read`].
pub fn prune(gpu: &Gpu, matrix: &mut Matrix, factors: &[f32], count: usize, blocks: Option<[usize; 2]>) -> Result<()> {
    let (columns, words) = (matrix.columns, matrix.columns.div_ceil(32));
    let factors = gpu.upload(factors);
    for rows in matrix.data.chunks_mut(gpu.rows_per_binding(4 * columns) * columns.max(1)) {
        let values = gpu.upload(rows);
        let scored = Scored { values: &values, factors: Some(&factors), rows: rows.len() / columns, columns };
        let keep: Vec<u32> = gpu.read(&match blocks {
            Some([kept, of]) => keep_in_blocks(gpu, scored, kept, of),
            None => keep_but_smallest(gpu, scored, count),
        })?;
        rows.par_chunks_mut(columns).zip(keep.par_chunks(words)).for_each(|(row, keep)| {
            for (at, value) in row.iter_mut().enumerate() {
                *value = if keep[at / 32] >> (at % 32) & 1 == 1 { *value } else { 0.0 };
            }
        });
    }
    Ok(())
}

/// Counts magnitudes by eleven bits from `shift` on, of those whose bits from `above` on are `prefix` and that `marked` does
/// not mark.
///
/// # Errors
/// As [`Gpu::read`].
pub fn histogram(gpu: &Gpu, values: &Buffer, marked: Option<&Buffer>, count: usize, [shift, above, prefix]: [u32; 3]) -> Result<Vec<u32>> {
    let bins = gpu.upload(&[0u32; BINS]);
    let parameters = [count as u32, shift, above, prefix, u32::from(marked.is_some())];
    let none = gpu.empty(1);
    gpu.launch(&KEY_HISTOGRAM, count.div_ceil(4096), &[values, marked.unwrap_or(&none), &bins], &parameters);
    gpu.read(&bins)
}

/// The bits of the magnitude of rank `rank` (from 0, ascending) among those that `marked` does not mark, and how many of its
/// equals have that rank or a lower one; as [`super::cut`] finds them.
///
/// # Errors
/// As [`Gpu::read`].
pub fn cut(gpu: &Gpu, values: &Buffer, marked: Option<&Buffer>, count: usize, rank: usize) -> Result<(u32, usize)> {
    let (mut prefix, mut left) = (0u32, rank);
    for (shift, above) in [(20, 32), (9, 20), (0, 9)] {
        let bins = histogram(gpu, values, marked, count, [shift, above, prefix])?;
        let mut bin = 0;
        while bin + 1 < BINS && left >= bins[bin] as usize {
            left -= bins[bin] as usize;
            bin += 1;
        }
        prefix = match shift {
            20 => bin as u32,
            9 => prefix << 11 | bin as u32,
            _ => prefix << 9 | (bin as u32 & 511),
        };
    }
    Ok((prefix, left + 1))
}

/// What of a whole matrix of `count` values stays when the `gone` smallest magnitudes go, as
/// [`super::keep_all_but_smallest`] finds them; what `protected` marks stays and has no rank.
///
/// # Errors
/// As [`Gpu::read`].
pub fn keep_largest(gpu: &Gpu, values: &Buffer, protected: Option<&Buffer>, count: usize, gone: usize) -> Result<Buffer> {
    let (threshold, ties) = match gone {
        0 => (0, 0),
        gone => cut(gpu, values, protected, count, gone - 1)?,
    };
    let workgroups = count.div_ceil(BINS);
    let (keep, none) = (gpu.empty(count.div_ceil(32)), gpu.empty(1));
    let counts = gpu.empty(workgroups);
    let stays = protected.unwrap_or(&none);
    let parameters = |second: u32| [count as u32, threshold, ties as u32, second, u32::from(protected.is_some())];
    gpu.launch(&KEEP_LARGEST, workgroups, &[values, &keep, &counts, stays], &parameters(0));
    let mut starts: Vec<u32> = gpu.read(&counts)?;
    let mut before = 0u32;
    for start in &mut starts {
        (*start, before) = (before, before + *start);
    }
    gpu.launch(&KEEP_LARGEST, workgroups, &[values, &keep, &gpu.upload(&starts), stays], &parameters(1));
    Ok(keep)
}

/// The entries of a mask of one row of `count`.
pub fn marked(words: &[u32], count: usize) -> Vec<bool> {
    (0..count).map(|at| words[at / 32] >> (at % 32) & 1 == 1).collect()
}

/// The words of a mask of one row.
pub fn words(marked: &[bool]) -> Vec<u32> {
    marked.chunks(32).map(|part| part.iter().enumerate().map(|(bit, &marked)| u32::from(marked) << bit).sum()).collect()
}
