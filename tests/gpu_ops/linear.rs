//! The linear layers, for many rows and for one, with what becomes of their results.

use cudarc::driver::CudaSlice;
use gleaner::cuda::ops::{DeviceLinear, Norm, Normed, Rotation, Scaling, Starts};
use half::bf16;

use super::{
    BF16_ROUNDING, CANARIES, CANARY, EPS, FP32_ROUNDING, Gpu, JUNK_ROWS, Noise, READING_LENGTHS, WORD_CANARY,
    accumulation, check_product, check_within, noise, product, rotate, slots, to_f32,
};
use crate::rows::normalised;

/// Shapes of the demo model, of Qwen2.5-0.5B, and odd ones.
const LINEARS: [(usize, usize); 5] = [(640, 384), (1152, 896), (48, 40), (896, 4864), (272, 72)];

/// `norm(a) weight^T + bias` in fp64, and the sums of its terms' magnitudes.
pub fn normed_product(a: &[bf16], norm: &[bf16], weight: &[bf16], bias: &[bf16]) -> (Vec<f64>, Vec<f64>) {
    let normed = normalised(a, norm, EPS);
    let row = |(weight, bias): (&[bf16], &bf16)| {
        let terms = weight.iter().zip(&normed).map(|(w, x)| w.to_f64() * x);
        terms.fold((bias.to_f64(), bias.to_f64().abs()), |(sum, magnitude), term| (sum + term, magnitude + term.abs()))
    };
    weight.chunks(a.len()).zip(bias).map(row).unzip()
}

/// Each of the at most k additions of a sum, in whatever order, is off by at most 2^-24 of the sum of magnitudes; so are the
/// norm's factor and the products with its weights.
pub fn fp32_sum(magnitude: f64, k: usize) -> f64 {
    magnitude * (k + 8) as f64 * FP32_ROUNDING
}

/// What `gemv_swiglu` makes of a normalised row.
fn swiglu_of_one(gpu: &Gpu, (n, k): (usize, usize), bias: bool) -> f64 {
    let (linear, weight, bias) = gpu.linear(n, k, bias);
    let (a, norm) = (noise(k, 7), noise(k, 17));
    let (products, magnitudes) = normed_product(&a, &norm, &weight, &bias);
    let pairs = |values: &[f64]| -> Vec<(f64, f64)> {
        values.chunks(16).flat_map(|pair| (0..8).map(|i| (pair[i], pair[8 + i]))).collect()
    };
    let (products, magnitudes) = (pairs(&products), pairs(&magnitudes));
    let expected: Vec<f64> = products.iter().map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
    let mut out = gpu.canaries(1, n / 2);
    let norm_gpu = gpu.upload(&norm);
    gpu.device.gemv_swiglu(&mut out, &gpu.upload(&to_f32(&a)), Norm { weight: &norm_gpu, eps: EPS }, &linear).unwrap();
    let op = format!("gemv_swiglu [{n}, {k}]");
    // The slope of silu is at most 1.1.
    let allowed = |i: usize| {
        let ((gate, up), (of_gate, of_up)) = (products[i], magnitudes[i]);
        let before = 1.1 * up.abs() * fp32_sum(of_gate, k) + gate.abs() * fp32_sum(of_up, k);
        expected[i].abs() * BF16_ROUNDING * 1.01 + 1e-5 + before
    };
    check_within(&gpu.download(&out, n / 2, &op), &expected, allowed, &op)
}

/// Weights of two norms, of which some columns have none, or next to none.
fn norms(width: usize) -> [Vec<bf16>; 2] {
    let [mut from, mut to] = [noise(width, 15), noise(width, 16)];
    for (i, weight) in [0.0, -0.0, 1e-30, -1e-18].into_iter().enumerate() {
        from[i * 3 % width] = bf16::from_f64(weight);
        to[i * 5 % width] = bf16::from_f64(weight);
    }
    [from, to]
}

fn residual(gpu: &mut Gpu, rows: usize, (n, k): (usize, usize), bias: bool) -> f64 {
    gpu.set(rows, [0, 0]);
    let (linear, weight, bias) = gpu.linear(n, k, bias);
    let (a, [from, to]) = (noise(rows * k, 5), norms(n));
    let mut fine = Noise::new(6);
    let x: Vec<f32> = (0..rows * n).map(|_| (2.0 * fine.unit() - 1.0) as f32).collect();
    let mut out = gpu.residual_canaries(&x, &from);
    let (from, to_gpu) = (gpu.upload(&from), gpu.upload(&to));
    let scaling = Scaling { from: &from, to: &to_gpu };
    gpu.device.gemm_residual(&mut out, &gpu.with_junk(&a, k), &linear, scaling, gpu.rows(rows)).unwrap();
    let expected: Vec<f64> = product(&a, &weight, &bias, n, k).iter().zip(&x).map(|(y, &x)| y + x as f64).collect();
    let op = format!("gemm_residual [{rows}, {n}, {k}]");
    // The stream is fp32: beside the product, two additions, and roundings by the norms' weights.
    let allowed = |_| accumulation(k);
    let worst = gpu.check_residual(&out, &expected, &to, allowed, &op);
    if rows > 1 {
        return worst;
    }
    let mut out = gpu.upload(&[&x[..], &[WORD_CANARY; CANARIES]].concat());
    gpu.device.gemv_residual(&mut out, &gpu.upload(&a), &linear).unwrap();
    let op = format!("gemv_residual [{n}, {k}]");
    let out = gpu.fetch(&out);
    assert!(out[n..].iter().all(|value| value.to_bits() == WORD_CANARY.to_bits()), "{op} wrote behind its row");
    let out: Vec<f64> = out[..n].iter().map(|&value| value as f64).collect();
    worst.max(check_within(&out, &expected, allowed, &op))
}

/// `normalised a weight^T + bias`, where rows of the product take what is left of the norm.
fn product_of_stream(a: &[bf16], factors: &[f64], weight: &[bf16], bias: &[bf16], n: usize, k: usize) -> Vec<f64> {
    let mut out = product(a, weight, &vec![bf16::ZERO; n], n, k);
    for (row, factor) in out.chunks_mut(n).zip(factors) {
        row.iter_mut().zip(bias).for_each(|(out, bias)| *out = *out * factor + bias.to_f64());
    }
    out
}

fn swiglu(gpu: &mut Gpu, rows: usize, (n, k): (usize, usize), bias_given: bool) -> f64 {
    gpu.set(rows, [0, 0]);
    let (linear, weight, bias) = gpu.linear(n, k, bias_given);
    let a = noise(rows * k, 7);
    let (stream, factors) = gpu.residual_of(&a, k, 27);
    let expected: Vec<f64> = product_of_stream(&a, &factors, &weight, &bias, n, k)
        .chunks(16)
        .flat_map(|pair| (0..8).map(|i| pair[i] / (1.0 + (-pair[i]).exp()) * pair[8 + i]).collect::<Vec<_>>())
        .collect();
    let mut out = gpu.canaries(rows, n / 2);
    gpu.device.gemm_swiglu(&mut out, Normed { residual: &stream, eps: EPS }, &linear, gpu.rows(rows)).unwrap();
    let op = format!("gemm_swiglu [{rows}, {n}, {k}]");
    let worst = check_product(&gpu.download(&out, rows * n / 2, &op), &expected, k, &op);
    if rows == 1 { worst.max(swiglu_of_one(gpu, (n, k), bias_given)) } else { worst }
}

/// Rows of `a` from `input` on, with all heads of `n` columns but the last rotated by their position, from `position` on, into
/// rows from `out` on. What is 0 is left out.
fn rope(gpu: &mut Gpu, rows: usize, starts: [usize; 3], head_dim: usize, n: usize, k: usize) -> f64 {
    gpu.set(rows, starts);
    let [input, position, out_row] = starts;
    let columns = n - head_dim;
    let (linear, weight, bias) = gpu.linear(n, k, true);
    let a = noise((input + rows) * k, 8);
    let (table, table_gpu) = gpu.rope_table(position + rows + JUNK_ROWS, head_dim);
    let (stream, factors) = gpu.residual_of(&a, k, 28);
    let mut expected = product_of_stream(&a[input * k..], &factors[input..], &weight, &bias, n, k);
    for (row, out) in expected.chunks_mut(n).enumerate() {
        out[..columns].chunks_mut(head_dim).for_each(|head| rotate(head, &table, position + row));
    }
    let rotation = Rotation { table: &table_gpu, head_dim, columns };
    let mut out = gpu.canaries(out_row + rows, n);
    let shift = |which: usize| (starts[which] > 0).then(|| gpu.shift(which));
    let (live, given) = (gpu.rows(rows), Starts { input: shift(0), position: shift(1), out: shift(2) });
    gpu.device.gemm_rope(&mut out, Normed { residual: &stream, eps: EPS }, &linear, rotation, live, given).unwrap();
    let op = format!("gemm_rope [{rows}, {n}, {k}] from {starts:?}");
    let out = gpu.download(&out, (out_row + rows) * n, &op);
    assert!(out[..out_row * n].iter().all(|value| *value == CANARY.to_f64()), "{op} wrote before its rows");
    check_product(&out[out_row * n..], &expected, k, &op)
}

/// Runs `check`, which returns the worst error, with the kernels made for this GPU, and on Hopper with the portable ones
/// too.
fn with_all_kernels(name: &str, check: impl Fn(&mut Gpu) -> f64) {
    let mut gpu = Gpu::open();
    if gpu.device.runs_hopper_kernels() {
        println!("{name} on Hopper: worst error {:.2} of the bound", check(&mut gpu));
        gpu.device.run_portable_kernels();
    }
    println!("{name}: worst error {:.2} of the bound", check(&mut gpu));
}

#[test]
#[ignore = "needs a GPU"]
fn gemm_residual() {
    with_all_kernels("gemm_residual", |gpu| {
        let mut worst = 0.0f64;
        for shape in LINEARS {
            for rows in [1, 64, 65, 127, 129, 300] {
                for bias in [false, true] {
                    worst = worst.max(residual(gpu, rows, shape, bias));
                }
            }
        }
        worst
    });
}

#[test]
#[ignore = "needs a GPU"]
fn gemm_swiglu() {
    with_all_kernels("gemm_swiglu", |gpu| {
        let mut worst = 0.0f64;
        for shape in LINEARS {
            for rows in [1, 63, 128, 200] {
                for bias in [false, true] {
                    worst = worst.max(swiglu(gpu, rows, shape, bias));
                }
            }
        }
        worst
    });
}

#[test]
#[ignore = "needs a GPU"]
fn gemm_rope() {
    with_all_kernels("gemm_rope", |gpu| {
        let mut worst = 0.0f64;
        for (head_dim, n, k) in [(64, 640, 384), (128, 384, 896), (64, 128, 72)] {
            for (rows, starts) in [(1, [0; 3]), (65, [0; 3]), (130, [17, 17, 0]), (70, [0, 128, 128]), (9, [3, 131, 0])]
            {
                worst = worst.max(rope(gpu, rows, starts, head_dim, n, k));
            }
        }
        worst
    });
}

/// The tile that a product is made of depends on the number of rows. What comes out for a row may not: keys and values of
/// one step serve the next.
#[test]
#[ignore = "needs a GPU"]
fn rows_are_the_same_to_the_bit_however_many_there_are() {
    let most = *READING_LENGTHS.last().unwrap();
    with_all_kernels("products of fewer rows", |gpu| {
        let eps = EPS;
        for (n, k) in [(1152, 896), (896, 896), (896, 4864), (672, 896), (9728, 896), (640, 384)] {
            let ((linear, ..), (plain, ..)) = (gpu.linear(n, k, true), gpu.linear(n, k, false));
            let (input, _) = gpu.residual_of(&noise(most * k, 31), k, 32);
            let (x, norm) = (to_f32(&noise(most * n, 33)), noise(n, 34));
            let norm_gpu = gpu.upload(&norm);
            let (_, table) = gpu.rope_table(most + JUNK_ROWS, 64);
            let rotation = Rotation { table: &table, head_dim: 64, columns: 128 };
            let mut all: Vec<Vec<u32>> = Vec::new();
            for rows in [most, 1, 129, 640, 1151, 1894] {
                gpu.set(rows, []);
                let normed = Normed { residual: &input, eps };
                let live = gpu.rows(rows);
                let (mut rope, mut h, mut plain_h) =
                    (gpu.canaries(rows, n), gpu.canaries(rows, n / 2), gpu.canaries(rows, n / 2));
                let mut stream = gpu.residual_canaries(&x[..rows * n], &norm);
                let norms = Scaling { from: &norm_gpu, to: &norm_gpu };
                gpu.device.gemm_rope(&mut rope, normed, &linear, rotation, live, Starts::default()).unwrap();
                gpu.device.gemm_swiglu(&mut h, normed, &linear, live).unwrap();
                gpu.device.gemm_swiglu(&mut plain_h, normed, &plain, live).unwrap();
                gpu.device.gemm_residual(&mut stream, &input.scaled, &linear, norms, live).unwrap();
                let halves = |out: &CudaSlice<bf16>, width: usize| -> Vec<u32> {
                    gpu.fetch(out)[..rows * width].iter().map(|value| value.to_bits().into()).collect()
                };
                let words = |out: &CudaSlice<f32>, width: usize| -> Vec<u32> {
                    gpu.fetch(out)[..rows * width].iter().map(|value| value.to_bits()).collect()
                };
                let (scaled, squares) = (halves(&stream.scaled, n), words(&stream.squares, slots(n)));
                let rest = gpu.fetch(&stream.rest)[..rows * n].iter().map(|&bits| bits.into()).collect();
                let (h, plain_h) = (halves(&h, n / 2), halves(&plain_h, n / 2));
                let outputs = vec![halves(&rope, n), h, plain_h, scaled, rest, squares];
                if all.is_empty() {
                    all = outputs;
                    continue;
                }
                for (which, (whole, part)) in all.iter().zip(&outputs).enumerate() {
                    assert!(whole[..part.len()] == part[..], "output {which} of [{rows}, {n}, {k}] is another");
                }
            }
        }
        0.0
    });
}

#[test]
#[ignore = "needs a GPU"]
fn gemm_at_reading_lengths() {
    with_all_kernels("gemm at reading lengths", |gpu| {
        let mut worst = 0.0f64;
        for rows in READING_LENGTHS {
            for shape in [(384, 640), (896, 896), (896, 4864), (272, 72)] {
                worst = worst.max(residual(gpu, rows, shape, false));
            }
            for shape in [(2048, 384), (9728, 896), (272, 72)] {
                worst = worst.max(swiglu(gpu, rows, shape, false));
            }
            for (head_dim, n, k) in [(64, 640, 384), (64, 1152, 896), (128, 384, 72)] {
                worst = worst.max(rope(gpu, rows, [0; 3], head_dim, n, k));
                worst = worst.max(rope(gpu, rows - 1100, [1100, 1100, 0], head_dim, n, k));
                worst = worst.max(rope(gpu, rows - 1024, [0, 1024, 1024], head_dim, n, k));
            }
        }
        worst
    });
}

/// Shapes for which Hopper's kernels take every tile that they have, in clusters of two and of four, and a step longer than the
/// host chooses tiles for; short sums, for the reference's sake.
#[test]
#[ignore = "needs a GPU"]
fn gemm_by_every_tile() {
    with_all_kernels("gemm by every tile", |gpu| {
        let mut worst = 0.0f64;
        for rows in [1894, 2561, 2900, 3400, 3900, 4100] {
            for n in [896, 1024, 1152] {
                worst = worst.max(residual(gpu, rows, (n, 72), true));
                for head_dim in [32, 64, 128] {
                    worst = worst.max(rope(gpu, rows, [0; 3], head_dim, n, 72));
                }
            }
        }
        // Tiles of 112 columns, all of a cluster beside each other; of 672 columns the last two are nobody's. Of 2780 rows the last
        // 92 are one part of two that a tile's CTAs copy, and some of the second strip.
        for (rows, n) in [(1860, 448), (1860, 672), (1860, 896), (1860, 1344), (2800, 896), (2780, 896)] {
            worst = worst.max(residual(gpu, rows, (n, 896), n == 672));
        }
        worst = worst.max(residual(gpu, 8300, (272, 72), false));
        worst = worst.max(swiglu(gpu, 8300, (2048, 72), false));
        worst
    });
}

#[test]
#[ignore = "needs a GPU"]
fn gemv_logits() {
    const CANARY: f32 = 7.7e7;
    let gpu = Gpu::open();
    let mut worst = 0.0f64;
    for (n, k) in [(16, 8), (256, 64), (8192, 384), (272, 72), (4096, 3584), (1008, 896)] {
        let (linear, weight, none) = gpu.linear(n, k, false);
        let (a, norm) = (noise(k, 14), noise(k, 18));
        let (expected, magnitudes) = normed_product(&a, &norm, &weight, &none);
        let mut out = gpu.upload(&vec![CANARY; n + CANARIES]);
        let mut best = gpu.upload(&[0u64]);
        let norm_gpu = gpu.upload(&norm);
        let norm = Norm { weight: &norm_gpu, eps: EPS };
        // Columns behind the vocabulary are none of its tokens.
        let vocab_size = n - 5;
        gpu.device
            .gemv_logits(&mut out, &mut best, &gpu.upload(&to_f32(&a)), norm, &linear.weight, [vocab_size, n])
            .unwrap();
        let out = gpu.fetch(&out);
        assert!(out[n..].iter().all(|value| *value == CANARY), "gemv_logits [{n}, {k}] wrote behind its row");
        let likeliest = (0..vocab_size).max_by(|a, b| out[*a].total_cmp(&out[*b]).then(b.cmp(a))).unwrap();
        let best = gpu.fetch(&best)[0];
        assert_eq!((1 << 24) - 1 - (best & 0xff_ffff) as usize, likeliest, "gemv_logits [{n}, {k}]");
        let out: Vec<f64> = out[..n].iter().map(|&value| value as f64).collect();
        let op = format!("gemv_logits [{n}, {k}]");
        worst = worst.max(check_within(&out, &expected, |i| fp32_sum(magnitudes[i], k), &op));
    }
    println!("gemv_logits: worst error {worst:.2} of the bound");
}

/// One row's product, rotated and written to `position` among rows that must stay as they are. `launch` makes it of a row;
/// before the rotation it is off by `before`, given the largest sum of its terms' magnitudes and k.
pub fn check_rope_of_one(
    gpu: &mut Gpu,
    name: &str,
    (head_dim, n, k): (usize, usize, usize),
    (position, columns): (usize, usize),
    launch: impl FnOnce(&Gpu, &mut CudaSlice<bf16>, &CudaSlice<f32>, Norm, &DeviceLinear, Rotation),
    before: impl FnOnce(f64, usize) -> f64,
) -> f64 {
    gpu.set(1, [position, 0]);
    let rows = 64;
    let (linear, weight, bias) = gpu.linear(n, k, columns > 0);
    let (a, norm) = (noise(k, 15), noise(k, 19));
    let (mut expected, magnitudes) = normed_product(&a, &norm, &weight, &bias);
    let norm_gpu = gpu.upload(&norm);
    let norm = Norm { weight: &norm_gpu, eps: EPS };
    let (table, table_gpu) = gpu.rope_table(rows + JUNK_ROWS + CANARIES.div_ceil(n), head_dim);
    expected[..columns].chunks_mut(head_dim).for_each(|head| rotate(head, &table, position));
    let rotation = Rotation { table: &table_gpu, head_dim, columns };
    let mut out = gpu.canaries(rows, n);
    launch(gpu, &mut out, &gpu.upload(&to_f32(&a)), norm, &linear, rotation);
    let op = format!("{name} [{n}, {k}] to row {position}, {columns} columns rotated");
    let out = gpu.fetch(&out);
    let (start, end) = (position * n, (position + 1) * n);
    let others = out[..start].iter().chain(&out[end..]);
    assert!(others.into_iter().all(|value| *value == CANARY), "{op} wrote beside its row");
    let out: Vec<f64> = out[start..end].iter().map(|value| value.to_f64()).collect();
    // A rotation adds two products, each times at most one: together off by less than twice the worst of all.
    let before = 2.0 * before(magnitudes.iter().copied().fold(0.0, f64::max), k);
    check_within(&out, &expected, |i| expected[i].abs() * BF16_ROUNDING * 1.01 + before, &op)
}

#[test]
#[ignore = "needs a GPU"]
fn gemv_rope() {
    let mut gpu = Gpu::open();
    let mut worst = 0.0f64;
    for shape @ (head_dim, n, _) in [(64, 640, 384), (128, 384, 896), (64, 128, 72), (64, 192, 8)] {
        for position in [0, 1, 17, 63] {
            for columns in [0, n - head_dim, n] {
                let launch = |gpu: &Gpu, out: &mut _, x: &_, norm: Norm, linear: &_, rotation: Rotation| {
                    gpu.device.gemv_rope(out, x, norm, linear, rotation, gpu.shift(0)).unwrap();
                };
                let error = check_rope_of_one(&mut gpu, "gemv_rope", shape, (position, columns), launch, fp32_sum);
                worst = worst.max(error);
            }
        }
    }
    println!("gemv_rope: worst error {worst:.2} of the bound");
}
