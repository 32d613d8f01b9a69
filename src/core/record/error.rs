//! The errors of a batch that fails a check, and of its decompression.

use crate::{limits, model::Compression};

/// Error of a batch that fails a check.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedBatch {
    /// The batch has fewer bytes than its header declares, or fewer than a header.
    #[error("batch is truncated: {needed} bytes are needed, {available} are present")]
    Truncated {
        /// Required number of bytes.
        needed: usize,
        /// Number of bytes present.
        available: usize,
    },
    /// Bytes follow the batch, and exactly one batch is expected.
    #[error("{extra} bytes follow the batch: send one batch in a request")]
    Trailing {
        /// Number of these bytes.
        extra: usize,
    },
    /// The field `batchLength` is outside the possible range.
    #[error("batch length {length} is outside {min} to {max}")]
    Length {
        /// The field's value.
        length: i32,
        /// Smallest possible value.
        min: usize,
        /// Largest possible value.
        max: usize,
    },
    /// The magic is not 2.
    #[error("batch has magic {magic}: only record batch version 2 is accepted")]
    Magic {
        /// Value of the field.
        magic: u8,
    },
    /// The CRC of the bytes is not the CRC in the header.
    #[error("batch is corrupt: CRC-32C is {actual:#010x}, the header has {stored:#010x}")]
    Crc {
        /// Value in the header.
        stored: u32,
        /// Value computed from the bytes.
        actual: u32,
    },
    /// Record count and last offset delta do not match, or they are outside the possible range.
    #[error(
        "batch has recordsCount {count} and lastOffsetDelta {last_offset_delta}: recordsCount must be 1 to {}, and \
         lastOffsetDelta one less than recordsCount",
        limits::MAX_BATCH_RECORDS
    )]
    Counts {
        /// `recordsCount`
        count: i32,
        /// `lastOffsetDelta`
        last_offset_delta: i32,
    },
    /// An attribute is not allowed.
    #[error("batch attributes {attributes:#06x} are not allowed: {reason}")]
    Attributes {
        /// The field's value.
        attributes: u16,
        /// Description of the problem.
        reason: &'static str,
    },
    /// The base offset is negative, the end offset overflows, or the leader epoch is below -1.
    #[error(
        "batch has baseOffset {base_offset} and partitionLeaderEpoch {leader_epoch}: its offsets must be 0 to 2^63-2, \
         and its leader epoch -1 or more; a producer sends baseOffset 0 and partitionLeaderEpoch -1"
    )]
    OffsetOrEpoch {
        /// `baseOffset`
        base_offset: i64,
        /// `partitionLeaderEpoch`
        leader_epoch: i32,
    },
    /// Producer id, producer epoch and base sequence are neither complete nor absent.
    #[error(
        "batch has producer id {id}, producer epoch {epoch} and base sequence {base_sequence}: with a producer id all three must be 0 or \
         more; without a producer id the id must be -1, and epoch and sequence -1 or 0"
    )]
    Producer {
        /// `producerId`
        id: i64,
        /// `producerEpoch`
        epoch: i16,
        /// `baseSequence`
        base_sequence: i32,
    },
    /// A record of the batch cannot be parsed.
    #[error("record {index} of the batch is malformed: {reason}")]
    Record {
        /// Index in the batch, from 0.
        index: u32,
        /// Description of the problem.
        reason: &'static str,
    },
    /// The decompressed records exceed the maximum.
    #[error(
        "batch cannot be decompressed ({codec}): its records have more than {max} bytes: send fewer records in a batch"
    )]
    Grows {
        /// The codec.
        codec: Compression,
        /// Maximum number of bytes after decompression.
        max: usize,
    },
    /// The decompressed records exceed the maximum that a memory setting of the broker implies.
    #[error(
        "batch cannot be decompressed ({codec}): its records have more than {max} bytes, the maximum that the \
         broker's setting {setting} allows for one batch: raise the setting, or send fewer records in a batch"
    )]
    NoMemory {
        /// The codec.
        codec: Compression,
        /// Maximum number of bytes after decompression.
        max: usize,
        /// Setting that determines the maximum.
        setting: &'static str,
    },
    /// The codec rejects the compressed bytes.
    #[error("batch cannot be decompressed ({codec}): {reason}")]
    Compression {
        /// The codec.
        codec: Compression,
        /// Error of the codec.
        reason: String,
    },
}

/// Error of a decompression.
pub(super) enum DecompressError {
    /// The decompressed bytes exceed the maximum.
    Grows,
    /// The codec rejects the bytes.
    Codec(String),
}

impl DecompressError {
    pub(super) fn into_malformed(self, codec: Compression, max: usize) -> MalformedBatch {
        match self {
            Self::Grows => MalformedBatch::Grows { codec, max },
            Self::Codec(reason) => MalformedBatch::Compression { codec, reason },
        }
    }
}

impl<T: Into<String>> From<T> for DecompressError {
    fn from(reason: T) -> Self {
        Self::Codec(reason.into())
    }
}
