//! drawknife
pub mod calibrate;
pub mod checkpoint;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod kernels;
pub mod matrix;
pub mod model;
pub mod run;
pub mod weight;
