// The gradients of causal attention by its keys and values. Twin of `Attention::adjoint` in src/kernels/attention_adjoint.rs.
//
// q, upstream: tokens × heads · d. k, v, dk, dv: tokens × kv_heads · d. pairs: tokens × heads, the normaliser that the forward
// wrote, and the product of a token's output and its upstream gradient. A workgroup does 16 keys of a key-value head, four threads
// each, which share the columns, and sums over the queries of all heads that read them.
@group(0) @binding(0) var<storage, read_write> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> pairs: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> upstream: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> dk: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> dv: array<vec4<f32>>;
// windows, seq, heads, kv_heads, d, sliding window (0: none), scale, soft cap (0: none)
@group(0) @binding(7) var<storage, read_write> parameters: array<u32>;

// Vectors of four floats that a thread holds of a row. Whoever launches writes here what the rows need, so that they lie in
// registers.
const FOURS: u32 = 16u;
const WIDTH: u32 = 4u * FOURS;
// Queries at a time.
const QUERIES: u32 = min(8u, 64u / FOURS);
var<workgroup> queries: array<vec4<f32>, QUERIES * WIDTH>;
var<workgroup> gradients: array<vec4<f32>, QUERIES * WIDTH>;
// Scores, and products of values and upstream gradients, of every thread's columns.
var<workgroup> products: array<vec2<f32>, QUERIES * 64u>;

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
    let kv_head = at / blocks % kv_heads;
    let window = at / blocks / kv_heads;
    if (window >= parameters[0]) {
        return;
    }
    let times = heads / kv_heads;
    let key = first + local / 4u;
    let part = local % 4u;
    let column = (window * seq + min(key, seq - 1u)) * kv_heads * d + kv_head * d;
    var row: array<vec4<f32>, FOURS>;
    var value: array<vec4<f32>, FOURS>;
    var key_sums: array<vec4<f32>, FOURS>;
    var value_sums: array<vec4<f32>, FOURS>;
    for (var c = 0u; c < FOURS; c++) {
        let four = 4u * c + part;
        row[c] = vec4<f32>();
        value[c] = vec4<f32>();
        key_sums[c] = vec4<f32>();
        value_sums[c] = vec4<f32>();
        if (four < d) {
            row[c] = k[column + four];
            value[c] = v[column + four];
        }
    }
    // To the last query that sees the last key.
    var end = seq;
    if (parameters[5] > 0u) {
        end = min(seq, first + 15u + parameters[5]);
    }
    for (var head = kv_head * times; head < (kv_head + 1u) * times; head++) {
        for (var base = first; base < end; base += QUERIES) {
            workgroupBarrier();
            for (var i = local; i < QUERIES * WIDTH; i += 64u) {
                queries[i] = vec4<f32>();
                gradients[i] = vec4<f32>();
                if (base + i / WIDTH < end && i % WIDTH < d) {
                    let place = ((window * seq + base + i / WIDTH) * heads + head) * d + i % WIDTH;
                    queries[i] = q[place];
                    gradients[i] = upstream[place];
                }
            }
            workgroupBarrier();
            for (var j = 0u; j < QUERIES; j++) {
                var product = vec2<f32>();
                for (var c = 0u; c < FOURS; c++) {
                    let place = j * WIDTH + 4u * c + part;
                    product += vec2<f32>(dot(row[c], queries[place]), dot(value[c], gradients[place]));
                }
                products[64u * j + local] = product;
            }
            workgroupBarrier();
            for (var j = 0u; j < QUERIES; j++) {
                let query = base + j;
                let quad = 64u * j + local - part;
                let product = (products[quad] + products[quad + 1u]) + (products[quad + 2u] + products[quad + 3u]);
                let pair = pairs[(window * seq + min(query, seq - 1u)) * heads + head];
                let found = select(vec2<f32>(), share_and_slope(product.x * scale, pair, product.y), sees(query, key));
                for (var c = 0u; c < FOURS; c++) {
                    let place = j * WIDTH + 4u * c + part;
                    value_sums[c] += found.x * gradients[place];
                    key_sums[c] += found.y * queries[place];
                }
            }
        }
    }
    if (key >= seq) {
        return;
    }
    for (var c = 0u; c < FOURS; c++) {
        if (4u * c + part < d) {
            dk[column + 4u * c + part] = key_sums[c];
            dv[column + 4u * c + part] = value_sums[c];
        }
    }
}
