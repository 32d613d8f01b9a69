//! State shared by all replicas of a data directory: disk, options, open files, tail cache, journal and sync queue.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tokio::sync::Semaphore;

use super::{ReplicaInner, file_cache::FileCache, removed::RemovedFiles, sync_queue::SyncQueue, tail_cache::TailCache};
use crate::log::{
    disk::{Disk, budget::DiskBudget},
    error::{ChangeError, PersistError},
    format::{EntryHeader, ProducerMemory},
    journal::{Journal, JournalEntry, PersistCallback, StepDriver},
    options::LogOptions,
};

/// Maximum number of concurrent reads of segments. A started read completes and keeps its result in memory, even if its
/// caller was cancelled.
const MAX_DISK_READS: usize = 32;

/// State shared by all replicas of a data directory.
pub(in crate::log) struct LogContext {
    pub(in crate::log) disk: Arc<dyn Disk>,
    /// Path of the data directory.
    pub(in crate::log) dir: PathBuf,
    pub(in crate::log) options: LogOptions,
    /// Open segment files.
    pub(super) files: FileCache,
    /// Removed segment files whose disk space is freed in steps.
    pub(in crate::log) removed: RemovedFiles,
    pub(super) tail: TailCache,
    pub(super) producer_memory: ProducerMemory,
    pub(in crate::log) journal: Journal,
    pub(in crate::log) sync_queue: SyncQueue,
    pub(in crate::log) budget: Arc<DiskBudget>,
    /// Largest generation assigned so far.
    generation: AtomicU64,
    /// True after a close: writes are refused.
    closed: AtomicBool,
    /// Permits for reads of segments, each on a thread for blocking work.
    pub(super) disk_reads: Arc<Semaphore>,
    /// In step mode: the driver that runs steps while a caller waits.
    step_driver: OnceLock<Weak<dyn StepDriver>>,
}

impl LogContext {
    /// Returns the context of an opened data directory. `generation` is the largest generation assigned so far.
    pub(in crate::log) fn new(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: LogOptions,
        journal: Journal,
        budget: Arc<DiskBudget>,
        generation: u64,
    ) -> Self {
        Self {
            files: FileCache::new(disk.clone()),
            removed: RemovedFiles::new(if options.step_mode { 0 } else { disk.max_open_files() }),
            disk,
            dir: dir.to_owned(),
            tail: TailCache::new(options.tail_bytes),
            producer_memory: ProducerMemory::new(options.producer_bytes),
            journal,
            sync_queue: SyncQueue::new(&options),
            budget,
            options,
            generation: AtomicU64::new(generation),
            closed: AtomicBool::new(false),
            disk_reads: Arc::new(Semaphore::new(MAX_DISK_READS)),
            step_driver: OnceLock::new(),
        }
    }

    /// Sets the driver of the journal's steps, in step mode.
    pub(in crate::log) fn set_step_driver(&self, driver: Weak<dyn StepDriver>) {
        drop(self.step_driver.set(driver));
    }

    /// Refuses appends and all other writes from now on. Returns false if the log was closed already.
    pub(in crate::log) fn close(&self) -> bool {
        !self.closed.swap(true, Ordering::AcqRel)
    }

    /// Returns the memory of the tail cache in bytes, its overhead included.
    pub(in crate::log) fn tail_bytes(&self) -> usize {
        self.tail.used()
    }

    /// Returns the bytes of producer state in memory.
    pub(in crate::log) fn producer_bytes(&self) -> usize {
        self.producer_memory.used_bytes()
    }

    /// Returns the largest generation assigned so far.
    pub(in crate::log) fn last_generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Assigns a generation that is larger than every earlier one of this data directory, and returns it.
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

    /// Submits an entry without batches to the journal, and does not wait for the result.
    pub(in crate::log) fn submit_unacked(&self, replica: &Arc<ReplicaInner>, header: EntryHeader) {
        self.journal.submit(JournalEntry {
            header,
            batches: Vec::new(),
            bytes: 0,
            client: replica.clone(),
            done: None,
        });
    }

    /// Checks that a change of a replica has space for `bytes` of files and for the two frames of its first entry and
    /// its completion. The check precedes every modification, because a partial change cannot be undone. Without space,
    /// marks the disk as full and fails with `DiskFull`.
    pub(super) fn check_change_space(&self, bytes: u64) -> Result<(), ChangeError> {
        if self.budget.has_change_space(bytes) && self.ensure_change_space() {
            return Ok(());
        }
        self.budget.on_full();
        Err(ChangeError::DiskFull)
    }

    /// Makes space for two more frames of the journal; returns false if there is none. In step mode writes the queued
    /// entries first, because nothing else runs a step while the caller waits. With threads the result is always true,
    /// because the writer thread waits until a journal file is free.
    fn ensure_change_space(&self) -> bool {
        self.step_driver().is_none_or(|driver| driver.ensure_change_space())
    }

    /// Returns the driver of the journal's steps; `None` with threads.
    fn step_driver(&self) -> Option<Arc<dyn StepDriver>> {
        self.step_driver.get().and_then(Weak::upgrade)
    }

    /// Submits an entry to the journal and waits until the entry is durable or failed: one sync.
    pub(super) fn commit(&self, replica: &Arc<ReplicaInner>, header: EntryHeader) -> Result<(), ChangeError> {
        self.commit_all([(replica, header)]).pop().expect("one entry has one outcome")
    }

    /// Submits entries to the journal and waits until each of them is durable or failed. Returns one result per entry,
    /// in order. The journal writes many entries in one frame.
    pub(in crate::log) fn commit_all<'a>(
        &self,
        entries: impl IntoIterator<Item = (&'a Arc<ReplicaInner>, EntryHeader)>,
    ) -> Vec<Result<(), ChangeError>> {
        let submit = |(replica, header): (&Arc<ReplicaInner>, EntryHeader)| {
            let (sender, receiver) = std::sync::mpsc::sync_channel(1);
            let done: PersistCallback = Box::new(move |result| drop(sender.send(result)));
            let client = replica.clone();
            self.journal.submit(JournalEntry { header, batches: Vec::new(), bytes: 0, client, done: Some(done) });
            receiver
        };
        let receivers: Vec<_> = entries.into_iter().map(submit).collect();
        let failed = |reason: &str| Err(ChangeError::Failed { reason: reason.to_owned() });
        // With threads, the wait below ends when the writer thread has completed the entry.
        let has_space = self.step_driver().is_none_or(|driver| {
            while self.journal.has_queued_entries() {
                if !driver.write_frame() {
                    return false;
                }
            }
            true
        });
        let outcome = |receiver: std::sync::mpsc::Receiver<_>| {
            // Without space, no step would ever complete the remaining entries.
            let received = if has_space { receiver.recv().ok() } else { receiver.try_recv().ok() };
            match received {
                // `Truncated` means that the entry is durable, and that a later change has replaced its generation.
                Some(Ok(_) | Err(PersistError::Truncated)) => Ok(()),
                Some(Err(error)) => failed(&error.to_string()),
                None if !has_space => failed("the journal has no space"),
                None => failed("the log is closed"),
            }
        };
        receivers.into_iter().map(outcome).collect()
    }

    /// Returns true if `bytes` may be appended, and deducts them from the append allowance.
    pub(super) fn reserve_append(&self, bytes: u64) -> bool {
        self.budget.reserve_append(bytes, || self.journal.unallocated_bytes())
    }
}
