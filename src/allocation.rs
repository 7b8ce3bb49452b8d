//! A target for the whole model to bits or sparsity for every layer: what a sensitivity measurement says of single layers
//! becomes the choices of a knapsack, groups of layers that engines fuse get one scheme, and the result stands in the
//! recipe as overrides.

use std::collections::BTreeMap;

use crate::compress::work::Work;
use crate::compress::{Job, Prepared};
use crate::error::{Error, Result};
use crate::formats::Format;
use crate::formats::targets::{Engine, fusion};
use crate::plan::allocate::{self, Allocation, Choice};
use crate::plan::recipe::{self, Override, Recipe};
use crate::plan::{Plan, Planned};
use crate::report::{Allocated, bytes};
use crate::run::Run;
use crate::sensitivity::file::{Candidate, LayerSensitivity, Sensitivity};
use crate::sensitivity::schemes::{Kind, Scheme};
use crate::sensitivity::{Options, Windows, sensitivity};
use crate::subject::Subject;
use crate::weight::{Outlined, Pattern, Storage};

/// Sparsity differs from the target by at most this much, because costs of very sparse layers do not add up (OWL,
/// arXiv:2310.05175, bounds it for the same reason).
const SPARSITY_SPREAD: f64 = 0.15;

/// What the whole model shall have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// Stored bits per weight of the compressed layers, scales included.
    Bits(f64),
    /// Bytes of the output's tensors.
    Size(u64),
    /// Share of zeros in the compressed layers.
    Sparsity(f64),
}

impl Target {
    /// The target of a recipe.
    ///
    /// # Errors
    /// When there is none or more than one, or a number is out of its range.
    pub fn of(wish: &recipe::Allocate) -> Result<Self> {
        let size = wish.target_size.as_deref().map(recipe::size).transpose()?.map(Self::Size);
        let targets = [wish.target_bpw.map(Self::Bits), size, wish.target_sparsity.map(Self::Sparsity)];
        let mut targets = targets.into_iter().flatten();
        match (targets.next(), targets.next()) {
            (None, _) => Err(Error::input("allocate: no target; give target_bpw, target_size or target_sparsity")),
            (Some(_), Some(_)) => Err(Error::input("allocate: several targets contradict each other; give one")),
            (Some(Self::Bits(bits)), None) if !(0.1..=16.0).contains(&bits) => {
                Err(Error::input(format!("a target of {bits} bits per weight; use 2 to 8, like 3.5")))
            }
            (Some(Self::Sparsity(share)), None) if !(0.0..1.0).contains(&share) => {
                Err(Error::input(format!("a target of {share} zeros; use at least 0 and below 1, like 0.5")))
            }
            (Some(target), None) => Ok(target),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bits(bits) => write!(f, "{bits} bits per weight"),
            Self::Size(size) => write!(f, "{}", bytes(*size)),
            Self::Sparsity(share) => write!(f, "{:.1} % zeros", 100.0 * share),
        }
    }
}

/// One way for one group, with what it means for the recipe.
struct Groups {
    members: Vec<Vec<usize>>,
    choices: Vec<Vec<Choice>>,
    /// Scheme of each choice.
    labels: Vec<Vec<String>>,
    overrides: Vec<Vec<(Option<u8>, Option<f64>)>>,
}

/// Spreads the target of a recipe over the layers of a job, on a measurement that is there or is quickly made now; the
/// measurement joins the output.
///
/// # Errors
/// When the measurement is of another model or incomplete, or as [`solve`].
/// A measurement that is made for this is kept in `work`, for whoever goes on.
pub fn allocate(job: &mut Job, wish: &recipe::Allocate, work: Option<&Work>, run: &Run<'_>) -> Result<()> {
    const METHOD: &str = "round-to-nearest";
    const FILE: &str = "sensitivity.json";
    let target = Target::of(wish)?;
    let subject = Subject::open(&job.model, run.scratch)?;
    let found = match &wish.sensitivity {
        Some(path) => {
            let found = Sensitivity::open(path)?;
            if found.identity.model != subject.fingerprint()? {
                return Err(Error::input("was measured on another model; measure this one with drawknife sensitivity").file(path));
            }
            if !found.complete {
                return Err(Error::input("is not complete; go on with the same drawknife sensitivity command").file(path));
            }
            found
        }
        None => {
            let names = match target {
                Target::Sparsity(share) => around(share),
                _ => "w2,w3,w4,w8".into(),
            };
            let text = Windows { source: "builtin:mix".into(), samples: 16, seq: 256, seed: run.seed };
            let options =
                Options { memory: job.memory, ..Options::new(&subject, Scheme::parse_all(&names, METHOD)?, METHOD, false, text)? };
            match work.map(|work| work.kept(FILE)).transpose()?.flatten() {
                Some(kept) => Sensitivity::parse(&kept)?,
                None => {
                    let found = sensitivity(&subject, &options, None, run)?.0;
                    let bytes = serde_json::to_vec_pretty(&found).map_err(|error| Error::run(error.to_string()))?;
                    work.map_or(Ok(()), |work| work.keep(FILE, &bytes))?;
                    found
                }
            }
        }
    };
    job.allocation = Some(solve(job, &found, target, wish.min_bits.unwrap_or(2))?);
    let bytes = serde_json::to_vec_pretty(&found).map_err(|error| Error::run(error.to_string()))?;
    job.beside.push((FILE.into(), bytes));
    Ok(())
}

/// Shares of zeros around a target, in steps of a twentieth.
fn around(share: f64) -> String {
    let percent = (100.0 * share).round() as i64;
    let names = [-15, -10, -5, 0, 5, 10, 15].map(|step| percent + step).into_iter().filter(|percent| (1..=95).contains(percent));
    names.map(|percent| format!("s{percent}")).collect::<Vec<_>>().join(",")
}

/// Solves a target and puts the result into the recipe of the job.
///
/// # Errors
/// When the recipe has nothing to choose, the sensitivity is of another model, or the target is out of reach.
pub fn solve(job: &mut Job, found: &Sensitivity, target: Target, least_bits: u8) -> Result<Allocated> {
    let probe = Prepared::new(Job { quality: None, recipe: Recipe { gate: Default::default(), ..job.recipe.clone() }, ..job.clone() })?;
    let formats: Vec<&'static Format> = probe.exports.iter().map(|export| export.format).collect();
    let variable: Vec<&Planned> =
        probe.plan.layers.iter().filter(|layer| !layer.stages.is_empty() && layer.bits.is_none() && layer.sparsity.is_none()).collect();
    let groups = groups(&variable, found, target, least_bits, &formats, job.engine)?;
    let entries: f64 = variable.iter().map(|layer| entries(&layer.outlined)).sum();
    let (limit, rest) = limit(target, &variable, &probe, &formats);
    let allocation = limit
        .and_then(|limit| allocate::allocate(&groups.choices, limit))
        .ok_or_else(|| out_of_reach(&groups, target, (rest, entries), &probe))?;
    for (group, &choice) in allocation.choices.iter().enumerate() {
        for &member in &groups.members[group] {
            let (bits, sparsity) = groups.overrides[group][choice];
            job.recipe.overrides.push(Override { pattern: globset::escape(&variable[member].outlined.name), bits, sparsity });
        }
    }
    let mut counts = BTreeMap::new();
    for (group, &choice) in allocation.choices.iter().enumerate() {
        *counts.entry(groups.labels[group][choice].clone()).or_insert(0) += groups.members[group].len();
    }
    let layers = || variable.iter().filter_map(|layer| found.layer(&layer.outlined.name));
    let measured = layers().flat_map(|layer| &layer.candidates).all(|candidate| candidate.kld.is_some());
    let next =
        |more: f64| limit.and_then(|limit| allocate::allocate(&groups.choices, limit + (more * entries) as u64)).map(|next| next.cost);
    Ok(Allocated {
        target: target.to_string(),
        reached: reached(target, &allocation, (rest, entries), &probe),
        predicted_kld: allocation.cost,
        measured,
        optimal: allocation.exact,
        counts,
        next_kld: (!matches!(target, Target::Sparsity(_))).then(|| next(0.1)).flatten().filter(|next| *next < allocation.cost),
        curve: curve(&groups, target, (rest, entries), &probe),
    })
}

fn entries(outlined: &Outlined) -> f64 {
    (outlined.shape[0] * outlined.shape[1]) as f64
}

/// The limit on the sum of the choices' sizes, and what else counts towards the target: both in bits, or for sparsity in weights
/// that stay.
fn limit(target: Target, variable: &[&Planned], probe: &Prepared, formats: &[&Format]) -> (Option<u64>, f64) {
    let whole = |limit: f64| (limit >= 0.0).then_some(limit as u64);
    match target {
        Target::Bits(bits) => {
            let (total, fixed) = fixed_bits(&probe.plan, variable);
            (whole(bits * total - fixed), fixed)
        }
        Target::Size(size) => {
            let now: u64 = variable.iter().map(|layer| stored(&layer.outlined, formats)).sum();
            let rest = 8.0 * probe.size.bytes_after as f64 - now as f64;
            (whole(8.0 * size as f64 - rest), rest)
        }
        Target::Sparsity(share) => {
            let total: f64 = variable.iter().map(|layer| entries(&layer.outlined)).sum();
            (whole(((1.0 - share) * total).ceil()), 0.0)
        }
    }
}

/// Weights of all compressed layers, and the bits of those that nothing is chosen for.
fn fixed_bits(plan: &Plan, variable: &[&Planned]) -> (f64, f64) {
    let compressed = plan.layers.iter().filter(|layer| layer.outlined.storage.is_some());
    let (mut total, mut fixed) = (0.0, 0.0);
    for layer in compressed {
        total += entries(&layer.outlined);
        if !variable.iter().any(|one| one.outlined.name == layer.outlined.name) {
            fixed += layer.outlined.storage.map_or(0, |storage| storage.bits(layer.outlined.shape, layer.outlined.float)) as f64;
        }
    }
    (total, fixed)
}

/// Bits of a layer in all formats that are written.
fn stored(outlined: &Outlined, formats: &[&Format]) -> u64 {
    formats.iter().flat_map(|format| (format.entries)(outlined)).map(|entry| 8 * entry.bytes()).sum()
}

fn reached(target: Target, allocation: &Allocation, (rest, entries): (f64, f64), probe: &Prepared) -> f64 {
    let size = allocation.size as f64;
    match target {
        Target::Bits(_) => {
            let all = probe
                .plan
                .layers
                .iter()
                .filter(|layer| layer.outlined.storage.is_some())
                .map(|layer| self::entries(&layer.outlined))
                .sum::<f64>();
            (size + rest) / all
        }
        Target::Size(_) => (size + rest) / 8.0,
        Target::Sparsity(_) => 1.0 - size / entries,
    }
}

fn out_of_reach(groups: &Groups, target: Target, rest: (f64, f64), probe: &Prepared) -> Error {
    let end = |of: fn(u64, u64) -> u64| {
        let size = groups.choices.iter().map(|group| group.iter().map(|choice| choice.size).reduce(of).unwrap_or(0)).sum();
        let at = Allocation { choices: Vec::new(), size, cost: 0.0, exact: true };
        let value = reached(target, &at, rest, probe);
        match target {
            Target::Bits(_) => Target::Bits((1000.0 * value).ceil() / 1000.0),
            Target::Size(_) => Target::Size(value as u64),
            Target::Sparsity(_) => Target::Sparsity(value),
        }
    };
    let mut labels: Vec<&String> = groups.labels.iter().flatten().collect();
    labels.sort_unstable();
    labels.dedup();
    let labels = labels.iter().map(|label| label.as_str()).collect::<Vec<_>>().join(", ");
    Error::input(format!(
        "a target of {target} is out of reach: {labels} give {} to {}; use a target in this range, or a sensitivity with more schemes",
        end(u64::min),
        end(u64::max)
    ))
}

/// The groups of layers that get one scheme, with their choices.
fn groups(
    variable: &[&Planned],
    found: &Sensitivity,
    target: Target,
    least_bits: u8,
    formats: &[&'static Format],
    engine: Option<Engine>,
) -> Result<Groups> {
    if variable.is_empty() {
        return Err(Error::input("there is no layer left to choose for: every one is skipped or has bits of its own"));
    }
    let fuses = match engine {
        Some(engine) => matches!(engine, Engine::Vllm | Engine::Sglang),
        None => formats.iter().any(|format| !["gguf", "dense", "tritplane"].contains(&format.name)),
    };
    let key = |name: &str| match target {
        Target::Sparsity(_) => block(name),
        // Experts are measured together, and GGUF has those of a layer in one tensor.
        _ if fuses || name.contains(".experts.") => fusion(name).unwrap_or_else(|| name.into()),
        _ => name.into(),
    };
    let mut members: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (number, layer) in variable.iter().enumerate() {
        members.entry(key(&layer.outlined.name)).or_default().push(number);
    }
    let mut groups = Groups { members: members.into_values().collect(), choices: Vec::new(), labels: Vec::new(), overrides: Vec::new() };
    for group in &groups.members {
        let options = group
            .iter()
            .map(|&member| options(variable[member], found, target, least_bits, formats, engine))
            .collect::<Result<Vec<_>>>()?;
        let (mut choices, mut labels, mut overrides) = (Vec::new(), Vec::new(), Vec::new());
        for first in &options[0] {
            // A group has only those choices that all its members have.
            let same: Vec<&Offer> = options.iter().filter_map(|of| of.iter().find(|other| other.change == first.change)).collect();
            if same.len() == group.len() {
                choices.push(Choice { size: same.iter().map(|of| of.size).sum(), cost: same.iter().map(|of| of.cost).sum() });
                labels.push(first.label.clone());
                overrides.push(first.change);
            }
        }
        if choices.is_empty() {
            let name = &variable[group[0]].outlined.name;
            return Err(Error::input("the sensitivity holds no scheme that the recipe, the format and the limits allow here").tensor(name));
        }
        groups.choices.push(choices);
        groups.labels.push(labels);
        groups.overrides.push(overrides);
    }
    Ok(groups)
}

/// One way for one layer.
struct Offer {
    change: (Option<u8>, Option<f64>),
    label: String,
    size: u64,
    cost: f64,
}

fn options(
    layer: &Planned,
    found: &Sensitivity,
    target: Target,
    least_bits: u8,
    formats: &[&'static Format],
    engine: Option<Engine>,
) -> Result<Vec<Offer>> {
    let outlined = &layer.outlined;
    let known = found.layer(&outlined.name).ok_or_else(|| {
        Error::input("the sensitivity does not know this layer; it is of another model, or incomplete").tensor(&outlined.name)
    })?;
    let mut offers = Vec::new();
    for candidate in &known.candidates {
        let kind = Kind::of(&candidate.scheme);
        match (target, kind, outlined.storage) {
            (Target::Sparsity(share), Kind::Sparsity(own), Some(Storage::Sparse(Pattern::Unstructured) | Storage::Ints { .. }))
                if (own - share).abs() <= SPARSITY_SPREAD + 1e-9 =>
            {
                let size = ((1.0 - own) * entries(outlined)) as u64;
                offers.push(Offer { change: (None, Some(own)), label: candidate.scheme.clone(), size, cost: candidate.cost() });
            }
            (Target::Bits(_) | Target::Size(_), Kind::Bits(bits), Some(Storage::Ints { group, symmetric, .. })) => {
                let storage = Storage::Ints { bits, group, symmetric };
                let with = Outlined { storage: Some(storage), ..outlined.clone() };
                let held = formats.iter().all(|format| (format.holds)(&with).is_ok());
                let loads =
                    engine.is_none_or(|engine| formats.iter().all(|format| engine.loads(format, std::slice::from_ref(&with)).is_ok()));
                if bits < least_bits || !held || !loads || !best_of_its_bits(known, candidate, storage) {
                    continue;
                }
                let size = if matches!(target, Target::Size(_)) { stored(&with, formats) } else { storage.bits(with.shape, with.float) };
                offers.push(Offer { change: (Some(bits), None), label: format!("{bits} bits"), size, cost: candidate.cost() });
            }
            (Target::Sparsity(_), _, Some(storage))
                if !matches!(storage, Storage::Sparse(Pattern::Unstructured) | Storage::Ints { .. }) =>
            {
                return Err(Error::input(format!("a target in zeros needs unstructured pruning; the recipe leaves {storage} here"))
                    .tensor(&outlined.name));
            }
            (Target::Bits(_) | Target::Size(_), _, Some(storage)) if !matches!(storage, Storage::Ints { .. }) => {
                return Err(Error::input(format!("a target in bits needs a recipe that makes integers; this one leaves {storage} here"))
                    .tensor(&outlined.name));
            }
            _ => {}
        }
    }
    Ok(offers)
}

/// Of several schemes of the same bits, the one with the groups of the recipe counts, else the first.
fn best_of_its_bits(layer: &LayerSensitivity, candidate: &Candidate, storage: Storage) -> bool {
    let mut same = layer.candidates.iter().filter(|other| Kind::of(&other.scheme) == Kind::of(&candidate.scheme));
    let exact = layer.candidates.iter().find(|other| other.storage == storage.to_string());
    exact.or(same.next()).is_some_and(|best| best.scheme == candidate.scheme)
}

/// The name of the block of a layer: up to its number.
fn block(name: &str) -> String {
    let mut parts: Vec<&str> = name.split('.').collect();
    let number = parts.iter().position(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()));
    parts.truncate(number.map_or(parts.len(), |number| number + 1));
    parts.join(".")
}

/// What targets from the smallest to the largest would reach.
fn curve(groups: &Groups, target: Target, rest: (f64, f64), probe: &Prepared) -> Vec<(f64, f64)> {
    const POINTS: u64 = 24;
    let end = |of: fn(u64, u64) -> u64| {
        groups.choices.iter().map(|group| group.iter().map(|choice| choice.size).reduce(of).unwrap_or(0)).sum::<u64>()
    };
    let (low, high) = (end(u64::min), end(u64::max));
    let point = |number: u64| {
        let limit = low + (high - low) / POINTS * number + if number == POINTS { (high - low) % POINTS } else { 0 };
        let found = allocate::allocate(&groups.choices, limit)?;
        Some((reached(target, &found, rest, probe), found.cost))
    };
    let mut points: Vec<(f64, f64)> = (0..=POINTS).filter_map(point).collect();
    points.dedup();
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_named_up_to_their_number() {
        assert_eq!(block("model.layers.11.mlp.down_proj"), "model.layers.11");
        assert_eq!(block("head"), "head");
    }
}
