// The gradients of causal attention by its keys and values. Twin of `Attention::adjoint` in src/kernels/attention_adjoint.rs.
//
// q, upstream: tokens × heads · d. k, v, dk, dv: tokens × kv_heads · d. pairs: tokens × heads, the normaliser that the forward
// wrote, and the product of a token's output and its upstream gradient. One thread per key of a key-value head, which sums over
// the queries of all heads that read it, without barriers.
@group(0) @binding(0) var<storage, read_write> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> pairs: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> upstream: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> dk: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> dv: array<vec4<f32>>;
// windows, seq, heads, kv_heads, d, sliding window (0: none), scale, soft cap (0: none)
@group(0) @binding(7) var<storage, read_write> parameters: array<u32>;

fn capped(score: f32) -> f32 {
    let cap = bitcast<f32>(parameters[7]);
    if (cap > 0.0) {
        return cap * tanh(score / cap);
    }
    return score;
}

// The share of a key in a query's sum, and the slope of the loss by their raw score.
fn share_and_slope(raw: f32, pair: vec2<f32>, product: f32) -> vec2<f32> {
    let score = capped(raw);
    let cap = bitcast<f32>(parameters[7]);
    let share = exp(score - pair.x);
    var bend = 1.0;
    if (cap > 0.0) {
        bend = 1.0 - (score / cap) * (score / cap);
    }
    return vec2<f32>(share, share * (product - pair.y) * bend * bitcast<f32>(parameters[6]));
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
    let first = at % blocks * 64u;
    let key = first + local;
    let kv_head = at / blocks % kv_heads;
    let window = at / blocks / kv_heads;
    if (window >= parameters[0] || key >= seq) {
        return;
    }
    let times = heads / kv_heads;
    let column = (window * seq + key) * kv_heads * d + kv_head * d;
    var row: array<vec4<f32>, 64>;
    var value: array<vec4<f32>, 64>;
    var key_sums: array<vec4<f32>, 64>;
    var value_sums: array<vec4<f32>, 64>;
    for (var c = 0u; c < d; c++) {
        row[c] = k[column + c];
        value[c] = v[column + c];
    }
    var end = seq;
    if (parameters[5] > 0u) {
        end = min(seq, key + parameters[5]);
    }
    for (var head = kv_head * times; head < (kv_head + 1u) * times; head++) {
        // From the first key of the workgroup on, so that all threads read the same query.
        for (var query = first; query < end; query++) {
            if (query < key) {
                continue;
            }
            let token = window * seq + query;
            let place = token * heads * d + head * d;
            var score = 0.0;
            var product = 0.0;
            for (var c = 0u; c < d; c++) {
                score += dot(row[c], q[place + c]);
                product += dot(value[c], upstream[place + c]);
            }
            let found = share_and_slope(score * scale, pairs[token * heads + head], product);
            for (var c = 0u; c < d; c++) {
                value_sums[c] += found.x * upstream[place + c];
                key_sums[c] += found.y * q[place + c];
            }
        }
    }
    for (var c = 0u; c < d; c++) {
        dk[column + c] = key_sums[c];
        dv[column + c] = value_sums[c];
    }
}
