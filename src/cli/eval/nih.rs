//! `gleaner eval nih`: a fact hidden at many depths of texts of many lengths.

use std::path::PathBuf;

use gleaner::Error;
use gleaner::reader::Sampling;
use gleaner::text::python_strip;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::super::Failure;
use super::super::noise::Noise;
use super::case::{Case, Score};
use super::folder::hex;
use super::haystack::{self, Haystack, Placement};
use super::needle::{self, Needle};
use super::run::{self, RunArgs};

#[derive(clap::Args)]
pub struct NihArgs {
    /// The text to hide needles in, UTF-8: a file, or a folder of .txt files
    #[arg(long, value_name = "FILE|DIR")]
    haystack: PathBuf,
    #[command(flatten)]
    run: RunArgs,
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

/// Word share and phrase are judged by the one answer that a needle has.
const SCORES: [Score; 2] = [
    Score { name: "word_share", of: |case, answer| needle::word_share(&case.answers[0], answer) },
    Score { name: "exact", of: |case, answer| f64::from(u8::from(needle::contains_phrase(&case.answers[0], answer))) },
];

/// A cell of the grid.
struct Cell {
    length: usize,
    depth: usize,
    needle: Needle,
    placement: Placement,
}

pub fn run(args: NihArgs) -> Result<(), Failure> {
    let (lengths, depths, given) = (args.lengths(), args.depths()?, args.needle()?);
    let text = haystack::read(&args.haystack)?;
    let engine = args.run.open()?;
    let count = |text: &str| Ok(engine.tokenizer().encode(text)?.len());
    let haystack = Haystack::new(text, count)?;

    let mut cells = Vec::new();
    // The lengths side by side, so that the time left can be told from the first cells.
    for &depth in &depths {
        for &length in &lengths {
            // A draw of its own, so that a cell is the same in every grid.
            let mut noise = Noise(args.seed);
            for part in [length, depth] {
                noise = Noise((noise.below(usize::MAX) as u64).wrapping_add(part as u64));
            }
            let needle = given.clone().unwrap_or_else(|| Needle::draw(&mut noise, haystack.text()));
            let tokens = count(&format!(" {}", needle.text))?;
            let placement = haystack.place(length.saturating_sub(tokens), &[depth], &mut noise).map_err(|sentence| {
                Failure::Mistake(format!(
                    "a length of {length} tokens is too small: the needle takes {tokens} and the sentence of the haystack beside it {sentence}; raise --lengths"
                ))
            })?;
            cells.push(Cell { length, depth, needle, placement });
        }
    }
    if let Some(longest) = lengths.last().filter(|&&length| length > haystack.tokens()) {
        eprintln!(
            "warning: the haystack has {} tokens, so that it is repeated in documents of up to {longest}",
            haystack.tokens()
        );
    }
    let hash = hex(&Sha256::digest(haystack.text()));
    let parameters = [("eval", json!("nih")), ("haystack_sha256", json!(hash)), ("seed", json!(args.seed))];
    let parameters = parameters.into_iter().map(|(name, value)| (name.into(), value)).collect();
    let rows = cells.into_iter().map(|cell| Ok(case(&haystack, cell, args.max_new_tokens)));
    run::run(&args.run, &engine, rows, parameters)?;
    Ok(())
}

fn case(haystack: &Haystack, cell: Cell, max_new_tokens: usize) -> Case {
    let Cell { length, depth, needle, placement } = cell;
    let (document, evidence) = haystack.hide(&placement, &[&needle.text]);
    let details = [("length", json!(length)), ("depth", json!(depth)), ("needle", json!(needle.text))];
    Case {
        id: format!("{length}-{depth}"),
        task: "nih".into(),
        document,
        question: needle.question,
        template: None,
        chat: true,
        answers: vec![needle.answer],
        all_classes: Vec::new(),
        evidence,
        max_new_tokens,
        scores: &SCORES,
        details: details.into_iter().map(|(name, value)| (name.into(), value)).collect(),
    }
}
