//! One error type. A message is one line: file, tensor, what is wrong with both numbers, and the way out.
//! Whose fault it is decides the exit code.

use std::path::Path;

/// Whose fault an error is; decides the exit code of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Input, output, memory or device failed while running: exit 1.
    Run,
    /// No room is left on a disk: exit 1.
    Full,
    /// An input is no longer what it was when it was opened, so that all work on it is void: exit 1.
    Changed,
    /// The command line or an input file is wrong or unsupported: exit 2.
    Input,
    /// Unfinished work of an earlier run is not as it was written: exit 1.
    Damaged,
    /// A quality gate was measured and is not met: exit 3.
    Gate,
    /// A quality gate cannot be decided with the tokens measured: exit 4.
    Inconclusive,
    /// The output that was written does not read back as intended: exit 5.
    Verification,
    /// A signal asked to stop; holds the signal number: exit 128 + number.
    Interrupted(u8),
}

/// An error: a fault and one line that names the place, the numbers and the way out.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Whose fault it is.
    pub fault: Fault,
    message: String,
}

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A wrong or unsupported input, or wrong usage.
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(Fault::Input, message)
    }

    /// A failure while running.
    pub fn run(message: impl Into<String>) -> Self {
        Self::new(Fault::Run, message)
    }

    /// A disk without room.
    pub fn full(message: impl Into<String>) -> Self {
        Self::new(Fault::Full, message)
    }

    /// Work of an earlier run that is not as it was written.
    pub fn damaged(what: impl std::fmt::Display) -> Self {
        Self::new(Fault::Damaged, format!("{what}; start over with --restart"))
    }

    /// Any fault with its message.
    pub fn new(fault: Fault, message: impl Into<String>) -> Self {
        Self { fault, message: one_line(&message.into()) }
    }

    /// A failed operating-system call on a file while running.
    pub fn io(path: &Path, source: &std::io::Error) -> Self {
        Self::run(format!("{}: {source}", shown_path(path)))
    }

    /// An input file that cannot be read.
    pub fn unreadable(path: &Path, source: &std::io::Error) -> Self {
        Self::input(format!("{}: {source}", shown_path(path)))
    }

    /// Puts the tensor's name in front.
    #[must_use]
    pub fn tensor(self, name: &str) -> Self {
        self.behind(&format!("tensor {}: ", shown(name)))
    }

    /// Puts the file's path in front.
    #[must_use]
    pub fn file(self, path: &Path) -> Self {
        self.behind(&format!("{}: ", shown_path(path)))
    }

    /// Puts a place in front, unless it stands there already.
    fn behind(self, place: &str) -> Self {
        if self.message.starts_with(place) { self } else { Self { message: format!("{place}{}", self.message), ..self } }
    }

    /// Adds what is to be done.
    #[must_use]
    pub fn advice(self, advice: &str) -> Self {
        Self { fault: self.fault, message: format!("{}; {advice}", self.message) }
    }

    /// The exit code of the program for this error.
    pub fn exit_code(&self) -> u8 {
        match self.fault {
            Fault::Run | Fault::Full | Fault::Changed | Fault::Damaged => 1,
            Fault::Input => 2,
            Fault::Gate => 3,
            Fault::Inconclusive => 4,
            Fault::Verification => 5,
            Fault::Interrupted(signal) => 128 + signal,
        }
    }
}

/// A name from an untrusted file, escaped and cut so that it can neither flood nor control a terminal.
pub fn shown(name: &str) -> String {
    const LONGEST: usize = 200;
    let mut out = String::new();
    for c in name.chars().take(LONGEST) {
        if matches!(c, '"' | '\'') { out.push(c) } else { out.extend(c.escape_debug()) }
    }
    if name.chars().nth(LONGEST).is_some() {
        out.push('…');
    }
    out
}

/// A path as it may be shown on a terminal.
pub fn shown_path(path: &Path) -> String {
    tamed(&path.to_string_lossy()).replace('\n', "\\n")
}

/// Whether a character controls a terminal or the direction of text.
pub fn controls(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A text whose characters that control something, ends of lines aside, are written out.
pub fn tamed(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if controls(c) && c != '\n' { out.extend(c.escape_debug()) } else { out.push(c) }
    }
    out
}

/// One line of bounded length without anything that controls a terminal.
fn one_line(message: &str) -> String {
    const LONGEST: usize = 800;
    let joined = message.split(['\n', '\r']).map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ");
    let mut out = String::new();
    for c in joined.chars().take(LONGEST) {
        if controls(c) {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    if joined.chars().nth(LONGEST).is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_that_names_file_and_tensor() {
        let error = Error::input("found 3\nneeded 4").tensor("a\u{1b}[31m").file(Path::new("x/y.safetensors"));
        assert_eq!(error.to_string(), "x/y.safetensors: tensor a\\u{1b}[31m: found 3; needed 4");
        assert_eq!(error.exit_code(), 2);
        assert_eq!(Error::input("bad").tensor("a").tensor("a").to_string(), "tensor a: bad");
        assert_eq!(Error::new(Fault::Interrupted(15), "").exit_code(), 143);
    }

    #[test]
    fn nothing_in_a_message_controls_a_terminal_or_floods_it() {
        let error = Error::input(format!("a\u{1b}[2Jb\u{202e}c\u{9b}{}", "x".repeat(5000))).to_string();
        assert!(error.starts_with("a\\u{1b}[2Jb\\u{202e}c\\u{9b}xxx") && error.chars().count() < 900);
    }

    #[test]
    fn long_names_are_cut() {
        assert_eq!(shown(&"n".repeat(5000)).chars().count(), 201);
    }
}
