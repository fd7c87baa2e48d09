//! The folder of a run: `run.json` with what shapes it, `cases.jsonl` with a line for each finished case.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use gleaner::{Engine, Error};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::super::Failure;
use super::file_error;
use super::run::Record;

/// An open folder, this program's alone until it is dropped.
pub struct RunFolder {
    path: PathBuf,
    /// Locked.
    cases: File,
}

/// run.json
#[derive(Serialize, Deserialize)]
struct RunRecord {
    /// What shapes the results of all cases: a run goes on only with the same.
    parameters: Map<String, Value>,
    /// Each start of the program on this folder.
    starts: Vec<Start>,
}

/// What is told of a start, whether or not it shapes results.
#[derive(Serialize, Deserialize)]
pub struct Start {
    version: String,
    commit: Option<String>,
    device: String,
    command: Vec<String>,
}

impl Start {
    pub fn now(engine: &Engine) -> Start {
        Start {
            version: env!("CARGO_PKG_VERSION").into(),
            commit: option_env!("GLEANER_COMMIT").map(str::to_owned),
            device: engine.reader().device(),
            command: std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect(),
        }
    }
}

impl RunFolder {
    /// Makes the folder, or takes up the run in it, which must have been made with the same `parameters`. Also returns
    /// the finished cases. A last line without an end was cut off by the end of the program, and is dropped.
    pub fn open(
        path: &Path,
        parameters: Map<String, Value>,
        start: Start,
    ) -> Result<(RunFolder, Vec<Record>), Failure> {
        fs::create_dir_all(path).map_err(file_error("create the folder", path))?;
        let (run_path, cases_path) = (path.join("run.json"), path.join("cases.jsonl"));
        let mut options = OpenOptions::new();
        let options = options.create(true).read(true).append(true);
        let mut cases = options.open(&cases_path).map_err(file_error("open", &cases_path))?;
        match cases.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::Mistake(format!(
                    "another run is at work in {}; wait for its end or choose another folder for --out",
                    path.display()
                )));
            }
            Err(TryLockError::Error(error)) => return Err(file_error("lock", &cases_path)(error).into()),
        }
        let mut bytes = Vec::new();
        cases.read_to_end(&mut bytes).map_err(file_error("read", &cases_path))?;

        let mut run = match fs::read(&run_path) {
            Ok(bytes) => compare(&run_path, &bytes, &parameters)?,
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(file_error("read", &run_path)(error).into());
            }
            Err(_) if bytes.is_empty() => RunRecord { parameters, starts: Vec::new() },
            Err(_) => {
                return Err(Failure::Mistake(format!(
                    "{} holds cases.jsonl but no run.json, so that nobody can say how it was made; choose another folder for --out",
                    path.display()
                )));
            }
        };
        run.starts.push(start);
        // Renamed when whole, so that a run that ends here leaves no half of it.
        let unfinished = path.join("run.json.part");
        let text = serde_json::to_string_pretty(&run).expect("plain values") + "\n";
        fs::write(&unfinished, text).map_err(file_error("write", &unfinished))?;
        fs::rename(&unfinished, &run_path).map_err(file_error("write", &run_path))?;

        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        cases.set_len(whole as u64).map_err(file_error("write", &cases_path))?;
        let lines = bytes[..whole].split(|&byte| byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
        let finished = lines
            .map(|(index, line)| {
                serde_json::from_slice(line).map_err(|error| {
                    Failure::Mistake(format!(
                        "{}:{}: the case cannot be read: {error}; remove its line to have it done again",
                        cases_path.display(),
                        index + 1
                    ))
                })
            })
            .collect::<Result<_, _>>()?;
        Ok((RunFolder { path: path.into(), cases }, finished))
    }

    /// Adds a finished case; it is in the file when this returns.
    pub fn append(&mut self, record: &Record) -> Result<(), Error> {
        let path = self.path.join("cases.jsonl");
        let line = serde_json::to_string(record).map_err(io::Error::from).map_err(file_error("write", &path))?;
        self.cases.write_all((line + "\n").as_bytes()).map_err(file_error("write", &path))
    }

    /// Writes a file beside the cases.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> Result<(), Error> {
        let path = self.path.join(name);
        fs::write(&path, contents).map_err(file_error("write", &path))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The record of a run, if it was made with the same parameters.
fn compare(path: &Path, bytes: &[u8], parameters: &Map<String, Value>) -> Result<RunRecord, Failure> {
    let run: RunRecord = serde_json::from_slice(bytes).map_err(|error| {
        Failure::Mistake(format!(
            "{} is not the record of a run: {error}; choose another folder for --out",
            path.display()
        ))
    })?;
    let recorded = &run.parameters;
    let names = parameters.keys().chain(recorded.keys().filter(|name| !parameters.contains_key(*name)));
    let shown = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
    let different: Vec<String> = names
        .filter(|name| parameters.get(*name) != recorded.get(*name))
        .map(|name| format!("{name}: {} there, {} now", shown(recorded.get(name)), shown(parameters.get(name))))
        .collect();
    match different.is_empty() {
        true => Ok(run),
        false => Err(Failure::Mistake(format!(
            "{} was made with other parameters ({}); use the same ones or choose another folder for --out",
            path.display(),
            different.join("; ")
        ))),
    }
}

/// Files of a model that shape its answers, the weights apart.
const MODEL_FILES: [&str; 5] =
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/// SHA-256 over names and contents of the files of a model that shape its answers. The same model in another folder
/// has the same.
pub fn model_hash(path: &Path) -> Result<String, Error> {
    let entries = fs::read_dir(path).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut files: Vec<PathBuf> = entries.map_err(file_error("read the folder", path))?;
    files.retain(|file| {
        let is_weights = file.extension().is_some_and(|extension| extension == "safetensors");
        is_weights || MODEL_FILES.iter().any(|name| file.ends_with(name))
    });
    files.sort();
    // Weights are many gigabytes in several files.
    let hash_file = |file: &PathBuf| -> io::Result<Vec<u8>> {
        let (mut hash, mut file, mut block) = (Sha256::new(), File::open(file)?, vec![0; 1 << 20]);
        loop {
            match file.read(&mut block)? {
                0 => return Ok(hash.finalize().to_vec()),
                read => hash.update(&block[..read]),
            }
        }
    };
    let hashes = files.par_iter().map(|file| hash_file(file).map_err(file_error("read", file)));
    let hashes: Vec<Vec<u8>> = hashes.collect::<Result<_, _>>()?;
    let mut all = Sha256::new();
    for (file, hash) in files.iter().zip(hashes) {
        all.update(file.file_name().unwrap_or_default().as_encoded_bytes());
        all.update(b"\0");
        all.update(hash);
    }
    Ok(hex(&all.finalize()))
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
