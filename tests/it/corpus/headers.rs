//! Safetensors files that are cut, lie about their lengths, or have headers that no reader may believe.

use crate::corpus::Expect::{self, Accepted, Either, Refused};
use crate::corpus::place::{WEIGHTS, with_header};
use crate::corpus::{Row, Variant, rows};

const FILE: Expect = Refused(WEIGHTS);
const EMBED: Expect = Refused("model.safetensors + model.embed_tokens.weight");
const NORM: Expect = Refused("model.safetensors + model.layers.0.input_layernorm.weight");

const LENGTHS: &[Row] = &[
    ("st_empty_file", FILE, |place| place.resize(|_| 0)),
    ("st_truncated_7_bytes", FILE, |place| place.resize(|_| 7)),
    ("st_truncated_8_bytes", FILE, |place| place.resize(|_| 8)),
    ("st_truncated_in_header", FILE, |place| place.resize(|_| 500)),
    ("st_truncated_after_header", FILE, |place| place.resize(|_| 8 + 3072)),
    ("st_truncated_half", FILE, |place| place.resize(|bytes| bytes / 2)),
    ("st_truncated_one_byte", FILE, |place| place.resize(|bytes| bytes - 1)),
    ("st_trailing_byte", FILE, |place| place.resize(|bytes| bytes + 1)),
    ("st_trailing_bytes", FILE, |place| place.resize(|bytes| bytes + 4096)),
    ("st_trailing_terabyte", FILE, |place| place.resize(|bytes| bytes + (1 << 40))),
    ("st_all_zero", FILE, |place| place.write(WEIGHTS, vec![0; 4096])),
    ("st_all_ones", FILE, |place| place.write(WEIGHTS, vec![0xff; 4096])),
    ("st_header_len_zero", FILE, |place| place.length(|_| 0)),
    ("st_header_len_one", FILE, |place| place.length(|_| 1)),
    ("st_header_len_minus_one", FILE, |place| place.length(|length| length - 1)),
    ("st_header_len_plus_one", FILE, |place| place.length(|length| length + 1)),
    ("st_header_len_file", FILE, |place| place.length(|_| 1_315_584)),
    ("st_header_len_beyond_file", FILE, |place| place.length(|_| 1_315_585)),
    ("st_header_len_2_31", FILE, |place| place.length(|_| 1 << 31)),
    ("st_header_len_2_63_minus_1", FILE, |place| place.length(|_| (1 << 63) - 1)),
    ("st_header_len_2_63", FILE, |place| place.length(|_| 1 << 63)),
    ("st_header_len_u64_max_minus_7", FILE, |place| place.length(|_| u64::MAX - 7)),
    ("st_header_len_u64_max", FILE, |place| place.length(|_| u64::MAX)),
    ("st_header_over_cap", FILE, |place| {
        place.length(|_| 150_000_000);
        place.resize(|_| 200_000_000);
    }),
    ("st_header_zeros_to_cap", FILE, |place| {
        place.length(|_| 99_000_000);
        place.resize(|_| 100_000_000);
    }),
    ("st_header_over_cap_sparse", FILE, |place| {
        place.length(|_| 1 << 40);
        place.resize(|_| 1 << 41);
    }),
];

const TEXTS: &[Row] = &[
    ("st_leading_blanks", Accepted, |place| place.header(|header| format!(" \n\t\r {header}"))),
    ("st_trailing_blanks", Accepted, |place| place.header(|header| format!("{header}   "))),
    ("st_blanks_20_mb", Accepted, |place| place.header(|header| format!("{header}{}", " ".repeat(20_000_000)))),
    ("st_unaligned_data", Accepted, |place| place.header(|header| format!("{} ", header.trim_end()))),
    ("st_no_metadata", Accepted, |place| place.in_header("\"__metadata__\":{\"format\":\"pt\"},", "")),
    ("st_order_reversed", Accepted, |place| place.tensors(|all| all.reverse())),
    ("st_header_not_json", FILE, |place| place.header(|header| header.replace(':', ";"))),
    ("st_header_list", FILE, |place| place.header(|header| format!("[{header}]"))),
    ("st_header_null", FILE, |place| place.header(|_| "null".into())),
    ("st_header_string", FILE, |place| place.header(|_| "\"{}\"".into())),
    ("st_header_empty_object", FILE, |place| place.header(|_| "{}".into())),
    ("st_header_blank", FILE, |place| place.header(|_| " ".repeat(64))),
    ("st_header_twice", FILE, |place| place.header(|header| format!("{header}{header}"))),
    ("st_header_trailing_text", FILE, |place| place.header(|header| format!("{header} x"))),
    ("st_header_trailing_nul", FILE, |place| place.header(|header| format!("{header}\0\0"))),
    ("st_header_bom", FILE, |place| place.header(|header| format!("\u{feff}{header}"))),
    ("st_header_not_utf8", FILE, |place| {
        let mut bytes = std::fs::read(place.file(WEIGHTS)).unwrap();
        let at = bytes.windows(5).position(|window| window == b"embed").unwrap();
        bytes[at] = 0xff;
        place.write(WEIGHTS, bytes);
    }),
    ("st_header_utf16", FILE, |place| {
        let text: Vec<u8> = "{\"a\":1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        place.write(WEIGHTS, [&(text.len() as u64).to_le_bytes()[..], &text].concat());
    }),
    ("st_header_raw_escape", FILE, |place| place.in_header("embed_tokens", "embed\u{1b}[2J")),
    ("st_header_deep_json", FILE, |place| place.header(|_| "[".repeat(1_000_000))),
    ("st_header_deep_objects", FILE, |place| place.header(|_| "{\"a\":".repeat(300_000))),
    ("st_header_deep_metadata", FILE, |place| place.in_header("\"pt\"", &format!("{}{}", "[".repeat(5000), "]".repeat(5000)))),
    ("st_header_deep_shape", FILE, |place| place.in_header("[512,128]", &format!("{}{}", "[".repeat(5000), "]".repeat(5000)))),
    ("st_header_text_over_cap", FILE, |place| place.in_header("\"pt\"", &format!("\"{}\"", "x".repeat(17 << 20)))),
    ("st_header_many_tensors", Either, |place| {
        let empty = |number: usize| format!(",\"t{number}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[1312512,1312512]}}");
        let all: String = (0..100_000).map(empty).collect();
        place.header(|header| format!("{}{all}}}", header.trim_end().strip_suffix('}').unwrap()));
    }),
    ("st_offsets_sum_u64_max", FILE, |place| {
        let step = u64::MAX / 8;
        let end = |number: u64| if number == 8 { u64::MAX } else { (number + 1) * step };
        let tensor = |number: u64| {
            let (begin, end) = (number * step, end(number));
            format!("\"t{number}\":{{\"dtype\":\"U8\",\"shape\":[{}],\"data_offsets\":[{begin},{end}]}}", end - begin)
        };
        let all: Vec<String> = (0..9).map(tensor).collect();
        place.write(WEIGHTS, with_header(&format!("{{{}}}", all.join(",")), &[0; 16]));
    }),
    ("st_shape_million_dims", FILE, |place| place.in_header("[512,128]", &format!("[512,128{}]", ",1".repeat(1_000_000)))),
    ("st_name_1_mb", FILE, |place| place.name(&format!("\"{}\"", "n".repeat(1 << 20)))),
    ("st_name_1_kb", Accepted, |place| place.name(&format!("\"{}\"", "n".repeat(1000)))),
    ("st_duplicate_name", EMBED, |place| place.name("\"model.embed_tokens.weight\"")),
];

const HEAD: &str = "\"model.embed_tokens.weight\":{\"dtype\":\"BF16\",\"shape\":[512,128],\"data_offsets\":[0,131072]}";
const NEXT: &str = "\"model.layers.0.input_layernorm.weight\":{\"dtype\":\"BF16\",\"shape\":[128],\"data_offsets\":[131072,131328]},";
const DTYPE: &str = "\"dtype\":\"BF16\",";
const SHAPE: &str = "[512,128]";
const OFFSETS: &str = "[0,131072]";
const ALL_OFFSETS: &str = ",\"data_offsets\":[0,131072]";
const METADATA: &str = "{\"format\":\"pt\"}";

/// A text of the header and what stands there instead.
const EDITS: &[(&str, Expect, &str, &str)] = &[
    ("st_offsets_overlap", NORM, "[131072,131328]", "[131000,131256]"),
    ("st_offsets_two_the_same", FILE, "[131072,131328]", "[1312256,1312512]"),
    ("st_offsets_hole", FILE, NEXT, ""),
    ("st_offsets_first_not_zero", EMBED, OFFSETS, "[8,131080]"),
    ("st_offsets_reversed", EMBED, OFFSETS, "[131072,0]"),
    ("st_offsets_negative", EMBED, OFFSETS, "[-131072,0]"),
    ("st_offsets_float", EMBED, OFFSETS, "[0.0,131072.0]"),
    ("st_offsets_exponent", EMBED, OFFSETS, "[0,1.31072e5]"),
    ("st_offsets_string", EMBED, OFFSETS, "[\"0\",\"131072\"]"),
    ("st_offsets_null", EMBED, OFFSETS, "null"),
    ("st_offsets_missing", EMBED, ALL_OFFSETS, ""),
    ("st_offsets_empty", EMBED, OFFSETS, "[]"),
    ("st_offsets_one", EMBED, OFFSETS, "[131072]"),
    ("st_offsets_three", EMBED, OFFSETS, "[0,131072,131072]"),
    ("st_offsets_wrong_span", EMBED, OFFSETS, "[0,131070]"),
    (
        "st_offsets_beyond_file",
        Refused("model.norm.weight"),
        "[128],\"data_offsets\":[1312256,1312512]",
        "[256],\"data_offsets\":[1312256,1312768]",
    ),
    ("st_offsets_u64_max", EMBED, OFFSETS, "[18446744073709551615,18446744073709551615]"),
    ("st_offsets_above_u64", EMBED, OFFSETS, "[0,18446744073709551616]"),
    ("st_offsets_1e30", EMBED, OFFSETS, "[0,1e30]"),
    ("st_shape_mismatch", EMBED, SHAPE, "[512,129]"),
    ("st_shape_transposed", Refused("model.embed_tokens.weight"), SHAPE, "[128,512]"),
    ("st_shape_overflow", EMBED, SHAPE, "[4294967296,4294967296,4294967296]"),
    ("st_shape_wraps_bits", EMBED, SHAPE, "[1152921504606912512]"),
    ("st_shape_wraps_bytes", EMBED, SHAPE, "[9223372036854841344]"),
    ("st_shape_zero_and_huge", EMBED, SHAPE, "[0,18446744073709551615]"),
    ("st_shape_u64_max", EMBED, SHAPE, "[18446744073709551615]"),
    ("st_shape_above_u64", EMBED, SHAPE, "[18446744073709551616]"),
    ("st_shape_negative", EMBED, SHAPE, "[-512,128]"),
    ("st_shape_two_negatives", EMBED, SHAPE, "[-512,-128]"),
    ("st_shape_float", EMBED, SHAPE, "[512.0,128]"),
    ("st_shape_string", EMBED, SHAPE, "\"512,128\""),
    ("st_shape_null", EMBED, SHAPE, "null"),
    ("st_shape_bool", EMBED, SHAPE, "[true,65536]"),
    ("st_shape_nested", EMBED, SHAPE, "[[512,128]]"),
    ("st_shape_nine_dims", EMBED, SHAPE, "[1,1,1,1,1,1,1,512,128]"),
    ("st_shape_scalar", EMBED, SHAPE, "[]"),
    ("st_shape_missing", EMBED, ",\"shape\":[512,128]", ""),
    ("st_dtype_unknown", EMBED, DTYPE, "\"dtype\":\"FP16\","),
    ("st_dtype_lower_case", EMBED, DTYPE, "\"dtype\":\"bf16\","),
    ("st_dtype_number", EMBED, DTYPE, "\"dtype\":16,"),
    ("st_dtype_null", EMBED, DTYPE, "\"dtype\":null,"),
    ("st_dtype_missing", EMBED, DTYPE, ""),
    ("st_dtype_twice", EMBED, DTYPE, "\"dtype\":\"BF16\",\"dtype\":\"F16\","),
    ("st_field_unknown", EMBED, DTYPE, "\"dtype\":\"BF16\",\"device\":\"cpu\","),
    ("st_tensor_null", EMBED, HEAD, "\"model.embed_tokens.weight\":null"),
    ("st_tensor_list", EMBED, HEAD, "\"model.embed_tokens.weight\":[\"BF16\",[512,128]]"),
    ("st_tensor_empty_object", EMBED, HEAD, "\"model.embed_tokens.weight\":{}"),
    ("st_metadata_number", FILE, METADATA, "{\"format\":1}"),
    ("st_metadata_nested", FILE, METADATA, "{\"format\":{\"a\":\"b\"}}"),
    ("st_metadata_null", FILE, METADATA, "null"),
    ("st_metadata_list", FILE, METADATA, "[\"pt\"]"),
    ("st_metadata_duplicate_key", FILE, METADATA, "{\"format\":\"pt\",\"format\":\"tf\"}"),
    ("st_metadata_twice", FILE, METADATA, "{},\"__metadata__\":{}"),
    ("st_metadata_empty", Accepted, METADATA, "{}"),
];

pub fn variants() -> impl Iterator<Item = Variant> {
    let edits = EDITS.iter().map(|&(name, expect, from, to)| Variant::new(name, expect, move |place| place.in_header(from, to)));
    rows(LENGTHS).chain(rows(TEXTS)).chain(edits)
}
