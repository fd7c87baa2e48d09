//! Where the time of an answer went: by stage, and by kind of operation.

mod work;

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::range::{Range, range};
pub use work::Work;

/// A stage of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The model's files and tokenizer are opened.
    Open,
    /// The weights go to the GPU. On a CPU they stay in their files.
    Upload,
    /// The document is cut and tokenised.
    Plan,
    /// All reading steps.
    Read,
    /// The final prompt, up to the first token of the answer.
    Prefill,
    /// The tokens behind the first.
    Decode,
}

impl Stage {
    /// Its name in tables and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Open => "open",
            Stage::Upload => "upload",
            Stage::Plan => "plan",
            Stage::Read => "read",
            Stage::Prefill => "prefill",
            Stage::Decode => "decode",
        }
    }
}

/// Where the time went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// Each stage once, in order, as it was without any measurement inside it. Opening and upload are those of the engine.
    pub stages: Vec<StageTime>,
    /// Of a second run, in the order of their first calls.
    pub operations: Vec<Operation>,
    /// What the device does at best.
    pub ceilings: Ceilings,
    /// Microseconds that a launch of nothing measures: what is part of each call. GPU only.
    pub empty_launch_us: Option<f64>,
}

/// Wall time of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StageTime {
    /// Which.
    pub stage: Stage,
    /// Milliseconds.
    pub ms: f64,
}

/// One kind of operation within a stage: a kernel on a GPU, a part of the pass on a CPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Operation {
    /// The stage that it belongs to.
    pub stage: Stage,
    /// The operation and, of a product, the matrix.
    pub name: String,
    /// How often.
    pub calls: u64,
    /// Milliseconds of all calls: of the device on a GPU, of the wall on a CPU.
    pub ms: f64,
    /// Bytes of all operands, each once a call; 0 where they are not counted.
    pub bytes: u64,
    /// FLOPs of products and attention.
    pub flops: u64,
    /// 10^12 FLOPs a second.
    pub tflops: Option<f64>,
    /// 10^9 bytes a second.
    pub gb_per_s: Option<f64>,
    /// The time that its work takes at the device's ceilings, by the time that it took.
    pub share_of_best: Option<f64>,
}

/// Rates that a device reaches at best, where they could be measured.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Ceilings {
    /// 10^12 FLOPs a second of bf16 matrix products.
    pub gemm_tflops: Option<f64>,
    /// 10^9 bytes a second, read and written.
    pub copy_gb_per_s: Option<f64>,
}

impl Ceilings {
    /// The time that `flops` take at the rate of the best product, or `bytes` at that of a copy, whichever is longer, by
    /// `seconds`. `None` where nothing is counted or a ceiling is missing.
    pub fn share(&self, bytes: u64, flops: u64, seconds: f64) -> Option<f64> {
        let floor = |work: u64, rate: f64| work as f64 / rate / seconds;
        match (flops, bytes) {
            (0, 0) => None,
            (0, _) => Some(floor(bytes, self.copy_gb_per_s? * 1e9)),
            _ => Some(floor(flops, self.gemm_tflops? * 1e12).max(floor(bytes, self.copy_gb_per_s? * 1e9))),
        }
    }
}

/// What [`crate::reader::Reader::profile`] measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// In the order of their first calls, without rates.
    pub operations: Vec<Operation>,
    /// As [`Timings::empty_launch_us`].
    pub empty_launch_us: Option<f64>,
}

impl Timings {
    /// The stages beside what happened in them, with rates filled in.
    pub fn new(stages: Vec<StageTime>, profile: Profile, ceilings: Ceilings) -> Timings {
        let Profile { mut operations, empty_launch_us } = profile;
        for operation in &mut operations {
            let seconds = operation.ms / 1e3;
            let rate = |work: u64, unit: f64| (work > 0 && seconds > 0.0).then(|| work as f64 / seconds / unit);
            operation.tflops = rate(operation.flops, 1e12);
            operation.gb_per_s = rate(operation.bytes, 1e9);
            operation.share_of_best = match seconds > 0.0 {
                true => ceilings.share(operation.bytes, operation.flops, seconds),
                false => None,
            };
        }
        Timings { stages, operations, ceilings, empty_launch_us }
    }
}

/// Adds up calls by stage and name.
#[derive(Default)]
pub(crate) struct Totals(Vec<Operation>);

impl Totals {
    pub(crate) fn add(&mut self, stage: Stage, name: &str, ms: f64, bytes: u64, flops: u64) {
        let known = self.0.iter().position(|operation| operation.stage == stage && operation.name == name);
        let at = known.unwrap_or_else(|| {
            self.0.push(Operation {
                stage,
                name: name.into(),
                calls: 0,
                ms: 0.0,
                bytes: 0,
                flops: 0,
                tflops: None,
                gb_per_s: None,
                share_of_best: None,
            });
            self.0.len() - 1
        });
        let operation = &mut self.0[at];
        operation.calls += 1;
        operation.ms += ms;
        operation.bytes += bytes;
        operation.flops += flops;
    }

    pub(crate) fn into_operations(self) -> Vec<Operation> {
        self.0
    }
}

/// A clock for operations that end when their call returns. One that is off costs a branch.
#[derive(Default)]
pub(crate) struct Clock {
    totals: Option<Mutex<Totals>>,
}

impl Clock {
    /// One that is on.
    pub(crate) fn started() -> Clock {
        Clock { totals: Some(Mutex::default()) }
    }

    /// Runs `operation`, of so many FLOPs, in a range of its name. Bytes are not counted: they are of caches here.
    pub(crate) fn time<T>(&self, stage: Stage, name: &str, flops: u64, operation: impl FnOnce() -> T) -> T {
        let _range: Range = range!("{name}");
        let Some(totals) = &self.totals else { return operation() };
        let begun = Instant::now();
        let result = operation();
        let ms = begun.elapsed().as_secs_f64() * 1e3;
        totals.lock().unwrap_or_else(PoisonError::into_inner).add(stage, name, ms, 0, flops);
        result
    }

    pub(crate) fn into_operations(self) -> Vec<Operation> {
        let totals = self.totals.map(|totals| totals.into_inner().unwrap_or_else(PoisonError::into_inner));
        totals.unwrap_or_default().into_operations()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CEILINGS: Ceilings = Ceilings { gemm_tflops: Some(500.0), copy_gb_per_s: Some(4000.0) };

    #[test]
    fn the_longer_floor_counts() {
        // 1 TFLOP takes 2 ms at best, 4 GB take 1 ms.
        assert_eq!(CEILINGS.share(4_000_000_000, 1_000_000_000_000, 4e-3), Some(0.5));
        assert_eq!(CEILINGS.share(16_000_000_000, 1_000_000_000_000, 4e-3), Some(1.0));
        assert_eq!(CEILINGS.share(4_000_000_000, 0, 4e-3), Some(0.25));
        assert_eq!(CEILINGS.share(0, 0, 1.0), None);
        let without = |gemm_tflops, copy_gb_per_s| Ceilings { gemm_tflops, copy_gb_per_s };
        assert_eq!(without(None, Some(1.0)).share(1, 1, 1.0), None);
        assert_eq!(without(Some(1.0), None).share(1, 1, 1.0), None);
        assert_eq!(without(None, Some(4000.0)).share(4_000_000_000, 0, 1e-3), Some(1.0));
    }

    #[test]
    fn calls_add_up_by_stage_and_name() {
        let mut totals = Totals::default();
        for (stage, name) in [(Stage::Read, "a"), (Stage::Read, "b"), (Stage::Decode, "a"), (Stage::Read, "a")] {
            totals.add(stage, name, 2.0, 8_000_000_000, 3_000_000_000_000);
        }
        let profile = Profile { operations: totals.into_operations(), empty_launch_us: None };
        let timings = Timings::new(Vec::new(), profile, CEILINGS);
        let found: Vec<_> = timings.operations.iter().map(|op| (op.stage, op.name.as_str(), op.calls, op.ms)).collect();
        assert_eq!(found, [(Stage::Read, "a", 2, 4.0), (Stage::Read, "b", 1, 2.0), (Stage::Decode, "a", 1, 2.0)]);
        for operation in &timings.operations {
            assert_eq!((operation.tflops, operation.gb_per_s), (Some(1500.0), Some(4000.0)));
            assert_eq!(operation.share_of_best, Some(3.0));
        }
    }

    #[test]
    fn a_clock_that_is_off_times_nothing() {
        let clock = Clock::default();
        assert_eq!(clock.time(Stage::Read, "a", 0, || 7), 7);
        assert!(clock.into_operations().is_empty());
        let clock = Clock::started();
        clock.time(Stage::Read, "a", 60, || ());
        let operations = clock.into_operations();
        assert_eq!((operations[0].calls, operations[0].flops, operations[0].bytes), (1, 60, 0));
    }
}
