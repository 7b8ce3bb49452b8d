//! The hidden states of all windows between two blocks. They lie in memory while they fit a budget and in an unnamed
//! temporary file when they do not; nobody else has to know.
//!
//! What perplexity is computed from stays in f32, because its figures are compared to the fifth digit. Calibration
//! keeps up to six such stores, and there the states are halved once they outgrow the budget: f16 with a power of two
//! per token, so that a few huge channels, which trained models have, neither overflow nor cost the others their
//! digits. The relative error is at most 2⁻¹¹ down to 2⁻²⁸ of the token's largest state.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use half::f16;
use rayon::prelude::*;

use crate::checkpoint::decode::{decode_chunk, encode};
use crate::error::{Error, Result};
use crate::weight::Float;

/// Bytes of hidden states of one store that may lie in memory.
const BUDGET_BYTES: u64 = 96 << 20;

/// Bytes of the pieces in which states are saved; a multiple of the 4 of a float.
const PIECE_BYTES: u64 = 4 << 20;

/// How states are kept.
#[derive(Debug, Clone, Copy)]
pub struct Keeping {
    /// Bytes that may lie in memory.
    budget_bytes: u64,
    /// Whether states over the budget stay in f32.
    exact: bool,
}

impl Keeping {
    /// In f32 in any case.
    pub const EXACT: Self = Self { budget_bytes: BUDGET_BYTES, exact: true };
    /// In 16 bits once they are over the budget.
    pub const HALVED: Self = Self { budget_bytes: BUDGET_BYTES, exact: false };

    /// In f32 in any case, with as much memory as is left when `stores` of them share it.
    pub fn shared(stores: usize) -> Self {
        Self { budget_bytes: 4 * BUDGET_BYTES / stores.max(1) as u64, exact: true }
    }

    /// Bytes of a store of `tokens × width` states, wherever it lies.
    pub fn stored_bytes(self, tokens: u64, width: u64) -> u64 {
        let single = 4 * tokens * width;
        if self.exact || single <= self.budget_bytes { single } else { tokens * halved_bytes(width as usize) as u64 }
    }

    /// Bytes in memory of a store of `tokens × width` states.
    pub fn memory_bytes(self, tokens: u64, width: u64) -> u64 {
        (4 * tokens * width).min(self.budget_bytes)
    }
}

/// Hidden states of windows of given lengths, `length × width` floats each.
#[derive(Debug)]
pub struct Hidden {
    width: usize,
    /// First token of each window, and the number of all.
    starts: Vec<usize>,
    keeping: Keeping,
    place: Store,
}

#[derive(Debug)]
enum Store {
    /// Floats in memory.
    Memory(Vec<f32>),
    /// Tokens as [`halve`] writes them, in memory.
    Halved(Vec<u8>),
    /// Tokens in a file, in f32 or halved.
    Disk { file: File, halved: bool },
}

impl Hidden {
    /// A store for windows of `lengths` tokens; what `keeping` has no memory for lies in `scratch`.
    ///
    /// # Errors
    /// When the temporary file cannot be made.
    pub fn new(lengths: &[usize], width: usize, keeping: Keeping, scratch: &Path) -> Result<Self> {
        let mut starts = vec![0];
        for length in lengths {
            starts.push(starts[starts.len() - 1] + length);
        }
        let tokens = starts[starts.len() - 1];
        let (single, half) = ((4 * width * tokens) as u64, (halved_bytes(width) * tokens) as u64);
        let place = if single <= keeping.budget_bytes {
            Store::Memory(vec![0.0; tokens * width])
        } else if !keeping.exact && half <= keeping.budget_bytes {
            Store::Halved(vec![0; halved_bytes(width) * tokens])
        } else {
            let halved = !keeping.exact;
            let file = tempfile::tempfile_in(scratch).map_err(|error| Error::io(scratch, &error))?;
            match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, if halved { half } else { single }) {
                Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Store::Disk { file, halved },
                Err(error) => return Err(spill_error(&error.into()).file(scratch)),
            }
        };
        Ok(Self { width, starts, keeping, place })
    }

    /// An empty store for windows of the same lengths, kept the same way, of another width.
    ///
    /// # Errors
    /// When the temporary file cannot be made.
    pub fn like(&self, width: usize, scratch: &Path) -> Result<Self> {
        let lengths: Vec<usize> = (0..self.len()).map(|window| self.tokens(window)).collect();
        Self::new(&lengths, width, self.keeping, scratch)
    }

    /// Columns of a state.
    pub fn width(&self) -> usize {
        self.width
    }

    /// A store with the same states.
    ///
    /// # Errors
    /// When the temporary file cannot be made or read.
    pub fn copy(&self, scratch: &Path) -> Result<Self> {
        self.copy_as(self.keeping, scratch)
    }

    /// As [`Self::copy`], kept in another way.
    ///
    /// # Errors
    /// As [`Self::copy`].
    pub fn copy_as(&self, keeping: Keeping, scratch: &Path) -> Result<Self> {
        let lengths: Vec<usize> = (0..self.len()).map(|window| self.tokens(window)).collect();
        let mut copy = Self::new(&lengths, self.width, keeping, scratch)?;
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
        self.starts[window + 1] - self.starts[window]
    }

    /// Whether the states lie on disk.
    pub fn spilled(&self) -> bool {
        matches!(self.place, Store::Disk { .. })
    }

    /// The states of consecutive windows, one after the other.
    ///
    /// # Errors
    /// When the temporary file cannot be read.
    pub fn read(&self, windows: Range<usize>) -> Result<Vec<f32>> {
        let (start, end) = (self.starts[windows.start], self.starts[windows.end]);
        let mut values = vec![0.0; (end - start) * self.width];
        match &self.place {
            Store::Memory(all) => values.copy_from_slice(&all[start * self.width..end * self.width]),
            Store::Halved(all) => {
                let row = halved_bytes(self.width);
                restore(&all[start * row..end * row], self.width, &mut values);
            }
            Store::Disk { file, halved } => {
                let row = if *halved { halved_bytes(self.width) } else { 4 * self.width };
                let mut bytes = vec![0; (end - start) * row];
                file.read_exact_at(&mut bytes, (start * row) as u64).map_err(|error| spill_error(&error))?;
                if *halved { restore(&bytes, self.width, &mut values) } else { decode_chunk(Float::F32, &bytes, &mut values) }
            }
        }
        Ok(values)
    }

    /// The window of a token, counted over all windows.
    pub fn window_of(&self, token: usize) -> usize {
        self.starts.partition_point(|&start| start <= token).saturating_sub(1)
    }

    /// The states of some tokens, counted over all windows.
    ///
    /// # Errors
    /// When the temporary file cannot be read.
    pub fn rows(&self, tokens: &[usize]) -> Result<Vec<f32>> {
        let mut values = vec![0.0; tokens.len() * self.width];
        let row = match self.place {
            Store::Halved(_) | Store::Disk { halved: true, .. } => halved_bytes(self.width),
            _ => 4 * self.width,
        };
        let mut bytes = vec![0; if self.spilled() { row } else { 0 }];
        for (&token, out) in tokens.iter().zip(values.chunks_exact_mut(self.width.max(1))) {
            match &self.place {
                Store::Memory(all) => out.copy_from_slice(&all[token * self.width..][..self.width]),
                Store::Halved(all) => restore(&all[token * row..][..row], self.width, out),
                Store::Disk { file, halved } => {
                    file.read_exact_at(&mut bytes, (token * row) as u64).map_err(|error| spill_error(&error))?;
                    if *halved { restore(&bytes, self.width, out) } else { decode_chunk(Float::F32, &bytes, out) }
                }
            }
        }
        Ok(values)
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
        assert_eq!(values.len(), (end - start) * self.width, "states of windows {windows:?}");
        match &mut self.place {
            Store::Memory(all) => all[start * self.width..end * self.width].copy_from_slice(values),
            Store::Halved(all) => {
                let row = halved_bytes(self.width);
                all[start * row..end * row].copy_from_slice(&halve(values, self.width));
            }
            Store::Disk { file, halved } => {
                let bytes = if *halved { halve(values, self.width) } else { encode(Float::F32, values) };
                let row = if *halved { halved_bytes(self.width) } else { 4 * self.width };
                file.write_all_at(&bytes, (start * row) as u64).map_err(|error| spill_error(&error))?;
            }
        }
        Ok(())
    }

    /// Adds something to the states of some tokens, counted over all windows: `values`, one row per token, each times its share.
    ///
    /// # Errors
    /// When the temporary file cannot be read or written.
    pub fn add(&mut self, tokens: &[usize], shares: &[f32], values: &[f32]) -> Result<()> {
        let width = self.width.max(1);
        let more = |out: &mut [f32], share: f32, values: &[f32]| out.iter_mut().zip(values).for_each(|(out, value)| *out += share * value);
        let rows = tokens.iter().zip(shares).zip(values.chunks_exact(width));
        if let Store::Memory(all) = &mut self.place {
            rows.for_each(|((&token, &share), values)| more(&mut all[token * width..][..width], share, values));
            return Ok(());
        }
        for ((&token, &share), values) in rows {
            let mut row = self.rows(&[token])?;
            more(&mut row, share, values);
            let at = |bytes: &[u8]| token * bytes.len();
            match &mut self.place {
                Store::Memory(_) => {}
                Store::Halved(all) => {
                    let bytes = halve(&row, width);
                    all[at(&bytes)..][..bytes.len()].copy_from_slice(&bytes);
                }
                Store::Disk { file, halved } => {
                    let bytes = if *halved { halve(&row, width) } else { encode(Float::F32, &row) };
                    file.write_all_at(&bytes, at(&bytes) as u64).map_err(|error| spill_error(&error))?;
                }
            }
        }
        Ok(())
    }

    /// Gives the states as they are kept, in pieces with their offsets, to somebody who stores them; the pieces come in no
    /// order. Gives their length and blake3 of the hashes of all pieces.
    ///
    /// # Errors
    /// Of the temporary file or of who stores.
    pub fn save(&self, store: impl Fn(u64, &[u8]) -> Result<()> + Sync) -> Result<(u64, blake3::Hash)> {
        let bytes = self.bytes();
        let pieces: Vec<u64> = (0..bytes).step_by(PIECE_BYTES as usize).collect();
        let save = |&start: &u64| {
            let length = (bytes - start).min(PIECE_BYTES) as usize;
            let part = start as usize..start as usize + length;
            let keep = |piece: &[u8]| store(start, piece).map(|()| blake3::hash(piece));
            match &self.place {
                Store::Memory(all) => keep(&bytemuck::cast_slice::<f32, u8>(all)[part]),
                Store::Halved(all) => keep(&all[part]),
                Store::Disk { file, .. } => {
                    let mut piece = vec![0; length];
                    file.read_exact_at(&mut piece, start).map_err(|error| spill_error(&error))?;
                    keep(&piece)
                }
            }
        };
        let hashes = pieces.par_iter().map(save).collect::<Result<Vec<_>>>()?;
        Ok((bytes, hash_of_hashes(&hashes)))
    }

    /// Takes states that [`Self::save`] gave from a file. Gives what `save` gave.
    ///
    /// # Errors
    /// Of the temporary file, or when the file cannot be read or has another length.
    pub fn load(&mut self, from: &File, path: &Path) -> Result<(u64, blake3::Hash)> {
        let bytes = self.bytes();
        let fail = |error: std::io::Error| Error::io(path, &error);
        let found = from.metadata().map_err(fail)?.len();
        if found != bytes {
            return Err(Error::run(format!("has {found} bytes, {bytes} were written")).file(path));
        }
        let mut hashes = Vec::new();
        let mut piece = vec![0; bytes.min(PIECE_BYTES) as usize];
        for start in (0..bytes).step_by(PIECE_BYTES as usize) {
            let piece = &mut piece[..(bytes - start).min(PIECE_BYTES) as usize];
            from.read_exact_at(piece, start).map_err(fail)?;
            hashes.push(blake3::hash(piece));
            let part = start as usize..start as usize + piece.len();
            match &mut self.place {
                Store::Memory(all) => bytemuck::cast_slice_mut::<f32, u8>(all)[part].copy_from_slice(piece),
                Store::Halved(all) => all[part].copy_from_slice(piece),
                Store::Disk { file, .. } => file.write_all_at(piece, start).map_err(|error| spill_error(&error))?,
            }
        }
        Ok((bytes, hash_of_hashes(&hashes)))
    }

    /// Bytes of all states as they are kept.
    fn bytes(&self) -> u64 {
        let tokens = self.starts[self.starts.len() - 1];
        let token = match self.place {
            Store::Memory(_) | Store::Disk { halved: false, .. } => 4 * self.width,
            Store::Halved(_) | Store::Disk { halved: true, .. } => halved_bytes(self.width),
        };
        (tokens * token) as u64
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

fn hash_of_hashes(hashes: &[blake3::Hash]) -> blake3::Hash {
    let mut all = blake3::Hasher::new();
    hashes.iter().for_each(|hash| {
        all.update(hash.as_bytes());
    });
    all.finalize()
}

/// Bytes of a halved token: its f16 values and its exponent.
const fn halved_bytes(width: usize) -> usize {
    2 * width + 2
}

/// Tokens of `width` states in 16 bits: each as its values divided by 2ᵉ in f16, and e as an i16. The largest state comes
/// to lie in [2¹⁴, 2¹⁵), the top of the range of f16 but for rounding.
fn halve(values: &[f32], width: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() / width.max(1) * halved_bytes(width));
    for token in values.chunks(width.max(1)) {
        let largest = token.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let exponent = if largest > 0.0 { (exponent(largest) - 14).max(-126) } else { 0 };
        let factor = 2.0_f32.powi(-exponent);
        bytes.extend(token.iter().flat_map(|value| f16::from_f32(value * factor).to_le_bytes()));
        bytes.extend((exponent as i16).to_le_bytes());
    }
    bytes
}

/// What [`halve`] wrote.
fn restore(bytes: &[u8], width: usize, values: &mut [f32]) {
    for (token, bytes) in values.chunks_mut(width.max(1)).zip(bytes.chunks(halved_bytes(width))) {
        let (halves, exponent) = bytes.split_at(2 * width);
        decode_chunk(Float::F16, halves, token);
        let factor = 2.0_f32.powi(i32::from(i16::from_le_bytes([exponent[0], exponent[1]])));
        token.iter_mut().for_each(|value| *value *= factor);
    }
}

/// ⌊log₂ of a positive number⌋ as its bits say, at least -127.
fn exponent(value: f32) -> i32 {
    (value.to_bits() >> 23) as i32 - 127
}

fn spill_error(error: &std::io::Error) -> Error {
    Error::run(format!("hidden states on disk: {error}; set TMPDIR to a file system with more room, or use fewer --samples"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACES: [Keeping; 4] = [
        Keeping { budget_bytes: u64::MAX, exact: true },
        Keeping { budget_bytes: 6 * 12, exact: false },
        Keeping { budget_bytes: 0, exact: false },
        Keeping { budget_bytes: 0, exact: true },
    ];

    #[test]
    fn every_place_holds_the_same_states() {
        for (keeping, spilled) in PLACES.into_iter().zip([false, false, true, true]) {
            let mut hidden = Hidden::new(&[3, 1, 2], 5, keeping, Path::new(".")).unwrap();
            assert_eq!(hidden.spilled(), spilled);
            for window in [2, 0, 1] {
                let values: Vec<f32> = (0..hidden.tokens(window) * 5).map(|i| (i + 100 * window) as f32).collect();
                hidden.write(window..window + 1, &values).unwrap();
            }
            let copy = hidden.copy(Path::new(".")).unwrap();
            for hidden in [hidden, copy] {
                let sums = hidden.map(&[0..1, 1..3], |_, values| Ok(values.iter().sum::<f32>())).unwrap();
                assert_eq!(sums, [105.0, 2555.0], "{keeping:?}");
            }
        }
    }

    #[test]
    fn states_come_back_bit_for_bit_from_where_they_were_saved() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        for keeping in PLACES {
            // More than one piece, and a last one that is not whole.
            let mut hidden = Hidden::new(&[900, 701], 1100, keeping, Path::new(".")).unwrap();
            for window in 0..2 {
                let values: Vec<f32> = (0..hidden.tokens(window) * 1100).map(|i| (i as f32).sin()).collect();
                hidden.write(window..window + 1, &values).unwrap();
            }
            let file = File::create(&path).unwrap();
            let saved = hidden.save(|start, piece| file.write_all_at(piece, start).map_err(|error| spill_error(&error))).unwrap();
            let mut back = hidden.like(1100, Path::new(".")).unwrap();
            assert_eq!(back.load(&File::open(&path).unwrap(), &path).unwrap(), saved);
            assert_eq!(back.read(0..2).unwrap(), hidden.read(0..2).unwrap(), "{keeping:?}");
            file.write_all_at(&[1], saved.0 - 1).unwrap();
            assert_ne!(back.load(&File::open(&path).unwrap(), &path).unwrap(), saved);
            file.set_len(saved.0 - 1).unwrap();
            assert!(back.load(&File::open(&path).unwrap(), &path).is_err());
        }
    }

    #[test]
    fn halved_states_keep_their_digits_beside_huge_ones() {
        let states = [1.0e9, -3.0e6, 3.8, 0.0, 7.0, -3.0e-30, 1.0e-38, 5.0e-38, 0.0, 2.9e-38, 3.0e38, 1.0e38, -3.0e38, 1.0e30, 1.0];
        let mut back = [f32::NAN; 15];
        restore(&halve(&states, 5), 5, &mut back);
        for (token, (states, back)) in states.chunks(5).zip(back.chunks(5)).enumerate() {
            let largest = states.iter().fold(0.0_f32, |largest, state| largest.max(state.abs()));
            for (state, back) in states.iter().zip(back) {
                let bound = (state.abs() * 2.0_f32.powi(-11)).max(largest * 2.0_f32.powi(-39));
                assert!((state - back).abs() <= bound, "token {token}: {state} came back as {back}");
            }
        }
    }

    #[test]
    fn runs_hold_windows_of_one_length_up_to_a_number_of_tokens() {
        let hidden = Hidden::new(&[4, 4, 4, 2, 2, 9], 1, PLACES[0], Path::new(".")).unwrap();
        assert_eq!(hidden.runs(8), [0..2, 2..3, 3..5, 5..6]);
        assert_eq!(hidden.runs(0).len(), 6);
    }
}
