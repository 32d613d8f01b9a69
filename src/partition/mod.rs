//! One partition on this broker.
//!
//! # Overview
//!
//! ```text
//!   writers ──append──▶ queue ──▶ actor ──▶ log (page cache) ──▶ journal (one sync for all partitions)
//!                                   │  ▲                             │
//!                                leader └────── persisted ───────────┘
//!                                   │
//!                                marks ──▶ readers: memory ─▶ disk ─▶ bucket
//!                                   │  ▲
//!         followers ◀── tail reader ┘  └── acknowledgements
//!
//!   leader's broker ──link──▶ orders ──▶ actor ──▶ log ──▶ journal ──▶ ends, to be acknowledged
//!                                   │
//!                               follower
//!
//!   upkeep: plan (retention) ── seal, move the start, upload, commit, evict
//! ```
//!
//! [`Partition`] is the handle; it lives as long as this broker holds the replica. Its task (`actor`) owns the log and does what its
//! [role](Role) is: it carries out what [`leader`] decides, or what [`follower`] decides, or waits. The metadata alone gives the role
//! ([`Partition::assign`]). What the task asks of others, links and the metadata store, it asks through [`Surroundings`] and never waits
//! for. Readers never ask the task: they see the marks it publishes. `upkeep` moves sealed segments to the bucket and lets old ones go, by
//! the plan of [`retention`], in the order that makes a crash harmless: object, manifest, commit in the metadata store, and only then
//! local files.
//!
//! # Invariants
//!
//! `log_start ≤ local_start ≤ tiered_end ≤ high_watermark ≤ log_end`, the middle ones wherever something was evicted. Where
//! nothing is uploaded, or deletion overtook it, `tiered_end` stays behind: it says what is in the bucket and nothing else.
//! An acknowledgement is given once and not before its rule holds. Only committed data is uploaded; only what the bucket has, or
//! what lies below the log start, leaves the disk; the log start is committed in the metadata store before anything is deleted.
//!
//! - A task appends what writers send only while it leads, and leads at most once in an epoch. What it asked the metadata store
//!   in one epoch is never taken for the answer to what it asked in another.
//! - What a replica calls committed it was told by a leader who had found their logs to agree, or committed itself. That others
//!   have committed up to an offset says nothing of what this log holds there.
//! - A role is published before anything is cut, and a link is left before: who reads this log as a leader's finds it over, and nothing is
//!   acknowledged in an epoch whose log is going.
//!
//! # Change of role
//!
//! Readers stay open. Writers whose records are in the log are told that nobody knows what becomes of them
//! ([`AppendError::Deposed`]), others that nothing was written ([`AppendError::NotLeader`]): an idempotent producer may send both again.
//!
//! # Crash and shutdown
//!
//! A crash loses what was not acknowledged, and leaks at most an object that no manifest names. A crash between a cut and the
//! claim after it leaves a log that is cut: it claims from there. On a stop the task leaves its link or refuses what is queued,
//! waits for the journal and answers what it covers. A disk that takes no writes ends leading and copying, and nothing else.

pub mod follower;
pub mod leader;
pub mod retention;

mod actor;
mod begin;
mod lag;
mod listeners;
mod memory;
mod opener;
mod reader;
mod ready;
mod rebuild;
mod replicated;
mod role;
pub mod session;
mod shared;
mod surroundings;
mod tail;
mod undecodable;
mod upkeep;
mod upkeep_queue;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::Instant,
};

use self::{
    actor::{Actor, Append, Command, News, Order, Parts},
    shared::Shared,
};
pub use self::{
    actor::{AppendError, AppendResult, BatchOrigin, Stored},
    lag::Lag,
    leader::{Acked, Held, Refused},
    memory::{Charge, Memory},
    opener::{INLINE_BYTES, Opener, Use},
    reader::{Fetched, ReadError, Reader, Source},
    ready::Ready,
    role::{Answered, Assignment, Beginning, FromLink, Joined, On, Overrun, Role, Standing},
    surroundings::{Agreement, Counts, Links, Surroundings},
    tail::TailReader,
    upkeep::{Step, Upkeep, UpkeepError},
    upkeep_queue::UpkeepQueue,
};
use crate::{
    log::{ChangeError, Log, Replica, ReplicaError},
    model::{Acks, BrokerId, LeaderEpoch, Offset, PartitionId, TopicConfig, TopicName, Watermarks},
    record::{Batch, Fingerprint},
    task::Tasks,
    tier::{PartitionTier, TierState},
};

/// Commands that may wait in a partition's queue, and orders in the one beside it. Bytes are bounded by the permits that appends
/// carry, and by the windows of links.
const QUEUE: usize = 1024;

/// What it takes to open a partition.
#[derive(Clone)]
pub struct Spec {
    /// Which one.
    pub id: PartitionId,
    /// Its topic's name.
    pub topic: TopicName,
    /// The topic's configuration.
    pub config: Arc<TopicConfig>,
    /// What the metadata store says of its log start and its tier; `None` before the first commit.
    pub committed: Option<TierState>,
    /// Its tier, when this broker has an object store.
    pub tier: Option<PartitionTier>,
    /// The metadata lies in the data directory and shares its fate: what is not here is nowhere else. Then a log that ends below what is
    /// committed goes on from there; else it is [`PartitionError::Lost`].
    pub alone: bool,
    /// What the disk has of it, if anything, counts for nothing: it is deleted, and the replica begins empty and copies. Only for a
    /// replica that is in no set, or that an operator has lead although it cannot be used: that goes on behind the bucket.
    pub anew: bool,
    /// `replication.lag_time`: how long a member of the ISR may take to reach what the log end was.
    pub lag_time: Duration,
}

/// Why a partition cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum PartitionError {
    /// The replica on the disk cannot be used.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The replica could not be begun anew where the bucket ends.
    #[error("the replica cannot begin anew where the bucket ends: {0}")]
    Reset(#[from] ChangeError),
    /// The disk holds less than what the bucket has, or what was deleted: whatever else is in it, it does not reach the log's tail.
    #[error(
        "the replica of partition {id} ends at {log_end}, below {committed}, where the bucket ends or the log starts: it must copy again"
    )]
    Lost {
        /// Which.
        id: PartitionId,
        /// Where the log on the disk ends.
        log_end: Offset,
        /// All before it was committed.
        committed: Offset,
    },
}

/// The handle of one partition's task.
pub struct Partition {
    id: PartitionId,
    topic: TopicName,
    mailbox: mpsc::Sender<Command>,
    orders: mpsc::Sender<Order>,
    news: Arc<News>,
    shared: Arc<Shared>,
    reader: Reader,
    tail: crate::log::Reader,
    tier: Option<PartitionTier>,
    /// What is committed in the metadata store, as far as it is known here.
    committed: Mutex<Option<TierState>>,
    /// One step of upkeep at a time.
    upkeep: tokio::sync::Mutex<()>,
    tasks: Tasks,
}

impl Partition {
    /// Opens the replica and starts the partition's task, which waits until it is [assigned](Self::assign) something. Blocks on
    /// files: call it where blocking is allowed.
    pub fn open(
        broker: BrokerId,
        log: &Log,
        spec: Spec,
        around: Surroundings,
        upkeep: &UpkeepQueue,
        parent: &Tasks,
    ) -> Result<Arc<Self>, PartitionError> {
        let committed = spec.committed.clone().unwrap_or_default();
        let (log_start, tiered_end) = (committed.log_start, committed.bucket_end());
        let replica = open_replica(log, &spec, log_start.max(tiered_end))?;
        // One of several may have copied what was never committed, from a leader that lost: where others have committed to, this log
        // may hold something else. Only what left the disk was committed for certain.
        let committed_end = if spec.alone { log_start.max(tiered_end) } else { replica.local_start() };
        let tasks = parent.child();
        let shared = Arc::new(Shared::new(spec.config, tasks.clone()));
        let tail = replica.reader();
        let reader = Reader::new(spec.id, Arc::clone(&shared), tail.clone(), spec.tier.clone());
        let (mailbox, commands) = mpsc::channel(QUEUE);
        let (orders, ordered) = mpsc::channel(QUEUE);
        let news = Arc::new(News::default());
        let actor = Actor::new(Parts {
            broker,
            id: spec.id,
            topic: spec.topic.clone(),
            replica,
            shared: Arc::clone(&shared),
            news: Arc::clone(&news),
            around,
            upkeep: upkeep.clone(),
            tier: spec.tier.clone(),
            log_start,
            tiered_end,
            committed_end,
            lag_ms: u64::try_from(spec.lag_time.as_millis()).unwrap_or(u64::MAX),
            orders: orders.downgrade(),
            tasks: tasks.clone(),
        });
        tasks.spawn("partition", actor.run(commands, ordered));
        let (id, topic, tier, committed) = (spec.id, spec.topic, spec.tier, Mutex::new(spec.committed));
        let upkeep = tokio::sync::Mutex::default();
        Ok(Arc::new(Self { id, topic, mailbox, orders, news, shared, reader, tail, tier, committed, upkeep, tasks }))
    }

    /// Which partition it is.
    pub fn id(&self) -> PartitionId {
        self.id
    }

    /// Its topic's name.
    pub fn topic(&self) -> &TopicName {
        &self.topic
    }

    /// Queues a write; waits only for room in the queue. `sent` is the fingerprint of the batch that the client sent, which `batch` may be a
    /// changed form of; `None` where the client sent records. Writes are appended in the order in which this returned. The
    /// answer comes when `acks` holds; a writer that drops the receiver has still written.
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

    /// As [`Self::append`], with all that is known of what the client sent. With `acks=tiered` the offsets are put into `stored` when the write is stored here and only the bucket is
    /// waited for.
    pub async fn append_tracked(
        &self,
        batch: Batch,
        origin: BatchOrigin,
        acks: Acks,
        permit: OwnedSemaphorePermit,
        stored: Option<Stored>,
    ) -> oneshot::Receiver<AppendResult> {
        let (answer, receiver) = oneshot::channel();
        let append = Box::new(Append { batch, origin, acks, permit, answer, stored });
        if let Err(mpsc::error::SendError(Command::Append(append))) = self.mailbox.send(Command::Append(append)).await {
            let _gone = append.answer.send(Err(AppendError::Closing));
        }
        receiver
    }

    /// Somebody waits no more for an answer that did not come: what was taken for its write is given back as soon as that is safe here. Never
    /// waits.
    pub fn given_up(&self) {
        self.news.given_up();
    }

    /// Everything below was deleted, as the metadata store says. It holds whatever this broker is in the partition.
    pub fn committed_log_start(&self) -> Offset {
        self.committed().map_or(Offset::ZERO, |state| state.log_start)
    }

    /// Its reader.
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// Its marks.
    pub fn marks(&self) -> Watermarks {
        self.shared.marks()
    }

    /// What this broker is in it.
    pub fn standing(&self) -> Standing {
        self.shared.standing()
    }

    /// The newest leader epoch that its metadata named here.
    pub fn epoch(&self) -> LeaderEpoch {
        self.shared.epoch()
    }

    /// Its topic's configuration.
    pub fn config(&self) -> Arc<TopicConfig> {
        self.shared.config()
    }

    /// Takes a changed configuration; it holds for every write after this returned.
    pub async fn configure(&self, config: Arc<TopicConfig>) {
        // Requests are checked before they reach the task.
        self.shared.configure(Arc::clone(&config));
        let _stopped = self.mailbox.send(Command::Configure(config)).await;
    }

    /// Bytes on this broker's disk.
    pub fn local_bytes(&self) -> u64 {
        self.shared.local_bytes()
    }

    /// Bytes in the bucket.
    pub fn tiered_bytes(&self) -> u64 {
        self.tier.as_ref().map_or(0, PartitionTier::bytes)
    }

    /// Segments with timestamps that are still to come, as the last plan found them; 0 while this broker does not lead.
    pub fn future_segments(&self) -> u64 {
        self.shared.future_segments()
    }

    /// Why it takes no writes, when it takes none.
    pub fn fault(&self) -> Option<Arc<str>> {
        self.shared.fault()
    }

    /// Whether its segments may need attention now: one is old enough to seal.
    pub fn seal_is_due(&self, now: Instant) -> bool {
        self.shared.active_age(now).is_some_and(|age| age >= self.shared.config().segment_age)
    }

    /// Whether retention may find anything: records in either tier, or the files of some that were deleted.
    pub fn holds_any(&self) -> bool {
        let marks = self.marks();
        marks.log_start.min(marks.local_start) < marks.log_end
    }

    /// Stops its task: what is queued is refused, what is written is made durable and answered.
    pub async fn stop(&self) {
        self.tasks.stop().await;
    }

    /// Takes over what the metadata store has committed of its tier and its log start, unless something newer is known. What is
    /// asked of the partition afterwards finds it.
    pub async fn adopt(&self, state: TierState) {
        self.note_committed(&state);
        self.command(Command::Committed(Box::new(state))).await;
    }

    fn note_committed(&self, state: &TierState) {
        if let Some(tier) = &self.tier {
            tier.adopt(state.clone());
        }
        let mut committed = self.committed.lock().unwrap_or_else(PoisonError::into_inner);
        let age = |state: &TierState| (state.version(), state.log_start, state.epoch);
        if committed.as_ref().is_none_or(|known| age(known) <= age(state)) {
            *committed = Some(state.clone());
        }
    }

    fn committed(&self) -> Option<TierState> {
        self.committed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn command(&self, command: Command) {
        let _stopped = self.mailbox.send(command).await;
    }
}

/// Opens the replica of `spec`, whose committed part ends at `committed` or later.
fn open_replica(log: &Log, spec: &Spec, committed: Offset) -> Result<Replica, PartitionError> {
    if spec.anew {
        log.delete_replica(spec.id)?;
    }
    // A replica that copies is empty at first: where it begins its leader says, and the bucket has what must be known there.
    let start = if spec.alone { committed } else { Offset::ZERO };
    let mut replica = log.open_replica(spec.id, start)?;
    let log_end = replica.log_end();
    if log_end >= committed || spec.anew {
        return Ok(replica);
    }
    if !spec.alone {
        return Err(PartitionError::Lost { id: spec.id, log_end, committed });
    }
    // This disk was lost or restored: go on behind what the bucket has and behind what was deleted. An offset is
    // never given twice.
    tracing::warn!(
        partition = %spec.id, %log_end, %committed, "the local log ends below what was committed; going on from there"
    );
    replica.reset(committed)?;
    Ok(replica)
}

#[cfg(test)]
mod check;
#[cfg(test)]
mod tests;
