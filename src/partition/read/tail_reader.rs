//! Reads of a leader's log up to its end, for followers. The records may be uncommitted, and may be truncated when
//! another broker leads.

use std::sync::Arc;

use super::reader::{FetchedBatches, ReadError, ReadSource, into_fetched};
use crate::{
    log,
    model::{LeaderEpoch, Offset},
    partition::{published::PublishedState, role::ReplicaRole},
    task,
};

/// Reader of this broker's log while the broker leads in one epoch. All reads fail after that leadership, because the
/// log may then hold records of another leader. Clones are cheap.
#[derive(Clone)]
pub struct TailReader {
    published: Arc<PublishedState>,
    log: log::LogReader,
    epoch: LeaderEpoch,
}

impl TailReader {
    pub(in crate::partition) fn new(published: Arc<PublishedState>, log: log::LogReader) -> Self {
        let epoch = published.epoch();
        Self { published, log, epoch }
    }

    pub fn epoch(&self) -> LeaderEpoch {
        self.epoch
    }

    /// Returns the leader's log end and its high watermark.
    pub fn progress(&self) -> (Offset, Offset) {
        // The high watermark is loaded first: it is never above a log end that is loaded later.
        let high_watermark = self.published.watermarks().high_watermark;
        (self.published.progress().log_end, high_watermark)
    }

    /// Reads from `from` on: at least one batch, and further batches up to `max_bytes` in total. Returns `None` if
    /// `from` is the log end. Reads memory or disk, never the object store.
    ///
    /// # Errors
    /// [`ReadError::Closed`] if this broker no longer leads in the reader's epoch, or the partition is closed.
    /// [`ReadError::OutOfRange`] if `from` is below the local start or above the log end: the follower has to subscribe
    /// again. [`ReadError::Corrupt`] or [`ReadError::Disk`] if the disk cannot be read.
    pub async fn read(&self, from: Offset, max_bytes: usize) -> Result<Option<FetchedBatches>, ReadError> {
        self.check_leading()?;
        let bound = self.published.progress().log_end;
        if from == bound {
            return Ok(None);
        }
        if from > bound {
            return Err(ReadError::OutOfRange { offset: from, start: self.log.local_start(), end: bound });
        }
        let batches = match self.log.read_memory(from, bound, max_bytes) {
            Some(read) => into_fetched(read, ReadSource::Memory),
            None => {
                let log = self.log.clone();
                let read = task::run_blocking(move || log.read_disk(from, bound, max_bytes)).await;
                into_fetched(read.map_err(|error| self.read_error(from, error))?, ReadSource::Disk)
            }
        };
        // This broker publishes the end of its leadership before it truncates the log. So if it still leads, the
        // batches are those of the log that the reader's epoch has.
        self.check_leading()?;
        Ok(Some(batches))
    }

    /// Returns [`ReadError::Closed`] if this broker no longer leads in the reader's epoch, or the partition is closed.
    pub(in crate::partition) fn check_leading(&self) -> Result<(), ReadError> {
        let status = self.published.status();
        if !self.published.is_closed()
            && status.epoch == self.epoch
            && matches!(status.role, ReplicaRole::Leader { .. })
        {
            Ok(())
        } else {
            Err(ReadError::Closed)
        }
    }

    /// Converts an error of a local read at `from`. Logs corruption, throttled.
    fn read_error(&self, from: Offset, error: log::LogReadError) -> ReadError {
        match error {
            log::LogReadError::OutOfRange { start, end, .. } => ReadError::OutOfRange { offset: from, start, end },
            log::LogReadError::Corrupt { offset, .. } => {
                if let Some(count) = self.published.count_follower_read_error() {
                    tracing::error!(
                        partition = %self.log.id(), %offset, %error, count,
                        "cannot read records from this broker's disk for a follower, which retries and cannot be in \
                         sync without them: check the disk, and see \"A broker's disk fails\" in docs/operations.md"
                    );
                }
                ReadError::Corrupt { offset, reason: error.to_string() }
            }
            other => ReadError::Disk { reason: other.to_string() },
        }
    }
}
