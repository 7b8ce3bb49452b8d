// Marks all but the smallest scores of every block of a row, ties by lower index. Twin of `smallest_in_blocks` in
// src/kernels/select.rs.
//
// values: rows × columns. The score of an entry is its magnitude times the factor of its column, where factors are in use.
// keep: rows × ⌈columns / 32⌉ words, the lowest bit first. One workgroup per 64 words: neighbours
// judge neighbours, then a thread gathers each word.
@group(0) @binding(0) var<storage, read_write> values: array<f32>;
@group(0) @binding(1) var<storage, read_write> factors: array<f32>;
@group(0) @binding(2) var<storage, read_write> keep: array<u32>;
// rows, columns, how many of a block stay, block, whether factors are in use
@group(0) @binding(3) var<storage, read_write> parameters: array<u32>;

// 33 to a word, which spreads words over the banks of the memory.
var<workgroup> stays: array<u32, 2112>;

fn score(row: u32, column: u32) -> u32 {
    var factor = 1.0;
    if (parameters[4] == 1u) {
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
    let going = parameters[3] - parameters[2];
    let block = parameters[3];
    let words = (columns + 31u) / 32u;
    let first_word = (group.y * groups.x + group.x) * 64u;
    for (var i = local; i < 2048u; i += 64u) {
        let row = (first_word + i / 32u) / words;
        let column = (first_word + i / 32u) % words * 32u + i % 32u;
        var smaller = 0u;
        if (row < rows && column < columns) {
            let key = score(row * columns, column);
            let first = column / block * block;
            let end = min(first + block, columns);
            for (var other = first; other < end; other++) {
                let rival = score(row * columns, other);
                smaller += u32(rival < key || (rival == key && other < column));
            }
        }
        stays[i / 32u * 33u + i % 32u] = u32(smaller >= going);
    }
    workgroupBarrier();
    let at = first_word + local;
    if (at >= rows * words) {
        return;
    }
    var bits = 0u;
    for (var bit = 0u; bit < min(32u, columns - at % words * 32u); bit++) {
        bits |= stays[local * 33u + bit] << bit;
    }
    keep[at] = bits;
}
