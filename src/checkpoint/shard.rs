//! One safetensors file. The file stays open; the bytes of a tensor are mapped while somebody holds them and no
//! longer, so resident memory is what is in use and a network file system is never mapped for hours.
//!
//! This module holds the only memory mapping of the crate.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::ops::{Deref, Range};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::checkpoint::header::{self, Header, TensorInfo};
use crate::error::{Error, Result};

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

/// The bytes of a tensor, mapped from the file.
#[derive(Debug)]
pub struct Bytes(Option<memmap2::Mmap>);

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
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
        let header = header::parse(&text, bytes - 8 - length).map_err(|what| Error::input(what).file(path))?;
        Ok(Self { path: path.to_path_buf(), header, file, bytes, modified: (metadata.mtime(), metadata.mtime_nsec()) })
    }

    /// Maps the bytes of a tensor, or of a part of it given in bytes from its start.
    ///
    /// # Errors
    /// When the file changed since it was opened or cannot be mapped.
    pub fn bytes(&self, info: &TensorInfo, part: Range<u64>) -> Result<Bytes> {
        debug_assert!(part.start <= part.end && part.end <= info.bytes());
        if part.is_empty() {
            return Ok(Bytes(None));
        }
        self.unchanged()?;
        let length = usize::try_from(part.end - part.start).map_err(|error| Error::run(error.to_string()).file(&self.path))?;
        let start = self.header.data_start + info.begin + part.start;
        // SAFETY: the mapping is private to this process and read only. The range lies inside the file: the header
        // was checked against the file's size at opening, and `unchanged` has just seen the same size and time of
        // change. Another process that shortens the file while it is mapped makes reads fail with SIGBUS; one that
        // rewrites it changes numbers, which are plain bytes for which every value is valid.
        let map = unsafe { memmap2::MmapOptions::new().offset(start).len(length).populate().map(&self.file) };
        map.map(|map| Bytes(Some(map))).map_err(|error| Error::io(&self.path, &error))
    }

    /// Reads a part of a tensor, `start` bytes from its beginning, into a buffer.
    ///
    /// # Errors
    /// When the file cannot be read or has become shorter.
    pub fn read(&self, info: &TensorInfo, start: u64, out: &mut [u8]) -> Result<()> {
        let at = self.header.data_start + info.begin + start;
        self.file.read_exact_at(out, at).map_err(|error| Error::io(&self.path, &error))
    }

    /// Checks that the file is still the one whose header was read.
    fn unchanged(&self) -> Result<()> {
        let now = self.file.metadata().map_err(|error| Error::io(&self.path, &error))?;
        if now.len() != self.bytes || (now.mtime(), now.mtime_nsec()) != self.modified {
            return Err(Error::run(format!(
                "the input changed while it was read: it had {} bytes, now {}; start again",
                self.bytes,
                now.len()
            ))
            .file(&self.path));
        }
        Ok(())
    }
}
