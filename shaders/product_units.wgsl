// C = A Bᵀ of halves on matrix units of 16 × 16 × 16, summed in floats. Twin of `multiplied` in
// src/kernels/linear/units.rs.
//
// a: m × k, b: n × k halves, four per entry; c: m × n floats; m and n multiples of 128, k of 64. One workgroup of eight subgroups
// of 32 threads per 128 × 128 entries, each subgroup 64 × 32 of them. While one step of 64 along k is multiplied from workgroup
// memory, the next lies in registers already. Matrix units must be reached by all threads alike, so a workgroup that has
// nothing to do goes through no step, and one beyond the matrix repeats the first.
enable f16;
enable wgpu_cooperative_matrix;

alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

@group(0) @binding(0) var<storage, read_write> a: array<vec4<f16>>;
@group(0) @binding(1) var<storage, read_write> b: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read_write> c: array<f32>;
// m, n, k, first place along k, steps of 64 along k, whether only tiles on and above the diagonal are wanted
@group(0) @binding(3) var<storage, read_write> parameters: array<u32>;

// Entries of four halves from row to row: 16 and a gap, which spreads rows over the banks of the memory.
const STRIDE: u32 = 18u;
var<workgroup> left: array<vec4<f16>, 2304>;
var<workgroup> right: array<vec4<f16>, 2304>;

@compute @workgroup_size(256, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let n = parameters[1];
    let across = parameters[2] / 4u;
    let tiles = n / 128u;
    let number = workgroup.y * workgroups.x + workgroup.x;
    let at = select(0u, number, number < parameters[0] / 128u * tiles);
    let first_row = at / tiles * 128u;
    let first_column = at % tiles * 128u;
    let steps = select(parameters[4], 0u, parameters[5] == 1u && first_column < first_row);
    // This subgroup's part of the tile.
    let row = local / 128u * 64u;
    let column = local / 32u % 4u * 32u;
    // This thread carries one column of fours, rows 16 apart.
    let carried = local / 16u;
    let four = local % 16u;
    let to = carried * STRIDE + four;
    let down = 16u * across;
    var from_a = (first_row + carried) * across + parameters[3] / 4u + four;
    var from_b = (first_column + carried) * across + parameters[3] / 4u + four;

    var a0 = a[from_a];
    var a1 = a[from_a + down];
    var a2 = a[from_a + 2u * down];
    var a3 = a[from_a + 3u * down];
    var a4 = a[from_a + 4u * down];
    var a5 = a[from_a + 5u * down];
    var a6 = a[from_a + 6u * down];
    var a7 = a[from_a + 7u * down];
    var b0 = b[from_b];
    var b1 = b[from_b + down];
    var b2 = b[from_b + 2u * down];
    var b3 = b[from_b + 3u * down];
    var b4 = b[from_b + 4u * down];
    var b5 = b[from_b + 5u * down];
    var b6 = b[from_b + 6u * down];
    var b7 = b[from_b + 7u * down];

    var sums00 = Sums();
    var sums01 = Sums();
    var sums10 = Sums();
    var sums11 = Sums();
    var sums20 = Sums();
    var sums21 = Sums();
    var sums30 = Sums();
    var sums31 = Sums();
    for (var step = 0u; step < steps; step++) {
        workgroupBarrier();
        left[to] = a0;
        left[to + 16u * STRIDE] = a1;
        left[to + 32u * STRIDE] = a2;
        left[to + 48u * STRIDE] = a3;
        left[to + 64u * STRIDE] = a4;
        left[to + 80u * STRIDE] = a5;
        left[to + 96u * STRIDE] = a6;
        left[to + 112u * STRIDE] = a7;
        right[to] = b0;
        right[to + 16u * STRIDE] = b1;
        right[to + 32u * STRIDE] = b2;
        right[to + 48u * STRIDE] = b3;
        right[to + 64u * STRIDE] = b4;
        right[to + 80u * STRIDE] = b5;
        right[to + 96u * STRIDE] = b6;
        right[to + 112u * STRIDE] = b7;
        workgroupBarrier();
        // The last step fetches itself again.
        let ahead = select(0u, 16u, step + 1u < steps);
        from_a += ahead;
        from_b += ahead;
        a0 = a[from_a];
        a1 = a[from_a + down];
        a2 = a[from_a + 2u * down];
        a3 = a[from_a + 3u * down];
        a4 = a[from_a + 4u * down];
        a5 = a[from_a + 5u * down];
        a6 = a[from_a + 6u * down];
        a7 = a[from_a + 7u * down];
        b0 = b[from_b];
        b1 = b[from_b + down];
        b2 = b[from_b + 2u * down];
        b3 = b[from_b + 3u * down];
        b4 = b[from_b + 4u * down];
        b5 = b[from_b + 5u * down];
        b6 = b[from_b + 6u * down];
        b7 = b[from_b + 7u * down];
        for (var depth = 0u; depth < 16u; depth += 4u) {
            let l = row * STRIDE + depth;
            let r = column * STRIDE + depth;
            let left0 = coopLoadT<Left>(&left[l], STRIDE);
            let left1 = coopLoadT<Left>(&left[l + 16u * STRIDE], STRIDE);
            let left2 = coopLoadT<Left>(&left[l + 32u * STRIDE], STRIDE);
            let left3 = coopLoadT<Left>(&left[l + 48u * STRIDE], STRIDE);
            // A row of B is a column of Bᵀ.
            let right0 = coopLoad<Right>(&right[r], STRIDE);
            let right1 = coopLoad<Right>(&right[r + 16u * STRIDE], STRIDE);
            sums00 = coopMultiplyAdd(left0, right0, sums00);
            sums01 = coopMultiplyAdd(left0, right1, sums01);
            sums10 = coopMultiplyAdd(left1, right0, sums10);
            sums11 = coopMultiplyAdd(left1, right1, sums11);
            sums20 = coopMultiplyAdd(left2, right0, sums20);
            sums21 = coopMultiplyAdd(left2, right1, sums21);
            sums30 = coopMultiplyAdd(left3, right0, sums30);
            sums31 = coopMultiplyAdd(left3, right1, sums31);
        }
    }
    let place = (first_row + row) * n + first_column + column;
    let place00 = place;
    let place01 = place + 16u;
    let place10 = place + 16u * n;
    let place11 = place + 16u * n + 16u;
    let place20 = place + 32u * n;
    let place21 = place + 32u * n + 16u;
    let place30 = place + 48u * n;
    let place31 = place + 48u * n + 16u;
    let done00 = sums00;
    let done01 = sums01;
    let done10 = sums10;
    let done11 = sums11;
    let done20 = sums20;
    let done21 = sums21;
    let done30 = sums30;
    let done31 = sums31;
    coopStoreT(done00, &c[place00], n);
    coopStoreT(done01, &c[place01], n);
    coopStoreT(done10, &c[place10], n);
    coopStoreT(done11, &c[place11], n);
    coopStoreT(done20, &c[place20], n);
    coopStoreT(done21, &c[place21], n);
    coopStoreT(done30, &c[place30], n);
    coopStoreT(done31, &c[place31], n);
}
