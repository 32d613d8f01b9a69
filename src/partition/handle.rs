//! The handle of one replica: the broker and its replication links use a partition through it.
//!
//! The handle reads state without the task: what the task published, the log, the tier, and the tier state that the
//! handle received. Writes, metadata, messages of links and commands go to the task, by its queues and signals.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{
        OwnedSemaphorePermit,
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    time::Instant,
};

use super::{
    actor::{
        Actor, ActorCommand, ActorConfig, ActorSignals, Append, AppendError, AppendResult, BatchOrigin, ControlMessage,
        Inbox, Stored, SubscribeMessage,
    },
    context::PartitionContext,
    lag::FollowerLag,
    leader::{
        divergence::LogPosition,
        isr::ProposalOutcome,
        member::{BrokerStatus, DisconnectCause, PeerId, ReplicaProgress},
    },
    maintenance_queue::MaintenanceQueue,
    published::PublishedState,
    read::{PartitionReader, TailReader},
    role::{LinkEvent, LocalSegments, PartitionAssignment, QueueFull, ReplicaStatus, SubscribeResponse, WatermarkKind},
    wake::WakeSet,
};
use crate::{
    log::{ChangeError, DataDir, LogReader, ReplicaError, ReplicaLog},
    model::{Acks, BrokerId, LeaderEpoch, Offset, PartitionId, TopicConfig, TopicName, Watermarks},
    record::{Batch, Fingerprint},
    task::{Tasks, lock::Mutex},
    tier::{PartitionTier, TierState},
};

/// Capacity of a partition's command queue and of its control queue, in messages. The permits of appends and the send
/// windows of links bound the bytes.
const COMMAND_QUEUE_LEN: usize = 1024;

/// Maximum time that a subscription waits until this broker leads in the subscription's epoch.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Parameters for opening a partition.
#[derive(Clone)]
pub struct ReplicaSpec {
    pub id: PartitionId,
    pub topic: TopicName,
    pub config: Arc<TopicConfig>,
    /// Log start and tier state committed in the metadata store; `None` before the first commit.
    pub committed: Option<TierState>,
    /// The partition's tier, if this broker has an object store.
    pub tier: Option<PartitionTier>,
    /// True if this broker is standalone: the metadata is in the same data directory, and there is no other replica. If
    /// the log ends below the committed end (the later of tiered end and log start), it is reset to that end. If this
    /// broker is not standalone, the open fails with [`PartitionError::Lost`] instead, unless `discard_local` is set.
    pub standalone: bool,
    /// True if the local replica, if any, is deleted before the open: the new replica starts empty and copies. Allowed
    /// only for a replica without files, for a replica outside ISR and ELR, and for an unusable replica that an
    /// operator elected. The latter resets its log to the committed end before it leads.
    pub discard_local: bool,
    /// `replication.max_lag_time`: maximum time in which an ISR member must reach the log end that was current when the
    /// time started.
    pub max_lag_time: Duration,
}

/// Error of [`Partition::open`].
#[derive(Debug, thiserror::Error)]
pub enum PartitionError {
    /// The local replica could not be opened or deleted.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The replica could not be reset to the committed end.
    #[error("cannot reset the replica to the committed end: {0}")]
    Reset(#[from] ChangeError),
    /// The local log ends below the tiered end or the log start, so it lacks committed records. This broker is not
    /// standalone.
    #[error(
        "the replica of partition {id} ends at {log_end}, below {committed}, the end of the object store or the log \
         start: its log is copied again once another replica leads"
    )]
    Lost {
        id: PartitionId,
        /// Log end of the local replica.
        log_end: Offset,
        /// The later of tiered end and log start: all records below it were committed.
        committed: Offset,
    },
}

/// Handle of one partition's task.
pub struct Partition {
    id: PartitionId,
    topic: TopicName,
    /// Queue for writes, maintenance and changes of the configuration. Senders wait for space.
    commands: mpsc::Sender<ActorCommand>,
    /// Queue for metadata, messages of links and outcomes of requests to the metadata store. These messages do not wait
    /// behind writes.
    control: mpsc::Sender<ControlMessage>,
    signals: Arc<ActorSignals>,
    pub(super) published: Arc<PublishedState>,
    reader: PartitionReader,
    log_reader: LogReader,
    pub(super) tier: Option<PartitionTier>,
    /// Newest tier state that this broker received as committed in the metadata store.
    committed: Mutex<Option<TierState>>,
    /// Held during a maintenance step, so that one step runs at a time.
    pub(super) maintenance_lock: tokio::sync::Mutex<()>,
    tasks: Tasks,
}

impl Partition {
    /// Opens the replica and starts the partition's task, which is idle until its first [assignment](Self::assign).
    /// Blocks on files: call it from a thread that may block.
    pub fn open(
        broker: BrokerId,
        log: &DataDir,
        spec: ReplicaSpec,
        ctx: PartitionContext,
        maintenance: &MaintenanceQueue,
        parent: &Tasks,
    ) -> Result<Arc<Self>, PartitionError> {
        let committed = spec.committed.clone().unwrap_or_default();
        let (log_start, tiered_end) = (committed.log_start, committed.tiered_end());
        let replica = open_replica(log, &spec, log_start.max(tiered_end))?;
        // A replica of several may hold uncommitted records of a deposed leader, even below the end up to which other
        // replicas have committed. Only the records below the local start are certain to have been committed.
        let committed_end = if spec.standalone { log_start.max(tiered_end) } else { replica.local_start() };
        let tasks = parent.child();
        let published = Arc::new(PublishedState::new(spec.config, tasks.clone()));
        let log_reader = replica.reader();
        let reader = PartitionReader::new(spec.id, Arc::clone(&published), log_reader.clone(), spec.tier.clone());
        let (commands, command_receiver) = mpsc::channel(COMMAND_QUEUE_LEN);
        let (control, control_receiver) = mpsc::channel(COMMAND_QUEUE_LEN);
        let signals = Arc::new(ActorSignals::default());
        let actor = Actor::new(ActorConfig {
            broker,
            id: spec.id,
            topic: spec.topic.clone(),
            replica,
            published: Arc::clone(&published),
            signals: Arc::clone(&signals),
            ctx,
            maintenance: maintenance.clone(),
            tier: spec.tier.clone(),
            log_start,
            tiered_end,
            committed_end,
            lag_ms: u64::try_from(spec.max_lag_time.as_millis()).unwrap_or(u64::MAX),
            control: control.downgrade(),
            inbox: Inbox::new(Arc::clone(&signals), control_receiver, command_receiver, tasks.clone()),
            tasks: tasks.clone(),
        });
        tasks.spawn("partition", actor.run());
        Ok(Arc::new(Self {
            id: spec.id,
            topic: spec.topic,
            commands,
            control,
            signals,
            published,
            reader,
            log_reader,
            tier: spec.tier,
            committed: Mutex::new(spec.committed),
            maintenance_lock: tokio::sync::Mutex::default(),
            tasks,
        }))
    }

    pub fn id(&self) -> PartitionId {
        self.id
    }

    pub fn topic(&self) -> &TopicName {
        &self.topic
    }

    /// Queues a write; waits only for space in the queue. `batch` may be a recompressed form of the batch that the
    /// client sent. `sent` is the fingerprint of the client's batch, or `None` if the client sent records. `permit` is
    /// the memory of the write. The task holds the permit until the result. With `acks=tiered`, or after the receiver
    /// was dropped, the task releases the permit once the write has the topic's durability on this broker. Writes are
    /// appended in the order in which calls of this function return. The receiver gets the result when the write has
    /// failed or `acks` holds. Dropping the receiver does not cancel the write.
    pub async fn append(
        &self,
        batch: Batch,
        sent: Option<Fingerprint>,
        acks: Acks,
        permit: OwnedSemaphorePermit,
    ) -> oneshot::Receiver<AppendResult> {
        let origin = BatchOrigin { fingerprint: sent, timestamps: batch.timestamp_range(), refusal: None };
        self.append_tracked(batch, origin, acks, permit, None).await
    }

    /// Queues a write as [`Self::append`] does, with the origin of its batch. With `acks=tiered` the task puts the
    /// offsets into `stored` when the write has the topic's durability on this broker. The write then waits only for
    /// the object store.
    pub async fn append_tracked(
        &self,
        batch: Batch,
        origin: BatchOrigin,
        acks: Acks,
        permit: OwnedSemaphorePermit,
        stored: Option<Stored>,
    ) -> oneshot::Receiver<AppendResult> {
        let (responder, receiver) = oneshot::channel();
        let append = Box::new(Append { batch, origin, acks, permit, responder, stored });
        if let Err(mpsc::error::SendError(ActorCommand::Append(append))) =
            self.commands.send(ActorCommand::Append(append)).await
        {
            let _receiver_dropped = append.responder.send(Err(AppendError::Closing));
        }
        receiver
    }

    /// Notifies the task that a writer dropped its receiver before the result. The task releases the memory of that
    /// write as soon as the write has the topic's durability on this broker. Never waits.
    pub fn on_waiter_dropped(&self) {
        self.signals.on_waiter_dropped();
    }

    /// Returns the newest log start that this broker received as committed in the metadata store; 0 before the first.
    /// All records below it are deleted. The value is valid in every role.
    pub fn committed_log_start(&self) -> Offset {
        self.committed().map_or(Offset::ZERO, |state| state.log_start)
    }

    pub fn reader(&self) -> &PartitionReader {
        &self.reader
    }

    pub fn watermarks(&self) -> Watermarks {
        self.published.watermarks()
    }

    /// Returns the replica's role, leader epoch and leader.
    pub fn status(&self) -> ReplicaStatus {
        self.published.status()
    }

    /// Returns the leader epoch of the partition value that the task applied last; 0 before the first.
    pub fn epoch(&self) -> LeaderEpoch {
        self.published.epoch()
    }

    pub fn config(&self) -> Arc<TopicConfig> {
        self.published.config()
    }

    /// Publishes a changed configuration and queues it for the task. Every write that is queued after this returns uses
    /// the new configuration.
    pub async fn update_config(&self, config: Arc<TopicConfig>) {
        // Requests are checked against the published configuration before they reach the task.
        self.published.configure(Arc::clone(&config));
        let _stopped = self.commands.send(ActorCommand::UpdateConfig(config)).await;
    }

    /// Returns the bytes of the replica on this broker's disk.
    pub fn local_bytes(&self) -> u64 {
        self.published.local_bytes()
    }

    /// Returns the bytes of the partition in the object store; 0 if this broker has no object store.
    pub fn tiered_bytes(&self) -> u64 {
        self.tier.as_ref().map_or(0, PartitionTier::bytes)
    }

    /// Returns the number of segments with timestamps in the future, by the last retention plan; 0 if this broker did
    /// not lead at that time.
    pub fn future_segments(&self) -> u64 {
        self.published.future_segments()
    }

    /// Returns the error that stopped writes to the replica for good; `None` if there was none. A full disk is no such
    /// error.
    pub fn error(&self) -> Option<Arc<str>> {
        self.published.error()
    }

    /// Returns true if the first batch in the active segment is at least `segment.ms` old, so that the segment must be
    /// sealed.
    pub fn roll_is_due(&self, now: Instant) -> bool {
        self.published.active_age(now).is_some_and(|age| age >= self.published.config().segment_age)
    }

    /// Returns true if retention may have work: records in either tier, or local segments of deleted records.
    pub fn may_need_retention(&self) -> bool {
        let watermarks = self.watermarks();
        watermarks.log_start.min(watermarks.local_start) < watermarks.log_end
    }

    /// Sends metadata to the task, and returns when the task has applied or dropped it, or has ended. Later requests to
    /// the partition find the new role. The caller passes values in the order of their revisions; the task drops a
    /// value that is older than the applied one.
    pub async fn assign(&self, assignment: PartitionAssignment) {
        if let Some(state) = &assignment.committed {
            self.update_tier_state(state);
        }
        let (done, applied) = oneshot::channel();
        self.send_control(ControlMessage::Assign(Box::new(assignment), done)).await;
        let _stopped = applied.await;
    }

    /// Applies a changed status of a broker in the metadata cache.
    pub async fn on_broker_status(&self, broker: BrokerId, status: BrokerStatus) {
        self.send_control(ControlMessage::BrokerStatusChanged(broker, status)).await;
    }

    /// Returns true if the task needs ticks ([`Self::tick`]) at intervals. Either it leads, and an ISR member is behind
    /// or the next ISR proposal waits for metadata or a tick. Or it is idle because its metadata is late.
    pub fn wants_ticks(&self) -> bool {
        self.published.wants_ticks()
    }

    /// Sends the time, so that the task checks for lagging members and for late metadata, and repeats a refused ISR
    /// proposal. Never waits; replaces an earlier time that the task has not handled. All calls pass the time of the
    /// same monotonic clock.
    pub fn tick(&self, now_ms: u64) {
        self.signals.tick(now_ms);
    }

    /// Delivers the outcome of a request that the task sent to [`IsrUpdater`](super::context::IsrUpdater).
    pub async fn on_isr_outcome(&self, outcome: ProposalOutcome) {
        self.send_control(ControlMessage::IsrOutcome(Box::new(outcome))).await;
    }

    /// Handles a subscription of a follower in `epoch`, and returns the response. Waits up to a second until this
    /// broker leads in that epoch, because this broker may receive the metadata later than the follower. A newer epoch,
    /// or the end of the partition, ends the wait.
    pub async fn subscribe(
        &self,
        peer: PeerId,
        epoch: LeaderEpoch,
        position: LogPosition,
        progress: ReplicaProgress,
    ) -> SubscribeResponse {
        let _timed_out = tokio::time::timeout(SUBSCRIBE_TIMEOUT, self.published.wait_until_leading(epoch)).await;
        let (responder, response) = oneshot::channel();
        self.send_control(ControlMessage::Subscribe(Box::new(SubscribeMessage {
            peer,
            epoch,
            position,
            progress,
            responder,
        })))
        .await;
        let closing =
            |_stopped| SubscribeResponse::rejected(self.epoch(), "the partition is closing on this broker".to_owned());
        response.await.unwrap_or_else(closing)
    }

    /// Sends an acknowledgement of a follower to the task, and updates the follower's lag. Never waits; replaces an
    /// earlier acknowledgement of that follower that the task has not handled.
    pub fn on_acknowledged(&self, peer: PeerId, epoch: LeaderEpoch, progress: ReplicaProgress) {
        self.published.acknowledged(peer.broker, progress.log_end);
        self.signals.on_acknowledged(peer, epoch, progress);
    }

    /// Calls `report` with the lag of each of these replicas, which must be all replicas of the partition. Makes no
    /// call while this broker does not lead.
    pub fn for_each_lag(&self, replicas: &[BrokerId], now: Instant, report: impl FnMut(BrokerId, FollowerLag)) {
        self.published.for_each_lag(replicas, now, report);
    }

    /// Reports to the task that a follower is disconnected, and why.
    pub async fn on_follower_disconnected(&self, peer: PeerId, cause: DisconnectCause) {
        self.send_control(ControlMessage::FollowerDisconnected(peer, cause)).await;
    }

    /// Reports a leader epoch that a follower sent and that the caller has found in the metadata store. A leader of an
    /// older epoch becomes idle. The leader stays idle until it receives metadata with the reported epoch. A read of
    /// the store that shows that the store does not have that epoch also ends the idle state.
    pub async fn report_newer_epoch(&self, reported: LeaderEpoch) {
        self.send_control(ControlMessage::NewerEpoch(reported)).await;
    }

    /// Returns a reader of the log up to its end, for the current leader epoch. Its reads fail while this broker does
    /// not lead in that epoch. The epoch may have changed since the response to a subscription, so the caller compares
    /// the epoch of the response with [`TailReader::epoch`].
    pub fn tail(&self) -> TailReader {
        TailReader::new(Arc::clone(&self.published), self.log_reader.clone())
    }

    /// Delivers an event of the link over which this replica follows its leader. Events are handled in order. Never
    /// waits.
    ///
    /// # Errors
    /// [`QueueFull`] if the control queue is full. The event is dropped, so the caller must deliver it again or end the
    /// subscription: the task cannot apply later events without this one.
    pub fn on_link_event(&self, event: LinkEvent) -> Result<(), QueueFull> {
        match self.control.try_send(ControlMessage::Link(event)) {
            // An event for a task that has ended changes nothing.
            Ok(()) | Err(TrySendError::Closed(_)) => Ok(()),
            Err(TrySendError::Full(_)) => Err(QueueFull),
        }
    }

    /// Returns the log end and the persisted end. A follower sends them to its leader as its acknowledgement.
    pub fn progress(&self) -> ReplicaProgress {
        self.published.progress()
    }

    /// Returns the newest epoch in the log's epoch history; `None` if the history is empty.
    pub fn last_epoch(&self) -> Option<LeaderEpoch> {
        self.log_reader.last_epoch()
    }

    /// Marks `index` in `wake_set` now, and whenever that watermark moves, the replica status changes or the partition
    /// is closed.
    pub fn add_listener(&self, wake_set: &Arc<WakeSet>, index: usize, watermark: WatermarkKind) {
        self.published.add_listener(wake_set, index, watermark);
    }

    /// Applies a tier state, with its log start, that the metadata store committed, unless a newer state is applied
    /// already. Commands that are sent after this returns find the state applied. The task treats the epoch of the
    /// state like a reported epoch.
    pub async fn apply_tier_state(&self, state: TierState) {
        self.update_tier_state(&state);
        self.command(ActorCommand::ApplyTierState(Box::new(state))).await;
    }

    /// Stops the task, and returns after it has ended. The task rejects queued writes, waits for the journal, and
    /// acknowledges the writes whose acks rule holds by then. All other writes fail.
    pub async fn stop(&self) {
        self.tasks.stop().await;
    }

    /// Replaces the tier state of this handle and of the partition's tier, unless they have a newer one. The caller
    /// sends the state to the task.
    fn update_tier_state(&self, state: &TierState) {
        if let Some(tier) = &self.tier {
            tier.apply_state(state.clone());
        }
        let mut committed = self.committed.lock();
        let sort_key = |state: &TierState| (state.version(), state.log_start, state.epoch);
        if committed.as_ref().is_none_or(|current| sort_key(current) <= sort_key(state)) {
            *committed = Some(state.clone());
        }
    }

    /// Returns the newest tier state that this broker received as committed; `None` before the partition's first tier
    /// commit.
    pub(super) fn committed(&self) -> Option<TierState> {
        self.committed.lock().clone()
    }

    /// Queues a command; waits for space in the queue. The command is dropped if the task has ended.
    pub(super) async fn command(&self, command: ActorCommand) {
        let _stopped = self.commands.send(command).await;
    }

    /// Returns the segments on this broker's disk, and the state of the task that maintenance needs; `None` if the task
    /// has ended.
    pub(super) async fn describe_segments(&self) -> Option<LocalSegments> {
        let (responder, segments) = oneshot::channel();
        self.command(ActorCommand::DescribeSegments(responder)).await;
        segments.await.ok()
    }

    /// Queues a control message; waits for space in the queue. The message is dropped if the task has ended.
    async fn send_control(&self, message: ControlMessage) {
        let _stopped = self.control.send(message).await;
    }
}

/// Opens the replica of `spec`, after its deletion if `spec.discard_local`. All records below `committed` were
/// committed, so a log that ends below it lacks committed records. A standalone broker then resets the log to
/// `committed`; any other broker returns [`PartitionError::Lost`]. A replica that was deleted on purpose is returned
/// empty.
fn open_replica(log: &DataDir, spec: &ReplicaSpec, committed: Offset) -> Result<ReplicaLog, PartitionError> {
    if spec.discard_local {
        log.delete_replica(spec.id)?;
    }
    // An empty replica of several starts at 0. Its leader then chooses the bootstrap offset, and the epoch history and
    // producer state before that offset come from the object store or the leader.
    let start = if spec.standalone { committed } else { Offset::ZERO };
    let mut replica = log.open_replica(spec.id, start)?;
    let log_end = replica.log_end();
    if log_end >= committed || spec.discard_local {
        return Ok(replica);
    }
    if !spec.standalone {
        return Err(PartitionError::Lost { id: spec.id, log_end, committed });
    }
    // The disk was lost, or restored from a copy. The log restarts after the tiered and the deleted records, so that no
    // offset is assigned twice.
    tracing::warn!(
        topic = %spec.topic, partition = %spec.id, %log_end, %committed,
        "the log on this disk ends before \"committed\", the end of the object store or the log start, as after a \
         restore of the disk from an older copy: the log is emptied and continues at \"committed\"; records from there \
         on that only the earlier disk held are lost"
    );
    replica.reset(committed)?;
    Ok(replica)
}

#[cfg(test)]
mod tests;
