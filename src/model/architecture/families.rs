//! One row per family.

use crate::kernels::gated::Activation;
use crate::model::architecture::{
    Biases, Defaults, DeltaNames, Embed, Family, LogitsFactor, Lying, Mixed, MixedLayers, Mixing, NormKind, Pairing, Places, QkNorm,
    Renormalized, Rotates, Routing, Scale, SlidingRule, Windows,
};

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

/// Gate, up and down as most families call them.
pub const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

const DEFAULTS: Defaults = Defaults {
    heads_and_vocabulary: None,
    head_dim: None,
    kv_heads: None,
    epsilon: 1e-6,
    partial: 1.0,
    logits: 1.0,
    theta: 1e4,
    rope: None,
    local_theta: None,
    tied: false,
    window: None,
    max_positions: 2048,
    caps: [None; 2],
};

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
    mixing: Mixing::Attention,
    gated: false,
    sinks: false,
    fused_qkv: None,
    fused_mlp: None,
    epsilon: "rms_norm_eps",
    mixed: None,
    activation: ("hidden_act", Activation::Silu),
    defaults: DEFAULTS,
};

/// Of qwen3_moe.
const MIXED: Mixed = Mixed {
    name: "mlp",
    router: "gate",
    layers: PROJECTIONS,
    lying: Lying::Apart,
    width: "moe_intermediate_size",
    which: MixedLayers::Sparse,
    routing: Routing::Softmax,
    renormalized: Renormalized::Key(false),
    shared: None,
    defaults: [128, 8, 768, 0],
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
    mixed: Some(Mixed { shared: Some(("shared_expert", Some("shared_expert_gate"))), defaults: [60, 4, 1408, 5632], ..MIXED }),
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

const QWEN3_NEXT: Family = Family {
    model_type: "qwen3_next",
    norm: NormKind::OnePlus,
    qk_norm: QkNorm::Head,
    gated: true,
    mixing: Mixing::Hybrid(DeltaNames { input: "linear_attn.in_proj_qkvz", gate: None, controls: &["linear_attn.in_proj_ba"] }),
    mixed: Some(Mixed {
        renormalized: Renormalized::Key(true),
        shared: Some(("shared_expert", Some("shared_expert_gate"))),
        defaults: [512, 10, 512, 512],
        ..MIXED
    }),
    defaults: Defaults { head_dim: Some(256), kv_heads: Some(2), partial: 0.25, max_positions: 32768, ..DEFAULTS },
    ..LLAMA
};

/// What mixes tokens in qwen3_5.
const QWEN3_5: Mixing = Mixing::Hybrid(DeltaNames {
    input: "linear_attn.in_proj_qkv",
    gate: Some("linear_attn.in_proj_z"),
    controls: &["linear_attn.in_proj_b", "linear_attn.in_proj_a"],
});

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
        mixed: Some(MIXED),
        defaults: Defaults { kv_heads: Some(4), ..QWEN2.defaults },
        ..QWEN2
    },
    Family {
        model_type: "olmoe",
        qk_norm: QkNorm::Projection,
        mixed: Some(Mixed { width: "intermediate_size", which: MixedLayers::Every, defaults: [64, 8, 2048, 0], ..MIXED }),
        defaults: Defaults { epsilon: 1e-5, max_positions: 4096, ..DEFAULTS },
        ..LLAMA
    },
    Family {
        model_type: "mixtral",
        windows: Windows::Every,
        mixed: Some(Mixed {
            name: "block_sparse_moe",
            layers: ["w1", "w3", "w2"],
            width: "intermediate_size",
            which: MixedLayers::Every,
            renormalized: Renormalized::Always,
            defaults: [8, 2, 14336, 0],
            ..MIXED
        }),
        defaults: Defaults { kv_heads: Some(8), epsilon: 1e-5, theta: 1e6, max_positions: 131_072, ..DEFAULTS },
        ..LLAMA
    },
    Family {
        model_type: "ministral3",
        windows: Windows::Every,
        position_scale: true,
        defaults: Defaults {
            head_dim: Some(128),
            kv_heads: Some(8),
            epsilon: 1e-5,
            theta: 1e6,
            rope: Some(
                r#"{"rope_type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 1,
                    "original_max_position_embeddings": 16384, "llama_4_scaling_beta": 0.1}"#,
            ),
            max_positions: 262_144,
            ..DEFAULTS
        },
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
    Family {
        model_type: "deepseek_v3",
        mixing: Mixing::Latent,
        pairing: Pairing::Interleaved,
        mixed: Some(Mixed {
            which: MixedLayers::AfterFirst,
            routing: Routing::GroupedSigmoid,
            renormalized: Renormalized::Key(true),
            shared: Some(("shared_experts", None)),
            defaults: [256, 8, 2048, 1],
            ..MIXED
        }),
        defaults: Defaults { max_positions: 4096, ..DEFAULTS },
        ..LLAMA
    },
    QWEN3_NEXT,
    Family { model_type: "qwen3_5_text", mixing: QWEN3_5, mixed: None, ..QWEN3_NEXT },
    Family {
        model_type: "qwen3_5_moe_text",
        mixing: QWEN3_5,
        mixed: Some(Mixed {
            which: MixedLayers::Every,
            renormalized: Renormalized::Always,
            shared: Some(("shared_expert", Some("shared_expert_gate"))),
            defaults: [256, 8, 512, 512],
            ..MIXED
        }),
        ..QWEN3_NEXT
    },
    Family {
        model_type: "gpt_oss",
        windows: Windows::ByType(SlidingRule::Even),
        sinks: true,
        mixed: Some(Mixed {
            router: "router",
            lying: Lying::Woven,
            width: "intermediate_size",
            which: MixedLayers::Every,
            renormalized: Renormalized::Always,
            defaults: [128, 4, 2880, 0],
            ..MIXED
        }),
        biases: Biases::Always,
        activation: ("hidden_act", Activation::Clamped),
        defaults: Defaults {
            head_dim: Some(64),
            kv_heads: Some(8),
            epsilon: 1e-5,
            theta: 1.5e5,
            rope: Some(
                r#"{"rope_type": "yarn", "factor": 32, "beta_fast": 32, "beta_slow": 1, "truncate": false,
                    "original_max_position_embeddings": 4096}"#,
            ),
            window: Some(128),
            max_positions: 131_072,
            ..DEFAULTS
        },
        ..LLAMA
    },
];

/// The row of a model type.
pub fn family(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.model_type == model_type)
}
