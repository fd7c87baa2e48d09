//! The front door: open a model, ask documents.

use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use crate::answer::{Answer, DocumentFigures, Evidence, ParamFigures, Timing};
use crate::cpu::CpuReader;
use crate::model::Model;
use crate::plan::{Plan, ReadParams};
use crate::reader::{Gleaned, Reader, Sampling, StepReport};
use crate::text::{ChatTemplate, Document, Frame, PromptTemplate, Tokenizer, python_strip};
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
    /// Whether the prompt is the user's message in the model's chat template, else it stands bare: a text to go on with.
    pub chat: bool,
}

impl Default for AskParams {
    fn default() -> Self {
        AskParams {
            read: ReadParams::default(),
            sampling: Sampling::default(),
            template: PromptTemplate::default(),
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
}

impl Engine {
    /// Opens a Hugging Face model directory on a device.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::ModelFile`], [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::Template`] for
    /// what is wrong with the directory, [`Error::Device`] if the device cannot be used.
    pub fn open(model_dir: impl AsRef<Path>, device: Device) -> Result<Engine> {
        // A device that is not there is the first thing to say: a model may take long to open.
        if let Device::Cuda(ordinal) = device {
            cuda::describe(ordinal)?;
        }
        let model_dir = model_dir.as_ref();
        let model = Arc::new(Model::open(model_dir)?);
        let tokenizer = Tokenizer::open(&model_dir.join("tokenizer.json"), model.config.vocab_size)?;
        let chat = ChatTemplate::open(model_dir)?;
        let (device, reader) = device.reader(model.clone())?;
        Ok(Engine { model, tokenizer, bare: chat.bare(), chat, device, reader })
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
        let begun = Instant::now();
        params.read.validate()?;
        params.sampling.validate()?;
        let frame = self.frame(question, params)?;
        let (plan, spans) = self.plan(document, &frame, &params.read)?;
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
        let gleaned = self.reader.read(&plan, &mut |report| {
            longest_step = longest_step.max(report.tokens);
            progress(Progress::Step(report))
        })?;
        let read = Instant::now();

        let prompt = self.answer_prompt(document, &spans, &gleaned, &frame)?;
        let answer = self.answer(&prompt, &params.sampling, &mut |text| progress(Progress::Text(text)))?;
        let answered = Instant::now();

        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
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
            warnings: self.warnings(&gleaned, &plan, longest_step.max(prompt.len() + params.sampling.max_new_tokens)),
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
        let mut stream = self.tokenizer.decode_stream();
        let mut failed = None;
        let mut begun = false;
        let tokens = self.reader.answer(prompt, sampling, &mut |token| match stream(token) {
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
        })?;
        match failed {
            Some(error) => Err(error),
            None => Ok(python_strip(&self.tokenizer.decode(&tokens)?).to_owned()),
        }
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
