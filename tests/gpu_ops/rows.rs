//! What works row by row: embedding and the head norms of Qwen3; and the checks of shapes.

use gleaner::cuda::CudaDevice;
use gleaner::cuda::ops::{DeviceLinear, Heads, Normed, Residual, Rotation, Rows, Scaling, Starts};
use half::bf16;

use super::{
    CANARIES, CANARY, EPS, FP32_ROUNDING, Gpu, JUNK_ROWS, Noise, WORD_CANARY, check, check_within, noise, rotate,
};

/// `x / sqrt(mean(x^2) + eps) * weight`
pub fn normalised(x: &[bf16], weight: &[bf16], eps: f32) -> Vec<f64> {
    let square: f64 = x.iter().map(|x| x.to_f64() * x.to_f64()).sum();
    let scale = (square / x.len() as f64 + eps as f64).sqrt().recip();
    x.iter().zip(weight).map(|(x, w)| x.to_f64() * scale * w.to_f64()).collect()
}

/// Rows exact to the bit, with what goes with them. The ids behind the live rows lead far out of the table: reading them
/// would be an error.
#[test]
#[ignore = "needs a GPU"]
fn embed() {
    let mut gpu = Gpu::open();
    for (vocab_size, hidden_size) in [(1, 8), (257, 384), (1000, 896), (333, 1048)] {
        let embedding = noise(vocab_size * hidden_size, 10);
        let (embedding_gpu, norm) = (gpu.upload(&embedding), noise(hidden_size, 20));
        let norm_gpu = gpu.upload(&norm);
        for (rows, first) in [(1, 0), (63, 0), (130, 128), (1894, 0)] {
            gpu.set(rows, [first]);
            let mut choice = Noise::new(rows as u64);
            let mut prompt: Vec<u32> = (0..rows).map(|_| choice.below(vocab_size) as u32).collect();
            prompt[rows - 1] = vocab_size as u32 - 1;
            let prompt_gpu = gpu.upload(&[&vec![u32::MAX; first], &prompt[..], &[u32::MAX; JUNK_ROWS]].concat());
            let given = (first > 0).then(|| gpu.shift(0));
            let mut out = gpu.residual_canaries(&vec![0.0; rows * hidden_size], &norm);
            let live = gpu.rows(rows);
            gpu.device.embed(&mut out, &prompt_gpu, &embedding_gpu, &norm_gpu, live, given, hidden_size).unwrap();
            let expected: Vec<f64> = prompt
                .iter()
                .flat_map(|&id| &embedding[id as usize * hidden_size..(id as usize + 1) * hidden_size])
                .map(|x| x.to_f64())
                .collect();
            let op = format!("embed [{rows}, {hidden_size}] from {first}");
            gpu.check_residual(&out, &expected, &norm, |_| 0.0, &op);
            let mut last = gpu.upload(&vec![WORD_CANARY; hidden_size + CANARIES]);
            gpu.device.stream_row(&mut last, &out, &norm_gpu, rows - 1, hidden_size).unwrap();
            let last = gpu.fetch(&last);
            let untouched = last[hidden_size..].iter().all(|value| value.to_bits() == WORD_CANARY.to_bits());
            assert!(untouched, "{op}: stream_row wrote behind its row");
            let last: Vec<f64> = last[..hidden_size].iter().map(|&value| value as f64).collect();
            let expected = &expected[(rows - 1) * hidden_size..];
            // A product, a reciprocal, off by twice as much, and a product.
            check_within(&last, expected, |i| expected[i].abs() * 4.0 * FP32_ROUNDING, &format!("stream_row of {op}"));
        }
    }
}

/// Normalised values are of order one and rotated in fp32 before the one rounding, as `check` allows.
#[test]
#[ignore = "needs a GPU"]
fn head_norm() {
    let mut gpu = Gpu::open();
    let eps = 1e-6f32;
    let mut worst = 0.0f64;
    // Of a row, the first heads are normalised as queries, the next as keys, and the rest is left alone.
    for (q, k, other, head_dim) in [(4, 2, 2, 64), (5, 0, 0, 128), (0, 3, 0, 64), (1, 1, 1, 128), (14, 2, 2, 16)] {
        let stride = (q + k + other) * head_dim;
        for (rows, first_row, row_start) in [(1, 0, 0), (65, 0, 0), (130, 17, 0), (33, 0, 100), (7, 3, 1000)] {
            gpu.set(rows, [first_row, row_start]);
            let x = noise((first_row + rows) * stride, 11);
            let norms = [noise(head_dim, 12), noise(head_dim, 13)];
            let (table, table_gpu) = gpu.rope_table(first_row + row_start + rows + JUNK_ROWS, head_dim);
            let mut out = gpu.with_canaries(&x, stride);
            let norms_gpu = [gpu.upload(&norms[0]), gpu.upload(&norms[1])];
            let rotation = Rotation { table: &table_gpu, head_dim, columns: 0 };
            let shift = |which: usize, by: usize| (by > 0).then(|| gpu.shift(which));
            let (first, start) = (shift(0, first_row), shift(1, row_start));
            gpu.device
                .head_norm(&mut out, &norms_gpu, rotation, (q, k), stride, gpu.rows(rows), first, start, eps)
                .unwrap();

            let op = format!("head_norm [{rows}, {q} and {k} heads of {head_dim}] from {first_row}, {row_start}");
            let out = gpu.fetch(&out);
            let live = (first_row + rows) * stride;
            assert!(out[live..].iter().all(|value| *value == CANARY), "{op} wrote behind its rows");
            assert!(out[..first_row * stride] == x[..first_row * stride], "{op} wrote before its rows");
            for row in first_row..first_row + rows {
                let (out, x) = (&out[row * stride..(row + 1) * stride], &x[row * stride..(row + 1) * stride]);
                let columns = (q + k) * head_dim;
                assert!(out[columns..] == x[columns..], "{op} wrote beside its heads");
                for (head, x) in x[..columns].chunks(head_dim).enumerate() {
                    let mut expected = normalised(x, &norms[(head >= q) as usize], eps);
                    rotate(&mut expected, &table, row_start + row);
                    let out: Vec<f64> =
                        out[head * head_dim..(head + 1) * head_dim].iter().map(|x| x.to_f64()).collect();
                    worst = worst.max(check(&out, &expected, &op));
                }
            }
        }
    }
    println!("head_norm: worst error {worst:.2} of the bound");
}

#[test]
#[ignore = "needs a GPU"]
fn wrong_shapes_are_errors() {
    let gpu = Gpu::open();
    let x = gpu.upload(&[bf16::ZERO; 64]);
    let mut out = gpu.upload(&[bf16::ZERO; 64]);
    let rows = |max| Rows { ints: &gpu.ints, index: 0, max };
    let (mut stream, prompt) = (Residual::new(&gpu.device, 8, 8).unwrap(), gpu.upload(&[0u32; 16]));
    for (max, width) in [(1, 12), (9, 8), (1, 0), (1 << 20, 8)] {
        let error = gpu.device.embed(&mut stream, &prompt, &x, &x, rows(max), None, width).unwrap_err();
        assert!(error.to_string().contains("embed"), "{error}");
    }
    assert!(gpu.device.embed(&mut stream, &prompt, &x, &x, rows(8), None, 8).is_ok());
    let (linear, ..) = gpu.linear(16, 8, true);
    let norms = Scaling { from: &x, to: &x };
    let error = gpu.device.gemm_residual(&mut stream, &x, &linear, norms, rows(9)).unwrap_err();
    assert!(error.to_string().contains("gemm_residual [9, 16, 8]"), "{error}");
    let wide = DeviceLinear::new(gpu.upload(&[bf16::ZERO; 64]), None, 1 << 22, 8);
    let error = gpu.device.gemm_residual(&mut stream, &x, &wide, norms, rows((1 << 20) - 1)).unwrap_err();
    let expected = if gpu.device.runs_hopper_kernels() { "too many tiles" } else { "smaller" };
    assert!(error.to_string().contains(expected), "{error}");
    let (linear, ..) = gpu.linear(32, 8, true);
    let rotation = Rotation { table: &gpu.upload(&[0.0f32; 32]), head_dim: 32, columns: 0 };
    let error = gpu
        .device
        .gemm_rope(&mut out, Normed { residual: &stream, eps: EPS }, &linear, rotation, rows(2), Starts::default())
        .unwrap_err();
    assert!(error.to_string().contains("too few positions"), "{error}");
    for (head_dim, n) in [(16, 32), (256, 256)] {
        let ((linear, ..), mut out) = (gpu.linear(n, 8, true), gpu.upload(&vec![bf16::ZERO; n]));
        let rotation = Rotation { table: &gpu.upload(&[0.0f32; 256]), head_dim, columns: 0 };
        let error = gpu
            .device
            .gemm_rope(&mut out, Normed { residual: &stream, eps: EPS }, &linear, rotation, rows(1), Starts::default())
            .unwrap_err();
        assert!(error.to_string().contains("heads must be 32 to 128 wide"), "{error}");
    }
    let heads = Heads { q: 3, kv: 2, dim: 64, window: 0 };
    assert!(gpu.device.attention(&mut out, &x, heads, rows(1), None).is_err());
    let error = gpu.device.upload_into("a copy", &[bf16::ZERO; 65], &mut out).unwrap_err();
    assert!(error.to_string().contains("65"), "{error}");
    assert!(CudaDevice::open(4096).is_err());
}
