//! `gleaner eval`: measurements of what is found and answered, each in a folder of its own that can be taken up again.

mod chart;
mod haystack;
mod needle;
mod nih;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use gleaner::Error;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::Failure;

#[derive(clap::Args)]
pub struct EvalArgs {
    #[command(subcommand)]
    command: EvalCommand,
}

#[derive(clap::Subcommand)]
enum EvalCommand {
    /// Hide a fact in a long text and ask for it: needle in a haystack
    Nih(nih::NihArgs),
}

pub fn run(args: EvalArgs) -> Result<(), Failure> {
    match args.command {
        EvalCommand::Nih(args) => nih::run(args),
    }
}

fn file_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io { action, path: path.into(), source }
}

/// The folder of one run: `run.json` with what shapes it, `cases.jsonl` with a line for each finished case.
struct RunFolder {
    path: PathBuf,
    cases: File,
}

impl RunFolder {
    /// Makes the folder, or takes up the run in it, which must have been made with the same `parameters`. Also returns
    /// the finished cases. A last line without an end was cut off by the end of the program, and is dropped.
    fn open<T: DeserializeOwned>(path: &Path, parameters: &Map<String, Value>) -> Result<(RunFolder, Vec<T>), Failure> {
        fs::create_dir_all(path).map_err(file_error("create the folder", path))?;
        let (run_path, cases_path) = (path.join("run.json"), path.join("cases.jsonl"));
        match fs::read(&run_path) {
            Ok(bytes) => compare(&run_path, &bytes, parameters)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if cases_path.exists() {
                    return Err(Failure::Mistake(format!(
                        "{} holds cases.jsonl but no run.json, so that nobody can say how it was made; choose another folder for --out",
                        path.display()
                    )));
                }
                // Renamed when whole, so that a run that ends here leaves no half of it.
                let unfinished = path.join("run.json.part");
                let text = serde_json::to_string_pretty(parameters).expect("a map of plain values") + "\n";
                fs::write(&unfinished, text).map_err(file_error("write", &unfinished))?;
                fs::rename(&unfinished, &run_path).map_err(file_error("write", &run_path))?;
            }
            Err(error) => return Err(file_error("read", &run_path)(error).into()),
        }

        let mut options = OpenOptions::new();
        let cases = options.create(true).append(true).open(&cases_path).map_err(file_error("open", &cases_path))?;
        let bytes = fs::read(&cases_path).map_err(file_error("read", &cases_path))?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        cases.set_len(whole as u64).map_err(file_error("write", &cases_path))?;
        let lines = bytes[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        let finished = lines
            .enumerate()
            .map(|(index, line)| {
                serde_json::from_slice(line).map_err(|error| {
                    Failure::Mistake(format!(
                        "{}: case {} cannot be read: {error}; remove its line to have it done again",
                        cases_path.display(),
                        index + 1
                    ))
                })
            })
            .collect::<Result<_, _>>()?;
        Ok((RunFolder { path: path.into(), cases }, finished))
    }

    /// Adds a finished case; it is in the file when this returns.
    fn append(&mut self, case: &impl Serialize) -> Result<(), Error> {
        let path = self.path.join("cases.jsonl");
        let line = serde_json::to_string(case).map_err(io::Error::from).map_err(file_error("write", &path))?;
        self.cases.write_all((line + "\n").as_bytes()).map_err(file_error("write", &path))
    }

    /// Writes a file beside the cases.
    fn write(&self, name: &str, text: &str) -> Result<(), Error> {
        let path = self.path.join(name);
        fs::write(&path, text).map_err(file_error("write", &path))
    }
}

/// Refuses to go on with a run that was made with other parameters.
fn compare(path: &Path, bytes: &[u8], parameters: &Map<String, Value>) -> Result<(), Failure> {
    let recorded: Map<String, Value> = serde_json::from_slice(bytes).map_err(|error| {
        Failure::Mistake(format!(
            "{} is not the record of a run: {error}; choose another folder for --out",
            path.display()
        ))
    })?;
    let names = parameters.keys().chain(recorded.keys().filter(|name| !parameters.contains_key(*name)));
    let shown = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
    let different: Vec<String> = names
        .filter(|name| parameters.get(*name) != recorded.get(*name))
        .map(|name| format!("{name}: {} there, {} now", shown(recorded.get(name)), shown(parameters.get(name))))
        .collect();
    match different.is_empty() {
        true => Ok(()),
        false => Err(Failure::Mistake(format!(
            "{} was made with other parameters ({}); use the same ones or choose another folder for --out",
            path.display(),
            different.join("; ")
        ))),
    }
}
