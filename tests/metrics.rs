//! LongBench's metrics against the Python packages they come from: tests/golden/metrics.json, which
//! benches/metrics_golden.py made.

use std::path::Path;

use gleaner::eval::{chinese, metrics};
use serde_json::Value;

fn cases(metric: &str) -> Vec<Vec<Value>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/metrics.json");
    let mut golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let cases: Vec<Vec<Value>> = serde_json::from_value(golden[metric].take()).unwrap();
    assert!(cases.len() > 50, "{metric} has only {} cases", cases.len());
    cases
}

fn compare(metric: &str, score: impl Fn(&[Value]) -> Option<f64>) {
    for case in cases(metric) {
        let (expected, arguments) = case.split_last().unwrap();
        let found = score(arguments);
        let same = match (found, expected.as_f64()) {
            (Some(found), Some(expected)) => (found - expected).abs() <= 1e-9,
            (found, expected) => found == expected,
        };
        assert!(same, "{metric} of {arguments:?} is {found:?}, the original has {expected}");
    }
}

fn compare_pairs(metric: &str, score: fn(&str, &str) -> f64) {
    compare(metric, |case| Some(score(case[0].as_str().unwrap(), case[1].as_str().unwrap())));
}

#[test]
fn english_answers() {
    compare_pairs("exact_match", metrics::exact_match);
    compare_pairs("qa_f1", metrics::qa_f1);
}

#[test]
fn english_summaries() {
    compare_pairs("rouge_l", metrics::rouge_l);
}

#[test]
fn chinese_words() {
    for case in cases("words") {
        let text = case[0].as_str().unwrap();
        let expected: Vec<String> = serde_json::from_value(case[1].clone()).unwrap();
        assert_eq!(chinese::words(text), expected, "words of {text:?}");
    }
}

#[test]
fn chinese_answers_and_summaries() {
    compare_pairs("qa_f1_zh", metrics::qa_f1_zh);
    compare_pairs("rouge_l_zh", metrics::rouge_l_zh);
}

#[test]
fn classes() {
    compare("classification", |case| {
        let classes: Vec<String> = serde_json::from_value(case[2].clone()).unwrap();
        Some(metrics::classification(case[0].as_str()?, case[1].as_str()?, &classes))
    });
}

#[test]
fn numbers() {
    compare_pairs("count", metrics::count);
    compare("retrieval", |case| metrics::retrieval(case[0].as_str()?, case[1].as_str()?));
    compare("retrieval_zh", |case| metrics::retrieval_zh(case[0].as_str()?, case[1].as_str()?));
}

#[test]
fn code() {
    compare_pairs("code_similarity", metrics::code_similarity);
}
