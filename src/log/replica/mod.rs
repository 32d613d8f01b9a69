//! The replicas of a data directory: their state, their single writers, their readers and their syncs. A replica knows
//! the journal and the disk, and neither the registry nor the threads.

pub(super) mod context;
pub(super) mod export;
pub(super) mod file_cache;
pub(super) mod reader;
pub(super) mod removed;
pub(super) mod state;
pub(super) mod tail_cache;
mod truncate;
pub(super) mod writer;
