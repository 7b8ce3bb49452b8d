//! config.json, in the spellings of transformers 4 and 5, to one typed description. Every number is bounded before
//! it is used; nothing is allocated in proportion to a number that no tensor has confirmed.

mod keys;

use std::borrow::Cow;

use serde_json::Value;

use crate::error::{Error, Result, shown};
use crate::kernels::delta_rule::Sizes;
use crate::kernels::gated::Activation;
use crate::model::architecture::families::{FAMILIES, family};
use crate::model::architecture::{Biases, Embed, Family, LogitsFactor, Mixing, QkNorm, Rotates, Scale, SlidingRule, Windows};
pub use crate::model::config::keys::{Keys, tokens};
use crate::model::delta;
use crate::model::latent::Latent;
use crate::model::mixture::Mixture;
use crate::model::rotation::{self, Rotation};

/// Everything about a decoder that its tensors do not say.
#[derive(Debug, Clone)]
pub struct Config {
    /// The family's row.
    pub family: &'static Family,
    /// `hidden_size`.
    pub hidden: usize,
    /// `intermediate_size`.
    pub intermediate: usize,
    /// `vocab_size`.
    pub vocabulary: usize,
    /// `num_attention_heads`.
    pub heads: usize,
    /// `num_key_value_heads`.
    pub kv_heads: usize,
    /// Columns of a head as attention knows them: `head_dim`.
    pub head_dim: usize,
    /// `rms_norm_eps`.
    pub epsilon: f64,
    /// `max_position_embeddings`.
    pub max_positions: usize,
    /// `tie_word_embeddings`.
    pub tied: bool,
    /// Activation of the MLP.
    pub activation: Activation,
    /// Factor of the scores.
    pub scale: f32,
    /// Soft cap of the scores.
    pub attention_cap: Option<f32>,
    /// Soft cap of the logits.
    pub logits_cap: Option<f32>,
    /// Factor of the embedding.
    pub embed_factor: f32,
    /// Factor of both residual branches.
    pub residual_factor: f32,
    /// Factor of the logits.
    pub logits_factor: f32,
    /// Whether the linear layers of attention (queries, keys, values; output) and of the MLP must have biases.
    pub biases: [bool; 3],
    /// One entry per layer.
    pub layers: Vec<Layer>,
    /// The mixture of experts in some of them.
    pub mixture: Option<Mixture>,
    /// Attention over narrowed keys and values, where that is what mixes tokens.
    pub latent: Option<Latent>,
    /// The delta rule of linear layers.
    pub delta: Option<Sizes>,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// The tokens that end a text.
    pub eos: Vec<u32>,
}

/// What distinguishes a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Positions that a token sees, itself included; `None` for all before it.
    pub window: Option<usize>,
    /// Rotation of queries and keys; `None` for no rotation.
    pub rotation: Option<Rotation>,
    /// Whether its MLP is a mixture of experts.
    pub mixed: bool,
    /// Whether a delta rule stands where attention stands in others.
    pub linear: bool,
}

/// `model_type` of a config.
pub fn model_type(config: &Value) -> &str {
    config.get("model_type").and_then(Value::as_str).unwrap_or("")
}

/// The family of a config, where it is one that can be computed.
pub fn known_family(config: &Value) -> Option<&'static Family> {
    family(model_type(&decoder(config)))
}

/// The decoder of a model that has other parts too, and what its text part is where config.json does not say it.
const WRAPPERS: [(&str, &str); 4] =
    [("gemma3", "gemma3_text"), ("mistral3", "mistral"), ("qwen3_5", "qwen3_5_text"), ("qwen3_5_moe", "qwen3_5_moe_text")];

/// What config.json says of the decoder: all of it, or its `text_config` with what the whole says of tokens and of tying.
pub fn decoder(config: &Value) -> Cow<'_, Value> {
    let (Some(text), None) = (config.get("text_config").filter(|text| text.is_object()), family(model_type(config))) else {
        return Cow::Borrowed(config);
    };
    let mut text = text.clone();
    let wrapper = WRAPPERS.iter().find(|(wrapper, _)| *wrapper == model_type(config));
    if text.get("model_type").is_none() {
        text["model_type"] = wrapper.map_or(Value::Null, |(_, text)| (*text).into());
    }
    // The flag of the whole decides, and it is true where it is absent.
    text["tie_word_embeddings"] = config.get("tie_word_embeddings").cloned().unwrap_or(Value::Bool(true));
    for key in ["bos_token_id", "eos_token_id", "num_nextn_predict_layers"] {
        if let Some(value) = config.get(key).filter(|_| text.get(key).is_none()) {
            text[key] = value.clone();
        }
    }
    Cow::Owned(text)
}

impl Config {
    /// Reads a config of a known family.
    ///
    /// # Errors
    /// One line naming the key and its value.
    pub fn read(config: &Value) -> Result<Self> {
        let config = decoder(config);
        let config = config.as_ref();
        let Some(family) = known_family(config) else {
            let known: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
            let found = shown(model_type(config));
            return Err(Error::input(format!(
                "config.json: model_type `{found}` cannot be computed; known are {}. Data-free round-to-nearest works without",
                known.join(", ")
            )));
        };
        let keys = Keys(config.as_object().ok_or_else(|| Error::input("config.json: not a JSON object"))?);
        refuse_unsupported(&keys, family)?;
        let defaults = family.defaults;
        let hidden = keys.required("hidden_size", 1 << 20)?;
        let [heads, vocabulary] = heads_and_vocabulary(&keys, defaults.heads_and_vocabulary)?;
        let latent = if family.mixing == Mixing::Latent { Some(Latent::read(&keys)?) } else { None };
        // All heads of a latent attention have keys of their own.
        let kv_heads = if latent.is_some() { heads } else { kv_heads(&keys, family, heads)? };
        let (head_dim, turning, scored) = match &latent {
            Some(latent) => (latent.head_dim(), latent.turning, latent.key()),
            None => [head_dim(&keys, family, hidden, heads)?; 3].into(),
        };
        let [scale, embed_factor] = factors(&keys, family, hidden, scored)?;
        let cap = |on: bool, key: &str, default: Option<f64>| match keys.0.contains_key(key) {
            true if on => keys.positive(key),
            false if on => Ok(default),
            _ => Ok(None),
        };
        let optional = |key: Option<&str>| key.map_or(Ok(None), |key| keys.positive(key));
        let max_positions = keys.count("max_position_embeddings", 1 << 31)?.unwrap_or(defaults.max_positions);
        if max_positions < 2 {
            return Err(Error::input(format!("config.json: max_position_embeddings is {max_positions}, a prediction needs 2")));
        }
        let mixture = Mixture::read(&keys, family)?;
        let layers = layers(&keys, family, turning, max_positions)?;
        let sharper = layers.iter().find_map(|layer| layer.rotation.as_ref()).map_or(1.0, Rotation::sharper);
        Ok(Self {
            family,
            hidden,
            intermediate: intermediate(&keys, mixture.as_ref(), &layers)?,
            vocabulary,
            heads,
            kv_heads,
            head_dim,
            epsilon: keys.positive(family.epsilon)?.unwrap_or(defaults.epsilon),
            max_positions,
            tied: keys.flag("tie_word_embeddings").unwrap_or(defaults.tied),
            activation: activation(&keys, family)?,
            scale: (scale * sharper) as f32,
            attention_cap: cap(family.attention_cap, "attn_logit_softcapping", defaults.caps[0])?.map(|cap| cap as f32),
            logits_cap: cap(family.logits_cap, "final_logit_softcapping", defaults.caps[1])?.map(|cap| cap as f32),
            embed_factor: embed_factor as f32,
            residual_factor: optional(family.residual)?.unwrap_or(1.0) as f32,
            logits_factor: match family.logits {
                LogitsFactor::One => 1.0,
                LogitsFactor::Over(key) => 1.0 / keys.positive(key)?.unwrap_or(defaults.logits) as f32,
                LogitsFactor::Times(key) => keys.positive(key)?.unwrap_or(defaults.logits) as f32,
            },
            biases: biases(&keys, family),
            mixture,
            layers,
            latent,
            delta: if matches!(family.mixing, Mixing::Hybrid(_)) { Some(delta::sizes(&keys)?) } else { None },
            bos: keys.tokens("bos_token_id", vocabulary)?.first().copied(),
            eos: keys.tokens("eos_token_id", vocabulary)?,
        })
    }

    /// Columns of queries as attention knows them.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns that the output projection of a layer reads.
    pub fn mixed_width(&self, layer: usize) -> usize {
        match (&self.delta, &self.latent) {
            (Some(sizes), _) if self.layers[layer].linear => sizes.values(),
            (_, Some(latent)) => self.heads * latent.value,
            _ => self.query_width(),
        }
    }

    /// The most of [`Self::mixed_width`] and of what attention and delta rules work on, over all layers.
    pub fn widest_mixed(&self) -> usize {
        let linear = self.delta.filter(|_| self.layers.iter().any(|layer| layer.linear)).map_or(0, |sizes| sizes.channels());
        self.query_width().max(linear)
    }

    /// The middle of the MLPs that are no mixtures; 0 where all are.
    pub fn dense_middle(&self) -> usize {
        if self.layers.iter().all(|layer| layer.mixed) { 0 } else { self.intermediate }
    }

    /// The widest middle of an expert; 0 where there is none.
    pub fn expert_middle(&self) -> usize {
        self.mixture.map_or(0, |mixture| mixture.width.max(mixture.shared.unwrap_or(0)))
    }

    /// The widest middle of the MLPs, or of the experts that a token goes to.
    pub fn widest_middle(&self) -> usize {
        let mixed = self.mixture.map_or(0, |mixture| mixture.rule.chosen * mixture.width + mixture.shared.unwrap_or(0));
        self.dense_middle().max(mixed)
    }

    /// Columns of k and of v.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Lengths of the weights of the query and key norms, where the family has them.
    pub fn qk_norm_widths(&self) -> Option<[usize; 2]> {
        match self.family.qk_norm {
            QkNorm::Absent => None,
            QkNorm::Head => Some([self.head_dim; 2]),
            QkNorm::Projection => Some([self.query_width(), self.kv_width()]),
        }
    }
}

/// `num_key_value_heads`, of which queries have a multiple.
fn kv_heads(keys: &Keys<'_>, family: &Family, heads: usize) -> Result<usize> {
    let kv_heads = match keys.count("num_key_value_heads", 1 << 16)? {
        Some(found) => found,
        None if keys.0.contains_key("num_key_value_heads") => heads,
        None => family.defaults.kv_heads.unwrap_or(heads),
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(Error::input(format!("config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")));
    }
    Ok(kv_heads)
}

/// `intermediate_size`, which may be left out where all layers are mixtures.
fn intermediate(keys: &Keys<'_>, mixture: Option<&Mixture>, layers: &[Layer]) -> Result<usize> {
    match mixture.filter(|_| layers.iter().all(|layer| layer.mixed) && !keys.0.contains_key("intermediate_size")) {
        Some(mixture) => Ok(mixture.width),
        None => keys.required("intermediate_size", 1 << 24),
    }
}

/// Which linear layers must have biases; families that always have those of attention do not look at the flag.
fn biases(keys: &Keys<'_>, family: &Family) -> [bool; 3] {
    let [attention, mlp] = ["attention_bias", "mlp_bias"].map(|key| keys.flag(key) == Some(true));
    match family.biases {
        Biases::Qkv => [keys.flag("qkv_bias").unwrap_or(true), false, false],
        Biases::QkvFlag => [attention, false, false],
        Biases::Flag => [attention, attention, mlp],
        Biases::Always => [keys.flag("attention_bias").unwrap_or(true); 3],
    }
}

/// `num_attention_heads` and `vocab_size`, which some families may leave out.
fn heads_and_vocabulary(keys: &Keys<'_>, silent: Option<[usize; 2]>) -> Result<[usize; 2]> {
    let read = |key: &str, limit: u64, at: usize| match silent.filter(|_| !keys.0.contains_key(key)) {
        Some(default) => Ok(default[at]),
        None => keys.required(key, limit),
    };
    Ok([read("num_attention_heads", 1 << 16, 0)?, read("vocab_size", 1 << 24, 1)?])
}

fn head_dim(keys: &Keys<'_>, family: &Family, hidden: usize, heads: usize) -> Result<usize> {
    let head_dim = match (keys.count("head_dim", 1 << 16)?, family.defaults.head_dim) {
        (Some(found), _) => found,
        (None, Some(default)) if !keys.0.contains_key("head_dim") => default,
        _ if hidden.is_multiple_of(heads) => hidden / heads,
        _ => {
            return Err(Error::input(format!(
                "config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is absent"
            )));
        }
    };
    if head_dim % 2 != 0 {
        return Err(Error::input(format!("config.json: head_dim {head_dim} is odd; rotation needs an even one")));
    }
    Ok(head_dim)
}

fn activation(keys: &Keys<'_>, family: &Family) -> Result<Activation> {
    let (key, default) = family.activation;
    match keys.text(key).filter(|_| default != Activation::Clamped) {
        None => Ok(default),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_tanh") => Ok(Activation::GeluTanh),
        Some(other) => {
            Err(Error::input(format!("config.json: {key} `{}` is not supported; known are silu and gelu_pytorch_tanh", shown(other))))
        }
    }
}

/// Factor of the scores and of the embedding.
fn factors(keys: &Keys<'_>, family: &Family, hidden: usize, head_dim: usize) -> Result<[f64; 2]> {
    let scale = match family.scale {
        Scale::HeadDim => (head_dim as f64).powf(-0.5),
        Scale::InverseRoot(key) => keys.positive(key)?.unwrap_or(256.0).powf(-0.5),
        Scale::Key(key) => keys.positive(key)?.unwrap_or(1.0),
    };
    let embed_factor = match family.embed {
        Embed::One => 1.0,
        Embed::RootHidden => (hidden as f64).sqrt(),
        Embed::Key(key) => keys.positive(key)?.unwrap_or(1.0),
    };
    Ok([scale, embed_factor])
}

/// Keys that change the mathematics and that the forward does not know.
fn refuse_unsupported(keys: &Keys<'_>, family: &Family) -> Result<()> {
    let wrong =
        |key: &str, kind: &str| Err(Error::input(format!("config.json: {key} is {}, it must be {kind}", shown(&keys.0[key].to_string()))));
    for key in ["attention_bias", "mlp_bias", "qkv_bias", "tie_word_embeddings", "use_sliding_window", "use_bidirectional_attention"] {
        if keys.0.get(key).is_some_and(|value| !value.is_null() && !value.is_boolean()) {
            return wrong(key, "true or false");
        }
    }
    for key in ["hidden_act", "hidden_activation"] {
        if keys.0.get(key).is_some_and(|value| !value.is_null() && !value.is_string()) {
            return wrong(key, "a name");
        }
    }
    for key in ["use_bidirectional_attention", "quantize_embeddings"] {
        if keys.flag(key) == Some(true) {
            return Err(Error::input(format!("config.json: {key} true is not supported")));
        }
    }
    let experts: &[&str] = if family.mixed.is_some() { &[] } else { &["num_experts", "num_local_experts"] };
    for key in ["clip_qkv"].iter().chain(experts) {
        if keys.0.get(*key).is_some_and(|value| value.as_f64().is_some_and(|number| number > 0.0)) {
            return Err(Error::input(format!("config.json: {key} is not supported for this model_type")));
        }
    }
    Ok(())
}

fn layers(keys: &Keys<'_>, family: &Family, head_dim: usize, max_positions: usize) -> Result<Vec<Layer>> {
    let count = keys.required("num_hidden_layers", 10_000)?;
    let mut rotates = rotating(keys, family, count)?;
    let slides = sliding(keys, family, count, &rotates)?;
    if family.rotates == Rotates::Sliding {
        rotates.clone_from(&slides);
    }
    let window = match keys.0.get("sliding_window") {
        Some(Value::Null) => None,
        // Some versions write 0 where no window is used.
        Some(value) if *value == 0 && keys.flag("use_sliding_window") == Some(false) => None,
        Some(_) => keys.count("sliding_window", 1 << 31)?,
        None => family.defaults.window,
    };
    let tables = rotation::tables(keys, family, head_dim, max_positions)?;
    let mixes = Mixture::layers(keys, family, count)?;
    let linear = linear(keys, family, count)?;
    let layers = slides.iter().zip(&rotates).zip(mixes.iter().zip(&linear)).map(|((&slides, &rotates), (&mixed, &linear))| {
        let table = if slides { &tables.sliding } else { &tables.full };
        Layer { window: window.filter(|_| slides), rotation: table.clone().filter(|_| rotates && !linear), mixed, linear }
    });
    Ok(layers.collect())
}

/// In which layers a delta rule stands.
fn linear(keys: &Keys<'_>, family: &Family, count: usize) -> Result<Vec<bool>> {
    if !matches!(family.mixing, Mixing::Hybrid(_)) {
        return Ok(vec![false; count]);
    }
    let every = keys.count("full_attention_interval", 1 << 20)?.unwrap_or(4);
    let listed = kinds(keys, count, ["linear_attention", "full_attention"])?;
    Ok(listed.unwrap_or_else(|| (0..count).map(|layer| !(layer + 1).is_multiple_of(every)).collect()))
}

/// Which layers `layer_types` says to be of the first of two kinds.
fn kinds(keys: &Keys<'_>, count: usize, [first, second]: [&str; 2]) -> Result<Option<Vec<bool>>> {
    let Some(list) = keys.0.get("layer_types").and_then(Value::as_array) else { return Ok(None) };
    if list.len() != count {
        return Err(Error::input(format!("config.json: layer_types lists {} layers, num_hidden_layers is {count}", list.len())));
    }
    let kinds = list.iter().map(|kind| match kind.as_str() {
        Some(kind) if kind == first => Ok(true),
        Some(kind) if kind == second => Ok(false),
        other => Err(Error::input(format!("config.json: layer type `{}` is not supported", shown(other.unwrap_or("?"))))),
    });
    kinds.collect::<Result<_>>().map(Some)
}

fn rotating(keys: &Keys<'_>, family: &Family, count: usize) -> Result<Vec<bool>> {
    let Rotates::Listed(key) = family.rotates else { return Ok(vec![true; count]) };
    if let Some(list) = keys.0.get(key).and_then(Value::as_array) {
        if list.len() != count {
            return Err(Error::input(format!("config.json: {key} lists {} layers, num_hidden_layers is {count}", list.len())));
        }
        return Ok(list.iter().map(|entry| entry.as_u64() != Some(0)).collect());
    }
    let every = keys.count("no_rope_layer_interval", 1 << 20)?.unwrap_or(4);
    Ok((0..count).map(|layer| (layer + 1) % every != 0).collect())
}

fn sliding(keys: &Keys<'_>, family: &Family, count: usize, rotates: &[bool]) -> Result<Vec<bool>> {
    let rule = match family.windows {
        Windows::Never => return Ok(vec![false; count]),
        Windows::Every => return Ok(vec![true; count]),
        Windows::EveryWhenUsed => return Ok(vec![keys.flag("use_sliding_window") == Some(true); count]),
        Windows::ByType(rule) => rule,
    };
    let used = keys.flag("use_sliding_window").unwrap_or(false);
    let switched = !matches!(rule, SlidingRule::All | SlidingRule::Even | SlidingRule::AllButEvery(_));
    if switched && !used {
        return Ok(vec![false; count]);
    }
    if let Some(slides) = kinds(keys, count, ["sliding_attention", "full_attention"])? {
        return Ok(slides);
    }
    let first = keys.count("max_window_layers", 1 << 20)?.unwrap_or(if keys.0.contains_key("max_window_layers") { 0 } else { 28 });
    let pattern = keys.count("sliding_window_pattern", 1 << 20)?;
    let slides = |layer: usize| match rule {
        SlidingRule::All => true,
        SlidingRule::FromMaxWindowLayers => layer >= first,
        SlidingRule::Even => layer.is_multiple_of(2),
        SlidingRule::AllButEvery(every) => !(layer + 1).is_multiple_of(pattern.unwrap_or(every)),
        SlidingRule::WithoutRope => !rotates[layer],
        SlidingRule::EvenBelowMaxWindowLayers => layer.is_multiple_of(2) && layer < first,
    };
    Ok((0..count).map(slides).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn base(extra: Value) -> Value {
        let mut config = json!({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4,
            "intermediate_size": 128, "vocab_size": 100});
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        config
    }

    #[test]
    fn hostile_numbers_are_refused_by_name() {
        for (extra, reason) in [
            (json!({"hidden_size": 0}), "hidden_size is 0"),
            (json!({"hidden_size": -4}), "hidden_size is -4"),
            (json!({"hidden_size": 1e12}), "hidden_size is"),
            (json!({"num_hidden_layers": 2_147_483_648u64}), "num_hidden_layers is 2147483648"),
            (json!({"vocab_size": "100"}), "vocab_size is \"100\""),
            (json!({"vocab_size": null}), "vocab_size is missing"),
            (json!({"num_attention_heads": 3}), "not a multiple"),
            (json!({"num_key_value_heads": 3}), "not a multiple of num_key_value_heads 3"),
            (json!({"head_dim": 7}), "odd"),
            (json!({"rms_norm_eps": -1.0}), "rms_norm_eps is -1.0"),
            (json!({"hidden_act": "relu"}), "relu"),
            (json!({"model_type": "mamba"}), "mamba"),
            (json!({"rope_scaling": {"rope_type": "bend"}}), "bend"),
            (json!({"rope_parameters": {"rope_theta": 0.0}}), "rope_theta"),
            (json!({"rope_scaling": {"type": 3}}), "type of rope is 3"),
            (json!({"rope_scaling": "linear"}), "rope_scaling is"),
            (json!({"eos_token_id": "2"}), "eos_token_id is \"2\""),
            (json!({"bos_token_id": [1, 2.5]}), "bos_token_id is [1,2.5]"),
            (json!({"bos_token_id": [1, 100]}), "bos_token_id is 100, vocab_size is 100"),
        ] {
            let error = Config::read(&base(extra)).unwrap_err().to_string();
            assert!(error.contains(reason), "{reason}: {error}");
        }
    }

    #[test]
    fn soft_caps_that_are_absent_have_the_family_s_default_and_null_means_none() {
        let caps = |extra| {
            let config = Config::read(&base(extra)).unwrap();
            (config.attention_cap, config.logits_cap)
        };
        let gemma = json!({"model_type": "gemma2", "num_key_value_heads": 2});
        assert_eq!(caps(gemma.clone()), (Some(50.0), Some(30.0)));
        let mut null = gemma;
        null["final_logit_softcapping"] = Value::Null;
        assert_eq!(caps(null), (Some(50.0), None));
        assert_eq!(caps(json!({"model_type": "gemma3_text", "num_key_value_heads": 2})), (None, None));
    }

    #[test]
    fn the_text_part_of_a_larger_model_is_its_decoder() {
        let text = base(json!({"num_key_value_heads": 4, "bos_token_id": 3}));
        let mut inner = text.clone();
        inner.as_object_mut().unwrap().remove("model_type");
        for (wrapper, family) in WRAPPERS {
            let config = Config::read(&json!({"model_type": wrapper, "text_config": inner, "eos_token_id": 7})).unwrap();
            assert_eq!((config.family.model_type, config.tied, config.bos, config.eos), (family, true, Some(3), vec![7]));
        }
        let sparse = json!({"model_type": "gemma3", "text_config": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}});
        let config = Config::read(&sparse).unwrap();
        assert_eq!((config.heads, config.kv_heads, config.head_dim, config.vocabulary), (8, 4, 256, 262_208));
        let other = json!({"model_type": "pictures", "text_config": text, "tie_word_embeddings": false});
        assert_eq!((known_family(&other).unwrap().model_type, Config::read(&other).unwrap().tied), ("llama", false));
        assert!(Config::read(&json!({"model_type": "pictures", "text_config": inner})).is_err());
    }

    #[test]
    fn null_is_not_absent() {
        let windows = |extra| Config::read(&base(extra)).unwrap().layers.iter().map(|layer| layer.window).collect::<Vec<_>>();
        assert_eq!(windows(json!({"model_type": "mistral", "num_key_value_heads": 4})), [Some(4096); 4]);
        assert_eq!(windows(json!({"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": null})), [None; 4]);
        assert_eq!(
            windows(json!({"model_type": "qwen2", "sliding_window": 0, "use_sliding_window": false, "num_key_value_heads": 4})),
            [None; 4]
        );
        assert!(Config::read(&base(json!({"sliding_window": 0}))).is_err());
        let head_dim = |extra| Config::read(&base(extra)).unwrap().head_dim;
        assert_eq!(head_dim(json!({"model_type": "qwen3", "num_key_value_heads": 4})), 128);
        assert_eq!(head_dim(json!({"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": null})), 16);
    }
}
