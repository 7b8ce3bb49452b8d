//! Selection of the smallest scores of a row, and of every block of a row. Scores are not negative, so the order of
//! their bits is the order of their values; on ties the lower index goes first.

pub mod gpu;

use rayon::prelude::*;

/// Calls `each` with the index of each of the `count` smallest of `scores`, in order of index.
pub fn smallest(scores: &[f32], count: usize, scratch: &mut Vec<u32>, mut each: impl FnMut(usize)) {
    if count == 0 {
        return;
    }
    if count >= scores.len() {
        (0..scores.len()).for_each(each);
        return;
    }
    scratch.clear();
    scratch.extend(scores.iter().map(|score| score.to_bits()));
    let (below, &mut threshold, _) = scratch.select_nth_unstable(count - 1);
    let mut ties = count - below.iter().filter(|&&bits| bits < threshold).count();
    for (index, score) in scores.iter().enumerate() {
        let bits = score.to_bits();
        if bits < threshold {
            each(index);
        } else if bits == threshold && ties > 0 {
            ties -= 1;
            each(index);
        }
    }
}

/// In every aligned block of `of` scores, calls `each` with the indices of the `of − kept` smallest.
pub fn smallest_in_blocks(scores: &[f32], kept: usize, of: usize, scratch: &mut Vec<u32>, mut each: impl FnMut(usize)) {
    for (block, scores) in scores.chunks(of).enumerate() {
        smallest(scores, of - kept, scratch, |index| each(block * of + index));
    }
}

/// The bits below which a key is among the `count` smallest, and how many of the keys that equal them still are; those
/// of lower index go first. Exact for any keys. `count` must not exceed their number.
pub fn cut(keys: &[u32], count: usize) -> (u32, usize) {
    /// Coarse bins: sign, exponent and four bits of the mantissa of a float.
    const SHIFT: u32 = 19;
    const CHUNK: usize = 1 << 18;
    if count == 0 {
        return (0, 0);
    }
    let histograms: Vec<Vec<u32>> = keys
        .par_chunks(CHUNK)
        .map(|keys| {
            let mut bins = vec![0u32; 1 << (32 - SHIFT)];
            keys.iter().for_each(|key| bins[(key >> SHIFT) as usize] = bins[(key >> SHIFT) as usize].wrapping_add(1));
            bins
        })
        .collect();
    let (mut bin, mut below) = (0, 0);
    loop {
        let inside: usize = histograms.iter().map(|bins| bins[bin] as usize).sum();
        if below + inside >= count {
            break;
        }
        (bin, below) = (bin + 1, below + inside);
    }
    let mut inside: Vec<u32> = keys.iter().copied().filter(|key| (key >> SHIFT) as usize == bin).collect();
    let rank = count - below;
    let (smaller, &mut threshold, _) = inside.select_nth_unstable(rank - 1);
    (threshold, rank - smaller.iter().filter(|&&key| key < threshold).count())
}

/// Marks as not kept the `count` smallest of the keys of a whole matrix, ties by lower index, and as kept the others.
pub fn keep_all_but_smallest(keys: &[u32], count: usize, keep: &mut [bool]) {
    let (threshold, mut ties) = cut(keys, count.min(keys.len()));
    keep.par_iter_mut().zip(keys).with_min_len(4096).for_each(|(keep, &key)| *keep = key >= threshold);
    for (keep, _) in keep.iter_mut().zip(keys).filter(|(_, key)| **key == threshold) {
        if ties == 0 {
            break;
        }
        *keep = false;
        ties -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picked(scores: &[f32], count: usize) -> Vec<usize> {
        let mut out = Vec::new();
        smallest(scores, count, &mut Vec::new(), |index| out.push(index));
        out
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(picked(&[1.0, 0.0, 1.0, 0.0, 1.0], 3), [0, 1, 3]);
        assert_eq!(picked(&[0.0; 4], 2), [0, 1]);
        assert_eq!(picked(&[3.0, 1.0], 0), Vec::<usize>::new());
        assert_eq!(picked(&[3.0, 1.0], 2), [0, 1]);
        assert_eq!(picked(&[f32::MAX, f32::MIN_POSITIVE, 1e-45], 1), [2]);
    }

    proptest::proptest! {
        #[test]
        fn the_selection_is_that_of_a_stable_sort(values in proptest::collection::vec(0u8..9, 1..60), share in 0.0f64..1.0) {
            let scores: Vec<f32> = values.iter().map(|&value| f32::from(value)).collect();
            let count = (scores.len() as f64 * share) as usize;
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
            let mut expected = order[..count].to_vec();
            expected.sort_unstable();
            proptest::prop_assert_eq!(picked(&scores, count), expected);
        }
    }

    proptest::proptest! {
        #[test]
        fn the_selection_of_a_whole_matrix_is_that_of_a_stable_sort(values in proptest::collection::vec(0u8..9, 1..60), share in 0.0f64..=1.0) {
            let keys: Vec<u32> = values.iter().map(|&value| (f32::from(value) * 0.3).to_bits()).collect();
            let count = (keys.len() as f64 * share) as usize;
            let mut order: Vec<usize> = (0..keys.len()).collect();
            order.sort_by_key(|&index| keys[index]);
            let mut keep = vec![false; keys.len()];
            keep_all_but_smallest(&keys, count, &mut keep);
            proptest::prop_assert!(order.iter().enumerate().all(|(rank, &index)| keep[index] == (rank >= count)));
        }
    }

    #[test]
    fn blocks_are_independent() {
        let mut out = Vec::new();
        smallest_in_blocks(&[4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], 1, 4, &mut Vec::new(), |index| out.push(index));
        assert_eq!(out, [1, 2, 3, 4, 5, 6]);
    }
}
