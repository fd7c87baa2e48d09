//! The model's passes: a reading step over all rows, and a token of an answer.

use cudarc::driver::CudaSlice;
use half::bf16;

use super::CudaDevice;
use super::answer::Answering;
use super::model::{DeviceLayer, DeviceModel};
use super::ops::{Heads, Logits, Norm, Normed, Rotation, Rows, Sampled, Scaling, Shift, Starts, answer};
use super::workspace::{Activations, Workspace};
use crate::Result;
use crate::model::Config;
use crate::range::range;

/// The rows that a pass computes: those of a prompt from some token on.
#[derive(Clone, Copy)]
pub struct Live<'a> {
    /// Of the prompt.
    pub tokens: Rows<'a>,
    /// Of them computed, in the first rows of the activations.
    pub rows: Rows<'a>,
    /// The token of the first; `None` for 0.
    pub first: Option<Shift<'a>>,
}

impl<'a> Live<'a> {
    /// All of a prompt.
    pub fn all(tokens: Rows<'a>) -> Live<'a> {
        Live { tokens, rows: tokens, first: None }
    }

    /// Where its keys and values lie: by their positions.
    fn starts(self) -> Starts<'a> {
        Starts { input: None, position: self.first, out: self.first }
    }
}

/// What every pass needs.
#[derive(Clone, Copy)]
pub struct Forward<'a> {
    pub device: &'a CudaDevice,
    pub weights: &'a DeviceModel,
    pub config: &'a Config,
}

impl Forward<'_> {
    /// Queries, keys and values of the live rows, into `qkv` from their first one on.
    fn project(&self, layer: &DeviceLayer, a: &mut Activations, qkv: &mut CudaSlice<bf16>, live: Live) -> Result<()> {
        let Forward { device, config, .. } = *self;
        let Heads { q, kv, dim, .. } = layer.heads;
        let columns = if layer.head_norms.is_some() { 0 } else { (q + kv) * dim };
        let rotation = Rotation { table: &a.rope, head_dim: dim, columns };
        let input = Normed { residual: &a.residual, eps: config.rms_norm_eps };
        device.gemm_rope(qkv, input, &layer.qkv, rotation, live.rows, live.starts())?;
        match &layer.head_norms {
            Some(norms) => device.head_norm(
                qkv,
                norms,
                rotation,
                (q, kv),
                layer.heads.qkv_columns(),
                live.rows,
                live.first,
                None,
                config.rms_norm_eps,
            ),
            None => Ok(()),
        }
    }

    /// The whole layer of this index over the rows of the residual stream. `qkv` has keys and values of what comes before.
    pub fn layer(&self, index: usize, a: &mut Activations, qkv: &mut CudaSlice<bf16>, live: Live) -> Result<()> {
        let Forward { device, weights, config } = *self;
        let _layer = range!("layer {index}");
        let layer = &weights.layers[index];
        let next_norm = weights.layers.get(index + 1).map_or(&weights.norm, |next| &next.input_layernorm);
        let mlp_norm = &layer.post_attention_layernorm;
        let rows = live.rows;
        self.project(layer, a, qkv, live)?;
        device.attention(&mut a.attended, qkv, layer.heads, live.tokens, live.first)?;
        let norms = Scaling { from: &layer.input_layernorm, to: mlp_norm };
        device.gemm_residual(&mut a.residual, &a.attended, &layer.o_proj, norms, rows)?;
        let input = Normed { residual: &a.residual, eps: config.rms_norm_eps };
        device.gemm_swiglu(&mut a.h, input, &layer.gate_up, rows)?;
        device.gemm_residual(&mut a.residual, &a.h, &layer.down_proj, Scaling { from: mlp_norm, to: next_norm }, rows)
    }

    /// The residual stream of a prompt's live rows.
    pub fn embed(&self, a: &mut Activations, prompt: &CudaSlice<u32>, live: Live) -> Result<()> {
        let Forward { device, weights, config } = *self;
        let norm = &weights.layers[0].input_layernorm;
        device.embed(&mut a.residual, prompt, &weights.embed_tokens, norm, live.rows, live.first, config.hidden_size)
    }

    /// One reading step: the prompt that lies ready, up to the next one.
    pub fn step(&self, workspace: &mut Workspace) -> Result<()> {
        let Forward { device, weights, config } = *self;
        let Workspace { activations: a, qkv, q, k, steps, plan, .. } = workspace;
        let live = Live { tokens: steps.tokens(), rows: steps.rows(), first: Some(steps.first_row()) };
        self.embed(a, steps.prompt(), live)?;
        for (index, qkv) in qkv.iter_mut().enumerate() {
            self.layer(index, a, qkv, live)?;
        }
        let last = weights.layers.last().expect("a checked configuration has layers");
        let _layer = range!("layer {}", weights.layers.len() - 1);
        let eps = config.rms_norm_eps;
        let input = Normed { residual: &a.residual, eps };
        let (question, position) = (steps.question_rows(), Some(steps.question_start()));
        let of_question = Starts { input: Some(steps.question_row()), position, out: None };
        let Heads { q: q_heads, kv, dim, .. } = last.heads;
        let rotation = |columns| Rotation {
            table: &a.rope,
            head_dim: dim,
            columns: if last.head_norms.is_some() { 0 } else { columns },
        };
        let scoring = &weights.scoring;
        device.gemm_rope(k, input, &scoring.k_proj, rotation(kv * dim), live.rows, live.starts())?;
        device.gemm_rope(q, input, &scoring.q_proj, rotation(q_heads * dim), question, of_question)?;
        if let Some(norms) = &last.head_norms {
            device.head_norm(k, norms, rotation(0), (0, kv), kv * dim, live.rows, live.first, None, eps)?;
            device.head_norm(q, norms, rotation(0), (q_heads, 0), q_heads * dim, question, None, position, eps)?;
        }
        device.question_scores(steps, q, k, last.heads)?;
        device.select(steps, plan)
    }

    /// Logits of the one row in `answering.one`, and the token that is taken from them, which takes its place.
    pub fn head(&self, answering: &mut Answering) -> Result<()> {
        let Forward { device, weights, config } = *self;
        let Answering { one, logits, best, state, sent, sampling, .. } = answering;
        let norm = Norm { weight: &weights.norm, eps: config.rms_norm_eps };
        let head = weights.lm_head.as_ref().unwrap_or(&weights.embed_tokens);
        device.gemv_logits(logits, best, &one.x, norm, head, [config.vocab_size, weights.vocab_rows])?;
        let out = Sampled { x: &mut one.x, answer: state, sent };
        device.sample(out, Logits { logits, best, embedding: &weights.embed_tokens }, sampling, config.vocab_size)
    }

    /// The last token through all layers, behind what the caches hold, to the next one.
    pub fn decode(&self, answering: &mut Answering) -> Result<()> {
        let Forward { device, weights, config } = *self;
        let Answering { one, caches, parts, row: fixed, counts, state, .. } = answering;
        let in_three = device.has_row_kernels(config.hidden_size, config.intermediate_size, config.head_dim);
        if in_three {
            device.row_start(fixed, &one.x)?;
        }
        let (row, position) = (Rows { ints: counts, index: 1, max: 1 }, Shift { ints: state, index: answer::POSITION });
        for (index, (layer, cache)) in weights.layers.iter().zip(caches).enumerate() {
            let _layer = range!("layer {index}");
            let Heads { q, kv, dim, .. } = layer.heads;
            let norm = |weight| Norm { weight, eps: config.rms_norm_eps };
            let columns = if layer.head_norms.is_some() { 0 } else { (q + kv) * dim };
            let rotation = Rotation { table: &one.rope, head_dim: dim, columns };
            let input_norm = norm(&layer.input_layernorm);
            match in_three {
                true => device.row_qkv(cache, fixed, input_norm, &layer.qkv, rotation, position)?,
                false => device.gemv_rope(cache, &one.x, input_norm, &layer.qkv, rotation, position)?,
            }
            if let Some(norms) = &layer.head_norms {
                let (stride, eps) = (layer.heads.qkv_columns(), config.rms_norm_eps);
                device.head_norm(cache, norms, rotation, (q, kv), stride, row, Some(position), None, eps)?;
            }
            let mlp_norm = norm(&layer.post_attention_layernorm);
            if in_three {
                device.row_attention(fixed, cache, &layer.o_proj, layer.heads, position)?;
                device.row_mlp(fixed, mlp_norm, &layer.gate_up, &layer.down_proj)?;
                continue;
            }
            device.decode_attention(&mut one.attended, parts, cache, layer.heads, position)?;
            device.gemv_residual(&mut one.x, &one.attended, &layer.o_proj)?;
            device.gemv_swiglu(&mut one.h, &one.x, mlp_norm, &layer.gate_up)?;
            device.gemv_residual(&mut one.x, &one.h, &layer.down_proj)?;
        }
        if in_three {
            device.row_end(&mut one.x, fixed)?;
        }
        self.head(answering)
    }
}
