//! `gleaner eval ruler`: needles and chains of RULER (arXiv 2404.06654), made at any length or read from its files.

mod file;
mod score;
mod tasks;
mod words;

use std::path::PathBuf;

use serde_json::{Map, json};
use sha2::{Digest, Sha256};

use super::super::Failure;
use super::case::{BadRow, Row};
use super::folder::hex;
use super::haystack::{self, Haystack};
use super::rows;
use super::run::{self, RunArgs};
use tasks::{Maker, TASKS, Task};

#[derive(clap::Args)]
pub struct RulerArgs {
    /// Files that RULER wrote, instead of tasks made here
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["tasks", "lengths", "seed", "haystack"])]
    data: Vec<PathBuf>,
    /// What to make [default: all]
    #[arg(long, value_name = "TASK,...", value_delimiter = ',', value_parser = TASKS.each_ref().map(|task| task.name))]
    tasks: Vec<String>,
    /// Most tokens of prompt and answer together
    #[arg(long, value_name = "TOKENS,...", value_delimiter = ',', default_value = "4096,8192,16384")]
    lengths: Vec<usize>,
    /// Cases of each task and length, or rows of each file [default: 10, or all rows]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    samples: Option<u32>,
    /// The same seed gives the same cases
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The text to hide needles in, UTF-8: a file, or a folder of .txt files
    #[arg(long, value_name = "FILE|DIR")]
    haystack: Option<PathBuf>,
    #[command(flatten)]
    run: RunArgs,
}

pub fn run(args: RulerArgs) -> Result<(), Failure> {
    if !args.data.is_empty() {
        let rows = rows::read(&args.data, args.samples.map(|samples| samples as usize), file::case)?;
        let engine = args.run.open()?;
        let parameters = Map::from_iter([("eval".into(), json!("ruler")), ("made".into(), json!(false))]);
        run::run(&args.run, &engine, rows.into_iter(), parameters)?;
        return Ok(());
    }
    let tasks: Vec<&Task> = match args.tasks[..] {
        [] => TASKS.iter().collect(),
        ref names => names.iter().filter_map(|name| Task::named(name)).collect(),
    };
    if let Some(task) = tasks.iter().find(|task| task.takes_text() && args.haystack.is_none()) {
        let others = TASKS.iter().filter(|task| !task.takes_text()).map(|task| task.name).collect::<Vec<_>>().join(",");
        return Err(Failure::Mistake(format!(
            "{} hides needles in a text: name one with --haystack, or make other tasks with --tasks {others}",
            task.name
        )));
    }
    // One paragraph, as the original has it.
    let words = |text: String| text.split_whitespace().flat_map(|word| [word, " "]).collect::<String>();
    let text = args.haystack.as_deref().map(haystack::read).transpose()?.map(words);
    let mut lengths = args.lengths.clone();
    lengths.sort_unstable();
    lengths.dedup();

    let engine = args.run.open()?;
    let hash = text.as_ref().map(|text| hex(&Sha256::digest(text)));
    let count = |text: &str| Ok(engine.tokenizer().encode(text)?.len());
    let haystack = text.map(|text| Haystack::new(text, count)).transpose()?;
    let maker = Maker { engine: &engine, haystack: haystack.as_ref(), seed: args.seed };
    // Whatever is too short is told before anything is asked.
    if let Some(&shortest) = lengths.first() {
        tasks.iter().try_for_each(|task| maker.case(task, shortest, 0).map(drop))?;
    }
    if let Some(haystack) = &haystack
        && let Some(longest) = lengths.last().filter(|&&length| length > haystack.tokens())
    {
        let tokens = haystack.tokens();
        eprintln!("warning: the haystack has {tokens} tokens, so that it is repeated in texts of up to {longest}");
    }
    let samples = args.samples.unwrap_or(10) as usize;
    let mut cells = Vec::new();
    for sample in 0..samples {
        for &length in &lengths {
            cells.extend(tasks.iter().map(|&task| (task, length, sample)));
        }
    }
    // Made when they are due: together they may be larger than memory.
    let rows = cells.into_iter().map(|(task, length, sample)| row(&maker, task, length, sample));
    let parameters =
        [("eval", json!("ruler")), ("made", json!(true)), ("seed", json!(args.seed)), ("haystack_sha256", json!(hash))];
    let parameters = parameters.into_iter().map(|(name, value)| (name.into(), value)).collect();
    run::run(&args.run, &engine, rows, parameters)?;
    Ok(())
}

fn row(maker: &Maker, task: &Task, length: usize, sample: usize) -> Row {
    maker.case(task, length, sample).map_err(|failure| BadRow {
        id: format!("{}-{length}-{sample}", task.name),
        task: format!("{}@{length}", task.name),
        error: match failure {
            Failure::Mistake(message) => message,
            Failure::Gleaner(error) => error.to_string(),
            Failure::Output(error) => error.to_string(),
        },
    })
}
