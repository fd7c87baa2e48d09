//! `gleaner info`

use std::io::{self, Write};

use gleaner::plan::{PlanShape, ReadParams};
use gleaner::reader::{MemoryRequest, Sampling};
use gleaner::{Engine, cuda};

use super::{Failure, ModelArgs};

/// Rows of an ordinary question, for the memory plan.
const QUESTION_ROWS: usize = 64;

#[derive(clap::Args)]
pub struct InfoArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Most tokens of a chunk, for the memory plan
    #[arg(long, value_name = "TOKENS", default_value_t = ReadParams::default().window_length)]
    window: usize,
    /// Most tokens that stay after a step, for the memory plan [default: twice the window]
    #[arg(long, value_name = "TOKENS")]
    max_retained: Option<usize>,
    /// Tokens of the document, for the memory plan
    #[arg(long, value_name = "TOKENS", default_value_t = 1_000_000,
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=u32::MAX as u64))]
    tokens: usize,
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}

pub fn run(args: InfoArgs) -> Result<(), Failure> {
    let params = ReadParams { window_length: args.window, max_retained: args.max_retained, ..ReadParams::default() };
    params.validate()?;
    let engine = Engine::open(args.model.model(), args.model.device)?;
    let model = engine.model();
    let config = &model.config;
    let plan = PlanShape::estimate(&params, args.tokens, QUESTION_ROWS);
    let memory = engine.reader().memory(&MemoryRequest {
        plan,
        prompt_tokens: plan.max_step_tokens.min(params.max_retained() + QUESTION_ROWS),
        max_new_tokens: Sampling::default().max_new_tokens,
    });
    let on_device = match memory.weights {
        0 => String::new(),
        bytes => format!(", {} on the GPU", mib(bytes)),
    };
    let build = match cuda::BUILT {
        true if cuda::RANGES => format!("CPU and CUDA ({}), ranges for profilers", cuda::ARCHITECTURES),
        true => format!("CPU and CUDA ({})", cuda::ARCHITECTURES),
        false => "CPU only".into(),
    };
    let gpu = cuda::describe(0).unwrap_or_else(|error| format!("none ({error})"));
    let lines = [
        ("gleaner", env!("CARGO_PKG_VERSION").into()),
        ("build", build),
        ("device", engine.reader().device()),
        ("GPU", gpu),
        ("model", model.path.display().to_string()),
        (
            "shape",
            format!(
                "{:?}: {:.1}M parameters, {} layers, hidden {}, {} query and {} KV heads of {}, intermediate {}, vocabulary {}",
                config.architecture,
                model.parameters() as f64 / 1e6,
                config.num_hidden_layers,
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                config.intermediate_size,
                config.vocab_size
            ),
        ),
        ("positions", format!("up to {} tokens a prompt", config.max_position_embeddings)),
        ("weights", format!("{} mapped from disk{on_device}", mib(model.weight_bytes))),
        (
            "workspace",
            format!(
                "{} for a document of {} tokens: {} chunks in steps of up to {} tokens ({} of window, {} kept, {QUESTION_ROWS} of question)",
                mib(memory.workspace_bytes()),
                plan.tokens,
                plan.chunks,
                plan.max_step_tokens,
                params.window_length,
                params.max_retained()
            ),
        ),
    ];
    let mut out = io::stdout().lock();
    for (name, value) in lines {
        writeln!(out, "{name:<10} {value}")?;
    }
    if memory.workspace.len() > 1 {
        for (part, bytes) in &memory.workspace {
            writeln!(out, "{:<10} {} {part}", "", mib(*bytes))?;
        }
        writeln!(out, "{:<10} {} with the weights", "in all", mib(memory.weights + memory.workspace_bytes()))?;
    }
    Ok(())
}
