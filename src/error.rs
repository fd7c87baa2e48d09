//! The one error type. Every variant names the thing that was wrong, where, and what was expected.

use std::path::PathBuf;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong, in words a person can act on.
///
/// [`Error::is_user_error`] parts the mistakes of the caller (a wrong path, a bad document, a parameter out of
/// range) from failures of the machine or of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read or mapped.
    #[error("cannot {action} {path}: {source}", path = .path.display())]
    Io {
        /// What was being done: "open", "read", "map".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's word on it.
        source: std::io::Error,
    },
    /// A document is not UTF-8.
    #[error(
        "{name} is not valid UTF-8: the byte at offset {offset} does not belong to a character; convert the document to UTF-8 first"
    )]
    InvalidUtf8 {
        /// The document's name.
        name: String,
        /// Offset of the first byte that is not part of a valid character.
        offset: usize,
    },
    /// A document without a single visible character.
    #[error("{name} is empty: there is nothing to read in it")]
    EmptyDocument {
        /// The document's name.
        name: String,
    },
    /// A question without a single visible character.
    #[error("the question is empty: write what you want to know")]
    EmptyQuestion,
    /// A question that leaves no room for the document.
    #[error(
        "the question and the prompt around it take {tokens} tokens, more than the window of {window_length}: shorten the question or raise the window"
    )]
    QuestionTooLong {
        /// Tokens of everything in the prompt but the context.
        tokens: usize,
        /// The window it was measured against.
        window_length: usize,
    },
    /// A parameter out of its range.
    #[error("{name} is {value}, but must be {expected}")]
    Parameter {
        /// The parameter's name.
        name: &'static str,
        /// What was given.
        value: String,
        /// The allowed range, in words.
        expected: String,
    },
    /// A model file whose contents do not make sense or are not supported.
    #[error("{path}: {message}", path = .path.display())]
    ModelFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what was expected.
        message: String,
    },
    /// A tensor that the architecture needs and the files do not hold.
    #[error("{path}: the tensor {name} is missing, which this architecture needs", path = .path.display())]
    MissingTensor {
        /// The model's directory.
        path: PathBuf,
        /// The tensor's name.
        name: String,
    },
    /// A tensor of another shape than the configuration asks for.
    #[error("{path}: tensor {name} has shape {found:?}, but config.json asks for {expected:?}", path = .path.display())]
    TensorShape {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that follows from config.json.
        expected: Vec<usize>,
    },
    /// A prompt or chat template that cannot be used.
    #[error("{origin}: {message}")]
    Template {
        /// Which template: a path, or "prompt template".
        origin: String,
        /// What is wrong with it.
        message: String,
    },
    /// A plan whose tables contradict each other or the model.
    #[error("this plan cannot be read: {0}")]
    Plan(String),
    /// A device that is not there or cannot be used.
    #[error("{0}")]
    Device(String),
    /// A CUDA call that failed.
    #[error("{op} failed: {message}")]
    Cuda {
        /// The operation with its dimensions.
        op: String,
        /// CUDA's name and text for the error.
        message: String,
    },
    /// The model produced a value that is not a number.
    #[error("step {step} produced scores that are not finite; the weights or the input are outside what fp32 can hold")]
    NotFinite {
        /// Index of the step, from 0.
        step: usize,
    },
    /// The caller's callback asked to stop.
    #[error("cancelled by the caller")]
    Cancelled,
}

impl Error {
    /// True for what the caller can mend (exit code 2 of the program), false for failures of the machine or of this
    /// crate (exit code 1).
    pub fn is_user_error(&self) -> bool {
        match self {
            Error::Io { source, .. } => matches!(
                source.kind(),
                std::io::ErrorKind::NotFound
                    | std::io::ErrorKind::PermissionDenied
                    | std::io::ErrorKind::IsADirectory
                    | std::io::ErrorKind::NotADirectory
            ),
            Error::Cuda { .. } | Error::NotFinite { .. } | Error::Cancelled => false,
            _ => true,
        }
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Error {
        Error::Io { action, path: path.into(), source }
    }

    pub(crate) fn model_file(path: impl Into<PathBuf>, message: impl Into<String>) -> Error {
        Error::ModelFile { path: path.into(), message: message.into() }
    }

    pub(crate) fn parameter(name: &'static str, value: impl ToString, expected: impl Into<String>) -> Error {
        Error::Parameter { name, value: value.to_string(), expected: expected.into() }
    }
}
