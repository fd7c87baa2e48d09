//! `gleaner eval nih`: facts hidden at many depths of texts of many lengths.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::PathBuf;

use gleaner::reader::Sampling;
use gleaner::text::python_strip;
use gleaner::{Engine, Error};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::super::Failure;
use super::super::noise::Noise;
use super::case::{Case, Score};
use super::chart::heatmap::{self, Heatmap};
use super::folder::hex;
use super::haystack::{self, Haystack, Placement};
use super::method::Variant;
use super::needle::{self, Needle};
use super::run::{self, Record, Results, RunArgs};

#[derive(clap::Args)]
pub struct NihArgs {
    /// The text to hide needles in, UTF-8: a file, or a folder of .txt files
    #[arg(long, value_name = "FILE|DIR")]
    haystack: PathBuf,
    #[command(flatten)]
    run: RunArgs,
    /// Lengths of the documents, needles included
    #[arg(long, value_name = "TOKENS,...", value_delimiter = ',', default_value = "4000,8000,16000")]
    lengths: Vec<usize>,
    /// Number of depths, evenly spread from the first sentence to the last
    #[arg(long, value_name = "N", default_value_t = 10)]
    depths: usize,
    /// Facts in each document, from the depth on at even distances, and asked for all at once
    #[arg(long, value_name = "N", default_value_t = 1)]
    needles: usize,
    /// For each fact so many more in the same words about something else, at drawn depths
    #[arg(long, value_name = "N", default_value_t = 0)]
    distractors: usize,
    /// For each length also ask for facts that are not there
    #[arg(long)]
    no_needle: bool,
    /// The same seed gives the same documents and needles
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The fact to hide, instead of drawn ones
    #[arg(long, value_name = "TEXT", requires_all = ["question", "answer"], conflicts_with_all = ["needles", "distractors"])]
    needle: Option<String>,
    /// The question for it
    #[arg(long, value_name = "TEXT", requires = "needle")]
    question: Option<String>,
    /// The answer to expect
    #[arg(long, value_name = "TEXT", requires = "needle")]
    answer: Option<String>,
    /// Most tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value_t = Sampling::default().max_new_tokens)]
    max_new_tokens: usize,
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
    fn depths(&self) -> Vec<usize> {
        let steps = self.depths - 1;
        (0..=steps).map(|step| (200 * step + steps) / (2 * steps)).collect()
    }

    fn validate(&self) -> Result<(), Error> {
        let numbers = [
            ("--depths", self.depths, 2..=101),
            ("--needles", self.needles, 1..=20),
            ("--distractors", self.distractors, 0..=1000),
        ];
        for (name, value, range) in numbers {
            if !range.contains(&value) {
                let expected = format!("from {} to {}", range.start(), range.end());
                return Err(Error::Parameter { name, value: value.to_string(), expected });
            }
        }
        Ok(())
    }

    /// The needle of the command line.
    fn needle(&self) -> Result<Option<Needle>, Failure> {
        let (Some(text), Some(question), Some(answer)) = (&self.needle, &self.question, &self.answer) else {
            return Ok(None);
        };
        let text = python_strip(text);
        if text.is_empty() {
            return Err(Failure::Mistake("--needle is empty: write the fact to hide".into()));
        }
        if !needle::has_words(answer) {
            return Err(Failure::Mistake(format!(
                "--answer {answer:?} has no word or number: write what a right answer contains"
            )));
        }
        Ok(Some(Needle::given(text, question, answer)))
    }

    /// What shapes all cases beside their ids.
    fn parameters(&self, haystack: &Haystack) -> Map<String, Value> {
        let Value::Object(parameters) = json!({
            "eval": "nih",
            "haystack_sha256": hex(&Sha256::digest(haystack.text())),
            "seed": self.seed,
            "needles": self.needles,
            "distractors": self.distractors,
            "needle": self.needle,
            "question": self.question,
            "answer": self.answer,
        }) else {
            unreachable!("the value above is an object")
        };
        parameters
    }
}

/// Means over the needles asked for.
const SCORES: [Score; 2] = [
    Score { name: "word_share", of: |case, answer| mean(case, |expected| needle::word_share(expected, answer)) },
    Score {
        name: "exact",
        of: |case, answer| mean(case, |expected| f64::from(u8::from(needle::contains_phrase(expected, answer)))),
    },
];

/// Of answers to questions for what is not there.
const DECLINED: [Score; 1] =
    [Score { name: "declined", of: |_, answer| f64::from(u8::from(needle::declines(answer))) }];

fn mean(case: &Case, score: impl Fn(&str) -> f64) -> f64 {
    case.answers.iter().map(|expected| score(expected)).sum::<f64>() / case.answers.len() as f64
}

/// A place of the grid.
struct Cell {
    length: usize,
    /// Percent; `None` hides nothing.
    depth: Option<usize>,
    asked: Vec<Needle>,
    distractors: Vec<Needle>,
    /// Of those asked for, if they are hidden, and behind them the distractors.
    placement: Placement,
}

pub fn run(args: NihArgs) -> Result<(), Failure> {
    args.validate()?;
    let (lengths, depths, given) = (args.lengths(), args.depths(), args.needle()?);
    let text = haystack::read(&args.haystack)?;
    let engine = args.run.open()?;
    let haystack = Haystack::new(text, |text| Ok(engine.tokenizer().encode(text)?.len()))?;

    let mut cells = Vec::new();
    let rows = depths.iter().map(|&depth| Some(depth)).chain(args.no_needle.then_some(None));
    // The lengths side by side, so that the time left can be told from the first cells.
    for depth in rows {
        for &length in &lengths {
            cells.push(cell(&args, &engine, &haystack, given.as_ref(), length, depth)?);
        }
    }
    if let Some(longest) = lengths.last().filter(|&&length| length > haystack.tokens()) {
        eprintln!(
            "warning: the haystack has {} tokens, so that it is repeated in documents of up to {longest}",
            haystack.tokens()
        );
    }
    let parameters = args.parameters(&haystack);
    let rows = cells.into_iter().map(|cell| Ok(case(&haystack, cell, args.max_new_tokens)));
    let results = run::run(&args.run, &engine, rows, parameters)?;

    let grids = grids(&results, &lengths, &depths, args.no_needle);
    results.write_chart("heatmap", &heatmap::svg("Needle in a haystack", &grids))?;
    let mut out = io::stdout().lock();
    grids.iter().try_for_each(|grid| out.write_all(table(grid).as_bytes()))?;
    Ok(())
}

fn cell(
    args: &NihArgs,
    engine: &Engine,
    haystack: &Haystack,
    given: Option<&Needle>,
    length: usize,
    depth: Option<usize>,
) -> Result<Cell, Failure> {
    // A draw of its own, so that a cell is the same in every grid.
    let mut noise = Noise(args.seed);
    for part in [length, depth.unwrap_or(usize::MAX)] {
        noise = Noise((noise.below(usize::MAX) as u64).wrapping_add(part as u64));
    }
    let mut asked: Vec<Needle> = given.cloned().into_iter().collect();
    while asked.len() < args.needles {
        let needle = Needle::draw(&mut noise, haystack.text());
        if asked.iter().all(|other| other.question != needle.question && other.answer != needle.answer) {
            asked.push(needle);
        }
    }
    let mut distractors = Vec::new();
    for needle in &asked {
        let wanted = distractors.len() + args.distractors;
        while distractors.len() < wanted {
            let near = needle.draw_like(&mut noise, haystack.text()).expect("a given needle has no distractors");
            if asked.iter().all(|other| other.question != near.question && other.answer != near.answer) {
                distractors.push(near);
            }
        }
    }

    let mut depths: Vec<usize> = match depth {
        Some(depth) => (0..asked.len()).map(|index| spread(depth, index, asked.len())).collect(),
        None => Vec::new(),
    };
    let hidden = asked.iter().take(depths.len()).chain(&distractors);
    let tokens = hidden.map(|needle| Ok(engine.tokenizer().encode(&format!(" {}", needle.text))?.len()));
    let tokens = tokens.sum::<Result<usize, Error>>()?;
    let room = length.saturating_sub(tokens);
    depths.extend(distractors.iter().map(|_| noise.below(101)));
    let placement = haystack.place(room, &depths, &mut noise).map_err(|sentence| {
        Failure::Mistake(format!(
            "a length of {length} tokens is too small: the needle takes {tokens} and the sentence of the haystack beside it {sentence}; raise --lengths"
        ))
    })?;
    Ok(Cell { length, depth, asked, distractors, placement })
}

/// Depth of needle `index` of `count`: from the first on at even distances, and from the end on at the beginning.
fn spread(first: usize, index: usize, count: usize) -> usize {
    let depth = first + 100 * index / count;
    if depth > 100 { depth - 100 } else { depth }
}

fn case(haystack: &Haystack, cell: Cell, max_new_tokens: usize) -> Case {
    let Cell { length, depth, asked, distractors, placement } = cell;
    let hidden = asked.iter().take(if depth.is_some() { asked.len() } else { 0 });
    let texts: Vec<&str> = hidden.chain(&distractors).map(|needle| needle.text.as_str()).collect();
    let (document, spans) = haystack.hide(&placement, &texts);
    let list = |needles: &[Needle]| json!(needles.iter().map(|needle| needle.text.as_str()).collect::<Vec<_>>());
    let details = [
        ("length", json!(length)),
        ("depth", json!(depth)),
        ("needles", list(&asked)),
        ("distractors", list(&distractors)),
    ];
    Case {
        id: cell_id(length, depth),
        task: if depth.is_some() { "needle" } else { "no needle" }.into(),
        document,
        question: asked.iter().map(|needle| needle.question.as_str()).collect::<Vec<_>>().join(" "),
        template: None,
        chat: true,
        evidence: if depth.is_some() { spans[..asked.len()].to_vec() } else { Vec::new() },
        answers: depth.map_or_else(Vec::new, |_| asked.into_iter().map(|needle| needle.answer).collect()),
        all_classes: Vec::new(),
        max_new_tokens,
        scores: if depth.is_some() { &SCORES } else { &DECLINED },
        details: details.into_iter().map(|(name, value)| (name.into(), value)).collect(),
    }
}

fn cell_id(length: usize, depth: Option<usize>) -> String {
    match depth {
        Some(depth) => format!("{length} tokens, {depth}%"),
        None => format!("{length} tokens, no needle"),
    }
}

/// What is shown in a grid: its title, and the value of a record.
type Shown = (&'static str, fn(&Record) -> Option<f64>);

const SHOWN: [Shown; 3] = [
    ("Answer: share of the expected words", |record| record.score("word_share")),
    ("Answer: expected phrase contained", |record| record.score("exact")),
    ("Evidence: share of the needle kept", |record| record.answered()?.evidence_recall),
];

/// Depths down, lengths across, a grid for each variant and score.
fn grids(results: &Results, lengths: &[usize], depths: &[usize], no_needle: bool) -> Vec<Heatmap> {
    let mut grids = Vec::new();
    for variant in &results.variants {
        let value = |length: usize, depth: Option<usize>, value: fn(&Record) -> Option<f64>| {
            let id = cell_id(length, depth);
            let of_cell = |record: &&Record| record.id == id && record.variant == *variant;
            results.records.iter().find(of_cell).and_then(value)
        };
        let row = |depth, of| lengths.iter().map(|&length| value(length, depth, of)).collect::<Vec<_>>();
        let grid = |title: &str, rows: Vec<String>, cells| Heatmap {
            title: titled(variant, &results.variants, title),
            columns: ("tokens".into(), lengths.iter().map(usize::to_string).collect()),
            rows: ("depth, %".into(), rows),
            cells,
        };
        for (title, of) in SHOWN {
            let cells = depths.iter().map(|&depth| row(Some(depth), of)).collect();
            grids.push(grid(title, depths.iter().map(usize::to_string).collect(), cells));
        }
        if no_needle {
            let cells = vec![row(None, |record| record.score("declined"))];
            grids.push(grid("No needle: no false answer", vec!["none".into()], cells));
        }
    }
    grids
}

fn titled(variant: &Variant, variants: &[Variant], title: &str) -> String {
    match variants {
        [_] => title.into(),
        _ => format!("{}. {title}", variant.label(variants)),
    }
}

/// A grid for the terminal.
fn table(grid: &Heatmap) -> String {
    let values: Vec<f64> = grid.cells.iter().flatten().flatten().copied().collect();
    let mut out = format!("\n{} (mean {:.3})\n", grid.title, values.iter().sum::<f64>() / values.len() as f64);
    let _ = write!(out, "{:>8}", "depth");
    grid.columns.1.iter().for_each(|length| out += &format!("{length:>9}"));
    for (depth, row) in grid.rows.1.iter().zip(&grid.cells) {
        let _ = write!(out, "\n{depth:>8}");
        row.iter().for_each(|value| out += &value.map_or(format!("{:>9}", "bad"), |value| format!("{value:>9.2}")));
    }
    out + "\n"
}
