//! `gleaner eval qa`: questions of one's own, a JSON object a line.

use std::fs;
use std::path::{Path, PathBuf};

use gleaner::Document;
use gleaner::eval::metrics;
use gleaner::reader::Sampling;
use serde::Deserialize;
use serde_json::{Map, json};

use super::super::Failure;
use super::case::{BadRow, Case, Row, Score};
use super::file_error;
use super::rows;
use super::run::{self, RunArgs};

#[derive(clap::Args)]
pub struct QaArgs {
    /// A JSON object a line: question, answers, document or path, and if known evidence and id
    #[arg(value_name = "FILE.jsonl")]
    file: PathBuf,
    #[command(flatten)]
    run: RunArgs,
    /// Most tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value_t = Sampling::default().max_new_tokens)]
    max_new_tokens: usize,
}

/// A line of the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: Option<String>,
    document: Option<String>,
    path: Option<PathBuf>,
    question: String,
    answers: Vec<String>,
    #[serde(default)]
    evidence: Vec<String>,
}

/// The best over the right answers, as LongBench and SQuAD take it.
const SCORES: [Score; 2] = [
    Score { name: "f1", of: |case, answer| best(case, |truth| metrics::qa_f1(answer, truth)) },
    Score { name: "exact", of: |case, answer| best(case, |truth| metrics::exact_match(answer, truth)) },
];

fn best(case: &Case, score: impl Fn(&str) -> f64) -> f64 {
    case.answers.iter().map(|truth| score(truth)).fold(0.0, f64::max)
}

pub fn run(args: QaArgs) -> Result<(), Failure> {
    // A row with a wrong byte is one bad row.
    let bytes = fs::read(&args.file).map_err(file_error("read", &args.file))?;
    let text = String::from_utf8_lossy(&bytes);
    let engine = args.run.open()?;
    let lines: Vec<(usize, &str)> = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()).collect();
    let rows = lines.into_iter().map(|(number, line)| row(&args, number, line));
    let parameters = Map::from_iter([("eval".into(), json!("qa"))]);
    run::run(&args.run, &engine, rows, parameters)?;
    Ok(())
}

fn row(args: &QaArgs, number: usize, text: &str) -> Row {
    let task = args.file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let unnamed = format!("line {number}");
    let bad = |id: &str, error: String| {
        let error = format!("{}:{number}: {error}", args.file.display());
        BadRow { id: id.into(), task: task.clone(), error }
    };
    let line: Line = serde_json::from_str(text).map_err(|error| bad(&unnamed, rows::without_line(&error)))?;
    let id = line.id.clone().unwrap_or(unnamed);
    case(args, line).map(|case| Case { id: id.clone(), task: task.clone(), ..case }).map_err(|error| bad(&id, error))
}

/// The case of a line, without its id and task; in words what is wrong with it.
fn case(args: &QaArgs, line: Line) -> Result<Case, String> {
    let document = match (line.document, line.path) {
        (Some(document), None) => document,
        (None, Some(path)) => {
            let path = args.file.parent().unwrap_or(Path::new("")).join(path);
            Document::open(path).map_err(|error| error.to_string())?.text().to_owned()
        }
        _ => return Err("give either document, the text, or path, its file".into()),
    };
    if line.answers.is_empty() {
        return Err("answers is empty: give at least one right answer".into());
    }
    let span = |evidence: &String| match document.find(evidence.as_str()).filter(|_| !evidence.trim().is_empty()) {
        Some(start) => Ok(start..start + evidence.len()),
        None => Err(format!("the evidence {evidence:?} is not in the document")),
    };
    Ok(Case {
        id: String::new(),
        task: String::new(),
        evidence: line.evidence.iter().map(span).collect::<Result<_, _>>()?,
        question: line.question,
        template: None,
        chat: true,
        answers: line.answers,
        all_classes: Vec::new(),
        max_new_tokens: args.max_new_tokens,
        scores: &SCORES,
        details: Map::new(),
        document,
    })
}
