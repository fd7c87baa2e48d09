//! What this GPU can do at best, to hold kernels against: NVIDIA's matrix products, and copies.

use cudarc::cublaslt::{CudaBlasLT, Matmul, MatmulConfig, result::CublasError};
use cudarc::driver::CudaSlice;
use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::CudaDevice;
use super::device::driver_error;
use crate::model::fill_normal;
use crate::{Error, Result};

/// Rows and columns of the matrices whose product is the ceiling.
const SIZE: usize = 8192;

/// Bytes that are copied.
const COPY: usize = 1 << 30;

/// NVIDIA's matrix products on the stream of one device, with the algorithm that the library thinks best.
pub struct CublasLt<'a> {
    library: CudaBlasLT,
    device: &'a CudaDevice,
}

#[allow(unsafe_code)]
fn library_is_present() -> bool {
    // SAFETY: only tries to load the library; cudarc's other calls would panic without it.
    unsafe { cudarc::cublaslt::sys::is_culib_present() }
}

fn failed(what: &str, error: CublasError) -> Error {
    Error::Cuda { op: what.into(), message: error.to_string() }
}

impl CublasLt<'_> {
    /// Loads the library.
    ///
    /// # Errors
    /// [`Error::Device`] if it is not there or the GPU has no memory for its workspace; [`Error::Cuda`].
    pub fn open(device: &CudaDevice) -> Result<CublasLt<'_>> {
        if !library_is_present() {
            return Err(Error::Device(
                "no cuBLASLt (libcublasLt) where libraries are looked for; install it, or add its folder to LD_LIBRARY_PATH"
                    .into(),
            ));
        }
        // The library's workspace is 32 MiB.
        device.check_free(64 << 20, "cuBLASLt and its workspace", "free some")?;
        device.bind()?;
        let library = CudaBlasLT::new(device.stream().clone()).map_err(|error| failed("opening cuBLASLt", error))?;
        Ok(CublasLt { library, device })
    }

    /// `out = a weight^T`; `out` is `[rows, n]`, `a` is `[rows, k]`, `weight` is `[n, k]`.
    ///
    /// # Errors
    /// [`Error::Cuda`] if a buffer is too small or the library fails.
    #[allow(unsafe_code)]
    pub fn product(
        &self,
        out: &mut CudaSlice<bf16>,
        a: &CudaSlice<bf16>,
        weight: &CudaSlice<bf16>,
        [rows, n, k]: [usize; 3],
    ) -> Result<()> {
        let op = || format!("cuBLASLt product [{rows}, {n}, {k}]");
        if out.len() < rows * n || a.len() < rows * k || weight.len() < n * k {
            return Err(Error::Cuda { op: op(), message: "a buffer is smaller than its shape".into() });
        }
        // The library's matrices are column-major: row-major out is [n, rows] to it, weight [k, n] and a [k, rows].
        let config = MatmulConfig {
            transa: true,
            transb: false,
            transc: false,
            m: n as u64,
            n: rows as u64,
            k: k as u64,
            alpha: 1.0,
            lda: k as i64,
            ldb: k as i64,
            beta: 0.0,
            ldc: n as i64,
            stride_a: None,
            stride_b: None,
            stride_c: None,
            stride_bias: None,
            batch_size: None,
        };
        // SAFETY: the buffers live on this stream's device and hold the matrices described (checked above).
        unsafe { self.library.matmul(config, weight, a, out, None, None) }.map_err(|error| failed(&op(), error))
    }

    /// The rate of a large product of random numbers, in FLOP/s.
    ///
    /// # Errors
    /// As [`CublasLt::product`].
    pub fn ceiling(&self) -> Result<f64> {
        let device = self.device;
        let mut random = vec![bf16::ZERO; SIZE * SIZE];
        fill_normal(bytemuck::cast_slice_mut(random.reinterpret_cast_mut()), 1.0, 0);
        let upload = || {
            let copied = device.stream().clone_htod(&random);
            copied.map_err(|error| driver_error("copying a matrix to the GPU", error))
        };
        let (a, weight) = (upload()?, upload()?);
        let mut out = device.zeros(SIZE * SIZE)?;
        let flops = 2.0 * (SIZE as f64).powi(3);
        Ok(flops / seconds(device, 50, || self.product(&mut out, &a, &weight, [SIZE; 3]))?)
    }
}

/// Seconds a launch: the median of five runs of `count`, behind one that warms up.
fn seconds(device: &CudaDevice, count: usize, mut launch: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut run = || device.time(|| (0..count).try_for_each(|_| launch()));
    run()?;
    let mut runs = (0..5).map(|_| run()).collect::<Result<Vec<f64>>>()?;
    runs.sort_by(f64::total_cmp);
    Ok(runs[2] / 1e3 / count as f64)
}

/// [`super::copy_ceiling`]
pub(super) fn copy(device: &CudaDevice) -> Result<f64> {
    device.check_free(2 * COPY as u64, "the two buffers of a copy", "free some")?;
    let from = device.zeros::<u8>(COPY)?;
    let mut to = device.zeros::<u8>(COPY)?;
    let copy = || {
        let copied = device.stream().memcpy_dtod(&from, &mut to);
        copied.map_err(|error| driver_error("copying on the GPU", error))
    };
    Ok(2.0 * COPY as f64 / seconds(device, 10, copy)?)
}
