//! The leader's decisions: which writes are admitted, when they are committed, and which writers get their result.
//!
//! A plain struct. The actor appends and syncs, and reports the outcome to the leader; the leader returns the writers whose result is
//! due. `W` is the actor's state of a writer, which the leader only stores. [`insync`] decides about the ISR and about commits; [`join`]
//! decides where a follower starts.
//!
//! # Invariants
//!
//! - Only [`InSync`] moves the high watermark; it never falls.
//! - A writer gets its result once, and not before its own rule ([`Acks`]) holds.
//! - One sequence of a producer is appended once, without gaps.

pub mod insync;
pub mod join;

use std::collections::{BTreeMap, VecDeque};

use self::insync::{Ends, InSync, Rule, Start};
use crate::{
    limits,
    log::{ProducerTable, Verdict},
    model::{Acks, Durability, LeaderEpoch, Offset, TopicName},
    record::{Batch, Fingerprint, ProducerSequence},
};

/// Location of an acknowledged write's records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// In the leader's memory.
    Memory,
    /// In the page cache of this number of replicas.
    PageCache(u32),
    /// On stable storage of this number of replicas.
    Synced(u32),
    /// In the object store, and on this number of replicas.
    Tiered(u32),
}

/// Result of an acknowledged write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acked {
    /// Offset of the first record.
    pub base: Offset,
    /// Offset after the last record.
    pub end: Offset,
    /// Leader epoch of the write.
    pub epoch: LeaderEpoch,
    /// Timestamp that the broker set on the records, if it set one.
    pub append_time_ms: Option<i64>,
    pub held: Held,
    /// True if an earlier attempt had appended the batch.
    pub duplicate: bool,
}

/// Error of a write that was not admitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The batch exceeds the topic's limit.
    #[error(
        "the batch has {bytes} bytes, topic {topic} takes at most {most}: send smaller batches, or raise max.message.bytes (up to {})",
        limits::MAX_BATCH_BYTES
    )]
    TooLarge {
        topic: TopicName,
        /// Size of the batch as the topic stores it.
        bytes: usize,
        /// `max.message.bytes`.
        most: usize,
    },
    /// The topic stores batches uncompressed, and the uncompressed batch exceeds the topic's limit.
    #[error(
        "the batch has more than {most} bytes without compression, as topic {topic} stores it (compression.type=uncompressed), and {most} is \
         what it takes at most: send smaller batches, or raise max.message.bytes (up to {})",
        limits::MAX_BATCH_BYTES
    )]
    Grows {
        topic: TopicName,
        /// `max.message.bytes`.
        most: usize,
    },
    /// The append would wait for the object store, which is unavailable.
    #[error(
        "the object store has served nothing {outage}; with acks=tiered nothing is appended until it does: use another acks, or try again \
         later"
    )]
    StoreAway {
        /// Duration and reason of the outage.
        outage: String,
    },
    /// The ISR is smaller than `min.insync.replicas`.
    #[error(
        "replicas in sync: {in_sync}, and min.insync.replicas is {needed}: wait for replicas to come back, or lower it"
    )]
    NotEnoughReplicas {
        /// Size of the ISR.
        in_sync: usize,
        /// `min.insync.replicas`.
        needed: usize,
    },
    /// A gap in a producer's sequence: the records before these were not written.
    #[error("producer {producer} sent sequence {sent}, expected was {expected}: an earlier batch is missing")]
    OutOfOrder {
        /// Producer id.
        producer: i64,
        /// Sequence of the batch.
        sent: i32,
        /// Expected sequence.
        expected: i32,
    },
    /// Another batch has the producer's sequence: a different producer uses the same id, or one producer made two batches for one
    /// sequence.
    #[error(
        "producer {producer} sent sequence {sent}, and another batch with that sequence is stored at offset {base}: this batch is not a retry \
         of that one and was not appended"
    )]
    SequenceConflict {
        /// Producer id.
        producer: i64,
        /// Sequence of the batch.
        sent: i32,
        /// Offset of the other batch.
        base: Offset,
    },
    /// A newer epoch of the same producer has written.
    #[error("producer {producer} epoch {epoch} is fenced: epoch {current} has written since")]
    Fenced {
        /// Producer id.
        producer: i64,
        /// Producer epoch of the batch.
        epoch: i16,
        /// Current producer epoch.
        current: i16,
    },
    /// A record's timestamp differs from this broker's clock by more than the topic allows.
    #[error(
        "the timestamp {timestamp_ms} lies {} ms {side} this broker's clock, and {setting} of the topic is {limit_ms}: set the clock \
         of the producer, or raise {setting} for the topic", timestamp_ms.abs_diff(*now_ms)
    )]
    Timestamp {
        /// Timestamp of the record.
        timestamp_ms: i64,
        /// This broker's clock.
        now_ms: i64,
        /// `before` or `after`.
        side: &'static str,
        /// Setting that the timestamp violates.
        setting: &'static str,
        /// Value of that setting.
        limit_ms: u64,
    },
    /// The partition has no state of this producer, and the batch is not its first.
    #[error("producer {producer} is not known to this partition and its batch begins at sequence {sent}, not 0")]
    UnknownProducer {
        /// Producer id.
        producer: i64,
        /// Sequence of the batch.
        sent: i32,
    },
    /// The broker's producer state is at its limit, so the partition adds no new producer.
    #[error(
        "this partition remembers {known} producers, and those of all partitions of this broker take more than {max_bytes} bytes (a sixteenth of \
         limits.memory_bytes): it takes no new producer until some are forgotten; keep producers instead of beginning new ones, lower \
         producer.id.expiration.ms of topics that many write to, or raise limits.memory_bytes"
    )]
    TooManyProducers {
        /// Number of producers in the partition's state.
        known: usize,
        /// Limit of the producer state of all partitions.
        max_bytes: usize,
    },
}

/// Outcome of an admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The write is appended at this offset.
    Append(Offset),
    /// The log already holds the write, at these offsets.
    Duplicate(Offset, Offset),
}

/// Number of writers whose memory an empty queue keeps.
const SPARE_WRITERS: usize = 64;

struct Waiting<W> {
    acked: Acked,
    writer: W,
}

/// One leader of one partition in one epoch.
pub struct Leader<W> {
    in_sync: InSync,
    log_end: Offset,
    persisted_end: Offset,
    tiered_end: Offset,
    /// Waiting writers by acks rule, in the order of arrival. That is the order of their end offsets, except for duplicates.
    for_leader: VecDeque<Waiting<W>>,
    for_all: VecDeque<Waiting<W>>,
    /// Writers with `acks=tiered`, in two steps: until the write is safe on this broker, and then until it is in the object store.
    for_tier_here: VecDeque<Waiting<W>>,
    for_tier: VecDeque<Waiting<W>>,
    /// Producers with batches in the group that is being admitted, because the producer table lacks that group. By id, with the next
    /// epoch and sequence.
    in_group: BTreeMap<i64, (i16, i32)>,
    next_base: Offset,
}

impl<W> Leader<W> {
    /// Creates the leader of the epoch in `start`. `tiered_end` is the first offset not committed to the object store.
    pub fn new(start: Start, tiered_end: Offset) -> Self {
        let own = start.own;
        Self {
            in_sync: InSync::new(start),
            log_end: own.written,
            persisted_end: own.persisted,
            tiered_end,
            for_leader: VecDeque::new(),
            for_all: VecDeque::new(),
            for_tier_here: VecDeque::new(),
            for_tier: VecDeque::new(),
            in_group: BTreeMap::new(),
            next_base: own.written,
        }
    }

    pub fn epoch(&self) -> LeaderEpoch {
        self.in_sync.epoch()
    }

    /// Returns the first uncommitted offset.
    pub fn high_watermark(&self) -> Offset {
        self.in_sync.high_watermark()
    }

    /// Returns the ISR state.
    pub fn in_sync(&self) -> &InSync {
        &self.in_sync
    }

    /// Returns the ISR state, for reports about followers, brokers and outcomes of proposals.
    pub fn in_sync_mut(&mut self) -> &mut InSync {
        &mut self.in_sync
    }

    /// Returns true if a writer waits for the object store.
    pub fn awaits_tier(&self) -> bool {
        !(self.for_tier_here.is_empty() && self.for_tier.is_empty())
    }

    /// Applies a changed topic configuration.
    pub fn configure(&mut self, rule: Rule) {
        self.in_sync.configure(rule);
    }

    /// Decides about one write. Admitted writes form a group until [`Self::appended`] or [`Self::not_appended`] ends it. `sent` is the
    /// fingerprint of the batch that the client sent, if the request held one. `refusal` is a reason against the append; a retry of a
    /// batch in the log gets its result all the same. A gap is refused with that reason too, because a refused batch most likely caused
    /// the gap.
    pub fn admit(
        &mut self,
        batch: &Batch,
        sent: Option<Fingerprint>,
        acks: Acks,
        producers: &ProducerTable,
        refusal: Option<Refused>,
    ) -> Result<Admission, Refused> {
        let strict = matches!(acks, Acks::All | Acks::Tiered);
        if strict && let Err(in_sync) = self.in_sync.has_minimum() {
            return Err(Refused::NotEnoughReplicas { in_sync, needed: self.in_sync.rule().min_insync });
        }
        let (count, stamp) = (batch.count(), batch.producer());
        let checked = stamp.map(|stamp| self.check(stamp, count, sent, producers));
        match (checked, refusal) {
            (Some(Ok(duplicate @ Admission::Duplicate(..))), _) => return Ok(duplicate),
            (Some(Err(refused @ (Refused::Fenced { .. } | Refused::SequenceConflict { .. }))), _)
            | (_, Some(refused))
            | (Some(Err(refused)), None) => return Err(refused),
            (Some(Ok(Admission::Append(_))) | None, None) => {}
        }
        if let Some(stamp) = stamp {
            self.note(stamp, count);
        }
        let base = self.next_base;
        self.next_base = base.plus(u64::from(count));
        Ok(Admission::Append(base))
    }

    /// Returns true if `batch` can be checked only after the pending group is in the log. Its producer has batches in the group, whose
    /// sequence it does not continue, and the producer table lacks the group.
    pub fn must_flush_before(&self, batch: &Batch) -> bool {
        let Some(stamp) = batch.producer() else { return false };
        self.in_group.get(&stamp.id).is_some_and(|next| *next != (stamp.epoch, stamp.base_sequence))
    }

    fn check(
        &self,
        stamp: ProducerSequence,
        count: u32,
        fingerprint: Option<Fingerprint>,
        producers: &ProducerTable,
    ) -> Result<Admission, Refused> {
        if let Some(next) = self.in_group.get(&stamp.id) {
            let continues = *next == (stamp.epoch, stamp.base_sequence);
            assert!(continues, "the actor flushes before a batch that continues nothing");
            return Ok(Admission::Append(self.next_base));
        }
        let (producer, sent) = (stamp.id, stamp.base_sequence);
        match producers.check(stamp, count, fingerprint) {
            Verdict::New => Ok(Admission::Append(self.next_base)),
            Verdict::Duplicate { base, end } => Ok(Admission::Duplicate(base, end)),
            Verdict::OutOfOrder { expected } => Err(Refused::OutOfOrder { producer, sent, expected }),
            Verdict::Conflict { base } => Err(Refused::SequenceConflict { producer, sent, base }),
            Verdict::Fenced { current } => Err(Refused::Fenced { producer, epoch: stamp.epoch, current }),
            Verdict::Unknown => Err(Refused::UnknownProducer { producer, sent }),
            Verdict::Full { max_bytes } => Err(Refused::TooManyProducers { known: producers.len(), max_bytes }),
        }
    }

    fn note(&mut self, stamp: ProducerSequence, count: u32) {
        let next = next_sequence(stamp.base_sequence, count);
        self.in_group.insert(stamp.id, (stamp.epoch, next));
    }

    /// Records that the group admitted since the last call is in the log.
    pub fn appended(&mut self) {
        self.log_end = self.next_base;
        self.in_group.clear();
        self.in_sync.own(self.own());
    }

    /// Records that the group admitted since the last call is not in the log. Its offsets are free again.
    pub fn not_appended(&mut self) {
        self.next_base = self.log_end;
        self.in_group.clear();
    }

    /// Keeps a writer until its acks rule holds.
    pub fn wait(&mut self, acks: Acks, acked: Acked, writer: W) {
        let waiting = Waiting { acked, writer };
        match acks {
            Acks::None | Acks::Leader => self.for_leader.push_back(waiting),
            Acks::All => self.for_all.push_back(waiting),
            Acks::Tiered => self.for_tier_here.push_back(waiting),
        }
    }

    /// Records that everything below `end` is on this broker's stable storage.
    pub fn persisted(&mut self, end: Offset) {
        self.persisted_end = self.persisted_end.max(end);
        self.in_sync.own(self.own());
    }

    fn own(&self) -> Ends {
        let persisted = if mutant!(AcknowledgeBeforeSync) { self.log_end } else { self.persisted_end };
        Ends { written: self.log_end, persisted }
    }

    /// Records that everything below `end` is committed to the object store.
    pub fn tiered(&mut self, end: Offset) {
        self.tiered_end = self.tiered_end.max(end);
    }

    /// Calls `stored` for each writer with `acks=tiered` whose write has just reached the topic's durability on this broker. The caller
    /// can release the memory of the write: only the object store is outstanding.
    pub fn take_stored(&mut self, mut stored: impl FnMut(&mut W, &Acked)) {
        let own = self.in_sync.own_end();
        while let Some(mut waiting) = self.for_tier_here.pop_front_if(|waiting| waiting.acked.end <= own) {
            stored(&mut waiting.writer, &waiting.acked);
            self.for_tier.push_back(waiting);
        }
    }

    /// Removes the writers whose rule holds now, and passes them to `answer` with their results.
    pub fn due(&mut self, mut answer: impl FnMut(W, Acked)) {
        self.take_stored(|_, _| {});
        let replicas = u32::try_from(self.in_sync.value().isr.len()).unwrap_or(u32::MAX);
        let held = |replicas| match self.in_sync.rule().durability {
            Durability::Persisted => Held::Synced(replicas),
            Durability::Replicated => Held::PageCache(replicas),
        };
        let (own, high_watermark) = (self.in_sync.own_end(), self.high_watermark());
        let tiered = self.tiered_end.min(high_watermark);
        let queues = [
            (&mut self.for_leader, own, held(1)),
            (&mut self.for_all, high_watermark, held(replicas)),
            (&mut self.for_tier, tiered, Held::Tiered(replicas)),
        ];
        for (queue, reached, held) in queues {
            while let Some(waiting) = queue.pop_front_if(|waiting| waiting.acked.end <= reached) {
                answer(waiting.writer, Acked { held, ..waiting.acked });
            }
        }
        self.shrink_queues();
    }

    /// Drops the writers that are gone and whose write is as safe as this broker alone can make it. Only other replicas or the object
    /// store can do more. Returns true while the write of a gone writer is not that safe yet.
    pub fn forget(&mut self, is_gone: impl Fn(&W) -> bool) -> bool {
        let own = self.in_sync.own_end();
        let mut left = false;
        for queue in [&mut self.for_all, &mut self.for_tier_here, &mut self.for_tier] {
            queue.retain(|waiting| {
                let gone = is_gone(&waiting.writer);
                let safe = waiting.acked.end <= own;
                left |= gone && !safe;
                !(gone && safe)
            });
        }
        self.shrink_queues();
        left
    }

    /// Frees the unused memory of queues. No budget counts it, and a broker has many partitions.
    fn shrink_queues(&mut self) {
        for queue in self.queues() {
            if queue.capacity() > SPARE_WRITERS && queue.len() < queue.capacity() / 4 {
                queue.shrink_to(SPARE_WRITERS.max(queue.len() * 2));
            }
        }
    }

    fn queues(&mut self) -> [&mut VecDeque<Waiting<W>>; 4] {
        [&mut self.for_leader, &mut self.for_all, &mut self.for_tier_here, &mut self.for_tier]
    }

    /// Removes all writers: their rules can no longer hold here.
    pub fn abandon(&mut self) -> impl Iterator<Item = W> + '_ {
        self.queues().into_iter().flat_map(|queue| queue.drain(..)).map(|waiting| waiting.writer)
    }
}

/// Returns the sequence after `count` records from `base`; sequences wrap from 2^31 - 1 to 0 (KIP-98).
fn next_sequence(base: i32, count: u32) -> i32 {
    let next = (i64::from(base) + i64::from(count)) % (i64::from(i32::MAX) + 1);
    i32::try_from(next).expect("below 2^31 by the remainder")
}

#[cfg(test)]
mod tests;
