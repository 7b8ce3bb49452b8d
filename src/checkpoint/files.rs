//! Reading whole files of strangers: regular ones of bounded length, never a pipe or a device that one would wait for.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// Longest configuration that is parsed, in bytes.
const JSON_BYTES: u64 = 4 << 20;

/// Opens a regular file of at most `limit` bytes and gives its length.
///
/// # Errors
/// When it is missing, not a regular file, or longer.
pub fn open_regular(path: &Path, limit: u64) -> Result<(File, u64)> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(|error| Error::unreadable(path, &error))?;
    let metadata = file.metadata().map_err(|error| Error::unreadable(path, &error))?;
    if !metadata.is_file() {
        return Err(Error::input("not a regular file").file(path));
    }
    if metadata.len() > limit {
        return Err(Error::input(format!("has {} bytes, the limit is {limit}", metadata.len())).file(path));
    }
    Ok((file, metadata.len()))
}

/// Reads a regular file that is not absurdly large.
///
/// # Errors
/// As [`open_regular`], or when it cannot be read.
pub fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let (file, length) = open_regular(path, limit)?;
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    file.take(limit).read_to_end(&mut bytes).map_err(|error| Error::unreadable(path, &error))?;
    Ok(bytes)
}

/// Reads a JSON file.
///
/// # Errors
/// When it is missing or not JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    let bytes = read_file(path, JSON_BYTES)?;
    serde_json::from_slice(&bytes).map_err(|error| Error::input(format!("not valid JSON: {error}")).file(path))
}

/// blake3 of a regular file.
///
/// # Errors
/// When it is not one or cannot be read.
pub fn hash_file(path: &Path) -> Result<blake3::Hash> {
    hash_within(path, u64::MAX)
}

/// As [`hash_file`], of a file of at most `limit` bytes.
///
/// # Errors
/// When it is longer too.
pub fn hash_within(path: &Path, limit: u64) -> Result<blake3::Hash> {
    let (file, _) = open_regular(path, limit)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).map_err(|error| Error::io(path, &error))?;
    Ok(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_bounded_length_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        std::fs::write(&path, "[1]").unwrap();
        assert_eq!((read_json(&path).unwrap(), hash_file(&path).unwrap()), (serde_json::json!([1]), blake3::hash(b"[1]")));
        assert!(read_file(&path, 2).unwrap_err().to_string().contains("has 3 bytes, the limit is 2") && hash_within(&path, 2).is_err());
        for other in [folder.path(), Path::new("/dev/zero")] {
            assert!(read_file(other, 9).unwrap_err().to_string().contains("not a regular file"));
        }
        assert!(read_file(&folder.path().join("none"), 9).is_err());
    }
}
