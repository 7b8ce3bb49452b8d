// The gradient of causal attention by its queries. Twin of `Attention::adjoint` in src/kernels/attention_adjoint.rs.
//
// q, upstream, dq: tokens × heads · d. k, v: tokens × kv_heads · d. pairs: tokens × heads, the normaliser that the forward
// wrote, and the product of a token's output and its upstream gradient. One thread per query of a head, without barriers.
@group(0) @binding(0) var<storage, read_write> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> pairs: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> upstream: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> dq: array<vec4<f32>>;
// windows, seq, heads, kv_heads, d, sliding window (0: none), scale, soft cap (0: none)
@group(0) @binding(6) var<storage, read_write> parameters: array<u32>;

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
    let pair = pairs[token * heads + head];
    var row: array<vec4<f32>, 64>;
    var gradient: array<vec4<f32>, 64>;
    var sums: array<vec4<f32>, 64>;
    for (var c = 0u; c < d; c++) {
        row[c] = q[column + c];
        gradient[c] = upstream[column + c];
    }
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
        var product = 0.0;
        for (var c = 0u; c < d; c++) {
            score += dot(row[c], k[place + c]);
            product += dot(gradient[c], v[place + c]);
        }
        let slope = share_and_slope(score * scale, pair, product).y;
        for (var c = 0u; c < d; c++) {
            sums[c] += slope * k[place + c];
        }
    }
    for (var c = 0u; c < d; c++) {
        dq[column + c] = sums[c];
    }
}
