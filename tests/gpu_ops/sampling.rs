//! The choice of the next token on the device.

use cudarc::driver::CudaSlice;
use gleaner::cuda::ops::{Logits, NO_TOKEN, Sampled, Sent, answer, sampling_words};
use gleaner::reader::Sampling;
use half::bf16;

use super::{Gpu, Noise};

/// Slots that tokens are sent to by turns.
const SLOTS: usize = 3;

struct Answer<'a> {
    gpu: &'a Gpu,
    x: CudaSlice<f32>,
    state: CudaSlice<i32>,
    sent: Sent,
    /// Row `id` of it is the bits of `id`, and something else.
    embedding: CudaSlice<bf16>,
}

impl Answer<'_> {
    fn new(gpu: &Gpu, vocab_size: usize) -> Answer<'_> {
        let rows = (0..vocab_size).flat_map(|id| [id as u16, (id >> 16) as u16, 7, 7, 7, 7, 7, 7]);
        Answer {
            gpu,
            x: gpu.upload(&[0.0f32; 8]),
            state: gpu.upload(&[99, 0]),
            sent: Sent::new(&gpu.device, SLOTS).unwrap(),
            embedding: gpu.upload(&rows.map(bf16::from_bits).collect::<Vec<_>>()),
        }
    }

    /// The token number `index` from `logits`, which must arrive at all its places.
    fn next(&mut self, logits: &[f32], sampling: &Sampling, index: usize) -> u32 {
        assert_eq!((answer::POSITION, answer::TOKENS, answer::LEN), (0, 1, 2));
        let device = &self.gpu.device;
        let words = self.gpu.upload(&sampling_words(sampling));
        device.upload_into("state", &[99, index as i32], &mut self.state).unwrap();
        let mut best = self.gpu.upload(&[likeliest(logits)]);
        let out = Sampled { x: &mut self.x, answer: &mut self.state, sent: &self.sent };
        let on_device = self.gpu.upload(logits);
        let input = Logits { logits: &on_device, best: &mut best, embedding: &self.embedding };
        device.sample(out, input, &words, logits.len()).unwrap();
        assert_eq!(self.gpu.fetch(&self.state), [100, index as i32 + 1]);
        assert_eq!(self.gpu.fetch(&best), [0]);
        let sent = self.sent.token(index);
        let row: Vec<bf16> = self.gpu.fetch(&self.x).into_iter().map(bf16::from_f32).collect();
        let embedded = row[0].to_bits() as u32 | (row[1].to_bits() as u32) << 16;
        assert_eq!((embedded, row[2].to_bits()), (if sent == NO_TOKEN { 0 } else { sent }, 7));
        sent
    }
}

/// The likeliest token as `gemv_logits` leaves it: the logit's bits as an integer of the same order, not-a-number first;
/// below them, 24 bits for the id, smaller ids greater.
fn likeliest(logits: &[f32]) -> u64 {
    let ordered = |(id, logit): (usize, &f32)| {
        let bits = (logit + 0.0).to_bits();
        let key = match (logit.is_nan(), bits >> 31) {
            (true, _) => u32::MAX,
            (_, 1) => !bits,
            _ => bits | 1 << 31,
        };
        (key as u64) << 24 | ((1 << 24) - 1 - id as u64)
    };
    logits.iter().enumerate().map(ordered).max().unwrap()
}

/// As the documentation of `Sampling` has it: tokens in order of likelihood (of equals, smaller ids first), those that
/// together reach `top_p`, and among them the one at which the running sum passes a uniform number's share. Also the ones
/// that would be taken for numbers a hundred-thousandth smaller and larger, and for a nucleus as much smaller and larger.
fn draws(logits: &[f32], sampling: &Sampling, uniform: f64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|a, b| logits[*b as usize].partial_cmp(&logits[*a as usize]).unwrap().then(a.cmp(b)));
    let max = logits[order[0] as usize] as f64;
    let weights: Vec<f64> =
        order.iter().map(|id| ((logits[*id as usize] as f64 - max) / sampling.temperature as f64).exp()).collect();
    let total: f64 = weights.iter().sum();
    let passing = |target: f64| {
        let mut sum = 0.0;
        weights.iter().position(|weight| {
            sum += weight;
            sum > target
        })
    };
    let mut found = Vec::new();
    for shift in [0.0, -1e-5, 1e-5] {
        let last = passing(((sampling.top_p as f64 + shift) * total).min(total) * (1.0 - 1e-15));
        let mass: f64 = weights[..=last.unwrap_or(weights.len() - 1)].iter().sum();
        for nudge in [0.0, -1e-5, 1e-5] {
            if let Some(at) = passing((uniform + nudge) * mass) {
                found.push(order[at]);
            }
        }
    }
    found
}

/// Two rounds of the SplitMix64 finaliser over seed and index, as 53 bits.
fn uniform(seed: u64, index: u64) -> f64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    for add in [0, index] {
        z = z.wrapping_add(add);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
    }
    (z >> 11) as f64 / (1u64 << 53) as f64
}

#[test]
#[ignore = "needs a GPU"]
fn draws_are_those_of_the_definition() {
    let gpu = Gpu::open();
    let mut answer = Answer::new(&gpu, 151_936);
    let mut exact = 0;
    let mut count = 0;
    for (vocab_size, spread) in [(1, 1.0), (17, 2.0), (8192, 10.0), (151_936, 24.0), (5000, 0.0), (300, 500.0)] {
        let mut noise = Noise::new(vocab_size as u64);
        // The sum of four is bell-shaped, as logits are.
        let mut logits: Vec<f32> =
            (0..vocab_size).map(|_| (spread * ((0..4).map(|_| noise.unit()).sum::<f64>() - 2.0)) as f32).collect();
        if vocab_size == 8192 {
            logits[5000..].fill(f32::NEG_INFINITY);
        }
        for (temperature, top_p) in [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5), (0.2, 0.99), (1.0, 1e-6)] {
            for index in 0..20 {
                let sampling = Sampling { temperature, top_p, seed: 11, ..Sampling::default() };
                let token = answer.next(&logits, &sampling, index);
                let allowed = draws(&logits, &sampling, uniform(11, index as u64));
                let case = format!("{vocab_size} tokens, temperature {temperature}, top_p {top_p}, number {index}");
                assert!(allowed.contains(&token), "{case}: {token}, expected {allowed:?}");
                exact += (token == allowed[0]) as usize;
                count += 1;
            }
        }
    }
    println!("draws: {exact} of {count} are those of fp64, the others of numbers 1e-5 beside it");
    // Weights are off by some 2^-22: of so few numbers hardly one lies so near an edge.
    assert!(exact + 1 >= count);
}

#[test]
#[ignore = "needs a GPU"]
fn the_likeliest_token_is_taken_at_temperature_zero() {
    let gpu = Gpu::open();
    let mut answer = Answer::new(&gpu, 151_936);
    let greedy = Sampling::default();
    for vocab_size in [1, 2, 1023, 1025, 151_936] {
        let mut noise = Noise::new(3);
        let mut logits: Vec<f32> = (0..vocab_size).map(|_| noise.unit() as f32 - 5.0).collect();
        for at in [0, vocab_size / 2, vocab_size - 1] {
            let mut best = logits.clone();
            // Of equals, the one of smaller id.
            best[at] = -3.0;
            best[vocab_size - 1] = -3.0;
            assert_eq!(answer.next(&best, &greedy, at), at as u32);
        }
        for bad in [f32::NAN, f32::INFINITY] {
            logits[vocab_size / 3] = bad;
            assert_eq!(answer.next(&logits, &greedy, 5), NO_TOKEN);
        }
        logits.fill(f32::NEG_INFINITY);
        for temperature in [0.0, 1.0] {
            let sampling = Sampling { temperature, ..Sampling::default() };
            assert_eq!(answer.next(&logits, &sampling, 5), NO_TOKEN);
        }
    }
}
