//! Rotary position embedding: frequencies by Hugging Face's formulas, and the table of cosines and sines.

use std::f64::consts::PI;

use serde_json::Value;

use super::config::Config;

/// How rotary frequencies are derived from `rope_theta`.
pub(super) enum RopeScaling {
    /// As trained.
    Default,
    /// All divided by `factor`.
    Linear { factor: f64 },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: f64 },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        factor: f64,
        attention_factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_max_position_embeddings: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
}

impl RopeScaling {
    /// From `rope_parameters` (new configurations) or `rope_scaling` (old ones).
    pub fn from_json(rope: &Value, max_position: usize) -> Result<RopeScaling, String> {
        let kind = rope["rope_type"].as_str().or(rope["type"].as_str()).unwrap_or("default");
        let number = |name: &str| rope[name].as_f64();
        let required = |name: &str| match number(name) {
            Some(value) if value > 0.0 => Ok(value),
            Some(value) => Err(format!("RoPE's {name} is {value}, but must be above 0")),
            None => Err(format!("RoPE of type {kind:?} needs the number {name}")),
        };
        match kind {
            "default" => Ok(RopeScaling::Default),
            "linear" => Ok(RopeScaling::Linear { factor: required("factor")? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: required("factor")?,
                low_freq_factor: required("low_freq_factor")?,
                high_freq_factor: required("high_freq_factor")?,
                original_max_position_embeddings: required("original_max_position_embeddings")?,
            }),
            "yarn" => {
                let original = number("original_max_position_embeddings").filter(|&length| length > 0.0);
                let original = original.unwrap_or(max_position as f64);
                let factor = match rope["factor"].is_null() {
                    true => max_position as f64 / original,
                    false => required("factor")?,
                };
                let scale = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
                let attention_factor = match (number("attention_factor"), number("mscale"), number("mscale_all_dim")) {
                    (Some(given), ..) => given,
                    (None, Some(mscale), Some(all_dim)) if mscale != 0.0 && all_dim != 0.0 => {
                        scale(mscale) / scale(all_dim)
                    }
                    _ => scale(1.0),
                };
                Ok(RopeScaling::Yarn {
                    factor,
                    attention_factor,
                    beta_fast: number("beta_fast").unwrap_or(32.0),
                    beta_slow: number("beta_slow").unwrap_or(1.0),
                    original_max_position_embeddings: original,
                    truncate: rope["truncate"].as_bool().unwrap_or(true),
                })
            }
            other => Err(format!("RoPE of type {other:?} is not supported; default, linear, llama3 and yarn are")),
        }
    }

    /// What cosines and sines are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        match *self {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Radians per position, `[head_dim / 2]`.
    pub fn inv_freq(&self, rope_theta: f64, head_dim: usize) -> Vec<f32> {
        let dim = head_dim as f64;
        // Rounded to fp32 twice, as transformers computes them: the angle at position 4000 shows the difference.
        let plain = (0..head_dim / 2).map(|i| 1.0 / rope_theta.powf(2.0 * i as f64 / dim) as f32);
        let plain: Vec<f64> = plain.map(f64::from).collect();
        let scaled: Vec<f64> = match *self {
            RopeScaling::Default => plain,
            RopeScaling::Linear { factor } => plain.iter().map(|f| f / factor).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let scale = |f: &f64| {
                    let rotations = original_max_position_embeddings * f / (2.0 * PI);
                    if rotations < low_freq_factor {
                        f / factor
                    } else if rotations > high_freq_factor {
                        *f
                    } else {
                        let smooth = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                plain.iter().map(scale).collect()
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_position_embeddings, truncate, .. } => {
                let dimension_of = |rotations: f64| {
                    dim * (original_max_position_embeddings / (rotations * 2.0 * PI)).ln() / (2.0 * rope_theta.ln())
                };
                let (mut low, mut high) = (dimension_of(beta_fast), dimension_of(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let ramp = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain.iter().enumerate().map(|(i, f)| f / factor * ramp(i) + f * (1.0 - ramp(i))).collect()
            }
        };
        scaled.into_iter().map(|f| f as f32).collect()
    }
}

/// Cosines and sines for positions `0..len`, `[len, head_dim / 2]` each, in fp32.
///
/// A head is rotated in the half-split layout: dimension `i` pairs with `i + head_dim / 2`.
#[derive(Debug, Clone)]
pub struct RopeTable {
    /// `[len, head_dim / 2]`
    pub cos: Vec<f32>,
    /// `[len, head_dim / 2]`
    pub sin: Vec<f32>,
}

impl RopeTable {
    /// The table of a model for positions below `len`.
    pub fn new(config: &Config, len: usize) -> RopeTable {
        let scale = config.rope_attention_factor;
        // The angle is a product in fp32, as in transformers: fp64 would differ from what the model saw in training.
        let angles = (0..len).flat_map(|position| config.inv_freq.iter().map(move |f| position as f32 * f));
        let (cos, sin) = angles.map(|angle| (angle.cos() * scale, angle.sin() * scale)).unzip();
        RopeTable { cos, sin }
    }
}
