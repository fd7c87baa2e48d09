//! The loop's own kernels against the rules of docs/method.md, with scores that the tests make up. Nothing is rounded
//! differently here and there: all comparisons are exact.

use gleaner::Error;
use gleaner::cuda::ops::{DevicePlan, Heads, StepBuffers};
use gleaner::plan::Plan;

use super::{Gpu, Noise};

/// The geometry does not matter here.
const HEADS: Heads = Heads { q: 1, kv: 1, dim: 64, window: 0 };

/// What a step selects: sentences, whether they stay, and their scores; and what stays.
struct Selection {
    log: Vec<(u32, bool, f32)>,
    kept: Vec<u32>,
    kept_tokens: usize,
}

/// The sentences of a step's context.
fn context_of(plan: &Plan, chunk: usize, kept: &[u32]) -> Vec<u32> {
    kept.iter().copied().chain(plan.chunk(chunk)).collect()
}

fn prompt_of(plan: &Plan, context: &[u32]) -> Vec<u32> {
    let sentences = context.iter().flat_map(|&sentence| plan.sentence(sentence));
    plan.prefix.iter().chain(sentences).chain(&plan.tail).copied().collect()
}

fn select(plan: &Plan, context: &[u32], scores: &[f64]) -> Selection {
    // Box filter: for an even width the odd tap lies on the left; zeros beyond the ends.
    let (len, width) = (scores.len() as i64, plan.phrase_width as i64);
    let filter = |c: i64| {
        let mut sum = 0.0;
        for tap in c - width / 2..c - width / 2 + width {
            if (0..len).contains(&tap) {
                sum += scores[tap as usize];
            }
        }
        sum as f32
    };
    let phrase_scores: Vec<f32> = (0..len).map(filter).collect();

    // The best tokens; of equal scores the later one wins.
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| phrase_scores[b].total_cmp(&phrase_scores[a]).then(b.cmp(&a)));
    order.truncate(plan.topk as usize);
    let is_best = |token: usize| order.contains(&token);

    // The sentences that own one, with the score of their best token.
    let mut start = 0;
    let mut owners = Vec::new();
    for &sentence in context {
        let tokens = start..start + plan.sentence_len(sentence);
        start = tokens.end;
        if tokens.clone().any(is_best) {
            owners.push((sentence, phrase_scores[tokens].iter().copied().fold(0.0, f32::max)));
        }
    }

    // While they are too many, the one of lowest score goes, of equal scores the earlier.
    let tokens_of = |owners: &[(u32, f32)]| owners.iter().map(|owner| plan.sentence_len(owner.0)).sum::<usize>();
    let mut stays = owners.clone();
    while tokens_of(&stays) > plan.max_retained as usize {
        let lowest = stays.iter().min_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0))).unwrap().0;
        stays.retain(|owner| owner.0 != lowest);
    }
    Selection {
        log: owners.iter().map(|owner| (owner.0, stays.contains(owner), owner.1)).collect(),
        kept: stays.iter().map(|owner| owner.0).collect(),
        kept_tokens: tokens_of(&stays),
    }
}

/// A plan of `chunks` chunks of so many sentences of 1 to `longest` tokens.
fn plan(chunks: usize, sentences: usize, longest: usize, settings: (u32, u32, u32)) -> Plan {
    let mut noise = Noise::new((chunks * 1000 + sentences * 10 + longest) as u64);
    let (mut tokens, mut sentence_offsets) = (Vec::new(), vec![0]);
    for _ in 0..chunks * sentences {
        tokens.extend((0..1 + noise.below(longest)).map(|_| noise.below(50_000) as u32));
        sentence_offsets.push(tokens.len() as u32);
    }
    let (topk, phrase_width, max_retained) = settings;
    Plan {
        prefix: (0..5).map(|_| noise.below(50_000) as u32).collect(),
        tail: (0..9).map(|_| noise.below(50_000) as u32).collect(),
        question_start: 4,
        tokens,
        sentence_offsets,
        chunk_offsets: (0..=chunks).map(|chunk| (chunk * sentences) as u32).collect(),
        topk,
        phrase_width,
        max_retained,
    }
}

struct Loop<'a> {
    gpu: &'a Gpu,
    tables: DevicePlan,
    steps: StepBuffers,
}

impl Loop<'_> {
    fn start<'a>(gpu: &'a Gpu, plan: &Plan, reuses: bool) -> Loop<'a> {
        let tables = DevicePlan::new(&gpu.device, plan).unwrap();
        let mut steps = StepBuffers::new(&gpu.device, plan, HEADS, reuses).unwrap();
        gpu.device.start(&mut steps, &tables).unwrap();
        Loop { gpu, tables, steps }
    }

    fn select(&mut self, scores: &[f64]) {
        // Behind the context lie scores that nobody may read.
        let room = self.steps.scores().len() - scores.len();
        let scores = [scores, &vec![f64::NAN; room]].concat();
        self.gpu.device.stream().memcpy_htod(&scores, &mut self.steps.scores_mut()).unwrap();
        self.gpu.device.select(&mut self.steps, &self.tables).unwrap();
    }

    /// The prompt that lies ready, its first question row, and how many follow.
    fn ready(&self) -> (Vec<u32>, usize, usize) {
        let (tokens, first, count) = (self.steps.tokens(), self.steps.question_start(), self.steps.question_rows());
        let ints = self.gpu.fetch(tokens.ints);
        let prompt = self.gpu.fetch(self.steps.prompt());
        (prompt[..ints[tokens.index] as usize].to_vec(), ints[first.index] as usize, ints[count.index] as usize)
    }

    /// The first row that is computed, how many are, and the first question row among them.
    fn computed(&self) -> [usize; 3] {
        let ints = self.gpu.fetch(self.steps.rows().ints);
        [self.steps.first_row().index, self.steps.rows().index, self.steps.question_row().index]
            .map(|index| ints[index] as usize)
    }
}

/// How many tokens two prompts begin with that are the same sentences in both.
fn reused_tokens(plan: &Plan, before: &[u32], context: &[u32]) -> usize {
    let same = before.iter().zip(context).take_while(|(a, b)| a == b);
    plan.prefix.len() + same.map(|(&sentence, _)| plan.sentence_len(sentence)).sum::<usize>()
}

/// All steps of a plan; returns how many sentences were dropped for capacity.
fn check(gpu: &Gpu, plan: &Plan, mut score: impl FnMut(usize) -> f64, name: &str) -> usize {
    plan.validate(50_000).unwrap();
    let mut on_gpu = Loop::start(gpu, plan, true);
    let (mut kept, mut dropped, mut before) = (Vec::new(), 0, None);
    for chunk in 0..plan.chunks() {
        let context = context_of(plan, chunk, &kept);
        let reused = before.map_or(0, |before: Vec<u32>| reused_tokens(plan, &before, &context));
        let prompt = prompt_of(plan, &context);
        let context_tokens = prompt.len() - plan.prefix.len() - plan.tail.len();
        let question_start = prompt.len() - plan.tail.len() + plan.question_start as usize;
        let question_rows = plan.tail.len() - plan.question_start as usize;
        assert!(on_gpu.ready() == (prompt.clone(), question_start, question_rows), "{name}: prompt of step {chunk}");
        let computed = [reused, prompt.len() - reused, question_start - reused];
        assert_eq!(on_gpu.computed(), computed, "{name}: rows of step {chunk}");

        let scores: Vec<f64> = (0..context_tokens).map(&mut score).collect();
        on_gpu.select(&scores);
        let expected = select(plan, &context, &scores);
        let log = on_gpu.steps.read_back(&gpu.device).unwrap();
        let counts = log.steps[chunk];
        let counts = [counts.tokens, counts.context_tokens, counts.kept_tokens, counts.reused_tokens];
        let counted = [prompt.len(), context_tokens, expected.kept_tokens, reused];
        assert_eq!(counts, counted, "{name}: step {chunk}");
        assert_eq!(log.selected[chunk], expected.log, "{name}: step {chunk}");
        dropped += expected.log.len() - expected.kept.len();
        assert_eq!(log.dropped_for_capacity, dropped, "{name}: step {chunk}");
        kept = expected.kept;
        before = Some(context);
    }
    assert!(on_gpu.ready().0.is_empty(), "{name}: a prompt behind the last step");
    dropped
}

/// Scores that spread over thirty decades.
fn decades(seed: u64) -> impl FnMut(usize) -> f64 {
    let mut noise = Noise::new(seed);
    move |_| 10f64.powf(-30.0 * noise.unit())
}

/// Scores of which a few values are each taken many times.
fn ties(seed: u64, values: usize) -> impl FnMut(usize) -> f64 {
    let mut noise = Noise::new(seed);
    move |_| noise.below(values) as f64
}

const UNLIMITED: u32 = 100_000;

#[test]
#[ignore = "needs a GPU"]
fn selection_follows_the_rules() {
    let gpu = Gpu::open();
    // Odd and even widths, and one that is wider than the context.
    for phrase_width in [1, 2, 5, 8, 256] {
        for topk in [1, 30, 300] {
            let plan = plan(6, 23, 20, (topk, phrase_width, UNLIMITED));
            check(&gpu, &plan, decades(topk as u64), &format!("top {topk}, width {phrase_width}"));
        }
    }
    let mut bare = plan(3, 10, 9, (12, 3, UNLIMITED));
    bare.prefix.clear();
    bare.question_start = 0;
    check(&gpu, &bare, decades(7), "no prefix");
}

/// What a prompt begins with as the one before is not computed again.
#[test]
#[ignore = "needs a GPU"]
fn rows_that_stay_are_reused() {
    let gpu = Gpu::open();
    // The later a token the worse, so that what leads the context stays.
    let mut score = 1e9;
    let falling = move |_| {
        score -= 1.0;
        score
    };
    let plan = plan(4, 60, 20, (500, 1, UNLIMITED));
    check(&gpu, &plan, falling, "what comes first stays");
    let mut on_gpu = Loop::start(&gpu, &plan, true);
    let context = on_gpu.ready().0.len() - plan.prefix.len() - plan.tail.len();
    let scores: Vec<f64> = (0..context).map(|token| (context - token) as f64).collect();
    on_gpu.select(&scores);
    assert!(on_gpu.computed()[0] >= 256, "of 500 best tokens at the beginning: {:?}", on_gpu.computed());

    let mut on_gpu = Loop::start(&gpu, &plan, false);
    on_gpu.select(&scores);
    let [first_row, rows, question_row] = on_gpu.computed();
    let (prompt, question_start, _) = on_gpu.ready();
    assert_eq!([first_row, rows, question_row], [0, prompt.len(), question_start], "not asked for");
}

/// More sentences and tokens than the kernel has threads, and than it holds in shared memory.
#[test]
#[ignore = "needs a GPU"]
fn selection_of_long_contexts() {
    let gpu = Gpu::open();
    check(&gpu, &plan(3, 3000, 1, (1500, 8, UNLIMITED)), decades(1), "sentences of one token");
    check(&gpu, &plan(3, 1300, 3, (300, 4, UNLIMITED)), decades(2), "many short sentences");
    check(&gpu, &plan(2, 3, 2500, (300, 8, UNLIMITED)), decades(3), "few long sentences");
    assert!(check(&gpu, &plan(4, 2000, 1, (900, 1, 700)), ties(4, 50), "over capacity") > 0);
    check(&gpu, &plan(2, 5000, 3, (300, 8, UNLIMITED)), decades(5), "in global memory");
    assert!(check(&gpu, &plan(3, 5000, 3, (6000, 1, 3000)), ties(6, 5), "in global memory, over capacity") > 0);
}

#[test]
#[ignore = "needs a GPU"]
fn of_equal_scores_the_later_token_wins() {
    let gpu = Gpu::open();
    for values in [1, 2, 3, 10] {
        for topk in [1, 17, 64] {
            check(&gpu, &plan(4, 30, 6, (topk, 1, UNLIMITED)), ties(topk as u64, values), "ties");
            check(&gpu, &plan(4, 30, 6, (topk, 8, UNLIMITED)), ties(topk as u64, values), "filtered ties");
        }
    }
    check(&gpu, &plan(3, 700, 4, (300, 1, UNLIMITED)), |_| 1.0, "all alike");
    check(&gpu, &plan(3, 30, 4, (10, 8, UNLIMITED)), |_| 0.0, "all zero");
}

#[test]
#[ignore = "needs a GPU"]
fn everything_is_selected_where_topk_exceeds_the_context() {
    let gpu = Gpu::open();
    for topk in [400, 16_384] {
        check(&gpu, &plan(3, 20, 6, (topk, 8, UNLIMITED)), decades(5), "all");
        check(&gpu, &plan(3, 20, 6, (topk, 8, UNLIMITED)), |_| 0.0, "all, zero");
    }
    // As many as the first context has, one fewer and one more.
    let tokens = plan(3, 20, 6, (1, 1, 1)).sentence_offsets[20];
    for topk in [tokens - 1, tokens, tokens + 1] {
        check(&gpu, &plan(3, 20, 6, (topk, 8, UNLIMITED)), decades(6), "all but one or not");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn chunks_of_one_sentence() {
    let gpu = Gpu::open();
    check(&gpu, &plan(9, 1, 12, (4, 3, UNLIMITED)), decades(8), "sentences");
    check(&gpu, &plan(9, 1, 1, (4, 8, UNLIMITED)), decades(9), "single tokens");
    check(&gpu, &plan(1, 1, 1, (1, 1, UNLIMITED)), decades(10), "a single token");
    check(&gpu, &plan(9, 1, 12, (4, 3, 0)), decades(11), "nothing stays");
}

/// The lowest-scored sentences go, of equal scores the earlier, until the rest fits; of those behind the first that goes
/// none stays, be it ever so short.
#[test]
#[ignore = "needs a GPU"]
fn capacity_drops_the_lowest_scored() {
    let gpu = Gpu::open();
    for max_retained in [0, 1, 20, 40, 100] {
        let mut plan = plan(5, 30, 12, (40, 4, max_retained));
        assert!(check(&gpu, &plan, decades(12), &format!("at most {max_retained}")) > 0);
        plan.phrase_width = 1;
        assert!(check(&gpu, &plan, ties(13, 3), &format!("at most {max_retained}, ties")) > 0);
    }
}

/// No score may be infinite or not a number, nor exceed fp32 behind the filter; the error names the step, and what is
/// launched behind it does nothing.
#[test]
#[ignore = "needs a GPU"]
fn scores_that_are_not_finite_are_errors() {
    let gpu = Gpu::open();
    let plan = plan(4, 20, 6, (10, 3, UNLIMITED));
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300] {
        for bad_step in 0..2 {
            let mut on_gpu = Loop::start(&gpu, &plan, true);
            for step in 0..4 {
                let (prompt, ..) = on_gpu.ready();
                assert_eq!(prompt.is_empty(), step > bad_step, "{bad} in step {bad_step}: step {step}");
                let context = prompt.len().saturating_sub(plan.prefix.len() + plan.tail.len());
                let mut scores = vec![1.0; context];
                if step == bad_step {
                    scores[context / 2] = bad;
                }
                on_gpu.select(&scores);
            }
            let result = on_gpu.steps.read_back(&gpu.device);
            assert!(matches!(result, Err(Error::NotFinite { step }) if step == bad_step), "{bad} in step {bad_step}");
        }
    }
}

/// A prompt that outgrows its buffers ends the reading with an error.
#[test]
#[ignore = "needs a GPU"]
fn a_prompt_that_does_not_fit_is_an_error() {
    let gpu = Gpu::open();
    let small = plan(2, 20, 8, (60, 1, 5));
    let large = Plan { max_retained: UNLIMITED, ..small.clone() };
    let mut on_gpu = Loop::start(&gpu, &small, true);
    on_gpu.tables = DevicePlan::new(&gpu.device, &large).unwrap();
    let context = on_gpu.ready().0.len() - small.prefix.len() - small.tail.len();
    let mut score = decades(14);
    on_gpu.select(&(0..context).map(&mut score).collect::<Vec<_>>());
    assert_eq!((on_gpu.ready(), on_gpu.computed()), ((Vec::new(), 0, 0), [0; 3]));
    let error = on_gpu.steps.read_back(&gpu.device).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("planned for"), "{error}");
}
