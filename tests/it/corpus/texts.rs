//! Texts to calibrate and to measure on that are none, or not what their names say.

use crate::corpus::Expect::{self, Accepted, ByCompress, Either, Refused};
use crate::corpus::place::{Place, pipe};
use crate::corpus::{Row, Variant};

const LINES: Expect = ByCompress("text.jsonl + line 2");
const SOUND: &str = "{\"text\":\"Sentences about the weather, which is as it was yesterday.\"}\n";

/// A text file with its bytes.
type Text = (&'static str, Expect, fn() -> Vec<u8>);

/// The bytes of a text file; `check` measures on it too.
const TEXTS: &[Text] = &[
    ("text_sound", Accepted, || "All this is said and done, and then again.\n".repeat(60).into()),
    ("text_empty", Refused("text.txt"), Vec::new),
    ("text_blank", Refused("text.txt"), || " \n\t\r\n".repeat(1000).into()),
    ("text_blank_unicode", Refused("text.txt"), || "\u{3000}\u{a0}\u{2028}\n".repeat(100).into()),
    ("text_short", ByCompress("calibration text"), || b"a b".to_vec()),
    ("text_one_byte", ByCompress("calibration text"), || b"x".to_vec()),
    ("text_not_utf8", Refused("text.txt + byte 5"), || b"abcd \xff\xfe and so on".to_vec()),
    ("text_not_utf8_late", Refused("text.txt + byte 4300"), || {
        [&b"All this is said and done, and then again.\n".repeat(100)[..], b"\xc3("].concat()
    }),
    ("text_cut_character", Refused("text.txt"), || "Straße ".repeat(100).into_bytes()[..709].to_vec()),
    ("text_latin_1", Refused("text.txt"), || b"Gr\xfc\xdfe aus K\xf6ln. ".repeat(100)),
    ("text_utf16", Refused("text.txt"), || {
        [&[0xff, 0xfe][..], &"text ".repeat(100).encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>()].concat()
    }),
    ("text_bom", Accepted, || format!("\u{feff}{}", "All this is said and done.\n".repeat(60)).into_bytes()),
    ("text_nul", Accepted, || b"a\0b \0\0 and then ".repeat(100)),
    ("text_only_nul", Accepted, || vec![0; 4000]),
    ("text_escapes", Accepted, || "\u{1b}[2J\u{7} and \u{202e}then\u{9b}\r".repeat(100).into()),
    ("text_binary", Refused("text.txt"), || (0..=255).cycle().take(4096).collect()),
    ("text_word_2_mb", Accepted, || vec![b'x'; 2 << 20]),
    ("text_word_2_mb_mixed", Accepted, || {
        (0..2u32 << 20).map(|index| b'a' + (index.wrapping_mul(2_654_435_761) >> 27) as u8 % 26).collect()
    }),
    ("text_blank_2_mb_between", Accepted, || [&b"A beginning"[..], &vec![b' '; 2 << 20], b"and an end, with a few words more."].concat()),
    ("text_line_ends_1_mb", Refused("text.txt"), || vec![b'\n'; 1 << 20]),
    ("text_combining", Accepted, || format!("a{}", "\u{301}".repeat(100_000)).into_bytes()),
    ("text_special_tokens", Accepted, || "<|begin|><|end|><|end|> and <|begin|>".repeat(100).into()),
    ("text_gzip", Refused("text.txt"), || b"\x1f\x8b\x08\0\0\0\0\0\0\x03".repeat(10)),
];

/// The bytes of a file of lines, of which the second is the one to look at.
const JSON_LINES: &[(&str, Expect, &[u8])] = &[
    ("text_lines_not_json", LINES, b"text"),
    ("text_lines_cut", LINES, b"{\"text\":\"a"),
    ("text_lines_two_objects", LINES, b"{\"text\":\"a\"}{\"text\":\"b\"}"),
    ("text_lines_list", LINES, b"[\"text\"]"),
    ("text_lines_null", LINES, b"null"),
    ("text_lines_no_field", LINES, b"{\"content\":\"a\"}"),
    ("text_lines_text_number", LINES, b"{\"text\":5}"),
    ("text_lines_text_null", LINES, b"{\"text\":null}"),
    ("text_lines_text_list", LINES, b"{\"text\":[\"a\"]}"),
    ("text_lines_not_utf8", ByCompress("text.jsonl"), b"{\"text\":\"\xff\"}"),
    ("text_lines_half_surrogate", LINES, b"{\"text\":\"\\ud800\"}"),
    ("text_lines_escape_key", LINES, b"{\"\\u001b[2J\":1}"),
    ("text_lines_raw_escape", LINES, b"{\"text\":\"\x1b[2J\"}"),
    ("text_lines_blank", Accepted, b"   "),
    ("text_lines_text_empty", Accepted, b"{\"text\":\"\"}"),
    ("text_lines_text_nul", Accepted, b"{\"text\":\"a\\u0000b\"}"),
    ("text_lines_ids_negative", LINES, b"{\"input_ids\":[1,-1]}"),
    ("text_lines_ids_fraction", LINES, b"{\"input_ids\":[1.5]}"),
    ("text_lines_ids_string", LINES, b"{\"input_ids\":[\"1\"]}"),
    ("text_lines_ids_nested", LINES, b"{\"input_ids\":[[1,2,3]]}"),
    ("text_lines_ids_number", LINES, b"{\"input_ids\":7}"),
    ("text_lines_ids_null", LINES, b"{\"input_ids\":null}"),
    ("text_lines_ids_empty", LINES, b"{\"input_ids\":[]}"),
    ("text_lines_ids_above_u32", LINES, b"{\"input_ids\":[4294967296]}"),
    ("text_lines_ids_1e30", LINES, b"{\"input_ids\":[1e30]}"),
    ("text_lines_ids_beyond", ByCompress("text.jsonl + 512"), b"{\"input_ids\":[1,2,512,3]}"),
    ("text_lines_ids_far_beyond", ByCompress("text.jsonl + 4294967295"), b"{\"input_ids\":[4294967295]}"),
    ("text_lines_ids_one", Either, b"{\"input_ids\":[5]}"),
    ("text_lines_ids_sound", Accepted, b"{\"input_ids\":[5,6,7,8,9,10,11,12,13]}"),
    ("text_lines_messages_number", LINES, b"{\"messages\":5}"),
    ("text_lines_messages_empty", LINES, b"{\"messages\":[]}"),
    ("text_lines_messages_strings", LINES, b"{\"messages\":[\"hello\"]}"),
    ("text_lines_messages_no_role", LINES, b"{\"messages\":[{\"content\":\"a\"}]}"),
    ("text_lines_messages_no_content", Either, b"{\"messages\":[{\"role\":\"user\"}]}"),
    ("text_lines_messages_content_list", Either, b"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"}]}]}"),
    ("text_lines_messages_role_escape", Accepted, b"{\"messages\":[{\"role\":\"\\u001b[2J\",\"content\":\"a\"}]}"),
];

/// What stands where the text should be.
const PLACES: &[Row] = &[
    ("text_missing", Refused("text.txt"), |_| {}),
    ("text_folder", Refused("text.txt"), |place| std::fs::create_dir(file(place)).unwrap()),
    ("text_pipe", Refused("text.txt"), |place| pipe(&file(place))),
    ("text_dev_zero", Refused("text.txt"), |place| link(place, "/dev/zero")),
    ("text_dev_null", Refused("text.txt"), |place| link(place, "/dev/null")),
    ("text_dangling", Refused("text.txt"), |place| link(place, "nowhere")),
    ("text_loop", Refused("text.txt"), |place| link(place, "text.txt")),
    ("text_huge_sparse", Refused("text.txt"), |place| std::fs::File::create(file(place)).unwrap().set_len(1 << 43).unwrap()),
    ("text_symlinked", Accepted, |place| {
        std::fs::write(place.folder.join("blob"), "All this is said and done, and then again.\n".repeat(60)).unwrap();
        link(place, "blob");
    }),
];

/// Sources by their names alone.
const SOURCES: &[(&str, Expect, &[&str])] = &[
    ("text_source_empty", ByCompress("neither"), &["--calibration", ""]),
    ("text_source_commas", ByCompress("neither"), &["--calibration", ",,"]),
    ("text_source_unknown", ByCompress("/text.csv"), &["--calibration", "{folder}/text.csv"]),
    ("text_source_unknown_builtin", ByCompress("builtin:other"), &["--calibration", "builtin:other"]),
    ("text_source_escape", ByCompress("[2J"), &["--calibration", "\u{1b}[2J.csv"]),
];

fn file(place: &Place) -> std::path::PathBuf {
    place.folder.join("text.txt")
}

fn link(place: &Place, target: &str) {
    std::os::unix::fs::symlink(target, file(place)).unwrap();
}

pub fn variants() -> impl Iterator<Item = Variant> {
    let text = |name: &str, expect: Expect, change: Box<dyn Fn(&Place) + Send + Sync>| Variant {
        compress: &["--calibration", "{folder}/text.txt"],
        check: &["--text", "{folder}/text.txt", "--seq", "64", "--max-tokens", "256"],
        ..Variant::new(name, expect, change)
    };
    let texts = TEXTS.iter().map(move |&(name, expect, bytes)| {
        text(name, expect, Box::new(move |place: &Place| std::fs::write(file(place), bytes()).unwrap()))
    });
    let places = PLACES.iter().map(move |&(name, expect, change)| text(name, expect, Box::new(change)));
    let lines = JSON_LINES.iter().map(|&(name, expect, line)| {
        let change = move |place: &Place| {
            let all = [SOUND.as_bytes(), line, b"\n", SOUND.as_bytes()].concat();
            std::fs::write(place.folder.join("text.jsonl"), all).unwrap();
        };
        Variant { compress: &["--calibration", "{folder}/text.jsonl"], ..Variant::new(name, expect, change) }
    });
    let sources = SOURCES.iter().map(|&(name, expect, compress)| Variant { compress, ..Variant::new(name, expect, |_| {}) });
    texts.chain(places).chain(lines).chain(sources)
}
