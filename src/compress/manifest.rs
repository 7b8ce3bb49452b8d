//! What an output depends on, and the hashes of all its files.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::calibrate::corpus::Source as Origin;
use crate::calibrate::corpus::TEXT_BYTES;
use crate::checkpoint::files::hash_within;
use crate::checkpoint::{Checkpoint, hash_file, read_json};
use crate::compress::Job;
use crate::compress::destination::MANIFEST;
use crate::device::Device;
use crate::error::{Error, Result, shown};
use crate::formats::targets::Engine;
use crate::storage::Store;

/// Version of the manifest's shape and of the work folder.
const VERSION: u32 = 1;

/// Longest side file of a model that is hashed before the work, in bytes.
const HASHED_BYTES: u64 = 256 << 20;

/// Files of an output that the manifest does not speak of: itself, times, and pages that can be made again at any time.
const LEFT_OUT: [&str; 4] = [MANIFEST, "timing.json", "report.html", "report.md"];

/// manifest.json of an output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Manifest {
    /// Version of this shape.
    pub version: u32,
    /// Version of the program.
    pub drawknife: String,
    /// blake3 of the recipe as JSON.
    pub recipe_blake3: String,
    /// Files of the model: weights with the hash of their header, others with that of all their bytes.
    pub inputs: BTreeMap<String, Hashed>,
    /// Files of the output.
    pub files: BTreeMap<String, Hashed>,
}

/// A file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Hashed {
    /// Its length.
    pub bytes: u64,
    /// blake3 of what is hashed of it.
    pub blake3: String,
}

/// Everything that the bytes of an output depend on; whoever goes on with a work needs the same. No path is in it, so that a
/// model may lie elsewhere, and no number of threads.
///
/// # Errors
/// When a file cannot be read.
pub fn dependencies(job: &Job, checkpoint: &Checkpoint, device: &Device) -> Result<Map<String, Value>> {
    let text = match &job.quality {
        Some(options) => {
            let text = options.text.as_deref().map(|path| hash_within(path, TEXT_BYTES)).transpose()?.map(|hash| hash.to_hex().to_string());
            let protocol = options.protocol;
            json!({"text": text.unwrap_or_else(|| "built in".into()), "tokens": protocol.max_tokens, "seq": protocol.seq})
        }
        None => Value::Null,
    };
    let sensitivity = job.recipe.allocate.as_ref().and_then(|wish| wish.sensitivity.as_deref());
    let sensitivity = sensitivity.map(hash_file).transpose()?.map(|hash| hash.to_hex().to_string());
    let recipe = serde_json::to_value(&job.recipe).map_err(|error| Error::run(error.to_string()))?;
    let value = json!({
        "drawknife": env!("CARGO_PKG_VERSION"), "version": VERSION, "recipe": recipe, "for": job.engine.map(Engine::name),
        "calibration": calibration(job), "sensitivity": sensitivity, "quality": text, "device": device.identity(), "model": inputs(checkpoint)?,
    });
    match value {
        Value::Object(map) => Ok(map),
        _ => Ok(Map::new()),
    }
}

/// As [`dependencies`], of a checkpoint or a GGUF file that is written in another format.
///
/// # Errors
/// When a file cannot be read.
pub fn of_export(model: &Path, checkpoint: &Checkpoint, format: &str) -> Result<Map<String, Value>> {
    let inputs = if model == checkpoint.folder {
        inputs(checkpoint)?
    } else {
        json!({name(model): {"bytes": model.metadata().map_or(0, |file| file.len()), "blake3": hash_file(model)?.to_hex().as_str()}})
    };
    let value = json!({"drawknife": env!("CARGO_PKG_VERSION"), "version": VERSION, "recipe": {"export": format}, "model": inputs});
    Ok(value.as_object().cloned().unwrap_or_default())
}

/// Hashes of the files that calibration reads.
fn calibration(job: &Job) -> Vec<String> {
    let sources = job.recipe.calibration.source.0.iter().flat_map(|source| source.split(','));
    let files = sources.filter_map(|source| match source.trim().parse() {
        Ok(Origin::File(path)) => Some(path),
        _ => None,
    });
    // A file that cannot be read is told of where it is read.
    files.map(|path| hash_within(&path, TEXT_BYTES).map_or_else(|_| "unreadable".into(), |hash| hash.to_hex().to_string())).collect()
}

/// What says that the files of a model are the same ones.
fn inputs(checkpoint: &Checkpoint) -> Result<Value> {
    let mut files = Map::new();
    for shard in &checkpoint.shards {
        let metadata = std::fs::metadata(&shard.path).map_err(|error| Error::unreadable(&shard.path, &error))?;
        let modified = format!("{}.{:09}", metadata.mtime(), metadata.mtime_nsec());
        let value = json!({"bytes": metadata.len(), "modified": modified, "blake3": shard.header.blake3});
        files.insert(name(&shard.path), value);
    }
    let mut others = checkpoint.side_files()?;
    others.push(checkpoint.folder.join("config.json"));
    for path in others {
        let metadata = std::fs::metadata(&path).map_err(|error| Error::unreadable(&path, &error))?;
        let bytes = metadata.len();
        // Large side files are told by their time, as weights are.
        let value = if bytes > HASHED_BYTES {
            json!({"bytes": bytes, "modified": format!("{}.{:09}", metadata.mtime(), metadata.mtime_nsec())})
        } else {
            json!({"bytes": bytes, "blake3": hash_file(&path)?.to_hex().as_str()})
        };
        files.insert(name(&path), value);
    }
    Ok(Value::Object(files))
}

fn name(path: &Path) -> String {
    shown(&path.file_name().unwrap_or_default().to_string_lossy())
}

/// Writes the manifest of a folder whose other files are complete. `dependencies` is what they depend on.
///
/// # Errors
/// When a file cannot be read or the disk refuses.
pub fn write(folder: &Path, dependencies: &Map<String, Value>, storage: &dyn Store) -> Result<()> {
    let empty = Map::new();
    let inputs = dependencies.get("model").and_then(Value::as_object).unwrap_or(&empty);
    let input = |(name, file): (&String, &Value)| {
        let blake3 = file["blake3"].as_str().unwrap_or_default().to_owned();
        (name.clone(), Hashed { bytes: file["bytes"].as_u64().unwrap_or_default(), blake3 })
    };
    let recipe = dependencies.get("recipe").map(Value::to_string).unwrap_or_default();
    let manifest = Manifest {
        version: VERSION,
        drawknife: env!("CARGO_PKG_VERSION").into(),
        recipe_blake3: blake3::hash(recipe.as_bytes()).to_hex().to_string(),
        inputs: inputs.iter().map(input).collect(),
        files: files(folder)?.into_iter().map(|path| hashed(folder, path)).collect::<Result<_>>()?,
    };
    storage.put_json(&folder.join(MANIFEST), &manifest).map(drop)
}

fn hashed(folder: &Path, path: PathBuf) -> Result<(String, Hashed)> {
    let bytes = std::fs::metadata(&path).map_err(|error| Error::unreadable(&path, &error))?.len();
    let relative = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy().into_owned();
    Ok((relative, Hashed { bytes, blake3: hash_file(&path)?.to_hex().to_string() }))
}

/// The files below a folder that a manifest speaks of.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|error| Error::unreadable(folder, &error))?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else if !LEFT_OUT.iter().any(|name| path.ends_with(name)) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Compares the files of a folder with its manifest, or with the part of it in the manifest of the folder above where several
/// formats were written; gives how many there are, or nothing where there is no manifest.
///
/// # Errors
/// Naming the first file that is missing, surplus among the weights, or other than it was written.
pub fn verify(folder: &Path) -> Result<Option<usize>> {
    let whole = folder.canonicalize().map_err(|error| Error::unreadable(folder, &error))?;
    let above = whole.parent().filter(|_| !folder.join(MANIFEST).exists());
    let within = above.map_or_else(PathBuf::new, |_| PathBuf::from(whole.file_name().unwrap_or_default()));
    let folder = above.unwrap_or(folder);
    let path = folder.join(MANIFEST);
    if !path.exists() {
        return Ok(None);
    }
    let manifest: Manifest =
        serde_json::from_value(read_json(&path)?).map_err(|error| Error::input(format!("is no manifest: {error}")).file(&path))?;
    let listed: Vec<(&String, &Hashed)> = manifest.files.iter().filter(|(name, _)| Path::new(name).starts_with(&within)).collect();
    if listed.is_empty() {
        return Ok(None);
    }
    for (name, expected) in &listed {
        let plain = Path::new(name).components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if !plain || name.is_empty() {
            return Err(Error::input(format!("names {}, which is not a file of this folder", shown(name))).file(&path));
        }
        let file = folder.join(name);
        let metadata = std::fs::metadata(&file).map_err(|error| Error::unreadable(&file, &error))?;
        if !metadata.is_file() {
            return Err(Error::input("is not a regular file").file(&file));
        }
        if metadata.len() != expected.bytes {
            return Err(Error::input(format!("has {} bytes, {} were written; copy it again", metadata.len(), expected.bytes)).file(&file));
        }
        if hash_file(&file)?.to_hex().as_str() != expected.blake3 {
            return Err(Error::input("is not as it was written: its hash differs from manifest.json; copy it again").file(&file));
        }
    }
    let surplus = |path: &PathBuf| {
        let relative = path.strip_prefix(folder).unwrap_or(path).to_string_lossy();
        path.extension().is_some_and(|end| end == "safetensors" || end == "gguf") && !manifest.files.contains_key(relative.as_ref())
    };
    if let Some(path) = files(&folder.join(within))?.into_iter().find(surplus) {
        return Err(Error::input("is not in manifest.json; it does not belong here").file(&path));
    }
    Ok(Some(listed.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Disk;

    #[test]
    fn every_change_of_a_file_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        assert_eq!(verify(folder.path()).unwrap(), None);
        std::fs::create_dir(path("gguf")).unwrap();
        for name in ["model.safetensors", "config.json", "gguf/model.gguf", "report.html", "timing.json"] {
            std::fs::write(path(name), format!("what {name} holds")).unwrap();
        }
        write(folder.path(), &Map::new(), &Disk).unwrap();
        assert_eq!(verify(folder.path()).unwrap(), Some(3), "pages and times are not in it");
        std::fs::write(path("report.html"), "another").unwrap();
        assert_eq!(verify(folder.path()).unwrap(), Some(3));
        for name in ["model.safetensors", "gguf/model.gguf"] {
            let whole = std::fs::read(path(name)).unwrap();
            for bit in 0..8 * whole.len() {
                let mut flipped = whole.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                std::fs::write(path(name), flipped).unwrap();
                assert!(verify(folder.path()).unwrap_err().to_string().contains(name), "{bit}");
            }
            std::fs::write(path(name), &whole[1..]).unwrap();
            assert!(verify(folder.path()).unwrap_err().to_string().contains("bytes"));
            std::fs::remove_file(path(name)).unwrap();
            assert!(verify(folder.path()).is_err());
            std::fs::write(path(name), whole).unwrap();
        }
        std::fs::write(path("other.safetensors"), "").unwrap();
        assert!(verify(folder.path()).unwrap_err().to_string().contains("does not belong"));
        std::fs::remove_file(path("other.safetensors")).unwrap();
        let text = std::fs::read_to_string(path(MANIFEST)).unwrap();
        assert_eq!(verify(&path("gguf")).unwrap(), Some(1), "one format of several");
        for wrong in ["../config.json", "/etc/hostname", ""] {
            std::fs::write(path(MANIFEST), text.replace("\"config.json\"", &format!("{wrong:?}"))).unwrap();
            assert!(verify(folder.path()).unwrap_err().to_string().contains("not a file of this folder"), "{wrong}");
        }
    }
}
