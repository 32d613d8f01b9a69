//! Errors of the log, one enum per operation.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::model::{BrokerId, Offset, PartitionId};

/// Error of opening a data directory.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another process uses the directory.
    #[error("data directory {} is in use by another process{}: stop that process, or set another directory \
        (broker.data_dir, --data-dir)",
        dir.display(), pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    InUse {
        /// Path of the directory.
        dir: PathBuf,
        /// Id of the other process, if the lock file holds one.
        pid: Option<u32>,
    },
    /// A newer version wrote the directory, or a file with a format number in it.
    #[error("data directory {} has format {found}, and this version reads formats up to {known}: start a newer version",
        dir.display())]
    Newer {
        /// Path of the directory.
        dir: PathBuf,
        /// Format of the directory or file.
        found: u32,
        /// Newest format that this version reads.
        known: u32,
    },
    /// The directory belongs to another cluster or broker.
    #[error("data directory {} belongs to broker {found_broker} of cluster {found_cluster:?}, and this is broker \
        {broker} of cluster {cluster:?}: correct the directory (broker.data_dir, --data-dir) or the \
        configuration", dir.display())]
    Foreign {
        /// Path of the directory.
        dir: PathBuf,
        /// Cluster of the directory.
        found_cluster: String,
        /// Broker of the directory.
        found_broker: BrokerId,
        /// Cluster that opens the directory.
        cluster: String,
        /// Broker that opens the directory.
        broker: BrokerId,
    },
    /// The directory holds data and no identity file.
    #[error("data directory {} holds {found} and no strandline.json, the file that names its owner: restore that \
        file{}, or set an empty directory (broker.data_dir, --data-dir) if this data is not needed", dir.display(),
        expected.as_ref().map(|expected| format!(" (with the content {expected}, if the directory is this broker's)"))
            .unwrap_or_default())]
    Unidentified {
        /// Path of the directory.
        dir: PathBuf,
        /// Data in the directory.
        found: String,
        /// Content that the identity file should have, according to the checkpoint.
        expected: Option<String>,
    },
    /// The directory was not closed cleanly, and the journal that it used is missing.
    #[error("data directory {} was not closed cleanly, and its journal is not in {} ({reason}): mount the journal's \
        device, or set the journal's directory (log.journal_dir); to start without the journal, and lose \
        the acknowledged records that only the journal holds, start once with log.accept_journal_loss = true",
        dir.display(), journal_dir.display())]
    JournalLost {
        /// Path of the directory.
        dir: PathBuf,
        /// Directory that was searched for the journal.
        journal_dir: PathBuf,
        /// Reason why `journal_dir` does not hold the journal.
        reason: String,
    },
    /// Another data directory uses the journal's directory.
    #[error("{} holds the journal of another data directory (id {owner}): set another journal directory for data \
        directory {} (log.journal_dir), or empty this one if the other data directory no longer \
        exists", journal_dir.display(), dir.display())]
    JournalForeign {
        /// Path of the directory.
        dir: PathBuf,
        /// Directory of the journal.
        journal_dir: PathBuf,
        /// Id of the other data directory.
        owner: uuid::Uuid,
    },
    /// The disk has less free space than a new journal of the configured size needs.
    #[error("log.journal_bytes = {bytes} does not fit into {}, where {free} bytes are free: set a lower value, or a \
        directory on a larger device (log.journal_dir)", journal_dir.display())]
    JournalTooLarge {
        /// Directory of the journal.
        journal_dir: PathBuf,
        /// Configured size of the journal, in bytes.
        bytes: u64,
        /// Free bytes on the disk.
        free: u64,
    },
    /// The identity file does not parse.
    #[error("{} is corrupt ({reason}): restore the file, or move the data directory away; a broker of a cluster then \
        copies its replicas again, and a standalone broker starts without records",
        file.display())]
    Corrupt {
        /// Path of the file.
        file: PathBuf,
        /// Error in the content.
        reason: String,
    },
    /// The file system returned an error.
    #[error("data directory {}: cannot {what}: {source}", path.display())]
    Io {
        /// Path of the file or directory.
        path: PathBuf,
        /// Operation that failed.
        what: &'static str,
        /// Error of the file system.
        source: io::Error,
    },
}

/// Error of opening or deleting a replica.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The replica has a writer already.
    #[error("partition {id} is already open")]
    Open {
        /// Partition of the replica.
        id: PartitionId,
    },
    /// Acknowledged data is missing, or may be missing because the persisted end is unknown. The segments stay
    /// unchanged.
    #[error("partition {id} {} ({reason}), and its files in {} are kept but not served: a broker of a cluster copies \
        the partition again once another broker leads it; otherwise restore the files",
        lost_data(*unverified, *persisted), dir.display())]
    Lost {
        /// Partition of the replica.
        id: PartitionId,
        /// Persisted end of the replica; meaningless if `unverified` is set.
        persisted: Offset,
        /// True if the persisted end is unknown, so that the data may be an incomplete write instead of a loss.
        unverified: bool,
        /// Description of the missing data.
        reason: String,
        /// Directory of the replica's files.
        dir: PathBuf,
    },
    /// The data directory accepts no writes.
    #[error("the data directory accepts no writes: {reason}")]
    Failed {
        /// Reason of the refusal.
        reason: String,
    },
    /// The file system returned an error.
    #[error("partition {id}: {}: {source}", path.display())]
    Io {
        /// Partition of the replica.
        id: PartitionId,
        /// Path of the file or directory.
        path: PathBuf,
        /// Error of the file system.
        source: io::Error,
    },
}

/// Message part that names the data of a lost replica. `persisted` is its persisted end, which is unknown if
/// `unverified` is set.
fn lost_data(unverified: bool, persisted: Offset) -> String {
    if unverified {
        "may have lost persisted data".to_owned()
    } else {
        format!("has lost persisted data below offset {persisted}")
    }
}

/// Error of an append call. None of the batches of the call is in the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogAppendError {
    /// The disk has too little free space. A later append succeeds once there is space.
    #[error("the disk is full")]
    DiskFull,
    /// The replica no longer accepts writes.
    #[error("the replica accepts no writes: {reason}")]
    Failed {
        /// Reason of the refusal.
        reason: String,
    },
}

impl LogAppendError {
    /// Returns true if the same call may succeed later.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::DiskFull)
    }
}

/// Error of a truncation, reset or eviction.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// The disk has no space for the writes of the change itself. Nothing was changed, and a retry works when there is
    /// space.
    #[error("the disk is full")]
    DiskFull,
    /// The replica or its data directory accepts no more writes, or an eviction could not write.
    #[error("the replica cannot be changed: {reason}")]
    Failed {
        /// Reason of the refusal, or the error of the write.
        reason: String,
    },
}

/// Error of a persist call, or of closing the directory: data may not be on stable storage.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PersistError {
    /// The log was truncated, reset or deleted before the call completed. Batches below a truncation stay in the log.
    #[error("the log was truncated before these records were persisted")]
    Truncated,
    /// A write or a sync failed, or the replica accepts no writes. Both are final.
    #[error("not persisted: {reason}")]
    Failed {
        /// Reason of the failure.
        reason: String,
    },
    /// The journal was closed before the batches were durable.
    #[error("not persisted: the log is closed")]
    Closed,
}

/// Error of a read.
#[derive(Debug, thiserror::Error)]
pub enum LogReadError {
    /// The offset is not on this disk.
    #[error("offset {offset} is not on this disk, which holds {start}..{end}")]
    OutOfRange {
        /// Requested offset.
        offset: Offset,
        /// Local start.
        start: Offset,
        /// Log end.
        end: Offset,
    },
    /// The bytes differ from the written bytes, and are not returned.
    #[error("offset {offset} cannot be read: {} is corrupt at byte {position}: {reason}", file.display())]
    Corrupt {
        /// First offset that cannot be read.
        offset: Offset,
        /// Path of the segment file.
        file: PathBuf,
        /// Position of the corruption in the file.
        position: u64,
        /// Description of the corruption.
        reason: String,
    },
    /// The first batch of the read is larger than the caller permits (`max_batch_bytes`).
    #[error("the batch has {bytes} bytes, which exceeds the memory of the reader")]
    BatchTooLarge {
        /// Size of the batch in bytes.
        bytes: usize,
    },
    /// The file system returned an error.
    #[error("{}: {source}", file.display())]
    Io {
        /// Path of the segment file.
        file: PathBuf,
        /// Error of the file system.
        source: io::Error,
    },
}

/// Returns true if an error means that the disk is full.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Returns a function for `map_err`: it converts a file system error of the operation `what` at `path`. The operation
/// completes the sentence "cannot {what}".
pub(super) fn io_error(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> DataDirError {
    let path = path.to_owned();
    move |source| DataDirError::Io { path, what, source }
}
