//! A stream that waits for the host, so that what is launched behind runs without gaps.

use std::sync::Arc;

use cudarc::driver::{CudaStream, PinnedHostSlice};

use super::*;
use crate::cuda::device::driver_error;

/// Nanoseconds after which a held stream goes on by itself: the driver lets the host wait when about a thousand launches
/// are under way.
const LIMIT: u64 = 20_000_000;

/// What a held stream looks at.
pub struct Gate {
    /// Never touched but through its address.
    _memory: PinnedHostSlice<u32>,
    /// The same on the device.
    address: usize,
    turn: u32,
    stream: Arc<CudaStream>,
}

impl Gate {
    /// # Errors
    /// [`Error::Cuda`] if memory cannot be pinned.
    pub fn new(device: &CudaDevice) -> Result<Gate> {
        let failed = |error| driver_error("pinning memory", error);
        let stream = device.stream().clone();
        // SAFETY: the memory comes from the driver with some content, and any bits are an integer.
        let memory: PinnedHostSlice<u32> = unsafe { stream.context().alloc_pinned_with_flags(1, 0) }.map_err(failed)?;
        let address = memory.as_ptr().map_err(failed)? as usize;
        let gate = Gate { _memory: memory, address, turn: 0, stream };
        gate.release();
        Ok(gate)
    }

    /// Lets the stream go on.
    pub fn release(&self) {
        // SAFETY: the one element of memory that lives as long as this; the device may read it at any time.
        unsafe { (self.address as *mut u32).write_volatile(self.turn) }
    }
}

impl Drop for Gate {
    /// The stream may still be looking at it.
    fn drop(&mut self) {
        self.release();
        // What failed, the failing call or the next one says.
        let _ = self.stream.synchronize();
    }
}

impl CudaDevice {
    /// Holds the stream at this place until [`Gate::release`], or a fiftieth of a second.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub(in crate::cuda) fn hold(&self, gate: &mut Gate) -> Result<()> {
        gate.turn = gate.turn.wrapping_add(1);
        let released = gate.address as *const u32;
        // SAFETY: pinned memory has the same address on the device; it is freed behind everything on the stream.
        check(unsafe { ffi::gleaner_hold(released, gate.turn, LIMIT, self.raw_stream()) }, || "hold".into())
    }

    /// A launch of nothing.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub(in crate::cuda) fn launch_nothing(&self) -> Result<()> {
        // SAFETY: a null address is not read.
        check(unsafe { ffi::gleaner_hold(std::ptr::null(), 0, 0, self.raw_stream()) }, || "hold".into())
    }
}
