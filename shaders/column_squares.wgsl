// Sums of squares of every column over 64 tokens. Twin of `add_column_squares` in src/kernels/gram.rs.
//
// x: tokens × columns. sums: ⌈tokens / 64⌉ × columns. One thread per sum, in the order of the tokens.
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> sums: array<f32>;
// tokens, columns
@group(0) @binding(2) var<storage, read_write> parameters: array<u32>;

const TOKENS: u32 = 64u;

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let tokens = parameters[0];
    let columns = parameters[1];
    let at = (group.y * groups.x + group.x) * 64u + local;
    let chunk = at / columns;
    let column = at % columns;
    if (chunk * TOKENS >= tokens) {
        return;
    }
    let last = min(tokens, (chunk + 1u) * TOKENS);
    var sum = 0.0;
    for (var token = chunk * TOKENS; token < last; token++) {
        let value = x[token * columns + column];
        sum += value * value;
    }
    sums[at] = sum;
}
