//! `gleaner eval ruler` on the bundled model: what is made is what RULER asks for, and its own files are read.

mod common;

use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Output};

use common::root;
use serde_json::{Value, json};

fn ruler(out: &Path, extra: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gleaner"))
        .args(["eval", "ruler", "--device", "cpu", "--methods", "last-window", "--window", "64", "--out"])
        .arg(out)
        .args(extra)
        .output()
        .unwrap()
}

fn records(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("cases.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn succeeds(output: Output) -> String {
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{err}");
    err
}

fn refused(output: Output) -> String {
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{err}");
    err
}

#[test]
fn each_task_asks_for_what_it_hides() {
    let folder = tempfile::tempdir().unwrap();
    let haystack = root().join("examples/almanac.txt");
    let made = ["--haystack", haystack.to_str().unwrap(), "--lengths", "1200", "--samples", "1"];
    let out = folder.path().join("all");
    succeeds(ruler(&out, &made));
    let records = records(&out);
    let expected = |name: &str| {
        let record = records.iter().find(|record| record["task"] == format!("{name}@1200")).unwrap();
        let answers: Vec<&str> = record["expected"].as_array().unwrap().iter().map(|a| a.as_str().unwrap()).collect();
        (record["question"].as_str().unwrap().to_owned(), answers.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>())
    };
    let (question, answers) = expected("niah_single_1");
    assert!(question.starts_with("What is the special magic number for ") && answers[0].len() == 7, "{question}");
    let (question, answers) = expected("niah_multikey_3");
    assert!(question.starts_with("What is the special magic uuid for ") && answers[0].len() == 36, "{question}");
    let (question, answers) = expected("niah_multivalue");
    assert!(question.starts_with("What are all the special magic numbers for "), "{question}");
    assert_eq!(answers.iter().collect::<HashSet<_>>().len(), 4);
    let (question, answers) = expected("niah_multiquery");
    assert!(question.matches(", ").count() == 3 && question.contains(", and ") && answers.len() == 4, "{question}");
    let (question, answers) = expected("vt");
    assert!(question.starts_with("Question: Find all variables that are assigned the value "), "{question}");
    assert!(answers.len() == 5 && answers.iter().all(|name| name.len() == 5), "{answers:?}");
    assert_eq!(records.len(), 9);

    // A case does not depend on what else is made, but on the seed.
    let question = |out: &Path, seed: &str| {
        succeeds(ruler(
            out,
            &["--tasks", "niah_multikey_2", "--lengths", "900,1200", "--samples", "1", "--seed", seed],
        ));
        let records = self::records(out);
        records.iter().find(|record| record["task"] == "niah_multikey_2@1200").unwrap()["question"].clone()
    };
    assert_eq!(question(&folder.path().join("same"), "0"), expected("niah_multikey_2").0);
    assert_ne!(question(&folder.path().join("other"), "1"), expected("niah_multikey_2").0);
}

const HEAD: &str = "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number afterwards.";
const QUESTION: &str = "What is the special magic number for calm-oak mentioned in the provided text?";

fn needle_row(prefix_apart: bool) -> Value {
    let hay = "The grass is green. The sky is blue.\n".repeat(6);
    let needle = "One of the special magic numbers for calm-oak is: 7654321.";
    let decoy = "One of the special magic numbers for shy-fox is: 1234567.";
    let input = format!("{HEAD}\n{hay}{decoy}\n{needle}\n{hay}{QUESTION}");
    let prefix = " The special magic number for calm-oak mentioned in the provided text is";
    match prefix_apart {
        true => json!({"index": 3, "input": input, "outputs": ["7654321"], "length": 300, "answer_prefix": prefix}),
        false => json!({"index": 3, "input": input + prefix, "outputs": ["7654321"], "length": 300}),
    }
}

#[test]
fn rows_of_ruler_are_taken_apart() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("niah_single_1.jsonl");
    let chain = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n";
    let ask = |value| format!("\nQuestion: Find all variables that are assigned the value {value} in the text above.");
    let answer = |value| {
        format!(
            " Answer: According to the chain(s) of variable assignment in the text above, 2 variables are assigned the value {value}, they are: "
        )
    };
    let example = format!("{chain}VAR AAA = 12345\nVAR BBB = VAR AAA{}{}AAA BBB\n\n", ask(12345), answer(12345));
    let tracking = format!(
        "{example}{chain}The grass is green.\nVAR QWERT = 54321\nThe sky is blue.\nVAR ZXCVB = VAR QWERT\nHere we go.{}{}",
        ask(54321),
        answer(54321)
    );
    let documents =
        "Answer the question based on the given documents. Only give me the answer and do not output any other words.";
    let qa = format!(
        "{documents}\n\nThe following are given documents.\n\nDocument 1:\nThe tower is in Lund.\n\n{documents}\n\nQuestion: Where is the tower? Answer:"
    );
    let rows = [
        needle_row(true),
        needle_row(false),
        json!({"index": 0, "input": tracking, "outputs": ["QWERT", "ZXCVB"], "length": 1}),
        json!({"input": qa, "outputs": ["Lund", "in Lund"]}),
        json!({"index": 4, "input": "[INST] A special magic", "outputs": ["1"]}),
        json!({"index": 5, "outputs": ["1"]}),
        json!({"index": 6, "input": HEAD, "outputs": [""]}),
    ];
    let lines = rows.map(|row| row.to_string()).join("\n");
    std::fs::write(&data, lines + "\n\n{\"index\":\n").unwrap();
    let out = folder.path().join("run");
    let data = data.to_str().unwrap();
    let run = ["eval", "ruler", "--device", "cpu", "--window", "256", "--topk", "40", "--methods", "gleaner", "--data"];
    let output =
        Command::new(env!("CARGO_BIN_EXE_gleaner")).args(run).args([data, "--out"]).arg(&out).output().unwrap();
    let err = succeeds(output);
    assert!(
        err.contains("4 of 8 rows cannot be used, the first: ") && err.contains("line 5: input begins with"),
        "{err}"
    );

    let records = records(&out);
    let of = |name: &str| records.iter().map(|record| record[name].clone()).collect::<Vec<_>>();
    let questions = [QUESTION, QUESTION, &ask(54321)[1..], "Question: Where is the tower?"];
    assert_eq!(of("question")[..4], questions.map(Value::from));
    assert_eq!(of("answer")[0], of("answer")[1], "the beginning of the answer may stand in either place");
    // All is read in one or two chunks, so what is known to be gold is kept.
    assert_eq!(of("evidence_recall")[..4], [json!(1.0), json!(1.0), json!(1.0), Value::Null]);
    let errors: Vec<String> = records.iter().filter_map(|record| Some(record["error"].as_str()?.to_owned())).collect();
    for (error, words) in errors.iter().zip([
        "line 5: input begins with \"[INST] A special magic\"",
        "line 6: missing field `input`",
        "line 7: outputs is empty",
        "line 9: no JSON: EOF while parsing",
    ]) {
        assert!(error.contains(words), "{words} is not in {error}");
    }
    assert_eq!(errors.len(), 4);
}

#[test]
fn mistakes_are_told_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let told = |extra: &[&str], words: &str| {
        let err = refused(ruler(&out, extra));
        assert!(err.contains(words), "{words} is not in: {err}");
        assert!(!out.exists());
    };
    told(&["--tasks", "niah_single_4"], "niah_single_3");
    told(&["--tasks", "niah_single_2"], "niah_single_2 hides needles in a text: name one with --haystack");
    told(
        &["--tasks", "niah_multikey_2", "--lengths", "200,4096"],
        "a length of 200 tokens is too small for niah_multikey_2",
    );
    told(&["--data", "missing.jsonl"], "missing.jsonl");
    told(&["--data", "missing.jsonl", "--seed", "1"], "--seed");
    let empty = folder.path().join("empty.jsonl");
    std::fs::write(&empty, "\n \n").unwrap();
    told(&["--data", empty.to_str().unwrap()], "empty.jsonl is empty");
    std::fs::write(&empty, "not JSON\n{}\n").unwrap();
    told(&["--data", empty.to_str().unwrap()], "none of the 2 rows can be used: ");
}
