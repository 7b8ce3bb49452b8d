//! What a report says about layers that give methods little to work with, whatever the method.

use crate::kernels::gram::add_column_squares;
use crate::model::arrivals::{Arrivals, FEW_TOKENS};
use crate::model::block::Site;
use crate::model::mixture::Which;
use crate::model::seen::Seen;
use crate::report::BlockReport;
use crate::weight::{Storage, Weight};

/// A change of more than this is no rounding.
const MOSTLY_LOST: f64 = 0.5;

/// What is unusual about a weight before compression.
pub fn of_weight(weight: &Weight) -> Option<String> {
    match weight {
        Weight::Stored(stored) => {
            let width = stored.float.bytes();
            let bytes: &[u8] = (*stored.bytes).as_ref();
            let value = |at: usize| &bytes[at * width..(at + 1) * width];
            let zero = |at: usize| value(at).iter().all(|byte| *byte == 0);
            constant_rows(stored.rows, stored.columns, |a, b| value(a) == value(b), zero)
        }
        Weight::Dense(matrix) => of_floats(&matrix.data, matrix.columns),
        _ => None,
    }
}

/// What a compressed layer no longer holds: `error` is the sum of squares of its change over that of its weights.
pub fn of_change(storage: Storage, error: f64) -> Option<String> {
    let percent = 100.0 * error;
    let lost = !matches!(storage, Storage::Sparse(_)) && error > MOSTLY_LOST;
    lost.then(|| format!("{percent:.0} % of the layer is lost (squares of the change over squares of the weights); values may be too large or too small for its scales"))
}

/// What is unusual about floats, `rows × columns`.
pub fn of_floats(floats: &[f32], columns: usize) -> Option<String> {
    constant_rows(floats.len() / columns.max(1), columns, |a, b| floats[a] == floats[b], |at| floats[at] == 0.0)
}

/// A sentence on rows of one value each; most rows are told by their first two entries.
fn constant_rows(rows: usize, columns: usize, equal: impl Fn(usize, usize) -> bool, zero: impl Fn(usize) -> bool) -> Option<String> {
    if columns < 2 {
        return None;
    }
    let constant: Vec<usize> =
        (0..rows).map(|row| row * columns).filter(|&start| (1..columns).all(|column| equal(start, start + column))).collect();
    let zeros = constant.iter().filter(|&&start| zero(start)).count();
    match (constant.len(), zeros) {
        (0, _) => None,
        (_, zeros) if zeros == rows => Some("all weights were zero before compression".into()),
        (constant, 0) => Some(format!("{constant} of {rows} rows hold one value each")),
        (constant, zeros) => Some(format!("{constant} of {rows} rows hold one value each, {zeros} of them zero")),
    }
}

/// How calibration spread over the experts of a model, where it has some: who saw least and most, and who too little.
pub fn of_experts(blocks: &[BlockReport]) -> Option<String> {
    const NAMED: usize = 6;
    let all: Vec<(usize, usize, u64)> =
        blocks.iter().flat_map(|block| block.experts.iter().enumerate().map(|(expert, &tokens)| (block.block, expert, tokens))).collect();
    let (least, most) = (all.iter().map(|one| one.2).min()?, all.iter().map(|one| one.2).max()?);
    let cold: Vec<String> =
        all.iter().filter(|one| one.2 < FEW_TOKENS as u64).map(|(block, expert, _)| format!("{expert} of block {block}")).collect();
    let spread = format!("calibration gave {least} to {most} tokens to each of {} experts", all.len());
    Some(match cold.len() {
        0 => spread,
        count => {
            let named = cold.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
            let more = if count > NAMED { format!(" and {} more", count - NAMED) } else { String::new() };
            format!("{spread}; {count} saw fewer than {FEW_TOKENS}: {named}{more}; use more --samples")
        }
    })
}

/// What is unusual about what came to an expert.
pub fn of_expert(arrivals: &Arrivals, which: Which) -> Option<String> {
    let tokens = arrivals.count(which);
    arrivals.cold(which).then(|| {
        let standing_in = arrivals.picked(which).len();
        format!(
            "{tokens} calibration tokens came to this expert, fewer than {FEW_TOKENS}: {standing_in} tokens of the whole block stand in"
        )
    })
}

/// What is unusual about the inputs of a layer of `columns`, given how many tokens calibration has.
pub fn of_inputs(seen: &Seen, site: Site, columns: usize, tokens: usize) -> Vec<String> {
    let squares = seen.sites.get(&site).map(|statistics| statistics.squares.clone()).or_else(|| {
        let mut squares = vec![0.0; columns];
        add_column_squares(seen.inputs.get(&site)?, &mut squares);
        Some(squares)
    });
    let dead = squares.iter().flatten().filter(|square| **square == 0.0).count();
    let mut remarks = Vec::new();
    if dead > 0 {
        remarks.push(format!("{dead} of {columns} input columns were zero for all tokens seen"));
    }
    if tokens < columns {
        remarks.push(format!("{tokens} calibration tokens are fewer than the {columns} input columns; use more --samples"));
    }
    remarks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constant_rows_zeros_and_dead_inputs_are_told() {
        assert_eq!(of_floats(&[1.0, 2.0, 3.0, 4.0], 2), None);
        assert_eq!(of_floats(&[1.0, 1.0, 3.0, 4.0], 2).unwrap(), "1 of 2 rows hold one value each");
        assert_eq!(of_floats(&[0.0, -0.0, 4.0, 4.0, 1.0, 2.0], 2).unwrap(), "2 of 3 rows hold one value each, 1 of them zero");
        assert_eq!(of_floats(&[0.0; 4], 2).unwrap(), "all weights were zero before compression");
        assert_eq!(of_change(Storage::Trits { group: 128 }, 0.2), None);
        assert!(of_change(Storage::Trits { group: 128 }, 1.0).unwrap().starts_with("100 % of the layer is lost"));
        let seen = Seen { inputs: [(Site::Mlp, vec![1.0, 0.0, 0.0, 2.0, 0.0, 0.0])].into(), ..Seen::default() };
        let remarks = of_inputs(&seen, Site::Mlp, 3, 2);
        assert!(remarks[0].starts_with("2 of 3 input columns") && remarks[1].starts_with("2 calibration tokens"), "{remarks:?}");
        assert!(of_inputs(&Seen::default(), Site::Down, 3, 3).is_empty());
        let block = |block, experts: &[u64]| BlockReport {
            block,
            output_error: None,
            stages: Vec::new(),
            experts: experts.to_vec(),
            router_entropy: None,
            experts_kept: Vec::new(),
        };
        assert_eq!(of_experts(&[block(0, &[])]), None);
        assert_eq!(of_experts(&[block(0, &[90, 16])]).unwrap(), "calibration gave 16 to 90 tokens to each of 2 experts");
        let told = of_experts(&[block(0, &[90, 15]), block(3, &[0; 7])]).unwrap();
        assert!(
            told.contains("8 saw fewer than 16: 1 of block 0, 0 of block 3, 1 of block 3,") && told.contains(" and 2 more; use"),
            "{told}"
        );
    }
}
