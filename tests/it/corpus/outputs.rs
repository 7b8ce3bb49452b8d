//! Destinations that may not be written, and options that nothing can be made of. The model is sound.

use crate::corpus::Expect::{self, Accepted, ByCompress, Either};
use crate::corpus::Variant;
use crate::corpus::place::Place;

/// A destination, and what is made before.
type Destination = (&'static str, Expect, &'static str, fn(&Place));

/// Destinations without `--force`.
const DESTINATIONS: &[Destination] = &[
    ("dest_sound", Accepted, "{folder}/out", |_| {}),
    ("dest_slash_behind", Accepted, "{folder}/out/", |_| {}),
    ("dest_not_empty", ByCompress("/out"), "{folder}/out", |place| {
        std::fs::create_dir(place.folder.join("out")).unwrap();
        std::fs::write(place.folder.join("out/notes"), "mine").unwrap();
    }),
    ("dest_empty_folder", Either, "{folder}/out", |place| std::fs::create_dir(place.folder.join("out")).unwrap()),
    ("dest_file", ByCompress("/out"), "{folder}/out", |place| std::fs::write(place.folder.join("out"), "mine").unwrap()),
    ("dest_pipe", ByCompress("/out"), "{folder}/out", |place| super::place::pipe(&place.folder.join("out"))),
    ("dest_model", ByCompress("/model"), "{folder}/model", |_| {}),
    ("dest_model_by_dots", ByCompress("/model"), "{folder}/model/../model", |_| {}),
    ("dest_inside_model", ByCompress("/model/sub"), "{folder}/model/sub", |_| {}),
    ("dest_deep_inside_model", ByCompress("model"), "{folder}/model/sub/sub", |_| {}),
    ("dest_around_model", ByCompress("the destination"), "{folder}", |_| {}),
    ("dest_link_to_model", ByCompress("/out"), "{folder}/out", |place| link(place, "model", "out")),
    ("dest_inside_link_to_model", ByCompress("out"), "{folder}/link/out", |place| link(place, "model", "link")),
    ("dest_link_to_folder", ByCompress("/out"), "{folder}/out", |place| {
        std::fs::create_dir(place.folder.join("other")).unwrap();
        link(place, "other", "out");
    }),
    ("dest_dangling", ByCompress("/out"), "{folder}/out", |place| link(place, "nowhere", "out")),
    ("dest_loop", ByCompress("/out"), "{folder}/out", |place| link(place, "out", "out")),
    ("dest_parent_missing", ByCompress("/none"), "{folder}/none/out", |_| {}),
    ("dest_parent_is_file", ByCompress("/file"), "{folder}/file/out", |place| std::fs::write(place.folder.join("file"), "mine").unwrap()),
    ("dest_parent_dangling", ByCompress("/link"), "{folder}/link/out", |place| link(place, "nowhere", "link")),
    ("dest_parent_proc", ByCompress("/proc/"), "/proc/drawknife-out", |_| {}),
    ("dest_root", ByCompress("/"), "/", |_| {}),
    ("dest_dot", ByCompress("."), ".", |_| {}),
    ("dest_dots", ByCompress(".."), "{folder}/model/..", |_| {}),
    ("dest_empty", ByCompress("-o"), "", |_| {}),
    ("dest_name_escape", Accepted, "{folder}/o\u{1b}[2Ju\u{202e}t", |_| {}),
    ("dest_name_html", Accepted, "{folder}/<img src=x onerror=alert(1)>", |_| {}),
    ("dest_name_not_utf8", Accepted, "{folder}/o%FFut", |_| {}),
    ("dest_refused_escape", ByCompress("\\u{1b}"), "{folder}/no\u{1b}[2Jne/out", |_| {}),
    ("dest_work_is_link", Either, "{folder}/out", |place| link(place, "model", ".out.drawknife-work")),
    ("dest_work_is_file", ByCompress("out"), "{folder}/out", |place| {
        std::fs::write(place.folder.join(".out.drawknife-work"), "mine").unwrap();
    }),
];

/// Names of many bytes.
const LONG: &[(&str, usize)] = &[("dest_name_300_bytes", 300), ("dest_name_256_bytes", 256), ("dest_path_5000_bytes", 5000)];

/// Destinations that `--force` is to replace.
const FORCED: &[Destination] = &[
    ("dest_force_foreign", ByCompress("/out"), "{folder}/out", |place| {
        std::fs::create_dir(place.folder.join("out")).unwrap();
        std::fs::write(place.folder.join("out/notes"), "mine").unwrap();
    }),
    ("dest_force_empty_folder", Accepted, "{folder}/out", |place| std::fs::create_dir(place.folder.join("out")).unwrap()),
    ("dest_force_file", ByCompress("/out"), "{folder}/out", |place| std::fs::write(place.folder.join("out"), "mine").unwrap()),
    ("dest_force_model", ByCompress("/model"), "{folder}/model", |_| {}),
    ("dest_force_inside_model", ByCompress("/model/sub"), "{folder}/model/sub", |_| {}),
    ("dest_force_around_model", ByCompress("the destination"), "{folder}", |_| {}),
    ("dest_force_link_to_model", ByCompress("/out"), "{folder}/out", |place| link(place, "model", "out")),
    ("dest_force_link_to_folder", ByCompress("/out"), "{folder}/out", |place| {
        std::fs::create_dir(place.folder.join("other")).unwrap();
        link(place, "other", "out");
    }),
    ("dest_force_dangling", ByCompress("/out"), "{folder}/out", |place| link(place, "nowhere", "out")),
];

/// Options that name what is not there, or is none.
const OPTIONS: &[(&str, Expect, &[&str])] = &[
    ("option_eval_text_missing", ByCompress("/none.txt"), &["--eval-text", "{folder}/none.txt"]),
    ("option_eval_text_folder", ByCompress("/model"), &["--eval-text", "{folder}/model"]),
    ("option_eval_text_pipe", ByCompress("/pipe"), &["--eval-text", "{folder}/pipe"]),
    ("option_eval_text_binary", ByCompress("model.safetensors"), &["--eval-text", "{folder}/model/model.safetensors"]),
    ("option_eval_text_dev_zero", ByCompress("/dev/zero"), &["--eval-text", "/dev/zero"]),
    ("option_sensitivity_pipe", ByCompress("/pipe"), &["--target-sparsity", "0.4", "--sensitivity", "{folder}/pipe"]),
    ("option_skip_no_pattern", ByCompress("["), &["--skip", "["]),
    ("option_skip_escape", ByCompress("[2J"), &["--skip", "\u{1b}[2J"]),
    ("option_keep_nonsense", ByCompress("--keep"), &["--keep", "\u{1b}[2J=x"]),
    ("option_threads_zero", ByCompress("--threads"), &["--threads", "0"]),
    ("option_unknown_escape", ByCompress("unexpected argument"), &["--\u{1b}[2J"]),
    ("option_memory_little", ByCompress("--memory"), &["--memory", "1MB"]),
    ("option_memory_nonsense", ByCompress("much"), &["--memory", "much"]),
];

fn link(place: &Place, target: &str, name: &str) {
    std::os::unix::fs::symlink(target, place.folder.join(name)).unwrap();
}

pub fn variants() -> impl Iterator<Item = Variant> {
    let destinations =
        DESTINATIONS.iter().map(|&(name, expect, output, change)| Variant { output: output.into(), ..Variant::new(name, expect, change) });
    let long = LONG.iter().map(|&(name, bytes)| Variant {
        output: format!("{{folder}}/{}", "n".repeat(bytes)),
        ..Variant::new(name, ByCompress("nnn"), |_| {})
    });
    let forced = FORCED.iter().map(|&(name, expect, output, change)| Variant {
        output: output.into(),
        compress: &["--force"],
        ..Variant::new(name, expect, change)
    });
    let options = OPTIONS.iter().map(|&(name, expect, compress)| {
        let change = |place: &Place| super::place::pipe(&place.folder.join("pipe"));
        Variant { compress, ..Variant::new(name, expect, change) }
    });
    let name = format!("{{folder}}/{}", "n".repeat(255));
    let longest = std::iter::once(Variant { output: name, ..Variant::new("dest_name_255_bytes", Accepted, |_| {}) });
    let kept = std::iter::once(Variant {
        check: &["--reference", "{folder}/model", "--seq", "32", "--max-tokens", "512", "--save-reference", "{folder}/kept"],
        ..Variant::new("option_save_reference_pipe", Either, |place| super::place::pipe(&place.folder.join("kept")))
    });
    destinations.chain(long).chain(longest).chain(kept).chain(forced).chain(options)
}
