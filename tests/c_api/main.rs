//! The C library as a program in C meets it: the header, the examples, the snippets of docs/embedding.md, misuse, threads.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

const MODEL: &str = "models/gleaner-demo-16m";
const ALMANAC: &str = "examples/almanac.txt";
const QUESTION: &str = "What is the name of the mayor of Pellinbridge?";
const EVIDENCE: &str = "The name of the mayor of Pellinbridge is Clara Whitlock.";
const STRICT: [&str; 6] = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"];
const C99: [&str; 4] = ["cc", "-std=c99", "-x", "c"];
const CPP17: [&str; 4] = ["c++", "-std=c++17", "-x", "c++"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo puts what it builds for this test, and how it calls the profile.
fn target() -> (PathBuf, String) {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_gleaner"));
    let folder = program.parent().expect("a program lies in a folder").to_owned();
    let name = folder.file_name().expect("it is named by the profile").to_string_lossy().into_owned();
    (folder, if name == "debug" { "dev".into() } else { name })
}

/// The folder with libgleaner, built on first use. This test is named beside it so that what both rest on keeps the
/// features that it was just built with.
static LIBRARY: LazyLock<PathBuf> = LazyLock::new(|| {
    let (folder, profile) = target();
    let parts = ["-p", "gleaner", "-p", "gleaner-capi", "--lib", "--test", "c_api"];
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--locked", "--profile", &profile]).args(parts).current_dir(root());
    run(&mut cargo);
    folder
});

/// Whether there is such a compiler. Only where nobody relies on the tests may it be missing.
fn has(compiler: &str) -> bool {
    let found = Command::new(compiler).arg("--version").output().is_ok();
    assert!(found || std::env::var_os("CI").is_none(), "no {compiler} on this machine");
    if !found {
        eprintln!("skipped: no {compiler} on this machine");
    }
    found
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let words = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}\n{}{}", words(&output.stdout), words(&output.stderr));
    output
}

fn compiler(call: [&str; 4]) -> Command {
    let mut command = Command::new(call[0]);
    command.args(&call[1..]).args(STRICT).arg("-Iinclude").current_dir(root());
    command
}

/// `source` as a program against the shared library.
fn link(call: [&str; 4], source: &Path, program: &Path, flags: &[&str]) {
    let library = LIBRARY.display();
    let mut command = compiler(call);
    command.args(["-D_POSIX_C_SOURCE=200809L", "-pthread", "-g"]).args(flags).arg(source).arg("-o").arg(program);
    command.args([&format!("-L{library}"), "-lgleaner", &format!("-Wl,-rpath,{library}")]);
    run(&mut command);
}

/// The flags that find misused memory and what is never freed, where the compiler and this machine have them.
fn sanitizer(folder: &Path) -> &'static [&'static str] {
    const FLAGS: [&str; 2] = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
    let (source, program) = (folder.join("probe.c"), folder.join("probe"));
    std::fs::write(&source, "int main(void) { return 0; }\n").unwrap();
    let compiled = compiler(C99).args(FLAGS).arg(&source).arg("-o").arg(&program).output();
    let works = compiled.is_ok_and(|output| output.status.success())
        && Command::new(&program).output().is_ok_and(|output| output.status.success());
    if works {
        return &FLAGS;
    }
    eprintln!("without sanitizers: this machine's compiler has none that run");
    &[]
}

/// The part of the almanac around the sentence that is asked for, which is on its first line.
fn excerpt(folder: &Path) -> PathBuf {
    let text = std::fs::read_to_string(root().join(ALMANAC)).unwrap();
    let at = text.find(EVIDENCE).expect("it says so");
    let start = text[..at].rfind('\n').expect("it is not the first") + 1;
    let path = folder.join("excerpt.txt");
    std::fs::write(&path, &text[start..text.floor_char_boundary(at + 3500)]).unwrap();
    path
}

fn output_of(program: &Path, document: &Path) -> (String, String) {
    let output = run(Command::new(program).args([MODEL.as_ref(), document, QUESTION.as_ref()]).current_dir(root()));
    (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn the_header_is_c_and_cpp_and_says_its_version() {
    for call in [C99, CPP17].into_iter().filter(|call| has(call[0])) {
        run(compiler(call).args(["-fsyntax-only", "-Wno-pragma-once-outside-header", "include/gleaner.h"]));
    }
    let header = std::fs::read_to_string(root().join("include/gleaner.h")).unwrap();
    assert!(header.contains(&format!("#define GLEANER_VERSION \"{}\"\n", env!("CARGO_PKG_VERSION"))));
}

/// The library exports what the header declares, and nothing else.
#[test]
fn exported_symbols_are_the_header_s() {
    let header = std::fs::read_to_string(root().join("include/gleaner.h")).unwrap();
    let declared = regex::Regex::new(r"(?m)^(?:gleaner_status|const \w+ \*)\s*\*?(gleaner_\w+)\(").unwrap();
    let declared: BTreeSet<&str> =
        declared.captures_iter(&header).map(|found| found.get(1).unwrap().as_str()).collect();
    let library = LIBRARY.join("libgleaner.so");
    let Ok(nm) = Command::new("nm").args(["-D", "--defined-only"]).arg(&library).output() else { return };
    let symbols = String::from_utf8(nm.stdout).unwrap();
    let exported: BTreeSet<&str> = symbols.lines().map(|line| line.rsplit(' ').next().unwrap()).collect();
    assert_eq!(exported, declared);
    let dynamic = run(Command::new("readelf").arg("-d").arg(&library)).stdout;
    assert!(String::from_utf8_lossy(&dynamic).contains("NODELETE"), "its threads outlive a dlclose");
}

#[test]
fn the_examples_answer() {
    let folder = tempfile::tempdir().unwrap();
    let (excerpt, program) = (excerpt(folder.path()), folder.path().join("program"));
    let source = |name: &str| root().join("examples").join(name);
    assert!(std::fs::read_to_string(source("ask.c")).unwrap().lines().count() < 60);

    link(C99, &source("ask.c"), &program, &[]);
    let (answer, progress) = output_of(&program, &root().join(ALMANAC));
    assert!(answer.starts_with("Clara Whitlock\nline 41, score "), "{answer}");
    assert!(answer.lines().nth(1).unwrap().ends_with(EVIDENCE), "{answer}");
    assert!(progress.ends_with("chunk 16 of 16\n"), "{progress}");

    link(C99, &source("low_level.c"), &program, sanitizer(folder.path()));
    let (answer, _) = output_of(&program, &excerpt);
    assert!(answer.starts_with("step 0: most looked at is token "), "{answer}");
    assert!(answer.ends_with("\nanswer: Clara Whitlock\n"), "{answer}");

    if has("c++") {
        link(CPP17, &source("ask.cpp"), &program, &[]);
        assert_eq!(output_of(&program, &excerpt).0, format!("Clara Whitlock\nline 1: {EVIDENCE}\n"));
    }

    // The same without the shared library.
    let mut cc = compiler(C99);
    cc.arg(source("ask.c")).args(["-x", "none"]).arg(LIBRARY.join("libgleaner.a")).arg("-o").arg(&program);
    cc.args(["-lpthread", "-lm", "-ldl", "-lrt", "-lgcc_s"]);
    // nvcc's side of the kernels is C++.
    run(cc.args(gleaner::cuda::BUILT.then_some("-lstdc++")));
    assert!(output_of(&program, &excerpt).0.starts_with("Clara Whitlock\n"));
}

/// Programs that check the library and print nothing unless something is wrong: its silence is tested along.
fn check(name: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (excerpt, program) = (excerpt(folder.path()), folder.path().join("program"));
    link(C99, &root().join("tests/c_api").join(name), &program, sanitizer(folder.path()));
    let output = run(Command::new(&program).args([MODEL.as_ref(), excerpt.as_path()]).current_dir(root()));
    assert_eq!(output.stdout.len() + output.stderr.len(), 0, "{output:?}");
}

#[test]
fn misuse_is_an_error() {
    check("misuse.c");
}

#[test]
fn callbacks_and_threads_keep_the_rules() {
    check("callbacks.c");
}

/// What stands between "```language" and "```" in docs/embedding.md.
fn snippets(language: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join("docs/embedding.md")).unwrap();
    let fence = format!("```{language}\n");
    text.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap().to_owned()).collect()
}

/// A snippet that includes the header is a whole file, any other the inside of a function.
#[test]
fn the_guide_s_snippets_compile() {
    let folder = tempfile::tempdir().unwrap();
    for (language, call) in [("c", C99), ("cpp", CPP17)] {
        let snippets = snippets(language);
        assert!(!snippets.is_empty(), "{language}");
        for snippet in snippets.iter().filter(|_| has(call[0])) {
            let around = "#include <gleaner.h>\n#include <stdio.h>\n#include <stdlib.h>\nint snippet(gleaner_engine *engine, \
                          gleaner_document *document);\nint snippet(gleaner_engine *engine, gleaner_document *document) {\n\
                          (void)engine, (void)document;\n";
            let whole = snippet.contains("#include <gleaner.h>");
            let source = if whole { snippet.clone() } else { format!("{around}{snippet}return 0;\n}}\n") };
            let path = folder.path().join("snippet");
            std::fs::write(&path, source).unwrap();
            run(compiler(call).arg("-fsyntax-only").arg(&path));
        }
    }
}
