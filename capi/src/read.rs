//! Reading plans, decoding prompts, and the tokenizer.

use std::ffi::{c_char, c_int, c_void};
use std::ops::ControlFlow;

use gleaner::reader::{Detail, Sampling};

use crate::args::{CText, Handle, In, Out, Versioned};
use crate::ask::{Kept, StepFn, flow, kept, report};
use crate::engine::Engine;
use crate::plan::ReadingPlan;
use crate::status::{Failure, Status, call, call_on};

/// `gleaner_read_options`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ReadOptions {
    struct_size: usize,
    scores: c_int,
    step: StepFn,
    user_data: *mut c_void,
}

// SAFETY: as `gleaner_read_options`; pointers and functions may be null.
unsafe impl Versioned for ReadOptions {
    const NAME: &str = "gleaner_read_options";
}

impl Default for ReadOptions {
    fn default() -> Self {
        ReadOptions { struct_size: size_of::<Self>(), scores: 0, step: None, user_data: std::ptr::null_mut() }
    }
}

type TokenFn = Option<unsafe extern "C" fn(*mut c_void, u32, *const c_char, usize) -> c_int>;

/// `gleaner_decode_options`.
#[derive(Clone, Copy)]
#[repr(C)]
struct DecodeOptions {
    struct_size: usize,
    max_new_tokens: usize,
    temperature: f32,
    top_p: f32,
    seed: u64,
    token: TokenFn,
    user_data: *mut c_void,
}

// SAFETY: as `gleaner_decode_options`; pointers and functions may be null.
unsafe impl Versioned for DecodeOptions {
    const NAME: &str = "gleaner_decode_options";
}

impl Default for DecodeOptions {
    fn default() -> Self {
        let Sampling { max_new_tokens, temperature, top_p, seed } = Sampling::default();
        DecodeOptions {
            struct_size: size_of::<Self>(),
            max_new_tokens,
            temperature,
            top_p,
            seed,
            token: None,
            user_data: std::ptr::null_mut(),
        }
    }
}

impl DecodeOptions {
    fn sampling(&self) -> Sampling {
        let DecodeOptions { max_new_tokens, temperature, top_p, seed, .. } = *self;
        Sampling { max_new_tokens, temperature, top_p, seed }
    }

    fn tell(&self, token: u32, text: Option<String>) -> ControlFlow<()> {
        let Some(function) = self.token else { return ControlFlow::Continue(()) };
        let text = CText::from(text.unwrap_or_default());
        // SAFETY: the caller's function, with what the header promises it until it returns.
        flow(unsafe { function(self.user_data, token, text.as_ptr(), text.len()) })
    }
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_read_options_init(options: Out<ReadOptions>, struct_size: usize) -> Status {
    call(|| options.init(struct_size))
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_decode_options_init(options: Out<DecodeOptions>, struct_size: usize) -> Status {
    call(|| options.init(struct_size))
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_read(
    engine: In<Handle<Engine>>,
    plan: In<Handle<ReadingPlan>>,
    options: In<ReadOptions>,
    out: Out<Kept>,
    capacity: usize,
    count: Out<usize>,
) -> Status {
    call_on(engine, |engine| {
        let (plan, options) = (plan.handle()?, options.sized_or_default()?);
        // Each sentence that stays owns one of the best tokens.
        let most = plan.plan.sentences().min(plan.plan.topk as usize);
        count.set("count", most)?;
        if capacity < most {
            return Err(Failure::buffer("kept", most, capacity));
        }
        out.check("kept")?;
        let detail = if options.scores == 0 { Detail::Selection } else { Detail::Scores };
        let _work = engine.work()?;
        let gleaned = engine
            .engine
            .reader()
            .read_with(&plan.plan, detail, &mut |step| report(options.step, options.user_data, step))?;
        count.set("count", gleaned.kept.len())?;
        out.fill(capacity, "kept", &kept(&gleaned.kept))
    })
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_decode(
    engine: In<Handle<Engine>>,
    prompt: In<u32>,
    prompt_count: usize,
    options: In<DecodeOptions>,
    tokens: Out<u32>,
    capacity: usize,
    count: Out<usize>,
) -> Status {
    call_on(engine, |engine| {
        let (prompt, options) = (prompt.slice(prompt_count, "prompt")?, options.sized_or_default()?);
        count.set("count", options.max_new_tokens)?;
        if capacity < options.max_new_tokens {
            return Err(Failure::buffer("tokens", options.max_new_tokens, capacity));
        }
        tokens.check("tokens")?;
        let mut text = engine.engine.tokenizer().decode_stream();
        let mut failed = None;
        let _work = engine.work()?;
        let answer = engine.engine.reader().answer(prompt, &options.sampling(), &mut |token| match text(token) {
            Ok(text) => options.tell(token, text),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        })?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        count.set("count", answer.len())?;
        tokens.fill(capacity, "tokens", &answer)
    })
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_tokenize(
    engine: In<Handle<Engine>>,
    text: In<c_char>,
    length: usize,
    parse_special: c_int,
    tokens: Out<u32>,
    capacity: usize,
    count: Out<usize>,
) -> Status {
    call_on(engine, |engine| {
        let (text, tokenizer) = (text.text(length, "text")?, engine.engine.tokenizer());
        let encoded = if parse_special == 0 { tokenizer.encode(text)? } else { tokenizer.encode_template(text)? };
        count.set("count", encoded.len())?;
        tokens.fill(capacity, "tokens", &encoded)
    })
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_detokenize(
    engine: In<Handle<Engine>>,
    tokens: In<u32>,
    count: usize,
    text: Out<u8>,
    capacity: usize,
    length: Out<usize>,
) -> Status {
    call_on(engine, |engine| {
        let decoded = CText::from(engine.engine.tokenizer().decode(tokens.slice(count, "tokens")?)?);
        length.set("length", decoded.len())?;
        text.fill(capacity, "text", decoded.as_bytes_with_nul())
    })
}
