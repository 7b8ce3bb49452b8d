// Adds YᵀX to totals that are kept as unevaluated sums of two floats. Twin of `add_gram` and `add_cross` in
// src/kernels/gram.rs.
//
// y, x: tokens × their widths, of which rows and columns are a part. high, low: rows × columns; of a Gram matrix, where y is x,
// only the tiles on and right of the diagonal are written. One workgroup per tile of 32 × 32, one thread per 4 × 4; products of one
// launch add up in f32.
@group(0) @binding(0) var<storage, read_write> y: array<f32>;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> high: array<f32>;
@group(0) @binding(3) var<storage, read_write> low: array<f32>;
// tokens, rows, columns, first row in y, first column in x, width of y, width of x, whether it is a Gram matrix, zero
@group(0) @binding(4) var<storage, read_write> parameters: array<u32>;

const TILE: u32 = 32u;
const DEPTH: u32 = 16u;
var<workgroup> left: array<f32, 512>;
var<workgroup> right: array<f32, 512>;

// The same float. Drivers cancel what is added and subtracted again, and cannot when a parameter stands between.
fn opaque(value: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(value) ^ parameters[8]);
}

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let tokens = parameters[0];
    let rows = parameters[1];
    let columns = parameters[2];
    let tiles = (columns + TILE - 1u) / TILE;
    let at = group.y * groups.x + group.x;
    let tile_row = at / tiles;
    let tile_column = at % tiles;
    let wanted = tile_row * TILE < rows && (parameters[7] == 0u || tile_column >= tile_row);
    let row = local / 8u * 4u;
    let column = local % 8u * 4u;
    var sums: array<f32, 16>;
    let steps = select(0u, (tokens + DEPTH - 1u) / DEPTH, wanted);
    for (var step = 0u; step < steps; step++) {
        for (var i = local; i < TILE * DEPTH; i += 64u) {
            let token = step * DEPTH + i / TILE;
            let l = tile_row * TILE + i % TILE;
            let r = tile_column * TILE + i % TILE;
            left[i] = 0.0;
            right[i] = 0.0;
            if (token < tokens && l < rows) {
                left[i] = y[token * parameters[5] + parameters[3] + l];
            }
            if (token < tokens && r < columns) {
                right[i] = x[token * parameters[6] + parameters[4] + r];
            }
        }
        workgroupBarrier();
        for (var k = 0u; k < DEPTH; k++) {
            let a = vec4<f32>(
                left[k * TILE + row], left[k * TILE + row + 1u], left[k * TILE + row + 2u], left[k * TILE + row + 3u]);
            let b = vec4<f32>(
                right[k * TILE + column], right[k * TILE + column + 1u], right[k * TILE + column + 2u], right[k * TILE + column + 3u]);
            for (var i = 0u; i < 4u; i++) {
                for (var j = 0u; j < 4u; j++) {
                    sums[i * 4u + j] += a[i] * b[j];
                }
            }
        }
        workgroupBarrier();
    }
    if (!wanted) {
        return;
    }
    for (var i = 0u; i < 16u; i++) {
        let r = tile_row * TILE + row + i / 4u;
        let c = tile_column * TILE + column + i % 4u;
        if (r < rows && c < columns) {
            // The sum of two floats and what it lost (Knuth).
            let place = r * columns + c;
            let old = high[place];
            let total = opaque(old + sums[i]);
            let moved = opaque(total - old);
            low[place] += (old - (total - moved)) + (sums[i] - moved);
            high[place] = total;
        }
    }
}
