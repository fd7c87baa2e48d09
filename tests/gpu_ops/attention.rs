//! Attention over a prompt, and of one new row over a cache.

use gleaner::cuda::ops::{AttentionParts, Heads};
use half::bf16;
use rayon::prelude::*;

use super::{BF16_ROUNDING, Gpu, READING_LENGTHS, check, check_within, scaled_noise, to_f32};

/// `softmax(q k^T / sqrt(dim)) v` of every row, and what each element may be off by: probabilities are rounded to bf16
/// before they meet the values, each off by 2^-8 of itself, so the sum by 2^-8 of the sum of their products' magnitudes;
/// then comes one more rounding. Logits are off by fp32 rounding alone.
pub fn definition(qkv: &[f32], heads: Heads, rows: usize) -> (Vec<f64>, Vec<f64>) {
    let Heads { q, kv, dim, window } = heads;
    let width = heads.qkv_columns();
    let (mut expected, mut allowed) = (vec![0.0; rows * q * dim], vec![0.0; rows * q * dim]);
    let outputs = expected.par_chunks_mut(dim).zip(allowed.par_chunks_mut(dim)).enumerate();
    outputs.for_each(|(index, (expected, allowed))| {
        let (row, head) = (index / q, index % q);
        let first = if window > 0 { (row + 1).saturating_sub(window) } else { 0 };
        let part = |row: usize, head: usize| &qkv[row * width + head * dim..row * width + (head + 1) * dim];
        let (k, v) = (q + head / (q / kv), q + kv + head / (q / kv));
        let query = part(row, head);
        let logit = |key: usize| -> f64 {
            let terms = query.iter().zip(part(key, k)).map(|(a, b)| (a * b) as f64);
            terms.sum::<f64>() / (dim as f64).sqrt()
        };
        let logits: Vec<f64> = (first..=row).map(logit).collect();
        let max = logits.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
        for (key, logit) in (first..=row).zip(&logits) {
            let probability = (logit - max).exp() / total;
            for ((sum, magnitude), v) in expected.iter_mut().zip(allowed.iter_mut()).zip(part(key, v)) {
                *sum += probability * *v as f64;
                *magnitude += probability * v.abs() as f64;
            }
        }
        for (sum, allowed) in expected.iter().zip(allowed) {
            *allowed = (*allowed + sum.abs()) * BF16_ROUNDING * 1.02 + 1e-5;
        }
    });
    (expected, allowed)
}

/// Both kernels on noise; the second on the last row.
fn check_attention(gpu: &mut Gpu, heads: Heads, rows: usize) -> f64 {
    check_attention_to(gpu, heads, rows, &scaled_noise(rows * heads.qkv_columns(), 9, 2.0))
}

fn check_attention_to(gpu: &mut Gpu, heads: Heads, rows: usize, qkv: &[bf16]) -> f64 {
    let Heads { q, kv, dim, window } = heads;
    let width = heads.qkv_columns();
    let (expected, allowed) = definition(&to_f32(qkv), heads, rows);

    gpu.set(rows, [0, 0]);
    let mut out = gpu.canaries(rows, q * dim);
    let qkv_gpu = gpu.with_junk(qkv, width);
    gpu.device.attention(&mut out, &qkv_gpu, heads, gpu.rows(rows), None).unwrap();
    let op = format!("attention [{rows}, {q} of {kv} heads of {dim}, window {window}]");
    let worst = check_within(&gpu.download(&out, rows * q * dim, &op), &expected, |i| allowed[i], &op);

    gpu.set(1, [rows - 1, 0]);
    let mut out = gpu.canaries(1, q * dim);
    let mut parts = AttentionParts::new(&gpu.device, heads).unwrap();
    gpu.device.decode_attention(&mut out, &mut parts, &qkv_gpu, heads, gpu.shift(0)).unwrap();
    let last = (rows - 1) * q * dim;
    let op = format!("decode_{op}");
    worst.max(check(&gpu.download(&out, q * dim, &op), &expected[last..], &op))
}

#[test]
#[ignore = "needs a GPU"]
fn attention() {
    let mut gpu = Gpu::open();
    let mut worst = 0.0f64;
    for (q, kv, dim, window) in
        [(6, 2, 64, 0), (8, 1, 64, 0), (3, 3, 128, 0), (4, 2, 128, 100), (2, 1, 64, 5), (2, 1, 64, 64)]
    {
        for rows in [1, 63, 64, 65, 129, 400] {
            worst = worst.max(check_attention(&mut gpu, Heads { q, kv, dim, window }, rows));
        }
    }
    println!("attention: worst error {worst:.2} of the bound");
}

/// Rows from a later one on come out as they do with all rows, to the bit, and where the output starts.
#[test]
#[ignore = "needs a GPU"]
fn attention_of_later_rows_alone() {
    for portable in [false, true] {
        let mut gpu = Gpu::open();
        if portable {
            gpu.device.run_portable_kernels();
        }
        let shapes = [
            (6, 2, 64, 0),
            (4, 2, 128, 0),
            (4, 2, 64, 300),
            (4, 2, 128, 300),
            (14, 2, 64, 0),
            (36, 4, 64, 0),
            (36, 4, 64, 300),
        ];
        for heads in shapes {
            let (q, kv, dim, window) = heads;
            let heads = Heads { q, kv, dim, window };
            for rows in [129, 1000, 1894] {
                let qkv = gpu.with_junk(&scaled_noise(rows * heads.qkv_columns(), 19, 2.0), heads.qkv_columns());
                gpu.set(rows, []);
                let mut whole = gpu.canaries(rows, q * dim);
                gpu.device.attention(&mut whole, &qkv, heads, gpu.rows(rows), None).unwrap();
                let whole = gpu.download(&whole, rows * q * dim, "attention");
                for first in (0..rows).step_by(29).chain([63, 64, 65, rows - 1]) {
                    gpu.set(rows, [first]);
                    let mut out = gpu.canaries(rows, q * dim);
                    gpu.device.attention(&mut out, &qkv, heads, gpu.rows(rows), Some(gpu.shift(0))).unwrap();
                    let op = format!("attention of {rows} rows from {first}, {q} heads of {dim}, window {window}");
                    let out = gpu.download(&out, (rows - first) * q * dim, &op);
                    assert!(out == whole[first * q * dim..], "{op} differs");
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn attention_of_every_group_size() {
    let mut gpu = Gpu::open();
    let mut worst = 0.0f64;
    for group in 1..=8 {
        for (kv, dim, window) in [(1, 64, 0), (2, 128, 0), (3, 64, 50)] {
            for rows in [17, 130] {
                worst = worst.max(check_attention(&mut gpu, Heads { q: group * kv, kv, dim, window }, rows));
            }
        }
    }
    println!("attention of every group size: worst error {worst:.2} of the bound");
}

/// So many heads that a kernel that takes more rows at once where there is work enough does so.
#[test]
#[ignore = "needs a GPU"]
fn attention_of_many_heads() {
    let mut gpu = Gpu::open();
    let mut worst = 0.0f64;
    for (q, kv, dim, window) in [(36, 4, 64, 0), (36, 4, 64, 300)] {
        for rows in [1151, 1152, 1217, 1500] {
            worst = worst.max(check_attention(&mut gpu, Heads { q, kv, dim, window }, rows));
        }
    }
    println!("attention of many heads: worst error {worst:.2} of the bound");
}

/// Keys far from most rows whose logits are above all others by some 50 and some 150: as exponentials, more than fp32 holds.
#[test]
#[ignore = "needs a GPU"]
fn attention_to_far_keys() {
    let mut gpu = Gpu::open();
    let mut worst = 0.0f64;
    for (q, kv, dim, window) in [(6, 2, 64, 0), (36, 4, 64, 0), (4, 2, 128, 0), (6, 2, 64, 500)] {
        let (heads, rows) = (Heads { q, kv, dim, window }, 1151);
        let width = heads.qkv_columns();
        let mut qkv = scaled_noise(rows * width, 9, 2.0);
        for (keys, factor) in [(0..20, 64.0), (300..320, 20.0)] {
            for key in keys {
                let head = key * width + q * dim..key * width + (q + kv) * dim;
                qkv[head].iter_mut().for_each(|x| *x = bf16::from_f32(x.to_f32() * factor));
            }
        }
        worst = worst.max(check_attention_to(&mut gpu, heads, rows, &qkv));
    }
    println!("attention to far keys: worst error {worst:.2} of the bound");
}

#[test]
#[ignore = "needs a GPU"]
fn attention_at_reading_lengths() {
    let mut gpu = Gpu::open();
    let mut worst = 0.0f64;
    for rows in READING_LENGTHS {
        for (q, kv, dim, window) in [(6, 2, 64, 0), (14, 2, 64, 0), (4, 1, 128, 0), (4, 2, 128, 1000)] {
            worst = worst.max(check_attention(&mut gpu, Heads { q, kv, dim, window }, rows));
        }
    }
    println!("attention at reading lengths: worst error {worst:.2} of the bound");
}
