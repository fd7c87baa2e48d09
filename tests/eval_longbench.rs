//! `gleaner eval longbench` on the bundled model and rows made here.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

fn longbench(files: &[&Path], out: &Path, extra: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gleaner"))
        .args(["eval", "longbench", "--device", "cpu", "--methods", "last-window", "--window", "128", "--out"])
        .arg(out)
        .args(files)
        .args(extra)
        .output()
        .unwrap()
}

fn text_of(output: Output) -> (String, String) {
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{err}");
    (out, err)
}

fn records(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("cases.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn row(dataset: &str, input: &str, answers: &[&str]) -> Value {
    let context = "The baker of Orrin is Tom Hale. The mill stands by the river.\n";
    json!({"_id": format!("{dataset}-1"), "input": input, "context": context, "answers": answers, "length": 12,
        "dataset": dataset, "language": "en", "all_classes": null})
}

#[test]
fn rows_are_asked_with_their_own_questions_limits_and_metrics() {
    let folder = tempfile::tempdir().unwrap();
    let mut trec = row("trec", "Question: Who is it?\nType:", &["Person"]);
    trec["all_classes"] = json!(["Person", "Place"]);
    let mut unnamed = row("narrativeqa", "Who is the baker?", &["Tom Hale", "Tom"]);
    unnamed.as_object_mut().unwrap().retain(|key, _| key != "dataset" && key != "_id");
    let mut retrieval = row("passage_retrieval_zh", "面包师", &["Absatz 3"]);
    let bad_retrieval = retrieval.clone();
    retrieval["answers"] = json!(["段落3"]);
    let rows = [
        unnamed,
        row("gov_report", "", &["A report."]),
        row("lcc", "", &["x = 1"]),
        trec,
        retrieval,
        row("squad", "Who?", &["Tom"]),
        row("qasper", " ", &["Tom"]),
        bad_retrieval,
        row("trec", "Question: Who?", &["Person"]),
        row("lcc", "", &["x = 2"]),
        json!({"input": "Who?", "answers": ["Tom"], "dataset": "hotpotqa"}),
    ];
    let lines = rows.map(|row| row.to_string()).join("\n") + "\n{\"input\": \"torn";
    let file = write(folder.path(), "narrativeqa.jsonl", &lines);
    let out = folder.path().join("run");
    let (table, err) = text_of(longbench(&[&file], &out, &[]));
    assert!(err.contains("7 of 12 rows cannot be used, the first: "), "{err}");
    assert!(!table.contains("LongBench v2"), "{table}");

    let records = records(&out);
    let (good, bad): (Vec<&Value>, Vec<&Value>) = records.iter().partition(|record| record["error"].is_null());
    let scored = good.iter().map(|record| (record["task"].as_str().unwrap(), record["scores"].as_object().unwrap()));
    let scored: Vec<(&str, &str)> =
        scored.map(|(task, scores)| (task, scores.keys().next().unwrap().as_str())).collect();
    assert_eq!(
        scored,
        [
            ("narrativeqa", "f1"),
            ("gov_report", "rouge_l"),
            ("lcc", "code_similarity"),
            ("trec", "classification"),
            ("passage_retrieval_zh", "retrieval")
        ]
    );
    assert_eq!(good[0]["question"], "Who is the baker?");
    assert_eq!(good[1]["question"], "Now, write a one-page summary of the report.\n\nSummary:");
    let errors: Vec<&str> = bad.iter().map(|record| record["error"].as_str().unwrap()).collect();
    let expected = [
        "line 6: \"squad\" is no task of LongBench; there are 2wikimqa",
        "line 7: input is empty, but the prompt of qasper",
        "line 8: the answer \"Absatz 3\" names no paragraph",
        "line 9: all_classes lists no class",
        "line 10: a row before it has the id \"lcc-1\" too",
        "line 11: missing field `context`",
        "line 12: no JSON: EOF while parsing a string at column 15",
    ];
    assert_eq!(errors.len(), expected.len());
    for (error, words) in errors.iter().zip(expected) {
        assert!(error.contains(words), "{words} is not in: {error}");
    }

    // The first rows alone, which are finished already.
    let before = std::fs::read(out.join("cases.jsonl")).unwrap();
    text_of(longbench(&[&file], &out, &["--limit", "2"]));
    assert_eq!(std::fs::read(out.join("cases.jsonl")).unwrap(), before);
}

#[test]
fn version_2_is_an_array_and_has_a_table_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let row = |id: &str, difficulty: &str, length: &str, answer: &str| {
        json!({"_id": id, "domain": "Novels", "sub_domain": "Plot", "difficulty": difficulty, "length": length,
            "question": "Who bakes?", "choice_A": "Tom", "choice_B": "Ann", "choice_C": "Eve", "choice_D": "Bob",
            "answer": answer, "context": "Tom bakes the bread. Ann mills the flour."})
    };
    let rows = json!([row("a", "easy", "short", "A"), row("b", "hard", "long", "B"), row("c", "hard", "long", "E")]);
    let file = write(folder.path(), "data.json", &serde_json::to_string_pretty(&rows).unwrap());
    let out = folder.path().join("run");
    let (table, err) = text_of(longbench(&[&file], &out, &[]));
    assert!(err.contains("row 3: answer is \"E\", and should be one of A, B, C, D"), "{err}");
    let records = records(&out);
    assert_eq!(
        records[0]["question"],
        "What is the correct answer to this question: Who bakes?\nChoices:\n(A) Tom\n(B) Ann\n(C) Eve\n(D) Bob"
    );
    assert_eq!(records[0]["details"]["sub_domain"], "Plot");
    let accuracy = |at: usize| 100.0 * records[at]["scores"]["accuracy"].as_f64().unwrap();
    let line = table.split("right answers in percent").nth(1).unwrap().lines().nth(2).unwrap();
    let cells: Vec<&str> = line.split_whitespace().collect();
    let [overall, easy, hard] =
        [(accuracy(0) + accuracy(1)) / 2.0, accuracy(0), accuracy(1)].map(|x| format!("{x:.1}"));
    assert_eq!(cells, ["last-window", &overall, &easy, &hard, &easy, "-", &hard], "{table}");
}

#[test]
fn files_without_a_row_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    for (text, words) in [("", "is empty"), ("[]", "is empty"), ("[{]", "is no array"), ("{}", "missing field `input`")]
    {
        let file = write(folder.path(), "rows.jsonl", text);
        let output = longbench(&[&file], &out, &[]);
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && err.contains(words) && err.contains("rows.jsonl"), "{words}: {err}");
        assert!(!out.exists());
    }
}
