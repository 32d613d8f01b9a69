//! Producer state: the last batches of each idempotent producer, to recognise a retry and to refuse a gap (KIP-98).
//! Pure code: no I/O, lock or clock.
//!
//! # Overview
//!
//! The set of known producers is a function of the log's batches and of `producer.id.expiration.ms`, and of nothing
//! else. No clock, and no order of restarts, snapshots or truncations affects it. *Partition time* is the largest
//! timestamp of all batches up to the log end. A producer is known under two conditions:
//!
//! - It is one of the last `limits::MAX_PRODUCERS` producers that wrote.
//! - Partition time is at most the expiration past the time of its last batch.
//!
//! # Invariants
//!
//! - Partition time never decreases as a log grows, so the order by offset is the order by time. Both rules remove the
//!   producers that wrote first, so the time of their application does not matter. A table that was restored without
//!   the expiration, and receives it later, equals a table that had it from the start.
//! - While the tables of all replicas exceed [`ProducerMemory`], a table with [`CROWDED_PRODUCERS`] producers accepts
//!   no new one ([`SequenceCheck::TooManyProducers`], which only leaders check). After each batch that the table then
//!   records, at most that many of its producers keep more than [`SHORT_WINDOW_BATCHES`] batches. The set of known
//!   producers never depends on this limit.

use std::collections::BTreeMap;

use bytes::{Buf, BufMut};

use super::producer_memory::{ProducerMemory, TableMemory};
use crate::{
    limits,
    model::{Compression, Offset, TimestampType},
    record::{Batch, Fingerprint, ProducerSequence},
};

/// Bytes of a producer besides its batches: its entries in two trees, and the overhead of the allocator.
const PRODUCER_BYTES: usize = 140;

/// Limit while all tables together exceed their memory. A table with this number of producers refuses new ones, and at
/// most this number of producers keep long windows.
const CROWDED_PRODUCERS: usize = 16;

/// Batches per producer that a table always keeps. The Rust client has that many in flight by default, Kafka's clients
/// at most 5.
const SHORT_WINDOW_BATCHES: usize = 16;

/// Producer state of one partition: the known producers, with the last batches of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProducerTable {
    producers: BTreeMap<i64, ProducerState>,
    /// Ids of the producers, by the base offset of their last batch.
    by_last: BTreeMap<Offset, i64>,
    /// Ids of the producers that keep more than [`SHORT_WINDOW_BATCHES`] batches, by the base offset of their last
    /// batch.
    long_windows: BTreeMap<Offset, i64>,
    /// Number of batches of all producers.
    batches: usize,
    memory: TableMemory,
    /// Partition time in milliseconds; `i64::MIN` before the first batch.
    time_ms: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct ProducerState {
    epoch: i16,
    /// Partition time at the append of the last batch, in milliseconds.
    last_ms: i64,
    /// Last batches, oldest first: at least one, and at most `limits::MAX_BATCHES_PER_PRODUCER`.
    batches: Vec<BatchMetadata>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BatchMetadata {
    sequence: i32,
    count: u32,
    base: Offset,
    /// Fingerprint of the batch as it is stored.
    fingerprint: Fingerprint,
}

/// Result of checking the sequence of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceCheck {
    /// The first batch of a producer or producer epoch, or the next batch of its producer. It may be appended.
    New,
    /// A batch that was appended before at `base..end`. The response returns that range.
    Duplicate {
        /// Base offset of the appended batch.
        base: Offset,
        /// Offset after the last record of the appended batch.
        end: Offset,
    },
    /// The sequence is not the next one, and no stored batch has this sequence and number of records. A batch before
    /// this one is missing, or this is a retry of a batch that is no longer stored.
    OutOfOrder {
        /// Sequence number of the producer's next batch.
        expected: i32,
    },
    /// A different batch with the same sequence and number of records was appended.
    Conflict {
        /// Base offset of the appended batch.
        base: Offset,
    },
    /// A newer epoch of the producer has written.
    Fenced {
        /// Newest epoch of the producer.
        current: i16,
    },
    /// The producer is not known, and this is not its first batch: its state was removed, or truncated with its
    /// batches.
    Unknown,
    /// The producer would be a new one. The producer state of all replicas exceeds its limit, and this table has many
    /// producers.
    TooManyProducers {
        /// Limit of the producer state, in bytes.
        max_bytes: usize,
    },
}

impl Default for ProducerTable {
    fn default() -> Self {
        Self {
            producers: BTreeMap::new(),
            by_last: BTreeMap::new(),
            long_windows: BTreeMap::new(),
            batches: 0,
            memory: TableMemory::default(),
            time_ms: i64::MIN,
        }
    }
}

impl ProducerTable {
    /// Returns a table without producers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts the bytes of the table in `memory` until the table is dropped.
    pub(in crate::log) fn charged(mut self, memory: &ProducerMemory) -> Self {
        self.memory = TableMemory::new(memory.clone(), self.bytes());
        self
    }

    /// Returns the approximate memory of the table, in bytes.
    fn bytes(&self) -> usize {
        self.producers.len() * PRODUCER_BYTES + self.batches * size_of::<BatchMetadata>()
    }

    /// Returns the number of known producers.
    pub fn len(&self) -> usize {
        self.producers.len()
    }

    /// Returns the ids of the known producers.
    #[cfg(feature = "sim")]
    pub(crate) fn ids(&self) -> impl Iterator<Item = i64> + '_ {
        self.producers.keys().copied()
    }

    /// Returns true if no producer is known.
    pub fn is_empty(&self) -> bool {
        self.producers.is_empty()
    }

    /// Checks whether a leader may append a batch of `count` records with the producer sequence `stamp`. `sent` is the
    /// fingerprint of the batch as the client sent it; `None` if the broker built the batch from records in the
    /// request.
    pub fn check(&self, stamp: ProducerSequence, count: u32, sent: Option<Fingerprint>) -> SequenceCheck {
        let Some(producer) = self.producers.get(&stamp.id) else {
            if stamp.base_sequence != 0 {
                return SequenceCheck::Unknown;
            }
            return match self.memory.exceeded_limit() {
                Some(max_bytes) if self.producers.len() >= CROWDED_PRODUCERS => {
                    SequenceCheck::TooManyProducers { max_bytes }
                }
                _ => SequenceCheck::New,
            };
        };
        if stamp.epoch < producer.epoch {
            return SequenceCheck::Fenced { current: producer.epoch };
        }
        if stamp.epoch > producer.epoch {
            let is_first = stamp.base_sequence == 0;
            return if is_first { SequenceCheck::New } else { SequenceCheck::OutOfOrder { expected: 0 } };
        }
        let is_same = |batch: &&BatchMetadata| batch.sequence == stamp.base_sequence && batch.count == count;
        if let Some(batch) = producer.batches.iter().find(is_same) {
            return if batch.fingerprint.can_store(sent) {
                SequenceCheck::Duplicate { base: batch.base, end: batch.base.plus(u64::from(batch.count)) }
            } else {
                SequenceCheck::Conflict { base: batch.base }
            };
        }
        let expected = producer.next_sequence();
        if stamp.base_sequence == expected { SequenceCheck::New } else { SequenceCheck::OutOfOrder { expected } }
    }

    /// Returns true if [`Self::record_batch`] of this batch would change the table.
    pub(in crate::log) fn is_changed_by(&self, batch: &Batch) -> bool {
        batch.producer().is_some() || batch.max_timestamp() > self.time_ms
    }

    /// Adds an appended batch, which the leader has accepted. So a batch of another producer epoch, or with another
    /// sequence than the next one, restarts the state of its producer. Also removes the oldest producer above
    /// `limits::MAX_PRODUCERS`, and shortens windows while all tables exceed their memory.
    pub fn record_batch(&mut self, batch: &Batch) {
        self.time_ms = self.time_ms.max(batch.max_timestamp());
        let Some(stamp) = batch.producer() else { return };
        let written = BatchMetadata {
            sequence: stamp.base_sequence,
            count: batch.count(),
            base: batch.base_offset(),
            fingerprint: batch.fingerprint(),
        };
        let new_state = || ProducerState { epoch: stamp.epoch, last_ms: i64::MIN, batches: Vec::with_capacity(1) };
        // The entries of the previous last batch are removed first, and those of this batch are added below.
        let producer = self.producers.entry(stamp.id).or_insert_with(new_state);
        self.batches -= producer.batches.len();
        if let Some(last) = producer.batches.last() {
            self.by_last.remove(&last.base);
            if producer.batches.len() > SHORT_WINDOW_BATCHES {
                self.long_windows.remove(&last.base);
            }
            if producer.epoch != stamp.epoch || producer.next_sequence() != stamp.base_sequence {
                *producer = new_state();
            }
        }
        if producer.batches.len() == limits::MAX_BATCHES_PER_PRODUCER {
            producer.batches.remove(0);
        }
        producer.batches.push(written);
        producer.last_ms = self.time_ms;
        self.batches += producer.batches.len();
        self.by_last.insert(written.base, stamp.id);
        if producer.batches.len() > SHORT_WINDOW_BATCHES {
            self.long_windows.insert(written.base, stamp.id);
        }
        if self.producers.len() > limits::MAX_PRODUCERS {
            self.remove_oldest();
        }
        self.memory.set(self.bytes());
        while self.long_windows.len() > CROWDED_PRODUCERS && self.memory.exceeded_limit().is_some() {
            self.shorten_oldest();
        }
    }

    /// Returns true if [`Self::remove_expired`] would remove a producer.
    pub(in crate::log) fn has_expired(&self, expiration_ms: Option<i64>) -> bool {
        let Some((expiration_ms, (_, id))) = expiration_ms.zip(self.by_last.first_key_value()) else { return false };
        self.time_ms.saturating_sub(self.producers[id].last_ms) > expiration_ms
    }

    /// Removes the producers that have written nothing for longer than `expiration_ms` of partition time. `None`
    /// removes none.
    pub fn remove_expired(&mut self, expiration_ms: Option<i64>) {
        while self.has_expired(expiration_ms) {
            self.remove_oldest();
        }
    }

    /// Removes the producer whose last batch is the oldest one.
    fn remove_oldest(&mut self) {
        let Some((last, id)) = self.by_last.pop_first() else { return };
        self.long_windows.remove(&last);
        self.batches -= self.producers.remove(&id).map_or(0, |producer| producer.batches.len());
        self.memory.set(self.bytes());
    }

    /// Shortens the window of one producer to [`SHORT_WINDOW_BATCHES`] batches. Of the producers with a longer window,
    /// this is the one whose last batch is the oldest.
    fn shorten_oldest(&mut self) {
        let Some((_, id)) = self.long_windows.pop_first() else { return };
        let Some(producer) = self.producers.get_mut(&id) else { return };
        let batches = &mut producer.batches;
        self.batches -= batches.len() - SHORT_WINDOW_BATCHES;
        *batches = batches.split_off(batches.len() - SHORT_WINDOW_BATCHES);
        self.memory.set(self.bytes());
    }

    pub(in crate::log) fn encode(&self, out: &mut impl BufMut) {
        out.put_i64(self.time_ms);
        out.put_u32(u32::try_from(self.producers.len()).unwrap_or(u32::MAX));
        for (id, producer) in &self.producers {
            out.put_i64(*id);
            out.put_i16(producer.epoch);
            out.put_i64(producer.last_ms);
            out.put_u8(u8::try_from(producer.batches.len()).unwrap_or(u8::MAX));
            for batch in &producer.batches {
                batch.encode(out);
            }
        }
    }

    /// Decodes the output of [`Self::encode`]; `None` if bytes are missing, or for a state that no log has.
    pub(in crate::log) fn decode(from: &mut impl Buf) -> Option<Self> {
        let mut table = Self { time_ms: from.try_get_i64().ok()?, ..Self::new() };
        for _ in 0..from.try_get_u32().ok()? {
            let id = from.try_get_i64().ok()?;
            let epoch = from.try_get_i16().ok()?;
            let last_ms = from.try_get_i64().ok()?;
            let count = usize::from(from.try_get_u8().ok()?);
            let is_ascending = table.producers.last_key_value().is_none_or(|(last, _)| *last < id);
            if id < 0
                || !is_ascending
                || last_ms > table.time_ms
                || !(1..=limits::MAX_BATCHES_PER_PRODUCER).contains(&count)
            {
                return None;
            }
            let mut batches = Vec::with_capacity(count);
            for _ in 0..count {
                batches.push(BatchMetadata::decode(from)?);
            }
            let last = batches.last()?.base;
            if table.by_last.insert(last, id).is_some() || table.producers.len() == limits::MAX_PRODUCERS {
                return None;
            }
            if count > SHORT_WINDOW_BATCHES {
                table.long_windows.insert(last, id);
            }
            table.batches += count;
            table.producers.insert(id, ProducerState { epoch, last_ms, batches });
        }
        // Times must not decrease as offsets grow. Otherwise replicas would remove different producers.
        let times = table.by_last.values().map(|id| table.producers[id].last_ms);
        times.is_sorted().then_some(table)
    }

    /// Encodes the table for the footer of a segment object, or for a replica that bootstraps.
    pub fn to_bytes(&self) -> bytes::Bytes {
        let mut out = bytes::BytesMut::new();
        self.encode(&mut out);
        out.freeze()
    }

    /// Decodes the output of [`Self::to_bytes`]; `None` if the bytes are invalid.
    pub fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
        Self::decode(&mut bytes).filter(|_| bytes.is_empty())
    }
}

/// Bit of the attributes byte: the broker set the timestamps. The low three bits are the codec. Both are as in the
/// attributes of a batch.
const LOG_APPEND_TIME: u8 = 1 << 3;

impl BatchMetadata {
    fn encode(&self, out: &mut impl BufMut) {
        out.put_i32(self.sequence);
        out.put_u32(self.count);
        out.put_u64(self.base.get());
        out.put_u32(self.fingerprint.crc);
        let time = if self.fingerprint.timestamp_type == TimestampType::LogAppendTime { LOG_APPEND_TIME } else { 0 };
        out.put_u8(self.fingerprint.compression as u8 | time);
    }

    /// Decodes the output of [`Self::encode`]. Returns `None` in these cases:
    /// - Bytes are missing.
    /// - The codec is unknown.
    /// - No batch can have the number of records.
    /// - The end exceeds the maximum offset: the response to a retry contains the end.
    fn decode(from: &mut impl Buf) -> Option<Self> {
        let (sequence, count) = (from.try_get_i32().ok()?, from.try_get_u32().ok()?);
        let base = Offset::new(from.try_get_u64().ok()?)?;
        let is_possible = (1..=limits::MAX_BATCH_RECORDS).contains(&usize::try_from(count).ok()?);
        Offset::new(base.get() + u64::from(count)).filter(|_| is_possible)?;
        let (crc, attributes) = (from.try_get_u32().ok()?, from.try_get_u8().ok()?);
        let compression = Compression::from_bits(attributes & !LOG_APPEND_TIME)?;
        let timestamp_type =
            if attributes & LOG_APPEND_TIME == 0 { TimestampType::CreateTime } else { TimestampType::LogAppendTime };
        Some(Self { sequence, count, base, fingerprint: Fingerprint { crc, compression, timestamp_type } })
    }
}

impl ProducerState {
    /// Returns the sequence number after the last batch; 0 follows 2^31 - 1.
    fn next_sequence(&self) -> i32 {
        let last = self.batches.last().expect("a producer has a batch");
        let next = (i64::from(last.sequence) + i64::from(last.count)) & i64::from(i32::MAX);
        i32::try_from(next).unwrap_or(0)
    }
}
