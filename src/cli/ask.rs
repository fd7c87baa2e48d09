//! `gleaner ask`

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use gleaner::plan::ReadParams;
use gleaner::reader::{Sampling, StepReport};
use gleaner::text::PromptTemplate;
use gleaner::{Answer, AskParams, Document, Engine, Error, Progress};
use indicatif::{ProgressBar, ProgressStyle};

use super::heatmap::Heatmap;
use super::timings::Table;
use super::{Failure, ModelArgs};

/// Evidence that is shown to a person who did not say how much.
const EVIDENCE: usize = 3;

/// How a document is read.
#[derive(clap::Args)]
pub struct ReadingArgs {
    /// Most tokens of a chunk
    #[arg(long, value_name = "TOKENS", default_value_t = ReadParams::default().window_length)]
    window: usize,
    /// Best tokens of a step; the sentences that own them stay
    #[arg(long, value_name = "TOKENS", default_value_t = ReadParams::default().topk)]
    topk: usize,
    /// Width of the filter over token scores: about as long as the phrases looked for
    #[arg(long, value_name = "TOKENS", default_value_t = ReadParams::default().phrase_width)]
    phrase: usize,
    /// Most tokens that stay after a step [default: twice the window]
    #[arg(long, value_name = "TOKENS")]
    max_retained: Option<usize>,
}

impl ReadingArgs {
    pub fn read_params(&self) -> ReadParams {
        ReadParams {
            window_length: self.window,
            topk: self.topk,
            phrase_width: self.phrase,
            max_retained: self.max_retained,
            ..ReadParams::default()
        }
    }
}

#[derive(clap::Args)]
pub struct AskArgs {
    /// What you want to know
    question: String,
    /// The document, UTF-8 text; - reads standard input
    #[arg(long, value_name = "FILE")]
    doc: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    reading: ReadingArgs,
    /// Most tokens of the answer
    #[arg(long, value_name = "TOKENS", default_value_t = Sampling::default().max_new_tokens)]
    max_new_tokens: usize,
    /// 0 takes the likeliest token each time
    #[arg(long, default_value_t = Sampling::default().temperature)]
    temperature: f32,
    /// Draw among the likeliest tokens that together reach this probability
    #[arg(long, default_value_t = Sampling::default().top_p)]
    top_p: f32,
    /// The same seed gives the same draws
    #[arg(long, default_value_t = Sampling::default().seed)]
    seed: u64,
    /// A prompt of your own with the fields {context} and {question}
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Evidence to show, best first [default: 3; all with --json]
    #[arg(long, value_name = "N")]
    evidence: Option<usize>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// Write what each step kept and dropped, one JSON line a step
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Write the document as an HTML page, its sentences shaded by their scores
    #[arg(long, value_name = "FILE")]
    heatmap: Option<PathBuf>,
    /// Show where the time went, by stage and by operation: reads and answers a second time for it. On standard error, or
    /// in the object of --json
    #[arg(long)]
    timings: bool,
    /// Launch kernel by kernel instead of replaying CUDA graphs, so that a profiler shows each in its range: slower, with
    /// the same result. Nothing changes on a CPU
    #[arg(long)]
    profile_eager: bool,
    /// Print the answer alone: no progress bar, no evidence
    #[arg(short, long)]
    quiet: bool,
}

pub fn run(args: AskArgs) -> Result<(), Failure> {
    let params = AskParams {
        read: args.reading.read_params(),
        sampling: Sampling {
            max_new_tokens: args.max_new_tokens,
            temperature: args.temperature,
            top_p: args.top_p,
            seed: args.seed,
        },
        template: args.template.as_deref().map(open_template).transpose()?.unwrap_or_default(),
        timings: args.timings,
        ..AskParams::default()
    };
    params.read.validate()?;
    params.sampling.validate()?;
    let document = open_document(&args.doc)?;
    let mut trace = args.trace.as_deref().map(Trace::create).transpose()?;
    let mut heatmap = args.heatmap.as_deref().map(Heatmap::create).transpose()?;
    let mut engine = Engine::open(args.model.model(), args.model.device)?;
    engine.set_graphs(!args.profile_eager);

    let bar = match args.quiet || !io::stderr().is_terminal() {
        true => ProgressBar::hidden(),
        false => ProgressBar::new(0).with_style(
            ProgressStyle::with_template("reading {wide_bar} {pos}/{len} chunks, {eta} left")
                .expect("a valid template"),
        ),
    };
    let stream = !args.json;
    let mut failure = None;
    let result = engine.ask_with(&document, &args.question, &params, &mut |progress| {
        let done = match progress {
            Progress::Planned { figures, plan, spans } => {
                bar.set_length(figures.chunks as u64);
                if let Some(heatmap) = &mut heatmap {
                    heatmap.planned(plan, spans);
                }
                Ok(())
            }
            Progress::Step(report) => {
                bar.set_position(report.step as u64 + 1);
                if report.step + 1 == report.steps {
                    bar.finish_and_clear();
                }
                if let Some(heatmap) = &mut heatmap {
                    heatmap.step(report);
                }
                trace.as_mut().map_or(Ok(()), |trace| trace.write(report)).map_err(Failure::from)
            }
            Progress::Text(text) if stream => print_now(text).map_err(Failure::from),
            Progress::Text(_) => Ok(()),
        };
        match done {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        }
    });
    bar.finish_and_clear();
    if let Some(failure) = failure {
        return Err(failure);
    }
    let mut answer = result?;
    if let Some(trace) = trace {
        trace.finish()?;
    }
    if let Some(heatmap) = heatmap {
        heatmap.finish(&document, &args.question, &answer)?;
    }
    for warning in &answer.warnings {
        eprintln!("warning: {warning}");
    }
    answer.evidence.truncate(args.evidence.unwrap_or(if args.json { usize::MAX } else { EVIDENCE }));
    match args.json {
        true => print_json(&answer)?,
        false => {
            print_evidence(&answer, args.quiet)?;
            if let Some(timings) = &answer.timings {
                eprint!("{}", Table(timings));
            }
        }
    }
    Ok(())
}

fn open_document(path: &Path) -> Result<Document, Error> {
    if path != Path::new("-") {
        return Document::open(path);
    }
    let mut bytes = Vec::new();
    let read = io::stdin().lock().read_to_end(&mut bytes);
    read.map_err(|source| Error::Io { action: "read the document", path: "standard input".into(), source })?;
    Document::from_bytes("standard input", bytes)
}

fn open_template(path: &Path) -> Result<PromptTemplate, Error> {
    let name = path.display().to_string();
    let bytes =
        std::fs::read(path).map_err(|source| Error::Io { action: "read the template", path: path.into(), source })?;
    let text = String::from_utf8(bytes)
        .map_err(|error| Error::InvalidUtf8 { name: name.clone(), offset: error.utf8_error().valid_up_to() })?;
    PromptTemplate::new(name, &text)
}

/// The file of `--trace`.
struct Trace {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Trace {
    fn create(path: &Path) -> Result<Trace, Error> {
        let file = File::create(path).map_err(|source| Error::Io { action: "create", path: path.into(), source })?;
        Ok(Trace { path: path.into(), file: BufWriter::new(file) })
    }

    fn write(&mut self, report: &StepReport) -> Result<(), Error> {
        let written = serde_json::to_writer(&mut self.file, report).map_err(io::Error::from);
        let written = written.and_then(|()| self.file.write_all(b"\n"));
        written.map_err(|source| Error::Io { action: "write", path: self.path.clone(), source })
    }

    fn finish(mut self) -> Result<(), Error> {
        self.file.flush().map_err(|source| Error::Io { action: "write", path: self.path, source })
    }
}

fn print_now(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn print_json(answer: &Answer) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, answer)?;
    out.write_all(b"\n")
}

/// Ends the line of the streamed answer and shows what it was made from.
fn print_evidence(answer: &Answer, quiet: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out)?;
    if quiet || answer.evidence.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nEvidence ({} of {} tokens kept):", answer.retained_tokens, answer.document.tokens)?;
    for evidence in &answer.evidence {
        let text = evidence.text.split_whitespace().collect::<Vec<_>>().join(" ");
        writeln!(out, "  line {:>6}  score {:<9.3} {text}", evidence.line, evidence.score)?;
    }
    Ok(())
}
