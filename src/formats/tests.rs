//! Every format × every storage that it holds: written, opened again, equal bit for bit. A new format joins by its line in
//! [`FORMATS`].

use std::collections::BTreeMap;

use super::*;
use crate::formats::output::Output;
use crate::matrix::Matrix;
use crate::storage::write_whole_json;
use crate::weight::{Ints, Pattern, Sparse, Split, Storage, SuperBlocks, SuperKind, Trits};

fn noise(count: usize, seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    })
}

fn ints([rows, columns]: [usize; 2], bits: u8, group: usize, symmetric: bool, scale_float: Float) -> Weight {
    let groups = columns.div_ceil(group);
    let code = |count, seed| noise(count, seed).map(|value| (value % (1 << bits)) as u8).collect::<Vec<_>>();
    let scale = |value: u64| scale_float.round((value % 4000 + 1) as f32 * if value.is_multiple_of(2) { 3e-4 } else { -3e-4 });
    let scales = noise(rows * groups, 7).map(scale).collect();
    let zeros = (!symmetric).then(|| code(rows * groups, 11));
    Weight::Ints(Ints { rows, columns, bits, group, codes: code(rows * columns, 3), scales, scale_float, zeros })
}

/// Weights of every storage that a recipe can leave, on round and on odd shapes.
fn weights(scale_float: Float) -> Vec<Weight> {
    let mut all = Vec::new();
    for shape in [[32usize, 64], [64, 96], [96, 32], [5, 70], [33, 172], [8, 24]] {
        for bits in 2..=8 {
            for group in [shape[1], 32, shape[1].div_ceil(2)] {
                for symmetric in [true, false] {
                    all.push(ints(shape, bits, group, symmetric, scale_float));
                }
            }
        }
        let floats = noise(shape[0] * shape[1], 5).map(|value| Float::BF16.round(value as f32 / 1e9 - 1.0)).collect();
        let mut matrix = Matrix::new(shape[0], shape[1], floats);
        all.push(Weight::Dense(matrix.clone()));
        matrix.data.iter_mut().step_by(2).for_each(|value| *value = 0.0);
        all.push(Weight::Sparse(Sparse { matrix: matrix.clone(), pattern: Pattern::Unstructured }));
        // One of every two stays, and of some none: a kept place may hold a zero.
        matrix.data.iter_mut().skip(1).step_by(14).for_each(|value| *value = 0.0);
        all.push(Weight::Sparse(Sparse { matrix, pattern: Pattern::Blocks { kept: 1, of: 2 } }));
        let ([rows, columns], group) = (shape, shape[1].div_ceil(2));
        let pair = |value: u64| [Float::F16.round(1.0 + (value % 97) as f32 / 9.0), Float::F16.round((value % 89) as f32 / 99.0)];
        let scales: Vec<[f32; 2]> = noise(rows * columns.div_ceil(group), 13).map(pair).collect();
        let codes = noise(rows * columns, 17).map(|value| (value % 9) as u8).collect();
        all.push(Weight::Trits(Trits { rows, columns, group, codes, scales: scales.clone(), scale_float: Float::F16 }));
        let codes = noise(rows * columns, 19).map(|value| (value % 7 + 1) as u8).collect();
        let mut mask: Vec<u8> = noise(rows * columns.div_ceil(8), 23).map(|value| value as u8).collect();
        let spare = columns.div_ceil(8) * 8 - columns;
        mask.chunks_mut(columns.div_ceil(8)).for_each(|row| *row.last_mut().unwrap() &= 255 >> spare);
        all.push(Weight::Split(Split { rows, columns, bits: 3, group, outliers: 5000, codes, scales, mask }));
    }
    all
}

/// What a format gives back of weights that it holds.
fn written_and_opened(format: &Format, layers: &[(Outlined, &Weight)]) -> Vec<Weight> {
    let folder = tempfile::tempdir().unwrap();
    let outlined: Vec<Outlined> = layers.iter().map(|(outlined, _)| outlined.clone()).collect();
    let entries: Vec<Entry> = outlined.iter().flat_map(|layer| (format.entries)(layer)).collect();
    let mut output = Output::create(folder.path(), &entries, 1 << 20, &BTreeMap::new()).unwrap();
    for (layer, weight) in layers {
        let tensors = (format.encode)(weight, layer.float);
        let planned = (format.entries)(layer);
        assert_eq!(tensors.len(), planned.len(), "{} {:?}", format.name, layer.storage);
        for (entry, bytes) in planned.iter().zip(tensors) {
            assert_eq!(entry.bytes(), bytes.len() as u64, "{} {} {:?}", format.name, entry.name, layer.storage);
            output.write(&entry.name, bytes).unwrap();
        }
    }
    output.finish().unwrap();
    let mut config = serde_json::json!({"model_type": "llama"});
    if let Some(section) = (format.config)(&outlined, &[]) {
        config["quantization_config"] = section;
    }
    write_whole_json(&folder.path().join("config.json"), &config).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let source = open(&checkpoint).unwrap();
    let read = |layer: &Outlined| {
        assert_eq!(source.shape(&checkpoint, &layer.name), Some(layer.shape), "{} {layer:?}", format.name);
        source.check(&checkpoint, &layer.name, layer.shape).unwrap();
        source.weight(&checkpoint, &layer.name, layer.shape).unwrap()
    };
    outlined.iter().map(read).collect()
}

#[test]
fn every_format_gives_back_what_it_holds_bit_for_bit() {
    // A GGUF file is a container of its own: its blocks are tested below, its header and the way through a file elsewhere.
    for format in FORMATS.iter().filter(|format| format.name != "gguf") {
        let scale_float = format.scales.unwrap_or(Float::BF16);
        let weights = weights(scale_float);
        let layer = |(number, weight): (usize, &Weight)| {
            let float = if matches!(weight, Weight::Ints(_)) { scale_float } else { Float::BF16 };
            Outlined { name: format!("model.layers.{number}.q_proj"), shape: weight.shape(), storage: Some(weight.storage()), float }
        };
        let layers = weights.iter().enumerate().map(|(number, weight)| (layer((number, weight)), weight));
        let held: Vec<_> = layers.filter(|(layer, _)| (format.holds)(layer).is_ok()).collect();
        assert!(held.len() >= 10, "{} holds only {}", format.name, held.len());
        // Formats that name one scheme per model get one at a time.
        let alone = format.name == "awq";
        let pieces: Vec<_> = if alone { held.chunks(1).collect() } else { held.chunks(held.len()).collect() };
        for piece in pieces {
            for ((layer, weight), got) in piece.iter().zip(written_and_opened(format, piece)) {
                let expected = match weight {
                    Weight::Ints(ints) if format.name != "dense" => {
                        // A grid whose zero points are all in the middle is a symmetric one.
                        let middle = ints.zeros.as_ref().is_some_and(|zeros| zeros.iter().all(|&zero| zero == ints.middle()));
                        Weight::Ints(Ints { zeros: ints.zeros.clone().filter(|_| !middle), ..ints.clone() })
                    }
                    Weight::Ints(ints) => {
                        let mut matrix = ints.to_matrix();
                        matrix.data.iter_mut().for_each(|value| *value = layer.float.round(*value));
                        Weight::Dense(matrix)
                    }
                    other if format.name == "dense" => {
                        let mut matrix = other.to_matrix().into_owned();
                        matrix.data.iter_mut().for_each(|value| *value = layer.float.round(*value));
                        Weight::Dense(matrix)
                    }
                    other => (*other).clone(),
                };
                let same = match (&got, &expected) {
                    (Weight::Ints(got), Weight::Ints(expected)) => got == expected,
                    (Weight::Trits(_) | Weight::Split(_), expected) => got == *expected,
                    (got, expected) => got.to_matrix() == expected.to_matrix(),
                };
                assert!(same, "{} {:?} {:?}", format.name, layer.storage, layer.shape);
            }
        }
    }
}

/// What GGUF blocks give back of a weight, as floats.
fn through_blocks(layer: &Outlined, weight: &Weight) -> Matrix {
    use crate::formats::gguf::blocks::{self, Kind};
    let bytes = (gguf::FORMAT.encode)(weight, layer.float).remove(0);
    assert_eq!(bytes.len() as u64, (gguf::FORMAT.entries)(layer)[0].bytes(), "{layer:?}");
    match gguf::carrier(layer) {
        Some(Kind::Super(kind)) => gguf::k_blocks::decode(&bytes, kind, layer.shape).to_matrix(),
        Some(kind) => blocks::decode(&bytes, kind, layer.shape).unwrap().to_matrix(),
        None => {
            let mut matrix = Matrix::new(layer.shape[0], layer.shape[1], vec![0.0; layer.shape[0] * layer.shape[1]]);
            decode(layer.float, &bytes, &mut matrix.data);
            matrix
        }
    }
}

/// A weight on a two-level grid.
fn two_level(kind: SuperKind, [rows, columns]: [usize; 2], seed: u64) -> Weight {
    let (supers, smalls) = (rows * columns / 256, rows * columns / kind.block());
    let [least, most] = kind.scales();
    let whole = |value: u64| {
        let minimum = if kind.minima() { (value >> 9) as i32 % (most + 1) } else { 0 };
        [least + value as i32 % (most - least + 1), minimum].map(|whole| whole as i8)
    };
    let float = |value: u64| Float::F16.round((value % 999) as f32 * 1e-4);
    Weight::Super(SuperBlocks {
        rows,
        columns,
        kind,
        codes: noise(rows * columns, seed).map(|value| (value % (1 << kind.bits())) as u8).collect(),
        floats: noise(supers, seed + 1).map(|value| [float(value), if kind.minima() { float(value >> 10) } else { 0.0 }]).collect(),
        wholes: noise(smalls, seed + 2).map(|value| whole(value & 0xf_ffff)).collect(),
    })
}

#[test]
fn gguf_blocks_give_back_every_weight_that_the_format_holds() {
    let mut all = weights(Float::F16);
    all.extend(SuperKind::ALL.map(|kind| two_level(kind, [3, 512], 29)));
    let mut carried = 0;
    for weight in &all {
        let float = if matches!(weight, Weight::Ints(_)) { Float::F16 } else { Float::BF16 };
        let layer = Outlined { name: "a".into(), shape: weight.shape(), storage: Some(weight.storage()), float };
        if (gguf::FORMAT.holds)(&layer).is_err() {
            continue;
        }
        let mut expected = weight.to_matrix().into_owned();
        if gguf::carrier(&layer).is_none() {
            expected.data.iter_mut().for_each(|value| *value = float.round(*value));
        } else {
            carried += 1;
        }
        assert!(through_blocks(&layer, weight) == expected, "{layer:?}");
    }
    assert!(carried > 40, "{carried}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
    #[test]
    fn integers_of_any_shape_come_back_from_every_format(
        rows in 1usize..80, columns in 1usize..200, unit in 0usize..3, bits in 2u8..=8, group in 1usize..200, symmetric: bool,
    ) {
        let unit = [1, 8, 32][unit];
        let (rows, columns) = (rows.next_multiple_of(unit), columns.next_multiple_of(unit));
        let group = group.next_multiple_of(unit).min(columns);
        let weight = ints([rows, columns], bits, group, symmetric, Float::F16);
        let layer = Outlined { name: "b.0.q".into(), shape: [rows, columns], storage: Some(weight.storage()), float: Float::F16 };
        for format in FORMATS.iter().filter(|format| format.name != "dense" && (format.holds)(&layer).is_ok()) {
            if format.name == "gguf" {
                let exact = gguf::carrier(&layer).is_some();
                proptest::prop_assert!(!exact || through_blocks(&layer, &weight) == *weight.to_matrix(), "{:?}", layer);
                continue;
            }
            let got = written_and_opened(format, &[(layer.clone(), &weight)]).remove(0);
            proptest::prop_assert!(got.to_matrix() == weight.to_matrix(), "{} {:?}", format.name, layer);
        }
    }

    #[test]
    fn two_level_grids_of_any_codes_come_back(rows in 1usize..6, supers in 1usize..4, kind in 0usize..5, seed: u32) {
        let kind = SuperKind::ALL[kind];
        let weight = two_level(kind, [rows, 256 * supers], u64::from(seed));
        let Weight::Super(blocks) = &weight else { unreachable!() };
        let bytes = gguf::k_blocks::encode(blocks);
        proptest::prop_assert_eq!(&gguf::k_blocks::decode(&bytes, kind, [rows, 256 * supers]), blocks);
    }
}

#[test]
fn a_tritplane_that_holds_no_trits_or_another_number_of_values_is_refused() {
    for (suffix, byte) in [("trits_coarse", 243u8), ("sparse_mask", 0)] {
        let folder = tempfile::tempdir().unwrap();
        let wanted =
            if suffix == "trits_coarse" { Storage::Trits { group: 32 } } else { Storage::Sparse(Pattern::Blocks { kept: 1, of: 2 }) };
        let weight = weights(Float::F16).into_iter().find(|weight| weight.storage() == wanted).unwrap();
        let layer = Outlined { name: "a".into(), shape: weight.shape(), storage: Some(wanted), float: Float::F16 };
        let entries = (tritplane::FORMAT.entries)(&layer);
        let mut output = Output::create(folder.path(), &entries, 1 << 20, &BTreeMap::new()).unwrap();
        for (entry, mut bytes) in entries.iter().zip((tritplane::FORMAT.encode)(&weight, layer.float)) {
            if entry.name.ends_with(suffix) {
                bytes[0] = byte;
            }
            output.write(&entry.name, bytes).unwrap();
        }
        output.finish().unwrap();
        let section = (tritplane::FORMAT.config)(std::slice::from_ref(&layer), &[]);
        write_whole_json(&folder.path().join("config.json"), &serde_json::json!({"model_type": "llama", "quantization_config": section}))
            .unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let error = open(&checkpoint).unwrap().weight(&checkpoint, "a", layer.shape).unwrap_err().to_string();
        assert!(error.contains(suffix), "{error}");
    }
}

#[test]
fn gptq_takes_its_second_version_where_the_first_has_no_room() {
    let layer = |symmetric, bits| Outlined {
        name: "b.0.q".into(),
        shape: [32, 64],
        storage: Some(Storage::Ints { bits, group: 32, symmetric }),
        float: Float::F16,
    };
    assert_eq!(fitting("gptq", &[layer(true, 4)]).unwrap().name, "gptq");
    assert_eq!(fitting("gptq", &[layer(true, 4), layer(false, 4)]).unwrap().name, "gptq_v2");
    assert!(fitting("gptq", &[layer(true, 5)]).unwrap_err().to_string().contains("compressed-tensors"));
}
