//! Leading: writes are admitted, appended as groups, handed to the journal, and answered.

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
    /// This broker does not lead the partition. The records were not written.
    #[error("this broker does not lead the partition (leader epoch {epoch}): {}",
        leader.map_or_else(|| "nobody is known to lead it now".to_owned(), |leader| format!("broker {leader} does")))]
    NotLeader {
        /// Who leads, as far as is known here.
        leader: Option<BrokerId>,
        /// The newest leader epoch known here.
        epoch: LeaderEpoch,
    },
    /// Another leader was elected before the records were committed: whether they will be is not known here.
    #[error(
        "another leader was elected while the write waited to be committed; whether it will be is not known: send it again"
    )]
    Deposed,
    /// The partition is being closed; whether the write happened is not known.
    #[error("the partition is closing on this broker; whether this write happened is not known")]
    Closing,
}

/// What a writer gets.
pub type AppendResult = Result<Acked, AppendError>;

/// What a client sent, of which the broker made the batch that it appends.
#[derive(Clone, Debug)]
pub struct BatchOrigin {
    /// Of the batch that the client sent; `None` where it sent records.
    pub fingerprint: Option<Fingerprint>,
    /// What is known of the records' timestamps: those of all where the broker has seen the records, else what the header says.
    pub timestamps: TimestampRange,
    /// Why the batch must not be appended. A retry of one that is stored already is answered all the same.
    pub refusal: Option<Refused>,
}

/// One write on its way.
pub(in crate::partition) struct Append {
    pub(in crate::partition) batch: Batch,
    pub(in crate::partition) origin: BatchOrigin,
    pub(in crate::partition) acks: Acks,
    /// Memory that the batch may take, given back when the write is answered, or is safe here and nobody waits for the answer any more.
    pub(in crate::partition) permit: OwnedSemaphorePermit,
    pub(in crate::partition) answer: oneshot::Sender<AppendResult>,
    /// With `acks=tiered`: where the caller finds that the write is stored here, while it waits for the bucket.
    pub(in crate::partition) stored: Option<Stored>,
}

/// The offsets of a write that is stored on this broker and waits for the bucket.
pub type Stored = Arc<SetOnce<Range<Offset>>>;

/// A writer who waits: the answer's way, and the memory that is given back with it.
pub(super) struct Writer {
    answer: oneshot::Sender<AppendResult>,
    permit: Option<OwnedSemaphorePermit>,
    stored: Option<Stored>,
}

impl Writer {
    /// Its write is stored here, and waits for the bucket: other writes may have its memory.
    fn on_stored(&mut self, acked: &Acked) {
        self.permit = None;
        if let Some(stored) = &self.stored {
            let _known = stored.set(acked.base..acked.end);
        }
    }

    /// Tells it. Whoever does not listen any more has still written.
    pub(super) fn answer(self, result: AppendResult) {
        let _gone = self.answer.send(result);
    }

    fn is_gone(&self) -> bool {
        self.answer.is_closed()
    }

    /// Whether it has gone before others were asked for what it wants. Who wants no answer has always gone.
    fn left_early(&self, acks: Acks) -> bool {
        matches!(acks, Acks::All | Acks::Tiered) && self.is_gone()
    }
}

impl Actor {
    /// Admits one write into the group, or answers it.
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
        // A group lies in one segment, so it must not be larger than one may be.
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
                batch.stamp(base, epoch);
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
                    // An earlier try with fewer acks, or one whose writer has gone, asked for no upload.
                    self.upkeep.push(self.id);
                }
            }
            Err(refused) => {
                writer.answer(Err(refused.into()));
            }
        }
    }

    /// Appends the group. Whatever happens, the group is empty afterwards and its writers wait or are answered.
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

    /// Appends batches that make `bytes` together, in a new segment when the active one is full or old.
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

    /// Tells the simulator's judge of an append.
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

    /// Hands everything appended to the journal, where the topic asks for that.
    pub(super) fn hand_to_journal(&mut self) {
        if self.syncs() && self.handed_end < self.replica.log_end() {
            let news = Arc::clone(&self.news);
            self.handed_end = self.replica.log_end();
            self.replica.persist(Box::new(move |outcome| news.persisted(outcome)));
        }
    }

    /// Takes in what the journal said.
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

    /// The disk takes no more writes. A leader gives up as far as it may, a follower leaves; what is committed can be read as before.
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

    /// Answers the writers whose rule holds now, and gives back the memory of those who have gone.
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
            // What others have to hold may take for ever, and who asks again brings its batch again.
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
