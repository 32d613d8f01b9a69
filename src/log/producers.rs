//! What an idempotent producer wrote last, so that its retry is recognised and a gap is refused (KIP-98). Pure.

use std::collections::BTreeMap;

use bytes::{Buf, BufMut};

use crate::{
    limits,
    model::Offset,
    record::{Batch, ProducerStamp},
};

/// The producers of one partition and the last batches of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProducerTable {
    producers: BTreeMap<i64, Producer>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Producer {
    epoch: i16,
    /// At most `limits::PRODUCER_WINDOW`, at least one, oldest first.
    batches: Vec<Written>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Written {
    sequence: i32,
    count: u32,
    base: Offset,
}

/// What a producer's stamp means for this partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The next batch of its producer: append it.
    New,
    /// It was appended before, at `base..end`: answer with that.
    Duplicate {
        /// Its first offset.
        base: Offset,
        /// The offset after its last.
        end: Offset,
    },
    /// A batch before it is missing.
    OutOfOrder {
        /// The sequence number that would be next.
        expected: i32,
    },
    /// A newer incarnation of the producer has written.
    Fenced {
        /// Its epoch.
        current: i16,
    },
    /// Nothing is known of the producer, and this is not its first batch: its state has expired or was cut.
    Unknown,
}

impl ProducerTable {
    /// No producers.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many producers are known.
    pub fn len(&self) -> usize {
        self.producers.len()
    }

    /// Who is known.
    #[cfg(feature = "sim")]
    pub(crate) fn ids(&self) -> impl Iterator<Item = i64> + '_ {
        self.producers.keys().copied()
    }

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.producers.is_empty()
    }

    /// What a batch of `count` records with this stamp would be.
    pub fn check(&self, stamp: ProducerStamp, count: u32) -> Verdict {
        let Some(producer) = self.producers.get(&stamp.id) else {
            return if stamp.base_sequence == 0 { Verdict::New } else { Verdict::Unknown };
        };
        if stamp.epoch < producer.epoch {
            return Verdict::Fenced { current: producer.epoch };
        }
        if stamp.epoch > producer.epoch {
            let first = stamp.base_sequence == 0;
            return if first { Verdict::New } else { Verdict::OutOfOrder { expected: 0 } };
        }
        let same = |batch: &&Written| batch.sequence == stamp.base_sequence && batch.count == count;
        if let Some(batch) = producer.batches.iter().find(same) {
            return Verdict::Duplicate { base: batch.base, end: batch.base.plus(u64::from(batch.count)) };
        }
        let expected = producer.next();
        if stamp.base_sequence == expected { Verdict::New } else { Verdict::OutOfOrder { expected } }
    }

    /// Notes a batch that was appended. One that is not its producer's next (a leader admitted it, this replica copies)
    /// starts the producer anew.
    pub fn note(&mut self, batch: &Batch) {
        let Some(stamp) = batch.producer() else { return };
        let written = Written { sequence: stamp.base_sequence, count: batch.count(), base: batch.base_offset() };
        let fresh = || Producer { epoch: stamp.epoch, batches: Vec::with_capacity(1) };
        let producer = self.producers.entry(stamp.id).or_insert_with(fresh);
        if producer.epoch != stamp.epoch || (!producer.batches.is_empty() && producer.next() != stamp.base_sequence) {
            *producer = fresh();
        }
        if producer.batches.len() == limits::PRODUCER_WINDOW {
            producer.batches.remove(0);
        }
        producer.batches.push(written);
        if self.producers.len() > limits::MAX_PRODUCERS {
            self.forget_oldest();
        }
    }

    /// Drops the eighth that has not written for longest, by offset: every replica forgets the same.
    fn forget_oldest(&mut self) {
        let mut last: Vec<Offset> = self.producers.values().map(Producer::last).collect();
        let (_, threshold, _) = last.select_nth_unstable(limits::MAX_PRODUCERS / 8);
        let threshold = *threshold;
        self.producers.retain(|_, producer| producer.last() > threshold);
    }

    pub(super) fn encode(&self, out: &mut impl BufMut) {
        out.put_u32(u32::try_from(self.producers.len()).unwrap_or(u32::MAX));
        for (id, producer) in &self.producers {
            out.put_i64(*id);
            out.put_i16(producer.epoch);
            out.put_u8(u8::try_from(producer.batches.len()).unwrap_or(u8::MAX));
            for batch in &producer.batches {
                out.put_i32(batch.sequence);
                out.put_u32(batch.count);
                out.put_u64(batch.base.get());
            }
        }
    }

    pub(super) fn decode(from: &mut impl Buf) -> Option<Self> {
        let mut table = Self::new();
        for _ in 0..from.try_get_u32().ok()? {
            let id = from.try_get_i64().ok()?;
            let epoch = from.try_get_i16().ok()?;
            let count = usize::from(from.try_get_u8().ok()?);
            let follows = table.producers.last_key_value().is_none_or(|(last, _)| *last < id);
            if id < 0 || !follows || !(1..=limits::PRODUCER_WINDOW).contains(&count) {
                return None;
            }
            let mut batches = Vec::with_capacity(count);
            for _ in 0..count {
                batches.push(Written::decode(from)?);
            }
            table.producers.insert(id, Producer { epoch, batches });
        }
        Some(table)
    }

    /// Its bytes in a segment object's footer or a snapshot.
    pub fn to_bytes(&self) -> bytes::Bytes {
        let mut out = bytes::BytesMut::new();
        self.encode(&mut out);
        out.freeze()
    }

    /// The table that [`Self::to_bytes`] gave; `None` when the bytes are not one.
    pub fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
        Self::decode(&mut bytes).filter(|_| bytes.is_empty())
    }
}

impl Written {
    /// One whose count and offsets a batch can have: the end is told to whoever repeats it.
    fn decode(from: &mut impl Buf) -> Option<Self> {
        let (sequence, count) = (from.try_get_i32().ok()?, from.try_get_u32().ok()?);
        let base = Offset::new(from.try_get_u64().ok()?)?;
        let possible = (1..=limits::MAX_BATCH_RECORDS).contains(&usize::try_from(count).ok()?);
        Offset::new(base.get() + u64::from(count)).filter(|_| possible)?;
        Some(Self { sequence, count, base })
    }
}

impl Producer {
    /// The sequence number after the last batch; after 2^31 - 1 comes 0.
    fn next(&self) -> i32 {
        let last = self.batches.last().expect("a producer has a batch");
        let next = (i64::from(last.sequence) + i64::from(last.count)) & i64::from(i32::MAX);
        i32::try_from(next).unwrap_or(0)
    }

    fn last(&self) -> Offset {
        self.batches.last().map_or(Offset::ZERO, |batch| batch.base)
    }
}
