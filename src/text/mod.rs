//! From bytes to tokens: sentences, tokenizer, chat template, prompt frame. Knows no model.

mod chat;
mod document;
mod frame;
mod sentences;
mod tokenizer;

pub use chat::ChatTemplate;
pub use document::Document;
pub use frame::{Frame, PromptTemplate};
pub use sentences::{cut_long_sentence, python_strip, split_sentences};
pub(crate) use sentences::{is_python_whitespace, python_trim_end};
pub use tokenizer::Tokenizer;
