// The nearest level of every weight, as 3·t₁ + t₂ + 4. Twin of `assign` in src/kernels/trits.rs.
//
// weights: rows × columns. scales: α₁ and α₂, and factors the power of two, per group of a row. codes: four per word, the first
// lowest. sums: per workgroup the sums of squares of error and weight. One thread per word.
@group(0) @binding(0) var<storage, read_write> weights: array<f32>;
@group(0) @binding(1) var<storage, read_write> scales: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> factors: array<f32>;
@group(0) @binding(3) var<storage, read_write> codes: array<u32>;
@group(0) @binding(4) var<storage, read_write> sums: array<vec2<f32>>;
// rows, columns, group
@group(0) @binding(5) var<storage, read_write> parameters: array<u32>;

const LARGEST: f32 = 3.4e38;
var<workgroup> partial: array<vec2<f32>, 64>;

struct Levels {
    // A magnitude above this is nearer to the level of the same index, or to a later one, than to any earlier.
    thresholds: vec4<f32>,
    values: vec4<f32>,
    fine_first: bool,
}

// The f32 above which f32 numbers are at least `middle`.
fn from_on(middle: f32) -> f32 {
    let bits = bitcast<u32>(middle);
    return bitcast<f32>(bits - min(bits, 1u));
}

fn levels_of(scales: vec2<f32>) -> Levels {
    let coarse = scales.x;
    let fine = scales.y;
    let less = coarse - fine;
    let more = coarse + fine;
    let fine_first = fine < less;
    let low = min(fine, less);
    let high = max(fine, less);
    let first = 0.5 * low;
    var second = 0.5 * (low + high);
    var third = 0.5 * (high + coarse);
    let fourth = 0.5 * (coarse + more);
    second = select(from_on(second), second, fine_first);
    third = select(third, from_on(third), fine_first);
    var thresholds = vec4<f32>(first, second, third, fourth);
    if (coarse == 0.0) {
        thresholds = vec4<f32>(LARGEST);
    } else if (fine == 0.0) {
        thresholds = vec4<f32>(0.5 * coarse, 0.5 * coarse, 0.5 * coarse, LARGEST);
    } else if (less == 0.0) {
        thresholds = vec4<f32>(0.5 * fine, 0.5 * fine, fourth, fourth);
    } else if (low == high) {
        thresholds = vec4<f32>(first, first, third, fourth);
    }
    return Levels(thresholds, vec4<f32>(low, high, coarse, more), fine_first);
}

fn magnitude_bits(weight: f32) -> u32 {
    let bits = bitcast<u32>(weight) & 0x7fffffffu;
    return select(0u, bits, bits < 0x7f800000u);
}

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let columns = parameters[1];
    let count = parameters[0] * columns;
    let width = parameters[2];
    let groups = (columns + width - 1u) / width;
    let at = workgroup.y * workgroups.x + workgroup.x;
    let first = (at * 64u + local) * 4u;
    var word = 0u;
    var sum = vec2<f32>(0.0, 0.0);
    for (var i = 0u; i < 4u; i++) {
        let place = first + i;
        if (place < count) {
            let group = place / columns * groups + place % columns / width;
            let factor = factors[group];
            let levels = levels_of(scales[group] * factor);
            let weight = weights[place];
            let size = bitcast<f32>(magnitude_bits(weight)) * factor;
            var step = 0.0;
            var value = 0.0;
            let steps = select(vec4<f32>(2.0, 1.0, 3.0, 4.0), vec4<f32>(1.0, 2.0, 3.0, 4.0), levels.fine_first);
            for (var k = 0u; k < 4u; k++) {
                if (size > levels.thresholds[k]) {
                    step = steps[k];
                    value = levels.values[k];
                }
            }
            let code = u32(4.0 + select(step, -step, weight < 0.0));
            let error = (size - value) / factor;
            word |= code << (8u * i);
            sum += vec2<f32>(error * error, size * size / (factor * factor));
        }
    }
    partial[local] = sum;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half >>= 1u) {
        if (local < half) {
            partial[local] += partial[local + half];
        }
        workgroupBarrier();
    }
    if (first < count) {
        codes[first / 4u] = word;
        if (local == 0u) {
            sums[at] = partial[0];
        }
    }
}
