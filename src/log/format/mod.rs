//! Byte formats of the log: entries, checkpoints, snapshots, indexes and segments, and the epoch history and producer
//! state in them. Nothing here holds a lock or starts a thread; a function that accesses files receives the disk or the
//! open file.

mod checkpoint;
pub(super) mod entry;
mod epochs;
pub(super) mod index;
mod producer_memory;
mod producers;
pub(super) mod segment;
pub(super) mod snapshot;

pub use epochs::EpochHistory;
pub use index::IndexEntry;
pub use producers::{ProducerTable, SequenceCheck};
pub use segment::SegmentInfo;

pub(super) use checkpoint::{Checkpoint, CheckpointKind, NAME as CHECKPOINT, ReplicaCheckpoint};
pub(super) use entry::{DecodedEntry, EntryHeader, EntryKind, MAX_NUMBER};
pub(super) use index::Index;
pub(super) use producer_memory::ProducerMemory;
pub(super) use segment::{Segment, SegmentFile, replica_dir};
pub(super) use snapshot::Snapshot;
