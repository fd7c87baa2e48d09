//! The decoder in fp32: layers, the last layer as scoring needs it, and the output head.

use rayon::prelude::*;

use super::attention::{Attention, BLOCK_ROWS};
use super::gemm::{Mat, matmul};
use super::math::{add, dot, rms_norm, rms_norm_heads, silu_mul};
use super::score::QuestionAttention;
use crate::model::{Config, LayerWeights, Linear, Model, RopeTable, Tensor};
use crate::range::range;
use crate::timings::{Clock, Stage, Work};

/// Rows up to which a product reads its weights once, straight from the checkpoint, instead of converting them.
pub const GEMV_ROWS: usize = 4;
/// Elements of a weight that are converted at a time.
const PANEL_ELEMENTS: usize = 1 << 22;

/// Keys and values of one layer, `[tokens, num_key_value_heads * head_dim]` each.
#[derive(Default)]
pub struct LayerCache {
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Buffers of a pass, kept between passes so that a step allocates nothing new.
#[derive(Default)]
pub struct Workspace {
    /// The residual stream, `[rows, hidden_size]`.
    x: Vec<f32>,
    normed: Vec<f32>,
    q: Vec<f32>,
    kv: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    panel: Vec<f32>,
    /// Of each layer; of the last the keys alone.
    caches: Vec<LayerCache>,
}

/// Upper bound of what [`Decoder::question_attention`] allocates for `tokens` tokens of which `question_rows` are read.
pub fn workspace_bytes(config: &Config, tokens: usize, question_rows: usize) -> u64 {
    let (q_dim, kv_dim, mlp) = (config.q_dim(), config.kv_dim(), config.intermediate_size);
    let caches = (2 * config.num_hidden_layers - 1) * kv_dim;
    let widths = 2 * config.hidden_size + 2 * q_dim + kv_dim + 2 * mlp + config.head_dim + caches;
    let largest_weight = config.hidden_size.max(q_dim) * mlp.max(q_dim).max(config.hidden_size);
    let probabilities = BLOCK_ROWS * tokens * rayon::current_num_threads();
    let floats = tokens * widths + probabilities + question_rows * tokens + largest_weight.min(PANEL_ELEMENTS);
    (floats * size_of::<f32>()) as u64
}

/// A model with what fp32 arithmetic wants prepared: norms, biases and the rotary table.
pub struct Decoder<'a> {
    pub model: &'a Model,
    rope: RopeTable,
    /// Of the operations, which belong to `stage`.
    pub clock: Clock,
    pub stage: Stage,
}

impl<'a> Decoder<'a> {
    /// Ready for prompts of up to `max_tokens` tokens.
    pub fn new(model: &'a Model, max_tokens: usize) -> Decoder<'a> {
        Decoder { model, rope: RopeTable::new(&model.config, max_tokens), clock: Clock::default(), stage: Stage::Read }
    }

    /// Runs an operation under its name.
    pub fn time<T>(&self, name: &str, work: Work, rows: usize, operation: impl FnOnce() -> T) -> T {
        self.clock.time(self.stage, name, work.flops(rows, 0), operation)
    }

    /// A product under its name.
    fn linear(&self, name: &str, out: &mut [f32], x: &[f32], weights: &Linear, panel: &mut Vec<f32>) {
        let (n, k) = (weights.weight.shape()[0], weights.weight.shape()[1]);
        self.time(name, Work::product(n, k), x.len() / k, || linear(out, x, weights, panel));
    }

    fn embed(&self, x: &mut Vec<f32>, tokens: &[u32]) {
        let hidden = self.model.config.hidden_size;
        self.time("embed", Work::Uncounted, tokens.len(), || {
            x.resize(tokens.len() * hidden, 0.0);
            for (row, &token) in x.chunks_mut(hidden).zip(tokens) {
                self.model.embed_tokens.to_f32(token as usize * hidden, row);
            }
        });
    }

    fn norm(&self, out: &mut Vec<f32>, x: &[f32], weight: &Tensor) {
        let config = &self.model.config;
        self.time("rms_norm", Work::Uncounted, x.len() / config.hidden_size, || {
            out.resize(x.len(), 0.0);
            rms_norm(out, x, &weight.to_vec_f32(), config.rms_norm_eps);
        });
    }

    /// Projects `rows` normalised rows from position `position` on to heads, normalised (Qwen3) and rotated.
    #[allow(clippy::too_many_arguments, reason = "a layer's own parts, and the name they are timed by")]
    fn rotated_heads(
        &self,
        name: &str,
        heads: &mut [f32],
        normed: &[f32],
        proj: &Linear,
        norm: Option<&Tensor>,
        position: usize,
        panel: &mut Vec<f32>,
    ) {
        self.linear(name, heads, normed, proj, panel);
        let width = proj.weight.shape()[0];
        self.time("rotate", Work::Uncounted, heads.len() / width, || self.rotate(heads, width, norm, position));
    }

    /// Normalises (Qwen3) and rotates rows of `width` from position `position` on.
    fn rotate(&self, heads: &mut [f32], width: usize, norm: Option<&Tensor>, position: usize) {
        let config = &self.model.config;
        if let Some(norm) = norm {
            rms_norm_heads(heads, &norm.to_vec_f32(), config.rms_norm_eps);
        }
        let half = config.head_dim / 2;
        heads.par_chunks_mut(width).enumerate().for_each(|(row, heads)| {
            let at = (position + row) * half;
            let (cos, sin) = (&self.rope.cos[at..at + half], &self.rope.sin[at..at + half]);
            for head in heads.chunks_mut(2 * half) {
                let (low, high) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (low[i], high[i]);
                    low[i] = a * cos[i] - b * sin[i];
                    high[i] = b * cos[i] + a * sin[i];
                }
            }
        });
    }

    /// One whole layer over the rows in `ws.x`, which stand behind the tokens already in `cache`.
    fn layer(&self, weights: &LayerWeights, ws: &mut Workspace, cache: &mut LayerCache) {
        let config = &self.model.config;
        let rows = ws.x.len() / config.hidden_size;
        let (q_dim, kv_dim) = (config.q_dim(), config.kv_dim());
        let past = cache.k.len() / kv_dim;

        self.norm(&mut ws.normed, &ws.x, &weights.input_layernorm);
        let (q_norm, k_norm) = (weights.q_norm.as_ref(), weights.k_norm.as_ref());
        ws.q.resize(rows * q_dim, 0.0);
        self.rotated_heads("product q", &mut ws.q, &ws.normed, &weights.q_proj, q_norm, past, &mut ws.panel);
        ws.kv.resize(rows * kv_dim, 0.0);
        self.rotated_heads("product k", &mut ws.kv, &ws.normed, &weights.k_proj, k_norm, past, &mut ws.panel);
        cache.k.extend_from_slice(&ws.kv);
        self.linear("product v", &mut ws.kv, &ws.normed, &weights.v_proj, &mut ws.panel);
        cache.v.extend_from_slice(&ws.kv);

        ws.attended.resize(rows * q_dim, 0.0);
        let work = Work::Attention { q_dim, kv_dim, window: weights.sliding_window.unwrap_or(0) };
        self.clock.time(self.stage, "attention", work.flops(rows, past), || {
            self.attention(weights, past, &cache.k).attend(&mut ws.attended, &ws.q, &cache.v);
        });
        self.linear("product o", &mut ws.normed, &ws.attended, &weights.o_proj, &mut ws.panel);
        self.time("add", Work::Uncounted, rows, || add(&mut ws.x, &ws.normed));

        self.norm(&mut ws.normed, &ws.x, &weights.post_attention_layernorm);
        ws.gate.resize(rows * config.intermediate_size, 0.0);
        ws.up.resize(rows * config.intermediate_size, 0.0);
        self.linear("product gate", &mut ws.gate, &ws.normed, &weights.gate_proj, &mut ws.panel);
        self.linear("product up", &mut ws.up, &ws.normed, &weights.up_proj, &mut ws.panel);
        self.time("silu_mul", Work::Uncounted, rows, || silu_mul(&mut ws.gate, &ws.up));
        self.linear("product down", &mut ws.normed, &ws.gate, &weights.down_proj, &mut ws.panel);
        self.time("add", Work::Uncounted, rows, || add(&mut ws.x, &ws.normed));
    }

    fn attention<'k>(&self, weights: &LayerWeights, past: usize, k: &'k [f32]) -> Attention<'k> {
        let config = &self.model.config;
        Attention {
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            past,
            sliding_window: weights.sliding_window,
            k,
        }
    }

    /// Runs `tokens` through all layers but the last, and of that computes only what scores need: keys of all rows
    /// and queries of the rows from `question_start` on. No values, no output projection, no MLP, no head. The first `reused`
    /// tokens are those of the last run in `ws`, of which their keys and values are taken.
    pub fn question_attention(
        &self,
        ws: &mut Workspace,
        tokens: &[u32],
        reused: usize,
        question_start: usize,
    ) -> QuestionAttention {
        let config = &self.model.config;
        let mut caches = std::mem::take(&mut ws.caches);
        caches.resize_with(self.model.layers.len(), LayerCache::default);
        let (kept, new) = (reused * config.kv_dim(), (tokens.len() - reused) * config.kv_dim());
        for (index, cache) in caches.iter_mut().enumerate() {
            cache.k.truncate(kept);
            cache.v.truncate(kept);
            // No more than is needed: `workspace_bytes` counts on it.
            cache.k.reserve_exact(new);
            if index + 1 < self.model.layers.len() {
                cache.v.reserve_exact(new);
            }
        }
        self.embed(&mut ws.x, &tokens[reused..]);
        let (last, layers) = self.model.layers.split_last().expect("a checked configuration has layers");
        for (index, (layer, cache)) in layers.iter().zip(&mut caches).enumerate() {
            let _layer = range!("layer {index}");
            self.layer(layer, ws, cache);
        }
        self.norm(&mut ws.normed, &ws.x, &last.input_layernorm);
        ws.kv.resize((tokens.len() - reused) * config.kv_dim(), 0.0);
        let (q_norm, k_norm) = (last.q_norm.as_ref(), last.k_norm.as_ref());
        self.rotated_heads("product k", &mut ws.kv, &ws.normed, &last.k_proj, k_norm, reused, &mut ws.panel);
        let keys = &mut caches[layers.len()].k;
        keys.extend_from_slice(&ws.kv);
        let rows = tokens.len() - question_start;
        ws.q.resize(rows * config.q_dim(), 0.0);
        let question = &ws.normed[(question_start - reused) * config.hidden_size..];
        let panel = &mut ws.panel;
        self.rotated_heads("product q", &mut ws.q, question, &last.q_proj, q_norm, question_start, panel);
        let work = Work::QuestionLogits { question_rows: rows, q_dim: config.q_dim(), kv_dim: config.kv_dim() };
        let head_sums = self.time("question_logits", work, tokens.len(), || {
            self.attention(last, question_start, keys).head_sums(&ws.q)
        });
        ws.caches = caches;
        QuestionAttention { head_sums, tokens: tokens.len() }
    }

    /// Runs `tokens` behind what `caches` hold (one per layer) and returns the last `rows` rows behind the final norm,
    /// `[rows, hidden_size]`.
    pub fn hidden(&self, ws: &mut Workspace, caches: &mut [LayerCache], tokens: &[u32], rows: usize) -> Vec<f32> {
        self.embed(&mut ws.x, tokens);
        for (index, (layer, cache)) in self.model.layers.iter().zip(caches).enumerate() {
            let _layer = range!("layer {index}");
            self.layer(layer, ws, cache);
        }
        let from = ws.x.len() - rows * self.model.config.hidden_size;
        let mut hidden = Vec::new();
        self.norm(&mut hidden, &ws.x[from..], &self.model.norm);
        hidden
    }

    /// Logits of `hidden` rows behind the final norm, `[rows, vocab_size]`.
    pub fn logits(&self, ws: &mut Workspace, hidden: &[f32]) -> Vec<f32> {
        let config = &self.model.config;
        let mut logits = vec![0.0; hidden.len() / config.hidden_size * config.vocab_size];
        let head = Linear { weight: self.model.lm_head.clone(), bias: None };
        self.linear("product logits", &mut logits, hidden, &head, &mut ws.panel);
        logits
    }
}

/// `out = x weight^T + bias`; `out` is `[rows, out]`, `x` is `[rows, in]`. Weights are converted panel by panel, so
/// that they never lie in memory twice.
fn linear(out: &mut [f32], x: &[f32], linear: &Linear, panel: &mut Vec<f32>) {
    let (outputs, inputs) = (linear.weight.shape()[0], linear.weight.shape()[1]);
    let rows = x.len() / inputs;
    if rows <= GEMV_ROWS {
        for (out, x) in out.chunks_mut(outputs).zip(x.chunks(inputs)) {
            gemv(out, x, &linear.weight);
        }
    } else {
        let step = (PANEL_ELEMENTS / inputs).clamp(1, outputs);
        for start in (0..outputs).step_by(step) {
            let count = step.min(outputs - start);
            panel.resize(count * inputs, 0.0);
            panel.par_chunks_mut(inputs).enumerate().for_each(|(row, w)| {
                linear.weight.to_f32((start + row) * inputs, w);
            });
            let w = Mat::new(panel, count, inputs, inputs);
            matmul(&mut out[start..], outputs, 1.0, Mat::new(x, rows, inputs, inputs), w.t(), true);
        }
    }
    if let Some(bias) = &linear.bias {
        let bias = bias.to_vec_f32();
        out.par_chunks_mut(outputs).for_each(|row| add(row, &bias));
    }
}

fn gemv(out: &mut [f32], x: &[f32], weight: &Tensor) {
    const ROWS: usize = 64;
    out.par_chunks_mut(ROWS).enumerate().for_each_init(
        || vec![0.0; x.len()],
        |w, (block, out)| {
            for (row, out) in out.iter_mut().enumerate() {
                weight.to_f32((block * ROWS + row) * x.len(), w);
                *out = dot(w, x);
            }
        },
    );
}
