//! Safetensors files, one or many, mapped into memory and never copied.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::{Error, Result};

/// Storage formats of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 8 exponent bits, 7 of mantissa.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }
}

/// A view of a tensor in a mapped file. Cheap to clone; keeps the file mapped.
#[derive(Clone)]
pub struct Tensor {
    file: Arc<Mmap>,
    range: Range<usize>,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}{:?}", self.dtype, self.shape)
    }
}

impl Tensor {
    /// The elements from byte `start` of `file` on.
    pub(super) fn view(file: Arc<Mmap>, start: usize, dtype: Dtype, shape: &[usize]) -> Tensor {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        Tensor { file, range: start..start + bytes, dtype, shape: shape.to_vec() }
    }

    /// How its elements are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of its elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its bytes as they lie in the file: little-endian, row-major, at no particular alignment.
    pub fn bytes(&self) -> &[u8] {
        &self.file[self.range.clone()]
    }

    /// Converts the elements from `start` on into `out`, as many as it holds.
    ///
    /// # Panics
    /// If they reach beyond the tensor's end.
    pub fn to_f32(&self, start: usize, out: &mut [f32]) {
        self.convert(start, out, bf16::to_f32, f16::to_f32, |value| value);
    }

    /// Copies the elements from `start` on into `out`, as many as it holds: those stored in another format are rounded
    /// to the nearest bf16, ties to even; a NaN stays one.
    ///
    /// # Panics
    /// If they reach beyond the tensor's end.
    pub fn to_bf16(&self, start: usize, out: &mut [bf16]) {
        self.convert(start, out, |value| value, |value| bf16::from_f32(value.to_f32()), bf16::from_f32);
    }

    fn convert<T>(
        &self,
        start: usize,
        out: &mut [T],
        from_bf16: impl Fn(bf16) -> T,
        from_f16: impl Fn(f16) -> T,
        from_f32: impl Fn(f32) -> T,
    ) {
        let size = self.dtype.size();
        let bytes = &self.bytes()[start * size..(start + out.len()) * size];
        match self.dtype {
            Dtype::Bf16 => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = from_bf16(bf16::from_le_bytes(*b));
                }
            }
            Dtype::F16 => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = from_f16(f16::from_le_bytes(*b));
                }
            }
            Dtype::F32 => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = from_f32(f32::from_le_bytes(*b));
                }
            }
        }
    }

    /// All elements, converted.
    pub fn to_vec_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements()];
        self.to_f32(0, &mut out);
        out
    }
}

struct Entry {
    file: usize,
    range: Range<usize>,
    dtype: std::result::Result<Dtype, String>,
    shape: Vec<usize>,
}

/// The tensors of a model directory by name.
pub struct Weights {
    directory: PathBuf,
    files: Vec<(PathBuf, Arc<Mmap>)>,
    entries: HashMap<String, Entry>,
}

impl Weights {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` names, and reads their headers.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::ModelFile`], naming the file: a missing shard, a truncated or malformed header.
    pub fn open(directory: &Path) -> Result<Weights> {
        let mut weights = Weights { directory: directory.into(), files: Vec::new(), entries: HashMap::new() };
        let single = directory.join("model.safetensors");
        let index = directory.join("model.safetensors.index.json");
        if single.exists() {
            weights.map(single)?;
        } else if index.exists() {
            for name in shards_in(&index)? {
                let shard = directory.join(&name);
                if !shard.exists() {
                    return Err(Error::model_file(
                        index,
                        format!("the shard {name} that it names is missing from the directory: download it again"),
                    ));
                }
                weights.map(shard)?;
            }
        } else {
            return Err(Error::model_file(
                directory,
                "holds neither model.safetensors nor model.safetensors.index.json; weights in other formats are not supported",
            ));
        }
        Ok(weights)
    }

    #[allow(unsafe_code)]
    fn map(&mut self, path: PathBuf) -> Result<()> {
        let file = File::open(&path).map_err(|source| Error::io("open", &path, source))?;
        // SAFETY: the bytes are only read, and every read is bounds-checked against the mapped length. Should another
        // process shorten the file while it is mapped, the operating system ends this process with a bus error; that
        // is the price of not copying weights, and the crate's documentation says so.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::io("map", &path, source))?;
        let (header_len, metadata) = SafeTensors::read_metadata(&map).map_err(|error| {
            Error::model_file(&path, format!("not a whole safetensors file ({error}): download it again"))
        })?;
        let data_start = header_len + 8;
        for (name, info) in metadata.tensors() {
            let dtype = match info.dtype {
                safetensors::Dtype::BF16 => Ok(Dtype::Bf16),
                safetensors::Dtype::F16 => Ok(Dtype::F16),
                safetensors::Dtype::F32 => Ok(Dtype::F32),
                other => Err(format!("{other:?}")),
            };
            let (start, end) = info.data_offsets;
            let entry = Entry {
                file: self.files.len(),
                range: data_start + start..data_start + end,
                dtype,
                shape: info.shape.clone(),
            };
            if let Some(earlier) = self.entries.insert(name.clone(), entry) {
                let other = self.files.get(earlier.file).map_or(&path, |(path, _)| path);
                return Err(Error::model_file(&path, format!("the tensor {name} stands in {} too", other.display())));
            }
        }
        self.files.push((path, Arc::new(map)));
        Ok(())
    }

    /// The tensor `name`, which must have `shape` and a supported dtype.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::ModelFile`] for another dtype.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let entry = self
            .entries
            .get(name)
            .ok_or_else(|| Error::MissingTensor { path: self.directory.clone(), name: name.into() })?;
        let (path, map) = &self.files[entry.file];
        if entry.shape != shape {
            return Err(Error::TensorShape {
                path: path.clone(),
                name: name.into(),
                found: entry.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        let dtype = entry.dtype.clone().map_err(|found| {
            Error::model_file(path, format!("tensor {name} is stored as {found}; supported are BF16, F16 and F32"))
        })?;
        Ok(Tensor { file: map.clone(), range: entry.range.clone(), dtype, shape: shape.to_vec() })
    }

    /// Bytes of all tensors together.
    pub fn bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.range.len() as u64).sum()
    }
}

/// The shards of an index, each once, in order of name. A name may not lead out of the directory.
fn shards_in(index: &Path) -> Result<Vec<String>> {
    let bytes = std::fs::read(index).map_err(|source| Error::io("read", index, source))?;
    let value: Value =
        serde_json::from_slice(&bytes).map_err(|error| Error::model_file(index, format!("not valid JSON: {error}")))?;
    let map = value["weight_map"]
        .as_object()
        .ok_or_else(|| Error::model_file(index, "has no weight_map, which says what shard holds which tensor"))?;
    let mut names = Vec::new();
    for shard in map.values() {
        let name = shard.as_str().filter(|name| Path::new(name).file_name() == Some(name.as_ref()));
        names.push(name.ok_or_else(|| Error::model_file(index, format!("{shard} is not a file name")))?.to_owned());
    }
    names.sort();
    names.dedup();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn open_bytes(bytes: &[u8]) -> Result<Weights> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        Weights::open(folder.path())
    }

    /// The tensor "a" of a file that holds nothing else.
    fn tensor(dtype: &str, bytes: &[u8], elements: usize) -> Tensor {
        let header =
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":[{elements}],"data_offsets":[0,{}]}}}}"#, bytes.len());
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), bytes].concat();
        open_bytes(&file).unwrap().tensor("a", &[elements]).unwrap()
    }

    fn bf16_bits(tensor: &Tensor, start: usize) -> Vec<u16> {
        let mut out = vec![bf16::ZERO; tensor.elements() - start];
        tensor.to_bf16(start, &mut out);
        out.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn bf16_is_copied_bit_by_bit() {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let tensor = tensor("BF16", &bytes, bits.len());
        assert_eq!(bf16_bits(&tensor, 0), bits);
        assert_eq!(bf16_bits(&tensor, 65001), bits[65001..]);
    }

    #[test]
    fn other_formats_are_rounded_to_the_nearest_bf16_with_ties_to_even() {
        let bits = |floats: &[u32]| -> Vec<u16> {
            let bytes: Vec<u8> = floats.iter().flat_map(|bits| bits.to_le_bytes()).collect();
            bf16_bits(&tensor("F32", &bytes, floats.len()), 0)
        };
        assert_eq!(bits(&[0x3f80_0000, 0x3f80_7fff, 0x3f80_8001]), [0x3f80, 0x3f80, 0x3f81], "to the nearer side");
        assert_eq!(bits(&[0x3f80_8000, 0x3f81_8000, 0xbf80_8000]), [0x3f80, 0x3f82, 0xbf80], "a tie to the even side");
        assert_eq!(bits(&[0x7f7f_ffff, 0x7f80_0000, 0x8000_0000]), [0x7f80, 0x7f80, 0x8000], "infinity, minus zero");
        let nans = bits(&[0x7f80_0001, 0xffff_ffff]);
        assert!(nans.iter().all(|&bits| bf16::from_bits(bits).is_nan()), "{nans:x?}");
    }

    /// All of fp16: its 11 significant bits rounded to 8, in integers.
    #[test]
    fn every_fp16_comes_out_as_the_nearest_bf16() {
        let halves: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = halves.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        for (half, bits) in halves.iter().zip(bf16_bits(&tensor("F16", &bytes, halves.len()), 0)) {
            let ours = bf16::from_bits(bits).to_f64();
            let (exponent, fraction) = (half >> 10 & 31, (half & 1023) as f64);
            let size = match exponent {
                0 => fraction * 2f64.powi(-24),
                31 if fraction != 0.0 => {
                    assert!(ours.is_nan(), "{half:x}");
                    continue;
                }
                31 => f64::INFINITY,
                _ => (1024.0 + fraction) * 2f64.powi(exponent as i32 - 25),
            };
            // Units of the last of 8 significant bits; a power of two, so that the division is exact.
            let unit = if size == 0.0 || size.is_infinite() { 1.0 } else { 2f64.powi(size.log2().floor() as i32 - 7) };
            let expected = if size.is_infinite() { size } else { (size / unit).round_ties_even() * unit };
            assert_eq!(ours, if half >> 15 == 1 { -expected } else { expected }, "{half:x}");
        }
    }

    fn valid_file() -> Vec<u8> {
        let header = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header);
        bytes.extend_from_slice(&[0, 0, 128, 63, 0, 0, 0, 64]);
        bytes
    }

    #[test]
    fn reads_what_was_written() {
        let tensor = open_bytes(&valid_file()).unwrap().tensor("a", &[2]).unwrap();
        assert_eq!(tensor.to_vec_f32(), [1.0, 2.0]);
    }

    #[test]
    fn a_header_that_claims_too_much_is_an_error() {
        for claim in [u64::MAX, 1 << 40, 200] {
            let mut bytes = valid_file();
            bytes[..8].copy_from_slice(&claim.to_le_bytes());
            let error = open_bytes(&bytes).map(|_| ()).unwrap_err();
            assert!(error.to_string().contains("model.safetensors"), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Whatever is changed in a file, it opens or is refused; nothing panics, and no tensor reaches beyond it.
        #[test]
        fn hostile_headers_never_panic(
            changes in prop::collection::vec((0usize..70, any::<u8>()), 0..6),
            length in 0usize..80,
        ) {
            let mut bytes = valid_file();
            for (at, byte) in changes {
                if let Some(target) = bytes.get_mut(at) {
                    *target = byte;
                }
            }
            bytes.truncate(length);
            if let Ok(weights) = open_bytes(&bytes) {
                for (name, entry) in &weights.entries {
                    if let Ok(tensor) = weights.tensor(name, &entry.shape) {
                        prop_assert_eq!(tensor.to_vec_f32().len(), entry.shape.iter().product::<usize>());
                    }
                }
            }
        }
    }
}
