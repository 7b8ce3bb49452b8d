//! Calibration and evaluation text to windows of token numbers.

pub mod builtin;
pub mod chat;
pub mod corpus;
pub mod starts;
pub mod tokens;
