//! The seam: what reads a plan and answers a prompt, on whatever device.

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::plan::{Plan, PlanShape};
use crate::timings::Profile;

/// Reads whole documents for one model on one device.
///
/// The trait sits at the level of a reading plan, not of a tensor operation: between the first chunk and the last
/// a reader decides for itself what travels where.
pub trait Reader: Send + Sync {
    /// Reads all chunks of `plan` and returns the sentences that are left.
    ///
    /// `observe` is called after each step, on the calling thread, with a report of the `detail` that is asked for;
    /// breaking stops the reading at the next step boundary.
    ///
    /// # Errors
    /// [`crate::Error::Plan`], [`crate::Error::Cancelled`], [`crate::Error::NotFinite`], or the device's.
    fn read_with(
        &self,
        plan: &Plan,
        detail: Detail,
        observe: &mut dyn FnMut(&StepReport) -> ControlFlow<()>,
    ) -> Result<Gleaned>;

    /// [`Reader::read_with`] without scores.
    ///
    /// # Errors
    /// Those of [`Reader::read_with`].
    fn read(&self, plan: &Plan, observe: &mut dyn FnMut(&StepReport) -> ControlFlow<()>) -> Result<Gleaned> {
        self.read_with(plan, Detail::Selection, observe)
    }

    /// Continues `prompt` until an end token, the limit of `sampling`, or a break from `on_token`.
    ///
    /// Returns the new tokens, without the end token.
    ///
    /// # Errors
    /// [`crate::Error::Plan`] if the prompt is empty or leaves the vocabulary; [`crate::Error::NotFinite`]; the
    /// device's.
    fn answer(
        &self,
        prompt: &[u32],
        sampling: &Sampling,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Vec<u32>>;

    /// Reads `plan` and continues `prompt` once more, to say what each kind of operation takes. The results, which are
    /// those of [`Reader::read`] and [`Reader::answer`], are dropped.
    ///
    /// # Errors
    /// Those of both.
    fn profile(&self, plan: &Plan, prompt: &[u32], sampling: &Sampling) -> Result<Profile>;

    /// Whether a GPU replays steps and tokens after the first from a recorded graph, as it does unless told otherwise, or
    /// is given them kernel by kernel, which is slower and shows a profiler each kernel in its range. The results are the
    /// same to the bit. A CPU has no graphs: each operation lies in its range as it is.
    fn set_graphs(&mut self, graphs: bool);

    /// Whether a step takes keys and values of the tokens that its prompt begins with from the step before, as far as the
    /// two begin alike, as it does unless told otherwise: a causal model has no others for them. The results are the same to
    /// the bit.
    fn set_reuse(&mut self, reuse: bool);

    /// The memory that a document and its answer take.
    fn memory(&self, request: &MemoryRequest) -> Memory;

    /// What it runs on, for people.
    fn device(&self) -> String;
}

/// A document and an answer, as far as memory depends on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRequest {
    /// The document's plan.
    pub plan: PlanShape,
    /// Tokens of the final prompt.
    pub prompt_tokens: usize,
    /// Most tokens of the answer.
    pub max_new_tokens: usize,
}

/// The memory that a reader takes on its device, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    /// Copies of the weights; 0 where the mapped files serve.
    pub weights: u64,
    /// What comes on top, by what it is for.
    pub workspace: Vec<(&'static str, u64)>,
}

impl Memory {
    /// What comes on top of the weights, together.
    pub fn workspace_bytes(&self) -> u64 {
        self.workspace.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// How much a [`StepReport`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Detail {
    /// What stays and what does not.
    #[default]
    Selection,
    /// The score of every context token too. A GPU then keeps those of all steps in its memory, 4 bytes each, and reads
    /// them back with the rest at the end.
    Scores,
}

/// A sentence that was kept, with its score in the step that kept it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// Index of the sentence in the plan.
    pub sentence: u32,
    /// Its best token's score. Comparable within one step only.
    pub score: f32,
}

/// Why a sentence did not stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// None of its tokens was among the best.
    NotInTopk,
    /// It was among the lowest-scored when the kept sentences exceeded `max_retained` tokens.
    MaxRetained,
}

/// What one step did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepReport {
    /// Its index, from 0.
    pub step: usize,
    /// How many there will be.
    pub steps: usize,
    /// Tokens of the whole prompt.
    pub tokens: usize,
    /// Of them, from the first on, those whose keys and values the step before had left, so that they were not computed again.
    pub reused_tokens: usize,
    /// Tokens of its context.
    pub context_tokens: usize,
    /// Tokens that stay.
    pub retained_tokens: usize,
    /// Sentences that stay, ascending.
    pub kept: Vec<Kept>,
    /// Sentences of its context that do not.
    pub dropped: Vec<(u32, DropReason)>,
    /// The best tokens, best first.
    pub top_tokens: Vec<TopToken>,
    /// The score of each context token, in the order of [`StepReport::sentences`]; empty unless [`Detail::Scores`] was
    /// asked for. It is what the best tokens are chosen by: the attention of the question's rows, weighted and summed
    /// over rows and heads, behind the box filter. A plan with a `phrase_width` of 1 leaves it unfiltered.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<f32>,
}

impl StepReport {
    /// The sentences of its context, in their order there, which is that of the document.
    pub fn sentences(&self) -> Vec<u32> {
        let kept = self.kept.iter().map(|kept| kept.sentence);
        let mut sentences: Vec<u32> = kept.chain(self.dropped.iter().map(|&(sentence, _)| sentence)).collect();
        sentences.sort_unstable();
        sentences
    }
}

/// A token among the best of a step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TopToken {
    /// The sentence that owns it.
    pub sentence: u32,
    /// Its place in the sentence.
    pub index: u32,
    /// Its id.
    pub id: u32,
    /// Its score.
    pub score: f64,
}

/// What is left of a document after the last step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gleaned {
    /// The sentences, in document order.
    pub kept: Vec<Kept>,
    /// How many times over all steps a sentence was dropped for `max_retained` alone.
    pub dropped_for_capacity: usize,
}

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token; above it, probabilities are flattened or sharpened by it.
    pub temperature: f32,
    /// Draws among the likeliest tokens that together reach this probability.
    pub top_p: f32,
    /// The same seed gives the same draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { max_new_tokens: 128, temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Checks every value against its range.
    ///
    /// # Errors
    /// [`crate::Error::Parameter`], naming the parameter and its range.
    pub fn validate(&self) -> Result<()> {
        use crate::Error;
        if !(1..=65536).contains(&self.max_new_tokens) {
            return Err(Error::parameter("max_new_tokens", self.max_new_tokens, "from 1 to 65536"));
        }
        if !(0.0..=100.0).contains(&self.temperature) {
            return Err(Error::parameter("temperature", self.temperature, "from 0 to 100"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::parameter("top_p", self.top_p, "above 0 and at most 1"));
        }
        Ok(())
    }
}
