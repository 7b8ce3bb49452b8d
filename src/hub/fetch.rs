//! The download itself, through the hf-hub crate.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use crate::error::{Error, Fault, Result, shown};
use crate::hub::{Hub, Id, UNVERIFIED, wanted};
use crate::run::Observer;

/// How often a file is tried in a row without a byte of progress.
const ATTEMPTS: u32 = 5;

/// How often whoever waits for the hub looks up.
const GLANCE: Duration = Duration::from_millis(100);

/// What a thread that asks the hub tells.
enum News<T> {
    /// A file of so many bytes begins.
    Begun(String, u64),
    /// So many bytes came.
    Came(u64),
    /// The file is there.
    Ended,
    /// What the library gave; nothing where it failed to understand the hub.
    Given(Option<Result<T, ApiError>>),
}

/// Tells of the bytes of a file.
struct Watched<T>(Sender<News<T>>);

impl<T> Progress for Watched<T> {
    fn init(&mut self, size: usize, filename: &str) {
        let _ = self.0.send(News::Begun(filename.into(), size as u64));
    }

    fn update(&mut self, size: usize) {
        if self.0.send(News::Came(size as u64)).is_err() {
            // Nobody waits any more, and the library has no other way out of a download; what came stays.
            std::panic::resume_unwind(Box::new("stopped"));
        }
    }

    fn finish(&mut self) {
        let _ = self.0.send(News::Ended);
    }
}

/// Whoever waits for the hub, which may fall silent: the library would wait for ever.
struct Patience<'a> {
    id: &'a Id,
    observer: &'a dyn Observer,
    longest: Duration,
    /// Whether the hub fell silent.
    gone: Cell<bool>,
}

impl Patience<'_> {
    /// What the library gives, asked in a thread of its own. Its failures are errors, and so is silence.
    fn ask<T: Send + 'static>(&self, ask: impl FnOnce(Sender<News<T>>) -> Result<T, ApiError> + Send + 'static) -> Result<T> {
        let (tell, news) = channel();
        let given = tell.clone();
        let asking = move || {
            let _ = given.send(News::Given(catch_unwind(AssertUnwindSafe(|| ask(tell))).ok()));
        };
        std::thread::Builder::new()
            .name("download".into())
            .spawn(asking)
            .map_err(|error| Error::run(format!("no thread to ask the hub: {error}")))?;
        let (mut heard, mut begun) = (Instant::now(), false);
        loop {
            self.go_on()?;
            match news.recv_timeout(GLANCE) {
                Ok(News::Given(Some(given))) => return given.map_err(|error| failed(self.id, &error)),
                Ok(News::Given(None)) | Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::run(format!("{}: the hub gives an answer that cannot be understood", self.id)));
                }
                Ok(News::Begun(name, size)) if !std::mem::replace(&mut begun, true) => {
                    self.observer.begin(&format!("download {}", shown(&name)), size);
                }
                Ok(News::Begun(..)) => {}
                Ok(News::Came(bytes)) => self.observer.step(bytes, ""),
                Ok(News::Ended) => self.observer.end(),
                Err(RecvTimeoutError::Timeout) if heard.elapsed() < self.longest => continue,
                Err(RecvTimeoutError::Timeout) => {
                    let what = format!(
                        "{}: the hub has sent nothing for {} s; what was downloaded is kept, run the same command again (HF_HUB_DOWNLOAD_TIMEOUT says how long to wait)",
                        self.id,
                        self.longest.as_secs()
                    );
                    self.gone.set(true);
                    return Err(Error::run(what));
                }
            }
            heard = Instant::now();
        }
    }

    fn go_on(&self) -> Result<()> {
        match self.observer.stopped() {
            Some(signal) => Err(Error::new(Fault::Interrupted(signal), "stopped; what was downloaded is kept, run the same command again")),
            None => Ok(()),
        }
    }
}

/// A repository that is downloaded.
struct Fetching<'a> {
    id: &'a Id,
    api: Api,
    patience: Patience<'a>,
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
        let fetching = Fetching {
            id,
            api,
            patience: Patience { id, observer, longest: self.patience, gone: Cell::new(false) },
            folder: self.folder(id),
        };
        let repo = fetching.repo();
        let info = fetching.patience.ask(move |_| repo.info())?;
        let names: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let names = wanted(&names);
        if !names.contains(&"config.json") || !names.iter().any(|name| name.ends_with(".safetensors")) {
            return Err(Error::input(format!("{id}: the repository holds no config.json with safetensors files beside it")));
        }
        names.iter().try_for_each(|name| fetching.file(name))?;
        self.cached(id).ok_or_else(|| Error::run(format!("{id}: the repository changed during the download; try again")))
    }
}

impl Fetching<'_> {
    /// One file, tried again where the connection ends and something came.
    fn file(&self, name: &str) -> Result<()> {
        let (mut fruitless, mut before) = (0, 0);
        loop {
            self.patience.go_on()?;
            let (came, error) = match self.attempt(name) {
                Ok(()) => return Ok(()),
                Err((_, error)) if matches!(error.fault, Fault::Input | Fault::Interrupted(_)) => return Err(error),
                // The thread that waits still holds the file.
                Err((_, error)) if self.patience.gone.get() => return Err(error),
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

    fn repo(&self) -> ApiRepo {
        self.api.repo(Repo::with_revision(self.id.name.clone(), RepoType::Model, self.id.revision.clone()))
    }

    /// Goes on with a file; an error comes with the number of bytes that are there.
    fn attempt(&self, name: &str) -> Result<(), (u64, Error)> {
        let none = |error: Error| (0, error);
        let (api, address) = (self.api.clone(), self.repo().url(name));
        let metadata = self.patience.ask(move |_| api.metadata(&address)).map_err(none)?;
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
            let (repo, own) = (self.repo(), name.to_owned());
            let download = move |news| repo.download_with_progress(&own, Watched(news));
            self.patience.ask(download).map_err(|error| (length(&part), error))?;
        }
        let came = length(&blob);
        let undo = || drop(std::fs::remove_file(&pointer));
        if came < size {
            // The connection ended as if all had come.
            undo();
            std::fs::rename(&blob, &part).map_err(|error| (came, Error::io(&blob, &error)))?;
            return Err((came, Error::run(format!("{}: {} ended at byte {came} of {size}", self.id, shown(name)))));
        }
        let sound = came == size && matches(&blob, tag, || self.patience.go_on()).map_err(|error| (came, error))?;
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
