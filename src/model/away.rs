//! Weights of experts that lie in an unnamed temporary file while nobody works on them: for blocks that alone are larger than memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::model::block::Slot;
use crate::weight::Weight;

/// The weights of some layers of a block.
#[derive(Debug)]
pub struct Away {
    file: File,
    shelves: Mutex<Shelves>,
}

#[derive(Debug, Default)]
struct Shelves {
    end: u64,
    by_slot: BTreeMap<Slot, Shelf>,
}

/// Where a weight lies.
#[derive(Debug, Clone)]
struct Shelf {
    /// The weight without its numbers.
    empty: Weight,
    /// How many numbers its lists have.
    counts: Vec<usize>,
    start: u64,
    bytes: u64,
}

impl Away {
    /// Nothing yet, in a file below `scratch`.
    ///
    /// # Errors
    /// When the temporary file cannot be made.
    pub fn new(scratch: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(scratch).map_err(|error| Error::io(scratch, &error))?;
        Ok(Self { file, shelves: Mutex::default() })
    }

    /// Puts the weight of a layer away, in the place of the one before where it is as large.
    ///
    /// # Errors
    /// When the temporary file cannot be written.
    pub fn put(&self, slot: Slot, mut weight: Weight) -> Result<()> {
        let bytes = weight.bulks().iter().map(|bulk| bulk.bytes().len() as u64).sum();
        let start = {
            let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
            match shelves.by_slot.get(&slot).filter(|shelf| bytes <= shelf.bytes) {
                Some(shelf) => shelf.start,
                None => {
                    shelves.end += bytes;
                    shelves.end - bytes
                }
            }
        };
        let (mut at, mut counts) = (start, Vec::new());
        for bulk in weight.bulks() {
            self.file.write_all_at(bulk.bytes(), at).map_err(|error| failed(&error))?;
            at += bulk.bytes().len() as u64;
            counts.push(bulk.empty());
        }
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        shelves.by_slot.insert(slot, Shelf { empty: weight, counts, start, bytes });
        Ok(())
    }

    /// The weight of a layer, where it was put away.
    ///
    /// # Errors
    /// When the temporary file cannot be read.
    pub fn get(&self, slot: Slot) -> Result<Option<Weight>> {
        let shelf = self.shelves.lock().unwrap_or_else(PoisonError::into_inner).by_slot.get(&slot).cloned();
        let Some(Shelf { empty: mut weight, counts, start: mut at, .. }) = shelf else { return Ok(None) };
        for (bulk, count) in weight.bulks().into_iter().zip(counts) {
            let room = bulk.room(count);
            self.file.read_exact_at(room, at).map_err(|error| failed(&error))?;
            at += room.len() as u64;
        }
        Ok(Some(weight))
    }
}

fn failed(error: &std::io::Error) -> Error {
    Error::run(format!("weights that memory has no room for could not be kept in a temporary file: {error}; TMPDIR says where it lies"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::Matrix;
    use crate::model::block::Role;
    use crate::model::mixture::Which;
    use crate::weight::{Float, Ints, Pattern, Sparse, Split, SuperBlocks, SuperKind, Trits};

    #[test]
    fn every_representation_comes_back_as_it_went() {
        let matrix = Matrix::from_fn(3, 8, |row, column| (row * 8 + column) as f32 * 0.37 - 2.0);
        let numbers = |count: usize| (0..count).map(|number| number as u8).collect::<Vec<u8>>();
        let ints = Ints {
            rows: 3,
            columns: 8,
            bits: 4,
            group: 4,
            codes: numbers(24),
            scales: vec![0.5, 0.25, 1.0, -1.0, 3.0, 0.1],
            scale_float: Float::BF16,
            zeros: None,
        };
        let all = [
            Weight::Sparse(Sparse { matrix: matrix.clone(), pattern: Pattern::Blocks { kept: 2, of: 4 } }),
            Weight::Dense(matrix),
            Weight::Ints(Ints { zeros: Some(numbers(6)), ..ints.clone() }),
            Weight::Ints(ints),
            Weight::Trits(Trits {
                rows: 3,
                columns: 8,
                group: 8,
                codes: numbers(24),
                scales: vec![[1.0, 0.5]; 3],
                scale_float: Float::F16,
            }),
            Weight::Split(Split {
                rows: 3,
                columns: 8,
                bits: 3,
                group: 8,
                outliers: 7,
                codes: numbers(24),
                scales: vec![[0.5, 2.0]; 3],
                mask: vec![1, 0, 129],
            }),
            Weight::Super(SuperBlocks {
                rows: 1,
                columns: 256,
                kind: SuperKind::Q4K,
                codes: vec![9; 256],
                floats: vec![[0.5, -0.5]],
                wholes: (0..8).map(|whole| [whole, -whole]).collect(),
            }),
        ];
        let folder = tempfile::tempdir().unwrap();
        let away = Away::new(folder.path()).unwrap();
        let slot = |expert| Slot::of(Which::Routed(expert), Role::Up);
        // Twice, so that what is put later lies over what was put before.
        for turn in 0..2 {
            for (expert, weight) in all.iter().enumerate() {
                away.put(slot((expert + turn) % all.len()), weight.clone()).unwrap();
            }
            for (expert, weight) in all.iter().enumerate() {
                assert_eq!(away.get(slot((expert + turn) % all.len())).unwrap().as_ref(), Some(weight));
            }
        }
        assert!(away.get(Slot::of(Which::Shared, Role::Up)).unwrap().is_none());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
