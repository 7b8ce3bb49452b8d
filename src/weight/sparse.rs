//! A weight with entries fixed at zero, and the patterns the zeros follow.

use crate::matrix::Matrix;

/// Floats of which pruned entries are exactly zero.
#[derive(Debug, Clone, PartialEq)]
pub struct Sparse {
    /// The weight, pruned entries zero.
    pub matrix: Matrix,
    /// The pattern that the zeros follow.
    pub pattern: Pattern,
}

/// Where zeros may lie. `N:M` keeps N of every M consecutive columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Pattern {
    /// Anywhere in a row.
    #[default]
    Unstructured,
    /// `kept` of every `of` consecutive columns stay.
    Blocks {
        /// Entries that stay in a block.
        kept: usize,
        /// Columns in a block.
        of: usize,
    },
}

impl std::str::FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unstructured" {
            return Ok(Self::Unstructured);
        }
        let blocks = text.split_once(':').and_then(|(kept, of)| Some((kept.parse().ok()?, of.parse().ok()?)));
        match blocks {
            Some((kept, of)) if 0 < kept && kept < of && of <= 1024 => Ok(Self::Blocks { kept, of }),
            Some((kept, of)) => {
                Err(format!("pattern {kept}:{of} keeps {kept} of {of}; it must keep at least 1 and fewer than M <= 1024, like 2:4"))
            }
            None => Err(format!("unknown pattern `{text}`; use \"unstructured\" or \"N:M\" (N kept of every M), like \"2:4\"")),
        }
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unstructured => write!(f, "unstructured"),
            Self::Blocks { kept, of } => write!(f, "{kept}:{of}"),
        }
    }
}

impl<'de> serde::Deserialize<'de> for Pattern {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl serde::Serialize for Pattern {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_read_as_they_print_and_nonsense_is_refused() {
        for text in ["unstructured", "2:4", "1:4", "3:4", "4:8"] {
            assert_eq!(text.parse::<Pattern>().unwrap().to_string(), text);
        }
        for text in ["4:2", "0:4", "4:4", "2;4", "", "-1:4", "2:4:8"] {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
    }
}
