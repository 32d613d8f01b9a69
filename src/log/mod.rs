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
//! {data}/reserve                                            disk space for a start or a checkpoint on a full disk
//! {data}/checkpoint                                         description of every replica; a start reads no segments
//! {data}/journal/{slot:05}.journal                          one file of the journal's ring
//! {data}/{topic-id}/{partition}/{base:020}.log              a segment: complete batches and nothing else
//!                                        .log.quarantined-{n}  a segment found at a replica's creation; never served
//!                                        .index .timeindex     caches: file position at which a read starts
//!                                        .snapshot             epoch history and producer state at the base
//!                                        .reset                the snapshot of a reset in progress
//! ```
//!
//! Every `.snapshot` file is a cache, except the one at the local start.
//!
//! A [`ReplicaLog`] is the single writer of a replica. [`ReplicaLog::append`] writes batches to the active segment
//! through the page cache, and readers see them at once. [`ReplicaLog::persist`] submits the same bytes to the journal,
//! or requests a sync of the segments if there are too many bytes. The journal's writer thread writes the queued
//! entries of all replicas as a frame, with one direct write to preallocated blocks. The thread then calls the callback
//! of each entry. Another thread syncs the segments in the background. A [`LogReader`] reads from the tail cache, else
//! from a file. A read from a file checks every batch before it returns the batch.
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
//! `journal` declares three traits for calls to upper layers. `JournalClient` is a replica, and `JournalHost` is the
//! data directory, which syncs segments for the journal. In step mode no thread runs: the simulator calls
//! [`DataDir::journal_step`] and [`DataDir::sync_step`]. A call that waits for the journal then writes the frames
//! itself, through `StepDriver`.
//!
//! # Locks
//!
//! A thread that holds a lock takes only locks after it:
//!
//! ```text
//! recycling, preallocating ▸ registry ▸ writer ▸ ring ▸ queue ▸ syncing ▸ state ▸ files
//! ```
//!
//! `recycling` and `registry` belong to the data directory, and `preallocating`, `writer`, `ring` and `queue` to the
//! journal. `syncing` and `state` belong to a replica, and `files` is the cache of open files.
//!
//! The locks of the sync queue, of checkpoint failures, of stray and removed files, and of the index of an open file
//! come last. So do those of the tail cache (`EvictionQueue` ▸ `ReplicaTail`). A thread that holds one of these locks
//! takes no other lock of this section. No file is accessed under `state`. [`SimHook`] may be called with locks held,
//! so it only wakes the driver of the steps.
//!
//! # Invariants
//!
//! - A segment holds complete, contiguous batches whose epochs never decrease, and nothing after them.
//! - Data that was acknowledged as persisted is in a segment or in the journal after any crash.
//! - Data that a completed truncation, reset or deletion has removed does not reappear.
//! - A journal file is reused only when no replica needs its entries and the checkpoint starts replay after the file.
//!   An entry is not needed once its batches are synced in their segment, or were removed from the log.
//! - An index, a snapshot, or a timestamp in one of them proves nothing about the log. A corrupt index or snapshot is
//!   rebuilt, except the snapshot at the local start, which cannot be rebuilt.
//! - A missing identity file or journal never counts as an empty one. The identity file is written before all data, and
//!   the checkpoint of a running directory names a frame in its journal. A directory with data is refused without its
//!   identity file. After an unclean stop, a directory without that frame is refused, unless the options accept the
//!   loss of the journal. The journal of another directory is always refused.
//! - The recovery point of a replica covers only synced data. Its epoch history and producer state are those at exactly
//!   that offset.
//!
//! # Crash
//!
//! A crash may lose any unsynced bytes of the segments, and may tear the last frame of the journal. Opening the
//! directory recovers in these steps:
//!
//! 1. Complete the deletions and resets that the crash interrupted. Write the journaled bytes that the segments lack to
//!    their recorded positions, and sync the segments. The redo is physical, so a repetition is harmless.
//! 2. Write a checkpoint.
//! 3. Write an empty frame to the journal, and then the checkpoint that starts replay at this frame.
//!
//! Opening a replica then scans the replica from its recovery point. Invalid bytes above the persisted end are a torn
//! tail and are truncated. Invalid bytes below the persisted end mean lost data: the replica is refused
//! ([`ReplicaError::Lost`]) and its segments stay unchanged.
//!
//! # Failures
//!
//! An append, truncation or reset that finds the disk full fails and changes nothing. An eviction then removes fewer
//! segments, or fails. A start or a checkpoint on a full disk uses the space of the reserve. Any other failed write,
//! and a failed sync, of a segment ends writing to its replica. A failed write of the journal ends writing to all
//! replicas. The kernel may have dropped the unsynced pages, and a second sync would not report that. Reads continue.
//! Entries of a failed replica that are only in the journal stay there for the next start. When the ring needs the file
//! that holds these entries, the journal has no space for any replica and fails.
//!
//! # Shutdown
//!
//! [`DataDir::close`] refuses appends, writes the indexes and snapshots of active segments, syncs, stops the threads
//! and writes the last checkpoint. The shutdown is clean if this checkpoint describes the files of every replica.
//! Dropping the last clone of a [`DataDir`] only stops the threads: the next start recovers as after a crash.

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
