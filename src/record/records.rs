//! Records inside a batch: the iterator over them, and the check that they are what the header says.
//!
//! ```text
//! length varint │ attributes i8 (unused) │ timestampDelta varlong │ offsetDelta varint
//! keyLength varint, key │ valueLength varint, value │ headerCount varint
//!   per header: keyLength varint, key │ valueLength varint, value
//! ```
//! A length of -1 means that there is no key or value. `length` counts what follows it.

use std::ops::Range;

use bytes::Bytes;

use super::{
    batch::{Batch, Malformed, TimestampRange},
    compression, varint,
};
use crate::{
    limits,
    model::{Compression, Offset, TimestampType},
};

/// Plain bytes of compressed records that the append checks. A batch that has no more is checked whole.
const CHECKED_BYTES: usize = 4 << 10;

/// Fewest bytes of a record: its length, attributes, timestamp, offset, key length, value length and header count.
const LEAST_RECORD_BYTES: usize = 7;

/// How often smaller compressed records usually are, where nothing says.
const USUAL_RATIO: usize = 4;

/// One header of a record: metadata that the system does not look at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Its name; several headers of one record may share it.
    pub key: String,
    /// Its value, if it has one.
    pub value: Option<Bytes>,
}

/// One record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Milliseconds since 1970-01-01 UTC, the producer's or the broker's (`message.timestamp.type`).
    pub timestamp_ms: i64,
    /// What the partitioner looks at; several records may share it.
    pub key: Option<Bytes>,
    /// The payload.
    pub value: Option<Bytes>,
    /// In the producer's order.
    pub headers: Vec<Header>,
}

/// The records of one batch, in order. After an error it ends.
#[derive(Debug)]
pub struct Records {
    /// Decompressed; records are slices of it.
    bytes: Bytes,
    /// First byte that was not walked yet.
    at: usize,
    next: u32,
    count: u32,
    base_offset: Offset,
    base_timestamp: i64,
    append_time: Option<i64>,
}

impl Batch {
    /// Decodes the records. Keys and values are slices of the batch's own memory, or of one decompressed buffer.
    ///
    /// # Errors
    /// When the bytes cannot be decompressed within `limits::MAX_DECOMPRESSED_BYTES`. What is wrong with a single
    /// record comes from the iterator, at that record.
    pub fn records(&self) -> Result<Records, Malformed> {
        self.records_within(limits::MAX_DECOMPRESSED_BYTES)
    }

    /// As [`Batch::records`], of records that have at most `most` bytes without compression.
    ///
    /// # Errors
    /// As there; [`Malformed::Grows`] when they have more.
    pub fn records_within(&self, most: usize) -> Result<Records, Malformed> {
        Ok(Records {
            bytes: self.plain_records(most)?,
            at: 0,
            next: 0,
            count: self.count(),
            base_offset: self.base_offset(),
            base_timestamp: self.base_timestamp(),
            append_time: (self.timestamp_type() == TimestampType::LogAppendTime).then(|| self.max_timestamp()),
        })
    }

    /// Checks that the records are well formed and as many as the header says, without building any.
    ///
    /// # Errors
    /// As [`Batch::records`] and its iterator.
    pub fn verify_records(&self) -> Result<(), Malformed> {
        self.records()?.timestamp_range().map(drop)
    }

    /// Refuses compressed records that nobody can decode, as far as their first 4 KiB tell: the codec's framing, the records that lie in
    /// them, and a count that the bytes cannot hold. Of zstd frames of more than that only framing and count are checked: zstd decodes
    /// whole blocks of up to 128 KiB. Records without compression are checked by [`Batch::correct_max_timestamp`].
    ///
    /// # Errors
    /// [`Malformed::Compression`] or [`Malformed::Record`].
    pub fn check_first_records(&self) -> Result<(), Malformed> {
        let (codec, stored) = (self.compression(), self.records_bytes());
        if codec == Compression::None {
            return Ok(());
        }
        let prefix = compression::prefix(codec, stored, CHECKED_BYTES)?;
        let least = self.count() as usize * LEAST_RECORD_BYTES;
        if let Some(most) = compression::largest_plain(codec, stored).filter(|most| *most < least) {
            let reason = format!("recordsCount promises {} records, which {most} bytes cannot hold", self.count());
            return Err(Malformed::Compression { codec, reason });
        }
        let mut walk = Walk { all: &prefix.bytes, at: 0, end: prefix.bytes.len() };
        for index in 0..self.count() {
            let record = if prefix.is_whole { walk.record(index).map(|_| true) } else { walk.cut_record(index) };
            match record {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(reason) => return Err(Malformed::Record { index, reason }),
            }
        }
        if prefix.is_whole && walk.at < walk.end {
            return Err(Malformed::Record { index: self.count() - 1, reason: TRAILING });
        }
        Ok(())
    }

    /// The framed records without compression, checked, and their timestamps.
    pub(super) fn plain_records_of_times(&self, most: usize) -> Result<(Bytes, TimestampRange), Malformed> {
        let records = self.records_within(most)?;
        Ok((records.bytes.clone(), records.timestamp_range()?))
    }

    /// How many bytes the records have without compression, as far as can be told without decompressing them: what the
    /// frame says, which may be a lie, or what is usual.
    pub fn plain_guess(&self) -> usize {
        let stored = self.records_bytes();
        match self.compression() {
            Compression::None => stored.len(),
            codec => compression::claimed(codec, stored).unwrap_or(stored.len().saturating_mul(USUAL_RATIO)),
        }
    }

    /// The framed records without compression.
    pub(super) fn plain_records(&self, most: usize) -> Result<Bytes, Malformed> {
        match self.compression() {
            Compression::None => Ok(self.records_bytes().clone()),
            codec => compression::decompress(codec, self.records_bytes(), most),
        }
    }
}

const TRAILING: &str = "bytes follow the last record";

/// Where the parts of one record are in the plain bytes.
struct Shape {
    timestamp_delta: i64,
    key: Option<Range<usize>>,
    value: Option<Range<usize>>,
    header_count: usize,
    headers: Range<usize>,
}

impl Records {
    /// Walks all that is left, without building any, for the timestamps.
    pub(super) fn timestamp_range(mut self) -> Result<TimestampRange, Malformed> {
        let mut range = TimestampRange::EMPTY;
        while let Some(shape) = self.advance() {
            range.note(self.timestamp(&shape?));
        }
        Ok(range)
    }

    /// Walks the records below `offset`, without building any.
    ///
    /// # Errors
    /// [`Malformed::Record`] for the first of them that is wrong.
    pub fn skip_below(&mut self, offset: Offset) -> Result<(), Malformed> {
        while self.base_offset.plus(u64::from(self.next)) < offset
            && let Some(shape) = self.advance()
        {
            shape?;
        }
        Ok(())
    }

    fn timestamp(&self, shape: &Shape) -> i64 {
        self.append_time.unwrap_or(self.base_timestamp.wrapping_add(shape.timestamp_delta))
    }

    /// Walks the next record and checks all of it. `None` after the last.
    fn advance(&mut self) -> Option<Result<Shape, Malformed>> {
        if self.next == self.count {
            return None;
        }
        let index = self.next;
        let mut walk = Walk { all: &self.bytes, at: self.at, end: self.bytes.len() };
        let mut shape = walk.record(index);
        if index + 1 == self.count && shape.is_ok() && walk.at < walk.end {
            shape = Err(TRAILING);
        }
        match shape {
            Ok(shape) => {
                self.at = walk.at;
                self.next += 1;
                Some(Ok(shape))
            }
            Err(reason) => {
                self.next = self.count;
                Some(Err(Malformed::Record { index, reason }))
            }
        }
    }

    fn build(&self, shape: Shape) -> Record {
        let slice = |range: Range<usize>| self.bytes.slice(range);
        let mut walk = Walk { all: &self.bytes, at: shape.headers.start, end: shape.headers.end };
        let headers = (0..shape.header_count).map(|_| {
            let (key, value) = walk.header().expect("headers were walked once already");
            Header { key: String::from_utf8_lossy(&self.bytes[key]).into_owned(), value: value.map(slice) }
        });
        Record {
            headers: headers.collect(),
            timestamp_ms: self.timestamp(&shape),
            key: shape.key.map(slice),
            value: shape.value.map(slice),
        }
    }
}

impl Iterator for Records {
    type Item = Result<(Offset, Record), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let offset = self.base_offset.plus(u64::from(self.next));
        let shape = self.advance()?;
        Some(shape.map(|shape| (offset, self.build(shape))))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // An error ends it early, so at least one item is all that is sure.
        let left = (self.count - self.next) as usize;
        (left.min(1), Some(left))
    }
}

impl std::iter::FusedIterator for Records {}

/// A place in the plain bytes that never passes `end`.
struct Walk<'a> {
    all: &'a [u8],
    at: usize,
    end: usize,
}

type Checked<T> = Result<T, &'static str>;

const LENGTH_VARINT: &str = "its length is no varint";
const LENGTH_NEGATIVE: &str = "its length is negative";
const KEY_LENGTH: &str = "its key's length is not possible";

/// Most bytes of a record from its length to its key's length: three varints of 5 bytes, a varlong of 10, and the attributes.
const MOST_HEAD_BYTES: usize = 3 * 5 + 10 + 1;

impl Walk<'_> {
    fn record(&mut self, index: u32) -> Checked<Shape> {
        if self.at == self.end {
            return Err("the bytes end before it; recordsCount promises more records");
        }
        let length = usize::try_from(self.int(LENGTH_VARINT)?).map_err(|_| LENGTH_NEGATIVE)?;
        if length > self.end - self.at {
            return Err("its length passes the batch's end");
        }
        let mut body = Walk { all: self.all, at: self.at, end: self.at + length };
        self.at = body.end;
        body.fields(index)
    }

    /// As [`Walk::record`], where the bytes may end inside of it: false, and all that is there was checked but the record's last fields.
    fn cut_record(&mut self, index: u32) -> Checked<bool> {
        if self.end - self.at < MOST_HEAD_BYTES {
            return Ok(false);
        }
        let mut head = Walk { all: self.all, at: self.at, end: self.end };
        let length = usize::try_from(head.int(LENGTH_VARINT)?).map_err(|_| LENGTH_NEGATIVE)?;
        if length <= self.end - head.at {
            return self.record(index).map(|_| true);
        }
        let start = head.at;
        head.time_and_offset(index)?;
        match head.int(KEY_LENGTH)? {
            ..-1 => Err(KEY_LENGTH),
            key if usize::try_from(key).is_ok_and(|key| key > length - (head.at - start)) => Err(KEY_LENGTH),
            _ => Ok(false),
        }
    }

    /// The fields before the key; gives the timestamp's delta.
    fn time_and_offset(&mut self, index: u32) -> Checked<i64> {
        // The attributes byte has no meaning yet; Kafka ignores it too.
        self.take(1).ok_or("its length leaves no room for its fields")?;
        let timestamp_delta = self.long("its timestamp is no varint")?;
        if i64::from(self.int("its offset is no varint")?) == i64::from(index) {
            Ok(timestamp_delta)
        } else {
            Err("its offset does not follow the one before")
        }
    }

    fn fields(&mut self, index: u32) -> Checked<Shape> {
        let timestamp_delta = self.time_and_offset(index)?;
        let key = self.nullable(KEY_LENGTH)?;
        let value = self.nullable("its value's length is not possible")?;
        let header_count = self.int("its header count is no varint")?;
        let header_count = usize::try_from(header_count).map_err(|_| "its header count is negative")?;
        if header_count > limits::MAX_RECORD_HEADERS {
            return Err("it has too many headers");
        }
        let start = self.at;
        for _ in 0..header_count {
            self.header()?;
        }
        if self.at != self.end {
            return Err("bytes follow its headers");
        }
        Ok(Shape { timestamp_delta, key, value, header_count, headers: start..self.end })
    }

    fn header(&mut self) -> Checked<(Range<usize>, Option<Range<usize>>)> {
        let key = self.nullable("a header's key length is not possible")?.ok_or("a header has no key")?;
        let value = self.nullable("a header's value length is not possible")?;
        Ok((key, value))
    }

    /// A length, -1 for none, and that many bytes.
    fn nullable(&mut self, reason: &'static str) -> Checked<Option<Range<usize>>> {
        match self.int(reason)? {
            -1 => Ok(None),
            length => {
                let length = usize::try_from(length).map_err(|_| reason)?;
                self.take(length).map(Some).ok_or(reason)
            }
        }
    }

    fn take(&mut self, length: usize) -> Option<Range<usize>> {
        if length > self.end - self.at {
            return None;
        }
        let start = self.at;
        self.at += length;
        Some(start..self.at)
    }

    fn int(&mut self, reason: &'static str) -> Checked<i32> {
        let mut rest = &self.all[self.at..self.end];
        let value = varint::read_i32(&mut rest).ok_or(reason)?;
        self.at = self.end - rest.len();
        Ok(value)
    }

    fn long(&mut self, reason: &'static str) -> Checked<i64> {
        let mut rest = &self.all[self.at..self.end];
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
    fn records_go_on_behind_those_that_are_skipped() {
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
        // The first record that is wrong ends it, also where nobody asked for that one.
        let mut builder = BatchBuilder::new(Compression::None);
        (0..2).for_each(|number| builder.push(number, None, Some(b"value"), &[]).expect("fits"));
        let mut bytes = builder.finish(None).expect("two records").to_bytes().to_vec();
        let mut records = bytes.split_off(HEADER_BYTES);
        records[0] = 0xff;
        let batch = Batch::seal(bytes.try_into().expect("a header"), records.into());
        let mut records = batch.records().expect("not compressed");
        let wrong = records.skip_below(Offset::new(1).expect("not negative"));
        assert!(matches!(wrong, Err(Malformed::Record { index: 0, .. })), "{wrong:?}");
        assert!(records.next().is_none());
    }
}
