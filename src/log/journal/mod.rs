//! The journal: one write and one sync for what all partitions handed over meanwhile.
//!
//! Whoever wants something durable [`submit`](Journal::submit)s an item. One writer takes all that is queued as one
//! round ([`Journal::step`]), writes it with one direct write to a preallocated file, and answers every item, in order.
//! Batching comes from the queue: while one round is being written the next gathers.
//!
//! # Invariants
//!
//! - Rounds are numbered without gaps, and a round is written only after the one before it was synced.
//! - The round that a checkpoint of a running directory names as the first is in the journal: [`Journal::begin`] writes
//!   one before the first of these checkpoints. So a journal that was lost, or is another directory's, is noticed.
//! - A file is used again only after everything in it is synced in its segment and a checkpoint says that replay begins
//!   later (`sync`).
//! - A failed write is final: every item from then on is answered with the reason, and appends are refused.
//!
//! # Crash
//!
//! The last round may be torn: none of its items was answered, and replay drops it whole. A round that does not check
//! while a later one does is damage, not a torn end: replay says whose data it held.

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

/// Bytes of a round that others do not join any more. The device takes more at once hardly faster, and whoever waits for a part of
/// it would wait for the whole: a producer that has all its batches in one round sends nothing meanwhile.
const ENOUGH: usize = 512 << 10;

/// Called once with the end of what is durable.
pub type Done = Box<dyn FnOnce(Result<Offset, PersistError>) + Send>;

/// One entry to be written.
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
    /// Signalled when a file of the ring was given up or made, or the journal ends.
    pub(super) released: Condvar,
    /// Signalled when a file of the ring was entered or is waited for, or the journal ends.
    entered: Condvar,
    /// Bytes of the file in use that are written.
    position: AtomicU64,
    /// Whether the writer waits for a file that is being made.
    awaited: AtomicBool,
    /// Since when it is to be closed soon: room is not waited for without an end any more.
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
    /// Since when the next round finds no room.
    stuck: Option<Instant>,
}

/// What a round needs before it can be written.
pub(super) enum Room {
    /// A free file: segments must be synced first.
    NeedsFile,
    /// Nothing: the next file was entered.
    Entered,
    /// Nothing.
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

    /// Why the journal takes nothing any more.
    pub(super) fn failed(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Sequence of the round to come.
    pub(super) fn next_round(&self) -> u64 {
        self.next_round.load(Ordering::Acquire)
    }

    /// Queues an item. Its `done` is called by the writer, or at once when the journal has failed or is closed.
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

    /// Waits until something is queued. False when the journal was closed and nothing is.
    pub(super) fn wait(&self) -> bool {
        let queue = lock(&self.queue);
        let queue = self
            .queued
            .wait_while(queue, |queue| queue.items.is_empty() && !queue.closed)
            .unwrap_or_else(PoisonError::into_inner);
        !queue.items.is_empty()
    }

    /// Ends the journal: what is queued is still written, nothing more is taken.
    pub(super) fn close(&self) {
        self.expect_close();
        lock(&self.queue).closed = true;
        self.queued.notify_all();
        // Whoever looks at the ring before it waits has seen the end, or waits by now.
        drop(lock(&self.ring));
        self.released.notify_all();
        self.entered.notify_all();
    }

    /// Answers what is still queued, which nobody writes any more: the replicas that it holds hold the journal.
    pub(super) fn abandon(&self) {
        let items = std::mem::take(&mut lock(&self.queue).items);
        items.into_iter().for_each(|item| item.answer(Err(self.refusal())));
    }

    /// Says that it is to be closed soon.
    pub(super) fn expect_close(&self) {
        self.closing.get_or_init(clock::monotonic);
    }

    /// For how long the next round has found no room.
    pub(super) fn waits_for_room(&self) -> Duration {
        lock(&self.writer).stuck.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// For how long of that it has been known that it is to be closed.
    pub(super) fn waits_closing(&self) -> Duration {
        self.closing.get().map_or(Duration::ZERO, Instant::elapsed).min(self.waits_for_room())
    }

    pub(super) fn is_closed(&self) -> bool {
        lock(&self.queue).closed
    }

    /// Whether something is queued.
    pub(super) fn pending(&self) -> bool {
        !lock(&self.queue).items.is_empty()
    }

    /// Makes sure that the next round has room in a file. Called by the writer only.
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

    /// Whether a round of one entry and then any other have room in the file in use, or in one that is free.
    pub(super) fn has_room_for_two(&self) -> bool {
        let position = lock(&self.writer).current.as_ref().map(|current| current.position);
        let needed = (entry::round_bytes(1, 0) + self.next_bytes()) as u64;
        let ring = lock(&self.ring);
        ring.has_free() || position.is_some_and(|position| position + needed <= ring.file_bytes)
    }

    /// Waits until a file may have been given up.
    pub(super) fn wait_for_file(&self, at_most: Duration) {
        let none = |ring: &mut Ring| !ring.has_free() && !self.is_closed();
        let waited = self.released.wait_timeout_while(lock(&self.ring), at_most, none);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits until the ring wants another file. False when the journal ends, or has failed.
    pub(super) fn wait_until_file_wanted(&self) -> bool {
        let ring = lock(&self.ring);
        let idle = |ring: &mut Ring| !ring.wants_file() && !self.has_ended();
        drop(self.entered.wait_while(ring, idle).unwrap_or_else(PoisonError::into_inner));
        !self.has_ended()
    }

    fn has_ended(&self) -> bool {
        self.is_closed() || self.failed().is_some()
    }

    /// Whether a file that is being made is not needed any more.
    pub(super) fn wants_no_file(&self) -> bool {
        self.has_ended() && !self.awaited.load(Ordering::Acquire)
    }

    /// Says whether the writer waits for the file that is being made.
    pub(super) fn await_file(&self, awaited: bool) {
        self.awaited.store(awaited, Ordering::Release);
        drop(lock(&self.ring));
        self.entered.notify_all();
    }

    /// For whoever makes the next file: lets the appends go first, unless the writer waits for it, or it would come too late because
    /// the one in use fills faster. `done` bytes of it are made.
    pub(super) fn give_way(&self, done: u64, at_most: Duration) {
        let hurried = |_: &mut Ring| self.has_ended() || self.awaited.load(Ordering::Acquire);
        if done < 2 * self.position.load(Ordering::Relaxed) {
            return;
        }
        let ring = lock(&self.ring);
        let waited = self.entered.wait_timeout_while(ring, at_most, |ring| !hurried(ring));
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// How many items the next round takes, and their payload in bytes.
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
        // What is queued meanwhile makes the round longer, at most to its bound.
        entry::round_bytes(items, payload).max(entry::round_bytes(1, self.round_bytes))
    }

    /// Writes a round of nothing. A checkpoint that says where replay begins names a round that is there for certain, so that a
    /// journal without it is known to be another one. There is room for it: [`Self::make_room`] was just called.
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

    /// Writes one round of what is queued and answers it. There is room for it: [`Self::make_room`] was just called.
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

    /// Stops the journal for good and answers everything that is queued with the reason.
    pub(super) fn fail(&self, error: &io::Error) {
        let reason = format!("the journal could not be written: {error}");
        if self.failed.set(reason).is_ok() {
            tracing::error!(%error, "the journal could not be written: this data directory takes no more writes");
        }
        let items = std::mem::take(&mut lock(&self.queue).items);
        for item in items {
            item.answer(Err(self.refusal()));
        }
        // Nobody waits for a file any more.
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
