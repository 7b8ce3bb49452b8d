// A Ŵᵀ straight from two trit-planes, for any shapes. Reference: `Trits::to_matrix`, then `linear` in src/kernels/linear.rs.
//
// a: m × k. codes: n × k, each 3·t₁ + t₂ + 4, four per word, the first lowest. scales: α₁ and α₂ per group of a row. c: m × n. One
// workgroup per tile of 64 × 64, one thread per 8 × 8.
@group(0) @binding(0) var<storage, read_write> a: array<f32>;
@group(0) @binding(1) var<storage, read_write> codes: array<u32>;
@group(0) @binding(2) var<storage, read_write> scales: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> c: array<f32>;
// m, n, k, group
@group(0) @binding(4) var<storage, read_write> parameters: array<u32>;

const TILE: u32 = 64u;
const DEPTH: u32 = 16u;
// Entries of a tile lie by depth; one more per depth keeps threads from waiting for each other.
const STRIDE: u32 = 65u;
var<workgroup> left: array<f32, 1040>;
var<workgroup> right: array<f32, 1040>;

// Four entries of a tile at a distance of eight.
fn four_left(place: u32) -> vec4<f32> {
    return vec4<f32>(left[place], left[place + 8u], left[place + 16u], left[place + 24u]);
}

fn four_right(place: u32) -> vec4<f32> {
    return vec4<f32>(right[place], right[place + 8u], right[place + 16u], right[place + 24u]);
}

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let m = parameters[0];
    let n = parameters[1];
    let k = parameters[2];
    let tiles = (n + TILE - 1u) / TILE;
    let at = group.y * groups.x + group.x;
    let first_row = at / tiles * TILE;
    let first_column = at % tiles * TILE;
    let row = local / 8u;
    let column = local % 8u;
    // Eight rows, two vectors each: columns at a distance of eight.
    var sums: array<vec4<f32>, 16>;
    for (var step = 0u; step < k; step += DEPTH) {
        for (var i = local; i < TILE * DEPTH; i += 64u) {
            let depth = step + i % DEPTH;
            let to = i % DEPTH * STRIDE + i / DEPTH;
            let l = first_row + i / DEPTH;
            let r = first_column + i / DEPTH;
            left[to] = 0.0;
            right[to] = 0.0;
            if (l < m && depth < k) {
                left[to] = a[l * k + depth];
            }
            if (r < n && depth < k) {
                let place = r * k + depth;
                let group_of = r * ((k + parameters[3] - 1u) / parameters[3]) + depth / parameters[3];
                let code = codes[place / 4u] >> (8u * (place % 4u)) & 255u;
                let pair = scales[group_of];
                right[to] = (f32(code / 3u) - 1.0) * pair.x + (f32(code % 3u) - 1.0) * pair.y;
            }
        }
        workgroupBarrier();
        for (var depth = 0u; depth < DEPTH; depth++) {
            let x0 = four_left(depth * STRIDE + row);
            let x1 = four_left(depth * STRIDE + row + 32u);
            let y0 = four_right(depth * STRIDE + column);
            let y1 = four_right(depth * STRIDE + column + 32u);
            sums[0] += x0.x * y0;
            sums[1] += x0.x * y1;
            sums[2] += x0.y * y0;
            sums[3] += x0.y * y1;
            sums[4] += x0.z * y0;
            sums[5] += x0.z * y1;
            sums[6] += x0.w * y0;
            sums[7] += x0.w * y1;
            sums[8] += x1.x * y0;
            sums[9] += x1.x * y1;
            sums[10] += x1.y * y0;
            sums[11] += x1.y * y1;
            sums[12] += x1.z * y0;
            sums[13] += x1.z * y1;
            sums[14] += x1.w * y0;
            sums[15] += x1.w * y1;
        }
        workgroupBarrier();
    }
    for (var i = 0u; i < 8u; i++) {
        for (var j = 0u; j < 8u; j++) {
            let r = first_row + row + 8u * i;
            let s = first_column + column + 8u * j;
            if (r < m && s < n) {
                c[r * n + s] = sums[i * 2u + j / 4u][j % 4u];
            }
        }
    }
}
