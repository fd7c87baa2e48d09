//! What a user can get wrong: each mistake ends with exit code 2 and a message that names the thing.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{demo_dir, root};
use tempfile::TempDir;

fn gleaner(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gleaner"));
    command.args(args).stdin(Stdio::null()).output().expect("the program starts")
}

/// Runs `args` and expects exit code 2, nothing on stdout, and one line on stderr that holds each of `words`.
fn refused(args: &[&str], words: &[&str]) {
    let output = gleaner(args);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(output.stdout.is_empty());
    assert_eq!(message.lines().count(), 1, "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

fn file(folder: &TempDir, name: &str, bytes: &[u8]) -> String {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

fn almanac() -> String {
    root().join("examples/almanac.txt").display().to_string()
}

/// A copy of a model directory for a test to break.
fn copy_of(model: &Path) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(model).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}

/// Asks with a broken model.
fn refuses_model(model: &Path, words: &[&str]) {
    refused(&["ask", "--model", model.to_str().unwrap(), "--doc", &almanac(), "Who?"], words);
}

fn edit_config(folder: &TempDir, old: &str, new: &str) {
    let path = folder.path().join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    assert!(config.contains(old), "{config}");
    fs::write(&path, config.replace(old, new)).unwrap();
}

#[test]
fn documents() {
    let folder = tempfile::tempdir().unwrap();
    refused(&["ask", "--doc", "no/such/file.txt", "Who?"], &["no/such/file.txt", "No such file"]);
    refused(&["ask", "--doc", folder.path().to_str().unwrap(), "Who?"], &[folder.path().to_str().unwrap()]);
    refused(&["ask", "--doc", &file(&folder, "blank.txt", b" \n\t\n"), "Who?"], &["blank.txt", "empty"]);
    refused(&["ask", "--doc", "-", "Who?"], &["standard input", "empty"]);
    let latin1 = file(&folder, "latin1.txt", b"caf\xe9 au lait");
    refused(&["ask", "--doc", &latin1, "Who?"], &["latin1.txt", "UTF-8", "offset 3"]);
}

#[test]
fn questions() {
    refused(&["ask", "--doc", &almanac(), "  "], &["question is empty"]);
    let long = "why ".repeat(300);
    refused(&["ask", "--doc", &almanac(), "--window", "256", &long], &["question", "tokens", "window of 256"]);
}

#[test]
fn parameters() {
    let with =
        |flag: &str, value: &str, words: &[&str]| refused(&["ask", "--doc", &almanac(), flag, value, "Who?"], words);
    with("--window", "0", &["window_length is 0", "16"]);
    with("--window", "99999999", &["window_length is 99999999", "32768"]);
    with("--topk", "0", &["topk is 0"]);
    with("--topk", "99999999", &["topk", "16384"]);
    with("--phrase", "0", &["phrase_width is 0"]);
    with("--phrase", "1000", &["phrase_width", "256"]);
    with("--max-retained", "3", &["max_retained is 3"]);
    with("--max-new-tokens", "0", &["max_new_tokens is 0"]);
    with("--temperature", "NaN", &["temperature is NaN"]);
    with("--top-p", "0", &["top_p is 0"]);
}

#[test]
fn templates() {
    let folder = tempfile::tempdir().unwrap();
    let with = |name: &str, text: &[u8], words: &[&str]| {
        refused(&["ask", "--doc", &almanac(), "--template", &file(&folder, name, text), "Who?"], words)
    };
    with("context.txt", b"{question}", &["context.txt", "{context}"]);
    with("question.txt", b"{context}", &["question.txt", "{question}"]);
    with("binary.txt", b"\xff{context}{question}", &["binary.txt", "offset 0"]);
    refused(&["ask", "--doc", &almanac(), "--template", "no.txt", "Who?"], &["no.txt", "template"]);
}

#[test]
fn model_directories() {
    refuses_model(Path::new("no/such/model"), &["no/such/model"]);
    let empty = tempfile::tempdir().unwrap();
    refuses_model(empty.path(), &["config.json"]);

    let model = copy_of(&demo_dir());
    fs::remove_file(model.path().join("model-00002-of-00002.safetensors")).unwrap();
    refuses_model(model.path(), &["model-00002-of-00002.safetensors", "missing"]);
    fs::write(model.path().join("model-00002-of-00002.safetensors"), b"\xff\xff\xff\xff\xff\xff\xff\xff{}").unwrap();
    refuses_model(model.path(), &["model-00002-of-00002.safetensors", "safetensors file"]);
    let shard = model.path().join("model-00001-of-00002.safetensors");
    let length = fs::metadata(&shard).unwrap().len();
    fs::File::options().write(true).open(&shard).unwrap().set_len(length / 2).unwrap();
    refuses_model(model.path(), &["model-00001-of-00002.safetensors", "safetensors file"]);
}

#[test]
fn configurations() {
    let tiny = || copy_of(&root().join("tests/golden/arch/llama"));

    let model = tiny();
    edit_config(&model, "\"intermediate_size\": 128", "\"intermediate_size\": 96");
    refuses_model(model.path(), &["gate_proj", "[128, 128]", "[96, 128]"]);

    let model = tiny();
    edit_config(&model, "LlamaForCausalLM", "MambaForCausalLM");
    refuses_model(model.path(), &["MambaForCausalLM", "Qwen2", "Qwen3", "Llama", "Mistral"]);

    let model = tiny();
    edit_config(&model, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    refuses_model(model.path(), &["model.layers.2", "missing"]);

    // The embedding has 256 rows, the tokenizer 8192 tokens.
    let model = tiny();
    fs::copy(demo_dir().join("tokenizer.json"), model.path().join("tokenizer.json")).unwrap();
    refuses_model(model.path(), &["tokenizer.json", "8191", "256"]);

    let model = tiny();
    refuses_model(model.path(), &["tokenizer.json"]);
    fs::write(model.path().join("config.json"), "{").unwrap();
    refuses_model(model.path(), &["config.json", "JSON"]);
}

#[test]
fn devices() {
    refused(&["ask", "--doc", &almanac(), "--device", "cuda:99", "Who?"], &["cuda:99"]);
    let output = gleaner(&["ask", "--doc", &almanac(), "--device", "tpu", "Who?"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cuda:N"));
}

/// A trace that cannot be written is found before any work is done.
#[test]
fn trace_files() {
    let started = std::time::Instant::now();
    refused(&["ask", "--doc", &almanac(), "--trace", "no/such/folder/trace", "Who?"], &["no/such/folder/trace"]);
    assert!(started.elapsed().as_secs() < 3);
    let full = PathBuf::from("/dev/full");
    if full.exists() {
        let output = gleaner(&["ask", "--doc", &almanac(), "--window", "128", "--trace", "/dev/full", "Who?"]);
        assert_eq!(output.status.code(), Some(1), "a full disk is the machine's failure");
        assert!(String::from_utf8_lossy(&output.stderr).contains("/dev/full"));
    }
}

#[test]
fn benchmarks() {
    let with = |flag: &str, value: &str, words: &[&str]| refused(&["bench", flag, value], words);
    with("--retained", "100", &["--retained is 100", "multiple of 16"]);
    with("--retained", "0", &["--retained is 0", "16"]);
    with("--lengths", "1894,800", &["--lengths is 800", "from 886", "800 retained"]);
    with("--lengths", "999999999", &["--lengths is 999999999", "131072"]);
    with("--window", "8", &["--window is 8", "16"]);
    with("--tokens", "1", &["--tokens is 1", "16"]);
    with("--pause", "60001", &["--pause is 60001", "60000"]);
    with("--new-tokens", "0", &["--new-tokens is 0", "1"]);
    with("--model", "no/such/model", &["no/such/model"]);

    let output = gleaner(&["bench", "--shape", "gpt-2"]);
    assert_eq!(output.status.code(), Some(2));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("gpt-2") && message.contains("qwen2.5-0.5b"), "{message}");
    let output = gleaner(&["bench", "--shape", "llama-3-8b", "--model", "some/model"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot be used with"));
}
