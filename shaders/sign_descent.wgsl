// Learned rounding: the signed step on offsets and on what is learned of the grid, then the fake-quantized weight. Twin of
// `Rounding::step` and `Rounding::quantize` in src/kernels/sign_descent.rs, which have the legend.
//
// base, offsets, gradient, quantized: rows × columns. learned, fixed: two floats per group of a row. An offset of NaN (its
// bits 0x7fc00000) marks a weight that stays zero. One workgroup per group; sums are made of 64 parts.
@group(0) @binding(0) var<storage, read_write> base: array<f32>;
@group(0) @binding(1) var<storage, read_write> offsets: array<u32>;
@group(0) @binding(2) var<storage, read_write> learned: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> fixed: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> gradient: array<f32>;
@group(0) @binding(5) var<storage, read_write> quantized: array<f32>;
// rows, columns, group, bits, symmetric, format of scales (0 f32, 1 f16, 2 bf16), start (0 range, 1 grid, 2 codes), whether
// to step, rate, rate of the grid
@group(0) @binding(6) var<storage, read_write> parameters: array<u32>;

const RANGE: u32 = 0u;
const CODES: u32 = 2u;
var<workgroup> parts: array<vec3<f32>, 64>;
var<workgroup> moved: vec2<f32>;

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

// Scale, zero point, what weights are divided by, and what is added to the rounded.
fn grid_of(learns: vec2<f32>, fixes: vec2<f32>) -> vec4<f32> {
    let start = parameters[6];
    let middle = f32(1u << (parameters[3] - 1u));
    let top = f32((1u << parameters[3]) - 1u);
    if (start != RANGE) {
        let scale = stored_scale(fixes.x * learns.x, parameters[5]);
        return select(vec4<f32>(scale, fixes.y, scale, fixes.y), vec4<f32>(scale, fixes.y, 1.0, 0.0), start == CODES);
    }
    if (fixes.x == 0.0 && fixes.y == 0.0) {
        return vec4<f32>(1.0, middle, 1.0, middle);
    }
    if (parameters[4] == 1u) {
        let low = -fixes.x * learns.x;
        let high = fixes.y * learns.y;
        let magnitude = quotient(max(low, high), middle);
        let scale = stored_scale(select(magnitude, -magnitude, high > low), parameters[5]);
        return vec4<f32>(scale, middle, scale, middle);
    }
    let scale = stored_scale(quotient(fixes.y * learns.y, top) - quotient(fixes.x * learns.x, top), parameters[5]);
    let zero = clamp(round(quotient(-fixes.x * learns.x, scale)), 0.0, top);
    return vec4<f32>(scale, zero, scale, zero);
}

// The slopes of what is learned, from Σ g·∂ŵ/∂s and Σ g over the entries clipped low and high.
fn slopes_of(fixes: vec2<f32>, learns: vec2<f32>, step: f32, sums: vec3<f32>) -> vec2<f32> {
    if (parameters[6] != RANGE) {
        return vec2<f32>(sums.x * fixes.x, 0.0);
    }
    let middle = f32(1u << (parameters[3] - 1u));
    let top = f32((1u << parameters[3]) - 1u);
    if (parameters[4] == 1u) {
        let right = fixes.y * learns.y > -fixes.x * learns.x;
        return select(vec2<f32>(sums.x * -fixes.x / middle, 0.0), vec2<f32>(0.0, -sums.x * fixes.y / middle), right);
    }
    let clipped = sums.y + sums.z;
    let scale = sums.x - clipped * fixes.x * learns.x / step;
    return vec2<f32>(clipped * fixes.x - scale * fixes.x / top, scale * fixes.y / top);
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
    let columns = parameters[1];
    let group = parameters[2];
    let groups = (columns + group - 1u) / group;
    let top = f32((1u << parameters[3]) - 1u);
    let rate = bitcast<f32>(parameters[8]);
    let grid_rate = bitcast<f32>(parameters[9]);
    let at = workgroup.y * workgroups.x + workgroup.x;
    let inside_matrix = at < parameters[0] * groups;
    let place = select(0u, at, inside_matrix);
    let row = place / groups * columns;
    let first = row + place % groups * group;
    let end = select(first, min(first + group, row + columns), inside_matrix);
    let old = grid_of(learned[place], fixed[place]);
    let through = select(1.0, 0.0, parameters[6] == CODES);
    let steps = parameters[7] == 1u;
    var sums = vec3<f32>(0.0, 0.0, 0.0);
    for (var i = select(end, first + local, steps); i < end; i += 64u) {
        let bits = offsets[i];
        let zero = (bits & 0x7fffffffu) > 0x7f800000u;
        let offset = bitcast<f32>(select(bits, 0u, zero));
        let exact = base[i] / old.z;
        let t = round(exact + offset) + old.w;
        let g = select(gradient[i], 0.0, zero);
        let low = select(0.0, 1.0, t < 0.0);
        let high = select(0.0, 1.0, t > top);
        let within = 1.0 - low - high;
        let code = select(clamp(t, 0.0, top), old.y, zero);
        sums += vec3<f32>(g * (code - old.y - through * within * exact), g * low, g * high);
        if (!zero) {
            offsets[i] = bitcast<u32>(offset - rate * sign(g * old.x * within));
        }
    }
    parts[local] = sums;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half >>= 1u) {
        if (local < half) {
            parts[local] += parts[local + half];
        }
        workgroupBarrier();
    }
    if (local == 0u) {
        moved = learned[place];
        if (steps && inside_matrix) {
            let slopes = slopes_of(fixed[place], moved, old.x, parts[0]);
            var least = 0.0;
            var most = 1.0;
            if (parameters[6] == CODES) {
                least = 0.5;
                most = 1.2;
            } else if (parameters[6] != RANGE) {
                most = 2.0;
            }
            moved = clamp(moved - grid_rate * sign(slopes), vec2<f32>(least), vec2<f32>(most));
            learned[place] = moved;
        }
    }
    workgroupBarrier();
    let grid = grid_of(moved, fixed[place]);
    for (var i = first + local; i < end; i += 64u) {
        let bits = offsets[i];
        let zero = (bits & 0x7fffffffu) > 0x7f800000u;
        let offset = bitcast<f32>(select(bits, 0u, zero));
        let code = clamp(round(base[i] / grid.z + offset) + grid.w, 0.0, top);
        quantized[i] = select((code - grid.y) * grid.x, 0.0, zero);
    }
}
