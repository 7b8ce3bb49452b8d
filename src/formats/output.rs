//! A safetensors checkpoint whose layout is known before its data: headers first, then bytes at their offsets in any
//! order. It is complete when every byte of every tensor was written.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use serde_json::{Map, json};

use crate::error::{Error, Fault, Result};
use crate::formats::Entry;

/// The weight files of an output. A thread of its own writes them, so that computing goes on meanwhile.
#[derive(Debug)]
pub struct Output {
    folder: PathBuf,
    places: BTreeMap<String, Place>,
    names: Vec<String>,
    writer: Option<Writer>,
}

#[derive(Debug)]
struct Place {
    shard: usize,
    start: u64,
    bytes: u64,
    written: u64,
}

/// The files, and the error that stopped the writing with the number of its file.
type Written = (Vec<File>, Option<(usize, std::io::Error)>);

/// Bytes for an offset of a file.
type Piece = (usize, u64, Vec<u8>);

#[derive(Debug)]
struct Writer {
    pieces: SyncSender<Piece>,
    thread: JoinHandle<Written>,
}

impl Writer {
    /// At most this many pieces wait.
    const WAITING: usize = 2;

    fn start(files: Vec<File>) -> Self {
        let (pieces, waiting) = sync_channel::<Piece>(Self::WAITING);
        let thread = std::thread::spawn(move || {
            for (shard, offset, bytes) in waiting {
                if let Err(error) = files[shard].write_all_at(&bytes, offset) {
                    return (files, Some((shard, error)));
                }
            }
            (files, None)
        });
        Self { pieces, thread }
    }
}

impl Output {
    /// Lays out the files: tensors in the given order, a new shard when one would exceed `shard_bytes`.
    ///
    /// # Errors
    /// When a file cannot be made or the disk is too small.
    ///
    /// # Panics
    /// When two entries have one name.
    pub fn create(folder: &Path, entries: &[Entry], shard_bytes: u64, metadata: &BTreeMap<String, String>) -> Result<Self> {
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
        let mut output = Self { folder: folder.to_path_buf(), places: BTreeMap::new(), names: Vec::new(), writer: None };
        let mut files = Vec::new();
        let mut map = Map::new();
        for (number, entries) in plan.iter().enumerate() {
            let name = match plan.len() {
                1 => "model.safetensors".to_string(),
                count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            map.extend(entries.iter().map(|entry| (entry.name.clone(), json!(name))));
            files.push(output.shard(name, entries, metadata)?);
        }
        if plan.len() > 1 {
            let total: u64 = entries.iter().map(Entry::bytes).sum();
            map.sort_keys();
            let index = json!({"metadata": {"total_size": total}, "weight_map": map});
            write_json(&folder.join("model.safetensors.index.json"), &index)?;
        }
        output.writer = Some(Writer::start(files));
        Ok(output)
    }

    /// Lays out one file of a given beginning, with tensors of given names at given offsets and of given sizes.
    ///
    /// # Errors
    /// When it cannot be made or the disk is too small.
    pub fn single(folder: &Path, name: &str, beginning: &[u8], tensors: Vec<(String, u64, u64)>) -> Result<Self> {
        let end = tensors.iter().map(|(_, start, bytes)| start + bytes).max().unwrap_or(0).max(beginning.len() as u64);
        let file = reserved(&folder.join(name), end)?;
        file.write_all_at(beginning, 0).map_err(|error| Error::io(&folder.join(name), &error))?;
        let place = |(name, start, bytes)| (name, Place { shard: 0, start, bytes, written: 0 });
        let places = tensors.into_iter().map(place).collect();
        let writer = Some(Writer::start(vec![file]));
        Ok(Self { folder: folder.to_path_buf(), places, names: vec![name.to_owned()], writer })
    }

    fn shard(&mut self, name: String, entries: &[&Entry], metadata: &BTreeMap<String, String>) -> Result<File> {
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
        let path = self.folder.join(&name);
        let fail = |error: std::io::Error| Error::io(&path, &error);
        let start = 8 + text.len() as u64;
        let file = reserved(&path, start + offset)?;
        file.write_all_at(&(text.len() as u64).to_le_bytes(), 0).map_err(fail)?;
        file.write_all_at(&text, 8).map_err(fail)?;
        let mut at = start;
        for entry in entries {
            let place = Place { shard: self.names.len(), start: at, bytes: entry.bytes(), written: 0 };
            at += entry.bytes();
            assert!(self.places.insert(entry.name.clone(), place).is_none(), "two tensors named {}", entry.name);
        }
        self.names.push(name);
        Ok(file)
    }

    /// Takes the next bytes of a tensor.
    ///
    /// # Errors
    /// When the disk refused earlier bytes, or the tensor is not part of the layout or already full.
    pub fn write(&mut self, name: &str, bytes: Vec<u8>) -> Result<()> {
        let place = self.places.get_mut(name).ok_or_else(|| Error::run("not part of the planned output").tensor(name))?;
        if place.written + bytes.len() as u64 > place.bytes {
            return Err(Error::run(format!("{} bytes planned, {} given", place.bytes, place.written + bytes.len() as u64)).tensor(name));
        }
        let offset = place.start + place.written;
        place.written += bytes.len() as u64;
        let piece = (place.shard, offset, bytes);
        match &self.writer {
            Some(writer) if writer.pieces.send(piece).is_ok() => Ok(()),
            _ => self.settle().map(drop),
        }
    }

    /// Waits for the writer; gives the files, or the error that stopped it.
    fn settle(&mut self) -> Result<Vec<File>> {
        let Some(Writer { pieces, thread }) = self.writer.take() else {
            return Err(Error::run("the output was given up after an earlier failure"));
        };
        drop(pieces);
        match thread.join() {
            Ok((files, None)) => Ok(files),
            Ok((_, Some((shard, error)))) => Err(Error::io(&self.folder.join(&self.names[shard]), &error)),
            Err(_) => Err(Error::run("the thread that writes the output failed")),
        }
    }

    /// Checks that every byte was written and brings the files to the disk.
    ///
    /// # Errors
    /// When a tensor is incomplete or the disk fails.
    pub fn finish(mut self) -> Result<()> {
        let files = self.settle()?;
        if let Some((name, place)) = self.places.iter().find(|(_, place)| place.written != place.bytes) {
            let message = format!("{} of {} bytes were written", place.written, place.bytes);
            return Err(Error::new(Fault::Verification, message).tensor(name));
        }
        for (name, file) in self.names.iter().zip(files) {
            file.sync_all().map_err(|error| Error::io(&self.folder.join(name), &error))?;
        }
        Ok(())
    }
}

/// A new file that has room for so many bytes.
fn reserved(path: &Path, bytes: u64) -> Result<File> {
    let file = File::options().write(true).create_new(true).open(path).map_err(|error| Error::io(path, &error))?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)
        .or_else(|error| if error == rustix::io::Errno::OPNOTSUPP { rustix::fs::ftruncate(&file, bytes) } else { Err(error) })
        .map_err(|error| Error::run(format!("no room for {bytes} bytes: {error}")).file(path))?;
    Ok(file)
}

/// Writes a JSON file with two spaces of indentation and a final newline.
///
/// # Errors
/// When it cannot be written.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::run(error.to_string()).file(path))?;
    std::fs::write(path, text + "\n").map_err(|error| Error::io(path, &error))
}

/// Writes a file complete or not at all.
///
/// # Errors
/// When it cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // As any new file: what the mask of the process takes away is not there.
    let file = tempfile::Builder::new().permissions(std::fs::Permissions::from_mode(0o666)).tempfile_in(folder);
    let mut file = file.map_err(|error| Error::io(folder, &error))?;
    std::io::Write::write_all(&mut file, bytes).map_err(|error| Error::io(path, &error))?;
    file.persist(path).map(drop).map_err(|error| Error::io(path, &error.error))
}

/// As [`write_whole`], an object as JSON.
///
/// # Errors
/// When it cannot be written.
pub fn write_whole_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::run(error.to_string()).file(path))?;
    write_whole(path, (text + "\n").as_bytes())
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
    fn an_incomplete_tensor_is_a_failed_verification() {
        let folder = tempfile::tempdir().unwrap();
        let mut output = Output::create(folder.path(), &[entry("a", 4)], 8, &BTreeMap::new()).unwrap();
        output.write("a", b"ab".to_vec()).unwrap();
        assert_eq!(output.finish().unwrap_err().exit_code(), 5);
    }
}
