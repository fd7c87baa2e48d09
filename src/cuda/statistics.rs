//! What travels between host and GPU, counted where it happens.

use std::ops::Sub;
use std::sync::atomic::{AtomicU64, Ordering};

/// What has travelled between the host and a GPU, and how often the host waited for it.
///
/// Counts only grow; the difference of two is what happened in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Copies from the host to the GPU.
    pub uploads: u64,
    /// Their bytes.
    pub bytes_up: u64,
    /// Copies from the GPU to the host.
    pub downloads: u64,
    /// Their bytes.
    pub bytes_down: u64,
    /// Times the host waited for the GPU.
    pub synchronizations: u64,
    /// Launches of recorded runs of kernels.
    pub graph_launches: u64,
}

impl Sub for Statistics {
    type Output = Statistics;

    /// What happened between `earlier` and `self`.
    fn sub(self, earlier: Statistics) -> Statistics {
        Statistics {
            uploads: self.uploads - earlier.uploads,
            bytes_up: self.bytes_up - earlier.bytes_up,
            downloads: self.downloads - earlier.downloads,
            bytes_down: self.bytes_down - earlier.bytes_down,
            synchronizations: self.synchronizations - earlier.synchronizations,
            graph_launches: self.graph_launches - earlier.graph_launches,
        }
    }
}

/// The counters behind [`Statistics`]. Each is right by itself; they are not read as one.
#[derive(Default)]
pub(super) struct Counters {
    uploads: AtomicU64,
    bytes_up: AtomicU64,
    downloads: AtomicU64,
    bytes_down: AtomicU64,
    synchronizations: AtomicU64,
    graph_launches: AtomicU64,
}

fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn upload(&self, bytes: usize) {
        add(&self.uploads, 1);
        add(&self.bytes_up, bytes);
    }

    pub(super) fn download(&self, bytes: usize) {
        add(&self.downloads, 1);
        add(&self.bytes_down, bytes);
    }

    pub(super) fn synchronization(&self) {
        add(&self.synchronizations, 1);
    }

    pub(super) fn graph_launch(&self) {
        add(&self.graph_launches, 1);
    }

    pub(super) fn read(&self) -> Statistics {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Statistics {
            uploads: value(&self.uploads),
            bytes_up: value(&self.bytes_up),
            downloads: value(&self.downloads),
            bytes_down: value(&self.bytes_down),
            synchronizations: value(&self.synchronizations),
            graph_launches: value(&self.graph_launches),
        }
    }
}
