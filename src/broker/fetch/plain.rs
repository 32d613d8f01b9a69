//! Plain answers: batches replaced by their records, for callers that decode none themselves.

use std::sync::Arc;

use bytes::Bytes;

use super::{Gathered, Granted, Session};
use crate::{
    broker::{CallMemory, Grant},
    limits,
    model::{Compression, Offset, PartitionId},
    partition::{INLINE_BYTES, Opener},
    proto::{
        fault::{Fault, Reason},
        v1,
    },
    record::{Batch, Malformed, Record},
};

/// Bytes of records from which on a plain answer takes no more. What is compressed may be a thousand times larger than it
/// was: an answer must stay one that can be sent, and held until it is.
pub(super) const PLAIN_BYTES: usize = limits::MAX_FETCH_BYTES;

/// The same where there is little memory.
pub(super) const SMALL_PLAIN_BYTES: usize = PLAIN_BYTES / 16;

/// Most bytes of records in one plain answer: a first record is taken up to here.
const MAX_PLAIN_BYTES: usize = limits::MAX_MESSAGE_BYTES - (4 << 20);

/// A first record needs more memory than was taken for one.
pub(super) struct RecordTooLarge {
    pub(super) bytes: usize,
}

impl Session {
    /// Replaces the batches of an answer by their records, and returns the bytes of the records.
    ///
    /// # Errors
    /// `RecordTooLarge` where the answer is to be read again with more memory.
    pub(super) async fn decode(&mut self, gathered: &mut Gathered) -> Result<usize, RecordTooLarge> {
        self.restore_now();
        // A batch that is being opened is charged also where the call has gone.
        let charge = Arc::new(self.grant.as_mut().map(Granted::split));
        let mut decoder = Decoder {
            opener: self.memory.opener(&self.broker.opener).charged(Arc::<Option<Grant>>::clone(&charge)),
            memory: &self.memory,
            room: self.grant.as_ref().map_or(PLAIN_BYTES, |granted| granted.records / 2 - self.record_bytes),
            record_bytes: self.record_bytes,
            has_record: false,
            decoded_bytes: 0,
        };
        let mut used = 0;
        for (fetched, place) in gathered.partitions.iter_mut().zip(&gathered.places) {
            let Some(place) = place.map(|index| &self.places[index]) else { continue };
            match decoder.decode(fetched, (place.served.id(), place.from), &mut used).await {
                Ok(()) => {}
                Err(Undecoded::TooLarge(record)) => return Err(record),
                Err(Undecoded::Refused(fault)) => {
                    self.broker.metrics.fetch_errors.count(fault.reason.as_str());
                    fetched.error = Some(fault.into());
                }
            }
        }
        drop(decoder);
        if let (Some(granted), Some(charge)) = (&mut self.grant, Arc::into_inner(charge).flatten()) {
            granted.end_read(charge);
        }
        Ok(used)
    }
}

/// Why an answer has no records of a partition.
enum Undecoded {
    Refused(Fault),
    TooLarge(RecordTooLarge),
}

impl<E: Into<Fault>> From<E> for Undecoded {
    fn from(error: E) -> Self {
        Self::Refused(error.into())
    }
}

/// Decodes the batches of one response.
struct Decoder<'a> {
    opener: Opener,
    memory: &'a CallMemory,
    /// Bytes of records from which on the response takes no more.
    room: usize,
    /// Bytes of one first record for which memory was taken.
    record_bytes: usize,
    /// That record was found.
    has_record: bool,
    /// Bytes of batches and records since other tasks had their turn.
    decoded_bytes: usize,
}

impl Decoder<'_> {
    /// Replaces the batches of an answer by their records from an offset on, as many as there is room for; `used` is what all
    /// partitions together have taken. An error says why there is none: where some come before what is wrong, the next read
    /// meets it first.
    async fn decode(
        &mut self,
        fetched: &mut v1::FetchedPartition,
        (id, from): (PartitionId, Offset),
        used: &mut usize,
    ) -> Result<(), Undecoded> {
        let mut bytes = Bytes::from(std::mem::take(&mut fetched.chunks).concat());
        while !bytes.is_empty() {
            let batch = Batch::split_from(&mut bytes)?;
            let first = fetched.records.is_empty();
            if *used >= self.room && !(first && batch.compression() == Compression::None) {
                // Nothing more has room: what follows need not be opened to see that.
                fetched.next_offset = from.max(batch.base_offset()).as_i64();
                return if first { Err(full(fetched, self.room < PLAIN_BYTES).into()) } else { Ok(()) };
            }
            let mut opened = self.open((id, &batch), from, *used, self.room).await;
            if let Ok(Taken { records, left: Some((_, size)), .. }) = &opened
                && first
                && records.is_empty()
                && *used + *size <= MAX_PLAIN_BYTES
            {
                // The first record comes whatever its size, for as much memory.
                let size = *size;
                self.reserve_record(size)?;
                opened = self.open((id, &batch), from, 0, size).await;
            }
            self.decoded_bytes += batch.encoded_len() + opened.as_ref().map_or(0, |taken| taken.used);
            if self.decoded_bytes > INLINE_BYTES {
                self.decoded_bytes = 0;
                tokio::task::yield_now().await;
            }
            match opened {
                Ok(taken) => {
                    *used += taken.used;
                    fetched.records.extend(taken.records);
                    let Some((offset, size)) = taken.left else { continue };
                    fetched.next_offset = offset.as_i64();
                    return match fetched.records.is_empty() {
                        true if size > MAX_PLAIN_BYTES => Err(too_large_for_plain(fetched, size).into()),
                        // With what others have, no message takes it.
                        true => Err(full(fetched, self.room < PLAIN_BYTES).into()),
                        false => Ok(()),
                    };
                }
                Err(error) => {
                    fetched.next_offset = from.max(batch.base_offset()).as_i64();
                    let first = fetched.records.is_empty();
                    return if first { Err(undecodable(fetched, &batch, &error).into()) } else { Ok(()) };
                }
            }
        }
        Ok(())
    }

    /// Memory for a first record above the room.
    fn reserve_record(&mut self, bytes: usize) -> Result<(), Undecoded> {
        if bytes <= self.record_bytes && !std::mem::replace(&mut self.has_record, true) {
            return Ok(());
        }
        match self.memory.reserve_more(2 * bytes) {
            // A record that is larger than all before gets its memory in turn; the response has the others' already.
            Err(_) if bytes > self.record_bytes => Err(Undecoded::TooLarge(RecordTooLarge { bytes })),
            reserved => Ok(reserved?),
        }
    }

    /// Opens a batch, one of the connection's at a time.
    async fn open(
        &self,
        (id, batch): (PartitionId, &Batch),
        from: Offset,
        used: usize,
        room: usize,
    ) -> Result<Taken, Malformed> {
        let work = move |batch: &Batch, most: usize| take_records(batch, most, from, room.saturating_sub(used));
        self.opener.open_stored(id, batch, work).await
    }
}

/// What was taken of a batch.
struct Taken {
    records: Vec<v1::Record>,
    /// Bytes of the records.
    used: usize,
    /// The first record that has no room any more, and its size.
    left: Option<(Offset, usize)>,
}

fn take_records(batch: &Batch, most: usize, from: Offset, room: usize) -> Result<Taken, Malformed> {
    // A slice would hold all that was decompressed until the answer is sent.
    let copies = batch.compression() != Compression::None;
    let keep = |bytes: Bytes| if copies { Bytes::copy_from_slice(&bytes) } else { bytes };
    let mut taken = Taken { records: Vec::new(), used: 0, left: None };
    let mut records = batch.records_within(most)?;
    records.skip_below(from)?;
    for entry in records {
        let (offset, record) = entry?;
        let size = plain_bytes(&record);
        if taken.used + size > room {
            taken.left = Some((offset, size));
            break;
        }
        taken.used += size;
        let headers = record.headers.into_iter().map(|h| v1::Header { key: h.key, value: h.value.map(keep) }).collect();
        taken.records.push(v1::Record {
            key: record.key.map(keep),
            value: record.value.map(keep),
            headers,
            timestamp_ms: Some(record.timestamp_ms),
            offset: offset.as_i64(),
        });
    }
    Ok(taken)
}

/// What a record takes in an answer, at most.
fn plain_bytes(record: &Record) -> usize {
    let length = |bytes: &Option<Bytes>| bytes.as_ref().map_or(0, Bytes::len);
    let headers = record.headers.iter().map(|header| header.key.len() + length(&header.value) + 32);
    length(&record.key) + length(&record.value) + headers.sum::<usize>() + 64
}

/// The records of other partitions have taken all the room, and this one's are compressed. The same request meets that again, unless there
/// was `little_room`.
fn full(fetched: &v1::FetchedPartition, little_room: bool) -> Fault {
    let message = format!(
        "the response is full before the records of topic {}, partition {}: read it again, alone or before the others",
        fetched.topic, fetched.partition
    );
    Fault { retryable: little_room, ..Fault::new(Reason::Overloaded, message) }
}

/// A record that no answer has room for must be read as a batch.
fn too_large_for_plain(fetched: &v1::FetchedPartition, size: usize) -> Fault {
    let message = format!("the record at offset {} has {size} bytes: read it as a batch", fetched.next_offset);
    Fault::new(Reason::RecordTooLarge, message).with("offset", fetched.next_offset)
}

/// A batch is stored with its records unread: what is wrong with them is its reader's to find.
fn undecodable(fetched: &v1::FetchedPartition, batch: &Batch, error: &Malformed) -> Fault {
    let (base, end) = (batch.base_offset(), batch.end_offset());
    if let Malformed::NoMemory { most, setting, .. } = error {
        let message = format!(
            "topic {}, partition {}: the batch at offset {base} has more than {most} bytes of records: read it as a batch, or raise {setting}",
            fetched.topic, fetched.partition
        );
        return Fault::new(Reason::RecordTooLarge, message).with("offset", base);
    }
    let message = format!(
        "topic {}, partition {}: the records of the batch at offset {base} cannot be decoded: {error}; read it as a batch, \
         or go on behind it at offset {end}",
        fetched.topic, fetched.partition
    );
    Fault::new(Reason::DataDamaged, message).with("offset", base).with("next", end)
}
