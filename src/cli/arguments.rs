//! The tree of commands and flags.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::device::Choice;
use crate::evaluate::Bos;
use crate::formats::targets::Engine;
use crate::gate::Limits;

/// Compresses large language models and measures what that costs.
#[derive(Debug, Parser)]
#[command(
    name = "drawknife",
    version,
    about,
    long_about = "Compresses Hugging Face checkpoints by quantization and pruning, block by block, so that\na model far larger than memory fits, and measures the quality of what it wrote.\n\nStart with `drawknife compress` alone: it compresses a small built-in model.",
    after_help = "Exit codes: 0 done, 1 failure while running, 2 wrong usage or input, 3 gate failed,\n4 gate inconclusive, 5 output does not verify, 130/143 interrupted."
)]
pub struct Arguments {
    /// Print one JSON object and nothing else on standard output.
    #[arg(long, global = true, help_heading = "General")]
    pub json: bool,
    /// Print only results and errors.
    #[arg(long, short, global = true, help_heading = "General")]
    pub quiet: bool,
    /// Print every layer.
    #[arg(long, short, global = true, help_heading = "General")]
    pub verbose: bool,
    /// Threads to compute with [default: one per core]; results do not depend on it.
    #[arg(long, global = true, help_heading = "General", value_name = "N")]
    pub threads: Option<usize>,
    /// Seed of random choices [default: that of the recipe, 0].
    #[arg(long, global = true, help_heading = "General", value_name = "N")]
    pub seed: Option<u64>,
    /// Never use the network: models given by name, like owner/name, must be in the cache.
    #[arg(long, global = true, help_heading = "General")]
    pub offline: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Compress a checkpoint and measure the result.
    #[command(
        after_help = "Examples:\n  drawknife compress                                  the built-in model, to try it out\n  drawknife compress ./Qwen3-0.6B -o ./Qwen3-0.6B-w4 --preset w4-fast\n  drawknife compress ./model -o ./out --recipe recipe.toml --calibration chats.jsonl"
    )]
    Compress(Compress),
    /// Show what `compress` would do: sizes, memory, time, layers. Writes nothing but, with -o FILE.toml, the resolved recipe.
    Plan(Compress),
    /// Measure perplexity, and divergence from a reference model on the same tokens.
    #[command(
        after_help = "Windows do not overlap, the tail is dropped, and the first token of a window is not\nscored. Perplexities are comparable only with equal text, --seq and --bos."
    )]
    Eval(Eval),
    /// Measure any number of models beside the first, on the same tokens: perplexity, divergence, sizes, errors of layers.
    #[command(
        after_help = "Examples:\n  drawknife compare ./Qwen3-0.6B ./Qwen3-0.6B-w4 ./Qwen3-0.6B-w3.gguf\n  drawknife compare ./Qwen3-0.6B ./a ./b --layers --json"
    )]
    Compare(Compare),
    /// Measure what every way to store every layer costs: the map that --target-bpw is solved on.
    #[command(
        after_help = "Examples:\n  drawknife sensitivity ./model                              writes sensitivity.json\n  drawknife sensitivity ./model --quick                      predictions only, a few percent of the time\n  drawknife compress ./model -o ./out --preset w4 --target-bpw 3.5 --sensitivity sensitivity.json\n\nThe file is written block by block; the same command goes on where it was stopped."
    )]
    Sensitivity(Sensitivity),
    /// Make report.html and report.md of a compressed model again.
    Report(ReportOf),
    /// Print the JSON schema of a file that this program writes.
    Schema(Schema),
    /// Decide whether a model is whole and as good as it was: for build pipelines.
    #[command(
        after_help = "Examples:\n  drawknife check ./model-w4                                          are the files whole?\n  drawknife check ./model-w4 --reference ./model --text eval.txt --baseline baseline.json --update-baseline\n  drawknife check ./model-w4 --reference ./model --text eval.txt --baseline baseline.json --junit check.xml\n  drawknife check ./model-w4 --reference ./model --max 'ppl_ratio<=1.01,kld_mean<=0.02,top1>=0.95,size<=5.8GB'\n\nExit codes: 0 pass, 3 fail, 4 inconclusive, 5 the files are not whole, 2 measured on something else\nthan the baseline was. A check needs at least eight windows of tokens to pass."
    )]
    Check(Check),
    /// Write a compressed checkpoint in another format, where that holds exactly the same weights.
    #[command(
        after_help = "Examples:\n  drawknife export ./model-w4 --format gguf -o ./model-w4-gguf\n  drawknife export ./model-trits --format dense -o ./model-dense      in 32-bit floats, exact"
    )]
    Export(ExportTo),
    /// Show what a checkpoint is: architecture, sizes, what would be compressed.
    Inspect(Inspect),
    /// List the presets, or show the recipe behind one.
    Presets(Presets),
    /// Show what this machine offers.
    Doctor(Doctor),
    /// Render chats for another process of this program.
    #[command(hide = true, name = crate::calibrate::chat::CHILD_VERB)]
    RenderChats,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Compare every kernel of every GPU with the processor, however long its driver takes to translate them.
    #[arg(long)]
    pub thorough: bool,
}

/// Arguments of `compress` and `plan`.
#[derive(Debug, Args)]
pub struct Compress {
    /// Folder of a Hugging Face checkpoint [default: builtin:model, a small one that the program carries].
    pub model: Option<PathBuf>,
    /// Folder to write; it appears when it is complete.
    #[arg(long, short, value_name = "FOLDER")]
    pub output: Option<PathBuf>,
    /// Name of a recipe; `drawknife presets` lists them [default: w4-fast].
    #[arg(long, conflicts_with = "recipe")]
    pub preset: Option<String>,
    /// A recipe file.
    #[arg(long, value_name = "FILE.toml")]
    pub recipe: Option<PathBuf>,
    /// compressed-tensors, dense, gptq, gptq_v2, auto-round, awq; several comma-separated, each in a folder of its own
    /// [default: compressed-tensors for integers, dense for pruned weights].
    #[arg(long, value_name = "NAME,...")]
    pub format: Option<String>,
    /// One GGUF file in llama.cpp's q2_k, q3_k, q4_k, q5_k or q6_k, searched under calibration: the recipe of the one stage k-quant.
    #[arg(long, value_name = "TYPE", conflicts_with_all = ["preset", "recipe", "format"])]
    pub gguf_type: Option<String>,
    /// Round the embeddings and the head of a GGUF file to 8 bits (Q8_0). Where other formats are written too, quality is measured
    /// on those, without it.
    #[arg(long)]
    pub gguf_embeddings_8: bool,
    /// Engine that shall load the output: vllm, transformers, sglang or llama.cpp. Picks the format, and refuses what the
    /// engine cannot load.
    #[arg(long = "for", value_name = "ENGINE")]
    pub engine: Option<Engine>,
    /// builtin:mix or .txt and .jsonl files, comma-separated; .jsonl lines hold `text`, `messages` or `input_ids`; or
    /// self for text that the model writes.
    #[arg(long, value_name = "SOURCE")]
    pub calibration: Option<String>,
    /// Calibration windows at most [default: 128].
    #[arg(long, value_name = "N")]
    pub samples: Option<usize>,
    /// Count every token for the statistics of every expert of a mixture, wherever its router sends it.
    #[arg(long)]
    pub all_experts: bool,
    /// Tokens per calibration window [default: 2048 or as many as the model takes].
    #[arg(long, value_name = "N")]
    pub seq: Option<usize>,
    /// auto, cpu, gpu or gpu:N.
    #[arg(long, default_value = "auto")]
    pub device: Choice,
    /// GPU memory to use at most, like 8GB, or else four fifths of what it has; weights beyond it pass tile by tile.
    #[arg(long, value_name = "SIZE")]
    pub gpu_memory: Option<String>,
    /// Leave layers whose name matches as they are; may be repeated.
    #[arg(long, value_name = "GLOB")]
    pub skip: Vec<String>,
    /// Other bits for layers whose name matches, like '*.down_proj=8'; 16 leaves them; may be repeated.
    #[arg(long, value_name = "GLOB=BITS")]
    pub keep: Vec<String>,
    /// Bits per weight of all compressed layers together, scales included; each layer gets the bits that it needs.
    #[arg(long, value_name = "X", conflicts_with_all = ["target_size", "target_sparsity"])]
    pub target_bpw: Option<f64>,
    /// Size of the whole output, like 5.5GB.
    #[arg(long, value_name = "SIZE", conflicts_with = "target_sparsity")]
    pub target_size: Option<String>,
    /// Share of zeros of all compressed layers together, for recipes that prune; each block gets its own.
    #[arg(long, value_name = "SHARE")]
    pub target_sparsity: Option<f64>,
    /// Fewest bits of a layer under a target.
    #[arg(long, value_name = "BITS")]
    pub min_bits: Option<u8>,
    /// File of `drawknife sensitivity` that a target is solved on [default: a quick measurement is made first].
    #[arg(long, value_name = "FILE.json")]
    pub sensitivity: Option<PathBuf>,
    /// Text to measure quality on [default: built-in evaluation text].
    #[arg(long, value_name = "FILE")]
    pub eval_text: Option<PathBuf>,
    /// Tokens to measure quality on at most.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub eval_tokens: usize,
    /// Tokens per window that quality is measured on, or as many as the model takes.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub eval_seq: usize,
    /// Do not measure quality.
    #[arg(long, conflicts_with_all = ["eval_text", "eval_tokens", "eval_seq"])]
    pub no_eval: bool,
    /// Fail with 3 when the quality exceeds a limit, like kld_mean=0.05 or ppl_ratio=1.02; may be repeated.
    #[arg(long, value_name = "NAME=LIMIT")]
    pub gate: Vec<String>,
    /// Only show the plan.
    #[arg(long)]
    pub dry_run: bool,
    /// Replace the output folder if it exists.
    #[arg(long)]
    pub force: bool,
    /// Throw away what an interrupted run left; without it the same command goes on.
    #[arg(long)]
    pub restart: bool,
    /// Memory to use at most, like 16GB: experts are read one at a time where a block is too large; refuse to start when even so
    /// more is expected to be needed. What is free where nothing is said.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
}

/// Which tokens of a window are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Scoring {
    /// All that have one before them.
    All,
    /// The second half, as llama.cpp's perplexity tool does it.
    #[value(name = "llama.cpp")]
    LlamaCpp,
}

/// What models are measured on.
#[derive(Debug, Args)]
pub struct Measuring {
    /// UTF-8 text to measure on [default: built-in evaluation text].
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens per window [default: 512 or as many as the model takes].
    #[arg(long, value_name = "N")]
    pub seq: Option<usize>,
    /// Tokens of the text to use at most.
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Where the token that begins a text goes: once, window or none.
    #[arg(long, default_value = "once")]
    pub bos: Bos,
}

/// Arguments of `eval`.
#[derive(Debug, Args)]
pub struct Eval {
    /// Folder of a checkpoint, original or compressed, or a GGUF file.
    pub model: PathBuf,
    /// What it is measured on.
    #[command(flatten)]
    pub measuring: Measuring,
    /// Which tokens of a window are scored: all that have one before them, or as llama.cpp's perplexity tool does it, the second
    /// half.
    #[arg(long, value_enum, default_value_t = Scoring::All, conflicts_with = "bos")]
    pub protocol: Scoring,
    /// Another checkpoint to compare with, on the same tokens.
    #[arg(long, value_name = "FOLDER")]
    pub reference: Option<PathBuf>,
    /// auto, cpu, gpu or gpu:N.
    #[arg(long, default_value = "auto")]
    pub device: Choice,
    /// GPU memory to use at most, like 8GB, or else four fifths of what it has; weights beyond it pass tile by tile.
    #[arg(long, value_name = "SIZE")]
    pub gpu_memory: Option<String>,
}

/// Arguments of `compare`.
#[derive(Debug, Args)]
pub struct Compare {
    /// Folders of checkpoints or GGUF files; the first is the reference.
    #[arg(required = true, num_args = 2.., value_name = "MODEL")]
    pub models: Vec<PathBuf>,
    /// What they are measured on.
    #[command(flatten)]
    pub measuring: Measuring,
    /// Also compare the weights of every linear layer with those of the reference.
    #[arg(long)]
    pub layers: bool,
    /// auto, cpu, gpu or gpu:N.
    #[arg(long, default_value = "auto")]
    pub device: Choice,
    /// GPU memory to use at most, like 8GB, or else four fifths of what it has; weights beyond it pass tile by tile.
    #[arg(long, value_name = "SIZE")]
    pub gpu_memory: Option<String>,
}

/// Arguments of `sensitivity`.
#[derive(Debug, Args)]
pub struct Sensitivity {
    /// Folder of a checkpoint, or a GGUF file.
    pub model: PathBuf,
    /// The file to write, and to go on with.
    #[arg(long, short, value_name = "FILE.json", default_value = "sensitivity.json")]
    pub output: PathBuf,
    /// Ways to store a layer: w2 to w8 with groups of 128, or like w3g64; s50 for half of the weights zero; 2:4; trit.
    #[arg(long, value_name = "NAMES", default_value = crate::sensitivity::schemes::DEFAULT)]
    pub schemes: String,
    /// What makes integers: round-to-nearest or gptq.
    #[arg(long, value_name = "NAME", default_value = "round-to-nearest")]
    pub method: String,
    /// Only predict from one walk back; leave out the exact measurement.
    #[arg(long)]
    pub quick: bool,
    /// builtin:mix or .txt and .jsonl files, comma-separated.
    #[arg(long, value_name = "SOURCE", default_value = "builtin:mix")]
    pub calibration: String,
    /// Windows.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub samples: usize,
    /// Tokens per window, or as many as the model takes.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub seq: usize,
    /// auto, cpu, gpu or gpu:N.
    #[arg(long, default_value = "auto")]
    pub device: Choice,
    /// GPU memory to use at most, like 8GB, or else four fifths of what it has; weights beyond it pass tile by tile.
    #[arg(long, value_name = "SIZE")]
    pub gpu_memory: Option<String>,
}

/// Arguments of `report`.
#[derive(Debug, Args)]
pub struct ReportOf {
    /// Folder that `compress` wrote.
    pub folder: PathBuf,
}

/// Arguments of `schema`.
#[derive(Debug, Args)]
pub struct Schema {
    /// report, run, sensitivity, baseline, check or compare; without a name they are listed.
    pub name: Option<String>,
}

/// How `check` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum CheckFormat {
    /// Tables.
    Human,
    /// Annotations for GitHub Actions, and a summary of the step.
    Github,
}

/// Arguments of `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// Folder of a checkpoint, or a GGUF file.
    pub model: PathBuf,
    /// The model before compression, or the file that --save-reference wrote of it.
    #[arg(long, value_name = "MODEL|FILE")]
    pub reference: Option<PathBuf>,
    /// What it is measured on.
    #[command(flatten)]
    pub measuring: Measuring,
    /// The accepted measurement to compare with.
    #[arg(long, value_name = "FILE.json")]
    pub baseline: Option<PathBuf>,
    /// Accept this measurement: write it to --baseline. Tolerances that stand there are kept.
    #[arg(long)]
    pub update_baseline: bool,
    /// Limits: ppl_ratio, ppl, kld_mean, kld_p99, top1, size or bits with <= or >=, comma-separated.
    #[arg(long, value_name = "LIMITS", value_parser = crate::cli::check::limits)]
    pub max: Option<Limits>,
    /// Time that measuring may take, like 2m; it stops as soon as everything is decided.
    #[arg(long, value_name = "TIME", value_parser = crate::cli::check::duration)]
    pub budget: Option<std::time::Duration>,
    /// Keep the reference's predictions (the 64 likeliest tokens) in a file that can take its place.
    #[arg(long, value_name = "FILE.safetensors")]
    pub save_reference: Option<PathBuf>,
    /// Engine that must load the model: vllm, transformers, sglang or llama.cpp.
    #[arg(long = "for", value_name = "ENGINE")]
    pub engine: Option<Engine>,
    /// Write the result as JUnit's XML too.
    #[arg(long, value_name = "FILE.xml")]
    pub junit: Option<PathBuf>,
    /// How to print.
    #[arg(long, value_enum, default_value_t = CheckFormat::Human)]
    pub format: CheckFormat,
    /// auto, cpu, gpu or gpu:N.
    #[arg(long, default_value = "auto")]
    pub device: Choice,
    /// GPU memory to use at most, like 8GB, or else four fifths of what it has; weights beyond it pass tile by tile.
    #[arg(long, value_name = "SIZE")]
    pub gpu_memory: Option<String>,
}

/// Arguments of `export`.
#[derive(Debug, Args)]
pub struct ExportTo {
    /// Folder of a compressed checkpoint, or a GGUF file.
    pub model: PathBuf,
    /// The format; `drawknife presets` lists them.
    #[arg(long, value_name = "NAME")]
    pub format: String,
    /// Folder to write; it appears when it is complete.
    #[arg(long, short, value_name = "FOLDER")]
    pub output: PathBuf,
    /// Replace the output folder if it exists.
    #[arg(long)]
    pub force: bool,
    /// Throw away what an interrupted run left; without it the same command goes on.
    #[arg(long)]
    pub restart: bool,
}

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub struct Inspect {
    /// Folder of a checkpoint, or a GGUF file.
    pub model: PathBuf,
    /// List every tensor.
    #[arg(long)]
    pub tensors: bool,
}

/// Arguments of `presets`.
#[derive(Debug, Args)]
pub struct Presets {
    /// Show the recipe of this preset.
    pub name: Option<String>,
}
