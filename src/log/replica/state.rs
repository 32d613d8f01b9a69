//! State shared by a replica's writer, its readers, the journal and the sync thread. The lock is held briefly, never
//! across a call to the disk.

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, MutexGuard};

use super::{context::LogContext, tail_cache::ReplicaTail};
use crate::{
    log::{
        disk::PIECE_BYTES,
        error::PersistError,
        format::{
            checkpoint::ReplicaCheckpoint,
            entry::{EntryHeader, EntryKind},
            epochs::EpochHistory,
            index::Index,
            producers::ProducerTable,
            segment::{Segment, SegmentFile, SegmentInfo, name},
        },
        journal::JournalClient,
    },
    model::{Offset, PartitionId},
    task::clock,
};

pub(in crate::log) struct ReplicaInner {
    pub(in crate::log) id: PartitionId,
    pub(in crate::log) dir: PathBuf,
    pub(in crate::log) ctx: Arc<LogContext>,
    /// The journal holds the replica as a trait object, from which no `Arc` of the replica follows.
    weak_self: Weak<Self>,
    pub(in crate::log) tail: Arc<ReplicaTail>,
    /// Reason why this replica accepts no writes.
    pub(in crate::log) failed: OnceLock<String>,
    /// True if a writer holds the replica.
    pub(in crate::log) writer_open: AtomicBool,
    /// True if the replica is in the sync queue.
    pub(in crate::log) dirty: AtomicBool,
    /// Bytes appended since the last write-out.
    pub(in crate::log) unwritten_bytes: AtomicU64,
    /// Held while the files are being synced.
    pub(in crate::log) syncing: Mutex<()>,
    pub(in crate::log) state: Mutex<LogState>,
}

pub(in crate::log) struct LogState {
    /// Segments, never empty. Each starts at the end of the previous one; the last is active.
    pub(in crate::log) segments: Vec<Segment>,
    /// First offset that can be read from any tier. The leader of the partition advances it.
    pub(in crate::log) log_start: Offset,
    /// First offset that may not be durable. The journal and the sync thread advance it; a truncation lowers it.
    pub(in crate::log) persisted_end: Offset,
    pub(in crate::log) epochs: Arc<EpochHistory>,
    pub(in crate::log) producers: Arc<ProducerTable>,
    /// Partition time after which an idle producer is removed, in milliseconds; `None` until the topic's configuration
    /// is known.
    pub(in crate::log) producer_expiration_ms: Option<i64>,
    /// Index of the active segment; `None` until it is needed.
    pub(in crate::log) index: Option<Index>,
    /// Number that grows with each truncation and reset, which identifies operations from before such a change.
    pub(in crate::log) generation: u64,
    /// Start of the scan after a crash: all earlier data is synced in the segments.
    pub(in crate::log) recovery: RecoveryPoint,
    /// End of the last entry of this replica in each journal file that holds one, until that end is synced.
    pub(in crate::log) journal_pins: VecDeque<(u64, Offset)>,
    /// Bytes appended since the start of the last sync.
    pub(in crate::log) unsynced_bytes: u64,
    /// True if files were created or removed since the last sync of the directory.
    pub(in crate::log) names_changed: bool,
    /// Record of the log before a reset. Checkpoints hold it until the old files are removed and the new ones are
    /// synced.
    pub(in crate::log) pre_reset_record: Option<Box<ReplicaCheckpoint>>,
    /// Number of persist calls that wait for a sync of the segments. Later calls queue behind them.
    pub(in crate::log) syncing: u32,
}

/// Recovery point: all earlier data is synced. Includes the epoch history and producer state at that offset.
#[derive(Clone)]
pub(in crate::log) struct RecoveryPoint {
    /// Segment that contains the point, as it was at the point.
    pub(in crate::log) segment: SegmentInfo,
    pub(in crate::log) epochs: Arc<EpochHistory>,
    pub(in crate::log) producers: Arc<ProducerTable>,
}

impl LogState {
    pub(in crate::log) fn active(&self) -> &Segment {
        self.segments.last().expect("a log has an active segment")
    }

    pub(in crate::log) fn active_mut(&mut self) -> &mut Segment {
        self.segments.last_mut().expect("a log has an active segment")
    }

    pub(in crate::log) fn log_end(&self) -> Offset {
        self.active().info.end
    }

    pub(in crate::log) fn local_start(&self) -> Offset {
        self.segments.first().expect("a log has a segment").info.base
    }

    pub(in crate::log) fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.info.bytes).sum()
    }

    /// Removes the epochs of offsets that are neither on this disk nor in the object store, except the last of them. A
    /// replica that starts at this offset reports that epoch in its log position.
    pub(in crate::log) fn remove_epochs(&mut self) {
        let first = self.log_start.min(self.local_start());
        if let Some(before) = first.get().checked_sub(1).and_then(Offset::new) {
            Arc::make_mut(&mut self.epochs).forget_below(before);
        }
    }

    /// Removes producers by the topic's rule. Needed after every change of the log end, and after a replacement of the
    /// table.
    pub(in crate::log) fn remove_expired_producers(&mut self) {
        if self.producers.has_expired(self.producer_expiration_ms) {
            Arc::make_mut(&mut self.producers).remove_expired(self.producer_expiration_ms);
        }
    }

    /// Returns the recovery point at the log end.
    pub(in crate::log) fn recovery_point(&self) -> RecoveryPoint {
        RecoveryPoint { segment: self.active().info, epochs: self.epochs.clone(), producers: self.producers.clone() }
    }
}

impl ReplicaInner {
    /// Creates the state of a replica from its record.
    pub(in crate::log) fn new(ctx: &Arc<LogContext>, dir: PathBuf, record: ReplicaCheckpoint) -> Arc<Self> {
        let segments = record.segments.iter().map(|info| {
            let file = SegmentFile::new(ctx.files.serial(), &dir, info.base);
            // The creator of the record has synced these bytes, or syncs all of them next.
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
                unsynced_bytes: 0,
                names_changed: false,
                pre_reset_record: None,
                syncing: 0,
            }),
        })
    }

    pub(in crate::log) fn state(&self) -> MutexGuard<'_, LogState> {
        self.state.lock()
    }

    /// Returns the reason why this replica accepts no writes, if any.
    pub(in crate::log) fn refusal(&self) -> Option<String> {
        self.failed.get().cloned().or_else(|| self.ctx.refusal())
    }

    /// Ends writing to this replica permanently.
    pub(in crate::log) fn fail(&self, reason: String) {
        tracing::error!(partition = %self.id, reason, "this replica accepts no more writes");
        drop(self.failed.set(reason));
    }

    /// Puts the replica into the sync queue, and into the write-out queue if it has a full piece.
    pub(in crate::log) fn mark_dirty(self: &Arc<Self>, bytes: u64) {
        let listed = self.dirty.swap(true, Ordering::AcqRel);
        let unwritten_bytes = self.unwritten_bytes.fetch_add(bytes, Ordering::AcqRel);
        let (piece_bytes, after) = (self.ctx.piece_bytes.load(Ordering::Relaxed) as u64, unwritten_bytes + bytes);
        // The check repeats with each small piece, because the size of a piece changes.
        let is_piece = after >= piece_bytes && unwritten_bytes / PIECE_BYTES as u64 != after / PIECE_BYTES as u64;
        let mut work = self.ctx.work();
        if is_piece {
            work.pieces.push(self.clone());
        }
        let was_due = self.ctx.sync_is_due(&work);
        if !listed {
            work.dirty.push(self.clone());
        }
        let first = work.since.is_none();
        if first {
            work.since = Some(clock::monotonic());
        }
        work.dirty_bytes += bytes;
        let due = self.ctx.sync_is_due(&work);
        drop(work);
        // In step mode a step is a full pass, which a piece alone does not justify.
        if first || (is_piece && !self.ctx.options.step_mode) || (due && !was_due) {
            self.ctx.wake_syncer();
        }
    }

    pub(in crate::log) fn entry_header(
        &self,
        kind: EntryKind,
        generation: u64,
        base: Offset,
        end: Offset,
    ) -> EntryHeader {
        EntryHeader { kind, id: self.id, generation, base, end, segment: Offset::ZERO, position: 0, epoch: None }
    }

    /// Returns the record of the replica for a checkpoint.
    pub(in crate::log) fn checkpoint_record(&self) -> ReplicaCheckpoint {
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

    pub(in crate::log) fn path(&self, base: Offset, extension: &str) -> PathBuf {
        self.dir.join(name(base, extension))
    }
}

impl JournalClient for ReplicaInner {
    fn on_journaled(&self, head: &EntryHeader, file: u64) {
        let mut state = self.state();
        if head.generation != state.generation {
            return;
        }
        let pinned = state.journal_pins.len();
        if head.kind == EntryKind::Append {
            sim_event!(EntryJournaled { partition: self.id, file, end: head.end });
        }
        match head.kind {
            EntryKind::Append | EntryKind::Create => {
                if head.kind == EntryKind::Create || head.end > state.recovery.segment.end {
                    match state.journal_pins.back_mut() {
                        Some((last, end)) if *last == file => *end = head.end,
                        _ => state.journal_pins.push_back((file, head.end)),
                    }
                }
                state.persisted_end = state.persisted_end.max(head.end);
            }
            EntryKind::Synced => state.persisted_end = state.persisted_end.max(head.end),
            // No sync releases this file, only the completion of the reset.
            EntryKind::Reset => state.journal_pins.push_back((file, Offset::MAX)),
            _ => {}
        }
        let pins = state.journal_pins.len() > pinned;
        drop(state);
        if pins
            && !self.dirty.load(Ordering::Acquire)
            && let Some(replica) = self.weak_self.upgrade()
        {
            // The sync pass that the entry requested has already run. Only another pass releases the journal file.
            replica.mark_dirty(0);
        }
    }

    fn persist_result(&self, head: &EntryHeader) -> Result<Offset, PersistError> {
        let state = self.state();
        if head.generation == state.generation { Ok(state.persisted_end) } else { Err(PersistError::Truncated) }
    }
}
