//! Plain answers: batches replaced by their records, for callers that decode none themselves.

use bytes::Bytes;

use crate::{
    limits,
    model::{Compression, Offset},
    partition::{Opener, Use},
    proto::{
        fault::{Fault, Reason},
        v1,
    },
    record::{Batch, Malformed, Record},
};

/// Bytes of records from which on a plain answer takes no more. What is compressed may be a thousand times larger than it
/// was: an answer must stay one that can be sent, and held until it is.
const PLAIN_BYTES: usize = limits::MAX_FETCH_BYTES;

/// Most bytes of records in one plain answer: each partition's first record is taken up to here.
const MAX_PLAIN_BYTES: usize = limits::MAX_MESSAGE_BYTES - (4 << 20);

/// Replaces the batches of an answer by their records from offset `from` on, as many as there is room for; `used` is what all
/// partitions together have taken. An error says why there is none: where some come before what is wrong, the next read
/// meets it first.
pub(super) async fn decode(
    opener: &Opener,
    fetched: &mut v1::FetchedPartition,
    from: Offset,
    used: &mut usize,
) -> Result<(), Fault> {
    let mut bytes = Bytes::from(std::mem::take(&mut fetched.chunks).concat());
    while !bytes.is_empty() {
        let batch = Batch::split_from(&mut bytes)?;
        let is_first = fetched.records.is_empty();
        if *used >= PLAIN_BYTES && !(is_first && batch.compression() == Compression::None) {
            // Nothing more has room: what follows need not be opened to see that.
            fetched.next_offset = from.max(batch.base_offset()).as_i64();
            return if is_first { Err(full(fetched)) } else { Ok(()) };
        }
        let (before, first) = (*used, fetched.records.is_empty());
        let work = move |batch: &Batch, most: usize| take_records(batch, most, from, before, first);
        match opener.open(&batch, limits::MAX_DECOMPRESSED_BYTES, Use::Read, work).await {
            Ok(taken) => {
                *used = taken.used;
                fetched.records.extend(taken.records);
                let Some((offset, size)) = taken.left else { continue };
                fetched.next_offset = offset.as_i64();
                let too_large = fetched.records.is_empty() && size > MAX_PLAIN_BYTES;
                return if too_large { Err(too_large_for_plain(fetched, size)) } else { Ok(()) };
            }
            Err(error) => {
                fetched.next_offset = from.max(batch.base_offset()).as_i64();
                return if fetched.records.is_empty() { Err(undecodable(fetched, &batch, &error)) } else { Ok(()) };
            }
        }
    }
    Ok(())
}

/// What was taken of a batch.
struct Taken {
    records: Vec<v1::Record>,
    /// Bytes of the whole answer.
    used: usize,
    /// The first record that has no room any more, and its size.
    left: Option<(Offset, usize)>,
}

fn take_records(batch: &Batch, most: usize, from: Offset, used: usize, first: bool) -> Result<Taken, Malformed> {
    // A slice would hold all that was decompressed until the answer is sent.
    let copies = batch.compression() != Compression::None;
    let keep = |bytes: Bytes| if copies { Bytes::copy_from_slice(&bytes) } else { bytes };
    let mut taken = Taken { records: Vec::new(), used, left: None };
    for entry in batch.records_within(most)? {
        let (offset, record) = entry?;
        if offset < from {
            continue;
        }
        let size = plain_bytes(&record);
        let room = if first && taken.records.is_empty() { MAX_PLAIN_BYTES } else { PLAIN_BYTES };
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

/// The records of other partitions have taken all the room, and this one's are compressed.
fn full(fetched: &v1::FetchedPartition) -> Fault {
    let message = format!(
        "the response is full before the records of topic {}, partition {}: read it again, alone or before the others",
        fetched.topic, fetched.partition
    );
    Fault::new(Reason::Overloaded, message)
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
