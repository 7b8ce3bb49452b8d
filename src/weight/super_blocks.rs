//! Two-level grids of 256 weights: whole-numbered scales, and minima, of small blocks times one float each (llama.cpp's K
//! types; ggml-quants.c).

use rayon::prelude::*;

use crate::matrix::Matrix;

/// Weights of a super-block.
pub const SIZE: usize = 256;

/// Which two-level grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SuperKind {
    /// Two bits with minima, blocks of 16.
    Q2K,
    /// Three bits around zero, blocks of 16.
    Q3K,
    /// Four bits with minima, blocks of 32.
    Q4K,
    /// Five bits with minima, blocks of 32.
    Q5K,
    /// Six bits around zero, blocks of 16.
    Q6K,
}

impl SuperKind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Q2K, Self::Q3K, Self::Q4K, Self::Q5K, Self::Q6K];

    /// As llama.cpp writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q2K => "q2_k",
            Self::Q3K => "q3_k",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
        }
    }

    /// Bits per code.
    pub fn bits(self) -> u8 {
        match self {
            Self::Q2K => 2,
            Self::Q3K => 3,
            Self::Q4K => 4,
            Self::Q5K => 5,
            Self::Q6K => 6,
        }
    }

    /// Weights of a block.
    pub fn block(self) -> usize {
        match self {
            Self::Q4K | Self::Q5K => 32,
            Self::Q2K | Self::Q3K | Self::Q6K => 16,
        }
    }

    /// Bytes of a super-block.
    pub fn bytes(self) -> usize {
        match self {
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Whether blocks have minima; others lie around zero.
    pub fn minima(self) -> bool {
        matches!(self, Self::Q2K | Self::Q4K | Self::Q5K)
    }

    /// The code of zero where blocks lie around it.
    pub fn middle(self) -> u8 {
        if self.minima() { 0 } else { 1 << (self.bits() - 1) }
    }

    /// The least and the largest whole-numbered scale.
    pub fn scales(self) -> [i32; 2] {
        match self {
            Self::Q2K => [0, 15],
            Self::Q3K => [-32, 31],
            Self::Q4K | Self::Q5K => [0, 63],
            Self::Q6K => [-128, 127],
        }
    }
}

/// Weights on a two-level grid: entry = d · s · (code − middle) − m · minimum, with d and m of the super-block, s and the
/// minimum of the block.
#[derive(Debug, Clone, PartialEq)]
pub struct SuperBlocks {
    /// Outputs of the linear layer.
    pub rows: usize,
    /// Inputs of the linear layer, a multiple of 256.
    pub columns: usize,
    /// Which grid.
    pub kind: SuperKind,
    /// `rows * columns` codes, row-major.
    pub codes: Vec<u8>,
    /// Per super-block d and m, already rounded to f16; m is 0 where there are no minima.
    pub floats: Vec<[f32; 2]>,
    /// Per block its scale and its minimum.
    pub wholes: Vec<[i8; 2]>,
}

impl SuperBlocks {
    /// Step and offset of the block of an entry: entry = step · (code − middle) + offset.
    #[inline(always)]
    pub fn line(&self, row: usize, column: usize) -> (f32, f32) {
        let at = row * self.columns + column;
        let ([d, m], [scale, minimum]) = (self.floats[at / SIZE], self.wholes[at / self.kind.block()]);
        (d * f32::from(scale), -m * f32::from(minimum))
    }

    /// The floats that the codes stand for.
    pub fn to_matrix(&self) -> Matrix {
        let middle = f32::from(self.kind.middle());
        let mut data = vec![0.0; self.rows * self.columns];
        let block = self.kind.block();
        data.par_chunks_mut(self.columns.max(1)).enumerate().with_min_len(8).for_each(|(row, out)| {
            for (number, out) in out.chunks_mut(block).enumerate() {
                let (step, offset) = self.line(row, number * block);
                let codes = &self.codes[row * self.columns + number * block..];
                out.iter_mut().zip(codes).for_each(|(value, &code)| *value = step * (f32::from(code) - middle) + offset);
            }
        });
        Matrix::new(self.rows, self.columns, data)
    }
}
