//! Runs of launches that are recorded once and replayed.

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::CudaDevice;
use super::device::driver_error;
use crate::{Error, Result};

/// A recorded run of launches.
pub struct Recorded(CudaGraph);

#[allow(unsafe_code)]
// SAFETY: a graph belongs to the context, not to a thread; this crate uses one from one thread at a time.
unsafe impl Send for Recorded {}

impl CudaDevice {
    /// Records what `launches` puts on the stream, which must not load a kernel.
    ///
    /// # Errors
    /// Those of `launches`; [`Error::Cuda`].
    pub fn record(&self, launches: impl FnOnce() -> Result<()>) -> Result<Recorded> {
        let failed = |error| driver_error("recording a graph", error);
        let stream = self.stream();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(failed)?;
        let launched = launches();
        // Ended in any case, or the stream would be of no further use.
        let graph = stream
            .end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
            .map_err(failed)?;
        launched?;
        let nothing = || Error::Cuda { op: "recording a graph".into(), message: "nothing was recorded".into() };
        graph.map(Recorded).ok_or_else(nothing)
    }

    /// Launches a recorded run of kernels; `what` names it in an error.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn launch(&self, what: &str, recorded: &Recorded) -> Result<()> {
        self.counters().graph_launch();
        recorded.0.launch().map_err(|error| driver_error(what, error))
    }
}
