//! Where the output appears: complete or not at all. Work happens in a hidden folder beside the destination, whose output is
//! renamed into place at the very end. What may be gone on with stays there when a run is cut off; all else is removed.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::checkpoint::hash_file;
use crate::compress::work::Work;
use crate::error::{Error, Fault, Result, shown_path};
use crate::report::bytes;
use crate::storage::{Disk, Store};

/// The file that names all others of an output with their hashes.
pub const MANIFEST: &str = "manifest.json";

/// How a destination is taken.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Whether an output that is there may be replaced.
    pub replace: bool,
    /// Whether unfinished work that is there is thrown away.
    pub restart: bool,
    /// What changes the disk.
    pub storage: Arc<dyn Store>,
}

impl Default for Claim {
    fn default() -> Self {
        Self { replace: false, restart: false, storage: Arc::new(Disk) }
    }
}

/// A destination that was checked and claimed.
#[derive(Debug)]
pub struct Destination {
    /// The work on it.
    pub work: Work,
    target: PathBuf,
    replace: bool,
}

impl Destination {
    /// Checks that `target` may be written and takes the hidden folder beside it.
    ///
    /// # Errors
    /// When it exists (unless `replace`), is or contains or lies in the model, its parent cannot be written, or another
    /// process works on it.
    pub fn claim(target: &Path, model: &Path, claim: Claim) -> Result<Self> {
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
        let work = Work::path(&parent, name);
        let free = may_be_written(&target, claim.replace);
        if free.is_err() && !work.exists() {
            free?;
        }
        let destination = Self { work: Work::open(work, claim.storage, claim.restart)?, target, replace: claim.replace };
        // The end of the last run may have come between putting the output into place and tidying up.
        if !destination.was_published() {
            may_be_written(&destination.target, claim.replace)?;
        }
        Ok(destination)
    }

    /// Begins the work that depends on what `plan` says, goes on with it, or finds it done: then true.
    ///
    /// # Errors
    /// As [`Work::begin`].
    pub fn begin(&mut self, plan: &Map<String, Value>) -> Result<bool> {
        if !self.was_published() {
            self.work.begin(plan)?;
            return Ok(false);
        }
        if self.work.depends_on(plan).is_ok() {
            self.work.discard();
            return Ok(true);
        }
        // Another command: what is left over says nothing to it.
        self.work.forget()?;
        may_be_written(&self.target, self.replace)?;
        self.work.begin(plan)?;
        Ok(false)
    }

    /// Whether the last run had put its output into place.
    fn was_published(&self) -> bool {
        let there = || hash_file(&self.target.join(MANIFEST)).ok();
        self.work.was_finished().is_some_and(|hash| there().is_some_and(|there| there.to_hex().as_str() == hash))
    }

    /// The folder to fill.
    pub fn folder(&self) -> PathBuf {
        self.work.output()
    }

    /// The folder as it will be called.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Checks the free space of the file system. What the work folder holds by now is part of what is needed.
    ///
    /// # Errors
    /// When `needed` bytes do not fit.
    pub fn has_room(&self, needed: u64) -> Result<()> {
        let free = free_bytes(&self.work.path)?;
        if free.saturating_add(held_bytes(&self.work.path)) < needed {
            return Err(Error::full(format!(
                "the output needs {} ({needed} bytes), {} are free; free some or give another place with -o",
                bytes(needed),
                bytes(free)
            ))
            .file(&self.target));
        }
        Ok(())
    }

    /// Brings the finished folder to the disk and renames it into place.
    ///
    /// # Errors
    /// When somebody else made the destination meanwhile, or the disk refuses; the destination is then as before.
    pub fn publish(mut self) -> Result<()> {
        match self.put_into_place() {
            Ok(()) => {
                self.work.discard();
                Ok(())
            }
            Err(error) => Err(self.give_up(error)),
        }
    }

    fn put_into_place(&mut self) -> Result<()> {
        let (folder, storage) = (self.folder(), Arc::clone(&self.work.storage));
        storage.as_ref().sync_all(&folder)?;
        storage.sync_folder(&self.work.path)?;
        if let Ok(manifest) = hash_file(&folder.join(MANIFEST)) {
            self.work.finished(&manifest)?;
        }
        let exchanged = self.replace && self.target.exists();
        let moved = |from: &Path, to: &Path| if exchanged { storage.exchange(from, to) } else { storage.rename(from, to) };
        moved(&folder, &self.target).map_err(|error| Error::run(format!("cannot put the output into place: {error}")))?;
        let parent = self.target.parent().unwrap_or(Path::new("/"));
        if let Err(error) = storage.sync_folder(parent) {
            // Nobody can tell whether the new name would last: the next run tries again.
            moved(&self.target, &folder)?;
            return Err(error);
        }
        Ok(())
    }

    /// Gives up after an error and says what stays: work that the same command can go on with, or nothing.
    pub fn give_up(mut self, error: Error) -> Error {
        if !matches!(error.fault, Fault::Run | Fault::Full | Fault::Damaged | Fault::Interrupted(_)) {
            self.work.discard();
        }
        let stays = self.work.stays();
        let place = shown_path(&self.work.path);
        drop(self);
        match (error.fault, stays) {
            (Fault::Interrupted(_), true) => error.advice("the work so far is kept"),
            (Fault::Run, true) => error.advice("the work so far is kept, the same command goes on with it"),
            (Fault::Full, true) => error.advice(&format!("the work so far is kept in {place}; make room and run the same command again")),
            (Fault::Interrupted(_), false) => error.advice("nothing was written"),
            _ => error,
        }
    }
}

/// Whether a destination is free, or may be replaced.
fn may_be_written(target: &Path, replace: bool) -> Result<()> {
    let metadata = match std::fs::symlink_metadata(target) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::input(format!("cannot be written: {error}; give another with -o")).file(target)),
    };
    if !replace {
        return Err(Error::input("the destination exists; give another with -o, or replace it with --force").file(target));
    }
    let ours = target.join("report.json").exists() || std::fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
    if metadata.is_dir() && !ours {
        let what = "the destination holds something that this program did not write; --force replaces only its own outputs";
        return Err(Error::input(what).file(target));
    }
    if !metadata.is_dir() {
        return Err(Error::input("the destination is not a folder; --force replaces only folders").file(target));
    }
    Ok(())
}

/// Bytes of the disk that a folder takes with all it holds.
fn held_bytes(folder: &Path) -> u64 {
    let held = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() => held_bytes(&entry.path()),
        Ok(found) => 512 * found.blocks(),
        Err(_) => 0,
    };
    std::fs::read_dir(folder).map_or(0, |entries| entries.flatten().map(held).sum())
}

/// Free bytes of the file system that holds `path`.
///
/// # Errors
/// When it cannot be asked.
pub fn free_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).map_err(|error| Error::io(path, &error.into()))?;
    Ok(stat.f_bavail * stat.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(replace: bool) -> Claim {
        Claim { replace, ..Claim::default() }
    }

    #[test]
    fn room_that_the_work_has_taken_by_now_is_not_asked_for_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut destination = Destination::claim(&folder.path().join("out"), &folder.path().join("model"), claim(false)).unwrap();
        destination.begin(&Map::new()).unwrap();
        let taken = 256 << 20;
        let file = destination.work.storage.create(&destination.folder().join("a"), taken).unwrap();
        drop(file);
        let free = free_bytes(folder.path()).unwrap();
        assert!(held_bytes(&destination.work.path) >= taken);
        destination.has_room(free + taken / 2).unwrap();
        assert_eq!(destination.has_room(free + 2 * taken).unwrap_err().exit_code(), 1);
    }

    #[test]
    fn the_destination_appears_only_when_published_and_nothing_stays_behind() {
        let folder = tempfile::tempdir().unwrap();
        let (model, out) = (folder.path().join("model"), folder.path().join("out"));
        std::fs::create_dir(&model).unwrap();
        for wrong in [model.clone(), model.join("inside"), folder.path().join("none/out")] {
            assert_eq!(Destination::claim(&wrong, &model, claim(true)).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
        drop(Destination::claim(&out, &model, claim(false)).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let mut destination = Destination::claim(&out, &model, claim(false)).unwrap();
        destination.begin(&Map::new()).unwrap();
        std::fs::write(destination.folder().join("a"), "1").unwrap();
        std::fs::write(destination.folder().join("report.json"), "{}").unwrap();
        assert!(!out.exists());
        destination.publish().unwrap();
        assert_eq!(std::fs::read(out.join("a")).unwrap(), b"1");
        assert!(Destination::claim(&out, &model, claim(false)).unwrap_err().to_string().contains("--force"));
        let mut again = Destination::claim(&out, &model, claim(true)).unwrap();
        again.begin(&Map::new()).unwrap();
        std::fs::write(again.folder().join("b"), "2").unwrap();
        again.publish().unwrap();
        assert!(out.join("b").exists() && !out.join("a").exists());
        assert!(Destination::claim(&out, &model, claim(true)).unwrap_err().to_string().contains("did not write"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
