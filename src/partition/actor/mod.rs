//! The one task that owns a partition. As leader it appends queued writes in groups, syncs them and responds; as
//! follower it copies from the leader.
//!
//! # Overview
//!
//! [`AppliedMetadata`] decides about the role, [`Leader`](super::leader::Leader) and [`Follower`] about the work in
//! that role; the task applies their decisions. While one group waits for the journal, the task appends the next one. A
//! group contains the writes that are queued by then; there is no timer.
//!
//! | module | work |
//! | --- | --- |
//! | `control` | changes of the role |
//! | `bootstrap` | tables for a log that starts above offset 0 |
//! | `leading` | writes |
//! | `isr` | followers and the ISR |
//! | `following` | messages of the leader |
//! | `log_ops` | all other operations on the log |
//! | `timestamps` | bounds on the timestamps of producers |
//! | `warnings` | log lines about lasting conditions |
//! | `inbox`, `signals` | queues of the task |
//!
//! # Turn
//!
//! The task takes one [`Input`] after the other (`inbox`); handling one is a turn. A handler changes the state of the
//! task, and may send requests to links and to the metadata store. Then [`Actor::finish_turn`] makes the changes
//! visible: it submits records to the journal, publishes, proposes an ISR change, and sends due results. Some handlers
//! finish the turn earlier: when a group is full, after an assignment, and before a command other than an append. A
//! handler also does so before a read of the tables for a bootstrapping follower. Some events publish earlier:
//!
//! | event | reason |
//! | --- | --- |
//! | a message that may end the role or replace the value | earlier commits belong to the old role and value |
//! | a truncation, reset or bootstrap of the log | readers and links of the old epoch must fail first |
//! | the end of such a change | the next subscription acknowledges the published ends |
//! | a new log start | readers must see it before the files are evicted |

mod bootstrap;
mod control;
mod following;
mod inbox;
mod isr;
mod leading;
mod log_ops;
mod signals;
mod timestamps;
mod warnings;

use std::{io, sync::Arc};

use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

pub use self::leading::{AppendError, AppendResult, BatchOrigin, Stored};
use self::{
    bootstrap::{BootstrapError, BootstrapRequest, ParsedTables},
    inbox::Input,
    isr::{LastProposal, PendingStoreRequest},
    leading::LeaderRole,
    log_ops::ReplicaCell,
    signals::PendingSignals,
    warnings::Warnings,
};
pub(super) use self::{inbox::Inbox, leading::Append, signals::ActorSignals};
use super::{
    context::PartitionContext,
    follower::Follower,
    leader::{
        divergence::LogPosition,
        isr::{IsrRules, ProposalOutcome},
        member::{BrokerStatus, DisconnectCause, PeerId, ReplicaProgress},
    },
    maintenance_queue::MaintenanceQueue,
    metadata::AppliedMetadata,
    published::PublishedState,
    role::{LinkEvent, LocalSegments, PartitionAssignment, ReplicaRole, ReplicaStatus, SubscribeResponse},
};
#[cfg(feature = "sim")]
use crate::task::sim_event::SimRole;
use crate::{
    log::{ReplicaLog, SegmentExport},
    model::{BrokerId, Durability, LeaderEpoch, Offset, PartitionId, TopicConfig, TopicName, Watermarks},
    task::{Tasks, clock},
    tier::{PartitionTier, TierState},
};

/// Number of commands, and of batches, for which an idle partition keeps memory. A broker has many partitions, so the
/// number is small.
pub(super) const SPARE_COMMANDS: usize = 64;

/// Maximum bytes of batches in one group, unless the group is one larger batch. A larger group adds latency but no
/// throughput: while one group is synced, the next one is appended.
const MAX_GROUP_BYTES: usize = 512 << 10;

/// Maximum number of control messages that are handled in one turn.
const MAX_CONTROL_BATCH: usize = 64;

/// Command: of a writer, of maintenance, or a changed configuration. Commands are handled in their order.
pub(super) enum ActorCommand {
    Append(Box<Append>),
    UpdateConfig(Arc<TopicConfig>),
    DescribeSegments(oneshot::Sender<LocalSegments>),
    /// Export the sealed segment at this offset.
    ExportSegment(Offset, oneshot::Sender<io::Result<SegmentExport>>),
    /// Seal the active segment.
    Roll,
    /// Apply this value of the tier key.
    ApplyTierState(Box<TierState>),
    /// Evict the segments below this offset.
    Evict(Offset),
}

/// Control message: of the metadata, the links, the metadata store, or a read of the object store. Control messages do
/// not wait behind queued writes.
pub(super) enum ControlMessage {
    /// Metadata of the partition. The task responds when it has applied the assignment, or dropped an old one, and has
    /// published its role.
    Assign(Box<PartitionAssignment>, oneshot::Sender<()>),
    Subscribe(Box<SubscribeMessage>),
    FollowerDisconnected(PeerId, DisconnectCause),
    BrokerStatusChanged(BrokerId, BrokerStatus),
    /// Outcome of the pending request to the metadata store.
    IsrOutcome(Box<ProposalOutcome>),
    /// Leader epoch that a follower reported and the metadata store confirmed.
    NewerEpoch(LeaderEpoch),
    /// Event of the link to the leader.
    Link(LinkEvent),
    /// Tables that the task requested from the object store, or the error of the read, with the number of that request.
    BootstrapReady(u64, Result<Box<ParsedTables>, BootstrapError>),
}

/// Subscription of a follower, with the channel for its response.
pub(super) struct SubscribeMessage {
    pub(super) peer: PeerId,
    pub(super) epoch: LeaderEpoch,
    pub(super) position: LogPosition,
    pub(super) progress: ReplicaProgress,
    pub(super) responder: oneshot::Sender<SubscribeResponse>,
}

/// Parts of a new task.
pub(super) struct ActorConfig {
    pub(super) broker: BrokerId,
    pub(super) id: PartitionId,
    pub(super) topic: TopicName,
    pub(super) replica: ReplicaLog,
    pub(super) published: Arc<PublishedState>,
    pub(super) signals: Arc<ActorSignals>,
    pub(super) ctx: PartitionContext,
    pub(super) maintenance: MaintenanceQueue,
    pub(super) tier: Option<PartitionTier>,
    /// Log start of the committed tier state. The local log may start above it: the records between them are then in
    /// the object store only.
    pub(super) log_start: Offset,
    /// Tiered end of the committed tier state.
    pub(super) tiered_end: Offset,
    /// High watermark at the start: all records of this log below it are committed.
    pub(super) committed_end: Offset,
    /// `replication.max_lag_time`, in milliseconds.
    pub(super) lag_ms: u64,
    /// Control queue, for the results of the task's background requests.
    pub(super) control: mpsc::WeakSender<ControlMessage>,
    pub(super) inbox: Inbox,
    pub(super) tasks: Tasks,
}

/// Current role of the task, with its state.
enum RoleState {
    /// Neither accepts writes nor copies.
    Idle,
    Following(Follower),
    Leading(LeaderRole),
}

/// State of the task.
pub(super) struct Actor {
    broker: BrokerId,
    id: PartitionId,
    /// Topic name, for log lines.
    topic: TopicName,
    log: ReplicaCell,
    role: RoleState,
    metadata: AppliedMetadata,
    /// Request to the metadata store that has no outcome yet, one at a time. It stays pending when the role changes. A
    /// resignation has no outcome and is not stored.
    pending_request: Option<PendingStoreRequest>,
    bootstrap_request: BootstrapRequest,
    /// Status that was last published.
    status: ReplicaStatus,
    config: Arc<TopicConfig>,
    lag_ms: u64,
    published: Arc<PublishedState>,
    ctx: PartitionContext,
    maintenance: MaintenanceQueue,
    inbox: Inbox,
    signals: Arc<ActorSignals>,
    tier: Option<PartitionTier>,
    control: mpsc::WeakSender<ControlMessage>,
    log_start: Offset,
    tiered_end: Offset,
    /// High watermark while the task is idle: that of the last role at its end, or of the opened log before the first
    /// role.
    committed_end: Offset,
    /// Time of the first batch in the active segment; `None` while the segment is empty.
    active_since: Option<Instant>,
    /// All records below are submitted to the journal, or durable. Never above the log end.
    persisted_submit_end: Offset,
    /// Last proposed ISR, for log lines.
    proposed: Option<Box<LastProposal>>,
    warnings: Warnings,
    tasks: Tasks,
}

impl Actor {
    pub(super) fn new(parts: ActorConfig) -> Self {
        let config = parts.published.config();
        let active = parts.replica.active_segment();
        let mut replica = parts.replica;
        replica.set_journaled(config.durability == Durability::Persisted);
        replica.set_producer_expiration(config.producer_expiration);
        // A crash after the commit of a log start, and before its change on this disk, leaves an older start on the
        // disk.
        replica.advance_log_start(parts.log_start.min(parts.committed_end));
        // A replica that starts at or below the tiered end may start above the log start: the records between them are
        // in the object store. Above the tiered end, all records before the start of the replica were deleted.
        let replica_start = replica.log_start();
        let log_start =
            if replica_start <= parts.tiered_end { parts.log_start } else { replica_start.max(parts.log_start) };
        let mut actor = Self {
            broker: parts.broker,
            id: parts.id,
            topic: parts.topic,
            role: RoleState::Idle,
            metadata: AppliedMetadata::default(),
            pending_request: None,
            bootstrap_request: BootstrapRequest::default(),
            status: ReplicaStatus::UNKNOWN,
            config,
            lag_ms: parts.lag_ms,
            published: parts.published,
            ctx: parts.ctx,
            maintenance: parts.maintenance,
            inbox: parts.inbox,
            signals: parts.signals,
            tier: parts.tier,
            control: parts.control,
            log_start,
            tiered_end: parts.tiered_end,
            committed_end: parts.committed_end,
            active_since: log_ops::active_since(&active),
            persisted_submit_end: replica.persisted_end(),
            log: ReplicaCell::new(replica),
            proposed: None,
            warnings: Warnings::default(),
            tasks: parts.tasks,
        };
        #[cfg(feature = "sim")]
        actor.report_opened();
        // Readers may exist before the first turn.
        actor.publish();
        actor
    }

    /// Handles inputs until the task is stopped, then closes the partition.
    pub(super) async fn run(mut self) {
        loop {
            match self.inbox.next_input().await {
                Input::Stop => break,
                input => self.handle(input).await,
            }
        }
        self.stop().await;
    }

    /// Handles one input as one turn.
    async fn handle(&mut self, input: Input) {
        match input {
            Input::Stop => {}
            Input::Signals(pending) => self.on_signals(pending),
            Input::Control(first) => self.handle_control(first).await,
            Input::Commands => self.process_commands().await,
        }
        self.finish_turn();
    }

    /// Ends a turn. Submits appended records to the journal, and publishes the state. Sends the request to the metadata
    /// store that is due, and responds to the writers whose result is due.
    fn finish_turn(&mut self) {
        self.submit_to_journal();
        self.publish();
        self.propose();
        self.respond_due();
    }

    /// Closes the partition: rejects queued writes, unsubscribes a follower, and waits for the journal if the topic is
    /// `persisted`. Writes whose acks rule holds by then are acknowledged. All other writes fail with
    /// [`AppendError::Closing`], or with [`AppendError::StorageFailed`] if the journal failed.
    async fn stop(&mut self) {
        for command in self.inbox.close() {
            if let ActorCommand::Append(append) = command {
                let _dropped_receiver = append.responder.send(Err(AppendError::Closing));
            }
        }
        if let RoleState::Following(_) = self.role {
            self.ctx.links.unsubscribe(self.id, self.metadata.epoch(), true);
        }
        // A crash may have left records that are not durable. They are not submitted before the first turn has ended.
        self.submit_to_journal();
        while self.awaits_journal() {
            let pending = self.inbox.next_signals().await;
            self.handle(Input::Signals(pending)).await;
        }
        if let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role {
            for writer in leader.drain_waiters() {
                writer.respond(Err(AppendError::Closing));
            }
        }
        self.published.close();
    }

    /// Returns true if appended records still wait for the journal; false after the disk has failed.
    fn awaits_journal(&self) -> bool {
        !self.published.has_failed() && self.needs_journal() && self.log.persisted_end() < self.log.log_end()
    }

    /// Returns true if the topic's durability requires that appends are submitted to the journal.
    fn needs_journal(&self) -> bool {
        self.config.durability == Durability::Persisted
    }

    /// Handles the commands that the inbox has taken from its queue, until none remains or a group is full. Consecutive
    /// writes are appended in groups.
    async fn process_commands(&mut self) {
        let mut now_ms = clock::wall_ms();
        while self.group_bytes() < MAX_GROUP_BYTES
            && let Some(command) = self.inbox.next_command()
        {
            match command {
                ActorCommand::Append(append) => self.append(*append, now_ms),
                command => {
                    // The command may take long, and earlier writes must not wait for it. `DescribeSegments` requires
                    // that all earlier changes are published: maintenance compares the described segments with the
                    // watermarks.
                    self.finish_group();
                    self.handle_admin_command(command).await;
                    now_ms = clock::wall_ms();
                }
            }
        }
        self.flush();
    }

    /// Returns the encoded size of the group; 0 while this broker does not lead.
    fn group_bytes(&self) -> usize {
        match &self.role {
            RoleState::Leading(role) => role.group_bytes,
            _ => 0,
        }
    }

    /// Returns the maximum bytes of a group. A group lies in one segment, so a smaller segment limits it.
    fn max_group_bytes(&self) -> usize {
        usize::try_from(self.config.segment_bytes).map_or(MAX_GROUP_BYTES, |bytes| bytes.min(MAX_GROUP_BYTES))
    }

    /// Appends the group and ends the turn, in the middle of an input.
    fn finish_group(&mut self) {
        self.flush();
        self.finish_turn();
    }

    /// Handles a command other than an append.
    async fn handle_admin_command(&mut self, command: ActorCommand) {
        match command {
            ActorCommand::Append(_) => unreachable!("process_commands handles appends"),
            ActorCommand::UpdateConfig(config) => self.configure(config),
            ActorCommand::DescribeSegments(responder) => {
                // Without writes, only this command detects a segment sync that failed after the journal write.
                if let Some(reason) = self.log.write_error() {
                    self.fail(&reason);
                }
                self.log.correct_written_times(clock::wall_ms());
                let _dropped_receiver = responder.send(LocalSegments {
                    sealed: self.log.sealed(),
                    active: self.log.active_segment(),
                    active_age: self.active_since.map(|since| since.elapsed()),
                    awaits_tier: self.awaits_tier(),
                    leads: match &self.role {
                        RoleState::Leading(LeaderRole { leader, .. }) => {
                            Some((leader.epoch(), leader.in_sync().is_epoch_committed()))
                        }
                        _ => None,
                    },
                });
            }
            ActorCommand::ExportSegment(base, responder) => {
                let _dropped_receiver = responder.send(self.export(base).await);
            }
            ActorCommand::Roll => self.roll_now(),
            ActorCommand::ApplyTierState(state) => self.apply_tier_state(&state),
            ActorCommand::Evict(below) => self.evict(below).await,
        }
    }

    /// Applies a changed topic configuration, and queues maintenance.
    fn configure(&mut self, config: Arc<TopicConfig>) {
        self.log.set_journaled(config.durability == Durability::Persisted);
        self.log.set_producer_expiration(config.producer_expiration);
        if let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role {
            leader.configure(isr_rules(&config, self.lag_ms));
        }
        self.config = config;
        self.maintenance.push(self.id);
    }

    /// Returns true if a writer waits for the object store.
    fn awaits_tier(&self) -> bool {
        matches!(&self.role, RoleState::Leading(LeaderRole { leader, .. }) if leader.awaits_tier())
    }

    /// Returns the high watermark: all records of this log below it are committed.
    fn high_watermark(&self) -> Offset {
        match &self.role {
            RoleState::Leading(LeaderRole { leader, .. }) => leader.high_watermark(),
            RoleState::Following(follower) => follower.high_watermark().min(self.log.log_end()),
            RoleState::Idle => self.committed_end.min(self.log.log_end()),
        }
    }

    /// Publishes the watermarks, the size and age of the local log, the need for ticks, and the replica status. Called
    /// at the start, by [`Self::finish_turn`], and for the events that publish earlier, which the module documentation
    /// lists. Also queues maintenance if a segment may have become uploadable, and ends the wait for late metadata if
    /// the metadata is no longer late.
    fn publish(&mut self) {
        let high_watermark = self.high_watermark();
        let watermarks = Watermarks {
            // A replica that is behind may have received a log start or a tiered end that it has not reached.
            log_start: self.log_start.min(high_watermark),
            local_start: self.log.local_start(),
            tiered_end: self.tiered_end.min(high_watermark),
            high_watermark,
            persisted_end: self.log.persisted_end(),
            log_end: self.log.log_end(),
        };
        sim_event!(WatermarksPublished { partition: self.id, watermarks, role: self.sim_role() });
        let (published_high_watermark, sealed_end) =
            (self.published.watermarks().high_watermark, self.log.active_segment().base);
        let commits_sealed =
            published_high_watermark < watermarks.high_watermark && published_high_watermark < sealed_end;
        if commits_sealed && (sealed_end <= watermarks.high_watermark || self.awaits_tier()) {
            // The last sealed segment has just become uploadable, or perhaps an earlier one, for which a writer waits.
            self.maintenance.push(self.id);
        }
        self.published.publish(watermarks, self.log.bytes());
        self.published.set_active_since(self.active_since);
        let leader_wants_ticks =
            matches!(&self.role, RoleState::Leading(LeaderRole { leader, .. }) if leader.in_sync().wants_ticks());
        let awaits_metadata = self.awaits_metadata();
        self.published.set_wants_ticks(leader_wants_ticks || awaits_metadata);
        if !awaits_metadata {
            self.metadata.stop_waiting();
        }
        let status = self.current_status();
        if status != self.status {
            self.status = status;
            self.published.publish_status(status);
            if status.role == (ReplicaRole::Leader { epoch_committed: true }) {
                // Uploads may start now: a leader uploads nothing before its epoch is committed.
                self.maintenance.push(self.id);
            }
        }
    }

    /// Reports the log that was found on the disk to the simulator's checker.
    #[cfg(feature = "sim")]
    fn report_opened(&self) {
        let epochs: Vec<_> = self.log.epochs().iter().collect();
        sim_event!(ReplicaOpened { partition: self.id, epochs: &epochs, end: self.log.log_end() });
    }

    /// Returns the role, for the simulator's checker.
    #[cfg(feature = "sim")]
    fn sim_role(&self) -> SimRole {
        match &self.role {
            RoleState::Idle => SimRole::Idle,
            RoleState::Following(follower) => SimRole::Following(follower.epoch()),
            RoleState::Leading(LeaderRole { leader, .. }) => {
                let (revision, min_insync) = (leader.in_sync().revision().0, leader.in_sync().rules().min_insync);
                SimRole::Leading { epoch: leader.epoch(), revision, min_insync }
            }
        }
    }

    /// Applies signals of the journal, the followers, the clock and the writers.
    fn on_signals(&mut self, pending: PendingSignals) {
        if let Some(outcome) = pending.persisted {
            self.on_persisted(outcome);
        }
        if !pending.acks.is_empty() {
            self.on_acknowledged(pending.acks);
        }
        if let Some(now_ms) = pending.now_ms {
            self.update_isr_tracker(|in_sync| in_sync.tick(now_ms));
            self.check_late_metadata(now_ms);
        }
        if let RoleState::Leading(role) = &mut self.role {
            role.has_dropped_waiters |= pending.has_dropped_waiters;
        }
    }
}

/// Returns the requirements of a topic and this broker on a leader.
fn isr_rules(config: &TopicConfig, lag_ms: u64) -> IsrRules {
    IsrRules { durability: config.durability, min_insync: config.min_insync_replicas, lag_ms }
}

#[cfg(test)]
mod tests;
