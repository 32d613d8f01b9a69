//! The journal: one write and one sync for the entries of all partitions.
//!
//! A caller that needs durable data [`submit`](Journal::submit)s an item. One writer takes the queued items as one
//! frame ([`Journal::step`]). It writes the frame with one direct write to a preallocated file, and completes every
//! item, in order. Batching comes from the queue: while one frame is being written, the items of the next one gather.
//!
//! # Invariants
//!
//! - Frames are numbered without gaps, and a frame is written only after the previous one was synced.
//! - The first frame that the checkpoint of a running directory names is in the journal: [`Journal::begin`] writes one
//!   before the first of these checkpoints. So a lost journal, and one of another directory, is detected.
//! - A file is reused only after all its entries are synced in their segments and a checkpoint starts replay after it
//!   (`sync`).
//! - A failed write is final: every later item fails with the same reason, and appends are refused.
//!
//! # Crash
//!
//! The last frame may be torn. None of its items was completed, and replay drops the frame. An invalid frame before a
//! valid one is corruption, not a torn end: replay reports the replicas whose data it held.

pub(super) mod buffer;
pub(super) mod entry;
pub(super) mod replay;
pub(super) mod ring;

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use uuid::Uuid;

use self::{
    buffer::AlignedBuffer,
    entry::EntryHead,
    ring::{Current, Ring},
};
use super::{
    core::{Options, Stepper},
    error::PersistError,
    shared::Shared,
};
use crate::{model::Offset, record::Batch, task::clock, telemetry::Metrics};

/// Target size of a frame in bytes. Larger frames add latency but hardly any throughput. Every item waits for its
/// entire frame: a producer with all its batches in one frame sends nothing meanwhile.
const ENOUGH: usize = 512 << 10;

/// Callback that receives the persisted end or an error, once.
pub type Done = Box<dyn FnOnce(Result<Offset, PersistError>) + Send>;

/// One entry to write.
pub(super) struct Item {
    pub(super) head: EntryHead,
    pub(super) batches: Vec<Batch>,
    pub(super) bytes: usize,
    pub(super) replica: Arc<Shared>,
    pub(super) done: Option<Done>,
}

pub(super) struct Journal {
    directory: Uuid,
    round_bytes: usize,
    stepper: Option<Stepper>,
    queue: Mutex<Queue>,
    queued: Condvar,
    writer: Mutex<Writer>,
    pub(super) ring: Mutex<Ring>,
    /// Signalled when a ring file is released or created, or when the journal ends.
    pub(super) released: Condvar,
    /// Signalled when a ring file is entered, when the writer starts or stops waiting for one, and when the journal
    /// ends.
    entered: Condvar,
    /// Bytes that are written to the active file.
    position: AtomicU64,
    /// True if the writer waits for a file that is being created.
    awaited: AtomicBool,
    /// Time of the announcement of a close. From then on, waits for space are bounded.
    closing: OnceLock<Instant>,
    next_round: AtomicU64,
    failed: OnceLock<String>,
    metrics: Metrics,
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Item>,
    closed: bool,
}

struct Writer {
    current: Option<Current>,
    buffer: AlignedBuffer,
    /// Time since which the next frame has no space.
    stuck: Option<Instant>,
}

/// Space for the next frame.
pub(super) enum Room {
    /// No free file: segments must be synced first.
    NeedsFile,
    /// Space in the next file, which was entered.
    Entered,
    /// Space in the active file.
    Ready,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Journal {
    pub(super) fn new(directory: Uuid, ring: Ring, next_round: u64, options: &Options) -> Self {
        Self {
            directory,
            round_bytes: options.round_bytes,
            stepper: options.stepper.clone(),
            queue: Mutex::default(),
            queued: Condvar::new(),
            writer: Mutex::new(Writer { current: None, buffer: AlignedBuffer::default(), stuck: None }),
            ring: Mutex::new(ring),
            released: Condvar::new(),
            entered: Condvar::new(),
            position: AtomicU64::new(0),
            awaited: AtomicBool::new(false),
            closing: OnceLock::new(),
            next_round: AtomicU64::new(next_round),
            failed: OnceLock::new(),
            metrics: options.metrics.clone(),
        }
    }

    /// Returns the reason of the journal's failure, if any.
    pub(super) fn failed(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Returns the sequence of the next frame.
    pub(super) fn next_round(&self) -> u64 {
        self.next_round.load(Ordering::Acquire)
    }

    /// Queues an item. The writer calls its `done`. If the journal has failed or is closed, `done` is called at once.
    pub(super) fn submit(&self, item: Item) {
        let mut queue = lock(&self.queue);
        if !queue.closed && self.failed.get().is_none() {
            queue.items.push_back(item);
            drop(queue);
            self.queued.notify_one();
            if let Some(stepper) = &self.stepper {
                stepper.wake();
            }
            return;
        }
        drop(queue);
        let error = self.refusal();
        item.answer(Err(error));
    }

    fn refusal(&self) -> PersistError {
        match self.failed() {
            Some(reason) => PersistError::Failed { reason: reason.to_owned() },
            None => PersistError::Closed,
        }
    }

    /// Waits until an item is queued. Returns false if the journal is closed and the queue is empty.
    pub(super) fn wait(&self) -> bool {
        let queue = lock(&self.queue);
        let queue = self
            .queued
            .wait_while(queue, |queue| queue.items.is_empty() && !queue.closed)
            .unwrap_or_else(PoisonError::into_inner);
        !queue.items.is_empty()
    }

    /// Closes the journal: queued items are still written, and new ones are refused.
    pub(super) fn close(&self) {
        self.expect_close();
        lock(&self.queue).closed = true;
        self.queued.notify_all();
        // A thread that checks the ring before it waits has seen the close, or is waiting by now.
        drop(lock(&self.ring));
        self.released.notify_all();
        self.entered.notify_all();
    }

    /// Fails all items that are still queued, because no writer is left. The items hold replicas, which hold the
    /// journal.
    pub(super) fn abandon(&self) {
        let items = std::mem::take(&mut lock(&self.queue).items);
        items.into_iter().for_each(|item| item.answer(Err(self.refusal())));
    }

    /// Announces that the journal will be closed soon.
    pub(super) fn expect_close(&self) {
        self.closing.get_or_init(clock::monotonic);
    }

    /// Returns the time for which the next frame has had no space.
    pub(super) fn waits_for_room(&self) -> Duration {
        lock(&self.writer).stuck.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Returns the part of [`Self::waits_for_room`] that follows the announcement of a close.
    pub(super) fn waits_closing(&self) -> Duration {
        self.closing.get().map_or(Duration::ZERO, Instant::elapsed).min(self.waits_for_room())
    }

    pub(super) fn is_closed(&self) -> bool {
        lock(&self.queue).closed
    }

    /// Returns true if an item is queued.
    pub(super) fn pending(&self) -> bool {
        !lock(&self.queue).items.is_empty()
    }

    /// Makes space for the next frame in a file. Called by the writer only.
    pub(super) fn make_room(&self, prepare: &mut dyn FnMut() -> io::Result<bool>) -> io::Result<Room> {
        let needed = self.next_bytes() as u64;
        let mut writer = lock(&self.writer);
        let file_bytes = lock(&self.ring).file_bytes;
        if writer.current.as_ref().is_some_and(|current| current.position + needed <= file_bytes) {
            writer.stuck = None;
            return Ok(Room::Ready);
        }
        if let Some(next) = lock(&self.ring).advance(self.next_round())? {
            (writer.current, writer.stuck) = (Some(next), None);
            self.position.store(0, Ordering::Relaxed);
            self.entered.notify_all();
            return Ok(Room::Entered);
        }
        writer.stuck.get_or_insert_with(clock::monotonic);
        drop(writer);
        if prepare()? { self.make_room(&mut || Ok(false)) } else { Ok(Room::NeedsFile) }
    }

    /// Returns true if a frame of one entry and the next frame fit into the active file, or if a file is free.
    pub(super) fn has_room_for_two(&self) -> bool {
        let position = lock(&self.writer).current.as_ref().map(|current| current.position);
        let needed = (entry::round_bytes(1, 0) + self.next_bytes()) as u64;
        let ring = lock(&self.ring);
        ring.has_free() || position.is_some_and(|position| position + needed <= ring.file_bytes)
    }

    /// Waits until a file may be free, at most `at_most`.
    pub(super) fn wait_for_file(&self, at_most: Duration) {
        let none = |ring: &mut Ring| !ring.has_free() && !self.is_closed();
        let waited = self.released.wait_timeout_while(lock(&self.ring), at_most, none);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits until the ring needs another file. Returns false if the journal is closed or has failed.
    pub(super) fn wait_until_file_wanted(&self) -> bool {
        let ring = lock(&self.ring);
        let idle = |ring: &mut Ring| !ring.wants_file() && !self.has_ended();
        drop(self.entered.wait_while(ring, idle).unwrap_or_else(PoisonError::into_inner));
        !self.has_ended()
    }

    fn has_ended(&self) -> bool {
        self.is_closed() || self.failed().is_some()
    }

    /// Returns true if a file that is being created is not needed any longer.
    pub(super) fn wants_no_file(&self) -> bool {
        self.has_ended() && !self.awaited.load(Ordering::Acquire)
    }

    /// Sets whether the writer waits for the file that is being created.
    pub(super) fn await_file(&self, awaited: bool) {
        self.awaited.store(awaited, Ordering::Release);
        drop(lock(&self.ring));
        self.entered.notify_all();
    }

    /// Lets appends go first while the next file is created; `done` is the number of bytes created so far. Returns at
    /// once if the writer waits for the file, or if the active file fills faster than the next one is created.
    pub(super) fn give_way(&self, done: u64, at_most: Duration) {
        let hurried = |_: &mut Ring| self.has_ended() || self.awaited.load(Ordering::Acquire);
        if done < 2 * self.position.load(Ordering::Relaxed) {
            return;
        }
        let ring = lock(&self.ring);
        let waited = self.entered.wait_timeout_while(ring, at_most, |ring| !hurried(ring));
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Returns the number of items in the next frame, and their payload in bytes.
    fn next_round_items(&self, queue: &Queue) -> (usize, usize) {
        let (mut items, mut bytes) = (0, 0);
        for item in &queue.items {
            let more = item.bytes + entry::ENTRY_HEAD;
            if items > 0 && bytes + more > self.round_bytes.min(ENOUGH) {
                break;
            }
            items += 1;
            bytes += more;
        }
        (items, bytes - items * entry::ENTRY_HEAD)
    }

    fn next_bytes(&self) -> usize {
        let queue = lock(&self.queue);
        let (items, payload) = self.next_round_items(&queue);
        // Items that are queued meanwhile lengthen the frame, at most to its limit.
        entry::round_bytes(items, payload).max(entry::round_bytes(1, self.round_bytes))
    }

    /// Writes an empty frame. The checkpoint that starts replay at this frame then names an existing one, so a journal
    /// without it is recognised as another journal. [`Self::make_room`] must just have made the space.
    pub(super) fn begin(&self) -> io::Result<()> {
        let mut writer = lock(&self.writer);
        let Writer { current, buffer, .. } = &mut *writer;
        let current = current.as_mut().expect("there is room");
        let round = buffer.slice(entry::round_bytes(0, 0));
        let sequence = self.next_round();
        entry::encode(round, self.directory, sequence, std::iter::empty());
        current.file.write_durable(round, current.position)?;
        current.position += round.len() as u64;
        self.position.store(current.position, Ordering::Relaxed);
        self.next_round.store(sequence + 1, Ordering::Release);
        Ok(())
    }

    /// Writes one frame of queued items and completes them. [`Self::make_room`] must just have made the space.
    pub(super) fn step(&self) {
        let mut writer = lock(&self.writer);
        let items: Vec<Item> = {
            let mut queue = lock(&self.queue);
            let (count, _) = self.next_round_items(&queue);
            queue.items.drain(..count).collect()
        };
        if items.is_empty() {
            return;
        }
        let Writer { current, buffer, .. } = &mut *writer;
        let current = current.as_mut().expect("there is room");
        let payload = items.iter().map(|item| item.bytes).sum();
        let round = buffer.slice(entry::round_bytes(items.len(), payload));
        let sequence = self.next_round();
        entry::encode(round, self.directory, sequence, items.iter().map(|item| (&item.head, item.batches.as_slice())));
        let began = clock::monotonic();
        let written = current.file.write_durable(round, current.position);
        let serial = current.serial;
        match written {
            Ok(()) => {
                current.position += round.len() as u64;
                self.position.store(current.position, Ordering::Relaxed);
                self.metrics.journal_rounds.inc();
                self.metrics.journal_bytes.inc_by(round.len() as u64);
                self.metrics.journal_sync_seconds.observe(began.elapsed().as_secs_f64());
                self.next_round.store(sequence + 1, Ordering::Release);
                for item in &items {
                    item.replica.journaled(&item.head, serial);
                }
                drop(writer);
                for item in items {
                    let answer = item.replica.persisted_answer(&item.head);
                    item.answer(answer);
                }
            }
            Err(error) => {
                drop(writer);
                let mut queue = items;
                self.fail(&error);
                for item in queue.drain(..) {
                    item.answer(Err(self.refusal()));
                }
            }
        }
    }

    /// Fails the journal permanently, and fails all queued items with the reason.
    pub(super) fn fail(&self, error: &io::Error) {
        let reason = format!("the journal could not be written: {error}");
        if self.failed.set(reason).is_ok() {
            tracing::error!(%error, "the journal could not be written: this data directory takes no more writes");
        }
        let items = std::mem::take(&mut lock(&self.queue).items);
        for item in items {
            item.answer(Err(self.refusal()));
        }
        // Threads that wait for a file end their wait.
        drop(lock(&self.ring));
        self.entered.notify_all();
    }
}

impl Item {
    pub(super) fn answer(self, result: Result<Offset, PersistError>) {
        if let Some(done) = self.done {
            done(result);
        }
    }
}
