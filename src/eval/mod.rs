//! How good answers are: the metrics of LongBench v1, with the values that its Python gives.
//!
//! | module | holds |
//! |---|---|
//! | [`metrics`] | one function per metric, from a prediction and a truth to a score in 0 to 1 |
//! | [`chinese`] | words of Chinese text, as the Chinese metrics count them |

pub mod chinese;
pub mod metrics;
