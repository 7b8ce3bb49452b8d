//! Every place of hidden states holds them alike.

use super::*;
use crate::device::Device;
use crate::run::Silent;

const PLACES: [Keeping; 4] = [
    Keeping { budget_bytes: u64::MAX, exact: true, near: true },
    Keeping { budget_bytes: 6 * 12, exact: false, near: true },
    Keeping { budget_bytes: 0, exact: false, near: true },
    Keeping { budget_bytes: 0, exact: true, near: true },
];

#[test]
fn every_place_holds_the_same_states() {
    let (device, scratch) = (Device::cpu(), Path::new("."));
    let run = Run { device: &device, seed: 0, observer: &Silent, scratch };
    for (keeping, spilled) in PLACES.into_iter().zip([false, false, true, true]) {
        let mut hidden = Hidden::new(&[3, 1, 2], 5, keeping, &run).unwrap();
        assert_eq!(hidden.spilled(), spilled);
        for window in [2, 0, 1] {
            let values: Vec<f32> = (0..hidden.tokens(window) * 5).map(|i| (i + 100 * window) as f32).collect();
            hidden.write(window..window + 1, &values).unwrap();
        }
        let copy = hidden.copy(&run).unwrap();
        for hidden in [hidden, copy] {
            let sums = hidden.map(&[0..1, 1..3], &device.burn, |_, states| Ok(crate::kernels::values(states).iter().sum::<f32>())).unwrap();
            assert_eq!(sums, [105.0, 2555.0], "{keeping:?}");
        }
    }
}

#[test]
fn states_come_back_bit_for_bit_from_where_they_were_saved() {
    let (device, scratch) = (Device::cpu(), Path::new("."));
    let run = Run { device: &device, seed: 0, observer: &Silent, scratch };
    let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    for keeping in PLACES {
        // More than one piece, and a last one that is not whole.
        let mut hidden = Hidden::new(&[900, 701], 1100, keeping, &run).unwrap();
        for window in 0..2 {
            let values: Vec<f32> = (0..hidden.tokens(window) * 1100).map(|i| (i as f32).sin()).collect();
            hidden.write(window..window + 1, &values).unwrap();
        }
        let file = File::create(&path).unwrap();
        let saved = hidden.save(|start, piece| file.write_all_at(piece, start).map_err(|error| spill_error(&error))).unwrap();
        let mut back = hidden.like(1100, &run).unwrap();
        assert_eq!(back.load(&File::open(&path).unwrap(), &path).unwrap(), saved);
        assert_eq!(back.read(0..2).unwrap(), hidden.read(0..2).unwrap(), "{keeping:?}");
        file.write_all_at(&[1], saved.0 - 1).unwrap();
        assert_ne!(back.load(&File::open(&path).unwrap(), &path).unwrap(), saved);
        file.set_len(saved.0 - 1).unwrap();
        assert!(back.load(&File::open(&path).unwrap(), &path).is_err());
    }
}

#[test]
fn states_that_were_kept_in_another_way_come_back_too() {
    let (device, scratch) = (Device::cpu(), Path::new("."));
    let run = Run { device: &device, seed: 0, observer: &Silent, scratch };
    let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    for from in PLACES {
        // Windows that end within a piece, and one that is longer than a piece.
        let mut hidden = Hidden::new(&[3, 1200, 5], 1100, from, &run).unwrap();
        for window in 0..3 {
            let values: Vec<f32> = (0..hidden.tokens(window) * 1100).map(|i| (i as f32).cos()).collect();
            hidden.write(window..window + 1, &values).unwrap();
        }
        let file = File::create(&path).unwrap();
        let saved = hidden.save(|start, piece| file.write_all_at(piece, start).map_err(|error| spill_error(&error))).unwrap();
        for into in PLACES {
            let mut back = Hidden::new(&[3, 1200, 5], 1100, into, &run).unwrap();
            assert_eq!(back.load(&File::open(&path).unwrap(), &path).unwrap(), saved);
            let pairs = back.read(0..3).unwrap().into_iter().zip(hidden.read(0..3).unwrap());
            assert!(pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) <= 2.0_f32.powi(-11), "{from:?} {into:?}");
        }
    }
}

#[test]
fn halved_states_keep_their_digits_beside_huge_ones() {
    let states = [1.0e9, -3.0e6, 3.8, 0.0, 7.0, -3.0e-30, 1.0e-38, 5.0e-38, 0.0, 2.9e-38, 3.0e38, 1.0e38, -3.0e38, 1.0e30, 1.0];
    let mut back = [f32::NAN; 15];
    restore(&halve(&states, 5), 5, &mut back);
    for (token, (states, back)) in states.chunks(5).zip(back.chunks(5)).enumerate() {
        let largest = states.iter().fold(0.0_f32, |largest, state| largest.max(state.abs()));
        for (state, back) in states.iter().zip(back) {
            let bound = (state.abs() * 2.0_f32.powi(-11)).max(largest * 2.0_f32.powi(-39));
            assert!((state - back).abs() <= bound, "token {token}: {state} came back as {back}");
        }
    }
}

#[test]
fn runs_hold_windows_of_one_length_up_to_a_number_of_tokens() {
    let (device, scratch) = (Device::cpu(), Path::new("."));
    let run = Run { device: &device, seed: 0, observer: &Silent, scratch };
    let hidden = Hidden::new(&[4, 4, 4, 2, 2, 9], 1, PLACES[0], &run).unwrap();
    assert_eq!(hidden.runs(8), [0..2, 2..3, 3..5, 5..6]);
    assert_eq!(hidden.runs(0).len(), 6);
}
