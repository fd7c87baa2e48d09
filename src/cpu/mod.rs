//! The fp32 reader: the definition of what is right, on any machine.

mod attention;
mod forward;
mod gemm;
mod math;
mod score;

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use forward::{Decoder, LayerCache, Workspace};
use score::{ContextSentence, QuestionAttention, select_sentences, top_k};

use crate::model::Model;
use crate::plan::{Plan, PlanShape};
use crate::range::range;
use crate::reader::{Detail, Gleaned, Kept, Memory, MemoryRequest, Reader, Sampling, StepReport, TopToken};
use crate::sample::sample;
use crate::timings::{Clock, Profile, Stage, Work};
use crate::{Error, Result};

/// Reads with plain fp32 arithmetic on all cores.
///
/// Weights stay in their mapped files and are converted as they are used, so that memory beyond them is that of one
/// step's activations and its keys and values.
pub struct CpuReader {
    model: Arc<Model>,
    reuse: bool,
}

/// The scores of one step, as [`CpuReader::score_step`] returns them.
#[derive(Debug, Clone, PartialEq)]
pub struct StepScores {
    /// One per context token.
    pub scores: Vec<f64>,
    /// The best tokens, as indices into the context, best first.
    pub selected: Vec<usize>,
}

impl CpuReader {
    /// A reader for `model`.
    pub fn new(model: Arc<Model>) -> CpuReader {
        CpuReader { model, reuse: true }
    }

    /// One step on its own: scores the tokens of `context` in `prompt` by the attention of the rows from
    /// `question_start` to its end, and selects the `topk` best.
    ///
    /// `question_weights` holds the weight of each row; if it is empty, this is a first step and fills it.
    ///
    /// # Errors
    /// [`Error::Plan`] if the positions or ids make no sense; [`Error::NotFinite`].
    pub fn score_step(
        &self,
        prompt: &[u32],
        context: Range<usize>,
        question_start: usize,
        phrase_width: usize,
        topk: usize,
        question_weights: &mut Vec<f32>,
    ) -> Result<StepScores> {
        self.model.check_prompt(prompt)?;
        let rows = prompt.len().saturating_sub(question_start);
        if context.start > context.end || context.end > question_start || rows == 0 {
            return Err(Error::Plan(format!(
                "the context {context:?} and the question rows {question_start}..{} must follow each other",
                prompt.len()
            )));
        }
        if !question_weights.is_empty() && question_weights.len() != rows {
            return Err(Error::Plan(format!("{} weights for {rows} question rows", question_weights.len())));
        }
        let decoder = Decoder::new(&self.model, prompt.len());
        let attention = decoder.question_attention(&mut Workspace::default(), prompt, 0, question_start);
        score(&attention, context, phrase_width, topk, question_weights).ok_or(Error::NotFinite { step: 0 })
    }

    /// Last-layer attention probabilities summed over heads, of the rows from `from` to the end of `prompt`:
    /// `[prompt.len() - from, prompt.len()]`.
    ///
    /// # Errors
    /// [`Error::Plan`] if `from` or an id is out of range.
    pub fn attention_head_sums(&self, prompt: &[u32], from: usize) -> Result<Vec<f32>> {
        self.model.check_prompt(prompt)?;
        if from >= prompt.len() {
            return Err(Error::Plan(format!("row {from} of a prompt of {} tokens", prompt.len())));
        }
        let decoder = Decoder::new(&self.model, prompt.len());
        Ok(decoder.question_attention(&mut Workspace::default(), prompt, 0, from).head_sums)
    }

    /// Hidden states behind the final norm and logits of every row of `prompt`: `[prompt.len(), hidden_size]` and
    /// `[prompt.len(), vocab_size]`.
    ///
    /// # Errors
    /// [`Error::Plan`] if the prompt is empty or an id is out of range.
    pub fn hidden_and_logits(&self, prompt: &[u32]) -> Result<(Vec<f32>, Vec<f32>)> {
        self.model.check_prompt(prompt)?;
        let decoder = Decoder::new(&self.model, prompt.len());
        let mut ws = Workspace::default();
        let hidden = decoder.hidden(&mut ws, &mut self.empty_caches(), prompt, prompt.len());
        let logits = decoder.logits(&mut ws, &hidden);
        Ok((hidden, logits))
    }

    fn empty_caches(&self) -> Vec<LayerCache> {
        self.model.layers.iter().map(|_| LayerCache::default()).collect()
    }
}

/// `None` if a score is not finite.
fn score(
    attention: &QuestionAttention,
    context: Range<usize>,
    phrase_width: usize,
    topk: usize,
    question_weights: &mut Vec<f32>,
) -> Option<StepScores> {
    if question_weights.is_empty() {
        *question_weights = attention.question_weights();
    }
    let scores = attention.token_scores(question_weights, context, phrase_width);
    if scores.iter().any(|score| !score.is_finite()) {
        return None;
    }
    let selected = top_k(&scores, topk);
    Some(StepScores { scores, selected })
}

/// The prompt of one step and where the sentences of its context lie.
struct Prompt {
    tokens: Vec<u32>,
    context: Range<usize>,
    sentences: Vec<ContextSentence>,
}

impl Prompt {
    fn new(plan: &Plan, step: usize, kept: &[Kept]) -> Prompt {
        let chunk = plan.chunk(step);
        let mut tokens = plan.prefix.clone();
        let start = tokens.len();
        let mut sentences = Vec::with_capacity(kept.len() + chunk.len());
        for sentence in kept.iter().map(|kept| kept.sentence).chain(chunk) {
            let from = tokens.len() - start;
            tokens.extend_from_slice(plan.sentence(sentence));
            sentences.push(ContextSentence { sentence, tokens: from..tokens.len() - start });
        }
        let context = start..tokens.len();
        tokens.extend_from_slice(&plan.tail);
        Prompt { tokens, context, sentences }
    }

    fn top_token(&self, index: usize, score: f64) -> TopToken {
        let at = self.sentences.partition_point(|sentence| sentence.tokens.end <= index);
        let ContextSentence { sentence, tokens } = &self.sentences[at];
        TopToken {
            sentence: *sentence,
            index: (index - tokens.start) as u32,
            id: self.tokens[self.context.start + index],
            score,
        }
    }
}

/// Tokens that both prompts begin with, none of them a question row, in whole blocks of attention and with more left than a
/// product takes one by one: so each row is computed as it would be with all.
fn reused_tokens(before: &[u32], tokens: &[u32], question_start: usize) -> usize {
    let most = question_start.min(tokens.len().saturating_sub(forward::GEMV_ROWS + 1));
    let same = before.iter().zip(&tokens[..most]).take_while(|(a, b)| a == b).count();
    same / attention::BLOCK_ROWS * attention::BLOCK_ROWS
}

impl CpuReader {
    /// All steps of `plan`, which is checked, with one decoder.
    fn read_steps(
        &self,
        decoder: &Decoder,
        plan: &Plan,
        detail: Detail,
        observe: &mut dyn FnMut(&StepReport) -> ControlFlow<()>,
    ) -> Result<Gleaned> {
        let mut ws = Workspace::default();
        let mut question_weights = Vec::new();
        let mut gleaned = Gleaned { kept: Vec::new(), dropped_for_capacity: 0 };
        let mut before: Vec<u32> = Vec::new();
        for step in 0..plan.chunks() {
            let _step = range!("step {step}");
            let prompt = Prompt::new(plan, step, &gleaned.kept);
            let question_start = prompt.context.end + plan.question_start as usize;
            let reused = if self.reuse { reused_tokens(&before, &prompt.tokens, question_start) } else { 0 };
            let attention = decoder.question_attention(&mut ws, &prompt.tokens, reused, question_start);
            let (phrase_width, topk) = (plan.phrase_width as usize, plan.topk as usize);
            let StepScores { scores, selected } = decoder
                .time("score", Work::Uncounted, prompt.tokens.len(), || {
                    score(&attention, prompt.context.clone(), phrase_width, topk, &mut question_weights)
                })
                .ok_or(Error::NotFinite { step })?;
            let selection = decoder.time("select", Work::Uncounted, prompt.tokens.len(), || {
                select_sentences(plan, &prompt.sentences, &scores, &selected)
            });

            gleaned.kept = selection.kept;
            gleaned.dropped_for_capacity += selection
                .dropped
                .iter()
                .filter(|(_, reason)| *reason == crate::reader::DropReason::MaxRetained)
                .count();
            let report = StepReport {
                step,
                steps: plan.chunks(),
                tokens: prompt.tokens.len(),
                reused_tokens: reused,
                context_tokens: prompt.context.len(),
                retained_tokens: gleaned.kept.iter().map(|kept| plan.sentence_len(kept.sentence)).sum(),
                kept: gleaned.kept.clone(),
                dropped: selection.dropped,
                top_tokens: selected.iter().map(|&index| prompt.top_token(index, scores[index])).collect(),
                scores: match detail {
                    Detail::Selection => Vec::new(),
                    Detail::Scores => scores.iter().map(|&score| score as f32).collect(),
                },
            };
            if observe(&report).is_break() {
                return Err(Error::Cancelled);
            }
            before = prompt.tokens;
        }
        Ok(gleaned)
    }

    /// All tokens behind `prompt`, which is checked, with one decoder.
    fn answer_tokens(
        &self,
        decoder: &mut Decoder,
        prompt: &[u32],
        sampling: &Sampling,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Vec<u32>> {
        let mut ws = Workspace::default();
        let mut caches = self.empty_caches();
        let mut answer = Vec::new();
        loop {
            let index = answer.len();
            let _token = match index {
                0 => range!("prefill"),
                _ => range!("token {index}"),
            };
            decoder.stage = if index == 0 { Stage::Prefill } else { Stage::Decode };
            let hidden = match answer.last() {
                None => decoder.hidden(&mut ws, &mut caches, prompt, 1),
                Some(&token) => decoder.hidden(&mut ws, &mut caches, &[token], 1),
            };
            let logits = decoder.logits(&mut ws, &hidden);
            let token = decoder
                .time("sample", Work::Uncounted, 1, || sample(&logits, sampling, index))
                .ok_or(Error::NotFinite { step: index })?;
            if self.model.generation_config.eos_token_id.contains(&token) {
                return Ok(answer);
            }
            answer.push(token);
            if on_token(token).is_break() || answer.len() == sampling.max_new_tokens {
                return Ok(answer);
            }
        }
    }

    fn check_answer(&self, prompt: &[u32], sampling: &Sampling) -> Result<()> {
        sampling.validate()?;
        self.model.check_prompt(prompt)
    }
}

impl Reader for CpuReader {
    fn read_with(
        &self,
        plan: &Plan,
        detail: Detail,
        observe: &mut dyn FnMut(&StepReport) -> ControlFlow<()>,
    ) -> Result<Gleaned> {
        plan.validate(self.model.config.vocab_size)?;
        self.read_steps(&Decoder::new(&self.model, plan.max_step_tokens()), plan, detail, observe)
    }

    fn answer(
        &self,
        prompt: &[u32],
        sampling: &Sampling,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Vec<u32>> {
        self.check_answer(prompt, sampling)?;
        let mut decoder = Decoder::new(&self.model, prompt.len() + sampling.max_new_tokens);
        self.answer_tokens(&mut decoder, prompt, sampling, on_token)
    }

    fn profile(&self, plan: &Plan, prompt: &[u32], sampling: &Sampling) -> Result<Profile> {
        plan.validate(self.model.config.vocab_size)?;
        self.check_answer(prompt, sampling)?;
        let tokens = plan.max_step_tokens().max(prompt.len() + sampling.max_new_tokens);
        let mut decoder = Decoder::new(&self.model, tokens);
        decoder.clock = Clock::started();
        self.read_steps(&decoder, plan, Detail::Selection, &mut |_| ControlFlow::Continue(()))?;
        self.answer_tokens(&mut decoder, prompt, sampling, &mut |_| ControlFlow::Continue(()))?;
        Ok(Profile { operations: decoder.clock.into_operations(), empty_launch_us: None })
    }

    fn set_graphs(&mut self, _: bool) {}

    fn set_reuse(&mut self, reuse: bool) {
        self.reuse = reuse;
    }

    fn memory(&self, request: &MemoryRequest) -> Memory {
        let PlanShape { max_step_tokens, question_rows, .. } = request.plan;
        let bytes = forward::workspace_bytes(&self.model.config, max_step_tokens, question_rows);
        Memory { weights: 0, workspace: vec![("step", bytes)] }
    }

    fn device(&self) -> String {
        format!("cpu ({} threads, fp32)", rayon::current_num_threads())
    }
}
