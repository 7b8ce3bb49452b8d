//! Where the output appears: complete or not at all. Work happens in a hidden folder beside the destination, which is
//! renamed into place at the very end and removed when anything fails.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::error::{Error, Result};
use crate::report::bytes;

/// A destination that was checked and claimed.
#[derive(Debug)]
pub struct Destination {
    target: PathBuf,
    work: TempDir,
    replace: bool,
}

impl Destination {
    /// Checks that `target` may be written and makes the hidden folder beside it.
    ///
    /// # Errors
    /// When it exists (unless `replace`), is or contains or lies in the model, or its parent cannot be written.
    pub fn claim(target: &Path, model: &Path, replace: bool) -> Result<Self> {
        let name = target.file_name().ok_or_else(|| Error::input("not a name for a folder; give one with -o").file(target))?;
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let parent =
            parent.canonicalize().map_err(|error| Error::input(format!("the folder that shall hold the output: {error}")).file(parent))?;
        let target = parent.join(name);
        if let Ok(model) = model.canonicalize() {
            let resolved = target.canonicalize().unwrap_or_else(|_| target.clone());
            if resolved == model || resolved.starts_with(&model) || model.starts_with(&resolved) {
                return Err(Error::input("the destination is, contains or lies in the model; give another with -o").file(&target));
            }
        }
        if let Ok(metadata) = std::fs::symlink_metadata(&target) {
            if !replace {
                return Err(Error::input("the destination exists; give another with -o, or replace it with --force").file(&target));
            }
            let ours = target.join("report.json").exists() || std::fs::read_dir(&target).is_ok_and(|mut entries| entries.next().is_none());
            if metadata.is_dir() && !ours {
                let what = "the destination holds something that this program did not write; --force replaces only its own outputs";
                return Err(Error::input(what).file(&target));
            }
            if !metadata.is_dir() {
                return Err(Error::input("the destination is not a folder; --force replaces only folders").file(&target));
            }
        }
        let short: String = name.to_string_lossy().chars().take(40).collect();
        let prefix = format!(".{short}.drawknife-");
        let work = tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir_in(&parent)
            .map_err(|error| Error::input(format!("cannot write here: {error}")).file(&parent))?;
        let destination = Self { target, work, replace };
        std::fs::create_dir(destination.folder()).map_err(|error| Error::io(&destination.folder(), &error))?;
        Ok(destination)
    }

    /// The folder to fill.
    pub fn folder(&self) -> PathBuf {
        self.work.path().join("out")
    }

    /// The folder as it will be called.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Checks the free space of the file system.
    ///
    /// # Errors
    /// When `needed` bytes do not fit.
    pub fn has_room(&self, needed: u64) -> Result<()> {
        let free = free_bytes(self.work.path())?;
        if free < needed {
            return Err(Error::input(format!(
                "the output needs {}, {} are free; free some or give another place with -o",
                bytes(needed),
                bytes(free)
            ))
            .file(&self.target));
        }
        Ok(())
    }

    /// Renames the finished folder into place.
    ///
    /// # Errors
    /// When somebody else made the destination meanwhile, or the rename fails.
    pub fn publish(self) -> Result<()> {
        use rustix::fs::{CWD, RenameFlags, rename, renameat_with};
        use rustix::io::Errno;
        sync_all(&self.folder())?;
        let fail = |error: Errno| Error::run(format!("cannot put the output into place: {error}")).file(&self.target);
        if self.replace && self.target.exists() {
            // Into the hidden folder, which is removed with all it holds; the moment without a destination is short.
            renameat_with(CWD, &self.target, CWD, self.work.path().join("old"), RenameFlags::empty()).map_err(fail)?;
        }
        match renameat_with(CWD, self.folder(), CWD, &self.target, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => rename(self.folder(), &self.target).map_err(fail)?,
            done => done.map_err(fail)?,
        }
        sync(self.target.parent().unwrap_or(Path::new("/")))
    }
}

/// Free bytes of the file system that holds `path`.
///
/// # Errors
/// When it cannot be asked.
pub fn free_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).map_err(|error| Error::io(path, &error.into()))?;
    Ok(stat.f_bavail * stat.f_frsize)
}

/// Brings a folder with all it holds to the disk.
fn sync_all(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(|error| Error::io(folder, &error))?.flatten() {
        if entry.path().is_dir() { sync_all(&entry.path())? } else { sync(&entry.path())? }
    }
    sync(folder)
}

fn sync(path: &Path) -> Result<()> {
    std::fs::File::open(path).and_then(|folder| folder.sync_all()).map_err(|error| Error::io(path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_destination_appears_only_when_published_and_nothing_stays_behind() {
        let folder = tempfile::tempdir().unwrap();
        let (model, out) = (folder.path().join("model"), folder.path().join("out"));
        std::fs::create_dir(&model).unwrap();
        for wrong in [model.clone(), model.join("inside"), folder.path().join("none/out")] {
            assert_eq!(Destination::claim(&wrong, &model, true).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
        drop(Destination::claim(&out, &model, false).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let destination = Destination::claim(&out, &model, false).unwrap();
        std::fs::write(destination.folder().join("a"), "1").unwrap();
        std::fs::write(destination.folder().join("report.json"), "{}").unwrap();
        assert!(!out.exists());
        destination.publish().unwrap();
        assert_eq!(std::fs::read(out.join("a")).unwrap(), b"1");
        assert!(Destination::claim(&out, &model, false).unwrap_err().to_string().contains("--force"));
        let again = Destination::claim(&out, &model, true).unwrap();
        std::fs::write(again.folder().join("b"), "2").unwrap();
        again.publish().unwrap();
        assert!(out.join("b").exists() && !out.join("a").exists());
        assert!(Destination::claim(&out, &model, true).unwrap_err().to_string().contains("did not write"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
