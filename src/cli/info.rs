//! `gleaner info`

use std::io::{self, Write};

use gleaner::plan::ReadParams;
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
    let step_tokens = params.window_length + params.max_retained() + QUESTION_ROWS;
    let build = match cuda::BUILT {
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
        ("weights", format!("{} mapped from disk", mib(model.weight_bytes))),
        (
            "workspace",
            format!(
                "{} for a step of {step_tokens} tokens ({} of window, {} kept, {QUESTION_ROWS} of question)",
                mib(engine.reader().workspace_bytes(step_tokens, QUESTION_ROWS)),
                params.window_length,
                params.max_retained()
            ),
        ),
    ];
    let mut out = io::stdout().lock();
    for (name, value) in lines {
        writeln!(out, "{name:<10} {value}")?;
    }
    Ok(())
}
