//! `gleaner eval`: measurements of what is found and answered, each in a folder of its own that can be taken up again.

mod case;
mod chart;
mod folder;
mod haystack;
mod longbench;
mod method;
mod needle;
mod nih;
mod qa;
mod recall;
mod rows;
mod ruler;
mod run;
mod stats;
mod table;

use std::io;
use std::path::Path;

use gleaner::Error;

use super::Failure;

#[derive(clap::Args)]
pub struct EvalArgs {
    #[command(subcommand)]
    command: EvalCommand,
}

#[derive(clap::Subcommand)]
enum EvalCommand {
    /// Ask the questions of LongBench, v1 or v2, from its files
    Longbench(longbench::LongBenchArgs),
    /// Hide a fact in a long text and ask for it: needle in a haystack
    Nih(nih::NihArgs),
    /// Ask questions of your own from a file
    Qa(qa::QaArgs),
    /// Ask for needles and chains of RULER, made here at any length or read from its files
    Ruler(ruler::RulerArgs),
}

pub fn run(args: EvalArgs) -> Result<(), Failure> {
    match args.command {
        EvalCommand::Longbench(args) => longbench::run(args),
        EvalCommand::Nih(args) => nih::run(args),
        EvalCommand::Qa(args) => qa::run(args),
        EvalCommand::Ruler(args) => ruler::run(args),
    }
}

fn file_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io { action, path: path.into(), source }
}
