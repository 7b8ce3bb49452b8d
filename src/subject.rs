//! A model that is looked at, whatever it is stored as: opened, named, weighed and told apart from others.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;

use crate::calibrate::tokens::Tokenizer;
use crate::checkpoint::source::Source;
use crate::checkpoint::{Checkpoint, hash_file};
use crate::compress::gguf::unpack::{Unpacked, file_of};
use crate::compress::layers::candidates;
use crate::error::{Error, Result, shown_path};
use crate::evaluate::{self, Protocol, Text};
use crate::formats;
use crate::formats::gguf::reader::Reader;
use crate::memory;
use crate::model::Model;

/// An opened model.
#[derive(Debug)]
pub struct Subject {
    /// The folder or file that was given.
    pub path: PathBuf,
    unpacked: Unpacked,
    /// Its checkpoint.
    pub checkpoint: Checkpoint,
    /// Where its weights come from.
    pub source: Box<dyn Source>,
}

/// How large a model is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, JsonSchema)]
pub struct Weights {
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bytes of the linear layers, with their scales.
    pub linear_bytes: u64,
    /// Weights of the linear layers.
    pub linear_weights: u64,
}

impl Weights {
    /// Stored bits per weight of the linear layers.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.linear_bytes as f64 / self.linear_weights.max(1) as f64
    }
}

impl Subject {
    /// Opens a folder or a GGUF file; what has to be unpacked lies below `scratch` as long as this lives.
    ///
    /// # Errors
    /// When it is no sound checkpoint.
    pub fn open(path: &Path, scratch: &Path) -> Result<Self> {
        let unpacked = Unpacked::open(path, scratch)?;
        let named = |error: Error| if unpacked.folder() == path { error } else { error.file(path) };
        let checkpoint = Checkpoint::open(unpacked.folder()).map_err(named)?;
        let source = formats::open(&checkpoint).map_err(named)?;
        Ok(Self { path: path.to_path_buf(), unpacked, checkpoint, source })
    }

    /// The last part of its path, or the whole where that has none.
    pub fn name(&self) -> String {
        if crate::embedded::is_named(&self.path) {
            return crate::embedded::NAME.into();
        }
        crate::hub::name_of(&self.path).unwrap_or_else(|| shown_path(&self.path))
    }

    /// The model, ready to be computed.
    ///
    /// # Errors
    /// When its family is not known or a tensor has the wrong shape.
    pub fn model(&self) -> Result<Model<'_>> {
        let named = |error: Error| if self.unpacked.folder() == self.path { error } else { error.file(&self.path) };
        let model = Model::open(&self.checkpoint, self.source.as_ref()).map_err(named)?;
        // Half of what is free is left to activations and to other programs.
        let singly = memory::available().is_some_and(|bytes| model.block_bytes() > bytes / 2);
        Ok(model.with_experts_read_singly(singly))
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// When it has none that can be read.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Tokenizer::open(self.unpacked.folder())
    }

    /// Windows of a text, checked against the vocabulary.
    ///
    /// # Errors
    /// When the protocol does not suit the model, or the text is too short.
    pub fn windows(&self, text: &Text, protocol: Protocol) -> Result<Vec<Vec<u32>>> {
        let model = self.model()?;
        let longest = model.config.max_positions;
        if protocol.seq < 2 || protocol.seq > longest {
            return Err(Error::input(format!("--seq {}: the model takes windows of 2 to {longest} tokens", protocol.seq)));
        }
        let tokenizer = self.tokenizer()?;
        let windows = evaluate::windows(&text.content, &tokenizer, protocol, tokenizer.bos(model.config.bos))?;
        tokenizer.fits(windows.iter().flatten(), model.config.vocabulary)?;
        Ok(windows)
    }

    /// Refuses another model whose tokenizer cuts the text into other tokens than `windows`, those of this one.
    ///
    /// # Errors
    /// Naming the other.
    pub fn shares_tokens(&self, other: &Self, text: &Text, protocol: Protocol, windows: &[Vec<u32>]) -> Result<()> {
        let same = other.tokenizer_fingerprint().ok() == self.tokenizer_fingerprint().ok();
        if same || other.windows(text, protocol)? == windows {
            return Ok(());
        }
        let what = format!("its tokenizer cuts the text into other tokens than that of {}", shown_path(&self.path));
        Err(Error::input(what).file(&other.path))
    }

    /// blake3 of what the model is made of: its configuration and every file of weights.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn fingerprint(&self) -> Result<String> {
        match file_of(&self.path) {
            Some(file) => Ok(hash_file(&file)?.to_hex().to_string()),
            None => self.checkpoint.fingerprint(),
        }
    }

    /// blake3 of its tokenizer.json.
    ///
    /// # Errors
    /// When it has none.
    pub fn tokenizer_fingerprint(&self) -> Result<String> {
        Ok(hash_file(&self.unpacked.folder().join("tokenizer.json"))?.to_hex().to_string())
    }

    /// Names and shapes of its linear layers.
    ///
    /// # Errors
    /// When the weights are stored in a way that is known not to work.
    pub fn linears(&self) -> Result<Vec<(String, [usize; 2])>> {
        let model = self.model().ok();
        let linears = candidates(&self.checkpoint, self.source.as_ref(), model.as_ref())?;
        Ok(linears.into_iter().map(|linear| (linear.name, linear.shape)).collect())
    }

    /// How large it is as it is stored.
    ///
    /// # Errors
    /// When a GGUF file cannot be read again.
    pub fn weights(&self) -> Result<Weights> {
        let linears = self.linears()?;
        let linear_weights = linears.iter().map(|(_, [rows, columns])| (rows * columns) as u64).sum();
        if let Some(file) = file_of(&self.path) {
            let reader = Reader::open(&file)?;
            let linear = |name: &str, shape: &[usize]| name.starts_with("blk.") && shape.len() == 2;
            let bytes = |linears: bool| {
                let tensors = reader.tensors.iter().filter(|(tensor, _)| !linears || linear(&tensor.name, &tensor.shape));
                tensors.map(|(tensor, _)| tensor.bytes()).sum()
            };
            return Ok(Weights { bytes: bytes(false), linear_bytes: bytes(true), linear_weights });
        }
        let bytes_of = |name: &str| self.checkpoint.info(name).map_or(0, crate::checkpoint::TensorInfo::bytes);
        // Several layers may lie in one tensor.
        let tensors: BTreeSet<String> = linears.iter().flat_map(|(name, _)| self.source.tensors(&self.checkpoint, name)).collect();
        let linear_bytes = tensors.iter().map(|name| bytes_of(name)).sum();
        Ok(Weights { bytes: self.checkpoint.names().map(bytes_of).sum(), linear_bytes, linear_weights })
    }
}
