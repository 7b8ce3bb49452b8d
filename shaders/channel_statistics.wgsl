// Mean of every channel over 64 tokens, and the sum of squared differences from it; the processor puts the pieces together. Twin
// of `channels` in src/kernels/channels.rs.
//
// values: tokens × width. pieces: ⌈tokens / 64⌉ × width pairs. One thread per pair, in the order of the tokens, twice.
@group(0) @binding(0) var<storage, read_write> values: array<f32>;
@group(0) @binding(1) var<storage, read_write> pieces: array<vec2<f32>>;
// tokens, width
@group(0) @binding(2) var<storage, read_write> parameters: array<u32>;

const TOKENS: u32 = 64u;

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let tokens = parameters[0];
    let width = parameters[1];
    let at = (workgroup.y * workgroups.x + workgroup.x) * 64u + local;
    let first = at / width * TOKENS;
    let channel = at % width;
    if (first >= tokens) {
        return;
    }
    let end = min(first + TOKENS, tokens);
    let origin = values[first * width + channel];
    var sum = 0.0;
    for (var token = first; token < end; token++) {
        sum += values[token * width + channel] - origin;
    }
    let mean = sum / f32(end - first);
    var squares = 0.0;
    for (var token = first; token < end; token++) {
        let difference = values[token * width + channel] - origin - mean;
        squares += difference * difference;
    }
    pieces[at] = vec2<f32>(origin + mean, squares);
}
