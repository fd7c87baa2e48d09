//! Weights on their way to the device: converted and ordered while they are copied from the mapped files into two pinned
//! buffers by turns, so that one is filled while the other travels.

use cudarc::driver::{CudaEvent, CudaSlice, DriverError, PinnedHostSlice};
use half::bf16;

use super::CudaDevice;
use super::device::{Allocator, driver_error};
use super::layout::Matrix;
use crate::{Error, Result};

/// Elements of a pinned buffer: 16 MiB.
const BUFFER: usize = 8 << 20;

const WHAT: &str = "copying weights to the GPU";

struct Buffer {
    memory: PinnedHostSlice<bf16>,
    /// Recorded behind the last copy from it.
    copied: CudaEvent,
}

/// The way of a model's weights to the device.
pub struct Staging<'a> {
    device: &'a CudaDevice,
    allocator: Allocator<'a>,
    buffers: [Buffer; 2],
    /// Which of them is being filled, and how much of it is.
    current: usize,
    filled: usize,
}

impl<'a> Staging<'a> {
    /// # Errors
    /// [`Error::Cuda`] if memory cannot be pinned.
    pub fn new(device: &'a CudaDevice) -> Result<Staging<'a>> {
        let buffer = || pinned_buffer(device).map_err(failed);
        Ok(Staging {
            device,
            allocator: Allocator::new(device),
            buffers: [buffer()?, buffer()?],
            current: 0,
            filled: 0,
        })
    }

    /// The matrix on the device, with rows of zeros behind it up to `rows`. The copies may still be on their way.
    ///
    /// # Errors
    /// [`Error::Cuda`], out of memory among them.
    pub fn upload(&mut self, matrix: &Matrix, rows: usize) -> Result<CudaSlice<bf16>> {
        let mut out = self.allocator.zeros(rows * matrix.width())?;
        let mut done = 0;
        while done < matrix.elements() {
            if self.filled == BUFFER {
                self.turn().map_err(failed)?;
            }
            let len = (BUFFER - self.filled).min(matrix.elements() - done);
            let memory = self.buffers[self.current].memory.as_mut_slice().map_err(failed)?;
            // Of this part of the buffer no copy is on its way: `turn` waited for those of its last round.
            let piece = &mut memory[self.filled..self.filled + len];
            matrix.fill(done, piece);
            self.device.upload_into(WHAT, piece, &mut out.slice_mut(done..done + len))?;
            self.filled += len;
            done += len;
        }
        Ok(out)
    }

    /// Goes over to the other buffer, once the copies from it are done.
    fn turn(&mut self) -> std::result::Result<(), DriverError> {
        self.buffers[self.current].copied.record(self.device.stream())?;
        self.current = 1 - self.current;
        self.filled = 0;
        // An event that was never recorded is not waited for.
        self.buffers[self.current].copied.synchronize()
    }

    /// Waits for all copies and checks that they took `planned` bytes.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn finish(self, planned: u64) -> Result<()> {
        self.device.synchronize()?;
        self.allocator.check(planned, "the weights")
    }
}

impl Drop for Staging<'_> {
    /// The buffers must outlive the copies from them, also where an error ended the loading.
    fn drop(&mut self) {
        // What failed, the failing call or the next one says.
        let _ = self.device.synchronize();
    }
}

fn failed(error: DriverError) -> Error {
    driver_error(WHAT, error)
}

#[allow(unsafe_code)]
fn pinned_buffer(device: &CudaDevice) -> std::result::Result<Buffer, DriverError> {
    let context = device.stream().context();
    // SAFETY: the memory comes from the driver with some content, and any bits are a bf16; each element is written before
    // it is copied.
    let memory = unsafe { context.alloc_pinned_with_flags(BUFFER, 0) }?;
    Ok(Buffer { memory, copied: context.new_event(None)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::layout::{RowOrder, tests::counting};

    /// More than both buffers hold, with small matrices before and behind it, as layers have them.
    #[test]
    #[ignore = "needs a GPU"]
    fn what_arrives_is_what_was_stored() {
        let device = CudaDevice::open(0).unwrap();
        let (rows, width) = (6400, 3001);
        assert!(rows * width > 2 * BUFFER);
        let shapes: [&[usize]; 3] = [&[rows / 2, width], &[rows / 2, width], &[77]];
        let tensors = counting(&shapes);
        let large = Matrix::new(vec![&tensors[0], &tensors[1]], RowOrder::gate_up(rows / 2));
        let small = Matrix::new(vec![&tensors[2]], RowOrder::STORED);
        let mut staging = Staging::new(&device).unwrap();
        let mut on_device = Vec::new();
        for _ in 0..2 {
            on_device.push((staging.upload(&small, 80).unwrap(), &small, 80));
            on_device.push((staging.upload(&large, rows).unwrap(), &large, rows));
        }
        let bytes = on_device.iter().map(|(slice, ..)| slice.num_bytes() as u64).sum();
        staging.finish(bytes).unwrap();
        for (slice, matrix, rows) in on_device {
            let mut expected = vec![bf16::ZERO; rows * matrix.width()];
            matrix.fill(0, &mut expected[..matrix.elements()]);
            let arrived = device.stream().clone_dtoh(&slice).unwrap();
            device.synchronize().unwrap();
            assert!(arrived.iter().map(|value| value.to_bits()).eq(expected.iter().map(|value| value.to_bits())));
        }
    }
}
