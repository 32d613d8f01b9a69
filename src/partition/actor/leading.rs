//! Leading: writes are admitted, appended in groups, submitted to the journal, and acknowledged.

use std::{ops::Range, sync::Arc};

use tokio::sync::{OwnedSemaphorePermit, SetOnce, oneshot};

use super::{Actor, GROUP_BYTES, Part, SPARE_COMMANDS, timestamps};
use crate::{
    log::{self, PersistError},
    model::{Acks, BrokerId, LeaderEpoch, Offset, TimestampType},
    partition::{
        Standing,
        leader::{Acked, Admission, Held, Refused},
    },
    record::{Batch, Fingerprint, TimestampRange},
    task::clock,
};

/// Error of a write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The leader did not admit the write.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The disk is full. Appends resume by themselves when there is space.
    #[error(
        "the disk of this broker is full: add space, or lower local.retention.* or retention.*; appends resume by themselves"
    )]
    DiskFull,
    /// A write or sync failed. The replica accepts no writes until the broker is restarted on an intact disk.
    #[error(
        "writing to this broker's disk failed: {why}; the partition takes no writes until the disk is repaired and the broker restarted"
    )]
    StorageFailed {
        /// Cause of the failure.
        why: Arc<str>,
    },
    /// This broker does not lead the partition. The records were not written.
    #[error("this broker does not lead the partition (leader epoch {epoch}): {}",
        leader.map_or_else(|| "nobody is known to lead it now".to_owned(), |leader| format!("broker {leader} does")))]
    NotLeader {
        /// Leader by this broker's metadata, if any.
        leader: Option<BrokerId>,
        /// Newest leader epoch of this broker's metadata.
        epoch: LeaderEpoch,
    },
    /// Another leader was elected before the records were committed. The outcome is unknown.
    #[error(
        "another leader was elected while the write waited to be committed; whether it will be is not known: send it again"
    )]
    Deposed,
    /// The partition is being closed. The outcome is unknown.
    #[error("the partition is closing on this broker; whether this write happened is not known")]
    Closing,
}

/// Result of a write.
pub type AppendResult = Result<Acked, AppendError>;

/// Facts about a client's request, from which the broker made the batch to append.
#[derive(Clone, Debug)]
pub struct BatchOrigin {
    /// Fingerprint of the batch that the client sent; `None` if it sent records.
    pub fingerprint: Option<Fingerprint>,
    /// Timestamps of all records if the broker decoded them, otherwise those of the batch header.
    pub timestamps: TimestampRange,
    /// Reason against the append. A retry of a stored batch gets its result all the same.
    pub refusal: Option<Refused>,
}

/// One queued write.
pub(in crate::partition) struct Append {
    pub(in crate::partition) batch: Batch,
    pub(in crate::partition) origin: BatchOrigin,
    pub(in crate::partition) acks: Acks,
    /// Memory of the batch. It is released with the result, or when the write is safe here and its receiver was dropped.
    pub(in crate::partition) permit: OwnedSemaphorePermit,
    pub(in crate::partition) answer: oneshot::Sender<AppendResult>,
    /// With `acks=tiered`: shows the caller that the write is stored here and waits for the object store.
    pub(in crate::partition) stored: Option<Stored>,
}

/// Offsets of a write that is stored on this broker and waits for the object store.
pub type Stored = Arc<SetOnce<Range<Offset>>>;

/// Waiting writer: the channel for its result, and the memory that is released with it.
pub(super) struct Writer {
    answer: oneshot::Sender<AppendResult>,
    permit: Option<OwnedSemaphorePermit>,
    stored: Option<Stored>,
}

impl Writer {
    /// Records that the write is stored here and waits for the object store: its memory is released.
    fn on_stored(&mut self, acked: &Acked) {
        self.permit = None;
        if let Some(stored) = &self.stored {
            let _known = stored.set(acked.base..acked.end);
        }
    }

    /// Sends the result. A write stays written even if its receiver was dropped.
    pub(super) fn answer(self, result: AppendResult) {
        let _gone = self.answer.send(result);
    }

    fn is_gone(&self) -> bool {
        self.answer.is_closed()
    }

    /// Returns true if the receiver was dropped before other replicas or the object store were involved. Writes without acks never have a
    /// receiver and do not count.
    fn left_early(&self, acks: Acks) -> bool {
        matches!(acks, Acks::All | Acks::Tiered) && self.is_gone()
    }
}

impl Actor {
    /// Admits one write into the group, or sends its result.
    pub(super) fn append(&mut self, append: Append, now_ms: i64) {
        let Append { mut batch, origin, acks, permit, answer, stored } = append;
        let Part::Leading(leader) = &self.part else {
            let Standing { leader, epoch, .. } = self.standing;
            let _gone = answer.send(Err(AppendError::NotLeader { leader, epoch }));
            return;
        };
        if let Some(why) = self.shared.fault() {
            let _gone = answer.send(Err(AppendError::StorageFailed { why }));
            return;
        }
        // A group lies in one segment, so it must not be larger than a segment may be.
        let most = usize::try_from(self.config.segment_bytes).map_or(GROUP_BYTES, |bytes| bytes.min(GROUP_BYTES));
        if leader.must_flush_before(&batch) || self.group_bytes + batch.encoded_len() > most {
            self.complete();
        }
        let writer = Writer { answer, permit: Some(permit), stored };
        let Part::Leading(leader) = &mut self.part else { unreachable!("appending changes no role") };
        let epoch = leader.epoch();
        let mut acked = Acked {
            base: Offset::ZERO,
            end: Offset::ZERO,
            epoch,
            append_time_ms: None,
            held: Held::Memory,
            duplicate: false,
        };
        let refusal = origin.refusal.or_else(|| timestamps::check(&self.config, origin.timestamps, now_ms).err());
        let admission = leader.admit(&batch, origin.fingerprint, acks, &self.replica.producers(), refusal);
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
                self.group_bytes += batch.encoded_len();
                self.group.push(batch);
                self.group_writers.push((acks, acked, writer));
            }
            Ok(Admission::Duplicate(base, end)) => {
                (acked.base, acked.end, acked.duplicate) = (base, end, true);
                self.writers_gone |= writer.left_early(acks);
                leader.wait(acks, acked, writer);
                if acks == Acks::Tiered && end > self.tiered_end {
                    // The first attempt requested no upload, if it had fewer acks or its receiver was dropped.
                    self.upkeep.push(self.id);
                }
            }
            Err(refused) => {
                writer.answer(Err(refused.into()));
            }
        }
    }

    /// Appends the group. In every case the group is empty afterwards, and its writers wait or have their results.
    pub(super) fn flush(&mut self) {
        if self.group.is_empty() {
            return;
        }
        let group = std::mem::take(&mut self.group);
        let written = self.write(&group, self.group_bytes);
        self.group = group;
        if let Err(AppendError::StorageFailed { why }) = &written {
            self.fail(why);
        }
        let Part::Leading(leader) = &mut self.part else { unreachable!("only a leader has a group") };
        match written {
            Ok(()) => {
                leader.appended();
                for (acks, acked, writer) in self.group_writers.drain(..) {
                    self.writers_gone |= writer.left_early(acks);
                    leader.wait(acks, acked, writer);
                }
                if leader.awaits_tier() {
                    self.upkeep.push(self.id);
                }
            }
            Err(error) => {
                leader.not_appended();
                for (_, _, writer) in self.group_writers.drain(..) {
                    writer.answer(Err(error.clone()));
                }
            }
        }
        self.group.clear();
        self.group.shrink_to(SPARE_COMMANDS);
        self.group_writers.shrink_to(SPARE_COMMANDS);
        self.group_bytes = 0;
    }

    /// Appends batches of `bytes` in total, in a new segment if the active one is full or old.
    pub(super) fn write(&mut self, batches: &[Batch], bytes: usize) -> Result<(), AppendError> {
        let now = clock::monotonic();
        let is_old = self.active_since.is_some_and(|since| now.duration_since(since) >= self.config.segment_age);
        if is_old || self.replica.is_full(self.config.segment_bytes, bytes) {
            self.seal()?;
        }
        self.replica.append(batches).map_err(append_error)?;
        #[cfg(feature = "sim")]
        batches.iter().for_each(|batch| self.tell_appended(batch));
        self.active_since.get_or_insert(now);
        Ok(())
    }

    /// Reports an append to the simulator's checker.
    #[cfg(feature = "sim")]
    fn tell_appended(&self, batch: &Batch) {
        sim_event!(Appended {
            partition: self.id,
            base: batch.base_offset(),
            end: batch.end_offset(),
            epoch: batch.leader_epoch().unwrap_or_default(),
            leads: match &self.part {
                Part::Leading(leader) => Some(leader.epoch()),
                _ => None,
            },
            crc: batch.crc(),
            producer: batch.producer().map(|stamp| (stamp.id, stamp.epoch, stamp.base_sequence)),
        });
    }

    /// Submits all appended records to the journal, if the topic requires that.
    pub(super) fn hand_to_journal(&mut self) {
        if self.syncs() && self.handed_end < self.replica.log_end() {
            let news = Arc::clone(&self.news);
            self.handed_end = self.replica.log_end();
            self.replica.persist(Box::new(move |outcome| news.persisted(outcome)));
        }
    }

    /// Applies a result of the journal.
    pub(super) fn on_persisted(&mut self, outcome: Result<(), PersistError>) {
        match outcome {
            Ok(()) => {
                let end = self.replica.persisted_end();
                if let Part::Leading(leader) = &mut self.part {
                    leader.persisted(end);
                }
            }
            Err(error) => {
                let why: Arc<str> = error.to_string().into();
                self.fail(&why);
                if let Part::Leading(leader) = &mut self.part {
                    for writer in leader.abandon() {
                        writer.answer(Err(AppendError::StorageFailed { why: Arc::clone(&why) }));
                    }
                }
            }
        }
    }

    /// Handles a disk that accepts no more writes. A leader resigns if it may, a follower unsubscribes; committed records stay readable.
    pub(super) fn fail(&mut self, why: &str) {
        if self.shared.fault().is_some() {
            return;
        }
        tracing::error!(
            topic = %self.topic, partition = %self.id, why,
            "the partition takes no more writes on this broker: repair or replace the disk, then restart the broker"
        );
        self.shared.set_fault(why);
        match &self.part {
            Part::Leading(leader) => self.around.agreement.resign(self.id, leader.epoch()),
            Part::Following(_) => {
                self.committed_end = self.high_watermark();
                self.part = Part::Waiting;
                self.around.links.leave(self.id, self.placed.epoch(), true);
            }
            Part::Waiting => {}
        }
    }

    /// Sends results to the writers whose rule holds now, and releases the memory of writers that are gone.
    pub(super) fn answer(&mut self) {
        if let Part::Leading(leader) = &mut self.part {
            let due = |writer: Writer, acked: Acked| {
                sim_event!(WriteAcked {
                    partition: self.id,
                    end: acked.end,
                    by_all: matches!(acked.held, Held::Synced(2..) | Held::PageCache(2..) | Held::Tiered(_))
                });
                writer.answer(Ok(acked));
            };
            leader.take_stored(Writer::on_stored);
            leader.due(due);
            // Other replicas or the object store may never be done, and a retry brings its batch again.
            self.writers_gone = self.writers_gone && leader.forget(Writer::is_gone);
        }
    }
}

pub(super) fn append_error(error: log::AppendError) -> AppendError {
    match error {
        log::AppendError::DiskFull => AppendError::DiskFull,
        other => AppendError::StorageFailed { why: other.to_string().into() },
    }
}
