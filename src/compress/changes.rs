//! What stages change beside linear layers: norms, and what experts that were removed leave behind.

use std::collections::HashMap;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::methods;
use crate::model::Model;
use crate::plan::Plan;
use crate::plan::recipe::Recipe;

/// What stages make of a tensor that is no linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Its numbers are others, in single precision: a step of a norm is smaller than what 16 bits resolve.
    Single,
    /// So many of its rows are left.
    Rows(usize),
    /// Nothing is left of it.
    Gone,
}

/// Tensors by name, with what becomes of them.
pub type Changes = HashMap<String, Change>;

/// How many experts a recipe leaves of every mixture, where it removes some.
///
/// # Errors
/// When a mixture does not permit it, or there is none.
pub fn experts_left(recipe: &Recipe, model: Option<&Model<'_>>) -> Result<Option<usize>> {
    let stages = recipe.stages.iter().map(|stage| methods::read(&stage.method, stage.options.clone()));
    let Some(method) = stages.flatten().find(|method| method.removes_experts()) else { return Ok(None) };
    match model.and_then(|model| model.config.mixture) {
        Some(mixture) => method.experts_left(&mixture).transpose(),
        None => Err(Error::input("the recipe removes experts, and this model is no mixture of experts that can be computed")),
    }
}

/// Tensors beside linear layers that the stages of a plan change.
pub fn of(model: &Model<'_>, plan: &Plan) -> Changes {
    let mut changes = Changes::new();
    for index in 0..model.config.layers.len() {
        if plan.norms() {
            changes.extend(model.norms(index).into_iter().map(|(name, _, _)| (name, Change::Single)));
        }
        if let Some(left) = plan.experts {
            let [whole, gone] = model.by_expert(index);
            changes.extend(whole.into_iter().map(|name| (name, Change::Rows(left))));
            changes.extend(gone.into_iter().map(|name| (name, Change::Gone)));
        }
    }
    changes
}

/// Sets the number of experts wherever a configuration says it.
pub fn set_experts(config: &mut Value, left: usize) {
    for (key, value) in config.as_object_mut().into_iter().flatten() {
        match key.as_str() {
            "num_experts" | "num_local_experts" | "n_routed_experts" => *value = left.into(),
            "text_config" => set_experts(value, left),
            _ => {}
        }
    }
}
