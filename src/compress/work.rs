//! The hidden folder beside a destination in which an output comes to be, so that whoever runs the same command again goes
//! on where the last run was cut off:
//!
//! ```text
//! .NAME.drawknife-work/
//!     LOCK          who works here; locked while they do
//!     plan.json     what the work depends on: program, recipe, inputs, texts, device
//!     journal       one line per commit
//!     out/          the output, laid out in full at the start
//!     states/       hidden states before the next block
//! ```
//!
//! Tensors are written to their final places in files that have their final length, and a commit records the hash of each.
//! Files per block, which would have to be put together at the end, would need the disk twice and the time of a copy; bytes
//! that a record vouches for are never written again, so that they are as immutable as a file of their own.

use std::collections::HashSet;
use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Read as _, Seek, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value};

use crate::compress::journal::{self, Journal, Kept, Record};
use crate::error::{Error, Result, shown, shown_path};
use crate::report::{BlockReport, LayerReport};
use crate::storage::Store;

const LOCK: &str = "LOCK";
const PLAN: &str = "plan.json";
const JOURNAL: &str = "journal";
const STATES: &str = "states";
const OUTPUT: &str = "out";
/// A file that is kept for whoever goes on: windows that a model wrote.
pub const WINDOWS: &str = "windows.json";
/// All that there is in a work folder.
const CONTENTS: [&str; 6] = [LOCK, PLAN, JOURNAL, STATES, OUTPUT, WINDOWS];

/// A work folder that this process holds.
#[derive(Debug)]
pub struct Work {
    /// What changes the disk.
    pub storage: Arc<dyn Store>,
    /// Where it is.
    pub path: PathBuf,
    lock: File,
    owner: String,
    read: journal::Read,
    log: Option<Arc<Mutex<Log>>>,
    discard: bool,
}

/// The journal with a look at who holds the folder, for where locks do not lock.
#[derive(Debug)]
pub struct Log {
    journal: Journal,
    lock: PathBuf,
    owner: String,
}

impl Log {
    /// Adds a record; all that it names must be on the disk.
    ///
    /// # Errors
    /// When the disk refuses, or another process took the folder.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        match std::fs::read_to_string(&self.lock) {
            Ok(owner) if owner == self.owner => self.journal.append(record),
            _ => Err(Error::run("another process took over the work on this output; let one of them finish").file(&self.lock)),
        }
    }
}

/// What earlier runs did, as their records say it.
#[derive(Debug, Default)]
pub struct Done {
    /// Tensors and layers of the model that are done.
    pub names: HashSet<String>,
    /// Reports of layers.
    pub layers: Vec<LayerReport>,
    /// Reports of blocks.
    pub blocks: Vec<BlockReport>,
    /// Hidden states before the next block.
    pub states: Vec<Kept>,
}

impl Work {
    /// The folder for a destination.
    pub fn path(parent: &Path, name: &std::ffi::OsStr) -> PathBuf {
        // A name may have 255 bytes.
        let whole = name.to_string_lossy();
        let short = if name.len() <= 200 {
            whole.into_owned()
        } else {
            let cut: String = whole.chars().take(40).collect();
            format!("{cut}-{}", &blake3::hash(name.as_encoded_bytes()).to_hex()[..16])
        };
        parent.join(format!(".{short}.drawknife-work"))
    }

    /// Whether work on a destination is left that can be gone on with.
    pub fn left(target: &Path) -> bool {
        let (parent, name) = (target.parent().unwrap_or(Path::new(".")), target.file_name().unwrap_or_default());
        worth_keeping(&Self::path(parent, name))
    }

    /// Makes the folder or takes the one that is there.
    ///
    /// # Errors
    /// When another process holds it, it cannot be written, or its journal is damaged.
    pub fn open(path: PathBuf, storage: Arc<dyn Store>, restart: bool) -> Result<Self> {
        let (mut lock, owner) = loop {
            match (storage.create_private_folder(&path), std::fs::symlink_metadata(&path)) {
                (Ok(()), _) => {}
                (Err(_), Ok(found)) if found.is_dir() => ours(&path)?,
                (Err(_), Ok(_)) => return Err(Error::input("is no work folder of this program; remove it").file(&path)),
                (Err(error), Err(_)) => return Err(error),
            }
            if let Some(held) = hold(&path)? {
                break held;
            }
        };
        let fail = |error: std::io::Error| Error::io(&path.join(LOCK), &error);
        lock.set_len(0).and_then(|()| lock.rewind()).and_then(|()| lock.write_all(owner.as_bytes())).map_err(fail)?;
        let mut work = Self { storage, path, lock, owner, read: journal::Read::default(), log: None, discard: false };
        if restart {
            work.clear()?;
        }
        let journal = work.path.join(JOURNAL);
        match std::fs::read(&journal) {
            Ok(bytes) => {
                work.read = journal::read(&bytes).map_err(|what| Error::damaged(what).file(&journal))?;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(&journal, &error)),
        }
        Ok(work)
    }

    /// Throws away what earlier runs left.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn forget(&mut self) -> Result<()> {
        self.log = None;
        self.clear()
    }

    /// Removes all but the lock.
    fn clear(&mut self) -> Result<()> {
        let entries = std::fs::read_dir(&self.path).map_err(|error| Error::io(&self.path, &error))?;
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| !path.ends_with(LOCK)).collect();
        paths.sort();
        self.read = journal::Read::default();
        paths.iter().try_for_each(|path| self.storage.remove(path))
    }

    /// The folder of the output.
    pub fn output(&self) -> PathBuf {
        self.path.join(OUTPUT)
    }

    /// What earlier runs recorded.
    pub fn records(&self) -> &[Record] {
        &self.read.records
    }

    /// Whether there is work of earlier runs.
    pub fn resumes(&self) -> bool {
        !self.read.records.is_empty()
    }

    /// Begins the work that depends on what `plan` says, or goes on with it.
    ///
    /// # Errors
    /// When earlier work depends on something else, naming what differs, or the disk refuses.
    pub fn begin(&mut self, plan: &Map<String, Value>) -> Result<()> {
        if self.resumes() {
            self.depends_on(plan)?;
            self.drop_unrecorded()?;
        } else {
            self.clear()?;
            let written = self.storage.as_ref().put_json(&self.path.join(PLAN), plan)?;
            self.storage.sync(&written)?;
            self.storage.create_folder(&self.output())?;
            self.storage.create_folder(&self.path.join(STATES))?;
        }
        let journal = self.path.join(JOURNAL);
        let file = if self.resumes() { self.storage.open(&journal)? } else { self.storage.create(&journal, 0)? };
        if self.resumes() {
            self.storage.cut(&file, self.read.bytes)?;
        }
        self.storage.sync_folder(&self.path)?;
        let journal = Journal::after(Arc::clone(&self.storage), file, &self.read);
        self.log = Some(Arc::new(Mutex::new(Log { journal, lock: self.path.join(LOCK), owner: self.owner.clone() })));
        Ok(())
    }

    /// Checks that earlier work depends on what `plan` says.
    ///
    /// # Errors
    /// When it does not, naming what differs.
    pub fn depends_on(&self, plan: &Map<String, Value>) -> Result<()> {
        let path = self.path.join(PLAN);
        let text = std::fs::read(&path).map_err(|error| Error::damaged(error).file(&path))?;
        let before: Map<String, Value> =
            serde_json::from_slice(&text).map_err(|error| Error::damaged(format!("is not as it was written ({error})")).file(&path))?;
        let differing = differing(&Value::Object(before), &Value::Object(plan.clone()));
        let Some(((key, how), others)) = differing.split_first() else { return Ok(()) };
        let more = match others.len() {
            0 => String::new(),
            more => format!(" and {more} more ({})", others.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>().join(", ")),
        };
        let what = format!(
            "holds unfinished work that differs in {key} ({how}){more}; run what was run before to finish it, or start over with --restart"
        );
        Err(Error::input(what).file(&self.path))
    }

    /// Removes states that no record of the last two blocks names.
    fn drop_unrecorded(&self) -> Result<()> {
        let blocks = self.read.records.iter().filter(|record| record.block.is_some()).rev().take(2);
        let named: HashSet<&str> = blocks.flat_map(|record| record.files.iter().map(|file| file.name.as_str())).collect();
        let folder = self.path.join(STATES);
        let entries = std::fs::read_dir(&folder).map_err(|error| Error::io(&folder, &error))?;
        for entry in entries.flatten() {
            if !named.contains(format!("{STATES}/{}", entry.file_name().to_string_lossy()).as_str()) {
                self.storage.remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// What earlier runs did.
    pub fn done(&self) -> Done {
        let mut done = Done::default();
        for record in self.records() {
            done.names.extend(record.done.iter().cloned());
            done.layers.extend(record.layers.iter().cloned());
            if let Some(block) = &record.block {
                done.blocks.push(block.clone());
                done.states.clone_from(&record.files);
            }
        }
        done
    }

    /// The journal.
    ///
    /// # Errors
    /// Before [`Self::begin`].
    pub fn log(&self) -> Result<Arc<Mutex<Log>>> {
        self.log.clone().ok_or_else(|| Error::run("the work was not begun"))
    }

    /// Keeps a small file for whoever goes on.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn keep(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let file = self.storage.as_ref().put(&self.path.join(name), bytes)?;
        self.storage.sync(&file)?;
        self.storage.sync_folder(&self.path)?;
        let kept = Kept { name: name.into(), bytes: bytes.len() as u64, blake3: blake3::hash(bytes).to_hex().to_string() };
        locked(self.log()?.as_ref()).append(&Record { files: vec![kept], ..Record::default() })
    }

    /// A small file that an earlier run kept.
    ///
    /// # Errors
    /// When it is not as it was written.
    pub fn kept(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some(kept) = self.records().iter().flat_map(|record| &record.files).find(|file| file.name == name) else { return Ok(None) };
        let path = self.path.join(name);
        let bytes = std::fs::read(&path).map_err(|error| Error::damaged(error).file(&path))?;
        if blake3::hash(&bytes).to_hex().as_str() != kept.blake3 {
            return Err(Error::damaged("is not as it was written").file(&path));
        }
        Ok(Some(bytes))
    }

    /// Where hidden states before a block are kept, by the name in the record.
    pub fn states(block: usize, stream: &str) -> String {
        format!("{STATES}/{block:05}-{stream}")
    }

    /// Records that the output is complete and only its place is missing.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn finished(&self, manifest: &blake3::Hash) -> Result<()> {
        locked(self.log()?.as_ref()).append(&Record { finished: Some(manifest.to_hex().to_string()), ..Record::default() })
    }

    /// The hash of the manifest of an output that only its place was missing of.
    pub fn was_finished(&self) -> Option<&str> {
        self.records().last()?.finished.as_deref()
    }

    /// Nothing here is of use to anybody: it goes with this value.
    pub fn discard(&mut self) {
        self.discard = true;
    }

    /// Whether the folder stays when this value goes, because something in it is worth going on with.
    pub fn stays(&self) -> bool {
        !self.discard && (self.resumes() || worth_keeping(&self.path))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !self.stays() {
            // A folder that cannot be removed now is emptied by the next run.
            let _ = self.storage.remove(&self.path);
        }
        let _ = self.lock.unlock();
    }
}

/// Refuses a folder that holds what this program puts into none.
fn ours(folder: &Path) -> Result<()> {
    let entries = std::fs::read_dir(folder).map_err(|error| Error::io(folder, &error))?;
    match entries.flatten().map(|entry| entry.file_name()).find(|name| !CONTENTS.iter().any(|known| name == known)) {
        Some(other) => {
            Err(Error::input(format!("holds {}, which no work of this program does; move it away", shown(&other.to_string_lossy())))
                .file(folder))
        }
        None => Ok(()),
    }
}

/// Whether something in a work folder was recorded.
pub fn worth_keeping(path: &Path) -> bool {
    std::fs::metadata(path.join(JOURNAL)).is_ok_and(|journal| journal.len() > 0)
}

/// A journal that a thread which failed may have left locked.
pub fn locked(log: &Mutex<Log>) -> MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks a folder and says who holds it now; nothing when it was removed meanwhile.
fn hold(folder: &Path) -> Result<Option<(File, String)>> {
    let path = folder.join(LOCK);
    let mut lock = match File::options().read(true).write(true).create(true).truncate(false).open(&path) {
        Ok(lock) => lock,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::input(format!("cannot write here: {error}")).file(folder)),
    };
    match lock.try_lock() {
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = (&mut lock).take(200).read_to_string(&mut holder);
            let holder = shown(holder.split(" at ").next().unwrap_or_default());
            return Err(Error::input(format!(
                "{} is being written by {}; wait for it, or give another destination with -o",
                shown_path(folder),
                if holder.is_empty() { "another process" } else { &holder }
            )));
        }
        // Where a file system has no locks, the look at the owner before every record is what is left.
        Err(TryLockError::Error(_)) | Ok(()) => {}
    }
    let same = std::fs::metadata(&path)
        .is_ok_and(|there| lock.metadata().is_ok_and(|held| (held.dev(), held.ino()) == (there.dev(), there.ino())));
    if !same {
        return Ok(None);
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
    Ok(Some((lock, format!("process {} on {} at {now}\n", std::process::id(), host.trim()))))
}

/// Keys in which two objects differ, each with its values before and now.
fn differing(before: &Value, now: &Value) -> Vec<(String, String)> {
    match (before, now) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
            keys.sort();
            keys.dedup();
            let below = |key: &String| {
                let found = differing(a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null));
                let joined =
                    |(below, how): (String, String)| (if below.is_empty() { shown(key) } else { format!("{}.{below}", shown(key)) }, how);
                found.into_iter().map(joined).collect::<Vec<_>>()
            };
            keys.into_iter().flat_map(below).collect()
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            let of = |(number, (a, b))| -> Vec<(String, String)> {
                let joined = |(below, how): (String, String)| {
                    (if below.is_empty() { format!("{number}") } else { format!("{number}.{below}") }, how)
                };
                differing(a, b).into_iter().map(joined).collect()
            };
            a.iter().zip(b).enumerate().flat_map(of).collect()
        }
        (a, b) if a == b => Vec::new(),
        (a, b) => vec![(String::new(), format!("{} before, {} now", short(a), short(b)))],
    }
}

fn short(value: &Value) -> String {
    match value {
        Value::Null => "absent".into(),
        value => shown(&value.to_string().chars().take(60).collect::<String>()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Disk;

    fn plan(recipe: &str) -> Map<String, Value> {
        serde_json::json!({"program": "1", "recipe": {"stage": [{"bits": 4}, {"method": recipe}]}}).as_object().unwrap().clone()
    }

    fn open(path: &Path) -> Result<Work> {
        Work::open(path.to_path_buf(), Arc::new(Disk), false)
    }

    fn block(number: usize) -> Record {
        let files = ["compressed", "float"].map(|stream| Kept { name: Work::states(number + 1, stream), bytes: 1, blake3: "0".into() });
        let block = BlockReport {
            block: number,
            output_error: None,
            stages: Vec::new(),
            experts: Vec::new(),
            router_entropy: None,
            experts_kept: Vec::new(),
        };
        Record { done: vec![format!("layer {number}")], block: Some(block), files: files.into(), ..Record::default() }
    }

    #[test]
    fn work_that_recorded_something_stays_and_is_gone_on_with_and_other_work_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = Work::path(folder.path(), std::ffi::OsStr::new("out"));
        assert!(!Work::left(&folder.path().join("out")));
        let mut work = open(&path).unwrap();
        assert!(work.log().is_err() && !work.resumes() && !work.stays());
        work.begin(&plan("a")).unwrap();
        drop(work);
        assert!(!path.exists(), "nothing was recorded");
        let mut work = open(&path).unwrap();
        work.begin(&plan("a")).unwrap();
        locked(&work.log().unwrap()).append(&block(0)).unwrap();
        assert!(work.stays());
        drop(work);
        assert!(Work::left(&folder.path().join("out")));
        let mut work = open(&path).unwrap();
        assert!(work.resumes() && work.records() == [block(0)]);
        let refused = work.begin(&plan("b")).unwrap_err().to_string();
        assert!(refused.contains("recipe.stage.1.method (\"a\" before, \"b\" now); run"), "{refused}");
        let mut other = plan("b");
        other.insert("seed".into(), 3.into());
        let refused = work.begin(&other).unwrap_err().to_string();
        assert!(refused.contains(" and 1 more (seed); run"), "{refused}");
        work.begin(&plan("a")).unwrap();
        locked(&work.log().unwrap()).append(&block(1)).unwrap();
        assert_eq!(journal::read(&std::fs::read(path.join(JOURNAL)).unwrap()).unwrap().records, [block(0), block(1)]);
        work.discard();
        assert!(!work.stays());
        drop(work);
        assert!(!path.exists());
    }

    #[test]
    fn one_process_holds_a_folder_and_another_is_told_which() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("work");
        let mut work = open(&path).unwrap();
        let refused = open(&path).unwrap_err();
        assert!(refused.to_string().contains(&format!("is being written by process {} on ", std::process::id())), "{refused}");
        assert!(refused.exit_code() == 2 && !refused.to_string().contains(" at "), "{refused}");
        work.begin(&plan("a")).unwrap();
        let log = work.log().unwrap();
        locked(&log).append(&block(0)).unwrap();
        std::fs::write(path.join(LOCK), "process 1 elsewhere").unwrap();
        assert!(locked(&log).append(&block(1)).unwrap_err().to_string().contains("another process took over"));
        work.discard();
        drop(work);
        drop(open(&path).unwrap());
        assert!(open(Path::new("/proc/none")).is_err());
        let (other, link) = (folder.path().join("other"), folder.path().join("link"));
        std::fs::create_dir(&other).unwrap();
        std::fs::write(other.join("letter"), "dear").unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        assert!(open(&link).unwrap_err().to_string().contains("no work folder") && other.join("letter").exists());
        assert!(open(&other).unwrap_err().to_string().contains("holds letter") && other.join("letter").exists());
    }

    #[test]
    fn states_of_the_last_two_blocks_stay_and_all_goes_with_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("work");
        let mut work = open(&path).unwrap();
        work.begin(&plan("a")).unwrap();
        (0..3).for_each(|number| locked(&work.log().unwrap()).append(&block(number)).unwrap());
        for name in (1..5).flat_map(|number| ["compressed", "float"].map(|stream| Work::states(number, stream))) {
            std::fs::write(path.join(name), "x").unwrap();
        }
        let journal = std::fs::read(path.join(JOURNAL)).unwrap();
        std::fs::write(path.join(JOURNAL), [&journal[..], b"torn"].concat()).unwrap();
        drop(work);
        let mut work = open(&path).unwrap();
        let done = work.done();
        assert_eq!((done.blocks.len(), done.names.len(), done.states), (3, 3, block(2).files));
        work.begin(&plan("a")).unwrap();
        let mut left: Vec<_> = std::fs::read_dir(path.join(STATES)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["00002-compressed", "00002-float", "00003-compressed", "00003-float"]);
        assert_eq!(std::fs::read(path.join(JOURNAL)).unwrap(), journal, "what was torn is cut off");
        drop(work);
        std::fs::write(path.join(JOURNAL), [b"x", &journal[..]].concat()).unwrap();
        assert!(open(&path).unwrap_err().to_string().contains("line 1 is not as it was written; start over with --restart"));
        let mut work = Work::open(path.clone(), Arc::new(Disk), true).unwrap();
        assert!(!work.resumes() && std::fs::read_dir(&path).unwrap().count() == 1);
        work.begin(&plan("b")).unwrap();
        locked(&work.log().unwrap()).append(&block(0)).unwrap();
        work.forget().unwrap();
        assert!(work.log().is_err() && !work.stays());
    }

    #[test]
    fn small_files_are_kept_and_a_changed_one_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("work");
        let mut work = open(&path).unwrap();
        work.begin(&plan("a")).unwrap();
        work.keep(WINDOWS, b"[1]").unwrap();
        assert_eq!(work.was_finished(), None);
        work.finished(&blake3::hash(b"all")).unwrap();
        drop(work);
        let work = open(&path).unwrap();
        assert_eq!(work.kept(WINDOWS).unwrap().unwrap(), b"[1]");
        assert_eq!(work.kept("others.json").unwrap(), None);
        assert_eq!(work.was_finished(), Some(blake3::hash(b"all").to_hex().as_str()));
        std::fs::write(path.join(WINDOWS), "[2]").unwrap();
        assert!(work.kept(WINDOWS).unwrap_err().to_string().contains("not as it was written"));
        std::fs::remove_file(path.join(WINDOWS)).unwrap();
        assert!(work.kept(WINDOWS).is_err());
        std::fs::write(path.join(PLAN), "{").unwrap();
        assert!(work.depends_on(&plan("a")).unwrap_err().to_string().contains("not as it was written ("));
    }

    #[test]
    fn a_folder_has_a_name_of_allowed_length_that_belongs_to_one_destination() {
        let name = |length: usize| Work::path(Path::new("p"), std::ffi::OsStr::new(&"n".repeat(length)));
        assert_eq!(name(3), Path::new("p/.nnn.drawknife-work"));
        assert!(name(200).to_str().unwrap().contains(&"n".repeat(200)));
        assert!(name(255).file_name().unwrap().len() < 200 && name(255) != name(254));
        assert_eq!(differing(&serde_json::json!([1, 2]), &serde_json::json!([1])), [(String::new(), "[1,2] before, [1] now".to_string())]);
        assert_eq!(short(&Value::String("x".repeat(100))).chars().count(), 60);
        assert_eq!(short(&Value::Null), "absent");
    }
}
