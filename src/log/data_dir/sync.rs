//! Syncing segments in the background: by bytes, by time, and when the journal's ring has few free files. One thread
//! runs the passes.
//!
//! # Overview
//!
//! Appended data is written out before its sync, in pieces and without a flush. The sync then finds little to write,
//! and the journal's next write never waits behind many megabytes.
//!
//! # Invariants
//!
//! - A pass takes every dirty replica, records its log end, syncs its files, and only then moves its recovery point.
//! - When ring files hold nothing but synced entries, a checkpoint is written first, and then the files are released.
//!   In this order replay never misses an entry that it needs.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::DataDirInner;
use crate::{
    log::{
        disk::{BLOCK, LARGE_PIECE_BYTES, OpenMode, PIECE_BYTES},
        error::{PersistError, is_full},
        format::checkpoint::{Checkpoint, CheckpointKind},
        journal::JournalEntry,
        replica::{
            context::{LogContext, SyncJob},
            state::ReplicaInner,
        },
    },
    task::{self, clock},
};

/// Maximum number of replicas that are synced concurrently. The file system makes concurrent syncs durable with one
/// commit of its own journal, which is the cost of syncing a small file.
const MAX_SYNC_THREADS: usize = 4;

/// Number of dirty replicas per sync thread.
const FILES_PER_SYNC_THREAD: usize = 16;

/// Minimum interval between two passes. Under load each pass covers more data for the same number of file system
/// commits.
const MIN_PASS_INTERVAL: Duration = Duration::from_millis(50);

/// Time without a write to the journal after which pieces become large: no acknowledgement waits for the device then.
const JOURNAL_QUIET: Duration = Duration::from_secs(5);

/// Time until a failed checkpoint is retried.
const CHECKPOINT_RETRY_INTERVAL: Duration = Duration::from_millis(200);

impl ReplicaInner {
    /// Syncs all data appended so far and moves the recovery point to its end. An error is final for this replica.
    pub(in crate::log) fn sync(&self) -> Result<(), PersistError> {
        // Outside the lock below, because it takes time.
        self.write_out();
        if let Some(reason) = self.failed.get() {
            return Err(PersistError::Failed { reason: reason.clone() });
        }
        // Each of two concurrent syncs would rely on the unfinished sync of the other.
        let _one_at_a_time = self.syncing.lock();
        let (point, generation, names, files) = {
            let mut state = self.state();
            state.unsynced_bytes = 0;
            // All data before the recovery point is synced.
            let first = state.segments.partition_point(|segment| segment.info.base < state.recovery.segment.base);
            let files: Vec<_> = state.segments[first..].iter().map(|segment| segment.file.clone()).collect();
            (state.recovery_point(), state.generation, std::mem::take(&mut state.names_changed), files)
        };
        let synced = || -> io::Result<()> {
            for file in files {
                if file.dirty.swap(false, Ordering::AcqRel) {
                    match self.ctx.files.get(file.serial, &file.path, OpenMode::Read) {
                        Ok(open) => open.file.sync()?,
                        // The segment was evicted or truncated meanwhile.
                        Err(error) if error.kind() == io::ErrorKind::NotFound && !self.holds(file.serial) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
            if names {
                self.sync_names()?;
            }
            Ok(())
        };
        if let Err(error) = synced() {
            let reason = format!("cannot sync a segment: {error}");
            self.fail(reason.clone());
            return Err(PersistError::Failed { reason });
        }
        let mut state = self.state();
        if state.generation != generation {
            return Err(PersistError::Truncated);
        }
        let end = point.segment.end;
        state.recovery = point;
        state.persisted_end = state.persisted_end.max(end);
        while state.journal_pins.front().is_some_and(|(_, last)| *last <= end) {
            state.journal_pins.pop_front();
        }
        Ok(())
    }

    /// Writes out the data appended since the last call, except the page that the next append writes to. Waits for the
    /// device. An error is final for this replica.
    fn write_out(&self) {
        self.unwritten_bytes.store(0, Ordering::Release);
        let mut ranges = Vec::new();
        {
            let state = self.state();
            let active = state.segments.len() - 1;
            for (number, segment) in state.segments.iter().enumerate().rev() {
                let bytes = segment.info.bytes;
                let end = if number == active { bytes - bytes % BLOCK as u64 } else { bytes };
                let start = segment.file.written_out.load(Ordering::Acquire);
                if start < end {
                    ranges.push((segment.file.clone(), start..end));
                } else if number < active {
                    // Earlier segments were written out no later than this one.
                    break;
                }
            }
        }
        for (file, range) in ranges.into_iter().rev() {
            file.written_out.store(range.end, Ordering::Release);
            let piece_bytes = self.ctx.piece_bytes.load(Ordering::Relaxed);
            if let Err(error) = self.ctx.disk.write_out(&file.path, range, piece_bytes) {
                self.fail(format!("cannot write out a segment: {error}"));
            }
        }
    }

    fn holds(&self, serial: u64) -> bool {
        self.state().segments.iter().any(|segment| segment.file.serial == serial)
    }

    /// Makes the names of this replica's files and directories durable.
    pub(in crate::log) fn sync_names(&self) -> io::Result<()> {
        for dir in self.dir.ancestors().take(3) {
            self.ctx.disk.sync_dir(dir)?;
        }
        Ok(())
    }
}

impl DataDirInner {
    /// Runs one pass: first the persist calls that exceed the journal's limit, then all dirty replicas, then the ring.
    /// Returns false if the ring could not be recycled.
    pub(in crate::log) fn sync_pass(&self) -> bool {
        self.write_out_pieces();
        self.sync_jobs();
        let (dirty, urgent) = {
            let mut work = self.ctx.work();
            work.dirty_bytes = 0;
            work.since = None;
            work.last_pass = Some(clock::monotonic());
            (std::mem::take(&mut work.dirty), std::mem::take(&mut work.urgent))
        };
        self.ctx.budget.create_reserve();
        if !mutant!(ReuseJournalFileBeforeSync) {
            self.sync_dirty(&dirty);
        }
        let is_low = self.ctx.journal.is_low();
        if !urgent && !is_low {
            return true;
        }
        let recycled = self.recycle();
        let is_recycled = recycled.is_ok();
        self.record_checkpoint_result(recycled.err());
        let has_free = self.ctx.journal.has_free_file();
        let mut work = self.ctx.work();
        work.passes_without_progress =
            if has_free || !is_recycled { 0 } else { work.passes_without_progress.saturating_add(1) };
        is_recycled
    }

    /// Logs the first failure of a series of checkpoints, and its end. A failed checkpoint is retried several times a
    /// second.
    fn record_checkpoint_result(&self, error: Option<io::Error>) {
        let path = self.ctx.dir.display();
        let mut current = self.ctx.checkpoint_error();
        match &error {
            Some(error) if current.is_none() => {
                tracing::warn!(%path, %error, "cannot write the checkpoint, retrying: acknowledgements may wait");
            }
            None if current.is_some() => tracing::info!(%path, "the checkpoint is written again"),
            _ => {}
        }
        let since = current.as_ref().map_or_else(clock::monotonic, |(since, _)| *since);
        *current = error.map(|error| (since, error));
    }

    fn sync_dirty(&self, dirty: &[Arc<ReplicaInner>]) {
        let threads = dirty.len().div_ceil(FILES_PER_SYNC_THREAD).clamp(1, MAX_SYNC_THREADS);
        let threads = if self.ctx.options.step_mode { 1 } else { threads };
        let next = AtomicUsize::new(0);
        task::run_scoped("segment-sync", threads, |thread| {
            while let Some(replica) = dirty.get(next.fetch_add(1, Ordering::Relaxed)) {
                replica.dirty.store(false, Ordering::Release);
                drop(replica.sync());
                // Only one thread does this, so that the results keep their order.
                if thread == 0 {
                    self.sync_jobs();
                    self.write_out_pieces();
                }
            }
        });
    }

    /// Sets the size of a piece by the use of the journal, and writes out every replica with a full piece.
    pub(in crate::log) fn write_out_pieces(&self) {
        let (frame, now) = (self.ctx.journal.next_frame(), clock::monotonic());
        let mut work = self.ctx.work();
        let since = match work.journal_use {
            Some((last, since)) if last == frame => since,
            _ => now,
        };
        work.journal_use = Some((frame, since));
        let pieces = std::mem::take(&mut work.pieces);
        drop(work);
        let is_quiet = now.saturating_duration_since(since) >= JOURNAL_QUIET;
        self.ctx.piece_bytes.store(if is_quiet { LARGE_PIECE_BYTES } else { PIECE_BYTES }, Ordering::Relaxed);
        pieces.iter().for_each(|replica| replica.write_out());
    }

    fn sync_jobs(&self) {
        loop {
            let Some(SyncJob { replica, head, done }) = self.ctx.work().jobs.pop_front() else { return };
            let check_generation =
                || if replica.state().generation == head.generation { Ok(()) } else { Err(PersistError::Truncated) };
            match replica.sync().and_then(|()| check_generation()) {
                Ok(()) => {
                    let entry =
                        JournalEntry { head, batches: Vec::new(), bytes: 0, client: replica.clone(), done: Some(done) };
                    self.ctx.journal.submit(entry);
                }
                Err(error) => done(Err(error)),
            }
            let mut state = replica.state();
            state.syncing = state.syncing.saturating_sub(1);
        }
    }

    /// Writes a checkpoint and releases the ring files that nothing needs any longer.
    pub(in crate::log) fn recycle(&self) -> io::Result<()> {
        let _one_at_a_time = self.ctx.recycling.lock();
        let open = self.open_replicas();
        let oldest =
            open.iter().filter_map(|replica| replica.state().journal_pins.front().map(|(file, _)| *file)).min();
        let oldest = oldest.filter(|_| !mutant!(ReuseJournalFileBeforeSync));
        let first_frame = self.ctx.journal.start_after(oldest.unwrap_or(u64::MAX));
        self.write_checkpoint(&self.checkpoint(first_frame, CheckpointKind::Running))?;
        self.ctx.journal.release(first_frame);
        Ok(())
    }

    /// Replaces the checkpoint. On a full disk it uses the space of the reserve. An eviction that would make space
    /// waits for the journal, and the journal waits for this checkpoint.
    pub(in crate::log) fn write_checkpoint(&self, checkpoint: &Checkpoint) -> io::Result<()> {
        let ctx = &self.ctx;
        let write = || checkpoint.write(&*ctx.disk, &ctx.dir, self.directory_id);
        match write() {
            Err(error) if is_full(&error) && ctx.budget.release_reserve() => write(),
            written => written,
        }
    }

    /// Returns the checkpoint of the current state, for replay from `first_frame` on.
    pub(in crate::log) fn checkpoint(&self, first_frame: u64, kind: CheckpointKind) -> Checkpoint {
        let registry = self.registry();
        let mut replicas: Vec<_> = registry.unopened.values().map(|unopened| unopened.record.clone()).collect();
        replicas.extend(registry.open.values().map(|replica| replica.checkpoint_record()));
        replicas.sort_by_key(|record| record.id);
        Checkpoint { first_frame, generation: self.ctx.generation.load(Ordering::Acquire), standing: kind, replicas }
    }
}

/// Runs the sync thread: waits for work and does it.
pub(in crate::log) fn run(inner: &Arc<DataDirInner>) {
    loop {
        match wait_for_work(&inner.ctx) {
            Due::Pass => {}
            Due::Pieces => {
                inner.write_out_pieces();
                continue;
            }
            Due::End => return,
        }
        if !inner.sync_pass() {
            // The disk is probably full. The retry comes soon, but not in a tight loop.
            let mut work = inner.ctx.work();
            work.urgent = true;
            inner.ctx.wake.wait_while_for(&mut work, |work| !work.stopping, CHECKPOINT_RETRY_INTERVAL);
        }
    }
}

/// Next action of the sync thread.
enum Due {
    /// A pass of syncs.
    Pass,
    /// A write-out of the queued pieces.
    Pieces,
    /// The end, because the log stops.
    End,
}

/// Waits until an action is due, and returns it.
fn wait_for_work(ctx: &LogContext) -> Due {
    let mut work = ctx.work();
    loop {
        if work.stopping {
            return Due::End;
        }
        if work.urgent || !work.jobs.is_empty() {
            return Due::Pass;
        }
        let now = clock::monotonic();
        let after =
            |since: tokio::time::Instant, wait: Duration| wait.saturating_sub(now.saturating_duration_since(since));
        let left = match work.since {
            Some(_) if ctx.sync_is_due(&work) => {
                Some(work.last_pass.map_or(Duration::ZERO, |last| after(last, MIN_PASS_INTERVAL)))
            }
            Some(since) => Some(after(since, ctx.options.sync_after)),
            None => None,
        };
        match left {
            Some(left) if left.is_zero() => return Due::Pass,
            _ if !work.pieces.is_empty() => return Due::Pieces,
            Some(left) => _ = ctx.wake.wait_for(&mut work, left),
            None => ctx.wake.wait(&mut work),
        }
    }
}
