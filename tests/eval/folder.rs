//! The folder of a run: taken up, moved, locked, or in no state to be used.

use std::fs::{self, File};
use std::process::{Command, Output};

use serde_json::Value;

use super::*;

fn haystack() -> std::path::PathBuf {
    root().join("examples/almanac.txt")
}

fn nih(out: &Path, extra: &[&str]) -> Output {
    let args: [&dyn AsRef<OsStr>; 6] = [&"--haystack", &haystack(), &"--depths", &"2", &"--lengths", &"400"];
    eval("nih", out, &args).args(SMALL).args(extra).output().unwrap()
}

/// Another path to the same model and text and another number of threads change nothing; what shapes results does.
#[test]
fn a_run_goes_on_elsewhere_but_not_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    succeeds(nih(&out, &["--methods", "last-window"]));
    let run: Value = serde_json::from_slice(&fs::read(out.join("run.json")).unwrap()).unwrap();
    let parameters = &run["parameters"];
    assert_eq!((&parameters["version"], &parameters["device"]), (&env!("CARGO_PKG_VERSION").into(), &"cpu".into()));
    assert_eq!(parameters["model_sha256"].as_str().unwrap().len(), 64);
    assert!(run["starts"][0]["device"].as_str().unwrap().starts_with("cpu ("), "{run}");

    let (moved, model) = (folder.path().join("moved"), folder.path().join("model"));
    fs::rename(&out, &moved).unwrap();
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(common::demo_dir()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    fs::write(model.join("notes.txt"), "shapes nothing").unwrap();
    let copy = folder.path().join("copy.txt");
    fs::copy(haystack(), &copy).unwrap();
    let args: [&dyn AsRef<OsStr>; 8] =
        [&"--haystack", &copy, &"--depths", &"2", &"--lengths", &"400", &"--model", &model];
    let again = |extra: &[&str]| {
        eval("nih", &moved, &args).args(SMALL).env("RAYON_NUM_THREADS", "1").args(extra).output().unwrap()
    };
    let before = fs::read(moved.join("cases.jsonl")).unwrap();
    let (_, err) = succeeds(again(&["--methods", "last-window"]));
    assert_eq!(err, "the folder has 2 answers already\n");
    assert_eq!(fs::read(moved.join("cases.jsonl")).unwrap(), before);

    // Another method beside the first, in the same folder.
    succeeds(again(&["--methods", "last-window,full"]));
    assert_eq!(cases(&moved).len(), 4);

    let mut config: Value = serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap();
    config["rope_theta"] = 5000.0.into();
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    let err = refused(again(&["--seed", "1"]));
    assert!(err.contains("model_sha256: ") && err.contains("seed: 0 there, 1 now"), "{err}");
    assert!(!err.contains("haystack"), "{err}");
    assert_eq!(cases(&moved).len(), 4);
}

#[test]
fn a_folder_at_work_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let cases = File::create(folder.path().join("cases.jsonl")).unwrap();
    cases.lock().unwrap();
    assert!(refused(nih(folder.path(), &[])).contains("another run is at work in"));
    assert!(!folder.path().join("run.json").exists());
    drop(cases);
    succeeds(nih(folder.path(), &["--methods", "last-window"]));
}

#[test]
fn folders_that_cannot_be_used_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(refused(nih(&file.join("run"), &[])).contains("cannot create the folder"));
    fs::write(folder.path().join("cases.jsonl"), "{}\n").unwrap();
    assert!(refused(nih(folder.path(), &[])).contains("holds cases.jsonl but no run.json"));
    fs::write(folder.path().join("run.json"), "[]").unwrap();
    assert!(refused(nih(folder.path(), &[])).contains("is not the record of a run"));
}

/// A limit on the size of files stands for a full disk.
#[cfg(unix)]
#[test]
fn a_full_disk_keeps_what_is_finished() {
    let folder = tempfile::tempdir().unwrap();
    let haystack = haystack();
    let args: [&dyn AsRef<OsStr>; 8] =
        [&"--depths", &"3", &"--lengths", &"400,500", &"--methods", &"last-window,gleaner", &"--haystack", &haystack];
    let limited = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 4; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_gleaner")])
        .args(["eval", "nih", "--device", "cpu", "--max-new-tokens", "24"])
        .args(SMALL)
        .args(args)
        .arg("--out")
        .arg(folder.path())
        .output()
        .unwrap();
    let err = String::from_utf8(limited.stderr).unwrap();
    assert_eq!(limited.status.code(), Some(1), "{err}");
    assert!(err.contains("cannot write") && err.contains("cases.jsonl"), "{err}");
    let kept = fs::read_to_string(folder.path().join("cases.jsonl")).unwrap();
    let whole = &kept[..kept.rfind('\n').unwrap() + 1];
    assert!((1..12).contains(&whole.lines().count()), "{kept}");
    let (_, err) = succeeds(eval("nih", folder.path(), &args).args(SMALL).output().unwrap());
    assert_eq!(err, format!("the folder has {} answers already\n", whole.lines().count()));
    assert!(fs::read_to_string(folder.path().join("cases.jsonl")).unwrap().starts_with(whole));
    assert_eq!(cases(folder.path()).len(), 12);
}
