//! The journal of an output in the making: one line per commit, `blake3 JSON`, where the hash is over that of the line before
//! and the JSON. What a line names is done and on the disk; what no line names is not there. Lines, rather than records with a
//! length, because a person may want to read them, and because a damaged length must not hide what follows it.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::as_conversions
    )
)]

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::checkpoint::header::wide;
use crate::error::{Error, Result};
use crate::report::{BlockReport, LayerReport};
use crate::storage::{Opened, Store};

/// What was done since the record before.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Tensors and layers of the model that every export holds completely.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub done: Vec<String>,
    /// Tensors of the output that are complete.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<Hashed>,
    /// Reports of layers, in the order of the plan.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayerReport>,
    /// The block that is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<BlockReport>,
    /// Files that lie beside the output for those who go on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<Kept>,
    /// blake3 of the manifest of the complete output; only its place is missing then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<String>,
}

/// A tensor of the output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hashed {
    /// Number of the export.
    pub export: usize,
    /// Its name.
    pub tensor: String,
    /// blake3 of its bytes.
    pub blake3: String,
}

/// A file that is kept beside the output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// blake3 of its bytes, in the way of who wrote it.
    pub blake3: String,
}

/// The journal, open for more.
#[derive(Debug)]
pub struct Journal {
    storage: Arc<dyn Store>,
    file: Opened,
    at: u64,
    chain: String,
}

/// What stands in a journal.
#[derive(Debug, Default)]
pub struct Read {
    /// The records, in order.
    pub records: Vec<Record>,
    /// Bytes of them; more are a record whose writing was cut off.
    pub bytes: u64,
    chain: String,
}

/// Reads a journal. A last line that is not whole or not sound was being written when all ended, and does not count.
///
/// # Errors
/// When a line before the last is not as it was written.
pub fn read(bytes: &[u8]) -> Result<Read, String> {
    let mut read = Read::default();
    let mut rest = bytes;
    while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
        let (line, after) = rest.split_at(end);
        let after = after.get(1..).unwrap_or_default();
        match record(line, &read.chain) {
            Some((record, hash)) => {
                read.records.push(record);
                read.chain = hash;
                read.bytes = read.bytes.saturating_add(wide(line.len())).saturating_add(1);
                rest = after;
            }
            None if after.is_empty() => break,
            None => return Err(format!("line {} is not as it was written", read.records.len().saturating_add(1))),
        }
    }
    Ok(read)
}

/// A record and its hash.
fn record(line: &[u8], chain: &str) -> Option<(Record, String)> {
    let (hash, json) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    if hash != chained(chain, json) {
        return None;
    }
    Some((serde_json::from_str(json).ok()?, hash.to_owned()))
}

fn chained(chain: &str, json: &str) -> String {
    blake3::Hasher::new().update(chain.as_bytes()).update(json.as_bytes()).finalize().to_hex().to_string()
}

impl Journal {
    /// A journal that goes on after what was read.
    pub fn after(storage: Arc<dyn Store>, file: Opened, read: &Read) -> Self {
        Self { storage, file, at: read.bytes, chain: read.chain.clone() }
    }

    /// Adds a record and waits until it is on the disk. All that it names must be there before.
    ///
    /// # Errors
    /// When the disk refuses; the record then does not count.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let json = serde_json::to_string(record).map_err(|error| Error::run(error.to_string()))?;
        let hash = chained(&self.chain, &json);
        let line = format!("{hash} {json}\n");
        self.storage.write_at(&self.file, line.as_bytes(), self.at)?;
        self.storage.sync(&self.file)?;
        self.at = self.at.saturating_add(wide(line.len()));
        self.chain = hash;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Disk;

    fn written() -> (Vec<Record>, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let storage: Arc<dyn Store> = Arc::new(Disk);
        let file = storage.create(&path, 0).unwrap();
        let mut journal = Journal::after(storage, file, &Read::default());
        let hashed = |tensor: &str| Hashed { export: 1, tensor: tensor.into(), blake3: "00".into() };
        let records = vec![
            Record { done: vec!["a\nb".into()], tensors: vec![hashed("x"), hashed("y")], ..Record::default() },
            Record { files: vec![Kept { name: "states".into(), bytes: 7, blake3: "11".into() }], ..Record::default() },
            Record { finished: Some("22".into()), ..Record::default() },
        ];
        records.iter().for_each(|record| journal.append(record).unwrap());
        (records, std::fs::read(path).unwrap())
    }

    #[test]
    fn records_come_back_and_a_last_line_that_was_cut_off_does_not_count() {
        let (records, bytes) = written();
        assert_eq!(read(&bytes).unwrap().records, records);
        let lines: Vec<usize> = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1).collect();
        for cut in 0..bytes.len() {
            let whole = lines.iter().filter(|&&end| end <= cut).count();
            let read = read(&bytes[..cut]).unwrap();
            assert_eq!((read.records.len(), read.bytes), (whole, lines[..whole].last().map_or(0, |&end| end as u64)));
        }
        let zeros = [&bytes[..], &[0; 100]].concat();
        assert_eq!(read(&zeros).unwrap().records, records, "a length that reached the disk before its bytes");
    }

    #[test]
    fn every_bit_that_flips_costs_at_least_its_record_and_never_changes_one() {
        let (records, bytes) = written();
        for bit in 0..8 * bytes.len() {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(read) = read(&flipped) {
                assert!(read.records.len() < records.len() && read.records == records[..read.records.len()], "bit {bit}");
            }
        }
    }
}
