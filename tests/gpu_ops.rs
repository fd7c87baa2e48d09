//! Each kernel against its definition in fp64, on a GPU: `cargo test --release --test gpu_ops -- --ignored`.
#![cfg(gleaner_cuda)]

use cudarc::driver::CudaSlice;
use gleaner::cuda::CudaDevice;
use gleaner::cuda::ops::{DeviceLinear, Heads, Rotation, Rows, Shift};
use half::bf16;

/// Rows that sit on, just below and just above every tile edge the kernels have.
const ROWS: [usize; 10] = [1, 63, 64, 65, 127, 128, 129, 1151, 1894, 2561];

/// bf16 has 8 significant bits: rounding to it is off by at most 2^-8 of the value.
const BF16_ROUNDING: f64 = 1.0 / 256.0;

/// Elements behind every output that a kernel must leave alone.
const CANARIES: usize = 4096;
const CANARY: bf16 = bf16::from_bits(0x7b7b);

/// Repeatable noise in -1..1.
fn noise(len: usize, seed: u64) -> Vec<bf16> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bf16::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    };
    (0..len).map(|_| next()).collect()
}

struct Gpu {
    device: CudaDevice,
    /// Row counts, and shifts.
    ints: CudaSlice<i32>,
}

/// Rows that a buffer holds beyond the live ones: junk that no kernel may read into a result.
const JUNK_ROWS: usize = 40;

impl Gpu {
    fn open() -> Gpu {
        let device = CudaDevice::open(0).unwrap();
        let ints = device.stream().clone_htod(&[0, 0]).unwrap();
        Gpu { device, ints }
    }

    fn upload(&self, values: &[bf16]) -> CudaSlice<bf16> {
        self.device.stream().clone_htod(values).unwrap()
    }

    /// Live rows of random numbers with NaN behind them.
    fn with_junk(&self, values: &[bf16], width: usize) -> CudaSlice<bf16> {
        self.upload(&[values, &vec![bf16::NAN; JUNK_ROWS * width]].concat())
    }

    fn canaries(&self, rows: usize, width: usize) -> CudaSlice<bf16> {
        self.upload(&vec![CANARY; (rows + JUNK_ROWS) * width + CANARIES])
    }

    fn set(&mut self, rows: usize, shift: usize) {
        self.device.stream().memcpy_htod(&[rows as i32, shift as i32], &mut self.ints).unwrap();
    }

    fn rows(&self, live: usize) -> Rows<'_> {
        Rows { ints: &self.ints, index: 0, max: live + JUNK_ROWS }
    }

    /// The live part of an output, the rest of which must be untouched.
    fn download(&self, out: &CudaSlice<bf16>, live: usize, op: &str) -> Vec<f64> {
        let out = self.device.stream().clone_dtoh(out).unwrap();
        assert!(out[live..].iter().all(|value| *value == CANARY), "{op} wrote behind its rows");
        out[..live].iter().map(|value| value.to_f64()).collect()
    }

    fn linear(&self, n: usize, k: usize, bias: bool) -> (DeviceLinear, Vec<bf16>, Vec<bf16>) {
        let weight: Vec<bf16> =
            noise(n * k, 3).iter().map(|w| bf16::from_f32(w.to_f32() / (k as f32).sqrt())).collect();
        let values = if bias { noise(n, 4) } else { vec![bf16::ZERO; n] };
        let linear = DeviceLinear { weight: self.upload(&weight), bias: bias.then(|| self.upload(&values)), n, k };
        (linear, weight, values)
    }
}

/// `a weight^T + bias` in fp64 (fp32 products of bf16 are exact).
fn product(a: &[bf16], weight: &[bf16], bias: &[bf16], n: usize, k: usize) -> Vec<f64> {
    let (a, weight): (Vec<f32>, Vec<f32>) =
        (a.iter().map(|x| x.to_f32()).collect(), weight.iter().map(|x| x.to_f32()).collect());
    let dot = |a: &[f32], w: &[f32]| -> f64 { a.iter().zip(w).map(|(a, w)| (a * w) as f64).sum() };
    let row =
        |a: &[f32]| -> Vec<f64> { (0..n).map(|j| dot(a, &weight[j * k..(j + 1) * k]) + bias[j].to_f64()).collect() };
    a.chunks(k).flat_map(row).collect()
}

/// One rounding of the result to bf16, and fp32 accumulation before it: values of order one, sums of at most 5000 terms.
fn check(out: &[f64], expected: &[f64], op: &str) -> f64 {
    const ACCUMULATION: f64 = 1e-5;
    assert_eq!(out.len(), expected.len());
    let mut worst = 0.0f64;
    for (i, (out, expected)) in out.iter().zip(expected).enumerate() {
        let allowed = expected.abs() * BF16_ROUNDING * 1.01 + ACCUMULATION;
        let error = (out - expected).abs();
        assert!(error <= allowed, "{op}: element {i} is {out} for {expected}");
        worst = worst.max(error / allowed);
    }
    worst
}

#[test]
#[ignore = "needs a GPU"]
fn rms_norm() {
    let mut gpu = Gpu::open();
    let eps = 1e-6f32;
    let mut worst = 0.0f64;
    for hidden_size in [8, 128, 384, 896, 3584] {
        for rows in ROWS {
            gpu.set(rows, 0);
            let (x, weight) = (noise(rows * hidden_size, 1), noise(hidden_size, 2));
            let mut out = gpu.canaries(rows, hidden_size);
            let (x_gpu, weight_gpu) = (gpu.with_junk(&x, hidden_size), gpu.upload(&weight));
            gpu.device.rms_norm(&mut out, &x_gpu, &weight_gpu, gpu.rows(rows), hidden_size, eps).unwrap();
            let expected: Vec<f64> = x
                .chunks(hidden_size)
                .flat_map(|x| {
                    let square: f64 = x.iter().map(|x| x.to_f64() * x.to_f64()).sum();
                    let scale = (square / hidden_size as f64 + eps as f64).sqrt().recip();
                    x.iter().zip(&weight).map(|(x, w)| x.to_f64() * scale * w.to_f64()).collect::<Vec<_>>()
                })
                .collect();
            let op = format!("rms_norm [{rows}, {hidden_size}]");
            worst = worst.max(check(&gpu.download(&out, rows * hidden_size, &op), &expected, &op));
        }
    }
    println!("rms_norm: worst error {worst:.2} of the bound");
}

/// Shapes of the demo model, of Qwen2.5-0.5B, and odd ones.
const LINEARS: [(usize, usize); 5] = [(640, 384), (1152, 896), (48, 40), (896, 4864), (272, 72)];

#[test]
#[ignore = "needs a GPU"]
fn gemm_residual() {
    let mut gpu = Gpu::open();
    let mut worst = 0.0f64;
    for (n, k) in LINEARS {
        for rows in [1, 64, 65, 127, 129, 300] {
            gpu.set(rows, 0);
            let (linear, weight, bias) = gpu.linear(n, k, rows % 2 == 0);
            let (a, x) = (noise(rows * k, 5), noise(rows * n, 6));
            let mut out = gpu.upload(&[&x[..], &vec![CANARY; JUNK_ROWS * n + CANARIES]].concat());
            gpu.device.gemm_residual(&mut out, &gpu.with_junk(&a, k), &linear, gpu.rows(rows)).unwrap();
            let expected: Vec<f64> =
                product(&a, &weight, &bias, n, k).iter().zip(&x).map(|(y, x)| y + x.to_f64()).collect();
            let op = format!("gemm_residual [{rows}, {n}, {k}]");
            worst = worst.max(check(&gpu.download(&out, rows * n, &op), &expected, &op));

            if rows == 1 {
                let mut out = gpu.upload(&[&x[..], &vec![CANARY; CANARIES]].concat());
                gpu.device.gemv_residual(&mut out, &gpu.upload(&a), &linear).unwrap();
                check(&gpu.download(&out, n, "gemv_residual"), &expected, "gemv_residual");
            }
        }
    }
    println!("gemm_residual: worst error {worst:.2} of the bound");
}

#[test]
#[ignore = "needs a GPU"]
fn gemm_swiglu() {
    let mut gpu = Gpu::open();
    let mut worst = 0.0f64;
    for (n, k) in LINEARS {
        for rows in [1, 63, 128, 200] {
            gpu.set(rows, 0);
            let (linear, weight, bias) = gpu.linear(n, k, true);
            let a = noise(rows * k, 7);
            let expected: Vec<f64> = product(&a, &weight, &bias, n, k)
                .chunks(16)
                .flat_map(|pair| (0..8).map(|i| pair[i] / (1.0 + (-pair[i]).exp()) * pair[8 + i]).collect::<Vec<_>>())
                .collect();
            let mut out = gpu.canaries(rows, n / 2);
            gpu.device.gemm_swiglu(&mut out, &gpu.with_junk(&a, k), &linear, gpu.rows(rows)).unwrap();
            let op = format!("gemm_swiglu [{rows}, {n}, {k}]");
            worst = worst.max(check(&gpu.download(&out, rows * n / 2, &op), &expected, &op));
            if rows == 1 {
                let mut out = gpu.canaries(1, n / 2);
                gpu.device.gemv_swiglu(&mut out, &gpu.upload(&a), &linear).unwrap();
                check(&gpu.download(&out, n / 2, "gemv_swiglu"), &expected, "gemv_swiglu");
            }
        }
    }
    println!("gemm_swiglu: worst error {worst:.2} of the bound");
}

#[test]
#[ignore = "needs a GPU"]
fn gemm_rope() {
    let mut gpu = Gpu::open();
    let mut worst = 0.0f64;
    for (head_dim, n, k) in [(64, 640, 384), (128, 384, 896), (64, 128, 72)] {
        for (rows, first) in [(1, 0), (65, 0), (130, 17)] {
            gpu.set(rows, first);
            let columns = n - head_dim;
            let (linear, weight, bias) = gpu.linear(n, k, true);
            let a = noise((first + rows) * k, 8);
            let table: Vec<f32> = (0..(first + rows + JUNK_ROWS) * head_dim / 2)
                .flat_map(|i| [(i as f32 * 0.37).cos(), (i as f32 * 0.37).sin()])
                .collect();
            let mut expected = product(&a[first * k..], &weight, &bias, n, k);
            for (row, out) in expected.chunks_mut(n).enumerate() {
                for out in out[..columns].chunks_mut(head_dim) {
                    for pair in 0..head_dim / 2 {
                        let (low, high) = (pair / 8 * 16 + pair % 8, pair / 8 * 16 + pair % 8 + 8);
                        let at = ((first + row) * head_dim / 2 + pair) * 2;
                        let (cos, sin) = (table[at] as f64, table[at + 1] as f64);
                        let (a, b) = (out[low], out[high]);
                        (out[low], out[high]) = (a * cos - b * sin, b * cos + a * sin);
                    }
                }
            }
            let table = gpu.device.stream().clone_htod(&table).unwrap();
            let rotation = Rotation { table: &table, head_dim, columns };
            let shift = Some(Shift { ints: &gpu.ints, index: 1 });
            let mut out = gpu.canaries(rows, n);
            let a_gpu = gpu.with_junk(&a, k);
            gpu.device.gemm_rope(&mut out, &a_gpu, &linear, rotation, gpu.rows(rows), shift).unwrap();
            let op = format!("gemm_rope [{rows}, {n}, {k}] from {first}");
            worst = worst.max(check(&gpu.download(&out, rows * n, &op), &expected, &op));
        }
    }
    println!("gemm_rope: worst error {worst:.2} of the bound");
}

/// Probabilities are rounded to bf16 before they meet the values: each is off by 2^-8 of itself, so the sum by 2^-8 of
/// the sum of their products' magnitudes; then comes one more rounding. Logits are off by fp32 rounding alone.
#[test]
#[ignore = "needs a GPU"]
fn attention() {
    let mut gpu = Gpu::open();
    let mut worst = 0.0f64;
    for (q, kv, dim, window) in
        [(6, 2, 64, 0), (8, 1, 64, 0), (3, 3, 128, 0), (4, 2, 128, 100), (2, 1, 64, 5), (2, 1, 64, 64)]
    {
        let heads = Heads { q, kv, dim, window };
        for rows in [1, 63, 64, 65, 129, 400] {
            gpu.set(rows, 0);
            let width = heads.qkv_columns();
            let qkv: Vec<bf16> = noise(rows * width, 9).iter().map(|x| bf16::from_f32(x.to_f32() * 2.0)).collect();
            let at = |row: usize, column: usize| qkv[row * width + column].to_f64();
            let mut expected = vec![0.0; rows * q * dim];
            let mut allowed = vec![0.0; rows * q * dim];
            for row in 0..rows {
                let first = if window > 0 { (row + 1).saturating_sub(window) } else { 0 };
                for head in 0..q {
                    let (k, v) = ((q + head / (q / kv)) * dim, (q + kv + head / (q / kv)) * dim);
                    let logit = |key: usize| -> f64 {
                        (0..dim).map(|d| at(row, head * dim + d) * at(key, k + d)).sum::<f64>() / (dim as f64).sqrt()
                    };
                    let logits: Vec<f64> = (first..=row).map(logit).collect();
                    let max = logits.iter().copied().fold(f64::MIN, f64::max);
                    let total: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
                    for d in 0..dim {
                        let terms = logits.iter().enumerate();
                        let terms = terms.map(|(i, logit)| (logit - max).exp() / total * at(first + i, v + d));
                        let (sum, magnitude) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
                        expected[(row * q + head) * dim + d] = sum;
                        allowed[(row * q + head) * dim + d] = (magnitude + sum.abs()) * BF16_ROUNDING * 1.02 + 1e-5;
                    }
                }
            }
            let mut out = gpu.canaries(rows, q * dim);
            let qkv_gpu = gpu.with_junk(&qkv, width);
            gpu.device.attention(&mut out, &qkv_gpu, heads, gpu.rows(rows)).unwrap();
            let op = format!("attention [{rows}, {q} of {kv} heads of {dim}, window {window}]");
            let out = gpu.download(&out, rows * q * dim, &op);
            for (i, ((out, expected), allowed)) in out.iter().zip(&expected).zip(&allowed).enumerate() {
                let error = (out - expected).abs();
                assert!(error <= *allowed, "{op}: element {i} is {out} for {expected}, {allowed:e} allowed");
                worst = worst.max(error / allowed);
            }

            gpu.set(1, rows - 1);
            let mut out = gpu.canaries(1, q * dim);
            let position = Shift { ints: &gpu.ints, index: 1 };
            gpu.device.decode_attention(&mut out, &qkv_gpu, heads, position).unwrap();
            let last = (rows - 1) * q * dim;
            check(&gpu.download(&out, q * dim, "decode_attention"), &expected[last..], &format!("decode {op}"));
        }
    }
    println!("attention: worst error {worst:.2} of the bound");
}

#[test]
#[ignore = "needs a GPU"]
fn wrong_shapes_are_errors() {
    let gpu = Gpu::open();
    let x = gpu.upload(&[bf16::ZERO; 64]);
    let mut out = gpu.upload(&[bf16::ZERO; 64]);
    let rows = |max| Rows { ints: &gpu.ints, index: 0, max };
    for (max, hidden_size) in [(1, 12), (9, 8), (1, 0), (usize::MAX, 8)] {
        let error = gpu.device.rms_norm(&mut out, &x, &x, rows(max), hidden_size, 1e-6).unwrap_err();
        assert!(error.to_string().contains("rms_norm"), "{error}");
    }
    assert!(gpu.device.rms_norm(&mut out, &x, &x, rows(8), 8, 1e-6).is_ok());
    let (linear, ..) = gpu.linear(16, 8, true);
    let error = gpu.device.gemm_residual(&mut out, &x, &linear, rows(9)).unwrap_err();
    assert!(error.to_string().contains("gemm_residual [9, 16, 8]"), "{error}");
    let heads = Heads { q: 3, kv: 2, dim: 64, window: 0 };
    assert!(gpu.device.attention(&mut out, &x, heads, rows(1)).is_err());
    assert!(CudaDevice::open(4096).is_err());
}
