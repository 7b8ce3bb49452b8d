//! Configurations that are no JSON, lie, or hold what no key may hold.

use crate::corpus::Expect::{self, Accepted, ByCompress, Either, Refused};
use crate::corpus::{Row, Variant, rows};

const CONFIG: Expect = Refused("config.json");

/// Keys that are counts, with a value that is off by little and what it contradicts.
const COUNTS: &[(&str, &str, &str)] = &[
    ("hidden_size", "256", "model.embed_tokens.weight"),
    ("intermediate_size", "255", "model.layers.0.mlp."),
    ("vocab_size", "513", "model.embed_tokens.weight"),
    ("num_hidden_layers", "4", "model.layers.3."),
    ("num_attention_heads", "8", "model.layers.0.self_attn."),
    ("num_key_value_heads", "4", "model.layers.0.self_attn."),
    ("head_dim", "32", "model.layers.0.self_attn."),
];

/// What no count may be.
const NO_COUNTS: &[(&str, &str)] = &[
    ("zero", "0"),
    ("negative", "-1"),
    ("2_31", "2147483648"),
    ("1e12", "1000000000000"),
    ("1e30", "1e30"),
    ("fraction", "2.5"),
    ("string", "\"128\""),
    ("list", "[128]"),
    ("bool", "true"),
];

/// A key and the text of its value.
const VALUES: &[(&str, Expect, &str, &str)] = &[
    ("cfg_hidden_size_null", Refused("hidden_size"), "hidden_size", "null"),
    ("cfg_vocab_size_null", Refused("vocab_size"), "vocab_size", "null"),
    ("cfg_num_hidden_layers_null", Refused("num_hidden_layers"), "num_hidden_layers", "null"),
    ("cfg_num_hidden_layers_fewer", Refused("model.layers.2."), "num_hidden_layers", "2"),
    ("cfg_num_hidden_layers_10000", Refused("model.layers.3."), "num_hidden_layers", "10000"),
    ("cfg_num_attention_heads_null", Refused("num_attention_heads"), "num_attention_heads", "null"),
    ("cfg_num_attention_heads_3", Refused("num_attention_heads"), "num_attention_heads", "3"),
    ("cfg_num_key_value_heads_null", CONFIG, "num_key_value_heads", "null"),
    ("cfg_num_key_value_heads_3", Refused("num_key_value_heads"), "num_key_value_heads", "3"),
    ("cfg_num_key_value_heads_more", Refused("num_key_value_heads"), "num_key_value_heads", "8"),
    ("cfg_head_dim_null", CONFIG, "head_dim", "null"),
    ("cfg_head_dim_odd", Refused("head_dim"), "head_dim", "63"),
    ("cfg_positions_zero", Refused("max_position_embeddings"), "max_position_embeddings", "0"),
    ("cfg_positions_one", Refused("max_position_embeddings"), "max_position_embeddings", "1"),
    ("cfg_positions_negative", Refused("max_position_embeddings"), "max_position_embeddings", "-1"),
    ("cfg_positions_1e12", Refused("max_position_embeddings"), "max_position_embeddings", "1000000000000"),
    ("cfg_positions_1e30", Refused("max_position_embeddings"), "max_position_embeddings", "1e30"),
    ("cfg_positions_string", Refused("max_position_embeddings"), "max_position_embeddings", "\"1024\""),
    ("cfg_positions_fewer_than_seq", ByCompress("--seq"), "max_position_embeddings", "32"),
    ("cfg_positions_2_31", Either, "max_position_embeddings", "2147483648"),
    ("cfg_positions_null", Either, "max_position_embeddings", "null"),
    ("cfg_epsilon_zero", Refused("rms_norm_eps"), "rms_norm_eps", "0"),
    ("cfg_epsilon_negative", Refused("rms_norm_eps"), "rms_norm_eps", "-1e-5"),
    ("cfg_epsilon_1e30", Refused("rms_norm_eps"), "rms_norm_eps", "1e30"),
    ("cfg_epsilon_string", Refused("rms_norm_eps"), "rms_norm_eps", "\"1e-5\""),
    ("cfg_epsilon_list", Refused("rms_norm_eps"), "rms_norm_eps", "[]"),
    ("cfg_epsilon_nan", CONFIG, "rms_norm_eps", "NaN"),
    ("cfg_epsilon_infinity", CONFIG, "rms_norm_eps", "Infinity"),
    ("cfg_epsilon_negative_infinity", CONFIG, "rms_norm_eps", "-Infinity"),
    ("cfg_epsilon_1e400", CONFIG, "rms_norm_eps", "1e400"),
    ("cfg_epsilon_1e_400", CONFIG, "rms_norm_eps", "1e-400"),
    ("cfg_epsilon_null", Accepted, "rms_norm_eps", "null"),
    ("cfg_theta_zero", Refused("rope_theta"), "rope_theta", "0"),
    ("cfg_theta_negative", Refused("rope_theta"), "rope_theta", "-10000"),
    ("cfg_theta_string", Refused("rope_theta"), "rope_theta", "\"10000\""),
    ("cfg_theta_1e30", Refused("rope_theta"), "rope_theta", "1e30"),
    ("cfg_theta_bool", Refused("rope_theta"), "rope_theta", "true"),
    ("cfg_theta_tiny", Either, "rope_theta", "1e-300"),
    ("cfg_rope_scaling_string", Refused("rope_scaling"), "rope_scaling", "\"llama3\""),
    ("cfg_rope_scaling_list", Refused("rope_scaling"), "rope_scaling", "[{\"rope_type\":\"linear\",\"factor\":2.0}]"),
    ("cfg_rope_scaling_number", Refused("rope_scaling"), "rope_scaling", "4"),
    ("cfg_rope_scaling_null", Accepted, "rope_scaling", "null"),
    ("cfg_rope_type_unknown", Refused("config.json + bend"), "rope_scaling", "{\"rope_type\":\"bend\"}"),
    ("cfg_rope_type_number", Refused("config.json + rope"), "rope_scaling", "{\"rope_type\":5}"),
    ("cfg_rope_factor_missing", Refused("factor"), "rope_scaling", "{\"rope_type\":\"linear\"}"),
    ("cfg_rope_factor_zero", Refused("factor"), "rope_scaling", "{\"rope_type\":\"linear\",\"factor\":0}"),
    ("cfg_rope_factor_string", Refused("factor"), "rope_scaling", "{\"rope_type\":\"linear\",\"factor\":\"2\"}"),
    (
        "cfg_rope_llama3_reversed",
        Refused("high_freq_factor"),
        "rope_scaling",
        "{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":1}",
    ),
    ("cfg_rope_yarn_extreme", Either, "rope_scaling", "{\"rope_type\":\"yarn\",\"factor\":1e29,\"beta_fast\":1e-29,\"beta_slow\":1e29}"),
    ("cfg_rope_dynamic_tiny", Either, "rope_scaling", "{\"rope_type\":\"dynamic\",\"factor\":1e-29}"),
    ("cfg_partial_rotary_zero", Refused("partial_rotary_factor"), "partial_rotary_factor", "0"),
    ("cfg_partial_rotary_large", Refused("partial_rotary_factor"), "partial_rotary_factor", "1e9"),
    ("cfg_partial_rotary_odd", Refused("partial_rotary_factor"), "partial_rotary_factor", "0.05"),
    ("cfg_partial_rotary_string", Refused("partial_rotary_factor"), "partial_rotary_factor", "\"half\""),
    ("cfg_window_zero", Refused("sliding_window"), "sliding_window", "0"),
    ("cfg_window_string", Refused("sliding_window"), "sliding_window", "\"wide\""),
    ("cfg_act_unknown", Refused("hidden_act + relu"), "hidden_act", "\"relu\""),
    ("cfg_act_number", Refused("hidden_act"), "hidden_act", "7"),
    ("cfg_act_list", Refused("hidden_act"), "hidden_act", "[\"silu\"]"),
    ("cfg_act_empty", Refused("hidden_act"), "hidden_act", "\"\""),
    ("cfg_act_null", Either, "hidden_act", "null"),
    ("cfg_tied_string", Refused("tie_word_embeddings"), "tie_word_embeddings", "\"true\""),
    ("cfg_tied_number", Refused("tie_word_embeddings"), "tie_word_embeddings", "1"),
    ("cfg_tied_false", Refused("lm_head.weight"), "tie_word_embeddings", "false"),
    ("cfg_attention_bias_string", Refused("attention_bias"), "attention_bias", "\"no\""),
    ("cfg_attention_bias_true", Refused("model.layers.0.self_attn.q_proj.bias"), "attention_bias", "true"),
    ("cfg_mlp_bias_true", Refused("model.layers.0.mlp."), "mlp_bias", "true"),
    ("cfg_mlp_bias_number", Refused("mlp_bias"), "mlp_bias", "0"),
    ("cfg_eos_beyond", Refused("eos_token_id"), "eos_token_id", "512"),
    ("cfg_eos_4e9", Refused("eos_token_id"), "eos_token_id", "4000000000"),
    ("cfg_eos_1e30", Refused("eos_token_id"), "eos_token_id", "1e30"),
    ("cfg_eos_minus_one", Accepted, "eos_token_id", "-1"),
    ("cfg_eos_negative", Refused("eos_token_id"), "eos_token_id", "-2"),
    ("cfg_eos_string", Refused("eos_token_id"), "eos_token_id", "\"<|end|>\""),
    ("cfg_eos_list_of_strings", Refused("eos_token_id"), "eos_token_id", "[\"<|end|>\"]"),
    ("cfg_eos_list", Accepted, "eos_token_id", "[1,0]"),
    ("cfg_eos_null", Accepted, "eos_token_id", "null"),
    ("cfg_bos_beyond", Refused("bos_token_id"), "bos_token_id", "4000000000"),
    ("cfg_bos_string", Refused("bos_token_id"), "bos_token_id", "\"<|begin|>\""),
    ("cfg_type_empty", Refused("model_type"), "model_type", "\"\""),
    ("cfg_type_null", Refused("model_type"), "model_type", "null"),
    ("cfg_type_number", Refused("model_type"), "model_type", "3"),
    ("cfg_type_list", Refused("model_type"), "model_type", "[\"llama\"]"),
    ("cfg_type_unknown", ByCompress("model_type + mamba"), "model_type", "\"mamba\""),
    ("cfg_type_other_case", ByCompress("model_type"), "model_type", "\"LLaMA\""),
    ("cfg_type_other_norms", Refused("model.layers.0."), "model_type", "\"gemma2\""),
    ("cfg_type_query_norms", Refused("model.layers.0.self_attn."), "model_type", "\"qwen3\""),
    ("cfg_dtype_unknown", Either, "dtype", "\"float99\""),
    ("cfg_dtype_list", Either, "dtype", "[1]"),
    ("cfg_experts", Refused("num_experts"), "num_experts", "8"),
    ("cfg_nextn_huge", Either, "num_nextn_predict_layers", "18446744073709551615"),
    ("cfg_nextn_string", Either, "num_nextn_predict_layers", "\"1\""),
    ("cfg_quant_string", CONFIG, "quantization_config", "\"gptq\""),
    ("cfg_quant_empty", CONFIG, "quantization_config", "{}"),
    ("cfg_quant_list", CONFIG, "quantization_config", "[1]"),
    ("cfg_quant_unknown", Refused("config.json + aqlm"), "quantization_config", "{\"quant_method\":\"aqlm\"}"),
    ("cfg_quant_without_tensors", CONFIG, "quantization_config", "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128}"),
    ("cfg_quant_bits_zero", CONFIG, "quantization_config", "{\"quant_method\":\"gptq\",\"bits\":0,\"group_size\":128}"),
    ("cfg_quant_group_zero", CONFIG, "quantization_config", "{\"quant_method\":\"awq\",\"bits\":4,\"group_size\":0}"),
    ("cfg_quant_fp8", CONFIG, "quantization_config", "{\"quant_method\":\"fp8\",\"weight_block_size\":[0,-1]}"),
    ("cfg_quant_null", Accepted, "quantization_config", "null"),
];

const TEXTS: &[Row] = &[
    ("cfg_empty", CONFIG, |place| place.write("config.json", "")),
    ("cfg_blank", CONFIG, |place| place.write("config.json", "  \n")),
    ("cfg_cut", CONFIG, |place| place.write("config.json", &std::fs::read(place.file("config.json")).unwrap()[..200])),
    ("cfg_list", CONFIG, |place| place.write("config.json", "[]")),
    ("cfg_null", CONFIG, |place| place.write("config.json", "null")),
    ("cfg_number", CONFIG, |place| place.write("config.json", "1e308")),
    ("cfg_string", CONFIG, |place| place.write("config.json", "\"llama\"")),
    ("cfg_empty_object", Refused("model_type"), |place| place.write("config.json", "{}")),
    ("cfg_deep", CONFIG, |place| place.config("extra", &format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)))),
    ("cfg_deep_open", CONFIG, |place| place.write("config.json", "{\"a\":".repeat(200_000))),
    ("cfg_deep_100", Accepted, |place| place.config("extra", &format!("{}{}", "[".repeat(100), "]".repeat(100)))),
    ("cfg_not_utf8", CONFIG, |place| place.write("config.json", b"{\"model_type\":\"ll\xff\"}")),
    ("cfg_utf16", CONFIG, |place| {
        let text = std::fs::read_to_string(place.file("config.json")).unwrap();
        place.write("config.json", text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>());
    }),
    ("cfg_bom", Either, |place| {
        let text = std::fs::read_to_string(place.file("config.json")).unwrap();
        place.write("config.json", format!("\u{feff}{text}"));
    }),
    ("cfg_zeros", CONFIG, |place| place.write("config.json", vec![0; 4096])),
    ("cfg_comment", CONFIG, |place| place.edit("config.json", "{", "{ // a llama\n")),
    ("cfg_comma_behind", CONFIG, |place| place.edit("config.json", "\"eos_token_id\": 1", "\"eos_token_id\": 1,")),
    ("cfg_trailing_text", CONFIG, |place| {
        let text = std::fs::read_to_string(place.file("config.json")).unwrap();
        place.write("config.json", format!("{text} x"));
    }),
    ("cfg_html", CONFIG, |place| place.write("config.json", "<!doctype html><p>404")),
    ("cfg_huge", CONFIG, |place| place.config("extra", &format!("\"{}\"", "x".repeat(6 << 20)))),
    ("cfg_huge_sparse", CONFIG, |place| std::fs::File::create(place.file("config.json")).unwrap().set_len(1 << 40).unwrap()),
    ("cfg_duplicate_same", Either, |place| place.edit("config.json", "{", "{\"hidden_size\": 128,")),
    ("cfg_duplicate_other", Either, |place| place.edit("config.json", "{", "{\"hidden_size\": 64,")),
    ("cfg_missing_hidden_size", Refused("hidden_size"), |place| place.without("hidden_size")),
    ("cfg_missing_intermediate_size", Refused("intermediate_size"), |place| place.without("intermediate_size")),
    ("cfg_missing_vocab_size", Refused("vocab_size"), |place| place.without("vocab_size")),
    ("cfg_missing_layers", Refused("num_hidden_layers"), |place| place.without("num_hidden_layers")),
    ("cfg_missing_heads", Refused("num_attention_heads"), |place| place.without("num_attention_heads")),
    ("cfg_missing_kv_heads", CONFIG, |place| place.without("num_key_value_heads")),
    ("cfg_missing_head_dim", CONFIG, |place| place.without("head_dim")),
    ("cfg_missing_tied", Refused("lm_head.weight"), |place| place.without("tie_word_embeddings")),
    ("cfg_missing_epsilon", Accepted, |place| place.without("rms_norm_eps")),
    ("cfg_missing_positions", Accepted, |place| place.without("max_position_embeddings")),
    ("cfg_missing_eos", Accepted, |place| place.without("eos_token_id")),
    ("cfg_missing_type", Refused("model_type"), |place| place.without("model_type")),
    ("cfg_folder", CONFIG, |place| place.make_folder("config.json")),
    ("cfg_pipe", CONFIG, |place| place.pipe("config.json")),
    ("cfg_dangling", CONFIG, |place| place.link("config.json", "nowhere")),
    ("cfg_loop", CONFIG, |place| place.link("config.json", "config.json")),
    ("cfg_dev_zero", CONFIG, |place| place.link("config.json", "/dev/zero")),
    ("cfg_symlinked", Accepted, |place| place.link_away("config.json")),
];

pub fn variants() -> impl Iterator<Item = Variant> {
    let bad = COUNTS.iter().flat_map(|&(key, ..)| NO_COUNTS.iter().map(move |&(what, raw)| (key, what, raw)));
    let bad = bad.map(|(key, what, raw)| Variant::new(&format!("cfg_{key}_{what}"), Refused(key), move |place| place.config(key, raw)));
    let off = COUNTS
        .iter()
        .map(|&(key, raw, culprit)| Variant::new(&format!("cfg_{key}_off"), Refused(culprit), move |place| place.config(key, raw)));
    let values = VALUES.iter().map(|&(name, expect, key, raw)| Variant::new(name, expect, move |place| place.config(key, raw)));
    bad.chain(off).chain(values).chain(rows(TEXTS))
}
