//! Reads of a leader's log up to its end, for followers. The records may be uncommitted, and may be truncated when another broker leads.

use std::sync::Arc;

use super::{
    ReadError,
    reader::{Fetched, Source, fetched},
    role::Role,
    shared::Shared,
};
use crate::{
    log,
    model::{LeaderEpoch, Offset},
    task,
};

/// Reader of one leader's log in one epoch. It ends with the epoch: records read afterwards may be another leader's. Clones are cheap.
#[derive(Clone)]
pub struct TailReader {
    shared: Arc<Shared>,
    log: log::Reader,
    epoch: LeaderEpoch,
}

impl TailReader {
    pub(super) fn new(shared: Arc<Shared>, log: log::Reader) -> Self {
        let epoch = shared.epoch();
        Self { shared, log, epoch }
    }

    pub fn epoch(&self) -> LeaderEpoch {
        self.epoch
    }

    /// Returns the leader's log end and its high watermark.
    pub fn ends(&self) -> (Offset, Offset) {
        // The high watermark first: it is never above a log end that is read after it.
        let high_watermark = self.shared.marks().high_watermark;
        (self.shared.ends().written, high_watermark)
    }

    /// Reads from `from` on: at least one batch if there is one, beyond that up to `max_bytes`. Returns `None` at the log end. Reads
    /// memory or disk, never the object store.
    ///
    /// # Errors
    /// [`ReadError::Closed`] if this broker no longer leads in that epoch; [`ReadError::OutOfRange`] if `from` is not on this
    /// disk: the follower has to subscribe again.
    pub async fn read(&self, from: Offset, max_bytes: usize) -> Result<Option<Fetched>, ReadError> {
        self.leads()?;
        let bound = self.shared.ends().written;
        if from == bound {
            return Ok(None);
        }
        if from > bound {
            return Err(ReadError::OutOfRange { offset: from, start: self.log.local_start(), end: bound });
        }
        let found = match self.log.read_memory(from, bound, max_bytes) {
            Some(read) => fetched(read, Source::Memory),
            None => {
                let log = self.log.clone();
                let read = task::run_blocking(move || log.read_disk(from, bound, max_bytes)).await;
                fetched(read.map_err(|error| self.failed(from, error))?, Source::Disk)
            }
        };
        // Before this broker follows another one it publishes that, and only then it truncates: so this was the log of that epoch.
        self.leads()?;
        Ok(Some(found))
    }

    /// Checks that this broker still leads in that epoch.
    pub(super) fn leads(&self) -> Result<(), ReadError> {
        let standing = self.shared.standing();
        if !self.shared.is_closed() && standing.epoch == self.epoch && matches!(standing.role, Role::Leader { .. }) {
            Ok(())
        } else {
            Err(ReadError::Closed)
        }
    }

    fn failed(&self, from: Offset, error: log::ReadError) -> ReadError {
        match error {
            log::ReadError::OutOfRange { start, end, .. } => ReadError::OutOfRange { offset: from, start, end },
            log::ReadError::Damaged { offset, .. } => {
                if let Some(count) = self.shared.count_unsendable() {
                    tracing::error!(
                        partition = %self.log.id(), %offset, %error, count,
                        "the local copy cannot be sent to a follower"
                    );
                }
                ReadError::Damaged { offset, why: error.to_string() }
            }
            other => ReadError::Disk { why: other.to_string() },
        }
    }
}
