//! An architecture is data: one row per family says which norms, windows, factors and defaults it has. The forward
//! reads the row; a new family whose switches exist is one more row.

pub mod families;

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
    /// All, unless `attention_bias` is false.
    Always,
}

/// What mixes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mixing {
    /// Attention in every layer.
    Attention,
    /// Attention over narrowed keys and values in every layer ([`crate::model::latent`]).
    Latent,
    /// A delta rule ([`crate::model::delta`]) in those layers that `layer_types` calls linear, without the list in all but
    /// every fourth; attention in the others.
    Hybrid(DeltaNames),
}

/// Names of the linear layers of a delta rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaNames {
    /// Of queries, keys and values, and of what opens the output where [`Self::gate`] is not there.
    pub input: &'static str,
    /// Of what opens the output.
    pub gate: Option<&'static str>,
    /// Of how much is learned and what is kept: in one layer, or in two.
    pub controls: &'static [&'static str],
}

/// Which layers are mixtures of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MixedLayers {
    /// All.
    Every,
    /// Those that `decoder_sparse_step` meets and `mlp_only_layers` does not list.
    Sparse,
    /// All but the first `first_k_dense_replace`.
    AfterFirst,
}

/// How tokens are given to experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routing {
    /// By the softmax of all logits.
    Softmax,
    /// By the sigmoid of logits within the best groups of experts.
    GroupedSigmoid,
}

/// Whether the shares of the chosen experts are made to add up to one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renormalized {
    /// Always.
    Always,
    /// As `norm_topk_prob` says, which is this when absent.
    Key(bool),
}

/// How experts lie in tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lying {
    /// Each layer of each expert in a tensor of its own, or gate and up of all experts, and down of all, stacked in one.
    Apart,
    /// Stacked, transposed, columns of gate and up in turn; or as 4-bit floats.
    Woven,
}

/// How the MLP of a block is a mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mixed {
    /// Name of the mixture in a block.
    pub name: &'static str,
    /// Name of the router in it.
    pub router: &'static str,
    /// Names of gate, up and down of an expert.
    pub layers: [&'static str; 3],
    /// How they lie in tensors.
    pub lying: Lying,
    /// Key of the columns in the middle of an expert.
    pub width: &'static str,
    /// Which layers are mixtures.
    pub which: MixedLayers,
    /// How tokens are given to experts.
    pub routing: Routing,
    /// Whether the shares of the chosen experts add up to one.
    pub renormalized: Renormalized,
    /// Name of the expert of all tokens, and of what scales its output, where there are such.
    pub shared: Option<(&'static str, Option<&'static str>)>,
    /// Experts, experts per token, and columns in the middle of an expert and of the shared one, where config.json is silent.
    pub defaults: [usize; 4],
}

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
    /// The rotation's parameters as JSON, where they are not the plain ones.
    pub rope: Option<&'static str>,
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
    /// What mixes tokens.
    pub mixing: Mixing,
    /// Whether queries come with what opens attention's output.
    pub gated: bool,
    /// Whether a share of every head's attention goes to nothing.
    pub sinks: bool,
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
