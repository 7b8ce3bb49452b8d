// A matrix in halves for matrix units, scaled by the power of two that brings its largest magnitude to 2¹⁴..2¹⁵, as it is or
// transposed, and padded with zeros. Twin of `halved` in src/kernels/linear/units.rs.
//
// A half holds 11 bits of a float; what it leaves is a half of its own. With parts 1 a row is the high halves; with 2, as the
// left operand of a product of three parts, high, low, high; with 3, as the right one, high, high, low.
//
// x: floats. largest: bits of their largest magnitude. halves: two per word. A workgroup does 32 × 32 entries.
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> largest: array<u32>;
@group(0) @binding(2) var<storage, read_write> halves: array<u32>;
// rows and columns of the halves, both padded, and of what is not zero; number of the first float, distance of floats from row
// to row and from column to column, parts
@group(0) @binding(3) var<storage, read_write> parameters: array<u32>;

// Rounded to what a half holds by whole numbers: adapters may pack by dropping digits.
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

const SIDE: u32 = 32u;
const STRIDE: u32 = 33u;
var<workgroup> tile: array<f32, 1056>;

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let columns = parameters[1];
    let tiles = columns / SIDE;
    let at = workgroup.y * workgroups.x + workgroup.x;
    let first_row = at / tiles * SIDE;
    let first_column = at % tiles * SIDE;
    let inside = first_row < parameters[0];
    let transposed = parameters[5] == 1u;
    // 2^(141 − biased exponent), within what a float can be.
    let exponent = clamp(largest[0] >> 23u, 15u, 254u);
    let scale = bitcast<f32>((268u - exponent) << 23u);
    for (var i = local; i < SIDE * SIDE; i += 64u) {
        let slow = i / SIDE;
        let fast = i % SIDE;
        let row = select(slow, fast, transposed);
        let column = select(fast, slow, transposed);
        let r = first_row + row;
        let c = first_column + column;
        var value = 0.0;
        if (r < parameters[2] && c < parameters[3]) {
            value = x[parameters[4] + r * parameters[5] + c * parameters[6]] * scale;
        }
        tile[row * STRIDE + column] = value;
    }
    workgroupBarrier();
    if (!inside) {
        return;
    }
    let parts = parameters[7];
    let width = columns / 2u;
    let row_words = width * select(1u, 3u, parts > 1u);
    for (var i = local; i < SIDE * SIDE / 2u; i += 64u) {
        let row = i / 16u;
        let column = i % 16u;
        let pair = vec2<f32>(tile[row * STRIDE + 2u * column], tile[row * STRIDE + 2u * column + 1u]);
        let near = vec2<f32>(f16_rounded(pair.x), f16_rounded(pair.y));
        let high = pack2x16float(near);
        let to = (first_row + row) * row_words + first_column / 2u + column;
        halves[to] = high;
        if (parts > 1u) {
            let rest = pair - near;
            let low = pack2x16float(vec2<f32>(f16_rounded(rest.x), f16_rounded(rest.y)));
            halves[to + width] = select(high, low, parts == 2u);
            halves[to + 2u * width] = select(low, high, parts == 2u);
        }
    }
}
