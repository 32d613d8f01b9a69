//! The segments of a partition as its task handles them: sealing, handing out for an upload, the log start, eviction.
//!
//! What waits for rounds of the journal or reads segments does so away from the async threads: the task lends its replica to a
//! thread that may block, and goes on when it has it back. Meanwhile the mailbox fills and nothing else happens to the log.

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
    log::{ChangeError, Replica, SegmentExport, SegmentInfo},
    model::Offset,
    task::{self, clock},
};

/// Where the task keeps its replica. It is empty only while [`Seat::lend`] is under way.
pub(super) struct Seat(Option<Replica>);

const TAKEN: &str = "the task waits until its replica is back";

impl Seat {
    pub(super) fn new(replica: Replica) -> Self {
        Self(Some(replica))
    }

    /// Does with the replica what may block, on a thread that may.
    pub(super) async fn lend<T: Send + 'static>(&mut self, work: impl FnOnce(&mut Replica) -> T + Send + 'static) -> T {
        let mut replica = self.0.take().expect(TAKEN);
        let (replica, output) = task::run_blocking(move || {
            let output = work(&mut replica);
            (replica, output)
        })
        .await;
        self.0 = Some(replica);
        output
    }
}

impl Deref for Seat {
    type Target = Replica;

    fn deref(&self) -> &Replica {
        self.0.as_ref().expect(TAKEN)
    }
}

impl DerefMut for Seat {
    fn deref_mut(&mut self) -> &mut Replica {
        self.0.as_mut().expect(TAKEN)
    }
}

/// When a segment took its first batch, by the monotonic clock; `None` while it is empty. Only at an opening and after a cut is the wall clock
/// asked how long ago that was: where the clock went back meanwhile, the age counts from now.
pub(super) fn active_since(info: &SegmentInfo) -> Option<Instant> {
    let age = u64::try_from(clock::wall_ms().saturating_sub(info.created_ms)).unwrap_or(0);
    let now = clock::monotonic();
    (info.bytes > 0).then(|| now.checked_sub(Duration::from_millis(age)).unwrap_or(now))
}

impl Actor {
    /// Begins a new segment. What is written stays where it is.
    pub(super) fn seal(&mut self) -> Result<(), AppendError> {
        self.replica.roll().map_err(append_error)?;
        self.active_since = None;
        self.upkeep.push(self.id);
        Ok(())
    }

    /// Seals what upkeep found old enough. Where that fails upkeep asks again.
    pub(super) fn seal_now(&mut self) {
        if self.active_since.is_some()
            && let Err(error) = self.seal()
            && let Some(count) = self.warnings.occur(Condition::CannotSeal)
        {
            tracing::warn!(topic = %self.topic, partition = %self.id, %error, count, "could not seal the segment; it is tried again");
        }
    }

    /// The sealed segment at `base`, to be read whatever is evicted meanwhile.
    pub(super) async fn export(&mut self, base: Offset) -> io::Result<SegmentExport> {
        self.replica.lend(move |replica| replica.export(base)).await
    }

    /// Cuts or empties the log, and forgets what was known of the part that went; false when the disk failed, which is final, or when it is
    /// full: then nothing was changed, and it is to be tried again.
    pub(super) async fn cut_by(
        &mut self,
        change: impl FnOnce(&mut Replica) -> Result<(), ChangeError> + Send + 'static,
    ) -> bool {
        // Whoever reads it as a leader's log is told before that it is none any more, and readers of an end that falls.
        self.publish();
        let active = self.replica.active();
        match self.replica.lend(change).await {
            Ok(()) => {
                // What is left was synced with the cut, but an answer to a hand-over from before speaks of it no more.
                self.handed_end = self.replica.persisted_end();
                let left = self.replica.active();
                if left.base != active.base || left.bytes == 0 {
                    self.active_since = active_since(&left);
                }
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

    /// Tells the log where it starts, as far as it has what is committed: what it may have to cut is not given up from the front.
    pub(super) fn keep_log_start(&mut self) {
        let start = self.log_start.min(self.high_watermark());
        self.replica.advance_log_start(start);
    }

    /// Lets segments leave the disk.
    pub(super) async fn evict(&mut self, below: Offset) {
        let free = self.tiered_end.max(self.log_start);
        let known = below <= free || mutant!(EvictBeforeCommit);
        assert!(known, "only what the bucket has, or nobody may read, leaves the disk");
        self.keep_log_start();
        let has_failed = self.replica.failure().is_some();
        match self.replica.lend(move |replica| replica.evict(below)).await {
            Ok(bytes) => {
                tracing::debug!(partition = %self.id, %below, bytes, "segments left the disk");
                sim_event!(Evicted { partition: self.id, start: self.replica.local_start() });
            }
            // That the disk is full was said, once for all partitions, and so was why a replica takes no writes.
            Err(error) if has_failed || error == ChangeError::DiskFull => {
                tracing::debug!(topic = %self.topic, partition = %self.id, %error, "could not remove segments; it is tried again");
            }
            Err(error) => {
                if let Some(count) = self.warnings.occur(Condition::CannotEvict) {
                    tracing::warn!(topic = %self.topic, partition = %self.id, %error, count, "could not remove segments; it is tried again");
                }
            }
        }
    }
}
