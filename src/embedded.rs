//! The small model that the program carries, so that a first run needs nothing else: really trained, on the built-in
//! calibration text, with the project's own forward (calibration/model/README.md).

use std::path::Path;

use crate::error::{Error, Result};

const FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../calibration/model/config.json")),
    ("tokenizer.json", include_bytes!("../calibration/model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../calibration/model/tokenizer_config.json")),
    ("model.safetensors", include_bytes!("../calibration/model/model.safetensors")),
];

/// What the model is called where a path is expected.
pub const NAME: &str = "builtin:model";

/// Whether a path is the name of the model that the program carries.
pub fn is_named(path: &Path) -> bool {
    path.as_os_str() == NAME
}

/// Writes the embedded model as a checkpoint into a folder.
///
/// # Errors
/// When a file cannot be written.
pub fn write(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, &error))?;
    for (name, bytes) in FILES {
        let path = folder.join(name);
        // Always of one time, so that a run that was cut off knows it again.
        let written = std::fs::write(&path, bytes)
            .and_then(|()| std::fs::File::options().write(true).open(&path)?.set_modified(std::time::UNIX_EPOCH));
        written.map_err(|error| Error::io(&path, &error))?;
    }
    Ok(())
}
