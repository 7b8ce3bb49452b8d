//! THE type: compression is a change of representation of a weight. Methods turn one variant into another,
//! formats write whichever variant they find, and neither knows the other.

pub mod bulk;
pub mod ints;
pub mod rows;
pub mod sparse;
pub mod split;
pub mod stored;
pub mod super_blocks;
pub mod trits;

use std::borrow::Cow;

pub use ints::Ints;
pub use sparse::{Pattern, Sparse};
pub use split::Split;
pub use stored::Stored;
pub use super_blocks::{SuperBlocks, SuperKind};
pub use trits::Trits;

use crate::matrix::Matrix;

/// The weight of a linear layer, `[outputs, inputs]`, in one of its representations.
#[derive(Debug, Clone, PartialEq)]
pub enum Weight {
    /// Every entry a float, as the checkpoint stores it.
    Stored(Stored),
    /// Every entry a float.
    Dense(Matrix),
    /// Floats with entries fixed at zero.
    Sparse(Sparse),
    /// Integers on a grid per group.
    Ints(Ints),
    /// Two planes of trits with two scales per group.
    Trits(Trits),
    /// Integers on two grids per group, one for outliers.
    Split(Split),
    /// Codes on llama.cpp's two-level grids.
    Super(SuperBlocks),
}

/// What a weight is stored as: the representation without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Storage {
    /// Every entry a float.
    Dense,
    /// Floats with entries fixed at zero.
    Sparse(Pattern),
    /// Integers of `bits` bits with one scale per `group` columns.
    Ints {
        /// Bits per code, 2..=8.
        bits: u8,
        /// Columns that share a scale; the number of columns when there is one scale per row.
        group: usize,
        /// Whether the zero point is the middle of the range.
        symmetric: bool,
    },
    /// Two planes of trits with two scales per `group` columns.
    Trits {
        /// Columns that share scales.
        group: usize,
    },
    /// Integers of `bits` bits with a scale for core weights and one for outliers per `group` columns.
    Split {
        /// Bits per code, 2..=8.
        bits: u8,
        /// Columns that share the two scales.
        group: usize,
        /// Outliers per million weights.
        outliers: u32,
    },
    /// Codes on a two-level grid of llama.cpp.
    Super(SuperKind),
}

/// What the output will hold of a linear layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outlined {
    /// Full name without `.weight`.
    pub name: String,
    /// `[outputs, inputs]`.
    pub shape: [usize; 2],
    /// Its representation; `None` when the layer is carried over as it is.
    pub storage: Option<Storage>,
    /// Number format of the model's floats.
    pub float: Float,
}

/// Number format of a stored float.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Float {
    /// bfloat16.
    BF16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl Float {
    /// Bytes per number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
        }
    }

    /// The largest finite value.
    pub fn largest(self) -> f32 {
        match self {
            Self::F32 => f32::MAX,
            Self::BF16 => half::bf16::MAX.to_f32(),
            Self::F16 => 65504.0,
        }
    }

    /// The nearest value that this format holds. Overflow of f16 is held at the largest finite value, so that a
    /// scale never becomes infinite.
    #[inline]
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::BF16 => half::bf16::from_f32(value).to_f32(),
            Self::F16 => half::f16::from_f32(value.clamp(-65504.0, 65504.0)).to_f32(),
        }
    }
}

impl Weight {
    /// The representation without its data.
    pub fn storage(&self) -> Storage {
        match self {
            Self::Stored(_) | Self::Dense(_) => Storage::Dense,
            Self::Sparse(sparse) => Storage::Sparse(sparse.pattern),
            Self::Ints(ints) => Storage::Ints { bits: ints.bits, group: ints.group, symmetric: ints.zeros.is_none() },
            Self::Trits(trits) => Storage::Trits { group: trits.group },
            Self::Super(blocks) => Storage::Super(blocks.kind),
            Self::Split(split) => Storage::Split { bits: split.bits, group: split.group, outliers: split.outliers },
        }
    }

    /// `[rows, columns]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Stored(stored) => [stored.rows, stored.columns],
            Self::Dense(matrix) => [matrix.rows, matrix.columns],
            Self::Sparse(sparse) => [sparse.matrix.rows, sparse.matrix.columns],
            Self::Ints(ints) => [ints.rows, ints.columns],
            Self::Trits(trits) => [trits.rows, trits.columns],
            Self::Split(split) => [split.rows, split.columns],
            Self::Super(blocks) => [blocks.rows, blocks.columns],
        }
    }

    /// The floats that this weight stands for: the oracle of every test and the input of every forward.
    pub fn to_matrix(&self) -> Cow<'_, Matrix> {
        match self {
            Self::Dense(matrix) | Self::Sparse(Sparse { matrix, .. }) => Cow::Borrowed(matrix),
            Self::Stored(stored) => Cow::Owned(stored.to_matrix()),
            Self::Ints(ints) => Cow::Owned(ints.to_matrix()),
            Self::Trits(trits) => Cow::Owned(trits.to_matrix()),
            Self::Split(split) => Cow::Owned(split.to_matrix()),
            Self::Super(blocks) => Cow::Owned(blocks.to_matrix()),
        }
    }

    /// A number that no entry exceeds in magnitude; infinite where an entry may not be finite. Floats that a reader has checked
    /// count as 0.
    pub fn bound(&self) -> f32 {
        let magnitude = |value: f32| if value.is_nan() { f32::INFINITY } else { value.abs() };
        let largest = |values: &mut dyn Iterator<Item = f32>| values.map(magnitude).fold(0.0, f32::max);
        match self {
            Self::Dense(matrix) => largest(&mut matrix.data.iter().copied()),
            Self::Sparse(sparse) => largest(&mut sparse.matrix.data.iter().copied()),
            Self::Ints(ints) if ints.zeros.is_none() => largest(&mut ints.scales.iter().copied()) * f32::from(1u16 << (ints.bits - 1)),
            Self::Ints(ints) => largest(&mut ints.scales.iter().copied()) * f32::from((1u16 << ints.bits) - 1),
            Self::Trits(trits) => largest(&mut trits.scales.iter().map(|[coarse, fine]| magnitude(*coarse) + magnitude(*fine))),
            Self::Split(split) => largest(&mut split.scales.iter().flatten().copied()) * f32::from(1u16 << (split.bits - 1)),
            Self::Stored(_) | Self::Super(_) => 0.0,
        }
    }

    /// Number of weights that are exactly zero.
    pub fn zeros(&self) -> usize {
        match self {
            Self::Dense(matrix) | Self::Sparse(Sparse { matrix, .. }) => matrix.zeros(),
            Self::Stored(stored) => stored.to_matrix().zeros(),
            Self::Ints(ints) => ints.zero_codes(),
            Self::Trits(trits) => trits.zeros(),
            Self::Split(split) => split.zeros(),
            Self::Super(blocks) => blocks.to_matrix().zeros(),
        }
    }

    /// The floats that this weight stands for, without a copy where it holds floats already.
    pub fn into_matrix(self) -> Matrix {
        match self {
            Self::Dense(matrix) | Self::Sparse(Sparse { matrix, .. }) => matrix,
            Self::Stored(stored) => stored.to_matrix(),
            Self::Ints(ints) => ints.to_matrix(),
            Self::Trits(trits) => trits.to_matrix(),
            Self::Split(split) => split.to_matrix(),
            Self::Super(blocks) => blocks.to_matrix(),
        }
    }
}

impl Storage {
    /// Stored bits of a `[rows, columns]` weight in this representation, scales and zero points included;
    /// `float` is the format of stored floats.
    pub fn bits(self, [rows, columns]: [usize; 2], float: Float) -> u64 {
        let entries = (rows * columns) as u64;
        match self {
            Self::Dense | Self::Sparse(_) => entries * 8 * float.bytes() as u64,
            Self::Ints { bits, group, symmetric } => {
                let groups = (rows * columns.div_ceil(group.max(1))) as u64;
                let zero_bits = if symmetric { 0 } else { u64::from(bits) };
                entries * u64::from(bits) + groups * (8 * float.bytes() as u64 + zero_bits)
            }
            // Five trits fit a byte, in each of two planes, and scales are f16.
            Self::Trits { group } => (entries * 16).div_ceil(5) + (rows * columns.div_ceil(group.max(1))) as u64 * 32,
            Self::Super(kind) => entries / super_blocks::SIZE as u64 * 8 * kind.bytes() as u64,
            // Scales are f16, and every outlier is listed by its position in its group.
            Self::Split { bits, group, outliers } => {
                let groups = (rows * columns.div_ceil(group.max(1))) as u64;
                let listed = (entries as f64 * f64::from(outliers) * 1e-6).round() as u64;
                entries * u64::from(bits) + groups * 32 + listed * split::position_bits(group)
            }
        }
    }
}

impl std::fmt::Display for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Dense => write!(f, "dense"),
            Self::Sparse(pattern) => write!(f, "sparse {pattern}"),
            Self::Trits { group } => write!(f, "trits g{group}"),
            Self::Ints { bits, group, symmetric } => {
                write!(f, "W{bits} g{group} {}", if *symmetric { "symmetric" } else { "asymmetric" })
            }
            Self::Super(kind) => write!(f, "{}", kind.name()),
            Self::Split { bits, group, outliers } => write!(f, "W{bits} g{group} split, {} % outliers", f64::from(*outliers) * 1e-4),
        }
    }
}
