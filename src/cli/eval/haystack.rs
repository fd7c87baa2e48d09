//! The text that needles are hidden in: cut at sentence ends to a number of tokens, with the needle between two
//! sentences.

use std::fs;
use std::ops::Range;
use std::path::Path;

use gleaner::plan::ReadParams;
use gleaner::text::{python_strip, split_sentences};
use gleaner::{Document, Error};
use rayon::prelude::*;

use super::super::Failure;
use super::super::noise::Noise;
use super::file_error;

/// The text of a file, or of all .txt files of a folder in order of name, with a blank line behind each.
pub fn read(path: &Path) -> Result<String, Failure> {
    let mut paths = vec![path.to_owned()];
    if path.is_dir() {
        let entries = fs::read_dir(path).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
        paths = entries.map_err(file_error("read the folder", path))?;
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
        paths.sort();
        if paths.is_empty() {
            return Err(Failure::Mistake(format!(
                "the folder {} has no .txt file: there is no haystack in it",
                path.display()
            )));
        }
    }
    let texts = paths.iter().map(|path| Ok(format!("{}\n\n", python_strip(Document::open(path)?.text()))));
    Ok(texts.collect::<Result<String, Error>>()?)
}

/// A text in sentences of known length.
pub struct Haystack {
    text: String,
    sentences: Vec<Range<usize>>,
    /// Tokens of each sentence.
    lengths: Vec<usize>,
}

/// A part of a haystack and places in it.
#[derive(Debug, PartialEq)]
pub struct Placement {
    /// First sentence of the part.
    start: usize,
    /// Sentences of the part, which goes on at the beginning of the haystack when its end is reached.
    count: usize,
    /// Sentences before each needle.
    before: Vec<usize>,
}

impl Haystack {
    /// `count` gives the tokens of a text; `text` ends in a blank line.
    pub fn new(text: String, count: impl Fn(&str) -> Result<usize, Error> + Sync) -> Result<Haystack, Error> {
        let sentences = split_sentences(&text, ReadParams::default().short_tail);
        let lengths = sentences.par_iter().map(|span| Ok(count(&text[span.clone()])?.max(1)));
        Ok(Haystack { lengths: lengths.collect::<Result<_, Error>>()?, sentences, text })
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// Tokens of all sentences.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Sentence `index` of the haystack repeated without end.
    fn sentence(&self, index: usize) -> &str {
        &self.text[self.sentences[index % self.sentences.len()].clone()]
    }

    fn length(&self, index: usize) -> usize {
        self.lengths[index % self.lengths.len()]
    }

    /// Takes sentences from a drawn place on, as many as fit `room` tokens, and for each of `depths` the boundary among
    /// them that is nearest to so many percent of their tokens. `Err` is the length of the first sentence, if not even
    /// that fits.
    pub fn place(&self, room: usize, depths: &[usize], noise: &mut Noise) -> Result<Placement, usize> {
        let start = noise.below(self.sentences.len());
        let mut ends = vec![0];
        loop {
            let end = ends[ends.len() - 1] + self.length(start + ends.len() - 1);
            if end > room {
                break;
            }
            ends.push(end);
        }
        let count = ends.len() - 1;
        if count == 0 {
            return Err(self.length(start));
        }
        // A shorter sentence would be read as the end of the needle's.
        let short = ReadParams::default().chunk_short_tail;
        let parts = |&at: &usize| at == count || python_strip(self.sentence(start + at)).chars().count() > short;
        let boundaries: Vec<usize> = (0..=count).filter(parts).collect();
        let nearest = |depth: &usize| {
            let distance = |&&at: &&usize| (ends[at] * 100).abs_diff(ends[count] * depth);
            *boundaries.iter().min_by_key(distance).expect("the end is a boundary")
        };
        Ok(Placement { start, count, before: depths.iter().map(nearest).collect() })
    }

    /// The text of a placement with `needles` in it, one for each of its places, and the bytes of each needle.
    pub fn hide(&self, placement: &Placement, needles: &[&str]) -> (String, Vec<Range<usize>>) {
        let hay = |part: Range<usize>| part.map(|at| self.sentence(placement.start + at)).collect::<String>();
        let mut order: Vec<usize> = (0..needles.len()).collect();
        order.sort_by_key(|&index| placement.before[index]);
        let (mut text, mut spans, mut at) = (String::new(), vec![0..0; needles.len()], 0);
        for index in order {
            let before = placement.before[index];
            join(&mut text, &hay(at..before));
            join(&mut text, needles[index]);
            spans[index] = text.len() - needles[index].len()..text.len();
            if !needles[index].ends_with(['.', '!', '?', '。', '！', '？']) {
                text.push_str("\n\n");
            }
            at = before;
        }
        join(&mut text, &hay(at..placement.count));
        (text, spans)
    }
}

/// Appends a text, with a space if words would touch.
fn join(text: &mut String, next: &str) {
    let touches = |c: Option<char>| c.is_some_and(|c| !c.is_whitespace());
    if touches(text.chars().next_back()) && touches(next.chars().next()) {
        text.push(' ');
    }
    text.push_str(next);
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDLE: &str = "The needle is made of silver.";

    fn words(text: &str) -> Result<usize, Error> {
        Ok(text.split_whitespace().count())
    }

    /// Twelve sentences of five words, some of them headings, and one too short to stand behind a full stop.
    fn haystack() -> Haystack {
        let sentences = (0..12).map(|index| match index % 4 {
            0 => format!("Heading number {index} of all\n\n"),
            1 => format!("Sentence {index} stands here alone."),
            2 => " Is there a question here? Oh my.".to_owned(),
            _ => format!(" Line {index} ends the paragraph.\n\n"),
        });
        Haystack::new(sentences.collect(), words).unwrap()
    }

    #[test]
    fn a_needle_is_a_sentence_of_its_own_at_its_depth() {
        let haystack = haystack();
        let longest = *haystack.lengths.iter().max().unwrap();
        for seed in 0..20 {
            for depth in [0, 11, 50, 89, 100] {
                for room in [10, 33, 57, 150] {
                    let placement = haystack.place(room, &[depth], &mut Noise(seed)).unwrap();
                    let (text, spans) = haystack.hide(&placement, &[NEEDLE]);
                    let span = &spans[0];
                    assert_eq!(&text[span.clone()], NEEDLE);
                    let alone = |limit| {
                        let sentences = split_sentences(&text, limit);
                        sentences.iter().filter(|sentence| python_strip(&text[(*sentence).clone()]) == NEEDLE).count()
                    };
                    assert_eq!((alone(8), alone(10)), (1, 1), "{text:?}");
                    let (before, after) = (words(&text[..span.start]).unwrap(), words(&text[span.end..]).unwrap());
                    assert!((room - longest + 1..=room).contains(&(before + after)), "{} in {room}", before + after);
                    let wanted = (before + after) as f64 * depth as f64 / 100.0;
                    assert!((before as f64 - wanted).abs() <= longest as f64, "{before} at {depth} of {room}");
                }
            }
        }
    }

    #[test]
    fn many_needles_lie_apart_and_the_hay_stays_whole() {
        let haystack = haystack();
        let needles = ["The first is of gold.", "The second is tin", "The third is lead."];
        for depths in [[0, 50, 100], [100, 50, 0], [50, 50, 50], [0, 0, 0]] {
            let placement = haystack.place(57, &depths, &mut Noise(2)).unwrap();
            let (text, spans) = haystack.hide(&placement, &needles);
            let mut bare = text.clone();
            for (needle, span) in needles.iter().zip(&spans) {
                assert_eq!(&text[span.clone()], *needle);
                bare = bare.replace(needle, "");
            }
            let sentences = split_sentences(&text, 10);
            let alone = |needle: &&&str| sentences.iter().any(|at| python_strip(&text[at.clone()]) == **needle);
            assert_eq!(needles.iter().filter(alone).count(), 3, "{text:?}");
            let (whole, _) = haystack.hide(&placement, &[]);
            assert!(bare.split_whitespace().eq(whole.split_whitespace()), "{bare:?} {whole:?}");
        }
    }

    #[test]
    fn the_text_is_repeated_only_when_it_has_run_out() {
        let haystack = haystack();
        let tokens = haystack.tokens();
        let all = |room| {
            let placement = haystack.place(room, &[100], &mut Noise(3)).unwrap();
            haystack.hide(&placement, &[NEEDLE]).0
        };
        assert_eq!(all(tokens).matches("Heading number 4 ").count(), 1);
        assert_eq!(all(2 * tokens).matches("Heading number 4 ").count(), 2);
    }

    #[test]
    fn a_seed_gives_the_same_place_and_another_seed_another() {
        let haystack = haystack();
        let place = |seed| haystack.place(20, &[50], &mut Noise(seed)).unwrap();
        assert_eq!(place(5), place(5));
        assert!((0..10).any(|seed| place(seed) != place(5)));
    }

    #[test]
    fn no_room_is_told() {
        assert!(matches!(haystack().place(1, &[50], &mut Noise(0)), Err(2..)));
    }

    #[test]
    fn a_needle_without_a_full_stop_ends_with_a_blank_line() {
        let haystack = haystack();
        let placement = haystack.place(40, &[50], &mut Noise(1)).unwrap();
        let (text, spans) = haystack.hide(&placement, &["the needle is silver"]);
        assert!(text[spans[0].end..].starts_with("\n\n"));
    }
}
