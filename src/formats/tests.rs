//! Every format × every storage that it holds: written, opened again, equal bit for bit. A new format joins by its line in
//! [`FORMATS`].

use std::collections::BTreeMap;

use super::*;
use crate::formats::output::{Output, write_json};
use crate::matrix::Matrix;
use crate::weight::{Ints, Pattern, Sparse, Split, Storage, Trits};

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
    write_json(&folder.path().join("config.json"), &config).unwrap();
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
    // One GGUF file is a container of its own, and tested there.
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
