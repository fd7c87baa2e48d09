//! The front door: open a model, ask documents.

use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use crate::answer::{Answer, DocumentFigures, Evidence, ParamFigures, Timing};
use crate::cpu::CpuReader;
use crate::cuda::ExternalStream;
use crate::model::Model;
use crate::plan::{Plan, ReadParams};
use crate::range::range;
use crate::reader::{Gleaned, Reader, Sampling, StepReport};
use crate::text::{ChatTemplate, Document, Frame, PromptTemplate, Tokenizer, python_strip};
use crate::timings::{Ceilings, Stage, StageTime, Timings};
use crate::{Error, Result, cuda};

/// Where to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The first GPU if this build, this machine and the model allow it, else the CPU; [`Answer::device`] tells.
    #[default]
    Auto,
    /// The fp32 reader.
    Cpu,
    /// The GPU of this ordinal.
    Cuda(usize),
    /// A GPU, on a stream that the program made.
    CudaStream(ExternalStream),
}

impl Device {
    /// A reader of `model`, and the device it is on: never [`Device::Auto`].
    ///
    /// # Errors
    /// [`Error::Device`] if the device cannot be used, or not by this model; [`Error::Cuda`].
    pub fn reader(self, model: Arc<Model>) -> Result<(Device, Box<dyn Reader>)> {
        let cpu = |model| -> (Device, Box<dyn Reader>) { (Device::Cpu, Box::new(CpuReader::new(model))) };
        let gpu = |ordinal, model| Ok((Device::Cuda(ordinal), cuda::reader(ordinal, model)?));
        match self {
            Device::Cuda(ordinal) => gpu(ordinal, model),
            Device::CudaStream(stream) => Ok((self, cuda::reader_on(stream, model)?)),
            Device::Auto => Ok(gpu(0, model.clone()).unwrap_or_else(|_: Error| cpu(model))),
            Device::Cpu => Ok(cpu(model)),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Device, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Device::Auto),
            None if text == "cpu" => Ok(Device::Cpu),
            None if text == "cuda" => Ok(Device::Cuda(0)),
            Some(("cuda", ordinal)) if ordinal.parse::<u16>().is_ok() => Ok(Device::Cuda(ordinal.parse().unwrap_or(0))),
            _ => Err(format!("{text:?} is no device; use auto, cpu, cuda or cuda:N")),
        }
    }
}

/// Everything that shapes an answer besides the document and the question.
#[derive(Debug, Clone)]
pub struct AskParams {
    /// How the document is read.
    pub read: ReadParams,
    /// How the answer's tokens are chosen.
    pub sampling: Sampling,
    /// The prompt around context and question.
    pub template: PromptTemplate,
    /// Whether to fill [`Answer::timings`], for which the document is read, and the prompt answered, a second time; it
    /// shapes nothing.
    pub timings: bool,
    /// Whether the prompt is the user's message in the model's chat template, else it stands bare: a text to go on with.
    pub chat: bool,
}

impl Default for AskParams {
    fn default() -> Self {
        AskParams {
            read: ReadParams::default(),
            sampling: Sampling::default(),
            template: PromptTemplate::default(),
            timings: false,
            chat: true,
        }
    }
}

/// What happens during an ask, in this order.
#[derive(Debug)]
pub enum Progress<'a> {
    /// The document is cut and tokenised.
    Planned {
        /// Its size.
        figures: &'a DocumentFigures,
        /// What will be read; the sentences of all reports are indices in it.
        plan: &'a Plan,
        /// The bytes of each sentence; together they cover the document without gap.
        spans: &'a [Range<usize>],
    },
    /// A chunk was read.
    Step(&'a StepReport),
    /// The answer grew by this text.
    Text(&'a str),
}

/// A model on a device, ready for any number of documents and questions, from any number of threads.
pub struct Engine {
    model: Arc<Model>,
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    bare: ChatTemplate,
    device: Device,
    reader: Box<dyn Reader>,
    /// What opening took.
    opening: [StageTime; 2],
}

impl Engine {
    /// Opens a Hugging Face model directory on a device.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::ModelFile`], [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::Template`] for
    /// what is wrong with the directory, [`Error::Device`] if the device cannot be used.
    pub fn open(model_dir: impl AsRef<Path>, device: Device) -> Result<Engine> {
        // A device that is not there is the first thing to say: a model may take long to open.
        match device {
            Device::Cuda(ordinal) => drop(cuda::describe(ordinal)?),
            Device::CudaStream(stream) => drop(cuda::describe(stream.ordinal())?),
            Device::Auto | Device::Cpu => {}
        }
        let begun = Instant::now();
        let opening = range!("open");
        let model_dir = model_dir.as_ref();
        let model = Arc::new(Model::open(model_dir)?);
        let tokenizer = Tokenizer::open(&model_dir.join("tokenizer.json"), model.config.vocab_size)?;
        let chat = ChatTemplate::open(model_dir)?;
        drop(opening);
        let opened = Instant::now();
        let _upload = range!("upload");
        let (device, reader) = device.reader(model.clone())?;
        let opening = [stage(Stage::Open, begun, opened), stage(Stage::Upload, opened, Instant::now())];
        Ok(Engine { model, tokenizer, bare: chat.bare(), chat, device, reader, opening })
    }

    /// As [`Reader::set_graphs`].
    pub fn set_graphs(&mut self, graphs: bool) {
        self.reader.set_graphs(graphs);
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Where it runs: never [`Device::Auto`].
    pub fn device(&self) -> Device {
        self.device
    }

    /// What reads plans and continues prompts: the tier below [`Engine::ask`].
    pub fn reader(&self) -> &dyn Reader {
        self.reader.as_ref()
    }

    /// The prompt around the context for one question.
    ///
    /// # Errors
    /// [`Error::EmptyQuestion`], [`Error::Template`].
    pub fn frame(&self, question: &str, params: &AskParams) -> Result<Frame> {
        let chat = if params.chat { &self.chat } else { &self.bare };
        Frame::new(&params.template, chat, &self.tokenizer, question, params.read.short_tail)
    }

    /// The reading plan of a document and a frame, with the byte span of each sentence.
    ///
    /// # Errors
    /// [`Error::Parameter`], [`Error::QuestionTooLong`].
    pub fn plan(&self, document: &Document, frame: &Frame, params: &ReadParams) -> Result<(Plan, Vec<Range<usize>>)> {
        Plan::new(document, frame, &self.tokenizer, params)
    }

    /// The final prompt: the kept sentences as one text, tokenised as a whole as the reference does.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn answer_prompt(
        &self,
        document: &Document,
        spans: &[Range<usize>],
        gleaned: &Gleaned,
        frame: &Frame,
    ) -> Result<Vec<u32>> {
        let sentences = gleaned.kept.iter().map(|kept| &document.text()[spans[kept.sentence as usize].clone()]);
        self.prompt(&sentences.collect::<String>(), frame)
    }

    /// A prompt over any `context`, a part of a document chosen in another way than by reading for one.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn prompt(&self, context: &str, frame: &Frame) -> Result<Vec<u32>> {
        let context = format!("{}{}", python_strip(context), frame.closing);
        Ok([&frame.answer_prefix[..], &self.tokenizer.encode(&context)?, &frame.answer_tail].concat())
    }

    /// Answers `question` from `document`.
    ///
    /// # Errors
    /// Every [`Error`] but those of opening; the document and the engine stay usable.
    pub fn ask(&self, document: &Document, question: &str, params: &AskParams) -> Result<Answer> {
        self.ask_with(document, question, params, &mut |_| ControlFlow::Continue(()))
    }

    /// [`Engine::ask`] with a callback for progress. Breaking from a step cancels; breaking from a text ends the
    /// answer there.
    ///
    /// # Errors
    /// Those of [`Engine::ask`], and [`Error::Cancelled`].
    pub fn ask_with(
        &self,
        document: &Document,
        question: &str,
        params: &AskParams,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Answer> {
        let _ask = range!("ask");
        let begun = Instant::now();
        params.read.validate()?;
        params.sampling.validate()?;
        let planning = range!("plan");
        let frame = self.frame(question, params)?;
        let (plan, spans) = self.plan(document, &frame, &params.read)?;
        drop(planning);
        let figures = DocumentFigures {
            bytes: document.text().len(),
            sentences: plan.sentences(),
            tokens: plan.tokens.len(),
            chunks: plan.chunks(),
        };
        let planned = Instant::now();
        if progress(Progress::Planned { figures: &figures, plan: &plan, spans: &spans }).is_break() {
            return Err(Error::Cancelled);
        }

        let mut longest_step = 0;
        let reading = range!("read");
        let gleaned = self.reader.read(&plan, &mut |report| {
            longest_step = longest_step.max(report.tokens);
            progress(Progress::Step(report))
        })?;
        drop(reading);
        let read = Instant::now();

        let answering = range!("answer");
        let prompt = self.answer_prompt(document, &spans, &gleaned, &frame)?;
        let Decoded { answer, tokens, first } =
            self.decode_answer(&prompt, &params.sampling, &mut |text| progress(Progress::Text(text)))?;
        drop(answering);
        let answered = Instant::now();

        let mut warnings =
            self.warnings(&gleaned, &plan, longest_step.max(prompt.len() + params.sampling.max_new_tokens));
        let timings = match params.timings {
            true => {
                let first = first.unwrap_or(answered);
                let stages = [
                    stage(Stage::Plan, begun, planned),
                    stage(Stage::Read, planned, read),
                    stage(Stage::Prefill, read, first),
                    stage(Stage::Decode, first, answered),
                ];
                // An answer that was ended from outside is not longer the second time.
                let max_new_tokens = params.sampling.max_new_tokens.min(tokens + 1);
                let profile =
                    self.reader.profile(&plan, &prompt, &Sampling { max_new_tokens, ..params.sampling.clone() })?;
                let ceilings = match self.device {
                    Device::Cuda(ordinal) => cuda::ceilings(ordinal, &mut warnings),
                    Device::CudaStream(stream) => cuda::ceilings(stream.ordinal(), &mut warnings),
                    Device::Auto | Device::Cpu => Ceilings::default(),
                };
                Some(Timings::new(self.opening.into_iter().chain(stages).collect(), profile, ceilings))
            }
            false => None,
        };

        Ok(Answer {
            answer,
            evidence: evidence(document, &plan, &spans, &gleaned),
            document: figures,
            retained_tokens: gleaned.kept.iter().map(|kept| plan.sentence_len(kept.sentence)).sum(),
            steps: plan.chunks(),
            params: ParamFigures {
                window_length: params.read.window_length,
                topk: params.read.topk,
                phrase_width: params.read.phrase_width,
                max_retained: params.read.max_retained(),
                max_sentence_tokens: params.read.max_sentence_tokens,
                short_tail: params.read.short_tail,
                chunk_short_tail: params.read.chunk_short_tail,
                max_new_tokens: params.sampling.max_new_tokens,
                temperature: params.sampling.temperature,
                top_p: params.sampling.top_p,
                seed: params.sampling.seed,
            },
            device: self.reader.device(),
            model: self.model.path.display().to_string(),
            timing_ms: Timing {
                plan: ms(begun, planned),
                read: ms(planned, read),
                answer: ms(read, answered),
                total: ms(begun, answered),
            },
            timings,
            warnings,
        })
    }

    /// Continues a prompt of tokens as text, without white space around it. `on_text` gets each piece as it becomes
    /// certain; breaking ends the answer there.
    ///
    /// # Errors
    /// Those of [`Reader::answer`] and the tokenizer's.
    pub fn answer(
        &self,
        prompt: &[u32],
        sampling: &Sampling,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<String> {
        Ok(self.decode_answer(prompt, sampling, on_text)?.answer)
    }

    fn decode_answer(
        &self,
        prompt: &[u32],
        sampling: &Sampling,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Decoded> {
        let mut stream = self.tokenizer.decode_stream();
        let mut failed = None;
        let mut begun = false;
        let mut first = None;
        let tokens = self.reader.answer(prompt, sampling, &mut |token| {
            first.get_or_insert_with(Instant::now);
            match stream(token) {
                Ok(Some(text)) => {
                    let text = if begun { &text } else { text.trim_start() };
                    begun |= !text.is_empty();
                    if text.is_empty() { ControlFlow::Continue(()) } else { on_text(text) }
                }
                Ok(None) => ControlFlow::Continue(()),
                Err(error) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let answer = python_strip(&self.tokenizer.decode(&tokens)?).to_owned();
        Ok(Decoded { answer, tokens: tokens.len(), first })
    }

    fn warnings(&self, gleaned: &Gleaned, plan: &Plan, longest_prompt: usize) -> Vec<String> {
        let mut warnings = Vec::new();
        if gleaned.dropped_for_capacity > 0 {
            warnings.push(format!(
                "{} kept sentences were dropped because together they exceeded {} tokens; raise max_retained to keep them",
                gleaned.dropped_for_capacity, plan.max_retained
            ));
        }
        let limit = self.model.config.max_position_embeddings;
        if longest_prompt > limit {
            warnings.push(format!(
                "prompts reached {longest_prompt} tokens, beyond the {limit} that the model was made for; lower the window or max_retained"
            ));
        }
        warnings
    }
}

/// An answer's text, the number of its tokens, and when the first of them came.
struct Decoded {
    answer: String,
    tokens: usize,
    first: Option<Instant>,
}

fn ms(from: Instant, to: Instant) -> f64 {
    (to - from).as_secs_f64() * 1e3
}

fn stage(stage: Stage, from: Instant, to: Instant) -> StageTime {
    StageTime { stage, ms: ms(from, to) }
}

fn evidence(document: &Document, plan: &Plan, spans: &[Range<usize>], gleaned: &Gleaned) -> Vec<Evidence> {
    let trimmed: Vec<Range<usize>> = gleaned
        .kept
        .iter()
        .map(|kept| {
            let span = &spans[kept.sentence as usize];
            let sentence = &document.text()[span.clone()];
            let text = python_strip(sentence);
            let start = span.start + (text.as_ptr() as usize - sentence.as_ptr() as usize);
            start..start + text.len()
        })
        .collect();
    let lines = document.lines_of(trimmed.iter().map(|span| span.start));
    let mut evidence: Vec<Evidence> = (gleaned.kept.iter().zip(trimmed).zip(lines))
        .map(|((kept, span), line)| Evidence {
            text: document.text()[span.clone()].to_owned(),
            start: span.start,
            end: span.end,
            line,
            score: kept.score,
            chunk: plan.chunk_of(kept.sentence),
        })
        .collect();
    evidence.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.start.cmp(&b.start)));
    evidence
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_spelled_as_in_pytorch() {
        assert_eq!("cuda:3".parse(), Ok(Device::Cuda(3)));
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        assert!("cuda:x".parse::<Device>().unwrap_err().contains("cuda:N"));
    }
}
