//! Files that are written in an unusual way and are sound: they are read like any other.

use std::path::Path;

use crate::command::workplace;

#[test]
fn blanks_before_the_header_and_unaligned_data_are_read_alike() {
    let (folder, model) = workplace();
    let path = Path::new(&model).join("model.safetensors");
    let nll = || crate::command::json(&["eval", &model, "--max-tokens", "512"])["nll"].clone();
    let expected = nll();
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let mut shifted = (length + 3).to_le_bytes().to_vec();
    shifted.extend(b"   ");
    shifted.extend(&bytes[8..]);
    std::fs::write(&path, shifted).unwrap();
    assert_eq!(nll(), expected);
    drop(folder);
}
