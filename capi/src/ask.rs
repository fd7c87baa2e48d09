//! Asking: options, progress, answers.

use std::ffi::{c_char, c_int, c_void};
use std::ops::ControlFlow;

use gleaner::plan::ReadParams;
use gleaner::reader::{Sampling, StepReport};
use gleaner::text::PromptTemplate;
use gleaner::{AskParams, Document, Progress};

use crate::args::{CText, Handle, In, Kind, Out, Slot, Versioned};
use crate::engine::Engine;
use crate::status::{Failure, Result, Status, call, call_on, pointer};

/// `gleaner_kept`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Kept {
    pub sentence: u32,
    pub score: f32,
}

/// `gleaner_step`.
#[repr(C)]
pub struct Step {
    struct_size: usize,
    step: usize,
    steps: usize,
    tokens: usize,
    context_tokens: usize,
    retained_tokens: usize,
    kept: *const Kept,
    kept_count: usize,
    sentences: *const u32,
    sentence_count: usize,
    scores: *const f32,
}

pub type StepFn = Option<unsafe extern "C" fn(*mut c_void, *const Step) -> c_int>;
type TextFn = Option<unsafe extern "C" fn(*mut c_void, *const c_char, usize) -> c_int>;

/// What a callback's return means.
pub fn flow(returned: c_int) -> ControlFlow<()> {
    if returned == 0 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
}

pub fn kept(kept: &[gleaner::reader::Kept]) -> Vec<Kept> {
    kept.iter().map(|&gleaner::reader::Kept { sentence, score }| Kept { sentence, score }).collect()
}

/// Tells C about a step, if it wants to know.
pub fn report(function: StepFn, user_data: *mut c_void, report: &StepReport) -> ControlFlow<()> {
    let Some(function) = function else { return ControlFlow::Continue(()) };
    let (kept, sentences) = (kept(&report.kept), report.sentences());
    let step = Step {
        struct_size: size_of::<Step>(),
        step: report.step,
        steps: report.steps,
        tokens: report.tokens,
        context_tokens: report.context_tokens,
        retained_tokens: report.retained_tokens,
        kept: kept.as_ptr(),
        kept_count: kept.len(),
        sentences: sentences.as_ptr(),
        sentence_count: sentences.len(),
        scores: if report.scores.is_empty() { std::ptr::null() } else { report.scores.as_ptr() },
    };
    // SAFETY: the caller's function, with what the header promises it until it returns.
    flow(unsafe { function(user_data, &step) })
}

/// `gleaner_ask_options`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct AskOptions {
    struct_size: usize,
    window_length: usize,
    topk: usize,
    phrase_width: usize,
    max_retained: usize,
    max_sentence_tokens: usize,
    short_tail: usize,
    chunk_short_tail: usize,
    prompt_template: In<'static, c_char>,
    max_new_tokens: usize,
    temperature: f32,
    top_p: f32,
    seed: u64,
    step: StepFn,
    text: TextFn,
    user_data: *mut c_void,
}

// SAFETY: as `gleaner_ask_options`; pointers and functions may be null.
unsafe impl Versioned for AskOptions {
    const NAME: &str = "gleaner_ask_options";
}

impl Default for AskOptions {
    fn default() -> Self {
        let (read, sampling) = (ReadParams::default(), Sampling::default());
        AskOptions {
            struct_size: size_of::<Self>(),
            window_length: read.window_length,
            topk: read.topk,
            phrase_width: read.phrase_width,
            max_retained: read.max_retained.unwrap_or(0),
            max_sentence_tokens: read.max_sentence_tokens,
            short_tail: read.short_tail,
            chunk_short_tail: read.chunk_short_tail,
            prompt_template: In::NULL,
            max_new_tokens: sampling.max_new_tokens,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            seed: sampling.seed,
            step: None,
            text: None,
            user_data: std::ptr::null_mut(),
        }
    }
}

impl AskOptions {
    pub fn params(&self) -> Result<AskParams> {
        let template = self.prompt_template.optional_string("prompt_template")?;
        Ok(AskParams {
            read: ReadParams {
                window_length: self.window_length,
                topk: self.topk,
                phrase_width: self.phrase_width,
                max_retained: Some(self.max_retained).filter(|&tokens| tokens != 0),
                max_sentence_tokens: self.max_sentence_tokens,
                short_tail: self.short_tail,
                chunk_short_tail: self.chunk_short_tail,
            },
            sampling: Sampling {
                max_new_tokens: self.max_new_tokens,
                temperature: self.temperature,
                top_p: self.top_p,
                seed: self.seed,
            },
            template: match template {
                Some(text) => PromptTemplate::new("prompt_template", text)?,
                None => PromptTemplate::default(),
            },
            ..AskParams::default()
        })
    }

    fn progress(&self, progress: Progress) -> ControlFlow<()> {
        match (progress, self.text) {
            (Progress::Step(step), _) => report(self.step, self.user_data, step),
            (Progress::Text(text), Some(function)) => {
                let text = CText::from(text.to_owned());
                // SAFETY: the caller's function, with what the header promises it until it returns.
                flow(unsafe { function(self.user_data, text.as_ptr(), text.len()) })
            }
            (Progress::Text(_), None) | (Progress::Planned { .. }, _) => ControlFlow::Continue(()),
        }
    }
}

/// `gleaner_evidence`.
#[repr(C)]
struct Evidence {
    text: *const c_char,
    text_length: usize,
    start: usize,
    end: usize,
    line: usize,
    chunk: usize,
    score: f32,
}

/// What a `gleaner_answer` holds.
struct Answer {
    text: CText,
    json: CText,
    evidence: Vec<Evidence>,
    /// What `evidence` points into.
    _texts: Vec<CText>,
}

// SAFETY: the pointers lead into texts that the answer owns and that never change.
unsafe impl Send for Answer {}
// SAFETY: as above.
unsafe impl Sync for Answer {}

impl Kind for Answer {
    const COOKIE: u64 = u64::from_ne_bytes(*b"gleanANS");
    const NAME: &str = "gleaner_answer";
}

impl Answer {
    fn new(answer: gleaner::Answer) -> Result<Answer> {
        let json = serde_json::to_string(&answer).map_err(|error| Failure::internal(error.to_string()))?;
        let texts: Vec<CText> = answer.evidence.iter().map(|evidence| CText::from(evidence.text.clone())).collect();
        let evidence = answer.evidence.iter().zip(&texts).map(|(evidence, text)| Evidence {
            text: text.as_ptr(),
            text_length: text.len(),
            start: evidence.start,
            end: evidence.end,
            line: evidence.line,
            chunk: evidence.chunk,
            score: evidence.score,
        });
        Ok(Answer {
            text: CText::from(answer.answer),
            json: CText::from(json),
            evidence: evidence.collect(),
            _texts: texts,
        })
    }
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_ask_options_init(options: Out<AskOptions>, struct_size: usize) -> Status {
    call(|| options.init(struct_size))
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_ask(
    engine: In<Handle<Engine>>,
    document: In<Handle<Document>>,
    question: In<c_char>,
    options: In<AskOptions>,
    answer: Slot<Answer>,
) -> Status {
    let slot = answer.cleared();
    call_on(engine, |engine| {
        let (slot, document, options) = (slot?, document.handle()?, options.sized_or_default()?);
        let (question, params) = (question.string("question")?, options.params()?);
        let _work = engine.work()?;
        let answer = engine.engine.ask_with(&document, question, &params, &mut |event| options.progress(event))?;
        engine.warn(&answer.warnings);
        slot.give(Answer::new(answer)?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_answer_free(answer: Slot<Answer>) -> Status {
    call(|| answer.free())
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_answer_text(answer: In<Handle<Answer>>, length: Out<usize>) -> *const c_char {
    pointer(answer.handle(), |answer| {
        length.set_if_wanted("length", answer.text.len())?;
        Ok(answer.text.as_ptr())
    })
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_answer_json(answer: In<Handle<Answer>>) -> *const c_char {
    pointer(answer.handle(), |answer| Ok(answer.json.as_ptr()))
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_answer_evidence(answer: In<Handle<Answer>>, index: usize) -> *const Evidence {
    pointer(answer.handle(), |answer| Ok(answer.evidence.get(index).map_or(std::ptr::null(), std::ptr::from_ref)))
}
