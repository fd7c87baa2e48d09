//! Version 2: questions with four choices over texts of up to two million words (arXiv 2412.15204).

use std::fmt::Write as _;
use std::sync::LazyLock;

use gleaner::text::{PromptTemplate, python_strip};
use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::case::{Case, Score};
use super::super::rows;
use super::super::run::{Outcome, Results};

/// What the cases are called in the table.
const TASK: &str = "longbench-v2";

/// The benchmark's prompt without examples; the question with its choices is one field.
const PROMPT: &str = "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n{question}\n\nFormat your response as follows: \"The correct answer is (insert answer here)\".";

const SCORES: [Score; 2] = [
    Score { name: "accuracy", of: |case, answer| share(letter(answer) == case.answers.first().map(String::as_str)) },
    Score { name: "answered", of: |_, answer| share(letter(answer).is_some()) },
];

static LETTERS: LazyLock<[Regex; 2]> = LazyLock::new(|| {
    [r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"]
        .map(|pattern| Regex::new(pattern).expect("a valid pattern"))
});

/// The choice that an answer names, in the two forms that the benchmark takes; asterisks do not count.
fn letter(answer: &str) -> Option<&'static str> {
    let plain = answer.replace('*', "");
    let found = LETTERS.iter().find_map(|pattern| pattern.captures(&plain))?;
    ["A", "B", "C", "D"].into_iter().find(|letter| *letter == &found[1])
}

fn share(of: bool) -> f64 {
    f64::from(u8::from(of))
}

#[derive(Deserialize)]
#[allow(non_snake_case, reason = "as the benchmark spells its fields")]
struct Line {
    _id: Option<String>,
    domain: String,
    sub_domain: String,
    difficulty: String,
    length: String,
    question: String,
    choice_A: String,
    choice_B: String,
    choice_C: String,
    choice_D: String,
    answer: String,
    context: String,
}

pub fn case(id: String, row: Value) -> Result<Case, String> {
    let line: Line = rows::fields(row)?;
    let one_of = |name: &str, value: &str, known: &[&str]| match known.contains(&value) {
        true => Ok(()),
        false => Err(format!("{name} is {value:?}, and should be one of {}", known.join(", "))),
    };
    one_of("answer", &line.answer, &["A", "B", "C", "D"])?;
    one_of("difficulty", &line.difficulty, &["easy", "hard"])?;
    one_of("length", &line.length, &["short", "medium", "long"])?;
    let context = python_strip(&line.context);
    if context.is_empty() {
        return Err("context is empty".into());
    }
    let [question, a, b, c, d] =
        [&line.question, &line.choice_A, &line.choice_B, &line.choice_C, &line.choice_D].map(|text| python_strip(text));
    let details = [
        ("domain", &line.domain),
        ("sub_domain", &line.sub_domain),
        ("difficulty", &line.difficulty),
        ("length", &line.length),
    ];
    Ok(Case {
        id: line._id.unwrap_or(id),
        task: TASK.into(),
        document: context.into(),
        question: format!(
            "What is the correct answer to this question: {question}\nChoices:\n(A) {a}\n(B) {b}\n(C) {c}\n(D) {d}"
        ),
        template: Some(PromptTemplate::new("the prompt of LongBench v2", PROMPT).map_err(|error| error.to_string())?),
        chat: true,
        answers: vec![line.answer],
        all_classes: Vec::new(),
        evidence: Vec::new(),
        max_new_tokens: 128,
        scores: &SCORES,
        details: Map::from_iter(details.map(|(name, value)| (name.to_owned(), json!(value)))),
    })
}

/// The accuracies that the benchmark reports, in percent, a line for each variant; empty without cases of version 2.
pub fn table(results: &Results) -> String {
    const GROUPS: [(&str, &str); 6] = [
        ("", "overall"),
        ("difficulty", "easy"),
        ("difficulty", "hard"),
        ("length", "short"),
        ("length", "medium"),
        ("length", "long"),
    ];
    let mut out = String::new();
    for variant in &results.variants {
        let cases: Vec<(&Map<String, Value>, f64)> = results
            .records
            .iter()
            .filter(|record| record.task == TASK && record.variant == *variant)
            .filter_map(|record| match &record.outcome {
                Outcome::Done { scores, .. } => Some((&record.details, scores["accuracy"].as_f64()?)),
                Outcome::Bad { .. } => None,
            })
            .collect();
        if cases.is_empty() {
            continue;
        }
        if out.is_empty() {
            let _ = write!(out, "\nLongBench v2, right answers in percent\n{:>24}", "");
            GROUPS.iter().for_each(|(_, name)| {
                let _ = write!(out, "{name:>9}");
            });
            out.push('\n');
        }
        let _ = write!(out, "{:>24}", variant.label(&results.variants));
        for (field, name) in GROUPS {
            let of_group = |details: &Map<String, Value>| field.is_empty() || details[field] == name;
            let scores: Vec<f64> =
                cases.iter().filter(|(details, _)| of_group(details)).map(|(_, score)| *score).collect();
            let _ = match scores.len() {
                0 => write!(out, "{:>9}", "-"),
                count => write!(out, "{:>9.1}", 100.0 * scores.iter().sum::<f64>() / count as f64),
            };
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_is_taken_from_the_sentence_that_was_asked_for() {
        assert_eq!(letter("The correct answer is (B)."), Some("B"));
        assert_eq!(letter("So: **The correct answer is C**"), Some("C"));
        // The form with parentheses is looked for first, wherever it stands.
        assert_eq!(letter("The correct answer is A, no: The correct answer is (D)"), Some("D"));
        assert_eq!(letter("The answer is (B)"), None);
        assert_eq!(letter("The correct answer is (E)"), None);
        assert_eq!(letter("the correct answer is (A)"), None);
    }
}
