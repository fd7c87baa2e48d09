//! The table of `gleaner ask --timings`.

use std::fmt::{self, Display, Formatter};

use gleaner::timings::{Operation, Stage, StageTime, Timings};

/// Stages, and below them the operations of each, the longest first.
pub struct Table<'a>(pub &'a Timings);

/// A rate with three digits or so, or a dash.
fn rate(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(value @ 100.0..) => format!("{value:.0}"),
        Some(value @ 1.0..) => format!("{value:.1}"),
        Some(value) => format!("{value:.3}"),
    }
}

fn percent(part: f64, whole: f64) -> String {
    if whole > 0.0 { format!("{:.1}%", 100.0 * part / whole) } else { "-".into() }
}

impl Display for Table<'_> {
    fn fmt(&self, out: &mut Formatter) -> fmt::Result {
        let Timings { stages, operations, ceilings, empty_launch_us } = self.0;
        let total: f64 = stages.iter().map(|stage| stage.ms).sum();
        writeln!(out, "\n{:<32} {:>8} {:>11} {:>7}", "stage", "", "ms", "share")?;
        for StageTime { stage, ms } in stages {
            writeln!(out, "{:<32} {:>8} {ms:>11.3} {:>7}", stage.name(), "", percent(*ms, total))?;
        }
        writeln!(out, "{:<32} {:>8} {total:>11.3}", "together", "")?;
        for StageTime { stage, ms } in stages {
            let of_stage = operations.iter().filter(|operation| operation.stage == *stage);
            let mut of_stage: Vec<&Operation> = of_stage.collect();
            if !of_stage.is_empty() {
                of_stage.sort_by(|a, b| b.ms.total_cmp(&a.ms));
                write_stage(out, *stage, *ms, &of_stage)?;
            }
        }
        if let Some(us) = empty_launch_us {
            writeln!(out, "\nA launch of nothing measures {us:.1} us, which is part of every call.")?;
        }
        if ceilings.gemm_tflops.or(ceilings.copy_gb_per_s).is_some() {
            let (tflops, gb_per_s) = (rate(ceilings.gemm_tflops), rate(ceilings.copy_gb_per_s));
            writeln!(out, "At best: {tflops} TFLOP/s (cuBLASLt, 8192 x 8192), {gb_per_s} GB/s (a copy).")?;
        }
        Ok(())
    }
}

fn write_stage(out: &mut Formatter, stage: Stage, wall: f64, operations: &[&Operation]) -> fmt::Result {
    let sum: f64 = operations.iter().map(|operation| operation.ms).sum();
    // A CPU's rates are in thousands of a GPU's.
    let (unit, scale) = match operations.iter().any(|operation| operation.tflops > Some(1.0)) {
        true => ("TFLOP/s", 1.0),
        false => ("GFLOP/s", 1e3),
    };
    writeln!(
        out,
        "\n{:<32} {:>8} {:>11} {:>7} {:>9} {:>9} {:>8} {:>8}",
        format!("in {}", stage.name()),
        "calls",
        "ms",
        "share",
        "us a call",
        unit,
        "GB/s",
        "of best"
    )?;
    for operation in operations {
        writeln!(
            out,
            "  {:<30} {:>8} {:>11.3} {:>7} {:>9.1} {:>9} {:>8} {:>8}",
            operation.name,
            operation.calls,
            operation.ms,
            percent(operation.ms, sum),
            operation.ms * 1e3 / operation.calls as f64,
            rate(operation.tflops.map(|tflops| tflops * scale)),
            rate(operation.gb_per_s),
            operation.share_of_best.map_or("-".into(), |share| percent(share, 1.0))
        )?;
    }
    writeln!(out, "  {:<30} {:>8} {sum:>11.3} {:>7} of the stage", "together", "", percent(sum, wall))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gleaner::timings::{Ceilings, Profile};

    fn operation(stage: Stage, name: &str, calls: u64, ms: f64, bytes: u64, flops: u64) -> Operation {
        let name = name.into();
        Operation { stage, name, calls, ms, bytes, flops, tflops: None, gb_per_s: None, share_of_best: None }
    }

    fn words(line: &str) -> Vec<&str> {
        line.split_whitespace().collect()
    }

    #[test]
    fn lines_hold_what_the_numbers_say() {
        let stages = [(Stage::Plan, 2.0), (Stage::Read, 8.0)].map(|(stage, ms)| StageTime { stage, ms });
        let operations = vec![
            operation(Stage::Read, "rms_norm", 4, 1.0, 2_000_000_000, 0),
            operation(Stage::Read, "gemm_residual o", 2, 3.0, 0, 1_500_000_000_000),
        ];
        let ceilings = Ceilings { gemm_tflops: Some(1000.0), copy_gb_per_s: Some(4000.0) };
        let profile = Profile { operations, empty_launch_us: Some(1.5) };
        let text = Table(&Timings::new(stages.to_vec(), profile, ceilings)).to_string();
        let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
        assert_eq!(words(lines[1]), ["plan", "2.000", "20.0%"]);
        assert_eq!(words(lines[2]), ["read", "8.000", "80.0%"]);
        assert_eq!(words(lines[3]), ["together", "10.000"]);
        assert!(lines[4].starts_with("in read"));
        // The longest first.
        assert_eq!(words(lines[5]), ["gemm_residual", "o", "2", "3.000", "75.0%", "1500.0", "500", "-", "50.0%"]);
        assert_eq!(words(lines[6]), ["rms_norm", "4", "1.000", "25.0%", "250.0", "-", "2000", "50.0%"]);
        assert_eq!(words(lines[7]), ["together", "4.000", "50.0%", "of", "the", "stage"]);
        assert!(lines[8].contains("1.5 us"), "{}", lines[8]);
        assert!(lines[9].contains("1000 TFLOP/s") && lines[9].contains("4000 GB/s"), "{}", lines[9]);
        assert_eq!(lines.len(), 10);
    }
}
