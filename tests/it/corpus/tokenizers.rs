//! Tokenizers and chat templates that are none, point beyond the vocabulary, or take time or memory without end.

use serde_json::{Value, json};

use crate::corpus::Expect::{self, Accepted, ByCheck, ByCompress, Either, Refused};
use crate::corpus::place::Place;
use crate::corpus::{Row, Variant, rows};

const NONE: Expect = Refused("tokenizer.json");
const FILE: &str = "tokenizer.json";
const SETTINGS: &str = "tokenizer_config.json";

/// Changes the tokenizer as JSON.
fn change(place: &Place, change: impl FnOnce(&mut Value)) {
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(place.file(FILE)).unwrap()).unwrap();
    change(&mut tokenizer);
    place.write(FILE, tokenizer.to_string());
}

/// Cuts texts by a regular expression.
fn split(place: &Place, pattern: &str) {
    let pattern = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    change(place, |tokenizer| tokenizer["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [pattern, bytes]}));
}

/// Replaces a text before it is cut.
fn replace(place: &Place, from: &str, to: &str) {
    change(place, |tokenizer| tokenizer["normalizer"] = json!({"type": "Replace", "pattern": {"String": from}, "content": to}));
}

fn template(place: &Place, template: &str) {
    place.write(SETTINGS, json!({"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": template}).to_string());
}

const FILES: &[Row] = &[
    ("tok_missing", NONE, |place| place.remove(FILE)),
    ("tok_empty", NONE, |place| place.write(FILE, "")),
    ("tok_not_json", NONE, |place| place.write(FILE, "tokens")),
    ("tok_list", NONE, |place| place.write(FILE, "[]")),
    ("tok_null", NONE, |place| place.write(FILE, "null")),
    ("tok_empty_object", NONE, |place| place.write(FILE, "{}")),
    ("tok_cut", NONE, |place| place.write(FILE, &std::fs::read(place.file(FILE)).unwrap()[..4000])),
    ("tok_not_utf8", NONE, |place| {
        let mut bytes = std::fs::read(place.file(FILE)).unwrap();
        bytes[1000] = 0xff;
        place.write(FILE, bytes);
    }),
    ("tok_html", NONE, |place| place.write(FILE, "<!doctype html>")),
    ("tok_deep", NONE, |place| place.write(FILE, format!("{{\"model\":{}", "[".repeat(1_000_000)))),
    ("tok_deep_normalizers", NONE, |place| {
        let (open, close) = ("{\"type\":\"Sequence\",\"normalizers\":[".repeat(5000), "]}".repeat(5000));
        place.edit(FILE, "\"normalizer\":null", &format!("\"normalizer\":{open}{close}"));
    }),
    ("tok_huge_sparse", NONE, |place| std::fs::File::create(place.file(FILE)).unwrap().set_len(1 << 40).unwrap()),
    ("tok_zeros", NONE, |place| place.write(FILE, vec![0; 4096])),
    ("tok_folder", NONE, |place| place.make_folder(FILE)),
    ("tok_pipe", NONE, |place| place.pipe(FILE)),
    ("tok_dangling", NONE, |place| place.link(FILE, "nowhere")),
    ("tok_loop", NONE, |place| place.link(FILE, FILE)),
    ("tok_dev_zero", NONE, |place| place.link(FILE, "/dev/zero")),
    ("tok_symlinked", Accepted, |place| place.link_away(FILE)),
    ("tok_settings_missing", Accepted, |place| place.remove(SETTINGS)),
    ("tok_settings_not_json", Refused(SETTINGS), |place| place.write(SETTINGS, "{")),
    ("tok_settings_list", Either, |place| place.write(SETTINGS, "[]")),
    ("tok_settings_number", Either, |place| place.write(SETTINGS, "1e308")),
    ("tok_settings_deep", Refused(SETTINGS), |place| place.write(SETTINGS, "[".repeat(1_000_000))),
    ("tok_settings_pipe", Refused(SETTINGS), |place| place.pipe(SETTINGS)),
    ("tok_settings_folder", Refused(SETTINGS), |place| place.make_folder(SETTINGS)),
    ("tok_settings_dev_zero", Refused(SETTINGS), |place| place.link(SETTINGS, "/dev/zero")),
    ("tok_settings_tokens_wrong", Either, |place| place.write(SETTINGS, "{\"bos_token\":5,\"eos_token\":[1],\"chat_template\":null}")),
    ("tok_settings_token_unknown", Either, |place| place.write(SETTINGS, "{\"bos_token\":\"<none>\",\"eos_token\":\"\\u001b[2J\"}")),
];

const VOCABULARIES: &[Row] = &[
    ("tok_id_beyond", NONE, |place| change(place, |all| all["model"]["vocab"]["e"] = 600.into())),
    ("tok_id_vocabulary_size", NONE, |place| change(place, |all| all["model"]["vocab"]["e"] = 512.into())),
    ("tok_id_4e9", NONE, |place| change(place, |all| all["model"]["vocab"]["e"] = 4_000_000_000u32.into())),
    ("tok_id_above_u32", NONE, |place| change(place, |all| all["model"]["vocab"]["e"] = (1u64 << 40).into())),
    ("tok_id_1e400", NONE, |place| place.edit(FILE, "\"a\":66", "\"a\":1e400")),
    ("tok_id_negative", NONE, |place| change(place, |all| all["model"]["vocab"]["e"] = (-1).into())),
    ("tok_id_string", NONE, |place| change(place, |all| all["model"]["vocab"]["e"] = "70".into())),
    ("tok_id_fraction", NONE, |place| change(place, |all| all["model"]["vocab"]["e"] = 70.5.into())),
    ("tok_id_twice", Either, |place| change(place, |all| all["model"]["vocab"]["e"] = 71.into())),
    ("tok_added_beyond", Either, |place| change(place, |all| all["added_tokens"][1]["id"] = 600.into())),
    ("tok_added_4e9", NONE, |place| change(place, |all| all["added_tokens"][1]["id"] = 4_000_000_000u32.into())),
    ("tok_added_negative", NONE, |place| change(place, |all| all["added_tokens"][1]["id"] = (-1).into())),
    ("tok_added_object", NONE, |place| change(place, |all| all["added_tokens"] = json!({"a": 1}))),
    ("tok_added_content_number", NONE, |place| change(place, |all| all["added_tokens"][1]["content"] = 5.into())),
    ("tok_added_content_empty", Either, |place| change(place, |all| all["added_tokens"][1]["content"] = "".into())),
    ("tok_processor_beyond", NONE, |place| place.edit(FILE, "\"ids\":[0]", "\"ids\":[9999]")),
    ("tok_processor_unknown_token", NONE, |place| {
        place.edit(FILE, "\"single\":[{\"SpecialToken\":{\"id\":\"<|begin|>\"", "\"single\":[{\"SpecialToken\":{\"id\":\"<none>\"");
    }),
    ("tok_vocab_missing", NONE, |place| place.edit(FILE, "\"vocab\":{", "\"vocabulary\":{")),
    ("tok_vocab_list", NONE, |place| change(place, |all| all["model"]["vocab"] = json!(["a", "b"]))),
    ("tok_vocab_empty", NONE, |place| change(place, |all| all["model"]["vocab"] = json!({}))),
    ("tok_vocab_and_merges_empty", NONE, |place| {
        change(place, |all| {
            all["model"]["vocab"] = json!({});
            all["model"]["merges"] = json!([]);
        });
    }),
    ("tok_merges_nonsense", NONE, |place| change(place, |all| all["model"]["merges"] = json!(["a b c", 7, null]))),
    ("tok_merges_unknown", NONE, |place| change(place, |all| all["model"]["merges"] = json!([["qqqq", "zzzz"]]))),
    ("tok_merges_string", NONE, |place| change(place, |all| all["model"]["merges"] = json!("a b"))),
    ("tok_merges_missing", NONE, |place| place.edit(FILE, "\"merges\":[", "\"merge\":[")),
    ("tok_model_missing", NONE, |place| place.edit(FILE, "\"model\":{", "\"modell\":{")),
    ("tok_model_null", NONE, |place| change(place, |all| all["model"] = Value::Null)),
    ("tok_model_type_unknown", NONE, |place| change(place, |all| all["model"]["type"] = "\u{1b}[2JBPE".into())),
    ("tok_version_unknown", NONE, |place| change(place, |all| all["version"] = "9.9".into())),
    ("tok_dropout", Either, |place| change(place, |all| all["model"]["dropout"] = 7.5.into())),
    ("tok_truncation_zero", Either, |place| {
        change(place, |all| all["truncation"] = json!({"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}));
    }),
    ("tok_padding_huge", Either, |place| {
        let strategy = json!({"Fixed": 4_000_000_000u32});
        change(place, |all| {
            all["padding"] = json!({"strategy": strategy, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"});
        });
    }),
];

const BOMBS: &[Row] = &[
    ("tok_regex_bomb", NONE, |place| split(place, "(a+)+$|(\\w+\\s?)+\u{1}")),
    ("tok_regex_nested", ByCheck("tokenizer.json"), |place| split(place, "((.+)+)+\u{1}")),
    ("tok_regex_invalid", NONE, |place| split(place, "(((")),
    ("tok_regex_empty", Either, |place| split(place, "")),
    ("tok_regex_empty_match", Either, |place| split(place, "(?=)")),
    ("tok_regex_deep", NONE, |place| split(place, &"(".repeat(100_000))),
    ("tok_regex_repeats", Either, |place| split(place, "(((a{100}){100}){100}){100}")),
    ("tok_replace_bomb", ByCompress("tokenizer.json"), |place| replace(place, "e", &"e".repeat(100_000))),
    ("tok_replace_empty", Either, |place| replace(place, "", "eeeeeeee")),
    ("tok_replace_all", Either, |place| {
        change(place, |all| all["normalizer"] = json!({"type": "Replace", "pattern": {"Regex": ".|\\n"}, "content": ""}));
    }),
    ("tok_prepend_bomb", Either, |place| {
        change(place, |all| all["normalizer"] = json!({"type": "Prepend", "prepend": "x".repeat(1 << 20)}));
    }),
];

/// A chat template.
type Template = (&'static str, Expect, fn() -> String);

/// Chat templates.
const TEMPLATES: &[Template] = &[
    ("tok_template_syntax", ByCompress("template"), || "{% for %}".into()),
    ("tok_template_unclosed", ByCompress("template"), || "{% for m in messages %}{{ m['content']".into()),
    ("tok_template_raise", ByCompress("template"), || "{{ raise_exception('\\u001b[2J no roles') }}".into()),
    ("tok_template_include", ByCompress("template"), || "{% include '/etc/passwd' %}".into()),
    ("tok_template_empty", ByCompress("gives 0 tokens"), String::new),
    ("tok_template_blank", Either, || "   ".into()),
    ("tok_template_undefined", Either, || "{{ nothing }}{{ messages[99].content }}".into()),
    ("tok_template_loop", ByCompress("template"), || {
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}".into()
    }),
    ("tok_template_recursion", ByCompress("template"), || "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into()),
    ("tok_template_deep", ByCompress("template"), || format!("{{{{ {}{} }}}}", "(".repeat(50_000), ")".repeat(50_000))),
    ("tok_template_deep_blocks", ByCompress("template"), || format!("{}{}", "{% if 1 %}".repeat(5000), "{% endif %}".repeat(5000))),
    ("tok_template_1_mb", ByCompress("template"), || "x".repeat(1 << 20)),
    ("tok_template_multiply", ByCompress("template"), || "{{ 'xxxxxxxx' * 1000000000 }}".into()),
    ("tok_template_doubling", ByCompress("template"), || {
        "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}".into()
    }),
];

pub fn variants() -> impl Iterator<Item = Variant> {
    let templates = TEMPLATES.iter().map(|&(name, expect, text)| {
        let chats = "{\"messages\":[{\"role\":\"user\",\"content\":\"How many legs has a spider, and why do people forget?\"}]}\n";
        let change = move |place: &Place| {
            template(place, &text());
            std::fs::write(place.folder.join("chats.jsonl"), chats.repeat(4)).unwrap();
        };
        Variant { compress: &["--calibration", "{folder}/chats.jsonl"], ..Variant::new(name, expect, change) }
    });
    rows(FILES).chain(rows(VOCABULARIES)).chain(rows(BOMBS)).chain(templates)
}
