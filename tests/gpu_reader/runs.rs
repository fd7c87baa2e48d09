//! What must not change a result: the graph, what ran before, other threads, an error in between; and what a run costs.

use std::ops::ControlFlow;
use std::thread;

use gleaner::cuda::{CudaDevice, CudaReader, Statistics};
use gleaner::plan::{Plan, ReadParams};
use gleaner::reader::{Gleaned, Reader, StepReport};
use gleaner::{Answer, AskParams, Device, Document, Engine};

use super::common::{DEMO, demo_dir, noise_plan, root, small_model};
use super::{answer, cuda_reader, read};

/// The result with all step reports.
fn read_with_reports(reader: &CudaReader, plan: &Plan) -> (Gleaned, Vec<StepReport>) {
    let mut reports = Vec::new();
    let gleaned = reader.read(plan, &mut |report| {
        reports.push(report.clone());
        ControlFlow::Continue(())
    });
    (gleaned.unwrap(), reports)
}

/// Replays the steps, then launches them kernel by kernel, and checks that the two agree to the bit.
fn check_replay(mut reader: CudaReader, plan: &Plan, name: &str) {
    let replayed = (read_with_reports(&reader, plan), answer(&reader, &plan.tokens[..50], 8));
    assert!(!replayed.0.0.kept.is_empty(), "{name}");
    assert_eq!(replayed.0.1.len(), plan.chunks(), "{name}");
    reader.set_graphs(false);
    let launched = (read_with_reports(&reader, plan), answer(&reader, &plan.tokens[..50], 8));
    assert!(replayed == launched, "{name}: {replayed:?} {launched:?}");
}

/// Small enough for racecheck: two steps of models with two layers, one of them with head norms.
#[test]
#[ignore = "needs a GPU"]
fn a_small_document() {
    for name in ["qwen2", "qwen3"] {
        let plan = noise_plan(256, 20, 100);
        assert_eq!(plan.chunks(), 2);
        check_replay(cuda_reader(small_model(name)), &plan, name);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn replayed_steps_equal_launched_ones() {
    for name in ["llama", "mistral_sliding", "qwen3"] {
        check_replay(cuda_reader(small_model(name)), &noise_plan(256, 95, 200), name);
    }
    for max_retained in [150, 4096] {
        check_replay(cuda_reader(DEMO.clone()), &noise_plan(8000, 205, max_retained), "demo");
    }
}

/// A step that takes keys and values of what it begins with from the step before comes out as one that computes all, to the
/// bit: where all stays, so that each step takes what the one before had; where some of the noise stays; and in a text.
#[test]
#[ignore = "needs a GPU"]
fn reused_rows_change_nothing() {
    let everything = |vocab_size| Plan { topk: 4096, ..noise_plan(vocab_size, 95, 4096) };
    let almanac = {
        let document = Document::open(root().join("examples/almanac.txt")).unwrap();
        let engine = Engine::open(demo_dir(), Device::Cpu).unwrap();
        let (params, read) = (AskParams::default(), ReadParams::default());
        engine.plan(&document, &engine.frame(QUESTIONS[0], &params).unwrap(), &read).unwrap().0
    };
    let small = ["llama", "mistral_sliding", "qwen3"].map(|name| (name, small_model(name), everything(256)));
    let demo = [everything(8000), noise_plan(8000, 205, 300), almanac].map(|plan| ("demo", DEMO.clone(), plan));
    for (name, model, plan) in small.into_iter().chain(demo) {
        let mut reader = cuda_reader(model);
        let reusing = read_with_reports(&reader, &plan);
        let reused: usize = reusing.1.iter().map(|report| report.reused_tokens).sum();
        let tokens: usize = reusing.1.iter().map(|report| report.tokens).sum();
        println!("{name}: {reused} of {tokens} tokens reused");
        assert!(reused > if plan.topk < 4096 { 0 } else { tokens / 2 }, "{name}: {reused} of {tokens}");
        reader.set_reuse(false);
        let mut computing = read_with_reports(&reader, &plan);
        assert!(computing.1.iter().all(|report| report.reused_tokens == 0));
        computing.1.iter_mut().zip(&reusing.1).for_each(|(report, other)| report.reused_tokens = other.reused_tokens);
        assert!(reusing == computing, "{name}");
    }
}

/// Between the first chunk and the last nothing travels: one copy comes back, and what goes up depends on the plan's
/// tables alone, not on the number of steps.
#[test]
#[ignore = "needs a GPU"]
fn one_readback_per_document() {
    let mut reader = cuda_reader(DEMO.clone());
    let opened = reader.statistics();
    let weights = (DEMO.parameters() * 2) as u64;
    assert!(opened.bytes_up >= weights, "{opened:?} for {weights} bytes of weights");
    assert_eq!((opened.downloads, opened.graph_launches), (0, 0));

    let (short, long) = (noise_plan(8000, 20, 150), noise_plan(8000, 205, 150));
    let costs = |reader: &CudaReader, plan: &Plan| -> Statistics {
        let before = reader.statistics();
        read(reader, plan);
        reader.statistics() - before
    };
    costs(&reader, &long);
    let of_short = costs(&reader, &short);
    for (plan, cost) in [(&short, of_short), (&long, costs(&reader, &long))] {
        println!("{} chunks: {cost:?}", plan.chunks());
        assert_eq!((cost.downloads, cost.synchronizations), (1, 1));
        assert_eq!(cost.graph_launches, plan.chunks() as u64 - 1);
        assert_eq!(cost.uploads, of_short.uploads);
        // A step's figures, and 12 bytes for each of at most `topk` sentences.
        let log = plan.chunks() * (20 + 12 * plan.topk as usize) + 64;
        assert!(cost.bytes_down <= log as u64, "{cost:?}, {log} bytes of logs");
    }
    reader.set_graphs(false);
    let cost = costs(&reader, &long);
    assert_eq!((cost.downloads, cost.synchronizations, cost.graph_launches), (1, 1, 0));
}

#[test]
#[ignore = "needs a GPU"]
fn what_ran_before_does_not_matter() {
    let (a, b) = (noise_plan(8000, 95, 300), noise_plan(8000, 205, 150));
    let fresh = cuda_reader(DEMO.clone());
    let expected = (read_with_reports(&fresh, &a), answer(&fresh, &a.tokens[..200], 20));
    let used = cuda_reader(DEMO.clone());
    for _ in 0..2 {
        read(&used, &b);
        answer(&used, &b.tokens[..700], 30);
        assert!(read_with_reports(&used, &a) == expected.0);
        read(&used, &b);
        assert_eq!(answer(&used, &a.tokens[..200], 20), expected.1);
    }
}

const QUESTIONS: [&str; 2] = ["What is the name of the mayor of Pellinbridge?", "When was the railway opened?"];

fn ask(engine: &Engine, document: &Document, question: &str) -> Answer {
    engine.ask(document, question, &AskParams::default()).unwrap()
}

/// The same words from the same sentences with the same scores.
fn assert_same(ours: &Answer, expected: &Answer) {
    assert_eq!((&ours.answer, &ours.evidence), (&expected.answer, &expected.evidence));
}

#[test]
#[ignore = "needs a GPU"]
fn threads_do_not_disturb_each_other() {
    let document = Document::open(root().join("examples/almanac.txt")).unwrap();
    let engines: Vec<Engine> = (0..2).map(|_| Engine::open(demo_dir(), Device::Cuda(0)).unwrap()).collect();
    let expected = QUESTIONS.map(|question| ask(&engines[0], &document, question));
    assert_ne!(expected[0].answer, expected[1].answer);

    // Two engines at once; then one engine for both threads.
    for shared in [false, true] {
        thread::scope(|scope| {
            for (index, question) in QUESTIONS.into_iter().enumerate() {
                let engine = &engines[if shared { 0 } else { index }];
                let (document, expected) = (&document, &expected[index]);
                scope.spawn(move || (0..5).for_each(|_| assert_same(&ask(engine, document, question), expected)));
            }
        });
    }
}

/// Two GPUs of one process, each by a thread of its own and both by one thread in turns.
#[test]
#[ignore = "needs a GPU"]
fn devices_do_not_disturb_each_other() {
    if CudaDevice::open(1).is_err() {
        eprintln!("skipped: one GPU");
        return;
    }
    let document = Document::open(root().join("examples/almanac.txt")).unwrap();
    let engines = [0, 1].map(|ordinal| Engine::open(demo_dir(), Device::Cuda(ordinal)).unwrap());
    let expected = QUESTIONS.map(|question| ask(&engines[0], &document, question));
    assert_ne!(expected[0].answer, expected[1].answer);
    thread::scope(|scope| {
        for (engine, (question, expected)) in engines.iter().zip(QUESTIONS.into_iter().zip(&expected)) {
            let document = &document;
            scope.spawn(move || (0..5).for_each(|_| assert_same(&ask(engine, document, question), expected)));
        }
    });
    for engine in [&engines[1], &engines[0], &engines[1]] {
        assert_same(&ask(engine, &document, QUESTIONS[0]), &expected[0]);
    }
}
