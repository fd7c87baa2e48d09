//! The whole reading job as flat tables of integers: what goes up to a device once and is replayed there.
//!
//! A plan needs no model to be made, saved, loaded or checked, so both readers are tested on the same plans.

use std::collections::HashSet;
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
    /// Nor does one of at most so many start a chunk: default 10.
    pub chunk_short_tail: usize,
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
            chunk_short_tail: 10,
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

/// Everything a reader needs to read one document for one question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Tokens before the context.
    pub prefix: Vec<u32>,
    /// Tokens behind the context.
    pub tail: Vec<u32>,
    /// Index in `tail` of the first question row; the rows run to its end.
    pub question_start: u32,
    /// Tokens of all sentences in document order. The last sentence of each chunk carries the white space that closes
    /// the context (a tokenizer takes a full stop and the blank line behind it as one token), and keeps it when it is
    /// kept, as in the reference.
    pub tokens: Vec<u32>,
    /// `tokens[sentence_offsets[s]..sentence_offsets[s + 1]]` is sentence `s`; one more entry than sentences.
    pub sentence_offsets: Vec<u32>,
    /// Sentences `chunk_offsets[c]..chunk_offsets[c + 1]` are chunk `c`, read in step `c`; one more entry than chunks.
    pub chunk_offsets: Vec<u32>,
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
        let sentence_spans = split_sentences(text, params.short_tail);
        let pieces: Vec<Vec<(Range<usize>, Vec<u32>)>> = sentence_spans
            .par_iter()
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

        let (spans, mut sentences): (Vec<_>, Vec<_>) = pieces.into_iter().flatten().unzip();
        let lengths: Vec<usize> = sentences.iter().map(Vec::len).collect();
        // Boundaries between sentences that are none to the splitter of chunks.
        let chunk_starts: HashSet<usize> =
            split_sentences(text, params.chunk_short_tail).into_iter().map(|span| span.start).collect();
        let starts_sentence: HashSet<usize> = sentence_spans.iter().map(|span| span.start).collect();
        let joined: Vec<bool> = spans
            .iter()
            .map(|span: &Range<usize>| starts_sentence.contains(&span.start) && !chunk_starts.contains(&span.start))
            .collect();
        let chunk_offsets = chunk_offsets(&lengths, &joined, params.window_length);
        for &end in &chunk_offsets[1..] {
            let last = end as usize - 1;
            // The reference strips the context before it closes it.
            let closed = format!("{}{}", python_trim_end(&text[spans[last].clone()]), frame.closing);
            sentences[last] = tokenizer.encode(&closed)?;
        }
        let tokens = sentences.concat();
        if tokens.len() > u32::MAX as usize {
            return Err(Error::Plan(format!("the document has {} tokens, more than 4,294,967,295", tokens.len())));
        }
        let ends = sentences.iter().scan(0, |end, sentence| {
            *end += sentence.len() as u32;
            Some(*end)
        });
        let sentence_offsets = [0].into_iter().chain(ends).collect();
        let plan = Plan {
            prefix: frame.prefix.clone(),
            tail: frame.tail.clone(),
            question_start: frame.question_start as u32,
            tokens,
            sentence_offsets,
            chunk_offsets,
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

    /// Number of chunks, which is that of steps.
    pub fn chunks(&self) -> usize {
        self.chunk_offsets.len().saturating_sub(1)
    }

    /// Sentences of chunk `c`.
    pub fn chunk(&self, c: usize) -> Range<u32> {
        self.chunk_offsets[c]..self.chunk_offsets[c + 1]
    }

    /// The chunk that holds sentence `s`.
    pub fn chunk_of(&self, s: u32) -> usize {
        self.chunk_offsets.partition_point(|&start| start <= s) - 1
    }

    /// Upper bound of a step's tokens: what a workspace must hold.
    pub fn max_step_tokens(&self) -> usize {
        let tokens = |sentences: &[u32]| {
            self.sentence_offsets[sentences[1] as usize] - self.sentence_offsets[sentences[0] as usize]
        };
        let chunk = self.chunk_offsets.windows(2).map(tokens).max().unwrap_or(0) as usize;
        // A plan from elsewhere may allow more than it has.
        let retained = if self.chunks() > 1 { (self.max_retained as usize).min(self.tokens.len()) } else { 0 };
        self.prefix.len() + retained + chunk + self.tail.len()
    }

    /// The sizes that a reader's memory depends on.
    pub fn shape(&self) -> PlanShape {
        PlanShape {
            max_step_tokens: self.max_step_tokens(),
            question_rows: self.tail.len() - self.question_start as usize,
            prefix_tokens: self.prefix.len(),
            tail_tokens: self.tail.len(),
            topk: self.topk as usize,
            chunks: self.chunks(),
            sentences: self.sentences(),
            tokens: self.tokens.len(),
        }
    }

    /// Checks that the tables agree with each other and with an embedding of `vocab_size` rows, so that a plan from
    /// anywhere can be read without further checks.
    ///
    /// # Errors
    /// [`Error::Plan`] with what is wrong.
    pub fn validate(&self, vocab_size: usize) -> Result<()> {
        let fail = |message: String| Err(Error::Plan(message));
        let covers = |offsets: &[u32], what: &str, end: usize| match offsets {
            [0, .., last] if *last as usize == end && offsets.is_sorted_by(|a, b| a < b) => Ok(()),
            _ => Err(Error::Plan(format!("{what} must rise from 0 to {end}"))),
        };
        covers(&self.sentence_offsets, "sentence_offsets", self.tokens.len())?;
        covers(&self.chunk_offsets, "chunk_offsets", self.sentences())?;
        if self.question_start as usize >= self.tail.len() {
            return fail(format!(
                "question_start is {}, but must be below the tail's {} tokens",
                self.question_start,
                self.tail.len()
            ));
        }
        if self.topk == 0 {
            return fail("topk must be at least 1".into());
        }
        // Far wider, positions of the filter would leave the integers that kernels count in.
        if !PHRASE_WIDTH.contains(&(self.phrase_width as usize)) {
            return fail(format!(
                "phrase_width is {}, but must be from 1 to {}",
                self.phrase_width,
                PHRASE_WIDTH.end - 1
            ));
        }
        match self.tokens.iter().chain(&self.prefix).chain(&self.tail).max() {
            Some(&id) if id as usize >= vocab_size => {
                fail(format!("token {id} is beyond the vocabulary of {vocab_size}"))
            }
            _ => Ok(()),
        }
    }
}

/// The sizes of a plan that a reader's memory depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanShape {
    /// Upper bound of a step's tokens.
    pub max_step_tokens: usize,
    /// Rows of a step that attention is read from.
    pub question_rows: usize,
    /// Tokens before the context.
    pub prefix_tokens: usize,
    /// Tokens behind it.
    pub tail_tokens: usize,
    /// Best tokens of a step.
    pub topk: usize,
    /// Number of chunks, which is that of steps.
    pub chunks: usize,
    /// Number of sentences.
    pub sentences: usize,
    /// Tokens of the document.
    pub tokens: usize,
}

/// Tokens of an ordinary sentence.
const SENTENCE_TOKENS: usize = 20;

impl PlanShape {
    /// What to expect of a document of `tokens` tokens in ordinary sentences, with `frame_tokens` behind the context, all
    /// of them question rows.
    pub fn estimate(params: &ReadParams, tokens: usize, frame_tokens: usize) -> PlanShape {
        let sentences = tokens.div_ceil(SENTENCE_TOKENS);
        // Each sentence counts one more, and the one that no longer fits leaves half its length unused.
        let filled = (params.window_length + 1 - SENTENCE_TOKENS.min(params.window_length) / 2).max(1);
        let chunks = (tokens + sentences).div_ceil(filled).max(1);
        let retained = if chunks > 1 { params.max_retained() } else { 0 };
        PlanShape {
            max_step_tokens: params.window_length.min(tokens) + retained + frame_tokens,
            question_rows: frame_tokens,
            prefix_tokens: 0,
            tail_tokens: frame_tokens,
            topk: params.topk,
            chunks,
            sentences,
            tokens,
        }
    }
}

/// Fills chunks with whole sentences of the given `lengths` up to `window_length` tokens; a sentence that is `joined` to
/// the one before does not start a chunk while the two fit one.
///
/// Each sentence but the first takes one token more than it has: the reference counts a separator that it never writes,
/// and a chunk that ends elsewhere than the reference's keeps other sentences.
fn chunk_offsets(lengths: &[usize], joined: &[bool], window_length: usize) -> Vec<u32> {
    let mut offsets = vec![0];
    let (mut counted, mut sentence) = (0, 0);
    while sentence < lengths.len() {
        let mut end = sentence + 1;
        let mut unit = lengths[sentence];
        while end < lengths.len() && joined[end] && unit + lengths[end] <= window_length {
            unit += lengths[end];
            end += 1;
        }
        if sentence == 0 {
            counted = unit;
        } else if counted + 1 + unit <= window_length {
            counted += 1 + unit;
        } else {
            offsets.push(sentence as u32);
            counted = unit;
        }
        sentence = end;
    }
    offsets.push(lengths.len() as u32);
    offsets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_whole_sentences_up_to_the_window() {
        let apart = [false; 5];
        assert_eq!(chunk_offsets(&[4, 4, 1, 10, 1], &apart, 10), [0, 2, 3, 4, 5]);
        assert_eq!(chunk_offsets(&[4, 3, 1, 10, 1], &apart, 10), [0, 3, 4, 5]);
        assert_eq!(chunk_offsets(&[10], &apart, 10), [0, 1]);
        assert_eq!(chunk_offsets(&[4, 4, 3, 2], &[false, false, true, false], 10), [0, 1, 4]);
        assert_eq!(chunk_offsets(&[6, 6, 6], &[false, true, true], 10), [0, 1, 2, 3], "a unit beyond the window");
    }

    /// Sentences of 1 to 39 tokens, 20 in the mean, cut into chunks as a document is.
    #[test]
    fn the_expected_shape_is_near_the_one_that_comes() {
        let noise = (0..50_000).scan(7u32, |state, _| {
            *state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            Some(*state as usize >> 8)
        });
        let lengths: Vec<usize> = noise.map(|noise| noise % 39 + 1).collect();
        let tokens = lengths.iter().sum();
        for window_length in [256, 1024, 4096] {
            let params = ReadParams { window_length, ..ReadParams::default() };
            let shape = PlanShape::estimate(&params, tokens, 64);
            let chunks = chunk_offsets(&lengths, &vec![false; lengths.len()], window_length).len() - 1;
            let off = shape.chunks.abs_diff(chunks) as f64 / chunks as f64;
            assert!(off < 0.02, "{} chunks expected, {chunks} came", shape.chunks);
            assert_eq!(shape.max_step_tokens, 3 * window_length + 64);
        }
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
            chunk_offsets: vec![0, 2],
            topk: 2,
            phrase_width: 1,
            max_retained: 8,
        };
        assert!(good.validate(7).is_ok());
        assert_eq!(good.max_step_tokens(), 6);
        let generous = Plan { chunk_offsets: vec![0, 1, 2], max_retained: u32::MAX, ..good.clone() };
        assert_eq!(generous.max_step_tokens(), 8, "no more than the 3 tokens that there are");
        let shape = good.shape();
        assert_eq!((shape.question_rows, shape.prefix_tokens, shape.tail_tokens), (1, 1, 2));
        assert_eq!((shape.chunks, shape.sentences, shape.tokens), (1, 2, 3));
        assert!(good.validate(6).is_err(), "a token beyond the vocabulary");
        assert!(Plan { question_start: 2, ..good.clone() }.validate(7).is_err());
        assert!(Plan { phrase_width: 0, ..good.clone() }.validate(7).is_err());
        assert!(Plan { phrase_width: 257, ..good.clone() }.validate(7).is_err());
        assert!(Plan { sentence_offsets: vec![0, 2, 1, 3], ..good.clone() }.validate(7).is_err());
        assert!(Plan { sentence_offsets: vec![0, 1, 1, 3], ..good.clone() }.validate(7).is_err(), "an empty sentence");
        assert!(Plan { sentence_offsets: vec![], ..good.clone() }.validate(7).is_err());
        assert!(Plan { chunk_offsets: vec![], ..good.clone() }.validate(7).is_err());
        assert!(Plan { chunk_offsets: vec![0, 1], ..good.clone() }.validate(7).is_err(), "a sentence left out");
        assert!(Plan { topk: 0, ..good }.validate(7).is_err());
    }
}
