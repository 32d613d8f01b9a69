//! The journal: one write and one sync for the entries of all partitions.
//!
//! A caller that needs durable data [`submit`](Journal::submit)s an entry. One writer takes the queued entries as one
//! frame ([`Journal::write_frame`]). It writes the frame with one direct write to a preallocated file, and completes
//! every entry, in order. Batching comes from the queue: while one frame is being written, the entries of the next one
//! gather.
//!
//! # Invariants
//!
//! - Frames are numbered without gaps, and a frame is written only after the previous one was synced.
//! - The first frame that the checkpoint of a running directory names is in the journal: [`Journal::begin`] writes one
//!   before the first of these checkpoints. So a lost journal, and one of another directory, is detected.
//! - A file is reused only after all its entries are synced in their segments and a checkpoint starts replay after it
//!   (`sync`).
//! - A failed write is final: every later entry fails with the same reason, and appends are refused.
//!
//! # Crash
//!
//! The last frame may be torn. None of its entries was completed, and replay drops the frame. An invalid frame before a
//! valid one is corruption, not a torn end: replay reports the replicas whose data it held.

pub(super) mod buffer;
pub(super) mod preallocate;
pub(super) mod replay;
pub(super) mod ring;

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use tokio::time::Instant;
use uuid::Uuid;

use self::{
    buffer::AlignedBuffer,
    ring::{ActiveFile, Ring},
};
use crate::{
    log::{
        error::PersistError,
        format::entry::{self, EntryHeader},
        options::{LogOptions, SimHook},
        replica::state::ReplicaInner,
    },
    model::Offset,
    record::Batch,
    task::clock,
    telemetry::Metrics,
};

/// Target size of a frame in bytes. Larger frames add latency but hardly any throughput. Every entry waits for
/// its entire frame: a producer with all its batches in one frame sends nothing meanwhile.
const TARGET_FRAME_BYTES: usize = 512 << 10;

/// Callback that receives the persisted end or an error, once.
pub type PersistCallback = Box<dyn FnOnce(Result<Offset, PersistError>) + Send>;

/// One entry to write.
pub(super) struct JournalEntry {
    pub(super) head: EntryHeader,
    pub(super) batches: Vec<Batch>,
    pub(super) bytes: usize,
    pub(super) replica: Arc<ReplicaInner>,
    pub(super) done: Option<PersistCallback>,
}

pub(super) struct Journal {
    directory: Uuid,
    max_frame_bytes: usize,
    sim_hook: Option<SimHook>,
    queue: Mutex<EntryQueue>,
    queued: Condvar,
    writer: Mutex<WriterState>,
    pub(super) ring: Mutex<Ring>,
    /// Signalled when a ring file is released or created, or when the journal ends.
    pub(super) released: Condvar,
    /// Signalled when a ring file is entered, when the writer starts or stops waiting for one, and when the journal
    /// ends.
    entered: Condvar,
    /// Bytes that are written to the active file.
    position: AtomicU64,
    /// True if the writer waits for a file that is being created.
    writer_waiting: AtomicBool,
    /// Time of the announcement of a close. From then on, waits for space are bounded.
    closing: OnceLock<Instant>,
    next_frame: AtomicU64,
    failed: OnceLock<String>,
    metrics: Metrics,
}

#[derive(Default)]
struct EntryQueue {
    entries: VecDeque<JournalEntry>,
    closed: bool,
}

struct WriterState {
    current: Option<ActiveFile>,
    buffer: AlignedBuffer,
    /// Time since which the next frame has no space.
    no_space_since: Option<Instant>,
}

/// Space for the next frame.
pub(super) enum FrameSpace {
    /// No free file: segments must be synced first.
    NeedsFile,
    /// Space in the next file, which was entered.
    NewFile,
    /// Space in the active file.
    Available,
}

impl Journal {
    pub(super) fn new(directory: Uuid, ring: Ring, next_frame: u64, options: &LogOptions) -> Self {
        Self {
            directory,
            max_frame_bytes: options.max_frame_bytes,
            sim_hook: options.sim_hook.clone(),
            queue: Mutex::default(),
            queued: Condvar::new(),
            writer: Mutex::new(WriterState { current: None, buffer: AlignedBuffer::default(), no_space_since: None }),
            ring: Mutex::new(ring),
            released: Condvar::new(),
            entered: Condvar::new(),
            position: AtomicU64::new(0),
            writer_waiting: AtomicBool::new(false),
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

    /// Queues an entry. The writer calls its `done`. If the journal has failed or is closed, `done` is called at once.
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

    fn refusal(&self) -> PersistError {
        match self.failed() {
            Some(reason) => PersistError::Failed { reason: reason.to_owned() },
            None => PersistError::Closed,
        }
    }

    /// Waits until an entry is queued. Returns false if the journal is closed and the queue is empty.
    pub(super) fn wait_for_entries(&self) -> bool {
        let mut queue = self.queue.lock();
        self.queued.wait_while(&mut queue, |queue| queue.entries.is_empty() && !queue.closed);
        !queue.entries.is_empty()
    }

    /// Closes the journal: queued entries are still written, and new ones are refused.
    pub(super) fn close(&self) {
        self.begin_shutdown();
        self.queue.lock().closed = true;
        self.queued.notify_all();
        // A thread that checks the ring before it waits has seen the close, or is waiting by now.
        drop(self.ring.lock());
        self.released.notify_all();
        self.entered.notify_all();
    }

    /// Fails all entries that are still queued, because no writer is left. The entries hold replicas, which hold the
    /// journal.
    pub(super) fn fail_queued(&self) {
        let entries = std::mem::take(&mut self.queue.lock().entries);
        entries.into_iter().for_each(|entry| entry.complete(Err(self.refusal())));
    }

    /// Announces that the journal will be closed soon.
    pub(super) fn begin_shutdown(&self) {
        self.closing.get_or_init(clock::monotonic);
    }

    /// Returns the time for which the next frame has had no space.
    pub(super) fn space_wait(&self) -> Duration {
        self.writer.lock().no_space_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Returns the part of [`Self::space_wait`] that follows the announcement of a close.
    pub(super) fn closing_wait(&self) -> Duration {
        self.closing.get().map_or(Duration::ZERO, Instant::elapsed).min(self.space_wait())
    }

    pub(super) fn is_closed(&self) -> bool {
        self.queue.lock().closed
    }

    /// Returns true if an entry is queued.
    pub(super) fn pending(&self) -> bool {
        !self.queue.lock().entries.is_empty()
    }

    /// Makes space for the next frame in a file. Called by the writer only.
    pub(super) fn ensure_space(&self, prepare: &mut dyn FnMut() -> io::Result<bool>) -> io::Result<FrameSpace> {
        let needed = self.next_bytes() as u64;
        let mut writer = self.writer.lock();
        let file_bytes = self.ring.lock().file_bytes;
        if writer.current.as_ref().is_some_and(|current| current.position + needed <= file_bytes) {
            writer.no_space_since = None;
            return Ok(FrameSpace::Available);
        }
        if let Some(next) = self.ring.lock().advance(self.next_frame())? {
            (writer.current, writer.no_space_since) = (Some(next), None);
            self.position.store(0, Ordering::Relaxed);
            self.entered.notify_all();
            return Ok(FrameSpace::NewFile);
        }
        writer.no_space_since.get_or_insert_with(clock::monotonic);
        drop(writer);
        if prepare()? { self.ensure_space(&mut || Ok(false)) } else { Ok(FrameSpace::NeedsFile) }
    }

    /// Returns true if a frame of one entry and the next frame fit into the active file, or if a file is free.
    pub(super) fn has_space_for_two_frames(&self) -> bool {
        let position = self.writer.lock().current.as_ref().map(|current| current.position);
        let needed = (entry::max_frame_bytes(1, 0) + self.next_bytes()) as u64;
        let ring = self.ring.lock();
        ring.has_free() || position.is_some_and(|position| position + needed <= ring.file_bytes)
    }

    /// Waits until a file may be free, at most `at_most`.
    pub(super) fn wait_for_file(&self, at_most: Duration) {
        let none = |ring: &mut Ring| !ring.has_free() && !self.is_closed();
        self.released.wait_while_for(&mut self.ring.lock(), none, at_most);
    }

    /// Waits until the ring needs another file. Returns false if the journal is closed or has failed.
    pub(super) fn wait_until_file_wanted(&self) -> bool {
        let idle = |ring: &mut Ring| !ring.wants_file() && !self.has_ended();
        self.entered.wait_while(&mut self.ring.lock(), idle);
        !self.has_ended()
    }

    fn has_ended(&self) -> bool {
        self.is_closed() || self.failed().is_some()
    }

    /// Returns true if a file that is being created is not needed any longer.
    pub(super) fn is_prealloc_cancelled(&self) -> bool {
        self.has_ended() && !self.writer_waiting.load(Ordering::Acquire)
    }

    /// Sets whether the writer waits for the file that is being created.
    pub(super) fn set_writer_waiting(&self, awaited: bool) {
        self.writer_waiting.store(awaited, Ordering::Release);
        drop(self.ring.lock());
        self.entered.notify_all();
    }

    /// Lets appends go first while the next file is created; `done` is the number of bytes created so far. Returns at
    /// once if the writer waits for the file, or if the active file fills faster than the next one is created.
    pub(super) fn yield_to_appends(&self, done: u64, at_most: Duration) {
        let is_urgent = |_: &mut Ring| self.has_ended() || self.writer_waiting.load(Ordering::Acquire);
        if done < 2 * self.position.load(Ordering::Relaxed) {
            return;
        }
        self.entered.wait_while_for(&mut self.ring.lock(), |ring| !is_urgent(ring), at_most);
    }

    /// Returns the number of entries in the next frame, and their payload in bytes.
    fn next_frame_entries(&self, queue: &EntryQueue) -> (usize, usize) {
        let (mut entries, mut bytes) = (0, 0);
        for entry in &queue.entries {
            let more = entry.bytes + entry::ENTRY_HEADER_BYTES;
            if entries > 0 && bytes + more > self.max_frame_bytes.min(TARGET_FRAME_BYTES) {
                break;
            }
            entries += 1;
            bytes += more;
        }
        (entries, bytes - entries * entry::ENTRY_HEADER_BYTES)
    }

    fn next_bytes(&self) -> usize {
        let queue = self.queue.lock();
        let (entries, payload) = self.next_frame_entries(&queue);
        // Entries that are queued meanwhile lengthen the frame, at most to its limit.
        entry::max_frame_bytes(entries, payload).max(entry::max_frame_bytes(1, self.max_frame_bytes))
    }

    /// Writes an empty frame. The checkpoint that starts replay at this frame then names an existing one, so a journal
    /// without it is recognised as another journal. [`Self::ensure_space`] must just have made the space.
    pub(super) fn begin(&self) -> io::Result<()> {
        let mut writer = self.writer.lock();
        let WriterState { current, buffer, .. } = &mut *writer;
        let current = current.as_mut().expect("`make_room` has entered a file");
        let frame = buffer.slice(entry::max_frame_bytes(0, 0));
        let sequence = self.next_frame();
        entry::encode(frame, self.directory, sequence, std::iter::empty());
        current.file.write_durable(frame, current.position)?;
        current.position += frame.len() as u64;
        self.position.store(current.position, Ordering::Relaxed);
        self.next_frame.store(sequence + 1, Ordering::Release);
        Ok(())
    }

    /// Writes one frame of queued entries and completes them. [`Self::ensure_space`] must just have made the space.
    pub(super) fn write_frame(&self) {
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
        let current = current.as_mut().expect("`make_room` has entered a file");
        let payload = entries.iter().map(|entry| entry.bytes).sum();
        let frame = buffer.slice(entry::max_frame_bytes(entries.len(), payload));
        let sequence = self.next_frame();
        let encoded = entries.iter().map(|entry| (&entry.head, entry.batches.as_slice()));
        entry::encode(frame, self.directory, sequence, encoded);
        let began = clock::monotonic();
        let written = current.file.write_durable(frame, current.position);
        let serial = current.serial;
        match written {
            Ok(()) => {
                current.position += frame.len() as u64;
                self.position.store(current.position, Ordering::Relaxed);
                self.metrics.journal_writes.inc();
                self.metrics.journal_bytes.inc_by(frame.len() as u64);
                self.metrics.journal_sync_seconds.observe(began.elapsed().as_secs_f64());
                self.next_frame.store(sequence + 1, Ordering::Release);
                for entry in &entries {
                    entry.replica.on_journaled(&entry.head, serial);
                }
                drop(writer);
                for entry in entries {
                    let result = entry.replica.persist_result(&entry.head);
                    entry.complete(result);
                }
            }
            Err(error) => {
                drop(writer);
                let mut queue = entries;
                self.fail(&error);
                for entry in queue.drain(..) {
                    entry.complete(Err(self.refusal()));
                }
            }
        }
    }

    /// Fails the journal permanently, and fails all queued entries with the reason.
    pub(super) fn fail(&self, error: &io::Error) {
        let reason = format!("cannot write the journal: {error}");
        if self.failed.set(reason).is_ok() {
            tracing::error!(%error, "cannot write the journal: this data directory accepts no more writes");
        }
        let entries = std::mem::take(&mut self.queue.lock().entries);
        for entry in entries {
            entry.complete(Err(self.refusal()));
        }
        // Threads that wait for a file end their wait.
        drop(self.ring.lock());
        self.entered.notify_all();
    }
}

impl JournalEntry {
    pub(super) fn complete(self, result: Result<Offset, PersistError>) {
        if let Some(done) = self.done {
            done(result);
        }
    }
}
