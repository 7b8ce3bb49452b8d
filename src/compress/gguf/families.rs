//! What llama.cpp calls the families of models: a row of data each, and what its files cannot say of them.
//!
//! Source: llama.cpp's loaders and graphs (src/models), and its converters (conversion), read in 2026.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use regex::Regex;

use crate::error::{Error, Result};
use crate::formats::gguf::container::Value;
use crate::kernels::gated::Activation;
use crate::model::config::{Config, Layer};
use crate::model::rotation::Rotation;

/// Whether a file has a matrix of its own for the logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// Where it is not the embedding.
    Either,
    /// It must have.
    Own,
    /// It must not have.
    Tied,
}

/// Which layers see a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sliding {
    /// None: a window is not known.
    Unknown,
    /// All but every so many.
    AllButEvery(usize),
    /// As a key says, where there are such layers.
    Listed,
}

/// A family as llama.cpp knows it.
#[derive(Debug)]
pub struct Family {
    /// Its name there.
    pub arch: &'static str,
    /// Its `model_type`s here; the first is what a file is read as.
    pub model_types: &'static [&'static str],
    /// The norms of a block: here and there.
    pub norms: &'static [(&'static str, &'static str)],
    /// Whether neighbours turn there, where halves turn here: rows of queries and keys go in pairs.
    pub paired: bool,
    /// Whether the weight of a norm is stored less 1 here.
    pub plus_one: bool,
    /// The matrix of the logits.
    pub head: Head,
    /// Windows.
    pub sliding: Sliding,
    /// Whether it knows divisors of frequencies: `rope_freqs`.
    pub divisors: bool,
    /// The layers that it knows biases of, by their names there.
    pub biases: &'static [&'static str],
    /// Whether gate and up are one matrix.
    pub fused: bool,
    /// Whether neighbours turn together here too, rather than halves.
    pub neighbours: bool,
    /// Whether a part of a head may turn.
    pub partial: bool,
    /// Whether all heads together must be as wide as the states.
    pub square: bool,
    /// Of a mixture, whether the shares of the experts of a token add up to one.
    pub renormalized: Option<bool>,
}

const BEFORE: &[(&str, &str)] = &[("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")];
const AFTER: &[(&str, &str)] = &[("post_attention_layernorm", "post_attention_norm"), ("post_feedforward_layernorm", "post_ffw_norm")];
const AROUND: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];
const AROUND_GLM: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("post_self_attn_layernorm", "post_attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("post_mlp_layernorm", "post_ffw_norm"),
];

const QKV: &[&str] = &["attn_q", "attn_k", "attn_v"];
const ALL: &[&str] = &["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

const QWEN2: Family = Family {
    arch: "qwen2",
    model_types: &["qwen2"],
    norms: BEFORE,
    paired: false,
    plus_one: false,
    head: Head::Either,
    sliding: Sliding::Unknown,
    divisors: false,
    biases: QKV,
    fused: false,
    neighbours: false,
    partial: false,
    square: false,
    renormalized: None,
};

const GEMMA2: Family = Family {
    arch: "gemma2",
    model_types: &["gemma2"],
    norms: AROUND,
    plus_one: true,
    sliding: Sliding::AllButEvery(2),
    biases: &[],
    ..QWEN2
};

const OLMO2: Family = Family { arch: "olmo2", model_types: &["olmo2"], norms: AFTER, head: Head::Own, biases: &[], square: true, ..QWEN2 };

/// Every family that a file is written and read for.
pub const FAMILIES: &[Family] = &[
    Family { arch: "llama", model_types: &["llama", "mistral"], paired: true, divisors: true, biases: ALL, ..QWEN2 },
    Family { arch: "llama", model_types: &["mixtral"], paired: true, divisors: true, renormalized: Some(true), ..QWEN2 },
    QWEN2,
    Family { arch: "qwen3", model_types: &["qwen3"], ..QWEN2 },
    GEMMA2,
    Family { arch: "gemma3", model_types: &["gemma3_text", "gemma3"], sliding: Sliding::AllButEvery(6), ..GEMMA2 },
    Family { arch: "phi3", model_types: &["phi3"], biases: &[], fused: true, partial: true, square: true, ..QWEN2 },
    OLMO2,
    Family { model_types: &["olmo3"], sliding: Sliding::Listed, ..OLMO2 },
    Family { arch: "smollm3", model_types: &["smollm3"], paired: true, ..QWEN2 },
    Family { arch: "granite", model_types: &["granite"], paired: true, divisors: true, biases: ALL, ..QWEN2 },
    Family { arch: "glm4", model_types: &["glm4"], norms: AROUND_GLM, fused: true, neighbours: true, partial: true, ..QWEN2 },
    Family {
        arch: "cohere2",
        model_types: &["cohere2"],
        norms: &[("input_layernorm", "attn_norm")],
        head: Head::Tied,
        sliding: Sliding::Listed,
        biases: &[],
        neighbours: true,
        square: true,
        ..QWEN2
    },
    Family { arch: "qwen2moe", model_types: &["qwen2_moe"], head: Head::Own, square: true, renormalized: Some(false), ..QWEN2 },
    Family { arch: "qwen3moe", model_types: &["qwen3_moe"], renormalized: Some(true), ..QWEN2 },
    Family { arch: "olmoe", model_types: &["olmoe"], head: Head::Own, biases: &[], square: true, renormalized: Some(false), ..QWEN2 },
];

/// What parts of a block are called: here and there.
const PARTS: &[(&str, &str)] = &[
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    // Gate and up in one matrix go by the name of up.
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.gate", ROUTER),
    ("block_sparse_moe.gate", ROUTER),
    ("mlp.shared_expert_gate", SHARED_GATE),
    ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
];

const ROUTER: &str = "ffn_gate_inp";
const SHARED_GATE: &str = "ffn_gate_inp_shexp";

/// What layers of experts are called, in the families that name them so: here and there.
const EXPERTS: &[(&str, &str, &str)] = &[
    ("mlp", "gate_proj", "ffn_gate_exps"),
    ("mlp", "up_proj", "ffn_up_exps"),
    ("mlp", "down_proj", "ffn_down_exps"),
    ("block_sparse_moe", "w1", "ffn_gate_exps"),
    ("block_sparse_moe", "w3", "ffn_up_exps"),
    ("block_sparse_moe", "w2", "ffn_down_exps"),
];

static BLOCK: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^layers\.(\d+)\.(.+)\.(weight|bias)$").expect("a pattern"));
static EXPERT: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^(\w+)\.experts\.(\d+)\.(\w+)$").expect("a pattern"));

/// The family of a `model_type`.
pub fn family(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.model_types.contains(&model_type))
}

/// Names of all families, for who asks in vain.
pub fn known() -> String {
    FAMILIES.iter().map(|family| family.model_types[0]).collect::<Vec<_>>().join(", ")
}

/// A tensor's name in a file, and which of the experts it is of whose tensors lie in one there. Here it stands below `prefix`, in
/// one of so many blocks: what other parts of a larger model have does not count.
pub fn renamed(name: &str, family: &Family, prefix: &str, blocks: usize) -> Option<(String, Option<usize>)> {
    if name == "lm_head.weight" || name.strip_suffix("lm_head.weight").is_some_and(|start| !start.is_empty() && prefix.starts_with(start)) {
        return Some(("output.weight".into(), None));
    }
    let name = name.strip_prefix(prefix)?;
    let Some(found) = BLOCK.captures(name) else {
        let simple = match name {
            "embed_tokens.weight" => "token_embd.weight",
            "norm.weight" => "output_norm.weight",
            _ => return None,
        };
        return Some((simple.into(), None));
    };
    let (number, part, end) = (&found[1], &found[2], &found[3]);
    number.parse::<usize>().ok().filter(|&number| number < blocks)?;
    if let Some(expert) = EXPERT.captures(part) {
        let (_, _, to) = EXPERTS.iter().find(|(mixture, layer, _)| expert[1] == **mixture && expert[3] == **layer)?;
        return Some((format!("blk.{number}.{to}.{end}"), Some(expert[2].parse().ok()?)));
    }
    let (_, to) = family.norms.iter().chain(PARTS).find(|(from, _)| *from == part)?;
    Some((format!("blk.{number}.{to}.{end}"), None))
}

/// A tensor's name in a checkpoint; of experts, that of each.
pub fn restored(name: &str, family: &Family, experts: usize) -> Option<Vec<String>> {
    let simple = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(simple) = simple {
        return Some(vec![simple.into()]);
    }
    let mut parts = name.split('.');
    let (Some("blk"), Some(number), Some(part), Some(end), None) = (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    number.parse::<u32>().ok()?;
    let mixtral = family.model_types.contains(&"mixtral");
    if let Some((mixture, layer, _)) = EXPERTS.iter().find(|(mixture, _, to)| *to == part && (*mixture == "block_sparse_moe") == mixtral) {
        return Some((0..experts).map(|expert| format!("model.layers.{number}.{mixture}.experts.{expert}.{layer}.{end}")).collect());
    }
    let fits = |(from, to): &&(&str, &str)| {
        *to == part
            && (part != ROUTER || from.starts_with("block_sparse_moe") == mixtral)
            && (part != "ffn_up" || (*from == "mlp.gate_up_proj") == family.fused)
    };
    let (from, _) = family.norms.iter().chain(PARTS).find(fits)?;
    Some(vec![format!("model.layers.{number}.{from}.{end}")])
}

/// Whether a tensor stays floats of 32 bits although it is a matrix.
pub fn single(name: &str) -> bool {
    matches!(name.rsplit('.').nth(1), Some(ROUTER | SHARED_GATE))
}

/// Refuses what llama.cpp computes differently, for its files cannot say it. `head` is whether the model has a matrix of logits of
/// its own.
///
/// # Errors
/// One line with what is different.
pub fn computes(config: &Config, family: &Family, head: bool) -> Result<()> {
    let arch = family.arch;
    let refuse = |what: String| Err(Error::input(format!("{what}; a GGUF file would compute something else, use another --format")));
    let activation = if arch.starts_with("gemma") { Activation::GeluTanh } else { Activation::Silu };
    if config.activation != activation {
        return refuse(format!("llama.cpp has the activation {activation:?} in {arch}, the model {:?}", config.activation));
    }
    let gemma = arch.starts_with("gemma");
    // The largest models of the family go by the width per head.
    let largest = gemma && [46, 62].contains(&config.layers.len());
    let size = if largest { config.hidden as f32 / config.heads as f32 } else { config.head_dim as f32 };
    if arch != "granite" && (config.scale * size.sqrt() - 1.0).abs() > 1e-4 {
        return refuse(format!("llama.cpp scales the scores of {arch} by {}, the model by {}", size.powf(-0.5), config.scale));
    }
    let fixed = |every: usize| move |(number, layer): (usize, &Layer)| layer.window.is_some() != (number + 1).is_multiple_of(every);
    if let Sliding::AllButEvery(every) = family.sliding
        && !config.layers.iter().enumerate().all(fixed(every))
    {
        return refuse(format!("llama.cpp has windows in all but every {every}th layer of {arch}, config.json says otherwise"));
    }
    match (family.head, !head) {
        (Head::Own, true) => {
            return refuse(format!("llama.cpp wants a matrix of logits beside the embedding of {arch}, and here it is the same"));
        }
        (Head::Tied, false) => {
            return refuse(format!("llama.cpp takes the embedding of {arch} for the logits, and here it is another matrix"));
        }
        _ => {}
    }
    if config.mixture.is_some_and(|mixture| mixture.experts > 1024) {
        return refuse("llama.cpp has 1024 experts at most".into());
    }
    if arch == "olmoe" && config.heads != config.kv_heads {
        return refuse("llama.cpp has as many keys as queries in olmoe".into());
    }
    if family.sliding == Sliding::Listed && config.layers.iter().all(|layer| layer.window.is_none()) {
        return refuse(format!("llama.cpp has windows in some layers of {}, the model has none", family.model_types[0]));
    }
    if family.renormalized.is_some() && !config.layers.iter().all(|layer| layer.mixed) {
        return refuse(format!("llama.cpp has experts in every layer of {arch}, config.json says otherwise"));
    }
    if let (Some(wanted), Some(mixture)) = (family.renormalized, &config.mixture)
        && wanted != mixture.rule.renormalized
    {
        let (wanted, found) = if wanted { ("made to", "do not") } else { ("not made to", "do") };
        return refuse(format!("llama.cpp's shares of the experts of {arch} are {wanted} add up to one, the model's {found}"));
    }
    if family.square && config.heads * config.head_dim != config.hidden {
        return refuse(format!("llama.cpp has heads of {arch} that are as wide as the states together"));
    }
    if arch == "smollm3" {
        let turns = |(number, layer): (usize, &Layer)| layer.rotation.is_some() != (number + 1).is_multiple_of(4);
        if !config.layers.iter().enumerate().all(turns) || config.layers.iter().any(|layer| layer.window.is_some()) {
            return refuse(
                "llama.cpp turns all but every 4th layer of smollm3 and has no windows there, config.json says otherwise".into(),
            );
        }
    }
    let zero = |factor: f32| factor == 0.0;
    if arch == "granite" && [config.scale, config.embed_factor, config.residual_factor].into_iter().any(zero) {
        return refuse("llama.cpp takes multipliers of granite that are 0 for 1".into());
    }
    turns(config, family).map_or(Ok(()), refuse)
}

/// What of the rotations of a model a file cannot say.
fn turns(config: &Config, family: &Family) -> Option<String> {
    let arch = family.arch;
    let rotations = || config.layers.iter().filter_map(|layer| layer.rotation.as_ref());
    if rotations().any(|rotation| rotation.divisors().is_some()) && !family.divisors {
        return Some(format!("llama.cpp has no divisors of frequencies for {arch}"));
    }
    if rotations().any(|rotation| rotation.width() != config.head_dim) && !family.partial {
        return Some(format!("llama.cpp turns whole heads of {arch}, the model a part of them"));
    }
    if rotations().any(|rotation| rotation.long().is_some()) && arch != "phi3" {
        return Some(format!("llama.cpp is given no lists of divisors for {arch}"));
    }
    if rotations().any(|rotation| rotation.interleaved() != family.neighbours) {
        let turned = if family.neighbours { "neighbours" } else { "halves" };
        return Some(format!("llama.cpp turns {turned} of {arch} together, the model others"));
    }
    if let Some(what) = rotations().find_map(Rotation::unusual) {
        return Some(format!("llama.cpp {what}"));
    }
    if arch == "cohere2" && rotations().any(|rotation| rotation.scaling().is_some()) {
        return Some("llama.cpp does not stretch the rotation of cohere2".into());
    }
    if family.arch == "olmo2" {
        let windowed =
            |sliding: bool| config.layers.iter().find(|layer| layer.window.is_some() == sliding).and_then(|layer| layer.rotation.as_ref());
        if let (Some(sliding), Some(full)) = (windowed(true), windowed(false))
            && (sliding.theta() != full.theta() || sliding.scaling().is_some())
        {
            return Some(
                "llama.cpp turns layers with windows of olmo3 at the base of the others and without scaling, the model does not".into(),
            );
        }
    }
    None
}

/// What the keys say of a family beside what they say of all.
pub fn keys(config: &Config, family: &Family, experts: Option<usize>, put: &mut dyn FnMut(&str, Value)) {
    let whole = |number: usize| Value::U32(number as u32);
    let epsilon = if family.arch == "cohere2" { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" };
    put(epsilon, Value::F32(config.epsilon as f32));
    if let (Some(mixture), Some(experts)) = (&config.mixture, experts) {
        put("expert_count", whole(experts));
        put("expert_used_count", whole(mixture.rule.chosen));
        if !["llama", "olmoe"].contains(&family.arch) {
            put("expert_feed_forward_length", whole(mixture.width));
        }
        mixture.shared.into_iter().for_each(|shared| put("expert_shared_feed_forward_length", whole(shared)));
    }
    if family.sliding != Sliding::Unknown {
        let window = config.layers.iter().find_map(|layer| layer.window);
        window.into_iter().for_each(|window| put("attention.sliding_window", whole(window)));
    }
    if family.sliding == Sliding::Listed {
        let pattern = config.layers.iter().map(|layer| i32::from(layer.window.is_some())).collect();
        put("attention.sliding_window_pattern", Value::I32s(pattern));
    }
    let local = config.layers.iter().find(|layer| layer.window.is_some()).and_then(|layer| layer.rotation.as_ref());
    if let Some(local) = local.filter(|_| family.arch == "gemma3") {
        put("rope.freq_base_swa", Value::F32(local.theta() as f32));
    }
    match family.arch {
        "cohere2" => put("logit_scale", Value::F32(config.logits_factor)),
        "granite" => {
            put("logit_scale", Value::F32(1.0 / config.logits_factor));
            put("attention.scale", Value::F32(config.scale));
            put("embedding_scale", Value::F32(config.embed_factor));
            put("residual_scale", Value::F32(config.residual_factor));
        }
        "gemma2" | "gemma3" => {
            config.attention_cap.into_iter().for_each(|cap| put("attn_logit_softcapping", Value::F32(cap)));
            config.logits_cap.into_iter().for_each(|cap| put("final_logit_softcapping", Value::F32(cap)));
        }
        _ => {}
    }
}

/// Tensors of rotations that are in no checkpoint, by name.
pub fn rotations(config: &Config) -> BTreeMap<&'static str, Vec<f32>> {
    let mut tensors = BTreeMap::new();
    let Some(rotation) = turning(config) else { return tensors };
    tensors.extend(rotation.divisors().map(|divisors| ("rope_freqs.weight", divisors)));
    if let Some([short, long]) = rotation.long() {
        tensors.extend([("rope_factors_short.weight", short), ("rope_factors_long.weight", long)]);
    }
    tensors
}

/// The rotation that keys speak of: that of layers that see everything, where there are such.
pub fn turning(config: &Config) -> Option<&Rotation> {
    let turning = || config.layers.iter().filter(|layer| layer.rotation.is_some());
    turning().find(|layer| layer.window.is_none()).or_else(|| turning().next_back()).and_then(|layer| layer.rotation.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_llama_cpp_and_back() {
        let named = |name: &str, model_type: &str| renamed(name, family(model_type).unwrap(), "model.", 4);
        let whole = |name: &str, model_type: &str| named(name, model_type).unwrap().0;
        assert_eq!(whole("model.layers.3.self_attn.q_proj.weight", "llama"), "blk.3.attn_q.weight");
        assert_eq!(whole("model.layers.3.post_attention_layernorm.weight", "gemma2"), "blk.3.post_attention_norm.weight");
        assert_eq!(whole("model.layers.3.post_attention_layernorm.weight", "glm4"), "blk.3.ffn_norm.weight");
        assert_eq!(whole("model.norm.weight", "qwen2"), "output_norm.weight");
        assert_eq!(whole("lm_head.weight", "qwen2"), "output.weight");
        let others = ["model.rotary_emb.inv_freq", "vision.layers.0.self_attn.q_proj.weight", "model.layers.4.mlp.up_proj.weight"];
        for other in others.into_iter().chain(["mtp.layers.0.mlp.up_proj.weight", "model.norm.bias", "vision.norm.weight"]) {
            assert_eq!(named(other, "llama"), None, "{other}");
        }
        assert_eq!(
            named("model.layers.0.block_sparse_moe.experts.7.w3.weight", "mixtral"),
            Some(("blk.0.ffn_up_exps.weight".into(), Some(7)))
        );
        for family in FAMILIES {
            let all = family.norms.iter().chain(PARTS).map(|(_, to)| format!("blk.2.{to}.weight"));
            for name in all.chain(EXPERTS.iter().map(|(.., to)| format!("blk.2.{to}.weight"))) {
                for (expert, here) in restored(&name, family, 3).unwrap().into_iter().enumerate() {
                    let (there, part) = renamed(&here, family, "model.", 4).unwrap();
                    assert_eq!((there, part.unwrap_or(0)), (name.clone(), expert), "{here}");
                }
            }
        }
        assert_eq!(restored("blk.1.ffn_up.weight", family("phi3").unwrap(), 0).unwrap(), ["model.layers.1.mlp.gate_up_proj.weight"]);
        assert_eq!(restored("blk.x.ffn_up.weight", &QWEN2, 0), None);
    }
}
