//! Models by the name that they have on a hub, like `owner/name` or `owner/name@revision`: in the cache that other programs
//! share, or downloaded into it. A download that was cut off goes on where it ended, and every file is held against the hash
//! that the hub gives for it.

#[cfg(feature = "hub")]
mod fetch;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::checkpoint::files::read_file;
use crate::checkpoint::index;
use crate::error::{Error, Result, shown, shown_path};
use crate::run::Observer;

/// End of the name of a mark beside a file whose bytes were not held against their hash yet.
const UNVERIFIED: &str = "unverified";

/// Longest file that says which commit a revision is, in bytes.
const REFERENCE_BYTES: u64 = 4096;

/// The name of a model on a hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Id {
    /// Owner and name.
    pub name: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.revision == "main" { write!(f, "{}", self.name) } else { write!(f, "{}@{}", self.name, self.revision) }
    }
}

impl Id {
    /// What a command line gives where a model is asked for, if it is the name of one on a hub: `owner/name`, perhaps with
    /// `@revision`, where neither that path nor a folder of the owner's name exists.
    pub fn of(path: &Path) -> Option<Self> {
        let text = path.to_str()?;
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, model) = name.split_once('/')?;
        let word = |word: &str, more: &str| {
            word.starts_with(|c: char| c.is_ascii_alphanumeric()) && word.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
        };
        let named = word(owner, "-_.") && word(model, "-_.") && word(revision, "-_./") && !revision.contains("..");
        let file = Path::new(model).extension().is_some_and(|extension| extension == "gguf" || extension == "safetensors");
        (named && !file && !path.exists() && !Path::new(owner).exists()).then(|| Self { name: name.into(), revision: revision.into() })
    }
}

/// Where models are found.
#[derive(Debug, Clone, Default)]
pub struct Hub {
    /// The folder of the cache.
    pub cache: PathBuf,
    /// Address of the hub; that of the library where there is none.
    pub endpoint: Option<String>,
    /// What tells the hub who asks.
    pub token: Option<String>,
    /// Whether the network is left alone.
    pub offline: bool,
    /// How long the hub may be silent.
    pub patience: Duration,
}

/// How long a hub may be silent where nobody says it.
pub const PATIENCE: Duration = Duration::from_secs(60);

impl Hub {
    /// The folder of a model, downloaded first where the cache does not hold it.
    ///
    /// # Errors
    /// When the cache does not hold it and the network is not to be touched, or the download fails.
    pub fn locate(&self, id: &Id, observer: &dyn Observer) -> Result<PathBuf> {
        match self.cached(id) {
            Some(folder) if self.offline || has_tokenizer(&folder) => Ok(folder),
            // Other programs may have fetched the weights alone.
            Some(folder) => self.fetch(id, observer).or(Ok(folder)),
            None if self.offline => Err(Error::input(format!(
                "{id}: not in the cache {} (--offline); download it first, without --offline, or give a folder",
                shown_path(&self.cache)
            ))),
            None => self.fetch(id, observer),
        }
    }

    #[cfg(not(feature = "hub"))]
    fn fetch(&self, id: &Id, _: &dyn Observer) -> Result<PathBuf> {
        Err(Error::input(format!("{id}: no such folder, and this program was built without downloads (feature `hub`)")))
    }

    /// The folder of a model in the cache, if all of it is there.
    pub fn cached(&self, id: &Id) -> Option<PathBuf> {
        let folder = self.folder(id);
        let commit = match read_file(&folder.join("refs").join(&id.revision), REFERENCE_BYTES) {
            Ok(commit) => String::from_utf8(commit).ok()?.trim().to_string(),
            Err(_) => id.revision.clone(),
        };
        let unsure = std::fs::read_dir(folder.join("blobs"))
            .is_ok_and(|blobs| blobs.flatten().any(|blob| blob.path().extension().is_some_and(|end| end == UNVERIFIED)));
        let plain = !unsure && !commit.is_empty() && commit.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        let snapshot = folder.join("snapshots").join(commit);
        (plain && complete(&snapshot)).then_some(snapshot)
    }

    fn folder(&self, id: &Id) -> PathBuf {
        self.cache.join(format!("models--{}", id.name.replace('/', "--")))
    }
}

/// Whether a folder holds a tokenizer, of whatever kind.
fn has_tokenizer(folder: &Path) -> bool {
    ["tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model"].iter().any(|name| folder.join(name).exists())
}

/// Whether a folder holds a configuration and all files of weights.
fn complete(folder: &Path) -> bool {
    let weights = folder.join("model.safetensors.index.json");
    let whole = if weights.exists() {
        index::read_index(&weights).is_ok_and(|index| index.values().all(|file| folder.join(file).exists()))
    } else {
        std::fs::read_dir(folder).is_ok_and(|mut entries| {
            entries.any(|entry| entry.is_ok_and(|entry| entry.path().extension().is_some_and(|e| e == "safetensors")))
        })
    };
    whole && folder.join("config.json").exists()
}

/// Which files of a repository make a model: those of its root that hold weights, configuration, tokenizer or words for people.
pub fn wanted<'a>(files: &[&'a str]) -> Vec<&'a str> {
    let index = files.contains(&"model.safetensors.index.json");
    let single = files.contains(&"model.safetensors");
    let plain = |name: &str| !name.starts_with('.') && !name.contains(['/', '\\', '\0']) && name.len() < 200;
    let kind = |name: &str| {
        let end = name.rsplit_once('.').map_or("", |(_, end)| end);
        match end {
            // Some repositories hold the same weights once more, as other programs name them.
            "safetensors" => !(index || single) || name.starts_with("model"),
            "json" => !name.ends_with(".bin.index.json"),
            "jinja" | "txt" | "model" | "tiktoken" | "md" => true,
            _ => name.to_uppercase().starts_with("LICEN") || name.to_uppercase().starts_with("NOTICE"),
        }
    };
    let mut wanted: Vec<&str> = files.iter().copied().filter(|name| plain(name) && kind(name)).collect();
    // Weights last: what is wrong with a model shows in its small files.
    wanted.sort_by_key(|name| (name.ends_with(".safetensors"), *name));
    wanted.dedup();
    wanted
}

/// The name on a hub of a model that lies in a cache, else the last part of its path.
pub fn name_of(folder: &Path) -> Option<String> {
    let whole = folder.canonicalize().ok()?;
    let last = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let snapshots = whole.parent().filter(|parent| parent.ends_with("snapshots"));
    let repository =
        snapshots.and_then(Path::parent).and_then(last).and_then(|name| Some(name.strip_prefix("models--")?.replacen("--", "/", 1)));
    repository.or_else(|| last(&whole)).map(|name| shown(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_a_hub_are_told_from_paths() {
        let id = |text: &str| Id::of(Path::new(text)).map(|id| id.to_string());
        assert_eq!(id("Owner/Name-0.6B"), Some("Owner/Name-0.6B".into()));
        assert_eq!(id("owner/name@refs/pr/3"), Some("owner/name@refs/pr/3".into()));
        for path in
            ["name", "/owner/name", "./owner/name", "../name", "owner/name/more", "owner/", "src/none", "a/b.gguf", "o/n@../x", "o/n@"]
        {
            assert_eq!(id(path), None, "{path}");
        }
    }

    #[test]
    fn files_that_make_a_model_are_wanted_and_others_are_not() {
        let files = [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "tokenizer.json",
            "README.md",
            "LICENSE",
            "original/model.safetensors",
            ".gitattributes",
            "../config.json",
            "chat_template.jinja",
            "figure.png",
        ];
        let expected = [
            "LICENSE",
            "README.md",
            "chat_template.jinja",
            "config.json",
            "model.safetensors.index.json",
            "tokenizer.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ];
        assert_eq!(wanted(&files), expected);
        assert_eq!(wanted(&["weights.safetensors"]), ["weights.safetensors"]);
    }

    #[test]
    fn a_model_in_the_cache_is_found_when_all_of_it_is_there() {
        let cache = tempfile::tempdir().unwrap();
        let hub = Hub { cache: cache.path().into(), offline: true, ..Hub::default() };
        let id = Id { name: "o/n".into(), revision: "main".into() };
        let refused = hub.locate(&id, &crate::run::Silent).unwrap_err();
        assert!(refused.to_string().contains("o/n: not in the cache") && refused.exit_code() == 2, "{refused}");
        let folder = cache.path().join("models--o--n");
        let snapshot = folder.join("snapshots/abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(folder.join("refs")).unwrap();
        std::fs::write(folder.join("refs/main"), "abc\n").unwrap();
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert_eq!(hub.cached(&id), None);
        std::fs::write(snapshot.join("model.safetensors.index.json"), r#"{"weight_map":{"a":"x.safetensors"}}"#).unwrap();
        assert_eq!(hub.cached(&id), None);
        std::fs::write(snapshot.join("x.safetensors"), "").unwrap();
        assert_eq!(hub.locate(&id, &crate::run::Silent).unwrap(), snapshot);
        std::fs::create_dir_all(folder.join("blobs")).unwrap();
        std::fs::write(folder.join("blobs/abc.unverified"), "").unwrap();
        assert_eq!(hub.cached(&id), None);
        std::fs::remove_file(folder.join("blobs/abc.unverified")).unwrap();
        assert_eq!(hub.cached(&Id { revision: "abc".into(), ..id.clone() }), Some(snapshot.clone()));
        assert_eq!(hub.cached(&Id { revision: "other".into(), ..id.clone() }), None);
        assert_eq!(name_of(&snapshot).unwrap(), "o/n");
        std::fs::write(folder.join("refs/main"), "../../..").unwrap();
        assert_eq!(hub.cached(&id), None);
    }
}
