//! Safetensors files whose layout is known before their data: headers first, then bytes at their offsets in any order. They
//! are complete when every byte of every tensor was written. [`Layout`] is the plan of it and does no input or output,
//! [`Files`] are the files on a disk, [`Output`] is both for who writes at once.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::error::{Error, Fault, Result, shown};
use crate::formats::Entry;
use crate::storage::{Disk, Opened, Store, json as json_text};

const INDEX: &str = "model.safetensors.index.json";

/// Bytes that are read at once where they are only hashed.
const READ_BYTES: u64 = 8 << 20;

/// Where every tensor lies, and how much of it was taken so far.
#[derive(Debug, Default)]
pub struct Layout {
    /// The files, in order.
    pub files: Vec<LaidOut>,
    places: BTreeMap<String, Place>,
    index: Option<Value>,
}

/// A file that is to be.
#[derive(Debug)]
pub struct LaidOut {
    /// Its name.
    pub name: String,
    /// All before the first tensor.
    pub beginning: Vec<u8>,
    /// Length.
    pub bytes: u64,
}

#[derive(Debug)]
struct Place {
    file: usize,
    start: u64,
    bytes: u64,
    written: u64,
}

/// Bytes for an offset of a file.
#[derive(Debug)]
pub struct Piece {
    /// Number of the file.
    pub file: usize,
    /// Where in it.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The tensor that they are of.
    pub tensor: String,
    /// Whether they are its last.
    pub last: bool,
}

impl Layout {
    /// Lays out safetensors files: tensors in the given order, a new file when one would exceed `shard_bytes`.
    ///
    /// # Errors
    /// When a header is no JSON.
    ///
    /// # Panics
    /// When two entries have one name.
    pub fn shards(entries: &[Entry], shard_bytes: u64, metadata: &BTreeMap<String, String>) -> Result<Self> {
        let mut plan: Vec<Vec<&Entry>> = vec![Vec::new()];
        let mut filled = 0;
        for entry in entries {
            if filled > 0 && filled + entry.bytes() > shard_bytes {
                plan.push(Vec::new());
                filled = 0;
            }
            filled += entry.bytes();
            plan.last_mut().expect("one shard at least").push(entry);
        }
        let mut layout = Self::default();
        let mut map = Map::new();
        for (number, entries) in plan.iter().enumerate() {
            let name = match plan.len() {
                1 => "model.safetensors".to_string(),
                count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            map.extend(entries.iter().map(|entry| (entry.name.clone(), json!(name))));
            layout.shard(name, entries, metadata)?;
        }
        if plan.len() > 1 {
            let total: u64 = entries.iter().map(Entry::bytes).sum();
            map.sort_keys();
            layout.index = Some(json!({"metadata": {"total_size": total}, "weight_map": map}));
        }
        Ok(layout)
    }

    /// Lays out one file of a given beginning, with tensors of given names at given offsets and of given sizes.
    pub fn single(name: &str, beginning: Vec<u8>, tensors: Vec<(String, u64, u64)>) -> Self {
        let end = tensors.iter().map(|(_, start, bytes)| start + bytes).max().unwrap_or(0).max(beginning.len() as u64);
        let place = |(name, start, bytes)| (name, Place { file: 0, start, bytes, written: 0 });
        let places = tensors.into_iter().map(place).collect();
        Self { files: vec![LaidOut { name: name.to_owned(), beginning, bytes: end }], places, index: None }
    }

    fn shard(&mut self, name: String, entries: &[&Entry], metadata: &BTreeMap<String, String>) -> Result<()> {
        let mut header = Map::new();
        let mut strings = json!({"format": "pt"});
        metadata.iter().for_each(|(key, value)| strings[key] = json!(value));
        header.insert("__metadata__".into(), strings);
        let mut offset = 0;
        for entry in entries {
            let end = offset + entry.bytes();
            header.insert(entry.name.clone(), json!({"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}));
            offset = end;
        }
        let mut text = serde_json::to_vec(&header).map_err(|error| Error::run(error.to_string()))?;
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut at = 8 + text.len() as u64;
        let beginning = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        for entry in entries {
            let place = Place { file: self.files.len(), start: at, bytes: entry.bytes(), written: 0 };
            at += entry.bytes();
            assert!(self.places.insert(entry.name.clone(), place).is_none(), "two tensors named {}", entry.name);
        }
        self.files.push(LaidOut { name, beginning, bytes: at });
        Ok(())
    }

    /// Takes the next bytes of a tensor and says where they go.
    ///
    /// # Errors
    /// When the tensor is not part of the layout or already full.
    pub fn piece(&mut self, name: &str, bytes: Vec<u8>) -> Result<Piece> {
        let place = self.places.get_mut(name).ok_or_else(|| Error::run("not part of the planned output").tensor(name))?;
        if place.written + bytes.len() as u64 > place.bytes {
            return Err(Error::run(format!("{} bytes planned, {} given", place.bytes, place.written + bytes.len() as u64)).tensor(name));
        }
        let offset = place.start + place.written;
        place.written += bytes.len() as u64;
        Ok(Piece { file: place.file, offset, bytes, tensor: name.to_owned(), last: place.written == place.bytes })
    }

    /// Takes a tensor as written before.
    ///
    /// # Errors
    /// When it is not part of the layout.
    pub fn written(&mut self, name: &str) -> Result<()> {
        let place = self.places.get_mut(name).ok_or_else(|| Error::run("not part of the planned output").tensor(name))?;
        place.written = place.bytes;
        Ok(())
    }

    /// Reads files of this layout and checks all they are to hold by now: `tensors` are those that are complete, with their
    /// hashes. Says what is not as it was written.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn verify(&self, folder: &Path, tensors: &HashMap<&str, &str>) -> Result<Result<(), String>> {
        let mut opened = Vec::new();
        for file in &self.files {
            let path = folder.join(&file.name);
            let fail = |error: std::io::Error| Error::io(&path, &error);
            let found = File::open(&path).map_err(fail)?;
            let bytes = found.metadata().map_err(fail)?.len();
            if bytes != file.bytes {
                return Ok(Err(format!("{}: has {bytes} bytes, {} were reserved", path.display(), file.bytes)));
            }
            let mut beginning = vec![0; file.beginning.len()];
            found.read_exact_at(&mut beginning, 0).map_err(fail)?;
            if beginning != file.beginning {
                return Ok(Err(format!("{}: its header is not the one that was written", path.display())));
            }
            opened.push((path, found));
        }
        if let Some(index) = &self.index {
            let path = folder.join(INDEX);
            if std::fs::read(&path).map_err(|error| Error::io(&path, &error))? != json_text(index)?.as_bytes() {
                return Ok(Err(format!("{}: is not as it was written", path.display())));
            }
        }
        for (name, hash) in tensors {
            let Some(place) = self.places.get(*name) else { return Ok(Err(format!("tensor {}: not part of the output", shown(name)))) };
            let (path, file) = &opened[place.file];
            if hash_part(file, place.start, place.bytes).map_err(|error| Error::io(path, &error))?.to_hex().as_str() != *hash {
                return Ok(Err(format!("{}: tensor {}: is not as it was written", path.display(), shown(name))));
            }
        }
        Ok(Ok(()))
    }

    /// Whether all of a tensor was taken.
    pub fn is_written(&self, name: &str) -> bool {
        self.places.get(name).is_some_and(|place| place.written == place.bytes)
    }

    /// Checks that every byte was taken.
    ///
    /// # Errors
    /// When a tensor is incomplete.
    pub fn complete(&self) -> Result<()> {
        match self.places.iter().find(|(_, place)| place.written != place.bytes) {
            Some((name, place)) => {
                let message = format!("{} of {} bytes were written", place.written, place.bytes);
                Err(Error::new(Fault::Verification, message).tensor(name))
            }
            None => Ok(()),
        }
    }
}

/// The files of a layout on a disk.
#[derive(Debug)]
pub struct Files {
    storage: Arc<dyn Store>,
    opened: Vec<Opened>,
}

impl Files {
    /// Makes the files of a layout with room for all they are to hold, and the index where there is one.
    ///
    /// # Errors
    /// When one cannot be made or the disk is too small.
    pub fn create(layout: &Layout, folder: &Path, storage: Arc<dyn Store>) -> Result<Self> {
        let mut opened = Vec::new();
        for file in &layout.files {
            let made = storage.create(&folder.join(&file.name), file.bytes)?;
            storage.write_at(&made, &file.beginning, 0)?;
            opened.push(made);
        }
        if let Some(index) = &layout.index {
            opened.push(storage.put_json(&folder.join(INDEX), index)?);
        }
        Ok(Self { storage, opened })
    }

    /// Opens the files of a layout that were made before.
    ///
    /// # Errors
    /// When one is missing.
    pub fn reopen(layout: &Layout, folder: &Path, storage: Arc<dyn Store>) -> Result<Self> {
        let names = layout.files.iter().map(|file| file.name.as_str()).chain(layout.index.as_ref().map(|_| INDEX));
        let opened = names.map(|name| storage.open(&folder.join(name))).collect::<Result<_>>()?;
        Ok(Self { storage, opened })
    }

    /// Writes a piece.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, piece: &Piece) -> Result<()> {
        self.storage.write_at(&self.opened[piece.file], &piece.bytes, piece.offset)
    }

    /// Brings the files to the disk.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn sync(&self) -> Result<()> {
        self.opened.iter().try_for_each(|file| self.storage.sync(file))
    }
}

/// blake3 of a part of a file.
fn hash_part(file: &File, start: u64, bytes: u64) -> std::io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; bytes.min(READ_BYTES) as usize];
    let mut at = 0;
    while at < bytes {
        let part = (bytes - at).min(READ_BYTES) as usize;
        file.read_exact_at(&mut buffer[..part], start + at)?;
        hasher.update(&buffer[..part]);
        at += part as u64;
    }
    Ok(hasher.finalize())
}

/// Files that are written as their bytes come.
#[derive(Debug)]
pub struct Output {
    layout: Layout,
    files: Files,
}

impl Output {
    /// As [`Layout::shards`], on the disk at once.
    ///
    /// # Errors
    /// As [`Files::create`].
    pub fn create(folder: &Path, entries: &[Entry], shard_bytes: u64, metadata: &BTreeMap<String, String>) -> Result<Self> {
        let layout = Layout::shards(entries, shard_bytes, metadata)?;
        let files = Files::create(&layout, folder, Arc::new(Disk))?;
        Ok(Self { layout, files })
    }

    /// Takes the next bytes of a tensor.
    ///
    /// # Errors
    /// As [`Layout::piece`] and [`Files::write`].
    pub fn write(&mut self, name: &str, bytes: Vec<u8>) -> Result<()> {
        self.files.write(&self.layout.piece(name, bytes)?)
    }

    /// Checks that every byte was written.
    ///
    /// # Errors
    /// When a tensor is incomplete.
    pub fn finish(self) -> Result<()> {
        self.layout.complete()
    }
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;
    use crate::checkpoint::Shard;

    fn entry(name: &str, size: usize) -> Entry {
        Entry { name: name.into(), dtype: Dtype::U8, shape: vec![size] }
    }

    #[test]
    fn bytes_written_in_any_order_and_pieces_are_read_back_from_shards() {
        let folder = tempfile::tempdir().unwrap();
        let mut output = Output::create(folder.path(), &[entry("a", 4), entry("b", 3), entry("c", 5)], 8, &BTreeMap::new()).unwrap();
        output.write("c", b"vwxyz".to_vec()).unwrap();
        output.write("a", b"ab".to_vec()).unwrap();
        output.write("b", b"123".to_vec()).unwrap();
        output.write("a", b"cd".to_vec()).unwrap();
        assert!(output.write("a", b"!".to_vec()).is_err() && output.write("d", b"!".to_vec()).is_err());
        output.finish().unwrap();
        let first = Shard::open(&folder.path().join("model-00001-of-00002.safetensors")).unwrap();
        let read =
            |shard: &Shard, name: &str| shard.bytes(&shard.header.tensors[name], 0..shard.header.tensors[name].bytes()).unwrap().to_vec();
        assert_eq!((read(&first, "a"), read(&first, "b")), (b"abcd".to_vec(), b"123".to_vec()));
        assert!(folder.path().join("model.safetensors.index.json").exists());
    }

    #[test]
    fn a_file_is_full_when_the_next_tensor_would_exceed_it() {
        let lengths = |shard: u64| -> Vec<u64> {
            let layout = Layout::shards(&[entry("a", 4), entry("b", 4), entry("c", 9), entry("d", 1)], shard, &BTreeMap::new()).unwrap();
            layout.files.iter().map(|file| file.bytes - file.beginning.len() as u64).collect()
        };
        assert_eq!(lengths(8), [8, 9, 1]);
        assert_eq!(lengths(7), [4, 4, 9, 1]);
        assert_eq!(lengths(18), [18]);
    }

    #[test]
    fn every_deviation_of_what_is_read_back_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let storage: Arc<dyn Store> = Arc::new(Disk);
        let metadata = BTreeMap::from([("made by".to_string(), "test".to_string())]);
        let mut layout = Layout::shards(&[entry("a", 4), entry("b", 3)], 4, &metadata).unwrap();
        let files = Files::create(&layout, folder.path(), Arc::clone(&storage)).unwrap();
        assert!(!layout.is_written("a") && layout.complete().is_err());
        files.write(&layout.piece("a", b"0123".to_vec()).unwrap()).unwrap();
        let (hash, other) = (blake3::hash(b"0123").to_hex().to_string(), blake3::hash(b"012").to_hex().to_string());
        let check = |name: &str, hash: &str| layout.verify(folder.path(), &HashMap::from([(name, hash)])).unwrap();
        assert_eq!(check("a", &hash), Ok(()));
        assert!(check("a", &other).unwrap_err().contains("tensor a: is not as it was written"));
        assert!(check("x", &hash).unwrap_err().contains("tensor x: not part of the output"));
        let (path, index) = (folder.path().join("model-00002-of-00002.safetensors"), folder.path().join(INDEX));
        let (sound, listed) = (std::fs::read(&path).unwrap(), std::fs::read(&index).unwrap());
        assert_eq!(Shard::open(&path).unwrap().header.metadata["made by"], "test");
        std::fs::write(&path, &sound[..sound.len() - 1]).unwrap();
        assert!(check("a", &hash).unwrap_err().contains("were reserved"));
        std::fs::write(&path, [b"x", &sound[1..]].concat()).unwrap();
        assert!(check("a", &hash).unwrap_err().contains("its header is not the one"));
        std::fs::write(&path, &sound).unwrap();
        std::fs::write(&index, &listed[1..]).unwrap();
        assert!(check("a", &hash).unwrap_err().contains("is not as it was written"));
        std::fs::remove_file(&index).unwrap();
        assert!(
            layout.verify(folder.path(), &HashMap::new()).is_err() && Files::reopen(&layout, folder.path(), Arc::clone(&storage)).is_err()
        );
        std::fs::write(&index, &listed).unwrap();
        let reopened = Files::reopen(&layout, folder.path(), storage).unwrap();
        layout.written("b").unwrap();
        assert!(layout.is_written("b") && layout.complete().is_ok() && layout.written("x").is_err());
        assert!(layout.piece("b", vec![1]).unwrap_err().to_string().contains("3 bytes planned, 4 given"));
        reopened.sync().unwrap();
    }

    #[test]
    fn a_single_file_has_room_for_its_farthest_tensor_and_its_beginning() {
        let layout = Layout::single("m.gguf", vec![0; 9], vec![("a".into(), 32, 5), ("b".into(), 16, 4)]);
        assert_eq!((layout.files[0].bytes, layout.files[0].name.as_str()), (37, "m.gguf"));
        assert_eq!(Layout::single("m", vec![0; 9], Vec::new()).files[0].bytes, 9);
    }

    #[test]
    fn an_incomplete_tensor_is_a_failed_verification() {
        let folder = tempfile::tempdir().unwrap();
        let mut output = Output::create(folder.path(), &[entry("a", 4)], 8, &BTreeMap::new()).unwrap();
        output.write("a", b"ab".to_vec()).unwrap();
        assert_eq!(output.finish().unwrap_err().exit_code(), 5);
    }
}
