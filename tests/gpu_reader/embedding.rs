//! What a program around the reader may ask for: the scores of every token, and work on a stream of its own.

use std::ffi::c_void;

use gleaner::cpu::CpuReader;
use gleaner::cuda::{CudaDevice, ExternalStream};
use gleaner::reader::{Detail, Reader, StepReport};
use gleaner::{AskParams, Device, Document, Engine, Error};

use super::common::{DEMO, demo_dir, noise_plan, reports, root};
use super::{SCORE_TOLERANCE, cuda_reader};

/// With graphs and without: one more copy back, whatever the number of steps, and nothing else changes.
#[test]
#[ignore = "needs a GPU"]
fn scores_come_with_one_more_copy_and_agree_with_the_selection() {
    let mut reader = cuda_reader(DEMO.clone());
    let plan = noise_plan(8000, 95, 200);
    let plain = reports(&reader, &plan, Detail::Selection);
    for graphs in [true, false] {
        reader.set_graphs(graphs);
        let before = reader.statistics();
        let scored = reports(&reader, &plan, Detail::Scores);
        let cost = reader.statistics() - before;
        assert_eq!((cost.downloads, cost.synchronizations), (2, 2));
        assert_eq!(cost.graph_launches, if graphs { plan.chunks() as u64 - 1 } else { 0 });
        assert_eq!(scored.len(), plain.len());
        for (report, plain) in scored.into_iter().zip(&plain) {
            assert_eq!(report.scores.len(), report.context_tokens);
            let mut scores = report.scores.iter().copied();
            for sentence in report.sentences() {
                let best = scores.by_ref().take(plan.sentence_len(sentence)).fold(0.0, f32::max);
                if let Some(kept) = report.kept.iter().find(|kept| kept.sentence == sentence) {
                    assert_eq!(kept.score, best, "step {}", report.step);
                }
            }
            assert_eq!(scores.next(), None, "every score has its token");
            assert_eq!(&StepReport { scores: Vec::new(), ..report }, plain);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn scores_agree_with_the_fp32_reader() {
    let plan = noise_plan(8000, 10, 4096);
    let ours = reports(&cuda_reader(DEMO.clone()), &plan, Detail::Scores);
    let expected = reports(&CpuReader::new(DEMO.clone()), &plan, Detail::Scores);
    let largest = expected[0].scores.iter().copied().fold(0.0, f32::max);
    let errors = ours[0].scores.iter().zip(&expected[0].scores).map(|(ours, expected)| (ours - expected).abs());
    let worst = errors.fold(0.0, f32::max) / largest;
    println!("{} scores within {worst:.1e} of the largest", ours[0].scores.len());
    assert_eq!(ours[0].scores.len(), expected[0].scores.len());
    assert!(worst <= SCORE_TOLERANCE, "{worst}");
}

#[allow(unsafe_code)]
fn stream_at(address: *mut c_void) -> ExternalStream {
    // SAFETY: a null or default stream is refused; the others here outlive what is opened on them, and nothing else is
    // put on them meanwhile.
    unsafe { ExternalStream::new(0, address) }
}

#[test]
#[ignore = "needs a GPU"]
fn an_engine_works_on_a_stream_of_the_caller_s() {
    let owner = CudaDevice::open(0).unwrap();
    let stream = stream_at(owner.stream().cu_stream() as *mut c_void);
    let document = Document::open(root().join("examples/almanac.txt")).unwrap();
    let ask = |engine: &Engine| {
        let question = "What is the name of the mayor of Pellinbridge?";
        let answer = engine.ask(&document, question, &AskParams::default()).unwrap();
        (answer.answer, answer.evidence)
    };
    let expected = ask(&Engine::open(demo_dir(), Device::Cuda(0)).unwrap());
    let engine = Engine::open(demo_dir(), Device::CudaStream(stream)).unwrap();
    assert_eq!(ask(&engine), expected);

    // Between calls the stream is the owner's, and after the engine it still is.
    let numbers: Vec<u32> = (0..1000).collect();
    let round_trip = || owner.download("test", &owner.upload("test", &numbers).unwrap()).unwrap();
    assert_eq!(round_trip(), numbers);
    assert_eq!(ask(&engine), expected);
    drop(engine);
    assert_eq!(round_trip(), numbers);
}

#[test]
#[ignore = "needs a GPU"]
fn default_streams_are_refused() {
    for address in 0..3usize {
        let stream = stream_at(address as *mut c_void);
        let error = Engine::open(demo_dir(), Device::CudaStream(stream)).err().expect("it cannot be recorded");
        assert!(matches!(&error, Error::Device(message) if message.contains("default stream")), "{error}");
    }
}
