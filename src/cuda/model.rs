//! A model's weights on the device, in the order the kernels want them.

use cudarc::driver::CudaSlice;
use half::bf16;

use super::layout::{Matrix, RowOrder};
use super::ops::{DeviceLinear, Heads};
use super::staging::Staging;
use super::{CudaDevice, memory};
use crate::Result;
use crate::model::{Config, LayerWeights, Linear, Model, Tensor};

/// The weights of one layer.
pub struct DeviceLayer {
    pub input_layernorm: CudaSlice<bf16>,
    /// Queries, keys and values in one, heads of q and k in rotary order.
    pub qkv: DeviceLinear,
    /// Norms of q and k heads, Qwen3 only.
    pub head_norms: Option<[CudaSlice<bf16>; 2]>,
    pub o_proj: DeviceLinear,
    pub post_attention_layernorm: CudaSlice<bf16>,
    /// Eight rows of the gate, eight of up, and so on.
    pub gate_up: DeviceLinear,
    pub down_proj: DeviceLinear,
    pub heads: Heads,
}

/// The last layer as scoring needs it.
pub struct ScoringLayer {
    pub q_proj: DeviceLinear,
    pub k_proj: DeviceLinear,
}

/// A whole model. The last layer's q and k lie there twice: alone, for scoring, and in one matrix, for answers.
pub struct DeviceModel {
    pub embed_tokens: CudaSlice<bf16>,
    pub layers: Vec<DeviceLayer>,
    pub scoring: ScoringLayer,
    pub norm: CudaSlice<bf16>,
    /// `None` where the embedding serves.
    pub lm_head: Option<CudaSlice<bf16>>,
    /// Rows of the embedding and the head, the vocabulary rounded up for the kernels.
    pub vocab_rows: usize,
}

/// The given projections on top of each other, with their rows in `order`; `role` is their name together.
fn linear(staging: &mut Staging, role: &'static str, parts: &[&Linear], order: RowOrder) -> Result<DeviceLinear> {
    let weight = Matrix::new(parts.iter().map(|part| &part.weight).collect(), order);
    let biases: Option<Vec<&Tensor>> = parts.iter().map(|part| part.bias.as_ref()).collect();
    Ok(DeviceLinear {
        weight: staging.upload(&weight, weight.rows())?,
        bias: biases.map(|biases| staging.upload(&Matrix::new(biases, order), weight.rows())).transpose()?,
        n: weight.rows(),
        k: weight.width(),
        role,
    })
}

/// A vector, the elements of which are ordered as `order` orders rows.
fn vector(staging: &mut Staging, tensor: &Tensor, order: RowOrder) -> Result<CudaSlice<bf16>> {
    staging.upload(&Matrix::new(vec![tensor], order), tensor.elements())
}

fn layer(staging: &mut Staging, config: &Config, layer: &LayerWeights) -> Result<DeviceLayer> {
    let (q_heads, kv_heads, dim) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
    let qkv = [&layer.q_proj, &layer.k_proj, &layer.v_proj];
    let gate_up = [&layer.gate_proj, &layer.up_proj];
    let mut head_norm = |norm: &Tensor| vector(staging, norm, RowOrder::rotary(1, dim));
    let head_norms = match (&layer.q_norm, &layer.k_norm) {
        (Some(q), Some(k)) => Some([head_norm(q)?, head_norm(k)?]),
        _ => None,
    };
    Ok(DeviceLayer {
        input_layernorm: vector(staging, &layer.input_layernorm, RowOrder::STORED)?,
        // Values are not rotated.
        qkv: linear(staging, "qkv", &qkv, RowOrder::rotary(q_heads + kv_heads, dim))?,
        head_norms,
        o_proj: linear(staging, "o", &[&layer.o_proj], RowOrder::STORED)?,
        post_attention_layernorm: vector(staging, &layer.post_attention_layernorm, RowOrder::STORED)?,
        gate_up: linear(staging, "gate_up", &gate_up, RowOrder::gate_up(config.intermediate_size))?,
        down_proj: linear(staging, "down", &[&layer.down_proj], RowOrder::STORED)?,
        heads: Heads { q: q_heads, kv: kv_heads, dim, window: layer.sliding_window.unwrap_or(0) },
    })
}

impl CudaDevice {
    /// Copies a model to the device, in bf16, in one pass over its files.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if it does not fit, before anything is copied; [`crate::Error::Cuda`].
    pub fn load(&self, model: &Model) -> Result<DeviceModel> {
        let config = &model.config;
        let bytes = memory::weight_bytes(config);
        self.check_free(bytes, "the model's weights", "free some or choose a smaller model")?;
        let mut staging = Staging::new(self)?;
        let vocab_rows = memory::vocab_rows(config);
        let padded = |staging: &mut Staging, tensor: &Tensor| {
            staging.upload(&Matrix::new(vec![tensor], RowOrder::STORED), vocab_rows)
        };
        let last = model.layers.last().expect("a checked configuration has layers");
        let rotated = |staging: &mut Staging, role, part: &Linear, heads: usize| {
            linear(staging, role, &[part], RowOrder::rotary(heads, config.head_dim))
        };
        let weights = DeviceModel {
            embed_tokens: padded(&mut staging, &model.embed_tokens)?,
            layers: model.layers.iter().map(|weights| layer(&mut staging, config, weights)).collect::<Result<_>>()?,
            scoring: ScoringLayer {
                q_proj: rotated(&mut staging, "q", &last.q_proj, config.num_attention_heads)?,
                k_proj: rotated(&mut staging, "k", &last.k_proj, config.num_key_value_heads)?,
            },
            norm: vector(&mut staging, &model.norm, RowOrder::STORED)?,
            lm_head: match config.tie_word_embeddings {
                true => None,
                false => Some(padded(&mut staging, &model.lm_head)?),
            },
            vocab_rows,
        };
        staging.finish(bytes)?;
        Ok(weights)
    }
}
