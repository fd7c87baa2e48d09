//! `gleaner eval longbench`: the rows of LongBench, versions 1 and 2, with their own prompts, limits and metrics.

mod v1;
mod v2;

use std::io::{self, Write};
use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::super::Failure;
use super::case::Case;
use super::rows;
use super::run::{self, RunArgs};

#[derive(clap::Args)]
pub struct LongBenchArgs {
    /// Files of LongBench v1 or v2: a JSON object a line, or an array of them
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Only the first rows of each file
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    #[command(flatten)]
    run: RunArgs,
}

pub fn run(args: LongBenchArgs) -> Result<(), Failure> {
    let rows = rows::read(&args.files, args.limit, case)?;
    let engine = args.run.open()?;
    let parameters = Map::from_iter([("eval".into(), json!("longbench"))]);
    let results = run::run(&args.run, &engine, rows.into_iter(), parameters)?;
    io::stdout().lock().write_all(v2::table(&results).as_bytes())?;
    Ok(())
}

/// The second version is told by its choices.
fn case(stem: &str, id: String, row: Value) -> Result<Case, String> {
    match row.get("choice_A") {
        Some(_) => v2::case(id, row),
        None => v1::case(stem, id, row),
    }
}
