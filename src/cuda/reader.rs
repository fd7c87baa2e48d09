//! The reader on a GPU: a plan is uploaded once, one recorded step is replayed for every chunk, and what is left is read
//! back once.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaSlice};
use half::bf16;

use super::device::{Allocator, driver_error};
use super::memory::{ActivationSizes, ReadSizes};
use super::model::{DeviceLayer, DeviceModel};
use super::ops::{Heads, Rotation, Rows, Shift, StepLog};
use super::statistics::{Counters, Statistics};
use super::workspace::{Activations, Workspace};
use super::{CudaDevice, memory};
use crate::model::Model;
use crate::plan::Plan;
use crate::reader::{DropReason, Gleaned, Kept, Memory, MemoryRequest, Reader, Sampling, StepReport};
use crate::sample::sample;
use crate::{Error, Result};

/// Reads on a GPU: bf16 storage, fp32 accumulation, fp32 attention scores.
pub struct CudaReader {
    model: Arc<Model>,
    /// One document at a time: the stream and its buffers serve one.
    gpu: Mutex<Gpu>,
    /// Kept from document to document. Locked behind `gpu`.
    workspace: Mutex<Option<Workspace>>,
    name: String,
    counters: Arc<Counters>,
    graphs: bool,
}

struct Gpu {
    device: CudaDevice,
    weights: DeviceModel,
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
        let gpu = Mutex::new(Gpu { device, weights });
        Ok(CudaReader { model, gpu, workspace: Mutex::new(None), name, counters, graphs: true })
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

    fn activations(&self, device: &CudaDevice, rows: usize, positions: usize) -> Result<Activations> {
        let sizes = ActivationSizes::new(&self.model.config, rows, positions);
        Activations::new(device, &mut Allocator::new(device), &self.model, sizes)
    }

    /// Queries, keys and values of all rows of `a.x`, into `qkv`.
    fn project(
        &self,
        device: &CudaDevice,
        layer: &DeviceLayer,
        a: &mut Activations,
        qkv: &mut CudaSlice<bf16>,
        rows: Rows,
    ) -> Result<()> {
        let config = &self.model.config;
        let Heads { q, kv, dim, .. } = layer.heads;
        device.rms_norm(&mut a.normed, &a.x, &layer.input_layernorm, rows, config.hidden_size, config.rms_norm_eps)?;
        let columns = if layer.head_norms.is_some() { 0 } else { (q + kv) * dim };
        let rotation = Rotation { table: &a.rope, head_dim: dim, columns };
        device.gemm_rope(qkv, &a.normed, &layer.qkv, rotation, rows, None)?;
        match &layer.head_norms {
            Some(norms) => device.head_norm(
                qkv,
                norms,
                rotation,
                (q, kv),
                layer.heads.qkv_columns(),
                rows,
                None,
                None,
                config.rms_norm_eps,
            ),
            None => Ok(()),
        }
    }

    /// One whole layer over the rows of `a.x`.
    fn layer(
        &self,
        device: &CudaDevice,
        layer: &DeviceLayer,
        a: &mut Activations,
        qkv: &mut CudaSlice<bf16>,
        rows: Rows,
    ) -> Result<()> {
        let config = &self.model.config;
        self.project(device, layer, a, qkv, rows)?;
        device.attention(&mut a.attended, qkv, layer.heads, rows)?;
        device.gemm_residual(&mut a.x, &a.attended, &layer.o_proj, rows)?;
        let norm = &layer.post_attention_layernorm;
        device.rms_norm(&mut a.normed, &a.x, norm, rows, config.hidden_size, config.rms_norm_eps)?;
        device.gemm_swiglu(&mut a.h, &a.normed, &layer.gate_up, rows)?;
        device.gemm_residual(&mut a.x, &a.h, &layer.down_proj, rows)
    }
}

/// A recorded run of launches.
fn record(device: &CudaDevice, launches: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    let stream = device.stream();
    let failed = |error| driver_error("recording a graph", error);
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(failed)?;
    let launched = launches();
    // Ended in any case, or the stream would be of no further use.
    let graph = stream
        .end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
        .map_err(failed)?;
    launched?;
    graph.ok_or_else(|| Error::Cuda { op: "recording a graph".into(), message: "nothing was recorded".into() })
}

impl CudaReader {
    /// One reading step: the prompt that lies ready, up to the next one.
    fn step(&self, gpu: &Gpu, workspace: &mut Workspace) -> Result<()> {
        let Gpu { device, weights } = gpu;
        let Workspace { activations: a, qkv, q, k, steps, plan, .. } = workspace;
        let config = &self.model.config;
        device.embed(&mut a.x, steps.prompt(), &weights.embed_tokens, steps.rows(), config.hidden_size)?;
        let (last, layers) = weights.layers.split_last().expect("a checked configuration has layers");
        for layer in layers {
            self.layer(device, layer, a, qkv, steps.rows())?;
        }
        let norm = &last.input_layernorm;
        device.rms_norm(&mut a.normed, &a.x, norm, steps.rows(), config.hidden_size, config.rms_norm_eps)?;
        let (question, first) = (steps.question_rows(), Some(steps.question_start()));
        let Heads { q: q_heads, kv, dim, .. } = last.heads;
        let rotation = |columns| Rotation {
            table: &a.rope,
            head_dim: dim,
            columns: if last.head_norms.is_some() { 0 } else { columns },
        };
        let scoring = &weights.scoring;
        device.gemm_rope(k, &a.normed, &scoring.k_proj, rotation(kv * dim), steps.rows(), None)?;
        device.gemm_rope(q, &a.normed, &scoring.q_proj, rotation(q_heads * dim), question, first)?;
        if let Some(norms) = &last.head_norms {
            let eps = config.rms_norm_eps;
            device.head_norm(k, norms, rotation(0), (0, kv), kv * dim, steps.rows(), None, None, eps)?;
            device.head_norm(q, norms, rotation(0), (q_heads, 0), q_heads * dim, question, None, first, eps)?;
        }
        device.question_scores(steps, q, k, last.heads)?;
        device.select(steps, plan)
    }

    /// All steps of `plan`, and what they did.
    fn read_steps(&self, gpu: &Gpu, workspace: &mut Workspace, plan: &Plan) -> Result<StepLog> {
        let device = &gpu.device;
        workspace.plan.upload(device, plan)?;
        workspace.steps.prepare(plan, self.heads())?;
        device.start(&mut workspace.steps, &workspace.plan)?;
        // The first step loads the kernels, which must not happen while a graph is recorded.
        self.step(gpu, workspace)?;
        let replay = self.graphs && plan.chunks() > 1;
        // Kept until the readback has waited for its last launch.
        let graph = replay.then(|| record(device, || self.step(gpu, workspace))).transpose()?;
        for _ in 1..plan.chunks() {
            match &graph {
                Some(graph) => device.launch("launching a step", graph)?,
                None => self.step(gpu, workspace)?,
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
        let gpu = self.gpu.lock().unwrap_or_else(PoisonError::into_inner);
        let device = &gpu.device;
        device.bind()?;
        let max_tokens = plan.max_step_tokens();
        if max_tokens >= 1 << 20 {
            return Err(Error::Plan(format!("steps of {max_tokens} tokens, more than 1,048,575")));
        }
        let mut slot = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let needed = ReadSizes::new(&self.model.config, &plan.shape());
        let workspace = Workspace::reserve(&mut slot, device, &self.model, needed)?;
        let log = match self.read_steps(&gpu, workspace, plan) {
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
        let config = &self.model.config;
        self.model.check_prompt(prompt)?;
        let gpu = self.gpu.lock().unwrap_or_else(PoisonError::into_inner);
        let Gpu { device, weights } = &*gpu;
        device.bind()?;
        let positions = prompt.len() + sampling.max_new_tokens;
        let (heads, hidden) = (self.heads(), config.hidden_size);
        let bytes = memory::answer_bytes(config, prompt.len(), sampling.max_new_tokens);
        device.check_free(bytes, "the buffers of an answer", "lower max_retained or max_new_tokens")?;

        let mut a = self.activations(device, prompt.len(), positions)?;
        let mut caches: Vec<CudaSlice<bf16>> =
            weights.layers.iter().map(|_| device.zeros(positions * heads.qkv_columns())).collect::<Result<_>>()?;
        // Number of the prompt's rows, one, and the position of the row that is being decoded.
        let mut ints = device.upload("answering", &[prompt.len() as i32, 1, 0])?;
        let tokens = device.upload("answering", prompt)?;
        {
            let rows = Rows { ints: &ints, index: 0, max: prompt.len() };
            device.embed(&mut a.x, &tokens, &weights.embed_tokens, rows, hidden)?;
            for (layer, cache) in weights.layers.iter().zip(&mut caches) {
                self.layer(device, layer, &mut a, cache, rows)?;
            }
        }
        let mut one = self.activations(device, 1, positions)?;
        let last_row = a.x.slice((prompt.len() - 1) * hidden..prompt.len() * hidden);
        device.stream().memcpy_dtod(&last_row, &mut one.x).map_err(|error| driver_error("answering", error))?;
        let mut logits = device.zeros(weights.vocab_rows)?;
        self.head(&gpu, &mut one, &mut logits, &ints)?;

        let mut token = device.upload("answering", &[0u32])?;
        let mut graph: Option<CudaGraph> = None;
        let mut answer = Vec::new();
        loop {
            let host: Vec<f32> = device.download("answering", &logits)?;
            let next = sample(&host[..config.vocab_size], sampling, answer.len());
            let next = next.ok_or(Error::NotFinite { step: answer.len() })?;
            if self.model.generation_config.eos_token_id.contains(&next) {
                return Ok(answer);
            }
            answer.push(next);
            if on_token(next).is_break() || answer.len() == sampling.max_new_tokens {
                return Ok(answer);
            }
            let position = prompt.len() + answer.len() - 1;
            device.upload_into("answering", &[next], &mut token)?;
            device.upload_into("answering", &[prompt.len() as i32, 1, position as i32], &mut ints)?;
            match &graph {
                Some(graph) => device.launch("answering", graph)?,
                None if answer.len() == 1 || !self.graphs => {
                    self.decode(&gpu, &mut one, &mut caches, &mut logits, &token, &ints)?
                }
                None => {
                    let recorded =
                        record(device, || self.decode(&gpu, &mut one, &mut caches, &mut logits, &token, &ints))?;
                    device.launch("answering", &recorded)?;
                    graph = Some(recorded);
                }
            }
        }
    }

    /// The workspace is kept from document to document, so that an answer's buffers come on top of it.
    fn memory(&self, request: &MemoryRequest) -> Memory {
        let config = &self.model.config;
        let reading = ReadSizes::new(config, &request.plan).parts();
        let answer = memory::answer_bytes(config, request.prompt_tokens, request.max_new_tokens);
        Memory {
            weights: memory::weight_bytes(config),
            workspace: reading.into_iter().chain([("answer", answer)]).collect(),
        }
    }

    fn device(&self) -> String {
        self.name.clone()
    }
}

impl CudaReader {
    /// Logits of the one row in `one.x`.
    fn head(&self, gpu: &Gpu, one: &mut Activations, logits: &mut CudaSlice<f32>, ints: &CudaSlice<i32>) -> Result<()> {
        let Gpu { device, weights } = gpu;
        let config = &self.model.config;
        let row = Rows { ints, index: 1, max: 1 };
        device.rms_norm(&mut one.normed, &one.x, &weights.norm, row, config.hidden_size, config.rms_norm_eps)?;
        let head = weights.lm_head.as_ref().unwrap_or(&weights.embed_tokens);
        device.gemv_logits(logits, &one.normed, head, weights.vocab_rows, config.hidden_size)
    }

    /// One token through all layers, behind what the caches hold.
    fn decode(
        &self,
        gpu: &Gpu,
        one: &mut Activations,
        caches: &mut [CudaSlice<bf16>],
        logits: &mut CudaSlice<f32>,
        token: &CudaSlice<u32>,
        ints: &CudaSlice<i32>,
    ) -> Result<()> {
        let Gpu { device, weights } = gpu;
        let config = &self.model.config;
        let (row, position) = (Rows { ints, index: 1, max: 1 }, Shift { ints, index: 2 });
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        device.embed(&mut one.x, token, &weights.embed_tokens, row, hidden)?;
        for (layer, cache) in weights.layers.iter().zip(caches) {
            let Heads { q, kv, dim, .. } = layer.heads;
            device.rms_norm(&mut one.normed, &one.x, &layer.input_layernorm, row, hidden, eps)?;
            let columns = if layer.head_norms.is_some() { 0 } else { (q + kv) * dim };
            let rotation = Rotation { table: &one.rope, head_dim: dim, columns };
            device.gemv_rope(cache, &one.normed, &layer.qkv, rotation, position)?;
            if let Some(norms) = &layer.head_norms {
                let stride = layer.heads.qkv_columns();
                device.head_norm(cache, norms, rotation, (q, kv), stride, row, Some(position), None, eps)?;
            }
            device.decode_attention(&mut one.attended, cache, layer.heads, position)?;
            device.gemv_residual(&mut one.x, &one.attended, &layer.o_proj)?;
            device.rms_norm(&mut one.normed, &one.x, &layer.post_attention_layernorm, row, hidden, eps)?;
            device.gemv_swiglu(&mut one.h, &one.normed, &layer.gate_up)?;
            device.gemv_residual(&mut one.x, &one.h, &layer.down_proj)?;
        }
        self.head(gpu, one, logits, ints)
    }
}
