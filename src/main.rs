//! The program `drawknife`: see `drawknife --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    drawknife::cli::main(std::env::args_os())
}
