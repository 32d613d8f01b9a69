//! Positions of the fields of a batch header, and functions that read and write them. All numbers are big-endian.

/// Length of the header. The records follow the header.
pub const HEADER_BYTES: usize = crate::limits::BATCH_HEADER_BYTES;

/// Length of the fields that `batchLength` does not count.
pub(super) const LENGTH_OVERHEAD: usize = 12;

/// Position of the first byte that the CRC covers.
pub(super) const CRC_START: usize = 21;

/// The only accepted magic.
pub(super) const MAGIC: u8 = 2;

pub(super) const BASE_OFFSET: usize = 0;
pub(super) const BATCH_LENGTH: usize = 8;
pub(super) const LEADER_EPOCH: usize = 12;
pub(super) const MAGIC_AT: usize = 16;
pub(super) const CRC: usize = 17;
pub(super) const ATTRIBUTES: usize = 21;
pub(super) const LAST_OFFSET_DELTA: usize = 23;
pub(super) const BASE_TIMESTAMP: usize = 27;
pub(super) const MAX_TIMESTAMP: usize = 35;
pub(super) const PRODUCER_ID: usize = 43;
pub(super) const PRODUCER_EPOCH: usize = 51;
pub(super) const BASE_SEQUENCE: usize = 53;
pub(super) const RECORDS_COUNT: usize = 57;

/// Timestamp value of a record that has no timestamp.
pub(super) const NO_TIMESTAMP: i64 = -1;

/// Attribute bits 0 to 2.
pub(super) const COMPRESSION_MASK: u16 = 0b111;
/// Attribute bit 3: the broker set the timestamps.
pub(super) const LOG_APPEND_TIME: u16 = 1 << 3;
/// Attribute bit 4: the batch is part of a transaction.
pub(super) const TRANSACTIONAL: u16 = 1 << 4;
/// Attribute bit 5: a control batch. Clients must not send control batches.
pub(super) const CONTROL: u16 = 1 << 5;

/// Reads the `N` bytes of a header at `at`.
pub(super) fn field<const N: usize>(header: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    header[at..at + N].try_into().expect("every field lies inside the header")
}

/// Writes the field of a header at `at`.
pub(super) fn set<const N: usize>(header: &mut [u8; HEADER_BYTES], at: usize, value: [u8; N]) {
    header[at..at + N].copy_from_slice(&value);
}
