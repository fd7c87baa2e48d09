//! Needles in haystacks.

use std::process::Output;

use serde_json::json;

use super::*;

/// Two lengths and three depths of the almanac, read by gleaner alone.
fn nih(out: &Path) -> Output {
    nih_in(
        &root().join("examples/almanac.txt"),
        out,
        &["--methods", "gleaner", "--depths", "3", "--lengths", "1500,900"],
    )
}

fn nih_in(haystack: &Path, out: &Path, extra: &[&str]) -> Output {
    eval("nih", out, &[&"--haystack", &haystack]).args(SMALL).args(extra).output().unwrap()
}

#[test]
fn a_run_finds_its_needles_and_can_be_taken_up_again() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("new/run");
    let (table, err) = succeeds(nih(&out));
    assert_eq!(err, "");
    let records = cases(&out);
    let cells = records.iter().map(|case| (&case["details"]["length"], &case["details"]["depth"]));
    let expected = [(900, 0), (1500, 0), (900, 50), (1500, 50), (900, 100), (1500, 100)];
    assert!(cells.eq(expected.map(|(length, depth)| (json!(length), json!(depth))).iter().map(|(l, d)| (l, d))));
    for case in &records {
        assert_eq!(case["evidence_recall"], 1.0, "{case}");
        let length = case["details"]["length"].as_u64().unwrap() as usize;
        let steps = case["steps"].as_array().unwrap().len();
        assert!((length / 256..=length / 256 + 2).contains(&steps), "{steps} steps of {length} tokens");
        assert!((case["retained_tokens"].as_u64().unwrap() as usize) < length / 2);
        let (needle, expected) = (&case["details"]["needles"][0], case["expected"][0].as_str().unwrap());
        assert!(needle.as_str().unwrap().contains(expected));
        let right = case["answer"].as_str().unwrap().contains(expected);
        assert_eq!(case["scores"]["exact"], f64::from(u8::from(right)), "{case}");
    }
    let right = records.iter().filter(|case| case["scores"]["exact"] == 1.0).count();
    assert!(right >= 4, "{right} of 6 right: {records:#?}");

    assert_eq!(csv(&out, "needle,gleaner,256,60,8,512,0", "evidence_recall"), [1.0, 1.0, 1.0]);
    assert_eq!(csv(&out, "needle,gleaner", "exact")[0], (right as f64 / 6.0 * 1e4).round() / 1e4);
    let svg = std::fs::read_to_string(out.join("heatmap.svg")).unwrap();
    assert_eq!(svg.matches("stroke=").count(), 18, "six cells in each of three maps");
    assert!(table.contains("Evidence: share of the needle kept (mean 1.000)"), "{table}");
    assert!(table.lines().filter(|line| line.starts_with("      50 ")).count() == 3, "{table}");

    // A mark in a finished case, and the end of the last one torn off.
    let path = out.join("cases.jsonl");
    let whole = std::fs::read_to_string(&path).unwrap();
    let marked = whole.replacen("\"details\":{", "\"details\":{\"mark\":\"as it was\",", 1);
    std::fs::write(&path, &marked[..marked.len() - 30]).unwrap();
    let (again, err) = succeeds(nih(&out));
    assert_eq!(err, "the folder has 5 answers already\n");
    let without_seconds =
        |text: &str| -> String { text.lines().filter(|line| !line.starts_with("gleaner ")).collect() };
    assert_eq!(without_seconds(&again), without_seconds(&table));
    let redone = cases(&out);
    assert_eq!(redone.len(), 6);
    assert_eq!(redone[0]["details"]["mark"], "as it was");
    for key in ["question", "expected", "answer", "scores", "evidence_recall", "retained_tokens", "steps"] {
        assert_eq!(redone[5][key], records[5][key]);
    }
}

/// The windows are so wide that each document is seen whole.
#[test]
fn many_needles_are_asked_for_at_once_and_their_absence_is_asked_for_too() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let args = ["--window", "2048", "--methods", "last-window", "--lengths", "900"];
    let many = ["--needles", "2", "--distractors", "3", "--no-needle"];
    let haystack = root().join("examples/almanac.txt");
    let args: Vec<&dyn AsRef<OsStr>> = args.iter().chain(&many).map(|arg| arg as &dyn AsRef<OsStr>).collect();
    let (table, _) =
        succeeds(eval("nih", &out, &args).args(["--depths", "2", "--haystack"]).arg(&haystack).output().unwrap());
    let records = cases(&out);
    assert_eq!(records.len(), 3);
    for case in &records[..2] {
        assert_eq!((&case["task"], &case["evidence_recall"]), (&"needle".into(), &1.0.into()), "{case}");
        assert_eq!(case["question"].as_str().unwrap().matches('?').count(), 2);
        let list = |key: &str| case["details"][key].as_array().unwrap().clone();
        let (needles, distractors, expected) = (list("needles"), list("distractors"), &case["expected"]);
        assert_eq!((needles.len(), distractors.len()), (2, 6));
        for (index, distractor) in distractors.iter().map(|text| text.as_str().unwrap()).enumerate() {
            let needle = needles[index / 3].as_str().unwrap();
            assert!(needle.split(' ').take(2).eq(distractor.split(' ').take(2)), "{needle} {distractor}");
            assert!(!expected.as_array().unwrap().iter().any(|answer| distractor.contains(answer.as_str().unwrap())));
        }
        let tokens = case["retained_tokens"].as_u64().unwrap();
        assert!((820..=910).contains(&tokens), "{tokens}: needles and distractors count in the length");
    }
    let none = &records[2];
    assert_eq!((&none["task"], &none["expected"]), (&"no needle".into(), &json!([])));
    assert!(none["evidence_recall"].is_null() && none["scores"]["declined"].is_number(), "{none}");
    assert!(table.contains("No needle: no false answer") && !table.contains("all tasks"), "{table}");
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
    let own = [&own[..], &["--lengths", "900", "--depths", "3", "--methods", "gleaner"]].concat();
    let (_, err) = succeeds(nih_in(&haystack, &out, &own));
    assert!(err.contains("warning: the haystack has") && err.contains("repeated"), "{err}");
    for case in cases(&out) {
        assert_eq!((&case["details"]["needles"][0], &case["evidence_recall"]), (&needle.into(), &1.0.into()), "{case}");
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
    told(&almanac, &["--depths", "1"], &["--depths is 1", "from 2 to 101"]);
    told(&almanac, &["--needles", "0"], &["--needles is 0"]);
    let own = ["--needle", "A fact.", "--question", "q", "--answer", "a"];
    told(&almanac, &[&own[..], &["--needles", "2"]].concat(), &["cannot be used with"]);
    told(&almanac, &[&own[..], &["--distractors", "2"]].concat(), &["cannot be used with"]);
    told(&almanac, &["--needle", "A fact."], &["--question", "--answer"]);
    told(&almanac, &["--needle", " ", "--question", "q", "--answer", "a"], &["--needle is empty"]);
    told(&almanac, &["--needle", "A.", "--question", "q", "--answer", "?"], &["--answer", "has no word"]);
}
