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
    var sums: array<f32, 64>;
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
            var x: array<f32, 8>;
            var y: array<f32, 8>;
            for (var i = 0u; i < 8u; i++) {
                x[i] = left[depth * STRIDE + row + 8u * i];
                y[i] = right[depth * STRIDE + column + 8u * i];
            }
            for (var i = 0u; i < 8u; i++) {
                for (var j = 0u; j < 8u; j++) {
                    sums[i * 8u + j] += x[i] * y[j];
                }
            }
        }
        workgroupBarrier();
    }
    for (var i = 0u; i < 8u; i++) {
        for (var j = 0u; j < 8u; j++) {
            let r = first_row + row + 8u * i;
            let s = first_column + column + 8u * j;
            if (r < m && s < n) {
                c[r * n + s] = sums[i * 8u + j];
            }
        }
    }
}
