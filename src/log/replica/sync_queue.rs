//! The queue of the sync thread: dirty replicas, replicas with a full piece to write out, and persist calls that need a
//! sync. The queue decides when work is due and runs none of it. A thread that holds its lock takes no other lock.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::ReplicaInner;
use crate::{
    log::{
        disk::{LARGE_PIECE_BYTES, PIECE_BYTES},
        format::EntryHeader,
        journal::{JournalClient, JournalEntry, PersistCallback},
        options::{LogOptions, SimHook},
    },
    task::{
        clock,
        lock::{Condvar, Mutex},
    },
};

/// Average number of unsynced bytes per dirty replica below which their total makes no sync pass due. A sync costs per
/// file, so a pass over many replicas with few bytes each is not worth its cost.
const MIN_SYNC_BYTES_PER_REPLICA: u64 = 512 << 10;

/// Divisor of the journal's ring size. A sync pass is due after at most that share of the ring is unsynced, so that
/// unsynced data pins few ring files. With many dirty replicas the share is larger.
const RING_SHARE: u64 = 8;

/// Divisor of the journal's ring size. A sync pass is due after this share of the ring is unsynced, however many
/// replicas are dirty, so that the ring keeps free files.
const MAX_RING_SHARE: u64 = 4;

/// Minimum time from the start of a pass to a pass that is due for its bytes. Under load each pass covers more data for
/// the same number of file system commits.
const MIN_PASS_INTERVAL: Duration = Duration::from_millis(50);

/// Time without a write to the journal after which pieces become large: no acknowledgement waits for the device then.
const JOURNAL_IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time until a failed checkpoint is retried.
const CHECKPOINT_RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// Queue of the sync thread.
pub(in crate::log) struct SyncQueue {
    /// Unsynced bytes after which a pass is due, if few replicas are dirty.
    due_bytes: u64,
    /// Unsynced bytes after which a pass is due, however many replicas are dirty.
    max_due_bytes: u64,
    /// Time after which a pass is due, however few bytes are unsynced.
    sync_after: Duration,
    step_mode: bool,
    sim_hook: Option<SimHook>,
    /// Bytes per write to the device while segments are written out: `PIECE_BYTES`, or `LARGE_PIECE_BYTES` while the
    /// journal is idle.
    piece_bytes: AtomicUsize,
    state: Mutex<SyncQueueState>,
    wake: Condvar,
}

#[derive(Default)]
struct SyncQueueState {
    /// Replicas with unsynced data.
    dirty: Vec<Arc<ReplicaInner>>,
    /// Unsynced bytes of all replicas.
    dirty_bytes: u64,
    /// Time of the first entry in `dirty`.
    dirty_since: Option<Instant>,
    /// Replicas with a full piece to write out.
    pieces: Vec<Arc<ReplicaInner>>,
    /// Persist calls that need a sync, in order.
    jobs: VecDeque<SyncJob>,
    /// True if a pass must run now, because the ring has few free files or the last checkpoint failed.
    urgent: bool,
    /// Start of the last sync pass.
    last_pass: Option<Instant>,
    /// Number of recycling passes in succession that wrote a checkpoint and left no ring file free.
    passes_without_progress: u32,
    /// Sequence of the journal's next frame at the last check, and the time of the check that found this sequence
    /// first.
    journal_use: Option<(u64, Instant)>,
    is_stopped: bool,
}

/// A persist call that is served by a sync of the segments, for one of two reasons. Either its batches were not kept
/// for the journal or exceed a frame, or an earlier persist call of the replica is in the same queue.
pub(in crate::log) struct SyncJob {
    pub(super) replica: Arc<ReplicaInner>,
    pub(super) header: EntryHeader,
    pub(super) done: PersistCallback,
}

/// Next action of the sync thread.
pub(in crate::log) enum SyncAction {
    /// A pass of syncs.
    Pass,
    /// A write-out of the queued pieces.
    WriteOut,
    /// Exit of the thread, because the log stops.
    Stop,
}

impl SyncJob {
    /// Syncs the segments, and submits a `Synced` entry whose result goes to the caller. After an error the caller
    /// receives the error at once.
    pub(in crate::log) fn run(self) {
        let Self { replica, header, done } = self;
        match replica.sync().and_then(|()| replica.persist_result(&header)) {
            Ok(_) => {
                let client = replica.clone();
                let entry = JournalEntry { header, batches: Vec::new(), bytes: 0, client, done: Some(done) };
                replica.ctx.journal.submit(entry);
            }
            Err(error) => done(Err(error)),
        }
        let mut state = replica.state();
        state.queued_sync_jobs = state.queued_sync_jobs.saturating_sub(1);
    }
}

impl SyncQueue {
    pub(super) fn new(options: &LogOptions) -> Self {
        Self {
            due_bytes: options.sync_bytes.min(options.journal_bytes / RING_SHARE),
            max_due_bytes: options.journal_bytes / MAX_RING_SHARE,
            sync_after: options.sync_after,
            step_mode: options.step_mode,
            sim_hook: options.sim_hook.clone(),
            piece_bytes: AtomicUsize::new(PIECE_BYTES),
            state: Mutex::default(),
            wake: Condvar::new(),
        }
    }

    /// Called after an append of `bytes`, or with 0 after another change. Adds the replica to the queue unless it is
    /// queued, and requests a write-out if the replica has a full piece. Wakes the sync thread for the first change,
    /// when a pass becomes due, and, except in step mode, for a full piece.
    pub(super) fn push_dirty(&self, replica: &Arc<ReplicaInner>, bytes: u64) {
        let is_queued = replica.dirty.swap(true, Ordering::AcqRel);
        let unwritten_bytes = replica.unwritten_bytes.fetch_add(bytes, Ordering::AcqRel);
        let (piece_bytes, new_unwritten_bytes) = (self.piece_bytes() as u64, unwritten_bytes + bytes);
        // The size of a piece may change after this call. So above the current size, each further small piece requests
        // a write-out.
        let small_pieces = |bytes: u64| bytes / PIECE_BYTES as u64;
        let is_piece =
            new_unwritten_bytes >= piece_bytes && small_pieces(unwritten_bytes) != small_pieces(new_unwritten_bytes);
        let mut state = self.state.lock();
        if is_piece {
            state.pieces.push(replica.clone());
        }
        let was_due = self.is_due(&state);
        if !is_queued {
            state.dirty.push(replica.clone());
        }
        let is_first = state.dirty_since.is_none();
        if is_first {
            state.dirty_since = Some(clock::monotonic());
        }
        state.dirty_bytes += bytes;
        let is_due = self.is_due(&state);
        drop(state);
        // In step mode a step is a full pass, which a piece alone does not justify.
        if is_first || (is_piece && !self.step_mode) || (is_due && !was_due) {
            self.wake();
        }
    }

    /// Returns true if enough bytes are unsynced for a sync pass. Many dirty replicas raise the threshold, because a
    /// sync costs per file. The threshold never exceeds the share [`MAX_RING_SHARE`] of the journal's ring.
    fn is_due(&self, state: &SyncQueueState) -> bool {
        let min_bytes = (state.dirty.len() as u64 * MIN_SYNC_BYTES_PER_REPLICA).min(self.max_due_bytes);
        state.dirty_bytes >= self.due_bytes.max(min_bytes)
    }

    pub(super) fn push_job(&self, job: SyncJob) {
        self.state.lock().jobs.push_back(job);
        self.wake();
    }

    pub(in crate::log) fn pop_job(&self) -> Option<SyncJob> {
        self.state.lock().jobs.pop_front()
    }

    /// Requests a pass now, because the journal's ring has few free files.
    pub(in crate::log) fn request_pass(&self) {
        self.state.lock().urgent = true;
        self.wake();
    }

    /// Starts a pass: takes the dirty replicas out of the queue. The second value is true if the pass was requested
    /// ([`Self::request_pass`], [`Self::wait_for_retry`]) and not only due.
    pub(in crate::log) fn begin_pass(&self) -> (Vec<Arc<ReplicaInner>>, bool) {
        let mut state = self.state.lock();
        state.dirty_bytes = 0;
        state.dirty_since = None;
        state.last_pass = Some(clock::monotonic());
        (std::mem::take(&mut state.dirty), std::mem::take(&mut state.urgent))
    }

    /// Ends a pass that tried to release a file of the ring. `has_progress` is false if a checkpoint was written and no
    /// file is free afterwards.
    pub(in crate::log) fn end_pass(&self, has_progress: bool) {
        let mut state = self.state.lock();
        state.passes_without_progress = if has_progress { 0 } else { state.passes_without_progress.saturating_add(1) };
    }

    pub(in crate::log) fn passes_without_progress(&self) -> u32 {
        self.state.lock().passes_without_progress
    }

    /// Takes the replicas with a full piece out of the queue. Also sets the size of later pieces. The pieces are large
    /// if the journal's next frame has been `next_frame` for some time, so that no acknowledgement waits for the
    /// device.
    pub(in crate::log) fn take_pieces(&self, next_frame: u64) -> Vec<Arc<ReplicaInner>> {
        let now = clock::monotonic();
        let mut state = self.state.lock();
        let since = match state.journal_use {
            Some((last, since)) if last == next_frame => since,
            _ => now,
        };
        state.journal_use = Some((next_frame, since));
        let is_idle = now.saturating_duration_since(since) >= JOURNAL_IDLE_TIMEOUT;
        self.piece_bytes.store(if is_idle { LARGE_PIECE_BYTES } else { PIECE_BYTES }, Ordering::Relaxed);
        std::mem::take(&mut state.pieces)
    }

    pub(super) fn piece_bytes(&self) -> usize {
        self.piece_bytes.load(Ordering::Relaxed)
    }

    /// Waits until an action is due, and returns it.
    pub(in crate::log) fn next_action(&self) -> SyncAction {
        let mut state = self.state.lock();
        loop {
            if state.is_stopped {
                return SyncAction::Stop;
            }
            if state.urgent || !state.jobs.is_empty() {
                return SyncAction::Pass;
            }
            let now = clock::monotonic();
            let after = |since: Instant, wait: Duration| wait.saturating_sub(now.saturating_duration_since(since));
            // Time until the next pass; `None` if nothing is dirty.
            let remaining = match state.dirty_since {
                Some(_) if self.is_due(&state) => {
                    Some(state.last_pass.map_or(Duration::ZERO, |last| after(last, MIN_PASS_INTERVAL)))
                }
                Some(since) => Some(after(since, self.sync_after)),
                None => None,
            };
            state = match remaining {
                Some(remaining) if remaining.is_zero() => return SyncAction::Pass,
                _ if !state.pieces.is_empty() => return SyncAction::WriteOut,
                Some(remaining) => self.wake.wait_for(state, remaining),
                None => self.wake.wait(state),
            };
        }
    }

    /// Requests another pass after a failed one, and waits before it. The disk is probably full, so the retry comes
    /// soon, but not in a tight loop.
    pub(in crate::log) fn wait_for_retry(&self) {
        let mut state = self.state.lock();
        state.urgent = true;
        drop(self.wake.wait_while_for(state, |state| !state.is_stopped, CHECKPOINT_RETRY_INTERVAL));
    }

    /// Ends the sync thread after its current action.
    pub(in crate::log) fn stop(&self) {
        self.state.lock().is_stopped = true;
        self.wake.notify_all();
    }

    /// Drops the queued work after the sync thread has ended. Otherwise the queue would keep replicas in memory, and
    /// these the context that owns the queue.
    pub(in crate::log) fn clear(&self) {
        let queued = std::mem::take(&mut *self.state.lock());
        drop(queued);
    }

    /// Wakes the sync thread, or the driver of the steps.
    fn wake(&self) {
        self.wake.notify_all();
        if let Some(sim_hook) = &self.sim_hook {
            sim_hook.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_synced_by_a_share_of_the_ring() {
        for (journal_bytes, due) in [(512 << 20, 64 << 20), (16 << 20, 2 << 20), (1 << 30, 64 << 20)] {
            let queue = SyncQueue::new(&LogOptions { journal_bytes, ..LogOptions::default() });
            let state = |dirty_bytes| SyncQueueState { dirty_bytes, ..SyncQueueState::default() };
            assert!(!queue.is_due(&state(due - 1)) && queue.is_due(&state(due)));
        }
    }
}
