//! Byte formats and tables of the log: entries, checkpoints, snapshots, indexes, segments, epoch history and producer
//! state. Nothing here holds a lock or starts a thread; a function that accesses files receives the disk.

pub(super) mod checkpoint;
pub(super) mod entry;
pub(super) mod epochs;
pub(super) mod index;
mod producer_memory;
pub(super) mod producers;
pub(super) mod segment;
pub(super) mod snapshot;

pub(super) use producer_memory::ProducerMemory;
