//! Which tokens a text may begin with that a model is to write: pieces of words in the scripts that it surely knows.
//! That approximates the language filter of methods-quant §2.4 without a detector of languages.

use regex::{Regex, RegexSet};

use crate::calibrate::tokens::Tokenizer;
use crate::error::{Error, Result};

/// Scripts that are told apart. The first two are always taken, of the others only the one that most pieces have.
const SCRIPTS: &[&str] = &[
    "Latin",
    "Han",
    "Arabic",
    "Armenian",
    "Bengali",
    "Cyrillic",
    "Devanagari",
    "Ethiopic",
    "Georgian",
    "Greek",
    "Gujarati",
    "Gurmukhi",
    "Hangul",
    "Hebrew",
    "Hiragana",
    "Kannada",
    "Katakana",
    "Khmer",
    "Lao",
    "Malayalam",
    "Myanmar",
    "Sinhala",
    "Tamil",
    "Telugu",
    "Thai",
    "Tibetan",
];

/// Tokens below `limit` that a text may begin with, in order: pieces of letters of one script; where the tokenizer has
/// none, every piece with something to see; special, added and byte tokens never.
///
/// # Errors
/// When the tokenizer's library fails or there is no token at all.
pub fn starts(tokenizer: &Tokenizer, limit: usize) -> Result<Vec<u32>> {
    let pieces = tokenizer.pieces(limit)?;
    let chosen = choose(pieces.iter().map(|(token, text)| (*token, text.trim())))?;
    if chosen.is_empty() {
        return Err(Error::input("calibration: the tokenizer has no token that a text could begin with; give text with --calibration"));
    }
    Ok(chosen)
}

fn choose<'a>(pieces: impl Iterator<Item = (u32, &'a str)> + Clone) -> Result<Vec<u32>> {
    let failed = |error: regex::Error| Error::run(format!("scripts: {error}"));
    // Marks, such as vowel signs, belong to many scripts at once.
    let word = |script: &&str| format!(r"^\p{{{script}}}[\p{{{script}}}\p{{M}}]*$");
    let scripts = RegexSet::new(SCRIPTS.iter().map(word)).map_err(failed)?;
    let seen = Regex::new(r"^[^\p{C}\p{Z}\u{FFFD}]+$").map_err(failed)?;
    let mut members: Vec<Vec<u32>> = vec![Vec::new(); SCRIPTS.len()];
    for (token, text) in pieces.clone() {
        if let Some(script) = scripts.matches(text).into_iter().next() {
            members[script].push(token);
        }
    }
    let most = (0..members.len()).rev().max_by_key(|&script| members[script].len()).unwrap_or(0);
    let taken = members.into_iter().enumerate().filter(|(script, _)| *script < 2 || *script == most);
    let mut chosen: Vec<u32> = taken.flat_map(|(_, tokens)| tokens).collect();
    if chosen.is_empty() {
        chosen = pieces.filter(|(_, text)| seen.is_match(text)).map(|(token, _)| token).collect();
    }
    chosen.sort_unstable();
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(pieces: &[&str]) -> Vec<u32> {
        choose(pieces.iter().enumerate().map(|(token, text)| (token as u32, text.trim()))).unwrap()
    }

    #[test]
    fn words_of_latin_han_and_the_most_frequent_script_begin_a_text() {
        let pieces = ["the", " über", "世界", "да", "нет", "как", "γε", "1", "a1", "", " ", "\u{fffd}", "a\u{fffd}", "!?", "don't", "аb"];
        assert_eq!(chosen(&pieces), [0, 1, 2, 3, 4, 5]);
        assert_eq!(chosen(&["हिन्दी", "बात", "a", "да"]), [0, 1, 2], "marks belong to the word");
        assert_eq!(chosen(&["1", "", "+", "\u{fffd}", "\n"]), [0, 2], "without words, whatever can be seen");
        assert!(chosen(&["", "\u{fffd}"]).is_empty());
    }

    #[test]
    fn the_built_in_model_begins_with_words_and_never_with_special_or_byte_tokens() {
        let folder = tempfile::tempdir().unwrap();
        crate::embedded::write(folder.path()).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let starts = starts(&tokenizer, 512).unwrap();
        assert!(starts.len() > 200 && starts[0] > 1, "{starts:?}");
        let pieces = tokenizer.pieces(512).unwrap();
        for (token, text) in pieces.iter().filter(|(token, _)| starts.contains(token)) {
            assert!(text.trim().chars().all(char::is_alphabetic), "{token}: {text}");
        }
    }
}
