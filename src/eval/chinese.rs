//! Words of Chinese text, as the Python package `jieba` 0.42.1 cuts them.

use std::sync::LazyLock;

use jieba_rs::Jieba;

static JIEBA: LazyLock<Jieba> = LazyLock::new(|| {
    let mut jieba = Jieba::new();
    // The one entry of the Python package's dictionary that the crate's lacks.
    jieba.add_word("B超", Some(3), Some("n"));
    jieba
});

/// Cuts `text` into words: jieba's accurate mode, with its hidden Markov model for words out of the dictionary.
///
/// The words in a row are the text, whitespace and punctuation included. The first call loads the dictionary, which
/// takes a fraction of a second.
pub fn words(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let len = match first {
            '\r' if rest.starts_with("\r\n") => 2,
            c if !is_block(c) => c.len_utf8(),
            _ => {
                let len = rest.find(|c| !is_block(c)).unwrap_or(rest.len());
                cut_block(&rest[..len], &mut words);
                rest = &rest[len..];
                continue;
            }
        };
        words.push(&rest[..len]);
        rest = &rest[len..];
    }
    words
}

/// Characters that jieba looks at together; all others are words of their own. The crate takes a wider range of Han.
fn is_block(c: char) -> bool {
    matches!(c, '\u{4e00}'..='\u{9fd5}' | 'a'..='z' | 'A'..='Z' | '0'..='9' | '+' | '#' | '&' | '.' | '_' | '%' | '-')
}

/// The crate keeps names such as `v1.2.3` and `GPT-4` whole, where the Python package has a word only if the
/// dictionary has it. Those are cut again.
fn cut_block<'a>(block: &'a str, words: &mut Vec<&'a str>) {
    for token in JIEBA.cut(block, true) {
        let word = token.word;
        if word.is_ascii() && word.contains(['.', '_', '-']) && !JIEBA.has_word(word) {
            cut_ascii(word, words);
        } else {
            words.push(word);
        }
    }
}

/// Letters and digits, with a decimal part and a percent sign if they follow; and what lies between such runs.
fn cut_ascii<'a>(text: &'a str, words: &mut Vec<&'a str>) {
    let run = |at: usize, class: fn(&u8) -> bool| text.as_bytes()[at..].iter().take_while(|&b| class(b)).count();
    let mut at = 0;
    while at < text.len() {
        let mut end = at + run(at, u8::is_ascii_alphanumeric);
        if end == at {
            end += run(at, |b| !b.is_ascii_alphanumeric());
        } else {
            if text[end..].starts_with('.') {
                let decimals = run(end + 1, u8::is_ascii_digit);
                end += if decimals > 0 { 1 + decimals } else { 0 };
            }
            end += usize::from(text[end..].starts_with('%'));
        }
        words.push(&text[at..end]);
        at = end;
    }
}
