//! Indexes that do not fit their files, and folders whose files are not what their names say.

use crate::corpus::Expect::{self, Accepted, ByCompress, Either, Refused};
use crate::corpus::place::{INDEX, SHARDS, WEIGHTS};
use crate::corpus::{Row, Variant, rows};

const IN_INDEX: Expect = Refused(INDEX);
const FILE: Expect = Refused(WEIGHTS);
const FIRST: &str = "\"model.embed_tokens.weight\":\"model-00001-of-00002.safetensors\"";

/// A text of the index and what stands there instead.
const EDITS: &[(&str, Expect, &str, &str)] = &[
    ("idx_sound", Accepted, "1312512", "1312512"),
    ("idx_total_size_wrong", Accepted, "1312512", "7"),
    ("idx_total_size_negative", Either, "1312512", "-1"),
    ("idx_total_size_string", Either, "1312512", "\"many\""),
    ("idx_without_metadata", Accepted, "\"metadata\":{\"total_size\":1312512},", ""),
    ("idx_path_parent", IN_INDEX, FIRST, "\"model.embed_tokens.weight\":\"../model-00001-of-00002.safetensors\""),
    ("idx_path_absolute", IN_INDEX, FIRST, "\"model.embed_tokens.weight\":\"/etc/passwd.safetensors\""),
    ("idx_path_sub_folder", IN_INDEX, FIRST, "\"model.embed_tokens.weight\":\"sub/model-00001-of-00002.safetensors\""),
    ("idx_path_dot", IN_INDEX, FIRST, "\"model.embed_tokens.weight\":\"./model-00001-of-00002.safetensors\""),
    ("idx_path_dots", IN_INDEX, FIRST, "\"model.embed_tokens.weight\":\"..\""),
    ("idx_path_nul", IN_INDEX, FIRST, "\"model.embed_tokens.weight\":\"model\\u0000.safetensors\""),
    ("idx_path_empty", IN_INDEX, FIRST, "\"model.embed_tokens.weight\":\"\""),
    ("idx_path_slash_behind", IN_INDEX, FIRST, "\"model.embed_tokens.weight\":\"model-00001-of-00002.safetensors/\""),
    ("idx_path_escape", IN_INDEX, FIRST, "\"model.embed_tokens.weight\":\"\\u001b[2J.safetensors\""),
    ("idx_not_safetensors", IN_INDEX, FIRST, "\"model.embed_tokens.weight\":\"config.json\""),
    ("idx_file_number", IN_INDEX, FIRST, "\"model.embed_tokens.weight\":1"),
    ("idx_file_null", IN_INDEX, FIRST, "\"model.embed_tokens.weight\":null"),
    ("idx_file_list", IN_INDEX, FIRST, "\"model.embed_tokens.weight\":[\"model-00001-of-00002.safetensors\"]"),
    ("idx_absent_shard", Refused("model-00003"), FIRST, "\"model.embed_tokens.weight\":\"model-00003-of-00003.safetensors\""),
    ("idx_wrong_shard", Refused("model.embed_tokens.weight"), FIRST, "\"model.embed_tokens.weight\":\"model-00002-of-00002.safetensors\""),
    (
        "idx_ghost_tensor",
        Refused("ghost"),
        FIRST,
        "\"ghost\":\"model-00001-of-00002.safetensors\",\"model.embed_tokens.weight\":\"model-00001-of-00002.safetensors\"",
    ),
    ("idx_omits_tensor", Refused("model.embed_tokens.weight"), "\"model.embed_tokens.weight\":\"model-00001-of-00002.safetensors\",", ""),
    (
        "idx_duplicate_key",
        Refused("model.embed_tokens.weight"),
        FIRST,
        "\"model.embed_tokens.weight\":\"a.safetensors\",\"model.embed_tokens.weight\":\"model-00001-of-00002.safetensors\"",
    ),
    ("idx_duplicate_map", IN_INDEX, "\"weight_map\"", "\"weight_map\":{},\"weight_map\""),
    ("idx_map_missing", IN_INDEX, "weight_map", "weights_map"),
];

const INDEXES: &[Row] = &[
    ("idx_path_long", IN_INDEX, |place| {
        place.in_index(FIRST, &format!("\"model.embed_tokens.weight\":\"{}.safetensors\"", "n".repeat(300)));
    }),
    ("idx_empty_file", IN_INDEX, |place| {
        place.shards();
        place.write(INDEX, "");
    }),
    ("idx_not_json", IN_INDEX, |place| {
        place.shards();
        place.write(INDEX, "weight_map: {}");
    }),
    ("idx_list", IN_INDEX, |place| {
        place.shards();
        place.write(INDEX, "[]");
    }),
    ("idx_map_list", IN_INDEX, |place| {
        place.shards();
        place.write(INDEX, "{\"weight_map\":[]}");
    }),
    ("idx_map_null", IN_INDEX, |place| {
        place.shards();
        place.write(INDEX, "{\"weight_map\":null}");
    }),
    ("idx_map_empty", IN_INDEX, |place| {
        place.shards();
        place.write(INDEX, "{\"weight_map\":{}}");
    }),
    ("idx_deep", IN_INDEX, |place| {
        place.shards();
        place.write(INDEX, format!("{{\"metadata\":{}", "[".repeat(1_000_000)));
    }),
    ("idx_lfs_pointer", IN_INDEX, |place| {
        place.shards();
        place.write(INDEX, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n");
    }),
    ("idx_cut", IN_INDEX, |place| {
        place.shards();
        let text = std::fs::read(place.file(INDEX)).unwrap();
        place.write(INDEX, &text[..text.len() / 2]);
    }),
    ("idx_huge_sparse", IN_INDEX, |place| {
        place.shards();
        std::fs::File::create(place.file(INDEX)).unwrap().set_len(1 << 40).unwrap();
    }),
    ("idx_folder", IN_INDEX, |place| {
        place.shards();
        place.make_folder(INDEX);
    }),
    ("idx_pipe", IN_INDEX, |place| {
        place.shards();
        place.pipe(INDEX);
    }),
    ("idx_dangling", IN_INDEX, |place| {
        place.shards();
        place.link(INDEX, "nowhere");
    }),
    ("idx_dev_zero", IN_INDEX, |place| {
        place.shards();
        place.link(INDEX, "/dev/zero");
    }),
    ("idx_symlinked", Accepted, |place| {
        place.shards();
        place.link_away(INDEX);
    }),
    ("idx_shards_symlinked", Accepted, |place| {
        place.shards();
        SHARDS.iter().for_each(|name| place.link_away(name));
    }),
    ("idx_shard_missing", Refused(SHARDS[1]), |place| {
        place.shards();
        place.remove(SHARDS[1]);
    }),
    ("idx_shard_dangling", Refused(SHARDS[1]), |place| {
        place.shards();
        place.link(SHARDS[1], "../blobs/nowhere");
    }),
    ("idx_shard_loop", Refused(SHARDS[1]), |place| {
        place.shards();
        place.link(SHARDS[1], SHARDS[1]);
    }),
    ("idx_shard_folder", Refused(SHARDS[1]), |place| {
        place.shards();
        place.make_folder(SHARDS[1]);
    }),
    ("idx_shard_pipe", Refused(SHARDS[1]), |place| {
        place.shards();
        place.pipe(SHARDS[1]);
    }),
    ("idx_shard_empty", Refused(SHARDS[1]), |place| {
        place.shards();
        place.write(SHARDS[1], "");
    }),
    ("idx_tensor_in_two_shards", Refused("model-00002-of-00002.safetensors + tensor model.layers.1."), |place| {
        let whole = std::fs::read(place.file(WEIGHTS)).unwrap();
        place.shards();
        place.write(SHARDS[0], whole);
    }),
    ("idx_missing", Refused(INDEX), |place| {
        place.shards();
        place.remove(INDEX);
    }),
    ("idx_further_shard", Either, |place| {
        let whole = std::fs::read(place.file(WEIGHTS)).unwrap();
        place.shards();
        place.write("model-00003-of-00002.safetensors", whole);
    }),
];

const FILES: &[Row] = &[
    ("files_no_config", Refused("config.json"), |place| place.remove("config.json")),
    ("files_no_weights", FILE, |place| place.remove(WEIGHTS)),
    ("files_empty_folder", Refused("config.json"), |place| {
        ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS].iter().for_each(|name| place.remove(name));
    }),
    ("files_folder_missing", Refused("model"), |place| std::fs::remove_dir_all(&place.model).unwrap()),
    ("files_folder_is_file", Refused("model"), |place| {
        std::fs::remove_dir_all(&place.model).unwrap();
        std::fs::write(&place.model, "a model").unwrap();
    }),
    ("files_folder_dangling", Refused("model"), |place| {
        std::fs::remove_dir_all(&place.model).unwrap();
        std::os::unix::fs::symlink("nowhere", &place.model).unwrap();
    }),
    ("files_folder_symlinked", Accepted, |place| {
        std::fs::rename(&place.model, place.folder.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", &place.model).unwrap();
    }),
    ("files_folder_is_pipe", Refused("model"), |place| {
        std::fs::remove_dir_all(&place.model).unwrap();
        super::place::pipe(&place.model);
    }),
    ("files_pickle_only", Refused("pytorch_model.bin"), |place| {
        place.remove(WEIGHTS);
        place.write("pytorch_model.bin", b"\x80\x02}q\x00.");
    }),
    ("files_gguf_only", Refused("model.gguf"), |place| {
        place.remove(WEIGHTS);
        place.write("model.gguf", b"GGUF\x03\0\0\0");
    }),
    ("files_zip", Refused("model.safetensors + pickle"), |place| place.write(WEIGHTS, b"PK\x03\x04\x14\0\0\0 and so on, a good while")),
    ("files_pickle", Refused("model.safetensors + pickle"), |place| {
        place.write(WEIGHTS, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.");
    }),
    ("files_pickle_4", FILE, |place| place.write(WEIGHTS, b"\x80\x04\x95\x1a\0\0\0\0\0\0\0}\x94\x8c\x01a\x94K\x01s.")),
    ("files_gguf", Refused("model.safetensors + GGUF"), |place| place.write(WEIGHTS, b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0")),
    ("files_html", Refused("model.safetensors + web page"), |place| place.write(WEIGHTS, "<!doctype html><html><body>404</body></html>")),
    ("files_html_upper", Refused("model.safetensors + web page"), |place| place.write(WEIGHTS, "<!DOCTYPE HTML><HTML></HTML>")),
    ("files_html_blank_before", FILE, |place| place.write(WEIGHTS, "\n\n<html><body>Access denied</body></html>")),
    ("files_json", FILE, |place| place.write(WEIGHTS, "{\"error\":\"Repository not found\"}")),
    ("files_lfs_pointer", Refused("model.safetensors + git-lfs"), |place| {
        place.write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1315592\n");
    }),
    ("files_gzip", FILE, |place| place.write(WEIGHTS, b"\x1f\x8b\x08\0\0\0\0\0\0\x03 and so on")),
    ("files_two_without_index", Refused(INDEX), |place| {
        std::fs::copy(place.file(WEIGHTS), place.file("other.safetensors")).unwrap();
        place.shards();
        place.remove(INDEX);
    }),
    ("files_other_name", Accepted, |place| std::fs::rename(place.file(WEIGHTS), place.file("weights.safetensors")).unwrap()),
    ("files_symlink_sound", Accepted, |place| place.link_away(WEIGHTS)),
    ("files_symlink_all", Accepted, |place| {
        ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS].iter().for_each(|name| place.link_away(name));
    }),
    ("files_symlink_dangling", FILE, |place| place.link(WEIGHTS, "../blobs/nowhere")),
    ("files_symlink_loop", FILE, |place| place.link(WEIGHTS, WEIGHTS)),
    ("files_symlink_folder", FILE, |place| place.link(WEIGHTS, "..")),
    ("files_symlink_dev_zero", FILE, |place| place.link(WEIGHTS, "/dev/zero")),
    ("files_symlink_dev_null", FILE, |place| place.link(WEIGHTS, "/dev/null")),
    ("files_pipe", FILE, |place| place.pipe(WEIGHTS)),
    ("files_symlink_pipe", FILE, |place| {
        super::place::pipe(&place.folder.join("pipe"));
        place.link(WEIGHTS, "../pipe");
    }),
    ("files_socket", FILE, |place| {
        place.remove(WEIGHTS);
        std::os::unix::net::UnixListener::bind(place.file(WEIGHTS)).unwrap();
    }),
    ("files_weights_folder", FILE, |place| place.make_folder(WEIGHTS)),
    ("files_side_pipe", Accepted, |place| place.pipe("notes.txt")),
    ("files_side_dangling", Accepted, |place| place.link("notes.txt", "nowhere")),
    ("files_side_dev_zero", Accepted, |place| place.link("notes.txt", "/dev/zero")),
    ("files_side_loop", Accepted, |place| place.link("notes.txt", "notes.txt")),
    ("files_side_folder", Accepted, |place| {
        place.make_folder("onnx");
        place.write("onnx/model.onnx", "x");
    }),
    ("files_side_folder_loop", Accepted, |place| place.link("again", ".")),
    ("files_side_escape", Either, |place| place.write("a\u{1b}[2Jb.txt", "x")),
    ("files_side_report", Either, |place| {
        place.write("report.json", "{}");
        place.write("report.html", "<p>");
    }),
    ("files_side_manifest", Either, |place| place.write("manifest.json", "{\"files\":{\"../../x\":\"00\"}}")),
    ("files_side_manifest_broken", Either, |place| place.write("manifest.json", "[[")),
    ("files_side_lock", Accepted, |place| place.write(".lock", "")),
    ("files_pickle_beside", Either, |place| place.write("pytorch_model.bin", b"\x80\x02}q\x00.")),
    ("files_remote_code", Accepted, |place| {
        place.config("auto_map", "{\"AutoModelForCausalLM\":\"modeling_x.X\"}");
        place.write("modeling_x.py", "import os\nos.system('touch /tmp/drawknife-was-here')\n");
    }),
    ("files_config_lfs_pointer", Refused("config.json"), |place| {
        place.write("config.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n");
    }),
    ("files_tokenizer_lfs_pointer", ByCompress("tokenizer.json"), |place| {
        place.write("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n");
    }),
];

pub fn variants() -> impl Iterator<Item = Variant> {
    let edits = EDITS.iter().map(|&(name, expect, from, to)| Variant::new(name, expect, move |place| place.in_index(from, to)));
    edits.chain(rows(INDEXES)).chain(rows(FILES))
}
