//! Payloads that no codec can compress. A payload is a slice of a pool, so it costs no allocation.

use crate::task::random;

/// Minimum size in bytes of the random pool: far more than a batch. A codec finds repetitions only within a batch.
const POOL_BYTES: usize = 16 << 20;

/// Shift in bytes, modulo the payload size, between the starts of two passes over the pool. An odd shift spreads the
/// starts of payloads over the pool.
const STRIDE: usize = 1_048_583;

/// Source of payloads of one size.
pub(super) struct PayloadPool {
    pool: Vec<u8>,
    size: usize,
    /// Start of the next payload in the pool.
    next_start: usize,
}

impl PayloadPool {
    pub(super) fn new(size: usize) -> Self {
        let mut pool = vec![0; POOL_BYTES.max(2 * size)];
        random::fill(&mut pool);
        Self { pool, size, next_start: 0 }
    }

    /// Returns the next payload.
    pub(super) fn next(&mut self) -> &[u8] {
        let start = self.next_start;
        // Consecutive payloads are adjacent in the pool. Each pass over the pool starts at another offset.
        self.next_start += self.size;
        if self.next_start + self.size > self.pool.len() {
            self.next_start = (self.next_start + STRIDE) % self.size.max(1);
        }
        &self.pool[start..start + self.size]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Compression, record::BatchBuilder};

    #[test]
    fn payloads_do_not_compress() {
        let mut payloads = PayloadPool::new(1000);
        for codec in [Compression::Lz4, Compression::Zstd] {
            let mut builder = BatchBuilder::new(codec);
            for _ in 0..200 {
                builder.push(0, None, Some(payloads.next()), &[]).expect("fits");
            }
            assert!(builder.finish(None).expect("not empty").encoded_len() > 199_000, "{codec}");
        }
    }

    #[test]
    fn payloads_stay_within_the_pool() {
        for size in [0, 1, 1024, 1_000_003] {
            let mut payloads = PayloadPool { pool: vec![7; 4_000_000], size, next_start: 0 };
            assert!((0..1000).all(|_| payloads.next().len() == size));
        }
    }
}
