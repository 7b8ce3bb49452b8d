// Marks all but the smallest scores of every row, ties by lower index. Twin of `smallest` in src/kernels/select.rs.
//
// values: rows × columns. The score of an entry is its magnitude times the factor of its column, where factors are in use;
// the bits of scores have their order. keep: rows × ⌈columns / 32⌉ words, the lowest bit first. One workgroup per row: three
// rounds over 11, 11 and 9 bits find the last score that goes and how many of its equals go with it; then 2048 entries at a time
// are judged by neighbours and gathered, a word by a thread.
@group(0) @binding(0) var<storage, read_write> values: array<f32>;
@group(0) @binding(1) var<storage, read_write> factors: array<f32>;
@group(0) @binding(2) var<storage, read_write> keep: array<u32>;
// rows, columns, count of smallest, whether factors are in use
@group(0) @binding(3) var<storage, read_write> parameters: array<u32>;

// First counts, 2048 of them. Then what becomes of entries, 33 to a word, which spreads words over the banks of the memory: 0 goes,
// 1 stays, 2 is a tie.
var<workgroup> bins: array<atomic<u32>, 2112>;
var<workgroup> prefix: u32;
var<workgroup> rank: u32;
var<workgroup> sums: array<u32, 64>;

fn score(row: u32, column: u32) -> u32 {
    var factor = 1.0;
    if (parameters[3] == 1u) {
        factor = factors[column];
    }
    return bitcast<u32>(min(abs(values[row + column]) * factor, 3.40282347e38));
}

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let rows = parameters[0];
    let columns = parameters[1];
    let count = min(parameters[2], columns);
    let row = group.y * groups.x + group.x;
    let inside = row < rows;
    let base = select(0u, row * columns, inside);
    if (local == 0u) {
        prefix = 0u;
        rank = max(count, 1u) - 1u;
    }
    for (var round = 0u; round < 3u; round++) {
        let shift = select(select(0u, 9u, round == 1u), 20u, round == 0u);
        let width = select(11u, 9u, round == 2u);
        for (var bin = local; bin < 2048u; bin += 64u) {
            atomicStore(&bins[bin], 0u);
        }
        workgroupBarrier();
        for (var i = local; i < columns; i += 64u) {
            let key = score(base, i);
            // What the rounds before left in play agrees with the prefix in all higher bits.
            if (round == 0u || (key >> (shift + width)) == prefix) {
                atomicAdd(&bins[(key >> shift) & ((1u << width) - 1u)], 1u);
            }
        }
        workgroupBarrier();
        // A thread has 32 bins; the one in whose bins the rank lies finds it.
        var mine = 0u;
        for (var bin = 0u; bin < 32u; bin++) {
            mine += atomicLoad(&bins[local * 32u + bin]);
        }
        sums[local] = mine;
        workgroupBarrier();
        var left = rank;
        var before = 0u;
        for (var i = 0u; i < local; i++) {
            before += sums[i];
        }
        let found = left >= before && left < before + mine;
        workgroupBarrier();
        if (found) {
            left -= before;
            var bin = local * 32u;
            while (left >= atomicLoad(&bins[bin])) {
                left -= atomicLoad(&bins[bin]);
                bin++;
            }
            rank = left;
            prefix = prefix << width | bin;
        }
        workgroupBarrier();
    }
    // `prefix` is now the key of the last score that goes; of its equals the first `rank + 1` go.
    let threshold = prefix;
    let going = select(rank + 1u, 0u, count == 0u);
    let words = (columns + 31u) / 32u;
    var seen = 0u;
    for (var first = 0u; first < words; first += 64u) {
        for (var i = local; i < 2048u; i += 64u) {
            let column = first * 32u + i;
            var is = 0u;
            if (column < columns) {
                let key = score(base, column);
                is = select(select(1u, 0u, key < threshold && count > 0u), 2u, key == threshold);
            }
            atomicStore(&bins[i / 32u * 33u + i % 32u], is);
        }
        workgroupBarrier();
        var mine = 0u;
        for (var bit = 0u; bit < 32u; bit++) {
            mine += u32(atomicLoad(&bins[local * 33u + bit]) == 2u);
        }
        sums[local] = mine;
        workgroupBarrier();
        var before = seen;
        for (var i = 0u; i < 64u; i++) {
            seen += sums[i];
            before += select(0u, sums[i], i < local);
        }
        var bits = 0u;
        for (var bit = 0u; bit < 32u; bit++) {
            let is = atomicLoad(&bins[local * 33u + bit]);
            bits |= u32(is == 1u || (is == 2u && before >= going)) << bit;
            before += u32(is == 2u);
        }
        if (inside && first + local < words) {
            keep[row * words + first + local] = bits;
        }
        workgroupBarrier();
    }
}
