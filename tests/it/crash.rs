//! Faults and power cuts: every operation on the disk fails once, and what is left of any part of them is gone on with.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use drawknife::compress::destination::{Claim, Destination};
use drawknife::compress::{Job, Prepared, manifest};
use drawknife::device::Device;
use drawknife::error::{Error, Result};
use drawknife::plan::recipe::Recipe;
use drawknife::run::{Run, Silent};
use drawknife::storage::{Disk, Opened, Store, failed};

/// Everything but times, by path.
type Tree = BTreeMap<PathBuf, Vec<u8>>;

fn tree(folder: &Path) -> Tree {
    let mut all = Tree::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(one) = folders.pop() {
        for path in std::fs::read_dir(&one).unwrap().map(|entry| entry.unwrap().path()) {
            match path.is_dir() {
                true => folders.push(path),
                false if path.ends_with("timing.json") => {}
                false => drop(all.insert(path.strip_prefix(folder).unwrap().into(), std::fs::read(&path).unwrap())),
            }
        }
    }
    all
}

/// A model of four blocks, a few windows of tokens, and a recipe of two formats that keeps both streams of hidden states.
struct Place {
    folder: tempfile::TempDir,
    job: Job,
}

impl Place {
    fn new(recipe: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        std::fs::create_dir(&model).unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gemma3_text");
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(golden.join(name), model.join(name)).unwrap();
        }
        let tokens = folder.path().join("tokens.jsonl");
        let line = |seed: u32| {
            let tokens: Vec<u32> = (0..24).map(|at| (seed * 7 + at * at * 3 + at) % 40).collect();
            format!("{{\"input_ids\":{tokens:?}}}\n")
        };
        std::fs::write(&tokens, (0..12).map(line).collect::<String>()).unwrap();
        let head = format!("version = 1\n[calibration]\nsource = {:?}\nseq = 24\n", tokens.to_str().unwrap());
        let recipe = Recipe::parse(&(head + recipe)).unwrap();
        let job =
            Job { model, recipe, engine: None, quality: None, allocation: None, command: Vec::new(), beside: Vec::new(), memory: None };
        Self { folder, job }
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("places/out")
    }

    /// What lies beside the model.
    fn places(&self) -> PathBuf {
        let places = self.folder.path().join("places");
        std::fs::create_dir_all(&places).unwrap();
        places
    }

    /// Runs, or goes on; true when the run before had finished.
    fn run(&self, storage: Arc<dyn Store>, restart: bool) -> Result<bool> {
        self.places();
        let device = Device::cpu();
        let run = Run { device: &device, seed: 0, observer: &Silent, scratch: self.folder.path() };
        let prepared = Prepared::new(self.job.clone())?;
        let dependencies = manifest::dependencies(&self.job, &prepared.checkpoint, &device)?;
        let mut destination = Destination::claim(&self.out(), &self.job.model, Claim { replace: false, restart, storage })?;
        if destination.begin(&dependencies)? {
            return Ok(true);
        }
        prepared.run(destination, &dependencies, &run).map(|_| false)
    }

    /// The result of a run without faults, which is removed again.
    fn straight(&self) -> Tree {
        assert!(!self.run(Arc::new(Disk), false).unwrap());
        let tree = tree(&self.out());
        assert!(tree.len() >= 6 && self.left().is_empty(), "{:?}", self.left());
        std::fs::remove_dir_all(self.out()).unwrap();
        tree
    }

    /// Names beside the output.
    fn left(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.places()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "out").collect()
    }
}

const CALIBRATED: &str = "[[stage]]\nmethod = \"closed-form\"\nbits = 4\ngroup = 16\n[[stage]]\nmethod = \"norm-refit\"\n[export]\nformat = [\"compressed-tensors\", \"dense\"]\nshard_size = \"20kB\"\n";

/// Fails the n-th operation, and all after it where the disk is full.
#[derive(Debug)]
struct Faulty {
    count: AtomicUsize,
    fails_at: usize,
    full: bool,
}

impl Faulty {
    fn new(fails_at: usize, full: bool) -> Self {
        Self { count: AtomicUsize::new(0), fails_at, full }
    }

    fn next(&self, path: &Path, needs_room: bool) -> Result<()> {
        let number = self.count.fetch_add(1, Ordering::SeqCst);
        let hit = number == self.fails_at || self.full && number > self.fails_at && needs_room;
        if !hit {
            return Ok(());
        }
        let errno = if self.full && needs_room { 28 } else { 5 };
        Err(failed(path, &std::io::Error::from_raw_os_error(errno), 4711))
    }
}

impl Store for Faulty {
    fn create_private_folder(&self, path: &Path) -> Result<()> {
        self.next(path, true)?;
        Disk.create_private_folder(path)
    }
    fn create_folder(&self, path: &Path) -> Result<()> {
        self.next(path, true)?;
        Disk.create_folder(path)
    }
    fn create(&self, path: &Path, bytes: u64) -> Result<Opened> {
        self.next(path, true)?;
        Disk.create(path, bytes)
    }
    fn open(&self, path: &Path) -> Result<Opened> {
        self.next(path, false)?;
        Disk.open(path)
    }
    fn write_at(&self, file: &Opened, bytes: &[u8], offset: u64) -> Result<()> {
        // What a short write leaves.
        if let Err(error) = self.next(&file.path, true) {
            Disk.write_at(file, &bytes[..bytes.len() / 2], offset)?;
            return Err(error);
        }
        Disk.write_at(file, bytes, offset)
    }
    fn cut(&self, file: &Opened, bytes: u64) -> Result<()> {
        self.next(&file.path, false)?;
        Disk.cut(file, bytes)
    }
    fn sync(&self, file: &Opened) -> Result<()> {
        self.next(&file.path, false)?;
        Disk.sync(file)
    }
    fn sync_folder(&self, path: &Path) -> Result<()> {
        self.next(path, false)?;
        Disk.sync_folder(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.next(to, false)?;
        Disk.rename(from, to)
    }
    fn exchange(&self, one: &Path, other: &Path) -> Result<()> {
        self.next(other, false)?;
        Disk.exchange(one, other)
    }
    fn remove(&self, path: &Path) -> Result<()> {
        self.next(path, false)?;
        Disk.remove(path)
    }
}

/// Fails operation after operation; gives how many runs left work to go on with.
fn every_fault(recipe: &str, full: bool) -> usize {
    let place = Place::new(recipe);
    let straight = place.straight();
    let (mut number, mut resumed) = (0, 0);
    loop {
        let storage = Arc::new(Faulty::new(number, full));
        let ended = place.run(storage.clone(), false);
        let all = storage.count.load(Ordering::SeqCst);
        match ended {
            Ok(_) => assert_eq!(tree(&place.out()), straight, "{number}"),
            Err(error) => {
                let told = error.to_string();
                assert_eq!(error.exit_code(), 1, "{number}: {told}");
                assert!(told.contains("out") && !told.contains('\n'), "{number}: {told}");
                assert!(!full || !told.contains("No space") || told.contains("4711 bytes"), "{number}: {told}");
                assert!(!place.out().exists(), "{number}: {told}");
                resumed += usize::from(told.contains("work so far is kept"));
                assert!(
                    told.contains("work so far is kept") || place.left().is_empty() || number == 0,
                    "{number}: {told} {:?}",
                    place.left()
                );
            }
        }
        if !place.out().exists() || !place.left().is_empty() {
            let finished = place.run(Arc::new(Disk), false).unwrap_or_else(|error| panic!("{number}: {error}"));
            assert!(!finished || number + 3 >= all, "{number} of {all}");
        }
        assert_eq!(tree(&place.out()), straight, "{number}");
        assert!(place.left().is_empty(), "{number}: {:?}", place.left());
        std::fs::remove_dir_all(place.out()).unwrap();
        if number >= all {
            break;
        }
        number += 1;
    }
    assert!(number > 40, "{number} operations");
    resumed
}

#[test]
fn every_fault_of_the_disk_is_told_leaves_no_output_and_can_be_gone_on_from() {
    assert!(every_fault(CALIBRATED, false) > 20);
}

#[test]
fn a_full_disk_is_told_with_its_bytes_leaves_no_output_and_can_be_gone_on_from() {
    assert!(every_fault(CALIBRATED, true) > 20);
}

#[test]
fn every_fault_of_a_run_without_calibration_can_be_gone_on_from() {
    every_fault("[[stage]]\nmethod = \"round-to-nearest\"\n", false);
}

/// A disk that writes down what is done to it.
#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<Operation>>);

#[derive(Debug, Clone)]
enum Operation {
    Folder(PathBuf),
    Create(PathBuf, u64),
    Write(PathBuf, Vec<u8>, u64),
    Cut(PathBuf, u64),
    Sync(PathBuf),
    SyncFolder(PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

impl Recorder {
    fn note(&self, operation: Operation) {
        self.0.lock().unwrap().push(operation);
    }
}

impl Store for Recorder {
    fn create_private_folder(&self, path: &Path) -> Result<()> {
        self.note(Operation::Folder(path.into()));
        Disk.create_private_folder(path)
    }
    fn create_folder(&self, path: &Path) -> Result<()> {
        self.note(Operation::Folder(path.into()));
        Disk.create_folder(path)
    }
    fn create(&self, path: &Path, bytes: u64) -> Result<Opened> {
        self.note(Operation::Create(path.into(), bytes));
        Disk.create(path, bytes)
    }
    fn open(&self, path: &Path) -> Result<Opened> {
        Disk.open(path)
    }
    fn write_at(&self, file: &Opened, bytes: &[u8], offset: u64) -> Result<()> {
        self.note(Operation::Write(file.path.clone(), bytes.into(), offset));
        Disk.write_at(file, bytes, offset)
    }
    fn cut(&self, file: &Opened, bytes: u64) -> Result<()> {
        self.note(Operation::Cut(file.path.clone(), bytes));
        Disk.cut(file, bytes)
    }
    fn sync(&self, file: &Opened) -> Result<()> {
        self.note(Operation::Sync(file.path.clone()));
        Disk.sync(file)
    }
    fn sync_folder(&self, path: &Path) -> Result<()> {
        self.note(Operation::SyncFolder(path.into()));
        Disk.sync_folder(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.note(Operation::Rename(from.into(), to.into()));
        Disk.rename(from, to)
    }
    fn exchange(&self, one: &Path, other: &Path) -> Result<()> {
        let _ = (one, other);
        Err(Error::run("no output is replaced here"))
    }
    fn remove(&self, path: &Path) -> Result<()> {
        self.note(Operation::Remove(path.into()));
        Disk.remove(path)
    }
}

/// A disk between the system's memory and its plates: names and contents that were waited for, and those that were not.
#[derive(Default)]
struct Plates {
    nodes: Vec<Node>,
    /// Renames that no folder was waited for after: node, and both folders with names.
    renames: Vec<Rename>,
}

/// A node, and the folders and names that it leaves and takes.
type Rename = (usize, (usize, String), (usize, String));

#[derive(Default, Clone)]
struct Node {
    is_folder: bool,
    names: [BTreeMap<String, usize>; 2],
    content: [Vec<u8>; 2],
}

const PLATE: usize = 0;
const MEMORY: usize = 1;
/// Bytes that reach the plates together.
const PAGE: usize = 4096;

/// Numbers that look like chance.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
    fn flip(&mut self) -> bool {
        self.below(2) == 1
    }
}

impl Plates {
    fn new() -> Self {
        Self { nodes: vec![Node { is_folder: true, ..Node::default() }], renames: Vec::new() }
    }

    fn find(&self, path: &Path) -> Option<usize> {
        path.iter().try_fold(0, |node, name| self.nodes[node].names[MEMORY].get(name.to_str().unwrap()).copied())
    }

    fn place(&self, path: &Path) -> (usize, String) {
        (self.find(path.parent().unwrap()).unwrap(), path.file_name().unwrap().to_str().unwrap().to_owned())
    }

    fn make(&mut self, path: &Path, is_folder: bool) -> usize {
        if let Some(node) = self.find(path) {
            return node;
        }
        let (folder, name) = self.place(path);
        self.nodes.push(Node { is_folder, ..Node::default() });
        let node = self.nodes.len() - 1;
        self.nodes[folder].names[MEMORY].insert(name, node);
        node
    }

    fn apply(&mut self, operation: &Operation, root: &Path) {
        let under = |path: &Path| path.strip_prefix(root).unwrap().to_path_buf();
        match operation {
            Operation::Folder(path) => drop(self.make(&under(path), true)),
            Operation::Create(path, bytes) => {
                let node = self.make(&under(path), false);
                self.nodes[node].content[MEMORY] = vec![0; *bytes as usize];
            }
            Operation::Write(path, bytes, offset) => {
                let node = self.find(&under(path)).unwrap();
                let content = &mut self.nodes[node].content[MEMORY];
                let end = *offset as usize + bytes.len();
                content.resize(content.len().max(end), 0);
                content[*offset as usize..end].copy_from_slice(bytes);
            }
            Operation::Cut(path, bytes) => {
                let node = self.find(&under(path)).unwrap();
                self.nodes[node].content[MEMORY].resize(*bytes as usize, 0);
            }
            Operation::Sync(path) => {
                let node = self.find(&under(path)).unwrap();
                self.nodes[node].content[PLATE] = self.nodes[node].content[MEMORY].clone();
            }
            Operation::SyncFolder(path) => {
                let folder = self.find(&under(path)).unwrap();
                self.nodes[folder].names[PLATE] = self.nodes[folder].names[MEMORY].clone();
                // A journal of the file system takes a rename as a whole.
                for (node, from, to) in self.renames.drain(..) {
                    if from.0 == folder || to.0 == folder {
                        self.nodes[from.0].names[PLATE].remove(&from.1);
                        self.nodes[to.0].names[PLATE].insert(to.1, node);
                    }
                }
            }
            Operation::Rename(from, to) => {
                let (from, to) = (self.place(&under(from)), self.place(&under(to)));
                let node = self.nodes[from.0].names[MEMORY].remove(&from.1).unwrap();
                self.nodes[to.0].names[MEMORY].insert(to.1.clone(), node);
                self.renames.push((node, from, to));
            }
            Operation::Remove(path) => {
                let (folder, name) = self.place(&under(path));
                self.nodes[folder].names[MEMORY].remove(&name);
            }
        }
    }

    /// What is found after the power came back.
    fn cut(&mut self, chance: &mut Chance) {
        for (node, from, to) in std::mem::take(&mut self.renames) {
            let done = chance.flip();
            for side in [PLATE, MEMORY] {
                let (gone, there) = if done { (&from, &to) } else { (&to, &from) };
                self.nodes[gone.0].names[side].remove(&gone.1);
                self.nodes[there.0].names[side].insert(there.1.clone(), node);
            }
        }
        for node in &mut self.nodes {
            let [plate, memory] = node.names.clone();
            let names: Vec<&String> = plate.keys().chain(memory.keys()).collect();
            for name in names {
                let (old, new) = (plate.get(name), memory.get(name));
                match if old != new && chance.flip() { new } else { old } {
                    Some(&found) => node.names[PLATE].insert(name.clone(), found),
                    None => node.names[PLATE].remove(name),
                };
            }
            let [plate, memory] = node.content.clone();
            let mut content = plate.clone();
            content.resize(if chance.flip() { memory.len() } else { plate.len() }, 0);
            for (number, page) in content.chunks_mut(PAGE).enumerate() {
                let new = memory.get(number * PAGE..).unwrap_or_default();
                if chance.flip() {
                    let common = new.len().min(page.len());
                    page[..common].copy_from_slice(&new[..common]);
                }
            }
            node.content[PLATE] = content;
        }
    }

    fn write(&self, node: usize, path: &Path) {
        let found = &self.nodes[node];
        if found.is_folder {
            std::fs::create_dir_all(path).unwrap();
            found.names[PLATE].iter().for_each(|(name, &inside)| self.write(inside, &path.join(name)));
        } else {
            std::fs::write(path, &found.content[PLATE]).unwrap();
        }
    }
}

#[test]
fn after_a_power_cut_at_any_moment_the_same_command_ends_in_the_same_output() {
    // As many as are asked for; a thousand take a few minutes.
    let cuts: u64 = std::env::var("DRAWKNIFE_POWER_CUTS").map_or(100, |text| text.parse().unwrap());
    let place = Place::new(CALIBRATED);
    let straight = place.straight();
    let recorder = Arc::new(Recorder::default());
    place.run(recorder.clone(), false).unwrap();
    let log = recorder.0.lock().unwrap().clone();
    let (mut resumed, mut fresh) = (0, 0);
    for seed in 0..cuts {
        let mut chance = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        chance.below(2);
        let at = chance.below(log.len() as u64 + 1) as usize;
        let mut plates = Plates::new();
        log[..at].iter().for_each(|operation| plates.apply(operation, &place.places()));
        plates.cut(&mut chance);
        std::fs::remove_dir_all(place.places()).unwrap();
        plates.write(0, &place.places());
        if place.out().exists() {
            assert_eq!(tree(&place.out()), straight, "seed {seed}: an output that is there is whole");
        }
        let journal = place.places().join(".out.drawknife-work/journal");
        let worked = std::fs::metadata(&journal).is_ok_and(|journal| journal.len() > 0);
        match place.run(Arc::new(Disk), false) {
            Ok(_) if worked => resumed += 1,
            Ok(_) => fresh += 1,
            Err(error) => assert!(place.out().exists() && error.to_string().contains("exists"), "seed {seed} at {at}: {error}"),
        }
        assert_eq!(tree(&place.out()), straight, "seed {seed} at {at} of {}", log.len());
        assert!(place.left().is_empty(), "seed {seed}: {:?}", place.left());
    }
    assert!(resumed > cuts / 3, "{resumed} resumed, {fresh} began anew");
}

#[test]
fn every_bit_that_flips_in_unfinished_work_is_found_or_changes_nothing() {
    let flips: u64 = std::env::var("DRAWKNIFE_BIT_FLIPS").map_or(100, |text| text.parse().unwrap());
    let place = Place::new(CALIBRATED);
    let straight = place.straight();
    // Cut off about in the middle.
    let all = {
        let storage = Arc::new(Faulty::new(usize::MAX, false));
        place.run(storage.clone(), false).unwrap();
        std::fs::remove_dir_all(place.out()).unwrap();
        storage.count.load(Ordering::SeqCst)
    };
    place.run(Arc::new(Faulty::new(all / 2, false)), false).unwrap_err();
    let work = place.places().join(".out.drawknife-work");
    let kept = tree(&work);
    let (mut chance, mut refused) = (Chance(7), 0);
    for flip in 0..flips {
        let names: Vec<&PathBuf> = kept.keys().filter(|path| !path.ends_with("LOCK") && !kept[*path].is_empty()).collect();
        let name = names[chance.below(names.len() as u64) as usize];
        let mut bytes = kept[name].clone();
        let bit = chance.below(8 * bytes.len() as u64) as usize;
        bytes[bit / 8] ^= 1 << (bit % 8);
        let _ = std::fs::remove_dir_all(place.places());
        for (path, content) in &kept {
            let path = work.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        std::fs::write(work.join(name), bytes).unwrap();
        match place.run(Arc::new(Disk), false) {
            Ok(_) => {}
            Err(error) => {
                let told = error.to_string();
                assert!(told.contains("--restart"), "flip {flip} of {name:?}: {told}");
                assert!(!place.out().exists());
                refused += 1;
                assert!(!place.run(Arc::new(Disk), true).unwrap());
            }
        }
        assert_eq!(tree(&place.out()), straight, "flip {flip}, bit {bit} of {name:?}");
        assert!(place.left().is_empty());
    }
    assert!(refused > flips / 3, "{refused} of {flips} were refused");
}
