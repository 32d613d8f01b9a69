//! Payloads that no codec makes smaller, at the cost of a slice.

use crate::task::random;

/// Random bytes that payloads are cut from: far more than a batch, within which alone a codec looks for repeats.
const POOL_BYTES: usize = 16 << 20;

/// Distance between the starts of neighbouring payloads: odd, so that payloads begin everywhere.
const STRIDE: usize = 1_048_583;

/// Payloads of one size.
pub(super) struct Payloads {
    pool: Vec<u8>,
    size: usize,
    at: usize,
}

impl Payloads {
    pub(super) fn new(size: usize) -> Self {
        let mut pool = vec![0; POOL_BYTES.max(2 * size)];
        random::fill(&mut pool);
        Self { pool, size, at: 0 }
    }

    /// The next payload.
    pub(super) fn next(&mut self) -> &[u8] {
        let start = self.at;
        // Neighbours in a batch are neighbours in the pool; each pass over it begins elsewhere.
        self.at += self.size;
        if self.at + self.size > self.pool.len() {
            self.at = (self.at + STRIDE) % self.size.max(1);
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
        let mut payloads = Payloads::new(1000);
        for codec in [Compression::Lz4, Compression::Zstd] {
            let mut builder = BatchBuilder::new(codec);
            for _ in 0..200 {
                builder.push(0, None, Some(payloads.next()), &[]).expect("fits");
            }
            assert!(builder.finish(None).expect("not empty").encoded_len() > 199_000, "{codec}");
        }
    }

    #[test]
    fn a_payload_never_leaves_the_pool() {
        for size in [0, 1, 1024, 1_000_003] {
            let mut payloads = Payloads { pool: vec![7; 4_000_000], size, at: 0 };
            assert!((0..1000).all(|_| payloads.next().len() == size));
        }
    }
}
