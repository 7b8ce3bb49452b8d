//! A model: a description and a checkpoint that lends its tensors block by block.

pub mod architecture;
pub mod backward;
pub mod bench;
pub mod block;
pub mod capture;
pub mod config;
pub mod forward;
pub mod generate;
pub mod hidden;
pub mod mixture;
pub mod rotation;
pub mod seen;
pub mod slopes;
pub mod walk;

use std::borrow::Cow;
use std::ops::Range;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::source::{Source, expect_shape};
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::model::architecture::{Mixed, PROJECTIONS};
use crate::model::block::{Block, Linear, Norm, Place, Role, Site};
use crate::model::config::{Config, decoder, known_family};
use crate::model::mixture::{Experts, Mixture, Which};
use crate::weight::Weight;

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
}

impl<'a> Model<'a> {
    /// Checks names and shapes of all tensors from the headers alone.
    ///
    /// # Errors
    /// One line naming the first tensor that is missing or wrong.
    pub fn open(checkpoint: &'a Checkpoint, source: &'a dyn Source) -> Result<Self> {
        let config = Config::read(&checkpoint.config).map_err(|error| error.file(&checkpoint.folder))?;
        let prefix = PREFIXES.iter().find(|prefix| checkpoint.has(&format!("{prefix}norm.weight"))).unwrap_or(&PREFIXES[0]).to_string();
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
        let model = Self { config, checkpoint, source, prefix, embedding, head };
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
            for module in self.modules(index) {
                let (name, needed) = (&module.name, self.module_shape(&module));
                let found = self.source.shape(self.checkpoint, name);
                expect_shape(self.checkpoint, &format!("{name}.weight"), found, needed)?;
                self.source.check(self.checkpoint, name, needed)?;
                let required = module.roles.first().is_some_and(|role| config.biases[role.bias_class()]);
                let bias = format!("{name}.bias");
                if required || self.checkpoint.has(&bias) {
                    self.vector_shape(&bias, needed[0])?;
                }
            }
            for (name, _, width) in self.norms(index) {
                self.vector_shape(&name, width)?;
            }
            for (name, shape) in self.routers(index) {
                expect_shape(self.checkpoint, &name, two(&name), shape)?;
                self.checkpoint.float(&name)?;
            }
        }
        self.no_more_layers()?;
        self.vector_shape(&format!("{}norm.weight", self.prefix), config.hidden)
    }

    /// Refuses a checkpoint with more blocks than config.json says, those that only predict further tokens aside.
    fn no_more_layers(&self) -> Result<()> {
        let start = format!("{}layers.", self.prefix);
        let number = |name: &str| name.strip_prefix(&start)?.split('.').next()?.parse::<usize>().ok();
        let further = self.checkpoint.config["num_nextn_predict_layers"].as_u64().unwrap_or(0) as usize;
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

    /// The linear layers of a block as the checkpoint stores them, in the order of a forward.
    pub fn modules(&self, index: usize) -> Vec<Module> {
        let family = self.config.family;
        let fused = |name: Option<&'static str>, roles: &[Role]| -> Vec<(&'static str, Vec<Role>)> {
            match name {
                Some(name) => vec![(name, roles.to_vec())],
                None => roles.iter().map(|&role| (role.name(), vec![role])).collect(),
            }
        };
        let mut modules = fused(family.fused_qkv, &[Role::Query, Role::Key, Role::Value]);
        modules.extend(fused(None, &[Role::Output]));
        let mixture = self.mixture(index);
        if mixture.is_none() {
            modules.extend(fused(family.fused_mlp, &[Role::Gate, Role::Up]));
            modules.extend(fused(None, &[Role::Down]));
        }
        let start = format!("{}layers.{index}.", self.prefix);
        let mut modules: Vec<Module> =
            modules.into_iter().map(|(name, roles)| Module { name: format!("{start}{name}"), roles, expert: None }).collect();
        if let Some((mixture, mixed)) = mixture {
            let mut of = |name: String, layers: [&str; 3], expert: Which| {
                let layers = layers.into_iter().zip([Role::Gate, Role::Up, Role::Down]);
                modules.extend(layers.map(|(layer, role)| Module {
                    name: format!("{name}.{layer}"),
                    roles: vec![role],
                    expert: Some(expert),
                }));
            };
            let name = format!("{start}{}", mixed.name);
            (0..mixture.experts).for_each(|expert| of(format!("{name}.experts.{expert}"), mixed.layers, Which::Routed(expert)));
            if let Some([shared, _]) = mixed.shared {
                of(format!("{name}.{shared}"), PROJECTIONS, Which::Shared);
            }
        }
        modules
    }

    /// The mixture of experts of a block that is one, and how its family names it.
    fn mixture(&self, index: usize) -> Option<(Mixture, Mixed)> {
        if self.config.layers[index].mixed { self.config.mixture.zip(self.config.family.mixed) } else { None }
    }

    /// The names of a mixture's router and of what scales its shared expert, with their shapes.
    fn routers(&self, index: usize) -> Vec<(String, [usize; 2])> {
        let Some((mixture, mixed)) = self.mixture(index) else { return Vec::new() };
        let name = format!("{}layers.{index}.{}", self.prefix, mixed.name);
        let mut routers = vec![(format!("{name}.gate.weight"), [mixture.experts, self.config.hidden])];
        routers.extend(mixed.shared.map(|[_, gate]| (format!("{name}.{gate}.weight"), [1, self.config.hidden])));
        routers
    }

    /// `[outputs, inputs]` of a module.
    pub fn module_shape(&self, module: &Module) -> [usize; 2] {
        if let (Some(which), Some(mixture)) = (module.expert, self.config.mixture) {
            let width = if which == Which::Shared { mixture.shared.unwrap_or(0) } else { mixture.width };
            let hidden = self.config.hidden;
            return if module.roles == [Role::Down] { [hidden, width] } else { [width, hidden] };
        }
        let columns = module.roles.first().map_or(0, |&role| self.shape(role)[1]);
        [module.roles.iter().map(|&role| self.shape(role)[0]).sum(), columns]
    }

    /// `[outputs, inputs]` of a role.
    pub fn shape(&self, role: Role) -> [usize; 2] {
        let config = &self.config;
        let (hidden, middle, query, kv) = (config.hidden, config.intermediate, config.query_width(), config.kv_width());
        match role {
            Role::Query => [query, hidden],
            Role::Key | Role::Value => [kv, hidden],
            Role::Output => [hidden, query],
            Role::Gate | Role::Up => [middle, hidden],
            Role::Down => [hidden, middle],
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
        if let Some([query, key]) = self.config.qk_norm_widths() {
            norms.push((format!("{}layers.{index}.self_attn.q_norm.weight", self.prefix), Place::Query, query));
            norms.push((format!("{}layers.{index}.self_attn.k_norm.weight", self.prefix), Place::Key, key));
        }
        norms
    }

    /// Reads a block.
    ///
    /// # Errors
    /// When a tensor is not finite or cannot be read.
    pub fn load_block(&self, index: usize) -> Result<Block> {
        let (mut linears, mut routed, mut shared) = (Vec::new(), Vec::new(), Vec::new());
        for module in self.modules(index) {
            let into = match module.expert {
                None => &mut linears,
                Some(Which::Routed(_)) => &mut routed,
                Some(Which::Shared) => &mut shared,
            };
            into.extend(self.load_module(module)?);
        }
        let mut routers = self.routers(index).into_iter().map(|(name, shape)| self.checkpoint.matrix(&name, shape));
        let experts = match routers.next().transpose()? {
            Some(router) => {
                let shared = threes(shared).pop().zip(routers.next().transpose()?);
                Some(Experts { router, routed: threes(routed), shared })
            }
            None => None,
        };
        let norm = |(name, place, width): (String, Place, usize)| Ok(Norm { weight: self.checkpoint.vector(&name, width)?, name, place });
        Ok(Block { index, linears, experts, norms: self.norms(index).into_iter().map(norm).collect::<Result<_>>()? })
    }

    /// Reads a module: a linear layer for each of its roles.
    fn load_module(&self, module: Module) -> Result<Vec<Linear>> {
        let shape = self.module_shape(&module);
        let Module { name, roles, .. } = module;
        let bias = format!("{name}.bias");
        let bias = if self.checkpoint.has(&bias) { Some(self.checkpoint.vector(&bias, shape[0])?) } else { None };
        let weight = match self.source.weight(self.checkpoint, &name, shape)? {
            Weight::Stored(stored) => Weight::Dense(stored.to_matrix()),
            weight => weight,
        };
        if let [role] = roles.as_slice() {
            return Ok(vec![Linear { weight, name, role: *role, bias }]);
        }
        let mut first = 0;
        let part = |role: Role| {
            let rows: Vec<usize> = (first..first + self.shape(role)[0]).collect();
            let bias = bias.as_ref().map(|bias| bias[first..first + rows.len()].to_vec());
            first += rows.len();
            Linear { weight: weight.picked(&rows), name: name.clone(), role, bias }
        };
        Ok(roles.into_iter().map(part).collect())
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
        let of =
            |roles: &[Role]| roles.iter().map(|&role| self.shape(role)).map(|[rows, columns]| rows as u64 * columns as u64).sum::<u64>();
        let (attention, mlp) = (of(&Role::ALL[..4]), of(&Role::ALL[4..]));
        let layers = &self.config.layers;
        let dense = if layers.iter().all(|layer| layer.mixed) { 0 } else { mlp };
        let mixed = self.config.mixture.filter(|_| layers.iter().any(|layer| layer.mixed));
        4 * (attention + dense.max(mixed.map_or(0, |mixture| mixture.entries(self.config.hidden))))
    }
}

/// Whether a checkpoint is one whose decoder can be computed, as far as its configuration and its names tell. What is not is
/// worked on by names and shapes: other families, larger models that say too little of their decoder, and mixtures whose experts
/// are stacked in one tensor.
pub fn computes(checkpoint: &Checkpoint) -> bool {
    let config = &checkpoint.config;
    let Some(family) = known_family(config) else { return false };
    let silent = matches!(decoder(config), Cow::Owned(_)) && Config::read(config).is_err();
    let stacked = family.mixed.is_some() && checkpoint.names().any(|name| name.contains(".experts.gate_up_proj"));
    !silent && !stacked
}

/// Gate, up and down of one expert after the other.
fn threes(linears: Vec<Linear>) -> Vec<[Linear; 3]> {
    let mut linears = linears.into_iter();
    std::iter::from_fn(|| Some([linears.next()?, linears.next()?, linears.next()?])).collect()
}
