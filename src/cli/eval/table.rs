//! What a run comes to: means of all measures by task and variant, as a table for people, as CSV and as charts.

use std::fmt::Write;

use super::chart::points::{self, Bar, Curve, Panel};
use super::method::{Method, Variant};
use super::run::{Outcome, Record, Results};
use super::stats::Interval;

/// The means of one variant in one task.
struct Row {
    task: String,
    variant: Variant,
    label: String,
    bad: usize,
    /// The first is the main score.
    measures: Vec<Measure>,
}

struct Measure {
    name: String,
    cases: usize,
    interval: Interval,
}

/// The measure of [`Table::against`].
const DIFFERENCE: &str = "difference";
const RECALL: &str = "evidence_recall";
const SOURCE: &str = "document_tokens";
const TOKENS: &str = "retained_tokens";
const SECONDS: &str = "seconds";

pub struct Table {
    /// Tasks in order, variants in order in each, and the mean of all tasks at the end, if there are several.
    rows: Vec<Row>,
    /// Whether there are several tasks.
    many_tasks: bool,
    /// Label of the variant that the others are compared with: the first of gleaner, or the first.
    against: String,
}

/// The value of a measure for a case, if it has one.
type Value<'a> = &'a dyn Fn(&Record) -> Option<f64>;

impl Table {
    pub fn new(results: &Results) -> Table {
        let variants = &results.variants;
        let against = variants.iter().find(|variant| variant.method == Method::Gleaner).unwrap_or(&variants[0]);
        let mut tasks: Vec<&str> = Vec::new();
        for record in &results.records {
            if !tasks.contains(&record.task.as_str()) {
                tasks.push(&record.task);
            }
        }
        let of = |tasks: &[&str], name: &str, scores: &[String]| {
            variants.iter().map(|variant| row(results, tasks, name, variant, against, scores)).collect::<Vec<_>>()
        };
        let mut rows: Vec<Row> = Vec::new();
        for &task in &tasks {
            let of_task = results.records.iter().filter(|record| record.task == task);
            let scores = of_task.flat_map(Record::score_names).fold(Vec::new(), |mut names: Vec<String>, name| {
                if !names.contains(name) {
                    names.push(name.clone());
                }
                names
            });
            rows.extend(of(&[task], task, &scores));
        }
        let many_tasks = tasks.len() > 1;
        // A task without right answers has another aim. Tasks are scored each in its own way, so that only the main
        // scores can be put together.
        tasks.retain(|task| results.records.iter().any(|record| record.task == *task && !record.expected.is_empty()));
        if tasks.len() > 1 {
            rows.extend(of(&tasks, "all tasks", &[]));
        }
        Table { rows, many_tasks, against: against.label(variants) }
    }

    /// For the terminal: tasks with the same scores in one table.
    pub fn text(&self) -> String {
        let mut groups: Vec<Vec<&Row>> = Vec::new();
        for row in &self.rows {
            match groups.iter_mut().find(|group| group[0].columns().eq(row.columns())) {
                Some(group) => group.push(row),
                None => groups.push(vec![row]),
            }
        }
        let mut out = String::new();
        for group in groups {
            out += &self.aligned(&group);
            out.push('\n');
        }
        let _ = write!(out, "In brackets: 95% intervals, by bootstrap over the cases.");
        if self.rows.iter().any(|row| row.label != self.against) {
            let _ = write!(out, " {DIFFERENCE}: main score less that of {}, on the same cases.", self.against);
        }
        out + "\n"
    }

    fn aligned(&self, rows: &[&Row]) -> String {
        let compared = rows.iter().any(|row| row.measure(DIFFERENCE).is_some());
        let any_bad = rows.iter().any(|row| row.bad > 0);
        let mut lines = vec![Vec::new(); rows.len() + 1];
        let mut column = |head: &str, cell: &dyn Fn(&Row) -> String| {
            lines[0].push(head.to_owned());
            lines[1..].iter_mut().zip(rows).for_each(|(line, row)| line.push(cell(row)));
        };
        if self.many_tasks {
            column("task", &|row| row.task.clone());
        }
        column("method", &|row| row.label.clone());
        column("cases", &|row| row.measures.first().map_or(0, |measure| measure.cases).to_string());
        if any_bad {
            column("bad", &|row| row.bad.to_string());
        }
        let difference = compared.then_some(DIFFERENCE);
        for name in rows[0].columns().chain(difference) {
            column(name, &|row| row.measure(name).map_or_else(String::new, |measure| shown(name, &measure.interval)));
        }
        let mut out = String::new();
        for line in &lines {
            for (index, cell) in line.iter().enumerate() {
                let width = lines.iter().map(|line| line[index].chars().count()).max().unwrap_or(0);
                let _ = write!(out, "{}{cell:<width$}", if index > 0 { "  " } else { "" });
            }
            out.truncate(out.trim_end().len());
            out.push('\n');
        }
        out
    }

    /// A line for each measure of each row.
    pub fn csv(&self) -> String {
        let settings = ["window", "topk", "phrase", "max-retained"];
        let mut csv = format!("task,method,{},bad,measure,cases,mean,low,high\n", settings.join(","));
        for row in &self.rows {
            let setting = |name: &str| row.variant.settings.get(name).map_or_else(String::new, usize::to_string);
            let settings = settings.map(setting).join(",");
            for Measure { name, cases, interval: Interval { mean, low, high } } in &row.measures {
                let (task, method) = (quoted(&row.task), row.variant.method.name());
                let _ =
                    writeln!(csv, "{task},{method},{settings},{},{name},{cases},{mean:.4},{low:.4},{high:.4}", row.bad);
            }
        }
        csv
    }

    /// The main scores.
    pub fn scores_chart(&self) -> String {
        let mut panels: Vec<Panel> = Vec::new();
        for row in &self.rows {
            let Some(main) = row.measures.first().filter(|main| main.name != SOURCE) else { continue };
            let bar = Bar { label: row.label.clone(), series: row.variant.method as usize, share: main.interval };
            let title = format!("{}: {}", row.task, main.name);
            match panels.last_mut().filter(|panel| panel.title == title) {
                Some(panel) => panel.bars.push(bar),
                None => panels.push(Panel { title, bars: vec![bar] }),
            }
        }
        points::rows("Scores, with 95% intervals", &panels)
    }

    /// Evidence against what was kept, if any evidence is known: a curve for the variants of gleaner that differ in
    /// `topk` alone, a point for each other.
    pub fn recall_chart(&self) -> Option<String> {
        // The mean of all tasks, or the one that knows evidence.
        let task = &self.rows.iter().rfind(|row| row.measure(RECALL).is_some())?.task;
        let mut curves: Vec<(Variant, Curve)> = Vec::new();
        for row in self.rows.iter().filter(|row| row.task == *task) {
            let (Some(tokens), Some(recall)) = (row.measure(TOKENS), row.measure(RECALL)) else { continue };
            let mut family = row.variant.clone();
            let topk = family.settings.remove("topk").map_or_else(String::new, |topk| format!("topk {topk}"));
            let point = (topk, tokens.interval.mean, recall.interval);
            match curves.iter_mut().find(|(known, _)| *known == family) {
                Some((_, curve)) => curve.points.push(point),
                None => {
                    // The signs of the methods, as in the other chart; further curves of gleaner have others.
                    let first = curves.iter().all(|(known, _)| known.method != family.method);
                    let series =
                        if first { family.method as usize } else { Method::LastWindow as usize + curves.len() };
                    curves.push((family, Curve { label: String::new(), series, points: vec![point] }));
                }
            }
        }
        let families: Vec<Variant> = curves.iter().map(|(family, _)| family.clone()).collect();
        let curves = curves.into_iter().map(|(family, mut curve)| {
            curve.points.sort_by(|a, b| a.1.total_cmp(&b.1));
            Curve { label: family.label(&families), ..curve }
        });
        let curves: Vec<Curve> = curves.collect();
        let axes = ("tokens of the document that the answer is made from (mean)", "share of the evidence kept (mean)");
        Some(points::curves("Evidence kept, with 95% intervals", axes, &curves))
    }
}

impl Row {
    /// Its measures without the difference, which the variant that the others are compared with has not.
    fn columns(&self) -> impl Iterator<Item = &str> {
        self.measures.iter().map(|measure| measure.name.as_str()).filter(|name| *name != DIFFERENCE)
    }

    fn measure(&self, name: &str) -> Option<&Measure> {
        self.measures.iter().find(|measure| measure.name == name)
    }
}

/// The measures of a variant over the cases of `tasks`, each of which counts alike.
fn row(results: &Results, tasks: &[&str], name: &str, variant: &Variant, against: &Variant, scores: &[String]) -> Row {
    let of_variant = |variant: &'_ Variant| {
        let variant = variant.clone();
        results.records.iter().filter(move |record| record.variant == variant)
    };
    let groups = |value: Value| -> Vec<Vec<f64>> {
        let of_task =
            |task: &&str| of_variant(variant).filter(|record| record.task == **task).filter_map(value).collect();
        tasks.iter().map(of_task).collect()
    };
    let measure = |name: &str, value: Value| {
        let groups = groups(value);
        let groups: Vec<&[f64]> = groups.iter().map(Vec::as_slice).filter(|group| !group.is_empty()).collect();
        let interval = Interval::of(&groups)?;
        Some(Measure { name: name.into(), cases: groups.iter().map(|group| group.len()).sum(), interval })
    };
    let mut measures = Vec::new();
    match scores {
        [] => measures.extend(measure("score", &Record::main_score)),
        scores => {
            measures.extend(scores.iter().filter_map(|name| measure(name, &|record| record.score(name))));
        }
    }
    if variant != against {
        let theirs: std::collections::HashMap<&str, f64> =
            of_variant(against).filter_map(|record| Some((record.id.as_str(), record.main_score()?))).collect();
        let difference = |record: &Record| Some(record.main_score()? - theirs.get(record.id.as_str())?);
        measures.extend(measure(DIFFERENCE, &difference));
    }
    measures.extend(measure(RECALL, &|record| record.answered()?.evidence_recall));
    measures.extend(measure(SOURCE, &|record| Some(record.answered()?.document_tokens as f64)));
    measures.extend(measure(TOKENS, &|record| Some(record.answered()?.retained_tokens as f64)));
    measures.extend(measure(SECONDS, &|record| Some(record.answered()?.timing_ms.total / 1e3)));
    let bad = of_variant(variant).filter(|record| tasks.contains(&record.task.as_str()));
    Row {
        task: name.into(),
        variant: variant.clone(),
        label: variant.label(&results.variants),
        bad: bad.filter(|record| matches!(record.outcome, Outcome::Bad { .. })).count(),
        measures,
    }
}

fn shown(name: &str, Interval { mean, low, high }: &Interval) -> String {
    match name {
        SOURCE | TOKENS => format!("{mean:.0}"),
        SECONDS => format!("{mean:.2}"),
        DIFFERENCE => format!("{mean:+.3} [{low:+.3}, {high:+.3}]"),
        _ => format!("{mean:.3} [{low:.3}, {high:.3}]"),
    }
}

/// A field of a CSV line.
fn quoted(text: &str) -> String {
    match text.contains([',', '"', '\n']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.into(),
    }
}
