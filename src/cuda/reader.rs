//! The reader on a GPU: a plan is uploaded once, one recorded step is replayed for every chunk, and what is left is read
//! back once.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::CudaSlice;

use super::answer::{self, Answering};
use super::device::driver_error;
use super::forward::Forward;
use super::memory::{AnswerSizes, ReadSizes};
use super::model::DeviceModel;
use super::ops::{Heads, StepLog};
use super::record::Recorded;
use super::statistics::{Counters, Statistics};
use super::workspace::Workspace;
use super::{CudaDevice, memory};
use crate::model::Model;
use crate::plan::Plan;
use crate::range::range;
use crate::reader::{Detail, DropReason, Gleaned, Kept, Memory, MemoryRequest, Reader, Sampling, StepReport};
use crate::timings::{Profile, Stage};
use crate::{Error, Result};

/// Reads on a GPU: bf16 storage, fp32 accumulation, fp32 attention scores.
pub struct CudaReader {
    model: Arc<Model>,
    /// One document at a time: the stream and its buffers serve one.
    gpu: Mutex<Gpu>,
    name: String,
    counters: Arc<Counters>,
    graphs: bool,
    reuse: bool,
}

/// What was allocated last goes first.
struct Gpu {
    /// Kept from document to document.
    workspace: Option<Workspace>,
    /// Kept from answer to answer.
    answering: Option<Answering>,
    weights: DeviceModel,
    device: CudaDevice,
}

/// Every step's token scores, kept on the device until the last step.
struct ScoreLog {
    /// `[chunks, max_step_tokens]`
    scores: CudaSlice<f32>,
    /// `max_step_tokens`
    stride: usize,
}

impl ScoreLog {
    const WHAT: &str = "keeping the scores of a step";

    fn new(device: &CudaDevice, plan: &Plan) -> Result<ScoreLog> {
        let stride = plan.max_step_tokens();
        let len = plan.chunks() * stride;
        let bytes = (len * size_of::<f32>()) as u64;
        device.check_free(bytes, "the scores of all steps", "read the document without them")?;
        Ok(ScoreLog { scores: device.zeros(len)?, stride })
    }

    /// Puts a copy of the scores that `step` left behind everything on the stream.
    fn keep(&mut self, device: &CudaDevice, step: usize, scores: &CudaSlice<f32>) -> Result<()> {
        let mut row = self.scores.slice_mut(step * self.stride..(step + 1) * self.stride);
        let copied = device.stream().memcpy_dtod(&scores.slice(..self.stride), &mut row);
        copied.map_err(|error| driver_error(Self::WHAT, error))
    }

    /// The scores of each step's context, of so many tokens. Waits for the device.
    fn read_back(&self, device: &CudaDevice, context_tokens: impl Iterator<Item = usize>) -> Result<Vec<Vec<f32>>> {
        let scores = device.download("reading back the scores", &self.scores)?;
        Ok(scores.chunks(self.stride).zip(context_tokens).map(|(row, tokens)| row[..tokens].to_vec()).collect())
    }
}

impl CudaReader {
    /// Copies `model` to the device.
    ///
    /// # Errors
    /// [`Error::Device`] for a model whose shape the kernels do not serve or whose weights do not fit; [`Error::Cuda`].
    pub fn new(device: CudaDevice, model: Arc<Model>) -> Result<CudaReader> {
        let config = &model.config;
        if !matches!(config.head_dim, 64 | 128) {
            return Err(Error::Device(format!(
                "the CUDA kernels serve attention heads of 64 and 128, but this model has {}; use --device cpu",
                config.head_dim
            )));
        }
        if !config.hidden_size.is_multiple_of(16) || !config.intermediate_size.is_multiple_of(8) {
            return Err(Error::Device(format!(
                "the CUDA kernels want a hidden_size in sixteens and an intermediate_size in eights, but this model has {} and {}; use --device cpu",
                config.hidden_size, config.intermediate_size
            )));
        }
        let name = device.describe()?;
        let weights = device.load(&model)?;
        let counters = device.counters();
        let gpu = Mutex::new(Gpu { workspace: None, answering: None, weights, device });
        Ok(CudaReader { model, gpu, name, counters, graphs: true, reuse: true })
    }

    /// What has travelled between host and GPU since the device was opened, the weights included. It can be asked while
    /// another thread reads.
    pub fn statistics(&self) -> Statistics {
        self.counters.read()
    }

    fn heads(&self) -> Heads {
        let config = &self.model.config;
        Heads { q: config.num_attention_heads, kv: config.num_key_value_heads, dim: config.head_dim, window: 0 }
    }

    /// All steps of `plan`: what they did, and of each the scores if `detail` asks for them.
    fn read_steps(
        &self,
        forward: &Forward,
        workspace: &mut Workspace,
        plan: &Plan,
        detail: Detail,
        graphs: bool,
    ) -> Result<(StepLog, Vec<Vec<f32>>)> {
        let device = forward.device;
        let mut score_log = match detail {
            Detail::Selection => None,
            Detail::Scores => Some(ScoreLog::new(device, plan)?),
        };
        workspace.plan.upload(device, plan)?;
        workspace.steps.prepare(plan, self.heads(), self.reuse)?;
        device.pass(Stage::Read, Some(0), || device.start(&mut workspace.steps, &workspace.plan))?;
        let mut run = |workspace: &mut Workspace, step: usize, graph: Option<&Recorded>| {
            let _step = range!("step {step}");
            match graph {
                Some(graph) => device.launch("launching a step", graph)?,
                None => device.pass(Stage::Read, None, || forward.step(workspace))?,
            }
            match &mut score_log {
                Some(log) => log.keep(device, step, workspace.steps.phrase_scores()),
                None => Ok(()),
            }
        };
        // The first step loads the kernels, which must not happen while a graph is recorded.
        run(workspace, 0, None)?;
        let replay = graphs && plan.chunks() > 1;
        // Kept until the readback has waited for its last launch.
        let graph = replay.then(|| device.record(|| forward.step(workspace))).transpose()?;
        for step in 1..plan.chunks() {
            run(workspace, step, graph.as_ref())?;
        }
        let log = workspace.steps.read_back(device)?;
        let context_tokens = log.steps.iter().map(|step| step.context_tokens);
        let scores = score_log.map(|scores| scores.read_back(device, context_tokens)).transpose()?;
        Ok((log, scores.unwrap_or_default()))
    }

    /// [`CudaReader::read_steps`] of a `plan` that is checked, with the buffers of `gpu`.
    fn read_on(&self, gpu: &mut Gpu, plan: &Plan, detail: Detail, graphs: bool) -> Result<(StepLog, Vec<Vec<f32>>)> {
        let Gpu { device, weights, workspace: slot, .. } = gpu;
        device.bind()?;
        let max_tokens = plan.max_step_tokens();
        if max_tokens >= 1 << 20 {
            return Err(Error::Plan(format!("steps of {max_tokens} tokens, more than 1,048,575")));
        }
        let needed = ReadSizes::new(&self.model.config, &plan.shape());
        let workspace = Workspace::reserve(slot, device, &self.model, needed)?;
        let forward = Forward { device, weights, config: &self.model.config };
        let read = self.read_steps(&forward, workspace, plan, detail, graphs);
        if read.is_err() {
            // What a failed document leaves behind may be infinite, which a workspace must not be.
            *slot = None;
        }
        read
    }

    /// [`Reader::answer`] with the buffers of `gpu`.
    fn answer_on(
        &self,
        gpu: &mut Gpu,
        prompt: &[u32],
        sampling: &Sampling,
        graphs: bool,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Vec<u32>> {
        sampling.validate()?;
        self.model.check_prompt(prompt)?;
        let Gpu { device, weights, answering, .. } = gpu;
        device.bind()?;
        let forward = Forward { device, weights, config: &self.model.config };
        let answer = answer::run(&forward, &self.model, answering, prompt, sampling, graphs, on_token);
        if answer.is_err() {
            // As after a failed document.
            *answering = None;
        }
        answer
    }

    fn lock(&self) -> MutexGuard<'_, Gpu> {
        self.gpu.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reader for CudaReader {
    /// The steps' reports come together, after the last step, and name no top tokens: between the first chunk and the
    /// last nothing travels to the host.
    fn read_with(
        &self,
        plan: &Plan,
        detail: Detail,
        observe: &mut dyn FnMut(&StepReport) -> ControlFlow<()>,
    ) -> Result<Gleaned> {
        plan.validate(self.model.config.vocab_size)?;
        let (log, mut scores) = self.read_on(&mut self.lock(), plan, detail, self.graphs)?;

        let mut gleaned = Gleaned { kept: Vec::new(), dropped_for_capacity: log.dropped_for_capacity };
        for (step, (counts, selected)) in log.steps.iter().zip(&log.selected).enumerate() {
            let context = gleaned.kept.iter().map(|kept| kept.sentence).chain(plan.chunk(step));
            let dropped =
                context.filter_map(|sentence| match selected.binary_search_by_key(&sentence, |entry| entry.0) {
                    Err(_) => Some((sentence, DropReason::NotInTopk)),
                    Ok(at) if !selected[at].1 => Some((sentence, DropReason::MaxRetained)),
                    Ok(_) => None,
                });
            let dropped = dropped.collect();
            let kept = selected.iter().filter(|entry| entry.1);
            gleaned.kept = kept.map(|&(sentence, _, score)| Kept { sentence, score }).collect();
            let report = StepReport {
                step,
                steps: plan.chunks(),
                tokens: counts.tokens,
                reused_tokens: counts.reused_tokens,
                context_tokens: counts.context_tokens,
                retained_tokens: counts.kept_tokens,
                kept: gleaned.kept.clone(),
                dropped,
                top_tokens: Vec::new(),
                scores: scores.get_mut(step).map(std::mem::take).unwrap_or_default(),
            };
            if observe(&report).is_break() {
                return Err(Error::Cancelled);
            }
        }
        Ok(gleaned)
    }

    fn answer(
        &self,
        prompt: &[u32],
        sampling: &Sampling,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Vec<u32>> {
        self.answer_on(&mut self.lock(), prompt, sampling, self.graphs, on_token)
    }

    fn profile(&self, plan: &Plan, prompt: &[u32], sampling: &Sampling) -> Result<Profile> {
        plan.validate(self.model.config.vocab_size)?;
        let mut gpu = self.lock();
        gpu.device.bind()?;
        gpu.device.start_timer()?;
        let log = self.read_on(&mut gpu, plan, Detail::Selection, false).and_then(|(log, _)| {
            self.answer_on(&mut gpu, prompt, sampling, false, &mut |_| ControlFlow::Continue(()))?;
            Ok(log)
        });
        let timer = gpu.device.stop_timer();
        let log = log?;
        Ok(timer.expect("it was started").profile(&log.steps))
    }

    fn set_graphs(&mut self, graphs: bool) {
        self.graphs = graphs;
    }

    fn set_reuse(&mut self, reuse: bool) {
        self.reuse = reuse;
    }

    /// The buffers of both are kept, so that an answer's come on top of a document's.
    fn memory(&self, request: &MemoryRequest) -> Memory {
        let config = &self.model.config;
        let reading = ReadSizes::new(config, &request.plan).parts();
        let answer =
            AnswerSizes::new(config, request.prompt_tokens, request.max_new_tokens).bytes(config.num_hidden_layers);
        Memory {
            weights: memory::weight_bytes(config),
            workspace: reading.into_iter().chain([("answer", answer)]).collect(),
        }
    }

    fn device(&self) -> String {
        self.name.clone()
    }
}
