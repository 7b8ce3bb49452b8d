//! Typed access to the keys of a configuration.

use serde_json::{Map, Value};

use crate::error::{Error, Result, shown};

/// Token numbers as a configuration gives them: one, a list or none.
pub fn tokens(value: Option<&Value>) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// Typed access to the keys of a JSON object, with errors that name key and value.
#[derive(Debug, Clone, Copy)]
pub struct Keys<'a>(pub &'a Map<String, Value>);

impl Keys<'_> {
    /// A count in 1..=limit; `None` when absent or null.
    ///
    /// # Errors
    /// When it is anything else.
    pub fn count(&self, key: &str, limit: u64) -> Result<Option<usize>> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64() {
                Some(number) if (1..=limit).contains(&number) => Ok(Some(number as usize)),
                // A window of all layers may be given as 0 layers.
                Some(0) if key == "max_window_layers" => Ok(None),
                _ => Err(Error::input(format!(
                    "config.json: {key} is {}, it must be a whole number from 1 to {limit}",
                    shown(&value.to_string())
                ))),
            },
        }
    }

    /// As [`Self::count`], where it may be 0.
    ///
    /// # Errors
    /// When it is anything else.
    pub fn whole(&self, key: &str, limit: u64) -> Result<Option<usize>> {
        if self.0.get(key).is_some_and(|value| *value == 0) { Ok(Some(0)) } else { self.count(key, limit) }
    }

    /// A count that must be there.
    ///
    /// # Errors
    /// When it is absent or not a count.
    pub fn required(&self, key: &str, limit: u64) -> Result<usize> {
        self.count(key, limit)?.ok_or_else(|| Error::input(format!("config.json: {key} is missing")))
    }

    /// A finite number above zero; `None` when absent or null.
    ///
    /// # Errors
    /// When it is anything else.
    pub fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number > 0.0 && number < 1e30 => Ok(Some(number)),
                _ => Err(Error::input(format!("config.json: {key} is {}, it must be a number above 0", shown(&value.to_string())))),
            },
        }
    }

    /// Token numbers below `vocabulary`: one, a list or none; −1 means none.
    ///
    /// # Errors
    /// When they are anything else.
    pub fn tokens(&self, key: &str, vocabulary: usize) -> Result<Vec<u32>> {
        let number = |value: &Value| value.as_i64().is_some_and(|number| number >= -1);
        match self.0.get(key) {
            Some(Value::Array(list)) if list.iter().all(number) => {}
            None | Some(Value::Null) => {}
            Some(value) if number(value) => {}
            Some(value) => {
                return Err(Error::input(format!(
                    "config.json: {key} is {}, it must be a token number or a list",
                    shown(&value.to_string())
                )));
            }
        }
        let value = self.0.get(key);
        let highest = value.into_iter().flat_map(|value| value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice));
        match highest.filter_map(Value::as_u64).max() {
            Some(highest) if highest >= vocabulary as u64 => {
                Err(Error::input(format!("config.json: {key} is {highest}, vocab_size is {vocabulary}")))
            }
            _ => Ok(tokens(value)),
        }
    }

    /// A flag; `None` when absent, null or not a flag.
    pub fn flag(&self, key: &str) -> Option<bool> {
        self.0.get(key).and_then(Value::as_bool)
    }

    /// A string; `None` when absent, null or not a string.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(Value::as_str)
    }
}
