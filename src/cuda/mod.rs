//! The CUDA side. Compiled on every machine; the kernels are in only where build.rs found a toolkit.

#[cfg(gleaner_cuda)]
mod answer;
#[cfg(gleaner_cuda)]
mod ceiling;
#[cfg(gleaner_cuda)]
mod device;
#[cfg(gleaner_cuda)]
#[allow(unsafe_code)]
pub(crate) mod ffi;
#[cfg(gleaner_cuda)]
mod forward;
// These two need no GPU, so that their tests run everywhere.
#[cfg(any(gleaner_cuda, test))]
mod layout;
#[cfg(any(gleaner_cuda, test))]
mod memory;
#[cfg(gleaner_cuda)]
mod model;
#[cfg(gleaner_cuda)]
pub mod ops;
#[cfg(gleaner_cuda)]
mod reader;
#[cfg(gleaner_cuda)]
mod record;
#[cfg(gleaner_cuda)]
mod staging;
#[cfg(gleaner_cuda)]
mod statistics;
#[cfg(gleaner_cuda)]
mod timer;
#[cfg(gleaner_cuda)]
mod workspace;

use std::ffi::c_void;
use std::sync::Arc;

#[cfg(gleaner_cuda)]
pub use ceiling::CublasLt;
#[cfg(gleaner_cuda)]
pub use device::CudaDevice;
#[cfg(gleaner_cuda)]
pub use reader::CudaReader;
#[cfg(gleaner_cuda)]
pub use record::Recorded;
#[cfg(gleaner_cuda)]
pub use statistics::Statistics;

#[cfg(not(gleaner_cuda))]
use crate::Error;
use crate::Result;
use crate::model::Model;
use crate::reader::Reader;
use crate::timings::Ceilings;

/// Whether this build holds the CUDA kernels.
pub const BUILT: bool = cfg!(gleaner_cuda);

/// The architectures the kernels were compiled for, as build.rs chose them; empty without kernels.
pub const ARCHITECTURES: &str = env!("GLEANER_CUDA_ARCHITECTURES");

/// Whether this build shows its work to NVIDIA's profilers as ranges.
pub const RANGES: bool = cfg!(gleaner_nvtx);

/// A GPU's stream that belongs to the program around this library: a reader puts its work there instead of on a stream
/// of its own, behind what already lies on it and with its priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExternalStream {
    ordinal: usize,
    /// A `CUstream`, which is what the runtime's `cudaStream_t` is too.
    address: usize,
}

impl ExternalStream {
    /// Names `stream`, a `CUstream` or `cudaStream_t` made in the primary context of GPU `ordinal` (the one that the
    /// CUDA runtime uses). The default streams are refused when it is opened.
    ///
    /// # Safety
    /// While an engine or reader that was opened on it lives, the stream must not be destroyed. While one of their calls
    /// is under way, no one else may put work on it, wait for it or record it: a call records its work as a graph, and
    /// would record the other work too. Whatever a call puts on it is done when the call returns.
    #[allow(unsafe_code, reason = "a stream is a bare address to this crate")]
    pub unsafe fn new(ordinal: usize, stream: *mut c_void) -> ExternalStream {
        ExternalStream { ordinal, address: stream as usize }
    }

    /// The GPU that it is on.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }
}

/// The reader of `model` on GPU `ordinal`.
///
/// # Errors
/// [`crate::Error::Device`]: this build has no kernels, the machine has no driver or no such GPU, the GPU is too old, or the
/// model's shape is not one the kernels serve; [`crate::Error::Cuda`].
pub(crate) fn reader(ordinal: usize, model: Arc<Model>) -> Result<Box<dyn Reader>> {
    #[cfg(gleaner_cuda)]
    return Ok(Box::new(CudaReader::new(CudaDevice::open(ordinal)?, model)?));
    #[cfg(not(gleaner_cuda))]
    {
        drop(model);
        Err(not_built(ordinal))
    }
}

/// The reader of `model` on a stream of the caller's.
///
/// # Errors
/// As [`reader`]; [`crate::Error::Device`] too for a stream that cannot serve.
pub(crate) fn reader_on(stream: ExternalStream, model: Arc<Model>) -> Result<Box<dyn Reader>> {
    #[cfg(gleaner_cuda)]
    return Ok(Box::new(CudaReader::new(CudaDevice::open_on(stream)?, model)?));
    #[cfg(not(gleaner_cuda))]
    {
        drop(model);
        Err(not_built(stream.ordinal))
    }
}

#[cfg(not(gleaner_cuda))]
fn not_built(ordinal: usize) -> Error {
    Error::Device(format!(
        "this build of gleaner is CPU-only, so cuda:{ordinal} cannot be used: no CUDA toolkit was found when it was built; install CUDA 12.8 or newer, set CUDA_HOME, and build again"
    ))
}

/// Name, compute capability and memory of GPU `ordinal`, for people.
///
/// # Errors
/// [`crate::Error::Device`] if it cannot be used, with the reason.
pub fn describe(ordinal: usize) -> Result<String> {
    #[cfg(gleaner_cuda)]
    return CudaDevice::open(ordinal)?.describe();
    #[cfg(not(gleaner_cuda))]
    Err(not_built(ordinal))
}

/// The rate of bf16 matrix products that GPU `ordinal` sustains, in FLOP/s: NVIDIA's cuBLASLt on matrices of 8192 x 8192
/// random numbers. Takes about half a second.
///
/// # Errors
/// [`crate::Error::Device`] if the GPU or the library (libcublasLt, looked for at run time) is not there;
/// [`crate::Error::Cuda`].
pub fn gemm_ceiling(ordinal: usize) -> Result<f64> {
    #[cfg(gleaner_cuda)]
    return CublasLt::open(&CudaDevice::open(ordinal)?)?.ceiling();
    #[cfg(not(gleaner_cuda))]
    Err(not_built(ordinal))
}

/// Both ceilings of GPU `ordinal`; why one could not be measured goes to `notes`.
pub fn ceilings(ordinal: usize, notes: &mut Vec<String>) -> Ceilings {
    let mut noted = |ceiling: Result<f64>, what: &str| {
        ceiling.inspect_err(|error| notes.push(format!("no ceiling for {what}: {error}"))).ok()
    };
    Ceilings {
        gemm_tflops: noted(gemm_ceiling(ordinal), "matrix products").map(|flops| flops / 1e12),
        copy_gb_per_s: noted(copy_ceiling(ordinal), "copies").map(|bytes| bytes / 1e9),
    }
}

/// The rate at which GPU `ordinal` copies its memory, in bytes read and written a second: a copy of 1 GiB.
///
/// # Errors
/// As [`describe`]; [`crate::Error::Cuda`].
pub fn copy_ceiling(ordinal: usize) -> Result<f64> {
    #[cfg(gleaner_cuda)]
    return ceiling::copy(&CudaDevice::open(ordinal)?);
    #[cfg(not(gleaner_cuda))]
    Err(not_built(ordinal))
}
