//! From head-summed attention to kept sentences, in fp64 and in the reference's order of operations
//! (infini-retri 0.0.3, `compute_phrase_scores`, `get_focus_index`, `select_sentence`).

use std::ops::Range;

use crate::plan::Plan;
use crate::reader::{DropReason, Kept};

/// Attention from the question rows of one step, summed over heads.
pub struct QuestionAttention {
    /// `[rows, tokens]`
    pub head_sums: Vec<f32>,
    /// Tokens of the prompt; the rows are its last ones.
    pub tokens: usize,
}

impl QuestionAttention {
    /// The weight of each question row: its attention to the question itself. Columns are added from left to right in
    /// fp32, as numpy does in the reference. Taken in the first step and kept for all later ones.
    pub fn question_weights(&self) -> Vec<f32> {
        let rows = self.head_sums.len() / self.tokens;
        let question = self.tokens - rows..self.tokens;
        self.head_sums.chunks(self.tokens).map(|row| row[question.clone()].iter().sum()).collect()
    }

    /// A score for each token of `context`: box filter of `phrase_width` taps over each row, times the row's weight,
    /// twice, rows added from top to bottom.
    ///
    /// The filter covers `c - phrase_width / 2 ..= c + (phrase_width - 1) / 2`, clipped to the context: for an even
    /// width the odd tap lies on the left.
    pub fn token_scores(&self, weights: &[f32], context: Range<usize>, phrase_width: usize) -> Vec<f64> {
        let len = context.len();
        let mut scores = vec![0.0; len];
        for (row, &weight) in self.head_sums.chunks(self.tokens).zip(weights) {
            let row = &row[context.clone()];
            let weight = weight as f64;
            for (c, score) in scores.iter_mut().enumerate() {
                let from = c.saturating_sub(phrase_width / 2);
                let to = (c + phrase_width.div_ceil(2)).min(len);
                let phrase: f64 = row[from..to].iter().map(|&p| p as f64).sum();
                *score += weight * (weight * phrase);
            }
        }
        scores
    }
}

/// Indices of the `k` largest scores, best first; of equal scores the larger index wins.
pub fn top_k(scores: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let best_first = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(b.cmp(a));
    if k < order.len() {
        order.select_nth_unstable_by(k, best_first);
        order.truncate(k);
    }
    order.sort_unstable_by(best_first);
    order
}

/// A sentence in the context of a step.
pub struct ContextSentence {
    /// Its index in the plan.
    pub sentence: u32,
    /// Its tokens, as indices into the context.
    pub tokens: Range<usize>,
}

/// What a step keeps and what it drops.
pub struct Selection {
    /// Ascending.
    pub kept: Vec<Kept>,
    /// In order of sentence.
    pub dropped: Vec<(u32, DropReason)>,
}

/// Keeps the sentences that own one of the `selected` tokens; then, while their tokens exceed the plan's
/// `max_retained`, drops the one of lowest score (of equal scores the earlier).
pub fn select_sentences(plan: &Plan, context: &[ContextSentence], scores: &[f64], selected: &[usize]) -> Selection {
    let mut is_selected = vec![false; scores.len()];
    for &token in selected {
        is_selected[token] = true;
    }
    let mut dropped = Vec::new();
    let mut kept = Vec::new();
    for ContextSentence { sentence, tokens } in context {
        if is_selected[tokens.clone()].contains(&true) {
            let score = scores[tokens.clone()].iter().copied().fold(0.0, f64::max);
            kept.push((*sentence, score));
        } else {
            dropped.push((*sentence, DropReason::NotInTopk));
        }
    }
    kept.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0)));
    let mut tokens = 0;
    let fitting = kept
        .iter()
        .position(|&(sentence, _)| {
            tokens += plan.sentence_len(sentence);
            tokens > plan.max_retained as usize
        })
        .unwrap_or(kept.len());
    dropped.extend(kept.drain(fitting..).map(|(sentence, _)| (sentence, DropReason::MaxRetained)));
    dropped.sort_unstable_by_key(|&(sentence, _)| sentence);
    kept.sort_unstable_by_key(|&(sentence, _)| sentence);
    Selection {
        kept: kept.into_iter().map(|(sentence, score)| Kept { sentence, score: score as f32 }).collect(),
        dropped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(row: &[f32], phrase_width: usize) -> Vec<f64> {
        let attention = QuestionAttention { head_sums: row.to_vec(), tokens: row.len() };
        attention.token_scores(&[1.0], 0..row.len(), phrase_width)
    }

    /// From scipy.signal.convolve2d(mode="same").
    #[test]
    fn filters_like_scipy() {
        assert_eq!(filtered(&[1.0, 2.0, 3.0, 4.0, 5.0], 8), [10.0, 15.0, 15.0, 15.0, 15.0]);
        assert_eq!(filtered(&[1.0, 2.0, 3.0], 8), [6.0, 6.0, 6.0]);
        assert_eq!(filtered(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8), [10.0, 15.0, 21.0, 28.0, 28.0, 27.0, 25.0]);
        assert_eq!(filtered(&[1.0, 2.0, 4.0], 3), [3.0, 7.0, 6.0]);
        assert_eq!(filtered(&[1.0, 2.0, 4.0], 1), [1.0, 2.0, 4.0]);
    }

    #[test]
    fn weights_are_squared_and_rows_added() {
        let attention = QuestionAttention { head_sums: vec![1.0, 2.0, 9.0, 9.0, 3.0, 4.0, 9.0, 9.0], tokens: 4 };
        assert_eq!(attention.question_weights(), [18.0, 18.0]);
        assert_eq!(attention.token_scores(&[2.0, 3.0], 0..2, 1), [4.0 + 27.0, 8.0 + 36.0]);
    }

    #[test]
    fn ties_go_to_the_larger_index() {
        let mut best = top_k(&[1.0, 2.0, 2.0, 2.0, 2.0, 0.0, 2.0, 2.0], 3);
        best.sort_unstable();
        assert_eq!(best, [4, 6, 7]);
        assert_eq!(top_k(&[1.0, 3.0], 9), [1, 0]);
    }

    #[test]
    fn capacity_drops_the_lowest_scores_first() {
        let plan = Plan {
            prefix: vec![],
            tail: vec![0],
            question_start: 0,
            tokens: vec![0; 9],
            sentence_offsets: vec![0, 3, 6, 9],
            chunk_offsets: vec![],
            topk: 3,
            phrase_width: 1,
            max_retained: 6,
        };
        let context: Vec<_> =
            (0..3).map(|s| ContextSentence { sentence: s, tokens: s as usize * 3..s as usize * 3 + 3 }).collect();
        let scores = [0.0, 0.0, 5.0, 1.0, 0.0, 0.0, 0.0, 7.0, 0.0];
        let selection = select_sentences(&plan, &context, &scores, &[2, 3, 7]);
        assert_eq!(selection.kept, [Kept { sentence: 0, score: 5.0 }, Kept { sentence: 2, score: 7.0 }]);
        assert_eq!(selection.dropped, [(1, DropReason::MaxRetained)]);
        let selection = select_sentences(&plan, &context, &scores, &[7]);
        assert_eq!(selection.dropped, [(0, DropReason::NotInTopk), (1, DropReason::NotInTopk)]);
    }
}
