// Histograms of sampled core weights, as they are and rounded at each of 26 clip ratios. Twin of the counts in `divergences` in
// src/kernels/precalibrate.rs, whose divergences are then formed from them.
//
// weights: the core weights of sampled groups, each in equal room. sizes: how many each group has. ranges: lower and upper end of
// each whole group. counts: 27 × 2048, the exact histogram first. One workgroup per group and histogram.
@group(0) @binding(0) var<storage, read_write> weights: array<f32>;
@group(0) @binding(1) var<storage, read_write> sizes: array<u32>;
@group(0) @binding(2) var<storage, read_write> ranges: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> counts: array<atomic<u32>>;
// groups, room of a group in weights, bits, symmetric, format of scales (0 f32, 1 f16, 2 bf16), the scale that stands for one
// that would overflow, bins per unit of weight
@group(0) @binding(4) var<storage, read_write> parameters: array<u32>;

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

fn ratio(index: u32) -> f32 {
    return 0.02 * f32(50u - index);
}

// Scale, and the lowest and the highest step from the zero point.
fn span(low: f32, high: f32) -> vec3<f32> {
    let bits = parameters[2];
    let middle = f32(1u << (bits - 1u));
    let top = f32((1u << bits) - 1u);
    let limit = bitcast<f32>(parameters[5]);
    if (low == 0.0 && high == 0.0) {
        return vec3<f32>(1.0, -middle, top - middle);
    }
    if (parameters[3] == 1u) {
        let extreme = select(low, high, high > -low);
        return vec3<f32>(decodable(stored_scale(quotient(extreme, -middle), parameters[4]), middle, limit), -middle, top - middle);
    }
    let scale = decodable(stored_scale(quotient(high, top) - quotient(low, top), parameters[4]), top, limit);
    let zero = clamp(round(quotient(-low, scale)), 0.0, top);
    return vec3<f32>(scale, -zero, top - zero);
}

// a / b as it is defined, for any finite b but zero: an adapter's own division may be off by some units in the last place, and
// lose the quotient by a huge number. The estimate is mended by the exact remainder.
fn quotient(a: f32, b: f32) -> f32 {
    let over = parts_of(a);
    let under = parts_of(b);
    let sign = (bitcast<u32>(a) ^ bitcast<u32>(b)) & 0x80000000u;
    if (over.x == 0) {
        return bitcast<f32>(sign);
    }
    // 25 bits of the quotient, the last for rounding.
    let shift = select(25u, 24u, over.x >= under.x);
    let divisor = u32(under.x);
    var found = u32(f32(over.x) / f32(under.x) * f32(1u << shift));
    var remainder = bitcast<i32>((u32(over.x) << shift) - found * divisor);
    while (remainder < 0) {
        found -= 1u;
        remainder += under.x;
    }
    while (remainder >= under.x) {
        found += 1u;
        remainder -= under.x;
    }
    let exponent = over.y - under.y + 151 - i32(shift);
    if (exponent >= 255) {
        return bitcast<f32>(sign | 0x7f800000u);
    }
    let drop = u32(clamp(2 - exponent, 1, 26));
    let whole = found >> drop;
    let rest = found & ((1u << drop) - 1u);
    let half = 1u << (drop - 1u);
    let up = rest > half || (rest == half && (remainder != 0 || (whole & 1u) == 1u));
    let bits = whole + select(0u, 1u, up) + (u32(max(exponent, 1) - 1) << 23u);
    return bitcast<f32>(sign | bits);
}

// The 24 bits of a number's magnitude, the highest set, and its exponent.
fn parts_of(x: f32) -> vec2<i32> {
    let magnitude = bitcast<u32>(x) & 0x7fffffffu;
    let fraction = magnitude & 0x7fffffu;
    if (magnitude >= 0x800000u) {
        return vec2<i32>(i32(fraction | 0x800000u), i32(magnitude >> 23u));
    }
    if (fraction == 0u) {
        return vec2<i32>(0, 0);
    }
    let shift = 23u - firstLeadingBit(fraction);
    return vec2<i32>(i32(fraction << shift), 1 - i32(shift));
}

// The whole number nearest to weight / scale, ties to even, where it is not far outside 0..255.
fn nearest(weight: f32, scale: f32) -> f32 {
    let near = weight / scale;
    let doubtful = abs(abs(near - trunc(near)) - 0.5) < 1e-3 || !(abs(scale) > 1e-30 && abs(scale) < 1e30);
    if (doubtful) {
        return round(quotient(weight, scale));
    }
    return round(near);
}

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let at = workgroup.y * workgroups.x + workgroup.x;
    let group = at / 27u;
    let histogram = at % 27u;
    if (group >= parameters[0]) {
        return;
    }
    let bins = bitcast<f32>(parameters[6]);
    let range = ranges[group];
    var grid = vec3<f32>(1.0, 0.0, 0.0);
    if (histogram > 0u) {
        grid = span(range.x * ratio(histogram - 1u), range.y * ratio(histogram - 1u));
    }
    let first = group * parameters[1];
    for (var i = local; i < sizes[group]; i += 64u) {
        var value = weights[first + i];
        if (histogram > 0u) {
            value = clamp(nearest(value, grid.x), grid.y, grid.z) * grid.x;
        }
        let bin = clamp(i32(floor(value * bins)), -1024, 1023) + 1024;
        atomicAdd(&counts[histogram * 2048u + u32(bin)], 1u);
    }
}
