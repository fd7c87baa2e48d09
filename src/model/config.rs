//! config.json and generation_config.json, with Hugging Face's field names.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::rope::RopeScaling;
use crate::{Error, Result};

/// The decoder architectures that Gleaner runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMSNorm on each head of q and k.
    Qwen3,
    /// Llama 2, 3, 3.1 and 3.2.
    Llama,
    /// Mistral, with its sliding window where the configuration sets one.
    Mistral,
}

const SUPPORTED: &str = "Qwen2ForCausalLM (Qwen2, Qwen2.5), Qwen3ForCausalLM, LlamaForCausalLM (Llama 2, 3, 3.1, 3.2) and MistralForCausalLM";

/// What config.json says, checked and with defaults filled in.
#[derive(Debug, Clone)]
pub struct Config {
    /// Which decoder this is.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; query heads share them in equal groups.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest prompt the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square before its root.
    pub rms_norm_eps: f32,
    /// Rotary frequencies in radians per position, scaled as the configuration says: `[head_dim / 2]`.
    pub inv_freq: Vec<f32>,
    /// Multiplies cosines and sines; 1 except for YaRN.
    pub rope_attention_factor: f32,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// A bias on the attention's output.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// Tokens that end a text, if generation_config.json does not name them.
    eos_token_id: Vec<u32>,
    /// Per layer, how many tokens a row may attend to.
    sliding_windows: Vec<Option<usize>>,
}

/// config.json as it stands; old and new spellings side by side.
#[derive(Deserialize)]
struct RawConfig {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    #[serde(default = "default_rms_norm_eps")]
    rms_norm_eps: f32,
    #[serde(default = "default_hidden_act")]
    hidden_act: String,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    #[serde(default)]
    tie_word_embeddings: bool,
    attention_bias: Option<bool>,
    #[serde(default)]
    mlp_bias: bool,
    sliding_window: Option<usize>,
    #[serde(default)]
    use_sliding_window: bool,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    #[serde(default)]
    eos_token_id: Value,
    quantization_config: Option<Value>,
}

fn default_rms_norm_eps() -> f32 {
    1e-6
}

fn default_hidden_act() -> String {
    "silu".into()
}

fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(|source| Error::io("read", path, source))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::model_file(path, format!("not valid JSON: {error}")))
}

/// One token id, a list of them, or null.
fn token_ids(value: &Value) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(ids) => ids.iter().filter_map(one).collect(),
        id => one(id).into_iter().collect(),
    }
}

impl Config {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::ModelFile`]; an architecture that is not supported is answered with the list of
    /// those that are.
    pub fn open(path: &Path) -> Result<Config> {
        Config::from_json(read_json(path)?).map_err(|message| Error::model_file(path, message))
    }

    pub(super) fn from_json(value: Value) -> std::result::Result<Config, String> {
        let architecture = architecture_of(&value)?;
        let raw = serde_json::from_value(value).map_err(|error| format!("not a usable configuration: {error}"))?;
        Config::from_raw(architecture, raw)
    }

    fn from_raw(architecture: Architecture, raw: RawConfig) -> std::result::Result<Config, String> {
        let sizes = [
            ("hidden_size", raw.hidden_size, 1 << 17),
            ("num_hidden_layers", raw.num_hidden_layers, 1 << 12),
            ("num_attention_heads", raw.num_attention_heads, 1 << 12),
            ("intermediate_size", raw.intermediate_size, 1 << 20),
            ("vocab_size", raw.vocab_size, 1 << 24),
            ("max_position_embeddings", raw.max_position_embeddings, 1 << 30),
        ];
        for (name, size, limit) in sizes {
            if size == 0 || size > limit {
                return Err(format!("{name} is {size}, but must be between 1 and {limit}"));
            }
        }
        let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / raw.num_attention_heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 1024 {
            return Err(format!("head_dim is {head_dim}, but must be an even number up to 1024"));
        }
        let num_key_value_heads = raw.num_key_value_heads.unwrap_or(raw.num_attention_heads);
        if num_key_value_heads == 0 || !raw.num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(format!(
                "num_key_value_heads is {num_key_value_heads}, but must divide num_attention_heads, {}",
                raw.num_attention_heads
            ));
        }
        if raw.hidden_act != "silu" {
            return Err(format!("hidden_act is {:?}; supported is \"silu\"", raw.hidden_act));
        }
        if raw.quantization_config.is_some() {
            return Err("the checkpoint is quantised (quantization_config); supported are BF16, F16 and F32".into());
        }
        let attention_bias = raw.attention_bias.unwrap_or(false);
        let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref()).unwrap_or(&Value::Null);
        let rope_theta = rope["rope_theta"].as_f64().or(raw.rope_theta).unwrap_or(10000.0);
        let scaling = RopeScaling::from_json(rope, raw.max_position_embeddings)?;
        Ok(Config {
            architecture,
            hidden_size: raw.hidden_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: raw.num_attention_heads,
            num_key_value_heads,
            head_dim,
            intermediate_size: raw.intermediate_size,
            vocab_size: raw.vocab_size,
            max_position_embeddings: raw.max_position_embeddings,
            rms_norm_eps: raw.rms_norm_eps,
            inv_freq: scaling.inv_freq(rope_theta, head_dim),
            rope_attention_factor: scaling.attention_factor(),
            tie_word_embeddings: raw.tie_word_embeddings,
            qkv_bias: architecture == Architecture::Qwen2 || attention_bias,
            o_bias: architecture != Architecture::Qwen2 && attention_bias,
            mlp_bias: raw.mlp_bias,
            eos_token_id: token_ids(&raw.eos_token_id),
            sliding_windows: sliding_windows_of(architecture, &raw)?,
        })
    }

    /// Width of all query heads.
    pub fn q_dim(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key, or all value, heads.
    pub fn kv_dim(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Whether each head of q and k passes an RMSNorm.
    pub fn qk_norm(&self) -> bool {
        self.architecture == Architecture::Qwen3
    }

    /// How many tokens a row of this layer may attend to, itself included; `None` for all.
    pub fn layer_sliding_window(&self, layer: usize) -> Option<usize> {
        self.sliding_windows[layer]
    }

    /// Multiplications and additions of the matrix products and the attention of one reading step of `tokens` tokens:
    /// all layers but the last in full, of the last the keys of all rows and the queries of `question_rows`. Attention
    /// counts the half of its square that is not masked.
    pub fn step_flops(&self, tokens: usize, question_rows: usize) -> u64 {
        let (hidden, q_dim, kv_dim) = (self.hidden_size, self.q_dim(), self.kv_dim());
        let layer_weights = hidden * (2 * q_dim + 2 * kv_dim + 3 * self.intermediate_size);
        // Twice the number of pairs of a row and a key it attends to; once each for q k^T and p v.
        let pairs = |window: Option<usize>| {
            let masked = tokens.saturating_sub(window.unwrap_or(tokens));
            tokens * tokens - masked * masked
        };
        let full_layers = &self.sliding_windows[..self.num_hidden_layers - 1];
        let attention: usize = full_layers.iter().map(|&window| pairs(window) * q_dim).sum();
        let last = tokens * hidden * kv_dim + question_rows * q_dim * (hidden + tokens);
        2 * (full_layers.len() * tokens * layer_weights + attention + last) as u64
    }
}

fn architecture_of(config: &Value) -> std::result::Result<Architecture, String> {
    let named = config["architectures"][0].as_str().or(config["model_type"].as_str());
    match named {
        Some("Qwen2ForCausalLM" | "qwen2") => Ok(Architecture::Qwen2),
        Some("Qwen3ForCausalLM" | "qwen3") => Ok(Architecture::Qwen3),
        Some("LlamaForCausalLM" | "llama") => Ok(Architecture::Llama),
        Some("MistralForCausalLM" | "mistral") => Ok(Architecture::Mistral),
        Some(other) => Err(format!("the architecture {other} is not supported; supported are {SUPPORTED}")),
        None => Err(format!("names no architecture; supported are {SUPPORTED}")),
    }
}

/// Qwen's old configurations switch windows on by a flag and from a layer on, new ones name each layer's kind, and
/// Mistral's window holds for all layers.
fn sliding_windows_of(architecture: Architecture, raw: &RawConfig) -> std::result::Result<Vec<Option<usize>>, String> {
    let layers = raw.num_hidden_layers;
    if raw.sliding_window == Some(0) {
        return Err("sliding_window is 0, but must be at least 1, or null for none".into());
    }
    if let Some(types) = &raw.layer_types {
        if types.len() != layers {
            return Err(format!("layer_types names {} layers, but num_hidden_layers is {layers}", types.len()));
        }
        return types
            .iter()
            .map(|kind| match kind.as_str() {
                "full_attention" => Ok(None),
                "sliding_attention" => {
                    raw.sliding_window.map(Some).ok_or("a layer slides, but sliding_window is not set".into())
                }
                other => {
                    Err(format!("the layer type {other:?} is not supported; full_attention and sliding_attention are"))
                }
            })
            .collect();
    }
    let first_sliding = match architecture {
        Architecture::Mistral => 0,
        Architecture::Qwen2 | Architecture::Qwen3 if raw.use_sliding_window => raw.max_window_layers.unwrap_or(28),
        _ => layers,
    };
    Ok((0..layers).map(|layer| raw.sliding_window.filter(|_| layer >= first_sliding)).collect())
}

/// When the model's authors stop generating.
#[derive(Debug, Clone)]
pub struct GenerationConfig {
    /// Tokens that end an answer.
    pub eos_token_id: Vec<u32>,
}

impl GenerationConfig {
    /// Reads generation_config.json, or falls back on config.json where there is none.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::ModelFile`] for JSON that does not parse.
    pub fn open(path: &Path, config: &Config) -> Result<GenerationConfig> {
        let ids = match path.exists() {
            true => token_ids(&read_json(path)?["eos_token_id"]),
            false => Vec::new(),
        };
        Ok(GenerationConfig { eos_token_id: if ids.is_empty() { config.eos_token_id.clone() } else { ids } })
    }
}
