//! One new row: matrix-vector products, attention over a cache, and the head norms of Qwen3.

use super::*;

impl CudaDevice {
    /// `out = a weight^T`, fp32 `[n]`, for a row `a` `[k]`.
    ///
    /// # Errors
    /// As [`CudaDevice::rms_norm`].
    pub fn gemv_logits(
        &self,
        out: &mut CudaSlice<f32>,
        a: &CudaSlice<bf16>,
        weight: &CudaSlice<bf16>,
        n: usize,
        k: usize,
    ) -> Result<()> {
        let op = || format!("gemv_logits [{n}, {k}]");
        let valid = n.is_multiple_of(16) && k.is_multiple_of(8) && n < 1 << 24 && k < 1 << 24;
        require(valid, op, "n must be a multiple of 16 and k of 8, both below 2^24")?;
        require(out.len() >= n && a.len() >= k && weight.len() >= n * k, op, "a buffer is smaller than its shape")?;
        // SAFETY: as in `rms_norm`.
        check(
            unsafe {
                ffi::gleaner_gemv_logits(
                    self.address_mut(out) as *mut f32,
                    self.address(a),
                    self.address(weight),
                    n as c_int,
                    k as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }

    /// `x += a weight^T + bias` for one row.
    ///
    /// # Errors
    /// As [`CudaDevice::rms_norm`].
    pub fn gemv_residual(&self, x: &mut CudaSlice<bf16>, a: &CudaSlice<bf16>, linear: &DeviceLinear) -> Result<()> {
        let op = || format!("gemv_residual [{}, {}]", linear.n, linear.k);
        self.check_linear(&op, x.len(), a.len(), linear, 1)?;
        // SAFETY: as in `rms_norm`, with the shapes that `check_linear` checked.
        check(
            unsafe {
                ffi::gleaner_gemv_residual(
                    self.address_mut(x),
                    self.address(a),
                    self.address(&linear.weight),
                    self.bias(linear),
                    linear.n as c_int,
                    linear.k as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }

    /// [`CudaDevice::gemm_swiglu`] for one row.
    ///
    /// # Errors
    /// As [`CudaDevice::rms_norm`].
    pub fn gemv_swiglu(&self, out: &mut CudaSlice<bf16>, a: &CudaSlice<bf16>, linear: &DeviceLinear) -> Result<()> {
        let op = || format!("gemv_swiglu [{}, {}]", linear.n, linear.k);
        self.check_linear(&op, out.len() * 2, a.len(), linear, 1)?;
        // SAFETY: as in `rms_norm`, with the shapes that `check_linear` checked.
        check(
            unsafe {
                ffi::gleaner_gemv_swiglu(
                    self.address_mut(out),
                    self.address(a),
                    self.address(&linear.weight),
                    self.bias(linear),
                    linear.n as c_int,
                    linear.k as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }

    /// [`CudaDevice::gemm_rope`] for one row `a`, written to row `position` of `out`; `position` is a device integer
    /// below the rows of `out` and of the table.
    ///
    /// # Errors
    /// As [`CudaDevice::rms_norm`].
    pub fn gemv_rope(
        &self,
        out: &mut CudaSlice<bf16>,
        a: &CudaSlice<bf16>,
        linear: &DeviceLinear,
        rotation: Rotation,
        position: Shift,
    ) -> Result<()> {
        let op = || format!("gemv_rope [{}, {}]", linear.n, linear.k);
        self.check_linear(&op, out.len(), a.len(), linear, 1)?;
        check_rotation(&op, rotation, linear.n, out.len() / linear.n)?;
        let position = self.shift(Some(position))?;
        // SAFETY: as in `rms_norm`; the caller keeps the position below the rows of `out`, of which the table has as
        // many positions (checked above).
        check(
            unsafe {
                ffi::gleaner_gemv_rope(
                    self.address_mut(out),
                    self.address(a),
                    self.address(&linear.weight),
                    self.bias(linear),
                    self.address(rotation.table),
                    position,
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

    /// The row at `position` of `qkv` over the rows up to it: `out` is `[q * dim]`.
    ///
    /// # Errors
    /// As [`CudaDevice::attention`].
    pub fn decode_attention(
        &self,
        out: &mut CudaSlice<bf16>,
        qkv: &CudaSlice<bf16>,
        heads: Heads,
        position: Shift,
    ) -> Result<()> {
        let op = || format!("decode_attention [{} of {} heads of {}]", heads.q, heads.kv, heads.dim);
        check_heads(&op, heads)?;
        require(out.len() >= heads.q * heads.dim, op, "the output is smaller than a row")?;
        let position = self.shift(Some(position))?;
        // SAFETY: as in `rms_norm`; the caller keeps the position below the rows of `qkv`.
        check(
            unsafe {
                ffi::gleaner_decode_attention(
                    self.address_mut(out),
                    self.address(qkv),
                    position,
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

    /// Qwen3, in place: normalises the first `q + k` heads of each row of `x` `[*, stride]`, the first `q` with
    /// `norms[0]`, the others with `norms[1]`, and rotates them by their row, `first_row + row`, plus `row_start`.
    ///
    /// # Errors
    /// As [`CudaDevice::rms_norm`].
    #[allow(clippy::too_many_arguments, reason = "rows, shifts and shape are one launch's contract")]
    pub fn head_norm(
        &self,
        x: &mut CudaSlice<bf16>,
        norms: &[CudaSlice<bf16>; 2],
        rotation: Rotation,
        (q, k): (usize, usize),
        stride: usize,
        rows: Rows,
        first_row: Option<Shift>,
        row_start: Option<Shift>,
        eps: f32,
    ) -> Result<()> {
        let dim = rotation.head_dim;
        let op = || format!("head_norm [{}, {} heads of {dim}]", rows.max, q + k);
        require(dim > 0 && dim.is_multiple_of(16) && (q + k) * dim <= stride, op, "heads must fit a row")?;
        require(x.len() >= rows.max * stride && rows.max < 1 << 20, op, "a buffer is smaller than its rows")?;
        require(norms.iter().all(|norm| norm.len() >= dim), op, "a norm is smaller than a head")?;
        require(rotation.table.len() >= rows.max * dim, op, "the table has too few positions")?;
        let (count, first_row, row_start) = (self.count(rows)?, self.shift(first_row)?, self.shift(row_start)?);
        // SAFETY: as in `rms_norm`; the caller keeps shifted rows and positions within `x` and the table.
        check(
            unsafe {
                ffi::gleaner_head_norm(
                    self.address_mut(x),
                    self.address(&norms[0]),
                    self.address(&norms[1]),
                    self.address(rotation.table),
                    count,
                    row_start,
                    first_row,
                    rows.max as c_int,
                    stride as c_int,
                    q as c_int,
                    (q + k) as c_int,
                    dim as c_int,
                    eps,
                    self.raw_stream(),
                )
            },
            op,
        )
    }
}
