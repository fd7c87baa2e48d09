//! The metrics of LongBench v1 ([arXiv 2308.14508](https://arxiv.org/abs/2308.14508)), quirks included.
//!
//! Each function compares one prediction with one true answer and gives a score from 0 to 1. LongBench takes the best
//! score over a question's true answers, the mean over questions, times 100. For its tasks trec, triviaqa, samsum and
//! lsht only the first line of the prediction counts; cutting it is left to the caller.
//!
//! | tasks | metric |
//! |---|---|
//! | narrativeqa, qasper, multifieldqa_en, hotpotqa, 2wikimqa, musique, triviaqa | [`qa_f1`] |
//! | multifieldqa_zh | [`qa_f1_zh`] |
//! | gov_report, qmsum, multi_news, samsum | [`rouge_l`] |
//! | dureader, vcsum | [`rouge_l_zh`] |
//! | trec, lsht | [`classification`] |
//! | passage_retrieval_en | [`retrieval`] |
//! | passage_retrieval_zh | [`retrieval_zh`] |
//! | passage_count | [`count`] |
//! | lcc, repobench-p | [`code_similarity`] |

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use regex::Regex;

use super::chinese;
use crate::text::is_python_whitespace;

static DIGITS: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\d+").expect("a valid pattern"));

/// Whether prediction and truth are the same English text up to case, punctuation, articles and spaces: 1 or 0.
///
/// This is SQuAD's exact match; LongBench does not use it. Two texts of which nothing is left are the same.
pub fn exact_match(prediction: &str, truth: &str) -> f64 {
    f64::from(u8::from(normal_words(prediction) == normal_words(truth)))
}

/// F1 of the words of an English answer.
///
/// Both texts are lowercased and lose ASCII punctuation, then the words a, an and the. The score is 0 where no word is
/// shared, and so where either text has none.
pub fn qa_f1(prediction: &str, truth: &str) -> f64 {
    f1(&normal_words(prediction), &normal_words(truth))
}

/// F1 of the [words](chinese::words) of a Chinese answer.
///
/// Each word is lowercased and loses punctuation and spaces; words of which nothing is left do not count. LongBench's
/// set of punctuation lacks some signs, `《` among them.
pub fn qa_f1_zh(prediction: &str, truth: &str) -> f64 {
    f1(&normal_words_zh(prediction), &normal_words_zh(truth))
}

/// ROUGE-L of an English summary, as the Python package `rouge` 1.0.1 has it: the F-measure at the level of summaries.
///
/// Sentences end at full stops only. The words in the longest common subsequence of any sentence of the truth with any
/// of the prediction are taken as one set; recall and precision are its size over the numbers of distinct words of the
/// truth and of the prediction. Case and punctuation count. 0 where either text has nothing but full stops.
///
/// The Python gives 0 to pairs of sentences of about 1,000 words together, where it exceeds its recursion limit. Here
/// they get the score of the formula.
pub fn rouge_l(prediction: &str, truth: &str) -> f64 {
    let mut ids = HashMap::new();
    let (prediction, truth) = (rouge_sentences(prediction, &mut ids), rouge_sentences(truth, &mut ids));
    let distinct = |sentences: &[Vec<usize>]| sentences.iter().flatten().collect::<HashSet<_>>().len() as f64;
    let (predicted, expected) = (distinct(&prediction), distinct(&truth));
    if predicted == 0.0 || expected == 0.0 {
        return 0.0;
    }
    let mut common = HashSet::new();
    for sentence in &truth {
        for other in &prediction {
            common.extend(longest_common_subsequence(sentence, other));
        }
    }
    let (recall, precision) = (common.len() as f64 / expected, common.len() as f64 / predicted);
    2.0 * ((precision * recall) / (precision + recall + 1e-8))
}

/// [`rouge_l`] over the [words](chinese::words) of Chinese texts. Sentences end at `.`, not at `。`.
pub fn rouge_l_zh(prediction: &str, truth: &str) -> f64 {
    rouge_l(&chinese::words(prediction).join(" "), &chinese::words(truth).join(" "))
}

/// One over the number of classes that the prediction names, if the true class is among them, else 0.
///
/// Classes that are a part of the true class' name are not held against the prediction. The original looks for them
/// in the list that it removes them from, so that the class after a removed one is never looked at; so does this.
pub fn classification<S: AsRef<str>>(prediction: &str, truth: &str, classes: &[S]) -> f64 {
    let mut named: Vec<&str> = classes.iter().map(AsRef::as_ref).filter(|&class| prediction.contains(class)).collect();
    let mut at = 0;
    while let Some(&class) = named.get(at) {
        if truth.contains(class) && class != truth {
            let first = named.iter().position(|&other| other == class).unwrap_or(at);
            named.remove(first);
        }
        at += 1;
    }
    if named.contains(&truth) { 1.0 / named.len() as f64 } else { 0.0 }
}

/// The share of the numbers in the prediction that equal the truth, a number in digits: `07` is not `7`. 0 without any.
pub fn count(prediction: &str, truth: &str) -> f64 {
    let (mut numbers, mut right) = (0u32, 0u32);
    for number in DIGITS.find_iter(prediction) {
        numbers += 1;
        right += u32::from(number.as_str() == truth);
    }
    if numbers == 0 { 0.0 } else { f64::from(right) / f64::from(numbers) }
}

/// The share of the numbers in the prediction that equal the first `Paragraph N` of the truth. 0 without any.
///
/// `None` where the truth names no paragraph: the data is wrong.
pub fn retrieval(prediction: &str, truth: &str) -> Option<f64> {
    Some(count(prediction, number_after("Paragraph ", truth)?))
}

/// [`retrieval`] for truths of the form `段落N`.
pub fn retrieval_zh(prediction: &str, truth: &str) -> Option<f64> {
    Some(count(prediction, number_after("段落", truth)?))
}

/// How alike the next line of code is: `ratio` of the Python package `fuzzywuzzy` 0.18 with `python-Levenshtein`, in
/// whole hundredths.
///
/// The prediction's first line without a backtick, `#` or `//` counts, leading empty lines apart. The ratio is twice
/// the length of the longest common subsequence of characters over the length of both texts; 1 for equal texts, be
/// they empty.
pub fn code_similarity(prediction: &str, truth: &str) -> f64 {
    let is_code = |line: &&str| !line.contains(['`', '#']) && !line.contains("//");
    let line = prediction.trim_start_matches('\n').split('\n').find(is_code).unwrap_or("");
    if line == truth {
        return 1.0;
    }
    let (line, truth): (Vec<char>, Vec<char>) = (line.chars().collect(), truth.chars().collect());
    if line.is_empty() || truth.is_empty() {
        return 0.0;
    }
    let length = line.len() + truth.len();
    let apart = length - 2 * longest_common_subsequence(&line, &truth).len();
    // Subtracted from 1 and rounded to even as the original does: halves fall to the same side.
    (100.0 * (1.0 - apart as f64 / length as f64)).round_ties_even() / 100.0
}

fn f1(prediction: &[String], truth: &[String]) -> f64 {
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in truth {
        *left.entry(word).or_default() += 1;
    }
    let mut common = 0usize;
    for word in prediction {
        if let Some(count) = left.get_mut(word.as_str()).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    if common == 0 {
        return 0.0;
    }
    let (precision, recall) = (common as f64 / prediction.len() as f64, common as f64 / truth.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

/// Punctuation goes before articles do, so `a.n` is the article `an`, and `the-end` is one word that stays.
fn normal_words(text: &str) -> Vec<String> {
    let mut text = text.to_lowercase();
    text.retain(|c| !c.is_ascii_punctuation());
    let is_article = |run: &str| matches!(run, "a" | "an" | "the");
    let mut without_articles = String::with_capacity(text.len());
    // An article is a whole run of letters and digits; what is not one, such as a curly quote, ends the run.
    let mut rest = text.as_str();
    while let Some(first) = rest.chars().next() {
        let in_word = first.is_alphanumeric();
        let len = rest.find(|c: char| c.is_alphanumeric() != in_word).unwrap_or(rest.len());
        without_articles.push_str(if is_article(&rest[..len]) { " " } else { &rest[..len] });
        rest = &rest[len..];
    }
    without_articles.split(is_python_whitespace).filter(|word| !word.is_empty()).map(String::from).collect()
}

fn normal_words_zh(text: &str) -> Vec<String> {
    let dropped = |c: char| c.is_ascii_punctuation() || is_chinese_punctuation(c) || is_python_whitespace(c);
    let normal = |word: &str| word.to_lowercase().chars().filter(|&c| !dropped(c)).collect::<String>();
    chinese::words(text).into_iter().map(normal).filter(|word| !word.is_empty()).collect()
}

/// LongBench's set. `〈`, `〉`, `《`, `．` and `·` are not in it.
fn is_chinese_punctuation(c: char) -> bool {
    matches!(c,
        '\u{2013}'..='\u{2014}' | '\u{2018}'..='\u{2019}' | '\u{201b}'..='\u{201f}' | '\u{2026}'..='\u{2027}'
        | '\u{3001}'..='\u{3003}' | '\u{300b}'..='\u{3011}' | '\u{3014}'..='\u{301f}' | '\u{3030}'
        | '\u{303e}'..='\u{303f}' | '\u{fe4f}' | '\u{ff01}'..='\u{ff0d}' | '\u{ff0f}' | '\u{ff1a}'..='\u{ff20}'
        | '\u{ff3b}'..='\u{ff40}' | '\u{ff5b}'..='\u{ff64}')
}

fn number_after<'a>(prefix: &str, text: &'a str) -> Option<&'a str> {
    let digits_at_start = |rest| DIGITS.find(rest).filter(|digits| digits.start() == 0);
    text.match_indices(prefix).find_map(|(at, _)| digits_at_start(&text[at + prefix.len()..])).map(|m| m.as_str())
}

/// Words as numbers, the same for the same word. A sentence of spaces alone has one word, the empty one.
fn rouge_sentences<'a>(text: &'a str, ids: &mut HashMap<&'a str, usize>) -> Vec<Vec<usize>> {
    let mut words = |sentence: &'a str| {
        let mut words: Vec<&str> = sentence.split(is_python_whitespace).filter(|word| !word.is_empty()).collect();
        if words.is_empty() {
            words.push("");
        }
        let id_of = |word| {
            let next = ids.len();
            *ids.entry(word).or_insert(next)
        };
        words.into_iter().map(id_of).collect()
    };
    text.split('.').filter(|sentence| !sentence.is_empty()).map(&mut words).collect()
}

/// The items of a longest common subsequence, from the last to the first. Of several it is the one that `rouge` finds,
/// on which its set of words depends: where both ways are as long, `y` is shortened.
fn longest_common_subsequence<T: Copy + PartialEq>(x: &[T], y: &[T]) -> Vec<T> {
    let width = y.len() + 1;
    let mut lengths = vec![0u32; (x.len() + 1) * width];
    for i in 1..=x.len() {
        for j in 1..=y.len() {
            lengths[i * width + j] = if x[i - 1] == y[j - 1] {
                lengths[(i - 1) * width + j - 1] + 1
            } else {
                lengths[(i - 1) * width + j].max(lengths[i * width + j - 1])
            };
        }
    }
    let (mut i, mut j) = (x.len(), y.len());
    let mut items = Vec::new();
    while i > 0 && j > 0 {
        if x[i - 1] == y[j - 1] {
            items.push(x[i - 1]);
            (i, j) = (i - 1, j - 1);
        } else if lengths[(i - 1) * width + j] > lengths[i * width + j - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
    }
    items
}
