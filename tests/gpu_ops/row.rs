//! The kernels that take one row through a layer with its residual stream in fixed point.

use cudarc::driver::CudaSlice;
use gleaner::cuda::ops::{FixedRow, Heads, Norm, Rotation};
use half::bf16;

use super::{BF16_ROUNDING, EPS, FP32_ROUNDING, Gpu, Noise, accumulation, check_within, noise, scaled_noise, to_f32};
use crate::attention::definition;
use crate::linear::{check_rope_of_one, fp32_sum, normed_product};

/// What two bf16 numbers leave of a value.
const TWO_ROUNDINGS: f64 = BF16_ROUNDING * BF16_ROUNDING;

/// A GPU, if it has the kernels, as Hopper's larger ones must.
fn open() -> Option<Gpu> {
    let gpu = Gpu::open();
    let has = gpu.device.has_row_kernels(896, 4864, 64);
    assert!(has || !gpu.device.runs_hopper_kernels(), "a Hopper GPU without row kernels");
    if !has {
        eprintln!("skipped: no row kernels for this GPU");
    }
    has.then_some(gpu)
}

fn fixed(gpu: &Gpu, x: &CudaSlice<f32>) -> FixedRow {
    let mut row = FixedRow::new(&gpu.device, x.len()).unwrap();
    gpu.device.row_start(&mut row, x).unwrap();
    row
}

fn floats(gpu: &Gpu, row: &FixedRow, width: usize) -> Vec<f64> {
    let mut x = gpu.upload(&vec![0.0f32; width]);
    gpu.device.row_end(&mut x, row).unwrap();
    gpu.fetch(&x).iter().map(|&x| x as f64).collect()
}

/// fp32 numbers in -1..1.
fn stream(width: usize) -> Vec<f32> {
    let mut fine = Noise::new(6);
    (0..width).map(|_| (2.0 * fine.unit() - 1.0) as f32).collect()
}

#[test]
#[ignore = "needs a GPU"]
fn rows_come_back_or_are_no_numbers() {
    let Some(gpu) = open() else { return };
    for width in [256, 896, 1024] {
        let mut x = stream(width);
        x[7] = 2.0f32.powi(21) - 1.0;
        let out = floats(&gpu, &fixed(&gpu, &gpu.upload(&x)), width);
        let expected: Vec<f64> = x.iter().map(|&x| x as f64).collect();
        check_within(&out, &expected, |i| 2f64.powi(-33) + expected[i].abs() * FP32_ROUNDING, "a row there and back");
        for wrong in [2.0f32.powi(21), -1e30, f32::INFINITY, f32::NAN] {
            x[7] = wrong;
            assert!(floats(&gpu, &fixed(&gpu, &gpu.upload(&x)), width).iter().all(|x| x.is_nan()), "{wrong}");
        }
    }
}

/// What a kernel adds, or finds in a row, that is out of range or no number makes all of the row none, through all kernels.
#[test]
#[ignore = "needs a GPU"]
fn rows_stay_no_numbers() {
    let Some(gpu) = open() else { return };
    let (width, intermediate) = (256, 48);
    let (gate_up, ..) = gpu.linear(2 * intermediate, width, false);
    let (down, ..) = gpu.linear(width, intermediate, false);
    let after = |x: &[f32], norm: &[bf16], times: usize| {
        let norm = gpu.upload(norm);
        let mut row = fixed(&gpu, &gpu.upload(x));
        for _ in 0..times {
            gpu.device.row_mlp(&mut row, Norm { weight: &norm, eps: EPS }, &gate_up, &down).unwrap();
        }
        floats(&gpu, &row, width)
    };
    let (x, ones) = (stream(width), vec![bf16::ONE; width]);
    assert!(after(&x, &ones, 2).iter().all(|x| x.is_finite()));
    for wrong in [2.0f32.powi(21), f32::INFINITY, f32::NAN] {
        let mut out_of_range = x.clone();
        out_of_range[7] = wrong;
        assert!(after(&out_of_range, &ones, 2).iter().all(|x| x.is_nan()), "{wrong} in the row");
    }
    for wrong in [bf16::INFINITY, bf16::NAN] {
        let mut norm = ones.clone();
        norm[200] = wrong;
        for times in 1..3 {
            assert!(after(&x, &norm, times).iter().all(|x| x.is_nan()), "{wrong} in the norm's weights, {times}");
        }
    }
}

/// As `gemv_rope`, but for the row's two bf16 parts.
#[test]
#[ignore = "needs a GPU"]
fn row_qkv() {
    let Some(mut gpu) = open() else { return };
    let mut worst = 0.0f64;
    let before = |largest, k| fp32_sum(largest, k) + largest * TWO_ROUNDINGS + accumulation(k);
    for shape @ (head_dim, n, _) in [(64, 640, 384), (64, 1152, 896), (128, 4096, 1024), (64, 192, 256)] {
        for place in [(0, n), (17, n - head_dim), (63, 0)] {
            let launch = |gpu: &Gpu, out: &mut _, x: &_, norm: Norm, linear: &_, rotation: Rotation| {
                gpu.device.row_qkv(out, &fixed(gpu, x), norm, linear, rotation, gpu.shift(0)).unwrap();
            };
            worst = worst.max(check_rope_of_one(&mut gpu, "row_qkv", shape, place, launch, before));
        }
    }
    println!("row_qkv: worst error {worst:.2} of the bound");
}

#[test]
#[ignore = "needs a GPU"]
fn row_attention() {
    let Some(mut gpu) = open() else { return };
    let mut worst = 0.0f64;
    let dim = 64;
    for (q, kv, window, width) in [
        (6, 2, 0, 384),
        (14, 2, 0, 896),
        (16, 8, 0, 1024),
        (4, 2, 100, 256),
        (2, 1, 5, 256),
        (3, 3, 0, 256),
        (8, 1, 1000, 256),
    ] {
        for rows in [1, 63, 64, 65, 128, 129, 400, 1151, 2561] {
            let heads = Heads { q, kv, dim, window };
            let qkv = scaled_noise(rows * heads.qkv_columns(), 9, 2.0);
            let (attended, _) = definition(&to_f32(&qkv), heads, rows);
            let attended = &attended[(rows - 1) * q * dim..];
            let (o, weight, bias) = gpu.linear(width, q * dim, rows % 2 == 0);
            let x = stream(width);
            let rows_of = || weight.chunks(q * dim).map(|weight| weight.iter().map(|w| w.to_f64()));
            let expected: Vec<f64> = rows_of()
                .zip(&bias)
                .zip(&x)
                .map(|((w, b), &x)| x as f64 + b.to_f64() + w.zip(attended).map(|(w, a)| w * a).sum::<f64>())
                .collect();
            let sums: Vec<f64> = rows_of().map(|weight| weight.map(f64::abs).sum()).collect();
            gpu.set(1, [rows - 1, 0]);
            let mut row = fixed(&gpu, &gpu.upload(&x));
            let qkv_gpu = gpu.with_junk(&qkv, heads.qkv_columns());
            gpu.device.synchronize().unwrap();
            gpu.device.row_attention(&mut row, &qkv_gpu, &o, heads, gpu.shift(0)).unwrap();
            let op = format!("row_attention [{rows}, {q} of {kv} heads of {dim}, window {window}, {width}]");
            // Probabilities in two bf16 parts meet values of at most 2, and what is attended to has two parts again.
            let allowed = |i: usize| sums[i] * (4.0 * TWO_ROUNDINGS + 1e-5) + accumulation(q * dim);
            worst = worst.max(check_within(&floats(&gpu, &row, width), &expected, allowed, &op));
        }
    }
    println!("row_attention: worst error {worst:.2} of the bound");
}

/// Two runs have the same bits.
#[test]
#[ignore = "needs a GPU"]
fn row_mlp() {
    let Some(gpu) = open() else { return };
    let mut worst = 0.0f64;
    for (width, intermediate, bias) in [(896, 4864, false), (1024, 3072, true), (384, 1024, false), (256, 48, true)] {
        let (gate_up, weight, up_bias) = gpu.linear(2 * intermediate, width, bias);
        let (down, down_weight, down_bias) = gpu.linear(width, intermediate, bias);
        let (a, norm) = (noise(width, 7), noise(width, 17));
        let (products, magnitudes) = normed_product(&a, &norm, &weight, &up_bias);
        let before = |at: usize| fp32_sum(magnitudes[at], width) + magnitudes[at] * TWO_ROUNDINGS + accumulation(width);
        let h: Vec<(f64, f64)> = (0..intermediate)
            .map(|i| {
                let at = i / 8 * 16 + i % 8;
                let (gate, up) = (products[at], products[at + 8]);
                let h = gate / (1.0 + (-gate).exp()) * up;
                // The slope of silu is at most 1.1.
                let inexact = 1.1 * up.abs() * before(at) + gate.abs() * before(at + 8);
                (h, h.abs() * BF16_ROUNDING * 1.01 + 1e-5 + inexact)
            })
            .collect();
        let (mut expected, mut allowed) = (Vec::new(), Vec::new());
        for ((weight, b), x) in down_weight.chunks(intermediate).zip(&down_bias).zip(&a) {
            let terms = weight.iter().zip(&h).map(|(w, (h, off))| (w.to_f64() * h, w.to_f64().abs() * off));
            let (sum, off) = terms.fold((0.0, 0.0), |(sum, all), (term, off)| (sum + term, all + off));
            expected.push(x.to_f64() + b.to_f64() + sum);
            allowed.push(off + accumulation(intermediate));
        }
        let norm_gpu = gpu.upload(&norm);
        let x = gpu.upload(&to_f32(&a));
        let run = || {
            let mut row = fixed(&gpu, &x);
            gpu.device.row_mlp(&mut row, Norm { weight: &norm_gpu, eps: EPS }, &gate_up, &down).unwrap();
            floats(&gpu, &row, width)
        };
        let out = run();
        let op = format!("row_mlp [{width}, {intermediate}]");
        worst = worst.max(check_within(&out, &expected, |i| allowed[i], &op));
        assert_eq!(run(), out, "{op}");
    }
    println!("row_mlp: worst error {worst:.2} of the bound");
}
