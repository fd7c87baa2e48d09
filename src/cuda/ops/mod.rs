//! Checked wrappers of the launchers in `kernels/`, one per op: shapes are checked here, errors carry the op and its
//! dimensions, and nothing is allocated or waited for.
#![allow(unsafe_code)]

mod decode;
mod hold;
mod row;
mod steps;
mod stream;

pub use decode::{AttentionParts, Logits, NO_TOKEN, Norm, Sampled, Sent, answer, sampling_words};
pub(in crate::cuda) use hold::Gate;
pub use row::FixedRow;
pub use steps::{DevicePlan, StepBuffers, StepCounts, StepLog, state};
pub use stream::{Normed, Residual, Scaling};

use std::ffi::{CStr, c_int, c_void};

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use half::bf16;

use crate::cuda::device::Allocator;
use crate::cuda::{CudaDevice, ffi, memory};
use crate::timings::Work;
use crate::{Error, Result};

/// Rows that an operand may have.
const MAX_ROWS: usize = (1 << 20) - 1;

/// Pairs of tiles of 128 x 128 that a product on Hopper may have: with as many clusters as a GPU could have, what
/// `divide_fast` of hopper.cuh divides.
const MAX_PAIRS: usize = (1 << 20) - (1 << 10);

/// How many rows of a buffer are live: a number that lies on the device, so that one recorded launch serves any length.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Device integers, written by this crate's kernels or by the caller: with a copy, or with a kernel that lets none start
    /// early and is not the last one before a product, for products read them while that one may still run.
    pub ints: &'a CudaSlice<i32>,
    /// Which of them is the count. It never exceeds `max`.
    pub index: usize,
    /// Rows that the buffers hold.
    pub max: usize,
}

/// A device integer that shifts rows or positions.
#[derive(Clone, Copy)]
pub struct Shift<'a> {
    /// Device integers.
    pub ints: &'a CudaSlice<i32>,
    /// Which of them is meant.
    pub index: usize,
}

/// Where the rows of a product lie: what stands for the first of them. `None` is 0.
#[derive(Clone, Copy, Default)]
pub struct Starts<'a> {
    /// In the input.
    pub input: Option<Shift<'a>>,
    /// In the table of positions.
    pub position: Option<Shift<'a>>,
    /// In the output.
    pub out: Option<Shift<'a>>,
}

/// A matrix `[n, k]` and its bias `[n]`.
pub struct DeviceLinear {
    /// `[n, k]`
    pub weight: CudaSlice<bf16>,
    /// `[n]`
    pub bias: Option<CudaSlice<bf16>>,
    /// Outputs, a multiple of 16.
    pub n: usize,
    /// Inputs, a multiple of 8.
    pub k: usize,
    /// What a model calls it, for profiles.
    pub(in crate::cuda) role: &'static str,
}

impl DeviceLinear {
    /// `weight` is `[n, k]`, `bias` `[n]`.
    pub fn new(weight: CudaSlice<bf16>, bias: Option<CudaSlice<bf16>>, n: usize, k: usize) -> DeviceLinear {
        DeviceLinear { weight, bias, n, k, role: "" }
    }
}

/// Heads that are rotated by their row's position.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    /// Cosine and sine by turns, `[positions, head_dim / 2, 2]`.
    pub table: &'a CudaSlice<f32>,
    /// Width of a head.
    pub head_dim: usize,
    /// Heads in the columns below this are rotated.
    pub columns: usize,
}

/// Geometry of an attention layer.
#[derive(Clone, Copy)]
pub struct Heads {
    /// Query heads.
    pub q: usize,
    /// Key and value heads.
    pub kv: usize,
    /// Width of a head, 64 or 128.
    pub dim: usize,
    /// Keys a row may attend to, itself included; 0 for all.
    pub window: usize,
}

impl Heads {
    /// Columns of a buffer of queries, keys and values.
    pub fn qkv_columns(&self) -> usize {
        (self.q + 2 * self.kv) * self.dim
    }
}

/// Turns a launcher's status into an error that names `op`.
fn check(status: c_int, op: impl FnOnce() -> String) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: takes any integer and returns a static string.
    let message = unsafe { CStr::from_ptr(ffi::gleaner_error_string(status)) };
    Err(Error::Cuda { op: op(), message: message.to_string_lossy().into_owned() })
}

fn require(holds: bool, op: impl FnOnce() -> String, message: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Cuda { op: op(), message: message.into() }) }
}

impl CudaDevice {
    /// The address of a buffer. All work of this crate on a device is on one stream, in order, so that no event has to
    /// guard it.
    fn address<T>(&self, slice: &CudaSlice<T>) -> *const c_void {
        slice.device_ptr(self.stream()).0 as *const c_void
    }

    fn address_mut<T>(&self, slice: &mut CudaSlice<T>) -> *mut c_void {
        slice.device_ptr_mut(self.stream()).0 as *mut c_void
    }

    fn int(&self, ints: &CudaSlice<i32>, index: usize) -> Result<*const i32> {
        require(index < ints.len(), || "a device integer".into(), "its index is beyond the buffer")?;
        Ok((self.address(ints) as *const i32).wrapping_add(index))
    }

    fn count(&self, rows: Rows) -> Result<*const i32> {
        self.int(rows.ints, rows.index)
    }

    fn shift(&self, shift: Option<Shift>) -> Result<*const i32> {
        shift.map_or(Ok(std::ptr::null()), |shift| self.int(shift.ints, shift.index))
    }

    fn raw_stream(&self) -> *mut c_void {
        self.stream().cu_stream() as *mut c_void
    }

    fn bias(&self, linear: &DeviceLinear) -> *const c_void {
        linear.bias.as_ref().map_or(std::ptr::null(), |bias| self.address(bias))
    }

    /// Checks a linear layer against its operands.
    fn check_linear(
        &self,
        op: &dyn Fn() -> String,
        out: usize,
        a: usize,
        linear: &DeviceLinear,
        rows: usize,
    ) -> Result<()> {
        let (n, k) = (linear.n, linear.k);
        require(n > 0 && n.is_multiple_of(16) && n < 1 << 24, op, "n must be a multiple of 16 below 2^24")?;
        require(k > 0 && k.is_multiple_of(8) && k < 1 << 24, op, "k must be a multiple of 8 below 2^24")?;
        require(rows <= MAX_ROWS, op, "at most 1048575 rows")?;
        // Hopper's kernels divide numbers of pairs of tiles by a reciprocal; no other tile makes as many.
        let pairs = rows.div_ceil(256) * n.div_ceil(128);
        let few = pairs < MAX_PAIRS || !self.runs_hopper_kernels();
        require(few, op, "the product has too many tiles: use fewer rows")?;
        require(linear.weight.len() >= n * k, op, "the weight is smaller than [n, k]")?;
        require(linear.bias.as_ref().is_none_or(|bias| bias.len() >= n), op, "the bias is smaller than [n]")?;
        require(out >= rows * n && a >= rows * k, op, "a buffer is smaller than its rows")
    }

    /// `x += a weight^T + bias` for the x of the residual stream; `a` is `[rows, k]`, norms are `[n]`.
    ///
    /// # Errors
    /// As [`CudaDevice::embed`].
    pub fn gemm_residual(
        &self,
        residual: &mut Residual,
        a: &CudaSlice<bf16>,
        linear: &DeviceLinear,
        norms: Scaling,
        rows: Rows,
    ) -> Result<()> {
        let op = || format!("gemm_residual [{}, {}, {}]", rows.max, linear.n, linear.k);
        self.check_linear(&op, residual.scaled.len(), a.len(), linear, rows.max)?;
        self.check_residual(&op, residual, norms.from, rows.max, linear.n)?;
        self.check_residual(&op, residual, norms.to, rows.max, linear.n)?;
        let count = self.count(rows)?;
        let launch = match self.runs_hopper_kernels() {
            true => ffi::gleaner_gemm_sm90_residual,
            false => ffi::gleaner_gemm_residual,
        };
        let _kernel = self.kernel("gemm_residual", linear.role, rows.max, Work::residual(linear.n, linear.k));
        // SAFETY: as in `embed`, with the shapes that `check_linear` checked.
        check(
            unsafe {
                launch(
                    self.address_mut(&mut residual.scaled),
                    self.address_mut(&mut residual.rest),
                    self.address_mut(&mut residual.squares) as *mut f32,
                    self.address(a),
                    self.address(&linear.weight),
                    self.bias(linear),
                    self.address(norms.from),
                    self.address(norms.to),
                    count,
                    rows.max as c_int,
                    linear.n as c_int,
                    linear.k as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }

    /// `out = silu(gate) * up` of the input, `[rows, n / 2]`; the rows of the weight come as 8 of the gate, 8 of up, and so
    /// on.
    ///
    /// # Errors
    /// As [`CudaDevice::embed`].
    pub fn gemm_swiglu(
        &self,
        out: &mut CudaSlice<bf16>,
        input: Normed,
        linear: &DeviceLinear,
        rows: Rows,
    ) -> Result<()> {
        let op = || format!("gemm_swiglu [{}, {}, {}]", rows.max, linear.n, linear.k);
        let Normed { residual, eps } = input;
        self.check_linear(&op, out.len() * 2, residual.scaled.len(), linear, rows.max)?;
        require(
            residual.squares.len() >= Residual::lens(rows.max, linear.k)[2],
            op,
            "a buffer is smaller than its rows",
        )?;
        let count = self.count(rows)?;
        let launch = match self.runs_hopper_kernels() {
            true => ffi::gleaner_gemm_sm90_swiglu,
            false => ffi::gleaner_gemm_swiglu,
        };
        let _kernel = self.kernel("gemm_swiglu", linear.role, rows.max, Work::swiglu(linear.n, linear.k));
        // SAFETY: as in `embed`, with the shapes that `check_linear` checked.
        check(
            unsafe {
                launch(
                    self.address_mut(out),
                    self.address(&residual.scaled),
                    self.address(&residual.squares) as *const f32,
                    self.address(&linear.weight),
                    self.bias(linear),
                    count,
                    rows.max as c_int,
                    linear.n as c_int,
                    linear.k as c_int,
                    eps,
                    self.raw_stream(),
                )
            },
            op,
        )
    }

    /// `out[starts.out..] = input[starts.input..] weight^T + bias`, `[rows, n]`, with heads rotated by their position,
    /// `starts.position` and on. Input, table and output hold the rows from these on.
    ///
    /// # Errors
    /// As [`CudaDevice::embed`]; heads must be 32, 64 or 128 wide.
    pub fn gemm_rope(
        &self,
        out: &mut CudaSlice<bf16>,
        input: Normed,
        linear: &DeviceLinear,
        rotation: Rotation,
        rows: Rows,
        starts: Starts,
    ) -> Result<()> {
        let op = || format!("gemm_rope [{}, {}, {}]", rows.max, linear.n, linear.k);
        let Normed { residual, eps } = input;
        let a = &residual.scaled;
        self.check_linear(&op, out.len(), a.len(), linear, rows.max)?;
        let a_rows = (a.len() / linear.k).min(MAX_ROWS);
        require(
            residual.squares.len() >= Residual::lens(a_rows, linear.k)[2],
            op,
            "a buffer is smaller than its rows",
        )?;
        check_rotation(&op, rotation, linear.n, rows.max)?;
        // Hopper's kernel brings the table whether or not it rotates, 32 columns at a time and at most four times; attention
        // knows no wider heads on any GPU.
        require((32..=128).contains(&rotation.head_dim), op, "heads must be 32 to 128 wide")?;
        let positions = (rotation.table.len() / rotation.head_dim).min(MAX_ROWS);
        require(positions >= rows.max, op, "the table has too few positions")?;
        let count = self.count(rows)?;
        let starts = ffi::GleanerStarts {
            a: self.shift(starts.input)?,
            position: self.shift(starts.position)?,
            out: self.shift(starts.out)?,
        };
        let _kernel = self.kernel("gemm_rope", linear.role, rows.max, Work::product(linear.n, linear.k));
        let (out, squares) = (self.address_mut(out), self.address(&residual.squares) as *const f32);
        let (a, weight, bias) = (self.address(a), self.address(&linear.weight), self.bias(linear));
        let (table, stream) = (self.address(rotation.table), self.raw_stream());
        let [max_rows, a_rows, positions] = [rows.max, a_rows, positions].map(|size| size as c_int);
        let [n, k] = [linear.n, linear.k].map(|size| size as c_int);
        let [head_dim, columns] = [rotation.head_dim, rotation.columns].map(|size| size as c_int);
        // SAFETY: as in `embed`, with the shapes that `check_linear` and `check_rotation` checked.
        check(
            unsafe {
                match self.runs_hopper_kernels() {
                    true => ffi::gleaner_gemm_sm90_rope(
                        out, a, squares, weight, bias, table, count, starts, max_rows, a_rows, positions, n, k,
                        head_dim, columns, eps, stream,
                    ),
                    false => ffi::gleaner_gemm_rope(
                        out, a, squares, weight, bias, table, count, starts, max_rows, n, k, head_dim, columns, eps,
                        stream,
                    ),
                }
            },
            op,
        )
    }

    /// Causal attention of the rows from `first` on; `out` is `[rows - first, q * dim]`, `qkv` is `[rows, (q + 2 kv) * dim]`.
    /// A row's result is the same to the bit whichever is the first; the queries of up to 63 rows before it are read.
    ///
    /// # Errors
    /// As [`CudaDevice::embed`]; `dim` must be 64 or 128.
    pub fn attention(
        &self,
        out: &mut CudaSlice<bf16>,
        qkv: &CudaSlice<bf16>,
        heads: Heads,
        rows: Rows,
        first: Option<Shift>,
    ) -> Result<()> {
        let op = || format!("attention [{}, {} of {} heads of {}]", rows.max, heads.q, heads.kv, heads.dim);
        check_heads(&op, heads)?;
        let fits = out.len() >= rows.max * heads.q * heads.dim && qkv.len() >= rows.max * heads.qkv_columns();
        require(fits, op, "a buffer is smaller than its rows")?;
        let (count, first) = (self.count(rows)?, self.shift(first)?);
        let Heads { q, kv, dim, window } = heads;
        let work = Work::Attention { q_dim: q * dim, kv_dim: kv * dim, window };
        let _kernel = self.kernel("attention", "", rows.max, work);
        let launch = match self.runs_hopper_kernels() {
            true => ffi::gleaner_attention_sm90,
            false => ffi::gleaner_attention,
        };
        // SAFETY: as in `embed`.
        check(
            unsafe {
                launch(
                    self.address_mut(out),
                    self.address(qkv),
                    count,
                    first,
                    rows.max as c_int,
                    heads.q as c_int,
                    heads.kv as c_int,
                    heads.dim as c_int,
                    heads.window as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }
}

fn check_heads(op: &dyn Fn() -> String, heads: Heads) -> Result<()> {
    let grouped = heads.kv > 0 && heads.q > 0 && heads.q.is_multiple_of(heads.kv) && heads.q < 1 << 12;
    require(grouped, op, "query heads must be a multiple of key heads")?;
    require(matches!(heads.dim, 64 | 128), op, "heads must be 64 or 128 wide")?;
    require(heads.window < 1 << 30, op, "the window must be below 2^30")
}

fn check_rotation(op: &dyn Fn() -> String, rotation: Rotation, n: usize, positions: usize) -> Result<()> {
    let dim = rotation.head_dim;
    let valid = dim >= 16 && dim.is_power_of_two() && rotation.columns <= n && rotation.columns.is_multiple_of(dim);
    require(valid, op, "rotated columns must be whole heads, their width a power of two and at least 16")?;
    require(rotation.columns == 0 || rotation.table.len() >= positions * dim, op, "the table has too few positions")
}
