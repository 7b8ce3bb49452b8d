//! The download itself, through the hf-hub crate.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use crate::error::{Error, Fault, Result, shown};
use crate::hub::{Hub, Id, UNVERIFIED, wanted};
use crate::run::Observer;

/// How often a file is tried in a row without a byte of progress.
const ATTEMPTS: u32 = 5;

/// Tells an observer of the bytes of a file.
struct Watched<'a> {
    observer: &'a dyn Observer,
    begun: bool,
}

impl Progress for Watched<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        if !std::mem::replace(&mut self.begun, true) {
            self.observer.begin(&format!("download {}", shown(filename)), size as u64);
        }
    }

    fn update(&mut self, size: usize) {
        self.observer.step(size as u64, "");
        if self.observer.stopped().is_some() {
            // The library has no other way out of a download; what came stays.
            std::panic::resume_unwind(Box::new("stopped"));
        }
    }

    fn finish(&mut self) {
        self.observer.end();
    }
}

/// A repository that is downloaded.
struct Fetching<'a> {
    id: &'a Id,
    api: Api,
    repo: ApiRepo,
    observer: &'a dyn Observer,
    folder: PathBuf,
}

impl Hub {
    /// Downloads what makes a model.
    ///
    /// # Errors
    /// When the hub does not answer, refuses, or gives other bytes than it says.
    pub(super) fn fetch(&self, id: &Id, observer: &dyn Observer) -> Result<PathBuf> {
        let cache = Cache::new(self.cache.clone());
        let token = self.token.clone().or_else(|| cache.token());
        let mut builder = ApiBuilder::from_cache(cache).with_progress(false).with_token(token).with_retries(0);
        builder = builder.with_user_agent("drawknife", env!("CARGO_PKG_VERSION"));
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_string());
        }
        let api = builder.build().map_err(|error| failed(id, &error))?;
        let repo = api.repo(Repo::with_revision(id.name.clone(), RepoType::Model, id.revision.clone()));
        let info = caught(id, || repo.info())?;
        let names: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let names = wanted(&names);
        if !names.contains(&"config.json") || !names.iter().any(|name| name.ends_with(".safetensors")) {
            return Err(Error::input(format!("{id}: the repository holds no config.json with safetensors files beside it")));
        }
        let fetching = Fetching { id, api, repo, observer, folder: self.folder(id) };
        names.iter().try_for_each(|name| fetching.file(name))?;
        self.cached(id).ok_or_else(|| Error::run(format!("{id}: the repository changed during the download; try again")))
    }
}

/// What the library gives, whose failures are errors.
fn caught<T>(id: &Id, ask: impl FnOnce() -> Result<T, ApiError>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(ask)) {
        Ok(given) => given.map_err(|error| failed(id, &error)),
        Err(_) => Err(Error::run(format!("{id}: the hub gives an answer that cannot be understood"))),
    }
}

impl Fetching<'_> {
    /// One file, tried again where the connection ends and something came.
    fn file(&self, name: &str) -> Result<()> {
        let (mut fruitless, mut before) = (0, 0);
        loop {
            self.go_on()?;
            let (came, error) = match self.attempt(name) {
                Ok(()) => return Ok(()),
                Err((_, error)) if error.fault == Fault::Input => return Err(error),
                Err(failure) => failure,
            };
            fruitless = if came > before { 0 } else { fruitless + 1 };
            before = before.max(came);
            if fruitless >= ATTEMPTS {
                return Err(error.advice("what was downloaded is kept, run the same command again"));
            }
            std::thread::sleep(Duration::from_millis(200 << fruitless.min(5)));
        }
    }

    fn go_on(&self) -> Result<()> {
        match self.observer.stopped() {
            Some(signal) => Err(Error::new(Fault::Interrupted(signal), "stopped; what was downloaded is kept, run the same command again")),
            None => Ok(()),
        }
    }

    /// Goes on with a file; an error comes with the number of bytes that are there.
    fn attempt(&self, name: &str) -> Result<(), (u64, Error)> {
        let none = |error: Error| (0, error);
        let metadata = caught(self.id, || self.api.metadata(&self.repo.url(name))).map_err(none)?;
        let (etag, commit, size) = (metadata.etag().to_string(), metadata.commit_hash().to_string(), metadata.size() as u64);
        // Both become parts of paths. A weak tag is the same tag.
        let tag = etag.strip_prefix("W/").unwrap_or(&etag);
        if ![tag, commit.as_str()]
            .iter()
            .all(|word| !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)))
        {
            return Err(none(Error::input(format!("{}: the hub gives {} the tag {}", self.id, shown(name), shown(&etag)))));
        }
        let snapshot = self.folder.join("snapshots").join(&commit);
        let (pointer, blob) = (snapshot.join(name), self.folder.join("blobs").join(&etag));
        let (part, mark) = (blob.with_extension("part"), self.folder.join("blobs").join(tag).with_extension(UNVERIFIED));
        let length = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
        let failed = |path: &Path, error: std::io::Error| (0, Error::io(path, &error));
        if pointer.exists() && length(&blob) == size && !mark.exists() {
            return Ok(());
        }
        // All bytes are there, but nobody has looked at them, or they belong to another revision.
        if length(&part) >= size && size > 0 {
            let whole = length(&part) == size && !blob.exists();
            let moved = if whole { std::fs::rename(&part, &blob) } else { std::fs::remove_file(&part) };
            moved.map_err(|error| failed(&part, error))?;
        }
        std::fs::create_dir_all(self.folder.join("blobs")).map_err(|error| failed(&blob, error))?;
        // Whoever finds this mark looks at the bytes once more.
        std::fs::write(&mark, "").map_err(|error| failed(&mark, error))?;
        if length(&blob) != size {
            let watched = Watched { observer: self.observer, begun: false };
            caught(self.id, || self.repo.download_with_progress(name, watched)).map_err(|error| (length(&part), error))?;
        }
        let came = length(&blob);
        let undo = || drop(std::fs::remove_file(&pointer));
        if came < size {
            // The connection ended as if all had come.
            undo();
            std::fs::rename(&blob, &part).map_err(|error| (came, Error::io(&blob, &error)))?;
            return Err((came, Error::run(format!("{}: {} ended at byte {came} of {size}", self.id, shown(name)))));
        }
        let sound = came == size && matches(&blob, tag, || self.go_on()).map_err(|error| (came, error))?;
        if !sound {
            undo();
            let _ = std::fs::remove_file(&blob).and_then(|()| std::fs::remove_file(&mark));
            let what = format!("{}: {} has other bytes than the hub says (hash {etag}); it was removed, try again", self.id, shown(name));
            return Err((0, Error::input(what)));
        }
        self.place(&snapshot, name, &etag).map_err(|error| failed(&pointer, error))?;
        std::fs::remove_file(&mark).map_err(|error| failed(&mark, error))
    }

    /// Makes a file of a revision and says which revision that is, where the library did not.
    fn place(&self, snapshot: &Path, name: &str, etag: &str) -> std::io::Result<()> {
        let pointer = snapshot.join(name);
        if !pointer.exists() {
            std::fs::create_dir_all(snapshot)?;
            // It may lead nowhere.
            let _ = std::fs::remove_file(&pointer);
            std::os::unix::fs::symlink(Path::new("../../blobs").join(etag), &pointer)?;
        }
        let commit = snapshot.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let reference = self.folder.join("refs").join(&self.id.revision);
        if std::fs::read_to_string(&reference).ok().as_deref().map(str::trim) != Some(commit.as_str()) {
            std::fs::create_dir_all(reference.parent().unwrap_or(&self.folder))?;
            std::fs::write(&reference, commit)?;
        }
        Ok(())
    }
}

/// Whether a file has the hash that a tag is, where it is one: SHA-256 of large files, that of git for small ones. `go_on` may end
/// the look.
fn matches(path: &Path, tag: &str, go_on: impl Fn() -> Result<()>) -> Result<bool> {
    use std::io::Read;
    let fail = |error: std::io::Error| Error::io(path, &error);
    let algorithm = match tag.len() {
        64 => &ring::digest::SHA256,
        40 => &ring::digest::SHA1_FOR_LEGACY_USE_ONLY,
        _ => return Ok(true),
    };
    if !tag.chars().all(|c| c.is_ascii_hexdigit()) {
        return Ok(true);
    }
    let mut file = std::fs::File::open(path).map_err(fail)?;
    let mut context = ring::digest::Context::new(algorithm);
    if tag.len() == 40 {
        context.update(format!("blob {}\0", file.metadata().map_err(fail)?.len()).as_bytes());
    }
    let mut piece = vec![0; 1 << 20];
    loop {
        go_on()?;
        match file.read(&mut piece).map_err(fail)? {
            0 => break,
            read => context.update(&piece[..read]),
        }
    }
    let found: String = context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(found.eq_ignore_ascii_case(tag))
}

/// An error of the library: whose fault it is and what to do.
fn failed(id: &Id, error: &ApiError) -> Error {
    let what = error.to_string();
    let status = |code: &str| what.contains(&format!("http status: {code}"));
    if status("404") || status("401") {
        return Error::input(format!("{id}: neither a folder nor a public model of this name on the hub; for a private one set HF_TOKEN"));
    }
    if status("403") {
        return Error::input(format!("{id}: the hub asks for consent on the model's page, and for HF_TOKEN"));
    }
    match error {
        ApiError::IoError(source) if source.kind() == std::io::ErrorKind::StorageFull => Error::full(format!("{id}: {source}")),
        _ => Error::run(format!("{id}: no such folder here, and the hub does not give it: {what}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_hashes_of_large_and_of_small_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, "hello\n").unwrap();
        let holds = |tag: &str| matches(&path, tag, || Ok(())).unwrap();
        assert!(holds("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"));
        assert!(holds("ce013625030ba8dba906f756967f9e9ca394464a"), "as git hash-object says");
        assert!(!holds(&"0".repeat(64)) && !holds(&"0".repeat(40)) && holds("W-other"));
    }
}
