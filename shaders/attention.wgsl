// Causal attention over packed windows, without a matrix of scores in memory. Twin of `Attention::run_cpu` in
// src/kernels/attention.rs.
//
// q, mixed: tokens × heads · d. k, v: tokens × kv_heads · d. normaliser: tokens × heads, the logarithm of the sum of the
// exponentials of a row's scores, which the adjoints need. One workgroup per 16 queries of a head; keys come in tiles,
// and what was summed shrinks when a larger score turns up.
@group(0) @binding(0) var<storage, read_write> q: array<f32>;
@group(0) @binding(1) var<storage, read_write> k: array<f32>;
@group(0) @binding(2) var<storage, read_write> v: array<f32>;
@group(0) @binding(3) var<storage, read_write> mixed: array<f32>;
@group(0) @binding(4) var<storage, read_write> normaliser: array<f32>;
// windows, seq, heads, kv_heads, d, sliding window (0: none), scale, soft cap (0: none)
@group(0) @binding(5) var<storage, read_write> parameters: array<u32>;

const ROWS: u32 = 16u;
const HIDDEN: f32 = -3e38;
var<workgroup> queries: array<f32, 4096>;
var<workgroup> tile: array<f32, 2048>;
var<workgroup> scores: array<f32, 512>;
var<workgroup> largest: array<f32, 16>;
var<workgroup> total: array<f32, 16>;
var<workgroup> shrink: array<f32, 16>;

fn capped(score: f32) -> f32 {
    let cap = bitcast<f32>(parameters[7]);
    if (cap > 0.0) {
        return cap * tanh(score / cap);
    }
    return score;
}

fn sees(query: u32, key: u32) -> bool {
    return key <= query && (parameters[5] == 0u || query - key < parameters[5]);
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
    let d = parameters[4];
    let scale = bitcast<f32>(parameters[6]);
    let blocks = (seq + ROWS - 1u) / ROWS;
    let at = workgroup.y * workgroups.x + workgroup.x;
    let inside = at < parameters[0] * heads * blocks;
    let place = select(0u, at, inside);
    let first = place % blocks * ROWS;
    let head = place / blocks % heads;
    let window = place / blocks / heads * seq;
    let head_column = head * d;
    let kv_column = head / (heads / kv_heads) * d;
    for (var i = local; i < ROWS * d; i += 64u) {
        let row = first + i / d;
        queries[i] = 0.0;
        if (row < seq) {
            queries[i] = q[(window + row) * heads * d + head_column + i % d];
        }
    }
    if (local < ROWS) {
        largest[local] = HIDDEN;
        total[local] = 0.0;
    }
    let keys = min(2048u / d, 32u);
    let row = local / 4u;
    let lane = local % 4u;
    var sums: array<f32, 64>;
    var start = 0u;
    if (parameters[5] > 0u && first + 1u > parameters[5]) {
        start = first + 1u - parameters[5];
    }
    let end = min(first + ROWS, seq);
    for (; start < end; start += keys) {
        workgroupBarrier();
        for (var i = local; i < keys * d; i += 64u) {
            let key = start + i / d;
            tile[i] = 0.0;
            if (key < seq) {
                tile[i] = k[(window + key) * kv_heads * d + kv_column + i % d];
            }
        }
        workgroupBarrier();
        for (var i = local; i < ROWS * keys; i += 64u) {
            let query = i / keys;
            let key = i % keys;
            var score = 0.0;
            for (var c = 0u; c < d; c++) {
                score += queries[query * d + c] * tile[key * d + c];
            }
            scores[query * 32u + key] = select(HIDDEN, capped(score * scale), sees(first + query, start + key));
        }
        workgroupBarrier();
        if (local < ROWS) {
            var most = largest[local];
            for (var key = 0u; key < keys; key++) {
                most = max(most, scores[local * 32u + key]);
            }
            var sum = 0.0;
            for (var key = 0u; key < keys; key++) {
                let score = scores[local * 32u + key];
                let share = select(exp(score - most), 0.0, score == HIDDEN);
                scores[local * 32u + key] = share;
                sum += share;
            }
            shrink[local] = exp(largest[local] - most);
            total[local] = total[local] * shrink[local] + sum;
            largest[local] = most;
        }
        for (var i = local; i < keys * d; i += 64u) {
            let key = start + i / d;
            tile[i] = 0.0;
            if (key < seq) {
                tile[i] = v[(window + key) * kv_heads * d + kv_column + i % d];
            }
        }
        workgroupBarrier();
        for (var c = lane; c < d; c += 4u) {
            var sum = sums[c / 4u] * shrink[row];
            for (var key = 0u; key < keys; key++) {
                sum += scores[row * 32u + key] * tile[key * d + c];
            }
            sums[c / 4u] = sum;
        }
    }
    if (!inside || first + row >= seq) {
        return;
    }
    let token = window + first + row;
    for (var c = lane; c < d; c += 4u) {
        mixed[token * heads * d + head_column + c] = sums[c / 4u] / total[row];
    }
    if (lane == 0u) {
        normaliser[token * heads + head] = largest[row] + log(total[row]);
    }
}
