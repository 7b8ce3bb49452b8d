//! What is large in a weight: its lists of numbers, taken out to lie elsewhere and put back in.

use bytemuck::Pod;

use crate::weight::{Sparse, Weight};

/// A list of numbers in a weight, seen as its bytes.
pub trait Bulk {
    /// Its bytes.
    fn bytes(&self) -> &[u8];
    /// Takes all numbers out and frees their memory; gives how many there were.
    fn empty(&mut self) -> usize;
    /// Makes room for so many numbers and gives their bytes to be written.
    fn room(&mut self, count: usize) -> &mut [u8];
}

impl<T: Pod> Bulk for Vec<T> {
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(self)
    }
    fn empty(&mut self) -> usize {
        std::mem::take(self).len()
    }
    fn room(&mut self, count: usize) -> &mut [u8] {
        *self = vec![T::zeroed(); count];
        bytemuck::cast_slice_mut(self)
    }
}

impl Weight {
    /// All lists of numbers of a weight, in an order that hangs on its representation alone. Floats as a checkpoint stores them are
    /// none: nobody owns them.
    pub fn bulks(&mut self) -> Vec<&mut dyn Bulk> {
        match self {
            Self::Stored(_) => Vec::new(),
            Self::Dense(matrix) | Self::Sparse(Sparse { matrix, .. }) => vec![&mut matrix.data],
            Self::Ints(ints) => {
                let mut bulks: Vec<&mut dyn Bulk> = vec![&mut ints.codes, &mut ints.scales];
                bulks.extend(ints.zeros.as_mut().map(|zeros| zeros as &mut dyn Bulk));
                bulks
            }
            Self::Trits(trits) => vec![&mut trits.codes, &mut trits.scales],
            Self::Split(split) => vec![&mut split.codes, &mut split.scales, &mut split.mask],
            Self::Super(blocks) => vec![&mut blocks.codes, &mut blocks.floats, &mut blocks.wholes],
        }
    }
}
