//! Checked wrappers of the launchers in `kernels/`, one per op: shapes are checked here, errors carry the op and its
//! dimensions, and nothing is allocated or waited for.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int};

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use half::bf16;

use super::{CudaDevice, ffi};
use crate::{Error, Result};

/// Turns a launcher's status into an error that names `op`.
fn check(status: c_int, op: impl FnOnce() -> String) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: takes any integer and returns a static string.
    let message = unsafe { CStr::from_ptr(ffi::gleaner_error_string(status)) };
    Err(Error::Cuda { op: op(), message: message.to_string_lossy().into_owned() })
}

/// `out = x / sqrt(mean(x^2) + eps) * weight` for each of `rows` rows; `out` and `x` are `[rows, hidden_size]`,
/// `weight` is `[hidden_size]`. Arithmetic in fp32, one rounding to bf16 at the end.
///
/// # Errors
/// [`Error::Cuda`] if a buffer is too small, `hidden_size` is not a multiple of 8, or the launch fails.
pub fn rms_norm(
    device: &CudaDevice,
    out: &mut CudaSlice<bf16>,
    x: &CudaSlice<bf16>,
    weight: &CudaSlice<bf16>,
    rows: usize,
    hidden_size: usize,
    eps: f32,
) -> Result<()> {
    let op = || format!("rms_norm [{rows}, {hidden_size}]");
    let elements = rows.saturating_mul(hidden_size);
    if hidden_size == 0 || !hidden_size.is_multiple_of(8) || rows > c_int::MAX as usize || hidden_size > 1 << 20 {
        let message = "hidden_size must be a multiple of 8 and at most 1048576".into();
        return Err(Error::Cuda { op: op(), message });
    }
    if out.len() < elements || x.len() < elements || weight.len() < hidden_size {
        let message = format!("buffers hold {}, {} and {} elements", out.len(), x.len(), weight.len());
        return Err(Error::Cuda { op: op(), message });
    }
    let stream = device.stream();
    let (out, _out) = out.device_ptr_mut(stream);
    let (x, _x) = x.device_ptr(stream);
    let (weight, _weight) = weight.device_ptr(stream);
    // SAFETY: the three buffers live on this stream's device and hold at least the elements that the kernel touches
    // (checked above); cudarc's allocations are 256-byte aligned, so rows of a multiple of 8 elements are 16-byte
    // aligned as the kernel's vector loads need.
    let status = unsafe {
        ffi::gleaner_rms_norm(
            out as *mut _,
            x as *const _,
            weight as *const _,
            rows as c_int,
            hidden_size as c_int,
            eps,
            stream.cu_stream() as *mut _,
        )
    };
    check(status, op)
}
