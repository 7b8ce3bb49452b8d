// Marks all but the smallest scores of every block of a row, ties by lower index. Twin of `smallest_in_blocks` in
// src/kernels/select.rs.
//
// values: rows × columns. The score of an entry is its magnitude times the factor of its column, where factors are in use.
// keep: rows × ⌈columns / 32⌉ words, the lowest bit first. One thread per word.
@group(0) @binding(0) var<storage, read_write> values: array<f32>;
@group(0) @binding(1) var<storage, read_write> factors: array<f32>;
@group(0) @binding(2) var<storage, read_write> keep: array<u32>;
// rows, columns, how many of a block stay, block, whether factors are in use
@group(0) @binding(3) var<storage, read_write> parameters: array<u32>;

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
    let at = (group.y * groups.x + group.x) * 64u + local;
    let row = at / words;
    let word = at % words;
    if (row >= rows) {
        return;
    }
    var bits = 0u;
    for (var bit = 0u; bit < min(32u, columns - word * 32u); bit++) {
        let column = word * 32u + bit;
        let key = score(row * columns, column);
        let first = column / block * block;
        let end = min(first + block, columns);
        var smaller = 0u;
        for (var other = first; other < end; other++) {
            let rival = score(row * columns, other);
            smaller += u32(rival < key || (rival == key && other < column));
        }
        bits |= u32(smaller >= going) << bit;
    }
    keep[at] = bits;
}
