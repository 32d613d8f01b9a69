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
    /// It holds data, and not the file that says whose.
    #[error("data directory {} holds {found}, and not strandline.json, which says whose they are. Put that file back{}; or, if this \
        data is not wanted, name an empty directory (broker.data_dir, --data-dir)", dir.display(), card.as_ref()
        .map(|card| format!(" (by the checkpoint, if it is this broker's directory, it reads {card})")).unwrap_or_default())]
    Unidentified {
        /// The directory.
        dir: PathBuf,
        /// What is in it.
        found: String,
        /// What the file would hold, as far as the checkpoint tells.
        card: Option<String>,
    },
    /// It was not stopped cleanly, and the journal that it was running with is not there.
    #[error("data directory {} was not stopped cleanly, and its journal is not in {}: {why}. Acknowledged records may be in it \
        alone. Mount its device, or name its folder (log.journal_dir). To go on without it and lose them, start once with \
        log.accept_journal_loss = true", dir.display(), journal_dir.display())]
    JournalLost {
        /// The directory.
        dir: PathBuf,
        /// Where the journal was looked for.
        journal_dir: PathBuf,
        /// What was found there.
        why: String,
    },
    /// The journal's folder is used by another data directory.
    #[error("{} holds the journal of another data directory (id {other}): give data directory {} a journal folder of its own \
        (log.journal_dir), or empty that one if the other directory is gone", journal_dir.display(), dir.display())]
    JournalForeign {
        /// The directory.
        dir: PathBuf,
        /// The journal's folder.
        journal_dir: PathBuf,
        /// Whose it is.
        other: uuid::Uuid,
    },
    /// There is no room for the journal.
    #[error("log.journal_bytes = {bytes} is more than {} has room for: {free} bytes are free. Set it lower, or name a folder on a \
        larger device (log.journal_dir)", journal_dir.display())]
    JournalTooLarge {
        /// The journal's folder.
        journal_dir: PathBuf,
        /// The journal's size.
        bytes: u64,
        /// What is free.
        free: u64,
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
    /// No room for what a change writes itself. Nothing was changed; it works when there is room.
    #[error("the disk is full")]
    DiskFull,
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
    /// The batch is larger than the reader has memory for.
    #[error("the batch has {bytes} bytes, and there is memory for fewer")]
    BatchTooLarge {
        /// Its bytes.
        bytes: usize,
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
