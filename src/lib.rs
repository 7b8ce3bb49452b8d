//! drawknife compresses large language models by quantization and pruning, and measures what that costs.
//!
//! # Bird's-eye view
//!
//! **Compression is a change of representation of a weight.** [`weight::Weight`] sits in the middle. [`methods`] turn one
//! variant into another, [`formats`] write whichever variant they find, and neither knows the other. Decisions about the
//! whole model are a [`plan`]: plain data that exists before any weight is read. There is one loop over blocks
//! ([`model::walk`]), one transformer forward ([`model::forward`]), and one definition of every measure.
//!
//! # Data flow
//!
//! ```text
//! recipe, preset, flags ──► Plan ──► tensors of the output ──► files laid out, headers written
//! checkpoint (read, checked) ───┘                                   ▲
//!     │                                                             │ bytes, as layers are done
//!     ├─ Block ─► forward of the original ─► Seen (Σx², XᵀX) ─► Bench ─► stages of methods ─► Block, compressed
//! text ─► tokens ─► Hidden ─┴─ forward of the compressed ─► the next block's Hidden
//! output, opened as a stranger would ─► evaluate against the original ─► report ─► rename into place
//!
//! forward walk, keeping what every block reads ─► slopes of the loss ─► walk back ─► what every way to store every layer costs
//!     ─► sensitivity.json ─► knapsack under a target ─► bits per layer in the recipe
//! ```
//!
//! A [`model::bench::Bench`] lends the block that is being worked on: methods that aim at the float model's outputs see both
//! streams of hidden states there, site by site, with everything before the site as it stands by then.
//!
//! Statistics hang on input *sites*, not on matrices: queries, keys and values read one input, and every expert of a mixture has
//! sites of its own. Those of experts are not gathered side by side: what the mixture reads is kept with where its tokens went
//! ([`model::arrivals`]), and a few experts at a time take their own tokens out of it. Hidden states go through a block by its
//! [`model::passage`]: in a mixture expert after expert, each with its tokens of all windows. Where memory has no room for the experts
//! of a block, each is read when it is needed ([`model::holdings`]), and what was made of it is put away ([`model::away`]).
//!
//! What a checkpoint stores as one matrix and the forward reads as several is a [`model::Module`]: it is split when a block is loaded
//! and put together when it is written. Recipes that need no calibration never run a forward: they stream layer by layer, from
//! stored bytes to packed integers.
//!
//! # Code map
//!
//! ```text
//! cli ─► compress · evaluate · compare · check · sensitivity · report      the verbs; those that open models know formats
//!           ├─► subject                                a model that is looked at: folder or GGUF file, sizes, hashes
//!           ├─► allocation ─► plan                     a target to bits or zeros of every layer
//!           ├─► gate                                   limits on figures and what can be said of them
//!           ├─► hub                                    models by name: in the shared cache, or downloaded and verified
//!           ├─► plan ─► methods ─► model ─► kernels     tensors: kernels, model, device, evaluate, nothing else
//!           │                                  └─► device    the processor or a GPU: adapters, buffers, launches
//!           ├─► formats ─► checkpoint                   no tensors here
//!           └─► calibrate ─► checkpoint                 text to windows of tokens; chat templates run in a child process
//! everything ─► weight · matrix · lanes · error         plain data and plain loops; statistics: intervals and ranks; memory: the system's word
//! compress · formats ─► storage                         what changes a disk
//! untrusted ─► what reads bytes of others               for fuzzers
//! ```
//!
//! Hidden states and statistics ([`model::hidden`], [`model::seen`]) stand beside the walk that owns them, so that
//! `calibrate` is text alone and nothing depends in a circle.
//!
//! # Invariants
//!
//! - `methods` and `formats` never see each other; `formats` and `checkpoint` hold no tensors; `weight` does no input or
//!   output. Nothing below `cli` prints, reads the environment or exits.
//! - A figure that a limit is held against has an interval, by the bootstrap over windows ([`statistics`]); without one nothing
//!   passes. Everything a report page says is in the files beside it, so that it can be made again ([`report::page`]).
//! - Only [`model::forward`] holds transformer mathematics, with [`model::latent`], [`model::delta`] and [`model::mixture`] below it;
//!   [`model::backward`] is its adjoint, written by hand and tested against automatic differentiation of the one forward, which
//!   takes its place on a GPU, and against finite differences. Only [`model::walk`] loops over
//!   blocks, and an architecture is a row of data ([`model::architecture`]). One exception: [`model::generate`], where the model writes its own
//!   calibration text, goes over positions outside and blocks inside, since a position needs the token of the last.
//! - On the processor, results do not depend on the number of threads: parallel over rows, sums in fixed lanes, and
//!   windows cut into runs by their size alone. Matrix products may round differently on another kind of processor.
//! - A kernel on a GPU is one valid file in `shaders/`, its launch `kernels/<op>/gpu.rs` and its twin `kernels/<op>.rs`;
//!   [`kernels::self_test`] compares the two on every adapter. On a GPU sums are formed in another order.
//! - A tensor's bytes are in memory while somebody holds them and no longer; one block is resident at a time, on a GPU also the next, or less of it where its
//!   experts are read one at a time, to the same bytes.
//! - The destination appears complete or not at all. Work on it lies beside it in a hidden folder ([`compress::work`]) whose journal
//!   is the only word on what is done; every change of the disk on the way goes through [`storage::Store`], which tests fail
//!   and cut off at every step.
//! - A new method, family, format or kernel is one file or row and one line in a table.
//! - Unsafe code stands in [`kernels::gemm`] (calls of the gemm crate),
//!   [`kernels::rough_product`] (bfloat16 instructions), `device::gpu` (one word that asks for matrix units, and a question for the memory of an adapter) and
//!   [`cli::allocator`] (settings of the C library and limits of a process) alone.
//!
//! The tests `layering` and `tidy` check most of these.

pub mod allocation;
pub mod calibrate;
pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod compare;
pub mod compress;
pub mod device;
pub mod embedded;
pub mod error;
pub mod evaluate;
pub mod formats;
pub mod gate;
pub mod hub;
pub mod kernels;
pub mod lanes;
pub mod matrix;
pub mod memory;
pub mod methods;
pub mod model;
pub mod plan;
pub mod report;
pub mod run;
pub mod sensitivity;
pub mod statistics;
pub mod storage;
pub mod subject;
pub mod untrusted;
pub mod weight;
