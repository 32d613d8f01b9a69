//! One data directory: every replica's log on this broker's disk, and the journal that makes their appends durable.
//!
//! # Overview
//!
//! ```text
//! {data}/strandline.json                                    whose it is: format, cluster, broker, directory id
//! {data}/lock                                               held while a process has it
//! {data}/uptimes.json                                       which uptimes of this broker the metadata may name
//! {data}/producer-ids.json                                  where the newest block of producer ids ends that this broker was given
//! {data}/reserve                                            room for a start on a disk that is full
//! {data}/checkpoint                                         what is known of every replica without reading it
//! {data}/journal/{slot:05}.journal                          the ring
//! {data}/{topic-id}/{partition}/{base:020}.log              a segment: whole batches and nothing else
//!                                        .log.aside-{n}     found where a new replica was made; nothing reads it
//!                                        .index .timeindex  caches: where to start reading
//!                                        .snapshot          a cache: epochs and producers where it begins
//!                                        .reset             the same, of a reset that is under way
//! ```
//!
//! A [`Replica`] is the one writer of a partition. [`Replica::append`] writes batches to the active segment, into the page cache;
//! readers see them at once. [`Replica::persist`] hands the same bytes to the journal: one writer thread takes what all
//! replicas handed over meanwhile, writes it with one direct write to preallocated blocks, and answers. Segments are
//! synced behind by another thread. A [`Reader`] reads from the tail buffer, else from a file, where it checks every
//! batch before it serves it.
//!
//! # Invariants
//!
//! - A segment holds whole, contiguous batches whose epochs do not fall, and nothing after them.
//! - What was answered as persisted is, after any crash, in a segment or in the journal.
//! - What was cut, reset or deleted before the call returned does not come back.
//! - A journal file is written again only when everything in it is synced in its segment and the checkpoint says that
//!   replay begins after it.
//! - An index, a snapshot or a timestamp in them is never evidence of anything: damaged ones are made again.
//! - What is missing is never taken for empty. The identity comes before all other files, and a running directory's checkpoint
//!   names a round that is in its journal: a directory without either is refused, and so is a foreign journal.
//! - The recovery point of a replica only covers what was synced, and its tables are those of that very offset.
//!
//! # What a crash leaves
//!
//! Segments with any of their unsynced bytes missing, and a journal whose last round may be torn. Opening the directory
//! writes the journaled bytes to the places that they had (physical redo: the same bytes at the same positions, so it may be done
//! twice), syncs them, and writes a checkpoint. Then the journal is begun anew with a round of nothing, which the next checkpoint
//! names. Opening a replica reads it from its recovery point on. Bytes that are
//! no batch, above what was persisted, are a torn tail and are cut; below it, data was lost: the replica is refused
//! ([`ReplicaError::Lost`]) and its files stay as they are.
//!
//! # Failures
//!
//! A full disk fails the append, which is taken back, and nothing else; a start on one, or a checkpoint, takes its room from
//! the reserve. A failed write or sync of a segment ends writing to that replica, of the journal to all: pages may be gone, and a
//! second sync would not say so. Reading goes on. What such a replica has in the journal alone stays there for the next start; when the
//! ring comes round to it, the journal has no room for anybody, and fails.
//!
//! # Shutdown
//!
//! [`Log::close`] refuses appends, writes the indexes of active segments, syncs, ends the threads and writes a
//! checkpoint that says that all is there. Dropping a [`Log`] only ends the threads: the next start is as after a crash.

mod change;
mod checkpoint;
mod core;
mod delete;
mod directory;
pub mod disk;
mod epochs;
mod error;
mod export;
mod files;
#[doc(hidden)]
pub mod fuzzing;
mod growth;
mod identity;
mod index;
mod journal;
mod producer_block;
mod producer_memory;
mod producers;
mod reader;
mod recover;
mod removed;
mod replica;
mod reserve;
mod segment;
mod shared;
mod snapshot;
mod startup;
mod status;
mod stuck;
mod sync;
mod tail;
mod unclaimed;
mod uptime;

#[cfg(test)]
mod tests;

pub use self::core::{Options, Stepper};
pub use directory::Log;
pub use disk::{Disk, Mode, PrivateDir, RealDisk, SimDisk, Stamp, give_back, write_out};
pub use epochs::EpochHistory;
pub use error::{AppendError, ChangeError, OpenError, PersistError, ReadError, ReplicaError};
pub use export::SegmentExport;
pub use identity::{FORMAT, Identity, METADATA, NAME as IDENTITY};
pub use index::IndexEntry;
pub use journal::Done;
pub use producers::{ProducerTable, Verdict};
pub use reader::{Read, ReadLimits, Reader};
pub use replica::{Held, Replica};
pub use segment::SegmentInfo;
pub use status::{Space, Status};
