//! Gleaner answers questions about documents of any length with a small transformer.
//!
//! It reads a document chunk by chunk (InfiniRetri, [arXiv 2502.12962](https://arxiv.org/abs/2502.12962)): each step
//! runs the model over the sentences kept so far, the next chunk and the question, takes the final layer's attention
//! from the question to the context, and keeps the sentences that own the best tokens. What is left at the end is
//! short enough to answer from, and is the evidence.
//!
//! # In three lines
//! ```no_run
//! use gleaner::{AskParams, Device, Document, Engine};
//! # fn main() -> gleaner::Result<()> {
//! let engine = Engine::open("models/gleaner-demo-16m", Device::Auto)?;
//! let document = Document::open("examples/almanac.txt")?;
//! let answer = engine.ask(&document, "What is the name of the mayor of Pellinbridge?", &AskParams::default())?;
//! println!("{} (line {})", answer.answer, answer.evidence[0].line);
//! # Ok(())
//! # }
//! ```
//!
//! # The road of a question
//! ```text
//! document bytes + question
//!   -> text      sentences (byte spans), tokens per sentence, chat template, prompt frame
//!   -> plan      the whole reading job as flat tables of integers
//!   -> reader    read(plan) -> kept sentences, answer(tokens) -> tokens
//!   -> answer    answer text, evidence with byte offsets, lines and scores, figures
//! ```
//! | module | holds |
//! |---|---|
//! | [`text`] | [`Document`], sentences, [`Tokenizer`](text::Tokenizer), chat and prompt templates |
//! | [`plan`] | [`Plan`](plan::Plan), what a reader reads, and [`ReadParams`](plan::ReadParams) |
//! | [`model`] | config.json and the mapped weights |
//! | [`reader`] | the [`Reader`](reader::Reader) trait: the seam between the CPU and the GPU |
//! | [`cpu`] | the fp32 reader: the definition of what is right |
//! | [`cuda`] | kernels and device, where a CUDA toolkit was found at build time |
//! | [`eval`] | metrics for answers: those of LongBench |
//! | [`timings`] | where the time of an answer went |
//!
//! # Two tiers
//! [`Engine::ask`] takes text and gives an [`Answer`]. One tier below, [`Engine::frame`], [`Engine::plan`] and
//! [`Engine::reader`] give the parts: token ids in, kept sentence ids and scores out, on request
//! ([`reader::Detail::Scores`]) those of every token. A C library offers the same two; `docs/embedding.md` shows both.
//!
//! # Rules
//! The library never panics on input, never prints, never exits. Everything that can go wrong is an [`Error`]. All
//! types can be shared between threads. The same input gives the same bits.
//!
//! Weights are mapped, not read: should another process shorten a model file while it is open, the operating system
//! ends this one.

mod answer;
pub mod cpu;
pub mod cuda;
mod engine;
mod error;
pub mod eval;
pub mod model;
pub mod plan;
mod range;
pub mod reader;
mod sample;
pub mod text;
pub mod timings;

pub use answer::{Answer, DocumentFigures, Evidence, ParamFigures, Timing};
pub use engine::{AskParams, Device, Engine, Progress};
pub use error::{Error, Result};
pub use text::Document;

#[cfg(doctest)]
#[doc = include_str!("../docs/embedding.md")]
struct Embedding;
