//! The leader's decisions: which writes are admitted, when they are committed, and which writers get their result.
//!
//! [`Leader`] is a plain struct. The actor appends and syncs, and reports the outcomes to the leader; the leader
//! returns the writers whose result is due. `W` is the actor's state of a writer, which the leader only stores. [`isr`]
//! decides about the ISR and about commits, from the states of other replicas ([`member`]); [`divergence`] decides
//! where a follower starts.
//!
//! # Invariants
//!
//! - Only [`IsrTracker`] moves the high watermark, which never falls.
//! - A writer gets at most one result, and an acknowledgement only after the writer's own rule ([`Acks`]) holds.
//! - Each sequence of a producer is appended once, without gaps.

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
    /// Epoch of the leader that acknowledges the write. For a duplicate, it may be newer than that of the stored batch.
    pub epoch: LeaderEpoch,
    /// Timestamp that this broker set on the records; `None` if it set none, and for a duplicate.
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
        "appends with acks=tiered are refused, because the object store has been unavailable {outage}; use acks=all, or \
         retry later"
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
    /// The sequence is not the producer's next one, and no stored batch has it. A batch before this one is missing, or
    /// this is a retry of a batch that is no longer stored.
    #[error(
        "producer {producer} sent sequence {sent} instead of {expected}: an earlier batch is missing, or this batch is \
         a retry that came too late; start a new producer"
    )]
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
         this batch is not a retry and was not appended; start a new producer"
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
    #[error(
        "epoch {epoch} of producer {producer} is fenced, because a newer instance of the producer (epoch {current}) has \
         written: stop this producer"
    )]
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
        /// Direction in which the timestamp differs from the clock: `before` or `after`.
        side: &'static str,
        /// Setting that the timestamp violates.
        setting: &'static str,
        /// Value of that setting.
        limit_ms: u64,
    },
    /// The partition has no state of this producer, and the batch does not start at sequence 0.
    #[error(
        "the partition has no state of producer {producer}, and the batch starts at sequence {sent}, not 0: start a \
         new producer"
    )]
    UnknownProducer {
        /// Producer id.
        producer: i64,
        /// Sequence of the batch.
        sent: i32,
    },
    /// The broker's producer state exceeds its limit, and this partition has many producers: the partition adds no new
    /// one.
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
    /// The write is to be appended at this offset.
    Append(Offset),
    /// The write was appended before, from the first offset to the second, which is excluded.
    Duplicate(Offset, Offset),
}

/// Minimum capacity, in writers, to which a queue shrinks.
const SPARE_WRITERS: usize = 64;

/// Writer whose acks rule does not hold yet, with the result that the writer gets when the rule holds.
struct WaitingWriter<W> {
    acked: WriteAck,
    writer: W,
}

/// One leader of one partition in one epoch.
pub struct Leader<W> {
    in_sync: IsrTracker,
    /// Log end without the group that is being admitted.
    log_end: Offset,
    persisted_end: Offset,
    tiered_end: Offset,
    /// Writers that wait for the durability on this broker alone. Each queue is in the order of arrival, which is the
    /// order of end offsets except for duplicates.
    for_leader: VecDeque<WaitingWriter<W>>,
    /// Writers with `acks=all`, which wait for the commit.
    for_all: VecDeque<WaitingWriter<W>>,
    /// Writers with `acks=tiered`, in two queues. The first holds a writer until the write has the topic's durability
    /// on this broker. The second holds it until the write is in the object store.
    for_tier_here: VecDeque<WaitingWriter<W>>,
    for_tier: VecDeque<WaitingWriter<W>>,
    /// Expected producer epoch and sequence, by producer id, of the producers with batches in the group that is being
    /// admitted. The producer table does not contain that group yet.
    in_group: BTreeMap<i64, (i16, i32)>,
    /// Offset of the next admitted batch: the log end after the group.
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

    /// Decides about one write, and gives an admitted one its offset. Admitted writes form a group until
    /// [`Self::on_appended`] or [`Self::on_append_failed`] ends it. `sent` is the fingerprint of the batch that the
    /// client sent; `None` if the client sent records. `refusal` is a reason against the append; a retry of a batch in
    /// the log is a duplicate in spite of `refusal`.
    ///
    /// # Errors
    /// The first of these that applies:
    /// 1. The acks need the min ISR, and the ISR is below it.
    /// 2. The producer is fenced, or its sequence belongs to another batch.
    /// 3. `refusal`.
    /// 4. Another error of the producer's sequence, or too many producers.
    ///
    /// So `refusal` replaces the error of a gap, because an earlier refusal most likely caused the gap.
    pub fn admit(
        &mut self,
        batch: &Batch,
        sent: Option<Fingerprint>,
        acks: Acks,
        producers: &ProducerTable,
        refusal: Option<AdmitError>,
    ) -> Result<Admission, AdmitError> {
        let needs_min_isr = matches!(acks, Acks::All | Acks::Tiered);
        if needs_min_isr && let Err(in_sync) = self.in_sync.check_min_isr() {
            return Err(AdmitError::NotEnoughReplicas { in_sync, needed: self.in_sync.rules().min_insync });
        }
        let (count, sequence) = (batch.count(), batch.producer());
        // `None` if the producer is not idempotent: its batch has no sequence.
        let checked = sequence.map(|sequence| self.check_sequence(sequence, count, sent, producers));
        match (checked, refusal) {
            (Some(Ok(duplicate @ Admission::Duplicate(..))), _) => return Ok(duplicate),
            (Some(Err(refused @ (AdmitError::Fenced { .. } | AdmitError::SequenceConflict { .. }))), _)
            | (_, Some(refused))
            | (Some(Err(refused)), None) => return Err(refused),
            (Some(Ok(Admission::Append(_))) | None, None) => {}
        }
        if let Some(sequence) = sequence {
            self.track_write(sequence, count);
        }
        let base = self.next_base;
        self.next_base = base.plus(u64::from(count));
        Ok(Admission::Append(base))
    }

    /// Returns true if `batch` can be checked only after the pending group is in the log. The producer of `batch` then
    /// has batches in the group, and `batch` does not continue their sequence. The producer table lacks the group.
    pub fn must_flush_before(&self, batch: &Batch) -> bool {
        let Some(sequence) = batch.producer() else { return false };
        self.in_group.get(&sequence.id).is_some_and(|next| *next != (sequence.epoch, sequence.base_sequence))
    }

    /// Checks a producer's sequence of `count` records against the producer table. If the producer has batches in the
    /// group that is being admitted, the sequence must continue these batches ([`Self::must_flush_before`]).
    fn check_sequence(
        &self,
        sequence: ProducerSequence,
        count: u32,
        fingerprint: Option<Fingerprint>,
        producers: &ProducerTable,
    ) -> Result<Admission, AdmitError> {
        if let Some(next) = self.in_group.get(&sequence.id) {
            let continues = *next == (sequence.epoch, sequence.base_sequence);
            assert!(continues, "the actor flushes before a batch that does not continue the group");
            return Ok(Admission::Append(self.next_base));
        }
        let (producer, sent) = (sequence.id, sequence.base_sequence);
        match producers.check(sequence, count, fingerprint) {
            SequenceCheck::New => Ok(Admission::Append(self.next_base)),
            SequenceCheck::Duplicate { base, end } => Ok(Admission::Duplicate(base, end)),
            SequenceCheck::OutOfOrder { expected } => Err(AdmitError::OutOfOrder { producer, sent, expected }),
            SequenceCheck::Conflict { base } => Err(AdmitError::SequenceConflict { producer, sent, base }),
            SequenceCheck::Fenced { current } => Err(AdmitError::Fenced { producer, epoch: sequence.epoch, current }),
            SequenceCheck::Unknown => Err(AdmitError::UnknownProducer { producer, sent }),
            SequenceCheck::TooManyProducers { max_bytes } => {
                Err(AdmitError::TooManyProducers { known: producers.len(), max_bytes })
            }
        }
    }

    /// Stores which sequence continues an admitted batch of `count` records.
    fn track_write(&mut self, sequence: ProducerSequence, count: u32) {
        let next = next_sequence(sequence.base_sequence, count);
        self.in_group.insert(sequence.id, (sequence.epoch, next));
    }

    /// Ends the admitted group, which the actor has appended: its records are in the log.
    pub fn on_appended(&mut self) {
        self.log_end = self.next_base;
        self.in_group.clear();
        self.in_sync.update_local(self.local_progress());
    }

    /// Ends the admitted group, whose append failed: its records are not in the log, and its offsets are used again.
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

    /// Applies a sync: all records below `end` are on this broker's stable storage.
    pub fn on_persisted(&mut self, end: Offset) {
        self.persisted_end = self.persisted_end.max(end);
        self.in_sync.update_local(self.local_progress());
    }

    /// Returns the progress of this broker's log without the admitted group.
    fn local_progress(&self) -> ReplicaProgress {
        let persisted_end = if mutant!(AcknowledgeBeforeSync) { self.log_end } else { self.persisted_end };
        ReplicaProgress { log_end: self.log_end, persisted_end }
    }

    /// Applies a tier commit: all records below `end` are in the object store.
    pub fn on_tiered(&mut self, end: Offset) {
        self.tiered_end = self.tiered_end.max(end);
    }

    /// Moves writers with `acks=tiered` to the queue for the object store, and calls `on_stored` with each. These are
    /// the writers whose write has the topic's durability on this broker. The write then waits for the object store
    /// only, so the caller can release its memory.
    pub fn take_stored(&mut self, mut on_stored: impl FnMut(&mut W, &WriteAck)) {
        let local_acked = self.in_sync.local_acked();
        while let Some(mut waiting) = self.for_tier_here.pop_front_if(|waiting| waiting.acked.end <= local_acked) {
            on_stored(&mut waiting.writer, &waiting.acked);
            self.for_tier.push_back(waiting);
        }
    }

    /// Removes the writers whose acks rule holds now, and passes them to `respond` with their results.
    pub fn take_due(&mut self, mut respond: impl FnMut(W, WriteAck)) {
        self.take_stored(|_, _| {});
        let replicas = u32::try_from(self.in_sync.value().isr.len()).unwrap_or(u32::MAX);
        let durability = |replicas| match self.in_sync.rules().durability {
            Durability::Persisted => AckDurability::Persisted(replicas),
            Durability::Replicated => AckDurability::PageCache(replicas),
        };
        let (local_acked, high_watermark) = (self.in_sync.local_acked(), self.high_watermark());
        let tiered_end = self.tiered_end.min(high_watermark);
        // Each queue with the end below which its rule holds, and the durability of its writes then.
        let queues = [
            (&mut self.for_leader, local_acked, durability(1)),
            (&mut self.for_all, high_watermark, durability(replicas)),
            (&mut self.for_tier, tiered_end, AckDurability::Tiered(replicas)),
        ];
        for (queue, safe_end, durability) in queues {
            while let Some(waiting) = queue.pop_front_if(|waiting| waiting.acked.end <= safe_end) {
                respond(waiting.writer, WriteAck { durability, ..waiting.acked });
            }
        }
        self.shrink_queues();
    }

    /// Removes the writers for which `is_dropped` returns true and whose writes have the topic's durability on this
    /// broker. Writers that wait for this broker alone stay: their result comes with that durability. Returns true if
    /// the write of another dropped writer does not have that durability yet: call again after the next sync.
    pub fn release_dropped(&mut self, is_dropped: impl Fn(&W) -> bool) -> bool {
        let local_acked = self.in_sync.local_acked();
        let mut has_pending = false;
        for queue in [&mut self.for_all, &mut self.for_tier_here, &mut self.for_tier] {
            queue.retain(|waiting| {
                if !is_dropped(&waiting.writer) {
                    return true;
                }
                let is_durable = waiting.acked.end <= local_acked;
                has_pending |= !is_durable;
                !is_durable
            });
        }
        self.shrink_queues();
        has_pending
    }

    /// Frees the unused memory of the writer queues. No memory budget counts it, and a broker has many partitions.
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

    /// Removes and returns all waiting writers. Called when this leader ends or its disk failed.
    pub fn drain_waiters(&mut self) -> impl Iterator<Item = W> + '_ {
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
