//! What `gleaner bench` found, for people and for programs.

use std::io::{self, Write};

use gleaner::timings::Ceilings;
use serde::Serialize;

/// Everything that was measured. Units stand in the names; `null` is what could not be measured.
#[derive(Serialize)]
pub struct Report {
    pub model: String,
    pub parameters: usize,
    pub weight_bytes: u64,
    pub device: String,
    /// From the files, or from random weights in memory, to a reader.
    pub load_ms: f64,
    pub retained: usize,
    /// Before each timed reading.
    pub pause_ms: u64,
    pub frame_tokens: usize,
    pub question_rows: usize,
    pub ceilings: Ceilings,
    pub steps: Vec<Step>,
    pub document: DocumentReading,
    pub answer: Answer,
    /// Of the document and the answer, beside the weights.
    pub workspace_bytes: u64,
    pub tokenizer: Option<TokenizerRate>,
    pub notes: Vec<String>,
}

#[derive(Serialize)]
pub struct Step {
    /// As asked for.
    pub tokens: usize,
    /// As it was.
    pub mean_tokens: f64,
    pub chunk_tokens: usize,
    /// Median of the runs.
    pub ms: f64,
    pub ms_min: f64,
    pub ms_max: f64,
    pub runs: usize,
    pub steps_per_run: usize,
    /// 10^12 operations of a step.
    pub tflop: f64,
    /// 10^12 operations a second.
    pub tflops: f64,
    pub share_of_gemm: Option<f64>,
}

#[derive(Serialize)]
pub struct DocumentReading {
    pub tokens: usize,
    pub window: usize,
    pub steps: usize,
    /// Behind the steps that fill what is retained.
    pub mean_step_tokens: f64,
    /// Of them, those whose keys and values the step before had not left.
    pub mean_computed_tokens: f64,
    pub seconds: f64,
    /// The same document with all tokens of all steps computed; `null` where they are anyway.
    pub seconds_without_reuse: Option<f64>,
    pub tokens_per_second: f64,
}

#[derive(Serialize)]
pub struct Answer {
    pub prompt_tokens: usize,
    /// To the first token of the answer.
    pub prefill_ms: f64,
    pub new_tokens: usize,
    pub decode_ms_per_token: f64,
}

#[derive(Serialize)]
pub struct TokenizerRate {
    pub bytes: usize,
    pub tokens: usize,
    pub seconds: f64,
    pub tokens_per_second: f64,
}

/// A rate with three digits or so: TFLOP/s of a GPU and of a CPU are three orders of magnitude apart.
fn rate(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        1.0.. => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 20) as f64
}

impl Report {
    pub fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let parameters = self.parameters as f64 / 1e6;
        writeln!(out, "model      {} ({parameters:.1}M parameters, {:.0} MiB)", self.model, mib(self.weight_bytes))?;
        writeln!(out, "device     {}", self.device)?;
        writeln!(out, "load       {:.1} ms", self.load_ms)?;
        writeln!(out, "workspace  {:.0} MiB for the document and its answer", mib(self.workspace_bytes))?;
        if let Some(tflops) = self.ceilings.gemm_tflops {
            writeln!(out, "products   {tflops:.0} TFLOP/s at best (cuBLASLt, 8192 x 8192)")?;
        }
        if let Some(gb_per_s) = self.ceilings.copy_gb_per_s {
            writeln!(out, "copies     {gb_per_s:.0} GB/s at best, read and written")?;
        }
        if self.pause_ms > 0 {
            writeln!(out, "pause      {} ms before each reading of steps or of the document", self.pause_ms)?;
        }
        writeln!(out, "\nstep tokens    chunk    ms a step    least-most ms    TFLOP/s    of the best product")?;
        for step in &self.steps {
            let share = step.share_of_gemm.map_or_else(|| "-".into(), |share| format!("{:.0}%", share * 100.0));
            let range = format!("{:.2}-{:.2}", step.ms_min, step.ms_max);
            writeln!(
                out,
                "{:>11.0} {:>8} {:>12.3} {range:>16} {:>10} {share:>22}",
                step.mean_tokens,
                step.chunk_tokens,
                step.ms,
                rate(step.tflops)
            )?;
        }
        let document = &self.document;
        writeln!(
            out,
            "\ndocument   {} tokens in {:.2} s: {:.0} tokens/s ({} steps of {:.0} tokens, window {})",
            document.tokens,
            document.seconds,
            document.tokens_per_second,
            document.steps,
            document.mean_step_tokens,
            document.window
        )?;
        if let Some(seconds) = document.seconds_without_reuse {
            writeln!(
                out,
                "           {:.0} tokens of a step computed, the others as the step before left them; {seconds:.2} s with all \
                 computed",
                document.mean_computed_tokens
            )?;
        }
        let answer = &self.answer;
        writeln!(out, "prefill    {:.2} ms for {} tokens", answer.prefill_ms, answer.prompt_tokens)?;
        writeln!(
            out,
            "decode     {:.3} ms a token: {:.0} tokens/s",
            answer.decode_ms_per_token,
            1e3 / answer.decode_ms_per_token
        )?;
        if let Some(tokenizer) = &self.tokenizer {
            let (rate, tokens, seconds) = (tokenizer.tokens_per_second, tokenizer.tokens, tokenizer.seconds);
            writeln!(out, "tokenizer  {rate:.0} tokens/s ({tokens} tokens in {seconds:.3} s)")?;
        }
        Ok(())
    }
}
