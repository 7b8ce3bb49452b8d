// Marks all but the smallest scores of every row, ties by lower index. Twin of `smallest` in src/kernels/select.rs.
//
// values: rows × columns. The score of an entry is its magnitude times the factor of its column, where factors are in use;
// the bits of scores have their order. keep: rows × ⌈columns / 32⌉ words, the lowest bit first. One workgroup per row: four rounds over eight bits each find the last score that goes and how many
// of its equals go with it.
@group(0) @binding(0) var<storage, read_write> values: array<f32>;
@group(0) @binding(1) var<storage, read_write> factors: array<f32>;
@group(0) @binding(2) var<storage, read_write> keep: array<u32>;
// rows, columns, count of smallest, whether factors are in use
@group(0) @binding(3) var<storage, read_write> parameters: array<u32>;

var<workgroup> bins: array<atomic<u32>, 256>;
var<workgroup> prefix: u32;
var<workgroup> rank: u32;
var<workgroup> ties: array<u32, 64>;

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
    for (var round = 0u; round < 4u; round++) {
        let shift = 24u - 8u * round;
        for (var bin = local; bin < 256u; bin += 64u) {
            atomicStore(&bins[bin], 0u);
        }
        workgroupBarrier();
        for (var i = local; i < columns; i += 64u) {
            let key = score(base, i);
            // What the rounds before left in play agrees with the prefix in all higher bits.
            if (round == 0u || (key >> (shift + 8u)) == prefix) {
                atomicAdd(&bins[(key >> shift) & 255u], 1u);
            }
        }
        workgroupBarrier();
        if (local == 0u) {
            var bin = 0u;
            var left = rank;
            while (bin < 255u && left >= atomicLoad(&bins[bin])) {
                left -= atomicLoad(&bins[bin]);
                bin++;
            }
            rank = left;
            prefix = prefix << 8u | bin;
        }
        workgroupBarrier();
    }
    // `prefix` is now the key of the last score that goes; of its equals the first `rank + 1` go.
    let threshold = prefix;
    let going = select(rank + 1u, 0u, count == 0u);
    let words = (columns + 31u) / 32u;
    let span = (words + 63u) / 64u;
    let begin = min(local * span, words);
    let to = min(begin + span, words);
    var mine = 0u;
    for (var i = begin * 32u; i < min(to * 32u, columns); i++) {
        mine += u32(score(base, i) == threshold);
    }
    ties[local] = mine;
    workgroupBarrier();
    var before = 0u;
    for (var i = 0u; i < local; i++) {
        before += ties[i];
    }
    if (!inside) {
        return;
    }
    for (var word = begin; word < to; word++) {
        var bits = 0u;
        for (var bit = 0u; bit < min(32u, columns - word * 32u); bit++) {
            let key = score(base, word * 32u + bit);
            let tie = key == threshold;
            let goes = count > 0u && (key < threshold || (tie && before < going));
            before += u32(tie);
            bits |= u32(!goes) << bit;
        }
        keep[row * words + word] = bits;
    }
}
