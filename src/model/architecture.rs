//! An architecture is data: one row per family says which norms, windows, factors and defaults it has. The forward
//! reads the row; a new family whose switches exist is one more row.

use crate::kernels::gated::Activation;
pub use crate::kernels::rms_norm::NormKind;

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
    /// Whether the MLP reads what attention reads, rather than the residual stream after it.
    pub parallel: bool,
}

const PRE: Places = Places {
    attention_in: Some("input_layernorm"),
    attention_out: None,
    mlp_in: Some("post_attention_layernorm"),
    mlp_out: None,
    parallel: false,
};
const SANDWICH: Places = Places {
    attention_out: Some("post_attention_layernorm"),
    mlp_in: Some("pre_feedforward_layernorm"),
    mlp_out: Some("post_feedforward_layernorm"),
    ..PRE
};
const SANDWICH_GLM: Places = Places { attention_out: Some("post_self_attn_layernorm"), mlp_out: Some("post_mlp_layernorm"), ..PRE };
const PARALLEL: Places = Places { mlp_in: None, parallel: true, ..PRE };
const POST: Places = Places { attention_in: None, mlp_in: None, ..SANDWICH };

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
    /// As every layer, when `use_sliding_window` is true as well.
    EveryWhenUsed,
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
    /// Those with an even number below `max_window_layers`, when `use_sliding_window`.
    EvenBelowMaxWindowLayers,
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

/// The factor of the logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsFactor {
    /// 1.
    One,
    /// 1 over the value of this key.
    Over(&'static str),
    /// The value of this key.
    Times(&'static str),
}

/// Which layers rotate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotates {
    /// All.
    Every,
    /// Those that the list of this key says (1) or not (0).
    Listed(&'static str),
    /// Those under a sliding window.
    Sliding,
}

/// Which columns of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// Column t and column t + half.
    Half,
    /// Columns 2t and 2t + 1.
    Interleaved,
}

/// Which linear layers of attention have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Biases {
    /// All, where `attention_bias` is true.
    Flag,
    /// Queries, keys and values, where `attention_bias` is true.
    QkvFlag,
    /// Queries, keys and values, unless `qkv_bias` is false.
    Qkv,
}

/// How the MLP of a block is a mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mixed {
    /// Name of the mixture in a block.
    pub name: &'static str,
    /// Names of gate, up and down of an expert.
    pub layers: [&'static str; 3],
    /// Key of the columns in the middle of an expert.
    pub width: &'static str,
    /// Whether all layers are mixtures; else `mlp_only_layers` and `decoder_sparse_step` say which.
    pub every: bool,
    /// Whether the shares of the chosen experts always add up to one; else `norm_topk_prob` says it.
    pub renormalized: bool,
    /// Name of the expert of all tokens, and of what scales its output, where there is one.
    pub shared: Option<[&'static str; 2]>,
    /// Experts, experts per token, and columns in the middle of an expert and of the shared one, where config.json is silent.
    pub defaults: [usize; 4],
}

/// Gate, up and down as most families call them.
pub const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// What config.json leaves out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    /// `num_attention_heads` and `vocab_size` when absent; `None` means that they must be there.
    pub heads_and_vocabulary: Option<[usize; 2]>,
    /// `head_dim` when absent; `None` means hidden_size / heads.
    pub head_dim: Option<usize>,
    /// `num_key_value_heads` when absent; `None` means as many as heads.
    pub kv_heads: Option<usize>,
    /// The ε of norms.
    pub epsilon: f64,
    /// `partial_rotary_factor`.
    pub partial: f64,
    /// Factor of the logits.
    pub logits: f64,
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
    heads_and_vocabulary: None,
    head_dim: None,
    kv_heads: None,
    epsilon: 1e-6,
    partial: 1.0,
    logits: 1.0,
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
    /// Factor of the logits.
    pub logits: LogitsFactor,
    /// Which layers rotate.
    pub rotates: Rotates,
    /// Which columns turn together.
    pub pairing: Pairing,
    /// Whether queries grow with the position, by `llama_4_scaling_beta`.
    pub position_scale: bool,
    /// Names that `rope_type` has for long-context rotation beside its own.
    pub longrope_too: &'static [&'static str],
    /// Biases of attention.
    pub biases: Biases,
    /// Name of the one tensor of queries, keys and values, where they are one.
    pub fused_qkv: Option<&'static str>,
    /// Name of the one tensor of gate and up, where they are one.
    pub fused_mlp: Option<&'static str>,
    /// Key of the ε of norms.
    pub epsilon: &'static str,
    /// Mixture of experts.
    pub mixed: Option<Mixed>,
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
    logits: LogitsFactor::One,
    rotates: Rotates::Every,
    pairing: Pairing::Half,
    position_scale: false,
    longrope_too: &[],
    biases: Biases::Flag,
    fused_qkv: None,
    fused_mlp: None,
    epsilon: "rms_norm_eps",
    mixed: None,
    activation: ("hidden_act", Activation::Silu),
    defaults: DEFAULTS,
};

const QWEN2: Family = Family {
    model_type: "qwen2",
    biases: Biases::Qkv,
    windows: Windows::ByType(SlidingRule::FromMaxWindowLayers),
    defaults: Defaults { kv_heads: Some(32), window: Some(4096), max_positions: 32768, ..DEFAULTS },
    ..LLAMA
};

const QWEN2_MOE: Family = Family {
    model_type: "qwen2_moe",
    windows: Windows::ByType(SlidingRule::EvenBelowMaxWindowLayers),
    mixed: Some(Mixed {
        name: "mlp",
        layers: PROJECTIONS,
        width: "moe_intermediate_size",
        every: false,
        renormalized: false,
        shared: Some(["shared_expert", "shared_expert_gate"]),
        defaults: [60, 4, 1408, 5632],
    }),
    defaults: Defaults { kv_heads: Some(16), ..QWEN2.defaults },
    ..QWEN2
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
        biases: Biases::Flag,
        defaults: Defaults { head_dim: Some(128), ..QWEN2.defaults },
        ..QWEN2
    },
    GEMMA2,
    Family {
        model_type: "gemma3_text",
        qk_norm: QkNorm::Head,
        windows: Windows::ByType(SlidingRule::AllButEvery(6)),
        attention_cap: false,
        defaults: Defaults {
            heads_and_vocabulary: Some([8, 262_208]),
            theta: 1e6,
            local_theta: Some(1e4),
            max_positions: 131_072,
            caps: [None; 2],
            ..GEMMA2.defaults
        },
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
        logits: LogitsFactor::Over("logits_scaling"),
        ..LLAMA
    },
    Family {
        model_type: "smollm3",
        windows: Windows::ByType(SlidingRule::WithoutRope),
        rotates: Rotates::Listed("no_rope_layers"),
        defaults: Defaults { kv_heads: Some(4), theta: 2e6, tied: true, max_positions: 32768, ..DEFAULTS },
        ..LLAMA
    },
    QWEN2_MOE,
    Family {
        model_type: "qwen3_moe",
        qk_norm: QkNorm::Head,
        windows: Windows::EveryWhenUsed,
        biases: Biases::Flag,
        mixed: Some(Mixed {
            name: "mlp",
            layers: PROJECTIONS,
            width: "moe_intermediate_size",
            every: false,
            renormalized: false,
            shared: None,
            defaults: [128, 8, 768, 0],
        }),
        defaults: Defaults { kv_heads: Some(4), ..QWEN2.defaults },
        ..QWEN2
    },
    Family {
        model_type: "mixtral",
        windows: Windows::Every,
        mixed: Some(Mixed {
            name: "block_sparse_moe",
            layers: ["w1", "w3", "w2"],
            width: "intermediate_size",
            every: true,
            renormalized: true,
            shared: None,
            defaults: [8, 2, 14336, 0],
        }),
        defaults: Defaults { kv_heads: Some(8), epsilon: 1e-5, theta: 1e6, max_positions: 131_072, ..DEFAULTS },
        ..LLAMA
    },
    Family {
        model_type: "ministral3",
        windows: Windows::Every,
        position_scale: true,
        defaults: Defaults { head_dim: Some(128), kv_heads: Some(8), epsilon: 1e-5, theta: 1e6, max_positions: 262_144, ..DEFAULTS },
        ..LLAMA
    },
    Family {
        model_type: "phi3",
        windows: Windows::Every,
        longrope_too: &["su", "yarn"],
        fused_qkv: Some("self_attn.qkv_proj"),
        fused_mlp: Some("mlp.gate_up_proj"),
        defaults: Defaults { epsilon: 1e-5, max_positions: 4096, ..DEFAULTS },
        ..LLAMA
    },
    Family {
        model_type: "glm4",
        places: SANDWICH_GLM,
        pairing: Pairing::Interleaved,
        biases: Biases::QkvFlag,
        fused_mlp: Some("mlp.gate_up_proj"),
        defaults: Defaults { head_dim: Some(128), kv_heads: Some(2), epsilon: 1.5625e-7, partial: 0.5, max_positions: 131_072, ..DEFAULTS },
        ..LLAMA
    },
    Family {
        model_type: "cohere2",
        norm: NormKind::Layer,
        places: PARALLEL,
        windows: Windows::ByType(SlidingRule::AllButEvery(4)),
        logits: LogitsFactor::Times("logit_scale"),
        rotates: Rotates::Sliding,
        pairing: Pairing::Interleaved,
        epsilon: "layer_norm_eps",
        defaults: Defaults { epsilon: 1e-5, logits: 0.0625, tied: true, window: Some(4096), max_positions: 8192, ..DEFAULTS },
        ..LLAMA
    },
];

/// The row of a model type.
pub fn family(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.model_type == model_type)
}
