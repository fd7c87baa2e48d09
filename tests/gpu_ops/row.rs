//! The kernels that take one row through a layer with its residual stream in fixed point.

use cudarc::driver::CudaSlice;
use gleaner::cuda::ops::{DeviceLinear, FixedRow, Heads, Norm, Rotation};
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

/// A model of one layer, and what its kernels do to a row.
struct Layer {
    qkv: CudaSlice<bf16>,
    o: DeviceLinear,
    gate_up: DeviceLinear,
    down: DeviceLinear,
    norm: CudaSlice<bf16>,
}

const WIDTH: usize = 256;
const HEADS: Heads = Heads { q: 4, kv: 2, dim: 64, window: 0 };
/// Of keys and values.
const ROWS: usize = 65;

impl Layer {
    fn new(gpu: &mut Gpu) -> Layer {
        gpu.set(1, [ROWS - 1, 0]);
        let intermediate = 48;
        Layer {
            qkv: gpu.upload(&scaled_noise(ROWS * HEADS.qkv_columns(), 9, 2.0)),
            o: gpu.linear(WIDTH, HEADS.q * HEADS.dim, true).0,
            gate_up: gpu.linear(2 * intermediate, WIDTH, false).0,
            down: gpu.linear(WIDTH, intermediate, true).0,
            norm: gpu.upload(&vec![bf16::ONE; WIDTH]),
        }
    }

    fn mlp(&self, gpu: &Gpu, row: &mut FixedRow) {
        gpu.device.row_mlp(row, Norm { weight: &self.norm, eps: EPS }, &self.gate_up, &self.down).unwrap();
    }

    fn attention(&self, gpu: &Gpu, row: &mut FixedRow) {
        gpu.device.row_attention(row, &self.qkv, &self.o, HEADS, gpu.shift(0)).unwrap();
    }
}

/// What a kernel finds or adds that is out of range or no number makes all of the row none.
#[test]
#[ignore = "needs a GPU"]
fn rows_stay_no_numbers() {
    let Some(mut gpu) = open() else { return };
    let mut layer = Layer::new(&mut gpu);
    let x = stream(WIDTH);
    let after_mlp = |gpu: &Gpu, layer: &Layer, x: &[f32]| {
        let mut row = fixed(gpu, &gpu.upload(x));
        layer.mlp(gpu, &mut row);
        floats(gpu, &row, WIDTH)
    };
    let after_attention = |gpu: &Gpu, layer: &Layer| {
        let mut row = fixed(gpu, &gpu.upload(&x));
        layer.attention(gpu, &mut row);
        floats(gpu, &row, WIDTH)
    };
    assert!(after_mlp(&gpu, &layer, &x).iter().chain(&after_attention(&gpu, &layer)).all(|x| x.is_finite()));

    for wrong in [2.0f32.powi(21), f32::INFINITY, f32::NAN] {
        let mut out_of_range = x.clone();
        out_of_range[7] = wrong;
        assert!(after_mlp(&gpu, &layer, &out_of_range).iter().all(|x| x.is_nan()), "{wrong} in the row");
    }
    for wrong in [bf16::INFINITY, bf16::NAN] {
        let mut norm = vec![bf16::ONE; WIDTH];
        norm[200] = wrong;
        layer.norm = gpu.upload(&norm);
        assert!(after_mlp(&gpu, &layer, &x).iter().all(|x| x.is_nan()), "{wrong} in the norm's weights");
    }
    let sound = scaled_noise(ROWS * HEADS.qkv_columns(), 9, 2.0);
    for column in [3, HEADS.q * HEADS.dim + 3, (HEADS.q + HEADS.kv) * HEADS.dim + 3] {
        let mut qkv = sound.clone();
        qkv[(ROWS - 1) * HEADS.qkv_columns() + column] = bf16::NAN;
        layer.qkv = gpu.upload(&qkv);
        assert!(after_attention(&gpu, &layer).iter().all(|x| x.is_nan()), "column {column} of the newest row");
    }

    // Each of two clusters adds 128 times 15360, just below 2^21, to each column: 300 times make more than 2^30.
    let mut layer = Layer::new(&mut gpu);
    let weight = gpu.upload(&vec![bf16::from_f32(15360.0); WIDTH * HEADS.q * HEADS.dim]);
    layer.o = DeviceLinear::new(weight, None, WIDTH, HEADS.q * HEADS.dim);
    layer.qkv = gpu.upload(&vec![bf16::ONE; ROWS * HEADS.qkv_columns()]);
    for (times, in_range) in [(250, true), (300, false)] {
        let mut row = fixed(&gpu, &gpu.upload(&x));
        for _ in 0..times {
            layer.attention(&gpu, &mut row);
        }
        layer.mlp(&gpu, &mut row);
        let out = floats(&gpu, &row, WIDTH);
        assert!(out.iter().all(|x| if in_range { x.is_finite() } else { x.is_nan() }), "{times} additions");
    }
}

/// Sums are exact, whatever was added before: attention folds all that the MLP added, and leaves nothing of it to be added again;
/// and all of it is part of the row of which queries, keys and values are made.
#[test]
#[ignore = "needs a GPU"]
fn rows_carry_what_was_added() {
    let Some(mut gpu) = open() else { return };
    let layer = Layer::new(&mut gpu);
    let x = stream(WIDTH);
    let after = |steps: &[fn(&Layer, &Gpu, &mut FixedRow)]| {
        let mut row = fixed(&gpu, &gpu.upload(&x));
        steps.iter().for_each(|step| step(&layer, &gpu, &mut row));
        row
    };
    let [mlp, attention] = [&[Layer::mlp as fn(&_, &_, &mut _)], &[Layer::attention as fn(&_, &_, &mut _)]]
        .map(|step| floats(&gpu, &after(step), WIDTH));
    // Of what the MLP adds, enough that it would be missed.
    assert!(mlp.iter().zip(&x).filter(|&(y, &x)| (y - x as f64).abs() > 0.01).count() > WIDTH / 2);
    let both: Vec<f64> = (0..WIDTH).map(|i| mlp[i] + attention[i] - x[i] as f64).collect();
    let rounding = |i: usize| 3.0 * FP32_ROUNDING * (mlp[i].abs() + attention[i].abs() + 1.0);
    let out = floats(&gpu, &after(&[Layer::mlp, Layer::attention]), WIDTH);
    check_within(&out, &both, rounding, "row_mlp, row_attention");
    // Once more: attention adds the same again, the MLP's part comes no second time.
    let twice: Vec<f64> = (0..WIDTH).map(|i| both[i] + attention[i] - x[i] as f64).collect();
    let out = floats(&gpu, &after(&[Layer::mlp, Layer::attention, Layer::attention]), WIDTH);
    check_within(&out, &twice, |i| 2.0 * rounding(i), "row_mlp, row_attention, row_attention");

    let n = HEADS.qkv_columns();
    let (linear, table) = (gpu.linear(n, WIDTH, true).0, gpu.rope_table(ROWS, HEADS.dim).1);
    let qkv = |row: &FixedRow| {
        let mut out = gpu.upload(&vec![bf16::ZERO; ROWS * n]);
        let rotation = Rotation { table: &table, head_dim: HEADS.dim, columns: (HEADS.q + HEADS.kv) * HEADS.dim };
        let norm = Norm { weight: &layer.norm, eps: EPS };
        gpu.device.row_qkv(&mut out, row, norm, &linear, rotation, gpu.shift(0)).unwrap();
        to_f32(&gpu.fetch(&out)[(ROWS - 1) * n..]).iter().map(|&x| x as f64).collect::<Vec<f64>>()
    };
    let restarted = fixed(&gpu, &gpu.upload(&mlp.iter().map(|&x| x as f32).collect::<Vec<f32>>()));
    let expected = qkv(&restarted);
    // What fp32 loses of the row may round a result the other way, or the lower of the two bf16 numbers that stand for a column,
    // which moves a sum by 2^-17 of it.
    let allowed = |i: usize| 2.0 * BF16_ROUNDING * expected[i].abs() + 1e-5;
    check_within(&qkv(&after(&[Layer::mlp])), &expected, allowed, "row_mlp, row_qkv");
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
    // On an H200, of 5, 3, 2, 4, 1 and 1 groups of columns a CTA; the last one has 1 of 2 and of 4.
    for (width, intermediate, bias) in [
        (896, 4864, false),
        (1024, 3072, true),
        (384, 2008, false),
        (256, 4232, true),
        (384, 1024, false),
        (256, 48, true),
    ] {
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
