//! Files of a benchmark: a JSON object a line, or one array of them.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use gleaner::Error;
use gleaner::text::python_strip;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::super::Failure;
use super::case::{BadRow, Case, Row};
use super::file_error;

/// The first `limit` rows of each file. `case` makes a case of an object, or says what is wrong with it; it gets the
/// file's stem and a name of the row for those that have none of their own.
///
/// A file without any row that can be used is a mistake. A bad row among good ones is told of and takes its place in the
/// results.
pub fn read(
    paths: &[PathBuf],
    limit: Option<usize>,
    case: impl Fn(&str, String, Value) -> Result<Case, String>,
) -> Result<Vec<Row>, Failure> {
    let mut ids = HashSet::new();
    let mut rows = Vec::new();
    for path in paths {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let mut row = |(place, value): Placed| {
            let id = format!("{stem}, {place}");
            let case = value.and_then(|value| case(&stem, id.clone(), value));
            let case = case.and_then(|case| match ids.insert(case.id.clone()) {
                true => Ok(case),
                false => Err(format!("a row before it has the id {:?} too", case.id)),
            });
            let bad =
                |error| BadRow { id, task: stem.to_string(), error: format!("{}, {place}: {error}", path.display()) };
            case.map_err(bad)
        };
        let of_file: Vec<Row> = values(path)?.into_iter().take(limit.unwrap_or(usize::MAX)).map(&mut row).collect();
        let bad: Vec<&BadRow> = of_file.iter().filter_map(|row| row.as_ref().err()).collect();
        match bad.first() {
            _ if of_file.is_empty() => {
                let name = path.display();
                return Err(Failure::Mistake(format!("{name} is empty: there should be a JSON object a line")));
            }
            Some(first) if bad.len() == of_file.len() => {
                return Err(Failure::Mistake(format!("none of the {} rows can be used: {}", bad.len(), first.error)));
            }
            Some(first) => {
                eprintln!(
                    "warning: {} of {} rows cannot be used, the first: {}",
                    bad.len(),
                    of_file.len(),
                    first.error
                );
            }
            None => {}
        }
        rows.extend(of_file);
    }
    Ok(rows)
}

/// A place in a file and the object there, or why there is none.
type Placed = (String, Result<Value, String>);

fn values(path: &Path) -> Result<Vec<Placed>, Failure> {
    let name = path.display();
    let bytes = fs::read(path).map_err(file_error("read", path))?;
    let text = String::from_utf8(bytes)
        .map_err(|error| Error::InvalidUtf8 { name: name.to_string(), offset: error.utf8_error().valid_up_to() })?;
    if python_strip(&text).starts_with('[') {
        let values: Vec<Value> = serde_json::from_str(&text)
            .map_err(|error| Failure::Mistake(format!("{name} is no array of JSON objects: {error}")))?;
        return Ok((1..).zip(values).map(|(number, value)| (format!("row {number}"), Ok(value))).collect());
    }
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !python_strip(line).is_empty());
    let parsed = |line| serde_json::from_str(line).map_err(|error| format!("no JSON: {}", without_line(&error)));
    Ok(lines.map(|(number, line)| (format!("line {number}"), parsed(line))).collect())
}

/// The fields of a row.
pub fn fields<T: DeserializeOwned>(row: Value) -> Result<T, String> {
    serde_json::from_value(row).map_err(|error| error.to_string())
}

/// To the parser a line of the file is its line 1, which only misleads.
pub fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let reason = text.rfind(" at line ").map_or(text.as_str(), |at| &text[..at]);
    format!("{reason} at column {}", error.column())
}
