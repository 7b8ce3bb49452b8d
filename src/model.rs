//! A model: a description and a checkpoint that lends its tensors block by block.

pub mod architecture;
pub mod arrivals;
pub mod away;
pub mod backward;
pub mod bench;
pub mod block;
pub mod capture;
pub mod config;
pub mod delta;
pub mod forward;
pub mod generate;
pub mod hidden;
pub mod holdings;
pub mod latent;
mod load;
pub mod loss;
pub mod mixture;
pub mod passage;
pub mod progress;
pub mod rotation;
pub mod seen;
pub mod slopes;
pub mod thinning;
pub mod walk;
pub mod woven;

use std::borrow::Cow;
use std::ops::Range;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::source::{Source, expect_shape};
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::model::architecture::families::PROJECTIONS;
use crate::model::architecture::{Lying, Mixed, Mixing, Routing};
use crate::model::block::{Place, Role, Site};
use crate::model::config::{Config, decoder, known_family};
use crate::model::hidden::{Hidden, Keeping};
use crate::model::mixture::{Mixture, Which};
use crate::run::Run;

/// Largest slice of the head that is decoded at once, in bytes of f32.
const HEAD_SLICE_BYTES: usize = 32 << 20;

/// What may stand before the names of a decoder's tensors.
const PREFIXES: &[&str] = &["model.", "language_model.model.", "model.language_model.", ""];

/// Most rows of a slice of the head: logits exist for so many tokens of the vocabulary at once.
const HEAD_SLICE_ROWS: usize = 8192;

/// A linear layer as a checkpoint stores it: of one role, or of several whose rows stand one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Full name without `.weight`.
    pub name: String,
    /// What its rows do, in order.
    pub roles: Vec<Role>,
    /// The expert of a mixture that it is part of.
    pub expert: Option<Which>,
    /// `[outputs, inputs]`.
    pub shape: [usize; 2],
}

impl Module {
    /// The input that it reads.
    pub fn site(&self) -> Site {
        self.roles.first().map_or(Site::Attention, |role| role.site())
    }
}

/// A decoder whose tensors were checked against its description.
#[derive(Debug)]
pub struct Model<'a> {
    /// The description.
    pub config: Config,
    checkpoint: &'a Checkpoint,
    source: &'a dyn Source,
    prefix: String,
    embedding: String,
    head: String,
    /// Experts that the output has of those that the router chooses from, where it has not all.
    left: Option<usize>,
    /// Whether experts are read one at a time.
    singly: bool,
}

impl<'a> Model<'a> {
    /// Checks names and shapes of all tensors from the headers alone.
    ///
    /// # Errors
    /// One line naming the first tensor that is missing or wrong.
    pub fn open(checkpoint: &'a Checkpoint, source: &'a dyn Source) -> Result<Self> {
        let config = Config::read(&checkpoint.config).map_err(|error| error.file(&checkpoint.folder))?;
        let prefix = prefix(checkpoint).to_string();
        let own = format!("{prefix}embed_tokens.weight");
        let separate = if checkpoint.has("lm_head.weight") {
            "lm_head.weight".to_string()
        } else {
            format!("{}lm_head.weight", prefix.strip_suffix("model.").unwrap_or(prefix.as_str()))
        };
        let (embedding, head) = match (checkpoint.has(&own), checkpoint.has(&separate), config.tied) {
            (true, true, _) => (own, separate),
            (true, false, true) => (own.clone(), own),
            (false, true, true) => (separate.clone(), separate),
            (true, false, false) => {
                return Err(Error::input(
                    "missing, and config.json says that the embedding is not tied to it; the checkpoint is incomplete",
                )
                .tensor(&separate)
                .file(&checkpoint.folder));
            }
            (false, _, _) => return Err(Error::input("missing; the checkpoint is incomplete").tensor(&own).file(&checkpoint.folder)),
        };
        let model = Self { config, checkpoint, source, prefix, embedding, head, left: None, singly: false };
        model.check()?;
        Ok(model)
    }

    fn check(&self) -> Result<()> {
        let config = &self.config;
        let two = |name: &str| self.checkpoint.info(name).and_then(|info| info.shape.as_slice().try_into().ok());
        for name in [&self.embedding, &self.head] {
            expect_shape(self.checkpoint, name, two(name), [config.vocabulary, config.hidden])?;
            self.checkpoint.float(name)?;
        }
        for index in 0..config.layers.len() {
            for module in self.all_modules(index) {
                let (name, needed) = (&module.name, module.shape);
                let found = self.source.shape(self.checkpoint, name);
                expect_shape(self.checkpoint, &format!("{name}.weight"), found, needed)?;
                self.source.check(self.checkpoint, name, needed)?;
                let required = module.roles.first().and_then(|role| role.bias_class()).is_some_and(|class| config.biases[class]);
                let bias = format!("{name}.bias");
                if required || self.checkpoint.has(&bias) {
                    self.vector_shape(&bias, needed[0])?;
                }
            }
            for (name, _, width) in self.norms(index) {
                self.vector_shape(&name, width)?;
            }
            for (name, shape) in self.matrices(index) {
                expect_shape(self.checkpoint, &name, two(&name), shape)?;
                self.checkpoint.float(&name)?;
            }
            for (name, width) in self.vectors(index) {
                self.vector_shape(&name, width)?;
            }
            if let Some((mixture, mixed)) = self.mixture(index).filter(|(_, mixed)| mixed.lying == Lying::Woven) {
                woven::check(self.checkpoint, &self.named(index, &format!("{}.experts", mixed.name)), &mixture, config.hidden)?;
            }
            if let (true, Some(sizes)) = (config.layers[index].linear, &config.delta) {
                let (name, needed) = (self.named(index, "linear_attn.conv1d.weight"), [sizes.channels(), 1, sizes.kernel]);
                self.checkpoint.float(&name)?;
                match self.checkpoint.info(&name) {
                    Some(info) if info.shape == needed => {}
                    found => {
                        let found = found.map(|info| info.shape.clone()).unwrap_or_default();
                        return Err(Error::input(format!("has shape {found:?}, config.json asks for {needed:?}"))
                            .tensor(&name)
                            .file(&self.checkpoint.folder));
                    }
                }
            }
        }
        self.no_more_layers()?;
        self.vector_shape(&format!("{}norm.weight", self.prefix), config.hidden)
    }

    /// Refuses a checkpoint with more blocks than config.json says, those that only predict further tokens aside.
    fn no_more_layers(&self) -> Result<()> {
        let start = format!("{}layers.", self.prefix);
        let number = |name: &str| name.strip_prefix(&start)?.split('.').next()?.parse::<usize>().ok();
        let further = ["num_nextn_predict_layers", "num_mtp_layers"].map(|key| self.checkpoint.config[key].as_u64().unwrap_or(0));
        let further = further.into_iter().max().unwrap_or(0) as usize;
        let count = self.config.layers.len();
        match self.checkpoint.names().find(|name| number(name).is_some_and(|number| number >= count.saturating_add(further))) {
            Some(name) => Err(Error::input(format!("config.json says num_hidden_layers {count}, but this belongs to a later one"))
                .tensor(name)
                .file(&self.checkpoint.folder)),
            None => Ok(()),
        }
    }

    fn vector_shape(&self, name: &str, width: usize) -> Result<()> {
        self.checkpoint.float(name)?;
        match self.checkpoint.info(name) {
            Some(info) if info.shape != [width] => Err(Error::input(format!("has shape {:?}, config.json asks for [{width}]", info.shape))
                .tensor(name)
                .file(&self.checkpoint.folder)),
            _ => Ok(()),
        }
    }

    /// The full name of something in a block.
    fn named(&self, index: usize, name: &str) -> String {
        format!("{}layers.{index}.{name}", self.prefix)
    }

    /// The same model, of whose experts only so many will be in the output.
    #[must_use]
    pub fn with_experts(self, left: Option<usize>) -> Self {
        Self { left, ..self }
    }

    /// The same model; with `singly` its blocks come without the weights of experts, which are then read one at a time.
    #[must_use]
    pub fn with_experts_read_singly(self, singly: bool) -> Self {
        Self { singly: singly && self.config.layers.iter().any(|layer| layer.mixed), ..self }
    }

    /// Whether experts are read one at a time.
    pub fn reads_experts_singly(&self) -> bool {
        self.singly
    }

    /// The linear layers of a block as the output stores them, in the order of a forward.
    pub fn modules(&self, index: usize) -> Vec<Module> {
        let left = self.left.unwrap_or(usize::MAX);
        let stays = |module: &Module| !matches!(module.expert, Some(Which::Routed(expert)) if expert >= left);
        self.all_modules(index).into_iter().filter(stays).collect()
    }

    /// Where the output has fewer experts: the tensors of a block that have a row, or a matrix, for every expert, and those of experts
    /// that the output does not have.
    pub fn by_expert(&self, index: usize) -> [Vec<String>; 2] {
        let (Some((mixture, mixed)), Some(left)) = (self.mixture(index), self.left) else { return Default::default() };
        let own = self.named(index, &format!("{}.{}.", mixed.name, mixed.router));
        let experts = self.named(index, &format!("{}.experts.", mixed.name));
        let apart = |name: &str| name.strip_prefix(&experts)?.split('.').next()?.parse::<usize>().ok();
        let every = |name: &str| self.checkpoint.info(name).is_some_and(|info| info.shape.first() == Some(&mixture.experts));
        let stacked = |name: &&str| (name.starts_with(&own) || mixed.lying == Lying::Woven && name.starts_with(&experts)) && every(name);
        let whole = self.checkpoint.names().filter(stacked).map(str::to_string).collect();
        let gone = |name: &&str| apart(name).is_some_and(|expert| (left..mixture.experts).contains(&expert));
        [whole, self.checkpoint.names().filter(gone).map(str::to_string).collect()]
    }

    /// The bytes of some rows of a tensor, shown one row after the other.
    ///
    /// # Errors
    /// When the tensor cannot be read, or of who sees.
    pub fn rows_of(&self, name: &str, rows: &[usize], mut see: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let Some(info) = self.checkpoint.info(name) else { return Ok(()) };
        let each = info.bytes() as usize / info.shape.first().copied().unwrap_or(1).max(1);
        rows.iter().try_for_each(|&row| see(&self.checkpoint.part(name, row * each..(row + 1) * each)?))
    }

    /// A tensor of experts outside the blocks, where there is one: of layers that predict further tokens.
    pub fn further_experts(&self) -> Option<&str> {
        let start = format!("{}layers.", self.prefix);
        let number = |name: &str| name.strip_prefix(&start)?.split('.').next()?.parse::<usize>().ok();
        let inside = |name: &str| number(name).is_some_and(|number| number < self.config.layers.len());
        self.checkpoint.names().find(|name| name.contains(".experts.") && !inside(name))
    }

    /// The linear layers of a block as the checkpoint stores them, in the order of a forward.
    fn all_modules(&self, index: usize) -> Vec<Module> {
        let family = self.config.family;
        let mut modules = self.mixers(index);
        let mixture = self.mixture(index);
        if mixture.is_none() {
            match family.fused_mlp {
                Some(name) => modules.push((name, vec![Role::Gate, Role::Up])),
                None => modules.extend([Role::Gate, Role::Up].map(|role| (role.name(), vec![role]))),
            }
            modules.push((Role::Down.name(), vec![Role::Down]));
        }
        let own = modules.into_iter().map(|(name, roles)| {
            let columns = roles.first().map_or(0, |&role| self.shape(index, role)[1]);
            let shape = [roles.iter().map(|&role| self.shape(index, role)[0]).sum(), columns];
            Module { name: self.named(index, name), roles, expert: None, shape }
        });
        let mut modules: Vec<Module> = own.collect();
        if let Some((mixture, mixed)) = mixture {
            let mut of = |name: String, layers: [&str; 3], which: Which, width: usize| {
                let hidden = self.config.hidden;
                let layers =
                    layers.into_iter().zip([(Role::Gate, [width, hidden]), (Role::Up, [width, hidden]), (Role::Down, [hidden, width])]);
                modules.extend(layers.map(|(layer, (role, shape))| Module {
                    name: format!("{name}.{layer}"),
                    roles: vec![role],
                    expert: Some(which),
                    shape,
                }));
            };
            let name = self.named(index, mixed.name);
            if mixed.lying == Lying::Apart {
                let each = |expert| (format!("{name}.experts.{expert}"), mixed.layers, Which::Routed(expert), mixture.width);
                (0..mixture.experts).map(each).for_each(|(name, layers, which, width)| of(name, layers, which, width));
            }
            if let (Some((shared, _)), Some(width)) = (mixed.shared, mixture.shared) {
                of(format!("{name}.{shared}"), PROJECTIONS, Which::Shared, width);
            }
        }
        modules
    }

    /// Names and roles of the linear layers of what mixes tokens in a block.
    fn mixers(&self, index: usize) -> Vec<(&'static str, Vec<Role>)> {
        let one = |role: Role| (role.name(), vec![role]);
        match (self.config.family.mixing, self.config.latent) {
            (Mixing::Hybrid(names), _) if self.config.layers[index].linear => {
                let mut mixers = vec![(names.input, vec![Role::DeltaIn])];
                mixers.extend(names.gate.map(|gate| (gate, vec![Role::DeltaGate])));
                mixers.push(("linear_attn.out_proj", vec![Role::Output]));
                mixers
            }
            (_, Some(latent)) => {
                let queries: &[Role] = if latent.query_rank.is_some() { &[Role::QueryDown, Role::QueryUp] } else { &[Role::Query] };
                queries.iter().chain(&[Role::KeyValueDown, Role::KeyValueUp, Role::Output]).map(|&role| one(role)).collect()
            }
            _ => {
                let roles = [Role::Query, Role::Key, Role::Value];
                let mut mixers = match self.config.family.fused_qkv {
                    Some(name) => vec![(name, roles.to_vec())],
                    None => roles.map(one).to_vec(),
                };
                mixers.push(one(Role::Output));
                mixers
            }
        }
    }

    /// The mixture of experts of a block that is one, and how its family names it.
    fn mixture(&self, index: usize) -> Option<(Mixture, Mixed)> {
        if self.config.layers[index].mixed { self.config.mixture.zip(self.config.family.mixed) } else { None }
    }

    /// Names and shapes of matrices of a block that no method works on: a mixture's router, what scales its shared expert, and
    /// what controls a delta rule.
    fn matrices(&self, index: usize) -> Vec<(String, [usize; 2])> {
        let (config, mut matrices) = (&self.config, Vec::new());
        if let Some((mixture, mixed)) = self.mixture(index) {
            matrices.push((self.named(index, &format!("{}.{}.weight", mixed.name, mixed.router)), [mixture.experts, config.hidden]));
            let gate = mixed.shared.and_then(|(_, gate)| gate);
            matrices.extend(gate.map(|gate| (self.named(index, &format!("{}.{gate}.weight", mixed.name)), [1, config.hidden])));
        }
        if let (Mixing::Hybrid(names), Some(sizes), true) = (config.family.mixing, config.delta, config.layers[index].linear) {
            let rows = 2 * sizes.value_heads / names.controls.len();
            matrices.extend(names.controls.iter().map(|name| (self.named(index, &format!("{name}.weight")), [rows, config.hidden])));
        }
        matrices
    }

    /// Names and widths of vectors of a block that are neither norms nor biases of linear layers.
    fn vectors(&self, index: usize) -> Vec<(String, usize)> {
        let (config, mut vectors) = (&self.config, Vec::new());
        if let Some((mixture, mixed)) = self.mixture(index) {
            let router = self.named(index, &format!("{}.{}", mixed.name, mixed.router));
            if mixed.routing == Routing::GroupedSigmoid {
                vectors.push((format!("{router}.e_score_correction_bias"), mixture.experts));
            }
            let bias = format!("{router}.bias");
            vectors.extend(self.checkpoint.has(&bias).then_some((bias, mixture.experts)));
        }
        if let (true, Some(sizes)) = (config.layers[index].linear, config.delta) {
            let named = |name: &str| self.named(index, &format!("linear_attn.{name}"));
            vectors.extend(["A_log", "dt_bias"].map(|name| (named(name), sizes.value_heads)));
            vectors.push((named("norm.weight"), sizes.value_dim));
        }
        if config.family.sinks {
            vectors.push((self.named(index, "self_attn.sinks"), config.heads));
        }
        vectors
    }

    /// `[outputs, inputs]` of a role in a block.
    pub fn shape(&self, index: usize, role: Role) -> [usize; 2] {
        let config = &self.config;
        let (hidden, middle, query, kv) = (config.hidden, config.intermediate, config.query_width(), config.kv_width());
        let (latent, sizes) = (config.latent, config.delta);
        let keys = latent.map_or(0, |latent| config.heads * latent.key());
        let rank = latent.and_then(|latent| latent.query_rank).unwrap_or(0);
        match role {
            Role::Query if latent.is_some() => [keys, hidden],
            Role::Query if config.family.gated => [2 * query, hidden],
            Role::Query => [query, hidden],
            Role::Key | Role::Value => [kv, hidden],
            Role::Output => [hidden, config.mixed_width(index)],
            Role::Gate | Role::Up => [middle, hidden],
            Role::Down => [hidden, middle],
            Role::QueryDown => [rank, hidden],
            Role::QueryUp => [keys, rank],
            Role::KeyValueDown => [latent.map_or(0, |latent| latent.rank + latent.turning), hidden],
            Role::KeyValueUp => latent.map_or([0, 0], |latent| [config.heads * (latent.still + latent.value), latent.rank]),
            Role::DeltaIn => {
                let apart = matches!(config.family.mixing, Mixing::Hybrid(names) if names.gate.is_some());
                [sizes.map_or(0, |sizes| sizes.channels() + if apart { 0 } else { sizes.values() }), hidden]
            }
            Role::DeltaGate => [sizes.map_or(0, |sizes| sizes.values()), hidden],
        }
    }

    /// The norms of a block: tensor name, place and width.
    pub fn norms(&self, index: usize) -> Vec<(String, Place, usize)> {
        let places = self.config.family.places;
        let mut norms = Vec::new();
        for (name, place) in [
            (places.attention_in, Place::AttentionIn),
            (places.attention_out, Place::AttentionOut),
            (places.mlp_in, Place::MlpIn),
            (places.mlp_out, Place::MlpOut),
        ] {
            norms.extend(name.map(|name| (format!("{}layers.{index}.{name}.weight", self.prefix), place, self.config.hidden)));
        }
        let mut own = |name: &str, place, width| norms.push((self.named(index, &format!("self_attn.{name}.weight")), place, width));
        if let Some([query, key]) = self.config.qk_norm_widths().filter(|_| !self.config.layers[index].linear) {
            own("q_norm", Place::Query, query);
            own("k_norm", Place::Key, key);
        }
        if let Some(latent) = &self.config.latent {
            if let Some(rank) = latent.query_rank {
                own("q_a_layernorm", Place::QueryLatent, rank);
            }
            own("kv_a_layernorm", Place::KeyValueLatent, latent.rank);
        }
        norms
    }

    /// The first hidden states of some tokens, `tokens × hidden`.
    ///
    /// # Errors
    /// When a token is beyond the vocabulary or a row is not finite.
    pub fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let mut rows = self.checkpoint.gather(&self.embedding, [self.config.vocabulary, self.config.hidden], tokens)?.data;
        if self.config.embed_factor != 1.0 {
            rows.iter_mut().for_each(|value| *value *= self.config.embed_factor);
        }
        Ok(rows)
    }

    /// The weight of the final norm.
    ///
    /// # Errors
    /// When it is not finite or cannot be read.
    pub fn final_norm(&self) -> Result<Vec<f32>> {
        self.checkpoint.vector(&format!("{}norm.weight", self.prefix), self.config.hidden)
    }

    /// Ranges of the vocabulary that are decoded one at a time.
    pub fn head_slices(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (vocabulary, rows) = (self.config.vocabulary, (HEAD_SLICE_BYTES / (4 * self.config.hidden)).clamp(1, HEAD_SLICE_ROWS));
        (0..vocabulary).step_by(rows).map(move |first| first..(first + rows).min(vocabulary))
    }

    /// Some rows of the head.
    ///
    /// # Errors
    /// When they are not finite or cannot be read.
    pub fn head_rows(&self, rows: Range<usize>) -> Result<Matrix> {
        self.checkpoint.rows(&self.head, [self.config.vocabulary, self.config.hidden], rows)
    }

    /// Bytes of the largest block in f32.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes_at_once(false)
    }

    /// A store of hidden states for windows of these lengths. Those of a mixture stay with the processor: experts take single
    /// tokens of all windows.
    ///
    /// # Errors
    /// As [`Hidden::new`].
    pub fn states(&self, lengths: &[usize], keeping: Keeping, run: &Run<'_>) -> Result<Hidden> {
        Hidden::new(lengths, self.config.hidden, if self.config.mixture.is_some() { keeping.near() } else { keeping }, run)
    }

    /// As [`Self::block_bytes`], with `singly` without experts.
    pub fn block_bytes_at_once(&self, singly: bool) -> u64 {
        (0..self.config.layers.len()).map(|index| 4 * self.entries(index, singly)).max().unwrap_or(0)
    }

    /// Weights of the linear layers of a block, with `singly` without those of experts.
    fn entries(&self, index: usize, singly: bool) -> u64 {
        let mut roles: Vec<Role> = self.mixers(index).into_iter().flat_map(|(_, roles)| roles).collect();
        let mixture = self.mixture(index);
        if mixture.is_none() {
            roles.extend([Role::Gate, Role::Up, Role::Down]);
        }
        let own: u64 = roles.into_iter().map(|role| self.shape(index, role)).map(|[rows, columns]| rows as u64 * columns as u64).sum();
        own + mixture.filter(|_| !singly).map_or(0, |(mixture, _)| mixture.entries(self.config.hidden))
    }
}

/// What stands before the names of the decoder's tensors.
pub fn prefix(checkpoint: &Checkpoint) -> &'static str {
    PREFIXES.iter().find(|prefix| checkpoint.has(&format!("{prefix}norm.weight"))).unwrap_or(&PREFIXES[0])
}

/// Whether a checkpoint is one whose decoder can be computed, as far as its configuration and its names tell. What is not is
/// worked on by names and shapes: other families, and larger models that say too little of their decoder.
pub fn computes(checkpoint: &Checkpoint) -> bool {
    let config = &checkpoint.config;
    known_family(config).is_some() && !(matches!(decoder(config), Cow::Owned(_)) && Config::read(config).is_err())
}
