//! One document with a question, of any benchmark.

use std::ops::Range;

use gleaner::text::PromptTemplate;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::folder::hex;

/// A document, a question and what a right answer is.
pub struct Case {
    /// Unique in a run: what a run that was cut short goes on by.
    pub id: String,
    /// The row of the table that it counts in.
    pub task: String,
    pub document: String,
    pub question: String,
    /// The benchmark's prompt; `None` is the default one.
    pub template: Option<PromptTemplate>,
    /// Whether the model's chat template goes around the prompt.
    pub chat: bool,
    /// Right answers; what several of them mean is up to the scores. None where the right thing is not to answer: such a
    /// task does not count in the mean of all.
    pub answers: Vec<String>,
    /// Labels to choose from, in tasks of classification.
    pub all_classes: Vec<String>,
    /// Bytes of `document` that hold the answer; empty where nobody knows.
    pub evidence: Vec<Range<usize>>,
    pub max_new_tokens: usize,
    /// The first is the main one. Cases of one task have the same.
    pub scores: &'static [Score],
    /// What else is told of the case in cases.jsonl.
    pub details: Map<String, Value>,
}

/// A judgement of an answer, 0 to 1.
#[derive(Debug)]
pub struct Score {
    pub name: &'static str,
    pub of: fn(&Case, &str) -> f64,
}

/// A case that cannot be asked, and why.
pub struct BadRow {
    pub id: String,
    pub task: String,
    pub error: String,
}

/// What a benchmark gives for each of its rows.
pub type Row = Result<Case, BadRow>;

impl Case {
    /// Tells a case from another of the same id: 16 hexadecimal digits over everything that shapes its answer or
    /// its scores.
    pub fn hash(&self) -> String {
        let mut hash = Sha256::new();
        let mut add = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        };
        for text in [&self.document, &self.question] {
            add(text);
        }
        for list in [&self.answers, &self.all_classes] {
            add(&list.len().to_string());
            list.iter().for_each(|text| add(text));
        }
        add(&self.template.as_ref().map_or_else(String::new, |template| format!("{template:?}")));
        add(&format!("{} {} {:?}", self.chat, self.max_new_tokens, self.evidence));
        hex(&hash.finalize()[..8])
    }
}
