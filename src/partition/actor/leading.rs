//! Leading: writes are admitted, appended as groups, handed to the journal, and answered.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::{Actor, GROUP_BYTES};
use crate::{
    log::{self, PersistError},
    model::{Acks, Offset, TimestampType},
    partition::leader::{Acked, Admission, Held, Refused},
    record::Batch,
};

/// Why a write failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The leader did not admit it.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// No room. Appends go on by themselves when there is some.
    #[error(
        "the disk of this broker is full: add space, or lower local.retention.* or retention.*; appends resume by themselves"
    )]
    DiskFull,
    /// A write or sync failed; the replica takes no more writes until the broker is restarted on a sound disk.
    #[error(
        "writing to this broker's disk failed: {why}; the partition takes no writes until the disk is repaired and the broker restarted"
    )]
    StorageFailed {
        /// What the system said.
        why: Arc<str>,
    },
    /// The partition is being closed; whether the write happened is not known.
    #[error("the partition is closing on this broker; whether this write happened is not known")]
    Closing,
}

/// What a writer gets.
pub type AppendResult = Result<Acked, AppendError>;

/// One write on its way.
pub(in crate::partition) struct Append {
    pub(in crate::partition) batch: Batch,
    pub(in crate::partition) acks: Acks,
    /// Memory that the batch may take, given back when the write is answered.
    pub(in crate::partition) permit: OwnedSemaphorePermit,
    pub(in crate::partition) answer: oneshot::Sender<AppendResult>,
}

/// A writer who waits: the answer's way, and the memory that is given back with it.
pub(super) struct Writer {
    answer: oneshot::Sender<AppendResult>,
    _permit: OwnedSemaphorePermit,
}

impl Writer {
    /// Tells it. Whoever does not listen any more has still written.
    pub(super) fn answer(self, result: AppendResult) {
        let _gone = self.answer.send(result);
    }
}

impl Actor {
    /// Admits one write into the group, or answers it.
    pub(super) fn append(&mut self, append: Append, now_ms: i64) {
        let Append { mut batch, acks, permit, answer } = append;
        if let Some(why) = self.shared.fault() {
            let _gone = answer.send(Err(AppendError::StorageFailed { why }));
            return;
        }
        // A group lies in one segment, so it must not be larger than one may be.
        let most = usize::try_from(self.config.segment_bytes).map_or(GROUP_BYTES, |bytes| bytes.min(GROUP_BYTES));
        if self.leader.must_flush_before(&batch) || self.group_bytes + batch.encoded_len() > most {
            self.complete(now_ms);
        }
        let writer = Writer { answer, _permit: permit };
        let epoch = self.leader.epoch();
        let mut acked = Acked {
            base: Offset::ZERO,
            end: Offset::ZERO,
            epoch,
            append_time_ms: None,
            held: Held::Memory,
            duplicate: false,
        };
        let admission = self.leader.admit(&batch, acks, &self.replica.producers());
        match admission {
            Ok(Admission::Append(base)) => {
                if self.config.timestamp_type == TimestampType::LogAppendTime {
                    batch.set_append_time(now_ms);
                    acked.append_time_ms = Some(now_ms);
                } else {
                    batch.set_create_time();
                }
                batch.stamp(base, epoch);
                (acked.base, acked.end) = (base, batch.end_offset());
                self.group_bytes += batch.encoded_len();
                self.group.push(batch);
                self.group_writers.push((acks, acked, writer));
            }
            Ok(Admission::Duplicate(base, end)) => {
                (acked.base, acked.end, acked.duplicate) = (base, end, true);
                self.leader.wait(acks, acked, writer);
            }
            Err(refused) => {
                writer.answer(Err(refused.into()));
            }
        }
    }

    /// Appends the group. Whatever happens, the group is empty afterwards and its writers wait or are answered.
    pub(super) fn flush(&mut self, now_ms: i64) {
        if self.group.is_empty() {
            return;
        }
        match self.write_group(now_ms) {
            Ok(()) => {
                self.leader.appended();
                for (acks, acked, writer) in self.group_writers.drain(..) {
                    self.leader.wait(acks, acked, writer);
                }
                if self.leader.awaits_tier() {
                    self.upkeep.push(self.id);
                }
            }
            Err(error) => {
                self.leader.not_appended();
                if let AppendError::StorageFailed { why } = &error {
                    self.fail(why);
                }
                for (_, _, writer) in self.group_writers.drain(..) {
                    writer.answer(Err(error.clone()));
                }
            }
        }
        self.group.clear();
        self.group_bytes = 0;
    }

    fn write_group(&mut self, now_ms: i64) -> Result<(), AppendError> {
        let (bytes, age) = (self.config.segment_bytes, self.config.segment_age);
        if self.replica.should_roll(bytes, age, now_ms, self.group_bytes) {
            self.seal()?;
        }
        self.replica.append(&self.group).map_err(append_error)?;
        if self.active_since_ms.is_none() {
            self.active_since_ms = Some(now_ms);
        }
        Ok(())
    }

    /// Hands everything appended to the journal.
    pub(super) fn hand_to_journal(&mut self) {
        let persisted = Arc::clone(&self.persisted);
        self.handed_end = self.replica.log_end();
        self.replica.persist(Box::new(move |outcome| persisted.report(outcome)));
    }

    /// Takes in what the journal said.
    pub(super) fn on_persisted(&mut self, outcome: Result<(), PersistError>) {
        match outcome {
            Ok(()) => self.leader.persisted(self.replica.persisted_end()),
            Err(error) => {
                let why: Arc<str> = error.to_string().into();
                self.fail(&why);
                for writer in self.leader.abandon() {
                    writer.answer(Err(AppendError::StorageFailed { why: Arc::clone(&why) }));
                }
            }
        }
        self.publish();
        self.answer();
    }

    fn fail(&self, why: &str) {
        if self.shared.fault().is_none() {
            tracing::error!(
                partition = %self.id, why,
                "the partition takes no more writes on this broker: repair or replace the disk, then restart the broker"
            );
            self.shared.set_fault(why);
        }
    }

    /// Answers the writers whose rule holds now.
    pub(super) fn answer(&mut self) {
        self.leader.due(|writer, acked| {
            writer.answer(Ok(acked));
        });
    }
}

pub(super) fn append_error(error: log::AppendError) -> AppendError {
    match error {
        log::AppendError::DiskFull => AppendError::DiskFull,
        other => AppendError::StorageFailed { why: other.to_string().into() },
    }
}
