//! Each kernel against its definition in fp64, on a GPU: `cargo test --release --test gpu_ops -- --ignored`.
#![cfg(gleaner_cuda)]

use gleaner::cuda::{CudaDevice, ops};
use half::bf16;

/// Rows that sit on, just below and just above every tile edge the kernels have.
const ROWS: [usize; 10] = [1, 63, 64, 65, 127, 128, 129, 1151, 1894, 2561];

/// bf16 has 8 significant bits: rounding to it is off by at most 2^-8 of the value.
const BF16_ROUNDING: f64 = 1.0 / 256.0;

/// Elements behind every output that a kernel must leave alone.
const CANARIES: usize = 1024;
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

#[test]
#[ignore = "needs a GPU"]
fn rms_norm() {
    let device = CudaDevice::open(0).unwrap();
    let stream = device.stream();
    let eps = 1e-6f32;
    let mut worst = 0.0f64;
    for hidden_size in [8, 128, 384, 896, 3584, 4096] {
        for rows in ROWS {
            let (x, weight) = (noise(rows * hidden_size, 1), noise(hidden_size, 2));
            let mut out = stream.clone_htod(&vec![CANARY; x.len() + CANARIES]).unwrap();
            let (x_gpu, weight_gpu) = (stream.clone_htod(&x).unwrap(), stream.clone_htod(&weight).unwrap());
            ops::rms_norm(&device, &mut out, &x_gpu, &weight_gpu, rows, hidden_size, eps).unwrap();
            let out = stream.clone_dtoh(&out).unwrap();
            assert!(out[x.len()..].iter().all(|value| *value == CANARY), "wrote behind [{rows}, {hidden_size}]");
            for (out, x) in out.chunks(hidden_size).zip(x.chunks(hidden_size)) {
                let square: f64 = x.iter().map(|x| x.to_f64() * x.to_f64()).sum();
                let scale = (square / hidden_size as f64 + eps as f64).sqrt().recip();
                for ((out, x), weight) in out.iter().zip(x).zip(&weight) {
                    let expected = x.to_f64() * scale * weight.to_f64();
                    let error = (out.to_f64() - expected).abs();
                    // One rounding of the result, and fp32 arithmetic before it.
                    assert!(error <= expected.abs() * (BF16_ROUNDING * 1.01), "{out} for {expected}");
                    worst = worst.max(error / expected.abs().max(f64::MIN_POSITIVE));
                }
            }
        }
    }
    println!("rms_norm: worst relative error {worst:.2e}, rounding alone allows {:.2e}", BF16_ROUNDING);
}

#[test]
#[ignore = "needs a GPU"]
fn wrong_shapes_are_errors() {
    let device = CudaDevice::open(0).unwrap();
    let stream = device.stream();
    let x = stream.alloc_zeros::<bf16>(64).unwrap();
    let mut out = stream.alloc_zeros::<bf16>(64).unwrap();
    for (rows, hidden_size) in [(1, 12), (9, 8), (1, 0), (usize::MAX, 8)] {
        let error = ops::rms_norm(&device, &mut out, &x, &x, rows, hidden_size, 1e-6).unwrap_err();
        assert!(error.to_string().contains("rms_norm"), "{error}");
    }
    assert!(ops::rms_norm(&device, &mut out, &x, &x, 8, 8, 1e-6).is_ok());
    assert!(CudaDevice::open(4096).is_err());
}
