// The grid of every group: a scale as it is stored, and a zero point. Twin of `fit` and `span` in src/kernels/quantize.rs.
//
// weights: rows × columns. ranges: per group its lower and upper end, where those are given. scales, zeros: one per group
// of a row. Eight threads per group; floats are compared by integers in their order.
@group(0) @binding(0) var<storage, read_write> weights: array<f32>;
@group(0) @binding(1) var<storage, read_write> ranges: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> scales: array<f32>;
@group(0) @binding(3) var<storage, read_write> zeros: array<u32>;
// rows, columns, group, bits, symmetric, format of scales (0 f32, 1 f16, 2 bf16), the scale that stands for one that would
// overflow, whether ranges are given
@group(0) @binding(4) var<storage, read_write> parameters: array<u32>;

var<workgroup> lows: array<i32, 64>;
var<workgroup> highs: array<i32, 64>;

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

fn key_of(value: f32) -> i32 {
    let bits = bitcast<i32>(value);
    return bits ^ ((bits >> 31u) & 0x7fffffff);
}

fn value_of(key: i32) -> f32 {
    return bitcast<f32>(key ^ ((key >> 31u) & 0x7fffffff));
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

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let rows = parameters[0];
    let columns = parameters[1];
    let group = parameters[2];
    let groups = (columns + group - 1u) / group;
    let at = (workgroup.y * workgroups.x + workgroup.x) * 8u + local / 8u;
    let lane = local % 8u;
    let row = at / groups;
    let first = at % groups * group;
    var end = min(first + group, columns);
    if (row >= rows || parameters[7] == 1u) {
        end = first;
    }
    var low = 0x7fffffff;
    var high = -0x7fffffff;
    for (var column = first + lane; column < end; column += 8u) {
        let key = key_of(weights[row * columns + column]);
        low = min(low, key);
        high = max(high, key);
    }
    lows[local] = low;
    highs[local] = high;
    workgroupBarrier();
    for (var half = 4u; half > 0u; half >>= 1u) {
        if (lane < half) {
            lows[local] = min(lows[local], lows[local + half]);
            highs[local] = max(highs[local], highs[local + half]);
        }
        workgroupBarrier();
    }
    if (lane != 0u || row >= rows) {
        return;
    }
    var range = vec2<f32>(value_of(lows[local]), value_of(highs[local]));
    if (parameters[7] == 1u) {
        range = ranges[at];
    }
    let bits = parameters[3];
    let middle = 1u << (bits - 1u);
    let limit = bitcast<f32>(parameters[6]);
    var scale = 1.0;
    var zero = middle;
    if (range.x != 0.0 || range.y != 0.0) {
        if (parameters[4] == 1u) {
            let extreme = select(range.x, range.y, range.y > -range.x);
            scale = decodable(stored_scale(quotient(extreme, -f32(middle)), parameters[5]), f32(middle), limit);
        } else {
            let top = f32((1u << bits) - 1u);
            let lower = min(range.x, 0.0);
            let upper = max(range.y, 0.0);
            scale = decodable(stored_scale(quotient(upper, top) - quotient(lower, top), parameters[5]), top, limit);
            zero = u32(clamp(round(quotient(-lower, scale)), 0.0, top));
        }
    }
    scales[at] = scale;
    zeros[at] = zero;
}
