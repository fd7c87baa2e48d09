//! One new row: matrix-vector products, attention over a cache, and the head norms of Qwen3.

use cudarc::driver::PinnedHostSlice;

use super::*;
use crate::cuda::device::{Allocator, driver_error};
use crate::cuda::memory::ATTENTION_SPLITS;
use crate::reader::Sampling;

/// An RMSNorm: `[hidden_size]` and what is added to the mean square.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// `[hidden_size]`
    pub weight: &'a CudaSlice<bf16>,
    /// Added to the mean square.
    pub eps: f32,
}

pub(super) fn check_norm(op: &dyn Fn() -> String, norm: Norm, k: usize) -> Result<()> {
    // A row in fp32 must fit the shared memory of any GPU: 99 KiB.
    require(norm.weight.len() == k && k <= 24 << 10, op, "the norm must be as wide as the row, at most 24576")
}

/// What the parts of a row's attention leave for their joining.
pub struct AttentionParts {
    parts: CudaSlice<f32>,
    done: CudaSlice<i32>,
}

impl AttentionParts {
    /// Elements of its two buffers.
    pub(in crate::cuda) fn lens(q: usize, dim: usize) -> [usize; 2] {
        [q * ATTENTION_SPLITS * (dim + 2), q]
    }

    /// For layers of so many heads.
    ///
    /// # Errors
    /// [`Error::Cuda`], out of memory among them.
    pub fn new(device: &CudaDevice, heads: Heads) -> Result<AttentionParts> {
        AttentionParts::allocate(&mut Allocator::new(device), heads)
    }

    pub(in crate::cuda) fn allocate(allocator: &mut Allocator, heads: Heads) -> Result<AttentionParts> {
        let [parts, done] = AttentionParts::lens(heads.q, heads.dim);
        Ok(AttentionParts { parts: allocator.zeros(parts)?, done: allocator.zeros(done)? })
    }
}

/// Host memory that the device writes tokens to, slot after slot, by turns.
pub struct Sent {
    memory: PinnedHostSlice<u32>,
    /// Its address, the same on the device. Asking for it again would wait, which a recording forbids.
    address: usize,
}

impl Sent {
    /// # Errors
    /// [`Error::Cuda`] if memory cannot be pinned.
    pub fn new(device: &CudaDevice, slots: usize) -> Result<Sent> {
        let failed = |error| driver_error("pinning memory", error);
        // SAFETY: the memory comes from the driver with some content, and any bits are an integer.
        let memory: PinnedHostSlice<u32> =
            unsafe { device.stream().context().alloc_pinned_with_flags(slots, 0) }.map_err(failed)?;
        let address = memory.as_ptr().map_err(failed)? as usize;
        Ok(Sent { memory, address })
    }

    /// The token of this index, once the device has written it, and until it writes the one `slots` later.
    pub fn token(&self, index: usize) -> u32 {
        let slot = index % self.memory.len();
        // SAFETY: the slot lies within the memory, which lives as long as this; the device may write it at any time.
        unsafe { (self.address as *const u32).add(slot).read_volatile() }
    }
}

/// Where a sampled token goes.
pub struct Sampled<'a> {
    /// Its row of the embedding, `[hidden_size]`.
    pub x: &'a mut CudaSlice<f32>,
    /// See [`answer`].
    pub answer: &'a mut CudaSlice<i32>,
    /// For the host.
    pub sent: &'a Sent,
}

/// What a token is sampled from.
pub struct Logits<'a> {
    /// `[vocab_size]`
    pub logits: &'a CudaSlice<f32>,
    /// As [`CudaDevice::gemv_logits`] leaves it.
    pub best: &'a mut CudaSlice<u64>,
    /// `[vocab_size, hidden_size]`
    pub embedding: &'a CudaSlice<bf16>,
}

/// Written by the device where a logit is not a number or infinite.
pub const NO_TOKEN: u32 = ffi::GLEANER_NO_TOKEN;

/// Integers of an answer's state, and which of them is the position of its last token.
pub mod answer {
    use super::ffi::GleanerAnswer;
    use std::mem::offset_of;

    /// Position of the last token.
    pub const POSITION: usize = offset_of!(GleanerAnswer, position) / 4;
    /// Number of tokens.
    pub const TOKENS: usize = offset_of!(GleanerAnswer, tokens) / 4;
    /// Number of integers.
    pub const LEN: usize = size_of::<GleanerAnswer>() / 4;
}

/// A `GleanerSampling` as the words that are copied to the device.
pub fn sampling_words(sampling: &Sampling) -> [u64; 2] {
    const _: () = assert!(size_of::<ffi::GleanerSampling>() == 16);
    [bytemuck::cast([sampling.temperature, sampling.top_p]), sampling.seed]
}

impl CudaDevice {
    /// `out = norm(x) weight^T`, fp32 `[n]`, for a row `x` `[k]`; `best`, which must be 0, becomes the likeliest of the
    /// first `vocab_size` tokens, for [`CudaDevice::sample`].
    ///
    /// # Errors
    /// As [`CudaDevice::embed`].
    pub fn gemv_logits(
        &self,
        out: &mut CudaSlice<f32>,
        best: &mut CudaSlice<u64>,
        x: &CudaSlice<f32>,
        norm: Norm,
        weight: &CudaSlice<bf16>,
        [vocab_size, n]: [usize; 2],
    ) -> Result<()> {
        let k = norm.weight.len();
        let op = || format!("gemv_logits [{n}, {k}]");
        let valid = n > 0 && n.is_multiple_of(16) && k.is_multiple_of(8) && n < 1 << 24 && vocab_size <= n;
        require(valid, op, "n must be a multiple of 16 below 2^24, k of 8, and the vocabulary not larger than n")?;
        require(!best.is_empty(), op, "there is no room for the likeliest token")?;
        require(out.len() >= n && x.len() >= k && weight.len() >= n * k, op, "a buffer is smaller than its shape")?;
        check_norm(&op, norm, k)?;
        let _kernel = self.kernel("gemv_logits", "", 1, Work::fp32_product(n, k));
        // SAFETY: as in `embed`.
        check(
            unsafe {
                ffi::gleaner_gemv_logits(
                    self.address_mut(out) as *mut f32,
                    self.address_mut(best) as *mut u64,
                    self.address(x) as *const f32,
                    self.address(norm.weight),
                    self.address(weight),
                    norm.eps,
                    vocab_size as c_int,
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
    /// As [`CudaDevice::embed`].
    pub fn gemv_residual(&self, x: &mut CudaSlice<f32>, a: &CudaSlice<bf16>, linear: &DeviceLinear) -> Result<()> {
        let op = || format!("gemv_residual [{}, {}]", linear.n, linear.k);
        self.check_linear(&op, x.len(), a.len(), linear, 1)?;
        let _kernel = self.kernel("gemv_residual", linear.role, 1, Work::residual(linear.n, linear.k));
        // SAFETY: as in `embed`, with the shapes that `check_linear` checked.
        check(
            unsafe {
                ffi::gleaner_gemv_residual(
                    self.address_mut(x) as *mut f32,
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

    /// [`CudaDevice::gemm_swiglu`] for one row, which is normalised first.
    ///
    /// # Errors
    /// As [`CudaDevice::embed`].
    pub fn gemv_swiglu(
        &self,
        out: &mut CudaSlice<bf16>,
        x: &CudaSlice<f32>,
        norm: Norm,
        linear: &DeviceLinear,
    ) -> Result<()> {
        let op = || format!("gemv_swiglu [{}, {}]", linear.n, linear.k);
        self.check_linear(&op, out.len() * 2, x.len(), linear, 1)?;
        check_norm(&op, norm, linear.k)?;
        let _kernel = self.kernel("gemv_swiglu", linear.role, 1, Work::swiglu(linear.n, linear.k));
        // SAFETY: as in `embed`, with the shapes that `check_linear` checked.
        check(
            unsafe {
                ffi::gleaner_gemv_swiglu(
                    self.address_mut(out),
                    self.address(x) as *const f32,
                    self.address(norm.weight),
                    self.address(&linear.weight),
                    self.bias(linear),
                    norm.eps,
                    linear.n as c_int,
                    linear.k as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }

    /// [`CudaDevice::gemm_rope`] for one row `x`, which is normalised first, written to row `position` of `out`; `position` is
    /// a device integer below the rows of `out` and of the table.
    ///
    /// # Errors
    /// As [`CudaDevice::embed`].
    pub fn gemv_rope(
        &self,
        out: &mut CudaSlice<bf16>,
        x: &CudaSlice<f32>,
        norm: Norm,
        linear: &DeviceLinear,
        rotation: Rotation,
        position: Shift,
    ) -> Result<()> {
        let op = || format!("gemv_rope [{}, {}]", linear.n, linear.k);
        self.check_linear(&op, out.len(), x.len(), linear, 1)?;
        check_rotation(&op, rotation, linear.n, out.len() / linear.n)?;
        check_norm(&op, norm, linear.k)?;
        let position = self.shift(Some(position))?;
        let _kernel = self.kernel("gemv_rope", linear.role, 1, Work::product(linear.n, linear.k));
        // SAFETY: as in `embed`; the caller keeps the position below the rows of `out`, of which the table has as
        // many positions (checked above).
        check(
            unsafe {
                ffi::gleaner_gemv_rope(
                    self.address_mut(out),
                    self.address(x) as *const f32,
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

    /// The row at `position` of `qkv` over the rows up to it: `out` is `[q * dim]`.
    ///
    /// # Errors
    /// As [`CudaDevice::attention`].
    pub fn decode_attention(
        &self,
        out: &mut CudaSlice<bf16>,
        parts: &mut AttentionParts,
        qkv: &CudaSlice<bf16>,
        heads: Heads,
        position: Shift,
    ) -> Result<()> {
        let op = || format!("decode_attention [{} of {} heads of {}]", heads.q, heads.kv, heads.dim);
        check_heads(&op, heads)?;
        require(out.len() >= heads.q * heads.dim, op, "the output is smaller than a row")?;
        let lens = AttentionParts::lens(heads.q, heads.dim);
        require(parts.parts.len() >= lens[0] && parts.done.len() >= lens[1], op, "the parts are for fewer heads")?;
        let max_rows = (qkv.len() / heads.qkv_columns()).min(MAX_ROWS);
        let position = self.shift(Some(position))?;
        let Heads { q, kv, dim, window } = heads;
        let work = Work::DecodeAttention { q_dim: q * dim, kv_dim: kv * dim, window, out: 0 };
        let _kernel = self.kernel("decode_attention", "", max_rows, work);
        // SAFETY: as in `embed`; the caller keeps the position below the rows of `qkv`.
        check(
            unsafe {
                ffi::gleaner_decode_attention(
                    self.address_mut(out),
                    self.address_mut(&mut parts.parts) as *mut f32,
                    self.address_mut(&mut parts.done) as *mut i32,
                    self.address(qkv),
                    position,
                    max_rows as c_int,
                    ATTENTION_SPLITS as c_int,
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

    /// The next token of an answer, from `logits` `[vocab_size]` and the likeliest of them, which is set to 0 again: for the
    /// host, into `sent`; its row of `embedding` `[vocab_size, hidden_size]` into `x`. The answer grows by it.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn sample(&self, out: Sampled, input: Logits, sampling: &CudaSlice<u64>, vocab_size: usize) -> Result<()> {
        let Sampled { x, answer, sent } = out;
        let Logits { logits, best, embedding } = input;
        let hidden_size = x.len();
        let op = || format!("sample [{vocab_size}, {hidden_size}]");
        require(vocab_size > 0 && vocab_size < 1 << 24, op, "a vocabulary has from 1 to 2^24 - 1 tokens")?;
        require(hidden_size.is_multiple_of(8) && hidden_size < 1 << 20, op, "hidden_size must be a multiple of 8")?;
        let fits = answer.len() >= size_of::<ffi::GleanerAnswer>() / 4
            && sampling.len() >= size_of::<ffi::GleanerSampling>() / 8
            && logits.len() >= vocab_size
            && embedding.len() >= vocab_size * hidden_size
            && !best.is_empty();
        require(fits && !sent.memory.is_empty(), op, "a buffer is too small")?;
        let _kernel = self.kernel("sample", "", 1, Work::Uncounted);
        // SAFETY: the buffers hold what the kernel touches (checked above). Pinned memory has the same address on the
        // device.
        check(
            unsafe {
                ffi::gleaner_sample(
                    self.address_mut(x) as *mut f32,
                    self.address_mut(answer) as *mut ffi::GleanerAnswer,
                    sent.address as *mut u32,
                    self.address_mut(best) as *mut u64,
                    self.address(logits) as *const f32,
                    self.address(sampling) as *const ffi::GleanerSampling,
                    self.address(embedding),
                    sent.memory.len() as c_int,
                    vocab_size as c_int,
                    hidden_size as c_int,
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
    /// As [`CudaDevice::embed`].
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
        let _kernel = self.kernel("head_norm", "", rows.max, Work::Elementwise { width: (q + k) * dim });
        // SAFETY: as in `embed`; the caller keeps shifted rows and positions within `x` and the table.
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
