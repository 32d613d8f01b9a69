//! Operations on the log other than appends: rolling, export for uploads, truncation, the log start, eviction.
//!
//! Work that waits for journal frames or reads segments runs outside the async threads. The task moves its replica to a
//! thread that may block, and waits until that thread returns the replica. Meanwhile the task handles no input.

use std::{
    io,
    ops::{Deref, DerefMut},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Actor,
    leading::{AppendError, append_error},
    warnings::Condition,
};
use crate::{
    log::{ChangeError, ReplicaLog, SegmentExport, SegmentInfo},
    model::Offset,
    task::{self, clock},
};

/// Cell of the task's replica. It is empty only during [`ReplicaCell::run_blocking`].
pub(super) struct ReplicaCell(Option<ReplicaLog>);

const REPLICA_LENT: &str = "the task waits until run_blocking has returned the replica";

impl ReplicaCell {
    pub(super) fn new(replica: ReplicaLog) -> Self {
        Self(Some(replica))
    }

    /// Runs blocking work on the replica, on a thread that may block, and waits for it.
    pub(super) async fn run_blocking<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut ReplicaLog) -> T + Send + 'static,
    ) -> T {
        let mut replica = self.0.take().expect(REPLICA_LENT);
        let (replica, output) = task::run_blocking(move || {
            let output = work(&mut replica);
            (replica, output)
        })
        .await;
        self.0 = Some(replica);
        output
    }
}

impl Deref for ReplicaCell {
    type Target = ReplicaLog;

    fn deref(&self) -> &ReplicaLog {
        self.0.as_ref().expect(REPLICA_LENT)
    }
}

impl DerefMut for ReplicaCell {
    fn deref_mut(&mut self) -> &mut ReplicaLog {
        self.0.as_mut().expect(REPLICA_LENT)
    }
}

/// Returns the time of the first batch of an active segment, by the monotonic clock; `None` while the segment is empty.
/// Called at an open and after a truncation: then only the wall clock shows the age. If the wall clock went back since
/// that batch, the segment counts as new.
pub(super) fn active_since(info: &SegmentInfo) -> Option<Instant> {
    let age = u64::try_from(clock::wall_ms().saturating_sub(info.created_ms)).unwrap_or(0);
    let now = clock::monotonic();
    (info.bytes > 0).then(|| now.checked_sub(Duration::from_millis(age)).unwrap_or(now))
}

impl Actor {
    /// Seals the active segment and starts the next one. Queues maintenance, because the sealed segment may be
    /// uploaded.
    pub(super) fn roll(&mut self) -> Result<(), AppendError> {
        self.log.roll().map_err(append_error)?;
        self.active_since = None;
        self.maintenance.push(self.id);
        Ok(())
    }

    /// Seals the active segment at the request of maintenance; an empty segment is not sealed. A failure is only
    /// logged: maintenance requests the roll again.
    pub(super) fn roll_now(&mut self) {
        if self.active_since.is_some()
            && let Err(error) = self.roll()
            && let Some(count) = self.warnings.occur(Condition::CannotRoll)
        {
            tracing::warn!(
                topic = %self.topic, partition = %self.id, %error, count,
                "cannot roll the segment; retrying"
            );
        }
    }

    /// Exports the sealed segment at `base`, which stays readable even if it is evicted meanwhile.
    pub(super) async fn export(&mut self, base: Offset) -> io::Result<SegmentExport> {
        self.log.run_blocking(move |replica| replica.export(base)).await
    }

    /// Truncates or resets the log by `change`. Publishes the state before the change, and again after its success.
    /// Returns false if the disk has failed, which is final, or is full. A full disk changes nothing, and the caller
    /// retries later.
    pub(super) async fn change_log(
        &mut self,
        change: impl FnOnce(&mut ReplicaLog) -> Result<(), ChangeError> + Send + 'static,
    ) -> bool {
        // Barrier: readers must see the new role and high watermark before the records are removed.
        self.publish();
        let active = self.log.active_segment();
        match self.log.run_blocking(change).await {
            Ok(()) => {
                // The change synced the remaining records. The journal's result for an earlier submission does not
                // count.
                self.persisted_submit_end = self.log.persisted_end();
                let remaining = self.log.active_segment();
                if remaining.base != active.base || remaining.bytes == 0 {
                    self.active_since = active_since(&remaining);
                }
                // Barrier: the next subscription acknowledges the published ends.
                self.publish();
                true
            }
            Err(ChangeError::DiskFull) => false,
            Err(error @ ChangeError::Failed { .. }) => {
                self.fail(&error.to_string());
                false
            }
        }
    }

    /// Moves the start of the replica to the log start, but not above the high watermark. Records above the high
    /// watermark may still have to be truncated, so they are not deleted as old ones.
    pub(super) fn advance_log_start(&mut self) {
        let start = self.log_start.min(self.high_watermark());
        self.log.advance_log_start(start);
    }

    /// Moves the start of the replica, and evicts the segments below this offset. The offset must not be above the
    /// later of tiered end and log start. An error is only logged: maintenance requests the eviction again.
    pub(super) async fn evict(&mut self, below: Offset) {
        let evictable_end = self.tiered_end.max(self.log_start);
        let is_allowed = below <= evictable_end || mutant!(EvictBeforeCommit);
        assert!(is_allowed, "only records in the object store or below the log start are evicted");
        self.advance_log_start();
        let had_failed = self.log.write_error().is_some();
        match self.log.run_blocking(move |replica| replica.evict(below)).await {
            Ok(bytes) => {
                tracing::debug!(partition = %self.id, %below, bytes, "evicted segments");
                sim_event!(Evicted { partition: self.id, start: self.log.local_start() });
            }
            // Already logged: a full disk once for all partitions, and a failed disk when it stopped accepting writes.
            Err(error) if had_failed || error == ChangeError::DiskFull => {
                tracing::debug!(topic = %self.topic, partition = %self.id, %error, "cannot evict segments; retrying");
            }
            Err(error) => {
                if let Some(count) = self.warnings.occur(Condition::CannotEvict) {
                    tracing::warn!(
                        topic = %self.topic, partition = %self.id, %error, count,
                        "cannot evict segments; retrying"
                    );
                }
            }
        }
    }
}
