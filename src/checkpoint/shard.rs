//! One safetensors file. The file stays open; the bytes of a tensor are in memory while somebody holds them and no longer.
//!
//! They are read, not mapped. A mapping is about 1.5 times as fast where the file is in memory already, but a file that
//! shrinks while it is mapped ends the whole program, one that is rewritten changes numbers under a calculation, and every
//! fault of a disk arrives as a signal instead of an error. What maps is the buffer: large pages that go back to the system
//! as soon as they are let go.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::as_conversions
    )
)]

use std::fs::File;
use std::io::Read;
use std::ops::{Deref, Range};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use memmap2::MmapMut;
use rayon::prelude::*;

use crate::checkpoint::header::{self, Header, TensorInfo, wide};
use crate::error::{Error, Fault, Result};

/// Bytes that one task reads.
const PIECE: usize = 4 << 20;

/// Bytes from which on a buffer is mapped.
const MAPPED: usize = 1 << 20;

/// An open safetensors file with its checked header.
#[derive(Debug)]
pub struct Shard {
    /// Where the file is.
    pub path: PathBuf,
    /// The checked header.
    pub header: Header,
    file: File,
    bytes: u64,
    modified: (i64, i64),
}

/// The bytes of a tensor.
#[derive(Debug)]
pub struct Bytes(Buffer);

#[derive(Debug)]
enum Buffer {
    Small(Vec<u8>),
    Large(MmapMut),
}

impl Buffer {
    fn new(length: usize) -> std::io::Result<Self> {
        if length < MAPPED {
            return Ok(Self::Small(vec![0; length]));
        }
        let map = MmapMut::map_anon(length)?;
        // Where there are no large pages, small ones do.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self::Large(map))
    }

    fn bytes(&mut self) -> &mut [u8] {
        match self {
            Self::Small(bytes) => bytes,
            Self::Large(bytes) => bytes,
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.0 {
            Buffer::Small(bytes) => bytes,
            Buffer::Large(bytes) => bytes,
        }
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Shard {
    /// Opens a file and checks its header against its size.
    ///
    /// # Errors
    /// When the file is not a regular file, cannot be read, or is not sound.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = i32::try_from((rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC).bits()).unwrap_or_default();
        let file = File::options().read(true).custom_flags(flags).open(path).map_err(|error| Error::unreadable(path, &error))?;
        let metadata = file.metadata().map_err(|error| Error::unreadable(path, &error))?;
        if !metadata.is_file() {
            return Err(Error::input("not a regular file").file(path));
        }
        let bytes = metadata.len();
        let mut first = Vec::new();
        (&file).take(64).read_to_end(&mut first).map_err(|error| Error::unreadable(path, &error))?;
        let length = header::length(&first, bytes).map_err(|what| Error::input(what).file(path))?;
        let mut text = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut text, 8).map_err(|error| Error::unreadable(path, &error))?;
        let header = header::parse(&text, bytes.saturating_sub(8).saturating_sub(length)).map_err(|what| Error::input(what).file(path))?;
        Ok(Self { path: path.to_path_buf(), header, file, bytes, modified: (metadata.mtime(), metadata.mtime_nsec()) })
    }

    /// The bytes of a tensor, or of a part of it given in bytes from its start.
    ///
    /// # Errors
    /// When the file changed since it was opened, or cannot be read.
    pub fn bytes(&self, info: &TensorInfo, part: Range<u64>) -> Result<Bytes> {
        debug_assert!(part.start <= part.end && part.end <= info.bytes());
        let length =
            usize::try_from(part.end.saturating_sub(part.start)).map_err(|error| Error::run(error.to_string()).file(&self.path))?;
        let mut buffer = Buffer::new(length).map_err(|error| Error::run(format!("{length} bytes of memory: {error}")).file(&self.path))?;
        let read =
            |(number, piece): (usize, &mut [u8])| self.read(info, part.start.saturating_add(wide(number.saturating_mul(PIECE))), piece);
        buffer.bytes().par_chunks_mut(PIECE).enumerate().try_for_each(read)?;
        self.unchanged()?;
        Ok(Bytes(buffer))
    }

    /// Reads a part of a tensor, `start` bytes from its beginning, into a buffer; [`Self::unchanged`] then tells whether it is
    /// what the header speaks of.
    ///
    /// # Errors
    /// When the file cannot be read or has become shorter.
    pub fn read(&self, info: &TensorInfo, start: u64, out: &mut [u8]) -> Result<()> {
        let at = self.header.data_start.saturating_add(info.begin).saturating_add(start);
        self.file.read_exact_at(out, at).map_err(|error| match self.unchanged() {
            Ok(()) => Error::io(&self.path, &error),
            Err(changed) => changed,
        })
    }

    /// Tells the system that a tensor will be read, so that it fetches what it has no copy of in memory.
    pub fn expect(&self, info: &TensorInfo) {
        let at = self.header.data_start.saturating_add(info.begin);
        // Whoever does not care for advice loses nothing.
        let _ = rustix::fs::fadvise(&self.file, at, std::num::NonZeroU64::new(info.bytes()), rustix::fs::Advice::WillNeed);
    }

    /// Checks that the file is still the one whose header was read.
    ///
    /// # Errors
    /// When its length or time of change is another.
    pub fn unchanged(&self) -> Result<()> {
        let now = self.file.metadata().map_err(|error| Error::io(&self.path, &error))?;
        if now.len() != self.bytes || (now.mtime(), now.mtime_nsec()) != self.modified {
            let how = match now.len() {
                same if same == self.bytes => "it was written to".to_string(),
                other => format!("it had {} bytes, now {other}", self.bytes),
            };
            let what = format!("the input changed while it was read: {how}; start again");
            return Err(Error::new(Fault::Changed, what).file(&self.path));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of one tensor of so many bytes.
    fn shard(folder: &Path, bytes: usize) -> Shard {
        let text = format!(r#"{{"t":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#);
        let data: Vec<u8> = (0..bytes).map(|i| (i / 7) as u8).collect();
        let path = folder.join("t.safetensors");
        std::fs::write(&path, [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &data].concat()).unwrap();
        Shard::open(&path).unwrap()
    }

    #[test]
    fn parts_of_any_size_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let size = 2 * PIECE + 11;
        let shard = shard(folder.path(), size);
        let info = &shard.header.tensors["t"];
        for part in [0..0, 3..4, 0..MAPPED, 5..PIECE + 6, 0..size, size - 1..size] {
            let bytes = shard.bytes(info, part.start as u64..part.end as u64).unwrap();
            assert!(bytes.iter().copied().eq(part.map(|i| (i / 7) as u8)));
        }
    }

    #[test]
    fn a_file_that_shrinks_or_changes_is_an_error_of_its_own() {
        for size in [100, 3 * PIECE] {
            let folder = tempfile::tempdir().unwrap();
            let whole = shard(folder.path(), size);
            let info = whole.header.tensors["t"].clone();
            let held = whole.bytes(&info, 0..size as u64).unwrap();
            File::options().write(true).open(&whole.path).unwrap().set_len(whole.bytes - 1).unwrap();
            let error = whole.bytes(&info, 0..size as u64).unwrap_err();
            assert_eq!((error.fault, held.len()), (Fault::Changed, size), "{error}");
            assert!(error.to_string().contains(&format!("had {} bytes, now {}", whole.bytes, whole.bytes - 1)), "{error}");
            let again = shard(folder.path(), size);
            File::options().write(true).open(&again.path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
            assert_eq!(again.bytes(&info, 0..1).unwrap_err().fault, Fault::Changed);
        }
    }
}
