//! How much of the sentences that hold the answer is kept: in bytes that can be seen, so that white space around a
//! sentence counts for nothing.

use std::collections::BTreeMap;
use std::ops::Range;

use gleaner::plan::Plan;
use gleaner::reader::StepReport;

/// Sorted, and overlaps joined.
fn merged(spans: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut spans = spans.to_vec();
    spans.sort_by_key(|span| span.start);
    let mut merged: Vec<Range<usize>> = Vec::new();
    for span in spans {
        match merged.last_mut() {
            Some(last) if span.start <= last.end => last.end = last.end.max(span.end),
            _ => merged.push(span),
        }
    }
    merged
}

/// Visible bytes of `gold` that lie in `part`.
fn visible(document: &str, gold: &[Range<usize>], part: &Range<usize>) -> usize {
    let common = gold.iter().map(|gold| gold.start.max(part.start)..gold.end.min(part.end));
    let texts = common.filter(|common| common.start < common.end).map(|common| &document[common]);
    texts.flat_map(str::chars).filter(|c| !c.is_whitespace()).map(char::len_utf8).sum()
}

fn share(part: usize, all: usize) -> Option<f64> {
    (all > 0).then(|| part as f64 / all as f64)
}

/// Share of the gold spans that lies in `parts`, which do not overlap; `None` without gold.
pub fn of_parts(document: &str, gold: &[Range<usize>], parts: &[Range<usize>]) -> Option<f64> {
    let gold = merged(gold);
    let held = parts.iter().map(|part| visible(document, &gold, part)).sum();
    share(held, visible(document, &gold, &(0..document.len())))
}

/// The gold of each sentence of a plan.
pub struct GoldBytes {
    /// Visible bytes of the sentences that have any.
    by_sentence: BTreeMap<u32, usize>,
    chunk_offsets: Vec<u32>,
}

impl GoldBytes {
    /// `spans` are the bytes of each sentence of `plan`.
    pub fn new(document: &str, gold: &[Range<usize>], plan: &Plan, spans: &[Range<usize>]) -> GoldBytes {
        let gold = merged(gold);
        let of_sentence = |(sentence, span): (usize, &Range<usize>)| {
            let bytes = visible(document, &gold, span);
            (bytes > 0).then_some((sentence as u32, bytes))
        };
        let by_sentence = spans.iter().enumerate().filter_map(of_sentence).collect();
        GoldBytes { by_sentence, chunk_offsets: plan.chunk_offsets.clone() }
    }

    /// Share of the gold in the chunks read so far that is kept after a step; `None` as long as there was none.
    pub fn kept(&self, report: &StepReport) -> Option<f64> {
        let seen = self.by_sentence.range(..self.chunk_offsets[report.step + 1]).map(|(_, bytes)| bytes).sum();
        let kept = report.kept.iter().filter_map(|kept| self.by_sentence.get(&kept.sentence)).sum();
        share(kept, seen)
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a list of one span is meant")]
mod tests {
    use super::*;
    use gleaner::reader::Kept;

    const DOCUMENT: &str = "Hay. Is it so? Yes. Hay.";

    #[test]
    fn recall_is_the_share_of_visible_bytes_that_are_held() {
        let needle = [5..19];
        let held = |parts: &[Range<usize>]| of_parts(DOCUMENT, &needle, parts);
        assert_eq!(held(&[5..14, 15..19]), Some(1.0));
        assert_eq!(held(&[0..14]), Some(7.0 / 11.0));
        assert_eq!(held(&[]), Some(0.0));
        assert_eq!(of_parts(DOCUMENT, &[], &[0..24]), None);
        assert_eq!(of_parts(DOCUMENT, &[5..14, 8..19, 5..9], &[5..14]), Some(7.0 / 11.0), "overlaps count once");
    }

    #[test]
    fn a_step_is_judged_by_what_was_read_until_then() {
        let spans = [0..4, 4..14, 14..19, 19..24];
        let plan = Plan {
            prefix: vec![],
            tail: vec![0],
            question_start: 0,
            tokens: vec![0; 4],
            sentence_offsets: vec![0, 1, 2, 3, 4],
            chunk_offsets: vec![0, 1, 2, 4],
            topk: 1,
            phrase_width: 1,
            max_retained: 4,
        };
        let gold = GoldBytes::new(DOCUMENT, &[5..19], &plan, &spans);
        let after = |step, kept: &[u32]| {
            let kept = kept.iter().map(|&sentence| Kept { sentence, score: 0.0 }).collect();
            let (dropped, top_tokens) = (vec![], vec![]);
            gold.kept(&StepReport {
                step,
                steps: 3,
                tokens: 0,
                reused_tokens: 0,
                context_tokens: 0,
                retained_tokens: 0,
                kept,
                dropped,
                top_tokens,
                scores: Vec::new(),
            })
        };
        assert_eq!(after(0, &[0]), None, "nothing to keep yet");
        assert_eq!(after(1, &[0, 1]), Some(1.0));
        assert_eq!(after(2, &[1, 3]), Some(7.0 / 11.0));
        assert_eq!(after(2, &[1, 2]), Some(1.0));
    }
}
