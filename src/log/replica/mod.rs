//! The replicas of a data directory: their state, single writers, readers and syncs. This module calls the journal and
//! the disk, but neither the registry nor the threads of the data directory.
//!
//! [`ReplicaInner`] is shared by a replica's writer, its readers, the journal and the sync thread. The lock of its
//! [`LogState`] is held briefly, never across a call to the disk.

pub(super) mod context;
mod export;
mod file_cache;
mod reader;
mod removed;
pub(super) mod segment_files;
mod sync;
mod sync_queue;
mod tail_cache;
mod truncate;
mod writer;

use std::{
    collections::VecDeque,
    io,
    path::PathBuf,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;

pub use export::SegmentExport;
pub use reader::{LogReader, ReadLimits};
pub use writer::{ReplicaLog, StateRef};

pub(super) use sync_queue::SyncAction;

use self::{context::LogContext, tail_cache::ReplicaTail};
use crate::{
    log::{
        disk::OpenMode,
        error::PersistError,
        format::{
            EntryHeader, EntryKind, EpochHistory, Index, ProducerTable, ReplicaCheckpoint, Segment, SegmentFile,
            SegmentInfo, segment::name,
        },
        journal::JournalClient,
    },
    model::{Offset, PartitionId},
    task::lock::{Mutex, MutexGuard},
};

/// Complete batches. The concatenated chunks are their bytes. The first batch may start before the requested offset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadBatches {
    /// Bytes of the batches, in order.
    pub chunks: Vec<Bytes>,
    /// Offset after the last batch; the requested offset if there is none.
    pub next: Offset,
    /// Bytes in all chunks.
    pub bytes: usize,
}

impl ReadBatches {
    fn empty(from: Offset) -> Self {
        Self { chunks: Vec::new(), next: from, bytes: 0 }
    }
}

/// One replica, shared by its writer, its readers, the journal and the sync thread.
pub(super) struct ReplicaInner {
    id: PartitionId,
    dir: PathBuf,
    ctx: Arc<LogContext>,
    /// Source of an `Arc` of this replica for calls from the journal, which holds the replica as a trait object.
    weak_self: Weak<Self>,
    tail: Arc<ReplicaTail>,
    /// Reason why this replica accepts no writes: a failed write or sync, or its deletion. Unset while it accepts
    /// writes.
    failed: OnceLock<String>,
    /// True if a writer holds the replica.
    writer_open: AtomicBool,
    /// True if the replica is in the sync queue.
    dirty: AtomicBool,
    /// Bytes appended since the last write-out.
    unwritten_bytes: AtomicU64,
    /// Held while the files are being synced.
    syncing: Mutex<()>,
    state: Mutex<LogState>,
}

/// State of a replica under its lock.
struct LogState {
    /// Segments, never empty. Each starts at the end of the previous one; the last is active.
    segments: Vec<Segment>,
    /// First offset that can be read from any tier. The partition's task advances it, at most to the log end. A reset
    /// sets it to the new start.
    log_start: Offset,
    /// First offset that may not be durable. The journal and the sync thread advance it; a truncation or reset moves it
    /// back.
    persisted_end: Offset,
    epochs: Arc<EpochHistory>,
    producers: Arc<ProducerTable>,
    /// Partition time after which an idle producer is removed, in milliseconds. `None` until the topic's configuration
    /// is known, and for a topic without an expiration.
    producer_expiration_ms: Option<i64>,
    /// Index of the active segment; `None` until it is needed.
    index: Option<Index>,
    /// Number that grows with each truncation and reset, and at the deletion. An entry or a read with a lower
    /// generation began before the change.
    generation: u64,
    /// Start of the scan after a crash: all earlier data is synced in the segments.
    recovery: RecoveryPoint,
    /// Journal files that hold unsynced entries of this replica, by serial, oldest first. Each is paired with the end
    /// of the replica's last entry in the file. A sync of the segments up to that end releases the file. For a reset
    /// the end is `Offset::MAX`: the end of the reset releases the file.
    journal_pins: VecDeque<(u64, Offset)>,
    /// True if files were created or removed since the last sync of the directory.
    names_changed: bool,
    /// Record of the log before a reset; `None` if no reset is in progress. Checkpoints contain this record until the
    /// old files are removed and the new ones are synced.
    pre_reset_record: Option<Box<ReplicaCheckpoint>>,
    /// Number of persist calls that wait for a sync of the segments. Later calls queue behind them.
    queued_sync_jobs: u32,
}

/// Recovery point: all earlier data is synced. Includes the epoch history and producer state at that offset.
#[derive(Clone)]
struct RecoveryPoint {
    /// Segment that contains the point, as it was at the point.
    segment: SegmentInfo,
    epochs: Arc<EpochHistory>,
    producers: Arc<ProducerTable>,
}

impl LogState {
    fn active_segment(&self) -> &Segment {
        self.segments.last().expect("a log has an active segment")
    }

    fn active_mut(&mut self) -> &mut Segment {
        self.segments.last_mut().expect("a log has an active segment")
    }

    fn log_end(&self) -> Offset {
        self.active_segment().info.end
    }

    fn local_start(&self) -> Offset {
        self.segments.first().expect("a log has a segment").info.base
    }

    fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.info.bytes).sum()
    }

    /// Removes the epochs of offsets that are neither on this disk nor in the object store, except the last of these
    /// epochs. A replica that starts at the first remaining offset reports that epoch in its log position.
    fn remove_epochs(&mut self) {
        let first = self.log_start.min(self.local_start());
        if let Some(before) = first.get().checked_sub(1).and_then(Offset::new) {
            Arc::make_mut(&mut self.epochs).truncate_front(before);
        }
    }

    /// Removes the producers that have expired by the topic's configuration. Called after every change of the log end
    /// or of the expiration, and after a replacement of the table.
    fn remove_expired_producers(&mut self) {
        if self.producers.has_expired(self.producer_expiration_ms) {
            Arc::make_mut(&mut self.producers).remove_expired(self.producer_expiration_ms);
        }
    }

    /// Returns the recovery point at the log end.
    fn recovery_point(&self) -> RecoveryPoint {
        RecoveryPoint {
            segment: self.active_segment().info,
            epochs: self.epochs.clone(),
            producers: self.producers.clone(),
        }
    }
}

impl ReplicaInner {
    /// Creates a replica from its record. The recovery point is the end of the record's last segment.
    pub(super) fn new(ctx: &Arc<LogContext>, dir: PathBuf, record: ReplicaCheckpoint) -> Arc<Self> {
        let segments = record.segments.iter().map(|info| {
            let file = SegmentFile::new(ctx.files.new_serial(), &dir, info.base);
            // The bytes of the record are synced, or the next sync covers all of them. So a write-out starts after
            // them.
            file.written_out.store(info.bytes, Ordering::Relaxed);
            Segment { info: *info, file: Arc::new(file) }
        });
        let segments: Vec<_> = segments.collect();
        let (epochs, producers) =
            (Arc::new(record.epochs), Arc::new(Arc::unwrap_or_clone(record.producers).charged(&ctx.producer_memory)));
        let segment = segments.last().expect("a record has a segment").info;
        Arc::new_cyclic(|weak_self| Self {
            id: record.id,
            dir,
            ctx: ctx.clone(),
            weak_self: weak_self.clone(),
            tail: Arc::default(),
            failed: OnceLock::new(),
            writer_open: AtomicBool::new(false),
            dirty: AtomicBool::new(false),
            unwritten_bytes: AtomicU64::new(0),
            syncing: Mutex::new(()),
            state: Mutex::new(LogState {
                log_start: record.log_start,
                persisted_end: record.persisted.max(segment.end),
                epochs: epochs.clone(),
                producers: producers.clone(),
                producer_expiration_ms: None,
                index: None,
                generation: record.generation,
                recovery: RecoveryPoint { segment, epochs, producers },
                segments,
                journal_pins: VecDeque::new(),
                names_changed: false,
                pre_reset_record: None,
                queued_sync_jobs: 0,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, LogState> {
        self.state.lock()
    }

    /// Returns the reason why this replica accepts no writes, if any.
    fn refusal(&self) -> Option<String> {
        self.failed.get().cloned().or_else(|| self.ctx.refusal())
    }

    /// Ends writing to this replica permanently.
    fn fail(&self, reason: String) {
        tracing::error!(partition = %self.id, reason, "this replica accepts no more writes");
        drop(self.failed.set(reason));
    }

    /// Puts the replica into the sync queue. `bytes` is the number of bytes that were appended, 0 after another change.
    pub(super) fn mark_dirty(self: &Arc<Self>, bytes: u64) {
        self.ctx.sync_queue.push_dirty(self, bytes);
    }

    /// Returns the header of an entry without data, at the offset `at` and with the current generation.
    pub(super) fn marker(&self, kind: EntryKind, at: Offset) -> EntryHeader {
        self.entry_header(kind, self.state().generation, at, at)
    }

    /// Returns the header of an entry that names no segment.
    fn entry_header(&self, kind: EntryKind, generation: u64, base: Offset, end: Offset) -> EntryHeader {
        EntryHeader { kind, id: self.id, generation, base, end, segment: Offset::ZERO, position: 0, epoch: None }
    }

    /// Returns the record of the replica for a checkpoint, as of its recovery point. During a reset this is the record
    /// from before the reset.
    pub(super) fn checkpoint_record(&self) -> ReplicaCheckpoint {
        let state = self.state();
        if let Some(record) = &state.pre_reset_record {
            return (**record).clone();
        }
        let recovery = &state.recovery;
        let sealed = state.segments.iter().map(|segment| segment.info);
        let mut segments: Vec<_> = sealed.take_while(|info| info.base < recovery.segment.base).collect();
        segments.push(recovery.segment);
        ReplicaCheckpoint {
            id: self.id,
            generation: state.generation,
            log_start: state.log_start,
            persisted: state.persisted_end.max(recovery.segment.end),
            segments,
            epochs: (*recovery.epochs).clone(),
            producers: recovery.producers.clone(),
            refusal: None,
        }
    }

    pub(super) fn id(&self) -> PartitionId {
        self.id
    }

    /// Returns the reason why this replica accepts no writes (a failed write or sync, or its deletion), if any.
    /// Failures of the whole directory are not included.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Returns true if a writer holds the replica.
    pub(super) fn has_writer(&self) -> bool {
        self.writer_open.load(Ordering::Acquire)
    }

    /// Returns the bytes of the segments.
    pub(super) fn bytes(&self) -> u64 {
        self.state().bytes()
    }

    /// Returns true if the replica has not failed, and all its data is synced in the segments.
    pub(super) fn is_synced(&self) -> bool {
        let state = self.state();
        self.failed.get().is_none() && state.recovery.segment.end == state.log_end()
    }

    /// Returns the oldest journal file that this replica needs, and the offset up to which a sync releases the file.
    /// Returns `None` if the replica needs no journal file.
    pub(super) fn oldest_pin(&self) -> Option<(u64, Offset)> {
        self.state().journal_pins.front().copied()
    }

    /// Creates the file of the active segment, unsynced. Called when the replica is created.
    pub(super) fn create_file(&self) -> io::Result<()> {
        let file = self.state().active_segment().file.clone();
        self.ctx.disk.open(&file.path, OpenMode::Write)?;
        file.dirty.store(true, Ordering::Release);
        self.on_names_changed();
        Ok(())
    }

    /// Called when files were created or removed: the next sync covers their directory.
    pub(super) fn on_names_changed(&self) {
        self.state().names_changed = true;
    }

    /// Moves the recovery point and the persisted end back to those of the record `synced`. A scan has found data above
    /// the recovery point that may be unsynced, so the files from there on are marked as dirty.
    pub(super) fn move_recovery_point(&self, synced: ReplicaCheckpoint) {
        let segment = *synced.segments.last().expect("a record has a segment");
        let producers = Arc::unwrap_or_clone(synced.producers).charged(&self.ctx.producer_memory);
        let mut state = self.state();
        state.persisted_end = synced.persisted.max(segment.end);
        state.recovery = RecoveryPoint { segment, epochs: Arc::new(synced.epochs), producers: Arc::new(producers) };
        state.names_changed = true;
        for Segment { info, file } in &state.segments {
            file.dirty.store(info.base >= segment.base && info.bytes > 0, Ordering::Release);
        }
    }

    /// Prepares a deletion: refuses writes, removes the cached batches, and makes earlier journal entries void by a new
    /// generation.
    pub(super) fn begin_delete(&self) {
        drop(self.failed.set("the replica was deleted".to_owned()));
        self.ctx.tail.truncate(&self.tail, Offset::ZERO);
        sim_event!(LogChangeStarted { partition: self.id, to: Offset::ZERO, emptied: true });
        self.state().generation = self.ctx.next_generation();
    }

    /// Closes the segment files, except for their current readers.
    pub(super) fn close_files(&self) {
        let serials: Vec<u64> = self.state().segments.iter().map(|segment| segment.file.serial).collect();
        serials.into_iter().for_each(|serial| self.ctx.files.remove(serial));
    }

    /// Returns the path of the file of the segment at `base` with this extension.
    fn path(&self, base: Offset, extension: &str) -> PathBuf {
        self.dir.join(name(base, extension))
    }
}

impl JournalClient for ReplicaInner {
    fn on_journaled(&self, header: &EntryHeader, file: u64) {
        let mut state = self.state();
        if header.generation != state.generation {
            return;
        }
        let pins_before = state.journal_pins.len();
        if header.kind == EntryKind::Append {
            sim_event!(EntryJournaled { partition: self.id, file, end: header.end });
        }
        match header.kind {
            EntryKind::Append | EntryKind::Create => {
                if header.kind == EntryKind::Create || header.end > state.recovery.segment.end {
                    // The journal file stays until a sync of the segments reaches the end of this entry.
                    match state.journal_pins.back_mut() {
                        Some((last, end)) if *last == file => *end = header.end,
                        _ => state.journal_pins.push_back((file, header.end)),
                    }
                }
                state.persisted_end = state.persisted_end.max(header.end);
            }
            EntryKind::Synced => state.persisted_end = state.persisted_end.max(header.end),
            // Only the end of the reset releases this file: no sync covers `Offset::MAX`.
            EntryKind::Reset => state.journal_pins.push_back((file, Offset::MAX)),
            // The other kinds make no data durable and need no sync of segments.
            _ => {}
        }
        let has_new_pin = state.journal_pins.len() > pins_before;
        drop(state);
        if has_new_pin
            && !self.dirty.load(Ordering::Acquire)
            && let Some(replica) = self.weak_self.upgrade()
        {
            // The sync pass that covers the entry's data has already run. Only another pass releases the journal file.
            replica.mark_dirty(0);
        }
    }

    fn persist_result(&self, header: &EntryHeader) -> Result<Offset, PersistError> {
        let state = self.state();
        if header.generation == state.generation { Ok(state.persisted_end) } else { Err(PersistError::Truncated) }
    }
}
