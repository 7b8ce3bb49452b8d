//! The adjoint of [`crate::model::latent`].

use crate::kernels::rope::{Table, rope_cpu};
use crate::model::backward::{Adjoint, room};
use crate::model::block::{Place, Role, Site};
use crate::model::forward::Point;
use crate::model::latent::Latent;

impl Adjoint<'_> {
    /// From the gradient of what the output projection reads to those of what the projections of queries, keys and values gave.
    pub(super) fn latent(
        &self,
        latent: &Latent,
        mixed: &[f32],
        outputs: &mut [Vec<f32>; Role::COUNT],
        norms: &mut [Vec<f32>; Place::COUNT],
    ) {
        let (heads, inner) = (self.spec.config.heads, latent.head_dim());
        let mut dout = vec![0.0; mixed.len() / latent.value * inner];
        for (wide, narrow) in dout.chunks_exact_mut(inner).zip(mixed.chunks_exact(latent.value)) {
            wide[..latent.value].copy_from_slice(narrow);
        }
        let [mut q, mut k, mut v] = [const { Vec::new() }; 3];
        self.attended(Point::Attended, &dout, [&mut q, &mut k, &mut v]);
        let table = self.spec.table.as_ref().map(Table::adjoint);
        if let Some(table) = &table {
            rope_cpu(&mut q, heads * inner, inner, table);
        }
        // Queries as their projection gave them: columns that do not turn come first.
        let still = latent.turning..latent.turning + latent.still;
        let q: Vec<f32> = q.chunks_exact(inner).flat_map(|q| [&q[still.clone()], &q[..latent.turning]]).flatten().copied().collect();
        if self.operands.weights[Role::QueryUp as usize].is_some() {
            let narrow = room(&mut outputs[Role::QueryDown as usize], self.passed(Point::Site(Site::QueryLatent)).len());
            self.input(Role::QueryUp, &q, narrow, false);
            self.norm(Place::QueryLatent, Point::Query, narrow, norms);
            outputs[Role::QueryUp as usize] = q;
        } else {
            outputs[Role::Query as usize] = q;
        }
        let pairs = k.chunks_exact(inner).zip(v.chunks_exact(inner));
        let wide: Vec<f32> = pairs.flat_map(|(k, v)| [&k[still.clone()], &v[..latent.value]]).flatten().copied().collect();
        let mut narrow = vec![0.0; self.passed(Point::Site(Site::KeyValueLatent)).len()];
        self.input(Role::KeyValueUp, &wide, &mut narrow, false);
        outputs[Role::KeyValueUp as usize] = wide;
        self.norm(Place::KeyValueLatent, Point::Key, &mut narrow, norms);
        // All heads share the columns of keys that turn.
        let mut turning = vec![0.0f32; narrow.len() / latent.rank * latent.turning];
        for (sum, k) in turning.chunks_exact_mut(latent.turning).zip(k.chunks_exact(heads * inner)) {
            for k in k.chunks_exact(inner) {
                sum.iter_mut().zip(k).for_each(|(sum, k)| *sum += k);
            }
        }
        if let Some(table) = &table {
            rope_cpu(&mut turning, latent.turning, latent.turning, table);
        }
        let rows = narrow.chunks_exact(latent.rank).zip(turning.chunks_exact(latent.turning));
        outputs[Role::KeyValueDown as usize] = rows.flat_map(|(narrow, turning)| [narrow, turning]).flatten().copied().collect();
    }
}
