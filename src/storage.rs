//! Every change of a disk that an output needs, behind one small trait, so that a test can fail the n-th of them and replay
//! what a power cut would have left of all before it. Reading needs no such trait: what is read is verified.

use std::fmt::Debug;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FallocateFlags, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::error::{Error, Result, controls};

/// A file that is open for writing.
#[derive(Debug)]
pub struct Opened {
    /// Where it is.
    pub path: PathBuf,
    /// The file.
    pub file: File,
}

/// What changes a disk. Every error names the path and, where room is missing, the number of bytes.
pub trait Store: Debug + Send + Sync {
    /// Makes a folder that only its owner may enter.
    ///
    /// # Errors
    /// When the disk refuses.
    fn create_private_folder(&self, path: &Path) -> Result<()>;

    /// Makes a folder, with those above it.
    ///
    /// # Errors
    /// When the disk refuses.
    fn create_folder(&self, path: &Path) -> Result<()>;

    /// Makes a file that has room for so many bytes; one that is there is emptied.
    ///
    /// # Errors
    /// When the disk refuses or is too small.
    fn create(&self, path: &Path, bytes: u64) -> Result<Opened>;

    /// Opens a file that is there.
    ///
    /// # Errors
    /// When it is not, or the disk refuses.
    fn open(&self, path: &Path) -> Result<Opened>;

    /// Writes at an offset.
    ///
    /// # Errors
    /// When the disk refuses or is full.
    fn write_at(&self, file: &Opened, bytes: &[u8], offset: u64) -> Result<()>;

    /// Cuts a file to a length.
    ///
    /// # Errors
    /// When the disk refuses.
    fn cut(&self, file: &Opened, bytes: u64) -> Result<()>;

    /// Waits until a file's bytes and length are on the disk. After a failure the file must be written anew: the system may
    /// have forgotten what it could not write.
    ///
    /// # Errors
    /// When the disk fails.
    fn sync(&self, file: &Opened) -> Result<()>;

    /// Waits until the names in a folder are on the disk.
    ///
    /// # Errors
    /// When the disk fails.
    fn sync_folder(&self, path: &Path) -> Result<()>;

    /// Renames where nothing has the new name.
    ///
    /// # Errors
    /// When something has, or the disk refuses.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;

    /// Exchanges two names.
    ///
    /// # Errors
    /// When the disk refuses.
    fn exchange(&self, one: &Path, other: &Path) -> Result<()>;

    /// Removes a file, or a folder with all it holds; nothing happens where there is nothing.
    ///
    /// # Errors
    /// When the disk refuses.
    fn remove(&self, path: &Path) -> Result<()>;
}

impl dyn Store + '_ {
    /// A file with these bytes, not yet waited for.
    ///
    /// # Errors
    /// As [`Store::create`] and [`Store::write_at`].
    pub fn put(&self, path: &Path, bytes: &[u8]) -> Result<Opened> {
        let file = self.create(path, bytes.len() as u64)?;
        self.write_at(&file, bytes, 0)?;
        Ok(file)
    }

    /// As `put`, an object as JSON with two spaces of indentation and a final newline.
    ///
    /// # Errors
    /// As `put`.
    pub fn put_json(&self, path: &Path, value: &impl serde::Serialize) -> Result<Opened> {
        self.put(path, json(value)?.as_bytes())
    }

    /// Brings a folder with all it holds to the disk.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn sync_all(&self, folder: &Path) -> Result<()> {
        let mut entries = std::fs::read_dir(folder)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>())
            .map_err(|error| Error::io(folder, &error))?;
        entries.sort();
        for path in entries {
            if path.is_dir() { self.sync_all(&path)? } else { self.sync(&self.open(&path)?)? }
        }
        self.sync_folder(folder)
    }
}

/// The file system.
#[derive(Debug, Clone, Copy)]
pub struct Disk;

impl Store for Disk {
    fn create_private_folder(&self, path: &Path) -> Result<()> {
        std::fs::DirBuilder::new().mode(0o700).create(path).map_err(|error| match error.kind() {
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem | ErrorKind::InvalidFilename => {
                Error::input(format!("cannot write here: {error}; give another place with -o")).file(path.parent().unwrap_or(path))
            }
            _ => failed(path, &error, 0),
        })
    }

    fn create_folder(&self, path: &Path) -> Result<()> {
        std::fs::create_dir_all(path).map_err(|error| failed(path, &error, 0))
    }

    fn create(&self, path: &Path, bytes: u64) -> Result<Opened> {
        let file = File::create(path).map_err(|error| failed(path, &error, bytes))?;
        if bytes > 0 {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)
                .or_else(|error| if error == Errno::OPNOTSUPP { rustix::fs::ftruncate(&file, bytes) } else { Err(error) })
                .map_err(|error| failed(path, &error.into(), bytes))?;
        }
        Ok(Opened { path: path.into(), file })
    }

    fn open(&self, path: &Path) -> Result<Opened> {
        let file = File::options().read(true).write(true).open(path).map_err(|error| failed(path, &error, 0))?;
        Ok(Opened { path: path.into(), file })
    }

    fn write_at(&self, file: &Opened, bytes: &[u8], offset: u64) -> Result<()> {
        file.file.write_all_at(bytes, offset).map_err(|error| failed(&file.path, &error, bytes.len() as u64))
    }

    fn cut(&self, file: &Opened, bytes: u64) -> Result<()> {
        file.file.set_len(bytes).map_err(|error| failed(&file.path, &error, 0))
    }

    fn sync(&self, file: &Opened) -> Result<()> {
        file.file.sync_data().map_err(|error| failed(&file.path, &error, 0))
    }

    fn sync_folder(&self, path: &Path) -> Result<()> {
        File::open(path).and_then(|folder| folder.sync_all()).map_err(|error| failed(path, &error, 0))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // A folder does not take the place of one that holds something, so that only an empty one could be lost.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => rustix::fs::rename(from, to),
            done => done,
        }
        .map_err(|error| failed(to, &error.into(), 0))
    }

    fn exchange(&self, one: &Path, other: &Path) -> Result<()> {
        renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).map_err(|error| failed(other, &error.into(), 0))
    }

    fn remove(&self, path: &Path) -> Result<()> {
        let removed = match std::fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() => std::fs::remove_dir_all(path),
            Ok(_) => std::fs::remove_file(path),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(failed(path, &error, 0)),
            _ => Ok(()),
        }
    }
}

/// The error of an operation that was to place so many bytes.
pub fn failed(path: &Path, source: &std::io::Error, bytes: u64) -> Error {
    match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            Error::full(format!("{source}: no room for {bytes} bytes")).file(path)
        }
        _ => Error::io(path, source),
    }
}

/// An object as JSON with two spaces of indentation and a final newline.
///
/// # Errors
/// When it is no JSON.
pub fn json(value: &impl serde::Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::run(error.to_string()))?;
    // JSON must escape the first 32 characters alone; what else controls a terminal can only stand inside its strings.
    let mut out = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        if controls(c) && c != '\n' { out.push_str(&format!("\\u{:04x}", u32::from(c))) } else { out.push(c) }
    }
    Ok(out + "\n")
}

/// Writes a file complete or not at all, over one that is there.
///
/// # Errors
/// When it cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    match std::fs::metadata(path) {
        // Like the null device, or standard output by its name.
        Ok(found) if found.file_type().is_char_device() => {
            let written = File::options().write(true).open(path).and_then(|mut file| std::io::Write::write_all(&mut file, bytes));
            return written.map_err(|error| failed(path, &error, bytes.len() as u64));
        }
        Ok(found) if !found.is_file() => return Err(Error::input("not a regular file; give another name").file(path)),
        _ => {}
    }
    // Through a link to what it leads to, rather than in its place.
    let linked = std::fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink());
    let target = if linked { path.canonicalize().unwrap_or_else(|_| path.to_path_buf()) } else { path.to_path_buf() };
    let path = target.as_path();
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // As any new file: what the mask of the process takes away is not there.
    let file = tempfile::Builder::new().permissions(std::fs::Permissions::from_mode(0o666)).tempfile_in(folder);
    let mut file = file.map_err(|error| Error::io(folder, &error))?;
    std::io::Write::write_all(&mut file, bytes).map_err(|error| failed(path, &error, bytes.len() as u64))?;
    file.persist(path).map(drop).map_err(|error| Error::io(path, &error.error))
}

/// As [`write_whole`], an object as JSON.
///
/// # Errors
/// When it cannot be written.
pub fn write_whole_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    write_whole(path, json(value)?.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_once_exchanged_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let disk: &dyn Store = &Disk;
        let (a, b, inside) = (folder.path().join("a"), folder.path().join("b"), folder.path().join("c/d"));
        disk.put(&a, b"1").unwrap();
        disk.put(&b, b"22").unwrap();
        assert!(disk.rename(&a, &b).unwrap_err().to_string().contains("b: "), "an existing name is not taken");
        disk.exchange(&a, &b).unwrap();
        assert_eq!((std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap()), (b"22".to_vec(), b"1".to_vec()));
        disk.create_folder(&inside).unwrap();
        disk.put(&inside.join("e"), b"").unwrap();
        disk.sync_all(folder.path()).unwrap();
        disk.remove(&folder.path().join("c")).unwrap();
        disk.remove(&a).unwrap();
        disk.remove(&a).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn json_holds_nothing_that_controls_a_terminal_and_reads_back() {
        let text = "a\u{1b}[31m\u{7f}\u{9b}\u{202e}b\u{2066}\n\tü";
        let written = json(&serde_json::json!({text: text})).unwrap();
        assert!(!written.chars().any(|c| c != '\n' && controls(c)), "{written:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&written).unwrap(), serde_json::json!({text: text}));
    }

    #[test]
    fn a_file_without_room_is_told_with_its_bytes() {
        let error = failed(Path::new("x/y"), &std::io::Error::from(ErrorKind::StorageFull), 77);
        assert!(error.to_string().starts_with("x/y: ") && error.to_string().contains("77 bytes"), "{error}");
        assert_eq!(error.exit_code(), 1);
    }

    #[test]
    fn files_have_their_length_at_once_and_are_cut_and_written_anywhere() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, path): (&dyn Store, _) = (&Disk, folder.path().join("a"));
        let file = disk.create(&path, 9).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 9);
        disk.write_at(&file, b"xy", 3).unwrap();
        disk.cut(&file, 5).unwrap();
        disk.sync(&file).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"\0\0\0xy");
        disk.write_at(&disk.open(&path).unwrap(), b"z", 0).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"z\0\0xy");
        let private = folder.path().join("p");
        disk.create_private_folder(&private).unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&private).unwrap()) & 0o777, 0o700);
        assert!(disk.create_private_folder(&private).is_err() && disk.open(&folder.path().join("none")).is_err());
        let forbidden = disk.create_private_folder(Path::new("/proc/none/p")).unwrap_err();
        assert!(forbidden.to_string().contains("/proc/none"), "{forbidden}");
        assert!(disk.sync_folder(&folder.path().join("none")).is_err() && disk.exchange(&path, &folder.path().join("none")).is_err());
        assert!(disk.remove(Path::new("/proc/self/status")).is_err());
        let null = Opened { path: "/dev/null".into(), file: File::create("/dev/null").unwrap() };
        assert!(disk.sync(&null).is_err() && disk.cut(&null, 1).is_err());
        assert!(disk.create(&folder.path().join("huge"), u64::MAX / 2).unwrap_err().to_string().contains("9223372036854775807 bytes"));
    }

    #[test]
    fn a_whole_file_replaces_another_with_the_rights_of_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_whole(&path, b"old").unwrap();
        write_whole_json(&path, &serde_json::json!({"a": 1})).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\n  \"a\": 1\n}\n");
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&path).unwrap());
        assert_ne!(mode & 0o600, 0);
        assert_eq!((mode & 0o111, std::fs::read_dir(folder.path()).unwrap().count()), (0, 1));
        assert!(write_whole(&folder.path().join("none/a"), b"").is_err());
        assert!(write_whole(folder.path(), b"").unwrap_err().to_string().contains("not a regular file"));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        write_whole(&link, b"through").unwrap();
        assert!(std::fs::read(&path).unwrap() == b"through" && std::fs::symlink_metadata(&link).unwrap().is_symlink());
        write_whole(Path::new("/dev/null"), b"x").unwrap();
        let device = std::fs::metadata("/dev/null").unwrap();
        assert!(std::os::unix::fs::FileTypeExt::is_char_device(&device.file_type()));
    }
}
