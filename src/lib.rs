//! drawknife
pub mod calibrate;
pub mod checkpoint;
pub mod cli;
pub mod compress;
pub mod device;
pub mod embedded;
pub mod error;
pub mod evaluate;
pub mod formats;
pub mod kernels;
pub mod matrix;
pub mod methods;
pub mod model;
pub mod plan;
pub mod report;
pub mod run;
pub mod weight;
