//! Selection of a partition for each record.

/// Decision of a [`Partitioner`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionChoice {
    /// This partition, modulo the number of partitions.
    Partition(u32),
    /// The partition whose batch the producer is filling. The producer stays with one partition until a batch or
    /// `batch_bytes` of records are full, and then selects another one. So few records still make large batches.
    Sticky,
}

/// Selects the partition of a record that names none.
pub trait Partitioner: Send + Sync + std::fmt::Debug {
    /// Selects one of `partitions` partitions (at least 1). Called on the sender's thread, for each record without an
    /// explicit partition.
    fn choose(&self, key: Option<&[u8]>, value: Option<&[u8]>, partitions: u32) -> PartitionChoice;
}

/// Partitioner like the default of Kafka's Java client. Keys are hashed with murmur2, so a key has the same partition
/// as with that client. Records without a key are [`PartitionChoice::Sticky`].
#[derive(Clone, Copy, Debug, Default)]
pub struct HashPartitioner;

impl Partitioner for HashPartitioner {
    fn choose(&self, key: Option<&[u8]>, _value: Option<&[u8]>, partitions: u32) -> PartitionChoice {
        match key {
            Some(key) => PartitionChoice::Partition((murmur2(key) & 0x7fff_ffff) % partitions),
            None => PartitionChoice::Sticky,
        }
    }
}

/// Partitioner that ignores keys: every record is [`PartitionChoice::Sticky`].
#[derive(Clone, Copy, Debug, Default)]
pub struct StickyPartitioner;

impl Partitioner for StickyPartitioner {
    fn choose(&self, _key: Option<&[u8]>, _value: Option<&[u8]>, _partitions: u32) -> PartitionChoice {
        PartitionChoice::Sticky
    }
}

/// Computes Murmur2 (Austin Appleby), 32 bits, as `org.apache.kafka.common.utils.Utils.murmur2` does.
pub fn murmur2(bytes: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    // Java hashes the length as an `int`, and no key is longer than 2^31.
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut hash = SEED ^ length;
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        let mut k = u32::from_le_bytes(*word).wrapping_mul(M);
        k ^= k >> 24;
        hash = hash.wrapping_mul(M) ^ k.wrapping_mul(M);
    }
    if !rest.is_empty() {
        for (position, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * position);
        }
        hash = hash.wrapping_mul(M);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(M);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors of Kafka's `UtilsTest.testMurmur2`.
    #[test]
    fn murmur2_matches_kafka() {
        let vectors: [(&str, i32); 6] = [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            ("abc", 479_470_107),
        ];
        for (key, hash) in vectors {
            assert_eq!(murmur2(key.as_bytes()).cast_signed(), hash, "{key}");
        }
    }

    #[test]
    fn key_selects_one_partition_and_null_key_is_sticky() {
        assert_eq!(
            HashPartitioner.choose(Some(b"21"), None, 7),
            PartitionChoice::Partition((-973_932_308_i32).cast_unsigned() & 0x7fff_ffff).modulo(7)
        );
        assert_eq!(HashPartitioner.choose(None, Some(b"v"), 7), PartitionChoice::Sticky);
        assert_eq!(StickyPartitioner.choose(Some(b"k"), Some(b"v"), 7), PartitionChoice::Sticky);
    }

    impl PartitionChoice {
        fn modulo(self, partitions: u32) -> Self {
            match self {
                Self::Partition(number) => Self::Partition(number % partitions),
                Self::Sticky => Self::Sticky,
            }
        }
    }
}
