//! Engines: opening, last errors, and which threads are reading.

use std::collections::{HashMap, HashSet};
use std::ffi::{c_char, c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use gleaner::cuda::{self, ExternalStream};
use gleaner::{Device, Error};

use crate::args::{CText, Handle, In, Kind, Out, Slot, Versioned};
use crate::status::{Failure, Result, Status, call, pointer};

type LogFn = Option<unsafe extern "C" fn(*mut c_void, c_int, *const c_char)>;

#[derive(Clone, Copy)]
#[repr(C)]
struct EngineOptions {
    struct_size: usize,
    device: In<'static, c_char>,
    cuda_stream: *mut c_void,
    log: LogFn,
    user_data: *mut c_void,
}

// SAFETY: as `gleaner_engine_options`; pointers and functions may be null.
unsafe impl Versioned for EngineOptions {
    const NAME: &str = "gleaner_engine_options";
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            struct_size: size_of::<Self>(),
            device: In::NULL,
            cuda_stream: std::ptr::null_mut(),
            log: None,
            user_data: std::ptr::null_mut(),
        }
    }
}

impl EngineOptions {
    /// On which device, and, if "auto" passed a GPU over, why.
    fn open(&self, model_dir: &str) -> Result<(gleaner::Engine, Option<Error>)> {
        let device = self.device.optional_string("device")?.unwrap_or("auto");
        let device: Device = device.parse().map_err(Failure::parameter)?;
        let device = match device {
            _ if self.cuda_stream.is_null() => device,
            // SAFETY: the header asks of the caller what `ExternalStream::new` asks.
            Device::Cuda(ordinal) => Device::CudaStream(unsafe { ExternalStream::new(ordinal, self.cuda_stream) }),
            _ => return Err(Failure::parameter("cuda_stream is of one GPU: set device to \"cuda\" or \"cuda:N\"")),
        };
        if device == Device::Auto {
            // What `Device::Auto` does, with the reason.
            return match gleaner::Engine::open(model_dir, Device::Cuda(0)) {
                Ok(engine) => Ok((engine, None)),
                Err(reason @ (Error::Device(_) | Error::Cuda { .. })) => {
                    Ok((gleaner::Engine::open(model_dir, Device::Cpu)?, Some(reason)))
                }
                Err(error) => Err(error.into()),
            };
        }
        Ok((gleaner::Engine::open(model_dir, device)?, None))
    }
}

/// Where messages go.
struct Log {
    function: LogFn,
    user_data: *mut c_void,
}

// SAFETY: the header says that the function is called on any thread that calls with the engine, on several at once.
unsafe impl Send for Log {}
// SAFETY: as above.
unsafe impl Sync for Log {}

const INFO: c_int = 0;
const WARNING: c_int = 1;

impl Log {
    fn write(&self, level: c_int, message: String) {
        if let Some(function) = self.function {
            let message = CText::from(message);
            // SAFETY: the caller's function, with what the header promises it.
            unsafe { function(self.user_data, level, message.as_ptr()) };
        }
    }
}

/// What a `gleaner_engine` holds.
pub struct Engine {
    pub engine: gleaner::Engine,
    device: CText,
    log: Log,
    /// Of each thread whose last call failed.
    errors: Mutex<HashMap<ThreadId, CText>>,
    /// Threads that are inside a call that reads or decodes.
    at_work: Mutex<HashSet<ThreadId>>,
}

impl Kind for Engine {
    const COOKIE: u64 = u64::from_ne_bytes(*b"gleanENG");
    const NAME: &str = "gleaner_engine";
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    pub fn set_last_error(&self, message: CText) {
        let mut errors = lock(&self.errors);
        if message.is_empty() {
            errors.remove(&thread::current().id());
        } else {
            errors.insert(thread::current().id(), message);
        }
    }

    /// The calling thread's, which no other thread moves or frees.
    pub fn last_error(&self) -> *const c_char {
        lock(&self.errors).get(&thread::current().id()).map_or(c"".as_ptr(), CText::as_ptr)
    }

    pub fn warn(&self, warnings: &[String]) {
        warnings.iter().for_each(|warning| self.log.write(WARNING, warning.clone()));
    }

    /// Holds the calling thread's place in a call that reads or decodes. A second such call from its callbacks would wait
    /// for the first for ever where a device serves one at a time.
    pub fn work(&self) -> Result<Work<'_>> {
        match lock(&self.at_work).insert(thread::current().id()) {
            true => Ok(Work(self)),
            false => Err(Failure::argument(
                "a callback may not ask, read or decode with the engine that called it; return first, or use another engine",
            )),
        }
    }
}

/// Ends with the call.
pub struct Work<'a>(&'a Engine);

impl Drop for Work<'_> {
    fn drop(&mut self) {
        lock(&self.0.at_work).remove(&thread::current().id());
    }
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_engine_options_init(options: Out<EngineOptions>, struct_size: usize) -> Status {
    call(|| options.init(struct_size))
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_engine_open(model_dir: In<c_char>, options: In<EngineOptions>, engine: Slot<Engine>) -> Status {
    call(|| {
        let slot = engine.cleared()?;
        let options = options.sized_or_default()?;
        let log = Log { function: options.log, user_data: options.user_data };
        let (engine, passed_over) = options.open(model_dir.string("model_dir")?)?;
        if let Some(reason) = passed_over.filter(|_| cuda::BUILT) {
            log.write(WARNING, format!("the GPU is not used: {reason}"));
        }
        let device = engine.reader().device();
        log.write(INFO, format!("{} is open on {device}", engine.model().path.display()));
        let (errors, at_work) = Default::default();
        slot.give(Engine { engine, device: CText::from(device), log, errors, at_work })
    })
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_engine_free(engine: Slot<Engine>) -> Status {
    call(|| engine.free())
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_engine_device(engine: In<Handle<Engine>>) -> *const c_char {
    pointer(engine.handle(), |engine| Ok(engine.device.as_ptr()))
}
