// Marks what a whole matrix keeps: magnitudes above a threshold, and those equal to it but the first few. Twin of
// `keep_all_but_smallest` in src/kernels/select.rs.
//
// values: floats. keep: ⌈count / 32⌉ words. ties: per workgroup of 2048 entries, in the first pass the count of entries at the
// threshold, in the second those before the workgroup. Where protected entries are in use, marked ones stay.
@group(0) @binding(0) var<storage, read_write> values: array<u32>;
@group(0) @binding(1) var<storage, read_write> keep: array<u32>;
@group(0) @binding(2) var<storage, read_write> ties: array<u32>;
@group(0) @binding(3) var<storage, read_write> fixed_words: array<u32>;
// count, threshold, how many at the threshold go, whether this is the second pass, whether protected is in use
@group(0) @binding(4) var<storage, read_write> parameters: array<u32>;

var<workgroup> counts: array<u32, 64>;

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let count = parameters[0];
    let threshold = parameters[1];
    let going = parameters[2];
    let workgroup = group.y * groups.x + group.x;
    let word = workgroup * 64u + local;
    let first = word * 32u;
    var stays = 0u;
    if (parameters[4] != 0u && first < count) {
        stays = fixed_words[word];
    }
    var mine = 0u;
    if (first < count) {
        for (var bit = 0u; bit < min(32u, count - first); bit++) {
            let key = values[first + bit] & 0x7fffffffu;
            mine += u32(key == threshold && (stays >> bit & 1u) == 0u);
        }
    }
    counts[local] = mine;
    workgroupBarrier();
    var before = 0u;
    for (var i = 0u; i < local; i++) {
        before += counts[i];
    }
    if (parameters[3] == 0u) {
        if (local == 63u && workgroup * 2048u < count) {
            ties[workgroup] = before + mine;
        }
        return;
    }
    if (first >= count) {
        return;
    }
    before += ties[workgroup];
    var bits = 0u;
    for (var bit = 0u; bit < min(32u, count - first); bit++) {
        let key = values[first + bit] & 0x7fffffffu;
        let protects = (stays >> bit & 1u) == 1u;
        let tie = key == threshold && !protects;
        let goes = !protects && (key < threshold || (tie && before < going));
        before += u32(tie);
        bits |= u32(!goes) << bit;
    }
    keep[word] = bits;
}
