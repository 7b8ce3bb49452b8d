//! An architecture is data: one row per family says which norms, windows, factors and defaults it has. The forward
//! reads the row; a new family whose switches exist is one more row.

use crate::kernels::gated::Activation;

/// How a norm uses its weight; the statistics are the root mean square in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// x̂ · w.
    Plain,
    /// x̂ · (1 + w).
    OnePlus,
}

/// The tensor names of the up to four norms of a block; a missing norm is the identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// Before attention.
    pub attention_in: Option<&'static str>,
    /// After attention, before the residual sum.
    pub attention_out: Option<&'static str>,
    /// Before the MLP.
    pub mlp_in: Option<&'static str>,
    /// After the MLP, before the residual sum.
    pub mlp_out: Option<&'static str>,
}

const PRE: Places =
    Places { attention_in: Some("input_layernorm"), attention_out: None, mlp_in: Some("post_attention_layernorm"), mlp_out: None };
const SANDWICH: Places = Places {
    attention_in: Some("input_layernorm"),
    attention_out: Some("post_attention_layernorm"),
    mlp_in: Some("pre_feedforward_layernorm"),
    mlp_out: Some("post_feedforward_layernorm"),
};
const POST: Places = Places {
    attention_in: None,
    attention_out: Some("post_attention_layernorm"),
    mlp_in: None,
    mlp_out: Some("post_feedforward_layernorm"),
};

/// Norm of queries and keys before the rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    Absent,
    /// One weight of `head_dim` for every head.
    Head,
    /// One weight over the whole projection.
    Projection,
}

/// Which layers see only a sliding window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows {
    /// No layer.
    Never,
    /// Every layer, when `sliding_window` is a number.
    Every,
    /// Those that `layer_types` lists; without the list, this rule.
    ByType(SlidingRule),
}

/// Which layers slide when config.json has no `layer_types`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlidingRule {
    /// All.
    All,
    /// Those from `max_window_layers` on, when `use_sliding_window`.
    FromMaxWindowLayers,
    /// Those with an even number.
    Even,
    /// All but every n-th; n may be overridden by `sliding_window_pattern`.
    AllButEvery(usize),
    /// Those without rotation, when `use_sliding_window`.
    WithoutRope,
}

/// The factor of the attention scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// head_dim^−½.
    HeadDim,
    /// (value of this key)^−½.
    InverseRoot(&'static str),
    /// The value of this key.
    Key(&'static str),
}

/// The factor of the embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Embed {
    /// 1.
    One,
    /// √hidden_size.
    RootHidden,
    /// The value of this key.
    Key(&'static str),
}

/// What config.json leaves out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    /// `head_dim` when absent; `None` means hidden_size / heads.
    pub head_dim: Option<usize>,
    /// `num_key_value_heads` when absent; `None` means as many as heads.
    pub kv_heads: Option<usize>,
    /// `rms_norm_eps`.
    pub epsilon: f64,
    /// `rope_theta` (of full-attention layers).
    pub theta: f64,
    /// `rope_local_base_freq` of sliding layers, where they have a table of their own.
    pub local_theta: Option<f64>,
    /// `tie_word_embeddings`.
    pub tied: bool,
    /// `sliding_window` when absent.
    pub window: Option<usize>,
    /// `max_position_embeddings`.
    pub max_positions: usize,
    /// `attn_logit_softcapping` and `final_logit_softcapping`.
    pub caps: [Option<f64>; 2],
}

const DEFAULTS: Defaults = Defaults {
    head_dim: None,
    kv_heads: None,
    epsilon: 1e-6,
    theta: 1e4,
    local_theta: None,
    tied: false,
    window: None,
    max_positions: 2048,
    caps: [None; 2],
};

/// One decoder family.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Family {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// How norms use their weight.
    pub norm: NormKind,
    /// Where norms stand.
    pub places: Places,
    /// Norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Sliding windows.
    pub windows: Windows,
    /// Factor of the scores.
    pub scale: Scale,
    /// Whether `attn_logit_softcapping` acts.
    pub attention_cap: bool,
    /// Whether `final_logit_softcapping` acts.
    pub logits_cap: bool,
    /// Factor of the embedding.
    pub embed: Embed,
    /// Key of the factor of both residual branches.
    pub residual: Option<&'static str>,
    /// Key of a divisor of the logits.
    pub logits_over: Option<&'static str>,
    /// Key of the list that says which layers rotate (1) or not (0).
    pub rope_list: Option<&'static str>,
    /// Whether queries, keys and values always have biases.
    pub qkv_bias: bool,
    /// Key and default of the activation.
    pub activation: (&'static str, Activation),
    /// What config.json leaves out.
    pub defaults: Defaults,
}

const LLAMA: Family = Family {
    model_type: "llama",
    norm: NormKind::Plain,
    places: PRE,
    qk_norm: QkNorm::Absent,
    windows: Windows::Never,
    scale: Scale::HeadDim,
    attention_cap: false,
    logits_cap: false,
    embed: Embed::One,
    residual: None,
    logits_over: None,
    rope_list: None,
    qkv_bias: false,
    activation: ("hidden_act", Activation::Silu),
    defaults: DEFAULTS,
};

const QWEN2: Family = Family {
    model_type: "qwen2",
    qkv_bias: true,
    windows: Windows::ByType(SlidingRule::FromMaxWindowLayers),
    defaults: Defaults { kv_heads: Some(32), window: Some(4096), max_positions: 32768, ..DEFAULTS },
    ..LLAMA
};

const GEMMA2: Family = Family {
    model_type: "gemma2",
    norm: NormKind::OnePlus,
    places: SANDWICH,
    windows: Windows::ByType(SlidingRule::Even),
    scale: Scale::InverseRoot("query_pre_attn_scalar"),
    attention_cap: true,
    logits_cap: true,
    embed: Embed::RootHidden,
    activation: ("hidden_activation", Activation::GeluTanh),
    defaults: Defaults {
        head_dim: Some(256),
        kv_heads: Some(4),
        tied: true,
        window: Some(4096),
        max_positions: 8192,
        caps: [Some(50.0), Some(30.0)],
        ..DEFAULTS
    },
    ..LLAMA
};

const OLMO2: Family =
    Family { model_type: "olmo2", places: POST, qk_norm: QkNorm::Projection, defaults: Defaults { epsilon: 1e-5, ..DEFAULTS }, ..LLAMA };

/// Every family that can be computed.
pub const FAMILIES: &[Family] = &[
    LLAMA,
    Family {
        model_type: "mistral",
        windows: Windows::Every,
        defaults: Defaults { kv_heads: Some(8), window: Some(4096), max_positions: 131_072, ..DEFAULTS },
        ..LLAMA
    },
    Family {
        model_type: "ministral",
        windows: Windows::ByType(SlidingRule::All),
        defaults: Defaults { kv_heads: Some(8), window: Some(4096), max_positions: 131_072, ..DEFAULTS },
        ..LLAMA
    },
    QWEN2,
    Family {
        model_type: "qwen3",
        qk_norm: QkNorm::Head,
        qkv_bias: false,
        defaults: Defaults { head_dim: Some(128), ..QWEN2.defaults },
        ..QWEN2
    },
    GEMMA2,
    Family {
        model_type: "gemma3_text",
        qk_norm: QkNorm::Head,
        windows: Windows::ByType(SlidingRule::AllButEvery(6)),
        attention_cap: false,
        defaults: Defaults { theta: 1e6, local_theta: Some(1e4), max_positions: 131_072, caps: [None; 2], ..GEMMA2.defaults },
        ..GEMMA2
    },
    OLMO2,
    Family {
        model_type: "olmo3",
        windows: Windows::ByType(SlidingRule::AllButEvery(4)),
        defaults: Defaults { theta: 5e5, local_theta: Some(5e5), window: Some(4096), ..OLMO2.defaults },
        ..OLMO2
    },
    Family {
        model_type: "granite",
        scale: Scale::Key("attention_multiplier"),
        embed: Embed::Key("embedding_multiplier"),
        residual: Some("residual_multiplier"),
        logits_over: Some("logits_scaling"),
        ..LLAMA
    },
    Family {
        model_type: "smollm3",
        windows: Windows::ByType(SlidingRule::WithoutRope),
        rope_list: Some("no_rope_layers"),
        defaults: Defaults { kv_heads: Some(4), theta: 2e6, tied: true, max_positions: 32768, ..DEFAULTS },
        ..LLAMA
    },
];

/// The row of a model type.
pub fn family(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.model_type == model_type)
}
