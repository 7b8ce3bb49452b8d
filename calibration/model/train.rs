//! Trains the embedded model on the built-in calibration text, with the project's own forward under burn autodiff.
//! Run by hand: `cargo run --release --example train_embedded -- FOLDER [steps]`; it writes a complete checkpoint.

#![allow(clippy::print_stdout, reason = "it is run by hand and tells what it does")]

use std::collections::HashMap;
use std::path::Path;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use drawknife::calibrate::corpus::{Options, Source, pack};
use drawknife::calibrate::{builtin, tokens::Tokenizer};
use drawknife::checkpoint::decode::encode;
use drawknife::kernels::values;
use drawknife::model::block::{Parameters, Place, Role};
use drawknife::model::config::Config;
use drawknife::model::forward::{self, Spec};
use drawknife::weight::Float;
use serde_json::json;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, TokenizerBuilder};

const VOCABULARY: usize = 512;
const HIDDEN: usize = 128;
const MIDDLE: usize = 256;
const LAYERS: usize = 3;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const SEQ: usize = 128;
const BATCH: usize = 16;
const RATE: f64 = 3e-3;
const DECAY: f64 = 0.1;
const TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}";

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("give the folder to write")?;
    let folder = Path::new(&folder);
    let steps: usize = arguments.next().map_or(Ok(600), |steps| steps.parse())?;
    std::fs::create_dir_all(folder)?;
    write_tokenizer(folder)?;
    let config = config();
    std::fs::write(folder.join("config.json"), format!("{}\n", serde_json::to_string_pretty(&config)?))?;
    let config = Config::read(&config)?;
    let options = Options { sources: vec![Source::Builtin], samples: 1, seq: usize::MAX / 8, seed: 0 };
    let packed = pack(&options, || Tokenizer::open(folder), Some(1), VOCABULARY)?;
    let train = &packed.windows[0];
    let held_out = Tokenizer::open(folder)?.encode(&builtin::evaluation_text(), true, None)?;
    println!("{} training tokens, {} held out", train.len(), held_out.len());
    let device = Device::flex();
    device.seed(1);
    let mut trainer = Trainer::new(config, &device.clone().autodiff());
    let unigram = unigram(train, &held_out);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    for step in 0..steps {
        let starts: Vec<usize> = (0..BATCH).map(|_| next(&mut random) as usize % (train.len() - SEQ - 1)).collect();
        let loss = trainer.step(train, &starts, rate(step, steps), step);
        if step % 50 == 0 || step + 1 == steps {
            let nll = trainer.nll(&held_out);
            println!(
                "step {step:5}  train {loss:.3}  held out {nll:.3} (perplexity {:.2}, unigram {:.2}, ratio {:.2})",
                nll.exp(),
                unigram.exp(),
                (unigram - nll).exp()
            );
        }
    }
    trainer.write(&folder.join("model.safetensors"))
}

fn rate(step: usize, steps: usize) -> f64 {
    let warm = (step as f64 + 1.0) / 60.0;
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos());
    RATE * warm.min(1.0) * (0.05 + 0.95 * cosine)
}

fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 11
}

fn config() -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": MIDDLE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "hidden_act": "silu",
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": false, "mlp_bias": false,
        "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 1
    })
}

fn write_tokenizer(folder: &Path) -> Result<(), Failure> {
    let special = ["<|begin|>", "<|end|>"].map(|text| AddedToken::from(text, true));
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(Some(
            TemplateProcessing::builder().try_single("<|begin|> $A")?.special_tokens(vec![("<|begin|>", 0)]).build()?,
        ))
        .with_decoder(Some(byte_level))
        .build()?;
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(VOCABULARY)
        .show_progress(false)
        .special_tokens(special.to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let texts: Vec<&str> = builtin::CALIBRATION.iter().map(|(_, text)| *text).collect();
    tokenizer.train(&mut trainer, texts.into_iter())?;
    tokenizer.save(folder.join("tokenizer.json"), false)?;
    let config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>",
        "model_max_length": 1024, "clean_up_tokenization_spaces": false, "chat_template": TEMPLATE});
    std::fs::write(folder.join("tokenizer_config.json"), format!("{}\n", serde_json::to_string_pretty(&config)?))?;
    Ok(())
}

/// Mean negative log-likelihood of a text under the token frequencies of another, each count raised by one.
fn unigram(train: &[u32], held_out: &[u32]) -> f64 {
    let mut counts = HashMap::new();
    train.iter().for_each(|token| *counts.entry(token).or_insert(0.0) += 1.0);
    let total = (train.len() + VOCABULARY) as f64;
    -held_out.iter().map(|token| ((counts.get(token).unwrap_or(&0.0) + 1.0) / total).ln()).sum::<f64>() / held_out.len() as f64
}

/// A tensor being trained, with the moments of AdamW.
struct Trained<const D: usize> {
    name: String,
    value: Tensor<D>,
    first: Tensor<D>,
    second: Tensor<D>,
}

impl<const D: usize> Trained<D> {
    fn new(name: String, value: Tensor<D>) -> Self {
        let zeros = value.clone().zeros_like();
        Self { name, value, first: zeros.clone(), second: zeros }
    }

    fn leaf(&self, device: &Device) -> Tensor<D> {
        Tensor::from_data(self.value.clone().into_data(), device).require_grad()
    }

    fn update(&mut self, gradient: Tensor<D>, rate: f64, step: usize) {
        let (b1, b2, t) = (0.9f64, 0.95f64, step as i32 + 1);
        self.first = self.first.clone() * b1 + gradient.clone() * (1.0 - b1);
        self.second = self.second.clone() * b2 + gradient.powi_scalar(2) * (1.0 - b2);
        let direction = (self.first.clone() / (1.0 - b1.powi(t))) / ((self.second.clone() / (1.0 - b2.powi(t))).sqrt() + 1e-8);
        let decay = if D == 2 { DECAY } else { 0.0 };
        self.value = self.value.clone() * (1.0 - rate * decay) - direction * rate;
    }
}

struct Trainer {
    config: Config,
    device: Device,
    matrices: Vec<Trained<2>>,
    norms: Vec<Trained<1>>,
}

impl Trainer {
    fn new(config: Config, device: &Device) -> Self {
        let plain = Device::flex();
        let normal = |shape: [usize; 2], std: f64| Tensor::<2>::random(shape, Distribution::Normal(0.0, std), &plain);
        let mut matrices = vec![Trained::new("model.embed_tokens.weight".into(), normal([VOCABULARY, HIDDEN], 0.04))];
        let mut norms = Vec::new();
        for layer in 0..LAYERS {
            for role in Role::PLAIN {
                let shape = match role {
                    Role::Query => [HEADS * HEAD_DIM, HIDDEN],
                    Role::Key | Role::Value => [KV_HEADS * HEAD_DIM, HIDDEN],
                    Role::Output => [HIDDEN, HEADS * HEAD_DIM],
                    Role::Gate | Role::Up => [MIDDLE, HIDDEN],
                    _ => [HIDDEN, MIDDLE],
                };
                let std = if matches!(role, Role::Output | Role::Down) { 0.02 } else { 0.05 };
                matrices.push(Trained::new(format!("model.layers.{layer}.{}.weight", role.name()), normal(shape, std)));
            }
            for name in ["input_layernorm", "post_attention_layernorm"] {
                norms.push(Trained::new(format!("model.layers.{layer}.{name}.weight"), Tensor::ones([HIDDEN], &plain)));
            }
        }
        norms.push(Trained::new("model.norm.weight".into(), Tensor::ones([HIDDEN], &plain)));
        Self { config, device: device.clone(), matrices, norms }
    }

    /// Mean loss of windows that begin at `starts`, with the leaves that gradients are read from.
    fn loss(&self, text: &[u32], starts: &[usize], matrices: &[Tensor<2>], norms: &[Tensor<1>]) -> Tensor<1> {
        let device = matrices[0].device();
        let tokens = |shift: usize| -> Tensor<1, Int> {
            let ids: Vec<i64> =
                starts.iter().flat_map(|start| text[start + shift..][..SEQ].iter().map(|&token| i64::from(token))).collect();
            let count = ids.len();
            Tensor::from_data(TensorData::new(ids, [count]), &device)
        };
        let mut x = matrices[0].clone().select(0, tokens(0));
        for layer in 0..LAYERS {
            let mut parameters = Parameters::default();
            for (role, weight) in Role::PLAIN.into_iter().zip(&matrices[1 + layer * 7..]) {
                parameters.set_weight(role, weight.clone());
            }
            parameters.set_norm(Place::AttentionIn, norms[2 * layer].clone());
            parameters.set_norm(Place::MlpIn, norms[2 * layer + 1].clone());
            x = forward::block(&Spec::new(&self.config, layer, SEQ), &parameters, x, &mut |_, _| {});
        }
        let normed = forward::final_norm(&self.config, &x, &norms[2 * LAYERS]);
        let logits = forward::logits(&self.config, normed, matrices[0].clone());
        log_softmax(logits, 1).gather(1, tokens(1).unsqueeze_dim(1)).mean().neg()
    }

    fn step(&mut self, text: &[u32], starts: &[usize], rate: f64, step: usize) -> f32 {
        let matrices: Vec<Tensor<2>> = self.matrices.iter().map(|trained| trained.leaf(&self.device)).collect();
        let norms: Vec<Tensor<1>> = self.norms.iter().map(|trained| trained.leaf(&self.device)).collect();
        let loss = self.loss(text, starts, &matrices, &norms);
        let gradients = loss.backward();
        for (trained, leaf) in self.matrices.iter_mut().zip(&matrices) {
            trained.update(leaf.grad(&gradients).expect("a gradient").clamp(-1.0, 1.0), rate, step);
        }
        for (trained, leaf) in self.norms.iter_mut().zip(&norms) {
            trained.update(leaf.grad(&gradients).expect("a gradient").clamp(-1.0, 1.0), rate, step);
        }
        values(loss.inner())[0]
    }

    fn nll(&self, text: &[u32]) -> f64 {
        let matrices: Vec<Tensor<2>> = self.matrices.iter().map(|trained| trained.value.clone()).collect();
        let norms: Vec<Tensor<1>> = self.norms.iter().map(|trained| trained.value.clone()).collect();
        let starts: Vec<usize> = (0..text.len() - SEQ - 1).step_by(SEQ).collect();
        let losses: Vec<f64> = starts
            .chunks(BATCH)
            .map(|starts| f64::from(values(self.loss(text, starts, &matrices, &norms))[0]) * starts.len() as f64)
            .collect();
        losses.iter().sum::<f64>() / starts.len() as f64
    }

    fn write(&self, path: &Path) -> Result<(), Failure> {
        let matrices = self.matrices.iter().map(|one| (one.name.clone(), one.value.dims().to_vec(), values(one.value.clone())));
        let norms = self.norms.iter().map(|one| (one.name.clone(), one.value.dims().to_vec(), values(one.value.clone())));
        let stored: Vec<_> = matrices.chain(norms).map(|(name, shape, values)| (name, shape, encode(Float::BF16, &values))).collect();
        let views = stored
            .iter()
            .map(|(name, shape, bytes)| Ok((name, safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes)?)));
        let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
        safetensors::serialize_to_file(views, Some(HashMap::from([("format".to_string(), "pt".to_string())])), path)?;
        Ok(())
    }
}
