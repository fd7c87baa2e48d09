//! Causal grouped-query attention in fp32, and the head-summed probabilities that scoring reads.

use rayon::prelude::*;

use super::gemm::{Mat, matmul};
use super::math::softmax;

/// Rows handled at a time: small enough for their probabilities to stay in cache, large enough to reuse keys.
pub const BLOCK_ROWS: usize = 64;

/// Geometry of one attention layer. Queries stand at positions `past..past + rows`, keys and values at `0..past +
/// rows`.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Position of the first query row.
    pub past: usize,
    /// Tokens a row may attend to, itself included.
    pub sliding_window: Option<usize>,
    /// Keys, `[past + rows, num_kv_heads * head_dim]`.
    pub k: &'a [f32],
}

impl Attention<'_> {
    /// First key that the row at `position` may attend to.
    fn first_key(&self, position: usize) -> usize {
        self.sliding_window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Probabilities of one head for `rows` query rows from `position` on: `probabilities[r, j]` for key
    /// `first_key(position) + j`, zero where masked. Returns how many keys a row has.
    fn probabilities(&self, probabilities: &mut Vec<f32>, q: Mat, rows: usize, head: usize, position: usize) -> usize {
        let kv_dim = self.num_kv_heads * self.head_dim;
        let kv_head = head / (self.num_heads / self.num_kv_heads);
        let first = self.first_key(position);
        let keys = position + rows - first;
        let k = Mat::new(&self.k[first * kv_dim + kv_head * self.head_dim..], keys, self.head_dim, kv_dim);
        probabilities.resize(rows * keys, 0.0);
        matmul(probabilities, keys, (self.head_dim as f32).powf(-0.5), q, k.t(), false);
        for (r, row) in probabilities.chunks_mut(keys).enumerate() {
            let from = self.first_key(position + r) - first;
            let to = position + r + 1 - first;
            row[..from].fill(0.0);
            softmax(&mut row[from..to]);
            row[to..].fill(0.0);
        }
        keys
    }

    /// `out = softmax(q k^T / sqrt(head_dim)) v` per head; `q` and `out` are `[rows, num_heads * head_dim]`, `v` is as
    /// `k`.
    pub fn attend(&self, out: &mut [f32], q: &[f32], v: &[f32]) {
        let q_dim = self.num_heads * self.head_dim;
        let kv_dim = self.num_kv_heads * self.head_dim;
        let group = self.num_heads / self.num_kv_heads;
        let blocks = out.par_chunks_mut(BLOCK_ROWS * q_dim).zip(q.par_chunks(BLOCK_ROWS * q_dim)).enumerate();
        blocks.for_each_init(Vec::new, |probabilities, (block, (out, q))| {
            let position = self.past + block * BLOCK_ROWS;
            let rows = q.len() / q_dim;
            let first = self.first_key(position);
            for head in 0..self.num_heads {
                let column = head * self.head_dim;
                let q = Mat::new(&q[column..], rows, self.head_dim, q_dim);
                let keys = self.probabilities(probabilities, q, rows, head, position);
                let v = &v[first * kv_dim + head / group * self.head_dim..];
                let p = Mat::new(probabilities, rows, keys, keys);
                matmul(&mut out[column..], q_dim, 1.0, p, Mat::new(v, keys, self.head_dim, kv_dim), false);
            }
        });
    }

    /// `sums[r, j] = sum over heads of P[head, r, j]` over all keys: `[rows, past + rows]`, heads added in order.
    pub fn head_sums(&self, q: &[f32]) -> Vec<f32> {
        let q_dim = self.num_heads * self.head_dim;
        let total = self.past + q.len() / q_dim;
        let mut sums = vec![0.0; q.len() / q_dim * total];
        let blocks = sums.par_chunks_mut(BLOCK_ROWS * total).zip(q.par_chunks(BLOCK_ROWS * q_dim)).enumerate();
        blocks.for_each_init(Vec::new, |probabilities, (block, (sums, q))| {
            let position = self.past + block * BLOCK_ROWS;
            let rows = q.len() / q_dim;
            let first = self.first_key(position);
            for head in 0..self.num_heads {
                let q = Mat::new(&q[head * self.head_dim..], rows, self.head_dim, q_dim);
                let keys = self.probabilities(probabilities, q, rows, head, position);
                for (sums, p) in sums.chunks_mut(total).zip(probabilities.chunks(keys)) {
                    for (sum, p) in sums[first..].iter_mut().zip(p) {
                        *sum += p;
                    }
                }
            }
        });
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the definition, in fp64, with grouped heads, a past, and a window.
    #[test]
    fn agrees_with_the_definition() {
        let (num_heads, num_kv_heads, head_dim, past, rows) = (4, 2, 8, 3, 70);
        let mut state = 1u64;
        let mut random = |len: usize| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            };
            (0..len).map(|_| next()).collect()
        };
        let q = random(rows * num_heads * head_dim);
        let k = random((past + rows) * num_kv_heads * head_dim);
        let v = random((past + rows) * num_kv_heads * head_dim);
        for sliding_window in [None, Some(5)] {
            let attention = Attention { num_heads, num_kv_heads, head_dim, past, sliding_window, k: &k };
            let mut out = vec![f32::NAN; q.len()];
            attention.attend(&mut out, &q, &v);
            let sums = attention.head_sums(&q);
            for r in 0..rows {
                let position = past + r;
                let mut expected_sums = vec![0.0f64; past + rows];
                for h in 0..num_heads {
                    let at = |x: &[f32], row: usize, heads: usize, head: usize, d: usize| {
                        x[(row * heads + head) * head_dim + d] as f64
                    };
                    let kv = h / 2;
                    let from = sliding_window.map_or(0, |w| (position + 1).saturating_sub(w));
                    let dot = |j: usize| -> f64 {
                        (0..head_dim).map(|d| at(&q, r, num_heads, h, d) * at(&k, j, num_kv_heads, kv, d)).sum()
                    };
                    let weights: Vec<f64> =
                        (from..=position).map(|j| (dot(j) / (head_dim as f64).sqrt()).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for d in 0..head_dim {
                        let terms = weights.iter().enumerate();
                        let expected: f64 = terms.map(|(j, w)| w / total * at(&v, from + j, num_kv_heads, kv, d)).sum();
                        assert!((expected - out[(r * num_heads + h) * head_dim + d] as f64).abs() < 1e-5);
                    }
                    for (j, w) in weights.iter().enumerate() {
                        expected_sums[from + j] += w / total;
                    }
                }
                for (expected, &sum) in expected_sums.iter().zip(&sums[r * (past + rows)..]) {
                    assert!((expected - sum as f64).abs() < 1e-5);
                }
            }
        }
    }
}
