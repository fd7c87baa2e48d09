//! The command line: arguments, exit codes, and what goes to which stream.

mod ask;
mod bench;
mod eval;
mod heatmap;
mod info;
mod noise;
mod timings;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use gleaner::{Device, Error};

/// Answers questions about documents of any length.
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done, 2 a mistake in what was given, 1 a failure of the machine or of gleaner."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer a question from a document
    Ask(ask::AskArgs),
    /// Measure reading and answering on this machine
    Bench(bench::BenchArgs),
    /// Measure how well the model finds and answers
    Eval(eval::EvalArgs),
    /// Show the model, the device, the memory plan and what this build can do
    Info(info::InfoArgs),
}

/// The model and what it runs on.
#[derive(clap::Args)]
struct ModelArgs {
    /// Directory of a Hugging Face model [default: the bundled gleaner-demo-16m]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Where to run: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: Device,
}

impl ModelArgs {
    fn model(&self) -> PathBuf {
        let bundled = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/models/gleaner-demo-16m"));
        self.model.clone().unwrap_or_else(bundled)
    }
}

/// What ends a command early.
enum Failure {
    /// The library's word on it.
    Gleaner(Error),
    /// Standard output could not be written.
    Output(io::Error),
    /// A mistake in what was given to the program, in words.
    Mistake(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Gleaner(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Output(error)
    }
}

/// Runs the program and returns its exit code.
pub fn run() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Ask(args) => ask::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Info(args) => info::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has seen enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(Failure::Output(error)) => {
            eprintln!("error: cannot write to standard output: {error}");
            ExitCode::from(1)
        }
        Err(Failure::Mistake(message)) => {
            eprintln!("error: {message}");
            ExitCode::from(2)
        }
        Err(Failure::Gleaner(error)) => {
            eprintln!("error: {error}");
            ExitCode::from(if error.is_user_error() { 2 } else { 1 })
        }
    }
}
