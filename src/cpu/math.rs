//! Elementwise fp32 arithmetic, written so that the compiler vectorises it for the processor at hand.

use std::f32::consts::{LN_2, LOG2_E};

use pulp::Arch;
use rayon::prelude::*;

/// Independent partial sums, so that a reduction vectorises; a fixed number, so that its result does not depend on
/// the processor's vector width.
const LANES: usize = 16;

/// e^x to within 2 units in the last place, for results that fp32 can hold as normal numbers.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    debug_assert!(r.abs() <= LN_2 / 2.0 + 1e-3);
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
}

#[inline(always)]
fn sum_by_lanes(len: usize, mut term: impl FnMut(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = len - len % LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
    }
    let tail: f32 = (whole..len).map(&mut term).sum();
    lanes.iter().sum::<f32>() + tail
}

/// `sum(a * b)`
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    Arch::new().dispatch(
        #[inline(always)]
        || sum_by_lanes(a.len(), |i| a[i] * b[i]),
    )
}

/// Softmax over all of `row`, in place.
pub fn softmax(row: &mut [f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut maxima = [f32::NEG_INFINITY; LANES];
            let chunks = row.chunks_exact(LANES);
            let tail = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for chunk in chunks {
                for (max, &x) in maxima.iter_mut().zip(chunk) {
                    *max = if x > *max { x } else { *max };
                }
            }
            let max = maxima.into_iter().fold(tail, f32::max);
            for x in row.iter_mut() {
                *x = exp(*x - max);
            }
            let scale = 1.0 / sum_by_lanes(row.len(), |i| row[i]);
            for x in row.iter_mut() {
                *x *= scale;
            }
        },
    );
}

/// `gate = silu(gate) * up`
pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
    const BLOCK: usize = 1 << 14;
    gate.par_chunks_mut(BLOCK).zip(up.par_chunks(BLOCK)).for_each(|(gate, up)| {
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for (g, u) in gate.iter_mut().zip(up) {
                    *g = *g / (1.0 + exp(-*g)) * u;
                }
            },
        )
    });
}

/// `x += y`
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// RMSNorm of each row of `weight.len()` elements: `out = x / sqrt(mean(x^2) + eps) * weight`.
pub fn rms_norm(out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    out.par_chunks_mut(width).zip(x.par_chunks(width)).for_each(|(out, x)| norm_row(out, x, weight, eps));
}

fn norm_row(out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let scale = 1.0 / (dot(x, x) / weight.len() as f32 + eps).sqrt();
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * w;
    }
}

/// RMSNorm of each head of `weight.len()` elements, in place (Qwen3's q and k).
pub fn rms_norm_heads(x: &mut [f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    x.par_chunks_mut(width).for_each(|x| {
        let scale = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
        for (x, w) in x.iter_mut().zip(weight) {
            *x = *x * scale * w;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_two_units_in_the_last_place() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0 + 0.001;
            let expected = (x as f64).exp();
            let error = (exp(x) as f64 - expected).abs() / expected;
            assert!(error < 2.4e-7, "exp({x}) is off by {error:e}");
        }
    }

    #[test]
    fn softmax_sums_to_one_over_odd_lengths() {
        for len in [1, 15, 16, 17, 100] {
            let mut row: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin() * 50.0 - 1e4).collect();
            softmax(&mut row);
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        }
    }
}
