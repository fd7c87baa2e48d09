//! The tier of plans and scores: how a step's scores belong to its selection, and `Engine::ask` made again from outside the crate.

mod common;
#[allow(dead_code, reason = "its main is not called")]
#[path = "../examples/low_level.rs"]
mod example;

use common::{DEMO, demo_dir, noise_plan, reports, root, small_model};
use gleaner::cpu::CpuReader;
use gleaner::plan::{Plan, ReadParams};
use gleaner::reader::{Detail, DropReason, Reader, StepReport};
use gleaner::{AskParams, Device, Document, Engine};

/// Its first so many bytes.
fn almanac(bytes: usize) -> Document {
    let text = std::fs::read_to_string(root().join("examples/almanac.txt")).unwrap();
    Document::new("almanac", &text[..text.floor_char_boundary(bytes)]).unwrap()
}

/// Scores belong to the context's tokens in order: each sentence's best is the score it is kept with, and nothing else in
/// a report depends on whether scores were asked for.
#[test]
fn scores_come_only_when_asked_for_and_agree_with_the_selection() {
    let engine = Engine::open(demo_dir(), Device::Cpu).unwrap();
    let document = almanac(8000);
    let params = AskParams {
        read: ReadParams { window_length: 256, topk: 60, max_retained: Some(256), ..ReadParams::default() },
        ..AskParams::default()
    };
    let frame = engine.frame("What is the name of the mayor of Pellinbridge?", &params).unwrap();
    let (plan, _) = engine.plan(&document, &frame, &params.read).unwrap();
    let with = reports(engine.reader(), &plan, Detail::Scores);
    let without = reports(engine.reader(), &plan, Detail::Selection);
    assert!(plan.chunks() > 3);
    assert!(with.iter().any(|report| report.dropped.iter().any(|entry| entry.1 == DropReason::MaxRetained)));
    for (report, plain) in with.into_iter().zip(without) {
        assert_eq!(report.scores.len(), report.context_tokens);
        assert!(report.sentences().is_sorted_by(|a, b| a < b));
        let mut scores = report.scores.iter().copied();
        for sentence in report.sentences() {
            let best = scores.by_ref().take(plan.sentence_len(sentence)).fold(0.0, f32::max);
            if let Some(kept) = report.kept.iter().find(|kept| kept.sentence == sentence) {
                assert_eq!(kept.score, best);
            }
        }
        assert_eq!(scores.next(), None, "every score has its token");
        let best = report.scores.iter().copied().fold(0.0, f32::max);
        assert_eq!(report.top_tokens[0].score as f32, best);
        assert_eq!(StepReport { scores: Vec::new(), ..report }, plain);
    }
}

/// A step that takes keys and values of what it begins with from the step before comes out as one that computes all, to the
/// bit: in a text, in noise of which all stays, and with the windows and norms that models may have.
#[test]
fn reused_rows_change_nothing() {
    let everything = |vocab_size| Plan { topk: 4096, ..noise_plan(vocab_size, 45, 4096) };
    let engine = Engine::open(demo_dir(), Device::Cpu).unwrap();
    let params = AskParams { read: ReadParams { window_length: 256, ..ReadParams::default() }, ..AskParams::default() };
    let frame = engine.frame("What is the name of the mayor of Pellinbridge?", &params).unwrap();
    let (text, _) = engine.plan(&almanac(12_000), &frame, &params.read).unwrap();
    let small = ["mistral_sliding", "qwen3"].map(|name| (name, small_model(name), everything(256)));
    let demo = [("noise", everything(8000)), ("text", text)].map(|(name, plan)| (name, DEMO.clone(), plan));
    for (name, model, plan) in small.into_iter().chain(demo) {
        let mut reader = CpuReader::new(model);
        let reusing = reports(&reader, &plan, Detail::Scores);
        let reused: usize = reusing.iter().map(|report| report.reused_tokens).sum();
        assert!(reused > 0, "{name}");
        reader.set_reuse(false);
        let mut computing = reports(&reader, &plan, Detail::Scores);
        assert!(computing.iter().all(|report| report.reused_tokens == 0), "{name}");
        computing.iter_mut().zip(&reusing).for_each(|(report, other)| report.reused_tokens = other.reused_tokens);
        assert!(reusing == computing, "{name}");
    }
}

#[test]
fn the_example_answers_as_ask_does() {
    let engine = Engine::open(demo_dir(), Device::Cpu).unwrap();
    let document = almanac(20_000);
    let question = "What is the name of the mayor of Pellinbridge?";
    let expected = engine.ask(&document, question, &AskParams::default()).unwrap();
    let found = example::ask(&engine, &document, question).unwrap();
    assert_eq!(found.answer, "Clara Whitlock");
    assert_eq!(found.answer, expected.answer);
    assert_eq!(found.peaks.len(), expected.steps);
    assert_eq!(found.evidence.len(), expected.evidence.len());
    for ((bytes, score), evidence) in found.evidence.into_iter().zip(expected.evidence) {
        assert_eq!((document.text()[bytes].trim(), score), (evidence.text.as_str(), evidence.score));
    }
}
