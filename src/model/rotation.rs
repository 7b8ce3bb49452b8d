//! Rotary frequencies from config.json: the kinds default, linear, dynamic, llama3, yarn and longrope.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::error::{Error, Result, shown};
use crate::kernels::rope::Table;
use crate::model::architecture::{Family, Mixing, Pairing};
use crate::model::config::Keys;

/// How the angles of a layer grow.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotation {
    /// Columns of a head that rotate.
    width: usize,
    /// Base of the frequencies.
    theta: f64,
    kind: Kind,
    /// Whether neighbouring columns turn together, rather than those of two halves.
    interleaved: bool,
    /// What scores are multiplied by beside, in latent attention.
    sharper: f64,
    /// How queries grow with the position p, by 1 + β ln(1 + ⌊p / original⌋): β and the original context length.
    growth: Option<[f64; 2]>,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Default,
    Linear {
        factor: f64,
    },
    Dynamic {
        factor: f64,
        max_positions: f64,
    },
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
    Yarn {
        factor: f64,
        original: f64,
        fast: f64,
        slow: f64,
        truncate: bool,
        attention: f64,
    },
    /// Divisors of the frequencies for windows up to the original context length, and for longer ones.
    Long {
        original: f64,
        short: Vec<f64>,
        long: Vec<f64>,
        attention: f64,
    },
}

/// The tables of the two kinds of layers; `None` where a kind of layer does not rotate.
#[derive(Debug)]
pub struct Tables {
    /// Layers that see everything.
    pub full: Option<Rotation>,
    /// Layers under a sliding window.
    pub sliding: Option<Rotation>,
}

/// Reads the rotation of both kinds of layers.
///
/// # Errors
/// One line naming the key.
pub fn tables(keys: &Keys<'_>, family: &Family, head_dim: usize, max_positions: usize) -> Result<Tables> {
    let empty = Map::new();
    for key in ["rope_scaling", "rope_parameters"] {
        if let Some(value) = keys.0.get(key).filter(|value| !value.is_null() && !value.is_object()) {
            return Err(Error::input(format!("config.json: {key} is {}, it must be an object", shown(&value.to_string()))));
        }
    }
    let object = |key: &str| keys.0.get(key).and_then(Value::as_object).filter(|map| !map.is_empty());
    let silent = family.defaults.rope.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let parameters = object("rope_scaling").or_else(|| object("rope_parameters")).unwrap_or(&silent);
    let one = |parameters: &Map<String, Value>, theta: f64| read(keys, &Keys(parameters), family, theta, [head_dim, max_positions]);
    let theta = keys.positive("rope_theta")?.unwrap_or(family.defaults.theta);
    let local = match family.defaults.local_theta {
        Some(default) => keys.positive("rope_local_base_freq")?.unwrap_or(default),
        None => theta,
    };
    let nested = |key: &str| match parameters.get(key) {
        Some(Value::Object(map)) => Some(Some(map)),
        Some(Value::Null) => Some(None),
        _ => None,
    };
    if nested("full_attention").is_some() || nested("sliding_attention").is_some() {
        let kind = |key: &str, theta: f64| match nested(key) {
            Some(Some(map)) => one(map, theta).map(Some),
            Some(None) => Ok(None),
            None => one(&empty, theta).map(Some),
        };
        return Ok(Tables { full: kind("full_attention", theta)?, sliding: kind("sliding_attention", local)? });
    }
    let full = one(parameters, theta)?;
    let sliding = if family.defaults.local_theta.is_some() { one(&empty, local)? } else { full.clone() };
    Ok(Tables { full: Some(full), sliding: Some(sliding) })
}

fn read(top: &Keys<'_>, keys: &Keys<'_>, family: &Family, theta: f64, [head_dim, max_positions]: [usize; 2]) -> Result<Rotation> {
    let theta = keys.positive("rope_theta")?.unwrap_or(theta);
    let partial = keys.positive("partial_rotary_factor")?.or(top.positive("partial_rotary_factor")?).unwrap_or(family.defaults.partial);
    let width = (head_dim as f64 * partial) as usize;
    if width == 0 || width > head_dim || !width.is_multiple_of(2) {
        return Err(Error::input(format!(
            "config.json: partial_rotary_factor {partial} of head_dim {head_dim} rotates {width} columns; it must be an even number of them"
        )));
    }
    let needed = |key: &str| keys.positive(key)?.ok_or_else(|| Error::input(format!("config.json: rope {key} is missing")));
    let original = || -> Result<f64> {
        let found = top.positive("original_max_position_embeddings")?.or(keys.positive("original_max_position_embeddings")?);
        Ok(found.unwrap_or(max_positions as f64))
    };
    let named = |key: &str| keys.0.get(key).filter(|value| !value.is_null());
    let name = match named("rope_type").or(named("type")) {
        None => "default",
        Some(value) => value
            .as_str()
            .ok_or_else(|| Error::input(format!("config.json: the type of rope is {}, it must be a name", shown(&value.to_string()))))?,
    };
    let name = if family.longrope_too.contains(&name) { "longrope" } else { name };
    let kind = match name {
        "default" => Kind::Default,
        "linear" => Kind::Linear { factor: needed("factor")? },
        "dynamic" => Kind::Dynamic { factor: needed("factor")?, max_positions: max_positions as f64 },
        "llama3" => {
            let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
            if high <= low {
                return Err(Error::input(format!("config.json: high_freq_factor {high} must be above low_freq_factor {low}")));
            }
            Kind::Llama3 { factor: needed("factor")?, low, high, original: original()? }
        }
        "yarn" => {
            let original = original()?;
            let factor = keys.positive("factor")?.unwrap_or(max_positions as f64 / original);
            let gain = |multiplier: f64| if factor <= 1.0 { 1.0 } else { 0.1 * multiplier * factor.ln() + 1.0 };
            let attention = match (
                keys.positive("attention_factor")?,
                keys.positive("mscale").ok().flatten(),
                keys.positive("mscale_all_dim").ok().flatten(),
            ) {
                (Some(given), _, _) => given,
                (None, Some(one), Some(all)) => gain(one) / gain(all),
                _ => gain(1.0),
            };
            let (fast, slow) = (keys.positive("beta_fast")?.unwrap_or(32.0), keys.positive("beta_slow")?.unwrap_or(1.0));
            Kind::Yarn { factor, original, fast, slow, truncate: keys.flag("truncate").unwrap_or(true), attention }
        }
        "longrope" => long(keys, width / 2, max_positions as f64, original()?)?,
        other => {
            return Err(Error::input(format!(
                "config.json: rope type `{}` is not supported; known are default, linear, dynamic, llama3, yarn and longrope",
                shown(other)
            )));
        }
    };
    let growth = match keys.positive("llama_4_scaling_beta")? {
        Some(_) if family.position_scale && width != head_dim => {
            return Err(Error::input("config.json: llama_4_scaling_beta with partial_rotary_factor is not supported"));
        }
        Some(beta) if family.position_scale => Some([beta, original()?]),
        _ => None,
    };
    let interleaved = family.pairing == Pairing::Interleaved && top.flag("rope_interleave") != Some(false);
    Ok(Rotation { width, theta, kind, interleaved, sharper: sharper(keys, family, name)?, growth })
}

/// What config.json calls mscale_all_dim makes scores of stretched latent attention larger, rather than queries and keys.
fn sharper(keys: &Keys<'_>, family: &Family, name: &str) -> Result<f64> {
    Ok(match (keys.positive("mscale_all_dim").ok().flatten(), keys.positive("factor")?) {
        (Some(all), Some(factor)) if family.mixing == Mixing::Latent && name != "default" && factor > 1.0 => {
            (0.1 * all * factor.ln() + 1.0).powi(2)
        }
        _ => 1.0,
    })
}

/// Long-context rotation of so many pairs.
fn long(keys: &Keys<'_>, pairs: usize, max_positions: f64, original: f64) -> Result<Kind> {
    let stretch = keys.positive("factor")?.unwrap_or(max_positions / original);
    let own = if stretch <= 1.0 { 1.0 } else { (1.0 + stretch.ln() / original.ln()).sqrt() };
    let attention = keys.positive("attention_factor")?.unwrap_or(own);
    let [short, long] = ["short_factor", "long_factor"].map(|key| divisors(keys, key, pairs));
    Ok(Kind::Long { original, short: short?, long: long?, attention })
}

/// A list of so many numbers above zero.
fn divisors(keys: &Keys<'_>, key: &str, count: usize) -> Result<Vec<f64>> {
    let wrong = |found: String| Error::input(format!("config.json: rope {key} is {found}, it must be a list of {count} numbers above 0"));
    let list = keys.0.get(key).ok_or_else(|| wrong("missing".into()))?;
    let entries = list.as_array().ok_or_else(|| wrong(shown(&list.to_string())))?;
    let one = |value: &Value| value.as_f64().filter(|number| *number > 0.0 && *number < 1e30);
    let numbers: Vec<f64> = entries.iter().filter_map(one).collect();
    if numbers.len() != count || entries.len() != count {
        return Err(wrong(format!("a list of {}", entries.len())));
    }
    Ok(numbers)
}

impl Rotation {
    /// Cosines and sines for windows of `seq` tokens.
    pub fn table(&self, seq: usize) -> Table {
        self.table_at(0..seq, seq)
    }

    /// The rows of some positions of the table for windows of `seq` tokens.
    pub fn table_at(&self, positions: Range<usize>, seq: usize) -> Table {
        let (frequencies, factor) = self.frequencies(seq);
        Table { interleaved: self.interleaved, ..Table::range(&frequencies, factor, positions) }
    }

    /// The table of queries at some positions, where it is another than that of keys.
    pub fn query_table_at(&self, positions: Range<usize>, seq: usize) -> Option<Table> {
        let [beta, original] = self.growth?;
        let first = positions.start;
        let growth = |row: usize| (1.0 + beta * (1.0 + ((first + row) as f64 / original).floor()).ln()) as f32;
        Some(self.table_at(positions, seq).scaled(growth))
    }

    /// What scores are multiplied by beside.
    pub fn sharper(&self) -> f64 {
        self.sharper
    }

    /// Columns of a head that rotate.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Base of the frequencies.
    pub fn theta(&self) -> f64 {
        self.theta
    }

    /// Name, factor and, where there is one, original context length of a rotation that is stretched by a rule.
    pub fn scaling(&self) -> Option<(&'static str, f64, Option<f64>)> {
        match self.kind {
            Kind::Linear { factor } => Some(("linear", factor, None)),
            Kind::Yarn { factor, original, .. } => Some(("yarn", factor, Some(original))),
            Kind::Long { original, .. } => Some(("longrope", 1.0, Some(original))),
            Kind::Default | Kind::Dynamic { .. } | Kind::Llama3 { .. } => None,
        }
    }

    /// What plain frequencies are divided by, where each has a divisor of its own.
    pub fn divisors(&self) -> Option<Vec<f32>> {
        let Kind::Llama3 { .. } = self.kind else { return None };
        let plain = Self { kind: Kind::Default, ..self.clone() };
        let (bent, plain) = (self.frequencies(1).0, plain.frequencies(1).0);
        Some(plain.iter().zip(&bent).map(|(plain, bent)| plain / bent).collect())
    }

    /// Divisors of the frequencies for windows up to the original context length, and for longer ones, where both are listed.
    pub fn long(&self) -> Option<[Vec<f32>; 2]> {
        let Kind::Long { short, long, .. } = &self.kind else { return None };
        Some([short, long].map(|list| list.iter().map(|&divisor| divisor as f32).collect()))
    }

    /// Whether neighbouring columns turn together, rather than those of two halves.
    pub fn interleaved(&self) -> bool {
        self.interleaved
    }

    /// The factor of sines and cosines.
    pub fn attention(&self) -> f64 {
        match self.kind {
            Kind::Yarn { attention, .. } | Kind::Long { attention, .. } => attention,
            _ => 1.0,
        }
    }

    /// What of a stretched rotation few programs know, in words.
    pub fn unusual(&self) -> Option<&'static str> {
        match self.kind {
            Kind::Yarn { fast, slow, .. } if (fast, slow) != (32.0, 1.0) => Some("knows yarn with 32 and 1 turns alone"),
            Kind::Yarn { truncate: false, .. } => Some("rounds the ends of yarn's ramp, and the model does not"),
            _ => None,
        }
    }

    /// Inverse frequencies and the attention factor.
    fn frequencies(&self, seq: usize) -> (Vec<f32>, f32) {
        let width = self.width as f64;
        let theta = match self.kind {
            Kind::Dynamic { factor, max_positions } if width > 2.0 => {
                let longest = max_positions.max(seq as f64);
                self.theta * (factor * longest / max_positions - (factor - 1.0)).powf(width / (width - 2.0))
            }
            _ => self.theta,
        };
        let plain = (0..self.width / 2).map(|t| theta.powf(-(2.0 * t as f64) / width));
        let bend = |(t, f): (usize, f64)| match self.kind {
            Kind::Default | Kind::Dynamic { .. } => f,
            Kind::Long { original, ref short, ref long, .. } => f / if seq as f64 > original { long[t] } else { short[t] },
            Kind::Linear { factor } => f / factor,
            Kind::Llama3 { factor, low, high, original } => {
                let wavelength = 2.0 * std::f64::consts::PI / f;
                if wavelength < original / high {
                    f
                } else if wavelength > original / low {
                    f / factor
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            }
            Kind::Yarn { factor, .. } => {
                let ramp = self.yarn_ramp(t);
                f / factor * ramp + f * (1.0 - ramp)
            }
        };
        (plain.enumerate().map(bend).map(|f| f as f32).collect(), self.attention() as f32)
    }

    /// How far pair `t` is interpolated under yarn, 0 (not) to 1.
    fn yarn_ramp(&self, t: usize) -> f64 {
        let Kind::Yarn { original, fast, slow, truncate, .. } = self.kind else { return 0.0 };
        let width = self.width as f64;
        let dimension = |turns: f64| width * (original / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * self.theta.ln());
        let (mut low, mut high) = (dimension(fast), dimension(slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(width - 1.0));
        if low == high {
            high += 0.001;
        }
        ((t as f64 - low) / (high - low)).clamp(0.0, 1.0)
    }
}
