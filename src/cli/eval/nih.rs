//! `gleaner eval nih`: a fact hidden at many depths of texts of many lengths.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use gleaner::reader::Sampling;
use gleaner::text::python_strip;
use gleaner::{AskParams, Document, Engine, Error, Progress, Timing};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::super::ask::ReadingArgs;
use super::super::noise::Noise;
use super::super::{Failure, ModelArgs};
use super::RunFolder;
use super::chart::{self, Heatmap};
use super::haystack::{self, Haystack, Placement};
use super::needle::{self, Needle};

#[derive(clap::Args)]
pub struct NihArgs {
    /// The text to hide needles in, UTF-8: a file, or a folder of .txt files
    #[arg(long, value_name = "FILE|DIR")]
    haystack: PathBuf,
    /// Folder of the results; a run that is in it already goes on where it ended
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// Lengths of the documents, needle included
    #[arg(long, value_name = "TOKENS,...", value_delimiter = ',', default_value = "4000,8000,16000")]
    lengths: Vec<usize>,
    /// Number of depths, evenly spread from the first sentence to the last
    #[arg(long, value_name = "N", default_value_t = 10)]
    depths: usize,
    /// The same seed gives the same documents and needles
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The fact to hide, instead of drawn ones
    #[arg(long, value_name = "TEXT", requires_all = ["question", "answer"])]
    needle: Option<String>,
    /// The question for it
    #[arg(long, value_name = "TEXT", requires = "needle")]
    question: Option<String>,
    /// The answer to expect
    #[arg(long, value_name = "TEXT", requires = "needle")]
    answer: Option<String>,
    #[command(flatten)]
    reading: ReadingArgs,
}

impl NihArgs {
    /// The lengths in order, each once.
    fn lengths(&self) -> Vec<usize> {
        let mut lengths = self.lengths.clone();
        lengths.sort_unstable();
        lengths.dedup();
        lengths
    }

    /// The depths in percent.
    fn depths(&self) -> Result<Vec<usize>, Error> {
        let steps = match self.depths {
            2..=101 => self.depths - 1,
            depths => {
                let expected = "from 2 to 101".into();
                return Err(Error::Parameter { name: "--depths", value: depths.to_string(), expected });
            }
        };
        Ok((0..=steps).map(|step| (200 * step + steps) / (2 * steps)).collect())
    }

    /// The needle of the command line.
    fn needle(&self) -> Result<Option<Needle>, Failure> {
        let (Some(text), Some(question), Some(answer)) = (&self.needle, &self.question, &self.answer) else {
            return Ok(None);
        };
        let text = python_strip(text).to_owned();
        if text.is_empty() {
            return Err(Failure::Mistake("--needle is empty: write the fact to hide".into()));
        }
        if !needle::has_words(answer) {
            return Err(Failure::Mistake(format!(
                "--answer {answer:?} has no word or number: write what a right answer contains"
            )));
        }
        Ok(Some(Needle { text, question: question.clone(), answer: answer.clone() }))
    }
}

/// One cell of the grid.
struct Case {
    length: usize,
    depth: usize,
    needle: Needle,
    placement: Placement,
}

/// A finished case: a line of cases.jsonl.
#[derive(Serialize, Deserialize)]
struct Record {
    length: usize,
    depth: usize,
    needle: String,
    question: String,
    expected: String,
    answer: String,
    word_share: f64,
    exact: bool,
    evidence_recall: f64,
    document_tokens: usize,
    steps: usize,
    retained_tokens: usize,
    timing_ms: Timing,
    warnings: Vec<String>,
}

pub fn run(args: NihArgs) -> Result<(), Failure> {
    let params = AskParams {
        read: args.reading.read_params(),
        sampling: Sampling { max_new_tokens: args.reading.max_new_tokens, ..Sampling::default() },
        ..AskParams::default()
    };
    params.read.validate()?;
    params.sampling.validate()?;
    let (lengths, depths, given) = (args.lengths(), args.depths()?, args.needle()?);
    let text = haystack::read(&args.haystack)?;
    let engine = Engine::open(args.model.model(), args.model.device)?;
    let count = |text: &str| Ok(engine.tokenizer().encode(text)?.len());
    let haystack = Haystack::new(text, count)?;

    let mut cases = Vec::new();
    for &length in &lengths {
        for &depth in &depths {
            // A draw of its own, so that a cell is the same in every grid.
            let mut noise = Noise(args.seed);
            for part in [length, depth] {
                noise = Noise((noise.below(usize::MAX) as u64).wrapping_add(part as u64));
            }
            let needle = given.clone().unwrap_or_else(|| Needle::draw(&mut noise, haystack.text()));
            let frame = engine.frame(&needle.question, &params)?;
            if frame.len() > params.read.window_length {
                let window_length = params.read.window_length;
                return Err(Error::QuestionTooLong { tokens: frame.len(), window_length }.into());
            }
            let tokens = count(&format!(" {}", needle.text))?;
            let placement = haystack.place(length.saturating_sub(tokens), depth, &mut noise).map_err(|sentence| {
                Failure::Mistake(format!(
                    "a length of {length} tokens is too small: the needle takes {tokens} and the sentence of the haystack beside it {sentence}; raise --lengths"
                ))
            })?;
            cases.push(Case { length, depth, needle, placement });
        }
    }

    let parameters = parameters(&args, &engine, &haystack, &lengths, &params);
    let (mut folder, finished) = RunFolder::open::<Record>(&args.out, &parameters)?;
    let mut records: BTreeMap<(usize, usize), Record> =
        finished.into_iter().map(|record| ((record.length, record.depth), record)).collect();
    if let Some(longest) = lengths.last().filter(|&&length| length > haystack.tokens()) {
        eprintln!(
            "warning: the haystack has {} tokens, so that it is repeated in documents of up to {longest}",
            haystack.tokens()
        );
    }
    cases.retain(|case| !records.contains_key(&(case.length, case.depth)));
    if !records.is_empty() {
        eprintln!("{} cases are finished already, {} are left", records.len(), cases.len());
    }

    let bar = match io::stderr().is_terminal() {
        false => ProgressBar::hidden(),
        // Counted in tokens, for long documents take longer.
        true => ProgressBar::new(cases.iter().map(|case| case.length as u64).sum()).with_style(
            ProgressStyle::with_template("{msg} {wide_bar} {percent}%, {eta} left").expect("a valid template"),
        ),
    };
    let all = cases.len();
    for (index, case) in cases.iter().enumerate() {
        bar.set_message(format!("case {} of {all}", index + 1));
        let done = bar.position();
        let progress = &mut |progress: Progress| {
            if let Progress::Step(report) = progress {
                bar.set_position(done + (case.length * (report.step + 1) / report.steps) as u64);
            }
            ControlFlow::Continue(())
        };
        let record = ask(&engine, &haystack, case, &params, progress)?;
        folder.append(&record)?;
        records.insert((case.length, case.depth), record);
    }
    bar.finish_and_clear();

    let warned: Vec<&String> = records.values().filter_map(|record| record.warnings.first()).collect();
    if let Some(first) = warned.first() {
        eprintln!("warning: {} of {} cases have warnings, the first: {first}", warned.len(), records.len());
    }
    let grid = Grid { lengths, depths, records };
    folder.write("table.csv", &grid.csv())?;
    folder.write("heatmap.svg", &grid.svg())?;
    let mut out = io::stdout().lock();
    out.write_all(grid.tables().as_bytes())?;
    writeln!(out, "cases.jsonl, table.csv and heatmap.svg are in {}", args.out.display())?;
    Ok(())
}

/// Everything that shapes the results, for run.json.
fn parameters(
    args: &NihArgs,
    engine: &Engine,
    haystack: &Haystack,
    lengths: &[usize],
    params: &AskParams,
) -> Map<String, Value> {
    // FNV-1a: tells an edited haystack from the one before.
    let fnv = |hash: u64, &byte: &u8| (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3);
    let hash = haystack.text().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, fnv);
    let Value::Object(parameters) = json!({
        "eval": "nih",
        "version": env!("CARGO_PKG_VERSION"),
        "model": engine.model().path,
        "device": engine.reader().device(),
        "haystack": args.haystack,
        "haystack_tokens": haystack.tokens(),
        "haystack_fnv1a": format!("{hash:016x}"),
        "lengths": lengths,
        "depths": args.depths,
        "seed": args.seed,
        "needle": args.needle,
        "question": args.question,
        "answer": args.answer,
        "window": params.read.window_length,
        "topk": params.read.topk,
        "phrase": params.read.phrase_width,
        "max_retained": params.read.max_retained(),
        "max_new_tokens": params.sampling.max_new_tokens,
    }) else {
        unreachable!("the value above is an object")
    };
    parameters
}

fn ask(
    engine: &Engine,
    haystack: &Haystack,
    case: &Case,
    params: &AskParams,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Record, Error> {
    let Needle { text: needle, question, answer: expected } = case.needle.clone();
    let (text, span) = haystack.hide(&case.placement, &needle);
    let document = Document::new("the haystack", text)?;
    let answer = engine.ask_with(&document, &question, params, progress)?;
    Ok(Record {
        length: case.length,
        depth: case.depth,
        word_share: needle::word_share(&expected, &answer.answer),
        exact: needle::contains_phrase(&expected, &answer.answer),
        evidence_recall: needle::evidence_recall(document.text(), &span, &answer.evidence),
        needle,
        question,
        expected,
        answer: answer.answer,
        document_tokens: answer.document.tokens,
        steps: answer.steps,
        retained_tokens: answer.retained_tokens,
        timing_ms: answer.timing_ms,
        warnings: answer.warnings,
    })
}

/// What is shown of a record.
type Score = (&'static str, fn(&Record) -> f64);

const SCORES: [Score; 3] = [
    ("Answer: share of the expected words", |record| record.word_share),
    ("Answer: expected phrase contained", |record| f64::from(u8::from(record.exact))),
    ("Evidence: share of the needle kept", |record| record.evidence_recall),
];

/// All cases, each finished.
struct Grid {
    lengths: Vec<usize>,
    depths: Vec<usize>,
    records: BTreeMap<(usize, usize), Record>,
}

impl Grid {
    /// A list for each depth with a value for each length.
    fn cells(&self, value: fn(&Record) -> f64) -> Vec<Vec<f64>> {
        let row = |depth: &usize| self.lengths.iter().map(|length| value(&self.records[&(*length, *depth)])).collect();
        self.depths.iter().map(row).collect()
    }

    fn csv(&self) -> String {
        let mut csv = "length,depth,word_share,exact,evidence_recall\n".to_owned();
        for ((length, depth), record) in &self.records {
            let exact = u8::from(record.exact);
            let _ = writeln!(csv, "{length},{depth},{:.4},{exact},{:.4}", record.word_share, record.evidence_recall);
        }
        csv
    }

    fn svg(&self) -> String {
        let maps = SCORES.map(|(title, value)| Heatmap {
            title: title.into(),
            columns: ("tokens".into(), self.lengths.iter().map(usize::to_string).collect()),
            rows: ("depth, %".into(), self.depths.iter().map(usize::to_string).collect()),
            cells: self.cells(value),
        });
        chart::svg("Needle in a haystack", &maps)
    }

    /// Depths down, lengths across, a table for each score.
    fn tables(&self) -> String {
        let mut out = String::new();
        for (title, value) in SCORES {
            let cells = self.cells(value);
            let mean = cells.iter().flatten().sum::<f64>() / self.records.len() as f64;
            let _ = writeln!(out, "{title} (mean {mean:.3})");
            let _ = write!(out, "{:>8}", "depth");
            for length in &self.lengths {
                let _ = write!(out, "{length:>9}");
            }
            for (depth, row) in self.depths.iter().zip(cells) {
                let _ = write!(out, "\n{depth:>7}%");
                for value in row {
                    let _ = write!(out, "{value:>9.2}");
                }
            }
            out.push_str("\n\n");
        }
        out
    }
}
