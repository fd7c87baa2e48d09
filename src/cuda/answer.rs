//! Answers: a pass over the prompt that fills the caches, then a token at a time. Tokens are chosen on the device and
//! written to host memory, so that the device goes on while the host looks at the one before.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;

use super::device::Allocator;
use super::forward::{Forward, Live};
use super::memory::{self, AnswerSizes};
use super::ops::{AttentionParts, FixedRow, Heads, NO_TOKEN, Rows, Sent, answer, sampling_words};
use super::record::Recorded;
use super::workspace::{Activations, RowActivations};
use crate::model::Model;
use crate::range::range;
use crate::reader::Sampling;
use crate::timings::Stage;
use crate::{Error, Result};

/// Tokens that the device may be ahead of the host.
const AHEAD: usize = 2;

const WHAT: &str = "answering";

/// The buffers of an answer, kept from one to the next. As a reading's workspace they are zeroed once and hold finite
/// numbers from then on.
pub struct Answering {
    sizes: AnswerSizes,
    prompt: Activations,
    /// Of the last token.
    pub one: RowActivations,
    /// Queries, keys and values of all positions, for each layer.
    pub caches: Vec<CudaSlice<bf16>>,
    pub logits: CudaSlice<f32>,
    /// The prompt's tokens.
    tokens: CudaSlice<u32>,
    pub parts: AttentionParts,
    /// The last token's residual stream between two layers, where the GPU has kernels for it.
    pub row: FixedRow,
    /// Rows of the prompt, and of a new token: one.
    pub counts: CudaSlice<i32>,
    /// See [`answer`].
    pub state: CudaSlice<i32>,
    /// The likeliest next token.
    pub best: CudaSlice<u64>,
    pub sampling: CudaSlice<u64>,
    /// What the host has not yet seen, by turns.
    pub sent: Sent,
    /// Whether a token was decoded, which loads the kernels.
    loaded: bool,
    /// A recorded token: of these buffers, whatever the answer.
    graph: Option<Recorded>,
    stream: Arc<CudaStream>,
}

impl Answering {
    /// The buffers in `slot`, if they have at least the `needed` sizes; else larger ones.
    fn reserve<'a>(
        slot: &'a mut Option<Answering>,
        forward: &Forward,
        model: &Model,
        needed: AnswerSizes,
    ) -> Result<&'a mut Answering> {
        let (device, layers) = (forward.device, model.config.num_hidden_layers);
        let answering = match slot.take() {
            Some(answering) if memory::cover(&answering.sizes, &needed) => answering,
            smaller => {
                let grown = smaller.map_or(needed, |smaller| smaller.sizes.union(&needed));
                // Memory that was given back counts as free from then on.
                device.synchronize()?;
                let sizes = if grown.bytes(layers) <= device.free_bytes()? { grown } else { needed };
                let remedy = "lower max_retained or max_new_tokens";
                device.check_free(sizes.bytes(layers), "the buffers of an answer", remedy)?;
                Answering::new(forward, model, sizes)?
            }
        };
        Ok(slot.insert(answering))
    }

    fn new(forward: &Forward, model: &Model, sizes: AnswerSizes) -> Result<Answering> {
        let device = forward.device;
        let mut allocator = Allocator::new(device);
        let layers = model.config.num_hidden_layers;
        let config = &model.config;
        let heads =
            Heads { q: config.num_attention_heads, kv: config.num_key_value_heads, dim: config.head_dim, window: 0 };
        let answering = Answering {
            sizes,
            prompt: Activations::new(device, &mut allocator, model, sizes.prompt)?,
            one: RowActivations::new(device, &mut allocator, model, sizes.one)?,
            caches: (0..layers).map(|_| allocator.zeros(sizes.cache)).collect::<Result<_>>()?,
            logits: allocator.zeros(sizes.logits)?,
            tokens: allocator.zeros(sizes.prompt_tokens)?,
            parts: AttentionParts::allocate(&mut allocator, heads)?,
            row: FixedRow::allocate(&mut allocator, sizes.row)?,
            counts: allocator.zeros(2)?,
            state: allocator.zeros(answer::LEN)?,
            best: allocator.zeros(1)?,
            sampling: allocator.zeros(2)?,
            sent: Sent::new(device, AHEAD + 1)?,
            loaded: false,
            graph: None,
            stream: device.stream().clone(),
        };
        allocator.check(sizes.bytes(layers), "the buffers of an answer")?;
        Ok(answering)
    }

    /// The prompt through all layers, up to the first token.
    fn prefill(&mut self, forward: &Forward, prompt: &[u32], sampling: &Sampling) -> Result<()> {
        let device = forward.device;
        device.upload_into(WHAT, &[prompt.len() as i32, 1], &mut self.counts)?;
        device.upload_into(WHAT, &[prompt.len() as i32 - 1, 0], &mut self.state)?;
        device.upload_into(WHAT, &sampling_words(sampling), &mut self.sampling)?;
        device.upload_into(WHAT, prompt, &mut self.tokens)?;
        device.pass(Stage::Prefill, Some(prompt.len()), || {
            let live = Live::all(Rows { ints: &self.counts, index: 0, max: prompt.len() });
            forward.embed(&mut self.prompt, &self.tokens, live)?;
            for (index, cache) in self.caches.iter_mut().enumerate() {
                forward.layer(index, &mut self.prompt, cache, live)?;
            }
            let (norm, last_row) = (&forward.weights.norm, prompt.len() - 1);
            device.stream_row(&mut self.one.x, &self.prompt.residual, norm, last_row, forward.config.hidden_size)?;
            forward.head(self)
        })
    }

    /// One more token, the last one standing at position `keys - 1`.
    fn next(&mut self, forward: &Forward, keys: usize, graphs: bool) -> Result<()> {
        if !self.loaded || !graphs {
            self.loaded = true;
            return forward.device.pass(Stage::Decode, Some(keys), || forward.decode(self));
        }
        let graph = match self.graph.take() {
            Some(graph) => graph,
            None => forward.device.record(|| forward.decode(self))?,
        };
        let launched = forward.device.launch(WHAT, &graph);
        self.graph = Some(graph);
        launched
    }
}

impl Drop for Answering {
    /// The device may still be writing tokens that nobody wants.
    fn drop(&mut self) {
        // What failed, the failing call or the next one says.
        let _ = self.stream.synchronize();
    }
}

/// [`crate::reader::Reader::answer`] with the buffers in `slot`, for a prompt that was checked.
pub fn run(
    forward: &Forward,
    model: &Model,
    slot: &mut Option<Answering>,
    prompt: &[u32],
    sampling: &Sampling,
    graphs: bool,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>> {
    let needed = AnswerSizes::new(forward.config, prompt.len(), sampling.max_new_tokens);
    let answering = Answering::reserve(slot, forward, model, needed)?;
    let device = forward.device;
    let mut under_way = VecDeque::new();
    let mut answer = Vec::new();
    loop {
        while answer.len() + under_way.len() < sampling.max_new_tokens.min(answer.len() + 1 + AHEAD) {
            match answer.len() + under_way.len() {
                0 => {
                    let _prefill = range!("prefill");
                    answering.prefill(forward, prompt, sampling)?;
                }
                index => {
                    let _token = range!("token {index}");
                    answering.next(forward, prompt.len() + index, graphs)?;
                }
            }
            under_way.push_back(device.record_event()?);
        }
        let Some(written) = under_way.pop_front() else { return Ok(answer) };
        device.wait(&written)?;
        let next = answering.sent.token(answer.len());
        if next == NO_TOKEN {
            return Err(Error::NotFinite { step: answer.len() });
        }
        if model.generation_config.eos_token_id.contains(&next) {
            return Ok(answer);
        }
        answer.push(next);
        if on_token(next).is_break() {
            return Ok(answer);
        }
    }
}
