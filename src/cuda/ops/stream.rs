//! The residual stream of a step's rows: where it begins, and a row of it as it is.

use super::*;

/// The residual stream x of some rows, as what the products behind it are made of: times the weights of the norm that comes
/// next, where a weight nearer to zero than 2^-60 counts as that. In fp32, of which half of the bits lie elsewhere.
pub struct Residual {
    /// That, to the nearest bf16, `[rows, width]`.
    pub scaled: CudaSlice<bf16>,
    /// What it lacks, `[rows, width]`: the bits of the fp32 are those of `scaled` followed by these, less 0x8000.
    pub rest: CudaSlice<u16>,
    /// Sums of the squares of x by parts of a row, for the norm. Which parts is up to the kernels: from one `embed` to the next, a
    /// stream is for Hopper's alone or for the portable ones alone. Those that no op has written must be zero.
    pub squares: CudaSlice<f32>,
}

const _: () = assert!(memory::squares(ffi::GLEANER_SQUARES_COLUMNS as usize) == ffi::GLEANER_SQUARES_SLOTS as usize);

impl Residual {
    /// Elements of its buffers for so many rows.
    pub(in crate::cuda) fn lens(rows: usize, width: usize) -> [usize; 3] {
        [rows * width, rows * width, rows * memory::squares(width)]
    }

    /// For so many rows of `width` columns, zero.
    ///
    /// # Errors
    /// [`Error::Cuda`], out of memory among them.
    pub fn new(device: &CudaDevice, rows: usize, width: usize) -> Result<Residual> {
        Residual::allocate(&mut Allocator::new(device), Residual::lens(rows, width))
    }

    pub(in crate::cuda) fn allocate(
        allocator: &mut Allocator,
        [scaled, rest, squares]: [usize; 3],
    ) -> Result<Residual> {
        Ok(Residual {
            scaled: allocator.zeros(scaled)?,
            rest: allocator.zeros(rest)?,
            squares: allocator.zeros(squares)?,
        })
    }
}

/// Weights of the norms that a residual stream is scaled with, each `[width]`.
#[derive(Clone, Copy)]
pub struct Scaling<'a> {
    /// Before an op.
    pub from: &'a CudaSlice<bf16>,
    /// From then on: those of the norm that comes next.
    pub to: &'a CudaSlice<bf16>,
}

/// The residual stream behind the norm whose weights it was scaled with.
#[derive(Clone, Copy)]
pub struct Normed<'a> {
    /// As the op before left it.
    pub residual: &'a Residual,
    /// Added to the mean square.
    pub eps: f32,
}

impl CudaDevice {
    /// Checks a stream, and the weights that it is scaled with, against its shape.
    pub(super) fn check_residual(
        &self,
        op: &dyn Fn() -> String,
        residual: &Residual,
        norm: &CudaSlice<bf16>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        let lens = Residual::lens(rows, width);
        let fits =
            [residual.scaled.len(), residual.rest.len(), residual.squares.len()].iter().zip(lens).all(|(a, b)| *a >= b);
        require(fits, op, "the residual stream has fewer rows")?;
        require(norm.len() >= width, op, "the norm is narrower than the residual stream")
    }

    /// The residual stream of a prompt from token `first` on: the rows of `embedding` `[vocab_size, width]` of its ids, which
    /// must be below `vocab_size`. `norm` `[width]` is the weight of the norm that comes next.
    ///
    /// # Errors
    /// [`Error::Cuda`] if a buffer is too small, `width` is not a multiple of 8, or the launch fails.
    #[allow(clippy::too_many_arguments, reason = "operands of one op")]
    pub fn embed(
        &self,
        residual: &mut Residual,
        prompt: &CudaSlice<u32>,
        embedding: &CudaSlice<bf16>,
        norm: &CudaSlice<bf16>,
        rows: Rows,
        first: Option<Shift>,
        width: usize,
    ) -> Result<()> {
        let op = || format!("embed [{}, {width}]", rows.max);
        let valid = width > 0 && width.is_multiple_of(8) && width < 1 << 20 && rows.max <= MAX_ROWS;
        require(valid, op, "the width must be a multiple of 8 below 1048576, with fewer than 1048576 rows")?;
        self.check_residual(&op, residual, norm, rows.max, width)?;
        require(prompt.len() >= rows.max && embedding.len() >= width, op, "a buffer is smaller than its rows")?;
        let (count, first) = (self.count(rows)?, self.shift(first)?);
        // Read in bf16, written in fp32.
        let _kernel = self.kernel("embed", "", rows.max, Work::Elementwise { width: width / 2 * 3 });
        // SAFETY: the buffers live on this stream's device and hold the rows that the kernel touches (checked above);
        // allocations are aligned to 256 bytes, so rows of a multiple of 8 elements are aligned for 16-byte loads. Ids were
        // checked against the embedding when the plan or prompt was validated.
        check(
            unsafe {
                ffi::gleaner_embed(
                    self.address_mut(&mut residual.scaled),
                    self.address_mut(&mut residual.rest),
                    self.address_mut(&mut residual.squares) as *mut f32,
                    self.address(prompt) as *const u32,
                    self.address(embedding),
                    self.address(norm),
                    count,
                    first,
                    rows.max as c_int,
                    width as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }

    /// Row `row` of the residual stream as it is, `[width]`, where `norm` `[width]` is what it is scaled with.
    ///
    /// # Errors
    /// [`Error::Cuda`] if a buffer is too small, `width` is odd, or the launch fails.
    pub fn stream_row(
        &self,
        x: &mut CudaSlice<f32>,
        residual: &Residual,
        norm: &CudaSlice<bf16>,
        row: usize,
        width: usize,
    ) -> Result<()> {
        let op = || format!("stream_row {row} of [*, {width}]");
        let valid = width > 0 && width.is_multiple_of(2) && width < 1 << 20 && row < MAX_ROWS;
        require(valid, op, "the width must be even and below 1048576, the row below 1048575")?;
        self.check_residual(&op, residual, norm, row + 1, width)?;
        require(x.len() >= width, op, "the row is narrower than the residual stream")?;
        let _kernel = self.kernel("stream_row", "", 1, Work::Uncounted);
        // SAFETY: as in `embed`.
        check(
            unsafe {
                ffi::gleaner_stream_row(
                    self.address_mut(x) as *mut f32,
                    self.address(&residual.scaled),
                    self.address(&residual.rest),
                    self.address(norm),
                    row as c_int,
                    width as c_int,
                    self.raw_stream(),
                )
            },
            op,
        )
    }
}
