//! Matrices in the order the kernels want their rows, and the one pass over the files that brings them there.

use half::bf16;
use rayon::prelude::*;

use crate::model::Tensor;

/// Rows that belong together for an epilogue lie in groups of so many.
const GROUP: usize = 8;

/// Elements that one thread fills at a time.
const SHARE: usize = 128 << 10;

/// Order of a matrix's rows on the device: the first `rows` in blocks, of each block eight rows of the lower half, eight
/// of the upper half, and so on; the others as they are stored.
#[derive(Clone, Copy)]
pub struct RowOrder {
    /// A multiple of 16.
    block: usize,
    rows: usize,
}

impl RowOrder {
    /// As stored.
    pub const STORED: RowOrder = RowOrder { block: 2 * GROUP, rows: 0 };

    /// The first `heads` heads of `head_dim` rows as the rotary epilogue wants them: dimensions that are rotated together
    /// lie eight apart.
    pub fn rotary(heads: usize, head_dim: usize) -> RowOrder {
        RowOrder { block: head_dim, rows: heads * head_dim }
    }

    /// The gate, stored on top of up, as the SwiGLU epilogue wants them: eight rows of one, eight of the other.
    pub fn gate_up(intermediate_size: usize) -> RowOrder {
        RowOrder { block: 2 * intermediate_size, rows: 2 * intermediate_size }
    }

    /// The stored row that comes to lie in `row`.
    fn stored(self, row: usize) -> usize {
        if row >= self.rows {
            return row;
        }
        let (block, within) = (row / self.block, row % self.block);
        let (pair, from_upper, offset) = (within / (2 * GROUP), within / GROUP % 2, within % GROUP);
        block * self.block + from_upper * (self.block / 2) + pair * GROUP + offset
    }
}

/// Tensors of equal width on top of each other, with their rows in some order. A vector has rows of one element.
pub struct Matrix<'a> {
    parts: Vec<&'a Tensor>,
    /// Elements of a row.
    width: usize,
    rows: usize,
    order: RowOrder,
}

impl<'a> Matrix<'a> {
    pub fn new(parts: Vec<&'a Tensor>, order: RowOrder) -> Matrix<'a> {
        let width = parts[0].shape().get(1).copied().unwrap_or(1);
        let rows = parts.iter().map(|part| part.shape()[0]).sum();
        Matrix { parts, width, rows, order }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn elements(&self) -> usize {
        self.rows * self.width
    }

    /// Fills `out` with the elements from `first` on, on all cores.
    ///
    /// # Panics
    /// If they reach beyond the matrix's end.
    pub fn fill(&self, first: usize, out: &mut [bf16]) {
        out.par_chunks_mut(SHARE).enumerate().for_each(|(share, out)| self.fill_share(first + share * SHARE, out));
    }

    fn fill_share(&self, first: usize, out: &mut [bf16]) {
        let mut filled = 0;
        while filled < out.len() {
            let (row, column) = ((first + filled) / self.width, (first + filled) % self.width);
            let len = (self.width - column).min(out.len() - filled);
            let (part, row) = self.locate(self.order.stored(row));
            part.to_bf16(row * self.width + column, &mut out[filled..filled + len]);
            filled += len;
        }
    }

    /// The tensor that holds a stored row, and the row's place in it.
    fn locate(&self, mut row: usize) -> (&Tensor, usize) {
        let mut parts = self.parts.iter();
        loop {
            let part = parts.next().expect("the row is one of the matrix's");
            let rows = part.shape()[0];
            if row < rows {
                return (part, row);
            }
            row -= rows;
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::model::Weights;

    /// Tensors of a file made for the purpose, in bf16, whose elements count up from 0, modulo 2^16, in bits.
    pub fn counting(shapes: &[&[usize]]) -> Vec<Tensor> {
        let (mut header, mut bytes, mut count) = (Vec::new(), Vec::new(), 0u16);
        for (index, shape) in shapes.iter().enumerate() {
            let start = bytes.len();
            for _ in 0..shape.iter().product() {
                bytes.extend(count.to_le_bytes());
                count = count.wrapping_add(1);
            }
            let end = bytes.len();
            header.push(format!(r#""{index}":{{"dtype":"BF16","shape":{shape:?},"data_offsets":[{start},{end}]}}"#));
        }
        let header = format!("{{{}}}", header.join(","));
        let folder = tempfile::tempdir().unwrap();
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes].concat();
        std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
        let weights = Weights::open(folder.path()).unwrap();
        shapes.iter().enumerate().map(|(index, shape)| weights.tensor(&index.to_string(), shape).unwrap()).collect()
    }

    fn order(order: RowOrder, rows: usize) -> Vec<usize> {
        (0..rows).map(|row| order.stored(row)).collect()
    }

    fn assert_is_permutation(order: &[usize]) {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..order.len()));
    }

    #[test]
    fn rotary_partners_lie_eight_apart() {
        for (heads, head_dim, unrotated) in [(16, 64, 128), (10, 128, 256), (1, 16, 0)] {
            let rows = heads * head_dim + unrotated;
            let order = order(RowOrder::rotary(heads, head_dim), rows);
            assert_is_permutation(&order);
            for (row, &stored) in order.iter().enumerate().take(heads * head_dim) {
                assert_eq!(stored / head_dim, row / head_dim, "a row leaves its head");
                if row / 8 % 2 == 0 {
                    assert!(stored % head_dim < head_dim / 2);
                    assert_eq!(order[row + 8], stored + head_dim / 2, "row {row}");
                }
            }
            assert!(order[heads * head_dim..].iter().copied().eq(heads * head_dim..rows), "values stay");
        }
    }

    #[test]
    fn gate_and_up_come_by_turns() {
        let intermediate_size = 40;
        let order = order(RowOrder::gate_up(intermediate_size), 2 * intermediate_size);
        assert_is_permutation(&order);
        assert!(order[..8].iter().copied().eq(0..8), "eight of the gate");
        assert!(order[8..16].iter().copied().eq(40..48), "eight of up");
        assert!(order[16..24].iter().copied().eq(8..16));
        assert!(order[72..].iter().copied().eq(72..80));
    }

    #[test]
    fn rows_of_several_tensors_come_in_order() {
        let tensors = counting(&[&[32, 3], &[16, 3], &[16, 3]]);
        let matrix = Matrix::new(tensors.iter().collect(), RowOrder::rotary(3, 16));
        assert_eq!((matrix.rows(), matrix.width(), matrix.elements()), (64, 3, 192));
        let mut out = vec![bf16::ZERO; 192];
        matrix.fill(0, &mut out);
        let expected = order(RowOrder::rotary(3, 16), 64);
        for (row, stored) in out.chunks(3).zip(expected) {
            let first = (stored * 3) as u16;
            assert!(row.iter().map(|value| value.to_bits()).eq(first..first + 3));
        }
    }

    /// A bias is ordered as its matrix is.
    #[test]
    fn vectors_have_rows_of_one() {
        let tensors = counting(&[&[16], &[16]]);
        let matrix = Matrix::new(tensors.iter().collect(), RowOrder::gate_up(16));
        let mut out = vec![bf16::ZERO; 32];
        matrix.fill(0, &mut out);
        let order = order(RowOrder::gate_up(16), 32);
        assert!(out.iter().map(|value| value.to_bits() as usize).eq(order));
    }

    /// Pieces that end within a row, within a thread's share and beyond it.
    #[test]
    fn pieces_are_what_the_whole_is() {
        let (rows, width) = (256, 1100);
        let tensors = counting(&[&[rows / 2, width], &[rows / 2, width]]);
        for order in [RowOrder::STORED, RowOrder::gate_up(rows / 2)] {
            let matrix = Matrix::new(tensors.iter().collect(), order);
            let mut whole = vec![bf16::ZERO; matrix.elements()];
            matrix.fill(0, &mut whole);
            assert!(whole.len() > 2 * SHARE);
            for piece in [1001, SHARE + 7, 2 * SHARE + 1] {
                let mut pieces = vec![bf16::ZERO; matrix.elements()];
                for (index, out) in pieces.chunks_mut(piece).enumerate() {
                    matrix.fill(index * piece, out);
                }
                assert!(pieces.iter().map(|value| value.to_bits()).eq(whole.iter().map(|value| value.to_bits())));
            }
        }
    }
}
