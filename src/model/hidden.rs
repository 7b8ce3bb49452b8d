//! The hidden states of all windows between two blocks. They lie in memory while they fit a budget and in an unnamed
//! temporary file when they do not; nobody else has to know.
//!
//! They are kept in f32: the same store carries perplexity runs, whose figures are compared to the fifth digit, and a
//! file costs little beside the forward that fills it.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rayon::prelude::*;

use crate::checkpoint::decode::{decode_chunk, encode};
use crate::error::{Error, Result};
use crate::weight::Float;

/// Bytes of hidden states that may lie in memory.
pub const BUDGET_BYTES: u64 = 96 << 20;

/// Hidden states of windows of given lengths, `length × width` floats each.
#[derive(Debug)]
pub struct Hidden {
    width: usize,
    starts: Vec<usize>,
    place: Store,
}

#[derive(Debug)]
enum Store {
    Memory(Vec<f32>),
    Disk(File),
}

impl Hidden {
    /// A store for windows of `lengths` tokens; on disk when it is larger than `budget_bytes`.
    ///
    /// # Errors
    /// When the temporary file cannot be made.
    pub fn new(lengths: &[usize], width: usize, budget_bytes: u64, scratch: &Path) -> Result<Self> {
        let mut starts = vec![0];
        for length in lengths {
            starts.push(starts[starts.len() - 1] + length * width);
        }
        let total = starts[starts.len() - 1];
        let place = if 4 * total as u64 <= budget_bytes {
            Store::Memory(vec![0.0; total])
        } else {
            let file = tempfile::tempfile_in(scratch).map_err(|error| Error::io(scratch, &error))?;
            let bytes = 4 * total as u64;
            match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
                Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Store::Disk(file),
                Err(error) => return Err(spill_error(&error.into()).file(scratch)),
            }
        };
        Ok(Self { width, starts, place })
    }

    /// A store with the same states.
    ///
    /// # Errors
    /// When the temporary file cannot be made or read.
    pub fn copy(&self, budget_bytes: u64, scratch: &Path) -> Result<Self> {
        let lengths: Vec<usize> = (0..self.len()).map(|window| self.tokens(window)).collect();
        let mut copy = Self::new(&lengths, self.width, budget_bytes, scratch)?;
        for window in 0..self.len() {
            copy.write(window..window + 1, &self.read(window..window + 1)?)?;
        }
        Ok(copy)
    }

    /// Number of windows.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Whether there is no window.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of a window.
    pub fn tokens(&self, window: usize) -> usize {
        (self.starts[window + 1] - self.starts[window]) / self.width.max(1)
    }

    /// Whether the states lie on disk.
    pub fn spilled(&self) -> bool {
        matches!(self.place, Store::Disk(_))
    }

    /// The states of consecutive windows, one after the other.
    ///
    /// # Errors
    /// When the temporary file cannot be read.
    pub fn read(&self, windows: Range<usize>) -> Result<Vec<f32>> {
        let (start, end) = (self.starts[windows.start], self.starts[windows.end]);
        match &self.place {
            Store::Memory(values) => Ok(values[start..end].to_vec()),
            Store::Disk(file) => {
                let mut bytes = vec![0; (end - start) * 4];
                file.read_exact_at(&mut bytes, start as u64 * 4).map_err(|error| spill_error(&error))?;
                let mut values = vec![0.0; end - start];
                decode_chunk(Float::F32, &bytes, &mut values);
                Ok(values)
            }
        }
    }

    /// Replaces the states of consecutive windows.
    ///
    /// # Errors
    /// When the temporary file cannot be written.
    ///
    /// # Panics
    /// When the number of values is not that of the windows.
    pub fn write(&mut self, windows: Range<usize>, values: &[f32]) -> Result<()> {
        let (start, end) = (self.starts[windows.start], self.starts[windows.end]);
        assert_eq!(values.len(), end - start, "states of windows {windows:?}");
        match &mut self.place {
            Store::Memory(all) => all[start..end].copy_from_slice(values),
            Store::Disk(file) => {
                let bytes = encode(Float::F32, values);
                file.write_all_at(&bytes, start as u64 * 4).map_err(|error| spill_error(&error))?;
            }
        }
        Ok(())
    }

    /// Cuts the windows into runs of equal length that hold at most `tokens` tokens, or one window each. The cut does
    /// not depend on the number of threads.
    pub fn runs(&self, tokens: usize) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for window in 0..self.len() {
            match runs.last_mut() {
                Some(run) if self.tokens(run.start) == self.tokens(window) && (run.len() + 1) * self.tokens(window) <= tokens => {
                    run.end += 1;
                }
                _ => runs.push(window..window + 1),
            }
        }
        runs
    }

    /// Works on runs of windows in parallel and gives the results in order.
    ///
    /// # Errors
    /// The first error of a read or of the work.
    pub fn map<R: Send>(&self, runs: &[Range<usize>], work: impl Fn(Range<usize>, Vec<f32>) -> Result<R> + Sync) -> Result<Vec<R>> {
        runs.par_iter().map(|run| work(run.clone(), self.read(run.clone())?)).collect()
    }
}

fn spill_error(error: &std::io::Error) -> Error {
    Error::run(format!("hidden states on disk: {error}; set TMPDIR to a file system with more room, or use fewer --samples"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_disk_hold_the_same_states() {
        for budget in [u64::MAX, 0] {
            let mut hidden = Hidden::new(&[3, 1, 2], 5, budget, Path::new(".")).unwrap();
            assert_eq!(hidden.spilled(), budget == 0);
            for window in [2, 0, 1] {
                let values: Vec<f32> = (0..hidden.tokens(window) * 5).map(|i| (i + 100 * window) as f32).collect();
                hidden.write(window..window + 1, &values).unwrap();
            }
            let sums = hidden.map(&[0..1, 1..3], |_, values| Ok(values.iter().sum::<f32>())).unwrap();
            assert_eq!(sums, [105.0, 2555.0]);
        }
    }

    #[test]
    fn runs_hold_windows_of_one_length_up_to_a_number_of_tokens() {
        let hidden = Hidden::new(&[4, 4, 4, 2, 2, 9], 1, u64::MAX, Path::new(".")).unwrap();
        assert_eq!(hidden.runs(8), [0..2, 2..3, 3..5, 5..6]);
        assert_eq!(hidden.runs(0).len(), 6);
    }
}
