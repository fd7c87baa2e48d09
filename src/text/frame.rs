//! The prompt around the context, as tokens, with every position known from how it was made.
//!
//! The reference formats the prompt as one string and then searches it for the context and the question, which fails
//! on most templates. Here the fields are placed, rendered and cut apart, so nothing is searched for.

use super::{ChatTemplate, Tokenizer, python_strip, split_sentences};
use crate::{Error, Result};

/// What the user's message says around the context and the question, in the reference's words.
const DEFAULT_TEMPLATE: &str = "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\nQuestion:\n\n{question}\n\nAnswer:";

/// Opens and closes the stand-in for a field while the chat template is rendered: private-use characters that no
/// template rewrites.
const FIELD_OPEN: char = '\u{f0000}';
const FIELD_CLOSE: char = '\u{f0001}';

/// A prompt with one `{context}` field and at least one `{question}` field. Everything else in it is literal.
#[derive(Debug, Clone)]
pub struct PromptTemplate {
    origin: String,
    parts: Vec<Part>,
    /// Beginning of the answer.
    opening: String,
}

#[derive(Debug, Clone, PartialEq)]
enum Part {
    Literal(String),
    Context,
    Question,
}

impl Default for PromptTemplate {
    /// The prompt of the reference.
    fn default() -> Self {
        PromptTemplate { origin: "prompt template".into(), parts: parse(DEFAULT_TEMPLATE), opening: String::new() }
    }
}

fn parse(text: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let fields = [("{context}", Part::Context), ("{question}", Part::Question)];
        let next = fields.into_iter().filter_map(|(name, part)| Some((rest.find(name)?, name, part)));
        let Some((at, name, part)) = next.min_by_key(|&(at, ..)| at) else { break };
        if at > 0 {
            parts.push(Part::Literal(rest[..at].into()));
        }
        parts.push(part);
        rest = &rest[at + name.len()..];
    }
    if !rest.is_empty() {
        parts.push(Part::Literal(rest.into()));
    }
    parts
}

impl PromptTemplate {
    /// A template from text; `origin` is what errors call it.
    ///
    /// # Errors
    /// [`Error::Template`] if a field is missing or the context stands in it twice.
    pub fn new(origin: impl Into<String>, text: &str) -> Result<PromptTemplate> {
        let template = PromptTemplate { origin: origin.into(), parts: parse(text), opening: String::new() };
        let count = |wanted: &Part| template.parts.iter().filter(|&part| part == wanted).count();
        if count(&Part::Context) != 1 {
            let found = count(&Part::Context);
            return Err(
                template.error(format!("the field {{context}} must stand in it once, but stands in it {found} times"))
            );
        }
        if count(&Part::Question) == 0 {
            return Err(template.error("the field {question} is missing"));
        }
        if text.contains([FIELD_OPEN, FIELD_CLOSE]) {
            return Err(template.error("the private-use characters U+F0000 and U+F0001 may not stand in a template"));
        }
        Ok(template)
    }

    /// The same prompt with the first words of the answer given: they stand behind the chat template's header of the
    /// assistant's turn, and the model goes on from them. Special tokens in them are parsed, as in all of a template.
    pub fn with_opening(self, opening: impl Into<String>) -> PromptTemplate {
        PromptTemplate { opening: opening.into(), ..self }
    }

    fn error(&self, message: impl Into<String>) -> Error {
        Error::Template { origin: self.origin.clone(), message: message.into() }
    }

    /// The whole prompt as parts, the chat template's text included.
    fn render(&self, chat: &ChatTemplate) -> Result<Vec<Part>> {
        let mut fields = Vec::new();
        let mut message = String::new();
        for part in &self.parts {
            match part {
                Part::Literal(text) => message.push_str(text),
                field => {
                    message.push_str(&format!("{FIELD_OPEN}{}{FIELD_CLOSE}", fields.len()));
                    fields.push(field.clone());
                }
            }
        }
        let rendered = chat.render(&message)?;
        let rewritten = || Error::Template {
            origin: chat.origin().into(),
            message: "the chat template does not carry the user's message over unchanged and once".into(),
        };
        let mut parts = Vec::new();
        let mut pieces = rendered.split(FIELD_OPEN);
        parts.extend(pieces.next().filter(|text| !text.is_empty()).map(|text| Part::Literal(text.into())));
        let mut placed = 0;
        for piece in pieces {
            let (number, literal) = piece.split_once(FIELD_CLOSE).ok_or_else(rewritten)?;
            let in_order = number.parse() == Ok(placed);
            parts.push(fields.get(placed).filter(|_| in_order).ok_or_else(rewritten)?.clone());
            placed += 1;
            if !literal.is_empty() {
                parts.push(Part::Literal(literal.into()));
            }
        }
        if placed != fields.len() {
            return Err(rewritten());
        }
        match parts.last_mut() {
            Some(Part::Literal(text)) => text.push_str(&self.opening),
            _ if self.opening.is_empty() => {}
            _ => parts.push(Part::Literal(self.opening.clone())),
        }
        Ok(parts)
    }
}

/// A text of the prompt and whether special tokens may be parsed out of it.
struct Piece {
    text: String,
    trusted: bool,
    is_question: bool,
}

/// The prompt around the context, tokenised for one question.
#[derive(Debug, Clone)]
pub struct Frame {
    /// Tokens before the context, in reading steps.
    pub prefix: Vec<u32>,
    /// White space between the context and what follows, tokenised together with the last sentence of the context.
    pub closing: String,
    /// Tokens behind the context, in reading steps.
    pub tail: Vec<u32>,
    /// Index in `tail` of the first question row; the rows run to the end of the prompt. It is the first token of
    /// the first question behind the context, or 0 for a template that asks only before it.
    pub question_start: usize,
    /// Tokens before the context in the final prompt, which is tokenised as a whole instead of sentence by sentence.
    pub answer_prefix: Vec<u32>,
    /// Tokens behind the context in the final prompt.
    pub answer_tail: Vec<u32>,
}

impl Frame {
    /// Renders `template` inside `chat` around `question`.
    ///
    /// # Errors
    /// [`Error::EmptyQuestion`]; [`Error::Template`] if a template fails or leaves no row behind the context to read
    /// attention from.
    pub fn new(
        template: &PromptTemplate,
        chat: &ChatTemplate,
        tokenizer: &Tokenizer,
        question: &str,
        short_tail: usize,
    ) -> Result<Frame> {
        let question = python_strip(question);
        if question.is_empty() {
            return Err(Error::EmptyQuestion);
        }
        let parts = template.render(chat)?;
        let (before, behind) = parts.split_at(parts.iter().position(|part| *part == Part::Context).unwrap_or(0));
        let (_, before) = glue_white_space(before, question, false);
        let (closing, behind) = glue_white_space(&behind[1..], question, true);

        let encode = |piece: &Piece, text: &str| match piece.trusted {
            true => tokenizer.encode_template(text),
            false => tokenizer.encode(text),
        };
        let whole = |pieces: &[Piece]| -> Result<Vec<u32>> {
            Ok(pieces.iter().map(|piece| encode(piece, &piece.text)).collect::<Result<Vec<_>>>()?.concat())
        };
        let sentence_by_sentence = |piece: &Piece| -> Result<Vec<u32>> {
            let sentences = split_sentences(&piece.text, short_tail);
            if sentences.is_empty() {
                return encode(piece, &piece.text);
            }
            let tokens = sentences.into_iter().map(|span| encode(piece, &piece.text[span]));
            Ok(tokens.collect::<Result<Vec<_>>>()?.concat())
        };

        let mut tail = Vec::new();
        let mut question_start = None;
        for piece in &behind {
            if piece.is_question && question_start.is_none() {
                question_start = Some(tail.len());
            }
            tail.extend(sentence_by_sentence(piece)?);
        }
        let question_start = question_start.unwrap_or(0);
        if question_start >= tail.len() {
            return Err(template.error(
                "nothing stands behind {context}: attention is read from the rows behind it, so let the question, or at least \"Answer:\", follow it",
            ));
        }
        Ok(Frame {
            prefix: before.iter().map(sentence_by_sentence).collect::<Result<Vec<_>>>()?.concat(),
            closing,
            tail,
            question_start,
            answer_prefix: whole(&before)?,
            answer_tail: whole(&behind)?,
        })
    }

    /// Tokens of the prompt that are not context.
    pub fn len(&self) -> usize {
        self.prefix.len() + self.tail.len()
    }

    /// Whether the frame has no token at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Fills in the question and moves the white space at the head of each literal to the field before it: a tokenizer
/// takes a full stop and the blank line behind it as one token. If a field stands before `parts`, what goes to it is
/// returned beside them.
fn glue_white_space(parts: &[Part], question: &str, follows_field: bool) -> (String, Vec<Piece>) {
    let mut closing = String::new();
    let mut pieces: Vec<Piece> = Vec::new();
    for part in parts {
        let Part::Literal(text) = part else {
            pieces.push(Piece { text: question.into(), trusted: false, is_question: true });
            continue;
        };
        let field = match pieces.last_mut() {
            Some(question) => Some(&mut question.text),
            None if follows_field => Some(&mut closing),
            None => None,
        };
        let body = match field {
            Some(field) => {
                let body = text.trim_start();
                field.push_str(&text[..text.len() - body.len()]);
                body
            }
            None => text,
        };
        if !body.is_empty() {
            pieces.push(Piece { text: body.into(), trusted: true, is_question: false });
        }
    }
    (closing, pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        PromptTemplate::new("mine.txt", text).unwrap_err().to_string()
    }

    #[test]
    fn missing_fields_are_named() {
        assert!(message("{context} why?").contains("{question}"));
        assert!(message("{question}").contains("{context}"));
        assert!(message("{context}{context}{question}").contains("2 times"));
    }

    #[test]
    fn other_braces_are_literal() {
        let template = PromptTemplate::new("mine.txt", "{\"json\": {}} {context} {question}").unwrap();
        assert_eq!(template.parts[0], Part::Literal("{\"json\": {}} ".into()));
        assert_eq!(template.parts.len(), 4);
    }
}
