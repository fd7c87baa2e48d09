//! Models without files: shapes by name and random weights, for timing, which depends on the shape alone.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use half::bf16;
use memmap2::MmapMut;
use rayon::prelude::*;

use super::{Config, Dtype, GenerationConfig, Model, Tensor};
use crate::{Error, Result};

/// The shapes that [`Config::named`] knows. `mistral-7b` is Mistral-7B-v0.3, which has no sliding window.
pub const SHAPES: [&str; 4] = ["qwen2.5-0.5b", "qwen2.5-7b", "llama-3-8b", "mistral-7b"];

/// What [`Model::path`] says of a model without files.
pub const RANDOM_WEIGHTS: &str = "random weights";

/// config.json of each of [`SHAPES`], as far as it bears on the shape.
const CONFIGS: [&str; 4] = [
    r#"{"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": true}"#,
    r#"{"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": false}"#,
    r#"{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": false}"#,
    r#"{"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32768, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "tie_word_embeddings": false, "sliding_window": null}"#,
];

/// Standard deviation of the weights, that of Hugging Face's initialisers.
const WEIGHT_STD: f32 = 0.02;

/// Elements of the random part beyond the largest matrix, so that matrices of that size can start at places of their own.
const SLACK: usize = 1 << 20;

impl Config {
    /// The configuration of one of [`SHAPES`], `None` for another name.
    pub fn named(shape: &str) -> Option<Config> {
        let at = SHAPES.iter().position(|name| *name == shape)?;
        let json = serde_json::from_str(CONFIGS[at]).expect("valid JSON");
        Some(Config::from_json(json).expect("a configuration of a published model"))
    }

    /// Elements of the largest matrix.
    fn largest_matrix(&self) -> usize {
        self.hidden_size * self.vocab_size.max(self.intermediate_size).max(self.q_dim())
    }
}

impl Model {
    /// A model of this shape with random weights (normal, standard deviation 0.02; norms are ones) and no end token. The
    /// same seed gives the same weights.
    ///
    /// All matrices are views of one block that is little larger than the largest of them, each at a place of its own,
    /// so that a model of billions of parameters takes about one gigabyte of memory.
    ///
    /// # Errors
    /// [`Error::Io`] if there is not enough memory.
    pub fn random(config: Config, seed: u64) -> Result<Model> {
        let failed = |source| Error::io("make room for", RANDOM_WEIGHTS, source);
        let random_len = config.largest_matrix() + SLACK;
        let ones_len = config.hidden_size.max(config.head_dim);
        let mut block = MmapMut::map_anon((random_len + ones_len) * 2).map_err(failed)?;
        let (random, ones) = block.split_at_mut(random_len * 2);
        fill_normal(random, WEIGHT_STD, seed);
        for one in ones.as_chunks_mut().0 {
            *one = bf16::ONE.to_le_bytes();
        }
        let block = Arc::new(block.make_read_only().map_err(failed)?);

        let (matrices, parameters) = (Cell::new(0u64), Cell::new(0));
        let tensor = |name: &str, shape: &[usize]| {
            let elements = shape.iter().product::<usize>();
            parameters.set(parameters.get() + elements);
            if name.ends_with("norm.weight") {
                return Ok(Tensor::view(block.clone(), random_len * 2, Dtype::Bf16, shape));
            }
            // Multiples of the golden ratio's fraction spread evenly and do not repeat.
            let place = matrices.replace(matrices.get() + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let start = ((place as u128 * (random_len - elements) as u128) >> 64) as usize;
            Ok(Tensor::view(block.clone(), start * 2, Dtype::Bf16, shape))
        };
        let no_end = GenerationConfig { eos_token_id: Vec::new() };
        let mut model = Model::assemble(Path::new(RANDOM_WEIGHTS), config, no_end, 0, &tensor)?;
        model.weight_bytes = 2 * parameters.get() as u64;
        Ok(model)
    }
}

/// Fills `bytes` with bf16 numbers of mean 0 and standard deviation `std`, the same for the same seed on any number of
/// threads.
pub(crate) fn fill_normal(bytes: &mut [u8], std: f32, seed: u64) {
    const BLOCK: usize = 1 << 20;
    // Four of the numbers 0..65536 together are close to normal: their mean and their standard deviation.
    const MEAN: i32 = 2 * 65535;
    const STD: f32 = 37837.2;
    bytes.par_chunks_mut(BLOCK).enumerate().for_each(|(index, block)| {
        // SplitMix64: a counter and a finaliser.
        let mut state = seed.wrapping_add((index as u64) << 32).wrapping_mul(0xd1b5_4a32_d192_ed03);
        for out in block.as_chunks_mut().0 {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            let sum = [0, 16, 32, 48].iter().map(|shift| (z >> shift) as u16 as i32).sum::<i32>();
            *out = bf16::from_f32((sum - MEAN) as f32 * (std / STD)).to_le_bytes();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model whose tensors have shapes but no elements.
    fn hollow(config: Config) -> Model {
        let empty = Arc::new(MmapMut::map_anon(1).unwrap().make_read_only().unwrap());
        let tensor = |_: &str, shape: &[usize]| Ok(Tensor::view(empty.clone(), 0, Dtype::Bf16, shape));
        let no_end = GenerationConfig { eos_token_id: Vec::new() };
        Model::assemble(Path::new("hollow"), config, no_end, 0, &tensor).unwrap()
    }

    /// The counts that Hugging Face's pages give for the published weights.
    #[test]
    fn shapes_have_as_many_parameters_as_the_published_models() {
        let published = [494_032_768, 7_615_616_512, 8_030_261_248, 7_248_023_552];
        for (shape, parameters) in SHAPES.iter().zip(published) {
            assert_eq!(hollow(Config::named(shape).unwrap()).parameters(), parameters, "{shape}");
        }
        assert!(Config::named("gpt-2").is_none());
    }

    #[test]
    fn shapes_have_the_heads_and_positions_of_the_published_models() {
        // Query and KV heads, width of a head, the base of rotary frequencies, epsilon.
        let published =
            [(14, 2, 64, 1e6, 1e-6), (28, 4, 128, 1e6, 1e-6), (32, 8, 128, 5e5, 1e-5), (32, 8, 128, 1e6, 1e-5)];
        for (shape, (q, kv, dim, theta, eps)) in SHAPES.iter().zip(published) {
            let config = Config::named(shape).unwrap();
            assert_eq!((config.num_attention_heads, config.num_key_value_heads, config.head_dim), (q, kv, dim));
            assert_eq!(config.inv_freq[1], 1.0 / f64::powf(theta, 2.0 / dim as f64) as f32, "{shape}");
            assert_eq!((config.rms_norm_eps, config.layer_sliding_window(0)), (eps, None), "{shape}");
            assert_eq!(config.qkv_bias, shape.starts_with("qwen"));
        }
    }

    /// TFLOP of a step of 1536 tokens, added up by hand from the layers' products: 23 layers of 50.1 GFLOP of
    /// Qwen2.5-0.5B, 31 of 690 of Llama-3-8B, 27 of 733 of Qwen2.5-7B.
    #[test]
    fn a_step_has_the_flops_of_its_products() {
        for (shape, expected) in [("qwen2.5-0.5b", 1.15e12), ("llama-3-8b", 21.4e12), ("qwen2.5-7b", 19.8e12)] {
            let flops = Config::named(shape).unwrap().step_flops(1536, 48) as f64;
            assert!((flops / expected - 1.0).abs() < 0.005, "{shape}: {flops:e}");
        }
    }

    #[test]
    fn random_weights_are_normal_differ_and_repeat() {
        let config = || {
            let json = r#"{"model_type": "qwen2", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
                "intermediate_size": 512, "vocab_size": 4096, "max_position_embeddings": 64}"#;
            Config::from_json(serde_json::from_str(json).unwrap()).unwrap()
        };
        let model = Model::random(config(), 1).unwrap();
        assert_eq!(model.weight_bytes, 2 * model.parameters() as u64);
        let values = model.embed_tokens.to_vec_f32();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let std = (values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32).sqrt();
        // A million draws: the mean is within 5 of its standard errors of 0.02 / 1024, the deviation within a percent.
        assert!(mean.abs() < 1e-4, "{mean}");
        assert!((std / 0.02 - 1.0).abs() < 0.01, "{std}");

        assert!(model.norm.to_vec_f32().iter().all(|&value| value == 1.0));
        let up = |layer: usize| model.layers[layer].up_proj.weight.bytes();
        assert_ne!(up(0), up(1));
        assert_ne!(model.embed_tokens.bytes(), model.lm_head.bytes());
        assert_eq!(model.embed_tokens.bytes(), Model::random(config(), 1).unwrap().embed_tokens.bytes());
        assert_ne!(model.embed_tokens.bytes(), Model::random(config(), 2).unwrap().embed_tokens.bytes());
    }
}
