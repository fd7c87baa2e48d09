//! `gleaner eval` on the bundled model and document.

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::root;
use serde_json::Value;

/// Small chunks and two lengths, so that a run takes seconds.
fn nih(out: &Path, extra: &[&str]) -> Output {
    nih_in(&root().join("examples/almanac.txt"), out, extra)
}

fn nih_in(haystack: &Path, out: &Path, extra: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gleaner"))
        .args(["eval", "nih", "--device", "cpu", "--window", "256", "--topk", "60", "--max-new-tokens", "24"])
        .args(["--depths", "3", "--haystack"])
        .arg(haystack)
        .arg("--out")
        .arg(out)
        .args(extra)
        .output()
        .unwrap()
}

fn succeeds(output: Output) -> (String, String) {
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{err}");
    (out, err)
}

/// The message of a mistake of the user.
fn refused(output: Output) -> String {
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert_eq!(output.stdout, b"");
    err
}

fn cases(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("cases.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

const LENGTHS: [&str; 2] = ["--lengths", "1500,900"];

#[test]
fn a_run_finds_its_needles_and_can_be_taken_up_again() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("new/run");
    let (table, err) = succeeds(nih(&out, &LENGTHS));
    assert_eq!(err, "");
    let records = cases(&out);
    let cells: Vec<_> = records.iter().map(|case| (case["length"].clone(), case["depth"].clone())).collect();
    let expected = [(900, 0), (900, 50), (900, 100), (1500, 0), (1500, 50), (1500, 100)];
    assert_eq!(cells, expected.map(|(length, depth)| (Value::from(length), Value::from(depth))));
    for case in &records {
        assert_eq!(case["evidence_recall"], 1.0, "{case}");
        let (length, tokens) = (case["length"].as_f64().unwrap(), case["document_tokens"].as_f64().unwrap());
        assert!((0.9..1.02).contains(&(tokens / length)), "{tokens} of {length}");
        assert!(case["retained_tokens"].as_f64().unwrap() < tokens);
        assert!(case["steps"].as_u64().unwrap() >= 4);
        let (needle, expected) = (case["needle"].as_str().unwrap(), case["expected"].as_str().unwrap());
        assert!(needle.contains(expected));
        assert_eq!(case["exact"], case["answer"].as_str().unwrap().contains(expected), "{case}");
    }
    let right = records.iter().filter(|case| case["exact"] == true).count();
    assert!(right >= 4, "{right} of 6 right: {records:#?}");

    let csv = std::fs::read_to_string(out.join("table.csv")).unwrap();
    assert_eq!(csv.lines().count(), 7);
    assert!(csv.lines().skip(1).all(|line| line.ends_with(",1.0000")), "{csv}");
    let svg = std::fs::read_to_string(out.join("heatmap.svg")).unwrap();
    assert_eq!(svg.matches("stroke=").count(), 18, "six cells in each of three maps");
    assert!(table.contains("Evidence: share of the needle kept (mean 1.000)"), "{table}");
    assert!(table.lines().filter(|line| line.contains("50%")).count() == 3, "{table}");
    let run: Value = serde_json::from_str(&std::fs::read_to_string(out.join("run.json")).unwrap()).unwrap();
    assert_eq!((&run["seed"], &run["max_retained"], &run["lengths"][0]), (&0.into(), &512.into(), &900.into()));

    // A mark in a finished case, and the end of the last one torn off.
    let path = out.join("cases.jsonl");
    let whole = std::fs::read_to_string(&path).unwrap();
    let marked = whole.replacen("{\"length\":", "{\"mark\":\"as it was\",\"length\":", 1);
    std::fs::write(&path, &marked[..marked.len() - 30]).unwrap();
    let (again, err) = succeeds(nih(&out, &LENGTHS));
    assert_eq!(again, table);
    assert_eq!(err, "5 cases are finished already, 1 are left\n");
    let redone = cases(&out);
    assert_eq!(redone.len(), 6);
    assert_eq!(redone[0]["mark"], "as it was");
    for key in ["needle", "question", "answer", "evidence_recall", "document_tokens", "retained_tokens"] {
        assert_eq!(redone[5][key], records[5][key]);
    }

    let before = std::fs::read(&path).unwrap();
    let err = refused(nih(&out, &["--lengths", "1500,900", "--seed", "1", "--phrase", "4"]));
    assert!(err.contains("seed: 0 there, 1 now") && err.contains("phrase: 8 there, 4 now"), "{err}");
    assert!(!err.contains("window"), "{err}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn a_needle_of_ones_own_is_asked_for_and_a_short_haystack_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let haystack = folder.path().join("texts");
    std::fs::create_dir(&haystack).unwrap();
    let almanac = std::fs::read_to_string(root().join("examples/almanac.txt")).unwrap();
    std::fs::write(haystack.join("b.txt"), &almanac[1500..3000]).unwrap();
    std::fs::write(haystack.join("a.txt"), &almanac[..1500]).unwrap();
    std::fs::write(haystack.join("c.md"), "\u{fe}").unwrap();
    let out = folder.path().join("run");
    let needle = "The price of a glass elephant is 41 shillings.";
    let own = ["--needle", needle, "--question", "What is the price of a glass elephant?", "--answer", "41 shillings"];
    let (_, err) = succeeds(nih_in(&haystack, &out, &[&own[..], &["--lengths", "900"]].concat()));
    assert!(err.contains("warning: the haystack has") && err.contains("repeated"), "{err}");
    for case in cases(&out) {
        assert_eq!((&case["needle"], &case["evidence_recall"]), (&needle.into(), &1.0.into()), "{case}");
    }
}

#[test]
fn mistakes_are_told_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let told = |haystack: &Path, extra: &[&str], words: &[&str]| {
        let err = refused(nih_in(haystack, &out, extra));
        assert!(words.iter().all(|word| err.contains(word)), "{words:?} are not in: {err}");
        assert!(!out.exists());
    };
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let almanac = root().join("examples/almanac.txt");
    told(&file("empty.txt", b" \n"), &[], &["empty.txt is empty"]);
    told(&file("latin.txt", b"caf\xe9"), &[], &["latin.txt is not valid UTF-8", "offset 3"]);
    told(folder.path(), &[], &["empty.txt is empty"]);
    let bare = folder.path().join("bare");
    std::fs::create_dir(&bare).unwrap();
    told(&bare, &[], &["bare has no .txt file"]);
    told(&folder.path().join("missing.txt"), &[], &["missing.txt"]);
    told(&almanac, &["--lengths", "10"], &["a length of 10 tokens is too small: the needle takes"]);
    let long = "Is it so? ".repeat(100);
    told(&almanac, &["--needle", "A.", "--question", &long, "--answer", "a"], &["more than the window of 256"]);
    told(&almanac, &["--needle", "A fact."], &["--question", "--answer"]);
    told(&almanac, &["--needle", " ", "--question", "q", "--answer", "a"], &["--needle is empty"]);
    told(&almanac, &["--needle", "A.", "--question", "q", "--answer", "?"], &["--answer", "has no word"]);
}

#[test]
fn folders_that_cannot_be_used_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(refused(nih(&file.join("run"), &[])).contains("cannot create the folder"));
    std::fs::write(folder.path().join("cases.jsonl"), "{}\n").unwrap();
    assert!(refused(nih(folder.path(), &[])).contains("holds cases.jsonl but no run.json"));
    std::fs::write(folder.path().join("run.json"), "[]").unwrap();
    assert!(refused(nih(folder.path(), &[])).contains("is not the record of a run"));
}

/// A limit on the size of files stands for a full disk.
#[cfg(unix)]
#[test]
fn a_full_disk_keeps_what_is_finished() {
    let folder = tempfile::tempdir().unwrap();
    let lengths = ["--lengths", "400,500"];
    let limited = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 3; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_gleaner")])
        .args(["eval", "nih", "--device", "cpu", "--window", "256", "--topk", "60", "--max-new-tokens", "24"])
        .args(["--depths", "3", "--haystack"])
        .arg(root().join("examples/almanac.txt"))
        .arg("--out")
        .arg(folder.path())
        .args(lengths)
        .output()
        .unwrap();
    let err = String::from_utf8(limited.stderr).unwrap();
    assert_eq!(limited.status.code(), Some(1), "{err}");
    assert!(err.contains("cannot write") && err.contains("cases.jsonl"), "{err}");
    let kept = std::fs::read_to_string(folder.path().join("cases.jsonl")).unwrap();
    let whole = &kept[..kept.rfind('\n').unwrap() + 1];
    assert!((1..6).contains(&whole.lines().count()), "{kept}");
    let (_, err) = succeeds(nih(folder.path(), &lengths));
    assert!(err.starts_with(&format!("{} cases are finished already", whole.lines().count())), "{err}");
    assert!(std::fs::read_to_string(folder.path().join("cases.jsonl")).unwrap().starts_with(whole));
    assert_eq!(cases(folder.path()).len(), 6);
}
