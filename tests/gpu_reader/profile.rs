//! What a profile of the GPU says: every launch, the work of the plan, times near those of a run, and nothing disturbed.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::process::Command;
use std::sync::Arc;

use gleaner::cuda::CudaDevice;
use gleaner::model::Model;
use gleaner::plan::Plan;
use gleaner::reader::{Reader, Sampling};
use gleaner::timings::{Operation, Stage};
use gleaner::{Answer, AskParams, Device, Document, Engine};

use super::common::{demo_dir, noise_plan, root};
use super::{answer, cuda_reader, read};

const NEW_TOKENS: usize = 8;

fn profile(reader: &dyn Reader, plan: &Plan, prompt: &[u32]) -> Vec<Operation> {
    let sampling = Sampling { max_new_tokens: NEW_TOKENS, ..Sampling::default() };
    let profile = reader.profile(plan, prompt, &sampling).unwrap();
    let empty = profile.empty_launch_us.unwrap();
    assert!((0.1..100.0).contains(&empty), "a launch of nothing takes {empty} us");
    profile.operations
}

/// The calls that the passes make in models of so many layers, with or without head norms, a new row in three kernels or five
/// a layer.
fn expected_calls(
    layers: u64,
    head_norms: bool,
    in_three: bool,
    steps: u64,
    tokens: u64,
) -> BTreeMap<(&'static str, &'static str), u64> {
    let full = layers - 1;
    let mut calls = BTreeMap::from([
        (("read", "start"), 1),
        (("read", "embed"), steps),
        (("read", "gemm_rope k"), steps),
        (("read", "gemm_rope q"), steps),
        (("read", "question_logits"), steps),
        (("read", "question_scores"), steps),
        (("read", "select"), steps),
        (("prefill", "embed"), 1),
        (("prefill", "stream_row"), 1),
        (("prefill", "gemv_logits"), 1),
        (("prefill", "sample"), 1),
        (("decode", "gemv_logits"), tokens),
        (("decode", "sample"), tokens),
    ]);
    for name in ["gemm_rope qkv", "attention", "gemm_residual o", "gemm_swiglu gate_up", "gemm_residual down"] {
        calls.extend([(("read", name), steps * full), (("prefill", name), layers)]);
    }
    let names: &[_] = match in_three {
        true => &["row_qkv qkv", "row_attention", "row_mlp"],
        false => &["gemv_rope qkv", "decode_attention", "gemv_residual o", "gemv_swiglu gate_up", "gemv_residual down"],
    };
    calls.extend(names.iter().map(|name| (("decode", *name), tokens * layers)));
    if in_three {
        calls.extend([(("decode", "row_start"), tokens), (("decode", "row_end"), tokens)]);
    }
    if head_norms {
        calls.insert(("read", "head_norm"), steps * (full + 2));
        calls.insert(("prefill", "head_norm"), layers);
        calls.insert(("decode", "head_norm"), tokens * layers);
    }
    calls
}

/// Every launch is timed once, the FLOPs of the steps are those of the configuration, and a run behind a profile is the
/// run before it.
#[test]
#[ignore = "needs a GPU"]
fn profiles_cover_every_launch_and_change_nothing() {
    let arch = root().join("tests/golden/arch");
    for folder in [arch.join("qwen3"), arch.join("llama"), arch.join("mistral_sliding"), demo_dir()] {
        let mut model = Model::open(folder).unwrap();
        // Without end tokens an answer is as long as it is asked to be.
        model.generation_config.eos_token_id.clear();
        let config = model.config.clone();
        let model = Arc::new(model);
        let plan = noise_plan(config.vocab_size as u32, 95, 200);
        let prompt = &plan.tokens[..60];
        let reader = cuda_reader(model.clone());
        let before = (read(&reader, &plan), answer(&reader, prompt, NEW_TOKENS));
        let operations = profile(&reader, &plan, prompt);
        assert_eq!((read(&reader, &plan), answer(&reader, prompt, NEW_TOKENS)), before);

        let calls: BTreeMap<_, _> = operations
            .iter()
            .map(|operation| ((operation.stage.name(), operation.name.as_str()), operation.calls))
            .collect();
        let head_norms = model.layers[0].q_norm.is_some();
        let in_three =
            CudaDevice::open(0).unwrap().has_row_kernels(config.hidden_size, config.intermediate_size, config.head_dim);
        let [layers, steps, tokens] =
            [config.num_hidden_layers, plan.chunks(), NEW_TOKENS - 1].map(|count| count as u64);
        let expected = expected_calls(layers, head_norms, in_three, steps, tokens);
        assert_eq!(calls, expected, "{:?}", config.architecture);

        let mut flops = 0;
        let question_rows = plan.shape().question_rows;
        let mut observe = |report: &gleaner::reader::StepReport| {
            // Less what the rows that were taken over would have cost.
            flops += config.step_flops(report.tokens, question_rows) - config.step_flops(report.reused_tokens, 0);
            ControlFlow::Continue(())
        };
        reader.read(&plan, &mut observe).unwrap();
        let of_steps = operations.iter().filter(|operation| operation.stage == Stage::Read);
        assert_eq!(of_steps.map(|operation| operation.flops).sum::<u64>(), flops, "{:?}", config.architecture);
        assert!(operations.iter().all(|operation| operation.ms > 0.0 && operation.ms < 1e3), "{operations:?}");
    }
}

/// Kernels one by one, each with what a launch costs, against the same kernels in a graph.
#[test]
#[ignore = "needs a GPU"]
fn kernels_of_the_almanac_take_about_as_long_as_its_steps() {
    let document = Document::open(root().join("examples/almanac.txt")).unwrap();
    let engine = Engine::open(demo_dir(), Device::Cuda(0)).unwrap();
    let params = AskParams { timings: true, ..AskParams::default() };
    // The first run loads the kernels.
    let runs = [(); 2].map(|()| engine.ask(&document, "When was the railway opened?", &params).unwrap());
    let timings = runs[1].timings.as_ref().unwrap();
    let stages: Vec<&str> = timings.stages.iter().map(|stage| stage.stage.name()).collect();
    assert_eq!(stages, ["open", "upload", "plan", "read", "prefill", "decode"]);
    let wall = timings.stages[3].ms;
    let of_steps = timings.operations.iter().filter(|operation| operation.stage == Stage::Read);
    let kernels: f64 = of_steps.map(|operation| operation.ms).sum();
    println!("{wall:.3} ms to read, {kernels:.3} ms of kernels one by one");
    assert!((0.5..2.0).contains(&(kernels / wall)), "{kernels} of {wall} ms");
    for operation in timings.operations.iter().filter(|operation| operation.bytes > 0) {
        // Without cuBLASLt there is no ceiling, and a warning.
        assert!(operation.share_of_best.is_some() || !runs[1].warnings.is_empty(), "{operation:?}");
        assert!(
            operation.share_of_best.is_none_or(|share| share < 2.0),
            "no kernel is twice as fast as what is possible: {operation:?}"
        );
    }
}

#[test]
#[ignore = "needs a GPU"]
fn the_almanac_reads_the_same_without_graphs() {
    let ask = |extra: &[&str]| -> Answer {
        let output = Command::new(env!("CARGO_BIN_EXE_gleaner"))
            .args(["ask", "--json", "--device", "cuda", "--doc", "examples/almanac.txt"])
            .args(["When was the railway opened?"])
            .args(extra)
            .current_dir(root())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (replayed, eager) = (ask(&[]), ask(&["--profile-eager"]));
    assert_eq!((replayed.answer, replayed.evidence), (eager.answer, eager.evidence));
}
