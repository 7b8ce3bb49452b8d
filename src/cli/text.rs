//! Standard output and standard error: a closed pipe is no failure, a table is aligned.

use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// Set when standard output takes no more; the work goes on, because somebody may wait for its result on disk.
static GONE: AtomicBool = AtomicBool::new(false);
/// Set when that was no closed pipe.
static LOST: AtomicBool = AtomicBool::new(false);

/// Prints a line; nothing more once the reader has gone.
pub fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    if GONE.load(Ordering::Relaxed) {
        return;
    }
    if let Err(error) = writeln!(out, "{line}").and_then(|()| out.flush()) {
        GONE.store(true, Ordering::Relaxed);
        LOST.store(error.kind() != ErrorKind::BrokenPipe, Ordering::Relaxed);
    }
}

/// Whether something that should have been printed was lost, other than by a reader that went away.
pub fn lost() -> bool {
    LOST.load(Ordering::Relaxed)
}

/// Prints a line on standard error.
pub fn complain(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Prints an object as JSON.
pub fn say_json(value: &impl serde::Serialize) {
    match crate::storage::json(value) {
        Ok(text) => say(text.trim_end()),
        Err(error) => complain(&format!("error: {error}")),
    }
}

/// Whether a person watches.
pub fn is_terminal() -> bool {
    std::io::stdout().is_terminal() && std::io::stderr().is_terminal()
}

/// Rows with aligned columns; the first column is left-aligned, the others right-aligned.
pub fn table(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, &width))| if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_string()
    };
    rows.iter().map(line).collect()
}

/// The name of a layer without what all layers of a model begin with.
pub fn layer(name: &str, width: usize) -> String {
    short(name.find("layers.").map_or(name, |start| &name[start..]), width)
}

/// A name that may be shown, cut in its middle to `width` characters.
pub fn short(name: &str, width: usize) -> String {
    let shown: Vec<char> = crate::error::shown(name).chars().collect();
    if shown.len() <= width {
        return shown.into_iter().collect();
    }
    let (front, back) = ((width - 1) / 2, width - 1 - (width - 1) / 2);
    shown[..front].iter().chain(&['…']).chain(&shown[shown.len() - back..]).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn long_names_keep_their_ends() {
        assert_eq!(super::short("model.layers.11.down_proj", 11), "model…_proj");
        assert_eq!(super::short("short", 11), "short");
    }

    #[test]
    fn tables_are_aligned() {
        let rows = [vec!["a".into(), "10".into()], vec!["long".into(), "7".into(), "x".into()]];
        assert_eq!(super::table(&rows), ["a     10", "long   7  x"]);
    }
}
