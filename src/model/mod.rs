//! A Hugging Face model directory: config.json, generation_config.json and the mmap'd weights.

mod config;
mod random;
mod rope;
mod weights;

use std::path::{Path, PathBuf};

pub use config::{Architecture, Config, GenerationConfig};
#[cfg(gleaner_cuda)]
pub(crate) use random::fill_normal;
pub use random::{RANDOM_WEIGHTS, SHAPES};
pub use rope::RopeTable;
pub use weights::{Dtype, Tensor, Weights};

use crate::{Error, Result};

/// The weights of one decoder layer. Matrices are `[out, in]`, as Hugging Face stores them.
#[derive(Debug, Clone)]
pub struct LayerWeights {
    /// `[hidden_size]`
    pub input_layernorm: Tensor,
    /// `[num_attention_heads * head_dim, hidden_size]`
    pub q_proj: Linear,
    /// `[num_key_value_heads * head_dim, hidden_size]`
    pub k_proj: Linear,
    /// `[num_key_value_heads * head_dim, hidden_size]`
    pub v_proj: Linear,
    /// `[hidden_size, num_attention_heads * head_dim]`
    pub o_proj: Linear,
    /// `[head_dim]`, Qwen3 only
    pub q_norm: Option<Tensor>,
    /// `[head_dim]`, Qwen3 only
    pub k_norm: Option<Tensor>,
    /// `[hidden_size]`
    pub post_attention_layernorm: Tensor,
    /// `[intermediate_size, hidden_size]`
    pub gate_proj: Linear,
    /// `[intermediate_size, hidden_size]`
    pub up_proj: Linear,
    /// `[hidden_size, intermediate_size]`
    pub down_proj: Linear,
    /// Rows may attend to this many tokens, themselves included; `None` for all.
    pub sliding_window: Option<usize>,
}

/// A matrix and the bias that some architectures add.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out, in]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
}

/// A model as it lies on disk: nothing is converted or copied, the weights are views of the mapped files.
#[derive(Debug)]
pub struct Model {
    /// The directory it came from.
    pub path: PathBuf,
    /// config.json
    pub config: Config,
    /// generation_config.json, as far as it says when to stop.
    pub generation_config: GenerationConfig,
    /// `[vocab_size, hidden_size]`
    pub embed_tokens: Tensor,
    /// In order of execution.
    pub layers: Vec<LayerWeights>,
    /// `[hidden_size]`
    pub norm: Tensor,
    /// `[vocab_size, hidden_size]`; the embedding itself where the two are tied.
    pub lm_head: Tensor,
    /// Bytes of all weights together.
    pub weight_bytes: u64,
}

impl Model {
    /// Reads the configuration, maps the weights and checks that every tensor is there in the shape it must have.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::ModelFile`], [`Error::MissingTensor`], [`Error::TensorShape`], each naming the file.
    pub fn open(path: impl AsRef<Path>) -> Result<Model> {
        let path = path.as_ref();
        if !path.is_dir() {
            let message = match path.exists() {
                true => "is a file; give the directory that holds config.json and the weights",
                false => "no such model directory",
            };
            return Err(Error::model_file(path, message));
        }
        let config = Config::open(&path.join("config.json"))?;
        let generation_config = GenerationConfig::open(&path.join("generation_config.json"), &config)?;
        let weights = Weights::open(path)?;
        let tensor = |name: &str, shape: &[usize]| weights.tensor(name, shape);
        Model::assemble(path, config, generation_config, weights.bytes(), &tensor)
    }

    /// The model whose tensors `tensor` finds by name and shape.
    fn assemble(
        path: &Path,
        config: Config,
        generation_config: GenerationConfig,
        weight_bytes: u64,
        tensor: &dyn Fn(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Model> {
        let hidden = config.hidden_size;
        let (q_dim, kv_dim) = (config.q_dim(), config.kv_dim());
        let linear = |name: String, out: usize, input: usize, bias: bool| -> Result<Linear> {
            Ok(Linear {
                weight: tensor(&format!("{name}.weight"), &[out, input])?,
                bias: bias.then(|| tensor(&format!("{name}.bias"), &[out])).transpose()?,
            })
        };
        let layers = (0..config.num_hidden_layers)
            .map(|layer| {
                let name = |part: &str| format!("model.layers.{layer}.{part}");
                let head_norm =
                    |part: &str| config.qk_norm().then(|| tensor(&name(part), &[config.head_dim])).transpose();
                Ok(LayerWeights {
                    input_layernorm: tensor(&name("input_layernorm.weight"), &[hidden])?,
                    q_proj: linear(name("self_attn.q_proj"), q_dim, hidden, config.qkv_bias)?,
                    k_proj: linear(name("self_attn.k_proj"), kv_dim, hidden, config.qkv_bias)?,
                    v_proj: linear(name("self_attn.v_proj"), kv_dim, hidden, config.qkv_bias)?,
                    o_proj: linear(name("self_attn.o_proj"), hidden, q_dim, config.o_bias)?,
                    q_norm: head_norm("self_attn.q_norm.weight")?,
                    k_norm: head_norm("self_attn.k_norm.weight")?,
                    post_attention_layernorm: tensor(&name("post_attention_layernorm.weight"), &[hidden])?,
                    gate_proj: linear(name("mlp.gate_proj"), config.intermediate_size, hidden, config.mlp_bias)?,
                    up_proj: linear(name("mlp.up_proj"), config.intermediate_size, hidden, config.mlp_bias)?,
                    down_proj: linear(name("mlp.down_proj"), hidden, config.intermediate_size, config.mlp_bias)?,
                    sliding_window: config.layer_sliding_window(layer),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let embed_tokens = tensor("model.embed_tokens.weight", &[config.vocab_size, hidden])?;
        let lm_head = match config.tie_word_embeddings {
            true => embed_tokens.clone(),
            false => tensor("lm_head.weight", &[config.vocab_size, hidden])?,
        };
        Ok(Model {
            path: path.into(),
            generation_config,
            embed_tokens,
            layers,
            norm: tensor("model.norm.weight", &[hidden])?,
            lm_head,
            weight_bytes,
            config,
        })
    }

    /// Checks that `prompt` has tokens and that the embedding has a row for each.
    ///
    /// # Errors
    /// [`Error::Plan`].
    pub(crate) fn check_prompt(&self, prompt: &[u32]) -> Result<()> {
        let vocab_size = self.config.vocab_size;
        match prompt.iter().max() {
            None => Err(Error::Plan("the prompt has no token".into())),
            Some(&id) if id as usize >= vocab_size => {
                Err(Error::Plan(format!("token {id} is beyond the vocabulary of {vocab_size}")))
            }
            Some(_) => Ok(()),
        }
    }

    /// Number of parameters; a tied head counts once.
    pub fn parameters(&self) -> usize {
        let linear = |linear: &Linear| linear.weight.elements() + linear.bias.as_ref().map_or(0, Tensor::elements);
        let layer = |layer: &LayerWeights| {
            let LayerWeights { q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, .. } = layer;
            let projections = [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj];
            let head_norms = [&layer.q_norm, &layer.k_norm].into_iter().flatten();
            let norms = [&layer.input_layernorm, &layer.post_attention_layernorm].into_iter().chain(head_norms);
            projections.into_iter().map(linear).sum::<usize>() + norms.map(Tensor::elements).sum::<usize>()
        };
        let head = if self.config.tie_word_embeddings { 0 } else { self.lm_head.elements() };
        self.embed_tokens.elements() + self.layers.iter().map(layer).sum::<usize>() + self.norm.elements() + head
    }
}
