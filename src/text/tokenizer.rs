//! The model's own tokenizer (tokenizer.json), with special tokens parsed only where the text is ours.

use std::ops::Range;
use std::path::Path;

use crate::{Error, Result};

/// A Hugging Face tokenizer in two states over one vocabulary.
///
/// The text of a chat template may spell special tokens such as an end-of-turn mark; the text of a document or a
/// question may not, or a document could end its own prompt. So there are two ways to encode.
pub struct Tokenizer {
    parsing_special: tokenizers::Tokenizer,
    plain: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and checks that its ids fit an embedding of `vocab_size` rows.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::ModelFile`], naming the file.
    pub fn open(path: &Path, vocab_size: usize) -> Result<Tokenizer> {
        let bytes = std::fs::read(path).map_err(|source| Error::io("read the tokenizer", path, source))?;
        let mut plain = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|error| Error::model_file(path, format!("not a tokenizer.json of Hugging Face: {error}")))?;
        // Truncation or padding stored in the file would change the document's tokens in silence.
        plain.with_padding(None);
        let _ = plain.with_truncation(None);
        let parsing_special = plain.clone();
        plain.set_encode_special_tokens(true);

        let vocabulary = plain.get_vocab(true);
        if let Some((token, &id)) = vocabulary.iter().max_by_key(|&(_, &id)| id)
            && id as usize >= vocab_size
        {
            return Err(Error::model_file(
                path,
                format!(
                    "the token {token:?} has id {id}, but config.json says vocab_size {vocab_size}: this tokenizer does not belong to this model"
                ),
            ));
        }
        Ok(Tokenizer { parsing_special, plain })
    }

    /// Tokens of text that is data: special tokens in it stay plain text.
    ///
    /// # Errors
    /// [`Error::Template`] if the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        encode_with(&self.plain, text)
    }

    /// Tokens of template text: special tokens in it are parsed.
    ///
    /// # Errors
    /// [`Error::Template`] if the tokenizer refuses the text.
    pub fn encode_template(&self, text: &str) -> Result<Vec<u32>> {
        encode_with(&self.parsing_special, text)
    }

    /// The bytes of `text` between its first `head` tokens and its last `tail`, widened to whole characters. Empty, at
    /// the end of `text`, where the two together are all its tokens.
    ///
    /// # Errors
    /// [`Error::Template`] if the tokenizer refuses the text.
    pub fn middle(&self, text: &str, head: usize, tail: usize) -> Result<Range<usize>> {
        let encoding = self.plain.encode(text, false).map_err(tokenizer_error)?;
        let offsets = encoding.get_offsets();
        if offsets.len() <= head + tail {
            return Ok(text.len()..text.len());
        }
        let start = if head == 0 { 0 } else { offsets[head - 1].1 };
        let end = if tail == 0 { text.len() } else { offsets[offsets.len() - tail].0 };
        let start = text.floor_char_boundary(start);
        Ok(start..text.ceil_char_boundary(end).max(start))
    }

    /// The text of `tokens`, special tokens left out.
    ///
    /// # Errors
    /// [`Error::Template`] if an id is unknown to the decoder.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.parsing_special.decode(tokens, true).map_err(tokenizer_error)
    }

    /// Turns tokens into text one by one: each call takes the next token and returns the text that became certain, if
    /// any (a character may be spread over several tokens).
    pub fn decode_stream(&self) -> impl FnMut(u32) -> Result<Option<String>> + '_ {
        let mut stream = self.parsing_special.decode_stream(true);
        move |token| stream.step(token).map_err(tokenizer_error)
    }

    /// The id of a token spelled exactly `token`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.parsing_special.token_to_id(token)
    }
}

fn encode_with(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode_fast(text, false).map_err(tokenizer_error)?;
    Ok(encoding.get_ids().to_vec())
}

fn tokenizer_error(error: tokenizers::Error) -> Error {
    Error::Template { origin: "tokenizer".into(), message: error.to_string() }
}
