//! The hidden states of all windows between two blocks. They lie in memory while they fit a budget and in an unnamed
//! temporary file when they do not; where a GPU computes and has room, they stay there. Nobody else has to know.
//!
//! What perplexity is computed from stays in f32, because its figures are compared to the fifth digit. Calibration
//! keeps up to six such stores, and there the states are halved once they outgrow the budget: f16 with a power of two
//! per token, so that a few huge channels, which trained models have, neither overflow nor cost the others their
//! digits. The relative error is at most 2⁻¹¹ down to 2⁻²⁸ of the token's largest state.

mod there;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use burn::tensor::Tensor;
use half::f16;
use rayon::prelude::*;

use crate::checkpoint::decode::{decode_chunk, encode};
use crate::error::{Error, Result};
use crate::kernels::{Floats, tensor};
use crate::model::hidden::there::There;
use crate::run::Run;
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
    /// Whether they lie with the processor though a GPU has room.
    near: bool,
}

impl Keeping {
    /// In f32 in any case.
    pub const EXACT: Self = Self { budget_bytes: BUDGET_BYTES, exact: true, near: false };
    /// In 16 bits once they are over the budget.
    pub const HALVED: Self = Self { budget_bytes: BUDGET_BYTES, exact: false, near: false };

    /// In f32 in any case, with as much memory as is left when `stores` of them share it.
    pub fn shared(stores: usize) -> Self {
        Self { budget_bytes: 4 * BUDGET_BYTES / stores.max(1) as u64, exact: true, near: false }
    }

    /// With the processor, also where a GPU has room.
    #[must_use]
    pub const fn near(self) -> Self {
        Self { near: true, ..self }
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
    /// Floats on a GPU.
    There(Box<There>),
}

impl Hidden {
    /// A store for windows of `lengths` tokens, on the GPU of the run where it has room; what `keeping` has no memory for lies
    /// in the run's temporary folder.
    ///
    /// # Errors
    /// When the temporary file cannot be made.
    pub fn new(lengths: &[usize], width: usize, keeping: Keeping, run: &Run<'_>) -> Result<Self> {
        let mut starts = vec![0];
        for length in lengths {
            starts.push(starts[starts.len() - 1] + length);
        }
        let tokens = starts[starts.len() - 1];
        let (single, half) = ((4 * width * tokens) as u64, (halved_bytes(width) * tokens) as u64);
        let there = if keeping.near { None } else { There::new(run.device, lengths.len(), tokens, width) };
        let place = if let Some(there) = there {
            Store::There(Box::new(there))
        } else if single <= keeping.budget_bytes {
            Store::Memory(vec![0.0; tokens * width])
        } else if !keeping.exact && half <= keeping.budget_bytes {
            Store::Halved(vec![0; halved_bytes(width) * tokens])
        } else {
            let (halved, scratch) = (!keeping.exact, run.scratch);
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
    pub fn like(&self, width: usize, run: &Run<'_>) -> Result<Self> {
        let lengths: Vec<usize> = (0..self.len()).map(|window| self.tokens(window)).collect();
        Self::new(&lengths, width, self.keeping, run)
    }

    /// Columns of a state.
    pub fn width(&self) -> usize {
        self.width
    }

    /// A store with the same states.
    ///
    /// # Errors
    /// When the temporary file cannot be made or read.
    pub fn copy(&self, run: &Run<'_>) -> Result<Self> {
        self.copy_as(self.keeping, run)
    }

    /// As [`Self::copy`], kept in another way; what stays with the processor does so in the copy too.
    ///
    /// # Errors
    /// As [`Self::copy`].
    pub fn copy_as(&self, keeping: Keeping, run: &Run<'_>) -> Result<Self> {
        let lengths: Vec<usize> = (0..self.len()).map(|window| self.tokens(window)).collect();
        let near = keeping.near || self.keeping.near;
        let mut copy = Self::new(&lengths, self.width, Keeping { near, ..keeping }, run)?;
        if let (Store::There(copied), Store::There(own)) = (&mut copy.place, &self.place) {
            copied.share(own);
            return Ok(copy);
        }
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

    /// Whether the states lie on a GPU.
    pub fn elsewhere(&self) -> bool {
        matches!(self.place, Store::There(_))
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
            Store::There(there) => {
                for window in windows {
                    let (at, count) = (self.starts[window] - start, self.tokens(window) * self.width);
                    values[at * self.width..][..count].copy_from_slice(&there.read(window, 0..count)?);
                }
            }
        }
        Ok(values)
    }

    /// The states of consecutive windows as a tensor on a device: without a copy of one window that lies there.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn states(&self, windows: Range<usize>, device: &burn::tensor::Device) -> Result<Tensor<2>> {
        match &self.place {
            Store::There(there) if there.is_on(device) => Ok(there.tensor(windows, |window| self.tokens(window))),
            _ => {
                let tokens = self.starts[windows.end] - self.starts[windows.start];
                Ok(tensor(self.read(windows)?, [tokens, self.width], device))
            }
        }
    }

    /// As [`Self::states`], of windows in any order.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn states_of(&self, windows: &[usize], device: &burn::tensor::Device) -> Result<Tensor<2>> {
        if let Store::There(there) = &self.place
            && there.is_on(device)
        {
            let each = windows.iter().map(|&window| there.tensor(window..window + 1, |window| self.tokens(window)));
            return Ok(Tensor::cat(each.collect(), 0));
        }
        let mut values = Vec::new();
        for &window in windows {
            values.extend(self.read(window..window + 1)?);
        }
        let tokens = values.len() / self.width.max(1);
        Ok(tensor(values, [tokens, self.width], device))
    }

    /// Replaces the states of consecutive windows by those of a tensor, which stay where they are if this store lies there.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn put(&mut self, windows: Range<usize>, states: &Tensor<2>) -> Result<()> {
        let starts = &self.starts;
        if let Store::There(there) = &mut self.place
            && there.put(windows.clone(), |window| starts[window + 1] - starts[window], states)
        {
            return Ok(());
        }
        self.write(windows, Floats::fetched(states).slice())
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
                Store::There(there) => {
                    let window = self.window_of(token);
                    let first = (token - self.starts[window]) * self.width;
                    out.copy_from_slice(&there.read(window, first..first + self.width)?);
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
            Store::There(there) => {
                for window in windows {
                    let states = (self.starts[window] - start) * self.width..(self.starts[window + 1] - start) * self.width;
                    there.write(window, &values[states]);
                }
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
                Store::There(_) => {
                    let window = self.window_of(token);
                    let mut states = self.read(window..window + 1)?;
                    states[(token - self.starts[window]) * width..][..width].copy_from_slice(&row);
                    self.write(window..window + 1, &states)?;
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
                Store::There(_) => keep(&encode(Float::F32, &self.floats(start as usize / 4..start as usize / 4 + length / 4)?)),
            }
        };
        let hashes = pieces.par_iter().map(save).collect::<Result<Vec<_>>>()?;
        Ok((bytes, hash_of_hashes(&hashes)))
    }

    /// Some floats of all states on a GPU, counted over all windows.
    fn floats(&self, part: Range<usize>) -> Result<Vec<f32>> {
        let mut floats = Vec::with_capacity(part.len());
        for window in 0..self.len() {
            let [start, end] = [self.starts[window], self.starts[window + 1]].map(|token| token * self.width);
            let own = part.start.max(start)..part.end.min(end);
            if let (Store::There(there), false) = (&self.place, own.is_empty()) {
                floats.extend(there.read(window, own.start - start..own.end - start)?);
            }
        }
        Ok(floats)
    }

    /// Takes states that [`Self::save`] gave from a file, also those of a store that kept them in another way. Gives what `save`
    /// gave.
    ///
    /// # Errors
    /// Of the temporary file, or when the file cannot be read or has another length.
    pub fn load(&mut self, from: &File, path: &Path) -> Result<(u64, blake3::Hash)> {
        let fail = |error: std::io::Error| Error::io(path, &error);
        let (own, tokens) = (self.token_bytes(), self.starts[self.starts.len() - 1]);
        let found = from.metadata().map_err(fail)?.len();
        let each = [own, 4 * self.width, halved_bytes(self.width)].into_iter().find(|each| (tokens * each) as u64 == found);
        let Some(each) = each else {
            return Err(Error::run(format!("has {found} bytes, {} were written", tokens * own)).file(path));
        };
        let direct = each == own && !matches!(self.place, Store::There(_));
        let (mut hashes, mut ahead, mut window) = (Vec::new(), Vec::new(), 0);
        let mut piece = vec![0; found.min(PIECE_BYTES) as usize];
        for start in (0..found).step_by(PIECE_BYTES as usize) {
            let piece = &mut piece[..(found - start).min(PIECE_BYTES) as usize];
            from.read_exact_at(piece, start).map_err(fail)?;
            hashes.push(blake3::hash(piece));
            if !direct {
                ahead.extend_from_slice(piece);
                self.take_windows(&mut window, &mut ahead, each)?;
                continue;
            }
            let part = start as usize..start as usize + piece.len();
            match &mut self.place {
                Store::Memory(all) => bytemuck::cast_slice_mut::<f32, u8>(all)[part].copy_from_slice(piece),
                Store::Halved(all) => all[part].copy_from_slice(piece),
                Store::Disk { file, .. } => file.write_all_at(piece, start).map_err(|error| spill_error(&error))?,
                Store::There(_) => {}
            }
        }
        Ok((found, hash_of_hashes(&hashes)))
    }

    /// Takes the windows from `window` on that lie whole in `bytes`, which are tokens of `each` bytes.
    fn take_windows(&mut self, window: &mut usize, bytes: &mut Vec<u8>, each: usize) -> Result<()> {
        let mut taken = 0;
        while *window < self.len() && taken + self.tokens(*window) * each <= bytes.len() {
            let own = &bytes[taken..taken + self.tokens(*window) * each];
            let mut values = vec![0.0; self.tokens(*window) * self.width];
            if each == 4 * self.width {
                decode_chunk(Float::F32, own, &mut values);
            } else {
                restore(own, self.width, &mut values);
            }
            taken += own.len();
            self.write(*window..*window + 1, &values)?;
            *window += 1;
        }
        bytes.drain(..taken);
        Ok(())
    }

    /// Bytes of all states as they are kept.
    fn bytes(&self) -> u64 {
        (self.starts[self.starts.len() - 1] * self.token_bytes()) as u64
    }

    /// Bytes of a token as it is kept.
    fn token_bytes(&self) -> usize {
        match self.place {
            Store::Memory(_) | Store::Disk { halved: false, .. } | Store::There(_) => 4 * self.width,
            Store::Halved(_) | Store::Disk { halved: true, .. } => halved_bytes(self.width),
        }
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

    /// Works on runs of windows in parallel, whose states lie on `device` then, and gives the results in order.
    ///
    /// # Errors
    /// The first error of a read or of the work.
    pub fn map<R: Send>(
        &self,
        runs: &[Range<usize>],
        device: &burn::tensor::Device,
        work: impl Fn(Range<usize>, Tensor<2>) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        runs.par_iter().map(|run| work(run.clone(), self.states(run.clone(), device)?)).collect()
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
mod tests;
