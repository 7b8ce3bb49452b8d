//! A recipe and a model to a plan: what happens to every linear layer, decided before any weight is read.

pub mod allocate;
pub mod recipe;

use std::collections::HashMap;
use std::sync::OnceLock;

use globset::Glob;
use regex::bytes::Regex;

use crate::error::{Error, Result, shown};
use crate::methods::{self, Method};
use crate::model::seen::Needs;
use crate::plan::recipe::{Override, Recipe, Skip};
use crate::weight::{Float, Outlined, Storage};

/// One stage of a plan.
#[derive(Debug)]
pub struct Stage {
    /// Name of the method.
    pub name: String,
    /// The method with its options.
    pub method: Box<dyn Method>,
}

/// A linear layer as the checkpoint holds it.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Full name without `.weight`.
    pub name: String,
    /// `[outputs, inputs]`.
    pub shape: [usize; 2],
    /// Number format of the model's floats.
    pub float: Float,
    /// Whether it is part of an expert that a router chooses.
    pub expert: bool,
}

/// What happens to one linear layer.
#[derive(Debug)]
pub struct Planned {
    /// What the output holds of it.
    pub outlined: Outlined,
    /// Stages that work on it, in order.
    pub stages: Vec<usize>,
    /// Bits that replace those of quantizing stages.
    pub bits: Option<u8>,
    /// Share of weights that replaces that of pruning stages.
    pub sparsity: Option<f64>,
}

/// Everything that is decided before the work.
#[derive(Debug)]
pub struct Plan {
    /// The stages.
    pub stages: Vec<Stage>,
    /// Every linear layer, also those left as they are.
    pub layers: Vec<Planned>,
    /// Deviations from what was asked for, each a sentence.
    pub notes: Vec<String>,
    /// Experts that are left of those that a router chooses from, where some are removed.
    pub experts: Option<usize>,
    /// Whether every token counts for every expert.
    pub everywhere: bool,
    /// Where layers stand.
    pub(crate) places: Places,
}

/// Where the layers of a plan stand, by name: found once, because a mixture of experts has ten thousands of them.
#[derive(Debug, Default)]
pub(crate) struct Places(OnceLock<HashMap<String, usize>>);

impl Plan {
    /// Resolves a recipe for the linear layers of a model whose other tensors are `carried` over: what is never compressed may be
    /// named in a skip list all the same.
    ///
    /// # Errors
    /// When a pattern matches nothing, or a method cannot take a layer.
    pub fn resolve(recipe: &Recipe, candidates: &[Candidate], carried: &[&str]) -> Result<Self> {
        let skip = recipe.skip.iter().map(|skip| pattern(&skip.pattern, candidates, carried)).collect::<Result<Vec<_>>>()?;
        let keep = recipe.overrides.iter().map(|one| Ok((pattern(&one.pattern, candidates, &[])?, one))).collect::<Result<Vec<_>>>()?;
        let mut stages = Vec::new();
        let mut targets = Vec::new();
        for stage in &recipe.stages {
            stages.push(Stage { name: stage.method.clone(), method: methods::read(&stage.method, stage.options.clone())? });
            targets.push(patterns(&stage.targets, candidates)?);
        }
        if stages.is_empty() {
            return Err(Error::input("the recipe has no [[stage]]; add one, like method = \"round-to-nearest\""));
        }
        sound(&stages)?;
        let mut layers = Vec::new();
        let mut notes = Vec::new();
        for candidate in candidates {
            let kept = || keep.iter().rev().filter(|(matcher, _)| matches(matcher, &candidate.name));
            let (bits, sparsity) = (kept().find_map(|(_, one)| one.bits), kept().find_map(|(_, one)| one.sparsity));
            let skipped = skip.iter().any(|matcher| matches(matcher, &candidate.name)) || bits == Some(16);
            let wanted =
                |stage: &usize| targets[*stage].is_empty() || targets[*stage].iter().any(|matcher| matches(matcher, &candidate.name));
            for stage in stages.iter().filter(|stage| stage.method.norms()) {
                stage.method.leaves(Storage::Dense, candidate.shape, bits).map_err(|error| error.tensor(&candidate.name))?;
            }
            // Where experts are removed, all others get their numbers.
            let renumbers = |stage: usize| removes(&stages[stage]);
            let chosen: Vec<usize> = (0..stages.len())
                .filter(|&stage| {
                    let method = &stages[stage].method;
                    if renumbers(stage) { candidate.expert } else { !skipped && !method.norms() && wanted(&stage) }
                })
                .collect();
            let storage = left(&stages, &chosen, candidate.shape, bits).map_err(|error| error.tensor(&candidate.name))?;
            note_group(&mut notes, &stages, &chosen, candidate, storage);
            let outlined = Outlined {
                name: candidate.name.clone(),
                shape: candidate.shape,
                storage: (!chosen.is_empty()).then_some(storage),
                float: candidate.float,
            };
            layers.push(Planned { outlined, stages: chosen, bits, sparsity });
        }
        let others = stages.iter().any(|stage| stage.method.norms() || removes(stage));
        if layers.iter().all(|layer| layer.stages.is_empty()) && !others {
            return Err(Error::input("nothing is left to compress: every linear layer is skipped"));
        }
        summarize(&mut notes);
        Ok(Self { stages, layers, notes, experts: None, everywhere: recipe.calibration.all_experts, places: Places::default() })
    }

    /// The recipe without patterns: layers by their names, so that it says the same of this model whatever else changes.
    pub fn resolved(&self, recipe: &Recipe) -> Recipe {
        let exact = |layer: &Planned| globset::escape(&layer.outlined.name);
        let norms = |stage: usize| self.stages[stage].method.norms();
        let mut resolved = recipe.clone();
        for (number, stage) in resolved.stages.iter_mut().enumerate().filter(|(_, stage)| !stage.targets.is_empty()) {
            let on = self.layers.iter().filter(|layer| layer.stages.contains(&number) || norms(number));
            stage.targets = on.map(exact).collect();
        }
        // What removes experts works on all of them, whatever is skipped.
        let left = |layer: &&Planned| layer.stages.iter().all(|&stage| removes(&self.stages[stage]));
        let untouched = self.layers.iter().filter(|layer| left(layer) && (0..self.stages.len()).any(|stage| !norms(stage)));
        resolved.skip = untouched.map(|layer| Skip { pattern: exact(layer) }).collect();
        let changed = self.layers.iter().filter(|layer| !layer.stages.is_empty() && (layer.bits.is_some() || layer.sparsity.is_some()));
        resolved.overrides = changed.map(|layer| Override { pattern: exact(layer), bits: layer.bits, sparsity: layer.sparsity }).collect();
        resolved.allocate = None;
        resolved
    }

    /// The most that any stage needs to have been seen.
    pub fn needs(&self) -> Needs {
        self.stages.iter().map(|stage| stage.method.sees()).max().unwrap_or(Needs::Nothing)
    }

    /// Whether any stage changes norms.
    pub fn norms(&self) -> bool {
        self.stages.iter().any(|stage| stage.method.norms())
    }

    /// The format that holds the plan where none is asked for.
    pub fn format(&self) -> &'static str {
        let two_level = self.layers.iter().any(|layer| matches!(layer.outlined.storage, Some(Storage::Super(_))));
        match two_level {
            true => "gguf",
            false if self.integers() => "compressed-tensors",
            false => "dense",
        }
    }

    /// Whether any layer becomes integers.
    pub fn integers(&self) -> bool {
        self.layers.iter().any(|layer| matches!(layer.outlined.storage, Some(Storage::Ints { .. })))
    }

    /// The plan of a layer.
    pub fn layer(&self, name: &str) -> Option<&Planned> {
        let names = || self.layers.iter().enumerate().map(|(at, layer)| (layer.outlined.name.clone(), at)).collect();
        self.layers.get(*self.places.0.get_or_init(names).get(name)?)
    }

    /// Stored bits per weight over the compressed layers, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        let (mut bits, mut entries) = (0, 0);
        for layer in &self.layers {
            if let Some(storage) = layer.outlined.storage {
                bits += storage.bits(layer.outlined.shape, layer.outlined.float);
                entries += (layer.outlined.shape[0] * layer.outlined.shape[1]) as u64;
            }
        }
        bits as f64 / entries.max(1) as f64
    }
}

/// Refuses an order of stages that loses what an earlier stage did (methods-quant §7).
fn sound(stages: &[Stage]) -> Result<()> {
    if let Some(late) = stages.iter().skip(1).find(|stage| removes(stage)) {
        return Err(Error::input(format!("{} must be the first stage: the others work on what it leaves", late.name)));
    }
    for (first, second) in stages.iter().zip(stages.iter().skip(1)) {
        if first.method.norms() && !second.method.norms() {
            let (first, second) = (&first.name, &second.name);
            return Err(Error::input(format!(
                "{second} after {first} is unsound: {first} fits the norms to the weights that {second} then changes; put {first} last"
            )));
        }
    }
    Ok(())
}

/// What the chosen stages leave of a layer. Ranges for a grid must be followed by a stage that rounds to that grid.
fn left(stages: &[Stage], chosen: &[usize], shape: [usize; 2], bits: Option<u8>) -> Result<Storage> {
    let mut storage = Storage::Dense;
    let mut prepared = None;
    for &stage in chosen {
        let Stage { name, method } = &stages[stage];
        storage = method.leaves(storage, shape, bits)?;
        let floats = matches!(storage, Storage::Dense | Storage::Sparse(_));
        if let Some(grid) = prepared.take_if(|grid| !floats && *grid != storage) {
            return Err(Error::input(format!(
                "ranges were chosen for {grid}, but {name} leaves {storage}; give both stages the same bits, group and symmetric"
            )));
        }
        prepared = if floats { method.prepares(shape[1], bits).or(prepared) } else { None };
    }
    match prepared {
        Some(grid) => Err(Error::input(format!("ranges were chosen for {grid}, but no quantizing stage follows; add one"))),
        None => Ok(storage),
    }
}

/// Whether a stage removes experts.
fn removes(stage: &Stage) -> bool {
    stage.method.removes_experts()
}

fn matches(matcher: &Regex, name: &str) -> bool {
    matcher.is_match(name.as_bytes())
}

fn patterns(patterns: &[String], candidates: &[Candidate]) -> Result<Vec<Regex>> {
    patterns.iter().map(|one| pattern(one, candidates, &[])).collect()
}

/// A glob over layer names, or a regular expression after `re:`; one that matches nothing is an error, because it is a typing mistake.
fn pattern(text: &str, candidates: &[Candidate], carried: &[&str]) -> Result<Regex> {
    let text = text.strip_suffix(".weight").unwrap_or(text);
    let wrong = |what: String| Error::input(format!("pattern `{}`: {what}", shown(text)));
    let expression = match text.strip_prefix("re:") {
        Some(expression) => format!("^(?:{expression})"),
        None => Glob::new(text).map_err(|error| wrong(error.kind().to_string()))?.regex().to_string(),
    };
    let matcher = Regex::new(&expression).map_err(|error| wrong(error.to_string()))?;
    let others = || carried.iter().any(|name| matcher.is_match(name.strip_suffix(".weight").unwrap_or(name).as_bytes()));
    if text == "lm_head" || candidates.iter().any(|candidate| matches(&matcher, &candidate.name)) || others() {
        return Ok(matcher);
    }
    let example = candidates.iter().map(|candidate| candidate.name.as_str()).max_by_key(|name| similarity(name, text));
    Err(Error::input(format!("pattern `{}` matches no linear layer; the nearest is `{}`", shown(text), shown(example.unwrap_or("none")))))
}

/// Number of pieces of a pattern that occur in a name.
fn similarity(name: &str, pattern: &str) -> usize {
    pattern.split(['*', '.']).filter(|piece| piece.len() > 1 && name.contains(piece)).count()
}

/// Notes a group size that differs from the one asked for.
fn note_group(notes: &mut Vec<String>, stages: &[Stage], chosen: &[usize], candidate: &Candidate, storage: Storage) {
    let (Storage::Ints { group, .. } | Storage::Trits { group } | Storage::Split { group, .. }) = storage else { return };
    for &stage in chosen {
        if let Some(wanted) = stages[stage].method.options().get("group").and_then(toml::Value::as_integer)
            && wanted != group as i64
        {
            let columns = candidate.shape[1];
            notes.push(format!("group size {wanted} does not divide {columns} columns: {group} is used instead"));
        }
    }
}

/// Merges equal notes into one with a count.
fn summarize(notes: &mut Vec<String>) {
    let all = std::mem::take(notes);
    for note in &all {
        if !notes.iter().any(|kept| kept.starts_with(note)) {
            let count = all.iter().filter(|other| *other == note).count();
            notes.push(format!("{note} ({count} layers)"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(recipe: &str) -> Result<Plan> {
        let candidate = Candidate { name: "layer".into(), shape: [64, 256], float: Float::BF16, expert: false };
        Plan::resolve(&Recipe::parse(&format!("version = 1\n{recipe}"))?, &[candidate], &["eyes.0.weight", "eyes.1.bias"])
    }

    #[test]
    fn what_is_carried_over_may_be_skipped_and_a_pattern_of_nothing_is_an_error_with_the_nearest_name() {
        let stage = "[[stage]]\nmethod = \"round-to-nearest\"\n";
        for pattern in ["eyes.*", "eyes.0", "re:eyes\\\\.", "lm_head", "eyes.1.bias"] {
            resolve(&format!("{stage}[[skip]]\nmatch = \"{pattern}\"\n")).unwrap();
        }
        for (key, pattern) in [("skip", "ears.*"), ("override", "eyes.*")] {
            let bits = if key == "override" { "bits = 8\n" } else { "" };
            let error = resolve(&format!("{stage}[[{key}]]\nmatch = \"{pattern}\"\n{bits}")).unwrap_err().to_string();
            assert!(error.contains("matches no linear layer; the nearest is `layer`"), "{error}");
        }
    }

    #[test]
    fn ranges_for_a_grid_need_a_stage_that_rounds_to_that_grid() {
        let ranges = "[[stage]]\nmethod = \"precalibrate\"\nbits = 3\n";
        let round = "[[stage]]\nmethod = \"round-to-nearest\"\n";
        for (recipe, reason) in [
            (format!("{ranges}{round}bits = 4\n"), "W3 g128 symmetric, but round-to-nearest leaves W4 g128 symmetric"),
            (format!("{ranges}{round}bits = 3\ngroup = 64\n"), "W3 g128 symmetric, but round-to-nearest leaves W3 g64 symmetric"),
            (format!("{ranges}{round}bits = 3\nsymmetric = false\n"), "leaves W3 g128 asymmetric"),
            (ranges.to_string(), "no quantizing stage follows"),
            (format!("{ranges}[[stage]]\nmethod = \"wanda\"\n"), "no quantizing stage follows"),
            (format!("{ranges}storage = \"adpq\"\n{round}"), "quantizing twice"),
            (format!("{ranges}storage = \"adpq\"\n[[stage]]\nmethod = \"wanda\"\n"), "pruning after quantization"),
        ] {
            let error = resolve(&recipe).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        for recipe in [
            format!("{ranges}{round}bits = 3\n"),
            format!("{ranges}[[stage]]\nmethod = \"wanda\"\n{round}bits = 3\n"),
            format!("{ranges}{round}bits = 4\n[[override]]\nmatch = \"*\"\nbits = 2\n"),
            format!("{ranges}storage = \"adpq\"\n"),
        ] {
            resolve(&recipe).unwrap();
        }
    }
}
