// Rounds weights to the nearest code of their group's grid. Twin of `round_group` in src/kernels/quantize.rs.
//
// weights: rows × columns. scales, zeros: one per group of a row. codes: four per word, the first lowest. sums: per workgroup the
// sums of squares of error and weight. A thread does four words, 64 apart, so that neighbouring threads
// do neighbouring words.
@group(0) @binding(0) var<storage, read_write> weights: array<f32>;
@group(0) @binding(1) var<storage, read_write> scales: array<f32>;
@group(0) @binding(2) var<storage, read_write> zeros: array<u32>;
@group(0) @binding(3) var<storage, read_write> codes: array<u32>;
@group(0) @binding(4) var<storage, read_write> sums: array<vec2<f32>>;
// rows, columns, group, bits
@group(0) @binding(5) var<storage, read_write> parameters: array<u32>;

var<workgroup> partial: array<vec2<f32>, 64>;

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
    let columns = parameters[1];
    let count = parameters[0] * columns;
    let group = parameters[2];
    let groups = (columns + group - 1u) / group;
    let top = f32((1u << parameters[3]) - 1u);
    let at = workgroup.y * workgroups.x + workgroup.x;
    var sum = vec2<f32>(0.0, 0.0);
    for (var round = 0u; round < 4u; round++) {
        let first = (at * 256u + round * 64u + local) * 4u;
        if (first >= count) {
            break;
        }
        let row = first / columns;
        var column = first - row * columns;
        var grid = row * groups + column / group;
        var inside = column % group;
        var word = 0u;
        for (var i = 0u; i < min(4u, count - first); i++) {
            let scale = scales[grid];
            let zero = f32(zeros[grid]);
            let weight = weights[first + i];
            let code = clamp(nearest(weight, scale) + zero, 0.0, top);
            let error = weight - (code - zero) * scale;
            word |= u32(code) << (8u * i);
            sum += vec2<f32>(error * error, weight * weight);
            column++;
            inside++;
            // The next group, and the next row where this one ends.
            let next = inside == group || column == columns;
            grid += u32(next);
            inside = select(inside, 0u, next);
            column = select(column, 0u, column == columns);
        }
        codes[first / 4u] = word;
    }
    partial[local] = sum;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half >>= 1u) {
        if (local < half) {
            partial[local] += partial[local + half];
        }
        workgroupBarrier();
    }
    if (local == 0u && at * 1024u < count) {
        sums[at] = partial[0];
    }
}
