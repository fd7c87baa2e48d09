//! Each recorded step of the reference (infini-retri 0.0.3, fp32), read by the CPU reader from the same input ids.

mod common;

use common::{Golden, GoldenStep, demo_reader, golden_folder, root, selected, teacher_forced};
use gleaner::cpu::CpuReader;
use gleaner::reader::Detail;

/// Scores may differ by this share of the step's largest: both sides sum the same products in fp32, in another order.
const SCORE_TOLERANCE: f64 = 1e-4;

fn check_step(reader: &CpuReader, golden: &Golden, index: usize, step: &GoldenStep, weights: &mut Vec<f32>) -> f64 {
    let name = format!("{} step {index}", golden.name);
    let ours = reader
        .score_step(
            &step.input_ids,
            step.prefix..step.context_end,
            step.question_start,
            golden.setting("answer_length"),
            golden.setting("topk"),
            weights,
        )
        .unwrap();
    let largest = step.scores.iter().copied().fold(0.0, f64::max);
    let tolerance = SCORE_TOLERANCE * largest;
    assert_eq!(ours.scores.len(), step.scores.len(), "{name}");
    let worst = ours.scores.iter().zip(&step.scores).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst <= tolerance, "{name}: a score is off by {:e} of the largest", worst / largest);

    let mut selected: Vec<usize> = ours.selected.iter().map(|c| c + step.prefix).collect();
    selected.sort_unstable();
    let mut expected = step.selected.clone();
    expected.sort_unstable();
    let threshold = expected.iter().map(|&c| step.scores[c - step.prefix]).fold(f64::INFINITY, f64::min);
    let only_one =
        selected.iter().filter(|c| !expected.contains(c)).chain(expected.iter().filter(|c| !selected.contains(c)));
    for &c in only_one {
        let distance = (step.scores[c - step.prefix] - threshold).abs();
        assert!(distance <= tolerance, "{name}: token {c} is no tie, {:e} of the largest", distance / largest);
    }

    let starts = &step.sentence_starts;
    let owners = selected.iter().map(|&c| starts[starts.partition_point(|&start| start <= c) - 1]);
    let mut kept: Vec<usize> = owners.collect();
    kept.dedup();
    assert_eq!(kept, step.kept_starts, "{name}: kept sentences");
    worst / largest
}

fn check(golden: &Golden) {
    let reader = demo_reader();
    let mut weights = Vec::new();
    let steps = golden.steps();
    let errors = steps.iter().enumerate().map(|(index, step)| check_step(&reader, golden, index, step, &mut weights));
    let worst = errors.fold(0.0, f64::max);
    println!("{}: {} steps, worst score error {worst:.1e} of the largest", golden.name, steps.len());
}

#[test]
fn committed_goldens() {
    Golden::all(&root().join("tests/golden")).iter().for_each(check);
}

/// The same steps as one plan, through all of the reader: what the GPU's test relies on. The scores that it gives on
/// request are the recorded ones.
#[test]
fn a_recorded_run_as_a_plan() {
    let golden = Golden::open(&root().join("tests/golden/almanac_narrow.safetensors"));
    let (plan, kept) = teacher_forced(&golden);
    let mut scores = Vec::new();
    assert_eq!(selected(&demo_reader(), &plan, Detail::Scores, &mut |step| scores.push(step.scores.clone())), kept);
    for (ours, step) in scores.iter().zip(golden.steps()) {
        let largest = step.scores.iter().copied().fold(0.0, f64::max);
        let worst = ours.iter().zip(&step.scores).map(|(&a, b)| (a as f64 - b).abs()).fold(0.0, f64::max);
        assert_eq!(ours.len(), step.scores.len());
        assert!(worst <= SCORE_TOLERANCE * largest, "off by {worst} of {largest}");
    }
}

#[test]
#[ignore = "set GLEANER_GOLDEN to a folder of recorded reference runs"]
fn goldens_of_the_environment() {
    Golden::all(&golden_folder()).iter().for_each(check);
}
