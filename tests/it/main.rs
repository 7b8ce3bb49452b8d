//! The one integration test binary.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and a skipped one says so")]

mod backward;
mod broken;
mod command;
mod corpus;
mod crash;
mod formats;
mod fuzz;
mod generate;
mod golden;
mod gpu;
mod hostile;
#[cfg(feature = "hub")]
mod hub;
mod kernels;
mod layering;
mod methods;
mod mixtures;
mod shared;
mod tidy;
mod truth;
