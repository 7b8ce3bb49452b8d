//! A workplace with a sound model, and the ways to break it.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// Where the weights of a model in one file are.
pub const WEIGHTS: &str = "model.safetensors";
/// The index of a model in several files.
pub const INDEX: &str = "model.safetensors.index.json";
/// The two files of a model in several.
pub const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// A temporary folder that holds the folder of a model.
pub struct Place {
    _held: tempfile::TempDir,
    /// The folder around it.
    pub folder: PathBuf,
    /// The folder of the model.
    pub model: PathBuf,
}

/// A tensor with everything that a header says of it.
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its number format.
    pub dtype: String,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// Gives it another number format and shape, and as many bytes as these need.
    pub fn turn(&mut self, dtype: &str, shape: &[usize]) {
        let width = match dtype {
            "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 1,
            "I16" | "BF16" | "F16" => 2,
            "I32" | "U32" | "F32" => 4,
            _ => 8,
        };
        (self.dtype, self.shape) = (dtype.into(), shape.to_vec());
        self.bytes.resize(width * shape.iter().product::<usize>(), 0);
    }

    /// Overwrites a value of 16 bits.
    pub fn value(&mut self, index: usize, bits: u16) {
        self.bytes[2 * index..2 * index + 2].copy_from_slice(&bits.to_le_bytes());
    }

    /// Overwrites all values of 16 bits.
    pub fn fill(&mut self, bits: u16) {
        self.bytes.as_chunks_mut::<2>().0.fill(bits.to_le_bytes());
    }
}

/// A safetensors file of tensors one behind the other.
pub fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for tensor in tensors {
        let begin = data.len();
        data.extend(&tensor.bytes);
        header.insert(tensor.name.clone(), json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, data.len()]}));
    }
    with_header(&Value::Object(header).to_string(), &data)
}

/// A safetensors file from its two parts.
pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// The tensors of a file.
fn tensors(path: &Path) -> Vec<Tensor> {
    let bytes = std::fs::read(path).unwrap();
    let (header, data) = parts(&bytes);
    let header: Map<String, Value> = serde_json::from_str(header).unwrap();
    let number = |value: &Value| value.as_u64().unwrap() as usize;
    let tensor = |(name, info): (String, Value)| Tensor {
        name,
        dtype: info["dtype"].as_str().unwrap().into(),
        shape: info["shape"].as_array().unwrap().iter().map(number).collect(),
        bytes: data[number(&info["data_offsets"][0])..number(&info["data_offsets"][1])].to_vec(),
    };
    header.into_iter().filter(|(name, _)| name != "__metadata__").map(tensor).collect()
}

fn parts(bytes: &[u8]) -> (&str, &[u8]) {
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    (std::str::from_utf8(&bytes[8..8 + length]).unwrap(), &bytes[8 + length..])
}

impl Place {
    /// A workplace with the embedded model.
    pub fn new() -> Self {
        let held = tempfile::tempdir().unwrap();
        let folder = held.path().to_path_buf();
        let model = folder.join("model");
        drawknife::embedded::write(&model).unwrap();
        Self { _held: held, folder, model }
    }

    /// A file of the model.
    pub fn file(&self, name: &str) -> PathBuf {
        self.model.join(name)
    }

    /// Writes a file of the model.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.file(name), bytes).unwrap();
    }

    /// Removes a file of the model.
    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.file(name)).unwrap();
    }

    /// Replaces the first such text in a file of the model.
    pub fn edit(&self, name: &str, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.file(name)).unwrap();
        assert!(text.contains(from), "{from} is not in {name}");
        self.write(name, text.replacen(from, to, 1));
    }

    /// Sets a key of config.json to text that need not be JSON.
    pub fn config(&self, key: &str, raw: &str) {
        let mut config: Map<String, Value> = serde_json::from_slice(&std::fs::read(self.file("config.json")).unwrap()).unwrap();
        config.insert(key.into(), "@@".into());
        self.write("config.json", Value::Object(config).to_string().replace("\"@@\"", raw));
    }

    /// Removes a key of config.json.
    pub fn without(&self, key: &str) {
        let mut config: Map<String, Value> = serde_json::from_slice(&std::fs::read(self.file("config.json")).unwrap()).unwrap();
        config.remove(key).unwrap();
        self.write("config.json", Value::Object(config).to_string());
    }

    /// Changes the header of the weights, and its length with it.
    pub fn header(&self, change: impl FnOnce(&str) -> String) {
        let bytes = std::fs::read(self.file(WEIGHTS)).unwrap();
        let (header, data) = parts(&bytes);
        self.write(WEIGHTS, with_header(&change(header), data));
    }

    /// Replaces the first such text in the header of the weights.
    pub fn in_header(&self, from: &str, to: &str) {
        self.header(|header| {
            assert!(header.contains(from), "{from} is not in the header");
            header.replacen(from, to, 1)
        });
    }

    /// Puts one more tensor without bytes into the header, whose name is given as JSON.
    pub fn name(&self, name: &str) {
        self.header(|header| {
            format!(
                "{},{name}:{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[1312512,1312512]}}}}",
                header.trim_end().strip_suffix('}').unwrap()
            )
        });
    }

    /// Changes the length word of the weights alone.
    pub fn length(&self, change: impl FnOnce(u64) -> u64) {
        let mut bytes = std::fs::read(self.file(WEIGHTS)).unwrap();
        let length = u64::from_le_bytes(*bytes.first_chunk().unwrap());
        bytes[..8].copy_from_slice(&change(length).to_le_bytes());
        self.write(WEIGHTS, bytes);
    }

    /// Makes the weights so many bytes long; what is new is zero.
    pub fn resize(&self, change: impl FnOnce(u64) -> u64) {
        let file = File::options().write(true).open(self.file(WEIGHTS)).unwrap();
        file.set_len(change(file.metadata().unwrap().len())).unwrap();
    }

    /// Changes the tensors and writes them anew.
    pub fn tensors(&self, change: impl FnOnce(&mut Vec<Tensor>)) {
        let mut all = tensors(&self.file(WEIGHTS));
        change(&mut all);
        self.write(WEIGHTS, safetensors(&all));
    }

    /// Changes one tensor.
    pub fn tensor(&self, name: &str, change: impl FnOnce(&mut Tensor)) {
        self.tensors(|all| change(all.iter_mut().find(|tensor| tensor.name == name).unwrap()));
    }

    /// Leaves a tensor out.
    pub fn lose(&self, name: &str) {
        self.tensors(|all| {
            let before = all.len();
            all.retain(|tensor| tensor.name != name);
            assert_eq!(all.len() + 1, before, "{name}");
        });
    }

    /// Adds a tensor.
    pub fn add(&self, name: &str, dtype: &str, shape: &[usize], bits: u16) {
        self.tensors(|all| {
            let mut tensor = Tensor { name: name.into(), dtype: String::new(), shape: Vec::new(), bytes: Vec::new() };
            tensor.turn(dtype, shape);
            if bits != 0 {
                tensor.fill(bits);
            }
            all.push(tensor);
        });
    }

    /// Splits the weights into two files with an index.
    pub fn shards(&self) {
        let mut first = tensors(&self.file(WEIGHTS));
        let second = first.split_off(12);
        let mut map = Map::new();
        for (name, tensors) in SHARDS.iter().zip([&first, &second]) {
            self.write(name, safetensors(tensors));
            map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), (*name).into())));
        }
        self.write(INDEX, json!({"metadata": {"total_size": 1_312_512}, "weight_map": map}).to_string());
        self.remove(WEIGHTS);
    }

    /// Splits the weights and replaces the first such text in the index.
    pub fn in_index(&self, from: &str, to: &str) {
        self.shards();
        self.edit(INDEX, from, to);
    }

    /// Puts a symbolic link in the place of a file of the model.
    pub fn link(&self, name: &str, target: impl AsRef<Path>) {
        let _ = std::fs::remove_file(self.file(name));
        std::os::unix::fs::symlink(target, self.file(name)).unwrap();
    }

    /// Moves a file of the model beside it and links to it.
    pub fn link_away(&self, name: &str) {
        let blobs = self.folder.join("blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::rename(self.file(name), blobs.join(name)).unwrap();
        self.link(name, Path::new("../blobs").join(name));
    }

    /// Puts a pipe with nobody at its other end in the place of a file of the model.
    pub fn pipe(&self, name: &str) {
        let _ = std::fs::remove_file(self.file(name));
        pipe(&self.file(name));
    }

    /// Puts a folder in the place of a file of the model.
    pub fn make_folder(&self, name: &str) {
        let _ = std::fs::remove_file(self.file(name));
        std::fs::create_dir(self.file(name)).unwrap();
    }
}

/// Makes a named pipe.
pub fn pipe(path: &Path) {
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR, 0).unwrap();
}
