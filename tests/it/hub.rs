//! Models by their name on a hub, from a server on this machine: downloaded, resumed, verified, found again, refused.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A hub with one model, `owner/model`, that is not well.
#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Files of which one answer ends half-way, and how it ends: with fewer bytes than announced, or as if those were all.
    cut: BTreeMap<String, bool>,
    /// Files of which an answer stops half-way, and the connection stays.
    silent: Vec<String>,
    /// Files that come with another byte.
    wrong: Vec<String>,
    /// What was asked for: a path, and the first byte of the range.
    asked: Vec<(String, u64)>,
}

struct Hub {
    address: String,
    state: Arc<Mutex<State>>,
    cache: tempfile::TempDir,
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn answer(stream: &mut TcpStream, status: &str, headers: &str, announced: usize, body: &[u8]) {
    let head = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {announced}\r\nConnection: close\r\n\r\n");
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).and_then(|()| stream.flush());
}

fn serve(mut stream: TcpStream, state: &Mutex<State>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(path) = lines.next().and_then(|line| line.split(' ').nth(1).map(str::to_string)) else { return };
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
    let range = headers.iter().find_map(|line| line.strip_prefix("range: bytes=")).unwrap_or("0-").to_string();
    let (first, last) = range.split_once('-').unwrap();
    let first: usize = first.parse().unwrap();
    let mut state = state.lock().unwrap();
    state.asked.push((path.clone(), first as u64));
    if path == "/api/models/owner/model/revision/main" {
        let files: Vec<Value> = state.files.keys().map(|name| json!({"rfilename": name})).collect();
        let body = json!({"sha": COMMIT, "siblings": files}).to_string();
        return answer(&mut stream, "200 OK", "Content-Type: application/json\r\n", body.len(), body.as_bytes());
    }
    let name = path.strip_prefix("/owner/model/resolve/main/").unwrap_or_default().to_string();
    let Some(mut bytes) = state.files.get(&name).cloned() else { return answer(&mut stream, "404 Not Found", "", 0, b"") };
    let tag = if name.ends_with(".safetensors") { sha256(&bytes) } else { "a-tag-that-is-no-hash".to_string() + &name.replace('.', "-") };
    if state.wrong.contains(&name) {
        bytes[0] ^= 1;
    }
    let end = last.parse::<usize>().map_or(bytes.len(), |last| last + 1).min(bytes.len());
    let content =
        format!("ETag: \"{tag}\"\r\nx-repo-commit: {COMMIT}\r\nContent-Range: bytes {first}-{}/{}\r\n", end.max(1) - 1, bytes.len());
    let body = &bytes[first..end];
    let cut = if body.len() > 1 { state.cut.remove(&name) } else { None };
    let (announced, sent) = match cut {
        Some(true) => (body.len(), body.len() / 2),
        Some(false) => (body.len() / 2, body.len() / 2),
        None => (body.len(), body.len()),
    };
    let silent = body.len() > 1 && state.silent.contains(&name);
    let sent = if silent { sent / 2 } else { sent };
    drop(state);
    answer(&mut stream, "206 Partial Content", &content, announced, &body[..sent]);
    if silent {
        std::thread::sleep(Duration::from_secs(20));
    }
}

fn sha256(bytes: &[u8]) -> String {
    ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Hub {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let folder = tempfile::tempdir().unwrap();
        drawknife::embedded::write(folder.path()).unwrap();
        let files = std::fs::read_dir(folder.path()).unwrap().flatten();
        let files = files.map(|file| (file.file_name().into_string().unwrap(), std::fs::read(file.path()).unwrap())).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let shared = Arc::clone(&state);
        let each = move |stream| {
            let shared = Arc::clone(&shared);
            drop(std::thread::spawn(move || serve(stream, &shared)));
        };
        std::thread::spawn(move || listener.incoming().flatten().for_each(each));
        Self { address, state, cache: tempfile::tempdir().unwrap() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drawknife"));
        command
            .args(arguments)
            .env("HF_ENDPOINT", &self.address)
            .env("HF_HOME", self.cache.path())
            .env("HF_HUB_DOWNLOAD_TIMEOUT", "2")
            .current_dir(self.cache.path());
        for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        command.output().unwrap()
    }

    fn inspect(&self, more: &[&str]) -> Result<Value, String> {
        let output = self.run(&[&["inspect", "owner/model", "--json"], more].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            Ok(serde_json::from_slice(&output.stdout).unwrap())
        } else {
            Err(format!("{:?} {error}", output.status.code()))
        }
    }

    fn blobs(&self) -> Vec<String> {
        let blobs = self.cache.path().join("hub/models--owner--model/blobs");
        std::fs::read_dir(blobs).unwrap().flatten().map(|file| file.file_name().into_string().unwrap()).collect()
    }
}

#[test]
fn a_model_is_downloaded_once_and_then_found_without_the_network() {
    let hub = Hub::new();
    let started = Instant::now();
    let refused = hub.inspect(&["--offline"]).unwrap_err();
    assert!(
        refused.starts_with("Some(2)") && refused.contains("owner/model: not in the cache") && refused.trim().lines().count() == 1,
        "{refused}"
    );
    assert!(started.elapsed() < Duration::from_secs(1) && hub.state().asked.is_empty());
    assert_eq!(hub.inspect(&[]).unwrap()["blocks"], 3);
    let asked = hub.state().asked.len();
    assert_eq!(hub.inspect(&["--offline"]).unwrap()["blocks"], 3);
    assert_eq!(hub.inspect(&[]).unwrap()["blocks"], 3);
    assert_eq!(hub.state().asked.len(), asked, "what is complete is not asked for again");
    let output = hub.run(&["compress", "owner/model", "-o", "out", "--preset", "w4-fast", "--no-eval"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(std::fs::read_to_string(hub.cache.path().join("out/README.md")).unwrap().contains("# owner/model, compressed"));
}

#[test]
fn a_connection_that_ends_half_way_is_gone_on_with() {
    for honest in [true, false] {
        let hub = Hub::new();
        hub.state().cut.insert("model.safetensors".into(), honest);
        assert_eq!(hub.inspect(&[]).unwrap()["blocks"], 3);
        let state = hub.state();
        let resumed = state.asked.iter().filter(|(path, first)| path.ends_with("/model.safetensors") && *first > 1).count();
        assert_eq!(resumed, 1, "{:?}", state.asked);
        let whole = hub.cache.path().join(format!("hub/models--owner--model/snapshots/{COMMIT}/model.safetensors"));
        let mut found = Vec::new();
        std::fs::File::open(whole).unwrap().read_to_end(&mut found).unwrap();
        assert!(found == state.files["model.safetensors"], "{honest}");
        drop(state);
        assert!(hub.blobs().iter().all(|name| !name.ends_with("part")), "{:?}", hub.blobs());
    }
}

#[test]
fn a_hub_that_falls_silent_is_not_waited_for_and_gone_on_with_later() {
    let hub = Hub::new();
    hub.state().silent.push("model.safetensors".into());
    let started = Instant::now();
    let error = hub.inspect(&[]).unwrap_err();
    let seconds = started.elapsed().as_secs_f64();
    assert!(
        error.starts_with("Some(1)") && error.contains("the hub has sent nothing for 2 s") && error.trim().lines().count() == 1,
        "{error}"
    );
    assert!((2.0..10.0).contains(&seconds), "{seconds}");
    hub.state().silent.clear();
    assert_eq!(hub.inspect(&[]).unwrap()["blocks"], 3);
    assert!(hub.state().asked.iter().any(|(path, first)| path.ends_with("model.safetensors") && *first > 0), "{:?}", hub.state().asked);
}

#[test]
fn other_bytes_than_the_hub_says_are_refused_and_nothing_of_them_is_kept() {
    let hub = Hub::new();
    hub.state().wrong.push("model.safetensors".into());
    let refused = hub.inspect(&[]).unwrap_err();
    assert!(
        refused.starts_with("Some(2)") && refused.contains("owner/model: model.safetensors has other bytes than the hub says"),
        "{refused}"
    );
    assert!(hub.blobs().iter().all(|name| name.len() != 64), "{:?}", hub.blobs());
    hub.state().wrong.clear();
    assert_eq!(hub.inspect(&[]).unwrap()["blocks"], 3);
}

#[test]
fn bytes_that_nobody_held_against_their_hash_are_looked_at_again_and_not_fetched_again() {
    let hub = Hub::new();
    hub.inspect(&[]).unwrap();
    let blobs = hub.cache.path().join("hub/models--owner--model/blobs");
    let weights = hub.blobs().into_iter().find(|name| name.len() == 64).unwrap();
    let asked = |hub: &Hub| hub.state().asked.iter().filter(|(path, _)| path.ends_with("/model.safetensors")).count();
    // Stopped between the download and the look: one question for the hash, none for the bytes.
    std::fs::write(blobs.join(format!("{weights}.unverified")), "").unwrap();
    let before = asked(&hub);
    hub.inspect(&[]).unwrap();
    assert_eq!(asked(&hub), before + 1);
    assert!(hub.blobs().iter().all(|name| !name.ends_with("unverified")));
    // The same with other bytes, and with all bytes in the part.
    let mut bytes = std::fs::read(blobs.join(&weights)).unwrap();
    bytes[9] ^= 1;
    std::fs::write(blobs.join(&weights), &bytes).unwrap();
    std::fs::write(blobs.join(format!("{weights}.unverified")), "").unwrap();
    assert!(hub.inspect(&[]).unwrap_err().contains("has other bytes"));
    bytes[9] ^= 1;
    std::fs::write(blobs.join(format!("{weights}.part")), &bytes).unwrap();
    let before = asked(&hub);
    assert_eq!(hub.inspect(&[]).unwrap()["blocks"], 3);
    assert_eq!(asked(&hub), before + 1);
}

#[test]
fn what_is_not_there_is_said_in_one_line() {
    let hub = Hub::new();
    let output = hub.run(&["inspect", "owner/other"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && error.contains("owner/other: neither a folder nor a public model"), "{error}");
    hub.state().files.remove("config.json");
    assert!(hub.inspect(&[]).unwrap_err().contains("holds no config.json with safetensors"));
    // A path whose first folder exists is no name on a hub.
    std::fs::create_dir(hub.cache.path().join("owner")).unwrap();
    let asked = hub.state().asked.len();
    let refused = hub.inspect(&[]).unwrap_err();
    assert!(refused.starts_with("Some(2)") && refused.contains("owner/model: No such file"), "{refused}");
    assert_eq!(hub.state().asked.len(), asked);
    assert!(Path::new(&hub.cache.path().join("owner")).exists());
}
