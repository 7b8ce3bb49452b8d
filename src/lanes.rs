//! Loops that the compiler turns into vector instructions of whatever width the processor has, with the same result
//! at every width.

/// Runs a closure compiled for the widest vector instructions of the processor. The closure must be `inline(always)`
/// code; its arithmetic is the same at every width.
#[inline(always)]
pub fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// Sum of `term` over a slice in sixteen fixed lanes: the same value at every vector width.
#[inline(always)]
pub fn sum_lanes(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for (total, &value) in lanes.iter_mut().zip(chunk) {
            *total += term(value);
        }
    }
    for (total, &value) in lanes.iter_mut().zip(rest) {
        *total += term(value);
    }
    add_up(lanes)
}

/// Sum of the products of two slices of one length in sixteen fixed lanes.
#[inline(always)]
pub fn dot_lanes(left: &[f32], right: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (left, left_rest) = left.as_chunks::<16>();
    let (right, right_rest) = right.as_chunks::<16>();
    for (left, right) in left.iter().zip(right) {
        for ((total, &left), &right) in lanes.iter_mut().zip(left).zip(right) {
            *total += left * right;
        }
    }
    for ((total, &left), &right) in lanes.iter_mut().zip(left_rest).zip(right_rest) {
        *total += left * right;
    }
    add_up(lanes)
}

#[inline(always)]
fn add_up(mut lanes: [f32; 16]) -> f32 {
    let mut width = 8;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Largest value of a slice; −∞ of an empty one.
#[inline(always)]
pub fn maximum(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for (highest, &value) in lanes.iter_mut().zip(chunk) {
            *highest = if value > *highest { value } else { *highest };
        }
    }
    for (highest, &value) in lanes.iter_mut().zip(rest) {
        *highest = if value > *highest { value } else { *highest };
    }
    let mut width = 8;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = if lanes[lane + width] > lanes[lane] { lanes[lane + width] } else { lanes[lane] };
        }
        width /= 2;
    }
    lanes[0]
}
