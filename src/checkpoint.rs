//! A Hugging Face model folder: shards or one file, index, config.json, tokenizer.json and whatever else lies
//! beside them. Everything in it is untrusted; it is checked completely before any weight is read.

pub mod decode;
pub mod files;
pub mod header;
pub mod index;
pub mod shard;
pub mod source;
pub mod stacked;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use files::{hash_file, read_file, read_json};
pub use header::TensorInfo;
use index::{WeightMap, agrees, read_index};
use safetensors::Dtype;
use serde_json::Value;
pub use shard::{Bytes, Shard};

use crate::error::{Error, Result, shown};
use crate::matrix::Matrix;
use crate::weight::{Float, Stored};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An opened and checked model folder.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder.
    pub folder: PathBuf,
    /// config.json as it stands.
    pub config: Value,
    /// The safetensors files in order of name.
    pub shards: Vec<Shard>,
    tensors: BTreeMap<String, usize>,
}

impl Checkpoint {
    /// Opens a folder and checks the headers of all its files against their sizes and against the index.
    ///
    /// # Errors
    /// One line naming the file and the tensor that are wrong.
    pub fn open(folder: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(folder).map_err(|error| Error::unreadable(folder, &error))?;
        if !metadata.is_dir() {
            return Err(Error::input("not a folder; give the folder that holds config.json and the safetensors files").file(folder));
        }
        let config = read_json(&folder.join("config.json"))?;
        if !config.is_object() {
            return Err(Error::input("not a JSON object").file(&folder.join("config.json")));
        }
        let kind = &config["model_type"];
        if kind.as_str().is_none_or(|kind| kind.trim().is_empty()) {
            let found = if kind.is_null() { "missing".to_string() } else { shown(&kind.to_string()) };
            return Err(Error::input(format!("model_type is {found}, it must name a family of models")).file(&folder.join("config.json")));
        }
        let (names, index) = shard_names(folder)?;
        let shards = names.iter().map(|name| Shard::open(&folder.join(name))).collect::<Result<Vec<_>>>()?;
        let mut tensors = BTreeMap::new();
        for (number, shard) in shards.iter().enumerate() {
            for name in shard.header.tensors.keys() {
                if let Some(other) = tensors.insert(name.clone(), number) {
                    let other = &names[other];
                    return Err(Error::input(format!("stands in {other} too; remove one of the two files")).tensor(name).file(&shard.path));
                }
            }
        }
        if let Some(index) = index {
            agrees(&index, &names, &tensors).map_err(|error| error.file(&folder.join(INDEX)))?;
        }
        Ok(Self { folder: folder.to_path_buf(), config, shards, tensors })
    }

    /// Names of all tensors in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether a tensor is there.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// What the header says of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.shard(name)?.header.tensors.get(name)
    }

    fn shard(&self, name: &str) -> Option<&Shard> {
        self.tensors.get(name).map(|&number| &self.shards[number])
    }

    fn located(&self, name: &str) -> Result<(&Shard, &TensorInfo)> {
        let shard = self.shard(name).ok_or_else(|| {
            Error::input("missing; the checkpoint is incomplete, or its config.json belongs to another model")
                .tensor(name)
                .file(&self.folder)
        })?;
        Ok((shard, &shard.header.tensors[name]))
    }

    /// Tells the system that all tensors whose names begin so will be read soon.
    pub fn expect(&self, prefix: &str) {
        for (name, &number) in self.tensors.range(prefix.to_owned()..).take_while(|(name, _)| name.starts_with(prefix)) {
            if let Some(info) = self.shards[number].header.tensors.get(name) {
                self.shards[number].expect(info);
            }
        }
    }

    /// The stored bytes of a tensor.
    ///
    /// # Errors
    /// When the tensor is missing or cannot be read.
    pub fn bytes(&self, name: &str) -> Result<Bytes> {
        let (shard, info) = self.located(name)?;
        shard.bytes(info, 0..info.bytes())
    }

    /// Reads single rows of a matrix in f32, without mapping the whole of it: the embedding of some tokens.
    ///
    /// # Errors
    /// As [`Self::matrix`], or when a row is beyond the end.
    pub fn gather(&self, name: &str, shape: [usize; 2], rows: &[u32]) -> Result<Matrix> {
        let float = self.float(name)?;
        let (shard, info) = self.located(name)?;
        let width = (shape[1] * float.bytes()) as u64;
        let mut bytes = vec![0; shape[1] * float.bytes()];
        let mut data = vec![0.0; rows.len() * shape[1]];
        for (&row, out) in rows.iter().zip(data.chunks_exact_mut(shape[1])) {
            if row as usize >= shape[0] {
                return Err(Error::input(format!(
                    "token {row} is beyond the {} rows of the embedding; tokenizer.json belongs to another model",
                    shape[0]
                ))
                .tensor(name)
                .file(&shard.path));
            }
            shard.read(info, u64::from(row) * width, &mut bytes)?;
            decode::decode_chunk(float, &bytes, out);
        }
        shard.unchanged()?;
        match decode::nonfinite(&data) {
            Some((_, count)) => {
                Err(Error::input(format!("{count} values are NaN or infinite; the model is damaged")).tensor(name).file(&shard.path))
            }
            None => Ok(Matrix::new(rows.len(), shape[1], data)),
        }
    }

    /// The number format of a tensor of floats.
    ///
    /// # Errors
    /// When the tensor is missing or does not hold BF16, F16 or F32.
    pub fn float(&self, name: &str) -> Result<Float> {
        let (shard, info) = self.located(name)?;
        float_of(info.dtype).ok_or_else(|| {
            Error::input(format!("holds {:?}, this reads BF16, F16 and F32; convert the checkpoint first", info.dtype))
                .tensor(name)
                .file(&shard.path)
        })
    }

    /// A matrix in f32, checked for its shape and for NaN and infinity.
    ///
    /// # Errors
    /// When it is missing, of another type or shape, or not finite.
    pub fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Matrix> {
        self.rows(name, shape, 0..shape[0])
    }

    /// A matrix as it is stored, checked as in [`Self::matrix`].
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub fn stored(&self, name: &str, shape: [usize; 2]) -> Result<Stored> {
        self.stored_part(name, &shape, 0, shape)
    }

    /// A matrix that is part of a tensor of some shape, from entry `first` on, as it is stored, checked as in [`Self::matrix`].
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub fn stored_part(&self, name: &str, whole: &[usize], first: usize, shape: [usize; 2]) -> Result<Stored> {
        let float = self.float(name)?;
        let (shard, info) = self.located(name)?;
        expect(info, whole).map_err(|error| error.tensor(name).file(&shard.path))?;
        let at = |entry: usize| entry as u64 * float.bytes() as u64;
        let bytes = shard.bytes(info, at(first)..at(first + shape[0] * shape[1]))?;
        if let Some((first, count)) = decode::nonfinite_bytes(float, &bytes) {
            return Err(nonfinite(first, count).tensor(name).file(&shard.path));
        }
        Ok(Stored { rows: shape[0], columns: shape[1], float, bytes: Arc::new(bytes), decode: decode::decode_chunk })
    }

    /// Some rows of a matrix in f32, checked as in [`Self::matrix`].
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub fn rows(&self, name: &str, shape: [usize; 2], rows: Range<usize>) -> Result<Matrix> {
        let data = self.floats(name, &shape, rows.start * shape[1]..rows.end * shape[1])?;
        Ok(Matrix::new(rows.len(), shape[1], data))
    }

    /// A vector in f32, checked as in [`Self::matrix`].
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>> {
        self.floats(name, &[length], 0..length)
    }

    /// The bytes from one place of a tensor to another.
    ///
    /// # Errors
    /// When the tensor is missing, ends before, or cannot be read.
    pub fn part(&self, name: &str, bytes: Range<usize>) -> Result<Bytes> {
        let (shard, info) = self.located(name)?;
        shard.bytes(info, bytes.start as u64..bytes.end as u64)
    }

    /// Some entries of a tensor of some shape in f32, checked as in [`Self::matrix`].
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub fn floats(&self, name: &str, shape: &[usize], entries: Range<usize>) -> Result<Vec<f32>> {
        let float = self.float(name)?;
        let (shard, info) = self.located(name)?;
        expect(info, shape).map_err(|error| error.tensor(name).file(&shard.path))?;
        let width = float.bytes() as u64;
        let bytes = shard.bytes(info, entries.start as u64 * width..entries.end as u64 * width)?;
        let mut out = vec![0.0; entries.len()];
        decode::decode(float, &bytes, &mut out);
        if let Some((first, count)) = decode::nonfinite(&out) {
            return Err(nonfinite(entries.start + first, count).tensor(name).file(&shard.path));
        }
        Ok(out)
    }

    /// blake3 of what the model is made of: its configuration and every file of weights.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn fingerprint(&self) -> Result<String> {
        let config = self.folder.join("config.json");
        let files = std::iter::once(config.as_path()).chain(self.shards.iter().map(|shard| shard.path.as_path()));
        let mut all = blake3::Hasher::new();
        for path in files {
            all.update(hash_file(path)?.as_bytes());
        }
        Ok(all.finalize().to_hex().to_string())
    }

    /// Side files: everything in the folder that is neither a weight file nor its index, in order of name.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn side_files(&self) -> Result<Vec<PathBuf>> {
        Ok(self.listing()?.into_iter().filter(|path| is_side_file(path)).collect())
    }

    /// Names of what is in the folder and is neither read nor a side file: folders, weights in other formats, weight
    /// files that the index does not name.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn left_behind(&self) -> Result<Vec<String>> {
        let read = |path: &PathBuf| self.shards.iter().any(|shard| shard.path.file_name() == path.file_name());
        let name = |path: &PathBuf| shown(&path.file_name().unwrap_or_default().to_string_lossy());
        let known = |name: &String| name == "config.json" || name == INDEX || name.starts_with('.');
        Ok(self.listing()?.iter().filter(|path| !is_side_file(path) && !read(path)).map(name).filter(|name| !known(name)).collect())
    }

    fn listing(&self) -> Result<Vec<PathBuf>> {
        let entries = std::fs::read_dir(&self.folder).map_err(|error| Error::unreadable(&self.folder, &error))?;
        let mut paths =
            entries.map(|entry| Ok(entry.map_err(|error| Error::unreadable(&self.folder, &error))?.path())).collect::<Result<Vec<_>>>()?;
        paths.sort();
        Ok(paths)
    }

    /// `__metadata__` of all files together.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.shards.iter().flat_map(|shard| shard.header.metadata.clone()).collect()
    }
}

fn is_side_file(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let weights = [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"].iter().any(|end| name.ends_with(end));
    let index = name.ends_with(".safetensors.index.json") || name.ends_with(".bin.index.json");
    // A name that is no text cannot stand in a manifest.
    let text = path.file_name().is_some_and(|name| name.to_str().is_some());
    text && path.is_file() && !weights && !index && !name.starts_with('.') && name != "config.json"
}

fn expect(info: &TensorInfo, shape: &[usize]) -> Result<()> {
    if info.shape == shape {
        return Ok(());
    }
    Err(Error::input(format!("has shape {:?}, config.json asks for {shape:?}", info.shape)))
}

fn nonfinite(first: usize, count: usize) -> Error {
    Error::input(format!("{count} values are NaN or infinite, the first at index {first}; the model is damaged"))
}

/// The float format of a safetensors type, where it is one that we compute with.
pub fn float_of(dtype: Dtype) -> Option<Float> {
    match dtype {
        Dtype::BF16 => Some(Float::BF16),
        Dtype::F16 => Some(Float::F16),
        Dtype::F32 => Some(Float::F32),
        _ => None,
    }
}

/// The safetensors type of a float format.
pub fn dtype_of(float: Float) -> Dtype {
    match float {
        Float::BF16 => Dtype::BF16,
        Float::F16 => Dtype::F16,
        Float::F32 => Dtype::F32,
    }
}

/// The names of the weight files and, where there is one, the index's map from tensors to files.
fn shard_names(folder: &Path) -> Result<(Vec<String>, Option<WeightMap>)> {
    let index_path = folder.join(INDEX);
    if index_path.exists() {
        let index = read_index(&index_path)?;
        let names: BTreeSet<String> = index.values().cloned().collect();
        for name in &names {
            if !folder.join(name).exists() {
                return Err(Error::input(format!("names {}, which is not in the folder; download it again", shown(name))).file(&index_path));
            }
        }
        return Ok((names.into_iter().collect(), Some(index)));
    }
    if std::fs::symlink_metadata(folder.join(SINGLE)).is_ok() {
        return Ok((vec![SINGLE.into()], None));
    }
    let entries = std::fs::read_dir(folder).map_err(|error| Error::unreadable(folder, &error))?;
    let mut names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    let with_end = |end: &str| names.iter().find(|name| name.ends_with(end)).cloned();
    let safetensors: Vec<String> = names.iter().filter(|name| name.ends_with(".safetensors")).cloned().collect();
    if let [only] = safetensors.as_slice() {
        return Ok((vec![only.clone()], None));
    }
    if safetensors.len() > 1 {
        return Err(Error::input(format!("{} safetensors files but no {INDEX}; download the index", safetensors.len())).file(folder));
    }
    if let Some(pickle) = with_end(".bin").or_else(|| with_end(".pt")).or_else(|| with_end(".pth")) {
        return Err(Error::input(format!(
            "holds only the pickle {}; convert it with save_pretrained(safe_serialization=True)",
            shown(&pickle)
        ))
        .file(folder));
    }
    if let Some(gguf) = with_end(".gguf") {
        return Err(Error::input(format!("holds only {}; give the original Hugging Face folder", shown(&gguf))).file(folder));
    }
    Err(Error::input(format!("no {SINGLE} and no {INDEX}; give a Hugging Face model folder")).file(folder))
}
