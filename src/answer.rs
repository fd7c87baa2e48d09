//! What a question gets back: the answer, the sentences that carry it, and the figures of the run.

use serde::{Deserialize, Serialize};

use crate::timings::Timings;

/// An answer with its evidence. Serialises to the JSON that `gleaner ask --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The model's words, without surrounding white space.
    pub answer: String,
    /// The sentences that were left after the last step, highest score first.
    pub evidence: Vec<Evidence>,
    /// Size of what was read.
    pub document: DocumentFigures,
    /// Tokens of all evidence.
    pub retained_tokens: usize,
    /// Reading steps.
    pub steps: usize,
    /// Everything that shaped the answer.
    pub params: ParamFigures,
    /// What it ran on.
    pub device: String,
    /// The model's directory.
    pub model: String,
    /// Where the time went.
    pub timing_ms: Timing,
    /// The same in detail, where [`crate::AskParams::timings`] asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
    /// What the reader of this answer should know.
    pub warnings: Vec<String>,
}

/// A sentence that the answer was made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// `document[start..end]`, without surrounding white space.
    pub text: String,
    /// First byte in the document.
    pub start: usize,
    /// One past its last byte.
    pub end: usize,
    /// The line it starts on, from 1.
    pub line: usize,
    /// Score of its best token in the last step; comparable within one answer only.
    pub score: f32,
    /// The chunk that brought it in, from 0.
    pub chunk: usize,
}

/// Size of a document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentFigures {
    /// UTF-8 bytes.
    pub bytes: usize,
    /// Sentences, over-long ones counted in pieces.
    pub sentences: usize,
    /// Tokens, each sentence tokenised alone.
    pub tokens: usize,
    /// Chunks, one per step.
    pub chunks: usize,
}

/// The parameters of an answer, defaults filled in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each is documented at ReadParams and Sampling")]
pub struct ParamFigures {
    pub window_length: usize,
    pub topk: usize,
    pub phrase_width: usize,
    pub max_retained: usize,
    pub max_sentence_tokens: usize,
    pub short_tail: usize,
    pub chunk_short_tail: usize,
    pub max_new_tokens: usize,
    pub temperature: f32,
    pub top_p: f32,
    pub seed: u64,
}

/// Milliseconds of each part of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Sentences, tokens, chunks.
    pub plan: f64,
    /// All reading steps.
    pub read: f64,
    /// Prompt and decoding of the answer.
    pub answer: f64,
    /// The whole call.
    pub total: f64,
}
