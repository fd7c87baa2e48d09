//! Each kernel against its definition in fp64, on a GPU: `cargo test --release --test gpu_ops -- --ignored`.
#![cfg(gleaner_cuda)]

mod attention;
mod linear;
mod row;
mod rows;
mod sampling;
mod scoring;
mod selection;

use cudarc::driver::{CudaSlice, DeviceRepr};
use gleaner::cuda::CudaDevice;
use gleaner::cuda::ops::{DeviceLinear, Residual, Rows, Shift};
use half::bf16;
use rayon::prelude::*;

/// Lengths of real reading steps; the smaller counts in the tests sit on, just below and just above tile edges.
const READING_LENGTHS: [usize; 3] = [1151, 1894, 2561];

/// bf16 has 8 significant bits: rounding to it is off by at most 2^-8 of the value.
const BF16_ROUNDING: f64 = 1.0 / 256.0;

/// fp32 has 24 significant bits: each operation is off by at most 2^-24 of its result.
const FP32_ROUNDING: f64 = 1.0 / (1 << 24) as f64;

/// What norms add to the mean square.
const EPS: f32 = 1e-6;

/// Elements behind every output that a kernel must leave alone.
const CANARIES: usize = 4096;
const CANARY: bf16 = bf16::from_bits(0x7b7b);
const WORD_CANARY: f32 = f32::from_bits(0x7b7b_7b7b);
const REST_CANARY: u16 = 0x7b7b;

/// Slots of the squares of a row of the residual stream: GLEANER_SQUARES in kernels.h.
fn slots(width: usize) -> usize {
    width.div_ceil(512) * 16
}

/// Repeatable noise in 0..1.
struct Noise(u64);

impl Noise {
    fn new(seed: u64) -> Noise {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f64 / (1u64 << 24) as f64
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.unit() * limit as f64) as usize
    }
}

/// Repeatable noise in -1..1.
fn noise(len: usize, seed: u64) -> Vec<bf16> {
    let mut noise = Noise::new(seed);
    (0..len).map(|_| bf16::from_f64(2.0 * noise.unit() - 1.0)).collect()
}

/// The same, `factor` times as large.
fn scaled_noise(len: usize, seed: u64, factor: f32) -> Vec<bf16> {
    noise(len, seed).iter().map(|x| bf16::from_f32(x.to_f32() * factor)).collect()
}

fn to_f32(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

struct Gpu {
    device: CudaDevice,
    /// A row count, and three shifts.
    ints: CudaSlice<i32>,
}

/// Rows that a buffer holds beyond the live ones: junk that no kernel may read into a result.
const JUNK_ROWS: usize = 40;

impl Gpu {
    fn open() -> Gpu {
        let device = CudaDevice::open(0).unwrap();
        let ints = device.upload("integers", &[0; 4]).unwrap();
        Gpu { device, ints }
    }

    fn upload<T: DeviceRepr>(&self, values: &[T]) -> CudaSlice<T> {
        self.device.upload("a test's input", values).unwrap()
    }

    fn fetch<T: DeviceRepr>(&self, values: &CudaSlice<T>) -> Vec<T> {
        self.device.download("a test's output", values).unwrap()
    }

    /// Live rows of random numbers with NaN behind them.
    fn with_junk(&self, values: &[bf16], width: usize) -> CudaSlice<bf16> {
        self.upload(&[values, &vec![bf16::NAN; JUNK_ROWS * width]].concat())
    }

    fn with_canaries(&self, values: &[bf16], width: usize) -> CudaSlice<bf16> {
        self.upload(&[values, &vec![CANARY; JUNK_ROWS * width + CANARIES]].concat())
    }

    fn canaries(&self, rows: usize, width: usize) -> CudaSlice<bf16> {
        self.with_canaries(&vec![CANARY; rows * width], width)
    }

    /// A residual stream to be written: rows of `x` scaled with `norm`, no squares, canaries behind all.
    fn residual_canaries(&self, x: &[f32], norm: &[bf16]) -> Residual {
        let (width, rows) = (norm.len(), x.len() / norm.len());
        let halves = x.iter().zip(norm.iter().cycle()).map(|(x, weight)| split(x * stream_weight(*weight)));
        let (scaled, rest): (Vec<bf16>, Vec<u16>) = halves.unzip();
        let squares = [vec![0.0; rows * slots(width)], vec![WORD_CANARY; JUNK_ROWS * slots(width) + CANARIES]].concat();
        Residual {
            scaled: self.with_canaries(&scaled, width),
            rest: self.upload(&[rest, vec![REST_CANARY; JUNK_ROWS * width + CANARIES]].concat()),
            squares: self.upload(&squares),
        }
    }

    /// A residual stream to be read, of which the products see rows of `scaled` and a factor for each; NaN behind them.
    fn residual_of(&self, scaled: &[bf16], width: usize, seed: u64) -> (Residual, Vec<f64>) {
        let (rows, slots, mut noise) = (scaled.len() / width, slots(width), Noise::new(seed));
        let mean = 2.0 * width as f64 / slots as f64;
        let squares: Vec<f32> = (0..rows * slots).map(|_| (noise.unit() * mean) as f32).collect();
        let factor = |row: &[f32]| {
            let sum: f64 = row.iter().map(|&square| square as f64).sum();
            (sum / width as f64 + EPS as f64).sqrt().recip()
        };
        let factors = squares.chunks(slots).map(factor).collect();
        let squares = self.upload(&[&squares[..], &vec![f32::NAN; JUNK_ROWS * slots]].concat());
        (Residual { scaled: self.with_junk(scaled, width), rest: self.upload(&[REST_CANARY]), squares }, factors)
    }

    /// What an op left in a residual stream that is scaled with `norm`, where `expected` is known of x, each within `allowed`: x
    /// itself, the bf16 nearest to what is there, and sums of squares. Returns the worst error as a share of its bound.
    fn check_residual(
        &self,
        residual: &Residual,
        expected: &[f64],
        norm: &[bf16],
        allowed: impl Fn(usize) -> f64,
        op: &str,
    ) -> f64 {
        let (live, width) = (expected.len(), norm.len());
        let (scaled, rest) = (self.fetch(&residual.scaled), self.fetch(&residual.rest));
        assert!(scaled[live..].iter().all(|value| *value == CANARY), "{op} wrote behind its rows");
        assert!(rest[live..].iter().all(|value| *value == REST_CANARY), "{op} wrote the rest behind its rows");
        let of_norm: Vec<f64> =
            scaled.iter().zip(&rest).take(live).map(|(&scaled, &rest)| join(scaled, rest)).collect();
        let nearest = |i: usize| of_norm[i].abs() * BF16_ROUNDING;
        check_within(&scaled[..live].iter().map(|x| x.to_f64()).collect::<Vec<f64>>(), &of_norm, nearest, op);
        let weights = norm.iter().cycle().map(|weight| stream_weight(*weight) as f64);
        let x: Vec<f64> = of_norm.iter().zip(weights).map(|(x, weight)| x / weight).collect();
        let worst = check_within(&x, expected, allowed, op);
        let is_canary = |value: &f32| value.to_bits() == WORD_CANARY.to_bits();
        let (squares, live_slots) = (self.fetch(&residual.squares), live / width * slots(width));
        assert!(squares[live_slots..].iter().all(is_canary), "{op} wrote squares behind its rows");
        let sum = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>();
        let sums: Vec<f64> = x.chunks(width).map(sum).collect();
        let of_slots = squares[..live_slots].chunks(slots(width)).map(|row| row.iter().map(|&s| s as f64).sum());
        // Each of the additions is off by at most 2^-24 of the sum, and so is each square.
        let rounding = |row: usize| sums[row] * (width + 8) as f64 * FP32_ROUNDING;
        worst.max(check_within(&of_slots.collect::<Vec<f64>>(), &sums, rounding, op))
    }

    fn set<const N: usize>(&mut self, rows: usize, shifts: [usize; N]) {
        let ints: Vec<i32> = [rows].into_iter().chain(shifts).map(|value| value as i32).collect();
        self.device.upload_into("integers", &ints, &mut self.ints).unwrap();
    }

    fn rows(&self, live: usize) -> Rows<'_> {
        Rows { ints: &self.ints, index: 0, max: live + JUNK_ROWS }
    }

    /// One of the shifts.
    fn shift(&self, which: usize) -> Shift<'_> {
        Shift { ints: &self.ints, index: 1 + which }
    }

    /// The live part of an output, the rest of which must be untouched.
    fn download(&self, out: &CudaSlice<bf16>, live: usize, op: &str) -> Vec<f64> {
        let out = self.fetch(out);
        assert!(out[live..].iter().all(|value| *value == CANARY), "{op} wrote behind its rows");
        out[..live].iter().map(|value| value.to_f64()).collect()
    }

    fn linear(&self, n: usize, k: usize, bias: bool) -> (DeviceLinear, Vec<bf16>, Vec<bf16>) {
        let weight = scaled_noise(n * k, 3, 1.0 / (k as f32).sqrt());
        let values = if bias { noise(n, 4) } else { vec![bf16::ZERO; n] };
        let linear = DeviceLinear::new(self.upload(&weight), bias.then(|| self.upload(&values)), n, k);
        (linear, weight, values)
    }

    /// Cosines and sines by turns for so many positions, no two pairs of which are alike; and the table on the device.
    fn rope_table(&self, positions: usize, head_dim: usize) -> (Vec<f32>, CudaSlice<f32>) {
        let angles = (0..positions * head_dim / 2).map(|i| i as f32 * 0.37);
        let table: Vec<f32> = angles.flat_map(|angle| [angle.cos(), angle.sin()]).collect();
        let on_device = self.upload(&table);
        (table, on_device)
    }
}

/// A norm's weight as the residual stream is multiplied with it.
fn stream_weight(weight: bf16) -> f32 {
    let least = (1u64 << 60) as f32;
    weight.to_f32().abs().max(least.recip()).copysign(weight.to_f32())
}

/// An fp32 as the residual stream has it: the bf16 nearest to it, and the bits that this lacks.
fn split(x: f32) -> (bf16, u16) {
    let bits = x.to_bits().wrapping_add(0x8000);
    (bf16::from_bits((bits >> 16) as u16), bits as u16)
}

fn join(scaled: bf16, rest: u16) -> f64 {
    let bits = (u32::from(scaled.to_bits()) << 16 | u32::from(rest)).wrapping_sub(0x8000);
    f32::from_bits(bits) as f64
}

/// Rotates a head whose dimensions come as 8 of the lower half, 8 of the upper, and so on.
fn rotate(head: &mut [f64], table: &[f32], position: usize) {
    let pairs = head.len() / 2;
    for pair in 0..pairs {
        let low = pair / 8 * 16 + pair % 8;
        let at = (position * pairs + pair) * 2;
        let (cos, sin) = (table[at] as f64, table[at + 1] as f64);
        let (a, b) = (head[low], head[low + 8]);
        (head[low], head[low + 8]) = (a * cos - b * sin, b * cos + a * sin);
    }
}

/// `a weight^T + bias` in fp64 (fp32 products of bf16 are exact).
fn product(a: &[bf16], weight: &[bf16], bias: &[bf16], n: usize, k: usize) -> Vec<f64> {
    let (a, weight) = (to_f32(a), to_f32(weight));
    let dot = |a: &[f32], w: &[f32]| -> f64 {
        let mut sums = [0.0; 8];
        for (a, w) in a.as_chunks::<8>().0.iter().zip(w.as_chunks::<8>().0) {
            for ((sum, a), w) in sums.iter_mut().zip(a).zip(w) {
                *sum += (a * w) as f64;
            }
        }
        sums.iter().sum()
    };
    assert_eq!(k % 8, 0);
    let mut out = vec![0.0; a.len() / k * n];
    out.par_chunks_mut(n).zip(a.par_chunks(k)).for_each(|(out, a)| {
        for ((out, w), bias) in out.iter_mut().zip(weight.chunks(k)).zip(bias) {
            *out = dot(a, w) + bias.to_f64();
        }
    });
    out
}

/// One rounding of the result to bf16, and before it fp32 arithmetic on few values of order one.
fn check(out: &[f64], expected: &[f64], op: &str) -> f64 {
    check_product(out, expected, 0, op)
}

/// The same behind a product of `k` terms.
fn check_product(out: &[f64], expected: &[f64], k: usize, op: &str) -> f64 {
    check_within(out, expected, |i| expected[i].abs() * BF16_ROUNDING * 1.01 + accumulation(k), op)
}

/// How far off a sum of `k` products may be. Tensor cores add 16 of them at a time to a sum of order one and may cut it off
/// rather than round it, which loses up to 2^-23.
fn accumulation(k: usize) -> f64 {
    1e-5f64.max(k as f64 / 16.0 * 2.0 * FP32_ROUNDING)
}

/// Returns the largest error as a share of what is allowed, which is at most 1.
fn check_within(out: &[f64], expected: &[f64], allowed: impl Fn(usize) -> f64, op: &str) -> f64 {
    assert_eq!(out.len(), expected.len(), "{op}");
    let mut worst = 0.0f64;
    for (i, (out, expected)) in out.iter().zip(expected).enumerate() {
        let (error, allowed) = ((out - expected).abs(), allowed(i));
        assert!(error <= allowed, "{op}: element {i} is {out} for {expected}, {allowed:e} allowed");
        if error > 0.0 {
            worst = worst.max(error / allowed);
        }
    }
    worst
}
