//! `gleaner eval` on the bundled model and document.

#[path = "../common/mod.rs"]
mod common;
mod folder;
mod nih;
mod qa;

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output};

use common::root;
use serde_json::Value;

/// Chunks so small that a run takes seconds.
const SMALL: [&str; 4] = ["--window", "256", "--topk", "60"];

fn eval(benchmark: &str, out: &Path, args: &[&dyn AsRef<OsStr>]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gleaner"));
    command.args(["eval", benchmark, "--device", "cpu", "--max-new-tokens", "24"]);
    command.args(args).arg("--out").arg(out);
    command
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

/// A value of table.csv: mean, low and high.
fn csv(folder: &Path, begins: &str, measure: &str) -> [f64; 3] {
    let text = std::fs::read_to_string(folder.join("table.csv")).unwrap();
    let line = text.lines().find(|line| line.starts_with(begins) && line.contains(&format!(",{measure},")));
    let line = line.unwrap_or_else(|| panic!("no {measure} of {begins} in {text}"));
    let numbers: Vec<f64> = line.rsplit(',').take(3).map(|number| number.parse().unwrap()).collect();
    [numbers[2], numbers[1], numbers[0]]
}
