//! Plans: made, looked at, turned into a final prompt.

use std::ffi::c_char;
use std::ops::Range;
use std::sync::Arc;

use gleaner::Document;
use gleaner::plan::Plan;
use gleaner::reader::{Gleaned, Kept};
use gleaner::text::Frame;

use crate::args::{Handle, In, Kind, Out, Slot, Versioned};
use crate::ask::AskOptions;
use crate::engine::Engine;
use crate::status::{Failure, Result, Status, call, call_on};

/// `gleaner_plan_tables`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Tables {
    struct_size: usize,
    prefix: In<'static, u32>,
    prefix_count: usize,
    tail: In<'static, u32>,
    tail_count: usize,
    question_start: usize,
    tokens: In<'static, u32>,
    token_count: usize,
    sentence_offsets: In<'static, u32>,
    sentence_offset_count: usize,
    chunk_offsets: In<'static, u32>,
    chunk_offset_count: usize,
    topk: u32,
    phrase_width: u32,
    max_retained: u32,
}

// SAFETY: as `gleaner_plan_tables`; pointers may be null.
unsafe impl Versioned for Tables {
    const NAME: &str = "gleaner_plan_tables";
}

impl Tables {
    fn plan(&self) -> Result<Plan> {
        let question_start = u32::try_from(self.question_start)
            .map_err(|_| Failure::plan(format!("question_start is {}, beyond any tail", self.question_start)))?;
        Ok(Plan {
            prefix: self.prefix.slice(self.prefix_count, "prefix")?.to_vec(),
            tail: self.tail.slice(self.tail_count, "tail")?.to_vec(),
            question_start,
            tokens: self.tokens.slice(self.token_count, "tokens")?.to_vec(),
            sentence_offsets: self.sentence_offsets.slice(self.sentence_offset_count, "sentence_offsets")?.to_vec(),
            chunk_offsets: self.chunk_offsets.slice(self.chunk_offset_count, "chunk_offsets")?.to_vec(),
            topk: self.topk,
            phrase_width: self.phrase_width,
            max_retained: self.max_retained,
        })
    }

    fn of(plan: &Plan) -> Tables {
        Tables {
            struct_size: size_of::<Tables>(),
            prefix: In::of(&plan.prefix),
            prefix_count: plan.prefix.len(),
            tail: In::of(&plan.tail),
            tail_count: plan.tail.len(),
            question_start: plan.question_start as usize,
            tokens: In::of(&plan.tokens),
            token_count: plan.tokens.len(),
            sentence_offsets: In::of(&plan.sentence_offsets),
            sentence_offset_count: plan.sentence_offsets.len(),
            chunk_offsets: In::of(&plan.chunk_offsets),
            chunk_offset_count: plan.chunk_offsets.len(),
            topk: plan.topk,
            phrase_width: plan.phrase_width,
            max_retained: plan.max_retained,
        }
    }
}

/// Where a plan came from, if not from token ids.
struct Source {
    document: Arc<Document>,
    frame: Frame,
    spans: Vec<Range<usize>>,
}

/// What a `gleaner_plan` holds.
pub struct ReadingPlan {
    pub plan: Plan,
    source: Option<Source>,
}

impl Kind for ReadingPlan {
    const COOKIE: u64 = u64::from_ne_bytes(*b"gleanPLN");
    const NAME: &str = "gleaner_plan";
}

impl ReadingPlan {
    fn source(&self) -> Result<&Source> {
        self.source.as_ref().ok_or_else(|| Failure::plan("this plan was made from token ids, so that it has no text"))
    }

    fn no_sentence(&self, sentence: u32) -> Failure {
        Failure::plan(format!("there is no sentence {sentence}: the plan has {}, from 0", self.plan.sentences()))
    }
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_plan_from_document(
    engine: In<Handle<Engine>>,
    document: In<Handle<Document>>,
    question: In<c_char>,
    options: In<AskOptions>,
    plan: Slot<ReadingPlan>,
) -> Status {
    let slot = plan.cleared();
    call_on(engine, |engine| {
        let (slot, document) = (slot?, document.handle()?);
        let (question, params) = (question.string("question")?, options.sized_or_default()?.params()?);
        let frame = engine.engine.frame(question, &params)?;
        let (plan, spans) = engine.engine.plan(&document, &frame, &params.read)?;
        slot.give(ReadingPlan { plan, source: Some(Source { document, frame, spans }) })
    })
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_plan_from_tokens(
    engine: In<Handle<Engine>>,
    tables: In<Tables>,
    plan: Slot<ReadingPlan>,
) -> Status {
    let slot = plan.cleared();
    call_on(engine, |engine| {
        let slot = slot?;
        let plan = tables.sized()?.plan()?;
        plan.validate(engine.engine.model().config.vocab_size)?;
        slot.give(ReadingPlan { plan, source: None })
    })
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_plan_free(plan: Slot<ReadingPlan>) -> Status {
    call(|| plan.free())
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_plan_view(plan: In<Handle<ReadingPlan>>, tables: Out<Tables>) -> Status {
    call(|| tables.replace(Tables::of(&plan.handle()?.plan)))
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_plan_span(
    plan: In<Handle<ReadingPlan>>,
    sentence: u32,
    start: Out<usize>,
    end: Out<usize>,
) -> Status {
    call(|| {
        let plan = plan.handle()?;
        let span = plan.source()?.spans.get(sentence as usize).ok_or_else(|| plan.no_sentence(sentence))?;
        start.set("start", span.start)?;
        end.set("end", span.end)
    })
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_final_prompt(
    engine: In<Handle<Engine>>,
    plan: In<Handle<ReadingPlan>>,
    sentences: In<u32>,
    sentence_count: usize,
    tokens: Out<u32>,
    capacity: usize,
    count: Out<usize>,
) -> Status {
    call_on(engine, |engine| {
        let plan = plan.handle()?;
        let Source { document, frame, spans } = plan.source()?;
        let sentences = sentences.slice(sentence_count, "sentences")?;
        if let Some(&sentence) = sentences.iter().find(|&&sentence| sentence as usize >= spans.len()) {
            return Err(plan.no_sentence(sentence));
        }
        let kept = sentences.iter().map(|&sentence| Kept { sentence, score: 0.0 }).collect();
        let gleaned = Gleaned { kept, dropped_for_capacity: 0 };
        let prompt = engine.engine.answer_prompt(document, spans, &gleaned, frame)?;
        count.set("count", prompt.len())?;
        tokens.fill(capacity, "tokens", &prompt)
    })
}
