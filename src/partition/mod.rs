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
//! owns the log. In its [role](ReplicaRole) the task applies the decisions of [`leader`] or of [`follower`], or is
//! idle. Only the metadata gives the task a role ([`Partition::assign`], [`metadata`]). The task sends its requests to
//! links and to the metadata store through [`PartitionContext`] and never waits for an outcome. Readers send no request
//! to the task: they read the watermarks that the task publishes. Maintenance (`maintenance`) uploads sealed segments
//! and removes old ones, by the plan of [`retention`]. The order of an upload makes a crash harmless: object, manifest,
//! commit in the metadata store, and only then the removal of local files.
//!
//! # Invariants
//!
//! - `log_start ≤ high_watermark ≤ log_end` and `tiered_end ≤ high_watermark`.
//! - `local_start` is the first offset of a segment, and `log_start` may lie inside that segment. `local_start` also
//!   lies below `log_start` until the files of deleted records are evicted. `local_start` lies above `log_start` only
//!   if the object store has all records between: then `log_start ≤ local_start ≤ tiered_end`.
//! - `tiered_end` may lie below `log_start` if nothing is uploaded, or if deletion overtook the uploads. It describes
//!   the object store and nothing else.
//! - Each write gets one result. The result is an acknowledgement only after the acks rule of the write holds.
//! - Only committed records are uploaded. Only records in the object store or below the log start are evicted. The
//!   metadata store commits a new log start before any record is deleted.
//! - A task appends writes only while it leads, and leads at most once in an epoch. It never applies the metadata
//!   store's response to a request of one epoch as the response to a request of another epoch.
//! - A follower takes its high watermark only from a leader that accepted the follower's log as a prefix of its own, or
//!   from a bootstrap. A leader takes it from its own commits, or from the tier state of its own epoch or an older one.
//!   A commit of other replicas is not enough: this log may hold different records below that offset.
//! - Before the log is truncated, the task has published its role, and has no accepted subscription. So tail reads of
//!   an earlier leadership fail, and nothing is acknowledged in an epoch whose records are being removed.
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
//! no `persisted` topic has acknowledged. Both leak at most orphan objects. A crash between a truncation and the next
//! subscription leaves a truncated log, which subscribes at its new end. On a stop the task unsubscribes from its
//! leader, rejects queued writes, waits for the journal and acknowledges the writes whose acks rule holds by then. A
//! disk that accepts no writes ends leadership and copying; reads continue.

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
