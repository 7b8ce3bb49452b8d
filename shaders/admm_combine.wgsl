// ADMM, after the product: V + U from ρ(G + ρ)⁻¹(Z − U − V₀), V₀ and U; or, at the end, Z from V + U and the mask. Twin of
// the loop of `prune` in src/kernels/admm.rs.
//
// sums, exact, dual: as many floats each. keep: a bit for each, the lowest first.
@group(0) @binding(0) var<storage, read_write> sums: array<f32>;
@group(0) @binding(1) var<storage, read_write> exact: array<f32>;
@group(0) @binding(2) var<storage, read_write> dual: array<f32>;
@group(0) @binding(3) var<storage, read_write> keep: array<u32>;
// count, ρ, whether this is the end
@group(0) @binding(4) var<storage, read_write> parameters: array<u32>;

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
    if (parameters[2] == 1u) {
        let kept = (keep[at / 32u] >> (at % 32u) & 1u) == 1u;
        sums[at] = select(0.0, sums[at], kept);
    } else {
        sums[at] = bitcast<f32>(parameters[1]) * sums[at] + (exact[at] + dual[at]);
    }
}
