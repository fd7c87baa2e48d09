//! What the integration tests share: the bundled model, and recorded runs of the reference.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use gleaner::cpu::CpuReader;
use gleaner::model::Model;
use gleaner::plan::Plan;
use gleaner::reader::{Detail, DropReason, Reader, StepReport};
use safetensors::SafeTensors;
use serde_json::Value;

pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

pub fn demo_dir() -> PathBuf {
    root().join("models/gleaner-demo-16m")
}

pub static DEMO: LazyLock<Arc<Model>> =
    LazyLock::new(|| Arc::new(Model::open(demo_dir()).expect("the bundled model opens")));

/// What the steps of a reading report.
pub fn reports(reader: &dyn Reader, plan: &Plan, detail: Detail) -> Vec<StepReport> {
    let mut reports = Vec::new();
    let keep = &mut |report: &StepReport| {
        reports.push(report.clone());
        ControlFlow::Continue(())
    };
    reader.read_with(plan, detail, keep).unwrap();
    reports
}

pub fn demo_reader() -> CpuReader {
    CpuReader::new(DEMO.clone())
}

/// A small random model of this architecture.
pub fn small_model(name: &str) -> Arc<Model> {
    Arc::new(Model::open(root().join("tests/golden/arch").join(name)).unwrap())
}

/// Sentences of 5 to 24 tokens that are noise, in chunks of ten.
pub fn noise_plan(vocab_size: u32, sentences: u32, max_retained: u32) -> Plan {
    seeded_noise_plan(7, vocab_size, sentences, max_retained)
}

/// The same from another seed.
pub fn seeded_noise_plan(seed: u32, vocab_size: u32, sentences: u32, max_retained: u32) -> Plan {
    let mut state = seed;
    let mut next = move |below: u32| {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) % below
    };
    let (mut tokens, mut sentence_offsets) = (Vec::new(), vec![0]);
    for _ in 0..sentences {
        let len = 5 + next(20);
        tokens.extend((0..len).map(|_| next(vocab_size)));
        sentence_offsets.push(tokens.len() as u32);
    }
    let chunk_offsets = (0..sentences).step_by(10).chain([sentences]).collect();
    Plan {
        prefix: (0..9).map(|_| next(vocab_size)).collect(),
        tail: (0..21).map(|_| next(vocab_size)).collect(),
        question_start: 2,
        tokens,
        sentence_offsets,
        chunk_offsets,
        topk: 40,
        phrase_width: 5,
        max_retained,
    }
}

/// The folder of further goldens that GLEANER_GOLDEN names.
pub fn golden_folder() -> PathBuf {
    PathBuf::from(std::env::var_os("GLEANER_GOLDEN").expect("GLEANER_GOLDEN names a folder"))
}

/// A recorded run: NAME.json (settings, lengths, answer), NAME.safetensors (arrays by step), NAME.txt (the document).
pub struct Golden {
    pub name: String,
    pub meta: Value,
    pub document: String,
    bytes: Vec<u8>,
}

/// One recorded step. Positions are indices into `input_ids`.
pub struct GoldenStep {
    pub input_ids: Vec<u32>,
    pub prefix: usize,
    pub context_end: usize,
    pub question_start: usize,
    pub scores: Vec<f64>,
    pub selected: Vec<usize>,
    pub sentence_starts: Vec<usize>,
    pub kept_starts: Vec<usize>,
}

impl Golden {
    pub fn open(path: &Path) -> Golden {
        let with = |extension: &str| path.with_extension(extension);
        let meta: Value = serde_json::from_slice(&std::fs::read(with("json")).unwrap()).unwrap();
        // A committed golden may name the bundled document instead of repeating it.
        let document = match meta["document"].as_str() {
            Some(document) => std::fs::read_to_string(root().join(document)).unwrap(),
            None => std::fs::read_to_string(with("txt")).unwrap(),
        };
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        Golden { name, meta, document, bytes: std::fs::read(path).unwrap() }
    }

    /// All goldens directly in `folder`.
    pub fn all(folder: &Path) -> Vec<Golden> {
        let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
        paths.sort();
        assert!(!paths.is_empty(), "no golden in {}", folder.display());
        paths.iter().map(|path| Golden::open(path)).collect()
    }

    pub fn setting(&self, name: &str) -> usize {
        self.meta[name].as_u64().unwrap() as usize
    }

    pub fn text(&self, name: &str) -> &str {
        self.meta[name].as_str().unwrap()
    }

    pub fn steps(&self) -> Vec<GoldenStep> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let integers = |name: String| -> Vec<usize> {
            let data = tensors.tensor(&name).unwrap().data().to_vec();
            data.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b) as usize).collect()
        };
        let steps = self.meta["steps"].as_array().unwrap();
        steps
            .iter()
            .enumerate()
            .map(|(i, step)| {
                let number = |name: &str| step[name].as_u64().unwrap() as usize;
                let scores = tensors.tensor(&format!("{i}.scores")).unwrap();
                GoldenStep {
                    input_ids: integers(format!("{i}.input_ids")).into_iter().map(|id| id as u32).collect(),
                    prefix: number("prefix"),
                    context_end: number("context_end"),
                    question_start: number("question_start"),
                    scores: scores.data().as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
                    selected: integers(format!("{i}.selected")),
                    sentence_starts: integers(format!("{i}.sentence_starts")),
                    kept_starts: integers(format!("{i}.kept_starts")),
                }
            })
            .collect()
    }
}

/// A recorded run as one plan that forces each step to start from its recorded prompt: chunk `i` is the whole context of
/// step `i`, and nothing of it may stay. What a step selects, it then drops for want of room. The weights of the question
/// rows are those of the first step, as in the recording.
///
/// Returns the plan, and the sentences that each recorded step kept.
pub fn teacher_forced(golden: &Golden) -> (Plan, Vec<BTreeSet<u32>>) {
    let steps = golden.steps();
    let first = &steps[0];
    let (prefix, tail) = (&first.input_ids[..first.prefix], &first.input_ids[first.context_end..]);
    let mut plan = Plan {
        prefix: prefix.to_vec(),
        tail: tail.to_vec(),
        question_start: (first.question_start - first.context_end) as u32,
        tokens: Vec::new(),
        sentence_offsets: vec![0],
        chunk_offsets: vec![0],
        topk: golden.setting("topk") as u32,
        phrase_width: golden.setting("answer_length") as u32,
        max_retained: 0,
    };
    let mut kept = Vec::new();
    for step in &steps {
        assert!(step.input_ids[..step.prefix] == *prefix && step.input_ids[step.context_end..] == *tail);
        let starts = step.sentence_starts.iter().copied();
        let starts: Vec<usize> = starts.filter(|start| (step.prefix..step.context_end).contains(start)).collect();
        assert_eq!(starts[0], step.prefix);
        let offset = plan.tokens.len();
        let first_sentence = plan.sentences() as u32;
        let id = |start: &usize| first_sentence + starts.binary_search(start).expect("a kept sentence starts") as u32;
        kept.push(step.kept_starts.iter().map(id).collect());
        plan.tokens.extend(&step.input_ids[step.prefix..step.context_end]);
        let ends = starts[1..].iter().chain([&step.context_end]);
        plan.sentence_offsets.extend(ends.map(|&end| (offset + end - step.prefix) as u32));
        plan.chunk_offsets.push(plan.sentences() as u32);
    }
    (plan, kept)
}

/// What each step of a plan by [`teacher_forced`] selects. `observe` gets the reports.
pub fn selected(
    reader: &dyn Reader,
    plan: &Plan,
    detail: Detail,
    observe: &mut dyn FnMut(&StepReport),
) -> Vec<BTreeSet<u32>> {
    let mut steps = Vec::new();
    let gleaned = reader.read_with(plan, detail, &mut |report| {
        observe(report);
        let dropped = report.dropped.iter();
        steps.push(dropped.filter(|entry| entry.1 == DropReason::MaxRetained).map(|entry| entry.0).collect());
        ControlFlow::Continue(())
    });
    assert!(gleaned.unwrap().kept.is_empty());
    steps
}

/// A tensor of fp32 values.
pub fn floats(tensors: &SafeTensors, name: &str) -> Vec<f32> {
    let tensor = tensors.tensor(name).unwrap();
    tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}
