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
        Some(mixture) => match model.and_then(Model::further_experts) {
            Some(name) => Err(Error::input(
                "belongs to experts that predict further tokens, which are not thinned with the others; remove those layers first",
            )
            .tensor(name)),
            None => method.experts_left(&mixture).transpose(),
        },
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

/// Sets the number of experts wherever a configuration says it, or where its family's is meant because it says none.
pub fn set_experts(config: &mut Value, left: usize) {
    const KEYS: [&str; 3] = ["num_experts", "num_local_experts", "n_routed_experts"];
    let inner = config["text_config"].is_object();
    let outer = set(config, &KEYS, left);
    let place = if inner { &mut config["text_config"] } else { config };
    if !set(place, &KEYS, left) && !outer {
        let key = match place["model_type"].as_str() {
            Some("mixtral" | "gpt_oss") => KEYS[1],
            Some("deepseek_v3") => KEYS[2],
            _ => KEYS[0],
        };
        place[key] = left.into();
    }
}

/// Sets those keys that are there; whether one was.
fn set(object: &mut Value, keys: &[&str], left: usize) -> bool {
    let mut found = false;
    for key in keys {
        if let Some(value) = object.get_mut(*key) {
            *value = left.into();
            found = true;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_number_of_experts_is_said_where_it_was_and_where_it_was_not() {
        for (config, expected) in [
            (json!({"num_experts": 8, "num_local_experts": 8}), json!({"num_experts": 4, "num_local_experts": 4})),
            (json!({"model_type": "mixtral"}), json!({"model_type": "mixtral", "num_local_experts": 4})),
            (json!({"model_type": "deepseek_v3"}), json!({"model_type": "deepseek_v3", "n_routed_experts": 4})),
            (json!({"text_config": {"hidden_size": 2}}), json!({"text_config": {"hidden_size": 2, "num_experts": 4}})),
            (json!({"text_config": {"num_experts": 8}}), json!({"text_config": {"num_experts": 4}})),
        ] {
            let mut found = config;
            set_experts(&mut found, 4);
            assert_eq!(found, expected);
        }
    }
}
