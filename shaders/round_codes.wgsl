// Rounds weights to the nearest code of their group's grid. Twin of `round_group` in src/kernels/quantize.rs.
//
// weights: rows × columns. scales, zeros: one per group of a row. codes: four per word, the first lowest. sums: per workgroup the
// sums of squares of error and weight. One thread per word.
@group(0) @binding(0) var<storage, read_write> weights: array<f32>;
@group(0) @binding(1) var<storage, read_write> scales: array<f32>;
@group(0) @binding(2) var<storage, read_write> zeros: array<u32>;
@group(0) @binding(3) var<storage, read_write> codes: array<u32>;
@group(0) @binding(4) var<storage, read_write> sums: array<vec2<f32>>;
// rows, columns, group, bits
@group(0) @binding(5) var<storage, read_write> parameters: array<u32>;

var<workgroup> partial: array<vec2<f32>, 64>;

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let columns = parameters[1];
    let count = parameters[0] * columns;
    let group = parameters[2];
    let groups = (columns + group - 1u) / group;
    let top = f32((1u << parameters[3]) - 1u);
    let at = workgroup.y * workgroups.x + workgroup.x;
    let first = (at * 64u + local) * 4u;
    var word = 0u;
    var sum = vec2<f32>(0.0, 0.0);
    for (var i = 0u; i < 4u; i++) {
        let place = first + i;
        if (place < count) {
            let grid = place / columns * groups + place % columns / group;
            let scale = scales[grid];
            let zero = f32(zeros[grid]);
            let weight = weights[place];
            let code = clamp(round(weight / scale) + zero, 0.0, top);
            let error = weight - (code - zero) * scale;
            word |= u32(code) << (8u * i);
            sum += vec2<f32>(error * error, weight * weight);
        }
    }
    partial[local] = sum;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half >>= 1u) {
        if (local < half) {
            partial[local] += partial[local + half];
        }
        workgroupBarrier();
    }
    if (first < count) {
        codes[first / 4u] = word;
        if (local == 0u) {
            sums[at] = partial[0];
        }
    }
}
