//! The loop on the device: a plan's tables, the state that steps hand on, and the launches from the final layer's keys
//! and queries to the next prompt.

use cudarc::driver::{CudaViewMut, DeviceRepr};

use super::*;
use crate::cuda::device::driver_error;
use crate::plan::Plan;

/// Places of the state's integers that other launches read.
pub mod state {
    use super::ffi::GleanerState;
    use std::mem::offset_of;

    /// Live rows of the step's prompt.
    pub const TOKENS: usize = offset_of!(GleanerState, tokens) / 4;
    /// The first question row.
    pub const QUESTION_START: usize = offset_of!(GleanerState, question_start) / 4;
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

/// A plan's tables on the device.
pub struct DevicePlan {
    raw: ffi::GleanerPlan,
    _buffers: [CudaSlice<u32>; 5],
}

impl DevicePlan {
    /// Uploads a plan, which must be valid.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn new(device: &CudaDevice, plan: &Plan) -> Result<DevicePlan> {
        let upload = |values: &[u32]| device.upload("copying the plan to the GPU", values);
        // An empty buffer has no address.
        let prefix = if plan.prefix.is_empty() { &[0][..] } else { &plan.prefix };
        let buffers = [&plan.tokens[..], &plan.sentence_offsets, &plan.chunk_offsets, prefix, &plan.tail];
        let buffers = buffers.map(upload);
        let [tokens, sentence_offsets, chunk_offsets, prefix, tail] = buffers;
        let buffers = [tokens?, sentence_offsets?, chunk_offsets?, prefix?, tail?];
        let address = |index: usize| device.address(&buffers[index]) as *const u32;
        let raw = ffi::GleanerPlan {
            tokens: address(0),
            sentence_offsets: address(1),
            chunk_offsets: address(2),
            prefix: address(3),
            tail: address(4),
            prefix_len: plan.prefix.len() as i32,
            tail_len: plan.tail.len() as i32,
            question_start: plan.question_start as i32,
            chunks: plan.chunks() as i32,
            topk: plan.topk.min(i32::MAX as u32) as i32,
            phrase_width: plan.phrase_width.min(i32::MAX as u32) as i32,
            max_retained: plan.max_retained.min(i32::MAX as u32) as i32,
        };
        Ok(DevicePlan { raw, _buffers: buffers })
    }
}

/// Integers that the state takes in the journal: what follows it is aligned to 16 bytes.
const STATE_INTS: usize = state::LEN.next_multiple_of(4);
const STEP_INTS: usize = size_of::<Step>() / 4;
const SELECTED_INTS: usize = size_of::<Selected>() / 4;

/// What the steps of one document share on the device.
pub struct StepBuffers {
    /// All that is read back, so that one copy brings it: the state, padded to [`STATE_INTS`]; a [`Step`] a chunk; and
    /// `max_log` times [`Selected`] a chunk.
    journal: CudaSlice<i32>,
    prompt: CudaSlice<u32>,
    head_sums: CudaSlice<f32>,
    logits: CudaSlice<f32>,
    stats: CudaSlice<f32>,
    row_weights: CudaSlice<f32>,
    scores: CudaSlice<f64>,
    _ints: [CudaSlice<i32>; 3],
    _words: [CudaSlice<u32>; 3],
    _phrase_scores: CudaSlice<f32>,
    raw: ffi::GleanerLoop,
    max_tokens: usize,
    max_rows: usize,
}

/// What a document's steps left, in plain numbers.
pub struct StepLog {
    /// `(tokens, context_tokens, kept_tokens)` of each step.
    pub steps: Vec<(usize, usize, usize)>,
    /// Of each step the sentences that owned a best token, whether they stay, and their scores.
    pub selected: Vec<Vec<(u32, bool, f32)>>,
    /// Sentences dropped for capacity, over all steps.
    pub dropped_for_capacity: usize,
}

impl StepBuffers {
    /// Buffers for `plan`.
    ///
    /// # Errors
    /// [`Error::Cuda`], out of memory among them.
    pub fn new(device: &CudaDevice, plan: &Plan, heads: Heads) -> Result<StepBuffers> {
        let max_tokens = plan.max_step_tokens();
        let max_rows = plan.tail.len() - plan.question_start as usize;
        let max_log = max_tokens.min(plan.topk as usize);
        let blocks = max_tokens.div_ceil(128);
        let mut ints = [device.zeros(max_tokens)?, device.zeros(max_tokens)?, device.zeros(max_tokens)?];
        let mut words = [device.zeros(max_tokens)?, device.zeros(max_tokens)?, device.zeros(max_tokens)?];
        let mut prompt = device.zeros(max_tokens)?;
        let (mut scores, mut phrase_scores) = (device.zeros(max_tokens)?, device.zeros(max_tokens)?);
        let log_start = STATE_INTS + plan.chunks() * STEP_INTS;
        let mut journal = device.zeros(log_start + plan.chunks() * max_log * SELECTED_INTS)?;
        let state = device.address_mut::<i32>(&mut journal) as *mut i32;
        let raw = ffi::GleanerLoop {
            state: state as *mut _,
            prompt: device.address_mut::<u32>(&mut prompt) as *mut _,
            owner: device.address_mut(&mut ints[0]) as *mut _,
            starts: device.address_mut(&mut ints[1]) as *mut _,
            selected: device.address_mut(&mut ints[2]) as *mut _,
            sentences: device.address_mut(&mut words[0]) as *mut _,
            best: device.address_mut(&mut words[1]) as *mut _,
            kept: device.address_mut(&mut words[2]) as *mut _,
            scores: device.address_mut::<f64>(&mut scores) as *mut _,
            phrase_scores: device.address_mut::<f32>(&mut phrase_scores) as *mut _,
            log: state.wrapping_add(log_start) as *mut _,
            step_log: state.wrapping_add(STATE_INTS) as *mut _,
            max_tokens: max_tokens as i32,
            max_log: max_log as i32,
        };
        Ok(StepBuffers {
            journal,
            prompt,
            head_sums: device.zeros(max_rows * max_tokens)?,
            logits: device.zeros(heads.q * max_rows * max_tokens)?,
            stats: device.zeros(heads.q * max_rows * blocks * 2)?,
            row_weights: device.zeros(max_rows)?,
            scores,
            _ints: ints,
            _words: words,
            _phrase_scores: phrase_scores,
            raw,
            max_tokens,
            max_rows,
        })
    }

    /// Live rows of the step's prompt.
    pub fn rows(&self) -> Rows<'_> {
        Rows { ints: &self.journal, index: state::TOKENS, max: self.max_tokens }
    }

    /// Its question rows.
    pub fn question_rows(&self) -> Rows<'_> {
        Rows { ints: &self.journal, index: state::QUESTION_ROWS, max: self.max_rows }
    }

    /// The first of them.
    pub fn question_start(&self) -> Shift<'_> {
        Shift { ints: &self.journal, index: state::QUESTION_START }
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

    /// The same, for a caller with scores of its own. A view: the buffer itself must stay where the kernels know it.
    pub fn scores_mut(&mut self) -> CudaViewMut<'_, f64> {
        self.scores.slice_mut(..)
    }

    /// The readback: what all steps did, and the error flags. Waits for the device.
    ///
    /// # Errors
    /// [`Error::NotFinite`], [`Error::Cuda`].
    pub fn read_back(&self, device: &CudaDevice, plan: &Plan) -> Result<StepLog> {
        let journal = device.download("reading a document", &self.journal)?;
        let (state, logs) = journal.split_at(STATE_INTS);
        let (steps, log) = logs.split_at(plan.chunks() * STEP_INTS);
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
        let max_log = log.len() / plan.chunks();
        let selected = steps.iter().zip(log.chunks(max_log)).map(|(step, log)| {
            log[..step.selected as usize].iter().map(|entry| (entry.sentence, entry.kept == 1, entry.score)).collect()
        });
        Ok(StepLog {
            selected: selected.collect(),
            steps: steps
                .iter()
                .map(|step| (step.tokens as usize, step.context_tokens as usize, step.kept_tokens as usize))
                .collect(),
            dropped_for_capacity: at(std::mem::offset_of!(ffi::GleanerState, dropped_for_capacity)) as usize,
        })
    }
}

impl CudaDevice {
    /// Zeroed memory.
    ///
    /// # Errors
    /// [`Error::Cuda`], out of memory among them.
    pub fn zeros<T: DeviceRepr + cudarc::driver::ValidAsZeroBits>(&self, len: usize) -> Result<CudaSlice<T>> {
        let op = || format!("allocating {} MiB on the GPU", (len * size_of::<T>()).div_ceil(1 << 20));
        self.stream().alloc_zeros(len.max(1)).map_err(|error| driver_error(&op(), error))
    }

    /// Writes the first step's prompt.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn start(&self, steps: &mut StepBuffers, plan: &DevicePlan) -> Result<()> {
        // SAFETY: every array of the loop has the length that kernels.h asks for (`StepBuffers::new`), the plan was
        // validated, and its step is no longer than `max_tokens`, which the kernel checks too.
        check(unsafe { ffi::gleaner_start(&steps.raw, &plan.raw, self.raw_stream()) }, || "start".into())
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
        let state = self.address(&steps.journal) as *const ffi::GleanerState;
        check(
            // SAFETY: the step buffers were made for these rows, tokens and heads; q and k hold them (checked above).
            unsafe {
                ffi::gleaner_question_logits(
                    self.address_mut(&mut steps.logits) as *mut f32,
                    self.address_mut(&mut steps.stats),
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
        check(
            // SAFETY: as above.
            unsafe {
                ffi::gleaner_question_scores(
                    self.address_mut(&mut steps.scores) as *mut f64,
                    self.address_mut(&mut steps.head_sums) as *mut f32,
                    self.address_mut(&mut steps.row_weights) as *mut f32,
                    self.address(&steps.logits) as *const f32,
                    self.address(&steps.stats),
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
        // SAFETY: as in `start`.
        check(unsafe { ffi::gleaner_select(&steps.raw, &plan.raw, self.raw_stream()) }, || "select".into())
    }
}
