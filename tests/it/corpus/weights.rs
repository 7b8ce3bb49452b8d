//! Tensors that are missing, of another shape or type, or hold what no model holds.

use crate::corpus::Expect::{Accepted, Either, Refused};
use crate::corpus::place::Place;
use crate::corpus::{Row, Variant, rows};

const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL: &str = "model.norm.weight";
const NORM: &str = "model.layers.1.input_layernorm.weight";
const QUERY: &str = "model.layers.1.self_attn.q_proj.weight";
const KEY: &str = "model.layers.0.self_attn.k_proj.weight";
const VALUE: &str = "model.layers.0.self_attn.v_proj.weight";
const DOWN: &str = "model.layers.2.mlp.down_proj.weight";
const GATE: &str = "model.layers.2.mlp.gate_proj.weight";

const NAN: u16 = 0x7fc0;
const INFINITE: u16 = 0x7f80;
const LARGEST: u16 = 0x7f7f;

/// Tensors that a model cannot be without.
const NEEDED: &[&str] = &[
    EMBEDDING,
    FINAL,
    NORM,
    "model.layers.0.post_attention_layernorm.weight",
    QUERY,
    KEY,
    VALUE,
    "model.layers.2.self_attn.o_proj.weight",
    GATE,
    "model.layers.1.mlp.up_proj.weight",
    DOWN,
];

const SHAPES: &[Row] = &[
    ("w_missing_layer", Refused("model.layers.1."), |place| {
        place.tensors(|all| all.retain(|tensor| !tensor.name.starts_with("model.layers.1.")));
    }),
    ("w_missing_all", Refused(EMBEDDING), |place| place.tensors(Vec::clear)),
    ("w_other_prefix", Refused(EMBEDDING), |place| {
        place.tensors(|all| all.iter_mut().for_each(|tensor| tensor.name = format!("transformer.{}", tensor.name)));
    }),
    ("w_other_case", Refused(QUERY), |place| place.tensor(QUERY, |tensor| tensor.name = QUERY.to_uppercase())),
    ("w_layer_beyond", Refused("model.layers.3."), |place| place.add("model.layers.3.mlp.up_proj.weight", "BF16", &[256, 128], 0)),
    ("w_layer_number_huge", Refused("model.layers.18446744073709551615."), |place| {
        place.add("model.layers.18446744073709551615.mlp.up_proj.weight", "BF16", &[1], 0);
    }),
    ("w_extra_tensor", Accepted, |place| place.add("model.extra.buffer", "F32", &[3], 0)),
    ("w_extra_integers", Accepted, |place| place.add("model.layers.0.self_attn.steps", "I64", &[1], 0)),
    ("w_extra_zero_dim", Accepted, |place| place.add("model.extra.buffer", "BF16", &[0, 4], 0)),
    ("w_extra_scalar", Accepted, |place| place.add("model.extra.scalar", "F32", &[], 0)),
    ("w_head_sound", Accepted, |place| {
        place.tensors(|all| {
            let (bytes, shape) = (all[0].bytes.clone(), all[0].shape.clone());
            all.push(super::place::Tensor { name: "lm_head.weight".into(), dtype: "BF16".into(), shape, bytes });
        });
    }),
    ("w_head_rows", Refused("lm_head.weight"), |place| place.add("lm_head.weight", "BF16", &[511, 128], 0)),
    ("w_head_zero_dim", Refused("lm_head.weight"), |place| place.add("lm_head.weight", "BF16", &[0, 128], 0)),
    ("w_bias_shape", Refused("model.layers.0.self_attn.q_proj.bias"), |place| {
        place.add("model.layers.0.self_attn.q_proj.bias", "BF16", &[255], 0);
    }),
    ("w_bias_integers", Refused("model.layers.0.self_attn.q_proj.bias"), |place| {
        place.add("model.layers.0.self_attn.q_proj.bias", "I32", &[256], 0);
    }),
    ("w_bias_sound", Accepted, |place| place.add("model.layers.0.self_attn.q_proj.bias", "BF16", &[256], 0)),
    ("w_bias_nan", Refused("model.layers.0.self_attn.q_proj.bias"), |place| {
        place.add("model.layers.0.self_attn.q_proj.bias", "BF16", &[256], NAN);
    }),
    ("w_rank_1_linear", Refused(QUERY), |place| place.tensor(QUERY, |tensor| tensor.shape = vec![256 * 128])),
    ("w_rank_3_linear", Refused(QUERY), |place| place.tensor(QUERY, |tensor| tensor.shape = vec![1, 256, 128])),
    ("w_rank_0_norm", Refused(NORM), |place| place.tensor(NORM, |tensor| tensor.turn("BF16", &[]))),
    ("w_rank_2_norm", Refused(NORM), |place| place.tensor(NORM, |tensor| tensor.shape = vec![1, 128])),
    ("w_rank_1_embedding", Refused(EMBEDDING), |place| place.tensor(EMBEDDING, |tensor| tensor.shape = vec![512 * 128])),
    ("w_rank_2_final_norm", Refused(FINAL), |place| place.tensor(FINAL, |tensor| tensor.shape = vec![128, 1])),
    ("w_zero_rows", Refused(QUERY), |place| place.tensor(QUERY, |tensor| tensor.turn("BF16", &[0, 128]))),
    ("w_zero_columns", Refused(DOWN), |place| place.tensor(DOWN, |tensor| tensor.turn("BF16", &[128, 0]))),
    ("w_zero_dim_norm", Refused(NORM), |place| place.tensor(NORM, |tensor| tensor.turn("BF16", &[0]))),
    ("w_zero_dim_embedding", Refused(EMBEDDING), |place| place.tensor(EMBEDDING, |tensor| tensor.turn("BF16", &[0, 0]))),
    ("w_transposed", Refused(DOWN), |place| place.tensor(DOWN, |tensor| tensor.shape.reverse())),
    ("w_one_row_short", Refused(KEY), |place| place.tensor(KEY, |tensor| tensor.turn("BF16", &[127, 128]))),
    ("w_one_column_more", Refused(VALUE), |place| place.tensor(VALUE, |tensor| tensor.turn("BF16", &[128, 129]))),
    ("w_norm_too_long", Refused(FINAL), |place| place.tensor(FINAL, |tensor| tensor.turn("BF16", &[129]))),
    ("w_huge_by_header", Refused("model.safetensors"), |place| {
        place.in_header("[512,128],\"data_offsets\":[0,131072]", "[1048576,1048576],\"data_offsets\":[0,2199023255552]");
    }),
];

const TYPES: &[Row] = &[
    ("w_i64_linear", Refused(QUERY), |place| place.tensor(QUERY, |tensor| tensor.turn("I64", &[256, 128]))),
    ("w_i8_linear", Refused(QUERY), |place| place.tensor(QUERY, |tensor| tensor.turn("I8", &[256, 128]))),
    ("w_bool_linear", Refused(QUERY), |place| place.tensor(QUERY, |tensor| tensor.turn("BOOL", &[256, 128]))),
    ("w_f64_linear", Refused(QUERY), |place| place.tensor(QUERY, |tensor| tensor.turn("F64", &[256, 128]))),
    ("w_f8_without_scale", Refused(QUERY), |place| place.tensor(QUERY, |tensor| tensor.turn("F8_E4M3", &[256, 128]))),
    ("w_f8_e5m2", Refused(DOWN), |place| place.tensor(DOWN, |tensor| tensor.turn("F8_E5M2", &[128, 256]))),
    ("w_u8_embedding", Refused(EMBEDDING), |place| place.tensor(EMBEDDING, |tensor| tensor.turn("U8", &[512, 128]))),
    ("w_i32_norm", Refused(NORM), |place| place.tensor(NORM, |tensor| tensor.turn("I32", &[128]))),
    ("w_f64_final_norm", Refused(FINAL), |place| place.tensor(FINAL, |tensor| tensor.turn("F64", &[128]))),
    ("w_f8_whole_model", Refused("model."), |place| {
        place.tensors(|all| {
            all.iter_mut().for_each(|tensor| {
                let shape = tensor.shape.clone();
                tensor.turn("F8_E4M3", &shape);
            });
        });
    }),
    ("w_f16_whole_model", Accepted, |place| convert(place, "F16")),
    ("w_f32_whole_model", Accepted, |place| convert(place, "F32")),
    ("w_f32_norm", Accepted, |place| place.tensor(NORM, |tensor| widen(tensor, "F32"))),
    ("w_quantized_gptq_names", Refused("model.layers."), |place| {
        place.tensors(|all| {
            for tensor in all.iter_mut().filter(|tensor| tensor.name.ends_with("_proj.weight")) {
                tensor.name = tensor.name.replace(".weight", ".qweight");
                tensor.turn("I32", &[16, 256]);
            }
        });
    }),
    ("w_quantized_without_scales", Refused("model.layers."), |place| {
        place.config("quantization_config", "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128,\"desc_act\":false,\"sym\":true}");
        place.tensors(|all| {
            for tensor in all.iter_mut().filter(|tensor| tensor.name.ends_with("_proj.weight")) {
                tensor.name = tensor.name.replace(".weight", ".qweight");
                tensor.turn("I32", &[16, 256]);
            }
        });
    }),
];

const VALUES: &[Row] = &[
    ("w_nan_linear", Refused(QUERY), |place| place.tensor(QUERY, |tensor| tensor.value(7, NAN))),
    ("w_nan_linear_last", Refused(DOWN), |place| place.tensor(DOWN, |tensor| tensor.value(128 * 256 - 1, NAN))),
    ("w_nan_signalling", Refused(GATE), |place| place.tensor(GATE, |tensor| tensor.value(0, 0xff81))),
    ("w_infinite_linear", Refused(KEY), |place| place.tensor(KEY, |tensor| tensor.value(0, INFINITE))),
    ("w_negative_infinite", Refused(VALUE), |place| place.tensor(VALUE, |tensor| tensor.value(0, INFINITE | 0x8000))),
    ("w_nan_norm", Refused(NORM), |place| place.tensor(NORM, |tensor| tensor.value(127, NAN))),
    ("w_nan_final_norm", Refused(FINAL), |place| place.tensor(FINAL, |tensor| tensor.value(0, NAN))),
    ("w_nan_embedding", Refused(EMBEDDING), |place| place.tensor(EMBEDDING, |tensor| tensor.value(70 * 128, NAN))),
    ("w_nan_embedding_last_row", Refused(EMBEDDING), |place| place.tensor(EMBEDDING, |tensor| tensor.value(512 * 128 - 1, NAN))),
    ("w_infinite_embedding", Refused(EMBEDDING), |place| place.tensor(EMBEDDING, |tensor| tensor.value(0, INFINITE))),
    ("w_nan_everywhere", Refused("model."), |place| place.tensors(|all| all.iter_mut().for_each(|tensor| tensor.fill(NAN)))),
    ("w_nan_extra_tensor", Refused("model.extra.buffer"), |place| place.add("model.extra.buffer", "BF16", &[4], NAN)),
    ("w_nan_head", Refused("lm_head.weight"), |place| place.add("lm_head.weight", "BF16", &[512, 128], NAN)),
    ("w_nan_f16", Refused(QUERY), |place| {
        convert(place, "F16");
        place.tensor(QUERY, |tensor| tensor.value(3, 0x7e00));
    }),
    ("w_nan_f32", Refused(QUERY), |place| {
        convert(place, "F32");
        place.tensor(QUERY, |tensor| tensor.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes()));
    }),
    ("w_infinite_f16", Refused(DOWN), |place| {
        convert(place, "F16");
        place.tensor(DOWN, |tensor| tensor.value(3, 0x7c00));
    }),
    ("w_zero_linear", Accepted, |place| place.tensor(QUERY, |tensor| tensor.fill(0))),
    ("w_negative_zero_linear", Accepted, |place| place.tensor(QUERY, |tensor| tensor.fill(0x8000))),
    ("w_zero_norm", Accepted, |place| place.tensor(NORM, |tensor| tensor.fill(0))),
    ("w_zero_final_norm", Accepted, |place| place.tensor(FINAL, |tensor| tensor.fill(0))),
    ("w_zero_embedding", Accepted, |place| place.tensor(EMBEDDING, |tensor| tensor.fill(0))),
    ("w_zero_model", Accepted, |place| place.tensors(|all| all.iter_mut().for_each(|tensor| tensor.fill(0)))),
    ("w_equal_rows", Accepted, |place| {
        place.tensor(DOWN, |tensor| {
            let row = tensor.bytes[..512].to_vec();
            tensor.bytes.chunks_mut(512).for_each(|other| other.copy_from_slice(&row));
        });
    }),
    ("w_constant", Accepted, |place| place.tensor(DOWN, |tensor| tensor.fill(0x3f80))),
    ("w_subnormal", Accepted, |place| place.tensor(QUERY, |tensor| tensor.fill(0x0001))),
    ("w_subnormal_model", Accepted, |place| place.tensors(|all| all.iter_mut().for_each(|tensor| tensor.fill(0x0001)))),
    ("w_largest_one", Either, |place| place.tensor(DOWN, |tensor| tensor.value(5, LARGEST))),
    ("w_largest_row", Either, |place| place.tensor(QUERY, |tensor| (0..128).for_each(|index| tensor.value(index, LARGEST)))),
    ("w_largest_linear", Either, |place| place.tensor(GATE, |tensor| tensor.fill(LARGEST))),
    ("w_largest_norm", Either, |place| place.tensor(NORM, |tensor| tensor.fill(LARGEST))),
    ("w_largest_model", Either, |place| place.tensors(|all| all.iter_mut().for_each(|tensor| tensor.fill(LARGEST)))),
    ("w_above_f16", Accepted, |place| place.tensor(DOWN, |tensor| tensor.value(5, 0x4780))),
];

/// The values of a tensor in another number format of 16 or 32 bits.
fn widen(tensor: &mut super::place::Tensor, dtype: &str) {
    let floats = tensor.bytes.as_chunks::<2>().0.iter().map(|pair| half::bf16::from_le_bytes(*pair).to_f32());
    tensor.bytes = match dtype {
        "F16" => floats.flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect(),
        _ => floats.flat_map(f32::to_le_bytes).collect(),
    };
    tensor.dtype = dtype.into();
}

fn convert(place: &Place, dtype: &str) {
    place.tensors(|all| all.iter_mut().for_each(|tensor| widen(tensor, dtype)));
}

pub fn variants() -> impl Iterator<Item = Variant> {
    let missing = NEEDED.iter().map(|&name| {
        let short = name.trim_end_matches(".weight").replace('.', "_");
        Variant::new(&format!("w_missing_{short}"), Refused(name), move |place| place.lose(name))
    });
    missing.chain(rows(SHAPES)).chain(rows(TYPES)).chain(rows(VALUES))
}
