//! The program on the bundled model and document: what goes to which stream, in which form.

mod common;

use std::io::Write;
use std::process::{Command, Stdio};

use common::root;
use gleaner::Answer;
use serde_json::Value;

const QUESTION: &str = "What is the color of Brackenhythe?";

/// The paragraph that holds the answer, with its neighbours: a quick document of several chunks.
fn document() -> String {
    let almanac = std::fs::read_to_string(root().join("examples/almanac.txt")).unwrap();
    let start = almanac.find("The Seven Towns").unwrap();
    let end = almanac.find("Of Rivers and Bridges").unwrap();
    almanac[start..end].to_owned()
}

fn ask(extra: &[&str]) -> (String, String) {
    ask_topk("60", extra)
}

fn ask_topk(topk: &str, extra: &[&str]) -> (String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_gleaner"))
        .args(["ask", "--doc", "-", "--window", "256", "--topk", topk, QUESTION])
        .args(extra)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(document().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{err}");
    (out, err)
}

#[test]
fn the_answer_comes_first_and_the_evidence_behind_it() {
    let (out, err) = ask(&["--evidence", "2"]);
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].contains("silver"), "{out}");
    assert!(lines[2].starts_with("Evidence"), "{out}");
    assert_eq!(lines.len(), 5, "{out}");
    assert!(lines[3..].iter().all(|line| line.contains("line ") && line.contains("score ")), "{out}");
    assert!(out.contains("The color of Brackenhythe is silver."), "{out}");
    assert_eq!(err, "", "no progress bar where there is no terminal");
}

#[test]
fn quiet_prints_the_answer_alone() {
    let (out, err) = ask(&["-q"]);
    assert_eq!(out.lines().count(), 1, "{out}");
    assert!(out.contains("silver"));
    assert_eq!(err, "");
}

#[test]
fn json_holds_everything_and_the_spans_are_right() {
    let (out, _) = ask(&["--json"]);
    let answer: Answer = serde_json::from_str(&out).unwrap();
    let document = document();
    assert!(answer.answer.contains("silver"));
    assert_eq!(answer.document.bytes, document.len());
    assert_eq!(answer.steps, answer.document.chunks);
    assert!(answer.steps >= 3);
    assert!(answer.retained_tokens <= answer.params.max_retained);
    assert!(answer.evidence.is_sorted_by(|a, b| a.score >= b.score));
    for evidence in &answer.evidence {
        assert_eq!(document[evidence.start..evidence.end], evidence.text);
        assert_eq!(document[..evidence.start].matches('\n').count() + 1, evidence.line);
        assert!(evidence.chunk < answer.steps);
    }
    let keys: Value = serde_json::from_str(&out).unwrap();
    for key in [
        "answer",
        "evidence",
        "document",
        "retained_tokens",
        "steps",
        "params",
        "device",
        "model",
        "timing_ms",
        "warnings",
    ] {
        assert!(keys.get(key).is_some(), "{key}");
    }
    assert!(keys.get("timings").is_none(), "nobody asked for them");
}

#[test]
fn the_trace_accounts_for_every_sentence_of_every_step() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.jsonl");
    ask(&["--trace", path.to_str().unwrap(), "-q"]);
    let trace = std::fs::read_to_string(path).unwrap();
    let steps: Vec<Value> = trace.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(steps.len() >= 3);
    let mut held: Vec<u64> = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        assert_eq!(step["step"], index);
        let kept: Vec<u64> = step["kept"].as_array().unwrap().iter().map(|k| k["sentence"].as_u64().unwrap()).collect();
        let dropped: Vec<u64> = step["dropped"].as_array().unwrap().iter().map(|d| d[0].as_u64().unwrap()).collect();
        assert!(held.iter().all(|sentence| kept.contains(sentence) != dropped.contains(sentence)));
        assert!(step["top_tokens"].as_array().unwrap().len() <= 60);
        held = kept;
    }
}

/// The elements of a page's part with their tags and texts, and the text of all of it.
fn elements(html: &str) -> (Vec<(String, String)>, String) {
    let plain = |text: &str| {
        let text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"");
        text.replace("&amp;", "&")
    };
    let (mut elements, mut all) = (Vec::new(), String::new());
    for piece in html.split('<').skip(1) {
        let (tag, text) = piece.split_once('>').unwrap();
        assert!(!text.contains(['>', '"']), "not escaped: {text}");
        if tag.starts_with('i') || tag.starts_with("mark") {
            elements.push((tag.to_owned(), plain(text)));
        }
        all += &plain(text);
    }
    (elements, all)
}

/// The page against the trace and the JSON of the same run.
#[test]
fn the_heatmap_holds_the_document_and_shades_what_was_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let text = format!("A <b>&\"bold\"</b> word &amp; its tag.\n\n{}", document());
    std::fs::write(path("doc.txt"), &text).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_gleaner"))
        .args(["ask", "--json", "--device", "cpu", "--window", "256", "--topk", "120", "--max-retained", "256"])
        .args(["--doc", &path("doc.txt"), "--trace", &path("trace"), "--heatmap", &path("page.html")])
        .arg("What is the <color> of Brackenhythe?")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: Answer = serde_json::from_slice(&output.stdout).unwrap();
    let page = std::fs::read_to_string(path("page.html")).unwrap();
    let (head, main) = page.split_once("<main dir=auto>\n").unwrap();

    for word in ["What is the &lt;color&gt; of", &answer.answer, &answer.device, &answer.model, "max-retained 256"] {
        assert!(head.contains(word), "{word:?} is not in: {head}");
    }
    assert!(!page.contains("<script") && !page.contains("http:") && !page.contains("https:"));

    // One section a chunk; without the headings and the newlines between sections, the text is the document's.
    let sections: Vec<&str> = main.split("<section id=c").skip(1).collect();
    assert_eq!(sections.len(), answer.document.chunks);
    let (mut marked, mut shown) = (Vec::new(), String::new());
    for (chunk, section) in (1..).zip(sections) {
        let section = section.strip_prefix(&format!("{chunk}><h2>Chunk {chunk}</h2>")).unwrap();
        let (elements, all) = elements(section.split_once("</p></section>").unwrap().0);
        marked.extend(elements);
        shown += &all;
    }
    assert_eq!(shown, text);

    // Each piece of evidence is marked under its number, which the head links to.
    for (number, evidence) in (1..).zip(&answer.evidence) {
        let tag = format!("mark id=e{number} ");
        let mark = marked.iter().find(|(found, _)| found.starts_with(&tag)).unwrap();
        assert_eq!(mark.1.trim(), evidence.text);
        assert!(head.contains(&format!("<a href=#e{number}>line {}</a>", evidence.line)));
    }
    assert_eq!(marked.iter().filter(|(tag, _)| tag.starts_with("mark ")).count(), answer.evidence.len());

    // The shades that the trace asks for, in the order of the document.
    let mut expected = std::collections::BTreeMap::new();
    for step in std::fs::read_to_string(path("trace")).unwrap().lines() {
        let step: Value = serde_json::from_str(step).unwrap();
        let kept = step["kept"].as_array().unwrap();
        let score = |kept: &Value| kept["score"].as_f64().unwrap();
        let best = kept.iter().map(score).fold(0.0, f64::max);
        for kept in kept {
            let shade = 9 - (best / score(kept)).log2().floor().min(8.0) as i32;
            expected.insert(kept["sentence"].as_u64().unwrap(), (format!("s{shade}"), false));
        }
        for dropped in step["dropped"].as_array().unwrap() {
            let sentence = dropped[0].as_u64().unwrap();
            if dropped[1] == "max_retained" {
                expected.entry(sentence).or_default().1 = true;
            }
        }
    }
    assert!(expected.values().any(|(_, crowded_out)| *crowded_out), "the memory is small enough to overflow");
    let classes = |tag: &str| {
        let mut words: Vec<&str> =
            tag.split_once("class=").unwrap().1.split(" title").next().unwrap().split(' ').collect();
        words.iter_mut().for_each(|word| *word = word.trim_matches('"'));
        (words.iter().find(|word| word.starts_with('s')).unwrap_or(&"").to_string(), words.contains(&"m"))
    };
    let shown: Vec<_> = marked.iter().map(|(tag, _)| classes(tag)).collect();
    assert_eq!(shown, expected.into_values().collect::<Vec<_>>());
}

/// Found before anything else is opened.
#[test]
fn a_heatmap_that_cannot_be_written_is_a_mistake() {
    let output = Command::new(env!("CARGO_BIN_EXE_gleaner"))
        .args(["ask", "--doc", "examples/almanac.txt", "--model", "no/such/model"])
        .args(["--heatmap", "no/such/folder/page.html", QUESTION])
        .current_dir(root())
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("no/such/folder/page.html"), "{message}");
    assert!(output.stdout.is_empty());
}

const STAGES: [&str; 6] = ["open", "upload", "plan", "read", "prefill", "decode"];

#[test]
fn timings_stand_beside_the_answer() {
    let (out, err) = ask(&["-q", "--timings", "--profile-eager"]);
    assert_eq!((out.lines().count(), out.contains("silver")), (1, true), "{out}");
    let lines: Vec<&str> = err.lines().collect();
    let line = |start: &str| *lines.iter().find(|line| line.starts_with(start)).expect(start);
    for stage in STAGES {
        assert!(line(stage).ends_with('%'), "{err}");
    }
    let ms = |line: &str| -> f64 { line.split_whitespace().find_map(|word| word.parse().ok()).unwrap() };
    let sum: f64 = STAGES.iter().map(|stage| ms(line(stage))).sum();
    assert!((sum - ms(line("together"))).abs() < 0.01, "{err}");
    for stage in ["read", "prefill", "decode"] {
        let table = &lines[lines.iter().position(|line| line.starts_with(&format!("in {stage} "))).unwrap()..];
        assert!(table.iter().any(|line| line.starts_with("  attention ")), "{err}");
    }
}

#[test]
fn timings_are_in_the_object_where_one_is_asked_for() {
    let (out, err) = ask(&["--json", "--timings"]);
    assert_eq!(err, "");
    let answer: Answer = serde_json::from_str(&out).unwrap();
    let timings = answer.timings.as_ref().unwrap();
    let stages: Vec<&str> = timings.stages.iter().map(|stage| stage.stage.name()).collect();
    assert_eq!(stages, STAGES);
    let total: f64 = timings.stages[2..].iter().map(|stage| stage.ms).sum();
    assert!((total - answer.timing_ms.total).abs() < 1.0, "{total} of {}", answer.timing_ms.total);
    assert!(timings.operations.iter().any(|operation| operation.name == "product gate"));
    let value: Value = serde_json::from_str(&out).unwrap();
    assert!(value["timings"]["operations"][0]["ms"].is_f64() && value["timings"]["ceilings"]["gemm_tflops"].is_null());
    assert_eq!(serde_json::to_value(&answer).unwrap()["timings"], value["timings"]);
}

#[test]
fn a_small_memory_is_kept_to_and_reported() {
    let (out, err) = ask_topk("300", &["--max-retained", "256", "--json"]);
    let answer: Answer = serde_json::from_str(&out).unwrap();
    assert!(answer.retained_tokens <= 256);
    assert!(answer.warnings.iter().any(|warning| warning.contains("max_retained")), "{:?}", answer.warnings);
    assert!(err.contains("warning: "), "{err}");
}

#[test]
fn a_template_file_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("template.txt");
    std::fs::write(&path, "{context}\n\nQuestion:\n\n{question}\n\nAnswer:").unwrap();
    assert!(ask(&["--template", path.to_str().unwrap()]).0.contains("silver"));
}

#[test]
fn sampling_repeats_with_its_seed() {
    let sample = |seed: &str| ask(&["--temperature", "3", "--max-new-tokens", "12", "-q", "--seed", seed]).0;
    assert_eq!(sample("7"), sample("7"));
    assert_ne!(sample("7"), sample("8"));
}

/// A reader that goes away early, as `head` does, is no failure.
#[test]
fn a_closed_pipe_ends_quietly() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_gleaner"))
        .arg("info")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert!(child.wait_with_output().unwrap().status.success());
}

#[test]
fn info_shows_model_device_memory_and_build() {
    let output = Command::new(env!("CARGO_BIN_EXE_gleaner")).arg("info").output().unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    for word in ["CPU", "threads", "15.7M parameters", "8 layers", "mapped", "workspace", "GPU"] {
        assert!(out.contains(word), "{word:?} is not in: {out}");
    }
}

#[test]
fn bench_measures_the_bundled_model_on_the_cpu() {
    let bench = |lengths: &str, document: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_gleaner"))
            .args(["bench", "--device", "cpu", "--window", "256", "--new-tokens", "4", "--lengths", lengths])
            .args(document)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let report: Value =
        serde_json::from_str(&bench("300", &["--tokens", "3000", "--retained", "128", "--json"])).unwrap();
    let positive =
        |value: &Value, what: &str| assert!(value.as_f64().is_some_and(|value| value > 0.0), "{what}: {value}");
    let steps = report["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 1);
    assert_eq!(steps[0]["tokens"], 300);
    assert_eq!(steps[0]["mean_tokens"], 300.0, "what is retained fills its room");
    assert_eq!(steps[0]["chunk_tokens"], 96, "whole sentences of 16 in 300 - 70 - 128 tokens");
    // On a busy machine the difference of two short runs may be anything, but it is a number.
    assert!(steps[0]["ms"].is_f64() && steps[0]["tflops"].is_f64());
    assert!(steps[0]["share_of_gemm"].is_null());
    // Seven full layers of 1,572,864 weights, twice a token; the rest is attention and the last layer's part.
    let tflop = steps[0]["tflop"].as_f64().unwrap();
    let products = 2.0 * 7.0 * 1_572_864.0 * 300.0 / 1e12;
    assert!((1.0..1.1).contains(&(tflop / products)), "{tflop} of {products}");
    // 3000 tokens in chunks of 256; 70 of prompt, 128 retained, the last chunk shorter.
    assert_eq!(report["document"]["steps"], 12);
    let step_tokens = report["document"]["mean_step_tokens"].as_f64().unwrap();
    assert!((256.0..=70.0 + 128.0 + 256.0).contains(&step_tokens), "{step_tokens}");
    positive(&report["document"]["tokens_per_second"], "document");
    let computed = report["document"]["mean_computed_tokens"].as_f64().unwrap();
    assert!((256.0..=step_tokens).contains(&computed), "{computed} of {step_tokens}");
    assert_eq!(report["document"]["seconds_without_reuse"].is_null(), computed == step_tokens);
    assert_eq!(report["answer"]["prompt_tokens"], 70 + 128);
    positive(&report["answer"]["prefill_ms"], "prefill");
    assert_eq!(report["answer"]["new_tokens"], 4);
    positive(&report["tokenizer"]["tokens_per_second"], "tokenizer");
    positive(&report["load_ms"], "load");
    positive(&report["workspace_bytes"], "workspace");
    assert_eq!(report["notes"].as_array().unwrap().len(), 0);

    let table = bench("278", &["--tokens", "300", "--retained", "128", "--pause", "20"]);
    for word in ["15.7M parameters", "pause      20 ms", "step tokens", "document", "prefill", "decode", "tokenizer"] {
        assert!(table.contains(word), "{word:?} is not in: {table}");
    }

    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "A short text. It says little, and in few words.\n".repeat(60)).unwrap();
    let report: Value =
        serde_json::from_str(&bench("278", &["--retained", "128", "--doc", text.to_str().unwrap(), "--json"])).unwrap();
    let tokens = report["document"]["tokens"].as_u64().unwrap();
    assert!((500..1500).contains(&tokens), "{tokens}");
    assert_eq!(report["document"]["steps"].as_u64().unwrap(), tokens.div_ceil(256), "chunks of up to 256");
}
