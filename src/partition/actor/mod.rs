//! The one task that owns a partition: it appends queued writes in groups, syncs them and responds, or it copies from its leader.
//!
//! # Overview
//!
//! The task decides nothing: [`Leader`] and [`Follower`] do. While one group waits for the journal, the next is being written. Batching
//! comes from the queue; there is no timer.
//!
//! | module | work |
//! | --- | --- |
//! | `assigned` | changes of the role |
//! | `leading` | writes |
//! | `replicas` | followers and the ISR |
//! | `following` | messages of the leader |
//! | `segments` | everything else that touches the log |
//!
//! ```text
//!   journal, followers, clock ─▶ signals ─────╮
//!   metadata, links, ISR updates ─▶ control ──┼─▶ task
//!   writers, maintenance ─▶ commands ─────────╯
//! ```
//!
//! Between any two groups the task polls the three in that order. So neither a flood of writes nor a flood of batches from a leader
//! delays the other inputs for long.

mod assigned;
mod following;
mod leading;
mod news;
mod replicas;
mod segments;
mod timestamps;
mod warnings;

use std::{io, sync::Arc};

use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

pub use self::leading::{AppendError, AppendResult, BatchOrigin, Stored};
pub(super) use self::{
    assigned::{JoinOrder, Order, Placed},
    leading::Append,
    news::News,
};
use self::{
    leading::Writer,
    news::Told,
    replicas::{Proposed, Question},
    segments::Seat,
    warnings::Warnings,
};
use super::{
    Role, Standing, Surroundings,
    follower::Follower,
    leader::{Acked, Leader, insync::Rule},
    shared::Shared,
    upkeep::Local,
    upkeep_queue::UpkeepQueue,
};
#[cfg(feature = "sim")]
use crate::task::sim_event::SimRole;
use crate::{
    log::{Replica, SegmentExport},
    model::{Acks, BrokerId, Durability, Offset, PartitionId, TopicConfig, TopicName, Watermarks},
    record::Batch,
    task::{Tasks, clock},
    tier::{PartitionTier, TierState},
};

/// Maximum number of commands that one turn takes from the queue.
const TURN: usize = 512;

/// Number of commands whose memory a partition keeps between its turns. A broker has many partitions, so the number is small.
pub(super) const SPARE_COMMANDS: usize = 64;

/// Maximum bytes of batches in one group. A larger write gains nothing, and in a larger group batches would wait for each other. While
/// one group is made durable, the next one is written and the one after that arrives.
const GROUP_BYTES: usize = 512 << 10;

/// Maximum number of control messages that are handled before their effects are submitted to the journal and published.
const ORDERS: usize = 64;

/// Command for the task.
pub(super) enum Command {
    Append(Box<Append>),
    Configure(Arc<TopicConfig>),
    Local(oneshot::Sender<Local>),
    Export(Offset, oneshot::Sender<io::Result<SegmentExport>>),
    Seal,
    /// Value of the tier key.
    Committed(Box<TierState>),
    Evict(Offset),
}

/// Parts of a new task.
pub(super) struct Parts {
    pub(super) broker: BrokerId,
    pub(super) id: PartitionId,
    pub(super) topic: TopicName,
    pub(super) replica: Replica,
    pub(super) shared: Arc<Shared>,
    pub(super) news: Arc<News>,
    pub(super) around: Surroundings,
    pub(super) upkeep: UpkeepQueue,
    pub(super) tier: Option<PartitionTier>,
    pub(super) log_start: Offset,
    pub(super) tiered_end: Offset,
    /// All records below are known as committed, and are in this log.
    pub(super) committed_end: Offset,
    /// `replication.lag_time`, in milliseconds.
    pub(super) lag_ms: u64,
    /// Control queue, for the results of the task's background requests.
    pub(super) orders: mpsc::WeakSender<Order>,
    pub(super) tasks: Tasks,
}

/// Current role of the task, with its state.
enum Part {
    /// Neither accepts writes nor copies.
    Waiting,
    Following(Box<Follower>),
    Leading(Box<Leader<Writer>>),
}

/// State of the task.
pub(super) struct Actor {
    broker: BrokerId,
    id: PartitionId,
    /// Topic name, for log lines.
    topic: TopicName,
    replica: Seat,
    part: Part,
    /// Status that was last published.
    standing: Standing,
    placed: Placed,
    config: Arc<TopicConfig>,
    lag_ms: u64,
    shared: Arc<Shared>,
    around: Surroundings,
    upkeep: UpkeepQueue,
    news: Arc<News>,
    tier: Option<PartitionTier>,
    orders: mpsc::WeakSender<Order>,
    log_start: Offset,
    tiered_end: Offset,
    /// High watermark while the task is idle: that of the last role at its end.
    committed_end: Offset,
    /// Time of the first batch in the active segment; `None` while the segment is empty.
    active_since: Option<Instant>,
    /// All records below are submitted to the journal, or durable. Never above the log end.
    handed_end: Offset,
    group: Vec<Batch>,
    group_bytes: usize,
    group_writers: Vec<(Acks, Acked, Writer)>,
    /// True if writers that wait for other replicas or the object store may have dropped their receivers.
    writers_gone: bool,
    /// Request to the metadata store that has no outcome yet. One request at a time.
    asked: Option<Question>,
    /// Last proposed ISR, for log lines.
    proposed: Option<Box<Proposed>>,
    warnings: Warnings,
    tasks: Tasks,
}

impl Actor {
    pub(super) fn new(parts: Parts) -> Self {
        let config = parts.shared.config();
        let active = parts.replica.active();
        let mut replica = parts.replica;
        replica.set_journaled(config.durability == Durability::Persisted);
        replica.set_producer_expiration(config.producer_expiration);
        // A crash between the commit and the change of this disk leaves an older start on the disk.
        replica.advance_log_start(parts.log_start.min(parts.committed_end));
        // A replica that bootstrapped at the tiered end has no earlier start. The records before it can be read from the object store.
        let known = replica.log_start();
        let log_start = if known <= parts.tiered_end { parts.log_start } else { known.max(parts.log_start) };
        let mut actor = Self {
            broker: parts.broker,
            id: parts.id,
            topic: parts.topic,
            part: Part::Waiting,
            standing: Standing::UNKNOWN,
            placed: Placed::default(),
            config,
            lag_ms: parts.lag_ms,
            shared: parts.shared,
            around: parts.around,
            upkeep: parts.upkeep,
            news: parts.news,
            tier: parts.tier,
            orders: parts.orders,
            log_start,
            tiered_end: parts.tiered_end,
            committed_end: parts.committed_end,
            active_since: segments::active_since(&active),
            handed_end: replica.persisted_end(),
            replica: Seat::new(replica),
            group: Vec::new(),
            group_bytes: 0,
            group_writers: Vec::new(),
            writers_gone: false,
            asked: None,
            proposed: None,
            warnings: Warnings::default(),
            tasks: parts.tasks,
        };
        #[cfg(feature = "sim")]
        actor.tell_opened();
        actor.publish();
        actor
    }

    /// Runs until the task is stopped, then finishes what can be finished.
    pub(super) async fn run(mut self, mut mailbox: mpsc::Receiver<Command>, mut orders: mpsc::Receiver<Order>) {
        let tasks = self.tasks.clone();
        let news = Arc::clone(&self.news);
        // In reverse order: the next command is the last element.
        let mut turn = Vec::with_capacity(16);
        loop {
            tokio::select! {
                biased;
                () = tasks.cancelled() => break,
                told = news.next() => self.hear(told),
                Some(order) = orders.recv() => {
                    self.carry_out(order, &mut orders).await;
                    // A stream of control messages does not block the command queue.
                    while turn.len() < TURN && let Ok(command) = mailbox.try_recv() {
                        turn.push(command);
                    }
                    turn.reverse();
                }
                taken = mailbox.recv_many(&mut turn, TURN) => {
                    if taken == 0 {
                        break;
                    }
                    turn.reverse();
                    self.turn(&mut turn).await;
                }
            }
            while !turn.is_empty() {
                // The woken writers run first.
                tokio::task::yield_now().await;
                if let Some(told) = news.take() {
                    self.hear(told);
                }
                if let Ok(order) = orders.try_recv() {
                    self.carry_out(order, &mut orders).await;
                }
                self.turn(&mut turn).await;
            }
            turn.shrink_to(SPARE_COMMANDS);
        }
        // Drops the queued control messages, so that their senders do not wait.
        drop(orders);
        self.stop(&mut mailbox).await;
    }

    /// Waits until written records are durable and completes their writes; rejects queued writes.
    async fn stop(&mut self, mailbox: &mut mpsc::Receiver<Command>) {
        mailbox.close();
        while let Ok(command) = mailbox.try_recv() {
            if let Command::Append(append) = command {
                let _gone = append.answer.send(Err(AppendError::Closing));
            }
        }
        if let Part::Following(_) = self.part {
            self.around.links.leave(self.id, self.placed.epoch(), true);
        }
        // A replica without an assignment since its start has not yet submitted the records that a crash left in it.
        self.hand_to_journal();
        let news = Arc::clone(&self.news);
        while self.awaits_journal() {
            let told = news.next().await;
            self.hear(told);
        }
        if let Part::Leading(leader) = &mut self.part {
            for writer in leader.abandon() {
                writer.answer(Err(AppendError::Closing));
            }
        }
        self.shared.close();
    }

    fn awaits_journal(&self) -> bool {
        self.shared.fault().is_none() && self.syncs() && self.replica.persisted_end() < self.replica.log_end()
    }

    /// Returns true if the topic's durability requires that appends are submitted to the journal.
    fn syncs(&self) -> bool {
        self.config.durability == Durability::Persisted
    }

    /// Processes commands, the last element first, until a group is full.
    async fn turn(&mut self, turn: &mut Vec<Command>) {
        let mut now_ms = clock::wall_ms();
        while self.group_bytes < GROUP_BYTES
            && let Some(command) = turn.pop()
        {
            match command {
                Command::Append(append) => self.append(*append, now_ms),
                other => {
                    // The command may take long: earlier writes do not wait for it.
                    self.complete();
                    self.administer(other).await;
                    now_ms = clock::wall_ms();
                }
            }
        }
        self.complete();
    }

    /// Appends the group, submits it to the journal, and responds to the writers whose result is due.
    fn complete(&mut self) {
        self.flush();
        self.hand_to_journal();
        self.publish();
        self.answer();
    }

    async fn administer(&mut self, command: Command) {
        match command {
            Command::Append(_) => unreachable!("appends are taken by the turn"),
            Command::Configure(config) => self.configure(config),
            Command::Local(answer) => {
                // Without writes, nothing else reports a segment sync that failed after the journal write.
                if let Some(why) = self.replica.failure() {
                    self.fail(&why);
                }
                self.replica.correct_written_times(clock::wall_ms());
                // The caller reads the watermarks next: they must contain the effects of the commands before this one.
                self.publish();
                let _gone = answer.send(Local {
                    sealed: self.replica.sealed(),
                    active: self.replica.active(),
                    active_age: self.active_since.map(|since| since.elapsed()),
                    awaits_tier: self.awaits_tier(),
                    leads: match &self.part {
                        Part::Leading(leader) => Some((leader.epoch(), leader.in_sync().is_settled())),
                        _ => None,
                    },
                });
            }
            Command::Export(base, answer) => {
                let _gone = answer.send(self.export(base).await);
            }
            Command::Seal => self.seal_now(),
            Command::Committed(state) => self.committed(&state),
            Command::Evict(below) => self.evict(below).await,
        }
    }

    fn configure(&mut self, config: Arc<TopicConfig>) {
        self.replica.set_journaled(config.durability == Durability::Persisted);
        self.replica.set_producer_expiration(config.producer_expiration);
        if let Part::Leading(leader) = &mut self.part {
            leader.configure(rule(&config, self.lag_ms));
        }
        self.config = config;
        self.propose();
        self.upkeep.push(self.id);
    }

    /// Returns true if a writer waits for the object store.
    fn awaits_tier(&self) -> bool {
        matches!(&self.part, Part::Leading(leader) if leader.awaits_tier())
    }

    /// Returns the end of the records that are known as committed and are in this log.
    fn high_watermark(&self) -> Offset {
        match &self.part {
            Part::Leading(leader) => leader.high_watermark(),
            Part::Following(follower) => follower.high_watermark().min(self.replica.log_end()),
            Part::Waiting => self.committed_end.min(self.replica.log_end()),
        }
    }

    /// Publishes the watermarks and the replica status.
    fn publish(&mut self) {
        let high_watermark = self.high_watermark();
        let marks = Watermarks {
            // A replica that is behind may have received a log start or a tiered end that it has not reached.
            log_start: self.log_start.min(high_watermark),
            local_start: self.replica.local_start(),
            tiered_end: self.tiered_end.min(high_watermark),
            high_watermark,
            persisted_end: self.replica.persisted_end(),
            log_end: self.replica.log_end(),
        };
        sim_event!(WatermarksPublished { partition: self.id, marks, role: self.sim_role() });
        let (before, sealed_end) = (self.shared.marks().high_watermark, self.replica.active().base);
        let has_moved = before < marks.high_watermark && before < sealed_end;
        if has_moved && (sealed_end <= marks.high_watermark || self.awaits_tier()) {
            // A sealed segment has just become uploadable: the last one, or perhaps one that a writer waits for.
            self.upkeep.push(self.id);
        }
        self.shared.publish(marks, self.replica.bytes());
        self.shared.set_active_since(self.active_since);
        let behind = matches!(&self.part, Part::Leading(leader) if leader.in_sync().is_behind());
        let has_given_up = self.has_given_up();
        self.shared.set_behind(behind || has_given_up);
        if !has_given_up {
            self.placed.given_up_ms = None;
        }
        let standing = self.stands();
        if standing != self.standing {
            self.standing = standing;
            self.shared.stand(standing);
            if standing.role == (Role::Leader { settled: true }) {
                // Before its epoch is committed, a leader uploads nothing, even if a writer waits for the object store.
                self.upkeep.push(self.id);
            }
        }
    }

    /// Reports the log that was found on the disk to the simulator's checker.
    #[cfg(feature = "sim")]
    fn tell_opened(&self) {
        let epochs: Vec<_> = self.replica.epochs().iter().collect();
        sim_event!(ReplicaOpened { partition: self.id, epochs: &epochs, end: self.replica.log_end() });
    }

    /// Returns the role, for the simulator's checker.
    #[cfg(feature = "sim")]
    fn sim_role(&self) -> SimRole {
        match &self.part {
            Part::Waiting => SimRole::Waiting,
            Part::Following(follower) => SimRole::Following(follower.epoch()),
            Part::Leading(leader) => {
                let (revision, min_insync) = (leader.in_sync().revision().0, leader.in_sync().rule().min_insync);
                SimRole::Leading { epoch: leader.epoch(), revision, min_insync }
            }
        }
    }

    /// Applies signals of the journal, the followers and the clock.
    fn hear(&mut self, told: Told) {
        if let Some(outcome) = told.persisted {
            self.on_persisted(outcome);
        }
        if !told.acks.is_empty() {
            self.on_acknowledged(told.acks);
        }
        if let Some(now_ms) = told.now_ms {
            self.in_sync(|in_sync| in_sync.tick(now_ms));
            self.look_at_given_up(now_ms);
        }
        self.writers_gone |= told.given_up;
        self.publish();
        self.answer();
    }
}

/// Returns the requirements of a topic and this broker on a leader.
fn rule(config: &TopicConfig, lag_ms: u64) -> Rule {
    Rule { durability: config.durability, min_insync: config.min_insync_replicas, lag_ms }
}

#[cfg(test)]
mod tests;
