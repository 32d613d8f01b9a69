//! The leader's decisions: which writes are admitted, when they are committed, and which writers get their result.
//!
//! A plain struct. The actor appends and syncs, and reports the outcome to the leader; the leader returns the writers
//! whose result is due. `W` is the actor's state of a writer, which the leader only stores. [`isr`] decides about the
//! ISR and about commits, from the states of other replicas ([`member`]); [`divergence`] decides where a follower
//! starts.
//!
//! # Invariants
//!
//! - Only [`IsrTracker`] moves the high watermark; it never falls.
//! - A writer gets its result once, and not before its own rule ([`Acks`]) holds.
//! - One sequence of a producer is appended once, without gaps.

pub mod divergence;
pub mod isr;
pub mod member;

use std::collections::{BTreeMap, VecDeque};

use self::{
    isr::{IsrRules, IsrTracker, LeaderStart},
    member::ReplicaProgress,
};
pub use crate::model::AckDurability;
use crate::{
    limits,
    log::{ProducerTable, SequenceCheck},
    model::{Acks, Durability, LeaderEpoch, Offset, TopicName},
    record::{Batch, Fingerprint, ProducerSequence},
};

/// Result of an acknowledged write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteAck {
    /// Offset of the first record.
    pub base: Offset,
    /// Offset after the last record.
    pub end: Offset,
    /// Leader epoch of the write.
    pub epoch: LeaderEpoch,
    /// Timestamp that the broker set on the records, if it set one.
    pub append_time_ms: Option<i64>,
    pub durability: AckDurability,
    /// True if an earlier attempt had appended the batch.
    pub duplicate: bool,
}

/// Error of a write that was not admitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// The batch exceeds the topic's limit.
    #[error(
        "the batch has {bytes} bytes, and topic {topic} accepts at most {max_bytes}: send smaller batches, or raise \
         max.message.bytes (up to {})",
        limits::MAX_BATCH_BYTES
    )]
    TooLarge {
        topic: TopicName,
        /// Size of the batch as the topic stores it.
        bytes: usize,
        /// `max.message.bytes`.
        max_bytes: usize,
    },
    /// The topic stores batches uncompressed, and the uncompressed batch exceeds the topic's limit.
    #[error(
        "the uncompressed batch exceeds {max_bytes} bytes, the limit of topic {topic}, which stores batches without \
         compression (compression.type=uncompressed): send smaller batches, or raise max.message.bytes (up to {})",
        limits::MAX_BATCH_BYTES
    )]
    Grows {
        topic: TopicName,
        /// `max.message.bytes`.
        max_bytes: usize,
    },
    /// The append would wait for the object store, which is unavailable.
    #[error(
        "the object store has been unavailable {outage}, so appends with acks=tiered are refused: use another acks, or \
         try again later"
    )]
    StoreUnavailable {
        /// Duration and reason of the outage.
        outage: String,
    },
    /// The ISR is smaller than `min.insync.replicas`.
    #[error(
        "replicas in sync: {in_sync}, below min.insync.replicas {needed}: wait for replicas to catch up, or lower \
         min.insync.replicas"
    )]
    NotEnoughReplicas {
        /// Size of the ISR.
        in_sync: usize,
        /// `min.insync.replicas`.
        needed: usize,
    },
    /// A gap in a producer's sequence: the records before these were not written.
    #[error("producer {producer} sent sequence {sent} instead of {expected}: an earlier batch is missing")]
    OutOfOrder {
        /// Producer id.
        producer: i64,
        /// Sequence of the batch.
        sent: i32,
        /// Expected sequence.
        expected: i32,
    },
    /// Another batch has the producer's sequence: a different producer uses the same id, or one producer made two
    /// batches for one sequence.
    #[error(
        "producer {producer} sent sequence {sent}, and another batch with that sequence is stored at offset {base}: \
         this batch is not a retry and was not appended"
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
    #[error("producer {producer} epoch {epoch} is fenced by epoch {current}")]
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
    #[error("the partition has no state of producer {producer}, and the batch starts at sequence {sent}, not 0")]
    UnknownProducer {
        /// Producer id.
        producer: i64,
        /// Sequence of the batch.
        sent: i32,
    },
    /// The broker's producer state is at its limit, so the partition adds no new producer.
    #[error(
        "this partition has {known} producers, and the producer state of all partitions of this broker exceeds \
         {max_bytes} bytes (a sixteenth of limits.memory_bytes), so the partition accepts no new producer until some \
         expire: reuse producers, lower producer.id.expiration.ms of topics with many producers, or raise \
         limits.memory_bytes"
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

struct WaitingWriter<W> {
    acked: WriteAck,
    writer: W,
}

/// One leader of one partition in one epoch.
pub struct Leader<W> {
    in_sync: IsrTracker,
    log_end: Offset,
    persisted_end: Offset,
    tiered_end: Offset,
    /// Waiting writers by acks rule, in the order of arrival. That is the order of their end offsets, except for
    /// duplicates.
    for_leader: VecDeque<WaitingWriter<W>>,
    for_all: VecDeque<WaitingWriter<W>>,
    /// Writers with `acks=tiered`, in two steps: until the write is safe on this broker, and then until it is in the
    /// object store.
    for_tier_here: VecDeque<WaitingWriter<W>>,
    for_tier: VecDeque<WaitingWriter<W>>,
    /// Producers with batches in the group that is being admitted, because the producer table lacks that group. By id,
    /// with the next epoch and sequence.
    in_group: BTreeMap<i64, (i16, i32)>,
    next_base: Offset,
}

impl<W> Leader<W> {
    /// Creates the leader of the epoch in `start`. `tiered_end` is the first offset not committed to the object store.
    pub fn new(start: LeaderStart, tiered_end: Offset) -> Self {
        let progress = start.progress;
        Self {
            in_sync: IsrTracker::new(start),
            log_end: progress.log_end,
            persisted_end: progress.persisted_end,
            tiered_end,
            for_leader: VecDeque::new(),
            for_all: VecDeque::new(),
            for_tier_here: VecDeque::new(),
            for_tier: VecDeque::new(),
            in_group: BTreeMap::new(),
            next_base: progress.log_end,
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
    pub fn in_sync(&self) -> &IsrTracker {
        &self.in_sync
    }

    /// Returns the ISR state, for reports about followers, brokers and outcomes of proposals.
    pub fn in_sync_mut(&mut self) -> &mut IsrTracker {
        &mut self.in_sync
    }

    /// Returns true if a writer waits for the object store.
    pub fn awaits_tier(&self) -> bool {
        !(self.for_tier_here.is_empty() && self.for_tier.is_empty())
    }

    /// Applies a changed topic configuration.
    pub fn configure(&mut self, rules: IsrRules) {
        self.in_sync.configure(rules);
    }

    /// Decides about one write. Admitted writes form a group until [`Self::on_appended`] or [`Self::on_append_failed`]
    /// ends it. `sent` is the fingerprint of the batch that the client sent, if the request held one. `refusal` is a
    /// reason against the append; a retry of a batch in the log gets its result all the same. A gap is refused with
    /// that reason too, because a refused batch most likely caused the gap.
    pub fn admit(
        &mut self,
        batch: &Batch,
        sent: Option<Fingerprint>,
        acks: Acks,
        producers: &ProducerTable,
        refusal: Option<AdmitError>,
    ) -> Result<Admission, AdmitError> {
        let strict = matches!(acks, Acks::All | Acks::Tiered);
        if strict && let Err(in_sync) = self.in_sync.has_minimum() {
            return Err(AdmitError::NotEnoughReplicas { in_sync, needed: self.in_sync.rule().min_insync });
        }
        let (count, stamp) = (batch.count(), batch.producer());
        let checked = stamp.map(|stamp| self.check(stamp, count, sent, producers));
        match (checked, refusal) {
            (Some(Ok(duplicate @ Admission::Duplicate(..))), _) => return Ok(duplicate),
            (Some(Err(refused @ (AdmitError::Fenced { .. } | AdmitError::SequenceConflict { .. }))), _)
            | (_, Some(refused))
            | (Some(Err(refused)), None) => return Err(refused),
            (Some(Ok(Admission::Append(_))) | None, None) => {}
        }
        if let Some(stamp) = stamp {
            self.track_write(stamp, count);
        }
        let base = self.next_base;
        self.next_base = base.plus(u64::from(count));
        Ok(Admission::Append(base))
    }

    /// Returns true if `batch` can be checked only after the pending group is in the log. Its producer has batches in
    /// the group, whose sequence it does not continue, and the producer table lacks the group.
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
    ) -> Result<Admission, AdmitError> {
        if let Some(next) = self.in_group.get(&stamp.id) {
            let continues = *next == (stamp.epoch, stamp.base_sequence);
            assert!(continues, "the actor flushes before a batch that does not continue the group");
            return Ok(Admission::Append(self.next_base));
        }
        let (producer, sent) = (stamp.id, stamp.base_sequence);
        match producers.check(stamp, count, fingerprint) {
            SequenceCheck::New => Ok(Admission::Append(self.next_base)),
            SequenceCheck::Duplicate { base, end } => Ok(Admission::Duplicate(base, end)),
            SequenceCheck::OutOfOrder { expected } => Err(AdmitError::OutOfOrder { producer, sent, expected }),
            SequenceCheck::Conflict { base } => Err(AdmitError::SequenceConflict { producer, sent, base }),
            SequenceCheck::Fenced { current } => Err(AdmitError::Fenced { producer, epoch: stamp.epoch, current }),
            SequenceCheck::Unknown => Err(AdmitError::UnknownProducer { producer, sent }),
            SequenceCheck::Full { max_bytes } => {
                Err(AdmitError::TooManyProducers { known: producers.len(), max_bytes })
            }
        }
    }

    fn track_write(&mut self, stamp: ProducerSequence, count: u32) {
        let next = next_sequence(stamp.base_sequence, count);
        self.in_group.insert(stamp.id, (stamp.epoch, next));
    }

    /// Records that the group admitted since the last call is in the log.
    pub fn on_appended(&mut self) {
        self.log_end = self.next_base;
        self.in_group.clear();
        self.in_sync.update_local(self.local_progress());
    }

    /// Records that the group admitted since the last call is not in the log. Its offsets are free again.
    pub fn on_append_failed(&mut self) {
        self.next_base = self.log_end;
        self.in_group.clear();
    }

    /// Keeps a writer until its acks rule holds.
    pub fn add_waiter(&mut self, acks: Acks, acked: WriteAck, writer: W) {
        let waiting = WaitingWriter { acked, writer };
        match acks {
            Acks::None | Acks::Leader => self.for_leader.push_back(waiting),
            Acks::All => self.for_all.push_back(waiting),
            Acks::Tiered => self.for_tier_here.push_back(waiting),
        }
    }

    /// Records that everything below `end` is on this broker's stable storage.
    pub fn on_persisted(&mut self, end: Offset) {
        self.persisted_end = self.persisted_end.max(end);
        self.in_sync.update_local(self.local_progress());
    }

    fn local_progress(&self) -> ReplicaProgress {
        let persisted = if mutant!(AcknowledgeBeforeSync) { self.log_end } else { self.persisted_end };
        ReplicaProgress { log_end: self.log_end, persisted_end: persisted }
    }

    /// Records that everything below `end` is committed to the object store.
    pub fn on_tiered(&mut self, end: Offset) {
        self.tiered_end = self.tiered_end.max(end);
    }

    /// Calls `stored` for each writer with `acks=tiered` whose write has just reached the topic's durability on this
    /// broker. The caller can release the memory of the write: only the object store is outstanding.
    pub fn take_stored(&mut self, mut stored: impl FnMut(&mut W, &WriteAck)) {
        let local_acked = self.in_sync.local_acked();
        while let Some(mut waiting) = self.for_tier_here.pop_front_if(|waiting| waiting.acked.end <= local_acked) {
            stored(&mut waiting.writer, &waiting.acked);
            self.for_tier.push_back(waiting);
        }
    }

    /// Removes the writers whose rule holds now, and passes them to `respond` with their results.
    pub fn take_due(&mut self, mut respond: impl FnMut(W, WriteAck)) {
        self.take_stored(|_, _| {});
        let replicas = u32::try_from(self.in_sync.value().isr.len()).unwrap_or(u32::MAX);
        let durability = |replicas| match self.in_sync.rule().durability {
            Durability::Persisted => AckDurability::Persisted(replicas),
            Durability::Replicated => AckDurability::PageCache(replicas),
        };
        let (local_acked, high_watermark) = (self.in_sync.local_acked(), self.high_watermark());
        let tiered = self.tiered_end.min(high_watermark);
        let queues = [
            (&mut self.for_leader, local_acked, durability(1)),
            (&mut self.for_all, high_watermark, durability(replicas)),
            (&mut self.for_tier, tiered, AckDurability::Tiered(replicas)),
        ];
        for (queue, reached, durability) in queues {
            while let Some(waiting) = queue.pop_front_if(|waiting| waiting.acked.end <= reached) {
                respond(waiting.writer, WriteAck { durability, ..waiting.acked });
            }
        }
        self.shrink_queues();
    }

    /// Drops the writers whose receivers were dropped and whose writes have the topic's durability on this broker.
    /// Returns true while such a write does not have that durability yet.
    pub fn release_dropped(&mut self, is_gone: impl Fn(&W) -> bool) -> bool {
        let local_acked = self.in_sync.local_acked();
        let mut has_unsafe = false;
        for queue in [&mut self.for_all, &mut self.for_tier_here, &mut self.for_tier] {
            queue.retain(|waiting| {
                let gone = is_gone(&waiting.writer);
                let safe = waiting.acked.end <= local_acked;
                has_unsafe |= gone && !safe;
                !(gone && safe)
            });
        }
        self.shrink_queues();
        has_unsafe
    }

    /// Frees the unused memory of queues. No budget counts it, and a broker has many partitions.
    fn shrink_queues(&mut self) {
        for queue in self.queues() {
            if queue.capacity() > SPARE_WRITERS && queue.len() < queue.capacity() / 4 {
                queue.shrink_to(SPARE_WRITERS.max(queue.len() * 2));
            }
        }
    }

    fn queues(&mut self) -> [&mut VecDeque<WaitingWriter<W>>; 4] {
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
    i32::try_from(next).expect("the remainder is below 2^31")
}

#[cfg(test)]
mod tests;
