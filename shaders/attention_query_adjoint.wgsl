// The gradient of causal attention by its queries. Twin of `Attention::adjoint` in src/kernels/attention_adjoint.rs.
//
// q, upstream, dq: tokens × heads · d. k, v: tokens × kv_heads · d. pairs: tokens × heads, the normaliser that the forward
// wrote, and the product of a token's output and its upstream gradient. A workgroup does 16 queries of a head, four threads each,
// which share the columns, as in the forward.
@group(0) @binding(0) var<storage, read_write> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> pairs: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> upstream: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> dq: array<vec4<f32>>;
// windows, seq, heads, kv_heads, d, sliding window (0: none), scale, soft cap (0: none)
@group(0) @binding(6) var<storage, read_write> parameters: array<u32>;

// Vectors of four floats that a thread holds of a row. Whoever launches writes here what the rows need, so that they lie in
// registers.
const FOURS: u32 = 16u;
const WIDTH: u32 = 4u * FOURS;
// Keys at a time.
const KEYS: u32 = min(8u, 64u / FOURS);
var<workgroup> keys: array<vec4<f32>, KEYS * WIDTH>;
var<workgroup> values: array<vec4<f32>, KEYS * WIDTH>;
// Scores, and products of values and upstream gradients, of every thread's columns.
var<workgroup> products: array<vec2<f32>, KEYS * 64u>;

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
    let pair = pairs[token * heads + head];
    var row: array<vec4<f32>, FOURS>;
    var gradient: array<vec4<f32>, FOURS>;
    var sums: array<vec4<f32>, FOURS>;
    for (var c = 0u; c < FOURS; c++) {
        let four = 4u * c + part;
        row[c] = vec4<f32>();
        gradient[c] = vec4<f32>();
        sums[c] = vec4<f32>();
        if (four < d) {
            row[c] = q[column + four];
            gradient[c] = upstream[column + four];
        }
    }
    var start = 0u;
    if (parameters[5] > 0u && first + 1u > parameters[5]) {
        start = first + 1u - parameters[5];
    }
    let end = min(first + 16u, seq);
    for (var base = start; base < end; base += KEYS) {
        workgroupBarrier();
        for (var i = local; i < KEYS * WIDTH; i += 64u) {
            keys[i] = vec4<f32>();
            values[i] = vec4<f32>();
            if (base + i / WIDTH < end && i % WIDTH < d) {
                let place = kv_column + (base + i / WIDTH) * kv_width + i % WIDTH;
                keys[i] = k[place];
                values[i] = v[place];
            }
        }
        workgroupBarrier();
        for (var j = 0u; j < KEYS; j++) {
            var product = vec2<f32>();
            for (var c = 0u; c < FOURS; c++) {
                let place = j * WIDTH + 4u * c + part;
                product += vec2<f32>(dot(row[c], keys[place]), dot(gradient[c], values[place]));
            }
            products[64u * j + local] = product;
        }
        workgroupBarrier();
        for (var j = 0u; j < KEYS; j++) {
            let quad = 64u * j + local - part;
            let product = (products[quad] + products[quad + 1u]) + (products[quad + 2u] + products[quad + 3u]);
            let slope = select(0.0, share_and_slope(product.x * scale, pair, product.y).y, sees(query, base + j));
            for (var c = 0u; c < FOURS; c++) {
                sums[c] += slope * keys[j * WIDTH + 4u * c + part];
            }
        }
    }
    if (query >= seq) {
        return;
    }
    for (var c = 0u; c < FOURS; c++) {
        if (4u * c + part < d) {
            dq[column + 4u * c + part] = sums[c];
        }
    }
}
