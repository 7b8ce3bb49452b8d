// Causal attention over packed windows, without a matrix of scores in memory. Twin of `Attention::run_cpu` in
// src/kernels/attention.rs.
//
// q, mixed: tokens × heads · d. k, v: tokens × kv_heads · d, with d a multiple of four. normaliser: tokens × heads, the logarithm of the sum of the
// exponentials of a row's scores, which the adjoints need. One thread per query of a head, without barriers: the threads of a
// workgroup read the same key at the same time, and what was summed shrinks when a larger score turns up.
@group(0) @binding(0) var<storage, read_write> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> mixed: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> normaliser: array<f32>;
// windows, seq, heads, kv_heads, d, sliding window (0: none), scale, soft cap (0: none)
@group(0) @binding(5) var<storage, read_write> parameters: array<u32>;

fn capped(score: f32) -> f32 {
    let cap = bitcast<f32>(parameters[7]);
    if (cap > 0.0) {
        return cap * tanh(score / cap);
    }
    return score;
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
    // Four floats at a time.
    let d = parameters[4] / 4u;
    let scale = bitcast<f32>(parameters[6]);
    let blocks = (seq + 63u) / 64u;
    let at = workgroup.y * workgroups.x + workgroup.x;
    let query = at % blocks * 64u + local;
    let head = at / blocks % heads;
    let window = at / blocks / heads;
    if (window >= parameters[0] || query >= seq) {
        return;
    }
    let token = window * seq + query;
    let column = token * heads * d + head * d;
    let kv_width = kv_heads * d;
    let kv_column = window * seq * kv_width + head / (heads / kv_heads) * d;
    var row: array<vec4<f32>, 64>;
    var sums: array<vec4<f32>, 64>;
    for (var c = 0u; c < d; c++) {
        row[c] = q[column + c] * scale;
    }
    var largest = -3e38;
    var total = 0.0;
    // The first key that the first query of the workgroup sees, so that all threads read the same one.
    var key = 0u;
    if (parameters[5] > 0u && query - local + 1u > parameters[5]) {
        key = query - local + 1u - parameters[5];
    }
    for (; key <= query; key++) {
        if (parameters[5] > 0u && query - key >= parameters[5]) {
            continue;
        }
        let place = kv_column + key * kv_width;
        var score = 0.0;
        for (var c = 0u; c < d; c++) {
            score += dot(row[c], k[place + c]);
        }
        score = capped(score);
        if (score > largest) {
            let shrink = exp(largest - score);
            total *= shrink;
            for (var c = 0u; c < d; c++) {
                sums[c] *= shrink;
            }
            largest = score;
        }
        let share = exp(score - largest);
        total += share;
        for (var c = 0u; c < d; c++) {
            sums[c] += share * v[place + c];
        }
    }
    for (var c = 0u; c < d; c++) {
        mixed[column + c] = sums[c] / total;
    }
    normaliser[token * heads + head] = largest + log(total);
}
