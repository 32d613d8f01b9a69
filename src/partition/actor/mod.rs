//! The one task that owns a partition: it drains what is queued into one group, appends it, has it synced, and answers.
//!
//! It decides nothing: [`Leader`] does. While one group waits for the journal the next is being written. The queue is
//! where batching comes from; there is no timer. `leading` carries out writes, `segments` all else that touches the log.

mod leading;
mod segments;

use std::{
    io,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

use tokio::sync::{Notify, mpsc, oneshot};

pub(super) use self::leading::Append;
pub use self::leading::{AppendError, AppendResult};
use self::{leading::Writer, segments::Seat};
use super::{
    leader::{
        Acked, Leader,
        insync::{Ends, Rule, Start},
    },
    shared::Shared,
    upkeep::Local,
    upkeep_queue::UpkeepQueue,
};
use crate::{
    log::{PersistError, Replica, SegmentExport},
    model::{Acks, BrokerId, Durability, Offset, PartitionId, TopicConfig, Watermarks},
    record::Batch,
    task::{Tasks, clock},
};

/// Most commands that one turn takes from the queue.
const TURN: usize = 512;

/// Most bytes of batches in one group: a larger write gains nothing. While this one is made durable the next is written, and while
/// it is answered the one after that is on its way: what came together need not wait for each other.
const GROUP_BYTES: usize = 512 << 10;

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

/// What the journal's thread last said. It only overwrites and wakes: the journal never waits for a partition. How far the log is
/// durable the replica knows: an end that was said before a cut speaks of records that are gone.
#[derive(Default)]
struct Persisted {
    outcome: Mutex<Option<Result<(), PersistError>>>,
    notify: Notify,
}

impl Persisted {
    fn report(&self, outcome: Result<Offset, PersistError>) {
        let outcome = match outcome {
            // What was handed over was cut by this very task: no failure of the disk.
            Ok(_) | Err(PersistError::Cut) => Ok(()),
            Err(error) => Err(error),
        };
        let mut last = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        // A failure is final; success after it cannot be.
        if !matches!(*last, Some(Err(_))) {
            *last = Some(outcome);
        }
        drop(last);
        self.notify.notify_one();
    }

    fn take(&self) -> Option<Result<(), PersistError>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    async fn next(&self) -> Result<(), PersistError> {
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
    replica: Seat,
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
            replica: Seat::new(replica),
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
                    self.turn(&mut turn).await;
                }
            }
            while !turn.is_empty() {
                // What was answered goes out first.
                tokio::task::yield_now().await;
                if let Some(outcome) = persisted.take() {
                    self.on_persisted(outcome);
                }
                self.turn(&mut turn).await;
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
            writer.answer(Err(AppendError::Closing));
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
    async fn turn(&mut self, turn: &mut Vec<Command>) {
        let mut now_ms = clock::wall_ms();
        while self.group_bytes < GROUP_BYTES
            && let Some(command) = turn.pop()
        {
            match command {
                Command::Append(append) => self.append(*append, now_ms),
                other => {
                    // It may take its time: writers that came before do not wait for it.
                    self.complete(now_ms);
                    self.administer(other).await;
                    now_ms = clock::wall_ms();
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

    async fn administer(&mut self, command: Command) {
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
                let _gone = answer.send(self.export(base).await);
            }
            Command::Seal => self.seal_now(),
            Command::Tiered(end) => {
                self.tiered_end = self.tiered_end.max(end);
                self.leader.tiered(end);
            }
            Command::AdvanceLogStart(to) => self.advance_log_start(to),
            Command::Evict(below) => self.evict(below).await,
        }
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

#[cfg(test)]
mod tests;
