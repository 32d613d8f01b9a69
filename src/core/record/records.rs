//! Records of a batch: the iterator over them, and the checks against the header.
//!
//! ```text
//! length varint │ attributes i8 (unused) │ timestampDelta varlong │ offsetDelta varint
//! keyLength varint, key │ valueLength varint, value │ headerCount varint
//!   per header: keyLength varint, key │ valueLength varint, value
//! ```
//! A key or value with the length -1 is absent. `length` counts the bytes after it.

use std::ops::Range;

use bytes::Bytes;

use super::{
    batch::{Batch, TimestampRange},
    compression,
    error::MalformedBatch,
    varint,
};
use crate::{
    limits,
    model::{Compression, Offset, TimestampType},
};

/// Maximum number of decompressed bytes of a compressed batch that an append checks. Shorter records are checked
/// completely.
const CHECKED_PREFIX_BYTES: usize = 4 << 10;

/// Minimum length of a record: length, attributes, timestamp, offset, key length, value length and header count have
/// one byte each.
const MIN_RECORD_BYTES: usize = 7;

/// Usual ratio of uncompressed to compressed bytes, for records whose header declares no length.
const TYPICAL_COMPRESSION_RATIO: usize = 4;

/// One header of a record. Brokers do not interpret headers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Name. Several headers of one record can have the same name.
    pub key: String,
    /// Optional value.
    pub value: Option<Bytes>,
}

/// One record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Time in milliseconds since 1970-01-01 UTC. `message.timestamp.type` determines whether producer or broker sets
    /// it.
    pub timestamp_ms: i64,
    /// Optional key, which selects the partition. Several records can have the same key.
    pub key: Option<Bytes>,
    /// Optional payload.
    pub value: Option<Bytes>,
    /// Headers, in the order of the producer.
    pub headers: Vec<Header>,
}

/// Iterator over the records of one batch. It ends after an error.
#[derive(Debug)]
pub struct Records {
    /// Decompressed bytes. Records are slices of them.
    bytes: Bytes,
    /// Position of the next record.
    at: usize,
    /// Index of the next record; equal to `count` after the last record and after an error.
    next: u32,
    count: u32,
    base_offset: Offset,
    base_timestamp: i64,
    /// Timestamp of all records if the timestamp type is `LogAppendTime`.
    append_time: Option<i64>,
}

impl Batch {
    /// Decodes the records. Keys and values are slices of the batch, or of one decompressed buffer.
    ///
    /// # Errors
    /// The records cannot be decompressed to at most `limits::MAX_DECOMPRESSED_BYTES`. The iterator returns the errors
    /// of single records.
    pub fn records(&self) -> Result<Records, MalformedBatch> {
        self.records_within(limits::MAX_DECOMPRESSED_BYTES)
    }

    /// Decodes the records, if the batch is uncompressed or they have at most `max_bytes` bytes after decompression.
    ///
    /// # Errors
    /// As [`Batch::records`], and [`MalformedBatch::Grows`] if the records of a compressed batch have more bytes.
    pub fn records_within(&self, max_bytes: usize) -> Result<Records, MalformedBatch> {
        Ok(Records {
            bytes: self.decode_records(max_bytes)?,
            at: 0,
            next: 0,
            count: self.count(),
            base_offset: self.base_offset(),
            base_timestamp: self.base_timestamp(),
            append_time: (self.timestamp_type() == TimestampType::LogAppendTime).then(|| self.max_timestamp()),
        })
    }

    /// Checks that all records are well formed and that their number is the `recordsCount` of the header.
    ///
    /// # Errors
    /// As [`Batch::records`] and its iterator.
    pub fn verify_records(&self) -> Result<(), MalformedBatch> {
        self.records()?.timestamp_range().map(drop)
    }

    /// Rejects compressed batches whose beginning no consumer can decode. Checks the records in the first 4 KiB of
    /// decompressed bytes, and the framing of the codec up to there. Checks also that all bytes can contain the number
    /// of records. Of larger zstd frames it checks framing and number only, because zstd decodes complete blocks of up
    /// to 128 KiB. Accepts every uncompressed batch: [`Batch::correct_max_timestamp`] checks it.
    ///
    /// # Errors
    /// [`MalformedBatch::Compression`] or [`MalformedBatch::Record`].
    pub fn check_first_records(&self) -> Result<(), MalformedBatch> {
        let (codec, stored) = (self.compression(), self.records_bytes());
        if codec == Compression::None {
            return Ok(());
        }
        let prefix = compression::prefix(codec, stored, CHECKED_PREFIX_BYTES)?;
        let min = self.count() as usize * MIN_RECORD_BYTES;
        if let Some(max) = compression::max_decoded_len(codec, stored).filter(|max| *max < min) {
            let reason = format!("recordsCount is {}, and {max} bytes cannot hold that number", self.count());
            return Err(MalformedBatch::Compression { codec, reason });
        }
        let mut cursor = Cursor { bytes: &prefix.bytes, at: 0, end: prefix.bytes.len() };
        for index in 0..self.count() {
            let is_whole = if prefix.is_complete {
                cursor.read_record(index).map(|_| true)
            } else {
                cursor.check_truncatable(index)
            };
            match is_whole {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(reason) => return Err(MalformedBatch::Record { index, reason }),
            }
        }
        if prefix.is_complete && cursor.at < cursor.end {
            return Err(MalformedBatch::Record { index: self.count() - 1, reason: TRAILING });
        }
        Ok(())
    }

    /// Checks the records. Returns their bytes, as in an uncompressed batch, and the range of their timestamps. Fails
    /// if they have more than `max_bytes` bytes after decompression.
    pub(super) fn decode_records_and_timestamps(
        &self,
        max_bytes: usize,
    ) -> Result<(Bytes, TimestampRange), MalformedBatch> {
        let records = self.records_within(max_bytes)?;
        Ok((records.bytes.clone(), records.timestamp_range()?))
    }

    /// Estimates the length of the records after decompression. This is the length that the compressed bytes declare,
    /// which can be wrong, or else the length by a typical ratio.
    pub fn estimated_len(&self) -> usize {
        let stored = self.records_bytes();
        match self.compression() {
            Compression::None => stored.len(),
            codec => compression::declared_len(codec, stored)
                .unwrap_or(stored.len().saturating_mul(TYPICAL_COMPRESSION_RATIO)),
        }
    }

    /// Returns the bytes of the records as in an uncompressed batch, unchecked. Fails if they have more than
    /// `max_bytes` bytes after decompression; the records of an uncompressed batch are not limited.
    pub(super) fn decode_records(&self, max_bytes: usize) -> Result<Bytes, MalformedBatch> {
        match self.compression() {
            Compression::None => Ok(self.records_bytes().clone()),
            codec => compression::decompress(codec, self.records_bytes(), max_bytes),
        }
    }
}

const TRAILING: &str = "bytes follow the last record";

/// Positions of the fields of one record in the decompressed bytes.
struct RecordLayout {
    timestamp_delta: i64,
    key: Option<Range<usize>>,
    value: Option<Range<usize>>,
    header_count: usize,
    headers: Range<usize>,
}

impl Records {
    /// Checks the remaining records and returns the range of their timestamps.
    pub(super) fn timestamp_range(mut self) -> Result<TimestampRange, MalformedBatch> {
        let mut range = TimestampRange::EMPTY;
        while let Some(layout) = self.next_layout() {
            range.extend(self.timestamp(&layout?));
        }
        Ok(range)
    }

    /// Skips the records below `offset` and checks them.
    ///
    /// # Errors
    /// [`MalformedBatch::Record`] for the first malformed record.
    pub fn skip_below(&mut self, offset: Offset) -> Result<(), MalformedBatch> {
        while self.base_offset.plus(u64::from(self.next)) < offset
            && let Some(layout) = self.next_layout()
        {
            layout?;
        }
        Ok(())
    }

    /// Returns the timestamp of a record.
    fn timestamp(&self, layout: &RecordLayout) -> i64 {
        self.append_time.unwrap_or(self.base_timestamp.wrapping_add(layout.timestamp_delta))
    }

    /// Checks the next record and returns the positions of its fields. Returns `None` after the last record. An error
    /// ends the iterator.
    fn next_layout(&mut self) -> Option<Result<RecordLayout, MalformedBatch>> {
        if self.next == self.count {
            return None;
        }
        let index = self.next;
        let mut cursor = Cursor { bytes: &self.bytes, at: self.at, end: self.bytes.len() };
        let mut layout = cursor.read_record(index);
        if index + 1 == self.count && layout.is_ok() && cursor.at < cursor.end {
            layout = Err(TRAILING);
        }
        match layout {
            Ok(layout) => {
                self.at = cursor.at;
                self.next += 1;
                Some(Ok(layout))
            }
            Err(reason) => {
                self.next = self.count;
                Some(Err(MalformedBatch::Record { index, reason }))
            }
        }
    }

    /// Builds a record from the positions of its fields.
    fn build(&self, layout: RecordLayout) -> Record {
        let slice = |range: Range<usize>| self.bytes.slice(range);
        let mut cursor = Cursor { bytes: &self.bytes, at: layout.headers.start, end: layout.headers.end };
        let headers = (0..layout.header_count).map(|_| {
            let (key, value) = cursor.read_header().expect("the headers were checked before");
            Header { key: String::from_utf8_lossy(&self.bytes[key]).into_owned(), value: value.map(slice) }
        });
        Record {
            headers: headers.collect(),
            timestamp_ms: self.timestamp(&layout),
            key: layout.key.map(slice),
            value: layout.value.map(slice),
        }
    }
}

impl Iterator for Records {
    type Item = Result<(Offset, Record), MalformedBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let offset = self.base_offset.plus(u64::from(self.next));
        let layout = self.next_layout()?;
        Some(layout.map(|layout| (offset, self.build(layout))))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // An error ends the iterator early, so only one item is certain.
        let remaining = (self.count - self.next) as usize;
        (remaining.min(1), Some(remaining))
    }
}

impl std::iter::FusedIterator for Records {}

/// Reader of the decompressed bytes. Its position `at` never exceeds `end`.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    /// End of the batch, or of the record that is read.
    end: usize,
}

/// Result of reading a record. The error is the reason of [`MalformedBatch::Record`].
type RecordResult<T> = Result<T, &'static str>;

const LENGTH_VARINT: &str = "its length is not a varint";
const LENGTH_NEGATIVE: &str = "its length is negative";
const KEY_LENGTH: &str = "the length of its key is not possible";

/// Maximum length of the fields from record length to key length: three varints of 5 bytes, a varlong of 10, and the
/// attributes.
const MAX_FIRST_FIELDS_BYTES: usize = 3 * 5 + 10 + 1;

impl Cursor<'_> {
    /// Reads and checks the record with this index in the batch, and moves behind it.
    fn read_record(&mut self, index: u32) -> RecordResult<RecordLayout> {
        if self.at == self.end {
            return Err("the bytes end before it, and recordsCount is larger");
        }
        let length = usize::try_from(self.read_i32(LENGTH_VARINT)?).map_err(|_| LENGTH_NEGATIVE)?;
        if length > self.end - self.at {
            return Err("it ends after the batch");
        }
        let mut body = Cursor { bytes: self.bytes, at: self.at, end: self.at + length };
        self.at = body.end;
        body.read_fields(index)
    }

    /// Checks the next record of a prefix, which may be truncated. Returns true and moves behind the record if it is
    /// complete. Returns false if it is truncated; its first fields are then checked if enough bytes for them remain.
    fn check_truncatable(&mut self, index: u32) -> RecordResult<bool> {
        if self.end - self.at < MAX_FIRST_FIELDS_BYTES {
            return Ok(false);
        }
        let mut header = Cursor { bytes: self.bytes, at: self.at, end: self.end };
        let length = usize::try_from(header.read_i32(LENGTH_VARINT)?).map_err(|_| LENGTH_NEGATIVE)?;
        if length <= self.end - header.at {
            return self.read_record(index).map(|_| true);
        }
        let start = header.at;
        header.read_timestamp_and_offset(index)?;
        match header.read_i32(KEY_LENGTH)? {
            ..-1 => Err(KEY_LENGTH),
            key if usize::try_from(key).is_ok_and(|key| key > length - (header.at - start)) => Err(KEY_LENGTH),
            _ => Ok(false),
        }
    }

    /// Reads the fields before the key. Returns the timestamp delta.
    fn read_timestamp_and_offset(&mut self, index: u32) -> RecordResult<i64> {
        // The attributes byte has no meaning. Kafka ignores it too.
        self.take(1).ok_or("its length is too small for its fields")?;
        let timestamp_delta = self.read_i64("its timestamp is not a varint")?;
        if i64::from(self.read_i32("its offset is not a varint")?) == i64::from(index) {
            Ok(timestamp_delta)
        } else {
            Err("its offset is not the next one")
        }
    }

    /// Reads the fields of a record after its length, which end at `end`.
    fn read_fields(&mut self, index: u32) -> RecordResult<RecordLayout> {
        let timestamp_delta = self.read_timestamp_and_offset(index)?;
        let key = self.read_nullable(KEY_LENGTH)?;
        let value = self.read_nullable("the length of its value is not possible")?;
        let header_count = self.read_i32("its header count is not a varint")?;
        let header_count = usize::try_from(header_count).map_err(|_| "its header count is negative")?;
        if header_count > limits::MAX_RECORD_HEADERS {
            return Err("it has too many headers");
        }
        let start = self.at;
        for _ in 0..header_count {
            self.read_header()?;
        }
        if self.at != self.end {
            return Err("bytes follow its headers");
        }
        Ok(RecordLayout { timestamp_delta, key, value, header_count, headers: start..self.end })
    }

    /// Reads the key and the value of a header.
    fn read_header(&mut self) -> RecordResult<(Range<usize>, Option<Range<usize>>)> {
        let key = self.read_nullable("the length of a header key is not possible")?.ok_or("a header has no key")?;
        let value = self.read_nullable("the length of a header value is not possible")?;
        Ok((key, value))
    }

    /// Reads a length and that number of bytes. The length -1 means that the field is absent.
    fn read_nullable(&mut self, reason: &'static str) -> RecordResult<Option<Range<usize>>> {
        match self.read_i32(reason)? {
            -1 => Ok(None),
            length => {
                let length = usize::try_from(length).map_err(|_| reason)?;
                self.take(length).map(Some).ok_or(reason)
            }
        }
    }

    /// Moves by `length` bytes and returns their positions; `None` if fewer bytes remain.
    fn take(&mut self, length: usize) -> Option<Range<usize>> {
        if length > self.end - self.at {
            return None;
        }
        let start = self.at;
        self.at += length;
        Some(start..self.at)
    }

    fn read_i32(&mut self, reason: &'static str) -> RecordResult<i32> {
        let mut rest = &self.bytes[self.at..self.end];
        let value = varint::read_i32(&mut rest).ok_or(reason)?;
        self.at = self.end - rest.len();
        Ok(value)
    }

    fn read_i64(&mut self, reason: &'static str) -> RecordResult<i64> {
        let mut rest = &self.bytes[self.at..self.end];
        let value = varint::read_i64(&mut rest).ok_or(reason)?;
        self.at = self.end - rest.len();
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{BatchBuilder, HEADER_BYTES};

    #[test]
    fn iterator_continues_after_skipped_records() {
        for codec in [Compression::None, Compression::Lz4] {
            let mut builder = BatchBuilder::new(codec);
            (0..5).for_each(|number| builder.push(number, None, Some(b"value"), &[]).expect("fits"));
            let batch = builder.finish(None).expect("five records");
            for from in 0..7_i64 {
                let mut records = batch.records().expect("well formed");
                records.skip_below(Offset::from_i64(from).expect("not negative")).expect("well formed");
                let offsets: Vec<i64> = records.map(|record| record.expect("well formed").0.as_i64()).collect();
                assert_eq!(offsets, (from.min(5)..5).collect::<Vec<_>>());
            }
        }
        // A malformed record ends the iterator, also if the record would be skipped.
        let mut builder = BatchBuilder::new(Compression::None);
        (0..2).for_each(|number| builder.push(number, None, Some(b"value"), &[]).expect("fits"));
        let mut bytes = builder.finish(None).expect("two records").to_bytes().to_vec();
        let mut records = bytes.split_off(HEADER_BYTES);
        records[0] = 0xff;
        let batch = Batch::seal(bytes.try_into().expect("a header"), records.into());
        let mut records = batch.records().expect("not compressed");
        let wrong = records.skip_below(Offset::new(1).expect("not negative"));
        assert!(matches!(wrong, Err(MalformedBatch::Record { index: 0, .. })), "{wrong:?}");
        assert!(records.next().is_none());
    }
}
