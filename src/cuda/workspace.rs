//! The buffers of a reading, planned before the first step and kept from document to document.

use cudarc::driver::CudaSlice;
use half::bf16;

use super::device::Allocator;
use super::memory::{ActivationSizes, ReadSizes, RowSizes};
use super::ops::{DevicePlan, Residual, StepBuffers};
use super::{CudaDevice, memory};
use crate::Result;
use crate::model::{Model, RopeTable};

/// Activations of a pass.
pub struct Activations {
    /// `[rows, hidden_size]`
    pub residual: Residual,
    /// `[rows, num_attention_heads * head_dim]`
    pub attended: CudaSlice<bf16>,
    /// `[rows, intermediate_size]`
    pub h: CudaSlice<bf16>,
    /// Cosine and sine by turns, `[positions, head_dim / 2, 2]`.
    pub rope: CudaSlice<f32>,
}

impl Activations {
    pub fn new(
        device: &CudaDevice,
        allocator: &mut Allocator,
        model: &Model,
        sizes: ActivationSizes,
    ) -> Result<Activations> {
        Ok(Activations {
            residual: Residual::allocate(allocator, [sizes.stream, sizes.stream, sizes.squares])?,
            attended: allocator.zeros(sizes.attended)?,
            h: allocator.zeros(sizes.h)?,
            rope: rope(device, allocator, model, sizes.rope)?,
        })
    }
}

/// The same of the one row of a new token, whose residual stream is plain.
pub struct RowActivations {
    /// `[hidden_size]`
    pub x: CudaSlice<f32>,
    /// `[num_attention_heads * head_dim]`
    pub attended: CudaSlice<bf16>,
    /// `[intermediate_size]`
    pub h: CudaSlice<bf16>,
    /// As above.
    pub rope: CudaSlice<f32>,
}

impl RowActivations {
    pub fn new(
        device: &CudaDevice,
        allocator: &mut Allocator,
        model: &Model,
        sizes: RowSizes,
    ) -> Result<RowActivations> {
        Ok(RowActivations {
            x: allocator.zeros(sizes.x)?,
            attended: allocator.zeros(sizes.attended)?,
            h: allocator.zeros(sizes.h)?,
            rope: rope(device, allocator, model, sizes.rope)?,
        })
    }
}

fn rope(device: &CudaDevice, allocator: &mut Allocator, model: &Model, len: usize) -> Result<CudaSlice<f32>> {
    let table = RopeTable::new(&model.config, len / model.config.head_dim);
    let by_turns: Vec<f32> = table.cos.iter().zip(&table.sin).flat_map(|(cos, sin)| [*cos, *sin]).collect();
    let mut rope = allocator.zeros(len)?;
    device.upload_into("copying the rotary table to the GPU", &by_turns, &mut rope)?;
    Ok(rope)
}

/// Everything that reading a document takes beside the weights.
///
/// It is zeroed once. Of an earlier document's contents nothing reaches a result, but all of it is finite, which a kernel
/// that reads rows beyond the live ones and masks them relies on: 0 times infinity would not be 0.
pub struct Workspace {
    sizes: ReadSizes,
    pub activations: Activations,
    /// Of each layer but the last, `[rows, (num_attention_heads + 2 num_key_value_heads) * head_dim]`. The next step finds in
    /// them the keys and values of the tokens that both begin with, and in `k`.
    pub qkv: Vec<CudaSlice<bf16>>,
    /// The last layer's queries, `[question rows, num_attention_heads * head_dim]`.
    pub q: CudaSlice<bf16>,
    /// The last layer's keys, `[rows, num_key_value_heads * head_dim]`.
    pub k: CudaSlice<bf16>,
    pub steps: StepBuffers,
    pub plan: DevicePlan,
}

impl Workspace {
    /// The workspace in `slot`, if it has at least the `needed` sizes; else one with room for both this document and
    /// those before, or, where memory lacks, for this one alone.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if even that does not fit; [`crate::Error::Cuda`].
    pub fn reserve<'a>(
        slot: &'a mut Option<Workspace>,
        device: &CudaDevice,
        model: &Model,
        needed: ReadSizes,
    ) -> Result<&'a mut Workspace> {
        let workspace = match slot.take() {
            Some(workspace) if memory::cover(&workspace.sizes, &needed) => workspace,
            smaller => {
                let grown = smaller.map_or(needed, |smaller| smaller.sizes.union(&needed));
                // Memory that was given back counts as free from then on.
                device.synchronize()?;
                let sizes = if grown.bytes() <= device.free_bytes()? { grown } else { needed };
                device.check_free(sizes.bytes(), "the buffers of this document", needed.remedy())?;
                Workspace::new(device, model, sizes)?
            }
        };
        Ok(slot.insert(workspace))
    }

    fn new(device: &CudaDevice, model: &Model, sizes: ReadSizes) -> Result<Workspace> {
        let mut allocator = Allocator::new(device);
        let workspace = Workspace {
            sizes,
            activations: Activations::new(device, &mut allocator, model, sizes.activations)?,
            qkv: (0..sizes.layers).map(|_| allocator.zeros(sizes.qkv)).collect::<Result<_>>()?,
            q: allocator.zeros(sizes.q)?,
            k: allocator.zeros(sizes.k)?,
            steps: StepBuffers::allocate(&mut allocator, sizes.steps)?,
            plan: DevicePlan::allocate(&mut allocator, sizes.plan)?,
        };
        allocator.check(sizes.bytes(), "the workspace")?;
        Ok(workspace)
    }
}
