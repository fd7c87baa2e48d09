//! The reader on a GPU: a plan is uploaded once, one recorded step is replayed for every chunk, and what is left is read
//! back once.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use super::answer::{self, Answering};
use super::forward::Forward;
use super::memory::{AnswerSizes, ReadSizes};
use super::model::DeviceModel;
use super::ops::{Heads, StepLog};
use super::statistics::{Counters, Statistics};
use super::workspace::Workspace;
use super::{CudaDevice, memory};
use crate::model::Model;
use crate::plan::Plan;
use crate::reader::{DropReason, Gleaned, Kept, Memory, MemoryRequest, Reader, Sampling, StepReport};
use crate::{Error, Result};

/// Reads on a GPU: bf16 storage, fp32 accumulation, fp32 attention scores.
pub struct CudaReader {
    model: Arc<Model>,
    /// One document at a time: the stream and its buffers serve one.
    gpu: Mutex<Gpu>,
    name: String,
    counters: Arc<Counters>,
    graphs: bool,
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
        Ok(CudaReader { model, gpu, name, counters, graphs: true })
    }

    /// Whether steps and tokens after the first are replayed from a recorded graph, as they are unless told otherwise,
    /// or launched kernel by kernel, which is slower and shows a profiler each kernel in its place. The results are the
    /// same to the bit.
    pub fn set_graphs(&mut self, graphs: bool) {
        self.graphs = graphs;
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

    /// All steps of `plan`, and what they did.
    fn read_steps(&self, forward: &Forward, workspace: &mut Workspace, plan: &Plan) -> Result<StepLog> {
        let device = forward.device;
        workspace.plan.upload(device, plan)?;
        workspace.steps.prepare(plan, self.heads())?;
        device.start(&mut workspace.steps, &workspace.plan)?;
        // The first step loads the kernels, which must not happen while a graph is recorded.
        forward.step(workspace)?;
        let replay = self.graphs && plan.chunks() > 1;
        // Kept until the readback has waited for its last launch.
        let graph = replay.then(|| device.record(|| forward.step(workspace))).transpose()?;
        for _ in 1..plan.chunks() {
            match &graph {
                Some(graph) => device.launch("launching a step", graph)?,
                None => forward.step(workspace)?,
            }
        }
        workspace.steps.read_back(device)
    }
}

impl Reader for CudaReader {
    /// The steps' reports come together, after the last step, and name no top tokens: between the first chunk and the
    /// last nothing travels to the host.
    fn read(&self, plan: &Plan, observe: &mut dyn FnMut(&StepReport) -> ControlFlow<()>) -> Result<Gleaned> {
        plan.validate(self.model.config.vocab_size)?;
        let mut gpu = self.gpu.lock().unwrap_or_else(PoisonError::into_inner);
        let Gpu { device, weights, workspace: slot, .. } = &mut *gpu;
        device.bind()?;
        let max_tokens = plan.max_step_tokens();
        if max_tokens >= 1 << 20 {
            return Err(Error::Plan(format!("steps of {max_tokens} tokens, more than 1,048,575")));
        }
        let needed = ReadSizes::new(&self.model.config, &plan.shape());
        let workspace = Workspace::reserve(slot, device, &self.model, needed)?;
        let forward = Forward { device, weights, config: &self.model.config };
        let log = match self.read_steps(&forward, workspace, plan) {
            Ok(log) => log,
            Err(error) => {
                // What a failed document leaves behind may be infinite, which a workspace must not be.
                *slot = None;
                return Err(error);
            }
        };

        let mut gleaned = Gleaned { kept: Vec::new(), dropped_for_capacity: log.dropped_for_capacity };
        for (step, (&(tokens, context_tokens, retained_tokens), selected)) in
            log.steps.iter().zip(&log.selected).enumerate()
        {
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
                tokens,
                context_tokens,
                retained_tokens,
                kept: gleaned.kept.clone(),
                dropped,
                top_tokens: Vec::new(),
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
        sampling.validate()?;
        self.model.check_prompt(prompt)?;
        let mut gpu = self.gpu.lock().unwrap_or_else(PoisonError::into_inner);
        let Gpu { device, weights, answering, .. } = &mut *gpu;
        device.bind()?;
        let forward = Forward { device, weights, config: &self.model.config };
        let answer = answer::run(&forward, &self.model, answering, prompt, sampling, self.graphs, on_token);
        if answer.is_err() {
            // As after a failed document.
            *answering = None;
        }
        answer
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
