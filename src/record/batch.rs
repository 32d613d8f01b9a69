//! One checked batch, and the checks that make it one.

use bytes::{Buf, Bytes, BytesMut};

use super::{
    compression,
    layout::{self, HEADER_BYTES, field, set},
};
use crate::{
    limits,
    model::{Compression, LeaderEpoch, Offset, TimestampType},
};

/// A whole batch whose framing, CRC and counts were checked.
///
/// The header is held apart from the records, so that stamping copies 61 bytes and never the payload.
#[derive(Clone, PartialEq, Eq)]
pub struct Batch {
    head: [u8; HEADER_BYTES],
    records: Bytes,
}

/// Who wrote a batch, for recognising its retries (KIP-98).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProducerStamp {
    /// The producer's id.
    pub id: i64,
    /// The producer's epoch; a higher one fences the lower.
    pub epoch: i16,
    /// The sequence number of the batch's first record.
    pub base_sequence: i32,
}

/// Content of a batch, and the form that its CRC belongs to. Base offset and leader epoch, which the broker stamps, are no part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// The CRC-32C of byte 21 to the end.
    pub crc: u32,
    /// The codec of the records.
    pub compression: Compression,
    /// Who set the timestamps.
    pub timestamp_type: TimestampType,
}

impl Fingerprint {
    /// Whether a stored batch with this fingerprint can be the batch that was sent with `sent`. The CRCs are compared only where codec and
    /// timestamp type are the same: in any other case the broker rewrote the batch before it stored it. `None` is a request that held
    /// records and no batch.
    pub fn can_store(self, sent: Option<Self>) -> bool {
        let is_unchanged =
            |sent: Self| sent.compression == self.compression && sent.timestamp_type == self.timestamp_type;
        sent.is_none_or(|sent| !is_unchanged(sent) || sent.crc == self.crc)
    }
}

/// The timestamps of a batch's records, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimestampRange {
    /// The smallest of those that are one: a record without a timestamp has -1. `i64::MAX` where no record has one.
    pub min: i64,
    /// The largest, that of a record without one included.
    pub max: i64,
}

impl TimestampRange {
    /// That of no records.
    pub const EMPTY: Self = Self { min: i64::MAX, max: i64::MIN };

    /// Takes in the timestamp of one more record.
    pub fn note(&mut self, timestamp_ms: i64) {
        if timestamp_ms != layout::NO_TIMESTAMP {
            self.min = self.min.min(timestamp_ms);
        }
        self.max = self.max.max(timestamp_ms);
    }
}

/// Why bytes are no batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Fewer bytes than the batch says it has, or than a header needs.
    #[error("batch is truncated: {needed} bytes needed, {available} there")]
    Truncated {
        /// Bytes that the batch needs.
        needed: usize,
        /// Bytes that are there.
        available: usize,
    },
    /// Bytes after the batch where exactly one was expected.
    #[error("the batch is followed by {extra} B that are no part of it; one request carries one batch")]
    Trailing {
        /// How many.
        extra: usize,
    },
    /// A `batchLength` that no batch can have.
    #[error("batch length {length} is not possible: {least} to {most}")]
    Length {
        /// The field's value.
        length: i32,
        /// Least value.
        least: usize,
        /// Largest value.
        most: usize,
    },
    /// Not the format of this system.
    #[error("batch has magic {magic}; only record batch version 2 is accepted")]
    Magic {
        /// The byte found.
        magic: u8,
    },
    /// The bytes are not those that were written.
    #[error("batch is damaged: CRC-32C is {actual:#010x}, the header says {stored:#010x}")]
    Crc {
        /// The header's value.
        stored: u32,
        /// The value of the bytes.
        actual: u32,
    },
    /// Record count and last offset delta disagree, or are not possible.
    #[error("batch counts disagree: recordsCount {count}, lastOffsetDelta {last_offset_delta}")]
    Counts {
        /// `recordsCount`
        count: i32,
        /// `lastOffsetDelta`
        last_offset_delta: i32,
    },
    /// An attribute that is not allowed here.
    #[error("batch attributes {attributes:#06x} are not allowed: {reason}")]
    Attributes {
        /// The field's value.
        attributes: u16,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A stamp that cannot be: negative or overflowing offset, negative epoch.
    #[error("batch has base offset {base_offset} and leader epoch {leader_epoch}, which is not possible")]
    Stamp {
        /// `baseOffset`
        base_offset: i64,
        /// `partitionLeaderEpoch`
        leader_epoch: i32,
    },
    /// A producer id, producer epoch and sequence that no producer has.
    #[error(
        "batch has producer id {id}, producer epoch {epoch} and base sequence {base_sequence}: with a producer id none of them may be \
         negative; without one the id is -1, and epoch and sequence are -1 or 0"
    )]
    Producer {
        /// `producerId`
        id: i64,
        /// `producerEpoch`
        epoch: i16,
        /// `baseSequence`
        base_sequence: i32,
    },
    /// A record inside the batch does not parse.
    #[error("record {index} of the batch is malformed: {reason}")]
    Record {
        /// Its place in the batch, from 0.
        index: u32,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Compressed bytes that grow beyond what is allowed where they are opened.
    #[error("batch cannot be decompressed ({codec}): it grows beyond {most} bytes; send fewer records in a batch")]
    Grows {
        /// The codec.
        codec: Compression,
        /// Most bytes that its records may have.
        most: usize,
    },
    /// Compressed bytes that grow beyond the memory that there is for opening batches.
    #[error(
        "batch cannot be decompressed ({codec}): its records have more than {most} bytes, all that {setting} has room for; raise it, or \
         send fewer records in a batch"
    )]
    NoMemory {
        /// The codec.
        codec: Compression,
        /// Most bytes that its records may have.
        most: usize,
        /// The setting that raises that.
        setting: &'static str,
    },
    /// Compressed bytes that their codec refuses.
    #[error("batch cannot be decompressed ({codec}): {reason}")]
    Compression {
        /// The codec.
        codec: Compression,
        /// What the codec said.
        reason: String,
    },
}

impl Batch {
    /// Checks bytes that must be exactly one batch.
    pub fn parse(bytes: Bytes) -> Result<Self, Malformed> {
        let mut rest = bytes;
        let batch = Self::split_from(&mut rest)?;
        if rest.is_empty() { Ok(batch) } else { Err(Malformed::Trailing { extra: rest.len() }) }
    }

    /// Checks and takes the first batch of `bytes`, which may hold more. On an error `bytes` is as it was.
    pub fn split_from(bytes: &mut Bytes) -> Result<Self, Malformed> {
        let size = Self::framed_len(bytes)?;
        if bytes.len() < size {
            return Err(Malformed::Truncated { needed: size, available: bytes.len() });
        }
        let mut head = [0; HEADER_BYTES];
        head.copy_from_slice(&bytes[..HEADER_BYTES]);
        let batch = Self { head, records: bytes.slice(HEADER_BYTES..size) };
        batch.check()?;
        bytes.advance(size);
        Ok(batch)
    }

    /// Checks a batch whose header and records came apart, without copying the records.
    pub fn from_halves(head: [u8; HEADER_BYTES], records: Bytes) -> Result<Self, Malformed> {
        let size = Self::framed_len(&head)?;
        let available = HEADER_BYTES + records.len();
        if available < size {
            return Err(Malformed::Truncated { needed: size, available });
        }
        if available > size {
            return Err(Malformed::Trailing { extra: available - size });
        }
        let batch = Self { head, records };
        batch.check()?;
        Ok(batch)
    }

    /// The length in bytes of the batch that starts at the front of `bytes`, by its header alone. Needs its first 12
    /// bytes; the rest need not be there.
    pub fn framed_len(bytes: &[u8]) -> Result<usize, Malformed> {
        let Some(length) = bytes.get(layout::BATCH_LENGTH..layout::LENGTH_OVERHEAD) else {
            return Err(Malformed::Truncated { needed: HEADER_BYTES, available: bytes.len() });
        };
        let length = i32::from_be_bytes(length.try_into().expect("four bytes"));
        let least = HEADER_BYTES - layout::LENGTH_OVERHEAD;
        let most = limits::MAX_BATCH_BYTES - layout::LENGTH_OVERHEAD;
        match usize::try_from(length) {
            Ok(bytes) if (least..=most).contains(&bytes) => Ok(bytes + layout::LENGTH_OVERHEAD),
            _ => Err(Malformed::Length { length, least, most }),
        }
    }

    /// Completes a header that the caller has filled but for length and CRC. The caller has kept every bound.
    pub(super) fn seal(mut head: [u8; HEADER_BYTES], records: Bytes) -> Self {
        let length = i32::try_from(HEADER_BYTES - layout::LENGTH_OVERHEAD + records.len());
        let length = length.expect("the caller kept MAX_BATCH_BYTES");
        set(&mut head, layout::BATCH_LENGTH, length.to_be_bytes());
        let mut batch = Self { head, records };
        batch.renew_checksum();
        debug_assert_eq!(batch.check(), Ok(()), "a built batch is valid");
        batch
    }

    /// The same records in another codec, for topics that set `compression.type`: timestamps, producer and every
    /// attribute but the codec stay, and `maxTimestamp` becomes that of the records. A batch already in that codec comes back as it is.
    ///
    /// # Errors
    /// When it cannot be decompressed or its records are malformed, or when it is larger than any batch may be in the new
    /// codec.
    pub fn recompress(&self, codec: Compression) -> Result<Self, Malformed> {
        Ok(self.recompress_within(codec, limits::MAX_DECOMPRESSED_BYTES)?.0)
    }

    /// As [`Batch::recompress`], of records that have at most `most` bytes without compression; with the timestamps that were found.
    ///
    /// # Errors
    /// As there; [`Malformed::Grows`] when they have more.
    pub fn recompress_within(&self, codec: Compression, most: usize) -> Result<(Self, TimestampRange), Malformed> {
        if codec == self.compression() {
            return Ok((self.clone(), self.timestamp_range()));
        }
        let (plain, range) = self.plain_records_of_times(most)?;
        let records = match codec {
            Compression::None => plain,
            codec => compression::compress(codec, &plain),
        };
        let (least, most) = (HEADER_BYTES - layout::LENGTH_OVERHEAD, limits::MAX_BATCH_BYTES - layout::LENGTH_OVERHEAD);
        if least + records.len() > most {
            let length = i32::try_from(least + records.len()).unwrap_or(i32::MAX);
            return Err(Malformed::Length { length, least, most });
        }
        let mut head = self.head;
        let attributes = self.attributes() & !layout::COMPRESSION_MASK | codec as u16;
        set(&mut head, layout::ATTRIBUTES, attributes.to_be_bytes());
        set(&mut head, layout::MAX_TIMESTAMP, range.max.to_be_bytes());
        Ok((Self::seal(head, records), range))
    }

    /// Names another producer as the writer, or none, and renews the CRC. For the producing client alone: a batch that
    /// a broker has accepted never changes its producer.
    pub fn set_producer(&mut self, producer: Option<ProducerStamp>) {
        let producer = producer.unwrap_or(ProducerStamp { id: -1, epoch: -1, base_sequence: -1 });
        set(&mut self.head, layout::PRODUCER_ID, producer.id.to_be_bytes());
        set(&mut self.head, layout::PRODUCER_EPOCH, producer.epoch.to_be_bytes());
        set(&mut self.head, layout::BASE_SEQUENCE, producer.base_sequence.to_be_bytes());
        self.renew_checksum();
    }

    fn check(&self) -> Result<(), Malformed> {
        let magic = self.head[layout::MAGIC_AT];
        if magic != layout::MAGIC {
            return Err(Malformed::Magic { magic });
        }
        let stored = u32::from_be_bytes(field(&self.head, layout::CRC));
        let actual = self.checksum();
        if stored != actual {
            return Err(Malformed::Crc { stored, actual });
        }
        let count = i32::from_be_bytes(field(&self.head, layout::RECORDS_COUNT));
        let last_offset_delta = i32::from_be_bytes(field(&self.head, layout::LAST_OFFSET_DELTA));
        let possible = usize::try_from(count).is_ok_and(|count| (1..=limits::MAX_BATCH_RECORDS).contains(&count));
        if !possible || last_offset_delta != count - 1 {
            return Err(Malformed::Counts { count, last_offset_delta });
        }
        let attributes = self.attributes();
        if attributes & layout::COMPRESSION_MASK > Compression::Zstd as u16 {
            return Err(Malformed::Attributes { attributes, reason: "unknown compression codec" });
        }
        let base_offset = i64::from_be_bytes(field(&self.head, layout::BASE_OFFSET));
        let leader_epoch = i32::from_be_bytes(field(&self.head, layout::LEADER_EPOCH));
        // A producer leaves the leader epoch at -1 and the offset at 0: both are stamped before anything is stored.
        if base_offset < 0 || base_offset.checked_add(i64::from(count)).is_none() || leader_epoch < -1 {
            return Err(Malformed::Stamp { base_offset, leader_epoch });
        }
        Ok(())
    }

    /// What no client may send, though it is well formed: control batches, transactions, a timestamp type, part of a producer's stamp.
    pub fn check_client(&self) -> Result<(), Malformed> {
        let attributes = self.attributes();
        let refuse = |reason| Err(Malformed::Attributes { attributes, reason });
        if attributes & layout::CONTROL != 0 {
            return refuse("control batches are the broker's own");
        }
        if attributes & layout::TRANSACTIONAL != 0 {
            return refuse("transactions are not supported");
        }
        if attributes & layout::LOG_APPEND_TIME != 0 {
            return refuse("only the broker says that the broker set the timestamps");
        }
        if attributes & !layout::COMPRESSION_MASK != 0 {
            return refuse("unknown bits are set");
        }
        self.check_producer()
    }

    /// Refuses a producer's stamp that is neither whole nor absent. Part of a stamp would pass for a batch without a producer, or start a
    /// producer in a state that no later batch of it can follow. Clients without idempotence write -1 or 0 as epoch and sequence: Java and C
    /// (-1, -1), Sarama (-1, 0), KafkaJS (0, 0).
    fn check_producer(&self) -> Result<(), Malformed> {
        let ProducerStamp { id, epoch, base_sequence } = self.stamp_fields();
        let is_absent = id == -1 && matches!(epoch, -1 | 0) && matches!(base_sequence, -1 | 0);
        let is_whole = id >= 0 && epoch >= 0 && base_sequence >= 0;
        if is_absent || is_whole { Ok(()) } else { Err(Malformed::Producer { id, epoch, base_sequence }) }
    }

    fn checksum(&self) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&self.head[layout::CRC_START..]), &self.records)
    }

    /// Sets the two fields that the CRC does not cover.
    pub fn stamp(&mut self, base_offset: Offset, epoch: LeaderEpoch) {
        set(&mut self.head, layout::BASE_OFFSET, base_offset.as_i64().to_be_bytes());
        set(&mut self.head, layout::LEADER_EPOCH, epoch.as_i32().to_be_bytes());
    }

    /// Makes every record's timestamp the broker's (`message.timestamp.type=LogAppendTime`) and renews the CRC.
    pub fn set_append_time(&mut self, now_ms: i64) {
        let attributes = self.attributes() | layout::LOG_APPEND_TIME;
        set(&mut self.head, layout::ATTRIBUTES, attributes.to_be_bytes());
        set(&mut self.head, layout::MAX_TIMESTAMP, now_ms.to_be_bytes());
        self.renew_checksum();
    }

    /// Makes `maxTimestamp` what retention and search by time take it for: the largest timestamp of the records, where they
    /// are plain, which checks them as [`Batch::verify_records`] does in the same walk. Of compressed ones only the first
    /// timestamp is known, and the largest is not below it. Returns what is known of the timestamps.
    ///
    /// # Errors
    /// As [`Batch::verify_records`].
    pub fn correct_max_timestamp(&mut self) -> Result<TimestampRange, Malformed> {
        let range = match self.compression() {
            Compression::None => self.records()?.timestamp_range()?,
            _ => self.timestamp_range(),
        };
        if range.max != self.max_timestamp() {
            set(&mut self.head, layout::MAX_TIMESTAMP, range.max.to_be_bytes());
            self.renew_checksum();
        }
        Ok(range)
    }

    /// What the header says of the timestamps: that of the first record, and the largest, which is not below it.
    pub fn timestamp_range(&self) -> TimestampRange {
        let mut range = TimestampRange::EMPTY;
        range.note(self.base_timestamp());
        range.note(self.max_timestamp().max(self.base_timestamp()));
        range
    }

    /// Clears a producer's claim that the broker set the timestamps, which only the broker may make.
    pub fn set_create_time(&mut self) {
        if self.attributes() & layout::LOG_APPEND_TIME != 0 {
            let attributes = self.attributes() & !layout::LOG_APPEND_TIME;
            set(&mut self.head, layout::ATTRIBUTES, attributes.to_be_bytes());
            self.renew_checksum();
        }
    }

    fn renew_checksum(&mut self) {
        let crc = self.checksum();
        set(&mut self.head, layout::CRC, crc.to_be_bytes());
    }

    /// The header's bytes.
    pub fn head(&self) -> &[u8; HEADER_BYTES] {
        &self.head
    }

    /// The bytes after the header: the framed records, perhaps compressed.
    pub fn records_bytes(&self) -> &Bytes {
        &self.records
    }

    /// The batch's length in bytes.
    pub fn encoded_len(&self) -> usize {
        HEADER_BYTES + self.records.len()
    }

    /// The whole batch in one piece: copies the payload.
    pub fn to_bytes(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(self.encoded_len());
        bytes.extend_from_slice(&self.head);
        bytes.extend_from_slice(&self.records);
        bytes.freeze()
    }

    /// Copies the batch into one block of memory of its own, so that the batch does not hold the larger buffer that it was received in. Returns
    /// all of its bytes.
    pub fn detach(&mut self) -> Bytes {
        let bytes = self.to_bytes();
        self.records = bytes.slice(HEADER_BYTES..);
        bytes
    }

    /// Offset of the first record.
    pub fn base_offset(&self) -> Offset {
        Offset::from_i64(i64::from_be_bytes(field(&self.head, layout::BASE_OFFSET))).expect("checked: not negative")
    }

    /// Offset after the last record.
    pub fn end_offset(&self) -> Offset {
        self.base_offset().plus(u64::from(self.count()))
    }

    /// How many records it holds: at least one.
    pub fn count(&self) -> u32 {
        u32::from_be_bytes(field(&self.head, layout::RECORDS_COUNT))
    }

    /// The epoch it was written in; `None` when it was not stamped.
    pub fn leader_epoch(&self) -> Option<LeaderEpoch> {
        LeaderEpoch::from_i32(i32::from_be_bytes(field(&self.head, layout::LEADER_EPOCH)))
    }

    /// The CRC-32C of byte 21 to the end.
    pub fn crc(&self) -> u32 {
        u32::from_be_bytes(field(&self.head, layout::CRC))
    }

    /// The attribute bits.
    pub fn attributes(&self) -> u16 {
        u16::from_be_bytes(field(&self.head, layout::ATTRIBUTES))
    }

    /// How the records are compressed.
    pub fn compression(&self) -> Compression {
        match self.attributes() & layout::COMPRESSION_MASK {
            0 => Compression::None,
            1 => Compression::Gzip,
            2 => Compression::Snappy,
            3 => Compression::Lz4,
            _ => Compression::Zstd,
        }
    }

    /// Who set the timestamps.
    pub fn timestamp_type(&self) -> TimestampType {
        if self.attributes() & layout::LOG_APPEND_TIME == 0 {
            TimestampType::CreateTime
        } else {
            TimestampType::LogAppendTime
        }
    }

    /// The timestamp that records' deltas count from, in milliseconds.
    pub fn base_timestamp(&self) -> i64 {
        i64::from_be_bytes(field(&self.head, layout::BASE_TIMESTAMP))
    }

    /// The largest timestamp of its records, in milliseconds, by the producer's word.
    pub fn max_timestamp(&self) -> i64 {
        i64::from_be_bytes(field(&self.head, layout::MAX_TIMESTAMP))
    }

    /// The idempotent producer that wrote it, when one did.
    pub fn producer(&self) -> Option<ProducerStamp> {
        Some(self.stamp_fields()).filter(|stamp| stamp.id >= 0)
    }

    fn stamp_fields(&self) -> ProducerStamp {
        ProducerStamp {
            id: i64::from_be_bytes(field(&self.head, layout::PRODUCER_ID)),
            epoch: i16::from_be_bytes(field(&self.head, layout::PRODUCER_EPOCH)),
            base_sequence: i32::from_be_bytes(field(&self.head, layout::BASE_SEQUENCE)),
        }
    }

    /// What tells this batch from another one with the same producer and sequence.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint { crc: self.crc(), compression: self.compression(), timestamp_type: self.timestamp_type() }
    }
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch")
            .field("base_offset", &self.base_offset())
            .field("count", &self.count())
            .field("leader_epoch", &self.leader_epoch())
            .field("bytes", &self.encoded_len())
            .finish_non_exhaustive()
    }
}
