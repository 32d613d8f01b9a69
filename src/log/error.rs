//! What can go wrong, one enum per operation.

use std::{io, path::PathBuf};

use crate::model::{BrokerId, Offset, PartitionId};

/// Why a data directory cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error("data directory {} is in use by another process{}: stop it, or give this one another directory (broker.data_dir, --data-dir)",
        dir.display(), pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// The other process, when it said.
        pid: Option<u32>,
    },
    /// Written by a newer version.
    #[error("data directory {} has format {found}; this version knows up to {known}: start the newer version",
        dir.display())]
    Newer {
        /// The directory.
        dir: PathBuf,
        /// Its format.
        found: u32,
        /// The newest known here.
        known: u32,
    },
    /// Another cluster's or another broker's.
    #[error("data directory {} belongs to broker {found_broker} of cluster {found_cluster:?}, this is broker {broker} \
        of {cluster:?}: give the right directory or configuration", dir.display())]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// Whose it is.
        found_cluster: String,
        /// Whose it is.
        found_broker: BrokerId,
        /// Who opens it.
        cluster: String,
        /// Who opens it.
        broker: BrokerId,
    },
    /// A file that says whose directory it is does not parse.
    #[error("{} is damaged: {why}; restore it, or move the directory away and let the broker copy its data again",
        file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The file system says no.
    #[error("data directory {}: cannot {what}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// Why a replica cannot be opened, or deleted.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// Somebody has it.
    #[error("partition {id} is open already")]
    Open {
        /// Which.
        id: PartitionId,
    },
    /// It acknowledged what it does not hold any more. Its files are kept as they are.
    #[error("partition {id} has lost data: it held offsets up to {persisted} on stable storage, and {why}. Its files in {} \
        are kept and not served; delete this replica to copy the partition again", dir.display())]
    Lost {
        /// Which.
        id: PartitionId,
        /// The end of what it had persisted.
        persisted: Offset,
        /// What is wrong.
        why: String,
        /// Where its files are.
        dir: PathBuf,
    },
    /// The data directory takes no writes.
    #[error("the data directory takes no writes: {reason}")]
    Failed {
        /// Why.
        reason: String,
    },
    /// The file system says no.
    #[error("partition {id}: {}: {source}", path.display())]
    Io {
        /// Which.
        id: PartitionId,
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Why batches were not appended. Nothing of them is in the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// No room. Appending works again by itself when there is.
    #[error("the disk is full")]
    DiskFull,
    /// The replica takes no writes any more.
    #[error("the replica takes no writes: {reason}")]
    Failed {
        /// Why.
        reason: String,
    },
}

impl AppendError {
    /// Whether the same call may succeed later.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::DiskFull)
    }
}

/// Why a replica could not be cut, emptied or shortened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// The replica, or its data directory, takes no writes any more.
    #[error("the replica cannot be changed: {reason}")]
    Failed {
        /// Why.
        reason: String,
    },
}

/// Why appended batches are not known to be on stable storage.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PersistError {
    /// They were cut meanwhile.
    #[error("the log was cut before these records were persisted")]
    Cut,
    /// A write or a sync failed, which is final.
    #[error("not persisted: {reason}")]
    Failed {
        /// Why.
        reason: String,
    },
    /// The log was closed.
    #[error("not persisted: the log is closed")]
    Closed,
}

/// Why records were not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Not on this disk.
    #[error("offset {offset} is not on this disk, which holds {start} to {end}")]
    OutOfRange {
        /// What was asked for.
        offset: Offset,
        /// The local start.
        start: Offset,
        /// The log end.
        end: Offset,
    },
    /// The bytes are not those that were written; they are not served.
    #[error("offset {offset} cannot be read: {} is damaged at byte {position}: {why}", file.display())]
    Damaged {
        /// The first offset that cannot be read.
        offset: Offset,
        /// The segment.
        file: PathBuf,
        /// Where in it.
        position: u64,
        /// What is wrong.
        why: String,
    },
    /// The file system says no.
    #[error("{}: {source}", file.display())]
    Io {
        /// The segment.
        file: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Whether an error means that there is no room.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
