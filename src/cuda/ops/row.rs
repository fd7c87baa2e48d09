//! One new row on Hopper, three kernels a layer: between them its residual stream lies in fixed point.

use super::decode::check_norm;
use super::*;

/// The residual stream of one row, in units of 2^-32, so that a sum does not depend on the order of its terms.
pub struct FixedRow(CudaSlice<i64>);

impl FixedRow {
    /// For `width` columns.
    ///
    /// # Errors
    /// [`Error::Cuda`], out of memory among them.
    pub fn new(device: &CudaDevice, width: usize) -> Result<FixedRow> {
        FixedRow::allocate(&mut Allocator::new(device), memory::fixed_row(width))
    }

    pub(in crate::cuda) fn allocate(allocator: &mut Allocator, len: usize) -> Result<FixedRow> {
        Ok(FixedRow(allocator.zeros(len)?))
    }
}

/// An intermediate size for ops that have none.
const SMALLEST: usize = 8;

/// Width of the heads that there is a kernel for.
const HEAD_DIM: usize = 64;

impl CudaDevice {
    /// Whether these kernels serve rows of so many columns, an intermediate size of so many and heads so wide.
    pub fn has_row_kernels(&self, width: usize, intermediate: usize, head_dim: usize) -> bool {
        // SAFETY: takes any integers.
        self.runs_hopper_kernels()
            && width < 1 << 20
            && intermediate < 1 << 20
            && head_dim < 1 << 20
            && unsafe { ffi::gleaner_row_sm90_fits(width as c_int, intermediate as c_int, head_dim as c_int) } == 1
    }

    fn check_row(&self, op: &dyn Fn() -> String, row: &FixedRow, width: usize, intermediate: usize) -> Result<()> {
        require(
            self.has_row_kernels(width, intermediate, HEAD_DIM),
            op,
            "this GPU has no kernels for a row of these sizes",
        )?;
        require(row.0.len() >= memory::fixed_row(width), op, "the row has fewer columns")
    }

    /// `row = x`.
    ///
    /// # Errors
    /// As [`CudaDevice::embed`].
    pub fn row_start(&self, row: &mut FixedRow, x: &CudaSlice<f32>) -> Result<()> {
        let width = x.len();
        let op = || format!("row_start [{width}]");
        self.check_row(&op, row, width, SMALLEST)?;
        let _kernel = self.kernel("row_start", "", 1, Work::Uncounted);
        // SAFETY: as in `embed`, with the shapes that `check_row` checked.
        check(
            unsafe {
                ffi::gleaner_row_sm90_start(
                    self.address_mut(&mut row.0) as *mut i64,
                    self.address(x) as *const f32,
                    width as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }

    /// `x = row`.
    ///
    /// # Errors
    /// As [`CudaDevice::embed`].
    pub fn row_end(&self, x: &mut CudaSlice<f32>, row: &FixedRow) -> Result<()> {
        let width = x.len();
        let op = || format!("row_end [{width}]");
        self.check_row(&op, row, width, SMALLEST)?;
        let _kernel = self.kernel("row_end", "", 1, Work::Uncounted);
        // SAFETY: as in `row_start`.
        check(
            unsafe {
                ffi::gleaner_row_sm90_end(
                    self.address_mut(x) as *mut f32,
                    self.address(&row.0) as *const i64,
                    width as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }

    /// The row at `position` of `out` `[*, n]`, as [`CudaDevice::gemv_rope`] makes it, from a row in fixed point.
    ///
    /// # Errors
    /// As [`CudaDevice::embed`].
    pub fn row_qkv(
        &self,
        out: &mut CudaSlice<bf16>,
        row: &FixedRow,
        norm: Norm,
        linear: &DeviceLinear,
        rotation: Rotation,
        position: Shift,
    ) -> Result<()> {
        let op = || format!("row_qkv [{}, {}]", linear.n, linear.k);
        self.check_row(&op, row, linear.k, SMALLEST)?;
        self.check_linear(&op, out.len(), linear.k, linear, 1)?;
        check_rotation(&op, rotation, linear.n, out.len() / linear.n)?;
        check_norm(&op, norm, linear.k)?;
        let position = self.shift(Some(position))?;
        let _kernel = self.kernel("row_qkv", linear.role, 1, Work::product(linear.n, linear.k));
        // SAFETY: as in `gemv_rope`.
        check(
            unsafe {
                ffi::gleaner_row_sm90_qkv(
                    self.address_mut(out),
                    self.address(&row.0) as *const i64,
                    self.address(norm.weight),
                    self.address(&linear.weight),
                    self.bias(linear),
                    self.address(rotation.table),
                    position,
                    norm.eps,
                    linear.n as c_int,
                    linear.k as c_int,
                    rotation.head_dim as c_int,
                    rotation.columns as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }

    /// Adds to the row what `o` makes of the attention of the row at `position` of `qkv` over the rows up to it. The kernel
    /// reads the position and the rows before it while the one before it still runs.
    ///
    /// # Errors
    /// As [`CudaDevice::attention`].
    pub fn row_attention(
        &self,
        row: &mut FixedRow,
        qkv: &CudaSlice<bf16>,
        o: &DeviceLinear,
        heads: Heads,
        position: Shift,
    ) -> Result<()> {
        let op = || format!("row_attention [{} of {} heads of {}, {}]", heads.q, heads.kv, heads.dim, o.n);
        let Heads { q, kv, dim, window } = heads;
        check_heads(&op, heads)?;
        require(dim == HEAD_DIM, op, "heads must be 64 wide")?;
        self.check_row(&op, row, o.n, SMALLEST)?;
        self.check_linear(&op, o.n, q * dim, o, 1)?;
        require(o.k == q * dim, op, "the weight must be as wide as the heads")?;
        let max_rows = (qkv.len() / heads.qkv_columns()).min(MAX_ROWS);
        let position = self.shift(Some(position))?;
        let work = Work::DecodeAttention { q_dim: q * dim, kv_dim: kv * dim, window, out: o.n };
        let _kernel = self.kernel("row_attention", "", max_rows, work);
        // SAFETY: as in `embed`; the caller keeps the position below the rows of `qkv`.
        check(
            unsafe {
                ffi::gleaner_row_sm90_attention(
                    self.address_mut(&mut row.0) as *mut i64,
                    self.address(qkv),
                    self.address(&o.weight),
                    self.bias(o),
                    position,
                    q as c_int,
                    kv as c_int,
                    window as c_int,
                    o.n as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }

    /// Adds to the row what `down` makes of `silu(gate) * up` of the normalised row; the rows of `gate_up` come as 8 of the
    /// gate, 8 of up, and so on.
    ///
    /// # Errors
    /// As [`CudaDevice::embed`].
    pub fn row_mlp(&self, row: &mut FixedRow, norm: Norm, gate_up: &DeviceLinear, down: &DeviceLinear) -> Result<()> {
        let (width, intermediate) = (down.n, down.k);
        let op = || format!("row_mlp [{width}, {intermediate}]");
        self.check_row(&op, row, width, intermediate)?;
        self.check_linear(&op, gate_up.n, width, gate_up, 1)?;
        self.check_linear(&op, width, intermediate, down, 1)?;
        require(gate_up.n == 2 * intermediate && gate_up.k == width, op, "gate and up do not fit down")?;
        check_norm(&op, norm, width)?;
        let _kernel = self.kernel("row_mlp", "", 1, Work::product(3 * intermediate, width));
        // SAFETY: as in `embed`, with the shapes that `check_linear` checked.
        check(
            unsafe {
                ffi::gleaner_row_sm90_mlp(
                    self.address_mut(&mut row.0) as *mut i64,
                    self.address(norm.weight),
                    self.address(&gate_up.weight),
                    self.bias(gate_up),
                    self.address(&down.weight),
                    self.bias(down),
                    norm.eps,
                    width as c_int,
                    intermediate as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }
}
