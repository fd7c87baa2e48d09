//! `gleaner bench`

mod measure;
mod report;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::builder::PossibleValuesParser;
use gleaner::model::{Config, Model, SHAPES};
use gleaner::plan::ReadParams;
use gleaner::reader::{MemoryRequest, Reader};
use gleaner::timings::Ceilings;
use gleaner::{Device, Document, Error, cuda};
use indicatif::ProgressBar;

use super::{Failure, ModelArgs};
use measure::{Bench, FRAME, QUESTION_ROWS, SENTENCE};
use report::Report;

/// Lengths that a step may have, in tokens.
const MAX_STEP: usize = 1 << 17;

/// Length of the document, in tokens, where the user did not say: seconds on a GPU, seconds with the bundled model on a CPU.
const GPU_DOCUMENT: usize = 1_000_000;
const CPU_DOCUMENT: usize = 8_192;

#[derive(clap::Args)]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// A published shape with random weights instead of a model: no files needed
    #[arg(long, conflicts_with = "model", value_parser = PossibleValuesParser::new(SHAPES))]
    shape: Option<String>,
    /// A document to read instead of random tokens, UTF-8 text: how much of a step the next one takes over depends on it,
    /// and so does what stays
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shape", "tokens"])]
    doc: Option<PathBuf>,
    /// Length of the document [default: 1000000 on a GPU, 8192 on a CPU]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Most tokens of a chunk of the document
    #[arg(long, value_name = "TOKENS", default_value_t = 1024)]
    window: usize,
    /// Tokens that stay after a step, in sixteens
    #[arg(long, value_name = "TOKENS", default_value_t = 800)]
    retained: usize,
    /// Lengths of the steps to time
    #[arg(long, value_name = "TOKENS,...", value_delimiter = ',', default_value = "1894,2918,4966")]
    lengths: Vec<usize>,
    /// Pause before each reading that is timed, in milliseconds: a GPU that has rested runs at its highest clock for a while,
    /// one that has worked for seconds at what its power limit leaves
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pause: u64,
    /// Tokens to decode
    #[arg(long, value_name = "N", default_value_t = 64)]
    new_tokens: usize,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

impl BenchArgs {
    fn validate(&self) -> Result<(), Error> {
        let check = |name, value: usize, valid: bool, expected: String| match valid {
            true => Ok(()),
            false => Err(Error::Parameter { name, value: value.to_string(), expected }),
        };
        let whole = self.retained.is_multiple_of(SENTENCE) && (SENTENCE..MAX_STEP).contains(&self.retained);
        let expected = format!("a multiple of {SENTENCE}, the length of the document's sentences, below {MAX_STEP}");
        check("--retained", self.retained, whole, expected)?;
        let shortest = FRAME + self.retained + SENTENCE;
        let lengths = shortest..=MAX_STEP.max(shortest);
        for &length in &self.lengths {
            let expected = format!(
                "from {shortest} ({FRAME} of prompt, {} retained, a sentence of {SENTENCE}) to {}",
                self.retained,
                lengths.end()
            );
            check("a step of --lengths", length, lengths.contains(&length), expected)?;
        }
        let window = (SENTENCE..=32768).contains(&self.window);
        check("--window", self.window, window, format!("from {SENTENCE} to 32768"))?;
        let tokens = self.tokens.unwrap_or(GPU_DOCUMENT);
        let most = 1_000_000_000;
        check("--tokens", tokens, (SENTENCE..=most).contains(&tokens), format!("from {SENTENCE} to {most}"))?;
        let new_tokens = (1..=4096).contains(&self.new_tokens);
        check("--pause", self.pause as usize, self.pause <= 60_000, "from 0 to 60000".into())?;
        check("--new-tokens", self.new_tokens, new_tokens, "from 1 to 4096".into())
    }
}

pub fn run(args: BenchArgs) -> Result<(), Failure> {
    args.validate()?;
    let bar = match io::stderr().is_terminal() {
        true => ProgressBar::new_spinner(),
        false => ProgressBar::hidden(),
    };
    bar.enable_steady_tick(Duration::from_millis(200));
    let report = measure(&args, &|what| bar.set_message(what));
    bar.finish_and_clear();
    let report = report?;
    for note in &report.notes {
        eprintln!("note: {note}");
    }
    let mut out = io::stdout().lock();
    match args.json {
        true => {
            serde_json::to_writer_pretty(&mut out, &report).map_err(io::Error::from)?;
            out.write_all(b"\n")?;
        }
        false => report.print(&mut out)?,
    }
    Ok(())
}

/// Everything, in the order of the report.
fn measure(args: &BenchArgs, progress: &dyn Fn(String)) -> Result<Report, Error> {
    // A device that is not there is the first thing to say: a model may take long to make.
    if let Device::Cuda(ordinal) = args.model.device {
        cuda::describe(ordinal)?;
    }
    let mut notes = Vec::new();
    let (name, mut model, opened) = match &args.shape {
        Some(shape) => {
            progress(format!("making random weights of the shape {shape}"));
            let config = Config::named(shape).expect("clap let a known shape through");
            (format!("{shape}, random weights"), Model::random(config, 0)?, Instant::now())
        }
        None => {
            let (path, opened) = (args.model.model(), Instant::now());
            (path.display().to_string(), Model::open(&path)?, opened)
        }
    };
    // Without end tokens an answer is as long as it is asked to be.
    model.generation_config.eos_token_id.clear();
    let model = Arc::new(model);
    progress("loading the model".into());
    let (device, mut reader) = args.model.device.reader(model.clone())?;
    let load_ms = opened.elapsed().as_secs_f64() * 1e3;

    let ceilings = match device {
        Device::Cuda(ordinal) => {
            progress("measuring what this GPU can do".into());
            cuda::ceilings(ordinal, &mut notes)
        }
        _ => Ceilings::default(),
    };

    // A closure would hold the reader from one use to the next.
    fn bench<'a>(reader: &'a dyn Reader, model: &'a Model, args: &BenchArgs) -> Bench<'a> {
        Bench { reader, config: &model.config, retained: args.retained, pause: Duration::from_millis(args.pause) }
    }
    let mut steps = Vec::new();
    reader.set_reuse(false);
    for &length in &args.lengths {
        progress(format!("steps of {length} tokens"));
        steps.push(bench(reader.as_ref(), &model, args).steps(length, ceilings.gemm_tflops)?);
    }
    let plan = match &args.doc {
        Some(path) => {
            progress("cutting the document".into());
            let params = ReadParams { window_length: args.window, ..ReadParams::default() };
            measure::plan_of(&model, &Document::open(path)?, &params)?.0
        }
        None => {
            let tokens = args.tokens.unwrap_or(if device == Device::Cpu { CPU_DOCUMENT } else { GPU_DOCUMENT });
            bench(reader.as_ref(), &model, args).document_plan(tokens, args.window)
        }
    };
    progress(format!("a document of {} tokens", plan.tokens.len()));
    reader.set_reuse(true);
    let mut document = bench(reader.as_ref(), &model, args).document(&plan, args.window)?;
    if document.mean_computed_tokens < document.mean_step_tokens {
        reader.set_reuse(false);
        document.seconds_without_reuse =
            Some(bench(reader.as_ref(), &model, args).document(&plan, args.window)?.seconds);
    }
    progress("answering".into());
    let answer = bench(reader.as_ref(), &model, args).answer(args.new_tokens)?;
    let tokenizer = match args.shape {
        Some(_) => None,
        None => {
            progress("tokenising".into());
            Some(measure::tokenizer(&model)?)
        }
    };

    let memory = reader.memory(&MemoryRequest {
        plan: plan.shape(),
        prompt_tokens: answer.prompt_tokens,
        max_new_tokens: args.new_tokens,
    });
    for step in steps.iter().filter(|step| step.mean_tokens != step.tokens as f64) {
        notes.push(format!(
            "steps of {} tokens had {:.0} on average: fewer sentences were kept than --retained allows",
            step.tokens, step.mean_tokens
        ));
    }
    Ok(Report {
        model: name,
        parameters: model.parameters(),
        weight_bytes: model.weight_bytes,
        device: reader.device(),
        load_ms,
        retained: args.retained,
        pause_ms: args.pause,
        frame_tokens: FRAME,
        question_rows: QUESTION_ROWS,
        ceilings,
        steps,
        document,
        answer,
        workspace_bytes: memory.workspace_bytes(),
        tokenizer,
        notes,
    })
}
