//! Every shader beside its twin on the processor, on odd shapes and awkward values. The program's `doctor` runs this on the
//! machine's own adapter, and so does the test suite.

mod cases;

use crate::device::Gpu;
use crate::error::Result;

/// What a comparison found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// What was compared.
    pub case: String,
    /// How far apart the two are: a share of entries, or a largest difference relative to the largest entry.
    pub difference: f64,
    /// How far apart they may be.
    pub tolerance: f64,
}

impl Found {
    /// Whether the two agree.
    pub fn agrees(&self) -> bool {
        self.difference <= self.tolerance
    }
}

/// The comparisons of one shader or of several that work together.
pub struct Check {
    /// Shaders that the comparisons launch.
    pub shaders: &'static [&'static str],
    /// Runs the comparisons.
    pub run: fn(&Gpu) -> Result<Vec<Found>>,
}

impl std::fmt::Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Check of {:?}", self.shaders)
    }
}

/// All of them.
pub const CHECKS: [Check; 13] = [
    Check { shaders: &["attention", "attention_query_adjoint", "attention_key_adjoint"], run: cases::attention },
    Check { shaders: &["column_squares"], run: cases::column_squares },
    Check { shaders: &["gram"], run: cases::gram },
    Check { shaders: &["select_smallest", "select_blocks"], run: cases::select },
    Check { shaders: &["key_histogram", "keep_largest"], run: cases::keep_largest },
    Check { shaders: &["group_grids", "round_codes"], run: cases::quantize },
    Check { shaders: &["sign_descent"], run: cases::sign_descent },
    Check { shaders: &["channel_statistics"], run: cases::channels },
    Check { shaders: &["product", "product_ints", "product_trits"], run: cases::products },
    Check { shaders: &["largest_magnitude", "halve", "product_units", "add_scaled"], run: cases::units },
    Check { shaders: &["admm_split", "admm_combine"], run: cases::admm },
    Check { shaders: &["clip_ratios", "rounded_histogram"], run: cases::precalibrate },
    Check { shaders: &["trit_scales", "trit_codes"], run: cases::trits },
];
