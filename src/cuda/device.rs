//! A GPU: found without assuming a driver, opened on its primary context.

use std::sync::{Arc, Mutex};

use cudarc::driver::sys::CUdevice_attribute::{
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
};
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::sys::{CUstream, cuStreamGetCtx};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, DriverError, ValidAsZeroBits,
};

use super::ExternalStream;
use super::statistics::{Counters, Statistics};
use super::timer::Timer;
use crate::{Error, Result};

/// Oldest compute capability the kernels run on.
const MIN_COMPUTE_CAPABILITY: (i32, i32) = (8, 0);

/// Compute capability whose own instructions some kernels use.
const HOPPER: (i32, i32) = (9, 0);

/// A GPU with a stream, its own unless it was opened on another. The context is the device's primary one, so that an
/// embedding program shares it.
pub struct CudaDevice {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    ordinal: usize,
    /// Whether to run the kernels that only Hopper has.
    hopper: bool,
    counters: Arc<Counters>,
    /// Times launches, where it is asked to.
    pub(super) timer: Mutex<Option<Timer>>,
}

pub(super) fn driver_error(what: &str, error: DriverError) -> Error {
    Error::Cuda { op: what.into(), message: error.to_string() }
}

#[allow(unsafe_code)]
fn driver_is_present() -> bool {
    // SAFETY: only tries to load the driver's library; cudarc's other calls would panic without it.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

#[allow(unsafe_code)]
fn disable_event_tracking(context: &CudaContext) {
    // SAFETY: the events order work between streams; every buffer made through this context is used on the one stream
    // of its `CudaDevice`.
    unsafe { context.disable_event_tracking() }
}

/// Largest address that stands for a default stream: none, the legacy one, each thread's.
const DEFAULT_STREAMS: usize = 2;

#[allow(unsafe_code)]
fn borrow_stream(context: &Arc<CudaContext>, external: ExternalStream) -> Result<Arc<CudaStream>> {
    let ExternalStream { ordinal, address } = external;
    if address <= DEFAULT_STREAMS {
        return Err(Error::Device(format!(
            "a default stream of cuda:{ordinal} cannot be used: its work cannot be recorded; make a stream of your own"
        )));
    }
    let stream = address as CUstream;
    let mut owner = std::ptr::null_mut();
    // SAFETY: who made an `ExternalStream` vouched for the stream; `owner` is written before it is read.
    let status = unsafe { cuStreamGetCtx(stream, &mut owner) };
    status.result().map_err(|error| driver_error("asking for the stream's context", error))?;
    if owner != context.cu_ctx() {
        return Err(Error::Device(format!(
            "the stream is not one of the primary context of cuda:{ordinal}; make it there, as the CUDA runtime does"
        )));
    }
    // SAFETY: it belongs to the context (checked above) and outlives the wrapper (`ExternalStream::new`); that nothing
    // else is put on it meanwhile is asked for there too.
    Ok(unsafe { context.wrap_borrowed_stream(stream) })
}

impl CudaDevice {
    /// Opens GPU `ordinal`.
    ///
    /// # Errors
    /// [`Error::Device`] if the machine has no driver or no such GPU, or the GPU is too old; [`Error::Cuda`] if the
    /// driver fails.
    pub fn open(ordinal: usize) -> Result<CudaDevice> {
        let own =
            |context: &Arc<CudaContext>| context.new_stream().map_err(|error| driver_error("creating a stream", error));
        CudaDevice::open_with(ordinal, own)
    }

    /// Opens the GPU of `stream`, to work on that.
    ///
    /// # Errors
    /// As [`CudaDevice::open`]; [`Error::Device`] too for a default stream or one of another context.
    pub fn open_on(stream: ExternalStream) -> Result<CudaDevice> {
        CudaDevice::open_with(stream.ordinal, |context| borrow_stream(context, stream))
    }

    fn open_with(
        ordinal: usize,
        stream: impl FnOnce(&Arc<CudaContext>) -> Result<Arc<CudaStream>>,
    ) -> Result<CudaDevice> {
        if !driver_is_present() {
            return Err(Error::Device(format!(
                "cuda:{ordinal} cannot be used: no NVIDIA driver (libcuda) on this machine; install it or use --device cpu"
            )));
        }
        let count = CudaContext::device_count().map_err(|error| {
            Error::Device(format!("cuda:{ordinal} cannot be used: the NVIDIA driver does not start ({error})"))
        })?;
        if ordinal >= count as usize {
            return Err(Error::Device(format!(
                "there is no cuda:{ordinal}: this machine has {count} GPUs, numbered from 0"
            )));
        }
        let context = CudaContext::new(ordinal).map_err(|error| driver_error("opening the GPU", error))?;
        disable_event_tracking(&context);
        let stream = stream(&context)?;
        let mut device =
            CudaDevice { context, stream, ordinal, hopper: false, counters: Arc::default(), timer: Mutex::default() };
        let (major, minor) = device.compute_capability()?;
        device.hopper = (major, minor) == HOPPER;
        if (major, minor) < MIN_COMPUTE_CAPABILITY {
            let (min_major, min_minor) = MIN_COMPUTE_CAPABILITY;
            return Err(Error::Device(format!(
                "cuda:{ordinal} has compute capability {major}.{minor}, but the kernels need {min_major}.{min_minor} (A100) or newer; use --device cpu"
            )));
        }
        Ok(device)
    }

    /// Whether it runs the kernels made for Hopper.
    pub fn runs_hopper_kernels(&self) -> bool {
        self.hopper
    }

    /// Makes it run the kernels that every GPU can run, for comparison. Not between two operations on one residual stream.
    pub fn run_portable_kernels(&mut self) {
        self.hopper = false;
    }

    /// Its stream; every operation of this crate runs on it.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Makes its context the calling thread's, which the kernels' launches rely on.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|error| driver_error("selecting the GPU", error))
    }

    /// Waits for everything on its stream.
    ///
    /// # Errors
    /// [`Error::Cuda`], a kernel's failure among them.
    pub fn synchronize(&self) -> Result<()> {
        self.counters.synchronization();
        self.stream.synchronize().map_err(|error| driver_error("waiting for the GPU", error))
    }

    /// An event behind everything on its stream.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn record_event(&self) -> Result<CudaEvent> {
        self.stream.record_event(None).map_err(|error| driver_error("recording an event", error))
    }

    /// Waits for what lies before `event`.
    ///
    /// # Errors
    /// [`Error::Cuda`], a kernel's failure among them.
    pub fn wait(&self, event: &CudaEvent) -> Result<()> {
        self.counters.synchronization();
        event.synchronize().map_err(|error| driver_error("waiting for the GPU", error))
    }

    /// Milliseconds from the start to the end of what `launches` puts on its stream. Waits for it.
    ///
    /// # Errors
    /// Those of `launches`; [`Error::Cuda`].
    pub fn time(&self, launches: impl FnOnce() -> Result<()>) -> Result<f64> {
        let now = || {
            let event = self.stream.record_event(Some(CU_EVENT_DEFAULT));
            event.map_err(|error| driver_error("recording an event", error))
        };
        let start = now()?;
        launches()?;
        let end = now()?;
        start.elapsed_ms(&end).map(f64::from).map_err(|error| driver_error("waiting for the GPU", error))
    }

    /// Copies `values` into new memory on the GPU; `what` names the copy in an error.
    ///
    /// # Errors
    /// [`Error::Cuda`], out of memory among them.
    pub fn upload<T: DeviceRepr>(&self, what: &str, values: &[T]) -> Result<CudaSlice<T>> {
        self.counters.upload(size_of_val(values));
        self.stream.clone_htod(values).map_err(|error| driver_error(what, error))
    }

    /// Copies `values` to the start of `to`.
    ///
    /// # Errors
    /// [`Error::Cuda`], also if `to` is shorter.
    pub fn upload_into<T: DeviceRepr>(&self, what: &str, values: &[T], to: &mut impl DevicePtrMut<T>) -> Result<()> {
        if values.len() > to.len() {
            let message = format!("{} elements do not fit a buffer of {}", values.len(), to.len());
            return Err(Error::Cuda { op: what.into(), message });
        }
        self.counters.upload(size_of_val(values));
        self.stream.memcpy_htod(values, to).map_err(|error| driver_error(what, error))
    }

    /// Waits for everything on the stream and returns what lies in `from`.
    ///
    /// # Errors
    /// [`Error::Cuda`], an earlier kernel's failure among them.
    pub fn download<T: DeviceRepr>(&self, what: &str, from: &impl DevicePtr<T>) -> Result<Vec<T>> {
        self.counters.download(from.num_bytes());
        let values = self.stream.clone_dtoh(from).map_err(|error| driver_error(what, error))?;
        self.synchronize()?;
        Ok(values)
    }

    /// What has travelled since the device was opened.
    pub fn statistics(&self) -> Statistics {
        self.counters.read()
    }

    /// The counters themselves, which can be read while the device is at work in another thread.
    pub(super) fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Bytes of its memory that are free.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn free_bytes(&self) -> Result<u64> {
        let (free, _) =
            self.context.mem_get_info().map_err(|error| driver_error("asking for the GPU's memory", error))?;
        Ok(free as u64)
    }

    /// Checks that `bytes` are free for `what`, before work that needs them starts; `remedy` is what to do if not.
    ///
    /// # Errors
    /// [`Error::Device`] with both numbers; [`Error::Cuda`].
    pub fn check_free(&self, bytes: u64, what: &str, remedy: &str) -> Result<()> {
        let free = self.free_bytes()?;
        if bytes <= free {
            return Ok(());
        }
        Err(Error::Device(format!(
            "cuda:{} has {} MiB of memory free, but {what} take {} MiB; {remedy}, or use --device cpu",
            self.ordinal,
            free >> 20,
            bytes.div_ceil(1 << 20)
        )))
    }

    /// Zeroed memory.
    ///
    /// # Errors
    /// [`Error::Cuda`], out of memory among them.
    pub fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, len: usize) -> Result<CudaSlice<T>> {
        let op = || format!("allocating {} MiB on the GPU", (len * size_of::<T>()).div_ceil(1 << 20));
        self.stream.alloc_zeros(len.max(1)).map_err(|error| driver_error(&op(), error))
    }

    /// Major and minor compute capability.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn compute_capability(&self) -> Result<(i32, i32)> {
        let attribute = |attribute| {
            self.context.attribute(attribute).map_err(|error| driver_error("asking for the compute capability", error))
        };
        Ok((
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ))
    }

    /// Name, compute capability and memory, for people.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn describe(&self) -> Result<String> {
        let name = self.context.name().map_err(|error| driver_error("asking for the GPU's name", error))?;
        let (_, total) =
            self.context.mem_get_info().map_err(|error| driver_error("asking for the GPU's memory", error))?;
        let (major, minor) = self.compute_capability()?;
        let gib = total as f64 / (1u64 << 30) as f64;
        Ok(format!("cuda:{} ({name}, compute capability {major}.{minor}, {gib:.0} GiB)", self.ordinal))
    }
}

/// Zeroed memory, counted, so that it can be held against what was planned.
pub struct Allocator<'a> {
    device: &'a CudaDevice,
    bytes: u64,
}

impl<'a> Allocator<'a> {
    pub fn new(device: &'a CudaDevice) -> Allocator<'a> {
        Allocator { device, bytes: 0 }
    }

    /// As [`CudaDevice::zeros`].
    ///
    /// # Errors
    /// [`Error::Cuda`], out of memory among them.
    pub fn zeros<T: DeviceRepr + ValidAsZeroBits>(&mut self, len: usize) -> Result<CudaSlice<T>> {
        let memory = self.device.zeros(len)?;
        self.bytes += memory.num_bytes() as u64;
        Ok(memory)
    }

    /// Checks that exactly `planned` bytes were allocated for `what`.
    ///
    /// # Errors
    /// [`Error::Cuda`]: the figures that are shown and checked beforehand are wrong.
    pub fn check(&self, planned: u64, what: &str) -> Result<()> {
        if self.bytes == planned {
            return Ok(());
        }
        let message = format!("{} bytes instead of the {planned} that were planned", self.bytes);
        Err(Error::Cuda { op: format!("allocating {what}"), message })
    }
}
