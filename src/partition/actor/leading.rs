//! Leading: the task admits writes, appends them in groups, submits them to the journal, and acknowledges them.

use std::{ops::Range, sync::Arc};

use tokio::sync::{OwnedSemaphorePermit, SetOnce, oneshot};

use super::{Actor, RoleState, SPARE_COMMANDS, timestamps};
use crate::{
    cluster::Revision,
    log::{self, PersistError},
    model::{Acks, BrokerId, LeaderEpoch, Offset, TimestampType},
    partition::{
        leader::{AckDurability, Admission, AdmitError, Leader, WriteAck},
        role::ReplicaStatus,
    },
    record::{Batch, Fingerprint, TimestampRange},
    task::clock,
};

/// Error of a write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The leader did not admit the write.
    #[error(transparent)]
    Refused(#[from] AdmitError),
    /// The disk is full. Appends resume by themselves when there is space.
    #[error(
        "the disk of this broker is full: add space, or lower local.retention.* or retention.*; appends resume when \
         there is space"
    )]
    DiskFull,
    /// A write or sync failed. The replica accepts no writes until the broker is restarted on an intact disk.
    #[error(
        "writing to this broker's disk failed: {reason}: repair the disk and restart the broker; this replica accepts \
         no writes until then"
    )]
    StorageFailed {
        /// Cause of the failure.
        reason: Arc<str>,
    },
    /// This broker does not lead the partition. The records were not written.
    #[error("this broker does not lead the partition (leader epoch {epoch}): {}",
        leader.map_or_else(|| "its leader is unknown".to_owned(), |leader| format!("broker {leader} leads it")))]
    NotLeader {
        /// Leader by this broker's metadata, if any.
        leader: Option<BrokerId>,
        /// Newest leader epoch of this broker's metadata.
        epoch: LeaderEpoch,
    },
    /// The leadership ended before the acks rule of the write held. The records were appended, and the outcome is
    /// unknown.
    #[error(
        "this broker's leadership ended before the write was committed, so it may or may not be stored: retry with an \
         idempotent producer, else the retry may duplicate it"
    )]
    Deposed,
    /// The partition is being closed. The outcome is unknown.
    #[error(
        "this broker stopped serving the partition before the write was committed, so it may or may not be stored: \
         retry with an idempotent producer, else the retry may duplicate it"
    )]
    Closing,
}

/// Result of a write.
pub type AppendResult = Result<WriteAck, AppendError>;

/// Facts about the client's request that contained the batch, or the records of the batch.
#[derive(Clone, Debug)]
pub struct BatchOrigin {
    /// Fingerprint of the batch that the client sent; `None` if the client sent records instead of a batch.
    pub fingerprint: Option<Fingerprint>,
    /// Range of the records' timestamps if the broker decoded the records, otherwise of those in the batch header.
    pub timestamps: TimestampRange,
    /// Reason to refuse the append. A retry of a stored batch still gets the result of that batch.
    pub refusal: Option<AdmitError>,
}

/// One queued write.
pub(in crate::partition) struct Append {
    pub(in crate::partition) batch: Batch,
    pub(in crate::partition) origin: BatchOrigin,
    pub(in crate::partition) acks: Acks,
    /// Permit for the memory of the batch, released with the result. It is released earlier if the write has
    /// `acks=tiered` or its receiver was dropped. The release then follows as soon as the write has the topic's
    /// durability on this broker.
    pub(in crate::partition) permit: OwnedSemaphorePermit,
    pub(in crate::partition) responder: oneshot::Sender<AppendResult>,
    /// With `acks=tiered`: set when the write has the topic's durability on this broker and waits for the object store.
    /// `None` if the caller does not need that signal.
    pub(in crate::partition) stored: Option<Stored>,
}

/// Offsets of a write that has the topic's durability on this broker and waits for the object store. Set at most once.
pub type Stored = Arc<SetOnce<Range<Offset>>>;

/// Waiting writer: the channel for its result, and the memory that is released with it.
pub(super) struct PendingWriter {
    responder: oneshot::Sender<AppendResult>,
    permit: Option<OwnedSemaphorePermit>,
    stored: Option<Stored>,
}

impl PendingWriter {
    /// Releases the memory of a write that has the topic's durability on this broker and waits for the object store.
    /// Signals that to the caller.
    fn on_stored(&mut self, acked: &WriteAck) {
        self.permit = None;
        if let Some(stored) = &self.stored {
            let _already_set = stored.set(acked.base..acked.end);
        }
    }

    /// Sends the result. If its receiver was dropped, the write stays written all the same.
    pub(super) fn respond(self, result: AppendResult) {
        let _dropped_receiver = self.responder.send(result);
    }

    fn has_dropped_receiver(&self) -> bool {
        self.responder.is_closed()
    }

    /// Returns true if this write waits for other replicas or the object store, and its receiver was dropped. With
    /// other acks it waits for neither, so a missing receiver does not count.
    fn waits_without_receiver(&self, acks: Acks) -> bool {
        matches!(acks, Acks::All | Acks::Tiered) && self.has_dropped_receiver()
    }
}

/// State of the task while it leads.
pub(super) struct LeaderRole {
    pub(super) leader: Box<Leader<PendingWriter>>,
    /// Admitted batches that are not appended yet. Empty between two turns.
    group: Vec<Batch>,
    /// Encoded size of `group`.
    pub(super) group_bytes: usize,
    /// Writers of `group`, in the same order.
    group_writers: Vec<(Acks, WriteAck, PendingWriter)>,
    /// True if a writer that waits for other replicas or the object store may have no receiver: its memory is to be
    /// released.
    pub(super) has_dropped_waiters: bool,
    /// Revision of the value when this broker resigned last. It resigns again with a newer value: that value may have
    /// an ISR member that can lead.
    resigned_at: Option<Revision>,
}

impl LeaderRole {
    pub(super) fn new(leader: Leader<PendingWriter>) -> Self {
        Self {
            leader: Box::new(leader),
            group: Vec::new(),
            group_bytes: 0,
            group_writers: Vec::new(),
            has_dropped_waiters: false,
            resigned_at: None,
        }
    }
}

impl Actor {
    /// Admits one write into the group, or sends its error. Appends the group first if the batch does not fit into it,
    /// or can be checked only afterwards. A retry of a stored batch is not appended: its writer waits until the stored
    /// batch satisfies the acks rule of the retry.
    pub(super) fn append(&mut self, append: Append, now_ms: i64) {
        let Append { mut batch, origin, acks, permit, responder, stored } = append;
        let RoleState::Leading(role) = &self.role else {
            let ReplicaStatus { leader, epoch, .. } = self.status;
            let _dropped_receiver = responder.send(Err(AppendError::NotLeader { leader, epoch }));
            return;
        };
        if let Some(reason) = self.published.error() {
            let _dropped_receiver = responder.send(Err(AppendError::StorageFailed { reason }));
            return;
        }
        let exceeds_group = role.group_bytes + batch.encoded_len() > self.max_group_bytes();
        if exceeds_group || role.leader.must_flush_before(&batch) {
            self.finish_group();
        }
        let writer = PendingWriter { responder, permit: Some(permit), stored };
        let RoleState::Leading(role) = &mut self.role else { unreachable!("an append does not change the role") };
        let epoch = role.leader.epoch();
        let mut acked = WriteAck {
            base: Offset::ZERO,
            end: Offset::ZERO,
            epoch,
            append_time_ms: None,
            durability: AckDurability::Memory,
            duplicate: false,
        };
        let refusal = origin.refusal.or_else(|| timestamps::check(&self.config, origin.timestamps, now_ms).err());
        let admission = role.leader.admit(&batch, origin.fingerprint, acks, &self.log.producers(), refusal);
        match admission {
            Ok(Admission::Append(base)) => {
                if self.config.timestamp_type == TimestampType::LogAppendTime {
                    batch.set_append_time(now_ms);
                    acked.append_time_ms = Some(now_ms);
                } else {
                    batch.set_create_time();
                }
                batch.set_offset_and_epoch(base, epoch);
                (acked.base, acked.end) = (base, batch.end_offset());
                role.group_bytes += batch.encoded_len();
                role.group.push(batch);
                role.group_writers.push((acks, acked, writer));
            }
            Ok(Admission::Duplicate(base, end)) => {
                (acked.base, acked.end, acked.duplicate) = (base, end, true);
                role.has_dropped_waiters |= writer.waits_without_receiver(acks);
                role.leader.add_waiter(acks, acked, writer);
                if acks == Acks::Tiered && end > self.tiered_end {
                    // The first attempt requested no upload if it had other acks or its receiver was dropped.
                    self.maintenance.push(self.id);
                }
            }
            Err(error) => {
                writer.respond(Err(error.into()));
            }
        }
    }

    /// Appends the group to the log. Afterwards the group is empty: its writers wait for their acks rule, or have
    /// received the error of the append. A failed disk also fails the replica ([`Self::fail`]).
    pub(super) fn flush(&mut self) {
        let RoleState::Leading(role) = &mut self.role else { return };
        if role.group.is_empty() {
            return;
        }
        let (mut group, bytes) = (std::mem::take(&mut role.group), std::mem::take(&mut role.group_bytes));
        let written = self.write(&group, bytes);
        if let Err(AppendError::StorageFailed { reason }) = &written {
            self.fail(reason);
        }
        let RoleState::Leading(role) = &mut self.role else { unreachable!("a write does not end a leadership") };
        match written {
            Ok(()) => {
                role.leader.on_appended();
                for (acks, acked, writer) in role.group_writers.drain(..) {
                    role.has_dropped_waiters |= writer.waits_without_receiver(acks);
                    role.leader.add_waiter(acks, acked, writer);
                }
                if role.leader.awaits_tier() {
                    self.maintenance.push(self.id);
                }
            }
            Err(error) => {
                role.leader.on_append_failed();
                for (_, _, writer) in role.group_writers.drain(..) {
                    writer.respond(Err(error.clone()));
                }
            }
        }
        group.clear();
        group.shrink_to(SPARE_COMMANDS);
        role.group = group;
        role.group_writers.shrink_to(SPARE_COMMANDS);
    }

    /// Appends batches of `bytes` in total to the log. Rolls the active segment first if it is full or old.
    pub(super) fn write(&mut self, batches: &[Batch], bytes: usize) -> Result<(), AppendError> {
        let now = clock::monotonic();
        let is_old = self.active_since.is_some_and(|since| now.duration_since(since) >= self.config.segment_age);
        if is_old || self.log.is_full(self.config.segment_bytes, bytes) {
            self.roll()?;
        }
        self.log.append(batches).map_err(append_error)?;
        #[cfg(feature = "sim")]
        batches.iter().for_each(|batch| self.report_appended(batch));
        self.active_since.get_or_insert(now);
        Ok(())
    }

    /// Reports an append to the simulator's checker.
    #[cfg(feature = "sim")]
    fn report_appended(&self, batch: &Batch) {
        sim_event!(Appended {
            partition: self.id,
            base: batch.base_offset(),
            end: batch.end_offset(),
            epoch: batch.leader_epoch().unwrap_or_default(),
            leads: match &self.role {
                RoleState::Leading(LeaderRole { leader, .. }) => Some(leader.epoch()),
                _ => None,
            },
            crc: batch.crc(),
            producer: batch.producer().map(|stamp| (stamp.id, stamp.epoch, stamp.base_sequence)),
        });
    }

    /// Submits all appended records to the journal, if the topic's durability requires that.
    pub(super) fn submit_to_journal(&mut self) {
        if self.needs_journal() && self.persisted_submit_end < self.log.log_end() {
            let signals = Arc::clone(&self.signals);
            self.persisted_submit_end = self.log.log_end();
            self.log.persist(Box::new(move |outcome| signals.on_persisted(outcome)));
        }
    }

    /// Applies a result of the journal. After an error, the replica fails and all waiting writers receive the error.
    pub(super) fn on_persisted(&mut self, outcome: Result<(), PersistError>) {
        match outcome {
            Ok(()) => {
                let end = self.log.persisted_end();
                if let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role {
                    leader.on_persisted(end);
                }
            }
            Err(error) => {
                let reason: Arc<str> = error.to_string().into();
                self.fail(&reason);
                if let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role {
                    for writer in leader.drain_waiters() {
                        writer.respond(Err(AppendError::StorageFailed { reason: Arc::clone(&reason) }));
                    }
                }
            }
        }
    }

    /// Handles a disk that no longer accepts writes: a leader resigns, and a follower unsubscribes and becomes idle.
    /// Committed records stay readable. Only the first call has an effect.
    pub(super) fn fail(&mut self, reason: &str) {
        if self.published.has_failed() {
            return;
        }
        tracing::error!(
            topic = %self.topic, partition = %self.id, reason,
            "the partition accepts no writes on this broker: repair or replace the disk, then restart the broker"
        );
        self.published.set_error(reason);
        match &self.role {
            RoleState::Leading(_) => self.resign(),
            RoleState::Following(_) => {
                self.committed_end = self.high_watermark();
                self.role = RoleState::Idle;
                self.metadata.end_role();
                self.ctx.links.unsubscribe(self.id, self.metadata.epoch(), true);
            }
            RoleState::Idle => {}
        }
    }

    /// Requests that this broker resigns, because its disk accepts no writes. Sends one request for each revision of
    /// the value. Does nothing in another role than the leader's.
    pub(super) fn resign(&mut self) {
        let RoleState::Leading(role) = &mut self.role else { return };
        let revision = role.leader.in_sync().revision();
        if role.resigned_at.replace(revision) != Some(revision) {
            self.ctx.isr_updater.resign(self.id, role.leader.epoch());
        }
    }

    /// Sends results to the writers whose acks rule holds now. Also releases memory of writes with the topic's
    /// durability on this broker. These are the writes that wait only for the object store or whose receivers were
    /// dropped.
    pub(super) fn respond_due(&mut self) {
        if let RoleState::Leading(LeaderRole { leader, has_dropped_waiters, .. }) = &mut self.role {
            let respond = |writer: PendingWriter, acked: WriteAck| {
                sim_event!(WriteAcked {
                    partition: self.id,
                    end: acked.end,
                    by_all: matches!(
                        acked.durability,
                        AckDurability::Persisted(2..) | AckDurability::PageCache(2..) | AckDurability::Tiered(_)
                    )
                });
                writer.respond(Ok(acked));
            };
            leader.take_stored(PendingWriter::on_stored);
            leader.take_due(respond);
            // The acks rule of a write may never hold. If its receiver was dropped, nothing needs its memory: a retry
            // has its own batch.
            *has_dropped_waiters = *has_dropped_waiters && leader.release_dropped(PendingWriter::has_dropped_receiver);
        }
    }
}

/// Returns the error that a writer receives for a failed append or roll of the log.
pub(super) fn append_error(error: log::LogAppendError) -> AppendError {
    match error {
        log::LogAppendError::DiskFull => AppendError::DiskFull,
        failed => AppendError::StorageFailed { reason: failed.to_string().into() },
    }
}
