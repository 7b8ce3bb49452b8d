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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_a_map_of_names_that_occur_once() {
        let read = index(br#"{"metadata":{"total_size":1},"weight_map":{"b":"y.safetensors","a":"x.safetensors"}}"#).unwrap();
        assert_eq!(read, WeightMap::from([("a".into(), "x.safetensors".into()), ("b".into(), "y.safetensors".into())]));
        for (text, reason) in [
            (r#"{"weight_map":{}}"#, "empty"),
            (r#"{"weight_map":{"a":"x","a":"x"}}"#, "a occurs twice"),
            (r#"{"weight_map":{"a":1}}"#, "invalid type"),
            ("{}", "missing field"),
        ] {
            assert!(index(text.as_bytes()).unwrap_err().contains(reason), "{text}");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index.json");
        std::fs::write(&path, format!(r#"{{"weight_map":{{"a":"x.safetensors"}}{}}}"#, " ".repeat(4000))).unwrap();
        assert_eq!(read_index(&path).unwrap().len(), 1);
        std::fs::write(&path, r#"{"weight_map":{"a":"../x.safetensors"}}"#).unwrap();
        assert!(read_index(&path).unwrap_err().to_string().contains("index.json: names the file"));
    }

    #[test]
    fn files_have_plain_names() {
        plain_file_name("model-00001-of-00002.safetensors").unwrap();
        for name in ["", ".", "..", "../a.safetensors", "a/b.safetensors", "/a.safetensors", "./a.safetensors", "a.safetensors/", "a.bin"] {
            assert!(plain_file_name(name).is_err(), "{name}");
        }
        assert!(plain_file_name("a\0.safetensors").is_err() && plain_file_name("a//.safetensors").is_err());
    }

    #[test]
    fn an_index_names_every_tensor_and_the_file_that_holds_it() {
        let files = ["x.safetensors".to_string(), "y.safetensors".into()];
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(name, file)| (name.to_string(), format!("{file}.safetensors"))).collect();
        let tensors = BTreeMap::from([("a".to_string(), 0), ("b".to_string(), 1)]);
        let check = |pairs: &[(&str, &str)]| agrees(&map(pairs), &files, &tensors).map_err(|error| error.to_string());
        assert_eq!(check(&[("a", "x"), ("b", "y")]), Ok(()));
        assert!(check(&[("a", "x"), ("b", "x")]).unwrap_err().contains("tensor b: said to be in x.safetensors, but it is in y"));
        assert!(check(&[("a", "x"), ("b", "y"), ("c", "y")]).unwrap_err().contains("tensor c: said to be in y"));
        assert!(check(&[("a", "x")]).unwrap_err().contains("tensor b: stands in y.safetensors but not in the index"));
    }
}
