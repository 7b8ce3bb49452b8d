//! See Cargo.toml.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drawknife::untrusted::reader("config")(bytes);
});
