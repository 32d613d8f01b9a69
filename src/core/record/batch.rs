//! `Batch`: a checked batch, its checks and the changes of its header.

use bytes::{Buf, Bytes, BytesMut};

use super::{
    compression,
    error::MalformedBatch,
    layout::{self, HEADER_BYTES, field, set},
};
use crate::{
    limits,
    model::{Compression, LeaderEpoch, Offset, TimestampType},
};

/// A complete batch. Its length, header fields and CRC are checked.
///
/// The header is apart from the records, so that a change of the header copies 61 bytes and no payload.
#[derive(Clone, PartialEq, Eq)]
pub struct Batch {
    header: [u8; HEADER_BYTES],
    records: Bytes,
}

/// Producer and sequence of a batch, which identify its retries (KIP-98).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProducerSequence {
    /// Id of the producer.
    pub id: i64,
    /// Epoch of the producer. A higher epoch fences the lower ones.
    pub epoch: i16,
    /// Sequence number of the first record.
    pub base_sequence: i32,
}

/// CRC of a batch, with the encoding that the CRC belongs to. Base offset and leader epoch, which the broker sets, do
/// not change the CRC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// The CRC-32C of byte 21 to the end.
    pub crc: u32,
    /// Codec of the records.
    pub compression: Compression,
    /// Source of the timestamps: producer or broker.
    pub timestamp_type: TimestampType,
}

impl Fingerprint {
    /// Returns true if a stored batch with this fingerprint can be the batch that was sent with `sent`. Compares the
    /// CRCs only if codec and timestamp type are equal: otherwise the broker rewrote the batch before it stored the
    /// batch. `None` stands for a request that had records and no batch.
    pub fn can_store(self, sent: Option<Self>) -> bool {
        let is_unchanged =
            |sent: Self| sent.compression == self.compression && sent.timestamp_type == self.timestamp_type;
        sent.is_none_or(|sent| !is_unchanged(sent) || sent.crc == self.crc)
    }
}

/// Smallest and largest timestamp of the records of a batch, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimestampRange {
    /// Smallest timestamp, not counting the -1 of records without a timestamp. `i64::MAX` if no record has a timestamp.
    pub min: i64,
    /// Largest timestamp, counting the -1 of records without a timestamp.
    pub max: i64,
}

impl TimestampRange {
    /// Range of no records.
    pub const EMPTY: Self = Self { min: i64::MAX, max: i64::MIN };

    /// Extends the range by the timestamp of one record.
    pub fn extend(&mut self, timestamp_ms: i64) {
        if timestamp_ms != layout::NO_TIMESTAMP {
            self.min = self.min.min(timestamp_ms);
        }
        self.max = self.max.max(timestamp_ms);
    }
}

impl Batch {
    /// Parses bytes that must be exactly one batch.
    pub fn parse(bytes: Bytes) -> Result<Self, MalformedBatch> {
        let mut rest = bytes;
        let batch = Self::split_from(&mut rest)?;
        if rest.is_empty() { Ok(batch) } else { Err(MalformedBatch::Trailing { extra: rest.len() }) }
    }

    /// Parses the first batch of `bytes` and removes it from `bytes`. An error leaves `bytes` unchanged.
    pub fn split_from(bytes: &mut Bytes) -> Result<Self, MalformedBatch> {
        let size = Self::framed_len(bytes)?;
        if bytes.len() < size {
            return Err(MalformedBatch::Truncated { needed: size, available: bytes.len() });
        }
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&bytes[..HEADER_BYTES]);
        let batch = Self { header, records: bytes.slice(HEADER_BYTES..size) };
        batch.check()?;
        bytes.advance(size);
        Ok(batch)
    }

    /// Creates a batch from a header and its records without copying the records.
    pub fn from_parts(header: [u8; HEADER_BYTES], records: Bytes) -> Result<Self, MalformedBatch> {
        let size = Self::framed_len(&header)?;
        let available = HEADER_BYTES + records.len();
        if available < size {
            return Err(MalformedBatch::Truncated { needed: size, available });
        }
        if available > size {
            return Err(MalformedBatch::Trailing { extra: available - size });
        }
        let batch = Self { header, records };
        batch.check()?;
        Ok(batch)
    }

    /// Returns the length of the batch at the start of `bytes`, as its header declares it. Reads the first 12 bytes
    /// only. Fails if there are fewer, or if the length is outside the possible range.
    pub fn framed_len(bytes: &[u8]) -> Result<usize, MalformedBatch> {
        let Some(length) = bytes.get(layout::BATCH_LENGTH..layout::LENGTH_OVERHEAD) else {
            return Err(MalformedBatch::Truncated { needed: HEADER_BYTES, available: bytes.len() });
        };
        let length = i32::from_be_bytes(length.try_into().expect("four bytes"));
        let min = HEADER_BYTES - layout::LENGTH_OVERHEAD;
        let max = limits::MAX_BATCH_BYTES - layout::LENGTH_OVERHEAD;
        match usize::try_from(length) {
            Ok(bytes) if (min..=max).contains(&bytes) => Ok(bytes + layout::LENGTH_OVERHEAD),
            _ => Err(MalformedBatch::Length { length, min, max }),
        }
    }

    /// Completes a header by the length and the CRC, and returns the batch. The caller has checked all limits.
    pub(super) fn seal(mut header: [u8; HEADER_BYTES], records: Bytes) -> Self {
        let length = i32::try_from(HEADER_BYTES - layout::LENGTH_OVERHEAD + records.len());
        let length = length.expect("the caller checks MAX_BATCH_BYTES");
        set(&mut header, layout::BATCH_LENGTH, length.to_be_bytes());
        let mut batch = Self { header, records };
        batch.renew_checksum();
        debug_assert_eq!(batch.check(), Ok(()), "a built batch is valid");
        batch
    }

    /// Returns the same records in another codec, for topics that set `compression.type`. Timestamps, producer and all
    /// other attributes stay the same. `maxTimestamp` becomes the largest timestamp of the records. If the batch has
    /// this codec already, the result is an equal batch, unchecked and with its `maxTimestamp`.
    ///
    /// # Errors
    /// The batch cannot be decompressed, a record is malformed, or the batch exceeds the maximum size in the new codec.
    pub fn recompress(&self, codec: Compression) -> Result<Self, MalformedBatch> {
        Ok(self.recompress_within(codec, limits::MAX_DECOMPRESSED_BYTES)?.0)
    }

    /// Recompresses as [`Batch::recompress`] does, if the decompressed records have at most `max` bytes. Also returns
    /// the range of their timestamps. If the batch already has this codec, it is not decompressed: `max` does not
    /// apply, and the range is that of the header.
    ///
    /// # Errors
    /// As [`Batch::recompress`], and [`MalformedBatch::Grows`] if the records have more bytes.
    pub fn recompress_within(&self, codec: Compression, max: usize) -> Result<(Self, TimestampRange), MalformedBatch> {
        if codec == self.compression() {
            return Ok((self.clone(), self.timestamp_range()));
        }
        let (uncompressed, range) = self.decode_records_and_timestamps(max)?;
        let records = match codec {
            Compression::None => uncompressed,
            codec => compression::compress(codec, &uncompressed),
        };
        let (min, max) = (HEADER_BYTES - layout::LENGTH_OVERHEAD, limits::MAX_BATCH_BYTES - layout::LENGTH_OVERHEAD);
        if min + records.len() > max {
            let length = i32::try_from(min + records.len()).unwrap_or(i32::MAX);
            return Err(MalformedBatch::Length { length, min, max });
        }
        let mut header = self.header;
        let attributes = self.attributes() & !layout::COMPRESSION_MASK | codec as u16;
        set(&mut header, layout::ATTRIBUTES, attributes.to_be_bytes());
        set(&mut header, layout::MAX_TIMESTAMP, range.max.to_be_bytes());
        Ok((Self::seal(header, records), range))
    }

    /// Sets or removes the producer, and updates the CRC. Only a producer client calls this function: the producer of a
    /// batch that a broker accepted never changes.
    pub fn set_producer(&mut self, producer: Option<ProducerSequence>) {
        let producer = producer.unwrap_or(ProducerSequence { id: -1, epoch: -1, base_sequence: -1 });
        set(&mut self.header, layout::PRODUCER_ID, producer.id.to_be_bytes());
        set(&mut self.header, layout::PRODUCER_EPOCH, producer.epoch.to_be_bytes());
        set(&mut self.header, layout::BASE_SEQUENCE, producer.base_sequence.to_be_bytes());
        self.renew_checksum();
    }

    /// Checks the header fields and the CRC, but not the records. The length was checked before.
    fn check(&self) -> Result<(), MalformedBatch> {
        let magic = self.header[layout::MAGIC_AT];
        if magic != layout::MAGIC {
            return Err(MalformedBatch::Magic { magic });
        }
        let stored = u32::from_be_bytes(field(&self.header, layout::CRC));
        let actual = self.checksum();
        if stored != actual {
            return Err(MalformedBatch::Crc { stored, actual });
        }
        let count = i32::from_be_bytes(field(&self.header, layout::RECORDS_COUNT));
        let last_offset_delta = i32::from_be_bytes(field(&self.header, layout::LAST_OFFSET_DELTA));
        let is_possible = usize::try_from(count).is_ok_and(|count| (1..=limits::MAX_BATCH_RECORDS).contains(&count));
        if !is_possible || last_offset_delta != count - 1 {
            return Err(MalformedBatch::Counts { count, last_offset_delta });
        }
        let attributes = self.attributes();
        if attributes & layout::COMPRESSION_MASK > Compression::Zstd as u16 {
            return Err(MalformedBatch::Attributes { attributes, reason: "unknown compression codec" });
        }
        let base_offset = i64::from_be_bytes(field(&self.header, layout::BASE_OFFSET));
        let leader_epoch = i32::from_be_bytes(field(&self.header, layout::LEADER_EPOCH));
        // A producer sends leader epoch -1 and offset 0. The leader sets both before the batch is stored.
        if base_offset < 0 || base_offset.checked_add(i64::from(count)).is_none() || leader_epoch < -1 {
            return Err(MalformedBatch::OffsetOrEpoch { base_offset, leader_epoch });
        }
        Ok(())
    }

    /// Rejects well-formed batches that a client must not send. These have the attributes control, transaction or
    /// `LogAppendTime`, unknown attribute bits, or incomplete producer fields.
    pub fn check_client(&self) -> Result<(), MalformedBatch> {
        let attributes = self.attributes();
        let reject = |reason| Err(MalformedBatch::Attributes { attributes, reason });
        if attributes & layout::CONTROL != 0 {
            return reject("only a broker writes control batches");
        }
        if attributes & layout::TRANSACTIONAL != 0 {
            return reject("transactions are not supported");
        }
        if attributes & layout::LOG_APPEND_TIME != 0 {
            return reject("only a broker sets the timestamp type LogAppendTime");
        }
        if attributes & !layout::COMPRESSION_MASK != 0 {
            return reject("unknown bits are set");
        }
        self.check_producer()
    }

    /// Rejects producer fields that are neither complete nor absent. A batch with incomplete fields would count as a
    /// batch without a producer. Or it would start a producer with a sequence that the next batch does not continue.
    /// Clients without idempotence write these values as epoch and sequence: Java and C (-1, -1), Sarama (-1, 0),
    /// KafkaJS (0, 0).
    fn check_producer(&self) -> Result<(), MalformedBatch> {
        let ProducerSequence { id, epoch, base_sequence } = self.producer_fields();
        let is_absent = id == -1 && matches!(epoch, -1 | 0) && matches!(base_sequence, -1 | 0);
        let is_complete = id >= 0 && epoch >= 0 && base_sequence >= 0;
        if is_absent || is_complete { Ok(()) } else { Err(MalformedBatch::Producer { id, epoch, base_sequence }) }
    }

    /// Computes the CRC-32C of byte 21 to the end.
    fn checksum(&self) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&self.header[layout::CRC_START..]), &self.records)
    }

    /// Sets base offset and leader epoch, the two fields that the CRC does not cover.
    pub fn set_offset_and_epoch(&mut self, base_offset: Offset, epoch: LeaderEpoch) {
        set(&mut self.header, layout::BASE_OFFSET, base_offset.as_i64().to_be_bytes());
        set(&mut self.header, layout::LEADER_EPOCH, epoch.as_i32().to_be_bytes());
    }

    /// Sets the timestamp type to `LogAppendTime` and the largest timestamp to `now_ms`, the time of the broker.
    /// Readers then use `now_ms` for all records. Updates the CRC.
    pub fn set_append_time(&mut self, now_ms: i64) {
        let attributes = self.attributes() | layout::LOG_APPEND_TIME;
        set(&mut self.header, layout::ATTRIBUTES, attributes.to_be_bytes());
        set(&mut self.header, layout::MAX_TIMESTAMP, now_ms.to_be_bytes());
        self.renew_checksum();
    }

    /// Sets `maxTimestamp` to the largest timestamp of the records, on which retention and search by time rely, and
    /// updates the CRC. Returns the range of the timestamps.
    ///
    /// Uncompressed records are checked in the same pass, as [`Batch::verify_records`] does. Of compressed records only
    /// the first timestamp is known, so a lower `maxTimestamp` is raised to it and any other value stays.
    ///
    /// # Errors
    /// As [`Batch::verify_records`].
    pub fn correct_max_timestamp(&mut self) -> Result<TimestampRange, MalformedBatch> {
        let range = match self.compression() {
            Compression::None => self.records()?.timestamp_range()?,
            _ => self.timestamp_range(),
        };
        if range.max != self.max_timestamp() {
            set(&mut self.header, layout::MAX_TIMESTAMP, range.max.to_be_bytes());
            self.renew_checksum();
        }
        Ok(range)
    }

    /// Returns the range of the timestamps that the header states: from the first record's timestamp to the largest
    /// one. The largest one is never below the first.
    pub fn timestamp_range(&self) -> TimestampRange {
        let mut range = TimestampRange::EMPTY;
        range.extend(self.base_timestamp());
        range.extend(self.max_timestamp().max(self.base_timestamp()));
        range
    }

    /// Sets the timestamp type to `CreateTime`, and updates the CRC if the type changes. The leader calls this for
    /// topics with `message.timestamp.type=CreateTime`.
    pub fn set_create_time(&mut self) {
        if self.attributes() & layout::LOG_APPEND_TIME != 0 {
            let attributes = self.attributes() & !layout::LOG_APPEND_TIME;
            set(&mut self.header, layout::ATTRIBUTES, attributes.to_be_bytes());
            self.renew_checksum();
        }
    }

    fn renew_checksum(&mut self) {
        let crc = self.checksum();
        set(&mut self.header, layout::CRC, crc.to_be_bytes());
    }

    /// Returns the bytes of the header.
    pub fn header(&self) -> &[u8; HEADER_BYTES] {
        &self.header
    }

    /// Returns the bytes after the header: the encoded records, which can be compressed.
    pub fn records_bytes(&self) -> &Bytes {
        &self.records
    }

    /// Returns the length of the batch in bytes.
    pub fn encoded_len(&self) -> usize {
        HEADER_BYTES + self.records.len()
    }

    /// Copies header and records into one buffer.
    pub fn to_bytes(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(self.encoded_len());
        bytes.extend_from_slice(&self.header);
        bytes.extend_from_slice(&self.records);
        bytes.freeze()
    }

    /// Copies the batch into a separate buffer, so that the batch does not hold the larger buffer in which it was
    /// received. Returns all bytes of the batch.
    pub fn detach(&mut self) -> Bytes {
        let bytes = self.to_bytes();
        self.records = bytes.slice(HEADER_BYTES..);
        bytes
    }

    /// Returns the offset of the first record.
    pub fn base_offset(&self) -> Offset {
        Offset::from_i64(i64::from_be_bytes(field(&self.header, layout::BASE_OFFSET))).expect("checked: not negative")
    }

    /// Returns the offset after the last record.
    pub fn end_offset(&self) -> Offset {
        self.base_offset().plus(u64::from(self.count()))
    }

    /// Returns the number of records, at least one.
    pub fn count(&self) -> u32 {
        u32::from_be_bytes(field(&self.header, layout::RECORDS_COUNT))
    }

    /// Returns the leader epoch, or `None` before the leader has set it.
    pub fn leader_epoch(&self) -> Option<LeaderEpoch> {
        LeaderEpoch::from_i32(i32::from_be_bytes(field(&self.header, layout::LEADER_EPOCH)))
    }

    /// Returns the CRC-32C of byte 21 to the end.
    pub fn crc(&self) -> u32 {
        u32::from_be_bytes(field(&self.header, layout::CRC))
    }

    /// Returns the attribute bits.
    pub fn attributes(&self) -> u16 {
        u16::from_be_bytes(field(&self.header, layout::ATTRIBUTES))
    }

    /// Returns the codec of the records.
    pub fn compression(&self) -> Compression {
        match self.attributes() & layout::COMPRESSION_MASK {
            0 => Compression::None,
            1 => Compression::Gzip,
            2 => Compression::Snappy,
            3 => Compression::Lz4,
            _ => Compression::Zstd,
        }
    }

    /// Returns the source of the timestamps: producer or broker.
    pub fn timestamp_type(&self) -> TimestampType {
        if self.attributes() & layout::LOG_APPEND_TIME == 0 {
            TimestampType::CreateTime
        } else {
            TimestampType::LogAppendTime
        }
    }

    /// Returns the timestamp to which the timestamp deltas of the records are relative, in milliseconds.
    pub fn base_timestamp(&self) -> i64 {
        i64::from_be_bytes(field(&self.header, layout::BASE_TIMESTAMP))
    }

    /// Returns the largest timestamp of the records by the header, in milliseconds. A producer can send any value.
    pub fn max_timestamp(&self) -> i64 {
        i64::from_be_bytes(field(&self.header, layout::MAX_TIMESTAMP))
    }

    /// Returns producer and sequence if an idempotent producer wrote the batch.
    pub fn producer(&self) -> Option<ProducerSequence> {
        Some(self.producer_fields()).filter(|producer| producer.id >= 0)
    }

    /// Returns the producer fields as they are, also without a producer (-1).
    fn producer_fields(&self) -> ProducerSequence {
        ProducerSequence {
            id: i64::from_be_bytes(field(&self.header, layout::PRODUCER_ID)),
            epoch: i16::from_be_bytes(field(&self.header, layout::PRODUCER_EPOCH)),
            base_sequence: i32::from_be_bytes(field(&self.header, layout::BASE_SEQUENCE)),
        }
    }

    /// Returns the fingerprint. Fingerprints distinguish different batches with the same producer and sequence, except
    /// if their CRCs collide.
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
