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
        Arc, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{
    checkpoint::{Checkpoint, Standing},
    core::{Core, SyncJob},
    directory::Inner,
    disk::{BLOCK, LARGE_PIECE_BYTES, Mode, PIECE_BYTES},
    error::{PersistError, is_full},
    journal::Item,
    reserve,
    shared::Shared,
};
use crate::task::{self, clock};

/// Maximum number of replicas that are synced concurrently. The file system makes concurrent syncs durable with one
/// commit of its own journal, which is the cost of syncing a small file.
const SIDE_BY_SIDE: usize = 4;

/// Number of dirty replicas per sync thread.
const FILES_A_THREAD: usize = 16;

/// Minimum interval between two passes. Under load each pass covers more data for the same number of file system
/// commits.
const PAUSE: Duration = Duration::from_millis(50);

/// Time without a write to the journal after which pieces become large: no acknowledgement waits for the device then.
const JOURNAL_QUIET: Duration = Duration::from_secs(5);

/// Time until a failed checkpoint is retried.
const RETRY: Duration = Duration::from_millis(200);

impl Shared {
    /// Syncs all data appended so far and moves the recovery point to its end. An error is final for this replica.
    pub(super) fn sync(&self) -> Result<(), PersistError> {
        // Outside the lock below, because it takes time.
        self.write_out();
        if let Some(reason) = self.failed.get() {
            return Err(PersistError::Failed { reason: reason.clone() });
        }
        // Each of two concurrent syncs would rely on the unfinished sync of the other.
        let _one_at_a_time = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let (point, generation, names, files) = {
            let mut state = self.state();
            state.unsynced_bytes = 0;
            // All data before the recovery point is synced.
            let first = state.segments.partition_point(|segment| segment.info.base < state.recovery.segment.base);
            let files: Vec<_> = state.segments[first..].iter().map(|segment| segment.file.clone()).collect();
            (state.point(), state.generation, std::mem::take(&mut state.names_changed), files)
        };
        let synced = || -> io::Result<()> {
            for file in files {
                if file.dirty.swap(false, Ordering::AcqRel) {
                    match self.core.files.get(file.serial, &file.path, Mode::Read) {
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
            let reason = format!("a segment could not be synced: {error}");
            self.fail(reason.clone());
            return Err(PersistError::Failed { reason });
        }
        let mut state = self.state();
        if state.generation != generation {
            return Err(PersistError::Cut);
        }
        let end = point.segment.end;
        state.recovery = point;
        state.persisted_end = state.persisted_end.max(end);
        while state.unsynced.front().is_some_and(|(_, last)| *last <= end) {
            state.unsynced.pop_front();
        }
        Ok(())
    }

    /// Writes out the data appended since the last call, except the page that the next append writes to. Waits for the
    /// device. An error is final for this replica.
    fn write_out(&self) {
        self.gathered.store(0, Ordering::Release);
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
            let piece_bytes = self.core.piece_bytes.load(Ordering::Relaxed);
            if let Err(error) = self.core.disk.write_out(&file.path, range, piece_bytes) {
                self.fail(format!("a segment could not be written out: {error}"));
            }
        }
    }

    fn holds(&self, serial: u64) -> bool {
        self.state().segments.iter().any(|segment| segment.file.serial == serial)
    }

    /// Makes the names of this replica's files and directories durable.
    pub(super) fn sync_names(&self) -> io::Result<()> {
        for dir in self.dir.ancestors().take(3) {
            self.core.disk.sync_dir(dir)?;
        }
        Ok(())
    }
}

impl Inner {
    /// Runs one pass: first the persist calls that exceed the journal's limit, then all dirty replicas, then the ring.
    /// Returns false if the ring could not be recycled.
    pub(super) fn sync_step(&self) -> bool {
        self.write_out_pieces();
        self.sync_jobs();
        let (dirty, urgent) = {
            let mut work = self.core.work();
            work.dirty_bytes = 0;
            work.since = None;
            work.last_pass = Some(clock::monotonic());
            (std::mem::take(&mut work.dirty), std::mem::take(&mut work.urgent))
        };
        self.take_reserve();
        if !mutant!(ReuseJournalFileBeforeSync) {
            self.sync_dirty(&dirty);
        }
        let short = self.ring().short();
        if !urgent && !short {
            return true;
        }
        let recycled = self.recycle();
        let whole = recycled.is_ok();
        self.note_checkpoint(recycled.err());
        let has_free = self.ring().has_free();
        let mut work = self.core.work();
        work.fruitless = if has_free || !whole { 0 } else { work.fruitless.saturating_add(1) };
        whole
    }

    /// Logs the first failure of a series of checkpoints, and its end. A failed checkpoint is retried several times a
    /// second.
    fn note_checkpoint(&self, error: Option<io::Error>) {
        let path = self.core.dir.display();
        let mut known = self.core.checkpoint_error();
        match &error {
            Some(error) if known.is_none() => {
                tracing::warn!(%path, %error, "the checkpoint cannot be written; it is tried again, and acknowledgements may wait for it");
            }
            None if known.is_some() => tracing::info!(%path, "the checkpoint can be written again"),
            _ => {}
        }
        let since = known.as_ref().map_or_else(clock::monotonic, |(since, _)| *since);
        *known = error.map(|error| (since, error));
    }

    fn sync_dirty(&self, dirty: &[Arc<Shared>]) {
        let threads = dirty.len().div_ceil(FILES_A_THREAD).clamp(1, SIDE_BY_SIDE);
        let threads = if self.core.options.manual { 1 } else { threads };
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
    pub(super) fn write_out_pieces(&self) {
        let (round, now) = (self.core.journal.next_round(), clock::monotonic());
        let mut work = self.core.work();
        let since = match work.journal_use {
            Some((last, since)) if last == round => since,
            _ => now,
        };
        work.journal_use = Some((round, since));
        let pieces = std::mem::take(&mut work.pieces);
        drop(work);
        let is_quiet = now.saturating_duration_since(since) >= JOURNAL_QUIET;
        self.core.piece_bytes.store(if is_quiet { LARGE_PIECE_BYTES } else { PIECE_BYTES }, Ordering::Relaxed);
        pieces.iter().for_each(|replica| replica.write_out());
    }

    fn sync_jobs(&self) {
        loop {
            let Some(SyncJob { replica, head, done }) = self.core.work().jobs.pop_front() else { return };
            let cut = || if replica.state().generation == head.generation { Ok(()) } else { Err(PersistError::Cut) };
            match replica.sync().and_then(|()| cut()) {
                Ok(()) => {
                    let item = Item { head, batches: Vec::new(), bytes: 0, replica: replica.clone(), done: Some(done) };
                    self.core.journal.submit(item);
                }
                Err(error) => done(Err(error)),
            }
            let mut state = replica.state();
            state.syncing = state.syncing.saturating_sub(1);
        }
    }

    /// Writes a checkpoint and releases the ring files that nothing needs any longer.
    pub(super) fn recycle(&self) -> io::Result<()> {
        let _one_at_a_time = self.core.recycling.lock().unwrap_or_else(PoisonError::into_inner);
        let open = self.open_replicas();
        let oldest = open.iter().filter_map(|replica| replica.state().unsynced.front().map(|(file, _)| *file)).min();
        let oldest = oldest.filter(|_| !mutant!(ReuseJournalFileBeforeSync));
        let first_round = self.ring().start_after(oldest.unwrap_or(u64::MAX), self.core.journal.next_round());
        self.write_checkpoint(&self.checkpoint(first_round, Standing::Running))?;
        self.ring().release(first_round);
        self.core.journal.released.notify_all();
        Ok(())
    }

    /// Replaces the checkpoint. On a full disk it uses the space of the reserve. An eviction that would make space
    /// waits for the journal, and the journal waits for this checkpoint.
    pub(super) fn write_checkpoint(&self, checkpoint: &Checkpoint) -> io::Result<()> {
        let core = &self.core;
        let write = || checkpoint.write(&*core.disk, &core.dir, self.directory_id);
        match write() {
            Err(error) if is_full(&error) && reserve::release(&*core.disk, &core.dir) => {
                core.reserved.store(core.options.reserve_bytes == 0, Ordering::Release);
                write()
            }
            written => written,
        }
    }

    /// Returns the checkpoint of the current state, for replay from `first_round` on.
    pub(super) fn checkpoint(&self, first_round: u64, standing: Standing) -> Checkpoint {
        let registry = self.registry();
        let mut replicas: Vec<_> = registry.dormant.values().map(|dormant| dormant.record.clone()).collect();
        replicas.extend(registry.open.values().map(|replica| replica.record()));
        replicas.sort_by_key(|record| record.id);
        Checkpoint { first_round, generation: self.core.generation.load(Ordering::Acquire), standing, replicas }
    }

    /// Creates the reserve if it does not exist and the disk has plenty of space.
    pub(super) fn take_reserve(&self) {
        let core = &self.core;
        if core.reserved.load(Ordering::Acquire) {
            return;
        }
        match reserve::take(&*core.disk, &core.dir, core.options.reserve_bytes) {
            Ok(taken) => core.reserved.store(taken, Ordering::Release),
            // The reserve serves only starts and checkpoints on a full disk.
            Err(error) => tracing::debug!(%error, "the reserve was not made; it is tried again"),
        }
    }
}

/// Runs the sync thread: waits for work and does it.
pub(super) fn run(inner: &Arc<Inner>) {
    loop {
        match wait(&inner.core) {
            Due::Pass => {}
            Due::Pieces => {
                inner.write_out_pieces();
                continue;
            }
            Due::End => return,
        }
        if !inner.sync_step() {
            // The disk is probably full. The retry comes soon, but not in a tight loop.
            let mut work = inner.core.work();
            work.urgent = true;
            let waited = inner.core.wake.wait_timeout_while(work, RETRY, |work| !work.stopping);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
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
fn wait(core: &Core) -> Due {
    let mut work = core.work();
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
            Some(_) if core.sync_is_due(&work) => {
                Some(work.last_pass.map_or(Duration::ZERO, |last| after(last, PAUSE)))
            }
            Some(since) => Some(after(since, core.options.sync_after)),
            None => None,
        };
        work = match left {
            Some(left) if left.is_zero() => return Due::Pass,
            _ if !work.pieces.is_empty() => return Due::Pieces,
            Some(left) => core.wake.wait_timeout(work, left).unwrap_or_else(PoisonError::into_inner).0,
            None => core.wake.wait(work).unwrap_or_else(PoisonError::into_inner),
        };
    }
}
