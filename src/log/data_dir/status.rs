//! Read-only status of a data directory.

use std::io;

use super::DataDir;
use crate::model::PartitionId;

/// Status of a data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataDirStatus {
    /// Reason why the directory accepts no writes, if any.
    pub failed: Option<String>,
    /// True after an append, truncation or reset found the disk full, until the next successful append.
    pub disk_full: bool,
    /// Number of replicas, opened or not.
    pub replicas: usize,
    /// Opened replicas whose own writes or syncs failed, each with the reason.
    pub failed_replicas: Vec<(PartitionId, String)>,
    /// Bytes of the segments of opened replicas.
    pub segment_bytes: u64,
    /// Bytes of the journal's files.
    pub journal_bytes: u64,
    /// Bytes used by the tail cache.
    pub tail_bytes: usize,
    /// Approximate bytes of the producer state of opened replicas.
    pub producer_bytes: usize,
    /// Bytes that can still be written; 0 if the file system does not report them.
    pub free_bytes: u64,
}

/// Space of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskSpace {
    /// Bytes that can still be written.
    pub free_bytes: u64,
    /// Bytes that are used or free.
    pub total_bytes: u64,
}

impl DataDir {
    /// Returns the status of the directory.
    pub fn status(&self) -> DataDirStatus {
        let ctx = &self.inner.ctx;
        let (open, replicas) = {
            let registry = self.inner.registry.lock();
            (registry.open_replicas(), registry.len())
        };
        let failed = open.iter().filter_map(|replica| Some((replica.id(), replica.failure()?.to_owned())));
        DataDirStatus {
            failed: ctx.refusal(),
            disk_full: ctx.budget.is_full(),
            replicas,
            failed_replicas: failed.collect(),
            segment_bytes: open.iter().map(|replica| replica.bytes()).sum(),
            journal_bytes: ctx.journal.bytes(),
            tail_bytes: ctx.tail_bytes(),
            producer_bytes: ctx.producer_bytes(),
            free_bytes: ctx.disk.free_bytes(&ctx.dir).unwrap_or(0),
        }
    }

    /// Returns the reason why the directory accepts no writes, if any. Accesses no file.
    pub fn failure(&self) -> Option<String> {
        self.inner.ctx.refusal()
    }

    /// Fails the journal, as a failure of its device would.
    #[cfg(test)]
    pub(crate) fn fail_journal(&self) {
        self.inner.ctx.journal.fail(&io::Error::other("a simulated failure"));
    }

    /// Returns true if an append, truncation or reset found the disk full, and no append has succeeded since. Accesses
    /// no file.
    pub fn is_full(&self) -> bool {
        self.inner.ctx.budget.is_full()
    }

    /// Returns the space of the file system that holds the directory.
    ///
    /// # Errors
    /// The file system does not report its space.
    pub fn space(&self) -> io::Result<DiskSpace> {
        let ctx = &self.inner.ctx;
        Ok(DiskSpace { free_bytes: ctx.disk.free_bytes(&ctx.dir)?, total_bytes: ctx.disk.total_bytes(&ctx.dir)? })
    }
}
