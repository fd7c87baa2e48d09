//! Models written by the tests: the same numbers stored in other types, and a weight that is not a number.

use std::fs;
use std::ops::ControlFlow;
use std::sync::Arc;

use gleaner::Error;
use gleaner::model::Model;
use gleaner::plan::Plan;
use gleaner::reader::{Reader, Sampling};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::common::{noise_plan, root};
use super::{answer, cuda_reader, read};

fn stored(value: f32, dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::F16 => {
            assert!(f16::from_f32(value).to_f32() == value, "{value:e} is no F16 number");
            f16::from_f32(value).to_le_bytes().to_vec()
        }
        Dtype::F32 => value.to_le_bytes().to_vec(),
        other => panic!("no test for {other:?}"),
    }
}

/// A small model of the tests, its weights changed by `edit` and stored as `dtype`.
fn rewritten(name: &str, dtype: Dtype, edit: impl Fn(&str, &mut [f32])) -> Arc<Model> {
    let from = root().join("tests/golden/arch").join(name);
    let to = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json"] {
        fs::copy(from.join(file), to.path().join(file)).unwrap();
    }
    let bytes = fs::read(from.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            assert_eq!(tensor.dtype(), Dtype::BF16);
            let values = tensor.data().as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32());
            let mut values: Vec<f32> = values.collect();
            edit(name, &mut values);
            let data = values.into_iter().flat_map(|value| stored(value, dtype)).collect();
            (name.to_owned(), tensor.shape().to_vec(), data)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, data)| {
        let view = TensorView::new(dtype, shape.clone(), data).unwrap();
        (name.as_str(), view)
    });
    safetensors::serialize_to_file(views, None, &to.path().join("model.safetensors")).unwrap();
    // The files stay mapped when the folder is gone.
    Arc::new(Model::open(to.path()).unwrap())
}

/// fp32 holds every bf16 number. F16 holds those of magnitude 2^-17 to 65504: its smallest step is 2^-24, and bf16
/// has 7 bits behind the leading one. Smaller weights are set to zero in all three files, which then hold the same numbers,
/// so that nothing may differ.
#[test]
#[ignore = "needs a GPU"]
fn f16_and_f32_checkpoints_read_as_bf16_ones() {
    let tiny = 2f32.powi(-17);
    let flush = |_: &str, values: &mut [f32]| {
        values.iter_mut().filter(|value| value.abs() < tiny).for_each(|value| *value = 0.0);
    };
    for name in ["qwen2", "qwen3", "llama"] {
        let plan = noise_plan(256, 40, 150);
        let results = [Dtype::BF16, Dtype::F16, Dtype::F32].map(|dtype| {
            let reader = cuda_reader(rewritten(name, dtype, flush));
            (read(&reader, &plan), answer(&reader, &plan.tokens[..60], 10))
        });
        assert!(!results[0].0.kept.is_empty());
        assert_eq!(results[0], results[1], "{name} in F16");
        assert_eq!(results[0], results[2], "{name} in F32");
    }
}

/// The token whose embedding is not a number.
const BROKEN: u32 = 7;

fn without_broken(mut plan: Plan) -> Plan {
    for token in plan.prefix.iter_mut().chain(&mut plan.tail).chain(&mut plan.tokens) {
        *token += (*token == BROKEN) as u32;
    }
    plan
}

/// Each way to fail, and behind each the same result as on a reader that has never failed.
#[test]
#[ignore = "needs a GPU"]
fn a_failed_run_leaves_the_reader_usable() {
    // The embedding is not the output head in this architecture.
    let model = rewritten("llama", Dtype::BF16, |name, values| {
        if name == "model.embed_tokens.weight" {
            let width = values.len() / 256;
            values[BROKEN as usize * width..(BROKEN as usize + 1) * width].fill(f32::NAN);
        }
    });
    let plan = without_broken(noise_plan(256, 60, 150));
    let prompt = &plan.tokens[..40];
    let fresh = cuda_reader(model.clone());
    let expected = (read(&fresh, &plan), answer(&fresh, prompt, 10));
    assert!(!expected.0.kept.is_empty());

    let reader = cuda_reader(model);
    let check = || assert_eq!((read(&reader, &plan), answer(&reader, prompt, 10)), expected);
    let go_on = &mut |_: &_| ControlFlow::Continue(());
    for step in [0, 1, 4] {
        let mut broken = plan.clone();
        broken.tokens[plan.sentence_offsets[plan.chunk(step).start as usize] as usize] = BROKEN;
        let result = reader.read(&broken, go_on);
        assert!(matches!(result, Err(Error::NotFinite { step: at }) if at == step), "{step}: {result:?}");
        check();
    }

    let mut refused = plan.clone();
    refused.tokens[0] = 256;
    assert!(matches!(reader.read(&refused, go_on), Err(Error::Plan(_))));
    check();
    let cancelled = reader.read(&plan, &mut |report| match report.step {
        0 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    });
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    check();

    let ask = |prompt: &[u32]| reader.answer(prompt, &Sampling::default(), &mut |_| ControlFlow::Continue(()));
    assert!(matches!(ask(&[1, BROKEN, 2]), Err(Error::NotFinite { .. })));
    check();
    assert!(matches!(ask(&[]), Err(Error::Plan(_))));
    assert!(matches!(ask(&[256]), Err(Error::Plan(_))));
    check();
}
