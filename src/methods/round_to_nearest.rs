//! Round to nearest: every weight to the nearest point of its group's grid, without calibration.
//!
//! Source: the common baseline; symmetric grids with the signed full-range scale (formats A4). Needs nothing, leaves
//! integers, keeps pruned weights exactly zero.

use crate::error::{Error, Result};
use crate::kernels::quantize::{self, Grid, round_stored_within, round_to_nearest, round_to_nearest_within};
use crate::methods::{Applied, Layer, Method, quantizable};
use crate::model::seen::Needs;
use crate::weight::{Storage, Weight};

/// Smallest group that a fallback picks before it gives every row one scale.
const SMALLEST_FALLBACK: usize = 16;

/// Options of round-to-nearest.
#[derive(Debug, Clone, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct RoundToNearest {
    /// Bits per weight, 2..=8.
    #[serde(default = "four")]
    pub bits: u8,
    /// Columns that share a scale.
    #[serde(default)]
    pub group: Group,
    /// Whether the zero point is fixed in the middle of the range.
    #[serde(default = "yes")]
    pub symmetric: bool,
}

fn four() -> u8 {
    4
}

fn yes() -> bool {
    true
}

/// Columns that share a scale: a number, or `"channel"` for a whole row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// This many consecutive columns.
    Columns(usize),
    /// The whole row.
    Channel,
}

impl Default for Group {
    fn default() -> Self {
        Self::Columns(128)
    }
}

impl Group {
    /// The group size for a row of `columns`: the one asked for when it divides; else the largest of 128, 64 and 32
    /// below it that does, because servers have kernels for those; else its largest divisor of at least 16; else the
    /// whole row.
    pub fn fit(self, columns: usize) -> usize {
        let Self::Columns(wanted) = self else { return columns };
        let divides = |size: &usize| columns.is_multiple_of(*size);
        let usual = [128, 64, 32].into_iter().filter(|&size| size < wanted);
        let divisors = (SMALLEST_FALLBACK..=wanted.min(columns)).rev();
        std::iter::once(wanted).chain(usual).chain(divisors).find(divides).unwrap_or(columns)
    }
}

impl<'de> serde::Deserialize<'de> for Group {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Number(i64),
            Text(String),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Number(-1) => Ok(Self::Channel),
            Raw::Text(text) if text == "channel" => Ok(Self::Channel),
            Raw::Number(size) if (8..=1 << 20).contains(&size) => Ok(Self::Columns(size as usize)),
            Raw::Number(size) => Err(serde::de::Error::custom(format!("group is {size}; use 32, 64, 128 or \"channel\""))),
            Raw::Text(text) => Err(serde::de::Error::custom(format!("group is \"{text}\"; use 32, 64, 128 or \"channel\""))),
        }
    }
}

impl serde::Serialize for Group {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Columns(size) => serializer.serialize_u64(*size as u64),
            Self::Channel => serializer.serialize_str("channel"),
        }
    }
}

impl Method for RoundToNearest {
    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn leaves(&self, before: Storage, [_, columns]: [usize; 2], bits: Option<u8>) -> Result<Storage> {
        let bits = bits.unwrap_or(self.bits);
        quantizable(before, bits, "round-to-nearest")?;
        Ok(Storage::Ints { bits, group: self.group.fit(columns), symmetric: self.symmetric })
    }

    fn apply(&self, weight: Weight, layer: &Layer<'_>) -> Result<Applied> {
        let shape = weight.shape();
        let [_, columns] = shape;
        let grid = Grid {
            bits: layer.bits.unwrap_or(self.bits),
            group: self.group.fit(columns),
            symmetric: self.symmetric,
            scale_float: layer.float,
        };
        if layer.bounds.is_some_and(|bounds| !bounds.fits(shape, grid.group)) {
            return Err(Error::run(format!("the ranges that an earlier stage chose are not for groups of {}", grid.group)));
        }
        let (ints, change) = match (&weight, layer.bounds, layer.gpu) {
            (weight, bounds, Some(gpu)) => quantize::gpu::round_to_nearest(gpu, &weight.to_matrix(), grid, bounds)?,
            (Weight::Stored(stored), bounds, None) => round_stored_within(stored, grid, bounds),
            (weight, Some(bounds), None) => round_to_nearest_within(&weight.to_matrix(), grid, bounds),
            (weight, None, None) => round_to_nearest(&weight.to_matrix(), grid),
        };
        Ok(Applied::new(Weight::Ints(ints), change))
    }

    fn options(&self) -> toml::Table {
        toml::Table::try_from(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_does_not_divide_falls_back_to_the_largest_that_does() {
        for (wanted, columns, fitted) in
            [(128, 4096, 128), (128, 2880, 64), (64, 2880, 64), (128, 64, 64), (128, 172, 86), (32, 173, 173), (128, 96, 32), (128, 48, 48)]
        {
            assert_eq!(Group::Columns(wanted).fit(columns), fitted, "{wanted} {columns}");
        }
        assert_eq!(Group::Channel.fit(172), 172);
    }
}
