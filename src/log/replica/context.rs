//! State shared by all replicas of a data directory: disk, options, open files, tail cache, journal and sync queue.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::{sync::Semaphore, time::Instant};

use super::{file_cache::FileCache, removed::RemovedFiles, state::ReplicaInner, tail_cache::TailCache};
use crate::log::{
    disk::{Disk, budget::DiskBudget},
    error::{ChangeError, PersistError},
    format::{ProducerMemory, entry::EntryHeader},
    journal::{Journal, JournalEntry, PersistCallback, StepDriver},
    options::LogOptions,
};

/// Maximum number of concurrent reads of segments. A started read completes and keeps its result in memory, even if its
/// caller was cancelled.
pub(in crate::log) const MAX_DISK_READS: usize = 32;

/// Minimum unsynced bytes of a replica that justify a sync of its own.
const MIN_SYNC_BYTES_PER_REPLICA: u64 = 512 << 10;

/// Divisor of the journal's ring size: a segment sync is due after that share. Few ring files are then pinned by
/// unsynced data.
const RING_SHARE: u64 = 8;

pub(in crate::log) struct LogContext {
    pub(in crate::log) disk: Arc<dyn Disk>,
    pub(in crate::log) dir: PathBuf,
    pub(in crate::log) options: LogOptions,
    pub(in crate::log) files: FileCache,
    pub(in crate::log) removed: RemovedFiles,
    pub(in crate::log) tail: TailCache,
    pub(in crate::log) producer_memory: ProducerMemory,
    pub(in crate::log) journal: Journal,
    pub(in crate::log) generation: AtomicU64,
    pub(in crate::log) closed: AtomicBool,
    pub(in crate::log) budget: Arc<DiskBudget>,
    /// Held while a checkpoint is written and the ring files that it makes unnecessary are released. It keeps an older
    /// checkpoint from replacing a newer one.
    pub(in crate::log) recycling: Mutex<()>,
    /// Start of the current series of failed checkpoints, and the last error; `None` while checkpoints succeed.
    pub(in crate::log) checkpoint_error: Mutex<Option<(Instant, io::Error)>>,
    /// Size of one write-out of a segment, in bytes.
    pub(in crate::log) piece_bytes: AtomicUsize,
    /// Permits for reads of segments on other threads.
    pub(in crate::log) disk_reads: Arc<Semaphore>,
    pub(in crate::log) work: Mutex<SyncQueue>,
    pub(in crate::log) wake: Condvar,
    /// In step mode: the driver that runs steps while a caller waits.
    pub(in crate::log) step_driver: OnceLock<Weak<dyn StepDriver>>,
}

/// Queue of the sync thread.
#[derive(Default)]
pub(in crate::log) struct SyncQueue {
    pub(in crate::log) dirty: Vec<Arc<ReplicaInner>>,
    /// Replicas with a full piece to write out.
    pub(in crate::log) pieces: Vec<Arc<ReplicaInner>>,
    /// Sequence of the journal's next frame at the last check, and the time at which that sequence was last seen to
    /// change.
    pub(in crate::log) journal_use: Option<(u64, tokio::time::Instant)>,
    pub(in crate::log) dirty_bytes: u64,
    pub(in crate::log) since: Option<tokio::time::Instant>,
    /// Start of the last sync pass.
    pub(in crate::log) last_pass: Option<tokio::time::Instant>,
    pub(in crate::log) jobs: std::collections::VecDeque<SyncJob>,
    /// True if a pass must run now, because the ring has few free files.
    pub(in crate::log) urgent: bool,
    /// Number of completed passes since the ring last had a free file.
    pub(in crate::log) passes_without_progress: u32,
    pub(in crate::log) stopping: bool,
}

/// A persist call that is served by a sync of the segments. Its bytes exceed the journal's limit, or an earlier call of
/// the replica waits for such a sync.
pub(in crate::log) struct SyncJob {
    pub(in crate::log) replica: Arc<ReplicaInner>,
    pub(in crate::log) head: EntryHeader,
    pub(in crate::log) done: PersistCallback,
}

impl LogContext {
    pub(in crate::log) fn work(&self) -> MutexGuard<'_, SyncQueue> {
        self.work.lock()
    }

    /// Returns true if enough bytes are unsynced for a sync pass. Many dirty replicas raise the threshold, because a
    /// sync costs per file. The threshold never exceeds a quarter of the journal's ring, so that the ring keeps free
    /// files.
    pub(in crate::log) fn sync_is_due(&self, work: &SyncQueue) -> bool {
        let of_all = (work.dirty.len() as u64 * MIN_SYNC_BYTES_PER_REPLICA).min(self.options.journal_bytes / 4);
        work.dirty_bytes >= self.options.sync_bytes.min(self.options.journal_bytes / RING_SHARE).max(of_all)
    }

    pub(in crate::log) fn checkpoint_error(&self) -> MutexGuard<'_, Option<(Instant, io::Error)>> {
        self.checkpoint_error.lock()
    }

    /// Returns a generation larger than every earlier one of this data directory.
    pub(in crate::log) fn next_generation(&self) -> u64 {
        self.generation.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Returns the reason why this data directory accepts no writes, if any.
    pub(in crate::log) fn refusal(&self) -> Option<String> {
        if let Some(reason) = self.journal.failed() {
            return Some(reason.to_owned());
        }
        self.closed.load(Ordering::Acquire).then(|| "the log is closed".to_owned())
    }

    /// Submits an entry to the journal without waiting for the result.
    pub(in crate::log) fn submit_unacked(&self, replica: &Arc<ReplicaInner>, head: EntryHeader) {
        self.journal.submit(JournalEntry { head, batches: Vec::new(), bytes: 0, client: replica.clone(), done: None });
    }

    /// Checks that a change of a replica has space for `bytes` of files and for its two frames of the journal. The
    /// check precedes every modification, because a partial change cannot be undone.
    pub(in crate::log) fn check_change_space(&self, bytes: u64) -> Result<(), ChangeError> {
        if self.budget.has_change_space(bytes) && self.has_space_for_two_frames() {
            return Ok(());
        }
        self.budget.on_full();
        Err(ChangeError::DiskFull)
    }

    /// Returns true if the journal accepts two more frames. With threads the result is always true, because a thread
    /// waits until a journal file is free. In step mode nothing else runs a step while the caller waits.
    fn has_space_for_two_frames(&self) -> bool {
        self.step_driver().is_none_or(|driver| driver.ensure_change_space())
    }

    /// Returns the driver of the journal's steps; `None` with threads.
    fn step_driver(&self) -> Option<Arc<dyn StepDriver>> {
        self.step_driver.get().and_then(Weak::upgrade)
    }

    /// Submits an entry to the journal and waits until the entry is durable: one sync.
    pub(in crate::log) fn commit(&self, replica: &Arc<ReplicaInner>, head: EntryHeader) -> Result<(), ChangeError> {
        self.commit_all([(replica, head)]).pop().expect("one entry has one outcome")
    }

    /// Submits entries to the journal and waits until each of them is durable or failed. The journal takes many entries
    /// in one frame.
    pub(in crate::log) fn commit_all<'a>(
        &self,
        entries: impl IntoIterator<Item = (&'a Arc<ReplicaInner>, EntryHeader)>,
    ) -> Vec<Result<(), ChangeError>> {
        let submit = |(replica, head): (&Arc<ReplicaInner>, EntryHeader)| {
            let (sender, receiver) = std::sync::mpsc::sync_channel(1);
            let done: PersistCallback = Box::new(move |result| drop(sender.send(result)));
            let client = replica.clone();
            self.journal.submit(JournalEntry { head, batches: Vec::new(), bytes: 0, client, done: Some(done) });
            receiver
        };
        let receivers: Vec<_> = entries.into_iter().map(submit).collect();
        let failed = |reason: &str| Err(ChangeError::Failed { reason: reason.to_owned() });
        let has_space = self.step_driver().is_none_or(|driver| {
            while self.journal.pending() {
                if !driver.write_frame() {
                    return false;
                }
            }
            true
        });
        let outcome = |receiver: std::sync::mpsc::Receiver<_>| {
            let received = if has_space { receiver.recv().ok() } else { receiver.try_recv().ok() };
            match received {
                Some(Ok(_) | Err(PersistError::Truncated)) => Ok(()),
                Some(Err(error)) => failed(&error.to_string()),
                None if !has_space => failed("the journal has no space"),
                None => failed("the log is closed"),
            }
        };
        receivers.into_iter().map(outcome).collect()
    }

    /// Returns true if `bytes` may be appended, and deducts them from the append allowance.
    pub(in crate::log) fn reserve_append(&self, bytes: u64) -> bool {
        self.budget.reserve_append(bytes, || self.journal.unallocated_bytes())
    }

    /// Wakes the sync thread, or the driver of the steps.
    pub(in crate::log) fn wake_syncer(&self) {
        self.wake.notify_all();
        if let Some(sim_hook) = &self.options.sim_hook {
            sim_hook.wake();
        }
    }

    /// Requests a sync of the segments now, because the journal's ring has few free files.
    pub(in crate::log) fn request_sync_now(&self) {
        self.work().urgent = true;
        self.wake_syncer();
    }
}
