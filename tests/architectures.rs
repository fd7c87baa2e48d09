//! Small random models of every supported architecture against Hugging Face transformers in fp32.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{floats, golden_folder, root};
use gleaner::cpu::CpuReader;
use gleaner::model::Model;
use half::bf16;
use safetensors::SafeTensors;

/// Largest difference allowed, absolute; logits and hidden states of these models are of order one.
const TOLERANCE: f32 = 1e-3;

/// Of hidden states every so many rows are recorded.
const HIDDEN_ROW_STEP: usize = 37;

/// How the recorded model held its rotary frequencies.
#[derive(Clone, Copy)]
enum Rotary {
    /// As transformers loads a model.
    F32,
    /// As a model keeps them that was cast to bf16 as a whole and back: PyTorch casts buffers too. Recordings made
    /// that way are reproduced to the last bit by transformers with this rounding, and by up to 5e-2 not without it.
    Bf16,
}

fn worst(ours: impl Iterator<Item = f32>, expected: &[f32]) -> f32 {
    let differences: Vec<f32> = ours.zip(expected).map(|(a, b)| (a - b).abs()).collect();
    assert_eq!(differences.len(), expected.len());
    assert!(differences.iter().all(|d| d.is_finite()));
    differences.into_iter().fold(0.0, f32::max)
}

fn check(folder: &Path, rotary: Rotary) {
    let mut model = Model::open(folder).unwrap();
    if let Rotary::Bf16 = rotary {
        for frequency in &mut model.config.inv_freq {
            *frequency = bf16::from_f32(*frequency).to_f32();
        }
    }
    let (hidden_size, vocab_size) = (model.config.hidden_size, model.config.vocab_size);
    let reader = CpuReader::new(Arc::new(model));
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let integers = |name: &str| -> Vec<u32> {
        let data = expected.tensor(name).unwrap().data().to_vec();
        data.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
    };
    let input_ids = integers("input_ids");

    let (hidden, logits) = reader.hidden_and_logits(&input_ids).unwrap();
    let rows = integers("logit_rows").into_iter().flat_map(|row| {
        let start = row as usize * vocab_size;
        logits[start..start + vocab_size].to_vec()
    });
    let logit_error = worst(rows, &floats(&expected, "logits"));
    let rows = (0..input_ids.len()).step_by(HIDDEN_ROW_STEP);
    let rows = rows.flat_map(|row| hidden[row * hidden_size..(row + 1) * hidden_size].to_vec());
    let hidden_error = worst(rows, &floats(&expected, "hidden_last"));

    let head_sums = floats(&expected, "last_attention_head_sum");
    let from = input_ids.len() - head_sums.len() / input_ids.len();
    let ours = reader.attention_head_sums(&input_ids, from).unwrap();
    let attention_error = worst(ours.into_iter(), &head_sums);

    let name = folder.file_name().unwrap().display();
    println!("{name}: logits {logit_error:.1e}, hidden {hidden_error:.1e}, head sums {attention_error:.1e}");
    for error in [logit_error, hidden_error, attention_error] {
        assert!(error <= TOLERANCE, "{name}: {error:e}");
    }
}

fn check_all(folder: &Path, rotary: Rotary) {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut models: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    models.retain(|path| path.join("config.json").exists());
    models.sort();
    assert_eq!(models.len(), 7, "models in {}", folder.display());
    models.iter().for_each(|folder| check(folder, rotary));
}

#[test]
fn committed_models() {
    check_all(&root().join("tests/golden/arch"), Rotary::F32);
}

#[test]
#[ignore = "set GLEANER_GOLDEN to a folder with recorded models in arch/"]
fn models_of_the_environment() {
    check_all(&golden_folder().join("arch"), Rotary::Bf16);
}
