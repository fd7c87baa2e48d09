//! Version 1: 21 tasks in English, Chinese and code (arXiv 2308.14508).

use std::collections::BTreeMap;
use std::sync::LazyLock;

use gleaner::eval::metrics;
use gleaner::text::{PromptTemplate, python_strip};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::case::{Case, Score};
use super::super::rows;

/// What defines a task, beside its rows.
#[derive(Deserialize)]
struct Task {
    /// With the field `{context}` and mostly `{input}`.
    prompt: String,
    max_new_tokens: usize,
    metric: Metric,
    /// Whether the prompt is a message of a chat. The few-shot and code tasks go better without, says the original.
    chat: bool,
    /// Whether only the first line of an answer counts.
    first_line: bool,
}

/// By name: the benchmark's prompts and limits, byte by byte, with what its programs do to each task.
static TASKS: LazyLock<BTreeMap<String, Task>> =
    LazyLock::new(|| serde_json::from_str(include_str!("tasks.json")).expect("a table of tasks"));

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "snake_case")]
enum Metric {
    QaF1,
    QaF1Zh,
    RougeL,
    RougeLZh,
    Classification,
    Retrieval,
    RetrievalZh,
    Count,
    CodeSimilarity,
}

static QA_F1: [Score; 1] = [Score { name: "f1", of: |case, answer| best(case, answer, metrics::qa_f1) }];
static QA_F1_ZH: [Score; 1] = [Score { name: "f1", of: |case, answer| best(case, answer, metrics::qa_f1_zh) }];
static ROUGE_L: [Score; 1] = [Score { name: "rouge_l", of: |case, answer| best(case, answer, metrics::rouge_l) }];
static ROUGE_L_ZH: [Score; 1] = [Score { name: "rouge_l", of: |case, answer| best(case, answer, metrics::rouge_l_zh) }];
static CLASSIFICATION: [Score; 1] = [Score {
    name: "classification",
    of: |case, answer| best(case, answer, |answer, truth| metrics::classification(answer, truth, &case.all_classes)),
}];
static RETRIEVAL: [Score; 1] = [Score {
    name: "retrieval",
    of: |case, answer| best(case, answer, |answer, truth| metrics::retrieval(answer, truth).unwrap_or(0.0)),
}];
static RETRIEVAL_ZH: [Score; 1] = [Score {
    name: "retrieval",
    of: |case, answer| best(case, answer, |answer, truth| metrics::retrieval_zh(answer, truth).unwrap_or(0.0)),
}];
static COUNT: [Score; 1] = [Score { name: "count", of: |case, answer| best(case, answer, metrics::count) }];
static CODE_SIMILARITY: [Score; 1] =
    [Score { name: "code_similarity", of: |case, answer| best(case, answer, metrics::code_similarity) }];

/// The best over the right answers.
fn best(case: &Case, answer: &str, metric: impl Fn(&str, &str) -> f64) -> f64 {
    let answer = match TASKS.get(&case.task) {
        Some(task) if task.first_line => answer.trim_start_matches('\n').split('\n').next().unwrap_or(""),
        _ => answer,
    };
    case.answers.iter().map(|truth| metric(answer, truth)).fold(0.0, f64::max)
}

impl Metric {
    fn scores(self) -> &'static [Score] {
        match self {
            Metric::QaF1 => &QA_F1,
            Metric::QaF1Zh => &QA_F1_ZH,
            Metric::RougeL => &ROUGE_L,
            Metric::RougeLZh => &ROUGE_L_ZH,
            Metric::Classification => &CLASSIFICATION,
            Metric::Retrieval => &RETRIEVAL,
            Metric::RetrievalZh => &RETRIEVAL_ZH,
            Metric::Count => &COUNT,
            Metric::CodeSimilarity => &CODE_SIMILARITY,
        }
    }

    /// Refuses a row that could not be scored.
    fn check(self, line: &Line) -> Result<(), String> {
        if line.answers.is_empty() {
            return Err("answers is empty: there is nothing to compare an answer with".into());
        }
        let names_paragraph = |truth: &&String| match self {
            Metric::Retrieval => metrics::retrieval("", truth).is_some(),
            Metric::RetrievalZh => metrics::retrieval_zh("", truth).is_some(),
            _ => true,
        };
        if let Some(truth) = line.answers.iter().find(|truth| !names_paragraph(truth)) {
            return Err(format!("the answer {truth:?} names no paragraph"));
        }
        match (self, line.all_classes.as_deref()) {
            (Metric::Classification, None | Some([])) => Err("all_classes lists no class to choose from".into()),
            _ => Ok(()),
        }
    }
}

#[derive(Deserialize)]
struct Line {
    _id: Option<String>,
    input: String,
    context: String,
    answers: Vec<String>,
    dataset: Option<String>,
    all_classes: Option<Vec<String>>,
}

/// A case of a row. One that does not name its dataset is of the task that its file is named after.
pub fn case(stem: &str, id: String, row: Value) -> Result<Case, String> {
    let line: Line = rows::fields(row)?;
    let name = line.dataset.as_deref().unwrap_or(stem);
    let task = TASKS.get(name).ok_or_else(|| {
        let names = TASKS.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        format!("{name:?} is no task of LongBench; there are {names}")
    })?;
    task.metric.check(&line)?;
    let context = python_strip(&line.context);
    if context.is_empty() {
        return Err("context is empty".into());
    }
    let (template, question) = fill(&task.prompt, &line.context, &line.input);
    if question.is_empty() {
        return Err(format!("input is empty, but the prompt of {name} has a place for it"));
    }
    let template =
        PromptTemplate::new(format!("the prompt of {name}"), &template).map_err(|error| error.to_string())?;
    Ok(Case {
        id: line._id.unwrap_or(id),
        task: name.into(),
        question: question.into(),
        template: Some(template),
        chat: task.chat,
        evidence: Vec::new(),
        max_new_tokens: task.max_new_tokens,
        scores: task.metric.scores(),
        details: Map::new(),
        document: context.into(),
        answers: line.answers,
        all_classes: line.all_classes.unwrap_or_default(),
    })
}

/// A template with the fields of [`PromptTemplate`], and the question for it.
///
/// In a prompt without a field for the input, such as that of a summary, what stands behind the context is the question:
/// it says what is wanted, so attention is read from there. The white space around context and question, which a frame
/// does not take over from them, goes into the template: in code it counts.
fn fill<'a>(prompt: &'a str, context: &str, input: &'a str) -> (String, &'a str) {
    let (head, tail) = prompt.split_once("{context}").unwrap_or((prompt, ""));
    let (between, question, end) = match tail.split_once("{input}") {
        Some((between, end)) => (between, input, end),
        None => ("", tail, ""),
    };
    let with_space_of = |text: &str, field: &str| text.replacen(python_strip(text), field, 1);
    let template =
        [head, &with_space_of(context, "{context}"), between, &with_space_of(question, "{question}"), end].concat();
    (template, python_strip(question))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the model sees: the benchmark's own `prompt.format(context=..., input=...)`.
    #[test]
    fn a_filled_template_is_the_prompt_of_the_benchmark() {
        let (context, input) = ("def f(x):\n    y = 1\n", "\n    return x\n");
        for (name, task) in TASKS.iter() {
            let (template, question) = fill(&task.prompt, context, input);
            let filled = template.replace("{context}", python_strip(context)).replace("{question}", question);
            assert_eq!(filled, task.prompt.replace("{context}", context).replace("{input}", input), "{name}");
            assert!(PromptTemplate::new(name.as_str(), &template).is_ok(), "{name}");
        }
    }

    #[test]
    fn without_a_field_for_the_input_the_instruction_is_the_question() {
        let question = |name: &str| fill(&TASKS[name].prompt, "text", "").1;
        assert_eq!(question("gov_report"), "Now, write a one-page summary of the report.\n\nSummary:");
        assert_eq!(question("vcsum"), "会议总结：");
        assert_eq!(question("lcc"), "Next line of code:");
        assert!(question("passage_count").starts_with("Please enter the final count"));
        assert_eq!(question("qasper"), "");
    }

    #[test]
    fn all_tasks_are_as_published() {
        let named = |of: fn(&Task) -> bool| {
            TASKS.iter().filter(|(_, task)| of(task)).map(|(name, _)| name.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(TASKS.len(), 21);
        assert_eq!(named(|task| !task.chat), ["lcc", "lsht", "repobench-p", "samsum", "trec", "triviaqa"]);
        assert_eq!(named(|task| task.first_line), ["lsht", "samsum", "trec", "triviaqa"]);
        assert_eq!(named(|task| task.max_new_tokens == 512), ["gov_report", "multi_news", "qmsum", "vcsum"]);
        assert_eq!(TASKS.values().map(|task| task.max_new_tokens).sum::<usize>(), 3168);
    }
}
