//! Which partition a record goes to.

/// What a [`Partitioner`] decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// This partition; taken modulo the number there are.
    Partition(u32),
    /// Wherever the producer is filling a batch: it stays with one partition until a batch is full, then goes on to
    /// another, so that few records still make large batches.
    Sticky,
}

/// Decides which partition a record goes to when its sender named none.
pub trait Partitioner: Send + Sync + std::fmt::Debug {
    /// Chooses one of `partitions` (at least 1). Called for every record, from the sender's thread.
    fn choose(&self, key: Option<&[u8]>, value: Option<&[u8]>, partitions: u32) -> Choice;
}

/// Kafka's default: records with a key by murmur2 of the key, so that they land where any Kafka client would have put
/// them; the others wherever a batch is being filled.
#[derive(Clone, Copy, Debug, Default)]
pub struct KeyHash;

impl Partitioner for KeyHash {
    fn choose(&self, key: Option<&[u8]>, _value: Option<&[u8]>, partitions: u32) -> Choice {
        match key {
            Some(key) => Choice::Partition((murmur2(key) & 0x7fff_ffff) % partitions),
            None => Choice::Sticky,
        }
    }
}

/// Ignores keys: every record goes wherever a batch is being filled.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spread;

impl Partitioner for Spread {
    fn choose(&self, _key: Option<&[u8]>, _value: Option<&[u8]>, _partitions: u32) -> Choice {
        Choice::Sticky
    }
}

/// Murmur2 by Austin Appleby, 32 bits, as `org.apache.kafka.common.utils.Utils.murmur2` computes it.
pub fn murmur2(bytes: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    // Java's int length; no key is longer than 2^31.
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut hash = SEED ^ length;
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        let mut k = u32::from_le_bytes(*word).wrapping_mul(M);
        k ^= k >> 24;
        hash = hash.wrapping_mul(M) ^ k.wrapping_mul(M);
    }
    if !rest.is_empty() {
        for (place, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * place);
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

    /// The vectors of Kafka's own `UtilsTest.testMurmur2`.
    #[test]
    fn murmur2_is_kafkas() {
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
    fn a_key_always_goes_to_one_partition_and_a_null_key_sticks() {
        assert_eq!(
            KeyHash.choose(Some(b"21"), None, 7),
            Choice::Partition((-973_932_308_i32).cast_unsigned() & 0x7fff_ffff).modulo(7)
        );
        assert_eq!(KeyHash.choose(None, Some(b"v"), 7), Choice::Sticky);
        assert_eq!(Spread.choose(Some(b"k"), Some(b"v"), 7), Choice::Sticky);
    }

    impl Choice {
        fn modulo(self, partitions: u32) -> Self {
            match self {
                Self::Partition(number) => Self::Partition(number % partitions),
                Self::Sticky => Self::Sticky,
            }
        }
    }
}
