//! The one task that owns a partition: it drains what is queued into one group, appends it, has it synced, and answers.
//!
//! It decides nothing: [`Leader`] does. While one group waits for the journal the next is being written. The queue is
//! where batching comes from; there is no timer.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, oneshot};

use super::{
    leader::{
        Acked, Admission, Held, Leader, Refused,
        insync::{Ends, Rule, Start},
    },
    shared::Shared,
    upkeep::Local,
    upkeep_queue::UpkeepQueue,
};
use crate::{
    log::{self, PersistError, Replica, SegmentExport},
    model::{Acks, BrokerId, Durability, Offset, PartitionId, TimestampType, TopicConfig, Watermarks},
    record::Batch,
    task::{Tasks, clock},
};

/// Most commands that one turn takes from the queue.
const TURN: usize = 512;

/// Most bytes of batches in one group: a larger write gains nothing. While this one is made durable the next is written, and while
/// it is answered the one after that is on its way: what came together need not wait for each other.
const GROUP_BYTES: usize = 512 << 10;

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
pub(super) struct Append {
    pub(super) batch: Batch,
    pub(super) acks: Acks,
    /// Memory that the batch may take, given back when the write is answered.
    pub(super) permit: OwnedSemaphorePermit,
    pub(super) answer: oneshot::Sender<AppendResult>,
}

/// What the task can be asked to do.
pub(super) enum Command {
    Append(Box<Append>),
    Configure(Arc<TopicConfig>),
    Local(oneshot::Sender<Local>),
    Export(Offset, oneshot::Sender<io::Result<SegmentExport>>),
    Seal,
    Tiered(Offset),
    AdvanceLogStart(Offset),
    Evict(Offset),
}

/// A writer who waits: the answer's way, and the memory that is given back with it.
struct Writer {
    answer: oneshot::Sender<AppendResult>,
    _permit: OwnedSemaphorePermit,
}

/// What the journal's thread last said. It only overwrites and wakes: the journal never waits for a partition.
#[derive(Default)]
struct Persisted {
    outcome: Mutex<Option<Result<Offset, PersistError>>>,
    notify: Notify,
}

impl Persisted {
    fn report(&self, outcome: Result<Offset, PersistError>) {
        let mut last = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        // A failure is final; success after it cannot be.
        if !matches!(*last, Some(Err(_))) {
            *last = Some(outcome);
        }
        drop(last);
        self.notify.notify_one();
    }

    fn take(&self) -> Option<Result<Offset, PersistError>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    async fn next(&self) -> Result<Offset, PersistError> {
        loop {
            let notified = self.notify.notified();
            if let Some(outcome) = self.take() {
                return outcome;
            }
            notified.await;
        }
    }
}

/// Everything that the task is made of.
pub(super) struct Parts {
    pub(super) broker: BrokerId,
    pub(super) id: PartitionId,
    pub(super) replica: Replica,
    pub(super) shared: Arc<Shared>,
    pub(super) upkeep: UpkeepQueue,
    pub(super) log_start: Offset,
    pub(super) tiered_end: Offset,
    pub(super) tasks: Tasks,
}

/// The task's state.
pub(super) struct Actor {
    id: PartitionId,
    replica: Replica,
    leader: Leader<Writer>,
    config: Arc<TopicConfig>,
    shared: Arc<Shared>,
    upkeep: UpkeepQueue,
    persisted: Arc<Persisted>,
    log_start: Offset,
    tiered_end: Offset,
    active_since_ms: Option<i64>,
    /// Everything below is with the journal, or durable. Never above the log end.
    handed_end: Offset,
    group: Vec<Batch>,
    group_bytes: usize,
    group_writers: Vec<(Acks, Acked, Writer)>,
    tasks: Tasks,
}

impl Actor {
    pub(super) fn new(parts: Parts) -> Self {
        let config = parts.shared.config();
        let own = Ends { written: parts.replica.log_end(), persisted: parts.replica.persisted_end() };
        let committed_end = parts.tiered_end.max(parts.log_start);
        let alone = Start::alone(parts.broker, parts.shared.epoch(), rule(&config), own, committed_end);
        let leader = Leader::new(alone, parts.tiered_end);
        let active = parts.replica.active();
        let mut replica = parts.replica;
        replica.set_journaled(config.durability == Durability::Persisted);
        // A crash between the commit and this broker's disk leaves the disk behind.
        replica.advance_log_start(parts.log_start);
        let handed_end = replica.persisted_end();
        let actor = Self {
            handed_end,
            id: parts.id,
            leader,
            config,
            shared: parts.shared,
            upkeep: parts.upkeep,
            persisted: Arc::default(),
            log_start: replica.log_start(),
            tiered_end: parts.tiered_end,
            active_since_ms: (active.end > active.base).then_some(active.created_ms),
            replica,
            group: Vec::new(),
            group_bytes: 0,
            group_writers: Vec::new(),
            tasks: parts.tasks,
        };
        actor.publish();
        actor
    }

    /// Runs until it is stopped, then gives up what nobody can be told any more.
    pub(super) async fn run(mut self, mut mailbox: mpsc::Receiver<Command>) {
        let tasks = self.tasks.clone();
        let persisted = Arc::clone(&self.persisted);
        // The next command is the last.
        let mut turn = Vec::with_capacity(16);
        loop {
            tokio::select! {
                biased;
                () = tasks.cancelled() => break,
                outcome = persisted.next() => self.on_persisted(outcome),
                taken = mailbox.recv_many(&mut turn, TURN) => {
                    if taken == 0 {
                        break;
                    }
                    turn.reverse();
                    self.turn(&mut turn);
                }
            }
            while !turn.is_empty() {
                // What was answered goes out first.
                tokio::task::yield_now().await;
                if let Some(outcome) = persisted.take() {
                    self.on_persisted(outcome);
                }
                self.turn(&mut turn);
            }
        }
        self.stop(&mut mailbox).await;
    }

    /// Lets what is written become durable and answers it; refuses what was not begun.
    async fn stop(&mut self, mailbox: &mut mpsc::Receiver<Command>) {
        mailbox.close();
        while let Ok(command) = mailbox.try_recv() {
            if let Command::Append(append) = command {
                let _gone = append.answer.send(Err(AppendError::Closing));
            }
        }
        let persisted = Arc::clone(&self.persisted);
        while self.awaits_journal() {
            let outcome = persisted.next().await;
            self.on_persisted(outcome);
        }
        for writer in self.leader.abandon() {
            let _gone = writer.answer.send(Err(AppendError::Closing));
        }
        self.shared.close();
    }

    fn awaits_journal(&self) -> bool {
        self.shared.fault().is_none() && self.syncs() && self.replica.persisted_end() < self.replica.log_end()
    }

    /// Whether appends are handed to the journal: by the topic's rule.
    fn syncs(&self) -> bool {
        self.config.durability == Durability::Persisted
    }

    /// Does what is asked, the last command first, until a group is full.
    fn turn(&mut self, turn: &mut Vec<Command>) {
        let now_ms = clock::wall_ms();
        while self.group_bytes < GROUP_BYTES
            && let Some(command) = turn.pop()
        {
            match command {
                Command::Append(append) => self.append(*append, now_ms),
                other => {
                    self.flush(now_ms);
                    self.administer(other);
                }
            }
        }
        self.complete(now_ms);
    }

    /// Appends the group, hands it on, and answers whoever is due.
    fn complete(&mut self, now_ms: i64) {
        self.flush(now_ms);
        if self.syncs() && self.handed_end < self.replica.log_end() {
            self.hand_to_journal();
        }
        self.publish();
        self.answer();
    }

    fn append(&mut self, append: Append, now_ms: i64) {
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
                let _gone = writer.answer.send(Err(refused.into()));
            }
        }
    }

    /// Appends the group. Whatever happens, the group is empty afterwards and its writers wait or are answered.
    fn flush(&mut self, now_ms: i64) {
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
                    let _gone = writer.answer.send(Err(error.clone()));
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

    fn seal(&mut self) -> Result<(), AppendError> {
        self.replica.roll().map_err(append_error)?;
        self.active_since_ms = None;
        self.upkeep.push(self.id);
        Ok(())
    }

    fn hand_to_journal(&mut self) {
        let persisted = Arc::clone(&self.persisted);
        self.handed_end = self.replica.log_end();
        self.replica.persist(Box::new(move |outcome| persisted.report(outcome)));
    }

    fn on_persisted(&mut self, outcome: Result<Offset, PersistError>) {
        match outcome {
            Ok(end) => self.leader.persisted(end),
            Err(error) => {
                let why: Arc<str> = error.to_string().into();
                self.fail(&why);
                for writer in self.leader.abandon() {
                    let _gone = writer.answer.send(Err(AppendError::StorageFailed { why: Arc::clone(&why) }));
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

    fn answer(&mut self) {
        self.leader.due(|writer, acked| {
            let _gone = writer.answer.send(Ok(acked));
        });
    }

    fn administer(&mut self, command: Command) {
        match command {
            Command::Append(_) => unreachable!("appends are taken by the turn"),
            Command::Configure(config) => {
                self.replica.set_journaled(config.durability == Durability::Persisted);
                self.leader.configure(rule(&config));
                self.shared.configure(Arc::clone(&config));
                self.config = config;
                self.upkeep.push(self.id);
            }
            Command::Local(answer) => {
                // Whoever asks looks at the marks next: they must know what the commands before this one did.
                self.publish();
                let _gone = answer.send(Local {
                    sealed: self.replica.sealed(),
                    active: self.replica.active(),
                    active_since_ms: self.active_since_ms,
                    awaits_tier: self.leader.awaits_tier(),
                });
            }
            Command::Export(base, answer) => {
                let _gone = answer.send(self.replica.export(base));
            }
            Command::Seal => {
                if self.active_since_ms.is_some()
                    && let Err(error) = self.seal()
                {
                    tracing::warn!(partition = %self.id, %error, "could not seal the segment; it is tried again");
                }
            }
            Command::Tiered(end) => {
                self.tiered_end = self.tiered_end.max(end);
                self.leader.tiered(end);
            }
            Command::AdvanceLogStart(to) => self.advance_log_start(to),
            Command::Evict(below) => {
                let free = self.tiered_end.max(self.log_start);
                assert!(below <= free, "only what the bucket has, or nobody may read, leaves the disk");
                match self.replica.evict(below) {
                    Ok(bytes) => {
                        tracing::debug!(partition = %self.id, %below, bytes, "segments left the disk");
                        let removed = self.replica.take_removed();
                        self.tasks.spawn_blocking(move || drop(removed));
                    }
                    Err(error) => {
                        tracing::warn!(partition = %self.id, %error, "could not remove segments; it is tried again");
                    }
                }
            }
        }
    }

    fn advance_log_start(&mut self, to: Offset) {
        assert!(to <= self.leader.high_watermark(), "only committed records are deleted");
        self.log_start = self.log_start.max(to);
        // Readers must see the new start before the files go.
        self.publish();
        self.replica.advance_log_start(to);
    }

    fn publish(&self) {
        let marks = Watermarks {
            log_start: self.log_start,
            local_start: self.replica.local_start(),
            tiered_end: self.tiered_end,
            high_watermark: self.leader.high_watermark(),
            persisted_end: self.replica.persisted_end(),
            log_end: self.replica.log_end(),
        };
        let sealed_end = self.replica.active().base;
        if self.shared.marks().high_watermark < sealed_end && sealed_end <= marks.high_watermark {
            // A sealed segment has just become one that may be uploaded.
            self.upkeep.push(self.id);
        }
        self.shared.publish(marks, self.replica.bytes());
        let since = self.active_since_ms.map_or(0, |ms| u64::try_from(ms).unwrap_or(1).max(1));
        self.shared.active_since_ms.store(since, Ordering::Relaxed);
    }
}

/// What a topic asks of its leader. Nobody else is in sync who could lag.
fn rule(config: &TopicConfig) -> Rule {
    Rule { durability: config.durability, min_insync: config.min_insync_replicas, lag_ms: u64::MAX }
}

fn append_error(error: log::AppendError) -> AppendError {
    match error {
        log::AppendError::DiskFull => AppendError::DiskFull,
        other => AppendError::StorageFailed { why: other.to_string().into() },
    }
}
