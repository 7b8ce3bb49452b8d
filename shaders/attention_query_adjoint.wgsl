// The gradient of causal attention by its queries. Twin of `Attention::adjoint` in src/kernels/attention_adjoint.rs.
//
// q, upstream, dq: tokens × heads · d. k, v: tokens × kv_heads · d. pairs: tokens × heads, the normaliser that the forward
// wrote, and the product of a token's output and its upstream gradient. One workgroup per 8 queries of a head.
@group(0) @binding(0) var<storage, read_write> q: array<f32>;
@group(0) @binding(1) var<storage, read_write> k: array<f32>;
@group(0) @binding(2) var<storage, read_write> v: array<f32>;
@group(0) @binding(3) var<storage, read_write> pairs: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> upstream: array<f32>;
@group(0) @binding(5) var<storage, read_write> dq: array<f32>;
// windows, seq, heads, kv_heads, d, sliding window (0: none), scale, soft cap (0: none)
@group(0) @binding(6) var<storage, read_write> parameters: array<u32>;

const ROWS: u32 = 8u;
var<workgroup> queries: array<f32, 2048>;
var<workgroup> gradients: array<f32, 2048>;
var<workgroup> keys: array<f32, 1024>;
var<workgroup> values: array<f32, 1024>;
var<workgroup> slopes: array<f32, 256>;

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
        gradients[i] = 0.0;
        if (row < seq) {
            let from_place = (window + row) * heads * d + head_column + i % d;
            queries[i] = q[from_place];
            gradients[i] = upstream[from_place];
        }
    }
    let count = min(1024u / d, 32u);
    let row = local / 8u;
    let lane = local % 8u;
    var sums: array<f32, 32>;
    var start = 0u;
    if (parameters[5] > 0u && first + 1u > parameters[5]) {
        start = first + 1u - parameters[5];
    }
    let end = min(first + ROWS, seq);
    for (; start < end; start += count) {
        workgroupBarrier();
        for (var i = local; i < count * d; i += 64u) {
            let key = start + i / d;
            keys[i] = 0.0;
            values[i] = 0.0;
            if (key < seq) {
                let from_place = (window + key) * kv_heads * d + kv_column + i % d;
                keys[i] = k[from_place];
                values[i] = v[from_place];
            }
        }
        workgroupBarrier();
        for (var i = local; i < ROWS * count; i += 64u) {
            let query = i / count;
            let key = i % count;
            var slope = 0.0;
            if (first + query < seq && sees(first + query, start + key)) {
                var score = 0.0;
                var product = 0.0;
                for (var c = 0u; c < d; c++) {
                    score += queries[query * d + c] * keys[key * d + c];
                    product += gradients[query * d + c] * values[key * d + c];
                }
                slope = share_and_slope(score * scale, pairs[(window + first + query) * heads + head], product).y;
            }
            slopes[query * 32u + key] = slope;
        }
        workgroupBarrier();
        for (var c = lane; c < d; c += 8u) {
            var sum = sums[c / 8u];
            for (var key = 0u; key < count; key++) {
                sum += slopes[row * 32u + key] * keys[key * d + c];
            }
            sums[c / 8u] = sum;
        }
    }
    if (!inside || first + row >= seq) {
        return;
    }
    for (var c = lane; c < d; c += 8u) {
        dq[(window + first + row) * heads * d + head_column + c] = sums[c / 8u];
    }
}
