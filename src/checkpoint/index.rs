//! The index of a checkpoint in several files: which tensor is in which.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::de::DeserializeSeed;

use crate::checkpoint::files::read_file;
use crate::checkpoint::header;
use crate::error::{Error, Result, shown};

/// Longest index that is parsed, in bytes.
const INDEX_BYTES: u64 = 256 << 20;

/// The index: from tensor to file.
pub type WeightMap = BTreeMap<String, String>;

/// Reads the index file at `path`.
///
/// # Errors
/// When it cannot be read or is not sound.
pub fn read_index(path: &Path) -> Result<WeightMap> {
    let bytes = read_file(path, INDEX_BYTES)?;
    let index = index(&bytes).map_err(|what| Error::input(what).file(path))?;
    index.values().try_for_each(|name| plain_file_name(name)).map_err(|error| error.file(path))?;
    Ok(index)
}

/// Reads the bytes of an index. Names of files in it are not looked at.
///
/// # Errors
/// What is wrong: no JSON, a name that occurs twice, nothing in it.
pub fn index(bytes: &[u8]) -> Result<WeightMap, String> {
    struct Map(BTreeMap<String, String>);
    impl<'de> serde::Deserialize<'de> for Map {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
            header::UniqueStrings(header::TENSORS).deserialize(deserializer).map(Self)
        }
    }
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: Map,
    }
    let index: Index = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if index.weight_map.0.is_empty() {
        return Err("weight_map is empty".into());
    }
    Ok(index.weight_map.0)
}

/// A name from the index may only be one plain file name.
///
/// # Errors
/// When it is anything else.
pub fn plain_file_name(name: &str) -> Result<()> {
    let mut components = Path::new(name).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(part)), None) if part.to_str() == Some(name));
    if plain && name.ends_with(".safetensors") && !name.contains('\0') {
        return Ok(());
    }
    Err(Error::input(format!("names the file {:?}, which is not a plain *.safetensors name", shown(name))))
}

/// Checks an index against the tensors that are there, each with the number of its file.
///
/// # Errors
/// Naming the first tensor that is elsewhere or not in the index.
pub fn agrees(index: &BTreeMap<String, String>, files: &[String], tensors: &BTreeMap<String, usize>) -> Result<()> {
    for (name, file) in index {
        match tensors.get(name) {
            None => {
                return Err(
                    Error::input(format!("said to be in {}, which does not hold it; download both again", shown(file))).tensor(name)
                );
            }
            Some(&number) if files[number] != *file => {
                return Err(Error::input(format!("said to be in {}, but it is in {}", shown(file), files[number])).tensor(name));
            }
            Some(_) => {}
        }
    }
    match tensors.keys().find(|name| !index.contains_key(*name)) {
        Some(name) => {
            Err(Error::input(format!("stands in {} but not in the index; download the index again", files[tensors[name]])).tensor(name))
        }
        None => Ok(()),
    }
}
