//! From the last layer's queries and keys to the scores of the context's tokens.

use gleaner::cuda::ops::{DevicePlan, Heads, StepBuffers};
use gleaner::plan::Plan;
use half::bf16;
use rayon::prelude::*;

use super::{FP32_ROUNDING, Gpu, JUNK_ROWS, check_within, scaled_noise, to_f32};

const PREFIX: usize = 11;
/// Tokens between the context and the first question row.
const BEFORE_QUESTION: usize = 3;

/// Two chunks, the second longer than the first, and so many question rows.
fn plan(question_rows: usize) -> Plan {
    let lengths = [&[7; 20][..], &[1, 30, 64, 19, 200, 5, 5]].concat();
    let sentence_offsets: Vec<u32> = [0]
        .into_iter()
        .chain(lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        }))
        .collect();
    Plan {
        prefix: vec![1; PREFIX],
        tail: vec![2; BEFORE_QUESTION + question_rows],
        question_start: BEFORE_QUESTION as u32,
        tokens: vec![3; *sentence_offsets.last().unwrap() as usize],
        sentence_offsets,
        chunk_offsets: vec![0, 20, 27],
        topk: 5,
        phrase_width: 4,
        max_retained: 60,
    }
}

/// Probabilities of the question rows, summed over heads, `[rows, tokens]`; and the bound of their relative error.
///
/// A logit is a sum of `dim` exact products in fp32: off by `dim + 2` roundings of the sum of their magnitudes, M at
/// most, and by fewer where 16 are added at a time. Its difference to a maximum is off by one rounding of at most 2 M,
/// and an exponential by as much as its argument and 2 units, 4 roundings. A probability is the quotient of such an
/// exponential and of a sum of such, which passes through up to three exponentials and a few dozen additions; over heads
/// come as many additions again.
fn head_sums(q: &[f32], k: &[f32], heads: Heads, rows: usize, tokens: usize) -> (Vec<f64>, f64) {
    let Heads { q: num_heads, kv, dim, window } = heads;
    let mut sums = vec![0.0; rows * tokens];
    let largest = sums.par_chunks_mut(tokens).enumerate().map(|(row, sums)| {
        let position = tokens - rows + row;
        let first = if window > 0 { (position + 1).saturating_sub(window) } else { 0 };
        let mut largest = 0.0f64;
        for head in 0..num_heads {
            let query = &q[(row * num_heads + head) * dim..][..dim];
            let logits = (first..=position).map(|key| {
                let key = &k[(key * kv + head / (num_heads / kv)) * dim..][..dim];
                let terms = query.iter().zip(key).map(|(a, b)| (a * b) as f64);
                let (sum, magnitude) = terms.fold((0.0, 0.0), |(s, m), term| (s + term, m + term.abs()));
                largest = largest.max(magnitude / (dim as f64).sqrt());
                sum / (dim as f64).sqrt()
            });
            let logits: Vec<f64> = logits.collect();
            let max = logits.iter().copied().fold(f64::MIN, f64::max);
            let total: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
            for (sum, logit) in sums[first..].iter_mut().zip(&logits) {
                *sum += (logit - max).exp() / total;
            }
        }
        largest
    });
    let largest = largest.reduce(|| 0.0, f64::max);
    let exponential = (dim + 2) as f64 * largest + 2.0 * largest + 4.0;
    let additions = 40.0 + num_heads as f64;
    (sums, (exponential + 3.0 * exponential + additions) * FP32_ROUNDING)
}

fn check_steps(gpu: &Gpu, heads: Heads, question_rows: usize) -> f64 {
    let plan = plan(question_rows);
    let tables = DevicePlan::new(&gpu.device, &plan).unwrap();
    let mut steps = StepBuffers::new(&gpu.device, &plan, heads, false).unwrap();
    gpu.device.start(&mut steps, &tables).unwrap();
    let (mut weights, mut worst) = (Vec::new(), 0.0f64);
    for step in 0..2 {
        let (rows, first) = (steps.rows(), steps.question_start());
        let ints = gpu.fetch(rows.ints);
        let (max_tokens, tokens, question_start) = (rows.max, ints[rows.index] as usize, ints[first.index] as usize);
        assert!(tokens < max_tokens && tokens - question_start == question_rows);
        let context = PREFIX..question_start - BEFORE_QUESTION;
        let seed = step as u64 * 2 + 20;
        // Queries and keys so large that probabilities spread over decades.
        let q = scaled_noise(question_rows * heads.q * heads.dim, seed, 3.0);
        let k = scaled_noise(tokens * heads.kv * heads.dim, seed + 1, 3.0);
        let (sums, relative) = head_sums(&to_f32(&q), &to_f32(&k), heads, question_rows, tokens);

        let junk = vec![f64::NAN; max_tokens];
        gpu.device.stream().memcpy_htod(&junk, &mut steps.scores_mut()).unwrap();
        let q_gpu = gpu.with_junk(&q, heads.q * heads.dim);
        let k_junk = vec![bf16::NAN; (max_tokens - tokens + JUNK_ROWS) * heads.kv * heads.dim];
        let k_gpu = gpu.upload(&[&k[..], &k_junk].concat());
        gpu.device.question_scores(&mut steps, &q_gpu, &k_gpu, heads).unwrap();

        let Heads { q, kv, dim, window } = heads;
        let op = format!("step {step} of {question_rows} rows, {q} of {kv} heads of {dim}, window {window}");
        let out = gpu.fetch(steps.head_sums());
        for (row, (out, expected)) in out.chunks(max_tokens).zip(sums.chunks(tokens)).enumerate() {
            let live: Vec<f64> = out[..tokens].iter().map(|&sum| sum as f64).collect();
            let op = format!("head sums of row {row}, {op}");
            worst = worst.max(check_within(&live, expected, |i| expected[i] * relative, &op));
            // The second step is the longer one.
            assert!(out[tokens..].iter().all(|&sum| sum == 0.0), "{op} wrote behind its columns");
        }

        let columns = question_start..tokens;
        let question_sums = sums.chunks(tokens).map(|row| row[columns.clone()].iter().sum::<f64>());
        if step == 0 {
            weights = question_sums.collect();
        } else {
            // Otherwise weights taken anew would pass for those of the first step.
            assert!(question_sums.zip(&weights).any(|(now, first)| (now / first - 1.0).abs() > 0.01), "{op}");
        }
        let score = |c: usize| -> f64 {
            let rows = sums.chunks(tokens).zip(&weights);
            rows.map(|(row, weight): (_, &f64)| weight * weight * row[context.start + c]).sum()
        };
        let expected: Vec<f64> = (0..context.len()).map(score).collect();
        // A score has three head sums' errors; a weight adds up to `question_rows` columns, twice.
        let relative = 3.0 * relative + 2.0 * question_rows as f64 * FP32_ROUNDING;
        let scores = gpu.fetch(steps.scores());
        let op = format!("scores, {op}");
        worst = worst.max(check_within(&scores[..context.len()], &expected, |i| expected[i] * relative, &op));
        assert!(scores[context.len()..].iter().all(|score| score.is_nan()), "{op}: wrote behind the context");
        gpu.device.select(&mut steps, &tables).unwrap();
    }
    worst
}

#[test]
#[ignore = "needs a GPU"]
fn question_scores() {
    let gpu = Gpu::open();
    let mut worst = 0.0f64;
    for (q, kv) in [(3, 3), (4, 2), (14, 2)] {
        for (dim, window) in [(64, 0), (128, 0), (64, 37), (128, 200)] {
            for question_rows in [1, 5, 48, 130] {
                worst = worst.max(check_steps(&gpu, Heads { q, kv, dim, window }, question_rows));
            }
        }
    }
    println!("question scores: worst error {worst:.2} of the bound");
}
