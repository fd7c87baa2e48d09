//! What a profile of the fp32 reader says.

mod common;

use std::ops::ControlFlow;

use common::{noise_plan, small_model};
use gleaner::cpu::CpuReader;
use gleaner::reader::{Reader, Sampling};
use gleaner::timings::Stage;

/// The FLOPs of the steps are those that the configuration counts, and every layer is in.
#[test]
fn a_profile_holds_the_work_of_its_steps() {
    for name in ["qwen3", "mistral_sliding"] {
        let model = small_model(name);
        let config = model.config.clone();
        let reader = CpuReader::new(model);
        let plan = noise_plan(config.vocab_size as u32, 40, 150);
        let mut flops = 0;
        let mut steps = 0;
        reader
            .read(&plan, &mut |report| {
                steps += 1;
                // Less what the rows that were taken over would have cost.
                flops += config.step_flops(report.tokens, plan.shape().question_rows);
                flops -= config.step_flops(report.reused_tokens, 0);
                ControlFlow::Continue(())
            })
            .unwrap();
        let sampling = Sampling { max_new_tokens: 4, ..Sampling::default() };
        let profile = reader.profile(&plan, &plan.tokens[..50], &sampling).unwrap();
        let of_stage = |stage| profile.operations.iter().filter(move |operation| operation.stage == stage);
        assert_eq!(of_stage(Stage::Read).map(|operation| operation.flops).sum::<u64>(), flops, "{name}");
        let calls = |stage, name| of_stage(stage).find(|operation| operation.name == name).map(|found| found.calls);
        let layers = config.num_hidden_layers as u64;
        assert_eq!(calls(Stage::Read, "attention"), Some(steps * (layers - 1)));
        assert_eq!(calls(Stage::Read, "product q"), Some(steps * layers));
        assert_eq!(calls(Stage::Read, "select"), Some(steps));
        assert_eq!(calls(Stage::Prefill, "attention"), Some(layers));
        assert_eq!(calls(Stage::Prefill, "sample"), Some(1));
        assert_eq!(calls(Stage::Decode, "product logits"), calls(Stage::Decode, "sample"));
        assert!(profile.operations.iter().all(|operation| operation.ms > 0.0));
    }
}
