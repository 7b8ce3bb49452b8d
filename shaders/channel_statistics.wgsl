// Mean of every channel over tokens, and its variance. Twin of `channels` in src/methods/norm_tweak.rs.
//
// values: tokens × width. mean, variance: one per channel. One workgroup per channel; sums are made of 64 parts, twice: the
// second pass over the differences from the mean.
@group(0) @binding(0) var<storage, read_write> values: array<f32>;
@group(0) @binding(1) var<storage, read_write> mean: array<f32>;
@group(0) @binding(2) var<storage, read_write> variance: array<f32>;
// tokens, width
@group(0) @binding(3) var<storage, read_write> parameters: array<u32>;

var<workgroup> parts: array<f32, 64>;

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let tokens = parameters[0];
    let width = parameters[1];
    let channel = workgroup.y * workgroups.x + workgroup.x;
    let place = min(channel, width - 1u);
    var centre = 0.0;
    for (var pass_number = 0u; pass_number < 2u; pass_number++) {
        var sum = 0.0;
        for (var token = local; token < tokens; token += 64u) {
            let value = values[token * width + place] - centre;
            sum += select(value * value, value, pass_number == 0u);
        }
        parts[local] = sum;
        workgroupBarrier();
        for (var half = 32u; half > 0u; half >>= 1u) {
            if (local < half) {
                parts[local] += parts[local + half];
            }
            workgroupBarrier();
        }
        let total = parts[0];
        workgroupBarrier();
        if (pass_number == 0u) {
            centre = total / f32(tokens);
        } else if (local == 0u && channel < width) {
            mean[channel] = centre;
            variance[channel] = total / max(f32(tokens) - 1.0, 1.0);
        }
    }
}
