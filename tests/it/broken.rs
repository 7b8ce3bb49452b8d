//! Broken model folders: every one is refused in one line that names the culprit, with exit code 2, and nothing is left.

use std::path::Path;

use crate::command::{drawknife, workplace};

type Breakage = fn(&Path);

fn edit(path: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from} is not in {}", path.display());
    std::fs::write(path, text.replacen(from, to, 1)).unwrap();
}

/// Replaces bytes in the header of the weights by as many others.
fn edit_header(folder: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let path = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    std::fs::write(&path, bytes).unwrap();
}

fn truncate(folder: &Path, keep: usize) {
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..keep.min(bytes.len())]).unwrap();
}

/// Overwrites the last two bytes, a bf16 of the last tensor.
fn last_value(folder: &Path, value: [u8; 2]) {
    let path = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&value);
    std::fs::write(&path, bytes).unwrap();
}

const BROKEN: &[(&str, Breakage, &str)] = &[
    ("empty weights", |folder| truncate(folder, 0), "model.safetensors"),
    ("seven bytes", |folder| truncate(folder, 7), "model.safetensors"),
    ("half a header", |folder| truncate(folder, 500), "model.safetensors"),
    ("one byte short", |folder| truncate(folder, 1_315_591), "truncated"),
    (
        "surplus bytes",
        |folder| {
            let path = folder.join("model.safetensors");
            let mut bytes = std::fs::read(&path).unwrap();
            bytes.extend([0; 9]);
            std::fs::write(path, bytes).unwrap();
        },
        "model.safetensors",
    ),
    ("a huge header length", |folder| std::fs::write(folder.join("model.safetensors"), [0xff; 64]).unwrap(), "header"),
    ("another type of floats", |folder| edit_header(folder, "\"BF16\"", "\"FP16\""), "unknown variant"),
    ("another shape", |folder| edit_header(folder, "[512,128]", "[128,512]"), "model.embed_tokens.weight"),
    ("a pickle", |folder| std::fs::write(folder.join("model.safetensors"), b"PK\x03\x04 and so on").unwrap(), "pickle"),
    ("no weights", |folder| std::fs::remove_file(folder.join("model.safetensors")).unwrap(), "model.safetensors"),
    (
        "weights that are a folder",
        |folder| {
            std::fs::remove_file(folder.join("model.safetensors")).unwrap();
            std::fs::create_dir(folder.join("model.safetensors")).unwrap();
        },
        "not a regular file",
    ),
    (
        "weights without end",
        |folder| {
            std::fs::remove_file(folder.join("model.safetensors")).unwrap();
            std::os::unix::fs::symlink("/dev/zero", folder.join("model.safetensors")).unwrap();
        },
        "not a regular file",
    ),
    ("no config", |folder| std::fs::remove_file(folder.join("config.json")).unwrap(), "config.json"),
    ("a config that is no JSON", |folder| std::fs::write(folder.join("config.json"), "{").unwrap(), "config.json"),
    ("a config that is a list", |folder| std::fs::write(folder.join("config.json"), "[]").unwrap(), "config.json"),
    ("NaN in the config", |folder| edit(&folder.join("config.json"), "10000.0", "NaN"), "config.json"),
    (
        "no layers",
        |folder| edit(&folder.join("config.json"), "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 0"),
        "num_hidden_layers is 0",
    ),
    (
        "too many layers",
        |folder| edit(&folder.join("config.json"), "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4"),
        "model.layers.3.",
    ),
    (
        "absurdly many layers",
        |folder| edit(&folder.join("config.json"), "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2147483648"),
        "num_hidden_layers",
    ),
    (
        "a larger vocabulary",
        |folder| edit(&folder.join("config.json"), "\"vocab_size\": 512", "\"vocab_size\": 513"),
        "model.embed_tokens.weight",
    ),
    (
        "an odd number of heads",
        |folder| edit(&folder.join("config.json"), "\"num_attention_heads\": 4", "\"num_attention_heads\": 3"),
        "num_attention_heads 3",
    ),
    (
        "quantized in a way that is not read",
        |folder| edit(&folder.join("config.json"), "{", "{\"quantization_config\": {\"quant_method\": \"aqlm\"},"),
        "quantized",
    ),
    (
        "an index that leads out of the folder",
        |folder| {
            std::fs::write(folder.join("model.safetensors.index.json"), r#"{"weight_map":{"a":"../model.safetensors"}}"#).unwrap();
        },
        "plain",
    ),
    (
        "an index that names a tensor twice",
        |folder| {
            std::fs::write(
                folder.join("model.safetensors.index.json"),
                r#"{"weight_map":{"a":"model.safetensors","a":"model.safetensors"}}"#,
            )
            .unwrap();
        },
        "occurs twice",
    ),
    (
        "an index with a ghost",
        |folder| {
            std::fs::write(folder.join("model.safetensors.index.json"), r#"{"weight_map":{"ghost":"model.safetensors"}}"#).unwrap();
        },
        "ghost",
    ),
    (
        "too few positions",
        |folder| edit(&folder.join("config.json"), "\"max_position_embeddings\": 1024", "\"max_position_embeddings\": 1"),
        "max_position_embeddings is 1",
    ),
    (
        "biases that are missing",
        |folder| edit(&folder.join("config.json"), "\"attention_bias\": false", "\"attention_bias\": true"),
        "q_proj.bias",
    ),
    ("NaN in a weight", |folder| last_value(folder, [0xc0, 0x7f]), "NaN or infinite"),
    ("an infinite weight", |folder| last_value(folder, [0x80, 0x7f]), "NaN or infinite"),
    ("a tokenizer that is none", |folder| std::fs::write(folder.join("tokenizer.json"), "{}").unwrap(), "tokenizer.json"),
];

#[test]
fn broken_folders_are_refused_by_name() {
    for (what, breakage, culprit) in BROKEN {
        let (folder, model) = workplace();
        breakage(Path::new(&model));
        let out = folder.path().join("out");
        let output = drawknife(&["compress", &model, "-o", out.to_str().unwrap(), "--preset", "prune50", "--samples", "2", "--seq", "64"]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{what}: {error}");
        assert!(error.contains(culprit) && error.trim_end().lines().count() == 1, "{what}: {error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "{what}");
    }
}

#[test]
fn blanks_before_the_header_and_unaligned_data_are_read_alike() {
    let (folder, model) = workplace();
    let path = Path::new(&model).join("model.safetensors");
    let nll = || crate::command::json(&["eval", &model, "--max-tokens", "512"])["nll"].clone();
    let expected = nll();
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let mut shifted = (length + 3).to_le_bytes().to_vec();
    shifted.extend(b"   ");
    shifted.extend(&bytes[8..]);
    std::fs::write(&path, shifted).unwrap();
    assert_eq!(nll(), expected);
    drop(folder);
}
