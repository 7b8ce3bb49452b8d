//! Names that control terminals, are markup, or turn the direction of text.

use crate::corpus::Expect::{Accepted, Either, Refused};
use crate::corpus::place::{INDEX, SHARDS, WEIGHTS};
use crate::corpus::{Row, Variant, rows};

const NAMES: &[Row] = &[
    ("names_tensor_escape", Either, |place| place.name("\"a\\u001b[2J\\u0007b\"")),
    ("names_tensor_rtl", Either, |place| place.name("\"a\u{202e}b\"")),
    ("names_tensor_html", Either, |place| place.name("\"<img src=x onerror=alert(1)>\"")),
    ("names_tensor_formula", Either, |place| place.name("\"=cmd|' /C calc'!A0\"")),
    ("names_tensor_empty", Either, |place| place.name("\"\"")),
    ("names_tensor_nul", Either, |place| place.name("\"a\\u0000b\"")),
    ("names_tensor_path", Either, |place| place.name("\"../../../tmp/drawknife-was-here\"")),
    ("names_tensor_line_end", Either, |place| place.name("\"a\\nerror: b\"")),
    ("names_layer_escape", Either, |place| place.add("model.layers.0.\u{1b}[31m.weight", "BF16", &[4, 4], 0)),
    ("names_layer_html", Either, |place| place.add("model.layers.0.<img src=x onerror=alert(1)>.weight", "BF16", &[4, 4], 0)),
    ("names_instead_escape", Refused("model.norm.weight"), |place| place.in_header("model.norm.weight", "model.no\\u001b[2Jrm.weight")),
    ("names_wrong_escape", Refused("\\u{1b}[2J"), |place| {
        place.in_header("\"model.norm.weight\":{\"dtype\":\"BF16\",\"shape\":[128]", "\"\\u001b[2J\":{\"dtype\":\"BF16\",\"shape\":[127]");
    }),
    ("names_wrong_rtl", Refused("\\u{202e}"), |place| {
        place.in_header("\"model.norm.weight\":{\"dtype\":\"BF16\",\"shape\":[128]", "\"a\u{202e}b\":{\"dtype\":\"BF16\",\"shape\":[127]");
    }),
    ("names_wrong_line_ends", Refused(WEIGHTS), |place| {
        place.in_header(
            "\"model.norm.weight\":{\"dtype\":\"BF16\",\"shape\":[128]",
            "\"a\\n\\n\\r\\nb\":{\"dtype\":\"BF16\",\"shape\":[127]",
        );
    }),
    ("names_wrong_long", Refused("nnnn"), |place| {
        let name = "n".repeat(1000);
        place.in_header(
            "\"model.norm.weight\":{\"dtype\":\"BF16\",\"shape\":[128]",
            &format!("\"{name}\":{{\"dtype\":\"BF16\",\"shape\":[127]"),
        );
    }),
    ("names_dtype_escape", Refused(WEIGHTS), |place| place.in_header("\"BF16\"", "\"\\u001b[2J\\u0007\"")),
    ("names_dtype_rtl", Refused(WEIGHTS), |place| place.in_header("\"BF16\"", "\"\u{202e}\"")),
    ("names_field_escape", Refused(WEIGHTS), |place| place.in_header("\"dtype\":\"BF16\"", "\"\\u001b]0;x\\u0007\":1,\"dtype\":\"BF16\"")),
    ("names_metadata_escape", Either, |place| place.in_header("\"pt\"", "\"\\u001b[2J<img src=x onerror=alert(1)>\"")),
    ("names_type_escape", Either, |place| place.config("model_type", "\"\\u001b[2Jllama\\u202e\"")),
    ("names_type_html", Either, |place| place.config("model_type", "\"<img src=x onerror=alert(1)>\"")),
    ("names_type_1_mb", Either, |place| place.config("model_type", &format!("\"{}\"", "x".repeat(1 << 20)))),
    ("names_architecture_escape", Accepted, |place| place.config("architectures", "[\"\\u001b[2J<img src=x onerror=alert(1)>\"]")),
    ("names_architecture_number", Either, |place| place.config("architectures", "7")),
    ("names_act_escape", Refused("hidden_act"), |place| place.config("hidden_act", "\"\\u001b[2J\\u202e\"")),
    ("names_act_1_mb", Refused("hidden_act"), |place| place.config("hidden_act", &format!("\"{}\"", "x".repeat(1 << 20)))),
    ("names_value_escape", Refused("hidden_size"), |place| place.config("hidden_size", "\"\\u001b[2J\"")),
    ("names_quant_escape", Refused("config.json"), |place| place.config("quantization_config", "{\"quant_method\":\"\\u001b[2J\\u202e\"}")),
    ("names_key_escape", Accepted, |place| place.config("\u{1b}[2J<img src=x onerror=alert(1)>", "1")),
    ("names_original_html", Either, |place| place.config("_name_or_path", "\"<img src=x onerror=alert(1)>\\u001b[2J\"")),
    ("names_token_escape", Refused("tokenizer.json"), |place| {
        place.edit("tokenizer.json", "{\"id\":1,\"content\":\"<|end|>\"", "{\"id\":99999999,\"content\":\"\\u001b[2J\\u202e\"");
    }),
    ("names_shard_escape", Either, |place| {
        place.shards();
        std::fs::rename(place.file(SHARDS[0]), place.file("a\u{1b}[2J.safetensors")).unwrap();
        let text = std::fs::read_to_string(place.file(INDEX)).unwrap();
        place.write(INDEX, text.replace(SHARDS[0], "a\\u001b[2J.safetensors"));
    }),
    ("names_side_file_html", Either, |place| place.write("<img src=x onerror=alert(1)>.txt", "x")),
    ("names_side_file_not_utf8", Either, |place| {
        use std::os::unix::ffi::OsStrExt;
        std::fs::write(place.model.join(std::ffi::OsStr::from_bytes(b"a\xffb.txt")), "x").unwrap();
    }),
    ("names_pickle_escape", Refused("pickle"), |place| {
        place.remove(WEIGHTS);
        place.write("a\u{1b}[2J.bin", "x");
    }),
];

/// Names of folders of models: all are sound.
const FOLDERS: &[(&str, &str)] = &[
    ("names_folder_escape", "{folder}/a\u{1b}[2J\u{7}b"),
    ("names_folder_line_end", "{folder}/a\nerror: b"),
    ("names_folder_rtl", "{folder}/a\u{202e}b"),
    ("names_folder_html", "{folder}/<img src=x onerror=alert(1)>"),
    ("names_folder_blank", "{folder}/ "),
    ("names_folder_not_utf8", "{folder}/a%FFb"),
    ("names_folder_like_gguf", "{folder}/model.gguf"),
    ("names_folder_like_option", "{folder}/--help"),
];

pub fn variants() -> impl Iterator<Item = Variant> {
    let folders = FOLDERS.iter().map(|&(name, model)| {
        let change = move |place: &super::place::Place| std::fs::rename(&place.model, super::filled(model, &place.folder)).unwrap();
        Variant { model, ..Variant::new(name, Accepted, change) }
    });
    rows(NAMES).chain(folders)
}
