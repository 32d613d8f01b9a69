//! What all replicas of a data directory share: its disk, options, open files, tail buffer, journal, and the list of
//! what is to be synced.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use tokio::{sync::Semaphore, time::Instant};

use super::{
    directory::Inner,
    disk::Disk,
    error::{ChangeError, PersistError},
    files::Files,
    journal::{Done, Item, Journal, entry::EntryHead},
    producer_memory::ProducerMemory,
    removed::RemovedFiles,
    shared::Shared,
    tail::Tail,
};
use crate::{limits, telemetry::Metrics};

/// Bytes that may be appended before the file system is asked again how much is free.
const GRANT: u64 = 4 << 20;

/// Reads of segments at a time. One that was begun goes on when its reader has gone, with what it read.
pub(super) const MAX_DISK_READS: usize = 32;

/// Bytes of one replica that are worth a sync of their own.
const WORTH_A_SYNC: u64 = 512 << 10;

/// A segment sync is due for this share of the journal's ring: few files of it are kept for what is not synced.
const RING_SHARE: u64 = 8;

/// What a user may choose about a data directory.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the journal's files together, when all are there. They are made as they are needed.
    pub journal_bytes: u64,
    /// Where the journal lies; in the data directory when not set. May be a device of its own.
    pub journal_dir: Option<PathBuf>,
    /// Go on where the journal of a directory that was not stopped cleanly is gone: what was in it alone is lost.
    pub accept_journal_loss: bool,
    /// Most bytes of one round: one write and one sync.
    pub round_bytes: usize,
    /// What is handed over at once beyond this is synced in its segment instead of being written twice.
    pub journal_most: usize,
    /// Bytes of the last batches of all partitions that are kept in memory.
    pub tail_bytes: usize,
    /// Bytes that the producer state of all replicas should take at most.
    pub producer_bytes: usize,
    /// Unsynced bytes of all segments together after which they are synced behind; an eighth of the journal's ring where that is less.
    /// Many, because each sync is a commit of the file system, which the journal's write waits for. The bytes themselves are written out
    /// long before.
    pub sync_bytes: u64,
    /// How long a segment stays unsynced at most, about.
    pub sync_after: std::time::Duration,
    /// Bytes of the disk that appends leave free, for what must be written before anything can be deleted: checkpoints, indexes,
    /// the metadata store beside the log.
    pub reserve_bytes: u64,
    /// Where rounds of the journal are counted.
    pub metrics: Metrics,
    /// No threads: [`Log::journal_step`](super::Log::journal_step) and [`Log::sync_step`](super::Log::sync_step) do their work.
    /// For the simulator.
    pub manual: bool,
    /// With `manual`: is woken when there may be something to do.
    pub stepper: Option<Stepper>,
}

/// Told that the journal or the segments may have something to do, where no threads see to it.
#[derive(Clone)]
pub struct Stepper(Arc<dyn Fn() + Send + Sync>);

impl Stepper {
    /// `wake` is called from anywhere, with locks held: it only wakes whoever does the steps.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(wake))
    }

    pub(super) fn wake(&self) {
        (self.0)();
    }
}

impl fmt::Debug for Stepper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stepper")
    }
}

impl Options {
    /// The journal's folder for a data directory.
    pub(super) fn journal_in(&self, dir: &Path) -> PathBuf {
        self.journal_dir.clone().unwrap_or_else(|| dir.join("journal"))
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            journal_bytes: 512 << 20,
            journal_dir: None,
            accept_journal_loss: false,
            round_bytes: 4 << 20,
            journal_most: 8 << 20,
            tail_bytes: 128 << 20,
            producer_bytes: 64 << 20,
            sync_bytes: 64 << 20,
            sync_after: std::time::Duration::from_secs(10),
            reserve_bytes: limits::MIN_FREE_DISK_BYTES,
            metrics: Metrics::new(),
            manual: false,
            stepper: None,
        }
    }
}

pub(super) struct Core {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) dir: PathBuf,
    pub(super) options: Options,
    pub(super) files: Files,
    pub(super) removed: RemovedFiles,
    pub(super) tail: Tail,
    pub(super) producer_memory: ProducerMemory,
    pub(super) journal: Journal,
    pub(super) generation: AtomicU64,
    pub(super) closed: AtomicBool,
    pub(super) disk_full: AtomicBool,
    /// Held while a checkpoint is written and what it makes needless is given up: a later one must not be replaced by an earlier one.
    pub(super) recycling: Mutex<()>,
    /// Since when checkpoints cannot be written, and why the last one could not, if so.
    pub(super) checkpoint_error: Mutex<Option<(Instant, io::Error)>>,
    /// Whether the reserve's file is there; made again when there is room.
    pub(super) reserved: AtomicBool,
    /// Bytes that may be appended without asking the file system.
    pub(super) granted: AtomicU64,
    /// Bytes of a segment that are written out at once.
    pub(super) piece_bytes: AtomicUsize,
    /// Reads of segments on other threads.
    pub(super) disk_reads: Arc<Semaphore>,
    pub(super) work: Mutex<Work>,
    pub(super) wake: Condvar,
    /// For `manual`: who does a step when something has to be waited for.
    pub(super) owner: OnceLock<Weak<Inner>>,
}

/// What the syncing thread has to do.
#[derive(Default)]
pub(super) struct Work {
    pub(super) dirty: Vec<Arc<Shared>>,
    /// Replicas with a piece to be written out.
    pub(super) pieces: Vec<Arc<Shared>>,
    /// The journal's next round when it was last looked at, and when it was last seen to have changed.
    pub(super) journal_use: Option<(u64, tokio::time::Instant)>,
    pub(super) dirty_bytes: u64,
    pub(super) since: Option<tokio::time::Instant>,
    /// When the last pass of syncs began.
    pub(super) last_pass: Option<tokio::time::Instant>,
    pub(super) jobs: std::collections::VecDeque<SyncJob>,
    /// The ring runs short.
    pub(super) urgent: bool,
    /// Whole passes since a file of the ring was free.
    pub(super) fruitless: u32,
    pub(super) stopping: bool,
}

/// Bytes too many for the journal: to be synced in their segments.
pub(super) struct SyncJob {
    pub(super) replica: Arc<Shared>,
    pub(super) head: EntryHead,
    pub(super) done: Done,
}

impl Core {
    pub(super) fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether enough was written for a pass of syncs. Where many replicas were written to it waits for more of each, because a
    /// sync costs by the file; never so long that the journal's ring runs short for it.
    pub(super) fn sync_is_due(&self, work: &Work) -> bool {
        let of_all = (work.dirty.len() as u64 * WORTH_A_SYNC).min(self.options.journal_bytes / 4);
        work.dirty_bytes >= self.options.sync_bytes.min(self.options.journal_bytes / RING_SHARE).max(of_all)
    }

    pub(super) fn checkpoint_error(&self) -> MutexGuard<'_, Option<(Instant, io::Error)>> {
        self.checkpoint_error.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number larger than every one before it in this data directory.
    pub(super) fn next_generation(&self) -> u64 {
        self.generation.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Why nothing can be written to this data directory.
    pub(super) fn refusal(&self) -> Option<String> {
        if let Some(reason) = self.journal.failed() {
            return Some(reason.to_owned());
        }
        self.closed.load(Ordering::Acquire).then(|| "the log is closed".to_owned())
    }

    /// Puts an entry into the journal without waiting.
    pub(super) fn note(&self, replica: &Arc<Shared>, head: EntryHead) {
        self.journal.submit(Item { head, batches: Vec::new(), bytes: 0, replica: replica.clone(), done: None });
    }

    /// Whether a change of a replica finds room for the `bytes` of its files and for its two rounds of the journal. Looked at before
    /// anything is changed: halfway there is no way back.
    pub(super) fn may_change(&self, bytes: u64) -> Result<(), ChangeError> {
        // A file system that does not say is written to until it refuses.
        let fits = self.disk.free_bytes(&self.dir).map_or(true, |free| free >= bytes);
        if fits && self.may_commit_twice() {
            return Ok(());
        }
        self.say_full();
        Err(ChangeError::DiskFull)
    }

    /// Whether the journal takes two more rounds. A thread waits until one of its files is free; by hand nobody else does a step meanwhile.
    fn may_commit_twice(&self) -> bool {
        let inner = self.owner.get().and_then(Weak::upgrade).filter(|_| self.options.manual);
        inner.is_none_or(|inner| inner.steps_ahead())
    }

    /// Says that the disk is full: once, until an append finds room again.
    pub(super) fn say_full(&self) {
        if !self.disk_full.swap(true, Ordering::Relaxed) {
            tracing::error!(path = %self.dir.display(), "the disk is full: appends are refused until there is room; add space, or lower local.retention.* or retention.*");
        }
    }

    /// Puts an entry into the journal and waits until it is durable: one sync.
    pub(super) fn commit(&self, replica: &Arc<Shared>, head: EntryHead) -> Result<(), ChangeError> {
        self.commit_all([(replica, head)]).pop().expect("one outcome of one entry")
    }

    /// Puts entries into the journal and waits until all are durable, or failed. The journal takes many in one round.
    pub(super) fn commit_all<'a>(
        &self,
        entries: impl IntoIterator<Item = (&'a Arc<Shared>, EntryHead)>,
    ) -> Vec<Result<(), ChangeError>> {
        let submit = |(replica, head): (&Arc<Shared>, EntryHead)| {
            let (sender, receiver) = std::sync::mpsc::sync_channel(1);
            let done: Done = Box::new(move |result| drop(sender.send(result)));
            let replica = replica.clone();
            self.journal.submit(Item { head, batches: Vec::new(), bytes: 0, replica, done: Some(done) });
            receiver
        };
        let receivers: Vec<_> = entries.into_iter().map(submit).collect();
        let failed = |reason: &str| Err(ChangeError::Failed { reason: reason.to_owned() });
        let inner = self.owner.get().and_then(Weak::upgrade).filter(|_| self.options.manual);
        let has_room = inner.is_none_or(|inner| {
            while self.journal.pending() {
                if !inner.journal_step() {
                    return false;
                }
            }
            true
        });
        let outcome = |receiver: std::sync::mpsc::Receiver<_>| {
            let received = if has_room { receiver.recv().ok() } else { receiver.try_recv().ok() };
            match received {
                Some(Ok(_) | Err(PersistError::Cut)) => Ok(()),
                Some(Err(error)) => failed(&error.to_string()),
                None if !has_room => failed("the journal has no room"),
                None => failed("the log is closed"),
            }
        };
        receivers.into_iter().map(outcome).collect()
    }

    /// Whether so many bytes may be appended and the reserve stays free. Without the reserve a log that filled its disk could
    /// not be helped: the commit that lets segments go needs room itself.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        let Options { reserve_bytes, .. } = self.options;
        let take = |granted: u64| granted.checked_sub(bytes);
        if reserve_bytes == 0 || self.granted.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).is_ok() {
            return true;
        }
        // A file system that does not say is written to until it refuses.
        let Ok(free) = self.disk.free_bytes(&self.dir) else { return true };
        let owed = self.journal.ring.lock().unwrap_or_else(PoisonError::into_inner).owed();
        let Some(left) = free.checked_sub(reserve_bytes + owed + bytes) else { return false };
        self.granted.store(left.min(GRANT), Ordering::Release);
        true
    }

    /// Says that there is something to sync.
    pub(super) fn wake_syncer(&self) {
        self.wake.notify_all();
        if let Some(stepper) = &self.options.stepper {
            stepper.wake();
        }
    }

    /// Asks for segments to be synced now, because the journal's ring runs short.
    pub(super) fn hurry(&self) {
        self.work().urgent = true;
        self.wake_syncer();
    }
}
