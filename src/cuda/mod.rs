//! The CUDA side. Compiled on every machine; the kernels are in only where build.rs found a toolkit.

#[cfg(gleaner_cuda)]
mod device;
#[cfg(gleaner_cuda)]
#[allow(unsafe_code)]
mod ffi;
#[cfg(gleaner_cuda)]
pub mod ops;

#[cfg(gleaner_cuda)]
pub use device::CudaDevice;

use crate::{Error, Result};

/// Whether this build holds the CUDA kernels.
pub const BUILT: bool = cfg!(gleaner_cuda);

/// The architectures the kernels were compiled for, as build.rs chose them; empty without kernels.
pub const ARCHITECTURES: &str = env!("GLEANER_CUDA_ARCHITECTURES");

/// The reader on GPU `ordinal`.
///
/// # Errors
/// [`Error::Device`]: this build has no kernels, the machine has no driver or no such GPU, or the GPU is too old; and,
/// for now, on any GPU, because the CUDA reader is not written yet.
pub(crate) fn reader(ordinal: usize) -> Result<()> {
    let device = describe(ordinal)?;
    Err(Error::Device(format!(
        "{device} is usable, but this version reads documents on the CPU only; use --device cpu"
    )))
}

/// Name, compute capability and memory of GPU `ordinal`, for people.
///
/// # Errors
/// [`Error::Device`] if it cannot be used, with the reason.
pub fn describe(ordinal: usize) -> Result<String> {
    #[cfg(gleaner_cuda)]
    return CudaDevice::open(ordinal)?.describe();
    #[cfg(not(gleaner_cuda))]
    Err(Error::Device(format!(
        "this build of gleaner is CPU-only, so cuda:{ordinal} cannot be used: no CUDA toolkit was found when it was built; install CUDA 12.8 or newer, set CUDA_HOME, and build again"
    )))
}
