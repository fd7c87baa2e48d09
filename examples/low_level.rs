//! `Engine::ask` taken apart into the calls it is made of, with every token's score on the way:
//! `cargo run --release --example low_level -- examples/almanac.txt "What is the name of the mayor of Pellinbridge?"`

use std::ops::{ControlFlow, Range};

use gleaner::plan::Plan;
use gleaner::reader::{Detail, StepReport};
use gleaner::{AskParams, Device, Document, Engine, Result};

/// What was found.
pub struct Found {
    /// The model's words.
    pub answer: String,
    /// Bytes and score of each kept sentence, best first.
    pub evidence: Vec<(Range<usize>, f32)>,
    /// Of each step the best token's place in the document's tokens, and its score.
    pub peaks: Vec<(usize, f32)>,
}

/// Answers `question` from `document`; the answer ends at a line break.
pub fn ask(engine: &Engine, document: &Document, question: &str) -> Result<Found> {
    let params = AskParams::default();
    let frame = engine.frame(question, &params)?;
    let (plan, spans) = engine.plan(document, &frame, &params.read)?;

    let mut peaks = Vec::new();
    let gleaned = engine.reader().read_with(&plan, Detail::Scores, &mut |step| {
        peaks.push(peak(&plan, step));
        ControlFlow::Continue(())
    })?;

    let prompt = engine.answer_prompt(document, &spans, &gleaned, &frame)?;
    let mut text = engine.tokenizer().decode_stream();
    let tokens = engine.reader().answer(&prompt, &params.sampling, &mut |token| match text(token) {
        Ok(Some(piece)) if piece.contains('\n') => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    })?;
    let mut evidence: Vec<_> =
        gleaned.kept.iter().map(|kept| (spans[kept.sentence as usize].clone(), kept.score)).collect();
    evidence.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok(Found { answer: engine.tokenizer().decode(&tokens)?.trim().to_owned(), evidence, peaks })
}

/// The token of a step's context that the question looks at most: its index in `plan.tokens`, and its score.
fn peak(plan: &Plan, step: &StepReport) -> (usize, f32) {
    let tokens = step.sentences().into_iter().flat_map(|sentence| {
        let sentence = sentence as usize;
        plan.sentence_offsets[sentence] as usize..plan.sentence_offsets[sentence + 1] as usize
    });
    let best = tokens.zip(step.scores.iter().copied()).max_by(|a, b| a.1.total_cmp(&b.1));
    best.expect("a step has context")
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(question)) = (args.next(), args.next()) else {
        return Err("usage: low_level DOCUMENT QUESTION".into());
    };
    let engine = Engine::open("models/gleaner-demo-16m", Device::Auto)?;
    let document = Document::open(path)?;
    let found = ask(&engine, &document, &question)?;
    for (step, (token, score)) in found.peaks.iter().enumerate() {
        println!("step {step:3}: most looked at is token {token} with {score:.3}");
    }
    println!("{}", found.answer);
    for (bytes, score) in found.evidence.iter().take(3) {
        println!("  {score:8.3}  {}", document.text()[bytes.clone()].trim());
    }
    Ok(())
}
