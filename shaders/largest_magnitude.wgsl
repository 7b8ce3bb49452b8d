// The largest magnitude of a matrix, by its bits. Twin of the maximum in `halved` in
// src/kernels/linear/units.rs.
//
// x: floats. largest: one word, zero before. A workgroup looks at 4096 floats.
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> largest: array<atomic<u32>>;
// number of the first float, their count
@group(0) @binding(2) var<storage, read_write> parameters: array<u32>;

var<workgroup> parts: array<u32, 64>;

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let count = parameters[1];
    let first = (workgroup.y * workgroups.x + workgroup.x) * 4096u + local;
    var most = 0u;
    for (var i = 0u; i < 64u; i++) {
        let at = first + 64u * i;
        if (at < count) {
            most = max(most, bitcast<u32>(x[parameters[0] + at]) & 0x7fffffffu);
        }
    }
    parts[local] = most;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half >>= 1u) {
        if (local < half) {
            parts[local] = max(parts[local], parts[local + half]);
        }
        workgroupBarrier();
    }
    if (local == 0u) {
        atomicMax(&largest[0], parts[0]);
    }
}
