//! A document: UTF-8 text with a name, and the lines of its byte offsets.

use std::path::Path;

use super::python_strip;
use crate::{Error, Result};

/// A text to be asked about. Every span that Gleaner reports is a range of bytes of it.
#[derive(Debug, Clone)]
pub struct Document {
    name: String,
    text: String,
}

impl Document {
    /// A document from text already in memory. `name` is what errors call it.
    ///
    /// # Errors
    /// [`Error::EmptyDocument`] if nothing in it is visible.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Result<Document> {
        let document = Document { name: name.into(), text: text.into() };
        match python_strip(&document.text).is_empty() {
            true => Err(Error::EmptyDocument { name: document.name }),
            false => Ok(document),
        }
    }

    /// A document from bytes, which must be UTF-8.
    ///
    /// # Errors
    /// [`Error::InvalidUtf8`] with the offset of the first wrong byte; [`Error::EmptyDocument`].
    pub fn from_bytes(name: impl Into<String>, bytes: Vec<u8>) -> Result<Document> {
        let name = name.into();
        match String::from_utf8(bytes) {
            Ok(text) => Document::new(name, text),
            Err(error) => Err(Error::InvalidUtf8 { name, offset: error.utf8_error().valid_up_to() }),
        }
    }

    /// A document from a file.
    ///
    /// # Errors
    /// [`Error::Io`], and those of [`Document::from_bytes`].
    pub fn open(path: impl AsRef<Path>) -> Result<Document> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| Error::io("read the document", path, source))?;
        Document::from_bytes(path.display().to_string(), bytes)
    }

    /// The name it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Lines (from 1) of the given byte offsets, which must ascend; one pass over the text.
    pub(crate) fn lines_of(&self, offsets: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let (mut line, mut at) = (1, 0);
        let mut line_of = |offset: usize| {
            line += self.text.as_bytes()[at..offset].iter().filter(|&&byte| byte == b'\n').count();
            at = offset;
            line
        };
        offsets.into_iter().map(&mut line_of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_first_bad_byte() {
        let error = Document::from_bytes("notes.txt", b"fine \xff".to_vec()).unwrap_err();
        assert!(matches!(&error, Error::InvalidUtf8 { offset: 5, .. }), "{error}");
    }

    #[test]
    fn counts_lines_from_one() {
        let document = Document::new("d", "a\nb\n\nc").unwrap();
        assert_eq!(document.lines_of([0, 2, 5]), [1, 2, 4]);
    }
}
