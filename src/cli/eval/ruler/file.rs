//! RULER's own files: each row holds a whole prompt, which is taken apart by the sentences around its text.

use std::ops::Range;
use std::sync::LazyLock;

use gleaner::text::{PromptTemplate, python_strip};
use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::case::{Case, Score};
use super::super::rows;
use super::score;

/// Prompts that are alike.
struct Family {
    max_new_tokens: usize,
    scores: &'static [Score],
    /// With the groups head, context, between, question and opening. Of a sentence that comes again in the text of the
    /// prompt, the first is taken before the context, but for worked examples, and the last behind it.
    pattern: Regex,
    /// The sentences of a context that hold an answer.
    evidence: fn(context: &str, answer: &str) -> Vec<Range<usize>>,
}

const MEAN: &[Score] = &[Score { name: "references", of: score::mean }];
const ANY: &[Score] = &[Score { name: "references", of: score::any }];

static FAMILIES: LazyLock<[Family; 5]> = LazyLock::new(|| {
    let family = |max_new_tokens, scores, head: &str, between: &str, question: &str, opening: &str, evidence| {
        let pattern = format!(
            r"(?s)^(?P<head>{head})(?P<context>.+)(?P<between>{between})(?P<question>{question})(?P<opening>{opening})?\s*$"
        );
        Family { max_new_tokens, scores, pattern: Regex::new(&pattern).expect("a valid pattern"), evidence }
    };
    let unknown = |_: &str, _: &str| Vec::new();
    [
        family(
            128,
            MEAN,
            r"(?:A|Some) special magic \w+ (?:is|are) hidden within the following text\. Make sure to memorize it\. I will quiz you about the \w+ afterwards\.\s",
            r"\s+",
            r"What (?:is|are all) the special magic \w+ for [^?]+ mentioned in the provided text\?",
            r" The special magic \w+ for .+",
            needles,
        ),
        family(
            30,
            MEAN,
            r"(?:Memorize and track the chain.*)?Memorize and track the chain\(s\) of variable assignment hidden in the following text\.\s+",
            r"\s+",
            r"Question: Find all variables that are assigned the value \d+ in the text above\.",
            r" Answer: According to the chain.+",
            assignments,
        ),
        family(
            120,
            MEAN,
            r"(?:Below is a numbered list of words\..*)?Below is a numbered list of words\. In these words, some appear more often than others\. Memorize the ones that appear most often\.\s",
            r"\s+",
            r"Question: What are the \d+ most common words in the above list\?",
            r" Answer: The top \d+ words.+",
            unknown,
        ),
        family(
            50,
            MEAN,
            r"Read the following coded text and track the frequency of each coded word\. Find the three most frequently appeared coded words\.\s",
            r"\s+",
            r"Question: Do not provide any explanation\. Please ignore the dots '\.+'\. What are the three most frequently appeared words in the above coded text\?",
            r" Answer: According to the coded text.+",
            unknown,
        ),
        family(
            32,
            ANY,
            r"Answer the question based on the given documents\. Only give me the answer and do not output any other words\.\s+The following are given documents\.\s+",
            r"\s+Answer the question based on the given documents\. Only give me the answer and do not output any other words\.\s+",
            r"Question: .+?",
            r" Answer:",
            unknown,
        ),
    ]
});

#[derive(Deserialize)]
struct Line {
    index: Option<u64>,
    input: String,
    outputs: Vec<String>,
    /// In files of newer versions; else at the end of `input`.
    answer_prefix: Option<String>,
}

/// A case of a row. The task is named after the file, for a row does not name it.
pub fn case(stem: &str, id: String, row: Value) -> Result<Case, String> {
    let line: Line = rows::fields(row)?;
    if line.outputs.iter().all(|output| python_strip(output).is_empty()) {
        return Err("outputs is empty: there is nothing to look for in an answer".into());
    }
    let (family, parts) =
        FAMILIES.iter().find_map(|family| Some((family, family.pattern.captures(&line.input)?))).ok_or_else(|| {
            let begins: String = line.input.chars().take(40).collect();
            format!(
                "input begins with {begins:?} and has not the sentences of a prompt of RULER around its text, or not in their order; write the file with --model_template_type base"
            )
        })?;
    let part = |name: &str| parts.name(name).map_or("", |part| part.as_str());
    let context = python_strip(part("context"));
    if context.is_empty() {
        return Err("input has no text between its first sentences and its question".into());
    }
    let template = [part("head"), "{context}", part("between"), "{question}"].concat();
    let template = PromptTemplate::new("input", &template).map_err(|error| error.to_string())?;
    Ok(Case {
        id,
        task: stem.into(),
        document: context.into(),
        question: part("question").into(),
        template: Some(template.with_opening(line.answer_prefix.as_deref().unwrap_or(part("opening")))),
        chat: true,
        evidence: line.outputs.iter().flat_map(|output| (family.evidence)(context, output)).collect(),
        answers: line.outputs,
        all_classes: Vec::new(),
        max_new_tokens: family.max_new_tokens,
        scores: family.scores,
        details: Map::from_iter([("index".to_owned(), json!(line.index))]),
    })
}

/// Needles with the value `answer`.
fn needles(context: &str, answer: &str) -> Vec<Range<usize>> {
    let end = format!(" is: {answer}.");
    let starts = context.match_indices(&end).filter_map(|(at, _)| {
        let start = context[..at].rfind("One of the special magic ")?;
        Some(start..at + end.len())
    });
    starts.collect()
}

/// Assignments to the variable `answer`.
fn assignments(context: &str, answer: &str) -> Vec<Range<usize>> {
    let start_of = format!("VAR {answer} = ");
    let assignment = |(start, _): (usize, &str)| {
        let end = context[start..].find(['\n', '.']).map_or(context.len(), |length| start + length);
        start..start + context[start..end].trim_end().len()
    };
    context.match_indices(&start_of).map(assignment).collect()
}
