// The scales of two trit-planes per group, by rounds of a ridge solve and an exact search. Twin of `Group::fit` in
// src/kernels/trits.rs, in f32 where that has f64.
//
// weights: rows × columns. importance: one per column, where in use. scales: α₁ and α₂ per group of a row, as stored.
// factors: per group the power of two that its weights are multiplied by. One thread per group.
@group(0) @binding(0) var<storage, read_write> weights: array<f32>;
@group(0) @binding(1) var<storage, read_write> importance: array<f32>;
@group(0) @binding(2) var<storage, read_write> scales: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> factors: array<f32>;
// rows, columns, group, tied, format of scales (0 f32, 1 f16, 2 bf16), the scale that stands for one that would overflow,
// rounds at most, ε, whether ε is absolute, whether the residual start is tried too, whether importance is in use
@group(0) @binding(4) var<storage, read_write> parameters: array<u32>;

const LARGEST: f32 = 3.4e38;
const BLOCK: u32 = 128u;

fn f16_rounded(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    let magnitude = bits & 0x7fffffffu;
    let sign = bits & 0x80000000u;
    // Below 2⁻¹⁴ the steps are 2⁻²⁴; above, ten bits of the fraction stay; beyond 65504 it stays there.
    let small = round(abs(x) * 16777216.0) * 5.9604645e-8;
    let large = (magnitude + 0xfffu + (magnitude >> 13u & 1u)) & 0xffffe000u;
    var rounded = select(large, bitcast<u32>(small), magnitude < 0x38800000u);
    rounded = select(rounded, 0x477fe000u, magnitude > 0x477fe000u);
    return bitcast<f32>(rounded | sign);
}

fn stored_scale(scale: f32, format: u32) -> f32 {
    let bits = bitcast<u32>(scale);
    var rounded = scale;
    var smallest = 0x00800000u;
    if (format == 1u) {
        rounded = f16_rounded(scale);
        smallest = 0x33800000u;
    } else if (format == 2u) {
        rounded = bitcast<f32>((bits + 0x7fffu + (bits >> 16u & 1u)) & 0xffff0000u);
    }
    let vanishes = (bitcast<u32>(rounded) & 0x7fffffffu) < smallest;
    return select(rounded, bitcast<f32>(smallest | (bits & 0x80000000u)), vanishes);
}

fn decodable(scale: f32, reach: f32, limit: f32) -> f32 {
    let product = bitcast<u32>(scale * reach) & 0x7f800000u;
    let stands = bitcast<f32>(bitcast<u32>(limit) | (bitcast<u32>(scale) & 0x80000000u));
    return select(scale, stands, product == 0x7f800000u);
}

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

// The power of two that brings a magnitude into 1..2.
fn factor_of(largest: u32) -> f32 {
    return bitcast<f32>((254u - clamp(largest >> 23u, 1u, 253u)) << 23u);
}

fn magnitude_bits(weight: f32) -> u32 {
    let bits = bitcast<u32>(weight) & 0x7fffffffu;
    return select(0u, bits, bits < 0x7f800000u);
}

// Importance and sum of magnitudes above each of four thresholds.
struct Above {
    counts: vec4<f32>,
    sums: vec4<f32>,
}

struct Group {
    // Place of the first weight, its column, and the number of weights.
    first: u32,
    column: u32,
    size: u32,
    factor: f32,
    // What importance is multiplied by to have a mean of one.
    unit: f32,
}

fn above_all(group: Group, thresholds: vec4<f32>, positive: bool) -> Above {
    var total = Above(vec4<f32>(0.0), vec4<f32>(0.0));
    for (var block = 0u; block < group.size; block += BLOCK) {
        var counts = vec4<f32>(0.0);
        var sums = vec4<f32>(0.0);
        for (var i = block; i < min(block + BLOCK, group.size); i++) {
            let weight = weights[group.first + i];
            let size = bitcast<f32>(magnitude_bits(weight)) * group.factor;
            var counted = 1.0;
            if (group.unit > 0.0) {
                counted = importance[group.column + i] * group.unit;
            }
            let over = vec4<f32>(size) > thresholds;
            let present = !positive || weight > 0.0;
            let ones = select(vec4<f32>(0.0), vec4<f32>(counted), over & vec4<bool>(present));
            counts += ones;
            sums += ones * size;
        }
        total.counts += counts;
        total.sums += sums;
    }
    return total;
}

// What lies between thresholds, by pair: (0, 1), (1, −1), (1, 0), (1, 1).
fn by_pair(above: Above, fine_first: bool) -> Above {
    let counts = vec4<f32>(above.counts.xyz - above.counts.yzw, above.counts.w);
    let sums = vec4<f32>(above.sums.xyz - above.sums.yzw, above.sums.w);
    if (fine_first) {
        return Above(counts, sums);
    }
    return Above(counts.yxzw, sums.yxzw);
}

fn ridge(found: Above) -> vec2<f32> {
    let n = found.counts;
    let s = found.sums;
    let n11 = n.y + n.z + n.w;
    let n22 = n.x + n.y + n.w;
    let n12 = n.w - n.y;
    let gram = n.x * n11 + n.y * n.z + 4.0 * n.y * n.w + n.z * n.w;
    let right = vec2<f32>(s.y + s.z + s.w, s.x - s.y + s.w);
    var lambda = 1e-8;
    var determinant = 0.0;
    loop {
        determinant = gram + lambda * (n11 + n22) + lambda * lambda;
        let norm = (n11 + lambda) * (n11 + lambda) + (n22 + lambda) * (n22 + lambda) + 2.0 * n12 * n12;
        if (norm <= 1e6 * determinant || lambda >= 1.0) {
            break;
        }
        lambda = min(10.0 * lambda, 1.0);
    }
    let difference = n12 * (right.x - right.y);
    let first = abs(((n22 - n12) * right.x + lambda * right.x + difference) / determinant);
    let second = abs(((n11 - n12) * right.y + lambda * right.y - difference) / determinant);
    return vec2<f32>(max(first, second), min(first, second));
}

fn tied_step(found: Above) -> vec2<f32> {
    let squares = dot(found.counts, vec4<f32>(1.0, 4.0, 9.0, 16.0));
    let products = dot(found.sums, vec4<f32>(1.0, 2.0, 3.0, 4.0));
    var step = 0.0;
    if (squares > 0.0) {
        step = products / squares;
    }
    return vec2<f32>(3.0 * step, step);
}

fn search(group: Group, pair: vec2<f32>) -> Above {
    let levels = levels_of(pair);
    return by_pair(above_all(group, levels.thresholds, false), levels.fine_first);
}

fn sign_start(group: Group, whole: Above, tied: bool) -> Above {
    let sign = Above(vec4<f32>(0.0, 0.0, 0.0, whole.counts.x), vec4<f32>(0.0, 0.0, 0.0, whole.sums.x));
    if (tied) {
        return sign;
    }
    let levels = levels_of(ridge(sign));
    var all = by_pair(above_all(group, levels.thresholds, false), levels.fine_first);
    let positive = by_pair(above_all(group, levels.thresholds, true), levels.fine_first);
    all.counts.z = all.counts.x - positive.counts.x;
    all.sums.z = all.sums.x - positive.sums.x;
    all.counts.x = positive.counts.x;
    all.sums.x = positive.sums.x;
    return all;
}

fn residual_start(group: Group, mean: f32) -> Above {
    let coarse = 0.7 * mean;
    let kept = above_all(group, vec4<f32>(coarse, LARGEST, LARGEST, LARGEST), false);
    let scale = kept.sums.x / max(kept.counts.x, 1e-30);
    let found = above_all(group, vec4<f32>(0.0, coarse, scale, LARGEST), false);
    let below = found.sums.x - found.sums.y;
    let lower_count = found.counts.y - found.counts.z;
    let lower_sum = found.sums.y - found.sums.z;
    let residual = below + (found.sums.z - scale * found.counts.z) + (scale * lower_count - lower_sum);
    let fine = 0.7 * residual / max(found.counts.x, 1e-30);
    let thresholds = vec4<f32>(min(fine, coarse), coarse, from_on(max(scale - fine, coarse)), scale + fine);
    return by_pair(above_all(group, thresholds, false), true);
}

fn store(pair: vec2<f32>, factor: f32) -> vec2<f32> {
    let found = min(pair / factor, vec2<f32>(LARGEST));
    if (parameters[3] == 0u) {
        return vec2<f32>(f16_rounded(found.x), f16_rounded(found.y));
    }
    if (found.y == 0.0) {
        return vec2<f32>(3.0, 1.0);
    }
    let fine = decodable(stored_scale(found.y, parameters[4]), 4.0, bitcast<f32>(parameters[5]));
    return vec2<f32>(3.0 * fine, fine);
}

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let columns = parameters[1];
    let width = parameters[2];
    let groups = (columns + width - 1u) / width;
    let at = (workgroup.y * workgroups.x + workgroup.x) * 64u + local;
    if (at >= parameters[0] * groups) {
        return;
    }
    let tied = parameters[3] == 1u;
    let column = at % groups * width;
    var group = Group(at / groups * columns + column, column, min(width, columns - column), 1.0, 0.0);
    var largest = 0u;
    var weighed = 0.0;
    for (var i = 0u; i < group.size; i++) {
        largest = max(largest, magnitude_bits(weights[group.first + i]));
        if (parameters[10] == 1u) {
            weighed += importance[column + i];
        }
    }
    group.factor = factor_of(largest);
    if (weighed > 0.0) {
        group.unit = f32(group.size) / weighed;
    }
    let whole = above_all(group, vec4<f32>(0.0, LARGEST, LARGEST, LARGEST), false);
    let mean = whole.sums.x / max(whole.counts.x, 1e-30);
    let epsilon = bitcast<f32>(parameters[7]) * select(mean, group.factor, parameters[8] == 1u);
    var best = vec2<f32>(0.0);
    var least = LARGEST;
    for (var start = 0u; start < 1u + parameters[9]; start++) {
        var found: Above;
        var rounds = parameters[6];
        if (start == 1u) {
            found = residual_start(group, mean);
        } else {
            found = sign_start(group, whole, tied);
            rounds -= select(1u, 0u, tied);
        }
        var pair = vec2<f32>(LARGEST);
        for (var round = 1u; ; round++) {
            var next: vec2<f32>;
            if (tied) {
                next = tied_step(found);
            } else {
                next = ridge(found);
            }
            let rests = all(abs(next - pair) < vec2<f32>(epsilon)) && length(next - pair) < epsilon;
            pair = next;
            if (rests || round >= rounds) {
                break;
            }
            found = search(group, pair);
        }
        let stored = store(pair, group.factor);
        var change = 0.0;
        if (parameters[9] == 1u) {
            let scaled = stored * group.factor;
            let after = search(group, scaled);
            let values = vec4<f32>(scaled.y, scaled.x - scaled.y, scaled.x, scaled.x + scaled.y);
            change = dot(values, values * after.counts - 2.0 * after.sums);
        }
        if (change < least) {
            best = stored;
            least = change;
        }
    }
    scales[at] = best;
    factors[at] = group.factor;
}
