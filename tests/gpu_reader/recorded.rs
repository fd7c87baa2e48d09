//! Each recorded step of the reference, read from the same input ids: `tests/teacher_forced.rs` on a GPU.

use std::collections::BTreeSet;

use gleaner::reader::Detail;
use serde_json::Value;

use super::common::{DEMO, Golden, golden_folder, root, selected, teacher_forced};
use super::cuda_reader;

/// Sentences that both keep, and the larger number of kept ones, over all steps.
fn common_and_kept(ours: &[BTreeSet<u32>], expected: &[BTreeSet<u32>]) -> (usize, usize) {
    assert_eq!(ours.len(), expected.len());
    let steps = || ours.iter().zip(expected);
    (steps().map(|(a, b)| a.intersection(b).count()).sum(), steps().map(|(a, b)| a.len().max(b.len())).sum())
}

/// The recordings are in fp32. How far bf16 leads away from them is a property of the model, which transformers in bf16
/// shows (`benches/reference_bf16.py`). It rounds more often than the kernels do, logits and sums over heads among others,
/// so that of all recordings together no more sentences may differ than there.
fn check(goldens: &[Golden]) {
    let path = root().join("tests/golden/bf16_agreement.json");
    let reference: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let reader = cuda_reader(DEMO.clone());
    let (mut differing, mut differing_in_reference) = (0, 0);
    for golden in goldens {
        let (plan, expected) = teacher_forced(golden);
        let (common, kept) = common_and_kept(&selected(&reader, &plan, Detail::Selection, &mut |_| ()), &expected);
        let recorded = &reference["recordings"][&golden.name];
        let number = |name: &str| recorded[name].as_u64().expect("benches/reference_bf16.py has recorded it") as usize;
        println!(
            "{}: {} steps, {:.1}% of the kept sentences in common with fp32; transformers in bf16 {:.1}%",
            golden.name,
            plan.chunks(),
            100.0 * common as f64 / kept as f64,
            100.0 * number("common") as f64 / number("kept") as f64
        );
        assert_eq!(number("steps"), plan.chunks());
        differing += kept - common;
        differing_in_reference += number("kept") - number("common");
    }
    println!("{differing} sentences differ, {differing_in_reference} with transformers in bf16");
    assert!(differing <= differing_in_reference, "{differing}, {differing_in_reference} in the reference");
}

#[test]
#[ignore = "needs a GPU"]
fn recorded_steps() {
    check(&Golden::all(&root().join("tests/golden")));
}

#[test]
#[ignore = "needs a GPU, and GLEANER_GOLDEN set to a folder of recorded reference runs"]
fn recorded_steps_of_the_environment() {
    check(&Golden::all(&golden_folder()));
}
