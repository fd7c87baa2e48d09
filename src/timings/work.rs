//! What an operation moves and computes, counted once for the table of `ask --timings` and for the kernels' benchmark.

/// Work of an operation as a function of its live rows. Bytes are those of all operands once, in bf16; FLOPs those of
/// products and attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Nothing that a ceiling applies to.
    Uncounted,
    /// `width` numbers of each row, read and written.
    Elementwise {
        /// Numbers of a row.
        width: usize,
    },
    /// A product of the rows, `k` wide, with a matrix `[n, k]`.
    Product {
        /// Columns that come out.
        n: usize,
        /// Columns that go in.
        k: usize,
        /// Columns moved of each row of the output, as if of bf16.
        moved: usize,
    },
    /// Each row attends to itself and all that come before it.
    Attention {
        /// Columns of the queries.
        q_dim: usize,
        /// Columns of the keys, and as many of the values.
        kv_dim: usize,
        /// Keys a row may attend to, itself included; 0 for all.
        window: usize,
    },
    /// One row attends to all: the rows are keys.
    DecodeAttention {
        /// Columns of the query.
        q_dim: usize,
        /// Columns of the keys, and as many of the values.
        kv_dim: usize,
        /// Keys the row may attend to, itself included; 0 for all.
        window: usize,
        /// Columns that a matrix makes of what is attended to, 0 without one.
        out: usize,
    },
    /// Question rows against all keys. The logits are not counted: they pass through the cache.
    QuestionLogits {
        /// Rows of the queries.
        question_rows: usize,
        /// Columns of the queries.
        q_dim: usize,
        /// Columns of the keys.
        kv_dim: usize,
    },
}

impl Work {
    /// A product whose output is written once.
    pub fn product(n: usize, k: usize) -> Work {
        Work::Product { n, k, moved: n }
    }

    /// A product that is added to the residual stream, which is read and written in fp32.
    pub fn residual(n: usize, k: usize) -> Work {
        Work::Product { n, k, moved: 4 * n }
    }

    /// A product whose columns become one of two.
    pub fn swiglu(n: usize, k: usize) -> Work {
        Work::Product { n, k, moved: n / 2 }
    }

    /// A product whose output is written once, in fp32.
    pub fn fp32_product(n: usize, k: usize) -> Work {
        Work::Product { n, k, moved: 2 * n }
    }

    /// Bytes that are read or written, for `rows` live rows behind `before` others.
    pub fn bytes(&self, rows: usize, before: usize) -> u64 {
        let numbers = match *self {
            Work::Uncounted => 0,
            Work::Elementwise { width } => 2 * rows * width,
            Work::Product { n, k, moved } => rows * k + n * k + rows * moved,
            Work::Attention { q_dim, kv_dim, .. } => 2 * (rows * q_dim + (before + rows) * kv_dim),
            Work::DecodeAttention { q_dim, kv_dim, window, out } => 2 * seen(rows, window) * kv_dim + q_dim * out,
            Work::QuestionLogits { question_rows, q_dim, kv_dim } => question_rows * q_dim + (before + rows) * kv_dim,
        };
        2 * numbers as u64
    }

    /// Floating-point operations, two a multiplication with its addition, for `rows` live rows behind `before` others.
    pub fn flops(&self, rows: usize, before: usize) -> u64 {
        let flops = match *self {
            Work::Uncounted | Work::Elementwise { .. } => 0,
            Work::Product { n, k, .. } => 2 * rows * n * k,
            // Of the square the half that is not masked, and not what lies before the window; once q k^T, once p v.
            Work::Attention { q_dim, window, .. } => {
                let of_first = |rows: usize| rows * rows - (rows - seen(rows, window)).pow(2);
                2 * (of_first(before + rows) - of_first(before)) * q_dim
            }
            Work::DecodeAttention { q_dim, window, out, .. } => (4 * seen(rows, window) + 2 * out) * q_dim,
            Work::QuestionLogits { question_rows, q_dim, .. } => 2 * question_rows * (before + rows) * q_dim,
        };
        flops as u64
    }
}

/// Keys that the last of `rows` rows attends to.
fn seen(rows: usize, window: usize) -> usize {
    if window == 0 { rows } else { rows.min(window) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Config;

    /// All operations of a step together are what the model's configuration counts, a second way of counting.
    #[test]
    fn a_step_adds_up() {
        for name in crate::model::SHAPES {
            let config = Config::named(name).unwrap();
            let (hidden, q_dim, kv_dim) = (config.hidden_size, config.q_dim(), config.kv_dim());
            let (rows, question_rows) = (1894, 48);
            let layer = [
                Work::product(q_dim + 2 * kv_dim, hidden),
                Work::Attention { q_dim, kv_dim, window: 0 },
                Work::residual(hidden, q_dim),
                Work::swiglu(2 * config.intermediate_size, hidden),
                Work::residual(hidden, config.intermediate_size),
            ];
            let layer: u64 = layer.iter().map(|work| work.flops(rows, 0)).sum();
            let scoring = Work::product(kv_dim, hidden).flops(rows, 0)
                + Work::product(q_dim, hidden).flops(question_rows, 0)
                + Work::QuestionLogits { question_rows, q_dim, kv_dim }.flops(rows, 0);
            let step = (config.num_hidden_layers - 1) as u64 * layer + scoring;
            assert_eq!(step, config.step_flops(rows, question_rows), "{name}");
        }
    }

    #[test]
    fn windows_bound_what_is_seen() {
        let attention = |window| Work::Attention { q_dim: 1, kv_dim: 1, window };
        assert_eq!(attention(10).flops(10, 0), attention(0).flops(10, 0));
        // As `Config::step_flops` counts: half of a square of 4, less half of the square of 2 before the window.
        assert_eq!(attention(2).flops(4, 0), 4 * (16 - 4) / 2);
        // What is split is the sum of its parts.
        for window in [0, 3, 6] {
            let parts = attention(window).flops(5, 0) + attention(window).flops(4, 5);
            assert_eq!(attention(window).flops(9, 0), parts, "{window}");
        }
        let decode = |window| Work::DecodeAttention { q_dim: 3, kv_dim: 2, window, out: 0 };
        assert_eq!((decode(0).bytes(100, 0), decode(0).flops(100, 0)), (800, 1200));
        assert_eq!((decode(5).bytes(100, 0), decode(5).flops(100, 0)), (40, 60));
        let with_matrix = Work::DecodeAttention { q_dim: 3, kv_dim: 2, window: 5, out: 7 };
        assert_eq!((with_matrix.bytes(100, 0), with_matrix.flops(100, 0)), (40 + 2 * 21, 60 + 2 * 21));
    }

    #[test]
    fn operands_count_once() {
        assert_eq!(Work::product(16, 8).bytes(3, 9), 2 * (3 * 8 + 16 * 8 + 3 * 16));
        assert_eq!(Work::residual(16, 8).bytes(3, 9), 2 * (3 * 8 + 16 * 8 + 4 * 3 * 16));
        assert_eq!(Work::swiglu(16, 8).bytes(3, 9), 2 * (3 * 8 + 16 * 8 + 3 * 8));
        assert_eq!(Work::Elementwise { width: 8 }.bytes(3, 9), 2 * 2 * 3 * 8);
        let attention = Work::Attention { q_dim: 7, kv_dim: 5, window: 0 };
        assert_eq!(attention.bytes(3, 9), 2 * (2 * 3 * 7 + 2 * 12 * 5));
    }
}
