//! The text that the program carries: written for this project, released under CC0, described in
//! `calibration/manifest.toml`. Evaluation text shares no sentence with calibration text.

/// Version of the built-in text; part of the recipe of a run.
pub const VERSION: &str = "builtin:mix@1";

/// Separates documents in the text files.
const SEPARATOR: &str = "\n%%\n";

/// One file of built-in text: its name and its content.
pub type File = (&'static str, &'static str);

/// Text for calibration.
pub const CALIBRATION: &[File] = &[
    ("prose.txt", include_str!("../../calibration/text/prose.txt")),
    ("chat.jsonl", include_str!("../../calibration/text/chat.jsonl")),
    ("code.txt", include_str!("../../calibration/text/code.txt")),
    ("mathematics.txt", include_str!("../../calibration/text/mathematics.txt")),
    ("tables.txt", include_str!("../../calibration/text/tables.txt")),
    ("languages.txt", include_str!("../../calibration/text/languages.txt")),
];

/// Text for evaluation.
pub const EVALUATION: &[File] = &[
    ("prose.txt", include_str!("../../calibration/evaluation/prose.txt")),
    ("chat.jsonl", include_str!("../../calibration/evaluation/chat.jsonl")),
    ("code.txt", include_str!("../../calibration/evaluation/code.txt")),
    ("mathematics.txt", include_str!("../../calibration/evaluation/mathematics.txt")),
    ("tables.txt", include_str!("../../calibration/evaluation/tables.txt")),
    ("languages.txt", include_str!("../../calibration/evaluation/languages.txt")),
];

/// The documents of a text file.
pub fn documents(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.trim_end_matches('\n').split(SEPARATOR)
}

/// blake3 over names and contents, in hexadecimal.
pub fn hash(files: &[File]) -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, text) in files {
        hasher.update(name.as_bytes()).update(&[0]).update(text.as_bytes()).update(&[0]);
    }
    hasher.finalize().to_hex().to_string()
}

/// One text for perplexity: the documents one after the other; chat as plain lines.
pub fn evaluation_text() -> String {
    let mut out = String::new();
    for (name, text) in EVALUATION {
        for document in documents_of(name, text) {
            out.push_str(&document);
            out.push_str("\n\n");
        }
    }
    out
}

fn documents_of(name: &str, text: &'static str) -> Vec<String> {
    if !name.ends_with(".jsonl") {
        return documents(text).map(str::to_string).collect();
    }
    let messages = |line: &str| serde_json::from_str(line).map(|line: serde_json::Value| super::chat::plain_chat(&line["messages"]));
    text.lines().filter_map(|line| messages(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_names_version_licence_size_and_hash_of_the_text() {
        let manifest: toml::Table = toml::from_str(include_str!("../../calibration/manifest.toml")).unwrap();
        assert_eq!(manifest["version"].as_str(), Some(VERSION));
        for (section, files) in [("calibration", CALIBRATION), ("evaluation", EVALUATION)] {
            let bytes: usize = files.iter().map(|(_, text)| text.len()).sum();
            assert_eq!(manifest[section]["bytes"].as_integer(), Some(bytes as i64), "{section}");
            assert_eq!(manifest[section]["blake3"].as_str(), Some(hash(files).as_str()), "{section}");
            assert_eq!(manifest[section]["licence"].as_str(), Some("CC0-1.0"), "{section}");
        }
        assert!(CALIBRATION.iter().map(|(_, text)| text.len()).sum::<usize>() >= 120_000);
    }

    #[test]
    fn no_sentence_of_the_evaluation_text_occurs_in_the_calibration_text() {
        let calibration: String = CALIBRATION.iter().map(|(_, text)| *text).collect();
        for (name, text) in EVALUATION {
            let sentences = text.split(['.', '!', '?', '\n', '。']).map(str::trim).filter(|sentence| sentence.chars().count() >= 40);
            for sentence in sentences {
                assert!(!calibration.contains(sentence), "{name}: {sentence}");
            }
        }
    }
}
