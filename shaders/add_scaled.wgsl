// What matrix units gave, without its padding and its scales: written, added to floats, or added to pairs of floats. Twin of
// `multiplied` in src/kernels/linear/units.rs.
//
// product: floats, padded. left, right: bits of the largest magnitudes that the operands' scales are made from. high, low:
// rows × columns. One thread per entry.
@group(0) @binding(0) var<storage, read_write> product: array<f32>;
@group(0) @binding(1) var<storage, read_write> left: array<u32>;
@group(0) @binding(2) var<storage, read_write> right: array<u32>;
@group(0) @binding(3) var<storage, read_write> high: array<f32>;
@group(0) @binding(4) var<storage, read_write> low: array<f32>;
// rows, columns, columns of the product, first row of the outcome, what is done (0 written, 1 added, 2 added to a pair), zero
@group(0) @binding(5) var<storage, read_write> parameters: array<u32>;

// 2^(biased exponent − 141), which undoes the scale of `halve`.
fn unscaled(largest: u32) -> f32 {
    return bitcast<f32>((clamp(largest >> 23u, 15u, 254u) - 14u) << 23u);
}

// What no compiler sees through: the zero is none that it knows.
fn opaque(value: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(value) ^ parameters[5]);
}

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let columns = parameters[1];
    let at = (workgroup.y * workgroups.x + workgroup.x) * 64u + local;
    if (at >= parameters[0] * columns) {
        return;
    }
    let to = parameters[3] * columns + at;
    var value = opaque(product[at / columns * parameters[2] + at % columns] * unscaled(left[0]) * unscaled(right[0]));
    // What is no number has no half that says so.
    if (max(left[0], right[0]) >= 0x7f800000u) {
        value = bitcast<f32>(0x7fc00000u ^ parameters[5]);
    }
    if (parameters[4] == 0u) {
        high[to] = value;
        return;
    }
    let before = high[to];
    let total = before + value;
    high[to] = total;
    if (parameters[4] == 2u) {
        let part = opaque(total - before);
        low[to] += opaque(before - opaque(total - part)) + opaque(value - part);
    }
}
