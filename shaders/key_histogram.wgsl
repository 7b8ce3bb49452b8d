// Counts the keys of a matrix by eleven of their bits. With the host's choice between the counts this finds the k-th
// smallest in three rounds. Twin of `cut` in src/kernels/select.rs.
//
// values: floats, whose key is the bits of the magnitude, or keys as they are; where keep is in use, only entries that it
// does not mark. bins: 2048 counts, which add up over launches. 64 entries per thread.
@group(0) @binding(0) var<storage, read_write> values: array<u32>;
@group(0) @binding(1) var<storage, read_write> keep: array<u32>;
@group(0) @binding(2) var<storage, read_write> bins: array<atomic<u32>, 2048>;
// count, shift of the bits, shift of the prefix (32: none), prefix, whether keep is in use
@group(0) @binding(3) var<storage, read_write> parameters: array<u32>;

var<workgroup> counts: array<atomic<u32>, 2048>;

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let count = parameters[0];
    let shift = parameters[1];
    let above = parameters[2];
    let prefix = parameters[3];
    for (var bin = local; bin < 2048u; bin += 64u) {
        atomicStore(&counts[bin], 0u);
    }
    workgroupBarrier();
    let first = (group.y * groups.x + group.x) * 4096u + local;
    for (var i = 0u; i < 64u; i++) {
        let at = first + i * 64u;
        if (at < count) {
            let key = values[at] & 0x7fffffffu;
            let free = parameters[4] == 0u || (keep[at / 32u] >> (at % 32u) & 1u) == 0u;
            if (free && (above >= 32u || (key >> above) == prefix)) {
                atomicAdd(&counts[(key >> shift) & 2047u], 1u);
            }
        }
    }
    workgroupBarrier();
    for (var bin = local; bin < 2048u; bin += 64u) {
        let counted = atomicLoad(&counts[bin]);
        if (counted > 0u) {
            atomicAdd(&bins[bin], counted);
        }
    }
}
