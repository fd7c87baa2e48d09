//! The CUDA reader against the fp32 reader, on a GPU: `cargo test --release --test gpu_reader -- --ignored`.
#![cfg(gleaner_cuda)]

mod checkpoints;
#[path = "../common/mod.rs"]
mod common;
mod embedding;
mod profile;
mod recorded;
mod runs;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::process::Command;
use std::sync::Arc;

use common::{DEMO, demo_dir, golden_folder, noise_plan, root, seeded_noise_plan, small_model};
use gleaner::cpu::CpuReader;
use gleaner::cuda::{CudaDevice, CudaReader};
use gleaner::model::Model;
use gleaner::plan::Plan;
use gleaner::reader::{Gleaned, Kept, Reader, Sampling};
use gleaner::{AskParams, Device, Document, Engine};
use serde_json::Value;

fn cuda_reader(model: Arc<Model>) -> CudaReader {
    CudaReader::new(CudaDevice::open(0).unwrap(), model).unwrap()
}

fn read(reader: &dyn Reader, plan: &Plan) -> Gleaned {
    reader.read(plan, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// The likeliest tokens behind `prompt`.
fn answer(reader: &dyn Reader, prompt: &[u32], max_new_tokens: usize) -> Vec<u32> {
    let greedy = Sampling { max_new_tokens, ..Sampling::default() };
    reader.answer(prompt, &greedy, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn ids(gleaned: &Gleaned) -> BTreeSet<u32> {
    gleaned.kept.iter().map(|kept| kept.sentence).collect()
}

fn share_in_common(a: &BTreeSet<u32>, b: &BTreeSet<u32>) -> f64 {
    a.intersection(b).count() as f64 / a.len().max(b.len()) as f64
}

/// The logits of these models' random weights reach about 15. Queries and keys rounded to bf16 move such a logit by up
/// to 15 * 2^-8 = 0.06 and its exponential by as much; the hidden states before them are rounded too. How far the worst of a
/// plan's scores goes depends on the plan: the median of many tells. The fp32 reader, with the kernels' roundings put in by
/// hand, had medians of 0.003 to 0.041 in as many plans, and was off by 0.23 at most: a fifth more is too much for any. Of a third
/// as many plans, whether ties are rounded to even or away from zero moved a median from 0.041 to 0.019, and that of yarn from
/// 0.054 to 0.044.
const SCORE_TOLERANCE: f32 = 0.06;
const WORST_SCORE_TOLERANCE: f32 = 0.28;
const PLANS: u32 = 21;

/// Logits of these models reach 8; a hidden state rounded to bf16 a few times on its way moves them by a few 2^-8 of that.
const LOGIT_TOLERANCE: f32 = 0.15;

fn median(mut values: Vec<f32>) -> f32 {
    values.sort_by(f32::total_cmp);
    values[values.len() / 2]
}

/// Steps of noise, and the first token of an answer.
fn check_against_fp32(name: &str, model: Arc<Model>) {
    let vocab_size = model.config.vocab_size;
    let ends = model.generation_config.eos_token_id.clone();
    let cuda = cuda_reader(model.clone());
    let cpu = CpuReader::new(model);
    let (mut common, mut worst) = (Vec::new(), Vec::new());
    for seed in 7..7 + PLANS {
        let plan = seeded_noise_plan(seed, vocab_size as u32, 10, 4096);
        let (ours, expected) = (read(&cuda, &plan), read(&cpu, &plan));
        let largest = expected.kept.iter().map(|kept| kept.score).fold(0.0, f32::max);
        common.push(share_in_common(&ids(&ours), &ids(&expected)) as f32);
        let off = |kept: &Kept| {
            let other = expected.kept.iter().find(|other| other.sentence == kept.sentence)?;
            Some((kept.score - other.score).abs() / largest)
        };
        worst.push(ours.kept.iter().filter_map(off).fold(0.0, f32::max));
        // The first token of an answer, one that ends it if there is none, is among those that bf16 cannot tell from the
        // likeliest.
        let prompt = &plan.tokens[..100];
        let (_, logits) = cpu.hidden_and_logits(prompt).unwrap();
        let logits = &logits[logits.len() - vocab_size..];
        let first = answer(&cuda, prompt, 1);
        let likeliest_of = |tokens: &[u32]| tokens.iter().map(|&token| logits[token as usize]).fold(f32::MIN, f32::max);
        let first = likeliest_of(if first.is_empty() { &ends } else { &first });
        let behind = logits.iter().copied().fold(f32::MIN, f32::max) - first;
        assert!(behind <= LOGIT_TOLERANCE, "{name}: the first token is {behind} behind the likeliest");
    }
    assert!(common.iter().all(|&share| share >= 0.6), "{name}: {common:?} in common");
    assert!(worst.iter().all(|&off| off <= WORST_SCORE_TOLERANCE), "{name}: {worst:?}");
    let (common, worst) = (median(common), median(worst));
    println!("{name}: {:.0}% in common, scores within {worst:.1e} of the largest, medians", common * 100.0);
    assert!(common >= 0.8, "{name}: {common}");
    assert!(worst <= SCORE_TOLERANCE, "{name}: {worst}");
}

#[test]
#[ignore = "needs a GPU"]
fn architectures_agree_with_the_fp32_reader() {
    for name in ["llama", "llama31_rope", "mistral", "mistral_sliding", "qwen2", "qwen3", "yarn"] {
        check_against_fp32(name, small_model(name));
    }
}

#[test]
#[ignore = "needs a GPU, and GLEANER_GOLDEN set to a folder with models in arch/"]
fn architectures_of_the_environment_agree_with_the_fp32_reader() {
    let mut folders: Vec<_> =
        std::fs::read_dir(golden_folder().join("arch")).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(!folders.is_empty());
    for folder in folders {
        check_against_fp32(&folder.display().to_string(), Arc::new(Model::open(&folder).unwrap()));
    }
}

/// Many steps, with and without the capacity rule; twice, to the bit.
#[test]
#[ignore = "needs a GPU"]
fn runs_repeat_to_the_bit() {
    let reader = cuda_reader(DEMO.clone());
    for max_retained in [150, 4096] {
        let plan = noise_plan(8000, 205, max_retained);
        let mut retained = Vec::new();
        let mut once = || {
            retained.clear();
            reader
                .read(&plan, &mut |report| {
                    retained.push(report.retained_tokens);
                    ControlFlow::Continue(())
                })
                .unwrap()
        };
        let first = once();
        assert_eq!(first, once());
        assert!(!first.kept.is_empty());
        assert_eq!(retained.len(), plan.chunks());
        assert!(retained.iter().all(|&tokens| tokens <= max_retained as usize));
        assert_eq!(first.dropped_for_capacity > 0, max_retained == 150);
        let answer = |seed| {
            let sampling = Sampling { max_new_tokens: 20, temperature: 1.0, seed, ..Sampling::default() };
            reader.answer(&plan.tokens[..300], &sampling, &mut |_| ControlFlow::Continue(())).unwrap()
        };
        assert_eq!(answer(1), answer(1));
    }
}

/// Long and short documents and questions by turns, on one reader: what each leaves on the device must not show in the
/// next, and a second round must find all the memory it needs.
#[test]
#[ignore = "needs a GPU"]
fn one_workspace_serves_documents_of_any_size() {
    let fresh = |plan: &Plan| read(&cuda_reader(DEMO.clone()), plan);
    let long = noise_plan(8000, 205, 2000);
    let short = noise_plan(8000, 12, 150);
    let long_question = Plan { tail: (0..300).collect(), ..short.clone() };
    let no_prefix = Plan { prefix: Vec::new(), topk: 5, ..long.clone() };
    let plans = [&short, &long, &long_question, &short, &no_prefix];
    let expected = plans.map(fresh);
    let reader = cuda_reader(DEMO.clone());
    let first = plans.map(|plan| read(&reader, plan));
    assert_eq!(first, expected);
    let observer = CudaDevice::open(0).unwrap();
    let free = observer.free_bytes().unwrap();
    assert_eq!(plans.map(|plan| read(&reader, plan)), expected);
    assert_eq!(observer.free_bytes().unwrap(), free, "the second round allocated or gave back");
}

/// Before anything is allocated, with both figures and what to do.
#[test]
#[ignore = "needs a GPU"]
fn too_little_memory_is_said_beforehand() {
    let device = CudaDevice::open(0).unwrap();
    let free = device.free_bytes().unwrap();
    assert!(device.check_free(free / 2, "the weights", "free some").is_ok());
    let error = device.check_free(1 << 50, "the weights", "free some").unwrap_err();
    assert!(matches!(error, gleaner::Error::Device(_)));
    let message = error.to_string();
    for word in ["MiB of memory free", "the weights take 1073741824 MiB", "free some", "--device cpu"] {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
    // A document whose steps alone would take terabytes: refused, and the reader goes on.
    let reader = CudaReader::new(device, DEMO.clone()).unwrap();
    let plan = noise_plan(8000, 40, 150);
    let huge = Plan { tail: vec![1; 200_000], question_start: 0, ..plan.clone() };
    let error = reader.read(&huge, &mut |_| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(error.contains("shorten the question"), "{error}");
    assert!(!read(&reader, &plan).kept.is_empty());
}

#[test]
#[ignore = "needs a GPU"]
fn info_lists_memory_by_what_it_is_for() {
    let info = Command::new(env!("CARGO_BIN_EXE_gleaner"))
        .args(["info", "--device", "cuda", "--tokens", "50000"])
        .output()
        .unwrap();
    let out = String::from_utf8(info.stdout).unwrap();
    println!("{out}");
    for word in
        ["on the GPU", "50000 tokens", "MiB activations", "MiB scoring", "MiB plan and log", "MiB answer", "in all"]
    {
        assert!(out.contains(word), "{word:?} is not in: {out}");
    }
}

/// A million tokens: the almanac over and over, and one sentence that is in it once. Its like must not be in the
/// almanac: 68 copies of another capital or password would take the places of the best tokens.
#[test]
#[ignore = "needs a GPU"]
fn a_needle_is_found_in_a_million_tokens() {
    let almanac = std::fs::read_to_string(root().join("examples/almanac.txt")).unwrap();
    let engine = Engine::open(demo_dir(), Device::Cuda(0)).unwrap();
    let text = almanac.repeat(68);
    for depth in 0..10 {
        let at = text[..text.len() * depth / 9].rfind(". ").map_or(0, |at| at + 1);
        let haystack = [&text[..at], " The wizard's telephone number is 4827.", &text[at..]].concat();
        let document = Document::new("haystack", haystack).unwrap();
        let answer = engine.ask(&document, "What is the wizard's telephone number?", &AskParams::default()).unwrap();
        let timing = &answer.timing_ms;
        println!(
            "depth {depth}/9: {:?}; {} tokens, {} steps; plan {:.0} ms, read {:.0} ms, answer {:.0} ms",
            answer.answer, answer.document.tokens, answer.steps, timing.plan, timing.read, timing.answer
        );
        assert_eq!(answer.answer, "4827", "depth {depth}/9");
    }
}

/// The fp32 reader keeps the evidence for all 60 and gets 58 right. With the kernels' roundings to bf16 put into it by hand it
/// got 55 to 59, depending on where they were put: which of the close ones are lost is chance.
#[test]
#[ignore = "needs a GPU"]
fn the_almanac_answers_its_questions_as_on_the_cpu() {
    const MUST_BE_RIGHT: usize = 55;
    const MUST_BE_KEPT: usize = 58;
    let questions = std::fs::read_to_string(root().join("examples/almanac-qa.jsonl")).unwrap();
    let document = Document::open(root().join("examples/almanac.txt")).unwrap();
    let cuda = Engine::open(demo_dir(), Device::Cuda(0)).unwrap();
    let cpu = Engine::open(demo_dir(), Device::Cpu).unwrap();
    let (mut right, mut evidence_kept, mut read_ms, mut answer_ms) = (0, 0, 0.0, 0.0);
    for (index, line) in questions.lines().enumerate() {
        let question: Value = serde_json::from_str(line).unwrap();
        let texts = |name: &str| -> Vec<String> {
            question[name].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_lowercase()).collect()
        };
        let asked = question["question"].as_str().unwrap();
        let answer = cuda.ask(&document, asked, &AskParams::default()).unwrap();
        let kept = |evidence: &String| answer.evidence.iter().any(|kept| kept.text.to_lowercase().contains(evidence));
        let is_kept = texts("evidence").iter().all(kept);
        let is_right = texts("answers").iter().any(|expected| answer.answer.to_lowercase().contains(expected));
        evidence_kept += is_kept as usize;
        right += is_right as usize;
        if !is_right {
            println!("wrong: {asked} {:?}, evidence kept: {is_kept}", answer.answer);
        }
        if index > 0 {
            read_ms += answer.timing_ms.read / 59.0;
            answer_ms += answer.timing_ms.answer / 59.0;
        }
        if index % 12 == 0 {
            let expected = cpu.ask(&document, asked, &AskParams::default()).unwrap();
            let starts = |answer: &gleaner::Answer| answer.evidence.iter().map(|e| e.start as u32).collect();
            let common = share_in_common(&starts(&answer), &starts(&expected));
            println!("{asked} {:?}, {:.0}% of the evidence in common with the CPU", answer.answer, common * 100.0);
        }
    }
    println!(
        "{right} of 60 right, evidence kept for {evidence_kept}; {read_ms:.1} ms to read 16 chunks, {answer_ms:.1} ms to \
         answer, means"
    );
    assert!(right >= MUST_BE_RIGHT, "{right} right");
    assert!(evidence_kept >= MUST_BE_KEPT, "{evidence_kept} kept");
}
