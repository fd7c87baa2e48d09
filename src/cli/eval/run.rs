//! What all benchmarks share: methods side by side on the same cases, in a folder that can be taken up again.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use gleaner::{Device, Engine, Error};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::super::ask::ReadingArgs;
use super::super::{Failure, ModelArgs};
use super::case::{BadRow, Row};
use super::chart;
use super::folder::{RunFolder, Start, model_hash};
use super::method::{Answered, Method, Sweep, Variant};
use super::table::Table;

/// The options of all benchmarks.
#[derive(clap::Args)]
pub struct RunArgs {
    /// Folder of the results; a run that is in it already goes on where it ended
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// Ways to answer, side by side
    #[arg(long, value_name = "METHOD,...", value_delimiter = ',', default_value = "gleaner,last-window")]
    methods: Vec<Method>,
    #[command(flatten)]
    reading: ReadingArgs,
    /// Values to try for window, topk, phrase or max-retained; all combinations, if given more than once
    #[arg(long, value_name = "NAME=N,...")]
    sweep: Vec<Sweep>,
}

impl RunArgs {
    /// Checks the settings and opens the model.
    pub fn open(&self) -> Result<Engine, Failure> {
        self.variants()?;
        Ok(Engine::open(self.model.model(), self.model.device)?)
    }

    fn variants(&self) -> Result<Vec<Variant>, Error> {
        Variant::all(&self.methods, &self.reading.read_params(), &self.sweep)
    }
}

/// A line of cases.jsonl: what one variant made of one case.
#[derive(Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    pub task: String,
    #[serde(flatten)]
    pub variant: Variant,
    /// `Case::hash`; empty for a row that made no case.
    case: String,
    question: String,
    /// Right answers; empty where there is none to give.
    pub expected: Vec<String>,
    pub details: Map<String, Value>,
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a case.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
pub enum Outcome {
    Done {
        /// A number for each score by name; the first is the main one.
        scores: Map<String, Value>,
        #[serde(flatten)]
        answered: Answered,
    },
    Bad {
        error: String,
    },
}

/// Everything that was found.
pub struct Results {
    folder: RunFolder,
    pub variants: Vec<Variant>,
    /// In the order of the rows, for each variant in order.
    pub records: Vec<Record>,
}

/// Asks all `rows` by all methods, except what the folder has already, and shows the table. `parameters` are the
/// benchmark's own that shape all cases.
pub fn run(
    args: &RunArgs,
    engine: &Engine,
    rows: impl ExactSizeIterator<Item = Row>,
    parameters: Map<String, Value>,
) -> Result<Results, Failure> {
    let variants = args.variants()?;
    let (mut folder, finished) = RunFolder::open(&args.out, shaping(engine, parameters)?, Start::now(engine))?;
    // Of several lines of a case the last counts.
    let mut finished: BTreeMap<(String, Variant), Record> =
        finished.into_iter().map(|record| ((record.id.clone(), record.variant.clone()), record)).collect();

    if !finished.is_empty() {
        eprintln!("the folder has {} answers already", finished.len());
    }

    let mut progress = RunProgress::new(rows.len());
    let (mut records, mut ids) = (Vec::new(), HashSet::new());
    for (index, row) in rows.enumerate() {
        if !ids.insert(id(&row).to_owned()) {
            return Err(Failure::Mistake(format!("two cases have the id {:?}; give each one of its own", id(&row))));
        }
        let first = records.len();
        for (at, variant) in variants.iter().enumerate() {
            let known = finished.remove(&(id(&row).to_owned(), variant.clone()));
            if let (Ok(case), Some(record)) = (&row, &known)
                && record.case == case.hash()
                && record.answered().is_some()
            {
                records.extend(known);
                continue;
            }
            let advance = &mut |share: f64| progress.advance(index, (at as f64 + share) / variants.len() as f64);
            let record = record(engine, &row, variant, advance)?;
            // A row that is as bad as it was needs no new line.
            if known.is_none_or(|known| !known.is_as_bad_as(&record)) {
                folder.append(&record)?;
            }
            records.push(record);
        }
        if let Some(error) = records[first..].iter().find_map(Record::error) {
            progress.warn(&format!("warning: {}: {error}", id(&row)));
        }
        progress.done(index);
    }
    drop(progress);
    let results = Results { folder, variants, records };
    results.show()?;
    Ok(results)
}

impl Results {
    /// Writes the tables and charts, and shows the table.
    fn show(&self) -> Result<(), Failure> {
        let done: Vec<&Answered> = self.records.iter().filter_map(Record::answered).collect();
        if done.is_empty() {
            return Err(Failure::Mistake("there is no case that could be asked".into()));
        }
        let warned: Vec<&String> = done.iter().filter_map(|answered| answered.warnings.first()).collect();
        if let Some(first) = warned.first() {
            eprintln!("warning: {} of {} answers have warnings, the first: {first}", warned.len(), done.len());
        }
        let table = Table::new(self);
        self.folder.write("table.csv", table.csv())?;
        self.write_chart("scores", &table.scores_chart())?;
        if let Some(chart) = table.recall_chart() {
            self.write_chart("recall", &chart)?;
        }
        let mut out = io::stdout().lock();
        out.write_all(table.text().as_bytes())?;
        writeln!(out, "Cases, table and charts are in {}", self.folder.path().display())?;
        Ok(())
    }

    /// Writes a chart as SVG and as PNG.
    pub fn write_chart(&self, name: &str, svg: &str) -> Result<(), Failure> {
        self.folder.write(&format!("{name}.svg"), svg)?;
        match chart::png(svg) {
            Ok(png) => self.folder.write(&format!("{name}.png"), png)?,
            Err(error) => eprintln!("warning: {name}.png was not written: {error}; {name}.svg is there"),
        }
        Ok(())
    }
}

/// How far a run is: a bar on a terminal, else a line a minute.
struct RunProgress {
    bar: ProgressBar,
    rows: usize,
    last_line: Instant,
}

/// Steps of the bar for each row.
const PARTS: u64 = 1000;

impl RunProgress {
    fn new(rows: usize) -> RunProgress {
        let style = "case {msg} {wide_bar} {percent}%, {eta} left";
        let bar = match io::stderr().is_terminal() {
            false => ProgressBar::hidden(),
            true => ProgressBar::no_length().with_style(ProgressStyle::with_template(style).expect("a valid template")),
        };
        bar.set_length(rows as u64 * PARTS);
        RunProgress { bar, rows, last_line: Instant::now() }
    }

    /// A share of row `index` is done.
    fn advance(&self, index: usize, share: f64) {
        self.bar.set_message(format!("{} of {}", index + 1, self.rows));
        self.bar.set_position(((index as f64 + share) * PARTS as f64) as u64);
    }

    fn done(&mut self, index: usize) {
        self.advance(index, 1.0);
        if !io::stderr().is_terminal() && self.last_line.elapsed() > Duration::from_secs(60) {
            eprintln!("{} of {} cases are done, about {} left", index + 1, self.rows, HumanDuration(self.bar.eta()));
            self.last_line = Instant::now();
        }
    }

    fn warn(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }
}

impl Drop for RunProgress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn id(row: &Row) -> &str {
    match row {
        Ok(case) => &case.id,
        Err(bad) => &bad.id,
    }
}

impl Record {
    /// What was answered, unless the row is bad.
    pub fn answered(&self) -> Option<&Answered> {
        match &self.outcome {
            Outcome::Done { answered, .. } => Some(answered),
            Outcome::Bad { .. } => None,
        }
    }

    /// What is wrong with a bad row.
    fn error(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Done { .. } => None,
            Outcome::Bad { error } => Some(error),
        }
    }

    pub fn score_names(&self) -> impl Iterator<Item = &String> {
        self.scores().into_iter().flat_map(Map::keys)
    }

    pub fn score(&self, name: &str) -> Option<f64> {
        self.scores()?.get(name)?.as_f64()
    }

    pub fn main_score(&self) -> Option<f64> {
        self.scores()?.values().next()?.as_f64()
    }

    fn scores(&self) -> Option<&Map<String, Value>> {
        match &self.outcome {
            Outcome::Done { scores, .. } => Some(scores),
            Outcome::Bad { .. } => None,
        }
    }

    fn is_as_bad_as(&self, other: &Record) -> bool {
        self.error().is_some() && self.error() == other.error() && self.case == other.case
    }
}

/// What the benchmark's parameters do not say of what shapes all results. How fast a machine is, and where on it the
/// files lie, does not.
fn shaping(engine: &Engine, parameters: Map<String, Value>) -> Result<Map<String, Value>, Error> {
    let device = if engine.device() == Device::Cpu { "cpu" } else { "cuda" };
    let mut all = parameters;
    all.insert("version".into(), json!(env!("CARGO_PKG_VERSION")));
    all.insert("model_sha256".into(), json!(model_hash(&engine.model().path)?));
    all.insert("device".into(), json!(device));
    Ok(all)
}

/// Asks a row by a variant. What is wrong with the row alone becomes its outcome; other errors end the run.
fn record(engine: &Engine, row: &Row, variant: &Variant, progress: &mut dyn FnMut(f64)) -> Result<Record, Error> {
    let case = match row {
        Ok(case) => case,
        Err(BadRow { id, task, error }) => {
            return Ok(Record {
                id: id.clone(),
                task: task.clone(),
                variant: variant.clone(),
                case: String::new(),
                question: String::new(),
                expected: Vec::new(),
                details: Map::new(),
                outcome: Outcome::Bad { error: error.clone() },
            });
        }
    };
    let outcome = match variant.ask(engine, case, progress) {
        Ok(answered) => {
            let scores = case.scores.iter().map(|score| (score.name.into(), (score.of)(case, &answered.answer).into()));
            Outcome::Done { scores: scores.collect(), answered }
        }
        Err(error) if of_the_row(&error) => Outcome::Bad { error: error.to_string() },
        Err(error) => return Err(error),
    };
    Ok(Record {
        id: case.id.clone(),
        task: case.task.clone(),
        variant: variant.clone(),
        case: case.hash(),
        question: case.question.clone(),
        expected: case.answers.clone(),
        details: case.details.clone(),
        outcome,
    })
}

/// Whether an error may be that of one row, so that the next may go well.
fn of_the_row(error: &Error) -> bool {
    matches!(
        error,
        Error::EmptyDocument { .. }
            | Error::EmptyQuestion
            | Error::QuestionTooLong { .. }
            | Error::Template { .. }
            | Error::Plan(_)
            | Error::NotFinite { .. }
    )
}
