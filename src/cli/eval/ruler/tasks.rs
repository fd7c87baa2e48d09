//! Tasks that are made rather than read: needles with keys and values, and chains of variables, at any length.

use std::ops::Range;

use gleaner::text::PromptTemplate;
use gleaner::{AskParams, Engine, Error};
use serde_json::{Map, json};

use super::super::super::Failure;
use super::super::case::{Case, Score};
use super::super::haystack::Haystack;
use super::score;
use super::words::{Draws, Form};

/// A task of RULER.
#[derive(Debug)]
pub struct Task {
    pub name: &'static str,
    hay: Hay,
    kind: Kind,
}

/// What the needles are hidden in.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Hay {
    /// One line of five short sentences, over and over.
    Noise,
    /// A text of the user's, as one paragraph.
    Text,
    /// Needles that nobody asks for, with keys of their own.
    Needles,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    /// `values` values for each of `keys` keys, of which the question names `asked`.
    Needles { key: Form, value: Form, keys: usize, values: usize, asked: usize },
    /// A variable with a number, and others that take it over one from another.
    Chain,
}

const fn needles(name: &'static str, hay: Hay, forms: (Form, Form), counts: [usize; 3]) -> Task {
    let ((key, value), [keys, values, asked]) = (forms, counts);
    Task { name, hay, kind: Kind::Needles { key, value, keys, values, asked } }
}

/// With the settings of RULER's synthetic.yaml.
pub static TASKS: [Task; 9] = [
    needles("niah_single_1", Hay::Noise, (Form::Word, Form::Number), [1, 1, 1]),
    needles("niah_single_2", Hay::Text, (Form::Word, Form::Number), [1, 1, 1]),
    needles("niah_single_3", Hay::Text, (Form::Word, Form::Uuid), [1, 1, 1]),
    needles("niah_multikey_1", Hay::Text, (Form::Word, Form::Number), [4, 1, 1]),
    needles("niah_multikey_2", Hay::Needles, (Form::Word, Form::Number), [1, 1, 1]),
    needles("niah_multikey_3", Hay::Needles, (Form::Uuid, Form::Uuid), [1, 1, 1]),
    needles("niah_multivalue", Hay::Text, (Form::Word, Form::Number), [1, 4, 1]),
    needles("niah_multiquery", Hay::Text, (Form::Word, Form::Number), [4, 1, 4]),
    Task { name: "vt", hay: Hay::Noise, kind: Kind::Chain },
];

impl Task {
    pub fn named(name: &str) -> Option<&'static Task> {
        TASKS.iter().find(|task| task.name == name)
    }

    /// Whether it needs a text to hide needles in.
    pub fn takes_text(&self) -> bool {
        self.hay == Hay::Text
    }
}

const NOISE: &str = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
/// Variables that take over the number of the first.
const HOPS: usize = 4;
/// Lines of noise in the worked example of a chain.
const EXAMPLE_LINES: usize = 5;

/// What is hidden, and what is asked.
struct Puzzle {
    /// In the order in which they go into the document; true for those that hold the answer.
    needles: Vec<(String, bool)>,
    template: String,
    question: String,
    opening: String,
    answers: Vec<String>,
    max_new_tokens: usize,
}

fn needle(key: &str, form: Form, value: &str) -> String {
    format!("One of the special magic {}s for {key} is: {value}.", form.name())
}

impl Puzzle {
    fn new(kind: Kind, draws: &mut Draws) -> Puzzle {
        match kind {
            Kind::Needles { key, value, keys, values, asked } => {
                let drawn: Vec<(String, Vec<String>)> =
                    (0..keys).map(|_| (draws.draw(key), (0..values).map(|_| draws.draw(value)).collect())).collect();
                let asked = draws.sample(asked, keys);
                let mut needles = Vec::new();
                for (index, (key, values)) in drawn.iter().enumerate() {
                    let is_asked = asked.contains(&index);
                    needles.extend(values.iter().map(|text| (needle(key, value, text), is_asked)));
                }
                draws.shuffle(&mut needles);
                let answers: Vec<String> = asked.iter().flat_map(|&index| drawn[index].1.clone()).collect();
                let query = match asked.iter().map(|&index| drawn[index].0.as_str()).collect::<Vec<_>>()[..] {
                    [one] => one.to_owned(),
                    ref all => format!("{}, and {}", all[..all.len() - 1].join(", "), all[all.len() - 1]),
                };
                let name = value.name();
                let [some, are, are_all, s] = match answers.len() {
                    1 => ["A", "is", "is", ""],
                    _ => ["Some", "are", "are all", "s"],
                };
                Puzzle {
                    needles,
                    template: format!(
                        "{some} special magic {name}{s} {are} hidden within the following text. Make sure to memorize it. I will quiz you about the {name}{s} afterwards.\n{{context}}\n{{question}}"
                    ),
                    question: format!(
                        "What {are_all} the special magic {name}{s} for {query} mentioned in the provided text?"
                    ),
                    opening: format!(" The special magic {name}{s} for {query} mentioned in the provided text {are}"),
                    answers,
                    max_new_tokens: 128,
                }
            }
            Kind::Chain => {
                // Shorter names in the worked example, which stands before the text.
                let example = Chain::new(draws, 3);
                let (lines, _) = among(draws, &vec![NOISE.to_owned(); EXAMPLE_LINES], &example.lines);
                let task = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n";
                let Chain { names, lines: chain, question, opening } = Chain::new(draws, 5);
                let [shown, asked] = [&example.question, &example.opening];
                Puzzle {
                    needles: chain.into_iter().map(|line| (line, true)).collect(),
                    template: format!(
                        "{task}{lines}\n{shown}{asked} {}\n\n{task}{{context}}\n{{question}}",
                        example.names.join(" ")
                    ),
                    question,
                    opening,
                    answers: names,
                    max_new_tokens: 30,
                }
            }
        }
    }
}

/// Variables that all come to have one number.
struct Chain {
    names: Vec<String>,
    lines: Vec<String>,
    question: String,
    opening: String,
}

impl Chain {
    fn new(draws: &mut Draws, letters: usize) -> Chain {
        let names: Vec<String> = (0..=HOPS).map(|_| draws.letters(letters)).collect();
        let number = 10_000 + draws.noise.below(89_999);
        let first = format!("VAR {} = {number}", names[0]);
        let others = names.windows(2).map(|pair| format!("VAR {} = VAR {}", pair[1], pair[0]));
        Chain {
            lines: [first].into_iter().chain(others).collect(),
            question: format!("Question: Find all variables that are assigned the value {number} in the text above."),
            opening: format!(
                " Answer: According to the chain(s) of variable assignment in the text above, {} variables are assigned the value {number}, they are: ",
                names.len()
            ),
            names,
        }
    }
}

/// A document and the bytes of the needles in it.
type Hidden = (String, Vec<Range<usize>>);

/// The lines of a text with each of `needles` as a line of its own before a drawn one, in order.
fn among(draws: &mut Draws, lines: &[String], needles: &[String]) -> Hidden {
    let places = draws.sample(needles.len(), lines.len());
    let mut waiting = needles.iter().zip(places).peekable();
    let (mut text, mut spans) = (String::new(), Vec::new());
    for (index, line) in lines.iter().enumerate() {
        if let Some((needle, _)) = waiting.next_if(|(_, place)| *place == index) {
            spans.push(text.len()..text.len() + needle.len());
            text.extend([needle, "\n"]);
        }
        text.extend([line, "\n"]);
    }
    text.pop();
    (text, spans)
}

/// What cases are made with.
pub struct Maker<'a> {
    pub engine: &'a Engine,
    /// For tasks that take a text.
    pub haystack: Option<&'a Haystack>,
    pub seed: u64,
}

impl Maker<'_> {
    /// Sample `sample` of a task whose prompt and answer take `length` tokens at most, as many as fit. It depends on
    /// these and the seed alone, so that it is the same in every run.
    pub fn case(&self, task: &Task, length: usize, sample: usize) -> Result<Case, Failure> {
        let number = TASKS.iter().position(|other| other.name == task.name).unwrap_or(TASKS.len());
        let mut draws = Draws::new(self.seed, &[number, length, sample]);
        let puzzle = Puzzle::new(task.kind, &mut draws);
        let template = PromptTemplate::new(format!("the prompt of {}", task.name), &puzzle.template)?;
        let template = template.with_opening(&puzzle.opening);
        let params = AskParams { template: template.clone(), ..AskParams::default() };
        let around = self.engine.frame(&puzzle.question, &params)?.len() + puzzle.max_new_tokens;
        let texts: Vec<String> = puzzle.needles.iter().map(|(text, _)| text.clone()).collect();
        let hidden = texts.iter().map(|text| self.count(&format!("{text}\n"))).sum::<Result<usize, Error>>()?;
        let room = length.saturating_sub(around + hidden);
        let (document, spans) = self.hide(task, &texts, room, &mut draws)?.ok_or_else(|| {
            Failure::Mistake(format!(
                "a length of {length} tokens is too small for {}: question and answer take {around}, what is hidden {hidden}, and some text should be around it; raise --lengths",
                task.name
            ))
        })?;
        let evidence = spans.into_iter().zip(&puzzle.needles).filter(|(_, (_, holds))| *holds).map(|(span, _)| span);
        Ok(Case {
            id: format!("{}-{length}-{sample}", task.name),
            task: format!("{}@{length}", task.name),
            document,
            question: puzzle.question,
            template: Some(template),
            chat: true,
            answers: puzzle.answers,
            all_classes: Vec::new(),
            evidence: evidence.collect(),
            max_new_tokens: puzzle.max_new_tokens,
            scores: const { &[Score { name: "references", of: score::mean }] },
            details: Map::from_iter([("length".to_owned(), json!(length)), ("sample".to_owned(), json!(sample))]),
        })
    }

    fn count(&self, text: &str) -> Result<usize, Error> {
        Ok(self.engine.tokenizer().encode(text)?.len())
    }

    /// A document of at most `room` tokens besides the needles; `None` where it is too small.
    fn hide(&self, task: &Task, needles: &[String], room: usize, draws: &mut Draws) -> Result<Option<Hidden>, Error> {
        let mut lines = Vec::new();
        match (task.hay, task.kind) {
            (Hay::Text, _) => {
                let Some(haystack) = self.haystack else { return Ok(None) };
                let needles: Vec<&str> = needles.iter().map(String::as_str).collect();
                let depths: Vec<usize> = draws.sample(needles.len(), 40).into_iter().map(depth).collect();
                let placement = haystack.place(room, &depths, &mut draws.noise);
                return Ok(placement.ok().map(|placement| haystack.hide(&placement, &needles)));
            }
            (Hay::Needles, Kind::Needles { key, value, .. }) => {
                let mut left = room;
                loop {
                    let line = needle(&draws.draw(key), value, &draws.draw(value));
                    match left.checked_sub(self.count(&format!("{line}\n"))?) {
                        Some(rest) => left = rest,
                        None => break,
                    }
                    lines.push(line);
                }
            }
            _ => lines = vec![NOISE.to_owned(); room / self.count(&format!("{NOISE}\n"))?.max(1)],
        }
        Ok((lines.len() >= needles.len()).then(|| among(draws, &lines, needles)))
    }
}

/// Step `index` of 40 from 0 to 100 percent.
fn depth(index: usize) -> usize {
    (200 * index + 39) / 78
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::path::Path;

    use gleaner::Device;
    use gleaner::text::{python_strip, split_sentences};

    use super::*;

    fn check(maker: &Maker, task: &Task, length: usize) {
        let case = maker.case(task, length, 0).unwrap_or_else(|_| panic!("{} fits {length}", task.name));
        let name = &case.id;
        let text = case.document.as_str();

        let params = AskParams { template: case.template.clone().unwrap(), ..AskParams::default() };
        let around = maker.engine.frame(&case.question, &params).unwrap().len() + case.max_new_tokens;
        let tokens = around + maker.count(text).unwrap();
        assert!(tokens <= length && tokens + 100 > length, "{name} takes {tokens} tokens");

        let gold: Vec<&str> = case.evidence.iter().map(|span| &text[span.clone()]).collect();
        assert_eq!(gold.len(), case.answers.len(), "{name}");
        if task.name == "vt" {
            let links = gold.windows(2).map(|pair| pair[1].rsplit(' ').next() == pair[0].split(' ').nth(1));
            assert!(links.clone().count() == HOPS && links.clone().all(|linked| linked), "{gold:?}");
            assert!(gold.iter().zip(&case.answers).all(|(line, name)| line.starts_with(&format!("VAR {name} = "))));
            let number = gold[0].rsplit(' ').next().unwrap();
            assert!(case.question.contains(&format!(" {number} ")), "{name}");
            return;
        }
        for answer in &case.answers {
            assert_eq!(text.matches(answer).count(), 1, "{name}");
            assert!(gold.iter().any(|needle| needle.ends_with(&format!(" is: {answer}."))), "{name}");
        }
        let key = |needle: &str| needle.split(" for ").nth(1).unwrap().split(" is: ").next().unwrap().to_owned();
        assert!(gold.iter().all(|needle| case.question.contains(&key(needle))), "{name}");

        let sentences = split_sentences(text, 10).into_iter().map(|span| python_strip(&text[span]));
        let needles: Vec<&str> =
            sentences.filter(|sentence| sentence.starts_with("One of the special magic")).collect();
        assert!(gold.iter().all(|needle| needles.contains(needle)), "{name}: each is a sentence of its own");
        let keys: HashSet<String> = needles.iter().map(|needle| key(needle)).collect();
        let expected = match task.name {
            "niah_multivalue" => (4, 1),
            "niah_multikey_1" | "niah_multiquery" => (4, 4),
            "niah_multikey_2" | "niah_multikey_3" => {
                assert_eq!(text.lines().count(), needles.len(), "{name}: nothing but needles");
                (needles.len(), needles.len())
            }
            _ => (1, 1),
        };
        assert_eq!((needles.len(), keys.len()), expected, "{name}: needles and keys");
    }

    #[test]
    fn cases_hold_what_they_ask_for_and_fill_their_length() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let engine = Engine::open(root.join("models/gleaner-demo-16m"), Device::Cpu).unwrap();
        let text = std::fs::read_to_string(root.join("examples/almanac.txt")).unwrap();
        let words: String = text.split_whitespace().flat_map(|word| [word, " "]).collect();
        let haystack = Haystack::new(words, |text| Ok(engine.tokenizer().encode(text)?.len())).unwrap();
        let maker = Maker { engine: &engine, haystack: Some(&haystack), seed: 7 };
        for task in &TASKS {
            [1500, 6000].iter().for_each(|&length| check(&maker, task, length));
            let made = |seed, sample| {
                let case = Maker { seed, ..maker }.case(task, 2000, sample).ok().expect("it fits");
                (case.document, case.question, case.answers)
            };
            assert_eq!(made(7, 1), made(7, 1), "{}", task.name);
            assert!(made(7, 1) != made(8, 1) && made(7, 1) != made(7, 2), "{}", task.name);
        }
    }

    #[test]
    fn the_worked_example_of_a_chain_stands_before_the_text() {
        let puzzle = Puzzle::new(Kind::Chain, &mut Draws::new(1, &[]));
        let (example, rest) = puzzle.template.split_once("\n\nMemorize").unwrap();
        assert_eq!(rest.matches("VAR").count(), 0);
        assert!(rest.ends_with("in the following text.\n\n{context}\n{question}"), "{rest}");
        let shown: Vec<&str> = example.rsplit(' ').take(HOPS + 1).collect();
        assert!(shown.iter().all(|name| name.len() == 3 && example.contains(&format!("VAR {name} = "))), "{example}");
    }

    #[test]
    fn depths_are_those_of_forty_steps() {
        assert_eq!([0, 1, 2, 20, 38, 39].map(depth), [0, 3, 5, 51, 97, 100]);
    }
}
