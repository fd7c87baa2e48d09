//! One reading step of the bundled model on the CPU, beside what the GEMM library alone reaches on this machine.
//! Criterion's "elements" are floating-point operations: Gelem/s reads as GFLOP/s.
#![allow(missing_docs, unsafe_code)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gemm::Parallelism;
use gleaner::cpu::CpuReader;
use gleaner::model::Model;

/// A first, an ordinary and a long step.
const TOKENS: [usize; 3] = [1054, 1894, 2918];
const QUESTION_ROWS: usize = 30;

fn step(c: &mut Criterion) {
    let model = Arc::new(Model::open(concat!(env!("CARGO_MANIFEST_DIR"), "/models/gleaner-demo-16m")).unwrap());
    let reader = CpuReader::new(model.clone());
    let mut group = c.benchmark_group("step");
    group.sample_size(10);
    for tokens in TOKENS {
        let prompt: Vec<u32> = (0..tokens as u32).map(|i| i.wrapping_mul(2_654_435_761) % 8000).collect();
        let question_start = tokens - QUESTION_ROWS;
        group.throughput(Throughput::Elements(model.config.step_flops(tokens, QUESTION_ROWS)));
        group.bench_function(format!("{tokens} tokens"), |b| {
            b.iter(|| reader.score_step(&prompt, 10..question_start, question_start, 8, 300, &mut Vec::new()).unwrap())
        });
    }
    group.finish();
}

/// The MLP's up projection, the largest share of a step, as a bare call of the library.
fn gemm_alone(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemm alone");
    group.sample_size(10);
    for m in TOKENS {
        let (n, k) = (1024, 384);
        let (a, b) = (vec![0.5f32; m * k], vec![0.25f32; n * k]);
        let mut out = vec![0.0f32; m * n];
        group.throughput(Throughput::Elements(2 * (m * n * k) as u64));
        group.bench_function(format!("{m} x {n} x {k}"), |bench| {
            bench.iter(|| {
                // SAFETY: row-major a [m, k], out [m, n] and transposed b [n, k], each of the full length.
                unsafe {
                    gemm::gemm(
                        m,
                        n,
                        k,
                        out.as_mut_ptr(),
                        1,
                        n as isize,
                        false,
                        a.as_ptr(),
                        1,
                        k as isize,
                        b.as_ptr(),
                        k as isize,
                        1,
                        0.0,
                        1.0,
                        false,
                        false,
                        false,
                        Parallelism::Rayon(0),
                    );
                }
                black_box(&out);
            })
        });
    }
    group.finish();
}

criterion_group!(benches, step, gemm_alone);
criterion_main!(benches);
