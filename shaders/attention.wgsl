// Causal attention over packed windows, without a matrix of scores in memory. Twin of `Attention::run_cpu` in
// src/kernels/attention.rs.
//
// q, mixed: tokens × heads · d. k, v: tokens × kv_heads · d, with d a multiple of four, at most 16 · FOURS. normaliser: tokens ×
// heads, the logarithm of the sum of the exponentials of a row's scores, which the adjoints need. A workgroup does 16 queries of a
// head, four threads each, which share the columns. Keys and then values pass through its memory, some at a time; what was summed
// shrinks when a larger score turns up.
@group(0) @binding(0) var<storage, read_write> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> mixed: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> normaliser: array<f32>;
// windows, seq, heads, kv_heads, d, sliding window (0: none), scale, soft cap (0: none)
@group(0) @binding(5) var<storage, read_write> parameters: array<u32>;

// Vectors of four floats that a thread holds of a row. Whoever launches writes here what the rows need, so that they lie in
// registers.
const FOURS: u32 = 16u;
const WIDTH: u32 = 4u * FOURS;
// Keys at a time.
const KEYS: u32 = min(16u, 128u / FOURS);
var<workgroup> tile: array<vec4<f32>, KEYS * WIDTH>;
var<workgroup> scores: array<f32, KEYS * 64u>;

fn capped(score: f32) -> f32 {
    let cap = bitcast<f32>(parameters[7]);
    if (cap > 0.0) {
        return cap * tanh(score / cap);
    }
    return score;
}

// Whether a query reads a key.
fn sees(query: u32, key: u32) -> bool {
    return key <= query && query < parameters[1] && (parameters[5] == 0u || query - key < parameters[5]);
}

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let seq = parameters[1];
    let heads = parameters[2];
    let kv_heads = parameters[3];
    // Vectors of four.
    let d = parameters[4] / 4u;
    let scale = bitcast<f32>(parameters[6]);
    let blocks = (seq + 15u) / 16u;
    let at = workgroup.y * workgroups.x + workgroup.x;
    let first = at % blocks * 16u;
    let head = at / blocks % heads;
    let window = at / blocks / heads;
    if (window >= parameters[0]) {
        return;
    }
    let query = first + local / 4u;
    let part = local % 4u;
    let token = window * seq + min(query, seq - 1u);
    let column = token * heads * d + head * d;
    let kv_width = kv_heads * d;
    let kv_column = window * seq * kv_width + head / (heads / kv_heads) * d;
    var row: array<vec4<f32>, FOURS>;
    var sums: array<vec4<f32>, FOURS>;
    for (var c = 0u; c < FOURS; c++) {
        let four = 4u * c + part;
        row[c] = vec4<f32>();
        sums[c] = vec4<f32>();
        if (four < d) {
            row[c] = q[column + four] * scale;
        }
    }
    var largest = -3e38;
    var total = 0.0;
    // From the first key that the first query sees to the last that the last one sees.
    var start = 0u;
    if (parameters[5] > 0u && first + 1u > parameters[5]) {
        start = first + 1u - parameters[5];
    }
    let end = min(first + 16u, seq);
    for (var base = start; base < end; base += KEYS) {
        workgroupBarrier();
        for (var i = local; i < KEYS * WIDTH; i += 64u) {
            tile[i] = vec4<f32>();
            if (base + i / WIDTH < end && i % WIDTH < d) {
                tile[i] = k[kv_column + (base + i / WIDTH) * kv_width + i % WIDTH];
            }
        }
        workgroupBarrier();
        for (var j = 0u; j < KEYS; j++) {
            var score = 0.0;
            for (var c = 0u; c < FOURS; c++) {
                score += dot(row[c], tile[j * WIDTH + 4u * c + part]);
            }
            scores[64u * j + local] = score;
        }
        workgroupBarrier();
        for (var i = local; i < KEYS * WIDTH; i += 64u) {
            tile[i] = vec4<f32>();
            if (base + i / WIDTH < end && i % WIDTH < d) {
                tile[i] = v[kv_column + (base + i / WIDTH) * kv_width + i % WIDTH];
            }
        }
        var shares: array<f32, KEYS>;
        var peak = largest;
        for (var j = 0u; j < KEYS; j++) {
            let quad = 64u * j + local - part;
            shares[j] = capped((scores[quad] + scores[quad + 1u]) + (scores[quad + 2u] + scores[quad + 3u]));
            if (sees(query, base + j)) {
                peak = max(peak, shares[j]);
            }
        }
        let shrink = exp(largest - peak);
        largest = peak;
        total *= shrink;
        for (var j = 0u; j < KEYS; j++) {
            shares[j] = select(0.0, exp(shares[j] - peak), sees(query, base + j));
            total += shares[j];
        }
        for (var c = 0u; c < FOURS; c++) {
            sums[c] *= shrink;
        }
        workgroupBarrier();
        for (var j = 0u; j < KEYS; j++) {
            for (var c = 0u; c < FOURS; c++) {
                sums[c] += shares[j] * tile[j * WIDTH + 4u * c + part];
            }
        }
    }
    if (query >= seq) {
        return;
    }
    for (var c = 0u; c < FOURS; c++) {
        if (4u * c + part < d) {
            mixed[column + 4u * c + part] = sums[c] / total;
        }
    }
    if (part == 0u) {
        normaliser[token * heads + head] = largest + log(total);
    }
}
