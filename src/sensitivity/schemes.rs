//! Ways to store a layer that a sensitivity measurement tries, by short names: `w4`, `w3g64`, `s50`, `2:4`, `trit`.

use crate::device::Gpu;
use crate::error::{Error, Result, shown};
use crate::matrix::Matrix;
use crate::methods::{self, Layer, Method};
use crate::model::seen::{Needs, Statistics};
use crate::weight::{Float, Storage, Weight};

/// The schemes that are tried where none are named.
pub const DEFAULT: &str = "w2,w3,w4,w8,s30,s40,s50,s60,s70,trit";

/// A way to store a layer.
#[derive(Debug)]
pub struct Scheme {
    /// Its short name.
    pub name: String,
    /// What it does.
    pub kind: Kind,
    method: Box<dyn Method>,
}

/// What a scheme changes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Integers of so many bits.
    Bits(u8),
    /// So large a share of zeros, unstructured.
    Sparsity(f64),
    /// Anything else.
    Other,
}

impl Kind {
    /// What a name stands for, as far as it says: whether it is one is for [`Scheme::parse`] to tell.
    pub fn of(name: &str) -> Self {
        let number = |text: &str| text.parse::<u8>().ok();
        if let Some(bits) = name.strip_prefix('w').and_then(|rest| number(rest.split('g').next()?)).filter(|bits| (2..=8).contains(bits)) {
            return Self::Bits(bits);
        }
        let percent = name.strip_prefix('s').and_then(number).filter(|percent| (1..=95).contains(percent));
        percent.map_or(Self::Other, |percent| Self::Sparsity(f64::from(percent) / 100.0))
    }
}

impl Scheme {
    /// Reads a name; integers are made by `method`, round-to-nearest or gptq.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(name: &str, method: &str) -> Result<Self> {
        let wrong = || {
            Error::input(format!(
                "scheme `{}`: use w2 to w8 like w4 or w3g64, s10 to s90 like s50, a pattern like 2:4, or trit",
                shown(name)
            ))
        };
        let table = |text: String| text.parse::<toml::Table>().map_err(|_| wrong());
        let read = |method: &str, options: String, kind| {
            Ok(Self { name: name.into(), kind, method: methods::read(method, table(options)?).map_err(|_| wrong())? })
        };
        let kind = Kind::of(name);
        match kind {
            Kind::Bits(bits) => {
                let group = name.split_once('g').map_or("128", |(_, group)| group);
                let group: usize = group.parse().map_err(|_| wrong())?;
                return read(method, format!("bits = {bits}\ngroup = {group}\nsymmetric = true"), kind);
            }
            Kind::Sparsity(share) => return read("wanda", format!("sparsity = {share}\npattern = \"unstructured\""), kind),
            Kind::Other => {}
        }
        if let Some(group) = name.strip_prefix("trit") {
            let group: usize =
                if group.is_empty() { 128 } else { group.strip_prefix('g').and_then(|group| group.parse().ok()).ok_or_else(wrong)? };
            return read("ptqtp", format!("group = {group}"), kind);
        }
        match name.split_once(':') {
            Some(_) => read("wanda", format!("pattern = {name:?}"), kind),
            None => Err(wrong()),
        }
    }

    /// Reads names, comma-separated.
    ///
    /// # Errors
    /// When one is none, or stands twice.
    pub fn parse_all(names: &str, method: &str) -> Result<Vec<Self>> {
        if !["round-to-nearest", "gptq"].contains(&method) {
            return Err(Error::input(format!("--method {}: use round-to-nearest or gptq", shown(method))));
        }
        let schemes = names.split(',').map(|name| Self::parse(name.trim(), method)).collect::<Result<Vec<_>>>()?;
        match schemes.iter().enumerate().find(|(at, scheme)| schemes[..*at].iter().any(|other| other.name == scheme.name)) {
            Some((_, twice)) => Err(Error::input(format!("scheme {} stands twice", twice.name))),
            None => Ok(schemes),
        }
    }

    /// What must have been seen.
    pub fn needs(&self) -> Needs {
        self.method.needs()
    }

    /// What it leaves of a layer of shape `[outputs, inputs]`; `None` where it cannot take it.
    pub fn leaves(&self, shape: [usize; 2]) -> Option<Storage> {
        self.method.leaves(Storage::Dense, shape, None).ok()
    }

    /// Stored bits of a layer; zeros are counted as not stored, because that is what pruning is compared by.
    pub fn bits(&self, shape: [usize; 2], float: Float) -> Option<u64> {
        let storage = self.leaves(shape)?;
        let entries = (shape[0] * shape[1]) as f64;
        Some(match (self.kind, storage) {
            (Kind::Sparsity(share), _) => (entries * (1.0 - share) * 8.0 * float.bytes() as f64) as u64,
            (_, storage) => storage.bits(shape, float),
        })
    }

    /// The layer as the scheme stores it.
    ///
    /// # Errors
    /// When the weight or the statistics do not permit it.
    pub fn compress(
        &self,
        name: &str,
        weight: &Matrix,
        statistics: Option<&Statistics>,
        float: Float,
        gpu: Option<&Gpu>,
    ) -> Result<Weight> {
        let layer = Layer { name, statistics, float, bits: None, sparsity: None, bounds: None, goal: None, gpu };
        Ok(self.method.apply(Weight::Dense(weight.clone()), &layer).map_err(|error| error.tensor(name))?.weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_schemes_and_other_names_are_not() {
        let schemes = Scheme::parse_all(&format!("{DEFAULT},w3g64,2:4,tritg64"), "round-to-nearest").unwrap();
        assert_eq!((schemes[0].kind, schemes[4].kind), (Kind::Bits(2), Kind::Sparsity(0.3)));
        assert_eq!(schemes[2].leaves([64, 256]), Some(Storage::Ints { bits: 4, group: 128, symmetric: true }));
        assert_eq!(schemes[6].bits([64, 256], Float::BF16), Some(64 * 256 * 8));
        for wrong in ["", "w", "w1", "w9", "w4g", "s0", "s99", "x", "trit7", "2:x", "w4,w4"] {
            assert!(Scheme::parse_all(wrong, "round-to-nearest").is_err(), "{wrong}");
        }
        assert!(Scheme::parse_all("w4", "magic").is_err());
    }
}
