// ADMM, before the product: U, and Z − U − V₀, from V + U and the mask. Twin of `split` in src/kernels/admm.rs.
//
// sums, exact, dual, right: as many floats each. keep: a bit for each, the lowest first.
@group(0) @binding(0) var<storage, read_write> sums: array<f32>;
@group(0) @binding(1) var<storage, read_write> exact: array<f32>;
@group(0) @binding(2) var<storage, read_write> keep: array<u32>;
@group(0) @binding(3) var<storage, read_write> dual: array<f32>;
@group(0) @binding(4) var<storage, read_write> right: array<f32>;
// count
@group(0) @binding(5) var<storage, read_write> parameters: array<u32>;

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let at = (group.y * groups.x + group.x) * 64u + local;
    if (at >= parameters[0]) {
        return;
    }
    let kept = (keep[at / 32u] >> (at % 32u) & 1u) == 1u;
    let sum = sums[at];
    dual[at] = select(sum, 0.0, kept);
    right[at] = select(-sum, sum, kept) - exact[at];
}
