//! How RULER judges an answer: by the references that it contains, whatever their case.

use super::super::case::Case;

fn contained<'a>(case: &'a Case, answer: &str) -> impl Iterator<Item = bool> + 'a {
    let answer = answer.to_lowercase();
    case.answers.iter().map(move |reference| answer.contains(&reference.to_lowercase()))
}

/// Share of the references.
pub fn mean(case: &Case, answer: &str) -> f64 {
    contained(case, answer).filter(|found| *found).count() as f64 / case.answers.len().max(1) as f64
}

/// Whether there is any reference.
pub fn any(case: &Case, answer: &str) -> f64 {
    f64::from(u8::from(contained(case, answer).any(|found| found)))
}
