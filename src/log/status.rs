//! What a data directory tells of itself. It changes nothing.

use std::{io, sync::atomic::Ordering};

use super::Log;
use crate::model::PartitionId;

/// How a data directory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Why it takes no writes, when it does not.
    pub failed: Option<String>,
    /// Whether the last append found the disk full.
    pub disk_full: bool,
    /// Replicas, opened or not.
    pub replicas: usize,
    /// Opened replicas that take no writes, and why.
    pub failed_replicas: Vec<(PartitionId, String)>,
    /// Bytes of the segments of opened replicas.
    pub segment_bytes: u64,
    /// Bytes of the journal's files.
    pub journal_bytes: u64,
    /// Bytes of the tail buffer in use.
    pub tail_bytes: usize,
    /// Bytes that the producer state of opened replicas takes, about.
    pub producer_bytes: usize,
    /// Bytes that can still be written; 0 when the file system does not say.
    pub free_bytes: u64,
}

/// How much room a file system has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that can still be written.
    pub free_bytes: u64,
    /// Bytes that are used or free.
    pub total_bytes: u64,
}

impl Log {
    /// How the directory is.
    pub fn status(&self) -> Status {
        let core = &self.inner.core;
        let open = self.inner.open_replicas();
        let failed = open.iter().filter_map(|replica| Some((replica.id, replica.failed.get()?.clone())));
        Status {
            failed: core.refusal(),
            disk_full: core.disk_full.load(Ordering::Relaxed),
            replicas: open.len() + self.inner.registry().dormant.len(),
            failed_replicas: failed.collect(),
            segment_bytes: open.iter().map(|replica| replica.state().bytes()).sum(),
            journal_bytes: self.inner.ring().bytes(),
            tail_bytes: core.tail.used(),
            producer_bytes: core.producer_memory.taken(),
            free_bytes: core.disk.free_bytes(&core.dir).unwrap_or(0),
        }
    }

    /// Why it takes no writes any more. Looks at nothing.
    pub fn failure(&self) -> Option<String> {
        self.inner.core.refusal()
    }

    /// From now on it takes no writes, as if the journal's device had failed.
    #[cfg(test)]
    pub(crate) fn fail_journal(&self) {
        self.inner.core.journal.fail(&io::Error::other("as a test wants it"));
    }

    /// Whether the last record that was to be written did not fit. Looks at nothing.
    pub fn is_full(&self) -> bool {
        self.inner.core.disk_full.load(Ordering::Relaxed)
    }

    /// How much room there is where the directory lies. Asks the file system and looks at nothing else.
    ///
    /// # Errors
    /// When the file system does not say.
    pub fn space(&self) -> io::Result<Space> {
        let core = &self.inner.core;
        Ok(Space { free_bytes: core.disk.free_bytes(&core.dir)?, total_bytes: core.disk.total_bytes(&core.dir)? })
    }
}
