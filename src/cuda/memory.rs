//! How much memory a model, a document and an answer take on the device: pure functions of shapes. The buffers are
//! allocated by these figures, `gleaner info` prints them, and work that they do not fit is refused before it starts.

use bytemuck::{Pod, Zeroable};

use crate::model::Config;
use crate::plan::PlanShape;

/// Bytes of a bf16, of an fp32 or a 32-bit integer, and of an fp64.
const HALF: usize = 2;
const WORD: usize = 4;
const DOUBLE: usize = 8;

/// 32-bit integers of a `GleanerState`, with two more that align what follows it to 16 bytes; and those of a
/// `GleanerStep` and a `GleanerSelected` in kernels.h.
pub const STATE_WORDS: usize = 16;
pub const STEP_WORDS: usize = 5;
pub const SELECTED_WORDS: usize = 3;

/// Parts that the keys are cut into where one new row attends to them.
pub const ATTENTION_SPLITS: usize = 16;

/// Keys that share a pair of softmax statistics, and question rows of which these are joined together.
const STATS_KEYS: usize = 128;
const STATS_ROWS: usize = 16;

/// Columns of the logits of so many tokens: their rows start at multiples of 16 bytes.
pub fn logit_columns(tokens: usize) -> usize {
    tokens.next_multiple_of(4)
}

/// Rows of the embedding and the head on the device: the vocabulary rounded up for the kernels.
pub fn vocab_rows(config: &Config) -> usize {
    config.vocab_size.next_multiple_of(16)
}

/// Elements of a row of the residual stream in fixed point: three a column, and two that say whether one was out of range.
pub const fn fixed_row(width: usize) -> usize {
    3 * width + 2
}

/// Bytes of a model's weights on the device: everything in bf16, and the last layer's q and k a second time, alone, for
/// scoring.
pub fn weight_bytes(config: &Config) -> u64 {
    let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
    let (q_dim, kv_dim) = (config.q_dim(), config.kv_dim());
    let linear = |out: usize, input: usize, bias: bool| out * input + if bias { out } else { 0 };
    let layer = linear(q_dim + 2 * kv_dim, hidden, config.qkv_bias)
        + linear(hidden, q_dim, config.o_bias)
        + linear(2 * mlp, hidden, config.mlp_bias)
        + linear(hidden, mlp, config.mlp_bias)
        + if config.qk_norm() { 2 * config.head_dim } else { 0 }
        + 2 * hidden;
    let scoring = linear(q_dim + kv_dim, hidden, config.qkv_bias);
    let vocabularies = if config.tie_word_embeddings { 1 } else { 2 };
    let elements = vocabularies * vocab_rows(config) * hidden + config.num_hidden_layers * layer + scoring + hidden;
    (elements * HALF) as u64
}

/// Sums of squares of a row of the residual stream: GLEANER_SQUARES in kernels.h.
pub const fn squares(width: usize) -> usize {
    width.div_ceil(512) * 16
}

/// Elements of the buffers that a pass over rows takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ActivationSizes {
    /// Of the residual stream, in each of its halves.
    pub stream: usize,
    /// Of the sums of its squares.
    pub squares: usize,
    pub attended: usize,
    pub h: usize,
    /// Cosines and sines.
    pub rope: usize,
}

impl ActivationSizes {
    pub fn new(config: &Config, rows: usize, positions: usize) -> ActivationSizes {
        ActivationSizes {
            stream: rows * config.hidden_size,
            squares: rows * squares(config.hidden_size),
            attended: rows * config.q_dim(),
            h: rows * config.intermediate_size,
            rope: positions * config.head_dim,
        }
    }

    fn bytes(&self) -> usize {
        HALF * (2 * self.stream + self.attended + self.h) + WORD * (self.squares + self.rope)
    }
}

/// Elements of the buffers that a pass over the one row of a new token takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct RowSizes {
    /// Of the residual stream.
    pub x: usize,
    pub attended: usize,
    pub h: usize,
    /// Cosines and sines.
    pub rope: usize,
}

impl RowSizes {
    fn new(config: &Config, positions: usize) -> RowSizes {
        RowSizes {
            x: config.hidden_size,
            attended: config.q_dim(),
            h: config.intermediate_size,
            rope: positions * config.head_dim,
        }
    }

    fn bytes(&self) -> usize {
        HALF * (self.attended + self.h) + WORD * (self.x + self.rope)
    }
}

/// Elements of the buffers that the steps of a document share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct StepSizes {
    /// Of each buffer with one entry a token: five of 32 bits and one of 64.
    pub tokens: usize,
    pub logits: usize,
    pub row_stats: usize,
    pub block_stats: usize,
    pub done: usize,
    pub head_sums: usize,
    pub row_weights: usize,
    /// State and logs, in 32-bit integers.
    pub journal: usize,
}

impl StepSizes {
    pub fn new(shape: &PlanShape, query_heads: usize) -> StepSizes {
        let (tokens, rows) = (shape.max_step_tokens, shape.question_rows);
        StepSizes {
            tokens,
            logits: query_heads * rows * logit_columns(tokens),
            row_stats: query_heads * rows * 2,
            block_stats: query_heads * rows * tokens.div_ceil(STATS_KEYS) * 2,
            done: query_heads * rows.div_ceil(STATS_ROWS),
            head_sums: rows * tokens,
            row_weights: rows,
            journal: STATE_WORDS + shape.chunks * (STEP_WORDS + max_log(shape) * SELECTED_WORDS),
        }
    }
}

/// Entries that the log holds for each step: no more sentences can own a best token than there are best tokens.
pub fn max_log(shape: &PlanShape) -> usize {
    shape.max_step_tokens.min(shape.topk)
}

/// Elements of a plan's tables, 32 bits each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PlanSizes {
    pub tokens: usize,
    pub sentence_offsets: usize,
    pub chunk_offsets: usize,
    /// At least one, for an empty buffer has no address.
    pub prefix: usize,
    pub tail: usize,
}

impl PlanSizes {
    pub fn new(shape: &PlanShape) -> PlanSizes {
        PlanSizes {
            tokens: shape.tokens,
            sentence_offsets: shape.sentences + 1,
            chunk_offsets: shape.chunks + 1,
            prefix: shape.prefix_tokens.max(1),
            tail: shape.tail_tokens,
        }
    }
}

/// Elements of every buffer that reading a document takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ReadSizes {
    pub activations: ActivationSizes,
    /// Queries, keys and values of all rows, in each layer but the last.
    pub qkv: usize,
    /// How many layers these are.
    pub layers: usize,
    /// The last layer's queries of the question rows, and its keys of all rows.
    pub q: usize,
    pub k: usize,
    pub steps: StepSizes,
    pub plan: PlanSizes,
}

impl ReadSizes {
    pub fn new(config: &Config, shape: &PlanShape) -> ReadSizes {
        let rows = shape.max_step_tokens;
        ReadSizes {
            activations: ActivationSizes::new(config, rows, rows),
            qkv: rows * (config.q_dim() + 2 * config.kv_dim()),
            layers: config.num_hidden_layers - 1,
            q: shape.question_rows * config.q_dim(),
            k: rows * config.kv_dim(),
            steps: StepSizes::new(shape, config.num_attention_heads),
            plan: PlanSizes::new(shape),
        }
    }

    /// The bytes of it all, by what they are for.
    pub fn parts(&self) -> [(&'static str, u64); 4] {
        let StepSizes { tokens, logits, row_stats, block_stats, done, head_sums, row_weights, journal } = self.steps;
        let keys_and_values = HALF * self.qkv * self.layers;
        let stats = row_stats + block_stats + done;
        let scoring =
            HALF * (self.q + self.k) + (5 * WORD + DOUBLE) * tokens + WORD * (logits + stats + head_sums + row_weights);
        let plan = WORD * (journal + lens(&self.plan).iter().sum::<usize>());
        [
            (ACTIVATIONS, self.activations.bytes() as u64),
            (KEYS, keys_and_values as u64),
            (SCORING, scoring as u64),
            (PLAN, plan as u64),
        ]
    }

    /// The bytes of it all.
    pub fn bytes(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// The larger of the two for each buffer.
    pub fn union(&self, other: &ReadSizes) -> ReadSizes {
        larger(self, other)
    }

    /// What a caller can lower to need less.
    pub fn remedy(&self) -> &'static str {
        let largest = self.parts().into_iter().max_by_key(|(_, bytes)| *bytes);
        match largest.map(|(part, _)| part) {
            Some(SCORING) => "shorten the question or lower the window or max_retained",
            Some(PLAN) => "lower topk or split the document",
            _ => "lower the window or max_retained",
        }
    }
}

const ACTIVATIONS: &str = "activations";
const KEYS: &str = "keys and values";
const SCORING: &str = "scoring";
const PLAN: &str = "plan and log";

/// Whether buffers of the sizes `have` serve where `needed` is asked for.
pub fn cover<T: Pod>(have: &T, needed: &T) -> bool {
    lens(have).iter().zip(lens(needed)).all(|(have, needed)| have >= needed)
}

/// The larger of the two for each length.
fn larger<T: Pod>(sizes: &T, other: &T) -> T {
    let mut larger = *sizes;
    let buffers: &mut [usize] = bytemuck::cast_slice_mut(std::slice::from_mut(&mut larger));
    buffers.iter_mut().zip(lens(other)).for_each(|(len, other)| *len = (*len).max(*other));
    larger
}

/// A struct of lengths as a list of them.
fn lens<T: Pod>(sizes: &T) -> &[usize] {
    bytemuck::cast_slice(std::slice::from_ref(sizes))
}

/// Elements of every buffer that an answer takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct AnswerSizes {
    /// Of the prompt.
    pub prompt: ActivationSizes,
    /// Of one new row.
    pub one: RowSizes,
    /// Queries, keys and values of all positions, in each layer.
    pub cache: usize,
    pub logits: usize,
    pub prompt_tokens: usize,
    /// What decoding needs besides, 32 bits each: the parts of attention and whether they are done, the number of rows of
    /// the prompt and of a new row, the answer's state, the likeliest token and how it is sampled.
    pub parts: usize,
    pub done: usize,
    pub state: usize,
    /// The new row's residual stream in fixed point, 64 bits each.
    pub row: usize,
}

/// Integers of an answer's state and counters, see [`AnswerSizes::state`].
const ANSWER_WORDS: usize = 2 + 2 + 2 + 4;

impl AnswerSizes {
    pub fn new(config: &Config, prompt_tokens: usize, max_new_tokens: usize) -> AnswerSizes {
        let positions = prompt_tokens + max_new_tokens;
        let (q, dim) = (config.num_attention_heads, config.head_dim);
        AnswerSizes {
            prompt: ActivationSizes::new(config, prompt_tokens, positions),
            one: RowSizes::new(config, positions),
            cache: positions * (config.q_dim() + 2 * config.kv_dim()),
            logits: vocab_rows(config),
            prompt_tokens,
            parts: q * ATTENTION_SPLITS * (dim + 2),
            done: q,
            state: ANSWER_WORDS,
            row: fixed_row(config.hidden_size),
        }
    }

    /// The bytes of it all, for so many layers.
    pub fn bytes(&self, layers: usize) -> u64 {
        let words = self.logits + self.prompt_tokens + self.parts + self.done + self.state;
        (self.prompt.bytes() + self.one.bytes() + HALF * layers * self.cache + WORD * words + DOUBLE * self.row) as u64
    }

    /// The larger of the two for each buffer.
    pub fn union(&self, other: &AnswerSizes) -> AnswerSizes {
        larger(self, other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;
    use crate::plan::ReadParams;
    use std::path::Path;

    /// The shape of Qwen2.5-0.5B.
    fn qwen() -> Config {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let json = r#"{"architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
            "max_position_embeddings": 32768, "rope_theta": 1000000.0, "tie_word_embeddings": true}"#;
        std::fs::write(&path, json).unwrap();
        Config::open(&path).unwrap()
    }

    /// Against what the files hold: every tensor in bf16, rows up to a multiple of 16, and the last layer's q and k.
    #[test]
    fn weights_take_what_the_files_hold_and_the_scoring_copy() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let names = ["llama", "llama31_rope", "mistral", "mistral_sliding", "qwen2", "qwen3", "yarn"];
        let golden = names.map(|name| root.join("tests/golden/arch").join(name));
        for path in golden.into_iter().chain([root.join("models/gleaner-demo-16m")]) {
            let model = Model::open(&path).unwrap();
            let last = model.layers.last().unwrap();
            let scoring: usize = [&last.q_proj, &last.k_proj]
                .iter()
                .map(|linear| linear.weight.elements() + linear.bias.as_ref().map_or(0, |bias| bias.elements()))
                .sum();
            let vocabularies = if model.config.tie_word_embeddings { 1 } else { 2 };
            let padding = (model.config.vocab_size.div_ceil(16) * 16 - model.config.vocab_size)
                * model.config.hidden_size
                * vocabularies;
            let expected = 2 * (model.parameters() + scoring + padding) as u64;
            assert_eq!(weight_bytes(&model.config), expected, "{}", path.display());
        }
    }

    /// The bytes of each buffer as kernels.h and the reader describe them.
    #[test]
    fn a_reading_takes_the_sum_of_its_buffers() {
        let shape = PlanShape {
            max_step_tokens: 999,
            question_rows: 20,
            prefix_tokens: 0,
            tail_tokens: 30,
            topk: 300,
            chunks: 7,
            sentences: 400,
            tokens: 6000,
        };
        let stream = 999 * 896 * (2 + 2);
        let squares = 999 * 32 * 4;
        let attended = 999 * 14 * 64 * 2;
        let h = 999 * 4864 * 2;
        let rope = 999 * 32 * 8;
        let qkv = 999 * (14 + 2 + 2) * 64 * 2;
        let (q, k) = (20 * 14 * 64 * 2, 999 * 2 * 64 * 2);
        // prompt, owner, sentences, phrase_scores, best; scores
        let by_token = 999 * (5 * 4 + 8);
        // Rows of a multiple of four.
        let logits = 14 * 20 * 1000 * 4;
        // Of a row, of eight blocks of keys, and one count for 16 rows.
        let stats = 14 * 20 * 8 + 14 * 20 * 8 * 8 + 14 * 2 * 4;
        let (head_sums, row_weights) = (20 * 999 * 4, 20 * 4);
        let state = 16 * 4;
        let logs = 7 * 20 + 7 * 300 * 12;
        let tables = (6000 + 401 + 8 + 1 + 30) * 4;
        let parts = ReadSizes::new(&qwen(), &shape).parts().map(|(_, bytes)| bytes);
        let scoring = q + k + by_token + logits + stats + head_sums + row_weights;
        let activations = stream + squares + attended + h + rope;
        assert_eq!(parts, [activations, 23 * qkv, scoring, state + logs + tables]);
    }

    #[test]
    fn a_million_tokens_take_less_than_a_gigabyte_beside_the_weights() {
        let config = qwen();
        let params = ReadParams { window_length: 1024, max_retained: Some(2048), ..ReadParams::default() };
        let shape = PlanShape::estimate(&params, 1_000_000, 64);
        assert!((980..1100).contains(&shape.chunks), "{}", shape.chunks);
        let sizes = ReadSizes::new(&config, &shape);
        let answer = AnswerSizes::new(&config, params.max_retained() + 64, 128).bytes(24);
        let total = sizes.bytes() + answer;
        assert!(total < 1_000_000_000, "{total}: {:?} and {answer}", sizes.parts());
        // 12 bytes for each of 300 entries a step.
        assert!(sizes.steps.journal * 4 < 4_000_000, "state and logs: {} words", sizes.steps.journal);
    }

    #[test]
    fn buffers_of_two_documents_hold_either() {
        let shape = PlanShape::estimate(&ReadParams::default(), 50_000, 10);
        let wide = ReadParams { window_length: 4096, ..ReadParams::default() };
        let (few_rows, short) = (PlanShape::estimate(&wide, 20_000, 10), PlanShape { question_rows: 900, ..shape });
        let config = qwen();
        let (a, b) = (ReadSizes::new(&config, &few_rows), ReadSizes::new(&config, &short));
        let both = a.union(&b);
        assert!(!cover(&a, &b) && !cover(&b, &a));
        assert!(cover(&both, &a) && cover(&both, &b));
        assert_eq!((both.qkv, both.q), (a.qkv, b.q));
        assert!(both.bytes() < a.bytes() + b.bytes());
    }

    #[test]
    fn the_remedy_is_for_what_takes_most() {
        let remedy = |shape: PlanShape| ReadSizes::new(&qwen(), &shape).remedy();
        let shape = PlanShape::estimate(&ReadParams::default(), 1_000_000, 64);
        assert!(remedy(shape).contains("the window"));
        assert!(remedy(PlanShape { question_rows: 1000, ..shape }).contains("shorten the question"));
        let many = PlanShape { topk: 16384, chunks: 100_000, ..shape };
        assert!(remedy(many).contains("topk"));
    }

    /// The cache is most of it: 24 layers of 18 heads of 64 in bf16 for each position.
    #[test]
    fn an_answer_takes_the_sum_of_its_buffers() {
        let cache = 24 * 1100 * 18 * 64 * 2;
        let row = 896 * (2 + 2) + 32 * 4 + 896 * 2 + 4864 * 2;
        let new_row = 896 * 4 + 896 * 2 + 4864 * 2;
        let tables = 2 * 1100 * 32 * 8;
        // Of each query head and of each of 16 parts a sum of values, a maximum and a total.
        let parts = 14 * 16 * 66 * 4;
        let logits_and_tokens = (151936 + 1000) * 4;
        // Done parts of as many heads as there may be key heads; two counts, two integers of state; the likeliest token
        // and two words of sampling, in 64 bits.
        let integers = (14 + 2 + 2 + 2 + 4) * 4;
        // Three numbers a column, and whether one was out of range.
        let fixed_row = (3 * 896 + 2) * 8;
        let expected = cache + 1000 * row + new_row + tables + parts + logits_and_tokens + integers + fixed_row;
        assert_eq!(AnswerSizes::new(&qwen(), 1000, 100).bytes(24), expected);
    }

    #[test]
    fn buffers_of_two_answers_hold_either() {
        let (long_prompt, long_answer) = (AnswerSizes::new(&qwen(), 900, 10), AnswerSizes::new(&qwen(), 100, 2000));
        let both = long_prompt.union(&long_answer);
        assert!(!cover(&long_prompt, &long_answer) && !cover(&long_answer, &long_prompt));
        assert!(cover(&both, &long_prompt) && cover(&both, &long_answer));
        assert_eq!((both.prompt.stream, both.cache), (long_prompt.prompt.stream, long_answer.cache));
    }
}
