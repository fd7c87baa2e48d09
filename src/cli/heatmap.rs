//! The page of `gleaner ask --heatmap`: the document, its sentences shaded by their scores.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use gleaner::plan::Plan;
use gleaner::reader::{DropReason, Kept, StepReport};
use gleaner::{Answer, Document, Error};

/// The darkest shade, of scores above half the step's best; each lighter one reaches down to half of that, and the
/// lightest to 0. 0 is no shade.
const SHADES: usize = 9;

/// One hue from light to dark. Every text keeps a contrast of at least 4.5 to its shade.
const STYLE: &str = include_str!("heatmap.css");

/// Tokens of a chunk that fill one em of the page's height: what a browser takes for the chunks it has not laid out.
const TOKENS_PER_EM: usize = 12;

/// Gathers what the steps say about each sentence and writes the page at the end.
pub struct Heatmap {
    path: PathBuf,
    file: BufWriter<File>,
    /// By index in the plan.
    sentences: Vec<Sentence>,
    /// Sentences `chunk_offsets[c]..chunk_offsets[c + 1]` are chunk `c`.
    chunk_offsets: Vec<u32>,
}

struct Sentence {
    span: Range<usize>,
    /// The last step that kept it.
    kept: Option<Mark>,
    /// Dropped for `max_retained` in its last step.
    crowded_out: bool,
}

#[derive(Clone, Copy)]
struct Mark {
    step: usize,
    score: f32,
    /// The largest score of that step.
    best: f32,
}

impl Heatmap {
    pub fn create(path: &Path) -> Result<Heatmap, Error> {
        let file = File::create(path).map_err(|source| Error::Io { action: "create", path: path.into(), source })?;
        Ok(Heatmap { path: path.into(), file: BufWriter::new(file), sentences: Vec::new(), chunk_offsets: Vec::new() })
    }

    pub fn planned(&mut self, plan: &Plan, spans: &[Range<usize>]) {
        let unread = |span: &Range<usize>| Sentence { span: span.clone(), kept: None, crowded_out: false };
        self.sentences = spans.iter().map(unread).collect();
        self.chunk_offsets = plan.chunk_offsets.clone();
    }

    pub fn step(&mut self, report: &StepReport) {
        // What is dropped for capacity scores lowest, so that the best score is a kept sentence's.
        let best = report.kept.iter().map(|kept| kept.score).fold(0.0, f32::max);
        for &Kept { sentence, score } in &report.kept {
            self.sentences[sentence as usize].kept = Some(Mark { step: report.step, score, best });
        }
        for &(sentence, reason) in &report.dropped {
            self.sentences[sentence as usize].crowded_out = reason == DropReason::MaxRetained;
        }
    }

    pub fn finish(mut self, document: &Document, question: &str, answer: &Answer) -> Result<(), Error> {
        let written = self.write(document, question, answer).and_then(|()| self.file.flush());
        written.map_err(|source| Error::Io { action: "write", path: self.path, source })
    }

    fn write(&mut self, document: &Document, question: &str, answer: &Answer) -> io::Result<()> {
        let Heatmap { file: out, sentences, chunk_offsets, .. } = self;
        write_head(out, document, question, answer)?;
        // An evidence's number, from 1 and best first, by its sentence.
        let ranks: HashMap<usize, usize> = (answer.evidence.iter().zip(1..))
            .map(|(evidence, rank)| (sentences.partition_point(|s| s.span.start <= evidence.start) - 1, rank))
            .collect();
        writeln!(out, "<main dir=auto>")?;
        for (chunk, range) in chunk_offsets.windows(2).enumerate() {
            let number = chunk + 1;
            write!(out, "<section id=c{number}><h2>Chunk {number}</h2><p dir=auto>")?;
            let members = &sentences[range[0] as usize..range[1] as usize];
            for (index, sentence) in (range[0] as usize..).zip(members) {
                write_sentence(out, &document.text()[sentence.span.clone()], sentence, ranks.get(&index))?;
            }
            writeln!(out, "</p></section>")?;
        }
        writeln!(out, "</main>")
    }
}

fn write_head(out: &mut impl Write, document: &Document, question: &str, answer: &Answer) -> io::Result<()> {
    let (title, question) = (escape(document.name()), escape(question));
    let (figures, params) = (&answer.document, &answer.params);
    write!(
        out,
        "<!DOCTYPE html>\n<html><head><meta charset=utf-8>\n\
         <meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=viewport content=\"width=device-width\">\n<title>{question} - {title}</title>\n\
         <style>\n{STYLE}section{{contain-intrinsic-size:auto {}em}}\n</style></head><body>\n",
        params.window_length / TOKENS_PER_EM
    )?;
    writeln!(out, "<header><h1 dir=auto>{question}</h1>\n<p id=answer dir=auto>{}</p>", escape(&answer.answer))?;
    for warning in &answer.warnings {
        writeln!(out, "<p>Warning: {}</p>", escape(warning))?;
    }
    let rows = [
        ("Document", title),
        ("Read", format!("{} tokens, {} sentences, {} steps", figures.tokens, figures.sentences, answer.steps)),
        ("Kept", format!("{} tokens, {} sentences", answer.retained_tokens, answer.evidence.len())),
        (
            "Parameters",
            format!(
                "window {}, topk {}, phrase {}, max-retained {}",
                params.window_length, params.topk, params.phrase_width, params.max_retained
            ),
        ),
        ("Device", escape(&answer.device)),
        ("Model", escape(&answer.model)),
        (
            "Time",
            format!(
                "{:.3} s: plan {:.3}, read {:.3}, answer {:.3}",
                answer.timing_ms.total / 1e3,
                answer.timing_ms.plan / 1e3,
                answer.timing_ms.read / 1e3,
                answer.timing_ms.answer / 1e3
            ),
        ),
    ];
    writeln!(out, "<table>")?;
    for (name, value) in rows {
        writeln!(out, "<tr><th>{name}<td>{value}")?;
    }
    writeln!(out, "</table>")?;
    write_legend(out)?;
    writeln!(out, "<details open><summary>Evidence, best first</summary><ol>")?;
    for (evidence, rank) in answer.evidence.iter().zip(1..) {
        let (line, score, chunk) = (evidence.line, evidence.score, evidence.chunk + 1);
        let text = escape(&evidence.text);
        writeln!(out, "<li><a href=#e{rank}>line {line}</a>, chunk {chunk}, score {score:.3}: <q dir=auto>{text}</q>")?;
    }
    writeln!(out, "</ol></details></header>")
}

fn write_legend(out: &mut impl Write) -> io::Result<()> {
    write!(out, "<div id=legend><p><span>not kept</span>")?;
    for shade in 1..SHADES {
        write!(out, " <i class=s{shade}>to 1/{}</i>", 1 << (SHADES - shade))?;
    }
    writeln!(
        out,
        " <i class=s{SHADES}>to 1</i> <mark>evidence</mark> <i class=m>no room</i></p>\n\
         <p>A sentence shows its score in the last step that kept it, as a share of that step's best score: scores \
         compare within one step only. Plain text was kept by no step. Chunk n is read in step n. Underlined and \
         numbered is the evidence, what was left after the last step. A dotted line marks what had a best token but \
         was dropped in its last step because max-retained was full.</p></div>"
    )
}

/// Plain text where there is nothing to say about a sentence, else one element.
fn write_sentence(out: &mut impl Write, text: &str, sentence: &Sentence, rank: Option<&usize>) -> io::Result<()> {
    let text = escape(text);
    let room = if sentence.crowded_out { " m" } else { "" };
    match (sentence.kept, rank) {
        (None, _) if sentence.crowded_out => write!(out, "<i class=m>{text}</i>"),
        (None, _) => write!(out, "{text}"),
        (Some(mark), None) => write!(out, "<i class=\"s{}{room}\" {}>{text}</i>", mark.shade(), mark.title()),
        (Some(mark), Some(rank)) => {
            write!(out, "<mark id=e{rank} class=s{} {}>{text}</mark>", mark.shade(), mark.title())
        }
    }
}

impl Mark {
    fn shade(self) -> usize {
        let (mut shade, mut bound) = (SHADES, self.best / 2.0);
        while shade > 1 && self.score <= bound {
            shade -= 1;
            bound /= 2.0;
        }
        shade
    }

    fn title(self) -> String {
        format!("title=\"score {:.3} of {:.3}, step {}\"", self.score, self.best, self.step + 1)
    }
}

/// `text` as HTML. A browser would drop a NUL.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + text.len() / 16);
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\0' => escaped.push('\u{fffd}'),
            _ => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shade_is_half_of_the_next() {
        let shade = |score, best| Mark { step: 0, score, best }.shade();
        assert_eq!([8.0, 4.1, 4.0, 2.1, 2.0].map(|score| shade(score, 8.0)), [9, 9, 8, 8, 7]);
        assert_eq!([1.1 / 256.0, 1.0 / 256.0, 1e-30, 0.0].map(|score| shade(score, 1.0)), [2, 1, 1, 1]);
        assert_eq!(shade(0.0, 0.0), 1, "a step that scored nothing");
    }

    #[test]
    fn no_text_becomes_markup_or_is_lost() {
        assert_eq!(escape("<a b=\"c\">&amp;\0é"), "&lt;a b=&quot;c&quot;&gt;&amp;amp;\u{fffd}é");
    }
}
