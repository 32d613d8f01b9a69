//! Sync passes over all replicas, checkpoints, and the release of journal files. The sync thread runs the passes; a
//! closing directory runs its own. A pass is due after a number of bytes, or after a time. A pass is also due when a
//! persist call needs a sync, or when the journal's ring has few free files.
//!
//! # Invariants
//!
//! - A pass takes every dirty replica, notes its log end, syncs its files, and only then moves its recovery point to
//!   that end.
//! - When no replica needs a ring file, a checkpoint that starts replay after the file is written first, and then the
//!   file is released. In this order replay never misses an entry that it needs.

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::DataDirInner;
use crate::{
    log::{
        error::is_full,
        format::{Checkpoint, CheckpointKind},
        replica::{ReplicaInner, SyncAction},
    },
    task::{self, clock},
    telemetry::LogThrottle,
};

/// Maximum number of replicas that are synced concurrently. A sync of a small file costs one commit of the file
/// system's own journal. Concurrent syncs share this commit.
const MAX_SYNC_THREADS: usize = 4;

/// Number of dirty replicas per sync thread. At most `MAX_SYNC_THREADS` threads are used.
const FILES_PER_SYNC_THREAD: usize = 16;

/// Failures of checkpoints. A failed checkpoint is retried several times a second.
#[derive(Default)]
pub(super) struct CheckpointFailures {
    /// Start of the current series of failures, and the last error; `None` while checkpoints succeed.
    current: Option<(Instant, io::Error)>,
    throttle: LogThrottle,
}

impl CheckpointFailures {
    /// Updates the state after a checkpoint, and logs the first failure, reminders at intervals, and the recovery.
    /// `error` is `None` after a success.
    fn record(&mut self, dir: &Path, error: Option<io::Error>) {
        let (path, now) = (dir.display(), clock::monotonic());
        if let Some(error) = &error
            && self.throttle.occur(now).is_some()
        {
            tracing::warn!(%path, %error, "cannot write the checkpoint, retrying: acknowledgements may wait");
        }
        if error.is_none() && self.throttle.recover().is_some() {
            tracing::info!(%path, "the checkpoint is written again");
        }
        let since = self.current.as_ref().map_or(now, |(since, _)| *since);
        self.current = error.map(|error| (since, error));
    }

    /// Returns the last error, if checkpoints have failed for at least `min`.
    pub(super) fn lasting(&self, min: Duration) -> Option<&io::Error> {
        self.current.as_ref().filter(|(since, _)| since.elapsed() >= min).map(|(_, error)| error)
    }
}

impl DataDirInner {
    /// Runs one pass: writes out full pieces, runs the queued persist calls, tries to create a missing reserve, and
    /// syncs all dirty replicas. If the pass was requested or few journal files are free, the pass then recycles the
    /// ring. Returns false if the recycling failed.
    pub(super) fn sync_pass(&self) -> bool {
        let (journal, queue) = (&self.ctx.journal, &self.ctx.sync_queue);
        self.write_out_pieces();
        self.run_jobs();
        let (dirty, is_urgent) = queue.begin_pass();
        self.ctx.budget.create_reserve();
        if !mutant!(ReuseJournalFileBeforeSync) {
            self.sync_dirty(&dirty);
        }
        if !is_urgent && !journal.is_low() {
            return true;
        }
        let recycled = self.recycle();
        let is_recycled = recycled.is_ok();
        self.checkpoint_failures.lock().record(&self.ctx.dir, recycled.err());
        // A failed checkpoint has its own time limit, so it does not count as a pass without progress.
        queue.end_pass(!is_recycled || journal.has_free_file());
        is_recycled
    }

    /// Syncs these replicas, on several threads if there are many.
    fn sync_dirty(&self, dirty: &[Arc<ReplicaInner>]) {
        let threads = dirty.len().div_ceil(FILES_PER_SYNC_THREAD).clamp(1, MAX_SYNC_THREADS);
        let threads = if self.ctx.options.step_mode { 1 } else { threads };
        let next = AtomicUsize::new(0);
        task::run_scoped("segment-sync", threads, |thread| {
            while let Some(replica) = dirty.get(next.fetch_add(1, Ordering::Relaxed)) {
                replica.sync_queued();
                // Only one thread runs the jobs, so that the results keep the order of the persist calls.
                if thread == 0 {
                    self.run_jobs();
                    self.write_out_pieces();
                }
            }
        });
    }

    /// Writes appended data from the page cache to the device, without a sync. Selects each replica that has appended
    /// at least one piece since its last write-out (`PIECE_BYTES`, or `LARGE_PIECE_BYTES` while the journal is idle).
    pub(super) fn write_out_pieces(&self) {
        let pieces = self.ctx.sync_queue.take_pieces(self.ctx.journal.next_frame());
        pieces.iter().for_each(|replica| replica.write_out());
    }

    /// Runs the queued persist calls that need a sync.
    fn run_jobs(&self) {
        while let Some(job) = self.ctx.sync_queue.pop_job() {
            job.run();
        }
    }

    /// Writes a checkpoint, and then releases the ring files before the oldest one that an open replica needs.
    pub(super) fn recycle(&self) -> io::Result<()> {
        let _one_at_a_time = self.recycling.lock();
        let replicas = self.registry.lock().open_replicas();
        let oldest = replicas.iter().filter_map(|replica| replica.oldest_pin()).map(|(file, _)| file).min();
        let oldest = oldest.filter(|_| !mutant!(ReuseJournalFileBeforeSync));
        let first_frame = self.ctx.journal.start_after(oldest.unwrap_or(u64::MAX));
        self.write_checkpoint(&self.checkpoint(first_frame, CheckpointKind::Running))?;
        self.ctx.journal.release(first_frame);
        Ok(())
    }

    /// Replaces the checkpoint. On a full disk the checkpoint uses the space of the reserve. An eviction that would
    /// make space waits for the journal, and the journal waits for this checkpoint.
    pub(super) fn write_checkpoint(&self, checkpoint: &Checkpoint) -> io::Result<()> {
        let ctx = &self.ctx;
        let write = || checkpoint.write(&*ctx.disk, &ctx.dir, self.directory_id);
        match write() {
            Err(error) if is_full(&error) && ctx.budget.release_reserve() => write(),
            written => written,
        }
    }

    /// Returns the checkpoint of the current state, for replay from `first_frame` on.
    pub(super) fn checkpoint(&self, first_frame: u64, kind: CheckpointKind) -> Checkpoint {
        let replicas = self.registry.lock().checkpoint_records();
        Checkpoint { first_frame, generation: self.ctx.last_generation(), kind, replicas }
    }

    /// Runs the sync thread until [`SyncAction::Stop`].
    pub(super) fn run_syncs(&self) {
        let queue = &self.ctx.sync_queue;
        loop {
            match queue.next_action() {
                SyncAction::Pass => {
                    if !self.sync_pass() {
                        queue.wait_for_retry();
                    }
                }
                SyncAction::WriteOut => self.write_out_pieces(),
                SyncAction::Stop => return,
            }
        }
    }
}
