//! How a call ends: a status code, the words behind it, and the guard that lets no panic through.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::c_char;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use gleaner::Error;

use crate::args::{CText, Handle, In};
use crate::engine::Engine;

/// `gleaner_status`.
pub type Status = i32;

const OK: Status = 0;
const CANCELLED: Status = 1;
const ARGUMENT: Status = 2;
const BUFFER: Status = 3;
const FILE: Status = 4;
const DOCUMENT: Status = 5;
const MODEL: Status = 6;
const TEMPLATE: Status = 7;
const PARAMETER: Status = 8;
const PLAN: Status = 9;
const DEVICE: Status = 10;
const NOT_FINITE: Status = 11;
const INTERNAL: Status = 12;

/// Why a call failed.
pub struct Failure {
    status: Status,
    message: String,
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A mistake in what C passed.
    pub fn argument(message: impl Into<String>) -> Failure {
        Failure { status: ARGUMENT, message: message.into() }
    }

    /// A buffer of fewer elements than are `needed`.
    pub fn buffer(name: &str, needed: usize, capacity: usize) -> Failure {
        Failure { status: BUFFER, message: format!("{name} must hold {needed} elements, but holds {capacity}") }
    }

    /// An option that makes no sense.
    pub fn parameter(message: impl Into<String>) -> Failure {
        Failure { status: PARAMETER, message: message.into() }
    }

    /// Tables or ids that do not fit together.
    pub fn plan(message: impl Into<String>) -> Failure {
        Failure { status: PLAN, message: message.into() }
    }

    /// What must not happen.
    pub fn internal(words: impl std::fmt::Display) -> Failure {
        Failure { status: INTERNAL, message: format!("a defect of gleaner, please report it: {words}") }
    }

    fn panic(payload: Box<dyn Any + Send>) -> Failure {
        let words = payload.downcast_ref::<String>().map(String::as_str);
        Failure::internal(words.or(payload.downcast_ref::<&str>().copied()).unwrap_or("no message"))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let status = match &error {
            Error::Io { .. } => FILE,
            Error::InvalidUtf8 { .. } | Error::EmptyDocument { .. } => DOCUMENT,
            Error::ModelFile { .. } | Error::MissingTensor { .. } | Error::TensorShape { .. } => MODEL,
            Error::Template { .. } => TEMPLATE,
            Error::EmptyQuestion | Error::QuestionTooLong { .. } | Error::Parameter { .. } => PARAMETER,
            Error::Plan(_) => PLAN,
            Error::Device(_) | Error::Cuda { .. } => DEVICE,
            Error::NotFinite { .. } => NOT_FINITE,
            Error::Cancelled => CANCELLED,
            _ => INTERNAL,
        };
        Failure { status, message: error.to_string() }
    }
}

thread_local! {
    /// Of this thread's last call without a valid engine.
    static LAST_ERROR: RefCell<CText> = RefCell::new(CText::default());
}

/// Runs what a call does. A panic ends here, in silence: the caller's standard error is not this library's.
fn guarded<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    #[cfg(not(test))]
    {
        // The hook of this library's own copy of the standard library; a Rust program around it keeps its own.
        static QUIET: std::sync::Once = std::sync::Once::new();
        QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    }
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| Err(Failure::panic(payload)))
}

fn outcome(result: Result<()>) -> (Status, CText) {
    match result {
        Ok(()) => (OK, CText::default()),
        Err(Failure { status, message }) => (status, CText::from(message)),
    }
}

/// Runs a call without an engine.
pub fn call(body: impl FnOnce() -> Result<()>) -> Status {
    let (status, message) = outcome(guarded(body));
    // A thread that ends has no one left to tell.
    let _ = LAST_ERROR.try_with(|last| last.replace(message));
    status
}

/// Runs a call with an engine, which it keeps alive.
pub fn call_on(engine: In<Handle<Engine>>, body: impl FnOnce(&Engine) -> Result<()>) -> Status {
    match engine.handle() {
        Ok(engine) => {
            let (status, message) = outcome(guarded(|| body(&engine)));
            engine.set_last_error(message);
            // Where a callback freed the handle, this was the last share of the engine.
            let _ = guarded(|| {
                drop(engine);
                Ok(())
            });
            status
        }
        Err(failure) => call(|| Err(failure)),
    }
}

/// What a handle holds, for calls that return a pointer: null, with an error, if the handle is not valid.
pub fn pointer<T, P>(handle: Result<Arc<T>>, pointer: impl FnOnce(&T) -> Result<*const P>) -> *const P {
    let mut found = std::ptr::null();
    call(|| {
        found = pointer(handle?.as_ref())?;
        Ok(())
    });
    found
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_last_error(engine: In<Handle<Engine>>) -> *const c_char {
    let of_thread = || LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr());
    engine.handle().map_or_else(|_| of_thread(), |engine| engine.last_error())
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    #[test]
    #[allow(unsafe_code)]
    fn a_panic_becomes_an_error() {
        let status = call(|| panic!("the {} of it", "sense"));
        assert_eq!(status, INTERNAL);
        LAST_ERROR.with_borrow(|message| {
            // SAFETY: a `CText` ends with a NUL.
            let message = unsafe { CStr::from_ptr(message.as_ptr()) }.to_str().unwrap();
            assert!(message.ends_with("the sense of it"), "{message}");
        });
        assert_eq!(call(|| Ok(())), OK);
    }
}
