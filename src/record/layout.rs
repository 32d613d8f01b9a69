//! Positions of the fields of a batch header, and functions that read and write them. All numbers are big-endian.

/// Length of the header. The records follow the header.
pub const HEADER_BYTES: usize = crate::limits::BATCH_HEADER_BYTES;

/// Length of the fields that `batchLength` does not count.
pub(crate) const LENGTH_OVERHEAD: usize = 12;

/// Position of the first byte that the CRC covers.
pub(crate) const CRC_START: usize = 21;

/// The only accepted magic.
pub(crate) const MAGIC: u8 = 2;

pub(crate) const BASE_OFFSET: usize = 0;
pub(crate) const BATCH_LENGTH: usize = 8;
pub(crate) const LEADER_EPOCH: usize = 12;
pub(crate) const MAGIC_AT: usize = 16;
pub(crate) const CRC: usize = 17;
pub(crate) const ATTRIBUTES: usize = 21;
pub(crate) const LAST_OFFSET_DELTA: usize = 23;
pub(crate) const BASE_TIMESTAMP: usize = 27;
pub(crate) const MAX_TIMESTAMP: usize = 35;
pub(crate) const PRODUCER_ID: usize = 43;
pub(crate) const PRODUCER_EPOCH: usize = 51;
pub(crate) const BASE_SEQUENCE: usize = 53;
pub(crate) const RECORDS_COUNT: usize = 57;

/// Timestamp value of a record that has no timestamp.
pub(crate) const NO_TIMESTAMP: i64 = -1;

/// Attribute bits 0 to 2.
pub(crate) const COMPRESSION_MASK: u16 = 0b111;
/// Attribute bit 3: the broker set the timestamps.
pub(crate) const LOG_APPEND_TIME: u16 = 1 << 3;
/// Attribute bit 4: the batch is part of a transaction.
pub(crate) const TRANSACTIONAL: u16 = 1 << 4;
/// Attribute bit 5: a control batch. Clients must not send control batches.
pub(crate) const CONTROL: u16 = 1 << 5;

/// Reads the `N` bytes of a header at `at`.
pub(crate) fn field<const N: usize>(header: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    header[at..at + N].try_into().expect("every field lies inside the header")
}

/// Writes the field of a header at `at`.
pub(crate) fn set<const N: usize>(header: &mut [u8; HEADER_BYTES], at: usize, value: [u8; N]) {
    header[at..at + N].copy_from_slice(&value);
}
