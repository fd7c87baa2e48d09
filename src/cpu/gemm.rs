//! The one door to the GEMM library: matrices as checked slices.

use gemm::Parallelism;

/// A matrix in a slice: element `(r, c)` lies at `r * row_stride + c * col_stride`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

fn assert_fits(len: usize, rows: usize, cols: usize, row_stride: usize, col_stride: usize) {
    let empty = rows == 0 || cols == 0;
    assert!(empty || (rows - 1) * row_stride + (cols - 1) * col_stride < len, "a matrix reaches beyond its slice");
}

impl<'a> Mat<'a> {
    /// `rows x cols` elements, rows `row_stride` apart.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Mat<'a> {
        assert_fits(data.len(), rows, cols, row_stride, 1);
        Mat { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The same elements with rows and columns exchanged.
    pub fn t(self) -> Mat<'a> {
        Mat { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// `out = alpha * a b`, where `out` is `[a.rows, b.cols]` with rows `out_stride` apart. `threads` spreads the product
/// over rayon's pool; the order of summation does not depend on it.
#[allow(unsafe_code)]
pub fn matmul(out: &mut [f32], out_stride: usize, alpha: f32, a: Mat, b: Mat, threads: bool) {
    assert_eq!(a.cols, b.rows, "inner dimensions differ");
    assert_fits(out.len(), a.rows, b.cols, out_stride, 1);
    let parallelism = if threads { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: every element that the three stride descriptions reach lies in its slice (`assert_fits` here and in
    // `Mat::new`; `t` only exchanges the roles), `out` is borrowed mutably and so overlaps neither operand, and with
    // `read_dst` false its old contents are not read.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            false,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            0.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiplies_by_a_transposed_weight() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let w = [1.0, 0.0, 1.0, 0.0, 2.0, 0.0];
        let mut out = [9.0; 4];
        matmul(&mut out, 2, 0.5, Mat::new(&a, 2, 3, 3), Mat::new(&w, 2, 3, 3).t(), false);
        assert_eq!(out, [2.0, 2.0, 5.0, 5.0]);
    }

    #[test]
    #[should_panic(expected = "beyond its slice")]
    fn refuses_a_matrix_larger_than_its_slice() {
        Mat::new(&[0.0; 5], 2, 3, 3);
    }
}
