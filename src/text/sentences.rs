//! Sentence boundaries, by the reference's rules (infini-retri 0.0.3, `split_sentence`), as byte spans.
//!
//! The reference works on strings and may lose text; here sentences are spans of the document, so that concatenating
//! them gives the document back byte for byte.

use std::ops::Range;

/// White space as Python's `str.strip` sees it: Unicode white space and the four information separators
/// U+001C..U+001F, which Rust's `char::is_whitespace` leaves out.
pub(crate) fn is_python_whitespace(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `text` without leading and trailing white space in Python's sense.
pub fn python_strip(text: &str) -> &str {
    text.trim_matches(is_python_whitespace)
}

/// `text` without trailing white space in Python's sense.
pub(crate) fn python_trim_end(text: &str) -> &str {
    text.trim_end_matches(is_python_whitespace)
}

fn is_sentence_mark(c: char) -> bool {
    matches!(c, '。' | '！' | '？' | '.' | '?' | '!')
}

/// Splits `text` at every double newline and sentence mark, separators being pieces of their own.
fn pieces(text: &str) -> impl Iterator<Item = Range<usize>> + '_ {
    let mut start = 0;
    std::iter::from_fn(move || {
        let rest = &text[start..];
        let first = rest.chars().next()?;
        let length = if rest.starts_with("\n\n") {
            2
        } else if is_sentence_mark(first) {
            first.len_utf8()
        } else {
            let mark = rest.find(is_sentence_mark).unwrap_or(rest.len());
            rest[..mark].find("\n\n").unwrap_or(mark)
        };
        start += length;
        Some(start - length..start)
    })
}

/// The sentences of `text` as byte spans that cover it without gap or overlap; none if `text` is blank.
///
/// A piece joins the sentence before it when either is blank, when it is a sentence mark, or when the sentence ends
/// in a full stop and the stripped piece has at most `short_tail` characters ("3.14", "e.g. this"): the reference
/// takes 8 when it scores and 10 when it cuts chunks, Gleaner one value for both.
pub fn split_sentences(text: &str, short_tail: usize) -> Vec<Range<usize>> {
    let mut sentences = Vec::new();
    let mut current = 0..0;
    for piece in pieces(text) {
        let sentence = &text[current.clone()];
        let stripped = python_strip(&text[piece.clone()]);
        let mut characters = stripped.chars();
        let is_mark = characters.next().is_some_and(is_sentence_mark) && characters.next().is_none();
        let joins = python_strip(sentence).is_empty()
            || stripped.is_empty()
            || is_mark
            || (sentence.ends_with('.') && stripped.chars().count() <= short_tail);
        if !joins {
            sentences.push(current.clone());
            current.start = piece.start;
        }
        current.end = piece.end;
    }
    if !python_strip(&text[current.clone()]).is_empty() {
        sentences.push(current);
    }
    sentences
}

/// Bytes that a token may take on average before a piece is cut unseen: bounds the work on one endless line.
const MAX_BYTES_PER_TOKEN: usize = 32;

fn is_clause_mark(c: char) -> bool {
    matches!(c, ',' | ';' | ':' | '，' | '；' | '：' | '、' | '—')
}

/// End of the best piece of `text` within its first `limit` bytes: behind the last newline, else clause mark, else
/// space, looked for in the second half so that pieces keep their size, else at the last character boundary.
fn best_cut(text: &str, limit: usize) -> usize {
    let limit = text.floor_char_boundary(limit);
    if limit == 0 {
        return text.chars().next().map_or(0, char::len_utf8);
    }
    let half = text.ceil_char_boundary(limit / 2);
    let window = &text[half..limit];
    let last = |is: fn(char) -> bool| window.char_indices().rev().find(|&(_, c)| is(c));
    last(|c| c == '\n')
        .or_else(|| last(is_clause_mark))
        .or_else(|| last(is_python_whitespace))
        .map_or(limit, |(at, c)| half + at + c.len_utf8())
}

/// Cuts a sentence of more than `max_tokens` tokens into pieces that have no more, and calls `emit` with the span
/// and the tokens of each, in order.
///
/// `encode` gives a text's tokens. A cut stands behind a newline where there is one, else behind a clause mark, a
/// space, a character. Pieces are tokenised alone, as sentences are.
pub fn cut_long_sentence<T>(
    text: &str,
    max_tokens: usize,
    mut encode: impl FnMut(&str) -> crate::Result<Vec<T>>,
    mut emit: impl FnMut(Range<usize>, Vec<T>),
) -> crate::Result<()> {
    let mut start = 0;
    while start < text.len() {
        let rest = &text[start..];
        let mut length = match rest.len() > max_tokens * MAX_BYTES_PER_TOKEN {
            true => best_cut(rest, max_tokens * MAX_BYTES_PER_TOKEN),
            false => rest.len(),
        };
        let tokens = loop {
            let tokens = encode(&rest[..length])?;
            if tokens.len() <= max_tokens || rest[..length].chars().nth(1).is_none() {
                break tokens;
            }
            // Aim a little below the proportional length: token density varies within a text.
            let aim = length * max_tokens / tokens.len();
            length = best_cut(rest, (aim - aim / 16).min(length - 1));
        };
        emit(start..start + length, tokens);
        start += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(text: &str, short_tail: usize) -> Vec<&str> {
        split_sentences(text, short_tail).into_iter().map(|span| &text[span]).collect()
    }

    /// Recorded from the reference's own splitter with its two limits.
    #[test]
    fn agrees_with_the_reference_on_its_vectors() {
        for limit in [8, 10] {
            assert_eq!(split("Pi is 3.14. Next", limit), ["Pi is 3.14. Next"]);
            assert_eq!(split("He left.\n\n\n\nShe stayed", limit), ["He left.\n\n\n\n", "She stayed"]);
            assert_eq!(split("x.\n\n\nYonder comes", limit), ["x.\n\n", "\nYonder comes"]);
            assert_eq!(split("Really?! Yes indeed", limit), ["Really?!", " Yes indeed"]);
            assert_eq!(split("a?b!c.d", limit), ["a?", "b!", "c.d"]);
            assert_eq!(split("他走了。她留下！真的？是", limit), ["他走了。", "她留下！", "真的？", "是"]);
            assert_eq!(
                split("One line\nsecond line. Third sentence", limit),
                ["One line\nsecond line.", " Third sentence"]
            );
            assert_eq!(
                split("\u{3000}\n\nText goes.  \n\n Tail text long", limit),
                ["\u{3000}\n\nText goes.  \n\n", " Tail text long"]
            );
            assert!(split("  \n\n  ", limit).is_empty());
        }
        assert_eq!(split("A. Bcdefgh. Ijklmnopq.", 10), ["A. Bcdefgh. Ijklmnopq."]);
        assert_eq!(split("A. Bcdefgh. Ijklmnopq.", 8), ["A. Bcdefgh.", " Ijklmnopq."]);
        assert_eq!(split("A. Bcdefghij. Zzzzzzzzzzzz.", 10), ["A. Bcdefghij.", " Zzzzzzzzzzzz."]);
        assert_eq!(split("A. Bcdefghij. Zzzzzzzzzzzz.", 8), ["A.", " Bcdefghij.", " Zzzzzzzzzzzz."]);
    }

    #[test]
    fn strips_what_python_strips() {
        assert_eq!(python_strip("\u{1c}\u{a0}\u{2003}x\u{1f}\u{85}\n"), "x");
        assert_eq!(python_strip("\u{200b}x"), "\u{200b}x", "a zero-width space is no white space");
    }

    fn one_token_a_byte(text: &str) -> crate::Result<Vec<u8>> {
        Ok(text.bytes().collect())
    }

    fn cut(text: &str, max_tokens: usize) -> Vec<&str> {
        let mut spans = Vec::new();
        cut_long_sentence(text, max_tokens, one_token_a_byte, |span, _| spans.push(span)).unwrap();
        spans.into_iter().map(|span| &text[span]).collect()
    }

    #[test]
    fn cuts_at_the_strongest_mark_there_is() {
        assert_eq!(cut("aaaaaa bbb,cc\ndd ee ff gg hh", 16)[0], "aaaaaa bbb,cc\n");
        assert_eq!(cut("aaaaaaaa b,cc dd ee ff gg hh", 16)[0], "aaaaaaaa b,");
        assert_eq!(cut("aaaaaaaaaa cc dd ee ff gg hh", 16)[0], "aaaaaaaaaa cc ");
        assert_eq!(cut("aaaaaaaaaaaaaaaaaaaaaaaaaaaa", 16)[0], "aaaaaaaaaaaaaaa");
    }

    proptest! {
        #[test]
        fn sentences_cover_any_text(text in "(\\PC|[ \\n.?!。]){0,200}", short_tail in 0usize..12) {
            let sentences = split_sentences(&text, short_tail);
            let joined: String = sentences.iter().map(|span| &text[span.clone()]).collect();
            if python_strip(&text).is_empty() {
                prop_assert!(sentences.is_empty());
            } else {
                prop_assert_eq!(joined, text);
            }
        }

        #[test]
        fn cuts_cover_any_text_within_the_limit(text in "(\\PC|[ \\n,；]){1,300}", max_tokens in 4usize..40) {
            let pieces = cut(&text, max_tokens);
            prop_assert_eq!(pieces.concat(), &text[..]);
            prop_assert!(pieces.iter().all(|piece| !piece.is_empty() && piece.len() <= max_tokens));
        }
    }
}
