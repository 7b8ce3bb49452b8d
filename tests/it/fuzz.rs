//! Everything that reads bytes of others, fed with mutated seeds: nothing panics, takes a second or much memory. A million
//! executions in an ordinary run; `DRAWKNIFE_FUZZ` asks for as many per reader. The targets of tests/fuzz begin with the same seeds.

use std::path::Path;
use std::time::{Duration, Instant};

use drawknife::untrusted::{READERS, header_of};
use rayon::prelude::*;

/// Sound bytes that mutations begin with, by reader.
pub fn seeds(reader: &str) -> Vec<Vec<u8>> {
    let golden = |name: &str| std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)).unwrap();
    match reader {
        "header" => vec![
            safetensors(r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}  "#, 16),
            safetensors(r#"{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#, 0),
            safetensors(r#"{"t":{"dtype":"F8_E4M3","shape":[1,1,1,7],"data_offsets":[0,7]},"uü":{"dtype":"I64","shape":[2],"data_offsets":[7,23]}}"#, 23),
            nine_tensors(),
        ],
        "index" => vec![br#"{"metadata":{"total_size":24},"weight_map":{"a.weight":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#.to_vec()],
        "config" => ["llama3", "gemma3_text", "qwen2", "granite", "llama_yarn", "smollm3"].iter().map(|name| golden(&format!("{name}/config.json"))).collect(),
        "tokenizer" => vec![br#"{"version":"1.0","added_tokens":[{"id":0,"content":"<s>","special":true}],"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"Split","pattern":{"Regex":"(a+)+$"},"behavior":"Isolated"},"model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":["a b"]}}"#.to_vec()],
        "recipe" => vec![
            b"version = 1\n[calibration]\nsource = \"builtin\"\nsamples = 16\nseq = 128\n[[stage]]\nmethod = \"wanda\"\nsparsity = 0.5\n[[stage]]\nmethod = \"round-to-nearest\"\nbits = 4\n[[override]]\npattern = \"*.down_proj\"\nbits = 8\n[gate]\nkld_mean = 0.05\n".to_vec(),
            b"version = 1\n[[stage]]\nmethod = \"signround\"\niters = 20\n[allocate]\ntarget_bpw = 3.5\n[export]\nformat = [\"gguf\", \"dense\"]\nshard_size = \"5GB\"\n".to_vec(),
        ],
        "journal" => vec![journal()],
        "gguf" => vec![gguf()],
        other => panic!("no seeds for {other}"),
    }
}

fn safetensors(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

/// Nine tensors whose ends add up to 2⁶⁴ with the header, which the safetensors crate overflows on.
fn nine_tensors() -> Vec<u8> {
    let step = u64::MAX / 8;
    let tensors: Vec<String> = (0..9u64)
        .map(|i| {
            let (begin, end) = (i * step, if i == 8 { u64::MAX } else { (i + 1) * step });
            format!(r#""t{i}":{{"dtype":"U8","shape":[{}],"data_offsets":[{begin},{end}]}}"#, end - begin)
        })
        .collect();
    safetensors(&format!("{{{}}}", tensors.join(",")), 16)
}

/// A journal of two lines, hashed as they are.
fn journal() -> Vec<u8> {
    let (mut chain, mut all) = (String::new(), Vec::new());
    for json in [
        r#"{"done":["a"],"tensors":[{"export":0,"tensor":"a","blake3":"00"}]}"#,
        r#"{"block":{"block":0,"output_error":0.5,"stages":[]},"files":[{"name":"states/00001-float","bytes":7,"blake3":"11"}]}"#,
    ] {
        chain = blake3::Hasher::new().update(chain.as_bytes()).update(json.as_bytes()).finalize().to_hex().to_string();
        all.extend(format!("{chain} {json}\n").into_bytes());
    }
    all
}

/// A file of two keys, a list and one tensor.
fn gguf() -> Vec<u8> {
    let mut all = b"GGUF".to_vec();
    let text = |all: &mut Vec<u8>, text: &str| {
        all.extend((text.len() as u64).to_le_bytes());
        all.extend(text.as_bytes());
    };
    all.extend(3u32.to_le_bytes());
    all.extend([1u64.to_le_bytes(), 2u64.to_le_bytes()].concat());
    text(&mut all, "general.architecture");
    all.extend(8u32.to_le_bytes());
    text(&mut all, "llama");
    text(&mut all, "tokenizer.ggml.tokens");
    all.extend([9u32.to_le_bytes(), 8u32.to_le_bytes()].concat());
    all.extend(2u64.to_le_bytes());
    ["a", "b"].iter().for_each(|token| text(&mut all, token));
    text(&mut all, "output_norm.weight");
    all.extend(1u32.to_le_bytes());
    all.extend(3u64.to_le_bytes());
    all.extend(0u32.to_le_bytes());
    all.extend(0u64.to_le_bytes());
    all.resize(all.len().next_multiple_of(32) + 12, 7);
    all
}

struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound.max(1) as u64) as usize
    }
}

/// What breaks parsers more often than chance finds.
const WORDS: &[&[u8]] = &[
    b"18446744073709551615",
    b"9223372036854775808",
    b"4294967296",
    b"-1",
    b"1e400",
    b"NaN",
    b"null",
    b"{}",
    b"[[[[",
    b"\"\\u0000\"",
    b"\"",
    b",",
    b":",
    b"\x1b[2J",
    b"../",
    b"\xff\xfe",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\0\0\0\0\0\0\0\x80",
    b"\n",
    b"__metadata__",
    b"data_offsets",
];

fn mutate(seeds: &[Vec<u8>], chance: &mut Chance) -> Vec<u8> {
    let mut bytes = seeds[chance.below(seeds.len())].clone();
    for _ in 0..=chance.below(4) {
        let at = chance.below(bytes.len() + 1);
        let end = (at + chance.below(16)).min(bytes.len());
        match chance.below(8) {
            0 | 1 if at < bytes.len() => bytes[at] ^= 1 << chance.below(8),
            2 if at < bytes.len() => bytes[at] = chance.below(256) as u8,
            3 => drop(bytes.splice(at..at, WORDS[chance.below(WORDS.len())].iter().copied())),
            4 => drop(bytes.splice(at..end, WORDS[chance.below(WORDS.len())].iter().copied())),
            5 => drop(bytes.drain(at..end)),
            6 => {
                let copied = bytes[at..end].to_vec();
                let to = chance.below(bytes.len() + 1);
                drop(bytes.splice(to..to, copied));
            }
            _ => {
                let other = &seeds[chance.below(seeds.len())];
                let from = chance.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
    bytes
}

fn executions() -> u64 {
    std::env::var("DRAWKNIFE_FUZZ").map_or(200_000, |text| text.parse().unwrap())
}

#[test]
fn mutated_seeds_neither_break_nor_stop_any_reader() {
    for (name, reader) in READERS {
        let seeds = seeds(name);
        assert!(seeds.iter().any(|seed| reader(seed)), "{name}: a sound seed is read");
        let (started, tasks) = (Instant::now(), 64);
        let taken: u64 = (0..tasks)
            .into_par_iter()
            .map(|task| {
                let mut chance = Chance(0x9e37_79b9_7f4a_7c15 ^ (task + 1));
                (0..executions().div_ceil(tasks)).fold(0, |taken, _| {
                    let bytes = mutate(&seeds, &mut chance);
                    let begun = Instant::now();
                    let read = std::panic::catch_unwind(|| reader(&bytes));
                    assert!(read.is_ok(), "{name} panics on {:?}", String::from_utf8_lossy(&bytes));
                    assert!(begun.elapsed() < Duration::from_secs(1), "{name} takes long on {:?}", String::from_utf8_lossy(&bytes));
                    taken + u64::from(read.unwrap_or_default())
                })
            })
            .sum();
        let rate = executions() as f64 / started.elapsed().as_secs_f64();
        eprintln!("{name}: {} executions, {taken} taken, {rate:.0} per second", executions());
    }
    let memory = drawknife::memory::peak().unwrap_or(0);
    eprintln!("peak memory of all tests so far: {} MB", memory >> 20);
}

#[test]
fn the_header_scanner_takes_nothing_that_the_safetensors_crate_refuses_and_refuses_more_for_known_reasons() {
    let mut seeds = seeds("header");
    seeds.truncate(3);
    // What only the crate takes.
    seeds.push(safetensors(
        r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#,
        2,
    ));
    seeds.push(safetensors(r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}}"#, 1));
    seeds.push(safetensors(r#"{"t":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}"#, 1));
    let mut chance = Chance(77);
    let (mut both, mut stricter) = (0, 0);
    for _ in 0..executions() {
        let bytes = mutate(&seeds, &mut chance);
        let theirs = std::panic::catch_unwind(|| safetensors::SafeTensors::deserialize(&bytes).map(|file| file.len()).ok());
        match (header_of(&bytes), theirs) {
            (Ok(header), Ok(Some(count))) => {
                assert_eq!(header.tensors.len(), count);
                both += 1;
            }
            (Ok(_), other) => panic!("only this scanner takes {:?}: {other:?}", String::from_utf8_lossy(&bytes)),
            (Err(reason), Ok(Some(_))) => {
                let known = ["occurs twice", "unknown field", "the limit is", "more than"];
                // Of a name that occurs twice, the crate sees the last alone, and here the first may be wrong already.
                let twice = String::from_utf8_lossy(&bytes).matches("\"t\":").count() > 1;
                assert!(twice || known.iter().any(|known| reason.contains(known)), "{reason}: {:?}", String::from_utf8_lossy(&bytes));
                stricter += 1;
            }
            _ => {}
        }
    }
    assert!(both > 100 && stricter > 0, "{both} taken by both, {stricter} refused here alone");
}

/// Writes the seeds for the targets of tests/fuzz where they are asked for.
#[test]
fn seeds_of_the_fuzz_targets_are_those_of_the_test() {
    let Ok(folder) = std::env::var("DRAWKNIFE_FUZZ_SEEDS") else { return };
    for (name, _) in READERS {
        let folder = Path::new(&folder).join(name);
        std::fs::create_dir_all(&folder).unwrap();
        for (number, seed) in seeds(name).iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{number}")), seed).unwrap();
        }
    }
}
