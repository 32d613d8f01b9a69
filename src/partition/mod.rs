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
//! [`Partition`] is the handle of one open replica. The replica's task (`actor`) owns the log. In its
//! [role](ReplicaRole) the task applies the decisions of [`leader`] or of [`follower`], or is idle. Only the metadata
//! gives the task a role ([`Partition::assign`], [`metadata`]). The task sends its requests to links and to the
//! metadata store through [`PartitionContext`] and never waits for an outcome. Readers send no request to the task:
//! they read the watermarks that the task publishes. Maintenance (`maintenance`) uploads sealed segments and removes
//! old ones, by the plan of [`retention`]. The order of an upload makes a crash harmless: object, manifest, commit in
//! the metadata store, and only then the removal of local files.
//!
//! # Invariants
//!
//! - `log_start ≤ high_watermark ≤ log_end` and `tiered_end ≤ high_watermark`.
//! - `local_start` is the first offset of a segment, and `log_start` may lie inside that segment. `local_start` also
//!   lies below `log_start` until the files of deleted records are evicted. `local_start` lies above `log_start` only
//!   if the object store has all records between: then `log_start ≤ local_start ≤ tiered_end`.
//! - `tiered_end` may lie below `log_start` if nothing is uploaded, or if deletion overtook the uploads. It describes
//!   the object store and nothing else.
//! - Each write gets at most one result, and an acknowledgement only after the acks rule of the write holds.
//! - Only committed records are uploaded. Only records in the object store or below the log start are evicted. The
//!   metadata store commits a new log start before retention deletes any record.
//! - A task appends writes only while it leads, and leads at most once in an epoch. It never applies the metadata
//!   store's response to a request of one epoch as the response to a request of another epoch.
//! - A follower raises its high watermark only by a bootstrap, or by the high watermark of a leader. This leader must
//!   have accepted the follower's log as a prefix of its own. A leader raises its high watermark by its own commits, or
//!   by the tier state of its own epoch or an older one. A commit of other replicas is not enough: this log may hold
//!   different records below that offset.
//! - Before the log is truncated, the task has published its role, and has no accepted subscription. So tail reads of
//!   an earlier leadership fail, and the replica acknowledges nothing while it removes records.
//!
//! # Change of role
//!
//! Readers stay open. A writer whose acks rule holds when the role ends receives its acknowledgement. Any other writer
//! whose records are in the log receives [`AppendError::Deposed`]: the outcome is unknown. A writer whose records were
//! not appended receives [`AppendError::NotLeader`]. An idempotent producer may retry both.
//!
//! # Crash and shutdown
//!
//! A crash of the process loses no record that is in the log. A crash of the machine loses only unsynced records, which
//! no `persisted` topic has acknowledged. In the object store, both crashes leave at most orphan objects. After a crash
//! between a truncation and the next subscription, the replica subscribes at the new end of its log. On a stop the task
//! rejects queued writes, unsubscribes from its leader, and waits for the journal. The task then acknowledges the
//! writes whose acks rule holds by then. After a disk failure a follower stops copying, and a leader resigns if the ISR
//! has another member; reads continue.

pub mod follower;
pub mod leader;
pub mod metadata;
pub mod replication;
pub mod retention;

mod actor;
mod context;
mod handle;
mod lag;
mod maintenance;
mod maintenance_queue;
mod published;
mod read;
mod role;
mod wake;

pub use self::{
    actor::{AppendError, AppendResult, BatchOrigin, Stored},
    context::{IsrUpdater, PartitionContext, PartitionCounters, ReplicationLinks},
    handle::{Partition, PartitionError, ReplicaSpec},
    lag::FollowerLag,
    leader::{
        AckDurability, AdmitError, WriteAck,
        divergence::{BootstrapTables, SubscribeOutcome},
    },
    maintenance::{MaintenanceError, MaintenanceResult, MaintenanceRunner},
    maintenance_queue::MaintenanceQueue,
    read::{
        Charge, DecompressPurpose, Decompressor, FetchedBatches, INLINE_BYTES, MemoryBudget, PartitionReader,
        ReadError, ReadSource, TailReader,
    },
    role::{LinkEvent, PartitionAssignment, QueueFull, ReplicaRole, ReplicaStatus, SubscribeResponse, WatermarkKind},
    wake::WakeSet,
};

#[cfg(test)]
mod model_check;
#[cfg(test)]
mod tests;
