//! The loop on the device: a plan's tables, the state that steps hand on, and the launches from the final layer's keys
//! and queries to the next prompt.

use cudarc::driver::CudaViewMut;

use super::*;
use crate::cuda::device::Allocator;
use crate::cuda::memory::{self, PlanSizes, StepSizes};
use crate::plan::Plan;

/// Places of the state's integers that other launches read.
pub mod state {
    use super::ffi::GleanerState;
    use std::mem::offset_of;

    /// Tokens of the step's prompt.
    pub const TOKENS: usize = offset_of!(GleanerState, tokens) / 4;
    /// The first token that is computed.
    pub const FIRST_ROW: usize = offset_of!(GleanerState, first_row) / 4;
    /// Number of tokens from there on.
    pub const ROWS: usize = offset_of!(GleanerState, rows) / 4;
    /// The first question row, as a token of the prompt.
    pub const QUESTION_START: usize = offset_of!(GleanerState, question_start) / 4;
    /// The same, of the rows that are computed.
    pub const QUESTION_ROW: usize = offset_of!(GleanerState, question_row) / 4;
    /// Number of question rows.
    pub const QUESTION_ROWS: usize = offset_of!(GleanerState, question_rows) / 4;
    /// Number of integers.
    pub const LEN: usize = size_of::<GleanerState>() / 4;
}

/// What a step did, as it lies on the device.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Step {
    tokens: i32,
    context_tokens: i32,
    selected: i32,
    kept_tokens: i32,
    first_row: i32,
}

/// A sentence that owned one of a step's best tokens, as it lies on the device.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Selected {
    sentence: u32,
    kept: u32,
    score: f32,
}

const _: () = assert!(size_of::<Step>() == size_of::<ffi::GleanerStep>());
const _: () = assert!(size_of::<Selected>() == size_of::<ffi::GleanerSelected>());
const _: () = assert!(state::LEN.next_multiple_of(4) == memory::STATE_WORDS);
const _: () = assert!(size_of::<Step>() == memory::STEP_WORDS * 4);
const _: () = assert!(size_of::<Selected>() == memory::SELECTED_WORDS * 4);

/// A plan's tables on the device.
pub struct DevicePlan {
    sizes: PlanSizes,
    /// Tokens, sentence offsets, chunk offsets, prefix, tail.
    tables: [CudaSlice<u32>; 5],
    numbers: PlanNumbers,
}

/// A plan's integers.
#[derive(Default)]
struct PlanNumbers {
    prefix_len: i32,
    tail_len: i32,
    question_start: i32,
    chunks: i32,
    topk: i32,
    phrase_width: i32,
    max_retained: i32,
}

impl DevicePlan {
    /// Uploads a plan, which must be valid.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn new(device: &CudaDevice, plan: &Plan) -> Result<DevicePlan> {
        let mut tables = DevicePlan::allocate(&mut Allocator::new(device), PlanSizes::new(&plan.shape()))?;
        tables.upload(device, plan)?;
        Ok(tables)
    }

    /// Tables for any plan up to `sizes`.
    pub(in crate::cuda) fn allocate(allocator: &mut Allocator, sizes: PlanSizes) -> Result<DevicePlan> {
        let PlanSizes { tokens, sentence_offsets, chunk_offsets, prefix, tail } = sizes;
        let tables = [
            allocator.zeros(tokens)?,
            allocator.zeros(sentence_offsets)?,
            allocator.zeros(chunk_offsets)?,
            allocator.zeros(prefix)?,
            allocator.zeros(tail)?,
        ];
        Ok(DevicePlan { sizes, tables, numbers: PlanNumbers::default() })
    }

    /// Uploads a plan, which must be valid, in the place of the one before.
    pub(in crate::cuda) fn upload(&mut self, device: &CudaDevice, plan: &Plan) -> Result<()> {
        let op = || "copying the plan to the GPU".to_owned();
        let fits = memory::cover(&self.sizes, &PlanSizes::new(&plan.shape()));
        require(fits, op, "its tables are smaller than the plan")?;
        let values = [&plan.tokens, &plan.sentence_offsets, &plan.chunk_offsets, &plan.prefix, &plan.tail];
        for (values, table) in values.into_iter().zip(&mut self.tables).filter(|(values, _)| !values.is_empty()) {
            device.upload_into(&op(), values, table)?;
        }
        self.numbers = PlanNumbers {
            prefix_len: plan.prefix.len() as i32,
            tail_len: plan.tail.len() as i32,
            question_start: plan.question_start as i32,
            chunks: plan.chunks() as i32,
            topk: plan.topk.min(i32::MAX as u32) as i32,
            phrase_width: plan.phrase_width.min(i32::MAX as u32) as i32,
            max_retained: plan.max_retained.min(i32::MAX as u32) as i32,
        };
        Ok(())
    }

    fn raw(&self, device: &CudaDevice) -> ffi::GleanerPlan {
        let [tokens, sentence_offsets, chunk_offsets, prefix, tail] =
            self.tables.each_ref().map(|table| device.address(table) as *const u32);
        let PlanNumbers { prefix_len, tail_len, question_start, chunks, topk, phrase_width, max_retained } =
            self.numbers;
        ffi::GleanerPlan {
            tokens,
            sentence_offsets,
            chunk_offsets,
            prefix,
            tail,
            prefix_len,
            tail_len,
            question_start,
            chunks,
            topk,
            phrase_width,
            max_retained,
        }
    }
}

/// What the steps of one document share on the device.
pub struct StepBuffers {
    /// All that is read back, so that one copy brings it: the state, padded to [`memory::STATE_WORDS`]; a [`Step`] a
    /// chunk; and `max_log` times [`Selected`] a chunk.
    journal: CudaSlice<i32>,
    prompt: CudaSlice<u32>,
    head_sums: CudaSlice<f32>,
    logits: CudaSlice<f32>,
    row_stats: CudaSlice<f32>,
    block_stats: CudaSlice<f32>,
    /// Blocks of keys whose statistics are there; zero between two launches.
    done: CudaSlice<i32>,
    row_weights: CudaSlice<f32>,
    scores: CudaSlice<f64>,
    owner: CudaSlice<i32>,
    sentences: CudaSlice<u32>,
    best: CudaSlice<u32>,
    phrase_scores: CudaSlice<f32>,
    sizes: StepSizes,
    /// Of the plan that they are prepared for, as are the next three.
    chunks: usize,
    max_tokens: usize,
    max_rows: usize,
    max_log: usize,
    reuses: bool,
}

/// A step, counted in tokens.
#[derive(Clone, Copy)]
pub struct StepCounts {
    /// Of its prompt.
    pub tokens: usize,
    /// Of them the context's.
    pub context_tokens: usize,
    /// Of the sentences that stay.
    pub kept_tokens: usize,
    /// At the beginning of the prompt, those whose keys and values the step before had left.
    pub reused_tokens: usize,
}

/// What a document's steps left, in plain numbers.
pub struct StepLog {
    /// Each step.
    pub steps: Vec<StepCounts>,
    /// Of each step the sentences that owned a best token, whether they stay, and their scores.
    pub selected: Vec<Vec<(u32, bool, f32)>>,
    /// Sentences dropped for capacity, over all steps.
    pub dropped_for_capacity: usize,
}

impl StepBuffers {
    /// Buffers for `plan`. `reuses` says whether the keys and values of each step stay where the next finds them.
    ///
    /// # Errors
    /// [`Error::Cuda`], out of memory among them.
    pub fn new(device: &CudaDevice, plan: &Plan, heads: Heads, reuses: bool) -> Result<StepBuffers> {
        let sizes = StepSizes::new(&plan.shape(), heads.q);
        let mut buffers = StepBuffers::allocate(&mut Allocator::new(device), sizes)?;
        buffers.prepare(plan, heads, reuses)?;
        Ok(buffers)
    }

    /// Buffers for any plan up to `sizes`, which are to be prepared for one before use.
    pub(in crate::cuda) fn allocate(allocator: &mut Allocator, sizes: StepSizes) -> Result<StepBuffers> {
        let tokens = sizes.tokens;
        Ok(StepBuffers {
            journal: allocator.zeros(sizes.journal)?,
            prompt: allocator.zeros(tokens)?,
            head_sums: allocator.zeros(sizes.head_sums)?,
            logits: allocator.zeros(sizes.logits)?,
            row_stats: allocator.zeros(sizes.row_stats)?,
            block_stats: allocator.zeros(sizes.block_stats)?,
            done: allocator.zeros(sizes.done)?,
            row_weights: allocator.zeros(sizes.row_weights)?,
            scores: allocator.zeros(tokens)?,
            owner: allocator.zeros(tokens)?,
            sentences: allocator.zeros(tokens)?,
            best: allocator.zeros(tokens)?,
            phrase_scores: allocator.zeros(tokens)?,
            sizes,
            chunks: 0,
            max_tokens: 0,
            max_rows: 0,
            max_log: 0,
            reuses: false,
        })
    }

    /// Makes the buffers `plan`'s. Of the plan before nothing is read but counts that are zero: whatever else a step
    /// reads, it or an earlier step of the same plan wrote.
    pub(in crate::cuda) fn prepare(&mut self, plan: &Plan, heads: Heads, reuses: bool) -> Result<()> {
        let shape = plan.shape();
        let covered = memory::cover(&self.sizes, &StepSizes::new(&shape, heads.q));
        require(covered, || "preparing a document".into(), "the step buffers are smaller than its plan")?;
        self.chunks = shape.chunks;
        self.max_tokens = shape.max_step_tokens;
        self.max_rows = shape.question_rows;
        self.max_log = memory::max_log(&shape);
        self.reuses = reuses;
        Ok(())
    }

    fn raw(&mut self, device: &CudaDevice) -> ffi::GleanerLoop {
        let state = device.address_mut(&mut self.journal) as *mut i32;
        let step_log = state.wrapping_add(memory::STATE_WORDS);
        ffi::GleanerLoop {
            state: state as *mut _,
            prompt: device.address_mut(&mut self.prompt) as *mut _,
            owner: device.address_mut(&mut self.owner) as *mut _,
            sentences: device.address_mut(&mut self.sentences) as *mut _,
            scores: device.address_mut(&mut self.scores) as *mut _,
            phrase_scores: device.address_mut(&mut self.phrase_scores) as *mut _,
            best: device.address_mut(&mut self.best) as *mut _,
            log: step_log.wrapping_add(self.chunks * memory::STEP_WORDS) as *mut _,
            step_log: step_log as *mut _,
            max_tokens: self.max_tokens as i32,
            max_log: self.max_log as i32,
            reuses: self.reuses.into(),
        }
    }

    /// Tokens of the step's prompt.
    pub fn tokens(&self) -> Rows<'_> {
        Rows { ints: &self.journal, index: state::TOKENS, max: self.max_tokens }
    }

    /// Those that are computed.
    pub fn rows(&self) -> Rows<'_> {
        Rows { ints: &self.journal, index: state::ROWS, max: self.max_tokens }
    }

    /// The first of them.
    pub fn first_row(&self) -> Shift<'_> {
        Shift { ints: &self.journal, index: state::FIRST_ROW }
    }

    /// Its question rows.
    pub fn question_rows(&self) -> Rows<'_> {
        Rows { ints: &self.journal, index: state::QUESTION_ROWS, max: self.max_rows }
    }

    /// The first of them, as a token of the prompt.
    pub fn question_start(&self) -> Shift<'_> {
        Shift { ints: &self.journal, index: state::QUESTION_START }
    }

    /// The same, of the rows that are computed.
    pub fn question_row(&self) -> Shift<'_> {
        Shift { ints: &self.journal, index: state::QUESTION_ROW }
    }

    /// The step's prompt, `[max_tokens]`.
    pub fn prompt(&self) -> &CudaSlice<u32> {
        &self.prompt
    }

    /// Probabilities of the question rows, summed over heads, `[max_rows, max_tokens]`.
    pub fn head_sums(&self) -> &CudaSlice<f32> {
        &self.head_sums
    }

    /// Scores of the context's tokens before the box filter, `[max_tokens]`.
    pub fn scores(&self) -> &CudaSlice<f64> {
        &self.scores
    }

    /// The same, for a caller with scores of its own. A view, so that the buffer keeps its length.
    pub fn scores_mut(&mut self) -> CudaViewMut<'_, f64> {
        self.scores.slice_mut(..)
    }

    /// Scores of the context's tokens behind the box filter, `[max_tokens]` or more.
    pub(in crate::cuda) fn phrase_scores(&self) -> &CudaSlice<f32> {
        &self.phrase_scores
    }

    /// The readback: what all steps did, and the error flags. Waits for the device.
    ///
    /// # Errors
    /// [`Error::NotFinite`], [`Error::Cuda`].
    pub fn read_back(&self, device: &CudaDevice) -> Result<StepLog> {
        let step_words = self.chunks * memory::STEP_WORDS;
        let words = memory::STATE_WORDS + step_words + self.chunks * self.max_log * memory::SELECTED_WORDS;
        let journal: Vec<i32> = device.download("reading a document", &self.journal.slice(..words))?;
        let (state, logs) = journal.split_at(memory::STATE_WORDS);
        let (steps, log) = logs.split_at(step_words);
        let at = |offset: usize| state[offset / 4];
        let error = at(std::mem::offset_of!(ffi::GleanerState, error));
        if error & ffi::GLEANER_ERROR_NOT_FINITE as i32 != 0 {
            return Err(Error::NotFinite { step: at(std::mem::offset_of!(ffi::GleanerState, chunk)) as usize });
        }
        if error & ffi::GLEANER_ERROR_CAPACITY as i32 != 0 {
            let message = format!("a step has more than the {} tokens that were planned for", self.max_tokens);
            return Err(Error::Cuda { op: "reading a document".into(), message });
        }
        let steps: &[Step] = bytemuck::cast_slice(steps);
        let log: &[Selected] = bytemuck::cast_slice(log);
        let selected = steps.iter().zip(log.chunks(self.max_log)).map(|(step, log)| {
            log[..step.selected as usize].iter().map(|entry| (entry.sentence, entry.kept == 1, entry.score)).collect()
        });
        Ok(StepLog {
            selected: selected.collect(),
            steps: steps
                .iter()
                .map(|step| StepCounts {
                    tokens: step.tokens as usize,
                    context_tokens: step.context_tokens as usize,
                    kept_tokens: step.kept_tokens as usize,
                    reused_tokens: step.first_row as usize,
                })
                .collect(),
            dropped_for_capacity: at(std::mem::offset_of!(ffi::GleanerState, dropped_for_capacity)) as usize,
        })
    }
}

impl CudaDevice {
    /// Writes the first step's prompt.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn start(&self, steps: &mut StepBuffers, plan: &DevicePlan) -> Result<()> {
        let _kernel = self.kernel("start", "", 1, Work::Uncounted);
        // SAFETY: every array of the loop has the length that kernels.h asks for (`StepBuffers::prepare`), the plan was
        // validated, and its step is no longer than `max_tokens`, which the kernel checks too.
        check(unsafe { ffi::gleaner_start(&steps.raw(self), &plan.raw(self), self.raw_stream()) }, || "start".into())
    }

    /// From the last layer's queries `[max_rows, q * dim]` and keys `[max_tokens, kv * dim]` to the scores of the
    /// context's tokens: two launches.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn question_scores(
        &self,
        steps: &mut StepBuffers,
        q: &CudaSlice<bf16>,
        k: &CudaSlice<bf16>,
        heads: Heads,
    ) -> Result<()> {
        let (max_rows, max_tokens) = (steps.max_rows, steps.max_tokens);
        let op = || {
            format!("question_scores [{max_rows}, {max_tokens}, {} of {} heads of {}]", heads.q, heads.kv, heads.dim)
        };
        check_heads(&op, heads)?;
        let fits = q.len() >= max_rows * heads.q * heads.dim && k.len() >= max_tokens * heads.kv * heads.dim;
        require(fits, op, "a buffer is smaller than its rows")?;
        require(heads.q <= 128, op, "at most 128 query heads")?;
        let logits = heads.q * max_rows * memory::logit_columns(max_tokens);
        require(steps.logits.len() >= logits, op, "the step buffers have fewer heads")?;
        let state = self.address(&steps.journal) as *const ffi::GleanerState;
        let (q_dim, kv_dim) = (heads.q * heads.dim, heads.kv * heads.dim);
        let work = Work::QuestionLogits { question_rows: max_rows, q_dim, kv_dim };
        let kernel = self.kernel("question_logits", "", max_tokens, work);
        check(
            // SAFETY: the step buffers were made for these rows, tokens and heads; q and k hold them (checked above).
            unsafe {
                ffi::gleaner_question_logits(
                    self.address_mut(&mut steps.logits) as *mut f32,
                    self.address_mut(&mut steps.row_stats),
                    self.address_mut(&mut steps.block_stats),
                    self.address_mut(&mut steps.done) as *mut i32,
                    self.address(q),
                    self.address(k),
                    state,
                    max_rows as c_int,
                    max_tokens as c_int,
                    heads.q as c_int,
                    heads.kv as c_int,
                    heads.dim as c_int,
                    heads.window as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )?;
        drop(kernel);
        let _kernel = self.kernel("question_scores", "", max_tokens, Work::Uncounted);
        check(
            // SAFETY: as above.
            unsafe {
                ffi::gleaner_question_scores(
                    self.address_mut(&mut steps.scores) as *mut f64,
                    self.address_mut(&mut steps.head_sums) as *mut f32,
                    self.address_mut(&mut steps.row_weights) as *mut f32,
                    self.address(&steps.logits) as *const f32,
                    self.address(&steps.row_stats),
                    state,
                    max_rows as c_int,
                    max_tokens as c_int,
                    heads.q as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }

    /// From scores to the sentences that stay, the step's log and the next step's prompt.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn select(&self, steps: &mut StepBuffers, plan: &DevicePlan) -> Result<()> {
        let _kernel = self.kernel("select", "", steps.max_tokens, Work::Uncounted);
        // SAFETY: as in `start`.
        check(unsafe { ffi::gleaner_select(&steps.raw(self), &plan.raw(self), self.raw_stream()) }, || "select".into())
    }
}
