//! The whole reading job as flat tables of integers: what goes up to a device once and is replayed there.
//!
//! A plan needs no model to be made, saved, loaded or checked, so both readers are tested on the same plans.

use std::ops::Range;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::text::{Document, Frame, Tokenizer, cut_long_sentence, python_trim_end, split_sentences};
use crate::{Error, Result};

/// How a document is read. The defaults are the reference's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadParams {
    /// Most tokens of a chunk: 16 to 32768, default 1024.
    pub window_length: usize,
    /// Best tokens of a step; the sentences that own them stay: 1 to 16384, default 300.
    pub topk: usize,
    /// Width of the box filter over token scores: 1 to 256, default 8.
    pub phrase_width: usize,
    /// Most tokens that stay after a step; `None` is twice the window. The reference knows no such limit, so that a
    /// text of long sentences can outgrow its model.
    pub max_retained: Option<usize>,
    /// Longer sentences are cut into pieces: 8 or more, default 256, never more than the window.
    pub max_sentence_tokens: usize,
    /// A piece of at most so many characters behind a full stop does not start a sentence: default 8.
    pub short_tail: usize,
}

impl Default for ReadParams {
    fn default() -> Self {
        ReadParams {
            window_length: 1024,
            topk: 300,
            phrase_width: 8,
            max_retained: None,
            max_sentence_tokens: 256,
            short_tail: 8,
        }
    }
}

/// Smallest and largest `window_length`.
const WINDOW_LENGTH: Range<usize> = 16..32769;
/// Smallest and largest `topk`.
const TOPK: Range<usize> = 1..16385;
/// Smallest and largest `phrase_width`.
const PHRASE_WIDTH: Range<usize> = 1..257;
/// Smallest and largest `max_sentence_tokens`: a character may take several tokens, so less could not be kept.
const MAX_SENTENCE_TOKENS: Range<usize> = 8..32769;
/// Largest `max_retained`.
const MAX_RETAINED: usize = 1 << 20;

impl ReadParams {
    /// Checks every value against its range.
    ///
    /// # Errors
    /// [`Error::Parameter`], naming the parameter and its range.
    pub fn validate(&self) -> Result<()> {
        let check = |name, value: usize, range: Range<usize>| match range.contains(&value) {
            true => Ok(()),
            false => Err(Error::parameter(name, value, format!("from {} to {}", range.start, range.end - 1))),
        };
        check("window_length", self.window_length, WINDOW_LENGTH)?;
        check("topk", self.topk, TOPK)?;
        check("phrase_width", self.phrase_width, PHRASE_WIDTH)?;
        check("max_sentence_tokens", self.max_sentence_tokens, MAX_SENTENCE_TOKENS)?;
        check("max_retained", self.max_retained(), self.sentence_limit()..MAX_RETAINED + 1)
    }

    /// `max_retained` with its default filled in.
    pub fn max_retained(&self) -> usize {
        self.max_retained.unwrap_or(2 * self.window_length)
    }

    /// Most tokens of one sentence: it must fit a chunk.
    fn sentence_limit(&self) -> usize {
        self.max_sentence_tokens.min(self.window_length)
    }
}

/// A run of whole sentences that is read in one step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Its sentences.
    pub sentences: Range<u32>,
    /// Tokens of its last sentence together with the white space that closes the context: the form in which it is
    /// read in this step. When it is kept, its own tokens go on.
    pub closing: Vec<u32>,
}

/// Everything a reader needs to read one document for one question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Tokens before the context.
    pub prefix: Vec<u32>,
    /// Tokens behind the context.
    pub tail: Vec<u32>,
    /// Index in `tail` of the first question row; the rows run to its end.
    pub question_start: u32,
    /// Tokens of all sentences in document order.
    pub tokens: Vec<u32>,
    /// `tokens[sentence_offsets[s]..sentence_offsets[s + 1]]` is sentence `s`; one more entry than sentences.
    pub sentence_offsets: Vec<u32>,
    /// One per step, covering all sentences in order.
    pub chunks: Vec<Chunk>,
    /// Best tokens of a step.
    pub topk: u32,
    /// Width of the box filter.
    pub phrase_width: u32,
    /// Most tokens that stay after a step.
    pub max_retained: u32,
}

impl Plan {
    /// Cuts `document` into sentences and chunks and puts `frame` around them. Returns the plan and the byte span of
    /// each of its sentences; the spans cover the document without gap.
    ///
    /// # Errors
    /// [`Error::Parameter`]; [`Error::QuestionTooLong`] if the frame alone exceeds the window; the tokenizer's errors.
    pub fn new(
        document: &Document,
        frame: &Frame,
        tokenizer: &Tokenizer,
        params: &ReadParams,
    ) -> Result<(Plan, Vec<Range<usize>>)> {
        params.validate()?;
        if frame.len() > params.window_length {
            return Err(Error::QuestionTooLong { tokens: frame.len(), window_length: params.window_length });
        }
        let text = document.text();
        let pieces: Vec<Vec<(Range<usize>, Vec<u32>)>> = split_sentences(text, params.short_tail)
            .into_par_iter()
            .map(|span| {
                let mut pieces = Vec::with_capacity(1);
                cut_long_sentence(
                    &text[span.clone()],
                    params.sentence_limit(),
                    |piece| tokenizer.encode(piece),
                    |piece, tokens| pieces.push((span.start + piece.start..span.start + piece.end, tokens)),
                )?;
                Ok(pieces)
            })
            .collect::<Result<_>>()?;

        let mut spans = Vec::new();
        let mut tokens = Vec::new();
        let mut sentence_offsets = vec![0];
        for (span, sentence) in pieces.into_iter().flatten() {
            spans.push(span);
            tokens.extend(sentence);
            let end = u32::try_from(tokens.len())
                .map_err(|_| Error::Plan("the document has more than 4,294,967,295 tokens".into()))?;
            sentence_offsets.push(end);
        }
        let chunks = chunk_sentences(&sentence_offsets, params.window_length)
            .into_iter()
            .map(|sentences| {
                let last = &text[spans[sentences.end as usize - 1].clone()];
                // The reference strips the context before it closes it.
                let closed = format!("{}{}", python_trim_end(last), frame.closing);
                Ok(Chunk { sentences, closing: tokenizer.encode(&closed)? })
            })
            .collect::<Result<_>>()?;
        let plan = Plan {
            prefix: frame.prefix.clone(),
            tail: frame.tail.clone(),
            question_start: frame.question_start as u32,
            tokens,
            sentence_offsets,
            chunks,
            topk: params.topk as u32,
            phrase_width: params.phrase_width as u32,
            max_retained: params.max_retained() as u32,
        };
        Ok((plan, spans))
    }

    /// Number of sentences.
    pub fn sentences(&self) -> usize {
        self.sentence_offsets.len().saturating_sub(1)
    }

    /// Tokens of sentence `s`.
    pub fn sentence(&self, s: u32) -> &[u32] {
        let s = s as usize;
        &self.tokens[self.sentence_offsets[s] as usize..self.sentence_offsets[s + 1] as usize]
    }

    /// Number of tokens of sentence `s`.
    pub fn sentence_len(&self, s: u32) -> usize {
        self.sentence(s).len()
    }

    /// The chunk that holds sentence `s`.
    pub fn chunk_of(&self, s: u32) -> usize {
        self.chunks.partition_point(|chunk| chunk.sentences.end <= s)
    }

    /// Upper bound of a step's tokens: what a workspace must hold.
    pub fn max_step_tokens(&self) -> usize {
        let chunk = |chunk: &Chunk| {
            let last = chunk.sentences.end as usize - 1;
            let body = self.sentence_offsets[last] - self.sentence_offsets[chunk.sentences.start as usize];
            body as usize + chunk.closing.len()
        };
        let retained = if self.chunks.len() > 1 { self.max_retained as usize } else { 0 };
        self.prefix.len() + retained + self.chunks.iter().map(chunk).max().unwrap_or(0) + self.tail.len()
    }

    /// Checks that the tables agree with each other and with an embedding of `vocab_size` rows, so that a plan from
    /// anywhere can be read without further checks.
    ///
    /// # Errors
    /// [`Error::Plan`] with what is wrong.
    pub fn validate(&self, vocab_size: usize) -> Result<()> {
        let fail = |message: String| Err(Error::Plan(message));
        let ascending = self.sentence_offsets.is_sorted()
            && self.sentence_offsets.first() == Some(&0)
            && self.sentence_offsets.last().map(|&end| end as usize) == Some(self.tokens.len());
        if !ascending {
            return fail(format!("sentence_offsets must rise from 0 to the {} tokens", self.tokens.len()));
        }
        if self.question_start as usize >= self.tail.len() {
            return fail(format!(
                "question_start is {}, but must be below the tail's {} tokens",
                self.question_start,
                self.tail.len()
            ));
        }
        if self.topk == 0 || self.phrase_width == 0 {
            return fail("topk and phrase_width must be at least 1".into());
        }
        let mut next = 0;
        for (index, chunk) in self.chunks.iter().enumerate() {
            if chunk.sentences.start != next || chunk.sentences.end <= next {
                return fail(format!("chunk {index} must start at sentence {next} and hold at least one"));
            }
            if chunk.closing.is_empty() {
                return fail(format!("the closing form of chunk {index} has no token"));
            }
            next = chunk.sentences.end;
        }
        if self.chunks.is_empty() || next as usize != self.sentences() {
            return fail(format!("the chunks cover {next} of {} sentences", self.sentences()));
        }
        let closings = self.chunks.iter().flat_map(|chunk| &chunk.closing);
        match self.tokens.iter().chain(&self.prefix).chain(&self.tail).chain(closings).max() {
            Some(&id) if id as usize >= vocab_size => {
                fail(format!("token {id} is beyond the vocabulary of {vocab_size}"))
            }
            _ => Ok(()),
        }
    }
}

/// Fills chunks with whole sentences up to `window_length` tokens.
fn chunk_sentences(sentence_offsets: &[u32], window_length: usize) -> Vec<Range<u32>> {
    let mut chunks = Vec::new();
    let mut start = 0;
    for end in 1..sentence_offsets.len() {
        let is_last = end + 1 == sentence_offsets.len();
        if is_last || (sentence_offsets[end + 1] - sentence_offsets[start]) as usize > window_length {
            chunks.push(start as u32..end as u32);
            start = end;
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_whole_sentences_up_to_the_window() {
        assert_eq!(chunk_sentences(&[0, 4, 8, 10, 20, 21], 10), [0..3, 3..4, 4..5]);
        assert_eq!(chunk_sentences(&[0, 10, 20], 10), [0..1, 1..2]);
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        let wrong = |params: ReadParams| params.validate().unwrap_err().to_string();
        let default = ReadParams::default;
        assert!(wrong(ReadParams { window_length: 0, ..default() }).contains("window_length is 0"));
        assert!(wrong(ReadParams { topk: 0, ..default() }).contains("topk is 0"));
        assert!(wrong(ReadParams { phrase_width: 1000, ..default() }).contains("from 1 to 256"));
        assert!(wrong(ReadParams { max_retained: Some(1), ..default() }).contains("max_retained is 1"));
    }

    #[test]
    fn plans_that_contradict_themselves_are_refused() {
        let good = Plan {
            prefix: vec![1],
            tail: vec![2, 3],
            question_start: 1,
            tokens: vec![4, 5, 6],
            sentence_offsets: vec![0, 1, 3],
            chunks: vec![Chunk { sentences: 0..2, closing: vec![5, 6] }],
            topk: 2,
            phrase_width: 1,
            max_retained: 8,
        };
        assert!(good.validate(7).is_ok());
        assert_eq!(good.max_step_tokens(), 6);
        assert!(good.validate(6).is_err(), "a token beyond the vocabulary");
        assert!(Plan { question_start: 2, ..good.clone() }.validate(7).is_err());
        assert!(Plan { sentence_offsets: vec![0, 2, 1, 3], ..good.clone() }.validate(7).is_err());
        assert!(Plan { sentence_offsets: vec![], ..good.clone() }.validate(7).is_err());
        assert!(Plan { chunks: vec![], ..good.clone() }.validate(7).is_err());
        let gap = Chunk { sentences: 1..2, closing: vec![5] };
        assert!(Plan { chunks: vec![gap], ..good.clone() }.validate(7).is_err());
        assert!(Plan { topk: 0, ..good }.validate(7).is_err());
    }
}
