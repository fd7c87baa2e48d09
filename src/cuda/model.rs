//! A model's weights on the device, in the order the kernels want them.

use cudarc::driver::CudaSlice;
use half::bf16;

use super::CudaDevice;
use super::ops::{DeviceLinear, Heads};
use crate::Result;
use crate::model::{LayerWeights, Linear, Model, RopeTable, Tensor};

/// Columns that belong together for an epilogue lie in groups of so many.
const GROUP: usize = 8;

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

fn to_bf16(tensor: &Tensor) -> Vec<bf16> {
    tensor.to_vec_f32().into_iter().map(bf16::from_f32).collect()
}

/// `rows` of equal length, in the order of `order`.
fn reorder(values: &[bf16], order: &[usize]) -> Vec<bf16> {
    let width = values.len() / order.len();
    order.iter().flat_map(|&row| values[row * width..(row + 1) * width].iter().copied()).collect()
}

/// Dimensions of a head as the rotary epilogue wants them: eight of the lower half, eight of the upper, and so on.
fn rotary_order(head_dim: usize) -> Vec<usize> {
    let half = head_dim / 2;
    (0..half)
        .step_by(GROUP)
        .flat_map(|start| (start..start + GROUP).chain(half + start..half + start + GROUP))
        .collect()
}

/// The same for all `heads` of a projection.
fn rotary_order_of(heads: usize, head_dim: usize) -> Vec<usize> {
    let order = rotary_order(head_dim);
    (0..heads).flat_map(|head| order.iter().map(move |dim| head * head_dim + dim)).collect()
}

/// Rows of gate and up by turns, eight each, as indices into the two on top of each other.
fn gate_up_order(intermediate_size: usize) -> Vec<usize> {
    let starts = (0..intermediate_size).step_by(GROUP);
    starts
        .flat_map(|start| (start..start + GROUP).chain(intermediate_size + start..intermediate_size + start + GROUP))
        .collect()
}

impl CudaDevice {
    fn upload_weights(&self, values: &[bf16]) -> Result<CudaSlice<bf16>> {
        self.upload("copying weights to the GPU", values)
    }

    /// The given projections on top of each other, with their rows in the order of `order`.
    fn linear(&self, parts: &[&Linear], order: Option<&[usize]>) -> Result<DeviceLinear> {
        let k = parts[0].weight.shape()[1];
        let n = parts.iter().map(|part| part.weight.shape()[0]).sum();
        let in_order = |values: Vec<bf16>| order.map_or(values.clone(), |order| reorder(&values, order));
        let weight: Vec<bf16> = parts.iter().flat_map(|part| to_bf16(&part.weight)).collect();
        let bias: Option<Vec<bf16>> = parts
            .iter()
            .map(|part| part.bias.as_ref().map(to_bf16))
            .collect::<Option<Vec<_>>>()
            .map(|bias| bias.concat());
        Ok(DeviceLinear {
            weight: self.upload_weights(&in_order(weight))?,
            bias: bias.map(|bias| self.upload_weights(&in_order(bias))).transpose()?,
            n,
            k,
        })
    }

    fn layer(&self, model: &Model, layer: &LayerWeights) -> Result<DeviceLayer> {
        let config = &model.config;
        let (q_heads, kv_heads, dim) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let rotated = (q_heads + kv_heads) * dim;
        let qkv_order: Vec<usize> =
            rotary_order_of(q_heads + kv_heads, dim).into_iter().chain(rotated..rotated + kv_heads * dim).collect();
        let head_norm = |norm: &Tensor| self.upload_weights(&reorder(&to_bf16(norm), &rotary_order(dim)));
        Ok(DeviceLayer {
            input_layernorm: self.upload_weights(&to_bf16(&layer.input_layernorm))?,
            qkv: self.linear(&[&layer.q_proj, &layer.k_proj, &layer.v_proj], Some(&qkv_order))?,
            head_norms: match (&layer.q_norm, &layer.k_norm) {
                (Some(q), Some(k)) => Some([head_norm(q)?, head_norm(k)?]),
                _ => None,
            },
            o_proj: self.linear(&[&layer.o_proj], None)?,
            post_attention_layernorm: self.upload_weights(&to_bf16(&layer.post_attention_layernorm))?,
            gate_up: self
                .linear(&[&layer.gate_proj, &layer.up_proj], Some(&gate_up_order(config.intermediate_size)))?,
            down_proj: self.linear(&[&layer.down_proj], None)?,
            heads: Heads { q: q_heads, kv: kv_heads, dim, window: layer.sliding_window.unwrap_or(0) },
        })
    }

    /// Copies a model to the device, in bf16.
    pub fn load(&self, model: &Model) -> Result<DeviceModel> {
        let config = &model.config;
        let vocab_rows = config.vocab_size.next_multiple_of(16);
        let padded = |tensor: &Tensor| {
            let mut values = to_bf16(tensor);
            values.resize(vocab_rows * config.hidden_size, bf16::ZERO);
            self.upload_weights(&values)
        };
        let last = model.layers.last().expect("a checked configuration has layers");
        let rotated =
            |linear: &Linear, heads: usize| self.linear(&[linear], Some(&rotary_order_of(heads, config.head_dim)));
        Ok(DeviceModel {
            embed_tokens: padded(&model.embed_tokens)?,
            layers: model.layers.iter().map(|layer| self.layer(model, layer)).collect::<Result<_>>()?,
            scoring: ScoringLayer {
                q_proj: rotated(&last.q_proj, config.num_attention_heads)?,
                k_proj: rotated(&last.k_proj, config.num_key_value_heads)?,
            },
            norm: self.upload_weights(&to_bf16(&model.norm))?,
            lm_head: (!config.tie_word_embeddings).then(|| padded(&model.lm_head)).transpose()?,
            vocab_rows,
        })
    }

    /// Cosines and sines by turns, for positions below `len`.
    pub fn rope_table(&self, model: &Model, len: usize) -> Result<CudaSlice<f32>> {
        let table = RopeTable::new(&model.config, len);
        let by_turns: Vec<f32> = table.cos.iter().zip(&table.sin).flat_map(|(cos, sin)| [*cos, *sin]).collect();
        self.upload("copying the rotary table to the GPU", &by_turns)
    }
}
