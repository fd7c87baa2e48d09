//! What is compared: ways to answer from a document, each with the settings that shape it.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::str::FromStr;
use std::time::Instant;

use gleaner::plan::ReadParams;
use gleaner::reader::Sampling;
use gleaner::{AskParams, Document, Engine, Error, Progress, Timing};
use serde::{Deserialize, Serialize};

use super::case::Case;
use super::recall::{self, GoldBytes};

/// A way to answer from a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Read the document chunk by chunk and answer from what was kept
    Gleaner,
    /// Answer from the whole document; if the model has too few positions, from its beginning and its end
    Full,
    /// Answer from the last tokens of the document, as many as a window has
    LastWindow,
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Method::Gleaner => "gleaner",
            Method::Full => "full",
            Method::LastWindow => "last-window",
        }
    }
}

/// A setting of reading and the values to try, as in `topk=100,300`.
#[derive(Clone)]
pub struct Sweep {
    set: fn(&mut ReadParams, usize),
    values: Vec<usize>,
}

/// A setting's name, how it is read, and how it is set.
type Setting = (&'static str, fn(&ReadParams) -> usize, fn(&mut ReadParams, usize));

const SETTINGS: [Setting; 4] = [
    ("window", |params| params.window_length, |params, value| params.window_length = value),
    ("topk", |params| params.topk, |params, value| params.topk = value),
    ("phrase", |params| params.phrase_width, |params, value| params.phrase_width = value),
    ("max-retained", ReadParams::max_retained, |params, value| params.max_retained = Some(value)),
];

impl FromStr for Sweep {
    type Err = String;

    fn from_str(text: &str) -> Result<Sweep, String> {
        let names = SETTINGS.map(|(name, ..)| name).join(", ");
        let (name, values) = text.split_once('=').ok_or("write NAME=N,N,..., for instance topk=100,300")?;
        let known = SETTINGS.into_iter().find(|(known, ..)| *known == name);
        let (_, _, set) = known.ok_or_else(|| format!("{name:?} is no setting; there are {names}"))?;
        let number = |text: &str| text.parse().map_err(|_| format!("{text:?} is no whole number"));
        Ok(Sweep { set, values: values.split(',').map(number).collect::<Result<_, _>>()? })
    }
}

/// A method with the settings that shape its answers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Variant {
    pub method: Method,
    pub settings: BTreeMap<String, usize>,
}

impl Variant {
    fn new(method: Method, params: &ReadParams) -> Variant {
        let shapes = |name: &str| match method {
            Method::Gleaner => true,
            Method::Full => false,
            Method::LastWindow => name == "window",
        };
        let settings = SETTINGS.iter().filter(|(name, ..)| shapes(name));
        Variant { method, settings: settings.map(|(name, get, _)| ((*name).into(), get(params))).collect() }
    }

    /// All `methods` with all combinations of swept values over `base`, each once.
    pub fn all(methods: &[Method], base: &ReadParams, sweeps: &[Sweep]) -> Result<Vec<Variant>, Error> {
        let mut settings = vec![base.clone()];
        for sweep in sweeps {
            let with = |params: &ReadParams, value| {
                let mut params = params.clone();
                (sweep.set)(&mut params, value);
                params
            };
            let all = settings.iter().flat_map(|params| sweep.values.iter().map(|&value| with(params, value)));
            settings = all.collect();
        }
        settings.iter().try_for_each(ReadParams::validate)?;
        let mut variants = Vec::new();
        for &method in methods {
            for params in &settings {
                let variant = Variant::new(method, params);
                if !variants.contains(&variant) {
                    variants.push(variant);
                }
            }
        }
        Ok(variants)
    }

    /// Its name among `variants`: the method, and the settings in which those of this method differ.
    pub fn label(&self, variants: &[Variant]) -> String {
        let alike = variants.iter().filter(|other| other.method == self.method);
        let differs = |(name, value): &(&String, &usize)| alike.clone().any(|other| other.settings[*name] != **value);
        let settings = self.settings.iter().filter(differs).map(|(name, value)| format!(" {name}={value}"));
        self.method.name().to_owned() + &settings.collect::<String>()
    }

    fn read_params(&self) -> ReadParams {
        let mut params = ReadParams::default();
        for (name, _, set) in SETTINGS {
            self.settings.get(name).into_iter().for_each(|&value| set(&mut params, value));
        }
        params
    }

    /// Asks a case. `progress` gets the share of the work that is done.
    pub fn ask(&self, engine: &Engine, case: &Case, progress: &mut dyn FnMut(f64)) -> Result<Answered, Error> {
        let params = AskParams {
            read: self.read_params(),
            sampling: Sampling { max_new_tokens: case.max_new_tokens, ..Sampling::default() },
            template: case.template.clone().unwrap_or_default(),
            chat: case.chat,
            ..AskParams::default()
        };
        params.sampling.validate()?;
        let document = Document::new(&case.id, case.document.as_str())?;
        match self.method {
            Method::Gleaner => by_reading(engine, case, &document, &params, progress),
            Method::Full => {
                let frame = engine.frame(&case.question, &params)?;
                let (before, behind) = (frame.answer_prefix.len(), frame.answer_tail.len());
                let positions = engine.model().config.max_position_embeddings;
                let room = positions.saturating_sub(case.max_new_tokens);
                // As LongBench cuts: the two halves of the prompt are as long, the frame counted in.
                let (head, tail) = ((room / 2).saturating_sub(before), (room - room / 2).saturating_sub(behind));
                from_ends(engine, case, &document, (head, tail), &params)
            }
            Method::LastWindow => from_ends(engine, case, &document, (0, params.read.window_length), &params),
        }
    }
}

/// What a method made of a case.
#[derive(Serialize, Deserialize)]
pub struct Answered {
    pub answer: String,
    /// Share of the gold evidence that the answer was made from; `None` where no gold is known.
    pub evidence_recall: Option<f64>,
    /// Tokens of the whole document: sentence by sentence where it was read, which comes to a little more.
    pub document_tokens: usize,
    /// Tokens of the document that the answer was made from.
    pub retained_tokens: usize,
    /// After each step of reading.
    pub steps: Vec<Step>,
    pub timing_ms: Timing,
    pub warnings: Vec<String>,
}

/// What was kept after a step.
#[derive(Serialize, Deserialize)]
pub struct Step {
    /// Share of the gold evidence in the chunks read so far; `None` as long as there was none.
    pub evidence_recall: Option<f64>,
    pub retained_tokens: usize,
}

fn by_reading(
    engine: &Engine,
    case: &Case,
    document: &Document,
    params: &AskParams,
    progress: &mut dyn FnMut(f64),
) -> Result<Answered, Error> {
    let mut gold = None;
    let mut steps = Vec::new();
    let answer = engine.ask_with(document, &case.question, params, &mut |event| {
        match event {
            Progress::Planned { plan, spans, .. } => {
                gold = Some(GoldBytes::new(document.text(), &case.evidence, plan, spans));
            }
            Progress::Step(report) => {
                progress((report.step + 1) as f64 / report.steps as f64);
                let evidence_recall = gold.as_ref().and_then(|gold| gold.kept(report));
                steps.push(Step { evidence_recall, retained_tokens: report.retained_tokens });
            }
            Progress::Text(_) => {}
        }
        ControlFlow::Continue(())
    })?;
    Ok(Answered {
        answer: answer.answer,
        evidence_recall: steps.last().and_then(|step| step.evidence_recall),
        document_tokens: answer.document.tokens,
        retained_tokens: answer.retained_tokens,
        steps,
        timing_ms: answer.timing_ms,
        warnings: answer.warnings,
    })
}

/// Answers from the first `head` and the last `tail` tokens of the document.
fn from_ends(
    engine: &Engine,
    case: &Case,
    document: &Document,
    (head, tail): (usize, usize),
    params: &AskParams,
) -> Result<Answered, Error> {
    let begun = Instant::now();
    let text = document.text();
    let frame = engine.frame(&case.question, params)?;
    let middle = engine.tokenizer().middle(text, head, tail)?;
    let parts: [Range<usize>; 2] = [0..middle.start, middle.end..text.len()];
    let context = parts.iter().map(|part| &text[part.clone()]).collect::<String>();
    let prompt = engine.prompt(&context, &frame)?;
    let planned = Instant::now();
    let answer = engine.answer(&prompt, &params.sampling, &mut |_| ControlFlow::Continue(()))?;
    let answered = Instant::now();
    let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
    Ok(Answered {
        answer,
        evidence_recall: recall::of_parts(text, &case.evidence, &parts),
        document_tokens: engine.tokenizer().encode(text)?.len(),
        retained_tokens: prompt.len() - frame.answer_prefix.len() - frame.answer_tail.len(),
        steps: Vec::new(),
        timing_ms: Timing {
            plan: ms(begun, planned),
            read: 0.0,
            answer: ms(planned, answered),
            total: ms(begun, answered),
        },
        warnings: Vec::new(),
    })
}
