//! Asks a document a question: `cargo run --release --example ask -- examples/almanac.txt "What is the name of the mayor of Pellinbridge?"`

use gleaner::{AskParams, Device, Document, Engine, Progress};
use std::ops::ControlFlow;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(question)) = (args.next(), args.next()) else {
        return Err("usage: ask DOCUMENT QUESTION".into());
    };
    let engine = Engine::open("models/gleaner-demo-16m", Device::Auto)?;
    let document = Document::open(path)?;
    let answer = engine.ask_with(&document, &question, &AskParams::default(), &mut |progress| {
        if let Progress::Step(step) = progress {
            eprintln!("chunk {} of {}", step.step + 1, step.steps);
        }
        ControlFlow::Continue(())
    })?;
    println!("{}", answer.answer);
    if let Some(best) = answer.evidence.first() {
        println!("line {}: {}", best.line, best.text);
    }
    Ok(())
}
