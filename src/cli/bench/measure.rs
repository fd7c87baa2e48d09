//! What is timed, on synthetic plans through the [`Reader`] trait.

use std::ops::ControlFlow;
use std::thread;
use std::time::{Duration, Instant};

use gleaner::model::{Config, Model};
use gleaner::plan::{Plan, ReadParams};
use gleaner::reader::{Reader, Sampling};
use gleaner::text::{ChatTemplate, Frame, PromptTemplate, Tokenizer};
use gleaner::{Document, Error};

use super::super::noise::Noise;
use super::report::{Answer, DocumentReading, Step, TokenizerRate};

/// Tokens of a sentence. As they are equal, the kept ones fill `max_retained` to the last token.
pub const SENTENCE: usize = 16;
/// Tokens of a prompt around its context.
pub const FRAME: usize = 70;
/// Those of them that are question rows: the tail.
pub const QUESTION_ROWS: usize = 48;

const TOPK: u32 = 300;

/// Time that the steps between two plans should take, and most of them.
const SPAN: Duration = Duration::from_millis(250);
const MAX_STEPS: usize = 256;
/// Pairs that are timed, unless they take longer than the budget; but two.
const PAIRS: usize = 5;
const BUDGET: Duration = Duration::from_secs(3);

/// Tokens of the shorter of two answers: a reader may do its first tokens otherwise than the rest.
const FIRST_TOKENS: usize = 8;

pub struct Bench<'a> {
    pub reader: &'a dyn Reader,
    pub config: &'a Config,
    pub retained: usize,
    /// Before each reading, warm-ups too: a GPU at its power limit lowers its clocks, one that has rested does not yet.
    pub pause: Duration,
}

impl Bench<'_> {
    fn random_tokens(&self, count: usize, seed: u64) -> Vec<u32> {
        let mut noise = Noise(seed);
        (0..count).map(|_| noise.below(self.config.vocab_size) as u32).collect()
    }

    /// `tokens` random tokens in chunks of `chunk` behind a prompt head of `prefix`.
    fn plan(&self, tokens: usize, chunk: usize, prefix: usize) -> Plan {
        let sentences = tokens.div_ceil(SENTENCE);
        let per_chunk = chunk / SENTENCE;
        Plan {
            prefix: self.random_tokens(prefix, 1),
            tail: self.random_tokens(QUESTION_ROWS, 2),
            question_start: 0,
            tokens: self.random_tokens(tokens, 3),
            sentence_offsets: (0..sentences).map(|s| (s * SENTENCE) as u32).chain([tokens as u32]).collect(),
            chunk_offsets: (0..sentences).step_by(per_chunk).chain([sentences]).map(|s| s as u32).collect(),
            topk: TOPK,
            // No filter: it would gather the best tokens in few sentences, which would not fill `max_retained`.
            phrase_width: 1,
            max_retained: self.retained as u32,
        }
    }

    /// Seconds to read `plan`, and the mean tokens of its steps behind `first_steps`, and of those computed.
    fn read(&self, plan: &Plan, first_steps: usize) -> Result<(f64, [f64; 2]), Error> {
        let mut tokens = Vec::with_capacity(plan.chunks());
        thread::sleep(self.pause);
        let begun = Instant::now();
        self.reader.read(plan, &mut |report| {
            tokens.push([report.tokens, report.tokens - report.reused_tokens]);
            ControlFlow::Continue(())
        })?;
        let seconds = begun.elapsed().as_secs_f64();
        let later = &tokens[first_steps.min(tokens.len() - 1)..];
        let mean = |of: usize| later.iter().map(|tokens| tokens[of]).sum::<usize>() as f64 / later.len() as f64;
        Ok((seconds, [mean(0), mean(1)]))
    }

    /// Steps of `length` tokens: the difference of two plans that differ in their number of steps only. The reader should
    /// compute all tokens of a step.
    pub fn steps(&self, length: usize, gemm_tflops: Option<f64>) -> Result<Step, Error> {
        let room = length - FRAME - self.retained;
        let chunk = room / SENTENCE * SENTENCE;
        // What does not fill a sentence goes to the head.
        let prefix = FRAME - QUESTION_ROWS + room % SENTENCE;
        let plan = |steps: usize| self.plan(steps * chunk, chunk, prefix);
        let first_steps = first_steps(self.retained, chunk);
        let short = plan(first_steps);
        self.read(&short, first_steps)?;
        let (seconds, _) = self.read(&short, first_steps)?;
        let span = SPAN.as_secs_f64() * first_steps as f64 / seconds;
        let span = (span as usize).clamp(2, MAX_STEPS);
        let long = plan(first_steps + span);

        let mut mean_tokens = 0.0;
        let ms = pairs(BUDGET + self.pause * (2 * PAIRS as u32), || {
            let (short, _) = self.read(&short, first_steps)?;
            let (long, [mean, _]) = self.read(&long, first_steps)?;
            mean_tokens = mean;
            Ok((long - short) * 1e3 / span as f64)
        })?;
        let flops = self.config.step_flops(mean_tokens.round() as usize, QUESTION_ROWS);
        let tflops = flops as f64 / ms.median / 1e9;
        Ok(Step {
            tokens: length,
            mean_tokens,
            chunk_tokens: chunk,
            ms: ms.median,
            ms_min: ms.min,
            ms_max: ms.max,
            runs: ms.runs,
            steps_per_run: span,
            tflop: flops as f64 / 1e12,
            tflops,
            share_of_gemm: gemm_tflops.map(|ceiling| tflops / ceiling),
        })
    }

    /// The plan of a whole document.
    pub fn document_plan(&self, tokens: usize, window: usize) -> Plan {
        self.plan(tokens, window / SENTENCE * SENTENCE, FRAME - QUESTION_ROWS)
    }

    /// A whole document, read once behind its beginning.
    pub fn document(&self, plan: &Plan, window: usize) -> Result<DocumentReading, Error> {
        let first_steps = first_steps(plan.max_retained as usize, window / SENTENCE * SENTENCE);
        self.read(&beginning(plan, first_steps), first_steps)?;
        let (seconds, [mean_step_tokens, mean_computed_tokens]) = self.read(plan, first_steps)?;
        let tokens = plan.tokens.len();
        Ok(DocumentReading {
            tokens,
            window,
            steps: plan.chunks(),
            mean_step_tokens,
            mean_computed_tokens,
            seconds,
            seconds_without_reuse: None,
            tokens_per_second: tokens as f64 / seconds,
        })
    }

    /// An answer from what a document leaves.
    pub fn answer(&self, new_tokens: usize) -> Result<Answer, Error> {
        let prompt = self.random_tokens(FRAME + self.retained, 4);
        let seconds = |max_new_tokens: usize| -> Result<f64, Error> {
            let sampling = Sampling { max_new_tokens, ..Sampling::default() };
            let begun = Instant::now();
            self.reader.answer(&prompt, &sampling, &mut |_| ControlFlow::Continue(()))?;
            Ok(begun.elapsed().as_secs_f64())
        };
        seconds(FIRST_TOKENS)?;
        let prefill = pairs(BUDGET, || Ok(seconds(1)? * 1e3))?;
        let decode = pairs(BUDGET, || {
            let (short, long) = (seconds(FIRST_TOKENS)?, seconds(FIRST_TOKENS + new_tokens)?);
            Ok((long - short) * 1e3 / new_tokens as f64)
        })?;
        Ok(Answer {
            prompt_tokens: prompt.len(),
            prefill_ms: prefill.median,
            new_tokens,
            decode_ms_per_token: decode.median,
        })
    }
}

/// Steps that fill `max_retained` from chunks of `chunk` tokens. If sentences are, the later ones are all equally long.
fn first_steps(max_retained: usize, chunk: usize) -> usize {
    max_retained.div_ceil(chunk) + 1
}

/// The first `chunks` chunks of a plan.
fn beginning(plan: &Plan, chunks: usize) -> Plan {
    let mut beginning = plan.clone();
    beginning.chunk_offsets.truncate(chunks + 1);
    beginning.sentence_offsets.truncate(*beginning.chunk_offsets.last().expect("a plan has chunks") as usize + 1);
    beginning.tokens.truncate(*beginning.sentence_offsets.last().expect("a chunk has sentences") as usize);
    beginning
}

struct Spread {
    median: f64,
    min: f64,
    max: f64,
    runs: usize,
}

/// Several runs of `measure`, at least two and no more than the budget allows.
fn pairs(budget: Duration, mut measure: impl FnMut() -> Result<f64, Error>) -> Result<Spread, Error> {
    let begun = Instant::now();
    let mut runs = Vec::new();
    while runs.len() < PAIRS && (runs.len() < 2 || begun.elapsed() < budget) {
        runs.push(measure()?);
    }
    runs.sort_by(f64::total_cmp);
    let middle = runs.len() / 2;
    let median = if runs.len() % 2 == 1 { runs[middle] } else { (runs[middle - 1] + runs[middle]) / 2.0 };
    Ok(Spread { median, min: runs[0], max: runs[runs.len() - 1], runs: runs.len() })
}

/// Bytes of the text to tokenise.
const TEXT: usize = 1 << 20;

/// Text like English in the lengths of its words and sentences and in how often words return: a few words make up most of
/// it, and many are rare.
fn synthetic_text() -> String {
    const SYLLABLES: [&str; 24] = [
        "an", "ba", "cor", "den", "el", "fi", "gar", "hol", "in", "jo", "ka", "lin", "mor", "ne", "or", "pel", "qui",
        "ro", "sta", "ter", "un", "ver", "wi", "yo",
    ];
    const WORDS: f64 = 20_000.0;
    let mut noise = Noise(5);
    let mut text = String::with_capacity(TEXT + 256);
    while text.len() < TEXT {
        let words = 6 + noise.below(14);
        let start = text.len();
        for word in 0..words {
            // Zipf's law: the logarithm of a word's rank is uniform.
            let rank = WORDS.powf(noise.below(1 << 24) as f64 / (1u64 << 24) as f64) as u64;
            let mut spelling = Noise(rank);
            let separator = if word == 0 { "" } else { " " };
            text.push_str(separator);
            let syllables = 1 + spelling.below(1 + rank.ilog10() as usize);
            (0..syllables).for_each(|_| text.push_str(SYLLABLES[spelling.below(SYLLABLES.len())]));
        }
        text[start..start + 1].make_ascii_uppercase();
        text.push_str(if noise.below(8) == 0 { ".\n\n" } else { ". " });
    }
    text
}

/// The plan of a text by a model's own tokenizer, for a question that fits any; and the seconds it takes.
pub fn plan_of(model: &Model, document: &Document, params: &ReadParams) -> Result<(Plan, f64), Error> {
    let tokenizer = Tokenizer::open(&model.path.join("tokenizer.json"), model.config.vocab_size)?;
    let chat = ChatTemplate::open(&model.path)?;
    let template = PromptTemplate::default();
    let frame = Frame::new(&template, &chat, &tokenizer, "What does the text say?", params.short_tail)?;
    let begun = Instant::now();
    let (plan, _) = Plan::new(document, &frame, &tokenizer, params)?;
    Ok((plan, begun.elapsed().as_secs_f64()))
}

/// The rate at which a model's own tokenizer turns a text into a plan.
pub fn tokenizer(model: &Model) -> Result<TokenizerRate, Error> {
    let document = Document::new("synthetic text", synthetic_text())?;
    let (plan, seconds) = plan_of(model, &document, &ReadParams::default())?;
    Ok(TokenizerRate {
        bytes: document.text().len(),
        tokens: plan.tokens.len(),
        seconds,
        tokens_per_second: plan.tokens.len() as f64 / seconds,
    })
}
