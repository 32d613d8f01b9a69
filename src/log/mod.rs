//! One data directory: the logs of all replicas on this broker's disk, and the journal that makes their appends
//! durable.
//!
//! # Overview
//!
//! ```text
//! {data}/strandline.json                                    identity file: format, cluster, broker, directory id
//! {data}/lock                                               locked while a process uses the directory
//! {data}/incarnations.json                                  incarnations of this broker that the metadata may name
//! {data}/producer-ids.json                                  end of this broker's newest block of producer ids
//! {data}/reserve                                            disk space for a start on a full disk
//! {data}/checkpoint                                         description of every replica; a start reads no segments
//! {data}/journal/{slot:05}.journal                          one file of the journal's ring
//! {data}/{topic-id}/{partition}/{base:020}.log              a segment: complete batches and nothing else
//!                                        .log.quarantined-{n}  a segment found at a replica's creation; never read
//!                                        .index .timeindex     caches: file position at which a read starts
//!                                        .snapshot             epoch history and producer state at the base
//!                                        .reset                the snapshot of a reset in progress
//! ```
//!
//! Every snapshot is a cache, except the one at the local start.
//!
//! A [`ReplicaLog`] is the single writer of a replica. [`ReplicaLog::append`] writes batches to the active segment
//! through the page cache, and readers see them at once. [`ReplicaLog::persist`] submits the same bytes to the journal.
//! The journal's writer thread collects the entries of all replicas and writes them as one frame: one direct write to
//! preallocated blocks. It then calls the callback of each entry. Another thread syncs the segments in the background.
//! A [`LogReader`] reads from the tail cache, else from a file. A read from a file checks every batch before it returns
//! the batch.
//!
//! # Layers
//!
//! Imports go down only. All layers may use `error` and `options`.
//!
//! | folder | content |
//! | --- | --- |
//! | `data_dir` | opening and closing; the registry of replicas; start, recovery, sync passes, checkpoints |
//! | `replica` | state of one replica; its writer, readers, syncs and caches; the context that all replicas share |
//! | `journal` | queue, frames, writer thread, ring of files, replay |
//! | `format` | bytes of entries, checkpoints, segments and their indexes; epoch history and producer state |
//! | `disk` | the only access to files, real and simulated; the budget of free space |
//!
//! The journal calls upper layers through three traits. `JournalClient` is a replica, `JournalHost` the data directory
//! that syncs segments for it. In step mode no thread runs: the simulator calls [`DataDir::journal_step`] and
//! [`DataDir::sync_step`], and a call that waits for the journal drives the frames itself through `StepDriver`.
//!
//! # Locks
//!
//! A thread that holds a lock takes only locks after it:
//!
//! ```text
//! recycling, preallocating ▸ registry ▸ writer ▸ ring ▸ queue ▸ syncing ▸ state ▸ files
//! ```
//!
//! `recycling` and `registry` belong to the data directory, `preallocating`, `writer`, `ring` and `queue` to the
//! journal, `syncing` and `state` to a replica, and `files` is the cache of open files.
//!
//! The locks of the sync queue, of checkpoint failures, of stray and removed files, and of the tail cache
//! (`EvictionQueue` ▸ `ReplicaTail`) come last: a thread that holds one of them takes no other. No file is accessed
//! under `state`. [`SimHook`] is called with locks held, so it only wakes the driver of the steps.
//!
//! # Invariants
//!
//! - A segment holds complete, contiguous batches whose epochs never decrease, and nothing after them.
//! - Data that was acknowledged as persisted is in a segment or in the journal after any crash.
//! - Data that was truncated, reset or deleted before the call returned does not reappear.
//! - A journal file is reused only when all its entries are synced in their segments and the checkpoint starts replay
//!   after the file.
//! - An index, a snapshot, or a timestamp in one of them proves nothing about the log. A corrupt one is rebuilt, except
//!   the snapshot at the local start, which cannot be rebuilt.
//! - A missing file never counts as an empty one. The identity file is written before all other files, and the
//!   checkpoint of a running directory names a frame in its journal. A directory without either is refused, and so is
//!   the journal of another directory.
//! - The recovery point of a replica covers only synced data. Its epoch history and producer state are those at exactly
//!   that offset.
//!
//! # Crash
//!
//! A crash may lose any unsynced bytes of the segments, and may tear the last frame of the journal. Opening the
//! directory recovers in these steps:
//!
//! 1. Write the journaled bytes to their recorded positions and sync them. The redo is physical, so a repetition is
//!    harmless.
//! 2. Write a checkpoint.
//! 3. Write an empty frame to the journal, which the next checkpoint names.
//!
//! Opening a replica then scans the replica from its recovery point. Invalid bytes above the persisted end are a torn
//! tail and are truncated. Invalid bytes below the persisted end mean lost data: the replica is refused
//! ([`ReplicaError::Lost`]) and its files stay unchanged.
//!
//! # Failures
//!
//! A full disk fails only the append, truncation or reset, which then changes nothing. A start or a checkpoint on a
//! full disk uses the space of the reserve. A failed write or sync of a segment ends writing to its replica, a failed
//! write of the journal ends writing to all replicas. The kernel may have dropped the unsynced pages, and a second sync
//! would not report that. Reads continue. Entries of a failed replica that are only in the journal stay there for the
//! next start. When the ring needs the file that holds these entries, the journal has no space for any replica and
//! fails.
//!
//! # Shutdown
//!
//! [`DataDir::close`] refuses appends, writes the indexes of active segments, syncs, stops the threads and writes the
//! checkpoint of a clean shutdown. Dropping a [`DataDir`] only stops the threads: the next start recovers as after a
//! crash.

mod data_dir;
pub mod disk;
mod error;
mod format;
#[doc(hidden)]
pub mod fuzzing;
mod journal;
mod options;
mod replica;

#[cfg(test)]
mod tests;

pub use data_dir::{DataDir, DataDirIdentity, DataDirStatus, DiskSpace, FORMAT, IDENTITY, METADATA};
pub use disk::{Disk, OpenMode, PrivateDir, RealDisk, SimDisk, SyncStamp, free_in_steps, write_out};
pub use error::{ChangeError, DataDirError, LogAppendError, LogReadError, PersistError, ReplicaError};
pub use format::{EpochHistory, IndexEntry, ProducerTable, SegmentInfo, SequenceCheck};
pub use journal::PersistCallback;
pub use options::{LogOptions, SimHook};
pub use replica::{LogReader, ReadBatches, ReadLimits, ReplicaLog, SegmentExport, StateRef};
