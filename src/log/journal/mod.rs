//! The journal: one write and one sync for the entries of all partitions.
//!
//! A caller that needs durable data [`submit`](Journal::submit)s an entry. One writer takes the queued entries as one
//! frame ([`Journal::write_frame`]). It writes the frame with one direct write to a preallocated file, and completes
//! every entry, in order. Batching comes from the queue: while one frame is being written, the entries of the next
//! frame wait in the queue.
//!
//! # Invariants
//!
//! - Frames are numbered without gaps, and a frame is written only after the previous one was synced.
//! - The first frame that the checkpoint of a running directory names is in the journal: [`Journal::begin`] writes one
//!   before the first of these checkpoints. So a lost journal, and one of another directory, is detected.
//! - A file is reused only after no replica needs its entries and a checkpoint starts replay after the file
//!   (`data_dir/sync`).
//! - A failed write is final: every later entry fails with the same reason, and appends are refused.
//!
//! # Crash
//!
//! The last frame may be torn. None of its entries was completed, and replay drops the frame. An invalid frame before a
//! valid one is corruption, not a torn end. Replay reports the replicas whose data the frame held, or a loss of unknown
//! replicas if the headers of the frame are invalid too.

mod preallocate;
pub(super) mod replay;
pub(super) mod ring;
mod thread;

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use uuid::Uuid;

use self::{
    ring::{ActiveFile, AlignedBuffer, Ring},
    thread::FrameSpace,
};
use crate::{
    log::{
        disk::budget::DiskBudget,
        error::PersistError,
        format::{EntryHeader, entry},
        options::{LogOptions, SimHook},
    },
    model::Offset,
    record::Batch,
    task::{
        clock,
        lock::{Condvar, Mutex},
    },
    telemetry::Metrics,
};

/// Target size of a frame in bytes. Larger frames add latency but hardly any throughput. Every entry waits for
/// its entire frame: a producer with all its batches in one frame sends nothing meanwhile.
const TARGET_FRAME_BYTES: usize = 512 << 10;

/// Callback that receives the persisted end or an error, once.
pub type PersistCallback = Box<dyn FnOnce(Result<Offset, PersistError>) + Send>;

/// One entry to write.
pub(super) struct JournalEntry {
    pub(super) header: EntryHeader,
    /// Payload; empty unless the entry is an append.
    pub(super) batches: Vec<Batch>,
    /// Encoded length of `batches`.
    pub(super) bytes: usize,
    pub(super) client: Arc<dyn JournalClient>,
    /// Callback that receives the result; `None` if no caller waits for it.
    pub(super) done: Option<PersistCallback>,
}

/// The replica to which an entry belongs.
pub(super) trait JournalClient: Send + Sync {
    /// Updates the replica after an entry became durable in the journal file with the serial `file`. Called with the
    /// lock of the journal's writer held, for all entries of a frame before any of their results is passed on.
    fn on_journaled(&self, entry: &EntryHeader, file: u64);

    /// Returns the result for the caller that submitted the entry. Called without a lock of the journal.
    fn persist_result(&self, entry: &EntryHeader) -> Result<Offset, PersistError>;
}

/// The data directory, which syncs the segments so that journal files can be reused.
pub(super) trait JournalHost {
    /// Requests a sync pass soon, on another thread.
    fn request_sync(&self);

    /// Runs a sync pass on this thread. Returns false if the checkpoint could not be written, so that no file was
    /// released.
    fn run_sync_pass(&self) -> bool;

    /// Returns the reason why no sync pass will release a file, if any.
    fn check_stall(&self) -> Option<String>;
}

/// Driver of the journal while a caller waits for a result. Used in step mode only, where no thread runs.
pub(super) trait StepDriver: Send + Sync {
    /// Writes one frame. Returns false if nothing is queued, or if the journal has no space.
    fn write_frame(&self) -> bool;

    /// Writes the queued entries and makes space for the two frames of a change: its first entry and its completion.
    /// Returns false if there is no space.
    fn ensure_change_space(&self) -> bool;
}

/// The journal of a data directory. Callers queue entries, and one writer writes them.
pub(super) struct Journal {
    /// Id of the data directory, which every frame contains.
    directory: Uuid,
    max_frame_bytes: usize,
    sim_hook: Option<SimHook>,
    queue: Mutex<EntryQueue>,
    /// Signalled when an entry is queued, and at a close.
    queued: Condvar,
    writer: Mutex<WriterState>,
    ring: Mutex<Ring>,
    /// Held while a file is being created: one at a time.
    preallocating: Mutex<()>,
    budget: Arc<DiskBudget>,
    /// Signalled when a ring file is released or created, and at a close.
    released: Condvar,
    /// Signalled when a ring file becomes active, and when the journal is closed or fails.
    entered: Condvar,
    /// Time at which a close was announced. From then on, waits for space are bounded.
    closing: OnceLock<Instant>,
    /// Sequence of the next frame.
    next_frame: AtomicU64,
    /// Reason of the journal's failure, which is permanent.
    failed: OnceLock<String>,
    metrics: Metrics,
}

#[derive(Default)]
struct EntryQueue {
    entries: VecDeque<JournalEntry>,
    /// True after a close: new entries are refused.
    closed: bool,
}

struct WriterState {
    /// File that receives the next frame; `None` before the first frame of this process.
    current: Option<ActiveFile>,
    /// Memory in which frames are encoded.
    buffer: AlignedBuffer,
    /// Time since which the next frame has no space; `None` if it has space.
    no_space_since: Option<Instant>,
}

impl Journal {
    pub(super) fn new(
        directory: Uuid,
        ring: Ring,
        next_frame: u64,
        budget: Arc<DiskBudget>,
        options: &LogOptions,
    ) -> Self {
        Self {
            directory,
            max_frame_bytes: options.max_frame_bytes,
            sim_hook: options.sim_hook.clone(),
            queue: Mutex::default(),
            queued: Condvar::new(),
            writer: Mutex::new(WriterState { current: None, buffer: AlignedBuffer::default(), no_space_since: None }),
            ring: Mutex::new(ring),
            preallocating: Mutex::default(),
            budget,
            released: Condvar::new(),
            entered: Condvar::new(),
            closing: OnceLock::new(),
            next_frame: AtomicU64::new(next_frame),
            failed: OnceLock::new(),
            metrics: options.metrics.clone(),
        }
    }

    /// Returns the reason of the journal's failure, if any.
    pub(super) fn failed(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Returns the sequence of the next frame.
    pub(super) fn next_frame(&self) -> u64 {
        self.next_frame.load(Ordering::Acquire)
    }

    /// Queues an entry. The writer calls the entry's `done` later. If the journal has failed or is closed, `done`
    /// receives the error at once.
    pub(super) fn submit(&self, entry: JournalEntry) {
        let mut queue = self.queue.lock();
        if !queue.closed && self.failed.get().is_none() {
            queue.entries.push_back(entry);
            drop(queue);
            self.queued.notify_one();
            if let Some(sim_hook) = &self.sim_hook {
                sim_hook.wake();
            }
            return;
        }
        drop(queue);
        let error = self.refusal();
        entry.complete(Err(error));
    }

    /// Returns the error for entries that a failed or closed journal does not write.
    fn refusal(&self) -> PersistError {
        match self.failed() {
            Some(reason) => PersistError::Failed { reason: reason.to_owned() },
            None => PersistError::Closed,
        }
    }

    /// Waits until an entry is queued. Returns false if the journal is closed and the queue is empty.
    fn wait_for_entries(&self) -> bool {
        let has_none = |queue: &mut EntryQueue| queue.entries.is_empty() && !queue.closed;
        !self.queued.wait_while(self.queue.lock(), has_none).entries.is_empty()
    }

    /// Closes the journal: queued entries are still written, and new ones are refused.
    pub(super) fn close(&self) {
        self.begin_shutdown();
        self.queue.lock().closed = true;
        self.queued.notify_all();
        // Other threads check `closed` with the ring locked, before they wait. Each of them has now either seen the
        // close, or waits and is notified.
        drop(self.ring.lock());
        self.released.notify_all();
        self.entered.notify_all();
    }

    /// Fails all entries that are still queued after the writer has ended. A queued entry would otherwise keep its
    /// replica, and thereby the journal itself, in memory.
    pub(super) fn fail_queued(&self) {
        let entries = std::mem::take(&mut self.queue.lock().entries);
        entries.into_iter().for_each(|entry| entry.complete(Err(self.refusal())));
    }

    /// Announces that the journal will be closed soon. [`Self::closing_wait`] counts from the first call; later calls
    /// change nothing.
    pub(super) fn begin_shutdown(&self) {
        self.closing.get_or_init(clock::monotonic);
    }

    /// Returns the time for which the next frame has had no space; zero if it has space.
    pub(super) fn space_wait(&self) -> Duration {
        self.writer.lock().no_space_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Returns the time for which a close has waited for a free journal file. Returns zero if no close has begun or the
    /// next frame has space.
    pub(super) fn closing_wait(&self) -> Duration {
        self.closing.get().map_or(Duration::ZERO, Instant::elapsed).min(self.space_wait())
    }

    fn is_closed(&self) -> bool {
        self.queue.lock().closed
    }

    pub(super) fn has_queued_entries(&self) -> bool {
        !self.queue.lock().entries.is_empty()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.ring.lock().bytes()
    }

    /// Returns the bytes of the files that the ring requires and that do not exist yet.
    pub(super) fn unallocated_bytes(&self) -> u64 {
        self.ring.lock().unallocated_bytes()
    }

    /// Returns true if fewer than half of the ring's files are free or not yet created: segments should be synced now.
    pub(super) fn is_low(&self) -> bool {
        self.ring.lock().is_low()
    }

    pub(super) fn has_free_file(&self) -> bool {
        self.ring.lock().has_free()
    }

    /// Returns the serial of the oldest file in use; `None` while a file is free.
    pub(super) fn oldest_file(&self) -> Option<u64> {
        self.ring.lock().oldest()
    }

    /// Returns the sequence of the frame at which replay would start if all files with a serial below `keep` were
    /// released.
    pub(super) fn start_after(&self, keep: u64) -> u64 {
        self.ring.lock().start_after(keep, self.next_frame())
    }

    /// Releases the files that hold only frames below `first_frame`, except the active one.
    pub(super) fn release(&self, first_frame: u64) {
        self.ring.lock().release(first_frame);
        self.released.notify_all();
    }

    fn has_ended(&self) -> bool {
        self.is_closed() || self.failed().is_some()
    }

    /// Returns the number of queued entries that the next frame takes, and the bytes of their payloads. A frame takes
    /// at least one entry, even one above the target size.
    fn next_frame_entries(&self, queue: &EntryQueue) -> (usize, usize) {
        let (mut entries, mut bytes) = (0, 0);
        for entry in &queue.entries {
            let entry_bytes = entry.bytes + entry::ENTRY_HEADER_BYTES;
            if entries > 0 && bytes + entry_bytes > self.max_frame_bytes.min(TARGET_FRAME_BYTES) {
                break;
            }
            entries += 1;
            bytes += entry_bytes;
        }
        (entries, bytes - entries * entry::ENTRY_HEADER_BYTES)
    }

    /// Returns the maximum length of the next frame. Space for that many bytes is made before the frame is composed.
    fn max_next_frame_bytes(&self) -> usize {
        let queue = self.queue.lock();
        let (entries, payload) = self.next_frame_entries(&queue);
        // Entries that are queued before the frame is composed lengthen it, at most to its limit.
        entry::frame_len(entries, payload).max(entry::frame_len(1, self.max_frame_bytes))
    }

    /// Creates the first file if there is none, and writes an empty frame. The next checkpoint starts replay at this
    /// frame. A journal without the frame is then recognised as lost or as that of another directory. Fails with
    /// `StorageFull` if no file can be created.
    pub(super) fn begin(&self) -> io::Result<()> {
        if matches!(self.ensure_space()?, FrameSpace::NeedsFile) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut writer = self.writer.lock();
        let WriterState { current, buffer, .. } = &mut *writer;
        let current = current.as_mut().expect("`ensure_space` has entered a file");
        let frame = buffer.slice(entry::frame_len(0, 0));
        let sequence = self.next_frame();
        entry::encode(frame, self.directory, sequence, std::iter::empty());
        current.file.write_durable(frame, current.position)?;
        current.position += frame.len() as u64;
        self.next_frame.store(sequence + 1, Ordering::Release);
        Ok(())
    }

    /// Writes queued entries as one frame, and completes these entries. A failed write fails the journal. The caller
    /// has just made the space with [`Self::ensure_space`]. An empty queue writes nothing.
    fn write_frame(&self) {
        let mut writer = self.writer.lock();
        let entries: Vec<JournalEntry> = {
            let mut queue = self.queue.lock();
            let (count, _) = self.next_frame_entries(&queue);
            queue.entries.drain(..count).collect()
        };
        if entries.is_empty() {
            return;
        }
        let WriterState { current, buffer, .. } = &mut *writer;
        let current = current.as_mut().expect("`ensure_space` has entered a file");
        let payload = entries.iter().map(|entry| entry.bytes).sum();
        let frame = buffer.slice(entry::frame_len(entries.len(), payload));
        let sequence = self.next_frame();
        let encoded = entries.iter().map(|entry| (&entry.header, entry.batches.as_slice()));
        entry::encode(frame, self.directory, sequence, encoded);
        let began = clock::monotonic();
        let written = current.file.write_durable(frame, current.position);
        let serial = current.serial;
        match written {
            Ok(()) => {
                current.position += frame.len() as u64;
                self.metrics.journal_writes.inc();
                self.metrics.journal_bytes.inc_by(frame.len() as u64);
                self.metrics.journal_sync_seconds.observe(began.elapsed().as_secs_f64());
                self.next_frame.store(sequence + 1, Ordering::Release);
                for entry in &entries {
                    entry.client.on_journaled(&entry.header, serial);
                }
                drop(writer);
                for entry in entries {
                    let result = entry.client.persist_result(&entry.header);
                    entry.complete(result);
                }
            }
            Err(error) => {
                drop(writer);
                self.fail(&error);
                for entry in entries {
                    entry.complete(Err(self.refusal()));
                }
            }
        }
    }

    /// Fails the journal permanently, and fails all queued entries with the reason.
    pub(super) fn fail(&self, error: &io::Error) {
        let reason = format!("cannot write the journal: {error}");
        if self.failed.set(reason).is_ok() {
            let journal_dir = self.ring.lock().dir().to_owned();
            tracing::error!(
                journal_dir = %journal_dir.display(), %error,
                "cannot write the journal: this data directory accepts no more writes until a restart; remove the \
                 cause in \"error\", such as a failed disk, then restart the broker"
            );
        }
        let entries = std::mem::take(&mut self.queue.lock().entries);
        for entry in entries {
            entry.complete(Err(self.refusal()));
        }
        // Wakes the thread that creates files. With the ring locked once, that thread has either seen the failure, or
        // waits and is notified.
        drop(self.ring.lock());
        self.entered.notify_all();
    }
}

impl JournalEntry {
    /// Passes the result to the caller that submitted the entry, if that caller waits for one.
    pub(super) fn complete(self, result: Result<Offset, PersistError>) {
        if let Some(done) = self.done {
            done(result);
        }
    }
}
