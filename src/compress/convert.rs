//! The verb `export`: a compressed checkpoint in another format, where that format holds exactly the same weights.

use std::path::Path;

use crate::checkpoint::{Checkpoint, read_file};
use crate::compress::destination::Destination;
use crate::compress::exports::{Export, Sinks, carry};
use crate::compress::gguf::unpack::Unpacked;
use crate::compress::layers::candidates;
use crate::compress::manifest;
use crate::error::{Error, Result};
use crate::formats;
use crate::model::Model;
use crate::model::computes;
use crate::plan::recipe;
use crate::plan::{Plan, Planned};
use crate::run::Run;
use crate::storage::Store;
use crate::weight::{Float, Ints, Outlined, Storage, Trits, Weight};

/// What was written.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Converted {
    /// The format.
    pub format: &'static str,
    /// Layers that are packed in it.
    pub layers: usize,
    /// Bytes of all its tensors.
    pub bytes: u64,
}

/// Writes a checkpoint in another format.
///
/// # Errors
/// When the format is unknown or does not hold a layer exactly, which is said before anything is written.
pub fn convert(model: &Path, format: &str, mut destination: Destination, run: &Run<'_>) -> Result<Converted> {
    match fill(model, format, &mut destination, run) {
        Ok((converted, true)) => Ok(converted),
        Ok((converted, false)) => destination.publish().map(|()| converted),
        Err(error) => Err(destination.give_up(error)),
    }
}

/// Fills the work folder; says whether an earlier run had put it into place already.
fn fill(model: &Path, format: &str, destination: &mut Destination, run: &Run<'_>) -> Result<(Converted, bool)> {
    let unpacked = Unpacked::open(model, run.scratch)?;
    let checkpoint = Checkpoint::open(unpacked.folder())?;
    let source = formats::open(&checkpoint)?;
    let known = computes(&checkpoint);
    let opened = if known { Some(Model::open(&checkpoint, source.as_ref())?) } else { None };
    let mut layers = Vec::new();
    let candidates = candidates(&checkpoint, source.as_ref(), opened.as_ref())?;
    run.observer.begin("look at layers", candidates.len() as u64);
    for candidate in candidates {
        run.check_stop()?;
        let weight = source.weight(&checkpoint, &candidate.name, candidate.shape)?;
        let outlined = outlined(&candidate.name, weight, format).map_err(|what| Error::input(what).tensor(&candidate.name))?;
        layers.push(Planned { outlined, stages: Vec::new(), bits: None, sparsity: None });
        run.observer.step(1, &candidate.name);
    }
    run.observer.end();
    let outlines: Vec<Outlined> = layers.iter().map(|layer| layer.outlined.clone()).collect();
    let format = formats::fitting(format, &outlines)?;
    let plan = Plan { stages: Vec::new(), layers, notes: Vec::new(), experts: None, everywhere: false, places: Default::default() };
    let export = Export::new(&checkpoint, source.as_ref(), &plan, format, &Default::default(), (&recipe::Export::default(), false))?;
    let dependencies = manifest::of_export(model, &checkpoint, format.name)?;
    let packed = export.layers.iter().filter(|layer| layer.storage.is_some()).count();
    let converted = Converted { format: format.name, layers: packed, bytes: export.bytes() };
    if destination.begin(&dependencies)? {
        return Ok((converted, true));
    }
    let (folder, work) = (destination.folder(), &destination.work);
    let storage: &dyn Store = work.storage.as_ref();
    destination.has_room(export.bytes())?;
    let exports = [export];
    let mut sinks = Sinks::create(&exports, &checkpoint.metadata(), work, u64::MAX)?;
    carry(&checkpoint, source.as_ref(), &plan, &Default::default(), &mut sinks, run)?;
    run.observer.begin("convert", packed as u64);
    for layer in exports[0].layers.iter().filter(|layer| layer.storage.is_some()) {
        run.check_stop()?;
        if sinks.was_done(&layer.name) {
            run.observer.step(1, &layer.name);
            continue;
        }
        let weight = source.weight(&checkpoint, &layer.name, layer.shape)?;
        let weight = if matches!(layer.storage, Some(Storage::Ints { .. })) { as_integers(weight) } else { weight };
        sinks.layer(&layer.name, &weight)?;
        sinks.commit_if_due(&mut Vec::new())?;
        run.observer.step(1, &layer.name);
    }
    run.observer.end();
    sinks.finish(Vec::new(), work)?;
    exports[0].side_files(&checkpoint, &folder, storage)?;
    let report = checkpoint.folder.join("report.json");
    if report.exists() {
        storage.put(&folder.join("report.json"), &read_file(&report, 256 << 20)?)?;
    }
    exports[0].verify(&folder)?;
    manifest::write(&folder, &dependencies, storage)?;
    Ok((converted, false))
}

/// What the other format is to hold of a layer: what it is now, or the same numbers in another storage.
fn outlined(name: &str, weight: Weight, format: &str) -> Result<Outlined, String> {
    let shape = weight.shape();
    let layer = |storage, float| Outlined { name: name.into(), shape, storage, float };
    if let Weight::Stored(stored) = &weight {
        return Ok(layer(None, stored.float));
    }
    let wanted = formats::find(format).map_err(|error| error.to_string())?;
    let float = match &weight {
        // Products of scales and whole numbers need more digits than 16 bits have.
        _ if format == formats::dense::FORMAT.name => Float::F32,
        Weight::Ints(ints) => wanted.scales.unwrap_or(ints.scale_float),
        Weight::Dense(_) | Weight::Sparse(_) => Float::F32,
        _ => Float::F16,
    };
    if format == formats::dense::FORMAT.name {
        return Ok(layer(Some(Storage::Dense), float));
    }
    let scales = match &weight {
        Weight::Ints(ints) => Some(&ints.scales),
        _ => None,
    };
    if let Some(scale) = scales.and_then(|scales| scales.iter().find(|&&scale| float.round(scale) != scale)) {
        return Err(format!(
            "the scale {scale:e} is not a number of {float:?}, in which {format} stores scales; use --format compressed-tensors"
        ));
    }
    let as_it_is = layer(Some(weight.storage()), float);
    let refused = match (wanted.holds)(&as_it_is) {
        Ok(()) => return Ok(as_it_is),
        Err(_) if formats::fitting(format, std::slice::from_ref(&as_it_is)).is_ok() => return Ok(as_it_is),
        Err(refused) => refused,
    };
    match as_integers(weight) {
        Weight::Ints(ints) => Ok(layer(Some(Storage::Ints { bits: ints.bits, group: ints.group, symmetric: true }), Float::F16)),
        _ => Err(refused),
    }
}

/// Trits whose coarse scale is three times the fine one everywhere, as 4-bit integers; anything else as it is.
fn as_integers(weight: Weight) -> Weight {
    let Weight::Trits(trits) = weight else { return weight };
    if !trits.scales.iter().all(|[coarse, fine]| *coarse == 3.0 * fine) {
        return Weight::Trits(trits);
    }
    let Trits { rows, columns, group, codes, scales, scale_float } = trits;
    // α(3·t₁ + t₂) with 3·t₁ + t₂ + 4 as the code of trits and 8 as the middle of 4 bits.
    let codes = codes.into_iter().map(|code| code + 4).collect();
    let scales = scales.into_iter().map(|[_, fine]| fine).collect();
    Weight::Ints(Ints { rows, columns, bits: 4, group, codes, scales, scale_float, zeros: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tied_trits_are_integers_and_others_are_not() {
        let trits = |coarse: f32| Trits {
            rows: 1,
            columns: 9,
            group: 9,
            codes: (0..9).collect(),
            scales: vec![[coarse, 0.5]],
            scale_float: Float::F16,
        };
        let tied = trits(1.5);
        let Weight::Ints(ints) = as_integers(Weight::Trits(tied.clone())) else { panic!("tied scales make integers") };
        assert_eq!(ints.to_matrix().data, tied.to_matrix().data);
        assert!(matches!(as_integers(Weight::Trits(trits(1.25))), Weight::Trits(_)));
        assert!(outlined("a", Weight::Trits(trits(1.25)), "gguf").unwrap_err().contains("no place"));
        assert_eq!(outlined("a", Weight::Trits(trits(1.25)), "dense").unwrap().float, Float::F32);
    }
}
