//! The thread that writes: pieces of tensors to their places, and commits to the journal once all before them is on the disk.
//! Computing goes on meanwhile.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::compress::journal::{Hashed, Record};
use crate::compress::work::{Log, locked};
use crate::error::{Error, Result};
use crate::formats::output::{Files, Piece};
use crate::storage::{Opened, Store};

/// At most this many tasks wait.
const WAITING: usize = 2;

/// What is to be recorded.
#[derive(Debug, Default)]
pub struct Commit {
    /// The record; the tensors that are complete join it.
    pub record: Record,
    /// Files that it names.
    pub files: Vec<Opened>,
    /// What nobody needs once it stands.
    pub stale: Vec<PathBuf>,
}

enum Task {
    Piece(usize, Piece),
    Commit(Box<Commit>),
}

/// The thread.
#[derive(Debug)]
pub struct Writer {
    tasks: Option<SyncSender<Task>>,
    thread: Option<JoinHandle<Result<Vec<Hashed>>>>,
    /// How long others waited for it.
    pub waited: Duration,
}

impl Writer {
    /// A thread for the files of all exports. Without a journal a commit only brings them to the disk.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(files: Vec<Files>, storage: Arc<dyn Store>, log: Option<Arc<Mutex<Log>>>) -> Result<Self> {
        let (tasks, waiting) = sync_channel::<Task>(WAITING);
        let mut state = State { files, storage, log, hashers: HashMap::new(), complete: Vec::new(), recorded: Vec::new() };
        let thread = std::thread::Builder::new().name("writer".into()).spawn(move || {
            waiting.into_iter().try_for_each(|task| state.work(task))?;
            Ok(state.recorded)
        });
        let thread = thread.map_err(|error| Error::run(format!("no thread to write the output: {error}")))?;
        Ok(Self { tasks: Some(tasks), thread: Some(thread), waited: Duration::ZERO })
    }

    /// Gives a piece of an export to be written.
    ///
    /// # Errors
    /// Whatever stopped the thread.
    pub fn write(&mut self, export: usize, piece: Piece) -> Result<()> {
        self.give(Task::Piece(export, piece))
    }

    /// Gives a record to be made of all that was given before.
    ///
    /// # Errors
    /// Whatever stopped the thread.
    pub fn commit(&mut self, commit: Commit) -> Result<()> {
        self.give(Task::Commit(Box::new(commit)))
    }

    fn give(&mut self, task: Task) -> Result<()> {
        let started = Instant::now();
        let taken = self.tasks.as_ref().is_some_and(|tasks| tasks.send(task).is_ok());
        self.waited += started.elapsed();
        if taken {
            return Ok(());
        }
        self.settle()?;
        Err(Error::run("the output was given up after an earlier failure"))
    }

    /// Waits until all is done; gives the tensors that were recorded.
    ///
    /// # Errors
    /// Whatever stopped the thread.
    pub fn settle(&mut self) -> Result<Vec<Hashed>> {
        let started = Instant::now();
        drop(self.tasks.take());
        let ended = match self.thread.take().map(JoinHandle::join) {
            None => Ok(Vec::new()),
            Some(Ok(ended)) => ended,
            Some(Err(_)) => Err(Error::run("the thread that writes the output failed")),
        };
        self.waited += started.elapsed();
        ended
    }
}

impl Drop for Writer {
    /// What was given is written before somebody else may take the folder.
    fn drop(&mut self) {
        let _ = self.settle();
    }
}

struct State {
    files: Vec<Files>,
    storage: Arc<dyn Store>,
    log: Option<Arc<Mutex<Log>>>,
    hashers: HashMap<(usize, String), blake3::Hasher>,
    /// Since the last record.
    complete: Vec<Hashed>,
    recorded: Vec<Hashed>,
}

impl State {
    fn work(&mut self, task: Task) -> Result<()> {
        match task {
            Task::Piece(export, piece) => {
                self.files[export].write(&piece)?;
                if self.log.is_some() {
                    self.hash(export, piece);
                }
                Ok(())
            }
            Task::Commit(commit) => self.commit(*commit),
        }
    }

    fn hash(&mut self, export: usize, piece: Piece) {
        let key = (export, piece.tensor);
        let mut hasher = self.hashers.remove(&key).unwrap_or_default();
        hasher.update(&piece.bytes);
        if piece.last {
            let blake3 = hasher.finalize().to_hex().to_string();
            self.complete.push(Hashed { export, tensor: key.1, blake3 });
        } else {
            self.hashers.insert(key, hasher);
        }
    }

    fn commit(&mut self, commit: Commit) -> Result<()> {
        self.files.iter().try_for_each(Files::sync)?;
        let Some(log) = &self.log else { return Ok(()) };
        commit.files.iter().try_for_each(|file| self.storage.sync(file))?;
        if let Some(folder) = commit.files.first().and_then(|file| file.path.parent()) {
            self.storage.sync_folder(folder)?;
        }
        let record = Record { tensors: std::mem::take(&mut self.complete), ..commit.record };
        locked(log).append(&record)?;
        self.recorded.extend(record.tensors);
        // A state that is of no use any more costs room, nothing else.
        commit.stale.iter().for_each(|path| drop(self.storage.remove(path)));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use safetensors::Dtype;
    use serde_json::Map;

    use super::*;
    use crate::compress::work::Work;
    use crate::formats::Entry;
    use crate::formats::output::Layout;
    use crate::storage::Disk;

    fn layout() -> Layout {
        let entry = |name: &str, size| Entry { name: name.into(), dtype: Dtype::U8, shape: vec![size] };
        Layout::shards(&[entry("a", 4), entry("b", 2)], 100, &Default::default()).unwrap()
    }

    fn work(folder: &Path) -> Work {
        let mut work = Work::open(folder.join("work"), Arc::new(Disk), false).unwrap();
        work.begin(&Map::new()).unwrap();
        work
    }

    fn records(folder: &Path) -> Vec<Record> {
        crate::compress::journal::read(&std::fs::read(folder.join("work/journal")).unwrap()).unwrap().records
    }

    #[test]
    fn a_record_names_what_is_complete_with_its_hash_and_comes_after_the_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let (work, mut layout) = (work(folder.path()), layout());
        let files = Files::create(&layout, &work.output(), Arc::new(Disk)).unwrap();
        let mut writer = Writer::start(vec![files], Arc::new(Disk), Some(work.log().unwrap())).unwrap();
        let stale = folder.path().join("stale");
        std::fs::write(&stale, "").unwrap();
        for (name, bytes) in [("a", "01"), ("b", "xy"), ("a", "2")] {
            writer.write(0, layout.piece(name, bytes.into()).unwrap()).unwrap();
        }
        let beside = (work.storage.as_ref() as &dyn Store).put(&work.path.join("states/1"), b"z").unwrap();
        let record = Record { done: vec!["layer".into()], ..Record::default() };
        writer.commit(Commit { record, files: vec![beside], stale: vec![stale.clone()] }).unwrap();
        writer.write(0, layout.piece("a", b"3".to_vec()).unwrap()).unwrap();
        writer.commit(Commit::default()).unwrap();
        let recorded = writer.settle().unwrap();
        let hashed = |tensor: &str, bytes: &str| {
            let blake3 = blake3::hash(bytes.as_bytes()).to_hex().to_string();
            Hashed { export: 0, tensor: tensor.into(), blake3 }
        };
        assert_eq!(recorded, [hashed("b", "xy"), hashed("a", "0123")]);
        let records = records(folder.path());
        assert_eq!((records[0].done.as_slice(), records[0].tensors.as_slice()), (&["layer".to_string()][..], &recorded[..1]));
        assert_eq!((records.len(), records[1].tensors.as_slice()), (2, &recorded[1..]));
        assert!(!stale.exists());
        let bytes = std::fs::read(work.output().join("model.safetensors")).unwrap();
        assert!(bytes.ends_with(b"0123xy"));
        assert!(writer.write(0, layout_piece()).unwrap_err().to_string().contains("given up"));
    }

    fn layout_piece() -> Piece {
        layout().piece("b", b"q".to_vec()).unwrap()
    }

    #[test]
    fn a_disk_that_refuses_stops_the_thread_with_its_reason_and_nothing_is_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let work = work(folder.path());
        let files = Files::create(&layout(), &work.output(), Arc::new(Disk)).unwrap();
        let mut writer = Writer::start(vec![files], Arc::new(Disk), Some(work.log().unwrap())).unwrap();
        // What cannot be waited for: a device that holds nothing.
        let nothing = Opened { path: "/dev/null".into(), file: std::fs::File::create("/dev/null").unwrap() };
        writer.write(0, layout_piece()).unwrap();
        writer.commit(Commit { files: vec![nothing], ..Commit::default() }).unwrap();
        let error = (0..100).find_map(|_| writer.write(0, layout_piece()).err()).unwrap();
        assert!(error.to_string().contains("/dev/null"), "{error}");
        assert!(records(folder.path()).is_empty());
    }

    #[test]
    fn without_a_journal_a_commit_only_brings_the_bytes_to_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::create(&layout(), folder.path(), Arc::new(Disk)).unwrap();
        let mut writer = Writer::start(vec![files], Arc::new(Disk), None).unwrap();
        writer.write(0, layout_piece()).unwrap();
        writer.commit(Commit::default()).unwrap();
        assert_eq!(writer.settle().unwrap(), []);
        assert!(std::fs::read(folder.path().join("model.safetensors")).unwrap().ends_with(b"q\0"));
    }
}
