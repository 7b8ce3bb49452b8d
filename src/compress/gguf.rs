//! A model as one GGUF file: its keys, the names of its tensors there, and what llama.cpp wants changed in them.

pub mod families;
pub mod unpack;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;

use serde_json::Value as Json;

use crate::calibrate::tokens::Tokenizer;
use crate::checkpoint::decode::{decode, encode};
use crate::checkpoint::source::Source;
use crate::checkpoint::{Checkpoint, float_of, read_json};
use crate::compress::changes::{Change as Other, Changes};
use crate::compress::gguf::families::{Family, Sliding, renamed};
use crate::error::{Error, Result, shown};
use crate::formats::gguf::blocks::{self, Kind};
use crate::formats::gguf::container::{Tensor, Value, header};
use crate::formats::gguf::reader::Reader;
use crate::formats::gguf::{FORMAT, carrier, tokenizer};
use crate::formats::output::Layout;
use crate::model;
use crate::model::config::{Config, model_type};
use crate::model::rotation::Rotation;
use crate::weight::{Float, Outlined, Storage, Weight};

/// The file's name.
pub const FILE: &str = "model.gguf";

/// What llama.cpp wants changed in a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Nothing.
    None,
    /// Floats of 32 bits, and 1 more where the weight of a norm is stored less 1.
    Single { plus_one: bool },
    /// Blocks of 8-bit codes, rounded to nearest.
    Eight,
    /// Rows of heads in pairs: llama.cpp turns neighbours, the checkpoint turns halves.
    Paired { heads: usize },
}

/// A tensor of the file, or the part of one that a tensor of the checkpoint becomes.
#[derive(Debug)]
struct Placed {
    tensor: Tensor,
    /// The expert, where those of a layer lie in one tensor.
    expert: Option<usize>,
    change: Change,
    /// Number format of the bytes that are carried; nothing for blocks.
    float: Option<Float>,
}

impl Placed {
    /// Its place in the layout of the file.
    fn place(&self) -> String {
        match self.expert {
            Some(expert) => format!("{}/{expert}", self.tensor.name),
            None => self.tensor.name.clone(),
        }
    }
}

/// Everything about the file but the bytes of its tensors.
#[derive(Debug)]
pub struct File {
    keys: BTreeMap<String, Value>,
    /// By the name in the checkpoint, in the order of the file.
    tensors: Vec<(String, Placed)>,
    places: HashMap<String, usize>,
    /// Tensors of rotations.
    rotations: BTreeMap<&'static str, Vec<f32>>,
    /// What the file does not hold, each a sentence.
    pub notes: Vec<String>,
}

/// Bytes of rows that wait for the rest of their tensor, by its name.
pub type Waiting = HashMap<String, Vec<u8>>;

impl File {
    /// Plans the file for a model and what a plan makes of its layers.
    ///
    /// # Errors
    /// When llama.cpp has no such architecture or tokenizer, or would compute something else.
    pub fn plan(checkpoint: &Checkpoint, source: &dyn Source, layers: &[Outlined], changes: &Changes, eight: bool) -> Result<Self> {
        let kind = model_type(&checkpoint.config);
        let family = families::family(kind).ok_or_else(|| {
            Error::input(format!("gguf is written for {}, not for `{}`; use another --format", families::known(), shown(kind)))
        })?;
        let config = Config::read(&checkpoint.config)?;
        let prefix = model::prefix(checkpoint);
        let renamed = |name: &str| renamed(name, family, prefix, config.layers.len());
        let head = checkpoint.names().any(|name| renamed(name).is_some_and(|(to, _)| to == "output.weight"));
        families::computes(&config, family, head)?;
        let by_name: HashMap<String, &Outlined> =
            layers.iter().filter(|layer| layer.storage.is_some()).map(|layer| (format!("{}.weight", layer.name), layer)).collect();
        let (no_keys, tensors, places, no_notes) = Default::default();
        let mut file = Self { keys: no_keys, tensors, places, notes: no_notes, rotations: families::rotations(&config) };
        let mut left = Vec::new();
        let packed: HashSet<String> = by_name
            .values()
            .flat_map(|layer| source.tensors(checkpoint, &layer.name))
            .filter(|tensor| !tensor.ends_with(".weight"))
            .collect();
        for (name, layer) in by_name.iter().filter(|(name, _)| !checkpoint.has(name)) {
            let to = renamed(name).ok_or_else(|| Error::input("has no place in a GGUF file").tensor(name))?;
            file.add(name, to, &layer.shape, layer.float, Some(layer), (&config, family));
        }
        for name in checkpoint.names().filter(|name| !packed.contains(*name)) {
            let (Some(info), Some(to)) = (checkpoint.info(name), renamed(name)) else {
                let number =
                    name.strip_prefix(prefix).and_then(|own| own.strip_prefix("layers.")?.split('.').next()?.parse::<usize>().ok());
                if name.contains(".experts.") && number.is_some_and(|number| number < config.layers.len()) {
                    return Err(Error::input("experts that lie in one tensor and are carried over have no place in a GGUF file; let a method work on them, or use another --format").tensor(name));
                }
                left.push(name.to_owned());
                continue;
            };
            let mut shape = info.shape.clone();
            match changes.get(name) {
                Some(Other::Gone) => continue,
                Some(Other::Rows(rows)) => shape[0] = *rows,
                Some(Other::Single) | None => {}
            }
            let bias = to.0.strip_suffix(".bias").and_then(|to| to.rsplit('.').next());
            if let Some(part) = bias.filter(|part| !family.biases.contains(part)) {
                let what = format!("llama.cpp has no place for biases of {part} in {}; use another --format", family.arch);
                return Err(Error::input(what).tensor(name));
            }
            let layer = by_name.get(name).copied();
            let float = layer
                .map(|layer| layer.float)
                .or(float_of(info.dtype))
                .ok_or_else(|| Error::input(format!("is {:?}, gguf is written from floats", info.dtype)).tensor(name))?;
            file.add(name, to, &shape, float, layer, (&config, family));
        }
        file.arrange(eight);
        file.notes = notes(&left, layers, &config, family);
        file.keys = keys(checkpoint, &config, family, file.experts()?)?;
        file.keys.extend(tokenizer_keys(checkpoint, &config)?);
        file.keys.insert("general.file_type".into(), Value::U32(file.mostly().file_type()));
        Ok(file)
    }

    /// Puts the tensors into the order of the file; with `eight` those of tokens become blocks of 8-bit codes.
    fn arrange(&mut self, eight: bool) {
        let order = |(_, placed): &(String, Placed)| {
            let mut parts = placed.tensor.name.split('.');
            let number = parts.nth(1).and_then(|number| number.parse::<usize>().ok());
            (
                number.map_or(usize::from(placed.tensor.name != "token_embd.weight") * usize::MAX, |number| number + 1),
                placed.tensor.name.clone(),
                placed.expert,
            )
        };
        for (_, placed) in self.tensors.iter_mut().filter(|_| eight) {
            let whole = placed.tensor.shape.last().is_some_and(|columns| columns.is_multiple_of(Kind::Q8_0.weights()));
            if whole && placed.float.is_some() && ["token_embd.weight", "output.weight"].contains(&placed.tensor.name.as_str()) {
                (placed.tensor.kind, placed.change) = (Kind::Q8_0, Change::Eight);
            }
        }
        self.tensors.sort_by_key(order);
        self.places = self.tensors.iter().enumerate().map(|(at, (name, _))| (name.clone(), at)).collect();
    }

    fn add(
        &mut self,
        name: &str,
        (to, expert): (String, Option<usize>),
        shape: &[usize],
        float: Float,
        layer: Option<&Outlined>,
        (config, family): (&Config, &Family),
    ) {
        let heads = match to.rsplit('.').nth(1) {
            Some("attn_q") => config.heads,
            Some("attn_k") => config.kv_heads,
            _ => 0,
        };
        let norm = to.contains("norm");
        let change = match shape.len() {
            _ if heads > 0 && family.paired => Change::Paired { heads },
            1 => Change::Single { plus_one: norm && family.plus_one },
            _ if families::single(&to) => Change::Single { plus_one: false },
            _ => Change::None,
        };
        let carried = layer.and_then(carrier);
        let kind = match (carried, shape.len()) {
            (Some(kind), _) => kind,
            (None, 1) => Kind::F32,
            (None, _) if families::single(&to) => Kind::F32,
            (None, _) => Kind::of(layer.map_or(float, |layer| layer.float)),
        };
        let float = if carried.is_some() { None } else { Some(float) };
        let tensor = Tensor { name: to, shape: shape.to_vec(), kind };
        self.tensors.push((name.to_owned(), Placed { tensor, expert, change, float }));
    }

    /// How many experts every tensor of experts has.
    fn experts(&self) -> Result<Option<usize>> {
        let mut counts = BTreeSet::new();
        for parts in self.tensors.chunk_by(|(_, a), (_, b)| a.tensor.name == b.tensor.name).filter(|parts| parts[0].1.expert.is_some()) {
            let first = &parts[0].1;
            let same = |(number, (_, part)): (usize, &(String, Placed))| part.tensor == first.tensor && part.expert == Some(number);
            if let Some((name, _)) = parts.iter().enumerate().find(|one| !same(*one)).map(|(_, part)| part) {
                let what = "the experts of a layer lie in one tensor of a GGUF file, and this one is stored in another way than the first; skip all of them or none";
                return Err(Error::input(what).tensor(name));
            }
            counts.insert(parts.len());
        }
        Ok(counts.last().copied())
    }

    /// The type of most weights in matrices.
    fn mostly(&self) -> Kind {
        let size = |kind: Kind| -> usize {
            let of = self.tensors.iter().filter(|(_, placed)| placed.tensor.kind == kind && placed.tensor.shape.len() == 2);
            of.map(|(_, placed)| placed.tensor.shape.iter().product::<usize>()).sum()
        };
        Kind::ALL.into_iter().max_by_key(|&kind| size(kind)).unwrap_or(Kind::F32)
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        let (header, offsets) = header(&self.keys, &self.listed());
        let last = self.listed().last().map_or(0, Tensor::bytes);
        offsets.last().map_or(header.len() as u64, |offset| offset + last)
    }

    /// Bytes of its tensors by their names in the checkpoint.
    pub fn sizes(&self) -> impl Iterator<Item = (&str, u64)> {
        self.tensors.iter().map(|(name, placed)| (name.as_str(), placed.tensor.bytes()))
    }

    /// All tensors, those of experts as one.
    fn listed(&self) -> Vec<Tensor> {
        let rotations =
            self.rotations.iter().map(|(name, values)| Tensor { name: (*name).into(), shape: vec![values.len()], kind: Kind::F32 });
        let whole = |parts: &[(String, Placed)]| {
            let Placed { tensor, expert, .. } = &parts[0].1;
            match expert {
                Some(_) => Tensor { shape: [&[parts.len()], tensor.shape.as_slice()].concat(), ..tensor.clone() },
                None => tensor.clone(),
            }
        };
        self.tensors.chunk_by(|(_, a), (_, b)| a.tensor.name == b.tensor.name).map(whole).chain(rotations).collect()
    }

    /// Lays out the file.
    pub fn layout(&self) -> Layout {
        let tensors = self.listed();
        let (header, offsets) = header(&self.keys, &tensors);
        let starts: HashMap<&str, u64> = tensors.iter().map(|tensor| tensor.name.as_str()).zip(offsets).collect();
        let place = |name: String, tensor: &Tensor, part: usize| {
            let start = starts.get(tensor.name.as_str()).copied().unwrap_or(0);
            (name, start + part as u64 * tensor.bytes(), tensor.bytes())
        };
        let own = self.tensors.iter().map(|(_, placed)| place(placed.place(), &placed.tensor, placed.expert.unwrap_or(0)));
        let rotations = tensors.iter().filter(|tensor| self.rotations.contains_key(tensor.name.as_str()));
        let places = own.chain(rotations.map(|tensor| place(tensor.name.clone(), tensor, 0))).collect();
        Layout::single(FILE, header, places)
    }

    /// The tensors that are in no checkpoint, and their bytes.
    pub fn computed(&self) -> impl Iterator<Item = (&'static str, Vec<u8>)> + '_ {
        self.rotations.iter().map(|(name, values)| (*name, encode(Float::F32, values)))
    }

    /// Opens the file as a stranger would and compares it with the plan.
    ///
    /// # Errors
    /// When it is not what was planned.
    pub fn verify(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        let written = Reader::open(&path)?;
        let tensors: Vec<Tensor> = written.tensors.into_iter().map(|(tensor, _)| tensor).collect();
        match self.listed().into_iter().zip(&tensors).find(|(planned, found)| planned != *found) {
            Some((planned, found)) => Err(Error::run(format!("{found:?} instead of {planned:?}")).file(&path)),
            None if written.keys != self.keys => Err(Error::run("the keys are not those that were planned").file(&path)),
            None if tensors.len() != self.listed().len() => Err(Error::run(format!("{} tensors", tensors.len())).file(&path)),
            None => Ok(()),
        }
    }

    /// Takes the next bytes of a tensor, in the number format `float`.
    /// Gives what becomes of them: a place of the layout and its next bytes.
    pub fn carry(&self, waiting: &mut Waiting, name: &str, bytes: &[u8], float: Option<Float>) -> Option<(String, Vec<u8>)> {
        let (_, placed) = &self.tensors[*self.places.get(name)?];
        let from = float.or(placed.float).unwrap_or(Float::F32);
        let tensor = &placed.tensor;
        let bytes = match placed.change {
            Change::None => bytes.to_vec(),
            Change::Single { plus_one } => {
                let mut values = vec![0.0; bytes.len() / from.bytes()];
                decode(from, bytes, &mut values);
                values.iter_mut().for_each(|value| *value += f32::from(u8::from(plus_one)));
                encode(Float::F32, &values)
            }
            Change::Eight => {
                let mut values = vec![0.0; bytes.len() / from.bytes()];
                decode(from, bytes, &mut values);
                blocks::rounded_to_eight(&values)
            }
            Change::Paired { heads } => {
                let come = waiting.entry(name.to_owned()).or_default();
                come.extend_from_slice(bytes);
                let rows = tensor.shape[0];
                let row_bytes = from.bytes() * tensor.shape.iter().skip(1).product::<usize>();
                if come.len() < rows * row_bytes {
                    return None;
                }
                let whole = waiting.remove(name).unwrap_or_default();
                let mut turned = Vec::with_capacity(whole.len());
                paired(rows, heads).for_each(|row| turned.extend_from_slice(&whole[row * row_bytes..][..row_bytes]));
                if tensor.shape.len() == 1 {
                    let mut values = vec![0.0; rows];
                    decode(from, &turned, &mut values);
                    turned = encode(Float::F32, &values);
                }
                turned
            }
        };
        Some((placed.place(), bytes))
    }

    /// What becomes of the weight of a linear layer: a place of the layout and its bytes.
    ///
    /// # Errors
    /// When the file has no place for it.
    pub fn layer(&self, layer: &Outlined, weight: &Weight) -> Result<(String, Vec<u8>)> {
        let name = format!("{}.weight", layer.name);
        let Some(&at) = self.places.get(&name) else { return Err(Error::run("has no place in the file").tensor(&name)) };
        let placed = &self.tensors[at].1;
        let turned = match placed.change {
            Change::Paired { heads } => Some(weight.picked(&paired(layer.shape[0], heads).collect::<Vec<_>>())),
            _ => None,
        };
        let encoded = (FORMAT.encode)(turned.as_ref().unwrap_or(weight), layer.float);
        Ok((placed.place(), encoded.concat()))
    }
}

/// What a file does not hold.
fn notes(left: &[String], layers: &[Outlined], config: &Config, family: &Family) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(first) = left.first() {
        notes.push(format!("gguf has no place for {} ({} such tensors)", shown(first), left.len()));
    }
    if let Some((_, _, Some(original))) = families::turning(config).filter(|turning| turning.long().is_some()).and_then(Rotation::scaling) {
        notes.push(format!(
            "llama.cpp turns as for long texts wherever its context is longer than {original} tokens: give it a --ctx-size up to that for short ones"
        ));
    }
    let floats = layers.iter().filter(|layer| matches!(layer.storage, Some(Storage::Ints { .. })) && carrier(layer).is_none());
    let (count, first) = (floats.clone().count(), floats.map(|layer| shown(&layer.name)).next());
    if let Some(first) = first {
        notes.push(format!("gguf: {count} layers stay floats, for their rows or groups are not whole blocks of 32, or they have 8 bits with zero points (first {first})"));
    }
    if let Some(window) = config
        .layers
        .iter()
        .find_map(|layer| layer.window)
        .filter(|&window| family.sliding == Sliding::Unknown && window < config.max_positions)
    {
        notes.push(format!("llama.cpp does not know this model's window of {window} tokens: beyond it, it computes something else"));
    }
    notes
}

/// Rows in llama.cpp's order: of each head the first of both halves, the second of both, and so on.
pub fn paired(rows: usize, heads: usize) -> impl Iterator<Item = usize> {
    let size = rows / heads.max(1);
    (0..rows).map(move |row| row / size * size + row % size % 2 * (size / 2) + row % size / 2)
}

/// What the keys say of the model itself.
fn keys(checkpoint: &Checkpoint, config: &Config, family: &Family, experts: Option<usize>) -> Result<BTreeMap<String, Value>> {
    let arch = family.arch;
    let name = crate::hub::name_of(&checkpoint.folder);
    let whole = |number: usize| Value::U32(number as u32);
    let mut keys = BTreeMap::from([
        ("general.architecture".to_string(), Value::Text(arch.into())),
        ("general.type".into(), Value::Text("model".into())),
        ("general.name".into(), Value::Text(name.unwrap_or_default())),
        ("general.quantization_version".into(), Value::U32(2)),
        ("general.alignment".into(), Value::U32(32)),
    ]);
    let mut put = |key: &str, value: Value| drop(keys.insert(format!("{arch}.{key}"), value));
    put("block_count", whole(config.layers.len()));
    put("context_length", whole(config.max_positions));
    put("embedding_length", whole(config.hidden));
    put("feed_forward_length", whole(config.intermediate));
    put("attention.head_count", whole(config.heads));
    put("attention.head_count_kv", whole(config.kv_heads));
    put("attention.key_length", whole(config.head_dim));
    put("attention.value_length", whole(config.head_dim));
    put("vocab_size", whole(config.vocabulary));
    if let Some(rotation) = families::turning(config) {
        put("rope.dimension_count", whole(rotation.width()));
        put("rope.freq_base", Value::F32(rotation.theta() as f32));
        if let Some((kind, factor, original)) = rotation.scaling() {
            put("rope.scaling.type", Value::Text(kind.into()));
            let mut attention = rotation.attention();
            if kind != "longrope" {
                put("rope.scaling.factor", Value::F32(factor as f32));
            }
            if kind == "yarn" && factor > 1.0 {
                // What llama.cpp multiplies by itself.
                attention /= 1.0 + 0.1 * factor.ln();
            }
            if (attention - 1.0).abs() > 1e-6 {
                put("rope.scaling.attn_factor", Value::F32(attention as f32));
            }
            original.into_iter().for_each(|original| put("rope.scaling.original_context_length", whole(original as usize)));
        }
    }
    families::keys(config, family, experts, &mut put);
    Ok(keys)
}

fn tokenizer_keys(checkpoint: &Checkpoint, config: &Config) -> Result<BTreeMap<String, Value>> {
    let path = checkpoint.folder.join("tokenizer.json");
    if !path.exists() {
        return Err(Error::input("missing; a GGUF file holds the tokenizer. Copy it into the folder, or use another --format").file(&path));
    }
    let tokenizer: Json = serde_json::from_slice(&crate::checkpoint::read_file(&path, 256 << 20)?)
        .map_err(|error| Error::input(format!("not JSON: {error}")).file(&path))?;
    let own = checkpoint.folder.join("tokenizer_config.json");
    let own = if own.exists() { read_json(&own)? } else { Json::Null };
    let opened = Tokenizer::open(&checkpoint.folder)?;
    let described = tokenizer::Described {
        tokenizer: &tokenizer,
        config: &own,
        template: opened.template(),
        vocabulary: config.vocabulary,
        ends: [config.bos, config.eos.first().copied()],
    };
    tokenizer::keys(&described).map_err(|error| error.file(&checkpoint.folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_heads_go_in_pairs() {
        // Two heads of four rows: halves [0 1] and [2 3] become pairs.
        assert_eq!(paired(8, 2).collect::<Vec<_>>(), [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
