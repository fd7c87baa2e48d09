//! Each kernel alone, at the shapes of a reading step and of a token of an answer, beside NVIDIA's product of the same
//! shape: `cargo bench --bench gpu_kernels -- [SHAPE] [--json] [--sustained]`, SHAPE as in `gleaner bench`, qwen2.5-0.5b if not
//! given.
//!
//! A kernel is recorded many times over operands that take turns and together exceed the L2 cache, and the record is
//! timed. Bytes and FLOPs are those of `gleaner::timings::Work`, as in `gleaner ask --timings`. The share is that of the time
//! which the FLOPs take at the rate of the best product, or the bytes at that of a copy, whichever is longer.
#![allow(missing_docs)]

#[cfg(not(gleaner_cuda))]
fn main() {
    eprintln!("built without CUDA: there is no kernel to measure");
}

#[cfg(gleaner_cuda)]
fn main() -> std::process::ExitCode {
    gpu::main()
}

#[cfg(gleaner_cuda)]
mod gpu {
    use std::cell::RefCell;
    use std::process::ExitCode;
    use std::time::{Duration, Instant};

    use cudarc::driver::{CudaSlice, DeviceRepr, DriverError};
    use gleaner::cuda::ops::{
        AttentionParts, DeviceLinear, DevicePlan, FixedRow, Heads, Norm, Normed, Residual, Rotation, Rows, Scaling,
        Shift, Starts, StepBuffers,
    };
    use gleaner::cuda::{self, CublasLt, CudaDevice};
    use gleaner::model::{Config, RopeTable, SHAPES};
    use gleaner::plan::Plan;
    use gleaner::timings::{Ceilings, Work};
    use gleaner::{Error, Result};
    use half::bf16;
    use serde_json::json;

    /// Rows of a step with 800 tokens retained and 70 of prompt, at windows of 1024, 2048 and 4096.
    const ROWS: [usize; 3] = [1894, 2918, 4966];
    const RETAINED: usize = 800;
    const PREFIX: usize = 22;
    const QUESTION_ROWS: usize = 48;
    const SENTENCE: usize = 16;

    /// Where a token of an answer stands.
    const POSITION: usize = 2000;

    /// Operands take turns over so much memory: several times the L2 cache.
    const TURN_BYTES: u64 = 256 << 20;
    /// Time of a recorded run, and most launches in it.
    const RUN_MS: f64 = 5.0;
    const MAX_LAUNCHES: usize = 256;
    /// The median of so many runs counts.
    const RUNS: usize = 7;
    /// With `--sustained`, the GPU is busy with the same for so long before: about as long as it takes for its clock to come down
    /// to what power allows.
    const SUSTAINED: Duration = Duration::from_millis(700);

    type Launch<'a> = Box<dyn FnMut() -> Result<()> + 'a>;

    fn driver(error: DriverError) -> Error {
        Error::Cuda { op: "the benchmark".into(), message: error.to_string() }
    }

    /// Repeatable noise in -0.25..0.25, so that sums of products over a row stay of order one.
    fn noise(len: usize) -> Vec<bf16> {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bf16::from_f32((state >> 40) as f32 / (1u64 << 25) as f32 - 0.25)
        };
        (0..len).map(|_| next()).collect()
    }

    /// What was measured beside its size.
    struct Kernel<'a> {
        name: &'a str,
        /// Rows, outputs and inputs of a product; what a launch works on otherwise, with 1 where there is nothing to say.
        dims: [usize; 3],
        work: Work,
        /// Whether cuBLASLt's product of these dimensions stands beside it.
        product: bool,
    }

    struct Bench<'a> {
        device: &'a CudaDevice,
        library: Option<CublasLt<'a>>,
        ceilings: Ceilings,
        config: Config,
        shape: &'a str,
        json: bool,
        sustained: bool,
        noise: Vec<bf16>,
        table: CudaSlice<f32>,
    }

    impl<'a> Bench<'a> {
        fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<CudaSlice<T>> {
            self.device.stream().clone_htod(values).map_err(driver)
        }

        fn random(&self, len: usize) -> Result<CudaSlice<bf16>> {
            self.upload(&self.noise[..len])
        }

        fn linear(&self, n: usize, k: usize, bias: bool) -> Result<DeviceLinear> {
            let bias = bias.then(|| self.random(n)).transpose()?;
            Ok(DeviceLinear::new(self.random(n * k)?, bias, n, k))
        }

        /// A residual stream whose rows have a mean square of 1.
        fn stream(&self, rows: usize) -> Result<Residual> {
            let hidden = self.config.hidden_size;
            let mut stream = Residual::new(self.device, rows, hidden)?;
            stream.scaled = self.random(rows * hidden)?;
            stream.rest = self.upload(&self.noise[..rows * hidden].iter().map(|x| x.to_bits()).collect::<Vec<_>>())?;
            let slots = stream.squares.len() / rows;
            stream.squares = self.upload(&vec![(hidden / slots) as f32; rows * slots])?;
            Ok(stream)
        }

        /// A row of it.
        fn row(&self, width: usize) -> Result<CudaSlice<f32>> {
            self.upload(&self.noise[..width].iter().map(|x| x.to_f32()).collect::<Vec<_>>())
        }

        fn heads(&self) -> Heads {
            let config = &self.config;
            Heads { q: config.num_attention_heads, kv: config.num_key_value_heads, dim: config.head_dim, window: 0 }
        }

        fn rotation(&self) -> Rotation<'_> {
            let Heads { q, kv, dim, .. } = self.heads();
            Rotation { table: &self.table, head_dim: dim, columns: (q + kv) * dim }
        }

        /// As many launches with operands of their own as exceed the L2 cache, where one touches `bytes`.
        fn turns<'b>(&self, bytes: u64, make: impl Fn() -> Result<Launch<'b>>) -> Result<Vec<Launch<'b>>> {
            (0..TURN_BYTES.div_ceil(bytes).clamp(2, 64)).map(|_| make()).collect()
        }

        /// Microseconds a launch.
        fn time(&self, mut launches: Vec<Launch>) -> Result<f64> {
            let mut round = || launches.iter_mut().try_for_each(|launch| launch());
            // The first round loads the kernels, which must not happen while a graph is recorded.
            round()?;
            let ms = self.device.time(&mut round)?;
            let rounds = (RUN_MS / ms).ceil() as usize;
            let count = launches.len();
            let rounds = rounds.clamp(1, (MAX_LAUNCHES / count).max(1));
            let mut round = || launches.iter_mut().try_for_each(|launch| launch());
            let graph = self.device.record(|| (0..rounds).try_for_each(|_| round()))?;
            let run = || self.device.time(|| self.device.launch("the benchmark", &graph));
            run()?;
            let start = Instant::now();
            while self.sustained && start.elapsed() < SUSTAINED {
                run()?;
            }
            let mut runs = (0..RUNS).map(|_| run()).collect::<Result<Vec<f64>>>()?;
            runs.sort_by(f64::total_cmp);
            Ok(runs[RUNS / 2] * 1e3 / (rounds * count) as f64)
        }

        fn measure<'b>(&self, kernel: Kernel, make: impl Fn() -> Result<Launch<'b>>) -> Result<()> {
            let Kernel { name, dims, work, product } = kernel;
            let (bytes, flops) = (work.bytes(dims[0], 0), work.flops(dims[0], 0));
            let us = self.time(self.turns(bytes, make)?)?;
            let library_us = match &self.library {
                Some(library) if product => Some(self.time(self.turns(bytes, || {
                    let [rows, n, k] = dims;
                    let (mut out, a) = (self.device.zeros(rows * n)?, self.random(rows * k)?);
                    let weight = self.random(n * k)?;
                    Ok(Box::new(move || library.product(&mut out, &a, &weight, dims)))
                })?)?),
                _ => None,
            };
            let (gb_per_s, tflops) = (bytes as f64 / us / 1e3, flops as f64 / us / 1e6);
            let share = self.ceilings.share(bytes, flops, us / 1e6);
            if self.json {
                let line = json!({
                    "shape": self.shape, "kernel": name, "dims": dims, "us": us, "bytes": bytes, "flops": flops,
                    "gb_per_s": gb_per_s, "tflops": tflops, "share": share, "cublaslt_us": library_us,
                });
                println!("{line}");
                return Ok(());
            }
            let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
            let dims = dims.map(|dim| dim.to_string()).join(" x ");
            println!(
                "{name:<20} {dims:<21} {us:>8.1} {:>8.1} {:>8.2} {gb_per_s:>7.0} {tflops:>8.1} {:>6} {:>9}",
                bytes as f64 / 1e6,
                flops as f64 / 1e9,
                or_dash(share.map(|share| format!("{:.0}%", share * 100.0))),
                or_dash(library_us.map(|us| format!("{us:.1}"))),
            );
            Ok(())
        }

        /// The kernels of a reading step of `rows` tokens, in their order.
        fn step(&self, rows: usize) -> Result<()> {
            let (device, config) = (self.device, &self.config);
            let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
            let (heads, eps) = (self.heads(), config.rms_norm_eps);
            let (q_dim, qkv) = (config.q_dim(), heads.qkv_columns());
            let ints = self.upload(&[rows as i32])?;
            let count = Rows { ints: &ints, index: 0, max: rows };
            let by_row = Work::Elementwise { width: hidden / 2 * 3 };
            let kernel = Kernel { name: "embed", dims: [rows, hidden, 1], work: by_row, product: false };
            let product = |name, n, k, work: fn(usize, usize) -> Work| Kernel {
                name,
                dims: [rows, n, k],
                work: work(n, k),
                product: true,
            };

            let embedding = self.random(config.vocab_size * hidden)?;
            let prompts = random_tokens(rows, config.vocab_size);
            let norm = self.random(hidden)?;
            self.measure(kernel, || {
                let (mut stream, prompt) = (Residual::new(device, rows, hidden)?, self.upload(&prompts)?);
                let (embedding, norm) = (&embedding, &norm);
                Ok(Box::new(move || device.embed(&mut stream, &prompt, embedding, norm, count, None, hidden)))
            })?;
            self.measure(product("gemm_rope qkv", qkv, hidden, Work::product), || {
                let (mut out, stream) = (device.zeros(rows * qkv)?, self.stream(rows)?);
                let (linear, rotation) = (self.linear(qkv, hidden, config.qkv_bias)?, self.rotation());
                Ok(Box::new(move || {
                    device.gemm_rope(
                        &mut out,
                        Normed { residual: &stream, eps },
                        &linear,
                        rotation,
                        count,
                        Starts::default(),
                    )
                }))
            })?;
            let attention = Kernel {
                name: "attention",
                dims: [rows, heads.q, heads.dim],
                work: Work::Attention { q_dim, kv_dim: config.kv_dim(), window: 0 },
                product: false,
            };
            self.measure(attention, || {
                let (mut out, qkv) = (device.zeros(rows * q_dim)?, self.random(rows * qkv)?);
                Ok(Box::new(move || device.attention(&mut out, &qkv, heads, count, None)))
            })?;
            for (name, k) in [("gemm_residual o", q_dim), ("gemm_residual down", intermediate)] {
                self.measure(product(name, hidden, k, Work::residual), || {
                    let (mut stream, a) = (self.stream(rows)?, self.random(rows * k)?);
                    let (linear, norms) = (self.linear(hidden, k, false)?, Scaling { from: &norm, to: &norm });
                    Ok(Box::new(move || device.gemm_residual(&mut stream, &a, &linear, norms, count)))
                })?;
            }
            self.measure(product("gemm_swiglu gate_up", 2 * intermediate, hidden, Work::swiglu), || {
                let (mut out, stream) = (device.zeros(rows * intermediate)?, self.stream(rows)?);
                let linear = self.linear(2 * intermediate, hidden, false)?;
                Ok(Box::new(move || device.gemm_swiglu(&mut out, Normed { residual: &stream, eps }, &linear, count)))
            })?;
            self.score_and_select(rows)
        }

        /// From the last layer's keys and queries to the next prompt. Each launch is a step of a document long enough for
        /// all of them.
        fn score_and_select(&self, rows: usize) -> Result<()> {
            let (device, config, heads) = (self.device, &self.config, self.heads());
            let chunk = rows - PREFIX - QUESTION_ROWS - RETAINED;
            // The warm-up and the run that sets the graph's length, at most 64 launches each, then the graph's.
            let chunks = 2 * 64 + (1 + RUNS) * MAX_LAUNCHES;
            let sentences = chunks * chunk / SENTENCE;
            let plan = Plan {
                prefix: random_tokens(PREFIX, config.vocab_size),
                tail: random_tokens(QUESTION_ROWS, config.vocab_size),
                question_start: 0,
                tokens: random_tokens(sentences * SENTENCE, config.vocab_size),
                sentence_offsets: (0..=sentences).map(|s| (s * SENTENCE) as u32).collect(),
                chunk_offsets: (0..=chunks).map(|c| (c * chunk / SENTENCE) as u32).collect(),
                topk: 300,
                // No filter: it would gather the best tokens in few sentences, and steps would be shorter.
                phrase_width: 1,
                max_retained: RETAINED as u32,
            };
            let tables = DevicePlan::new(device, &plan)?;
            let steps = RefCell::new(StepBuffers::new(device, &plan, heads, false)?);
            device.start(&mut steps.borrow_mut(), &tables)?;
            let (q_len, k_len) = (QUESTION_ROWS * config.q_dim(), rows * config.kv_dim());
            let kernel = Kernel {
                name: "score_and_select",
                dims: [rows, QUESTION_ROWS, heads.q],
                work: Work::QuestionLogits {
                    question_rows: QUESTION_ROWS,
                    q_dim: config.q_dim(),
                    kv_dim: config.kv_dim(),
                },
                product: false,
            };
            self.measure(kernel, || {
                let (q, k) = (self.random(q_len)?, self.random(k_len)?);
                let (steps, tables) = (&steps, &tables);
                Ok(Box::new(move || {
                    device.question_scores(&mut steps.borrow_mut(), &q, &k, heads)?;
                    device.select(&mut steps.borrow_mut(), tables)
                }))
            })?;
            let log = steps.borrow().read_back(device)?;
            let lengths = log.steps.iter().map(|step| step.tokens).filter(|&tokens| tokens > 0).skip(2);
            let (sum, count) = lengths.fold((0, 0), |(sum, count), tokens| (sum + tokens, count + 1));
            if sum != count * rows {
                eprintln!("note: score_and_select saw {} rows on average, not {rows}", sum as f64 / count as f64);
            }
            Ok(())
        }

        /// The kernels of one token of an answer at [`POSITION`].
        fn token(&self) -> Result<()> {
            let (device, config) = (self.device, &self.config);
            let (hidden, intermediate, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
            let (heads, q_dim) = (self.heads(), config.q_dim());
            let qkv = heads.qkv_columns();
            let ints = self.upload(&[POSITION as i32])?;
            let position = Shift { ints: &ints, index: 0 };
            let norm_weight = self.random(hidden)?;
            let norm = Norm { weight: &norm_weight, eps: config.rms_norm_eps };
            let kernel = |name, n, k, work: fn(usize, usize) -> Work| Kernel {
                name,
                dims: [1, n, k],
                work: work(n, k),
                product: false,
            };
            let cache = (POSITION + 1) * qkv;
            self.measure(kernel("gemv_rope qkv", qkv, hidden, Work::product), || {
                let (mut out, a) = (device.zeros(cache)?, self.row(hidden)?);
                let (linear, rotation) = (self.linear(qkv, hidden, config.qkv_bias)?, self.rotation());
                Ok(Box::new(move || device.gemv_rope(&mut out, &a, norm, &linear, rotation, position)))
            })?;
            let attention = Kernel {
                name: "decode_attention",
                dims: [POSITION + 1, heads.q, heads.dim],
                work: Work::DecodeAttention { q_dim, kv_dim: config.kv_dim(), window: 0, out: 0 },
                product: false,
            };
            self.measure(attention, || {
                let (mut out, qkv) = (device.zeros(q_dim)?, self.random(cache)?);
                let mut parts = AttentionParts::new(device, heads)?;
                Ok(Box::new(move || device.decode_attention(&mut out, &mut parts, &qkv, heads, position)))
            })?;
            for (name, k) in [("gemv_residual o", q_dim), ("gemv_residual down", intermediate)] {
                self.measure(kernel(name, hidden, k, Work::residual), || {
                    let (mut x, a, linear) = (self.row(hidden)?, self.random(k)?, self.linear(hidden, k, false)?);
                    Ok(Box::new(move || device.gemv_residual(&mut x, &a, &linear)))
                })?;
            }
            self.measure(kernel("gemv_swiglu gate_up", 2 * intermediate, hidden, Work::swiglu), || {
                let (mut out, a) = (device.zeros(intermediate)?, self.row(hidden)?);
                let linear = self.linear(2 * intermediate, hidden, false)?;
                Ok(Box::new(move || device.gemv_swiglu(&mut out, &a, norm, &linear)))
            })?;
            if device.has_row_kernels(hidden, intermediate, heads.dim) {
                self.measure(kernel("row_qkv qkv", qkv, hidden, Work::product), || {
                    let (mut out, row) = (device.zeros(cache)?, FixedRow::new(device, hidden)?);
                    let (linear, rotation) = (self.linear(qkv, hidden, config.qkv_bias)?, self.rotation());
                    Ok(Box::new(move || device.row_qkv(&mut out, &row, norm, &linear, rotation, position)))
                })?;
                let attention = Kernel {
                    name: "row_attention",
                    dims: [POSITION + 1, heads.q, heads.dim],
                    work: Work::DecodeAttention { q_dim, kv_dim: config.kv_dim(), window: 0, out: hidden },
                    product: false,
                };
                self.measure(attention, || {
                    let (mut row, qkv) = (FixedRow::new(device, hidden)?, self.random(cache)?);
                    let o = self.linear(hidden, q_dim, false)?;
                    Ok(Box::new(move || device.row_attention(&mut row, &qkv, &o, heads, position)))
                })?;
                self.measure(kernel("row_mlp", 3 * intermediate, hidden, Work::product), || {
                    let mut row = FixedRow::new(device, hidden)?;
                    let gate_up = self.linear(2 * intermediate, hidden, false)?;
                    let down = self.linear(hidden, intermediate, false)?;
                    Ok(Box::new(move || device.row_mlp(&mut row, norm, &gate_up, &down)))
                })?;
            }
            self.measure(kernel("gemv_logits", vocab, hidden, Work::fp32_product), || {
                let (mut out, mut best) = (device.zeros(vocab)?, device.zeros(1)?);
                let (a, weight) = (self.row(hidden)?, self.random(vocab * hidden)?);
                Ok(Box::new(move || device.gemv_logits(&mut out, &mut best, &a, norm, &weight, [vocab, vocab])))
            })
        }
    }

    fn random_tokens(len: usize, vocab_size: usize) -> Vec<u32> {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % vocab_size as u64) as u32
        };
        (0..len).map(|_| next()).collect()
    }

    fn run(device: &CudaDevice, shape: &str, config: Config, json: bool, sustained: bool) -> Result<()> {
        let mut notes = Vec::new();
        let ceilings = cuda::ceilings(0, &mut notes);
        notes.iter().for_each(|note| eprintln!("note: {note}"));
        let rows = ROWS[ROWS.len() - 1];
        let largest = config.hidden_size * config.vocab_size.max(2 * config.intermediate_size);
        let activations = rows * (2 * config.intermediate_size).max(config.q_dim() + 2 * config.kv_dim());
        let table = RopeTable::new(&config, rows);
        let by_turns: Vec<f32> = table.cos.iter().zip(&table.sin).flat_map(|(cos, sin)| [*cos, *sin]).collect();
        let bench = Bench {
            device,
            library: CublasLt::open(device).ok(),
            ceilings,
            config,
            shape,
            json,
            sustained,
            noise: noise(largest.max(activations)),
            table: device.stream().clone_htod(&by_turns).map_err(driver)?,
        };
        if !json {
            let show =
                |rate: Option<f64>, unit| rate.map_or("not measured".into(), |rate| format!("{rate:.0} G{unit}/s"));
            println!("{shape} on {}", device.describe()?);
            println!(
                "best product {}, best copy {}\n",
                show(ceilings.gemm_tflops.map(|tflops| tflops * 1e3), "FLOP"),
                show(ceilings.copy_gb_per_s, "B")
            );
            println!(
                "{:<20} {:<21} {:>8} {:>8} {:>8} {:>7} {:>8} {:>6} {:>9}",
                "kernel", "rows x n x k", "us", "MB", "GFLOP", "GB/s", "TFLOP/s", "share", "cuBLASLt"
            );
        }
        for rows in ROWS {
            bench.step(rows)?;
        }
        bench.token()
    }

    pub fn main() -> ExitCode {
        // Cargo adds --bench.
        let mut arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
        let mut flag = |name: &str| {
            let count = arguments.len();
            arguments.retain(|argument| argument != name);
            arguments.len() < count
        };
        let (json, sustained) = (flag("--json"), flag("--sustained"));
        let shape = arguments.first().map_or(SHAPES[0], String::as_str);
        let Some(config) = Config::named(shape) else {
            eprintln!("{shape:?} is no shape; there are {}", SHAPES.join(", "));
            return ExitCode::from(2);
        };
        let device = match CudaDevice::open(0) {
            Ok(device) => device,
            Err(error) => {
                eprintln!("nothing to measure: {error}");
                return ExitCode::SUCCESS;
            }
        };
        match run(&device, shape, config, json, sustained) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error}");
                ExitCode::FAILURE
            }
        }
    }
}
