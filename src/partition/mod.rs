//! A partition replica on this broker: its task, its readers and its maintenance.
//!
//! # Overview
//!
//! ```text
//!   writers ──append──▶ queue ──▶ actor ──▶ log (page cache) ──▶ journal (one sync for all partitions)
//!                                   │  ▲                             │
//!                                leader └────── persisted ───────────┘
//!                                   │
//!                              watermarks ──▶ readers: memory ─▶ disk ─▶ object store
//!                                   │  ▲
//!         followers ◀── tail reader ┘  └── acknowledgements
//!
//!   leader's broker ──link──▶ control ─▶ actor ──▶ log ──▶ journal ──▶ log end, persisted end: acknowledged to the leader
//!                                   │
//!                               follower
//!
//!   maintenance: plan (retention) ── roll, move the log start, upload, commit, evict
//! ```
//!
//! [`Partition`] is the handle of one replica; it exists as long as this broker holds the replica. Its task (`actor`)
//! owns the log. By its [role](ReplicaRole) the task applies the decisions of [`leader`], applies those of
//! [`follower`], or is idle. Only the metadata sets the role ([`Partition::assign`]). The task sends its requests to
//! links and to the metadata store through [`PartitionContext`] and never waits for an outcome. Readers send no request
//! to the task: they read the watermarks that the task publishes. Maintenance (`maintenance`) uploads sealed segments
//! and removes old ones, by the plan of [`retention`]. Its order makes a crash harmless: object, manifest, commit in
//! the metadata store, and only then local files.
//!
//! # Invariants
//!
//! - `log_start ≤ high_watermark ≤ log_end` and `tiered_end ≤ high_watermark`.
//! - `local_start` may lie below `log_start` until the files are evicted. It lies above `log_start` only if the object
//!   store has all records between: then `log_start ≤ local_start ≤ tiered_end`.
//! - `tiered_end` may lie below `log_start` if nothing is uploaded, or if deletion overtook the uploads. It describes
//!   the object store and nothing else.
//! - Each write is acknowledged once, and not before its acks rule holds.
//! - Only committed records are uploaded. Only records in the object store or below the log start are evicted. The
//!   metadata store commits a new log start before any record is deleted.
//! - A task appends writes only while it leads, and leads at most once in an epoch. It never applies the metadata
//!   store's response to a request of one epoch as the response to a request of another epoch.
//! - A follower's high watermark comes from a leader that found the two logs to agree; a leader's comes from its own
//!   commits. A commit by other replicas up to an offset does not show that the records of this log below that offset
//!   are committed.
//! - Before the log is truncated, the task publishes its role and ends its subscription. So a reader of a leader's log
//!   finds its epoch ended, and nothing is acknowledged in an epoch whose records are being removed.
//!
//! # Change of role
//!
//! Readers stay open. A writer whose records are in the log receives [`AppendError::Deposed`]: the outcome is unknown.
//! A writer whose records were not appended receives [`AppendError::NotLeader`]. An idempotent producer may retry both.
//!
//! # Crash and shutdown
//!
//! A crash loses only unacknowledged records, and leaks at most orphan objects. A crash between a truncation and the
//! next subscription leaves a truncated log, which subscribes at its new end. On a stop the task unsubscribes from its
//! leader, rejects queued writes, waits for the journal and completes the writes that the journal covers. A disk that
//! accepts no writes ends leadership and copying; reads continue.

pub mod follower;
pub mod leader;
pub mod retention;

mod actor;
mod bootstrap;
mod context;
mod decompressor;
mod lag;
mod listeners;
mod maintenance;
mod maintenance_queue;
mod memory_budget;
mod published;
mod reader;
mod rebuild;
mod replicated;
pub mod replication;
mod role;
mod tail_reader;
mod undecodable;
mod wake_set;

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::Instant,
};

use self::{
    actor::{Actor, ActorConfig, ActorSignals, Append, ControlMessage, PartitionCommand},
    published::PublishedState,
};
pub use self::{
    actor::{AppendError, AppendResult, BatchOrigin, Stored},
    context::{IsrUpdater, PartitionContext, PartitionCounters, ReplicationLinks},
    decompressor::{DecompressPurpose, Decompressor, INLINE_BYTES},
    lag::FollowerLag,
    leader::{AckDurability, AdmitError, WriteAck},
    maintenance::{MaintenanceError, MaintenanceResult, MaintenanceRunner},
    maintenance_queue::MaintenanceQueue,
    memory_budget::{Charge, MemoryBudget},
    reader::{FetchedBatches, PartitionReader, ReadError, ReadSource},
    role::{
        BootstrapTables, LinkEvent, PartitionAssignment, QueueFull, ReplicaRole, ReplicaStatus, SubscribeOutcome,
        SubscribeResponse, WatermarkKind,
    },
    tail_reader::TailReader,
    wake_set::WakeSet,
};
use crate::{
    log::{ChangeError, DataDir, ReplicaError, ReplicaLog},
    model::{Acks, BrokerId, LeaderEpoch, Offset, PartitionId, TopicConfig, TopicName, Watermarks},
    record::{Batch, Fingerprint},
    task::Tasks,
    tier::{PartitionTier, TierState},
};

/// Capacity of a partition's command queue and of its control queue, in messages. The permits of appends and the send
/// windows of links bound the bytes.
const COMMAND_QUEUE_LEN: usize = 1024;

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
    /// True if this broker is standalone: the metadata is in the same data directory, and there is no other replica. A
    /// log that ends below the committed end is then reset to that end. Otherwise the open fails with
    /// [`PartitionError::Lost`].
    pub standalone: bool,
    /// True if the local replica, if any, is deleted before the open: the new replica starts empty and copies. Allowed
    /// only for a replica outside ISR and ELR, and for an unusable replica that an operator elected: that one
    /// bootstraps at the end of the object store.
    pub discard_local: bool,
    /// `replication.max_lag_time`: maximum time in which an ISR member must reach the log end that was current when the
    /// time started.
    pub max_lag_time: Duration,
}

/// Error of [`Partition::open`].
#[derive(Debug, thiserror::Error)]
pub enum PartitionError {
    /// The local replica is unusable.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The replica could not be reset to the committed end.
    #[error("cannot reset the replica to the committed end: {0}")]
    Reset(#[from] ChangeError),
    /// The local log ends below the tiered end or the log start. The log lacks committed records at its end.
    #[error(
        "the replica of partition {id} ends at {log_end}, below {committed}, the end of the object store or the log \
         start: the replica must copy its log again"
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
    mailbox: mpsc::Sender<PartitionCommand>,
    control: mpsc::Sender<ControlMessage>,
    signals: Arc<ActorSignals>,
    published: Arc<PublishedState>,
    reader: PartitionReader,
    tail: crate::log::LogReader,
    tier: Option<PartitionTier>,
    /// Newest tier state that this broker received as committed in the metadata store.
    committed: Mutex<Option<TierState>>,
    /// Held during a maintenance step, so that one step runs at a time.
    maintenance: tokio::sync::Mutex<()>,
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
        // A replica among several may hold uncommitted records of a deposed leader, also below the committed end of its
        // peers. Only evicted records are certain to have been committed.
        let committed_end = if spec.standalone { log_start.max(tiered_end) } else { replica.local_start() };
        let tasks = parent.child();
        let published = Arc::new(PublishedState::new(spec.config, tasks.clone()));
        let tail = replica.reader();
        let reader = PartitionReader::new(spec.id, Arc::clone(&published), tail.clone(), spec.tier.clone());
        let (mailbox, commands) = mpsc::channel(COMMAND_QUEUE_LEN);
        let (control, control_messages) = mpsc::channel(COMMAND_QUEUE_LEN);
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
            orders: control.downgrade(),
            tasks: tasks.clone(),
        });
        tasks.spawn("partition", actor.run(commands, control_messages));
        let (id, topic, tier, committed) = (spec.id, spec.topic, spec.tier, Mutex::new(spec.committed));
        let maintenance = tokio::sync::Mutex::default();
        Ok(Arc::new(Self {
            id,
            topic,
            mailbox,
            control,
            signals,
            published,
            reader,
            tail,
            tier,
            committed,
            maintenance,
            tasks,
        }))
    }

    pub fn id(&self) -> PartitionId {
        self.id
    }

    pub fn topic(&self) -> &TopicName {
        &self.topic
    }

    /// Queues a write; waits only for space in the queue. `sent` is the fingerprint of the batch that the client sent,
    /// of which `batch` may be a changed form; it is `None` if the client sent records. Writes are appended in the
    /// order in which calls of this function return. The receiver gets the result when `acks` holds. Dropping the
    /// receiver does not cancel the write.
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
    /// offsets into `stored` when the write is stored on this broker and waits only for the object store.
    pub async fn append_tracked(
        &self,
        batch: Batch,
        origin: BatchOrigin,
        acks: Acks,
        permit: OwnedSemaphorePermit,
        stored: Option<Stored>,
    ) -> oneshot::Receiver<AppendResult> {
        let (responder, receiver) = oneshot::channel();
        let append = Box::new(Append { batch, origin, acks, permit, answer: responder, stored });
        if let Err(mpsc::error::SendError(PartitionCommand::Append(append))) =
            self.mailbox.send(PartitionCommand::Append(append)).await
        {
            let _gone = append.answer.send(Err(AppendError::Closing));
        }
        receiver
    }

    /// Notifies the task that a writer dropped its receiver before the result. The task releases the memory of that
    /// write as soon as the write is safe on this broker. Never waits.
    pub fn on_waiter_dropped(&self) {
        self.signals.on_waiter_dropped();
    }

    /// Returns the log start committed in the metadata store: all records below it are deleted. It is valid in every
    /// role.
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

    /// Returns the newest leader epoch in the metadata that this partition received.
    pub fn epoch(&self) -> LeaderEpoch {
        self.published.epoch()
    }

    pub fn config(&self) -> Arc<TopicConfig> {
        self.published.config()
    }

    /// Applies a changed configuration. It holds for every write that is queued after this returns.
    pub async fn update_config(&self, config: Arc<TopicConfig>) {
        // Requests are checked against the published configuration before they reach the task.
        self.published.configure(Arc::clone(&config));
        let _stopped = self.mailbox.send(PartitionCommand::UpdateConfig(config)).await;
    }

    /// Returns the bytes of the replica on this broker's disk.
    pub fn local_bytes(&self) -> u64 {
        self.published.local_bytes()
    }

    /// Returns the bytes of the partition in the object store.
    pub fn tiered_bytes(&self) -> u64 {
        self.tier.as_ref().map_or(0, PartitionTier::bytes)
    }

    /// Returns the number of segments with timestamps in the future, by the last retention plan; 0 while this broker
    /// does not lead.
    pub fn future_segments(&self) -> u64 {
        self.published.future_segments()
    }

    /// Returns the error that stopped writes to the replica, if any.
    pub fn error(&self) -> Option<Arc<str>> {
        self.published.error()
    }

    /// Returns true if the active segment is old enough to be sealed.
    pub fn roll_is_due(&self, now: Instant) -> bool {
        self.published.active_age(now).is_some_and(|age| age >= self.published.config().segment_age)
    }

    /// Returns true if retention may have work: records in either tier, or local files of deleted records.
    pub fn holds_any(&self) -> bool {
        let watermarks = self.watermarks();
        watermarks.log_start.min(watermarks.local_start) < watermarks.log_end
    }

    /// Stops the task. The task rejects queued writes, waits until written records are durable, and responds to their
    /// writers.
    pub async fn stop(&self) {
        self.tasks.stop().await;
    }

    /// Applies a tier state and log start that the metadata store committed, unless a newer state is known. Commands
    /// sent after this returns find the state applied.
    pub async fn apply_tier_state(&self, state: TierState) {
        self.record_tier_state(&state);
        self.command(PartitionCommand::ApplyTierState(Box::new(state))).await;
    }

    fn record_tier_state(&self, state: &TierState) {
        if let Some(tier) = &self.tier {
            tier.apply_state(state.clone());
        }
        let mut committed = self.committed.lock();
        let age = |state: &TierState| (state.version(), state.log_start, state.epoch);
        if committed.as_ref().is_none_or(|known| age(known) <= age(state)) {
            *committed = Some(state.clone());
        }
    }

    fn committed(&self) -> Option<TierState> {
        self.committed.lock().clone()
    }

    async fn command(&self, command: PartitionCommand) {
        let _stopped = self.mailbox.send(command).await;
    }
}

/// Opens the replica of `spec`. All records below `committed` were committed.
fn open_replica(log: &DataDir, spec: &ReplicaSpec, committed: Offset) -> Result<ReplicaLog, PartitionError> {
    if spec.discard_local {
        log.delete_replica(spec.id)?;
    }
    // A replica that copies starts empty. Its leader chooses the bootstrap offset, and the object store has the tables
    // for that offset.
    let start = if spec.standalone { committed } else { Offset::ZERO };
    let mut replica = log.open_replica(spec.id, start)?;
    let log_end = replica.log_end();
    if log_end >= committed || spec.discard_local {
        return Ok(replica);
    }
    if !spec.standalone {
        return Err(PartitionError::Lost { id: spec.id, log_end, committed });
    }
    // This disk was lost or restored. The log restarts after the tiered and the deleted records, so that no offset is
    // assigned twice.
    tracing::warn!(
        partition = %spec.id, %log_end, %committed, "the local log ends below the committed end: resetting the log to the committed end"
    );
    replica.reset(committed)?;
    Ok(replica)
}

#[cfg(test)]
mod model_check;
#[cfg(test)]
mod tests;
