//! Questions of one's own, and what all benchmarks share.

use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};

use super::*;

/// Writes lines beside a copy of the almanac.
fn questions(folder: &Path, lines: &[String]) -> std::path::PathBuf {
    std::fs::copy(root().join("examples/almanac.txt"), folder.join("almanac.txt")).unwrap();
    let path = folder.join("mine.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

fn qa(file: &Path, out: &Path, extra: &[&str]) -> Output {
    eval("qa", out, &[&file]).args(SMALL).args(extra).output().unwrap()
}

const SHORT: &str = "The moon is far. The name of the mayor of Tarn is Ada Bell. It rains. The color of Tarn is green.";

fn row(question: &str, answer: &str, evidence: &str) -> Value {
    json!({ "document": SHORT, "question": question, "answers": [answer], "evidence": [evidence] })
}

#[test]
fn bad_rows_are_told_by_line_and_the_others_asked() {
    let folder = tempfile::tempdir().unwrap();
    let mayor = row("What is the name of the mayor of Tarn?", "Ada Bell", "The name of the mayor of Tarn is Ada Bell.");
    let mut with_id = row("What is the color of Tarn?", "green", "The color of Tarn is green.");
    with_id["id"] = "color".into();
    let changed = |key: &str, value: Value| {
        let mut row = mayor.clone();
        row[key] = value;
        row.to_string()
    };
    let mut lines = vec![
        mayor.to_string(),
        "{\"question\": ".into(),
        String::new(),
        json!({ "document": SHORT, "answers": ["x"] }).to_string(),
        changed("evidence", json!(["It snows."])),
        changed("path", json!("almanac.txt")),
        json!({ "path": "gone.txt", "question": "q", "answers": ["a"] }).to_string(),
        changed("answers", json!([])),
        changed("question", json!(" ")),
        changed("evidense", json!([])),
        with_id.to_string(),
    ];
    let file = questions(folder.path(), &lines);
    let out = folder.path().join("run");
    let run = || succeeds(qa(&file, &out, &["--methods", "gleaner"]));
    let (table, err) = run();
    let told: Vec<&str> = err.lines().collect();
    let expected = [
        (2, "EOF while parsing"),
        (4, "missing field `question`"),
        (5, "the evidence \"It snows.\" is not in the document"),
        (6, "give either document"),
        (7, "gone.txt"),
        (8, "answers is empty"),
        (9, "the question is empty"),
        (10, "unknown field `evidense`"),
    ];
    assert_eq!(told.len(), expected.len(), "{err}");
    for (told, (line, words)) in told.iter().zip(expected) {
        assert!(told.contains(&format!("line {line}: ")) && told.contains(words), "{told}");
        assert!(line == 9 || told.contains(&format!("mine.jsonl:{line}: ")), "{told}");
    }
    let records = cases(&out);
    assert_eq!(records.len(), 10);
    assert_eq!(records.iter().filter(|case| case["error"].is_string()).count(), 8);
    assert_eq!((&records[9]["id"], &records[9]["answer"]), (&"color".into(), &"green".into()));
    assert_eq!(records[0]["scores"], json!({ "f1": 1.0, "exact": 1.0 }), "{}", records[0]);
    let row = table.lines().find(|line| line.starts_with("gleaner")).unwrap();
    assert!(row.split_whitespace().take(3).eq(["gleaner", "2", "8"]), "two cases, eight bad: {table}");

    // Nothing new, nothing done again; a mended row is asked, and so is one whose answers changed.
    let (again, err) = run();
    assert_eq!((again, cases(&out).len()), (table, 10));
    assert!(err.starts_with("the folder has 10 answers already\n"), "{err}");
    lines[4] = changed("evidence", json!(["It rains."]));
    lines[0] = changed("answers", json!(["Ada Bell", "Bell"]));
    questions(folder.path(), &lines);
    run();
    let records = cases(&out);
    let added: Vec<&Value> = records[10..].iter().map(|case| &case["id"]).collect();
    assert_eq!(added, ["line 1", "line 5"]);
    assert_eq!(records[11]["evidence_recall"], 1.0);
}

/// The beginning of the almanac, as far as a sentence that answers, is longer than the model's 4096 positions, so that
/// `full` sees the ends alone, and `last-window` the end.
#[test]
fn methods_see_what_they_are_said_to_see() {
    let folder = tempfile::tempdir().unwrap();
    let almanac = std::fs::read_to_string(root().join("examples/almanac.txt")).unwrap();
    let rows = std::fs::read_to_string(root().join("examples/almanac-qa.jsonl")).unwrap();
    let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_byte = |byte: usize| {
        let place = |row: &Value| almanac.find(row["evidence"][0].as_str().unwrap()).unwrap();
        rows.iter().min_by_key(|row| place(row).abs_diff(byte)).unwrap().clone()
    };
    let mut asked = [of_byte(0), of_byte(11_000), of_byte(22_000)];
    let last = asked[2]["evidence"][0].as_str().unwrap();
    let document = &almanac[..almanac.find(last).unwrap() + last.len()];
    for row in &mut asked {
        row["path"] = "part.txt".into();
    }
    let file = questions(folder.path(), &asked.map(|row| row.to_string()));
    std::fs::write(folder.path().join("part.txt"), document).unwrap();
    let out = folder.path().join("run");
    let (table, _) = succeeds(qa(&file, &out, &["--methods", "gleaner,full,last-window", "--sweep", "topk=60,2"]));
    let recall = |method: &str, topk: Option<u64>| -> Vec<f64> {
        let of = |case: &&Value| case["method"] == method && case["settings"]["topk"].as_u64() == topk;
        cases(&out).iter().filter(of).map(|case| case["evidence_recall"].as_f64().unwrap()).collect()
    };
    assert_eq!(recall("full", None), [1.0, 0.0, 1.0]);
    assert_eq!(recall("last-window", None), [0.0, 0.0, 1.0]);
    assert_eq!(recall("gleaner", Some(60)), [1.0, 1.0, 1.0]);
    for case in cases(&out) {
        let (retained, steps) = (case["retained_tokens"].as_u64().unwrap(), case["steps"].as_array().unwrap());
        let answer_room = 24 + 150;
        match case["method"].as_str().unwrap() {
            "full" => assert!((4096 - answer_room..4096 - 24).contains(&retained), "{retained}"),
            "last-window" => assert!((250..=260).contains(&retained), "{retained}"),
            _ => {
                let last = steps.last().unwrap();
                assert_eq!(last["retained_tokens"], retained);
                assert_eq!(last["evidence_recall"], case["evidence_recall"]);
            }
        }
        // What is not read yet cannot be kept.
        let unread = steps.iter().filter(|step| step["evidence_recall"].is_null()).count();
        let share = unread as f64 / steps.len().max(1) as f64;
        match case["id"].as_str().unwrap() {
            "line 2" if !steps.is_empty() => assert!((0.4..0.6).contains(&share), "{case}"),
            "line 3" if !steps.is_empty() => assert_eq!(unread, steps.len() - 1, "{case}"),
            _ => assert!(share < 0.1, "{case}"),
        }
    }

    let mean = |begins: &str, measure: &str| csv(&out, begins, measure)[0];
    let (full, gleaner) = (mean("mine,full", "f1"), mean("mine,gleaner,256,60,", "f1"));
    assert!((mean("mine,full", "difference") - (full - gleaner)).abs() < 1e-3);
    assert!(mean("mine,gleaner,256,2,", "retained_tokens") < mean("mine,gleaner,256,60,", "retained_tokens") / 4.0);
    let [_, low, high] = csv(&out, "mine,last-window", "evidence_recall");
    assert_eq!((low, high), (0.0, 1.0), "one of three");
    assert!(table.contains("gleaner topk=60") && table.contains("less that of gleaner topk=60"), "{table}");
    for name in ["scores", "recall"] {
        let svg = std::fs::read_to_string(out.join(name).with_extension("svg")).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("last-window"), "{svg}");
        let png = std::fs::read(out.join(name).with_extension("png")).unwrap();
        assert!(png.starts_with(b"\x89PNG\r\n") && png.len() > 5000, "{} bytes", png.len());
    }
}

#[test]
fn mistakes_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let one = row("What is the color of Tarn?", "green", "The color of Tarn is green.").to_string();
    let file = questions(folder.path(), &[one]);
    let out = folder.path().join("run");
    let told = |file: &Path, extra: &[&str], words: &[&str]| {
        let err = refused(qa(file, &out, extra));
        assert!(words.iter().all(|word| err.contains(word)), "{words:?} are not in: {err}");
        assert!(!out.exists());
    };
    told(&folder.path().join("none.jsonl"), &[], &["none.jsonl"]);
    told(&file, &["--sweep", "depth=1"], &["\"depth\" is no setting", "window, topk, phrase, max-retained"]);
    told(&file, &["--sweep", "topk=1,x"], &["\"x\" is no whole number"]);
    told(&file, &["--sweep", "topk"], &["NAME=N"]);
    told(&file, &["--sweep", "window=256,3"], &["window_length is 3"]);
    told(&file, &["--methods", "rag"], &["rag", "last-window"]);

    let twice = json!({ "id": "a", "document": SHORT, "question": "q", "answers": ["a"] }).to_string();
    let file = questions(folder.path(), &[twice.clone(), twice]);
    assert!(refused(qa(&file, &out, &[])).contains("two cases have the id \"a\""));
    let file = questions(folder.path(), &["{}".into()]);
    assert!(refused(qa(&file, &out, &[])).contains("no case that could be asked"));
}
